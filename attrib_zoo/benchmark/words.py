"""What a table shows, in words: which method leads, which are tied, and where a control is as good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from attrib_zoo.benchmark.controls import CHANCE, PERFECT, UNTRAINED
from attrib_zoo.benchmark.estimates import Estimate
from attrib_zoo.benchmark.measures import Measure

_FEW = 30  # images; with fewer, intervals are only a hint


class Numbers(Protocol):
    """The part of a :class:`~attrib_zoo.benchmark.table.Table` used here: it imports this module, not the reverse."""

    measures: list[Measure]

    @property
    def methods(self) -> list[str]:
        """The names of the rows."""

    @property
    def controls(self) -> list[str]:
        """Those of them that are controls."""

    @property
    def images(self) -> list[int]:
        """The positions of the images."""

    def estimate(self, method: str, measure: str) -> Estimate:
        """Mean and interval."""

    def difference(self, method: str, other: str, measure: str) -> Estimate:
        """Mean and interval of the difference."""


@dataclass(frozen=True)
class Standing:
    """The ranking by one measure.

    Attributes:
        measure: its name.
        best: the method with the best mean; ``None`` where no method has one.
        tied: the other methods whose difference from the best cannot be told from 0, possibly for lack of images.
        better: controls that ignore the model and have a clearly better mean than the best method.
        level: controls that ignore the model and are tied with the best method, or have a better mean.
        rivals: how many methods have a value.
    """

    measure: str
    best: str | None
    tied: tuple[str, ...]
    better: tuple[str, ...]
    level: tuple[str, ...]
    rivals: int

    @property
    def leads(self) -> bool:
        """Whether the best method is clearly ahead of all other methods, and of all controls that ignore the model."""
        return self.best is not None and self.rivals > 1 and not (self.tied or self.better or self.level)


def standing(table: Numbers, measure: Measure) -> Standing:
    """Compare the method with the best mean with all others, image by image."""
    sign = -1.0 if measure.lower else 1.0
    means = {m: sign * table.estimate(m, measure.name).mean for m in table.methods}
    means = {m: mean for m, mean in means.items() if mean == mean}
    able = [m for m in means if m not in table.controls]
    if not able:
        return Standing(measure.name, None, (), (), (), 0)
    best = max(able, key=lambda m: means[m])
    found: dict[str, list[str]] = {"tied": [], "better": [], "level": []}
    for method in means:
        if method in (best, PERFECT, CHANCE) or method.endswith(UNTRAINED):
            continue
        gap = table.difference(method, best, measure.name)
        clear = gap.images > 1 and (gap.low > 0 or gap.high < 0)
        if method in able:
            found["tied"] += [] if clear else [method]
        elif not clear or means[method] > means[best]:
            found["better" if clear else "level"].append(method)
    return Standing(measure.name, best, tuple(found["tied"]), tuple(found["better"]), tuple(found["level"]), len(able))


def summary(table: Numbers) -> str:
    """A paragraph that says what a table shows, and which methods it cannot separate."""
    found = [standing(table, measure) for measure in table.measures]
    told = [one for one in found if one.best is not None]
    able = [method for method in table.methods if method not in table.controls]
    text = [
        f"{_count(len(able), 'method')} on {_count(len(table.images), 'image')}, "
        f"judged by {_count(len(found), 'measure')}."
    ]
    leaders = dict.fromkeys(one.best for one in told if one.leads and one.best)
    ahead = {best: [one.measure for one in told if one.leads and one.best == best] for best in leaders}
    text += [f"{best} is ahead of all others by {_listed(measures)}." for best, measures in ahead.items()]
    level: dict[tuple[str, str], list[str]] = {}
    for one in told:
        if one.best and one.tied and not (one.better or one.level):
            mean = table.estimate(one.best, one.measure).mean
            equal = [method for method in one.tied if table.estimate(method, one.measure).mean == mean]
            names = _listed([one.best, *equal])
            rest = [method for method in one.tied if method not in equal]
            words = f"{names} have the same, best mean" if equal else f"{names} has the best mean"
            more = f", but these images cannot tell {'them' if equal else 'it'} from {_listed(rest)}" if rest else ""
            level.setdefault((words, more), []).append(one.measure)
    text += [f"By {_listed(measures)}, {words}{more}." for (words, more), measures in level.items()]
    for one in told:
        if one.better:
            text.append(
                f"By {one.measure}, {_listed(one.better)}, which knows nothing of the model, beats every method."
            )
        elif one.level:
            text.append(
                f"By {one.measure}, no method can be told from {_listed(one.level)}, which knows nothing of the model: "
                "it ranks nothing here."
            )
    if len(able) == 1 and not any(one.better or one.level for one in told):
        text.append(f"{able[0]} was measured alone, so only the controls stand beside it.")
    if len(table.images) < _FEW:
        text.append(f"With fewer than {_FEW} images all of this is a hint and no result.")
    return " ".join(text)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
