"""The results of an evaluation: means with their intervals, differences between methods, costs; in any format."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attrib_zoo.benchmark.controls import CHANCE, CONTROLS, PERFECT, UNTRAINED
from attrib_zoo.benchmark.estimates import Estimate, estimate
from attrib_zoo.benchmark.markup import table_html
from attrib_zoo.benchmark.measures import Measure
from attrib_zoo.benchmark.plots import plot
from attrib_zoo.benchmark.records import Records
from attrib_zoo.benchmark.words import summary
from attrib_zoo.errors import OptionError, aligned, cell, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Table:
    """What :func:`attrib_zoo.benchmark.evaluate` returns; ``print`` shows it.

    Attributes:
        records: everything per image: ``records.rows[method, image]``, ``records.costs[method]``, ``records.setting``.
        measures: the columns.
    """

    def __init__(self, records: Records, measures: Sequence[Measure]) -> None:
        self.records = records
        self.measures = list(measures)
        self._estimates: dict[tuple[str, str], Estimate] = {}

    @property
    def methods(self) -> list[str]:
        """The rows, in the order requested."""
        return list(dict.fromkeys(method for method, _ in self.records.rows))

    @property
    def controls(self) -> list[str]:
        """The rows that are controls, which bracket the others."""
        named = self.records.setting.get("controls") or ()
        return [method for method in self.methods if method in named or method in CONTROLS]

    @property
    def images(self) -> list[int]:
        """The positions in the loader of all images that any method explained."""
        return sorted({image for _, image in self.records.rows})

    def values(self, method: str, measure: str) -> Tensor:
        """One number per image, ``(N,)``, in the order of ``images``; times 100 where tables print percent."""
        factor = 100.0 if self._measure(measure).percent else 1.0
        self._known(method)
        rows = [self.records.rows.get((method, image)) for image in self.images]
        found = [math.nan if row is None else row.values.get(measure, math.nan) for row in rows]
        return factor * torch.tensor(found, dtype=torch.float64)

    def curve(self, method: str, measure: str) -> Tensor:
        """The mean curve of a measure that has one, ``(P,)``."""
        self._known(method)
        if not self._measure(measure).points:
            raise OptionError(f"measure: must be one that has a curve, got {measure!r}")
        nothing = [math.nan] * len(self._measure(measure).points)
        rows = [row.curves.get(measure, nothing) for (name, _), row in self.records.rows.items() if name == method]
        return torch.tensor(rows, dtype=torch.float64).nanmean(0)

    def estimate(self, method: str, measure: str) -> Estimate:
        """Mean and 95 % interval of a method on a measure."""
        key = method, measure
        if key not in self._estimates:
            self._estimates[key] = estimate(self.values(method, measure))
        return self._estimates[key]

    def best(self, measure: str, digits: int | None = None, among: Sequence[str] | None = None) -> list[str]:
        """The methods with the best mean, including all that print the same; none where a control is better.

        A control here is a map that ignores the model: not the true region, and not an untrained explainer.

        Args:
            measure: its name.
            digits: the number of decimals of printed means; ``None``: as in :meth:`cells`.
            among: the methods that can win, controls left out; ``None``: all.
        """
        column = self._measure(measure)
        digits = _digits(column) if digits is None else digits
        sign = -1.0 if column.lower else 1.0
        means = {method: self.estimate(method, measure).mean for method in self.methods if method != PERFECT}
        known = {method: sign * round(mean, digits) for method, mean in means.items() if not math.isnan(mean)}
        rivals = [m for m in self.controls if m in known and not m.endswith(UNTRAINED)]
        able = [m for m in known if m not in self.controls and (among is None or m in among)]
        top = max((known[m] for m in able), default=-math.inf)
        return [] if any(known[m] > top for m in rivals) else [m for m in able if known[m] == top]

    def difference(self, method: str, other: str, measure: str) -> Estimate:
        """Mean and 95 % interval of the difference on the same images: ``method - other``.

        An interval that contains 0 means that these images do not separate the two.
        """
        return estimate(self.values(method, measure) - self.values(other, measure))

    def differences(self, reference: str | None = None) -> str:
        """Every method minus one of them (the first), as Markdown; ``*`` where 0 is outside the interval."""
        base = self.methods[0] if reference is None else self._known(reference)
        lines = []
        for method in self.methods:
            if method != base:
                found = [self.difference(method, base, measure.name) for measure in self.measures]
                clear = [e.images > 1 and (e.low > 0 or e.high < 0) for e in found]
                digits = [_digits(measure) for measure in self.measures]
                cells = [e.text(d) + "*" * c for e, d, c in zip(found, digits, clear, strict=True)]
                lines.append([method, *cells])
        return _markdown([f"minus {base}", *(f"{m.name} {m.arrow}" for m in self.measures)], lines)

    # ------------------------------------------------------------------ formats

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows as text."""
        costs = self.records.costs
        head = ["method", *(f"{measure.name} {measure.arrow}" for measure in self.measures)]
        head += ["images", "forward", "backward", "x forward", "peak MB"]
        rows = []
        for method in self.methods:
            found = [self.estimate(method, measure.name) for measure in self.measures]
            row = [method, *(e.text(_digits(m)) for e, m in zip(found, self.measures, strict=True))]
            row.append(str(max((e.images for e in found), default=0)))
            cost = costs[method]
            each = max(cost.images, 1)
            times = "–" if math.isnan(cost.times_forward) else f"{cost.times_forward:.2f}"
            row += [f"{cost.forward / each:.4g}", f"{cost.backward / each:.4g}", times]
            rows.append([*row, "–" if cost.peak is None else f"{cost.peak / 1e6:.0f}"])
        return head, rows

    def notes(self) -> list[str]:
        """What the reader needs to know: what was left out, and how it was computed."""
        setting = self.records.setting
        lines = [
            f"{len(self.images)} images; mean [95 % bootstrap interval]; ↑ more is better, ↓ less is better",
            "forward, backward: samples per image; x forward: time as a multiple of a plain pass of the same images",
            f"masking {setting['masking']}, score {setting['score']}, seed {setting['seed']}, {setting['model']} "
            f"{setting['weights']}, attrib_zoo {setting['attrib_zoo']}, torch {setting['torch']}",
        ]
        for method in self.methods:
            for measure in self.measures:
                lost = int((~self.values(method, measure.name).isfinite()).sum())
                if lost and not (method == CHANCE and lost == len(self.images)):  # chance has no such value
                    images = f"{lost} image{'s' * (lost > 1)}"
                    lines.append(f"{method}, {measure.name}: {images} without a value (no region, or no finite map)")
        return lines

    def to_text(self) -> str:
        """For the terminal: a line for each measure, a column for each method; the mean and half its interval."""
        head, rows = self.cells()
        columns = [[name, *row[1:]] for name, row in zip(self.methods, rows, strict=True)]
        for column, method in zip(columns, self.methods, strict=True):
            for i, measure in enumerate(self.measures, start=1):
                column[i] = self.estimate(method, measure.name).short(_digits(measure))
        columns.insert(0, ["", *head[1:]])
        lines = aligned(list(zip(*columns, strict=True)), rule=True, right=True)
        notes = [
            note.replace("[95 % bootstrap interval]", "±half its 95 % bootstrap interval") for note in self.notes()
        ]
        return "\n".join([*lines, "", *notes])

    def to_markdown(self) -> str:
        """A Markdown table with its notes."""
        return "\n\n".join([_markdown(*self.cells()), "\n".join(f"* {note}" for note in self.notes())])

    def to_latex(self) -> str:
        """A ``tabular``; needs the package booktabs."""
        head, rows = self.cells()
        signs = {letter: rf"\{letter}" for letter in "%_&#${}"} | {"↑": r"$\uparrow$", "↓": r"$\downarrow$"}
        signs |= {"–": "--", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}

        def line(cells: Sequence[str]) -> str:
            return " & ".join("".join(signs.get(letter, letter) for letter in cell) for cell in cells) + r" \\"

        body = [line(head), r"\midrule", *map(line, rows)]
        return "\n".join(
            [rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}"]
        )

    def to_csv(self) -> str:
        """One line per method and measure: mean, low, high, images; names cannot act as spreadsheet formulas."""
        lines = [_csv(["method", "measure", "mean", "low", "high", "images"])]
        for method in self.methods:
            for measure in self.measures:
                e = self.estimate(method, measure.name)
                lines.append(_csv([cell(method), cell(measure.name), e.mean, e.low, e.high, e.images]))
        return "".join(lines)

    def to_json(self) -> str:
        """Setting, means with intervals, and costs."""
        methods = {
            method: {
                "measures": {m.name: _jsonable(vars(self.estimate(method, m.name))) for m in self.measures},
                "cost": self.records.costs[method].facts(),
            }
            for method in self.methods
        }
        return json.dumps({"setting": self.records.setting, "methods": methods}, indent=1)

    def to_pandas(self) -> Any:
        """A DataFrame with a row for each image and method: method, image, target, clean, the measures. Needs pandas.

        Values are as the measures return them: fractions where the table prints percent.
        """
        import pandas as pd

        rows = [
            {"method": row.method, "image": row.image, "target": row.target, "clean": row.clean, **row.values}
            for row in self.records.rows.values()
        ]
        return pd.DataFrame(rows)

    def plot(self, across: int = 3) -> Figure:
        """Curves of ROAD, insertion and deletion where measured, and a measure against the cost.

        Args:
            across: the largest number of panels side by side.
        """
        return plot(self, across)

    def summary(self) -> str:
        """What the table shows, in words: which method leads, and which ones these images cannot separate."""
        return summary(self)

    def __str__(self) -> str:
        return self.to_text()

    def _repr_html_(self) -> str:
        """For notebooks."""
        return table_html(self)

    def __repr__(self) -> str:
        return f"<Table of {len(self.methods)} methods, {len(self.measures)} measures, {len(self.images)} images>"

    def _known(self, method: str) -> str:
        if method not in self.methods:
            raise OptionError(f"method: must be one of {', '.join(self.methods)}, got {method!r}")
        return method

    def _measure(self, name: str) -> Measure:
        for measure in self.measures:
            if measure.name == name:
                return measure
        raise OptionError(f"measure: must be one of {', '.join(m.name for m in self.measures)}, got {name!r}")


def _csv(cells: Sequence[Any]) -> str:
    """One line of a CSV file."""
    line = io.StringIO()
    csv.writer(line).writerow(cells)  # with its own line end, since before Python 3.13 only what is in that is quoted
    return line.getvalue().removesuffix("\r\n") + "\n"


def _digits(measure: Measure) -> int:
    return 2 if measure.percent else 4


def _jsonable(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[shown(cell, 200).replace("|", r"\|") for cell in line] for line in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    rule = "|".join("-" * (width + 2) for width in widths)
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])
