"""The constructor: layers, layer resolution, chunk sizes and the other options."""

from __future__ import annotations

import copy
import functools
import inspect
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrib_zoo.errors import UnsupportedModelError
from attrib_zoo.masking import min_max, upsample
from attrib_zoo.testing.benches import MODELS, BenchModel
from attrib_zoo.testing.suite import Case, Inapplicable, check, expect, raises, same

_ALL = tuple(MODELS)
_CELLS = (4, 8, 16)  # sides in pixels
_CHUNKS = ("chunk_size", "perturbations_per_eval", "internal_batch_size")


@check()
def options(case: Case) -> None:
    """Options are keyword-only with defaults, checked by the constructor and shown by ``repr``."""
    named = {name: p for name, p in case.parameters().items() if name != "layers"}
    for name, parameter in named.items():
        expect(parameter.kind is inspect.Parameter.KEYWORD_ONLY, f"{name}: expected a keyword-only parameter")
        expect(parameter.default is not inspect.Parameter.empty, f"{name}: expected a default")
    if not named:
        raise Inapplicable("no options")
    case.needs(*named)
    for name, parameter in named.items():
        if type(parameter.default) is not bool:
            raises(functools.partial(case.build, case.model, **{name: object()}), name, what=f"{name}=object()")
        for value in _others(parameter.default):
            try:
                changed = case.build(case.model, **{name: value})
            except (ValueError, TypeError):
                continue
            expect(f"{name}={value!r}" in repr(changed), f"expected repr to show {name}={value!r}, got {changed!r}")


def _others(default: Any) -> list[Any]:
    """Values of the same type that are likely to be allowed."""
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, int):
        return [default + 1]
    if isinstance(default, float):
        return [default / 2 or 0.5]
    return []


def _needs_layers(case: Case) -> None:
    case.needs("layers")
    if getattr(case.explainer, "default_layers", ()) is None:
        raise Inapplicable(f"{type(case.explainer).__name__} reads no layers")


@check("cnn", "vit")
def layers(case: Case) -> None:
    """A layer may be named or given as a module; an unknown name is answered with the closest ones.

    A method that reads layers of some models only, so that it has no ``taps`` here, must refuse one.
    """
    _needs_layers(case)
    name = case.model.explained
    ask = {"target": case.targets}
    taps = getattr(case.explainer, "taps", None)
    if callable(taps) and not taps(case.inputs):
        asked = lambda: case.ready(case.model, layers=name).attribute(case.inputs, **ask)  # noqa: E731
        raises(asked, "layers", "None", what="a layer for a method that reads none")
        return
    by_name = case.ready(case.model, layers=name).attribute(case.inputs, **ask)
    module = case.model.get_submodule(name)
    explainer = case.ready(case.model, layers=module)
    same(explainer.attribute(case.inputs, **ask), by_name, "a module against its name", 0)
    twin = copy.deepcopy(explainer)
    same(twin.attribute(case.inputs, **ask), by_name, "a deep copy of an object that was given a module", 0)
    wrong = f"{name}x"
    raises(
        lambda: case.ready(case.model, layers=wrong).attribute(case.inputs, **ask),
        "closest",
        wrong,
        what="an unknown layer",
    )
    idle = case.bench.model
    idle.idle = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    raises(
        lambda: case.ready(idle, layers="idle").attribute(case.inputs, **ask), "idle", what="a layer that never runs"
    )


@check("cnn")
def in_place_followers(case: Case) -> None:
    """A layer followed by an in-place activation is explained as if the activation worked on a copy."""
    _needs_layers(case)
    careful = copy.deepcopy(case.model)
    for module in careful.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    layer = "stages.2.1"
    try:
        wanted = case.ready(careful, layers=layer).attribute(case.inputs, target=case.targets)
    except UnsupportedModelError as reason:
        raise Inapplicable(f"it cannot explain such a layer: {reason}") from None
    found = case.ready(case.model, layers=layer).attribute(case.inputs, target=case.targets)
    same(found, wanted, "BatchNorm before an in-place ReLU against the same before an ordinary one", 1e-5)


@check("cnn")
def plain_callable(case: Case) -> None:
    """A function instead of a module is explained the same, or refused with the advice to wrap it in an nn.Module."""
    model = case.model
    try:
        found = case.ready(lambda *args: model(*args)).attribute(case.inputs, target=case.targets)  # type: ignore[arg-type]
    except Exception as error:
        expect(
            "module" in str(error).lower(),
            f"expected advice to wrap it in an nn.Module, got {type(error).__name__}: {error}",
        )
        expect(not isinstance(error, (AttributeError, KeyError)), f"expected a clear error, got {type(error).__name__}")
        return
    same(found, case.maps, "a function against its model", 1e-5)


