"""Our rows next to the printed ones."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from attrib_zoo.benchmark.protocols.papers import Printed
from attrib_zoo.benchmark.table import Table
from attrib_zoo.errors import aligned


@dataclass(frozen=True)
class Line:
    """One method on the measures of one printed table.

    Attributes:
        table: as the paper calls it.
        method: as the paper calls it.
        ours: for each measure mean, half the 95 % interval and number of images.
        printed: for each measure the printed number.
        forward: forward passes per image, ours and printed (``None`` where not printed).
    """

    table: str
    method: str
    ours: tuple[tuple[float, float, int], ...]
    printed: tuple[float, ...]
    forward: tuple[float, int | None]


class Comparison:
    """What a protocol returns.

    Attributes:
        printed: the paper's tables.
        tables: ours; each measure is taken from the table that has it.
        facts: lines about the run: images, accuracy, how the explainers were trained.
    """

    def __init__(self, printed: Sequence[Printed], tables: Sequence[Table], facts: Sequence[str]) -> None:
        self.printed, self.tables, self.facts = list(printed), list(tables), list(facts)

    def lines(self, printed: Printed) -> list[Line]:
        """The methods of a printed table that were run, in its order."""
        found = []
        for method, numbers in printed.rows.items():
            tables = [self._table(method, measure) for measure in printed.measures]
            ours = []
            for table, measure in zip(tables, printed.measures, strict=True):
                e = None if table is None else table.estimate(method, measure)
                half = math.nan if e is None else (e.high - e.low) / 2
                ours.append((math.nan, half, 0) if e is None else (e.mean, half, e.images))
            used = next((table for table in tables if table is not None), None)
            if used is not None:
                cost = used.records.costs[method]
                passes = cost.forward / max(cost.images, 1), printed.passes.get(method)
                found.append(Line(printed.table, method, tuple(ours), numbers, passes))
        return found

    def _table(self, method: str, measure: str) -> Table | None:
        for table in self.tables:
            if method in table.methods and any(m.name == measure for m in table.measures):
                return table
        return None

    def to_text(self) -> str:
        """For the terminal."""
        parts = []
        for printed in self.printed:
            head, rows = self._cells(printed)
            if not rows:
                continue
            body = "\n".join(aligned([head, *rows], rule=True))
            parts.append(
                "\n".join([f"{printed.table}, {printed.backbone}, in percent", "", body, *self._remarks(printed)])
            )
        return "\n\n".join([*parts, "\n".join(self.notes())])

    def to_markdown(self) -> str:
        """The same with Markdown tables."""
        parts = []
        for printed in self.printed:
            head, rows = self._cells(printed)
            if rows:
                lines = [head, ["---"] * len(head), *rows]
                body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
                parts.append("\n".join([f"## {printed.table}, {printed.backbone}", "", body, *self._remarks(printed)]))
        return "\n\n".join([*parts, "\n".join(f"* {note}" for note in self.notes())])

    def to_json(self) -> str:
        """Every number, ours and theirs."""
        tables = [
            {
                "paper": printed.paper,
                "table": printed.table,
                "backbone": printed.backbone,
                "methods": {
                    line.method: {
                        "ours": {
                            measure: None
                            if math.isnan(mean)
                            else {"mean": mean, "half_interval": _finite(half), "n": n}
                            for measure, (mean, half, n) in zip(printed.measures, line.ours, strict=True)
                        },
                        "printed": dict(zip(printed.measures, line.printed, strict=True)),
                        "forward": {"ours": line.forward[0], "printed": line.forward[1]},
                    }
                    for line in self.lines(printed)
                },
                "remarks": list(printed.remarks),
            }
            for printed in self.printed
        ]
        settings = [table.records.setting for table in self.tables]
        return json.dumps({"tables": tables, "facts": self.facts, "settings": settings}, indent=1)

    def notes(self) -> list[str]:
        """What the reader needs to know."""
        return [
            *self.facts,
            "ours: mean ± half the 95 % bootstrap interval; printed: the paper's number; "
            "forward: samples passed forward for one map",
        ]

    def _cells(self, printed: Printed) -> tuple[list[str], list[list[str]]]:
        arrows = {m.name: m.arrow for table in self.tables for m in table.measures}
        head = ["method", "", *(f"{name} {arrows.get(name, '')}".strip() for name in printed.measures), "forward"]
        rows = []
        for line in self.lines(printed):
            passes, theirs = line.forward
            rows.append([line.method, "ours", *(_number(*cell) for cell in line.ours), f"{passes:.6g}"])
            rows.append(["", "printed", *(f"{x:.2f}" for x in line.printed), "–" if theirs is None else str(theirs)])
        return head, rows

    def _remarks(self, printed: Printed) -> list[str]:
        return ["", *printed.remarks] if printed.remarks else []


def _number(mean: float, half: float, images: int) -> str:
    if not images:
        return "–"
    return f"{mean:.2f}" if math.isnan(half) else f"{mean:.2f} ±{half:.2f}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
