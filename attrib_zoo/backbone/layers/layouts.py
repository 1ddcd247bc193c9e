"""How the outputs of a traced pass hold maps, inferred from the spatial sizes that the pass went through."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from attrib_zoo.backbone.grid import Grid
from attrib_zoo.backbone.layers.trace import BATCH, Call, Output, Trace

MOST_PREFIX_TOKENS = 16  # no known model has more registers; more would let tokens pass for a smaller grid
_STRIDES = (16, 14, 32, 8, 4, 12, 7, 28)  # of patch embeddings, the most common first, since the first fit counts

Size = tuple[int, int]


def find_grids(trace: Trace) -> None:
    """Give each output of the trace that holds a map its grid, in execution order.

    Sizes seen last come first, since a layer's map most likely has the size of the last convolution or pooling, or the
    (h, w) that the model passed along.
    """
    # Beyond these counts a few tokens too many are rather a grid that was misread than registers.
    usual = {0, 1, getattr(trace.model, "num_prefix_tokens", 1)}
    seen = _Sizes(trace)
    pending = sorted(trace.sizes)[::-1]
    undecided: list[tuple[Call, Output]] = []
    for call in trace.calls():
        # Only sizes seen up to here: a later stage's grid must not explain the tokens of an earlier one.
        while pending and pending[-1][0] <= call.end:
            seen.add(pending.pop()[1])
        for output in call.outputs:
            if output.shape[0:1] != (BATCH,) or (output.node is None and not output.on_path):
                continue  # no batch, or none of the images: a table of positions has length 1 for any number of them
            if len(output.shape) == 3:
                _read_tokens(output, seen, usual)
            elif len(output.shape) == 4 and not _read_image(output, seen):
                undecided.append((call, output))
    _settle(undecided, trace)
    _undo_mask_units(trace)


def fits(size: Size, image: Size) -> bool:
    """More than one cell, no larger than the image, and of its aspect ratio to within one cell.

    Args:
        size: of a grid.
        image: pixels that the grid covers, (H, W): more than those of the image where the model pads it.
    """
    (h, w), (height, width) = size, image
    return h * w > 1 and 1 <= h <= height and 1 <= w <= width and abs(h * width - w * height) <= max(height, width)


class _Sizes:
    """Spatial sizes seen during the pass, the last first; then sizes that can be derived from them."""

    def __init__(self, trace: Trace) -> None:
        self._image, self._covered = trace.size, trace.extents.pixels
        self._seen: dict[Size, None] = {}

    def add(self, size: Size) -> None:
        if self.fits(size):
            self._seen.pop(size, None)  # moves it to the end: the age of a size is that of its last use
            self._seen[size] = None

    def fits(self, size: Size) -> bool:
        """See :func:`fits`."""
        return fits(size, self._covered(size))

    def __contains__(self, size: Size) -> bool:
        return size in self._seen

    def ranked(self) -> Iterator[tuple[int, Size]]:
        """``(0, size)`` for each size seen, then 1 for halves of them and 2 for what strides of the image give."""
        seen = list(self._seen)[::-1]
        yield from ((0, size) for size in seen)
        for h, w in seen:
            if self.fits(size := (-(-h // 2), -(-w // 2))):  # merging pads odd grids, so halves round up
                yield 1, size
        height, width = self._image
        yield from ((2, size) for s in _STRIDES if self.fits(size := (height // s, width // s)))


@dataclass(order=True, frozen=True)
class _Reading:
    """One way to read tokens; the smallest in sort order is the most likely."""

    derived: int
    channel_major: bool
    unusual: bool
    prefix: int
    age: int
    hw: Size


def _read_tokens(output: Output, seen: _Sizes, usual: set[int]) -> None:
    _, first, second = output.shape
    readings = [
        _Reading(derived, channel_major, prefix not in usual, prefix, age, hw)
        for age, (derived, hw) in enumerate(seen.ranked())
        for channel_major, length, channels in ((False, first, second), (True, second, first))
        if 0 <= (prefix := length - hw[0] * hw[1]) <= MOST_PREFIX_TOKENS and channels > 1
        # Each guess is allowed once: a size that was not seen, channels before tokens, or an unusual prefix. With two
        # of them almost any length would fit some grid.
        if prefix in usual or not (derived or channel_major)
        if not (derived and channel_major)
    ]
    if readings:
        best = min(readings)
        kind = "channel_tokens" if best.channel_major else "tokens"
        _set(output, Grid(kind, prefix=best.prefix, hw=best.hw), best.hw)
        seen.add(best.hw)  # the blocks that follow most likely keep it


def _read_image(output: Output, seen: _Sizes) -> bool:
    """Whether the layout is clear; an output that fits both layouts is left open."""
    _, first, second, third = output.shape
    axes = {"nchw": (second, third), "nhwc": (first, second)}
    fitting = {kind: hw for kind, hw in axes.items() if seen.fits(hw)}
    known = {kind: hw for kind, hw in fitting.items() if hw in seen}
    likely = known or fitting  # a width that happens to equal the channels fits too, but was rarely seen
    for kind, hw in likely.items():
        _set(output, Grid(kind), hw)
        return len(likely) == 1
    return True


def _settle(undecided: list[tuple[Call, Output]], trace: Trace) -> None:
    """Outputs that fit both layouts get the one that modules of the same class use elsewhere; in doubt NCHW."""
    if not undecided:
        return
    unclear = {id(output) for _, output in undecided}  # they were provisionally set to NCHW and must not vote
    votes: Counter[tuple[type[nn.Module], str]] = Counter(
        (type(call.module), output.grid.kind)
        for call in trace.calls()
        for output in call.outputs
        if output.grid is not None and not output.grid.is_tokens and id(output) not in unclear
    )
    for call, output in undecided:
        kind = type(call.module)
        if votes[kind, "nhwc"] > votes[kind, "nchw"]:
            _set(output, Grid("nhwc"), (output.shape[1], output.shape[2]))


def _set(output: Output, grid: Grid, hw: Size) -> None:
    output.grid, output.hw = grid, hw
    output.channels = output.shape[{"nchw": 1, "channel_tokens": 1, "nhwc": 3, "tokens": 2}[grid.kind]]


def _undo_mask_units(trace: Trace) -> None:
    """Tokens in mask-unit order (Hiera) get the permutation that the model itself would use to undo it.

    Such a model keeps ``reroll``, the inverse of its ``unroll``; an index tensor sent through it shows where each
    cell's token lies. Where that fails, the model's tokens are not read as maps at all: a scrambled map would still
    look like a map.
    """
    owner = next((m for m in trace.model.modules() if isinstance(getattr(m, "unroll", None), nn.Module)), None)
    if owner is None:
        return
    orders: dict[Size, tuple[int, ...] | None] = {}
    started = False
    for call in trace.calls():
        started = started or call.module is owner.unroll
        for output in call.outputs:
            if output.grid is None or not output.grid.is_tokens or not started:
                continue
            if output.hw not in orders:
                orders[output.hw] = _order(getattr(owner, "reroll", None), output.hw)
            order = orders[output.hw]
            regular = order is not None and output.grid.prefix == 0
            output.grid = Grid(output.grid.kind, hw=output.hw, permutation=order) if regular else None


def _order(reroll: object, hw: Size) -> tuple[int, ...] | None:
    """For each cell of the grid, the token that holds it at the depth where the grid has this size."""
    schedule = getattr(reroll, "schedule", None)
    if not isinstance(reroll, nn.Module) or not isinstance(schedule, dict):
        return None
    depth = next((depth for depth, (_, size) in schedule.items() if tuple(size) == hw), None)
    if depth is None:
        return None
    index = reroll.forward(torch.arange(hw[0] * hw[1]).view(1, -1, 1), depth)
    return tuple(index.flatten().tolist())