@check(*_ALL)
def layer_resolution(case: Case) -> None:
    """``upsample=False`` gives (N, 1, h, w), and its bilinear enlargement is the default map; at odd sizes too."""
    case.needs("upsample")
    for size in ((32, 48), (45, 33)):
        sized = case.at(size)
        explainer = sized.ready(sized.model, upsample=False)
        small = explainer.attribute(sized.inputs, target=sized.targets)
        expect(small.ndim == 4 and small.shape[1] == 1, f"expected (N, 1, h, w), got {tuple(small.shape)}")
        h, w = small.shape[2:]
        expect(h < size[0] and w < size[1], f"expected a layer's resolution, got {(h, w)}")
        expect((h > w) == (size[0] > size[1]), f"images of {size}: expected rows before columns, got {(h, w)}")
        where = getattr(explainer, "placed", None)  # the extent of the grid, where the class knows it
        with where(sized.inputs) if callable(where) else nullcontext():
            large = upsample(small, size)
        same(large.expand_as(sized.inputs), sized.maps, f"at {size}, enlarged against the default map", 1e-5)


@check(*_ALL)
def smooth_enlargement(case: Case) -> None:
    """A map that exists only at the size of the image is not made of blocks, nor stretched from corner to corner.

    Cells without interpolation are blocks; ``align_corners=True`` puts the centres of the outer cells on the edge.
    A class whose regions have one value each (superpixels, occluded boxes) declares ``piecewise_constant = True``.
    """
    if "upsample" in case.parameters():
        raise Inapplicable("layer_resolution compares the two sizes")
    if getattr(type(case.explainer), "piecewise_constant", False):
        raise Inapplicable("it says that its maps are piecewise constant")
    for heat in case.maps[:, 0]:
        low, high = heat.amin(), heat.amax()
        for axis in (0, 1):
            before, after = heat.narrow(axis, 0, heat.shape[axis] - 1), heat.narrow(axis, 1, heat.shape[axis] - 1)
            inner = (before > low) & (before < high)
            flat = float((before == after)[inner].double().mean()) if int(inner.sum()) > heat.numel() // 8 else 0.0
            expect(flat < 0.75, f"{flat:.0%} of neighbouring pixels are equal: enlarge maps bilinearly")
        stretched = min(_rest(heat.double(), cells, align_corners=True) for cells in _CELLS)
        placed = min(_rest(heat.double(), cells, align_corners=False) for cells in _CELLS)
        expect(stretched > 1e-4 or placed < 1e-2, "this is a map enlarged with align_corners=True; leave that out")


def _rest(heat: Tensor, cells: int, *, align_corners: bool) -> float:
    """What of a map ``(H, W)`` no grid of cells of this many pixels gives when enlarged, as a share of its range."""
    fitted = heat
    for _ in range(2):  # the enlargement is one along the rows of one along the columns
        count = fitted.shape[0] // cells
        unit = torch.eye(count, dtype=heat.dtype)[None]
        lines = F.interpolate(unit, fitted.shape[0], mode="linear", align_corners=align_corners)[0].T
        fitted = (lines @ torch.linalg.pinv(lines) @ fitted).T
    return float((fitted - heat).abs().max() / (heat.amax() - heat.amin()).clamp_min(1e-30))


def _cells(case: Case, **options: Any) -> Tensor:
    """The maps at their own resolution, ``(N, 1, h, w)``; for methods that read several layers, those of one."""
    if "upsample" in case.parameters():
        options["upsample"] = False
        taps = getattr(case.explainer, "taps", None)
        if callable(taps) and len(taps(case.inputs)) > 1:
            options["layers"] = case.model.explained
    return case.ready(case.model, **options).attribute(case.inputs, target=case.targets)[:, :1]  # type: ignore[no-any-return]


