"""The command ``explain``: overlays of photographs, and what the model saw in them; returns the text to print."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attrib_zoo.attribution import Attribution
from attrib_zoo.cli.shared import explainers, load_model
from attrib_zoo.errors import DataError, aligned
from attrib_zoo.methods.bases.trainable import TrainableAttribution
from attrib_zoo.models import LoadedModel
from attrib_zoo.models.photos import cut, find_photos, open_photo, own_stems, writable_folder
from attrib_zoo.targets import Contrast, TargetQuery, class_scores, scores_in
from attrib_zoo.visualize import Box, check_colours, figure, picture, write_picture


@dataclass(frozen=True)
class _Photo:
    """A photograph, what it is called in the table, and where its pictures go."""

    path: Path
    shown: str
    stem: str
    files: dict[str, Path]
    asked: str

    @property
    def written(self) -> str:
        kinds = list(self.files)
        kind = kinds[0] if len(kinds) == 1 else f"{{{','.join(kinds)}}}"
        return f"{self.stem}-{kind}{self.asked}.png"


def explain(options: Any) -> str:
    """Write overlays of photographs, and say what the model saw in them."""
    folder = Path(options.output)
    colours = {"alpha": options.alpha, "colormap": check_colours(options.alpha, options.colormap)}
    paths = find_photos(options.photos, leave_out=folder)
    for path in paths:
        open_photo(path)  # whatever cannot be read is found before anything is written
    loaded = load_model(options)
    target = None if options.target is None else loaded.class_index(options.target)
    ready = explainers(options, loaded)
    asked = "" if target is None else _asked(loaded, target)
    asked += "" if options.contrast is None else f"-contrast-{options.contrast}"
    photos = _plan(paths, folder, list(ready), asked)
    writable_folder(folder)

    rows: list[list[str]] = []
    for start in _progress(range(0, len(photos), options.batch_size)):
        batch = photos[start : start + options.batch_size]
        rows += _explain_batch(batch, loaded, ready, target, options.contrast, options.score, colours)
    headers = ["photo", "top-1 class", "confidence"]
    headers += [] if target is None else [f"explained: {loaded.class_name(target)}"]
    size = torch.zeros(1, *loaded.input_size, device=_device_of(loaded))
    room = max(map(len, ready))
    reads = [f"{name:{room}} reads {', '.join(t.name for t in e.taps(size))}" for name, e in ready.items()]
    count = sum(len(photo.files) for photo in photos)
    footer = "\n".join([*reads, f"{count} picture{'s' * (count > 1)} in {folder}{os.sep}"])
    return "\n".join([*aligned([[*headers, "files"], *rows], rule=True), "", footer])


def _explain_batch(
    photos: Sequence[_Photo],
    loaded: LoadedModel,
    explainers: dict[str, Attribution],
    target: int | None,
    contrast: int | None,
    score: str,
    colours: dict[str, Any],
) -> list[list[str]]:
    """Explain and draw a few photographs; returns their rows of the table."""
    images = [open_photo(photo.path) for photo in photos]
    inputs = torch.stack([loaded.transform(image) for image in images]).to(_device_of(loaded))
    with torch.no_grad():
        outputs = scores_in(loaded.model(inputs)).float().cpu()
    confidence = class_scores(outputs, score)
    decision = TargetQuery(None).resolve(outputs).classes[:, 0]
    asked = decision if target is None else torch.full_like(decision, target)
    shown = sys.stderr.isatty()  # long methods draw a bar of their own
    wanted = asked.tolist() if contrast is None else Contrast(contrast, target=asked.tolist())
    maps = {name: e.attribute(inputs, wanted, show_progress=shown) for name, e in explainers.items()}
    maps = {name: found.cpu().clamp(min=0) for name, found in maps.items()}  # what speaks for the class
    rows = []
    for i, photo in enumerate(photos):
        top, sure = loaded.class_name(int(decision[i])), float(confidence[i, decision[i]])
        row = [photo.shown, top, f"{sure:.1%}"]
        title = f"{top}  {sure:.0%}"
        if target is not None:
            share = float(confidence[i, target])
            row.append(f"{share:.1%}")
            title = f"explained: {loaded.class_name(target)}  {share:.0%}      decided: {title}"
        columns = {_heading(e, int(asked[i])): maps[name][i] for name, e in explainers.items()}
        _draw(photo, images[i], loaded.seen(images[i]), columns, title, colours)
        rows.append([*row, photo.written])
    return rows


def _heading(explainer: Attribution, target: int) -> str:
    unseen = isinstance(explainer, TrainableAttribution) and not explainer.has_map_of(target)
    return explainer.get_name() + (" (not trained on this class)" if unseen else "")


def _draw(photo: _Photo, image: Any, box: Box, columns: dict[str, Tensor], title: str, colours: dict[str, Any]) -> None:
    """A picture of the whole photograph for each method, the part that the model saw outlined, and one of them all."""
    for file, (heading, found) in zip(photo.files.values(), columns.items(), strict=False):
        write_picture(file, picture(image, found, f"{title}\n{heading}", box=box, **colours).save)
    if len(columns) > 1:
        maps = {heading: [found] for heading, found in columns.items()}
        figure([image], maps, titles=[title], path=photo.files["compared"], boxes=[box], **colours)


def _asked(loaded: LoadedModel, target: int) -> str:
    """What a class that was asked for adds to the names of its pictures, so that they stand beside those of others."""
    name = "-".join(re.findall(r"\w+", loaded.class_names[target])) if loaded.class_names else ""
    return f"-{target}" + (f"-{cut(name, 40)}" if name else "")


def _plan(paths: Sequence[Path], folder: Path, names: list[str], asked: str) -> list[_Photo]:
    """Which files will be written; never one of the photographs."""
    base = os.path.commonpath([path.absolute().parent for path in paths])
    kinds = [*names, "compared"] if len(names) > 1 else names
    photos = []
    for path, stem in zip(paths, own_stems(paths), strict=True):
        files = {kind: folder / f"{stem}-{kind}{asked}.png" for kind in kinds}
        photos.append(_Photo(path, os.path.relpath(path.absolute(), base), stem, files, asked))
    own = {path.resolve() for path in paths}
    for photo in photos:
        for file in photo.files.values():
            if file.resolve() in own:
                raise DataError(f"output: '{file}' would replace a photograph; choose another folder with --output")
    return photos


def _device_of(loaded: LoadedModel) -> torch.device:
    return next(loaded.model.parameters()).device


def _progress(steps: range) -> Iterator[int]:
    from tqdm.auto import tqdm

    return iter(tqdm(steps, desc="explain", unit="batch", disable=None if len(steps) > 1 else True, leave=False))
