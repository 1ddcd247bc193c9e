"""One HTML page with everything: the table, the curves, and each method's best, median and worst maps; no network."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.capture import evaluating
from attrib_zoo.benchmark.markup import parts, render
from attrib_zoo.benchmark.runner import as_function
from attrib_zoo.benchmark.table import Table
from attrib_zoo.benchmark.words import summary
from attrib_zoo.errors import DataError, OptionError
from attrib_zoo.training.files import write_whole
from attrib_zoo.visualize import overlay


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
    page = render(
        "report.html",
        title=title,
        summary=summary(table),
        parts=parts(table),
        notes=table.notes(),
        wide=_plot(table, 3),
        narrow=_plot(table, 1),
        cards=[card for card in cards if card[1]],
        measure=measure,
    )
    target = Path(path)
    try:
        write_whole(target, page + "\n")
    except OSError as error:
        raise DataError(f"path: cannot write '{target}' ({error.strerror}); choose another folder") from error
    return target


def _plot(table: Table, across: int) -> str:
    picture = io.BytesIO()
    table.plot(across).savefig(picture, format="png")
    return _data(picture.getvalue(), "png")


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
) -> tuple[str, list[tuple[str, ...]]]:
    """A method's name, and of three images what they are, value, class, its share, and the pictures."""
    values = table.values(name, measure)
    lower = next(m.lower for m in table.measures if m.name == measure)
    order = (values if lower else -values).nan_to_num(torch.inf).argsort().tolist()
    order = [place for place in order if bool(values[place].isfinite())]
    if not order:
        return name, []
    figures: list[tuple[str, ...]] = []
    for what, place in (("best", order[0]), ("median", order[len(order) // 2]), ("worst", order[-1])):
        row = table.records.rows[name, table.images[place]]
        picture = image(row.image)[None]
        inputs = picture.to(next(model.parameters(), picture))
        with evaluating(model), torch.enable_grad():
            found = as_function(name, method)(inputs, torch.tensor([row.target], device=inputs.device)).detach()
        plain = overlay(inputs[0].cpu(), torch.zeros(2, 2), mean=mean, std=std)
        heat = found[0].float().cpu().nan_to_num(0.0, 0.0, 0.0).clamp(min=0)  # what speaks for the class
        drawn = overlay(inputs[0].cpu(), heat, mean=mean, std=std)
        told = f"{float(values[place]):.2f}", class_name(row.target), f"{row.clean:.0%}"
        figures.append((what, *told, _jpeg(plain), _jpeg(drawn)))
    return name, figures


def _jpeg(pixels: Any) -> str:
    from PIL import Image

    file = io.BytesIO()
    picture = Image.fromarray(pixels)
    picture.thumbnail((224, 224))
    picture.save(file, "jpeg", quality=80)
    return _data(file.getvalue(), "jpeg")


def _data(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
