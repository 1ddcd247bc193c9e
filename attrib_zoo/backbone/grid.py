"""Layouts as data: how a layer lays its feature map out, and the way there and back.

Everything above works on maps ``(N, C, h, w)``. A :class:`Grid` says where the cells of such a map lie in the layer's
output; a :class:`Tap` says which tensor of which layer is meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from attrib_zoo.errors import LayerError, OptionError

ATTENDED = "attended"
"""In a layer's label, ``"blocks.11.attn['attended']"``: see :attr:`Tap.attended`."""

KINDS = {
    "nchw": "(N, C, h, w)",
    "nhwc": "(N, h, w, C)",
    "tokens": "(N, prefix + h*w, C)",
    "channel_tokens": "(N, C, prefix + h*w)",
}


@dataclass(frozen=True)
class Grid:
    """The layout of one layer's output.

    Args:
        kind: ``"nchw"``, ``"nhwc"``, ``"tokens"`` (N, L, C) or ``"channel_tokens"`` (N, C, L).
        prefix: tokens before the patches (class, distillation, register tokens); they are no part of a map.
        hw: rows and columns of the patches. Needed to read tokens; a hint given with a layer may omit it where the
            patches have the image's aspect. For images it is optional, and checked.
        permutation: for tokens that are not in row-major order: entry ``i`` is the patch token (counted without the
            prefix) that holds cell ``i`` of the row-major grid.
    """

    kind: str = "nchw"
    prefix: int = 0
    hw: tuple[int, int] | None = None
    permutation: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise OptionError(f"grid: kind must be one of {', '.join(map(repr, KINDS))}, got {self.kind!r}")
        if self.prefix < 0:
            raise OptionError(f"grid: prefix must be 0 or more tokens, got {self.prefix}")
        if self.hw is not None:
            if len(self.hw) != 2 or min(self.hw) < 1:
                raise OptionError(f"grid: hw must be two positive sizes (h, w), got {self.hw}")
            object.__setattr__(self, "hw", (int(self.hw[0]), int(self.hw[1])))
        if not self.is_tokens and (self.prefix or self.permutation is not None):
            raise OptionError(f"grid: prefix and permutation belong to tokens, got kind={self.kind!r}; leave them out")
        if self.permutation is not None:
            object.__setattr__(self, "permutation", tuple(int(token) for token in self.permutation))
            if self.hw is None or sorted(self.permutation) != list(range(self.hw[0] * self.hw[1])):
                raise OptionError(
                    f"grid: permutation must name each of the h*w patch tokens once, got {len(self.permutation)} "
                    f"entries for hw={self.hw}"
                )

    @property
    def is_tokens(self) -> bool:
        """Whether the layer outputs a sequence rather than an image."""
        return self.kind in ("tokens", "channel_tokens")

    def to_map(self, activation: Tensor) -> Tensor:
        """The layer's output as a map ``(N, C, h, w)``; differentiable, a view where no order changes.

        Raises:
            LayerError: the activation has another shape than this layout.
        """
        self._check(activation)
        if self.kind == "nchw":
            return activation
        if self.kind == "nhwc":
            return activation.permute(0, 3, 1, 2)
        cells = self._channel_major(activation)[:, :, self.prefix :]
        if self.permutation is not None:
            cells = cells[:, :, torch.tensor(self.permutation, device=cells.device)]
        return cells.reshape(*cells.shape[:2], *self._sizes())

    def from_map(self, maps: Tensor, like: Tensor) -> Tensor:
        """A map ``(N, C, h, w)`` in the layer's own layout, dtype and strides; differentiable.

        Args:
            maps: the map to write back.
            like: the layer's own output for these N examples. Prefix tokens are taken from it.

        Raises:
            LayerError: ``like`` has another shape than this layout, or the map does not fit it.
        """
        own = self.to_map(like)
        if maps.shape != own.shape:
            raise LayerError(f"grid: the map must have shape {tuple(own.shape)} to replace it, got {tuple(maps.shape)}")
        maps = maps.to(like.dtype)
        if self.kind == "nchw":
            return _with_strides_of(like, maps)
        if self.kind == "nhwc":
            return _with_strides_of(like, maps.permute(0, 2, 3, 1))
        cells = maps.flatten(2)
        if self.permutation is not None:
            cells = cells[:, :, torch.tensor(self.permutation, device=cells.device).argsort()]
        if self.prefix:
            cells = torch.cat([self._channel_major(like)[:, :, : self.prefix], cells], dim=2)
        return _with_strides_of(like, self._channel_major(cells))

    def of_all_tokens(self) -> Grid:
        """The same tokens, with those before the patches, as one row of cells."""
        h, w = self._sizes()
        return Grid(self.kind, hw=(1, self.prefix + h * w))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain numbers, strings and lists, for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Grid:
        """The inverse of :meth:`to_dict`."""
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
        return cls(**fields)

    def _channel_major(self, tokens: Tensor) -> Tensor:
        """Swaps tokens and channels for the layout that needs it; its own inverse."""
        return tokens.transpose(1, 2) if self.kind == "tokens" else tokens

    def _sizes(self) -> tuple[int, int]:
        if self.hw is None:
            raise LayerError("grid: tokens need hw=(h, w) to be read as a map; give it, the rows first")
        return self.hw

    def _check(self, activation: Tensor) -> None:
        shape = tuple(activation.shape)
        if self.is_tokens:
            h, w = self._sizes()
            length = shape[1 if self.kind == "tokens" else 2] if len(shape) == 3 else -1
            if length == self.prefix + h * w:
                return
            must = f"{self.prefix} + {h}x{w} = {self.prefix + h * w} tokens"
        else:
            sizes = shape[2:] if self.kind == "nchw" else shape[1:3]
            if len(shape) == 4 and self.hw in (None, sizes):
                return
            must = "4 dimensions" if self.hw is None else f"{self.hw[0]}x{self.hw[1]} cells"
        raise LayerError(f"grid: {self.kind} {KINDS[self.kind]} must have {must}, got shape {shape}")


def _with_strides_of(like: Tensor, tensor: Tensor) -> Tensor:
    """The same values in the memory order of ``like``, because the layers that follow may take views of it."""
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)


@dataclass(frozen=True)
class Tap:
    """One tensor of one layer, resolved on a model and an input size.

    Attributes:
        name: dotted path of the layer in the unwrapped model.
        grid: how its output is laid out.
        channels: C of its map; of attention, H d, see ``attended``.
        element: which entry, where the layer outputs a tuple, list or dict.
        calls: how often the layer runs in one forward pass.
        call: which of these runs is meant, counted from 0, or from the end: -1 is the last.
        attended: the layer is an attention module, and the map is not its output but the values of the patches and the
            share of each that the class token takes:
            :func:`~attrib_zoo.backbone.vit.attended.values_and_shares`. It can be read, not replaced.
    """

    name: str
    grid: Grid
    channels: int
    element: int | str | None = None
    calls: int = 1
    call: int = -1
    attended: bool = False

    @property
    def label(self) -> str:
        """The name with the entry meant, ``"stage4[1]"``: what ``layers=`` takes for this output."""
        if self.attended:
            return f"{self.name}[{ATTENDED!r}]"
        return self.name if self.element is None else f"{self.name}[{self.element!r}]"
