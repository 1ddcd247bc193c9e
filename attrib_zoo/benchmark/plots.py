"""Pictures of a table: curves over the share of pixels removed, and what a method's faithfulness costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from attrib_zoo.benchmark.controls import CHANCE
from attrib_zoo.benchmark.estimates import Estimate
from attrib_zoo.benchmark.measures import Measure
from attrib_zoo.benchmark.records import Records
from attrib_zoo.errors import shown
from attrib_zoo.visualize import PLAIN, shows_itself

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"),
    *("#56b4e9", "#882255", "#332288", "#117733", "#999933"),
)
"""Of Okabe and Ito, and of Tol: the colour-blind can tell them apart."""

_MARKERS = "osD^vPX*<>"
_GREYS = ("#444444", "#777777", "#a0a0a0")
_DASHES: tuple[Any, ...] = ("--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (2, 4)))
_CONTROL_MARKERS = ("x", "+", "1", "|", "_")


class Numbers(Protocol):
    """The part of a :class:`~attrib_zoo.benchmark.table.Table` drawn here: it imports this module, not the reverse."""

    records: Records
    measures: list[Measure]

    @property
    def methods(self) -> list[str]:
        """The names of the rows."""

    @property
    def controls(self) -> list[str]:
        """Those of them that are controls."""

    def curve(self, method: str, measure: str) -> Tensor:
        """The mean curve, ``(P,)``."""

    def estimate(self, method: str, measure: str) -> Estimate:
        """Mean and interval."""


def plot(table: Numbers, across: int = 3) -> Figure:
    """A panel for each measure with a curve, and one for the first measure against the time it takes.

    Args:
        table: the numbers.
        across: the largest number of panels side by side; 1 is for narrow screens.

    Returns:
        A matplotlib figure of its own, unknown to ``pyplot``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    curves = [measure for measure in table.measures if measure.points]
    panels = len(curves) + 1
    across = min(panels, max(1, across))
    across = 2 if (panels, across) == (4, 3) else across  # no row of one
    down = -(-panels // across)
    rows = [method for method in table.methods if method != CHANCE]
    beside = max(1, min(len(rows), 5 * across // 3 if across > 1 else 2))  # names per line of the legend
    tall = 3.6 * down + 0.25 + 0.2 * -(-len(rows) // beside)
    sheet = Figure(figsize=(4.4 * across, tall), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(sheet)
    shows_itself(sheet)
    axes = [sheet.add_subplot(down, across, i + 1) for i in range(panels)]
    styles = _styles(table.methods, table.controls)
    for panel, measure in zip(axes, curves, strict=False):
        for method in rows:
            curve = 100 * table.curve(method, measure.name)
            panel.plot([100 * point for point in measure.points], curve, **styles[method])
        _dress(panel, f"{measure.name} {measure.arrow}", "pixels changed, %", "confidence, %")
    _scatter(axes[-1], table, styles)
    lines = [Line2D([], [], **styles[method]) for method in rows]
    places = list(map(str, range(len(rows))))  # the names follow: a legend leaves out those that begin with "_"
    style: dict[str, Any] = {"ncols": beside, "frameon": False, "fontsize": 9, "handlelength": 3.2}
    legend = sheet.legend(lines, places, loc="outside lower center", **style)
    for text, method in zip(legend.get_texts(), rows, strict=True):
        text.set(text=_name(method), **PLAIN)
    return sheet


def _scatter(panel: Axes, table: Numbers, styles: dict[str, dict[str, Any]]) -> None:
    """The first measure against the cost, with intervals."""
    from matplotlib.ticker import LogLocator, NullFormatter

    measure = table.measures[0]
    for method in table.methods:
        if method == CHANCE:
            continue
        found, cost = table.estimate(method, measure.name), table.records.costs[method].times_forward
        style = {**styles[method], "linestyle": "none"}
        reach = [[max(found.mean - found.low, 0.0)], [max(found.high - found.mean, 0.0)]]  # by rounding, else negative
        error = None if found.low != found.low else reach
        panel.errorbar([max(cost, 0.01)], [found.mean], yerr=error, capsize=2, elinewidth=0.8, **style)
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.xaxis.set_minor_formatter(NullFormatter())
    if measure.lower:
        panel.invert_yaxis()
    _dress(panel, f"{measure.name} against cost (up and left is better)", "time, × a forward pass", measure.name)


def _styles(methods: list[str], controls: list[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of each method: no two alike among a hundred; controls are grey, dashed lines."""
    styles: dict[str, dict[str, Any]] = {}
    for method in methods:
        control = method in controls
        number = sum((other in controls) == control for other in styles)
        colours, markers = (_GREYS, _CONTROL_MARKERS) if control else (_COLOURS, _MARKERS)
        styles[method] = {
            "color": colours[number % len(colours)],
            "marker": markers[(number + number // len(colours)) % len(markers)],
            "linestyle": _DASHES[number % len(_DASHES)] if control else "-",
            "markersize": 5 if control else 4,
            "linewidth": 1.2 if control else 1.6,
        }
    return styles


def _name(text: str) -> str:
    """A name that somebody chose, as it may stand in a picture."""
    return shown(text, 100)


def _dress(panel: Axes, title: str, x: str, y: str) -> None:
    panel.set_title(_name(title), fontsize=10, loc="left", **PLAIN)
    panel.set_xlabel(x, fontsize=9, **PLAIN)
    panel.set_ylabel(_name(y), fontsize=9, **PLAIN)
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
