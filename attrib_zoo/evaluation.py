"""What the commands ``evaluate`` and ``layers`` do; each returns the text to print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from attrib_zoo.backbone.layers import describe
from attrib_zoo.benchmark import evaluate as run
from attrib_zoo.benchmark import write_report
from attrib_zoo.commands import explainers, load_model, methods
from attrib_zoo.models import unloaded
from attrib_zoo.photos import Photos, find_photos, writable_folder

RESULTS, REPORT = "results.jsonl", "report.html"


def evaluate(options: Any) -> str:
    """Measure methods on a folder of images; write table, per-image results, plots and a page."""
    folder = Path(options.output)
    paths = find_photos([options.data], leave_out=folder)[: options.max_images]
    loaded = load_model(options)
    ready = {explainer.get_name(): explainer for explainer in explainers(options, loaded).values()}
    writable_folder(folder)
    photos = Photos(paths, loaded.transform)
    table = run(
        loaded.model,
        ready,
        DataLoader(photos, options.batch_size, num_workers=options.workers),
        options.metrics,
        masking=options.masking,
        seed=options.seed,
        memory=options.memory,
        path=folder / RESULTS,
    )
    formats = {"table.md": table.to_markdown(), "table.csv": table.to_csv(), "table.json": table.to_json()}
    formats |= {"table.tex": table.to_latex(), "differences.md": table.differences()}
    for name, text in formats.items():
        (folder / name).write_text(text + "\n", encoding="utf-8")
    table.plot().savefig(folder / "plots.png")
    write_report(
        folder / REPORT,
        table,
        loaded.model,
        ready,
        photos.__getitem__,
        mean=loaded.mean,
        std=loaded.std,
        title=f"{options.model} on {len(paths)} images of {Path(options.data).name}",
        class_name=loaded.class_name,
    )
    files = ", ".join([REPORT, *formats, "plots.png", RESULTS])
    return f"{table.to_text()}\n\n{folder}/: {files}"


def layers(options: Any) -> str:
    """Which layers of a model can be explained, and which method takes which by default."""
    model, size = unloaded(options.model)
    if options.size is not None:
        height, _, width = options.size.partition("x")
        size = (size[0], int(height), int(width or height))
    with torch.no_grad():
        description = describe(model.eval(), torch.zeros(1, *size))
    return f"{description}\n\n{_takers(model)}"


def _takers(model: nn.Module) -> str:
    """Which method takes which of the defaults that the table names."""
    by_rule: dict[str, list[str]] = {}
    for cls in methods().values():
        rule = cls(model)._layer_rule()
        counted = rule is not None and rule[0] in ("outputs", "norms")
        name = "no layers" if rule is None else f"{rule[0]} ({rule[1]})" if counted else rule[0]
        by_rule.setdefault(name, []).append(cls.__name__)
    width = max(map(len, by_rule))
    lines = [f"  {rule:{width}}  {', '.join(names)}" for rule, names in sorted(by_rule.items())]
    return "\n".join(["taken by default:", *lines])
