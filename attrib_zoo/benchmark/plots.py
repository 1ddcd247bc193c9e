"""Pictures of a table: curves over the share of pixels removed, and what a method's faithfulness costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from attrib_zoo.benchmark.controls import CHANCE
from attrib_zoo.benchmark.estimates import Estimate
from attrib_zoo.benchmark.measures import Measure
from attrib_zoo.benchmark.records import Records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = (
    "#d1495b",
    "#00798c",
    "#edae49",
    "#30638e",
    "#6a994e",
    "#8e5572",
    "#003d5b",
    "#bc6c25",
    "#577590",
    "#9a031e",
)
_MARKERS = "osD^vPX*<>"


class Numbers(Protocol):
    """What is drawn of a :class:`~attrib_zoo.benchmark.table.Table`, which imports this module and not the reverse."""

    records: Records
    measures: list[Measure]

    @property
    def methods(self) -> list[str]:
        """The rows."""

    @property
    def controls(self) -> list[str]:
        """Those of them that explain nothing."""

    def curve(self, method: str, measure: str) -> Tensor:
        """The mean curve, ``(P,)``."""

    def estimate(self, method: str, measure: str) -> Estimate:
        """Mean and interval."""


def plot(table: Numbers) -> Figure:
    """A panel for each measure with a curve, and one for the first measure against the time it takes.

    Returns:
        A matplotlib figure of its own, unknown to ``pyplot``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = [measure for measure in table.measures if measure.points]
    panels = len(curves) + 1
    across = min(panels, 3)
    down = -(-panels // across)
    sheet = Figure(figsize=(4.4 * across, 3.6 * down + 0.6), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(sheet)
    axes = [sheet.add_subplot(down, across, i + 1) for i in range(panels)]
    styles = _styles(table.methods, table.controls)
    for panel, measure in zip(axes, curves, strict=False):
        for method in table.methods:
            if method != CHANCE:
                curve = 100 * table.curve(method, measure.name)
                panel.plot([100 * point for point in measure.points], curve, **styles[method])
        _dress(panel, f"{measure.name} {measure.arrow}", "pixels changed, %", "confidence, %")
    _scatter(axes[-1], table, styles)
    handles, labels = axes[-1].get_legend_handles_labels()
    sheet.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False, fontsize=9)
    return sheet


def _scatter(panel: Axes, table: Numbers, styles: dict[str, dict[str, Any]]) -> None:
    """The first measure against the cost, with intervals; controls have no cost worth showing."""
    measure = table.measures[0]
    for method in table.methods:
        if method == CHANCE:
            continue
        found, cost = table.estimate(method, measure.name), table.records.costs[method].times_forward
        style = {**styles[method], "linestyle": "none"}
        reach = [[max(found.mean - found.low, 0.0)], [max(found.high - found.mean, 0.0)]]  # rounding can turn them
        error = None if found.low != found.low else reach
        panel.errorbar([max(cost, 0.01)], [found.mean], yerr=error, capsize=2, elinewidth=0.8, label=method, **style)
    panel.set_xscale("log")
    if measure.lower:
        panel.invert_yaxis()
    _dress(panel, f"{measure.name} against cost (up and left is better)", "time, × a forward pass", measure.name)


def _styles(methods: list[str], controls: list[str]) -> dict[str, dict[str, Any]]:
    styles: dict[str, dict[str, Any]] = {}
    for number, method in enumerate(methods):
        shown = {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)], "markersize": 4}
        if method in controls:
            shown |= {"color": "#9aa0a6", "linestyle": "--" if number % 2 else ":"}
        styles[method] = shown
    return styles


def _dress(panel: Axes, title: str, x: str, y: str) -> None:
    panel.set_title(title, fontsize=10, loc="left")
    panel.set_xlabel(x, fontsize=9)
    panel.set_ylabel(y, fontsize=9)
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