@check("cnn", "vit")
def smoothing(case: Case) -> None:
    """``smooth=k`` takes the mean over k x k cells, at the borders over those that exist, before any scaling."""
    case.needs("smooth", "upsample")
    if case.fits(case.explainer):  # a fit may depend on the filter, so one fitted explainer makes both maps
        explainer = case.ready(case.model, upsample=False, smooth=3)
        smoothed = explainer.attribute(case.inputs, target=case.targets)[:, :1]
        explainer.smooth = 1
        plain = explainer.attribute(case.inputs, target=case.targets)[:, :1]
    else:
        plain, smoothed = _cells(case), _cells(case, smooth=3)
        same(_cells(case, smooth=1), plain, "smooth=1 against the default", 0)
    wanted = F.avg_pool2d(plain, 3, 1, 1) / F.avg_pool2d(torch.ones_like(plain[:1]), 3, 1, 1)
    same(min_max(smoothed), min_max(wanted), "smooth=3 against means of the default map", 1e-4)
    raises(functools.partial(case.build, case.model, smooth=4), "smooth", "odd", what="smooth=4")


@check("cnn", "vit")
def scaling(case: Case) -> None:
    """``scale="rank"`` replaces the values of a map by their ranks, ties by the mean rank; "min-max" scales."""
    case.needs("scale")
    plain = _cells(case)
    same(_cells(case, scale="min-max"), min_max(plain), 'scale="min-max" against the default map scaled', 1e-4)
    values = plain.flatten(1)
    below = torch.stack([(row[:, None] > row).sum(1) + ((row[:, None] == row).sum(1) - 1) / 2 for row in values])
    wanted = (below / max(values.shape[1] - 1, 1)).view_as(plain)
    same(_cells(case, scale="rank"), wanted, 'scale="rank" against the ranks of the default map', 1e-4)
    raises(functools.partial(case.build, case.model, scale="ranks"), "scale", "rank", what='scale="ranks"')


@check(*_ALL)
def flips(case: Case) -> None:
    """The mirrored image and the mirrored model give the mirrored map: rows, columns and tokens are in order.

    Methods that draw random masks, those with an option ``seed``, are left out.
    """
    if "seed" in case.parameters():
        raise Inapplicable("random masks have no mirror image")
    for size, axes in (((32, 48), (2, 3)), ((48, 32), (3,))):
        sized = case.at(size, torch.float64)
        wanted = sized.maps
        for axis in axes:
            mirrored = case.at(size, torch.float64)
            mirror(mirrored.model, axis, size)
            mirrored.bench.batches = [batch.flip(axis) for batch in mirrored.bench.batches]
            logits = mirrored.model(sized.inputs.flip(axis)) - sized.model(sized.inputs)
            expect(float(logits.abs().max()) < 1e-9, "fault of the suite: the mirrored model differs")
            explainer = mirrored.ready(mirrored.model)  # fitted on mirrored images
            found = explainer.attribute(sized.inputs.flip(axis), target=sized.targets)
            name = ("top to bottom", "left to right")[axis - 2]
            same(found.flip(axis), wanted, f"images of {size} mirrored {name}", 1e-5)


def mirror(model: BenchModel, axis: int, size: tuple[int, int]) -> None:
    """Change the bench model so that images mirrored along ``axis`` 2 or 3 give the logits of the originals."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.copy_(module.weight.flip(axis))
        if model.layout == "tokens":
            positions: Tensor = model.pos_embed  # type: ignore[assignment]
            grid = positions[:, model.prefix :].view(1, size[0] // 8, size[1] // 8, -1)
            positions[:, model.prefix :] = grid.flip(axis - 1).flatten(1, 2)


def _chunk_option(case: Case) -> str:
    for name in _CHUNKS:
        if name in case.parameters():
            case.needs(name)
            return name
    raise Inapplicable(f"no option {' or '.join(_CHUNKS)}")


@check("cnn", "vit")
def chunk_size(case: Case) -> None:
    """How many copies go through the model at once never changes a result."""
    option = _chunk_option(case)
    gates = case.bench.gates
    wanted = case.explainer.attribute(case.inputs, target=case.targets, additional_forward_args=gates)
    for number in (1, 3, 64):
        chunked = case.ready(case.model, **{option: number})
        found = chunked.attribute(case.inputs, target=case.targets)
        same(found, case.maps, f"{option}={number} against the default", 1e-4)
        found = chunked.attribute(case.inputs, target=case.targets, additional_forward_args=gates)
        same(found, wanted, f"{option}={number} with a forward argument", 1e-4)


@check("cnn")
def out_of_memory(case: Case) -> None:
    """When memory runs out the chunks shrink, and the result is the same."""
    _chunk_option(case)
    wanted = case.maps
    case.model.fuse.rows = 4
    found = case.ready(case.model).attribute(case.inputs, target=case.targets)
    same(found, wanted, "with memory for four rows", 1e-4)
