"""From what a user says about layers, which may be nothing, to resolved layers of any image classifier.

A layer is given as its dotted name, as the module, as a negative index into the model's stages or blocks, as a pair
``(layer, Grid)`` for a layout that cannot be found, as a ready :class:`Tap`, or as a list of these.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, TypeAlias, cast

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.capture import frozen, run_with_graph, select_args
from attrib_zoo.backbone.grid import Grid, Tap
from attrib_zoo.backbone.layers.known import known, situation
from attrib_zoo.backbone.layers.layouts import find_grids
from attrib_zoo.backbone.layers.lookup import Layer, find_layer, folded, several_views
from attrib_zoo.backbone.layers.stages import Item, Stages
from attrib_zoo.backbone.layers.trace import Trace, trace
from attrib_zoo.backbone.randomness import draws_taken_back
from attrib_zoo.errors import AttribZooError, OptionError, UnsupportedModelError, aligned, html_table

__all__ = ["Description", "Grid", "Layer", "Layers", "Tap", "Trace", "describe", "look", "resolve"]

Layers: TypeAlias = Layer | Sequence[Layer] | None

RULES = ("outputs", "norms", "live", "gradient", "stages", "unpooled", "fine")

_log = logging.getLogger("attrib_zoo")


def look(model: nn.Module, inputs: Tensor, args: Sequence[Any] = ()) -> Trace:
    """A forward pass on one image that shows every layer and layout; the basis of :func:`resolve`.

    It runs once per model, image size and dtype, and again when the model has changed.
    """

    def run() -> Trace:
        traced = trace(model, inputs, args)
        find_grids(traced)
        return traced

    return known(model).get(("trace", situation(inputs, args)), run)


def resolve(
    model: nn.Module,
    layers: Layers,
    inputs: Tensor,
    args: Sequence[Any] = (),
    *,
    count: int = 1,
    rule: str = "outputs",
    traced: Trace | None = None,
) -> tuple[Tap, ...]:
    """The layers meant, as the model runs them on inputs of this size, in the order of execution.

    Args:
        model: the classifier; wrappers are removed. Nothing about it changes.
        layers: see the module docstring; None lets ``rule`` decide.
        inputs: images ``(N, C, H, W)`` of the size to be explained.
        args: further arguments of the model's forward.
        count: how many layers the rule takes; a smaller network gives as many as it has.
        rule: ``"outputs"``: the last stage ends, or the last blocks of a plain transformer; ``"norms"``: the same, and
            in token blocks their first normalisation layer; ``"live"``: of the stage ends or blocks with a gradient,
            the last ones that share a grid; ``"gradient"``: the deepest layer with a gradient; ``"stages"``: every
            stage end; ``"unpooled"``: the same, but the input of a pooling instead of the pooling; ``"fine"``: the
            same, but where these are poolings, every layer with weights.
        traced: what :func:`look` returned for this model and input size, to save a pass.

    Raises:
        LayerNotFoundError: a layer is not part of the model.
        LayerError: a layer never ran, or outputs no map.
        OptionError: layers are given twice, or as something that names no layer.
        UnsupportedModelError: no layer was given and none outputs a map.
    """
    if rule not in RULES:
        raise OptionError(f"rule: must be one of {', '.join(map(repr, RULES))}, got {rule!r}")
    if count < 1:
        raise OptionError(f"count: must be 1 or more layers, got {count}")
    traced = traced or look(model, inputs, args)
    if layers is None:
        items = _by_rule(traced, inputs, args, count, rule)
        taps = tuple(item.tap(traced) for item in items)
        _log.info("layers of %s: %s", type(traced.model).__name__, ", ".join(tap.label for tap in taps))
        return taps
    given = _listed(layers)
    if not given:
        raise OptionError("layers: must name at least one layer, got an empty list; leave it out for the default")
    found = sorted((find_layer(traced, layer) for layer in given), key=lambda entry: entry[0])
    taps = tuple(tap for _, tap in found)
    for tap, following in pairwise(taps):
        if (tap.name, tap.element, tap.call) == (following.name, following.element, following.call):
            raise OptionError(f"layers: each must be given once, got {tap.label!r} twice")
    return taps


def _listed(layers: Layer | Sequence[Layer]) -> list[Any]:
    """One entry per layer given; a pair (layer, Grid) is one."""
    pair = isinstance(layers, tuple) and len(layers) == 2 and isinstance(layers[1], Grid)
    return list(layers) if isinstance(layers, (list, tuple)) and not pair else [layers]


# --- the default ----------------------------------------------------------------------------------------------


def _by_rule(traced: Trace, inputs: Tensor, args: Sequence[Any], count: int, rule: str) -> list[Item]:
    stages = Stages.of(traced)
    if not stages.units:
        views = folded(traced.calls())
        if views > 1:
            raise UnsupportedModelError(several_views(type(traced.model).__name__, views))
        raise UnsupportedModelError(
            f"layers: no layer of {type(traced.model).__name__} puts out a map at input size "
            f"{traced.size[0]}x{traced.size[1]}; name a layer and its layout, such as "
            "layers=('encoder', Grid('tokens', prefix=1, hw=(14, 14)))"
        )
    if rule == "stages":
        return stages.ends()
    if rule == "unpooled":
        return stages.unpooled()
    if rule == "fine":
        return stages.fine()
    if rule == "gradient":
        return [_with_gradient(traced, stages, inputs, args)]
    if rule == "live":
        return _live(traced, stages, inputs, args, count)
    items = stages.last(count)
    if len(items) < count:
        _log.info("%s has %d layers to explain, not %d", type(traced.model).__name__, len(items), count)
    return [stages.norm(item) for item in items] if rule == "norms" else items


def _with_gradient(traced: Trace, stages: Stages, inputs: Tensor, args: Sequence[Any]) -> Item:
    """The deepest candidate whose map has a gradient; where none has (a zero head), the first norm of a block."""
    candidates = stages.deepest()
    if len(candidates) == 1:
        return candidates[0]
    found: Item | None = traced.derived.get("deepest with gradient")
    if found is not None:
        return found
    with _scored(traced, candidates, inputs, args) as (score, maps):
        for item, each in zip(
            candidates, maps, strict=True
        ):  # the first ones are close to the outputs, and cost little
            if _moves(torch.autograd.grad(score, each, allow_unused=True, retain_graph=True)[0]):
                # only a positive answer is kept: once the head is trained, a layer without a gradient may get one
                return cast("Item", traced.derived.setdefault("deepest with gradient", item))
    _log.info("no layer of %s gets a gradient; is its head untrained?", type(traced.model).__name__)
    return stages.norm(stages.last(1)[0])


def _live(traced: Trace, stages: Stages, inputs: Tensor, args: Sequence[Any], count: int) -> list[Item]:
    """The last blocks of a transformer that have a gradient; of any other model the layer of ``"gradient"``."""
    if not stages.last(1)[-1].is_tokens:
        return [_with_gradient(traced, stages, inputs, args)]
    items = stages.last(count + 1)  # the patch tokens of the last block may have none
    block = type(items[-1].call.module)  # a patch embedding before the first one is no block
    items = [item for item in items if type(item.call.module) is block]
    live: list[Item] | None = traced.derived.get(("live", count))
    if live is None:
        reached = _reached(traced, items, inputs, args)
        live = [item for item, has in zip(items, reached, strict=True) if has]
        if live:  # kept only if positive, as for the deepest layer with a gradient
            live = traced.derived.setdefault(("live", count), live)
    items = live or items[-count:]
    return [item for item in items if item.output.hw == items[-1].output.hw][-count:]


def _reached(traced: Trace, items: Sequence[Item], inputs: Tensor, args: Sequence[Any]) -> list[bool]:
    """Whether the outputs have a gradient to each map, on the first image."""
    with _scored(traced, items, inputs, args) as (score, maps):
        return [_moves(gradient) for gradient in torch.autograd.grad(score, maps, allow_unused=True)]


@contextmanager
def _scored(
    traced: Trace, items: Sequence[Item], inputs: Tensor, args: Sequence[Any]
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """A sum of the outputs for the first image, and the maps of these layers in its graph."""
    taps = [item.tap(traced) for item in items]
    rows = torch.zeros(1, dtype=torch.long, device=inputs.device)
    with draws_taken_back(inputs.device), frozen(traced.model) as bare:
        extra = select_args(args, rows, len(inputs))
        with run_with_graph(bare, inputs[:1], extra, taps) as (outputs, maps):
            scores = outputs.flatten()
            # unequal weights: the sum of a softmax has no gradient
            yield (scores * torch.linspace(1, 2, len(scores), dtype=scores.dtype, device=scores.device)).sum(), maps


def _moves(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.ne(0).any())


# --- what is there --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of a :class:`Description`.

    Attributes:
        name: the layer's name.
        module: its class.
        tap: how it is read.
        hw: rows and columns of its map.
        on_path: whether the outputs depend on it.
        taken_by: the defaults that choose it.
        gradient: whether the outputs have a gradient to the map; None where that cannot be told (a head of zeros).
    """

    name: str
    module: str
    tap: Tap
    hw: tuple[int, int]
    on_path: bool
    taken_by: tuple[str, ...]
    gradient: bool | None = None


