"""Finding the layer that a user named in a traced model, or saying what to do where it cannot be used."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import nn

from attrib_zoo.backbone.grid import ATTENDED, Grid, Tap
from attrib_zoo.backbone.kind import attends
from attrib_zoo.backbone.layers.layouts import fits
from attrib_zoo.backbone.layers.stages import Item, Stages, spatial
from attrib_zoo.backbone.layers.trace import Call, Output, Trace, layer_names
from attrib_zoo.backbone.module import find, original
from attrib_zoo.backbone.vit.attended import attended_channels
from attrib_zoo.errors import LayerError, LayerNotFoundError, OptionError

Layer: TypeAlias = str | nn.Module | int | Tap | tuple[str | nn.Module, Grid]

_log = logging.getLogger("attrib_zoo")


def find_layer(traced: Trace, layer: Layer) -> tuple[tuple[int, int], Tap]:
    """A layer that the user gave, with its place in the order of execution."""
    hint: Grid | None = None
    wanted: Tap | None = None
    if isinstance(layer, tuple) and len(layer) == 2 and isinstance(layer[1], Grid):
        layer, hint = layer
    if isinstance(layer, Tap):
        wanted, hint, layer = layer, layer.grid, layer.label
    if isinstance(layer, bool) or not isinstance(layer, (str, nn.Module, int)):
        raise OptionError(
            "layers: must be names, modules, negative indices or (layer, Grid) pairs, "
            f"got {layer!r} of type {type(layer).__name__}"
        )
    if isinstance(layer, int):
        item = _at_index(traced, layer)
        return item.place, item.tap(traced)
    layer, element = _split(layer) if isinstance(layer, str) else (layer, None)
    name = _name(traced.model, layer)
    calls = [call for call in traced.calls() if call.name == name]
    if not calls:
        raise LayerError(_never_ran(traced, name))
    call = calls[wanted.call % len(calls)] if wanted else calls[-1]
    if len(calls) > 1 and not wanted:
        _log.info("layers: %r runs %d times in a pass; the last run is explained", name, len(calls))
    if element == ATTENDED:
        return _attended(traced, call)
    output = _chosen_output(traced, call, element) if hint is None else _read_as(call, element, hint, traced.size)
    item = Item(call, output)
    return item.place, item.tap(traced)


def _attended(traced: Trace, call: Call) -> tuple[tuple[int, int], Tap]:
    """What the class token takes from the patches in this attention module, which is no output of it."""
    tokens = [o for o in call.outputs if o.grid is not None and o.grid.kind == "tokens" and o.grid.prefix]
    if not tokens or not attends(call.module):
        modules = [c.name for c in traced.calls() if attends(c.module)]
        known = f"such as {modules[-1]!r}" if modules else "and this model has none"
        raise LayerError(
            f"layers: ['{ATTENDED}'] is read from an attention module behind a class token, {known}; got {call.name!r} "
            f"({type(call.module).__name__})"
        )
    item = Item(call, tokens[0])
    channels = attended_channels(call.module, call.name)
    return item.place, replace(item.tap(traced), channels=channels, attended=True)


def _split(label: str) -> tuple[str, int | str | None]:
    """A name and, where it ends in ``[1]`` or ``['key']``, the entry of the layer's output."""
    match = re.fullmatch(r"(.+)\[(?:(\d+)|(['\"])(.*)\3)\]", label)
    if match is None:
        return label, None
    return match[1], int(match[2]) if match[2] else match[4]


def _at_index(traced: Trace, index: int) -> Item:
    blocks = Stages.of(traced).blocks()
    if index >= 0 or -index > len(blocks):
        names = ", ".join(repr(item.call.name) for item in blocks)
        raise LayerNotFoundError(
            f"layers: an index must lie between -{len(blocks)} and -1 (the last), got {index}; it counts in {names}"
        )
    return blocks[index]


def _name(model: nn.Module, layer: str | nn.Module) -> str:
    """The dotted path of a layer in the unwrapped model."""
    names = layer_names(model)
    if isinstance(layer, nn.Module):
        bare = original(layer)
        for name, module in names.items():
            if module is bare:
                return name
        raise LayerNotFoundError(
            f"layers: the {type(layer).__name__} must be part of the {type(model).__name__} to explain, "
            f"but is not; take it from the model, or give its name, such as {_closest(names, '')}"
        )
    wrappers = ("module", "_orig_mod")
    parts = layer.split(".")
    for start in range(len(parts)):
        name = ".".join(part for part in parts[start:] if part != "_orig_mod")
        if name in names:
            return name
        if parts[start] not in wrappers:
            break
    raise LayerNotFoundError(f"layers: no layer {layer!r} in {type(model).__name__}; closest: {_closest(names, layer)}")


def _closest(names: dict[str, nn.Module], wanted: str) -> str:
    close = difflib.get_close_matches(wanted, names, n=3) or [name for name in names if "." not in name][-5:]
    return ", ".join(map(repr, close))


