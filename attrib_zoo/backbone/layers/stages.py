"""Which layers of a traced model stand for it: its stages or, in a plain transformer, its blocks.

There is no list of models: a module is opened while it holds several stages, or most of a network without stages. The
modules that then follow one another from the input to the outputs are the units, and the last unit of each grid ends a
stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.grid import Tap
from attrib_zoo.backbone.kind import embeds_patches
from attrib_zoo.backbone.layers.trace import Call, Output, Trace
from attrib_zoo.backbone.module import is_quantised

_SEVERAL_STAGES = 2.5  # one stage halves the grid at most
_HIERARCHICAL = 3  # grids; a plain transformer has one, or two with a convolutional stem
_SMALLEST_OPENED = 1 / 6  # of the weights: a smaller module that shrinks the grid is a stem
_MOST = 1 / 2
_LEAST = 1 / 100
_PROBED_UNITS = 3


@dataclass(frozen=True, eq=False)
class Item:
    """One output of one call, as a candidate."""

    call: Call
    output: Output

    @property
    def weighted(self) -> bool:
        """Whether it mixes channels or cells: the module has a weight matrix or kernel."""
        return _weighted(self.call)

    @property
    def is_tokens(self) -> bool:
        """Whether its map is a sequence."""
        return self.output.grid is not None and self.output.grid.is_tokens

    @property
    def place(self) -> tuple[int, int]:
        """Sorts items by the order of execution."""
        return self.call.end, [output.element for output in self.call.outputs].index(self.output.element)

    def tap(self, trace: Trace) -> Tap:
        """The resolved layer."""
        if self.output.grid is None:
            raise ValueError(f"{self.call.name} puts out no map")
        calls = trace.count(self.call.module)
        number = -1 if self.call.number == calls - 1 else self.call.number
        return Tap(self.call.name, self.output.grid, self.output.channels, self.output.element, calls, number)


def spatial(call: Call) -> list[Item]:
    """The maps that a call outputs, one per grid: those that the model's outputs depend on, and new ones, if any.

    Next to images, what looks like tokens is a state.
    """
    maps = [output for output in call.outputs if output.grid is not None]
    maps = [output for output in maps if output.on_path] or maps
    maps = [output for output in maps if output.grid and not output.grid.is_tokens] or maps
    best: dict[tuple[int, int], Output] = {}
    for output in [output for output in maps if not output.same] or maps:
        best.setdefault(output.hw, output)
    return [Item(call, output) for output in best.values()]


def _hands_on(call: Call) -> bool:
    """Whether a call makes no map of its own: identity, dropout, a permutation of axes."""
    return all(item.output.same for item in spatial(call))


class Stages:
    """The units of a traced model in the order of execution, and the stage ends among them."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._weights = {call: _size(call.module) for call in trace.root.inside()}
        leaves = [call for call in self._weights if not any(call.module.children()) and _weighted(call)]
        first = min(leaves, key=lambda call: call.begin, default=None)
        if first is not None and embeds_patches(first.module):
            # Its weights grow with the patch size, not with the network: a few narrow blocks may hold fewer weights
            # than it.
            held, around = self._weights[first], first
            while around.parent is not None:  # all around it too, whose share would otherwise be the patch's
                self._weights[around] -= held
                around = around.parent
        self._spatial_leaves = {call for call in leaves if spatial(call)}
        convolutions = [(call, call.module) for call in leaves if isinstance(call.module, nn.Conv2d)]
        self._dilated = [
            (call.end, max(map(int, conv.dilation))) for call, conv in convolutions if conv.dilation != (1, 1)
        ]
        self.units = self._main(_units(self._open()))

    @classmethod
    def of(cls, trace: Trace) -> Stages:
        """The stages of a traced model, found once."""
        return trace.once("stages", lambda: cls(trace))

    def ends(self) -> list[Item]:
        """The last unit of each grid; where the network ends in a pooling without weights, the poolings.

        A stage whose convolutions are dilated instead of strided keeps the grid of the one before, and is one all the
        same, see :meth:`_undilated`.
        """
        grids: dict[tuple[int, int], list[Item]] = {}
        for unit in self.units:
            grids.setdefault(unit.output.hw, []).append(unit)
        runs = [run for units in grids.values() for run in self._undilated(units)]
        pooled = self._pooled()
        ends = [run[0] if pooled and not run[0].weighted else run[-1] for run in runs]
        below = [end for end in ends if end.output.hw != self._trace.size]
        return sorted(below or ends, key=lambda item: item.place)

    def _undilated(self, units: list[Item]) -> list[list[Item]]:
        """The units of one grid, as the stages that they would be with strides in place of dilation.

        One begins where the channels or the module around change, if a convolution up to their next change is dilated
        more widely than all before: the first block of a stage still has the dilation of the one before in many
        networks. Blocks that dilate their convolutions by turns are no stages, nor is the pooling before the first one.
        """
        stages: list[list[Item]] = []
        for _, group in groupby(units, lambda unit: (unit.output.channels, unit.call.parent)):
            found = list(group)
            last = stages[-1] if stages else []
            if any(unit.weighted for unit in last) and self._dilation(found[-1]) > self._dilation(last[-1]):
                stages.append(found)
            elif stages:
                last += found
            else:
                stages.append(found)
        return stages

    def _dilation(self, unit: Item) -> int:
        """The widest dilation of a convolution up to the end of a unit."""
        return max((wide for end, wide in self._dilated if end <= unit.call.end), default=1)

    def unpooled(self) -> list[Item]:
        """The last unit with weights of each grid, also at the size of the image."""
        return sorted({unit.output.hw: unit for unit in self.units if unit.weighted}.values(), key=lambda u: u.place)

    def fine(self) -> list[Item]:
        """The stage ends; where these are poolings without weights, every unit with weights instead."""
        return [unit for unit in self.units if unit.weighted] if self._pooled() else self.ends()

    def _pooled(self) -> bool:
        """Whether no unit of the last grid has weights: the network ends in a pooling."""
        last = self.units[-1].output.hw if self.units else None
        return last is not None and not any(unit.weighted for unit in self.units if unit.output.hw == last)

    def blocks(self) -> list[Item]:
        """What negative indices count: the stage ends, or all units of a network without stages."""
        ends = self.ends()
        return ends if len(ends) >= _HIERARCHICAL else [u for u in self.units if u.weighted] or ends

    def last(self, count: int) -> list[Item]:
        """The last stage ends; where there are too few, units of the last stages are added, the deepest first."""
        stems = self._stems()
        chosen = [end for end in self.ends() if end not in stems][-count:]
        spare = [unit for unit in self.units[::-1] if unit.weighted and unit not in chosen]
        deepest = chosen[-1].output.hw if chosen else None
        spare.sort(key=lambda unit: (unit in stems, unit.output.hw != deepest))
        return sorted(chosen + spare[: count - len(chosen)], key=lambda item: item.place)

    def _stems(self) -> list[Item]:
        """Single layers before the first block of a network of blocks; on a shared grid they would pass for stages.

        In a network of single layers, as VGG is, none is a stem; nor is one after the blocks, as EfficientNet's last.
        """
        weighted = [unit for unit in self.units if unit.weighted]
        single = [sum(_is_leaf(call) for call in unit.call.inside()) < 2 for unit in weighted]
        if 2 * sum(single) >= len(weighted):
            return []
        return weighted[: single.index(False)]

    def deepest(self) -> list[Item]:
        """Candidate layers for gradient methods, the deepest first: one item unless only a gradient can decide.

        The last unit with weights of a convolutional network. In a transformer its class token may be all that the
        head reads, so that patch tokens get no gradient: then the blocks and their normalisation layers, backwards.
        """
        last = next((unit for unit in self.units[::-1] if unit.weighted), self.units[-1])
        if not last.is_tokens and last.output.on_path:
            return [last]
        units = [unit for unit in self.units if unit.weighted][-_PROBED_UNITS:]
        calls = {call for unit in units for call in (unit.call, *unit.call.inside()) if not _hands_on(call)}
        items = [item for call in calls for item in spatial(call) if item.output.on_path and _probed(call)]
        return sorted(items, key=lambda item: item.place, reverse=True) or [last]

    def norm(self, item: Item) -> Item:
        """The first normalisation layer directly inside a token block; the item itself where there is none."""
        if not item.is_tokens:
            return item
        norms = [inner for call in item.call.children if is_norm(call.module) for inner in spatial(call)]
        return next((inner for inner in norms if inner.output.hw == item.output.hw), item)

    def _main(self, units: list[Item]) -> list[Item]:
        """The units, less tokens that are no map: those that only read out a class token or a state as large as a map.

        They are of another class than most token blocks of their grid, or hold few weights compared with its images.
        """
        weights: dict[tuple[tuple[int, int], type[nn.Module]], int] = {}
        images: dict[tuple[int, int], int] = {}
        for unit in units:
            held, hw = self._weights[unit.call], unit.output.hw
            if _kind(unit) == "nchw":
                images[hw] = images.get(hw, 0) + held
            else:
                weights[hw, type(unit.call.module)] = weights.get((hw, type(unit.call.module)), 0) + held
        main = {hw: max(weights[key] for key in weights if key[0] == hw) for hw, _ in weights}

        def kept(unit: Item) -> bool:
            hw = unit.output.hw
            held = weights.get((hw, type(unit.call.module)), 0)
            return not unit.is_tokens or (held == main[hw] and held >= _LEAST * images.get(hw, 0))

        return [unit for unit in units if kept(unit)]

    def _open(self) -> list[Call]:
        """The sequence of calls that the network is made of, opened as far as needed."""
        sequence = self._within(self._trace.root, branches=True)
        while True:
            total = sum(self._weights[call] for call in sequence)
            grids = len({unit.output.hw for unit in _units(sequence)})
            for place, call in enumerate(sequence):
                several = self._shrinks(sequence, place)
                large = self._weights[call] >= (_SMALLEST_OPENED if several else _MOST) * total
                if large and (several or grids < _HIERARCHICAL):
                    inner = self._within(call, branches=several)
                    held = sum(self._weights[child] for child in inner)
                    if held >= _MOST * self._weights[call] and self._has_blocks(inner):
                        sequence[place : place + 1] = inner
                        break
            else:
                return sequence

    def _has_blocks(self, sequence: list[Call]) -> bool:
        """Whether there are blocks in a sequence: several parts with weights, or a single block of tokens.

        A single convolutional block is not looked for, since its stage stands for it. A single block of tokens is,
        since what holds it may end in a norm that belongs to the head.
        """
        weighted = [call for call in sequence if _weighted(call)]
        return len(weighted) > 1 or any(
            _is_token_block(call) or self._has_blocks(self._within(call, branches=False)) for call in weighted
        )

    def _shrinks(self, sequence: list[Call], place: int) -> bool:
        before = spatial(sequence[place - 1])[-1].output.hw if place else self._trace.size
        after = spatial(sequence[place])[-1].output.hw
        return max(before[0] / after[0], before[1] / after[1]) > _SEVERAL_STAGES

    def _within(self, call: Call, *, branches: bool) -> list[Call]:
        """The spatial calls directly inside; one that is not spatial itself but holds most of those that are is opened.

        Args:
            call: the call to open.
            branches: where the calls that everything passes through hold too few weights, also take those on branches.
        """
        inner: list[Call] = []
        for child in call.children:
            if spatial(child):
                if not _hands_on(child) and not isinstance(child.module, _HEAD_POOLING):
                    inner.append(child)
            elif len(self._spatial_leaves.intersection(child.inside())) >= _MOST * len(self._spatial_leaves) > 0:
                inner.extend(self._within(child, branches=branches))
        trunk = [child for child in inner if child.cut]
        on_path = [child for child in inner if child.cut or any(item.output.on_path for item in spatial(child))]
        held = sum(self._weights[child] for child in trunk)
        enough = held > 0 and held >= _MOST * sum(self._weights[child] for child in on_path)
        return on_path if branches and not enough else trunk


