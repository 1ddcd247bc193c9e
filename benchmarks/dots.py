"""The pictures of docs/results: means and intervals of every method on all images, from benchmarks/results/CASE.json.

    python benchmarks/dots.py resnet10t vit squeezenet

A row for each method, a panel for each measure, a line through T-TAME's mean. Methods that were measured on fewer
images are left out, as means of other images compare badly; so are further seeds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

ROOT = Path(__file__).resolve().parent.parent
PANELS = ("AD(100)", "cost", "AD(50)", "AD(15)", "ROAD MoRF", "ROAD LeRF", "insertion", "deletion")
MORE = ("ROAD LeRF", "insertion")
FITTED, OTHER, CONTROL = ("#0072b2", "o"), ("#d55e00", "D"), ("#777777", "x")
MEANT = {FITTED: "fitted once", OTHER: "not fitted", CONTROL: "control"}


def rows(numbers: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The methods that are drawn and their colour and marker: fitted ones first, controls last."""
    controls, held = numbers["setting"]["controls"], numbers["methods"]
    most = max(one["measures"]["AD(100)"]["images"] for one in held.values())
    found = {}
    for name, one in held.items():
        if "seed" not in name and name != "chance" and one["measures"]["AD(100)"]["images"] == most:
            fitted = name.startswith(("TTAME", "LCAM"))
            found[name] = CONTROL if name in controls else FITTED if fitted else OTHER
    return dict(sorted(found.items(), key=lambda row: list(MEANT).index(row[1])))


def picture(numbers: dict[str, Any]) -> Figure:
    """Dots with 95 % intervals."""
    shown = rows(numbers)
    tall = 4 * (0.6 + 0.17 * len(shown)) + 0.3
    sheet = Figure(figsize=(7.6, tall), dpi=120, facecolor="white", layout="constrained")  # as wide as a page's text
    axes = sheet.subplots(4, 2, sharey=True)
    for panel, name in zip(axes.flat, PANELS, strict=True):
        for place, (method, (colour, marker)) in enumerate(shown.items()):
            held = numbers["methods"][method]
            style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4.5}
            if name == "cost":
                panel.plot([max(0.01, held["cost"]["seconds"] / held["cost"]["plain"])], [place], **style)
                continue
            found = held["measures"][name]
            panel.plot([found["low"], found["high"]], [place, place], color=colour, linewidth=1.2)
            panel.plot([found["mean"]], [place], **style)
        if name == "cost":
            panel.set(xscale="log", title="time, × a forward pass")
        else:
            if "TTAME" in shown:
                panel.axvline(numbers["methods"]["TTAME"]["measures"][name]["mean"], color=FITTED[0], linewidth=0.6)
            panel.set(title=f"{name}, %: {'more' if name in MORE else 'less'} is better")
        panel.title.set_fontsize(10)
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_yticks(range(len(shown)), list(shown), fontsize=9)
        panel.set_ylim(len(shown) - 0.4, -0.6)  # the first at the top
    marks = [Line2D([], [], color=colour, marker=marker, linestyle="none") for colour, marker in MEANT]
    sheet.legend(marks, list(MEANT.values()), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return sheet


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=["resnet10t", "vit", "squeezenet"])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    options = parser.parse_args()
    for case in options.cases:
        numbers = json.loads((ROOT / "benchmarks" / "results" / f"{case}.json").read_text(encoding="utf-8"))
        picture(numbers).savefig(options.output / f"{case}.png")


if __name__ == "__main__":
    main()
