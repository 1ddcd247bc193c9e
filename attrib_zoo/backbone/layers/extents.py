"""Where in the image a grid lies: models that pad have cells beyond the image, those that crop pixels beyond the grid.

A map is enlarged to what its grid covers and then cut to the image. Padding (by an operator of torch, onto a canvas, by
concatenation), cutting by slices, and windows that tile without overlap (patch embeddings, merging, pooling) say
exactly what is covered. Overlapping windows have no clear edges: their cells are spread over the layer's whole input,
as in the papers; padding that is just what such a convolution needs belongs to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from attrib_zoo.masking import Extent

Size = tuple[int, int]
Span = tuple[float, float]

_PADDING = ("constant_pad_nd", "reflection_pad2d", "replication_pad2d")
_WINDOWS = ("aten.convolution.", "aten.max_pool2d", "aten.avg_pool2d.")
_PLACING = ("aten.slice.", "aten.copy_.", "aten.cat.")
_RESIZING = ("aten.upsample_", "adaptive_avg_pool2d", "adaptive_max_pool2d")


class Extents:
    """The part of the image that grids of each size cover, read off the operators of a pass.

    The first operator that produces a size decides, since later padding (for attention windows, say) is cut off again.
    Where both overlapping windows and tiles produce the same size (a shortcut), the overlapping ones decide.

    Args:
        image: (H, W).
    """

    def __init__(self, image: Size) -> None:
        self._image = image
        self._spans: dict[Size, tuple[Span, Span]] = {image: ((0.0, float(image[0])), (0.0, float(image[1])))}
        self._padded: dict[Size, tuple[Size, Size]] = {}  # the size before, and how much wider it became
        self._spread: set[Size] = {image}

    @property
    def pads(self) -> bool:
        """Whether some operator pads: by how much depends, as a rule, on the size of the images."""
        return bool(self._padded)

    def of(self, size: Size) -> Extent:
        """Top, bottom, left and right of the part that a grid covers, in heights and widths of the image."""
        (top, bottom), (left, right) = self._of(size)
        height, width = self._image
        return top / height, bottom / height, left / width, right / width

    def pixels(self, size: Size) -> Size:
        """How many rows and columns of pixels a grid covers, with those that the model added."""
        (top, bottom), (left, right) = self._of(size)
        return round(bottom - top), round(right - left)

    def see(self, operator: str, args: Sequence[Any], results: Sequence[Tensor]) -> None:
        """Record an operator that was applied to something made from the image."""
        if not results or results[0].ndim != 4:
            return
        if operator.startswith("aten.cat."):
            self._join(results[0], *args)
        if not args or not isinstance(args[0], Tensor) or args[0].ndim != 4:
            return
        given, made = args[0], results[0]
        if any(word in operator for word in _PADDING):
            self._pad(given, made, args[1])
        elif operator.startswith("aten.slice."):
            self._cut(given, made, *_bounds(*args[1:]))
        elif operator.startswith("aten.copy_."):
            self._place(args[1], given)
        elif any(word in operator for word in _WINDOWS):
            kernel, stride, padding = _window(operator, args)
            self._slide(_rows_and_columns(given), _rows_and_columns(made), kernel, stride, padding)
        elif any(word in operator for word in _RESIZING):
            self._set(_rows_and_columns(made), *self._of(_rows_and_columns(given)), spread=True)

    @staticmethod
    def concerns(operator: str) -> bool:
        """Whether :meth:`see` has a use for an operator of this name."""
        return operator.startswith(_PLACING) or any(w in operator for w in (*_PADDING, *_WINDOWS, *_RESIZING))

    def _of(self, size: Size) -> tuple[Span, Span]:
        """For a size that no operator produced (tokens merged by a reshape): that of the grid it came from."""
        if size in self._spans:
            return self._spans[size]
        known = list(self._spans)[::-1]
        h, w = size
        for whole in ([s for s in known if s == (2 * h, 2 * w)], [s for s in known if s in _doubles(size)]):
            if whole:
                return self._spans[whole[0]]
        return self._spans[self._image]

    def _set(self, size: Size, rows: Span, columns: Span, *, spread: bool = False) -> None:
        if size not in self._spans or (spread and size not in self._spread):
            self._spans[size] = rows, columns
        if spread:
            self._spread.add(size)

    def _pad(self, given: Tensor, made: Tensor, padding: Sequence[int]) -> None:
        pads = [*padding, 0, 0, 0, 0, 0, 0]
        last = len(padding) >= 6 and not (pads[0] or pads[1])  # (N, h, w, C)
        left, top = (pads[2], pads[4]) if last else (pads[0], pads[2])
        axes = (1, 2) if last else (2, 3)
        self._widen(_size(given, axes), _size(made, axes), (top, left))

    def _widen(self, before: Size, after: Size, at: Size) -> None:
        """A grid became part of a larger one, from this row and column on."""
        if before == after:
            return
        rows, columns = self._of(before)
        self._set(before, rows, columns)  # before a cut of a padded grid can produce it
        (top, left), (down, right) = at, (after[0] - at[0] - before[0], after[1] - at[1] - before[1])
        self._set(after, _widened(rows, before[0], top, down), _widened(columns, before[1], left, right))
        self._padded.setdefault(after, (before, (after[0] - before[0], after[1] - before[1])))

    def _place(self, source: Any, part: Tensor) -> None:
        """Copied into part of a canvas, which the strides of the part describe."""
        if not isinstance(source, Tensor) or source.ndim != 4 or source.shape[-2:] != part.shape[-2:]:
            return
        images, channels, rows, columns = part.stride()
        nested = rows >= columns > 0 and min(images, channels) > 0
        if not nested or _rows_and_columns(source) not in self._spans:
            return
        whole = images if channels < columns else channels  # what one image's plane, with or without channels, takes
        size = int(whole // rows), int(rows // columns)
        start = int(part.storage_offset() % whole // columns)
        at = start // size[1], start % size[1]
        if at[0] + part.shape[2] <= size[0] and at[1] + part.shape[3] <= size[1]:
            self._widen(_rows_and_columns(source), size, at)

    def _join(self, made: Tensor, parts: Sequence[Tensor], axis: int = 0) -> None:
        """Concatenated along rows or columns with what has no place in the image."""
        axis %= 4
        known = [i for i, part in enumerate(parts) if part.ndim == 4 and _rows_and_columns(part) in self._spans]
        if axis < 2 or len(known) != 1:
            return
        before = sum(part.shape[axis] for part in parts[: known[0]])
        self._widen(
            _rows_and_columns(parts[known[0]]),
            _rows_and_columns(made),
            (before, 0) if axis == 2 else (0, before),
        )

    def _cut(self, given: Tensor, made: Tensor, axis: int, start: int, step: int) -> None:
        axis %= 4
        for axes in ((2, 3), (1, 2)):
            before = _size(given, axes)
            if step == 1 and axis in axes and before in self._spans and _size(made, axes) != before:
                spans = list(self._spans[before])
                at, count = axes.index(axis), made.shape[axis]
                start = max(0, start + before[at] if start < 0 else start)
                spans[at] = _widened(spans[at], before[at], -start, start + count - before[at])
                self._set(_size(made, axes), *spans)
                return

    def _slide(
        self, before: Size, after: Size, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
    ) -> None:
        if tuple(stride) == (1, 1) and after in self._spans:
            return  # the size stays
        tiles = [k == s for k, s in zip(kernel, stride, strict=True)]
        inner, added = self._padded.get(before, (before, (0, 0)))
        exact, spread = self._of(before), list(self._of(before))
        for i in range(2):
            if padding[i] == 0 and 0 < added[i] < kernel[i]:  # "same" padding, by an operator of its own
                spread[i] = self._of(inner)[i]
        spans = [
            _widened(exact[i], before[i], padding[i], after[i] * stride[i] - before[i] - padding[i])
            if tiles[i]
            else spread[i]
            for i in range(2)
        ]
        leaves_out = any(k < s for k, s in zip(kernel, stride, strict=True))  # as shortcuts do: others decide
        self._set(after, *spans, spread=not any(tiles) and not leaves_out)


def _widened(span: Span, cells: int, before: int, after: int) -> Span:
    """The span of ``cells`` cells with more cells at both ends."""
    cell = (span[1] - span[0]) / cells
    return span[0] - before * cell, span[1] + after * cell


def _doubles(size: Size) -> set[Size]:
    """The sizes whose every second row and column give this size."""
    return {(2 * size[0] - i, 2 * size[1] - j) for i in (0, 1) for j in (0, 1)}


def _size(tensor: Tensor, axes: tuple[int, int]) -> Size:
    return tensor.shape[axes[0]], tensor.shape[axes[1]]


def _rows_and_columns(tensor: Tensor) -> Size:
    return _size(tensor, (2, 3))


def _bounds(axis: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> tuple[int, int, int]:
    return axis, start or 0, step


def _window(operator: str, args: Sequence[Any]) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """Kernel, stride and padding, each of rows and columns, of a convolution or pooling."""
    if "convolution" in operator:
        kernel, stride, padding, dilation = args[1].shape[2:], args[3], args[4], args[5]
        wide = [(k - 1) * d + 1 for k, d in zip(kernel, _two(dilation), strict=True)]
        return ([1, 1], [1, 1], [0, 0]) if args[6] else (wide, _two(stride), _two(padding))
    kernel = _two(args[1])
    stride = _two(args[2]) if len(args) > 2 and args[2] else kernel
    return kernel, stride, _two(args[3]) if len(args) > 3 else [0, 0]


def _two(value: Any) -> list[int]:
    listed = [value] if isinstance(value, int) else list(value)
    return listed * 2 if len(listed) == 1 else listed
