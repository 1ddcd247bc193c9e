"""The measures by the names that tables and the command line use; each is a call of ``attrib_zoo.metrics``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo import metrics
from attrib_zoo.errors import OptionError, closest
from attrib_zoo.metrics.confidence import _SISE

NEEDS = {
    "region": ("masks", "boxes"),
    "others": ("other_masks", "other_boxes"),
    "distractors": ("distractor_masks",),
}
"""What a measure may need, and under which keys a dict batch says it."""

TRUTH = tuple(key for keys in NEEDS.values() for key in keys)
"""Under which keys a dict batch says where things are."""

Explain = Callable[[Tensor, Tensor], Tensor]
Function = Callable[..., Tensor]


@dataclass
class Question:
    """One batch and one method's maps for it: everything that a measure may use.

    Attributes:
        model: the classifier.
        explain: the method, ``(inputs, target) -> maps``; for measures that need maps of other inputs.
        inputs: ``(N, C, H, W)``.
        maps: ``(N, C, H, W)`` or ``(N, 1, h, w)``.
        target: ``(N,)`` class indices.
        clean: ``(N,)``, the target's score on the whole images.
        seeds: one int per image, independent of the batch.
        truth: ``masks`` or ``boxes`` of the target's object, ``other_masks`` or ``other_boxes`` and
            ``distractor_masks``, where known.
        masking: what replaces hidden pixels; see ``metrics.masked_confidence``.
        score: ``"softmax"`` or ``"sigmoid"``.
    """

    model: nn.Module
    explain: Explain
    inputs: Tensor
    maps: Tensor
    target: Tensor
    clean: Tensor
    seeds: list[int]
    truth: dict[str, Tensor] = field(default_factory=dict)
    masking: str | Tensor = "auto"
    score: str = "softmax"
    _cache: dict[Any, Any] = field(default_factory=dict)

    def ask(self, function: Function, **options: Any) -> Tensor:
        """Call a function of ``attrib_zoo.metrics`` on this batch."""
        return function(self.model, self.inputs, self.maps, self.target, **options)

    def shared(self, function: Callable[..., Any], **options: Any) -> Any:
        """The same, computed once for all measures that use it, with the arguments of all model-based measures."""
        key = function, tuple(options.items())
        if key not in self._cache:
            told = {"clean": self.clean, "masking": self.masking, "score": self.score}
            self._cache[key] = self.ask(function, **options, **{k: v for k, v in told.items() if k in _names(function)})
        return self._cache[key]

    def region(self, *, others: bool = False) -> dict[str, Tensor]:
        """The true regions as keyword arguments."""
        keys = NEEDS["region"] + NEEDS["others"] * others
        return {key: self.truth[key] for key in keys if key in self.truth}


def _names(function: Callable[..., Any]) -> Sequence[str]:
    return function.__code__.co_varnames[: function.__code__.co_argcount + function.__code__.co_kwonlyargcount]


@dataclass(frozen=True)
class Measure:
    """A named number per image.

    Attributes:
        name: as printed in tables.
        compute: from a :class:`Question` to ``(N,)``, or ``(N, P)`` for a curve, whose mean is the number.
        lower: whether less is better.
        percent: whether tables print 100 times the mean.
        needs: ``"region"``, ``"others"`` or ``"distractors"`` where the data must provide the truth.
        chance: like ``compute``, for a question whose maps are constant: what an uninformed map gets on average, where
            the region alone determines it.
        points: the horizontal positions of a curve's values.
        area: the number of a curve is the area under it instead of its mean.
        elsewhere: whether it explains images that it makes itself, for which no true region is known; the perfect map
            then has no value.
    """

    name: str
    compute: Callable[[Question], Tensor]
    lower: bool = False
    percent: bool = True
    needs: str | None = None
    chance: Callable[[Question], Tensor] | None = None
    points: tuple[float, ...] = ()
    area: bool = False
    elsewhere: bool = False

    def number(self, found: Tensor) -> Tensor:
        """One number per image, ``(N,)``."""
        if found.ndim == 1:
            return found
        return torch.trapezoid(found, dx=1 / (found.shape[1] - 1)) if self.area else found.mean(1)

    @property
    def arrow(self) -> str:
        """Which way is better."""
        return "↓" if self.lower else "↑"


def _drop(keep: float, **options: Any) -> Callable[[Question], Tensor]:
    def compute(asked: Question) -> Tensor:
        whole, masked = asked.shared(metrics.masked_confidence, keep=keep, **options, seed=tuple(asked.seeds))
        lost: Tensor = (whole - masked).clamp(min=0)
        return lost / torch.where(lost > 0, whole, torch.ones_like(whole))

    return compute


def _rise(keep: float, **options: Any) -> Callable[[Question], Tensor]:
    def compute(asked: Question) -> Tensor:
        whole, masked = asked.shared(metrics.masked_confidence, keep=keep, **options, seed=tuple(asked.seeds))
        rose: Tensor = (masked > whole).to(whole.dtype)
        return rose.masked_fill((whole + masked).isnan(), torch.nan)

    return compute


def _curve(function: Function, **options: Any) -> Callable[[Question], Tensor]:
    def compute(asked: Question) -> Tensor:
        found: Tensor = asked.shared(function, **options, seed=tuple(asked.seeds))
        return found

    return compute


def _gap(kept: Callable[[Question], Tensor], lost: Callable[[Question], Tensor]) -> Callable[[Question], Tensor]:
    """What is left in one order minus what is left in the other."""
    return lambda asked: kept(asked) - lost(asked)


def _hidden(order: str) -> Callable[[Question], Tensor]:
    """The removal curve with pixels hidden as the question says, instead of imputed."""
    return lambda asked: _curve(metrics.road_curve, order=order, fractions=_TENTHS, hiding=asked.masking)(asked)


def _mosaic(asked: Question) -> Tensor:
    """The grid pointing game among the images of the batch; NaN for those that fit into no mosaic."""
    found = asked.clean.new_full((len(asked.inputs),), torch.nan)
    mosaics = metrics.grid_mosaics(asked.inputs, asked.target, asked.clean, seed=asked.seeds)
    if len(mosaics):
        maps = asked.explain(mosaics.inputs, mosaics.target).detach()
        shares = metrics.grid_pointing_game(asked.model, mosaics.inputs, maps, cell=mosaics.cell)
        found[mosaics.image.to(found.device)] = shares.to(found)
    return found


def _where(
    function: Function, *, others: bool = False, ranked: bool = True, **options: Any
) -> Callable[[Question], Tensor]:
    def compute(asked: Question) -> Tensor:
        seeds = {"seed": asked.seeds} if ranked else {}
        return asked.ask(function, **asked.region(others=others), **seeds, **options)

    return compute


def _share(**options: Any) -> Callable[[Question], Tensor]:
    """Energy on the target's object rather than the others; for a constant map, its share of their area."""
    return _where(metrics.class_discrimination, others=True, ranked=False, **options)


