"""One HTML page with everything: the table, the curves, and each method's best, median and worst maps; no network."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.capture import evaluating
from attrib_zoo.benchmark.runner import as_function
from attrib_zoo.benchmark.table import Table
from attrib_zoo.errors import DataError, OptionError
from attrib_zoo.training.files import write_whole
from attrib_zoo.visualize import overlay

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
th { cursor: pointer; user-select: none; } th[aria-sort=ascending]::after { content: " ▲"; font-size: .7em; }
th[aria-sort=descending]::after { content: " ▼"; font-size: .7em; }
td small { color: #888; } td.best { font-weight: 650; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(34rem, 1fr)); gap: 1.2rem; }
.card { border: 1px solid #8884; border-radius: .5rem; padding: .7rem; }
.card h3 { margin: 0 0 .5rem; font-size: 1rem; }
.trio { display: grid; grid-template-columns: repeat(3, 1fr); gap: .5rem; } figure { margin: 0; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 2px; }
img { max-width: 100%; height: auto; display: block; }
.pair img { width: 100%; } figcaption { font-size: .8rem; color: #777; } li { color: #777; font-size: .9rem; }
"""

_SCRIPT = """
for (const head of document.querySelectorAll("th")) head.addEventListener("click", () => {
  const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => { const v = row.cells[column].dataset.value; return v === "" ? NaN : isNaN(v) ? v : Number(v); };
  const order = (a, b) => { const x = key(a), y = key(b);
    if (Number.isNaN(x)) return 1; if (Number.isNaN(y)) return -1;
    return (x > y ? 1 : x < y ? -1 : 0) * (up ? 1 : -1); };
  body.append(...[...body.rows].sort(order));
});
"""


def write_report(
    path: str | os.PathLike[str],
    table: Table,
    model: nn.Module,
    methods: Mapping[str, Any],
    image: Callable[[int], Tensor],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    title: str = "attrib_zoo: evaluation",
    class_name: Callable[[int], str] = str,
    rank_by: str | None = None,
) -> Path:
    """Write the page; pictures are inside it.

    Args:
        path: the ``.html`` file; its folder must exist.
        table: what :func:`attrib_zoo.benchmark.evaluate` returned.
        model: the classifier.
        methods: name -> method, whose maps are drawn.
        image: from an image's place in the loader to the standardised image ``(C, H, W)``.
        mean: of the standardisation, for drawing.
        std: of the standardisation.
        title: the heading.
        class_name: from a class index to its name.
        rank_by: the measure by which best, median and worst are picked; the first by default.

    Returns:
        The path.

    Raises:
        DataError: the file cannot be written.
        OptionError: no such measure to rank by.
    """
    names = [measure.name for measure in table.measures]
    measure = names[0] if rank_by is None else rank_by
    if measure not in names:
        raise OptionError(f"rank_by: must be one of {', '.join(names)}, got {measure!r}")
    cards = [
        _card(table, model, name, method, image, measure, mean, std, class_name)
        for name, method in methods.items()
        if name in table.methods
    ]
    picture = io.BytesIO()
    table.plot().savefig(picture, format="png")
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes())
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p>Click a column's head to sort. Under each mean stands its 95 % bootstrap interval; the best mean is
bold, with all that equal it as shown, unless a control that knows nothing is better.</p>
<div class="scroll">{_table(table)}</div>
<ul>{notes}</ul>
<h2>Curves and cost</h2>
<img alt="curves and cost" src="{_data(picture.getvalue(), "png")}">
<h2>Best, median and worst image of each method, by {escape(measure)}</h2>
<div class="cards">{"".join(cards)}</div>
<script>{_SCRIPT}</script></body></html>
"""
    target = Path(path)
    try:
        write_whole(target, page)
    except OSError as error:
        raise DataError(f"path: cannot write '{target}' ({error.strerror}); choose another folder") from error
    return target


def _table(table: Table) -> str:
    head, rows = table.cells()
    best = [table.best(measure.name) for measure in table.measures]
    lines = []
    for method, row in zip(table.methods, rows, strict=True):
        cells = [f'<td data-value="{escape(method)}">{escape(method)}</td>']
        for measure, leaders, text in zip(table.measures, best, row[1:], strict=False):
            mean, _, interval = text.partition(" ")
            value = "" if mean == "–" else table.estimate(method, measure.name).mean
            mark = ' class="best"' if method in leaders else ""
            cells.append(f'<td data-value="{value}"{mark}>{mean}<br><small>{escape(interval)}</small></td>')
        cells += [f'<td data-value="{"" if c == "–" else c}">{c}</td>' for c in row[1 + len(table.measures) :]]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    heads = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _card(
    table: Table,
    model: nn.Module,
    name: str,
    method: Any,
    image: Callable[[int], Tensor],
    measure: str,
    mean: Sequence[float],
    std: Sequence[float],
    class_name: Callable[[int], str],
) -> str:
    """Three images with their maps."""
    values = table.values(name, measure)
    lower = next(m.lower for m in table.measures if m.name == measure)
    order = (values if lower else -values).nan_to_num(torch.inf).argsort().tolist()
    order = [place for place in order if bool(values[place].isfinite())]
    if not order:
        return ""
    figures = []
    for what, place in (("best", order[0]), ("median", order[len(order) // 2]), ("worst", order[-1])):
        row = table.records.rows[name, table.images[place]]
        picture = image(row.image)[None]
        inputs = picture.to(next(model.parameters(), picture))
        with evaluating(model), torch.enable_grad():
            found = as_function(name, method)(inputs, torch.tensor([row.target], device=inputs.device)).detach()
        plain = overlay(inputs[0].cpu(), torch.zeros(2, 2), mean=mean, std=std)
        heat = found[0].float().cpu().nan_to_num(0.0, 0.0, 0.0).clamp(min=0)  # what speaks for the class
        drawn = overlay(inputs[0].cpu(), heat, mean=mean, std=std)
        caption = f"{what}: {float(values[place]):.2f}<br>{escape(class_name(row.target))}, {row.clean:.0%}"
        pictures = "".join(f'<img alt="" src="{_jpeg(pixels)}">' for pixels in (plain, drawn))
        figures.append(f'<figure><div class="pair">{pictures}</div><figcaption>{caption}</figcaption></figure>')
    return f'<section class="card"><h3>{escape(name)}</h3><div class="trio">{"".join(figures)}</div></section>'


def _jpeg(pixels: Any) -> str:
    from PIL import Image

    file = io.BytesIO()
    picture = Image.fromarray(pixels)
    picture.thumbnail((224, 224))
    picture.save(file, "jpeg", quality=80)
    return _data(file.getvalue(), "jpeg")


def _data(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
