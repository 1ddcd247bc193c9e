"""A table as HTML: for the page of an evaluation, and for notebooks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from attrib_zoo.benchmark.words import Numbers, standing, summary

if TYPE_CHECKING:
    from attrib_zoo.benchmark.records import Records

_ACROSS = 8  # columns next to the name that a screen of 1280 pixels shows


class Told(Numbers, Protocol):
    """The part of a :class:`~attrib_zoo.benchmark.table.Table` shown here: it imports this module, not the reverse."""

    records: Records

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows as text."""

    def best(self, measure: str) -> list[str]:
        """The methods with the best mean."""

    def notes(self) -> list[str]:
        """What the reader needs to know."""


@dataclass(frozen=True)
class Cell:
    """What one field shows: its value for sorting, a number, the interval below it, and how it compares."""

    value: Any
    text: str
    interval: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Part:
    """A table of at most as many columns as a screen shows."""

    title: str
    head: list[str]
    rows: list[tuple[str, bool, list[Cell]]]


def parts(table: Told) -> list[Part]:
    """Measures, then costs; columns without any value are left out."""
    head, rows = table.cells()
    columns: list[tuple[str, list[Cell]]] = []
    for place, measure in enumerate(table.measures, start=1):
        stands = standing(table, measure)
        leaders = table.best(measure.name)
        cells = []
        for method, row in zip(table.methods, rows, strict=True):
            text, _, interval = row[place].partition(" ")
            kind = "best" if method in leaders else "tied" if method in (*stands.tied, *stands.level) else ""
            value = table.estimate(method, measure.name).mean
            cells.append(Cell("" if math.isnan(value) else value, text, interval, kind))
        columns.append((head[place], cells))
    costs = [
        (head[place], [Cell("" if row[place] == "–" else row[place], row[place]) for row in rows])
        for place in range(1 + len(table.measures), len(head))
    ]
    kept = [column for column in columns if any(cell.value != "" for cell in column[1])]
    per = -(-len(kept) // max(1, -(-len(kept) // _ACROSS)))  # parts of about the same length
    found = [_part("", table, kept[i : i + per]) for i in range(0, len(kept), max(1, per))]
    costs = [column for column in costs if any(cell.value != "" for cell in column[1])]
    return [part for part in (*found, _part("Cost", table, costs)) if part.head]


def _part(title: str, table: Told, columns: Sequence[tuple[str, list[Cell]]]) -> Part:
    rows = [
        (method, method in table.controls, [cells[i] for _, cells in columns]) for i, method in enumerate(table.methods)
    ]
    return Part(title, [name for name, _ in columns], rows)


def render(template: str, **values: Any) -> str:
    """Fill a template of this package; everything is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = Environment(
        loader=PackageLoader("attrib_zoo.benchmark"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return found.get_template(template).render(**values)


def table_html(table: Told) -> str:
    """A table for notebooks, with the words before it."""
    return render("notebook.html", parts=parts(table), summary=summary(table), notes=table.notes())