_HEAD_POOLING = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer: one of torch's, or one whose name says so."""
    return isinstance(module, _NORMS) or "norm" in type(module).__name__.lower()


def _probed(call: Call) -> bool:
    """The layers whose gradients are tested: a block, or a norm at the start of one of its parts."""
    return call.cut or (is_norm(call.module) and call.parent is not None and call.parent.cut)


def _units(sequence: list[Call]) -> list[Item]:
    """Each module with weights, taken after the norm, activation or dropout that follows it.

    In an image the unit is the last of them (a convolution's ReLU, a stage's final batch norm). After token and NHWC
    blocks a norm belongs to the head, so the unit is the block.
    """
    units: list[Item] = []
    for call in sequence:
        for item in spatial(call):
            dresses = bool(units) and not item.weighted and item.output.hw == units[-1].output.hw
            if not dresses:
                units.append(_last_block(item))
            elif _kind(item) == _kind(units[-1]) == "nchw" and units[-1].weighted:
                units[-1] = _Dressed(item.call, item.output)
    return units


class _Dressed(Item):
    """A norm or activation that represents the weights before it."""

    @property
    def weighted(self) -> bool:
        return True


def _last_block(item: Item) -> Item:
    """A bare sequence of token blocks is named by its last block, which has the same output."""
    while item.is_tokens and isinstance(item.call.module, nn.Sequential):
        inner = [child for child in item.call.children if child.cut and _weighted(child) and spatial(child)]
        if len(inner) < 2:
            break
        item = spatial(inner[-1])[-1]
    return item