@dataclass(frozen=True)
class Description:
    """The layers that can be explained, for reading: ``print(describe(model, inputs))``.

    Attributes:
        model: the model's class.
        size: (H, W) of the input.
        rows: one per candidate, in the order of execution.
    """

    model: str
    size: tuple[int, int]
    rows: tuple[Row, ...]

    HEADER: ClassVar = ("layer", "module", "layout", "grid", "channels", "prefix", "gradient", "taken by")

    def __str__(self) -> str:
        lines = [self.HEADER, *(self._cells(row) for row in self.rows)]
        return "\n".join([f"{self.model} at {self.size[0]}x{self.size[1]}", *aligned(lines)])

    def _repr_html_(self) -> str:
        """For notebooks."""
        lines = [self.HEADER, *(self._cells(row) for row in self.rows)]
        return html_table(lines, head=True, title=f"{self.model} at {self.size[0]}x{self.size[1]}")

    def _cells(self, row: Row) -> tuple[str, ...]:
        run = "" if row.tap.calls == 1 else f" (run {row.tap.call % row.tap.calls + 1} of {row.tap.calls})"
        unused = () if row.on_path else ("not read by the head",)
        return (
            row.tap.label + run,
            row.module,
            row.tap.grid.kind,
            f"{row.hw[0]}x{row.hw[1]}",
            str(row.tap.channels),
            str(row.tap.grid.prefix),
            "not tested" if row.gradient is None else "yes" if row.gradient else "no",
            ", ".join((*row.taken_by, *unused)),
        )