def _never_ran(traced: Trace, name: str) -> str:
    inner = [call.name for call in traced.calls() if call.name.startswith(f"{name}.") and spatial(call)]
    direct = list(dict.fromkeys(n for n in inner if n.count(".") == name.count(".") + 1))
    advice = f"name one of its parts: {', '.join(map(repr, direct[-5:]))}" if direct else "name a layer that does"
    kind = type(find(traced.model, name)).__name__
    return f"layers: {name!r} ({kind}) must run in the forward pass, but is never called; {advice}"


def _chosen_output(traced: Trace, call: Call, element: int | str | None) -> Output:
    """The output of the call that holds the map meant."""
    maps = [item.output for item in spatial(call)] if element is None else _entries(call, element)
    maps = [output for output in maps if output.grid is not None]
    if not maps:  # a map of one cell has no size that was seen before; a user who names it means it
        cells = [o for o in _entries(call, element) if len(o.shape) == 4 and tuple(o.shape[2:]) == (1, 1)]
        maps = [replace(o, grid=Grid("nchw"), channels=o.shape[1], hw=(1, 1)) for o in cells]
    if not maps:
        raise LayerError(_not_spatial(traced, call))
    if len(maps) > 1:
        _log.info("layers: %r puts out %d maps; the last is explained", call.name, len(maps))
    return maps[-1]


def _entries(call: Call, element: int | str | None) -> list[Output]:
    """The call's outputs, or the one at that place."""
    entries = [output for output in call.outputs if element in (None, output.element)]
    if not entries and element is not None:
        places = ", ".join(repr(output.element) for output in call.outputs if output.element is not None)
        raise LayerError(
            f"layers: {call.name!r} puts out no tensor at [{element!r}]; it has {places or 'one output: give its name'}"
        )
    return entries


def _read_as(call: Call, element: int | str | None, hint: Grid, image: tuple[int, int]) -> Output:
    """The call's output, read as the user says."""
    problem: LayerError | None = None
    for output in _entries(call, element):
        grid = replace(hint, hw=_rows_and_columns(output, hint, image)) if hint.hw is None else hint
        try:
            _, channels, h, w = grid.to_map(torch.empty(output.shape, device="meta")).shape
        except LayerError as error:
            problem = error
        else:
            return replace(output, grid=grid, channels=channels, hw=(h, w))
    raise LayerError(
        f"layers: {call.name!r} must put out what the given layout says, but does not; {problem or 'it has no tensor'}"
    )


def _rows_and_columns(output: Output, hint: Grid, image: tuple[int, int]) -> tuple[int, int] | None:
    """The size found for tokens, or the only one with the image's aspect ratio for this many patches."""
    if not hint.is_tokens or len(output.shape) != 3:
        return None
    if output.grid is not None and (output.grid.kind, output.grid.prefix) == (hint.kind, hint.prefix):
        return output.grid.hw
    count = output.shape[1 if hint.kind == "tokens" else 2] - hint.prefix
    sizes = [(h, count // h) for h in range(1, count + 1) if count % h == 0 and fits((h, count // h), image)]
    return min(sizes, key=lambda size: abs(size[0] * image[1] - size[1] * image[0]), default=None)


def folded(calls: Iterable[Call]) -> int:
    """How many images the layers see for each one given: more than 1 where a model cuts it into views."""
    batches = [output.shape[0] for call in calls for output in call.outputs if len(output.shape) == 4]
    return max(set(batches), key=batches.count) if batches else 1


def several_views(what: str, views: int) -> str:
    """What to do where a model folds views or frames into the batch."""
    return (
        f"model: must put out one map for each image, but in {what} there are {views} for one: it folds views, crops "
        "or frames into the batch; explain the network inside on these views, each an image of its own, and give the "
        "model's mean over them by hand"
    )


def _not_spatial(traced: Trace, call: Call) -> str:
    views = folded(traced.calls())
    if views > 1 and folded([call]) == views:
        return several_views(f"{call.name!r} of {type(traced.model).__name__}", views)
    shapes = [f"(N, {', '.join(map(str, output.shape[1:]))})" for output in call.outputs] or ["no tensor"]
    near = nearest(traced, call, 5)
    advice = f"the nearest spatial layers are {', '.join(map(repr, near))}" if near else "no layer of it does"
    return (
        f"layers: {call.name!r} of {type(traced.model).__name__} must put out a map, got {' and '.join(shapes)}; "
        f"{advice}; if it is a map, say how to read it: ({call.name!r}, Grid(...))"
    )


def nearest(traced: Trace, call: Call, count: int) -> list[str]:
    """Names of the spatial layers that end closest to a call, the nearest first; those on the way to the outputs."""
    maps = [c for c in traced.calls() if c.name != call.name and any(i.output.on_path for i in spatial(c))]
    names = dict.fromkeys(c.name for c in sorted(maps, key=lambda c: abs(c.end - call.end)))
    return list(names)[:count]
