"""The command ``evaluate``: methods times measures on a folder of images; returns the text to print."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from attrib_zoo.attribution import Attribution
from attrib_zoo.benchmark import FAMILIES, Measure, write_report
from attrib_zoo.benchmark import evaluate as run
from attrib_zoo.benchmark.measures import TRUTH, chosen
from attrib_zoo.cli.shared import explainers, load_model
from attrib_zoo.errors import DataError, OptionError, shown
from attrib_zoo.models import LoadedModel
from attrib_zoo.models.photos import BoxedPhotos, Photos, find_photos, is_photo, open_photo, read_boxes, writable_folder
from attrib_zoo.training.files import write_whole
from attrib_zoo.training.locks import hold
from attrib_zoo.training.signals import Stopped

RESULTS, REPORT = "results.jsonl", "report.html"


def evaluate(options: Any) -> str:
    """Measure methods on a folder of images; write table, per-image results, plots and a page."""
    folder = Path(options.output)
    paths = find_photos([options.data], leave_out=folder)[: options.max_images]
    for path in paths:
        if not is_photo(path):
            open_photo(path)  # fails for a bad file before anything is measured
    boxes = None if options.boxes is None else _boxes(options.boxes, paths)
    measures = _measures(options.metrics, boxes is not None)
    loaded = load_model(options)
    ready = {explainer.get_name(): explainer for explainer in explainers(options, loaded).values()}
    like = torch.zeros(1, *loaded.input_size).to(next(loaded.model.parameters()))
    for explainer in ready.values():
        explainer.taps(like)  # fails for a missing layer before anything is written
    with hold(writable_folder(folder), "evaluate"):
        return _measured(options, loaded, ready, measures, paths, boxes)


def _measured(
    options: Any,
    loaded: LoadedModel,
    ready: dict[str, Attribution],
    measures: list[Measure],
    paths: list[Path],
    boxes: dict[Path, torch.Tensor] | None,
) -> str:
    """The table, its files and the page; returns what to print."""
    folder = Path(options.output)
    photos = Photos(paths, loaded.transform)
    data: Any = photos if boxes is None else BoxedPhotos(photos, boxes, loaded.mean, loaded.std)
    try:
        table = run(
            loaded.model,
            ready,
            DataLoader(data, options.batch_size, num_workers=options.workers),
            measures,
            masking=options.masking,
            score=options.score,
            seed=options.seed,
            memory=options.memory,
            path=folder / RESULTS,
        )
    except KeyboardInterrupt as stop:
        signal = getattr(stop, "signal", None)
        raise Stopped(f"the same command continues from {folder / RESULTS}", signal=signal) from None
    formats = {"table.md": table.to_markdown(), "table.csv": table.to_csv(), "table.json": table.to_json()}
    formats |= {"table.tex": table.to_latex(), "differences.md": table.differences()}
    for name, text in formats.items():
        write_whole(folder / name, text + "\n")
    write_whole(folder / "plots.png", partial(table.plot().savefig, format="png"))
    write_report(
        folder / REPORT,
        table,
        loaded.model,
        ready,
        photos.__getitem__,
        mean=loaded.mean,
        std=loaded.std,
        title=shown(f"{options.model} on {len(paths)} images of {Path(options.data).name}"),
        class_name=loaded.class_name,
    )
    files = ", ".join([REPORT, *formats, "plots.png", RESULTS])
    return f"{table.to_text()}\n\n{folder}/: {files}"


def _boxes(path: str, paths: Sequence[Path]) -> dict[Path, torch.Tensor]:
    """The boxes of ``--boxes``; some photograph must have one."""
    found = read_boxes(path)
    if not any(photo.resolve() in found for photo in paths):
        raise DataError(
            f"boxes: '{path}' must name images of the folder, relative to its own place, got none of '{paths[0]}' and "
            f"the {len(paths) - 1} others; look at its paths"
        )
    return found


def _measures(names: str, boxed: bool) -> list[Measure]:
    """The measures of ``--metrics``; a folder of images has no regions, a file of boxes gives one for each."""
    served = (None, "region") if boxed else (None,)
    allowed = [family for family, measures in FAMILIES.items() if measures[0].needs in served]
    found = chosen(names, TRUTH)
    for measure in found:
        if measure.needs not in served:
            raise OptionError(
                f"metrics: {measure.name} needs the true regions of each image, which a folder does not say; "
                f"{'' if boxed else 'give their boxes with --boxes, '}choose from {', '.join(allowed)}, or call "
                "attrib_zoo.benchmark.evaluate"
            )
    return found