def describe(model: nn.Module, inputs: Tensor, args: Sequence[Any] = ()) -> Description:
    """The stages and blocks of a model, how they lay out their maps, and which default takes which.

    Any other layer inside them that outputs a map can be named too.

    Raises:
        UnsupportedModelError: no layer outputs a map.
    """
    traced = look(model, inputs, args)
    takers: dict[Tap, list[str]] = {}
    items: dict[Tap, Item] = {}
    for label, count, rule in (
        ("outputs", 3, "outputs"),
        ("norms", 3, "norms"),
        ("gradient", 1, "gradient"),
        ("stages", 1, "stages"),
    ):
        for item in _by_rule(traced, inputs, args, count, rule):
            tap = item.tap(traced)
            items[tap] = item
            takers.setdefault(tap, []).append(label if count == 1 else f"{label} ({count})")
    items.update((item.tap(traced), item) for item in Stages.of(traced).units)
    ordered = sorted(items.items(), key=lambda entry: entry[1].place)
    rows = [
        Row(
            tap.name,
            type(item.call.module).__name__,
            tap,
            item.output.hw,
            item.output.on_path,
            tuple(takers.get(tap, ())),
            gradient,
        )
        for (tap, item), gradient in zip(
            ordered, _told(traced, [item for _, item in ordered], inputs, args), strict=True
        )
    ]
    return Description(type(traced.model).__name__, traced.size, tuple(rows))


def _told(traced: Trace, items: Sequence[Item], inputs: Tensor, args: Sequence[Any]) -> Sequence[bool | None]:
    """Whether each map has a gradient, where any map has."""
    try:
        found = _reached(traced, items, inputs, args)
    except AttribZooError:  # a model without gradients
        found = []
    return found if any(found) else [None] * len(items)