def _kind(item: Item) -> str:
    return item.output.grid.kind if item.output.grid else ""


def _is_token_block(call: Call) -> bool:
    return bool(call.children) and any(item.is_tokens for item in spatial(call))


def _is_leaf(call: Call) -> bool:
    return not call.children and _weighted(call)


def _size(module: nn.Module) -> int:
    return sum(weight.numel() for weight in _weights(module))


def _weighted(call: Call) -> bool:
    return any(_is_matrix(weight) for weight in _weights(call.module))


def _weights(module: nn.Module) -> Iterator[Tensor]:
    """The parameters, and the weights of quantised layers, which are none: packed, or in buffers of small integers."""
    yield from module.parameters()
    for part in module.modules():
        if is_quantised(part) and callable(weight := getattr(part, "weight", None)):
            yield weight()
        yield from (buffer for buffer in part.buffers(recurse=False) if _packed(buffer))


def _packed(tensor: Tensor) -> bool:
    """Whether a tensor holds rounded weights: 8-bit floats, or integers other than flags and indices."""
    kind = tensor.dtype
    small = kind.itemsize == 1 if kind.is_floating_point else kind not in (torch.bool, torch.int64)
    return tensor.ndim > 1 and small


def _is_matrix(weight: Tensor) -> bool:
    return _packed(weight) or sum(size > 1 for size in weight.shape) > 1