def _beside(**options: Any) -> Callable[[Question], Tensor]:
    """Energy on the distractors."""
    return lambda asked: asked.ask(metrics.energy_pointing_game, masks=asked.truth["distractor_masks"], **options)


def _overlap(asked: Question) -> Tensor:
    """The average mIoU of as many pixels drawn at random, to second order in how many of them lie inside."""
    size = asked.inputs.shape[-2] * asked.inputs.shape[-1]
    region, taken = _AREA(asked) * size, math.ceil(_TOP * size)
    inside, both = region * taken / size, region + taken
    variance = inside * (size - region) * (size - taken) / (size * max(size - 1, 1))
    return inside / (both - inside) + both * variance / (both - inside) ** 3


# For a constant map: the energy inside, all pixels taken at once, all pixels pointing at once.
_AREA = _where(metrics.energy_pointing_game, ranked=False, normalize=False)
_ALL = _where(metrics.bbox_score, ranked=False, ties="threshold")
_ANYWHERE = _where(metrics.pointing_game, ranked=False, ties="threshold")


_TENTHS = tuple(round(0.1 * i, 1) for i in range(1, 10))
_POINTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
_RELEASED = {"fractions": _POINTS, "reduce": "accuracy", "ties": "threshold"}
_KEEPS = (1.0, 0.5, 0.15)
_STEPS = 32
_TOP = 0.2  # of the pixels, in mIoU
_GRID = tuple(i / _STEPS for i in range(_STEPS + 1))

_MORF, _LERF = (_curve(metrics.road_curve, order=order, fractions=_TENTHS) for order in ("morf", "lerf"))
_INSERTION, _DELETION = (_curve(curve, steps=_STEPS) for curve in (metrics.insertion_curve, metrics.deletion_curve))

FAMILIES: dict[str, tuple[Measure, ...]] = {
    "ad": tuple(Measure(f"AD({keep:.0%})".replace("%", ""), _drop(keep), lower=True) for keep in _KEEPS),
    "ic": tuple(Measure(f"IC({keep:.0%})".replace("%", ""), _rise(keep)) for keep in _KEEPS),
    "drop": (Measure("Drop%", _drop(**_SISE), lower=True),),
    "increase": (Measure("Increase%", _rise(**_SISE)),),
    "road": (
        Measure("ROAD MoRF", _MORF, lower=True, points=_TENTHS),
        Measure("ROAD LeRF", _LERF, points=_TENTHS),
    ),
    "road-released": tuple(
        Measure(f"{name}, released", _curve(metrics.road_curve, order=order, **_RELEASED), lower, points=_POINTS)
        for name, order, lower in (("ROAD MoRF", "morf", True), ("ROAD LeRF", "lerf", False))
    ),
    "insertion": (Measure("insertion", _INSERTION, points=_GRID, area=True),),
    "deletion": (Measure("deletion", _DELETION, lower=True, points=_GRID, area=True),),
    "hiding": (
        Measure("hidden MoRF", _hidden("morf"), lower=True, points=_TENTHS),
        Measure("hidden LeRF", _hidden("lerf"), points=_TENTHS),
    ),
    "srg": (Measure("SRG", _gap(_LERF, _MORF), points=_TENTHS),),
    "srg-hidden": (Measure("hidden SRG", _gap(_hidden("lerf"), _hidden("morf")), points=_TENTHS),),
    "srg-insertion": (Measure("ins - del", _gap(_INSERTION, _DELETION), points=_GRID, area=True),),
    "grid": (Measure("grid pointing", _mosaic, chance=lambda a: torch.full_like(a.clean, 0.25), elsewhere=True),),
    "ebpg": (Measure("EBPG", _where(metrics.energy_pointing_game, ranked=False), needs="region", chance=_AREA),),
    "miou": (Measure("mIoU", _where(metrics.miou, keep=_TOP), needs="region", chance=_overlap),),
    "bbox": (Measure("Bbox", _where(metrics.bbox_score), needs="region", chance=_ALL),),
    "pointing": (Measure("pointing game", _where(metrics.pointing_game), needs="region", chance=_ANYWHERE),),
    "discrimination": (Measure("discrimination", _share(), needs="others", chance=_share(normalize=False)),),
    "distractors": (
        Measure("distractors", _beside(), lower=True, needs="distractors", chance=_beside(normalize=False)),
    ),
    "sparseness": (Measure("sparseness", lambda asked: asked.ask(metrics.sparseness), percent=False),),
    "infidelity": (
        Measure("infidelity", lambda asked: asked.ask(metrics.infidelity, seed=asked.seeds), lower=True, percent=False),
    ),
    "sensitivity": (
        Measure(
            "sensitivity",
            lambda asked: asked.ask(metrics.sensitivity_max, explain=asked.explain, seed=asked.seeds),
            lower=True,
            percent=False,
        ),
    ),
    "variation": (Measure("variation", lambda asked: asked.ask(metrics.total_variation), lower=True, percent=False),),
}
"""Family -> its measures; ``metrics="ad,road"`` takes all of a family, ``"AD(50)"`` one.

Insertion and deletion take 32 steps here; ``metrics.insertion`` has as many as the image has rows, as its paper does.
``road-released`` is what the authors of T-TAME have in their code, not in their equations: the share of decisions that
stay, at seven percentages, where all pixels of one value fall together. Their AD and IC hide with ``masking="raw"``.
``hiding`` and ``srg-hidden`` hide pixels as ``masking`` says instead of ROAD's imputation. ``grid`` makes mosaics of
those images of each batch that the model is sure of, at the images' size; it needs four classes or more in a batch.
"""

Wanted = str | Sequence[str | Measure] | Mapping[str, Function]


def chosen(wanted: Wanted | None, truth: Sequence[str]) -> list[Measure]:
    """The measures asked for; ``None`` takes AD, IC, ROAD and whatever the data has regions for.

    Raises:
        OptionError: no such measure, or one that needs what the data does not provide.
    """
    if isinstance(wanted, Mapping):
        return [Measure(name, _custom(function), percent=False) for name, function in wanted.items()]
    if wanted is None:
        told = [name for name, keys in NEEDS.items() if any(key in truth for key in keys)]
        allowed = [name for name, measures in FAMILIES.items() if measures[0].needs in told]
        wanted = ["ad", "ic", "road", *allowed]
    names = wanted.split(",") if isinstance(wanted, str) else list(wanted)
    known = {**{m.name.lower(): (m,) for family in FAMILIES.values() for m in family}, **FAMILIES}
    found: list[Measure] = []
    for name in names:
        if isinstance(name, Measure):
            found.append(name)
            continue
        key = str(name).strip().lower()
        if key not in known:
            raise OptionError(f"metrics: no measure {key!r}{closest(key, known)}; there are {', '.join(FAMILIES)}")
        found += known[key]
    for measure in found:
        keys = NEEDS.get(measure.needs or "", ())
        if keys and not any(key in truth for key in keys):
            what = " or ".join(keys)
            raise OptionError(f"metrics: {measure.name} needs {what} in the loader's dict batches, got none; add them")
    return list({measure.name: measure for measure in found}.values())


def _custom(function: Function) -> Callable[[Question], Tensor]:
    return lambda asked: asked.ask(function)
