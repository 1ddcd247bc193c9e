"""What the commands of the command line do; each returns the text to print."""

from __future__ import annotations

import inspect
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

import attrib_zoo
from attrib_zoo.attribution import Attribution
from attrib_zoo.errors import CheckpointError, DataError, NotFittedError, OptionError
from attrib_zoo.models import LoadedModel, load, read_class_names
from attrib_zoo.photos import Photos, find_photos, is_photo, open_photo, own_stems, writable_folder
from attrib_zoo.training import checkpoint
from attrib_zoo.visualize import figure, save_overlay
from attrib_zoo.wording import closest, listed


def methods() -> dict[str, type[Attribution]]:
    """Every exported method by the name it has on the command line: its class name in lower case."""
    exported = vars(attrib_zoo).values()
    found = [cls for cls in exported if isinstance(cls, type) and issubclass(cls, Attribution) and cls.family]
    return {cls.__name__.lower(): cls for cls in sorted(found, key=lambda cls: (cls.family, cls.__name__))}


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text under their headers."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    lines = [headers, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


# ---------------------------------------------------------------------- demo, list


def demo(options: Any) -> str:
    """Run the self-contained demonstration."""
    from attrib_zoo.cli.demo import run

    result = run(writable_folder(options.output), seed=options.seed, progress=True)
    return f"{result}\n\npicture: {result.picture}"


def list_methods(options: Any) -> str:
    """The methods, as their classes describe them."""
    rows = [
        (name, cls.family, " ".join(cls.models), "yes" if cls.needs_fit else "no", cls.cost, cls.paper)
        for name, cls in methods().items()
    ]
    note = "cost per image: F a forward pass, B a backward pass"
    return table(("method", "family", "models", "fit first", "cost", "paper"), rows) + f"\n\n{note}"


# ---------------------------------------------------------------------- explain


@dataclass(frozen=True)
class _Photo:
    """A photograph, what it is called in the table, and where its pictures go."""

    path: Path
    shown: str
    stem: str
    files: dict[str, Path]

    @property
    def written(self) -> str:
        kinds = list(self.files)
        return f"{self.stem}-{kinds[0]}.png" if len(kinds) == 1 else f"{self.stem}-{{{','.join(kinds)}}}.png"


def explain(options: Any) -> str:
    """Write overlays of photographs, and say what the model saw in them."""
    folder = Path(options.output)
    paths = find_photos(options.photos, leave_out=folder)
    for path in paths:
        open_photo(path)  # whatever cannot be read is found before anything is written
    loaded = load_model(options)
    target = None if options.target is None else loaded.class_index(options.target)
    ready = explainers(options, loaded)
    photos = _plan(paths, folder, list(ready))
    writable_folder(folder)

    rows: list[list[str]] = []
    for start in _progress(range(0, len(photos), options.batch_size)):
        rows += _explain_batch(photos[start : start + options.batch_size], loaded, ready, target)
    headers = ["photo", "top-1 class", "confidence"]
    headers += [] if target is None else [f"explained: {loaded.class_name(target)}"]
    size = torch.zeros(1, *loaded.input_size, device=_device_of(loaded))
    room = max(map(len, ready))
    reads = [f"{name:{room}} reads {', '.join(t.name for t in e.taps(size))}" for name, e in ready.items()]
    count = sum(len(photo.files) for photo in photos)
    footer = "\n".join([*reads, f"{count} picture{'s' * (count > 1)} in {folder}{os.sep}"])
    return table([*headers, "files"], rows) + "\n\n" + footer


def _explain_batch(
    photos: Sequence[_Photo], loaded: LoadedModel, explainers: dict[str, Attribution], target: int | None
) -> list[list[str]]:
    """Explain and draw a few photographs; returns their rows of the table."""
    images = [open_photo(photo.path) for photo in photos]
    inputs = torch.stack([loaded.transform(image) for image in images]).to(_device_of(loaded))
    with torch.no_grad():
        outputs = loaded.model(inputs).float().cpu()
    confidence = outputs.softmax(1) if loaded.num_classes > 1 else outputs.sigmoid()
    decision = outputs.argmax(1)
    asked = decision if target is None else torch.full_like(decision, target)
    shown = sys.stderr.isatty()  # long methods draw a bar of their own
    maps = {name: e.attribute(inputs, asked.tolist(), show_progress=shown) for name, e in explainers.items()}
    maps = {name: found.cpu().clamp(min=0) for name, found in maps.items()}  # what speaks for the class
    rows = []
    for i, photo in enumerate(photos):
        top, sure = loaded.class_name(int(decision[i])), float(confidence[i, decision[i]])
        row = [photo.shown, top, f"{sure:.1%}"]
        title = f"{top}  {sure:.0%}"
        if target is not None:
            share = float(confidence[i, target])
            row.append(f"{share:.1%}")
            title += f"      explained: {loaded.class_name(target)}  {share:.0%}"
        columns = {_heading(e, int(asked[i])): maps[name][i] for name, e in explainers.items()}
        _draw(photo, loaded.view(images[i]), columns, title)
        rows.append([*row, photo.written])
    return rows


def _heading(explainer: Attribution, target: int) -> str:
    counts = getattr(explainer, "class_counts_", None)
    return explainer.get_name() + (" (not trained on this class)" if counts is not None and counts[target] == 0 else "")


def _draw(photo: _Photo, view: Tensor, columns: dict[str, Tensor], title: str) -> None:
    for file, found in zip(photo.files.values(), columns.values(), strict=False):
        save_overlay(file, view, found)
    if len(columns) > 1:
        maps = {heading: [found] for heading, found in columns.items()}
        figure([view], maps, titles=[title], path=photo.files["compared"])


def _plan(paths: Sequence[Path], folder: Path, names: list[str]) -> list[_Photo]:
    """Which files will be written; never one of the photographs."""
    base = os.path.commonpath([path.absolute().parent for path in paths])
    kinds = [*names, "compared"] if len(names) > 1 else names
    photos = []
    for path, stem in zip(paths, own_stems(paths), strict=True):
        files = {kind: folder / f"{stem}-{kind}.png" for kind in kinds}
        photos.append(_Photo(path, os.path.relpath(path.absolute(), base), stem, files))
    own = {path.resolve() for path in paths}
    for photo in photos:
        for file in photo.files.values():
            if file.resolve() in own:
                raise DataError(f"output: '{file}' would replace a photograph; choose another folder with --output")
    return photos


def explainers(options: Any, loaded: LoadedModel) -> dict[str, Attribution]:
    """The methods of ``--method`` and ``--explainer`` by name, ready to explain."""
    names = [name.strip().lower() for name in (options.method or "").split(",") if name.strip()]
    ready: dict[str, Attribution] = {}
    cls: Any
    for file in (options.explainer or "").split(","):
        if file.strip():
            kind = str(checkpoint.read(file.strip()).facts.get("method", ""))
            cls = methods().get(kind.lower())
            if cls is None:
                raise CheckpointError(f"explainer: '{file}' is of the method {kind!r}, which is not installed")
            ready[kind.lower()] = cls.load(file.strip(), loaded.model)
    for name in names or ([] if ready else ["gradcam"]):
        cls = _method(name)
        if name not in ready and cls.needs_fit:
            weights = f" --weights {shlex.quote(options.weights)}" if options.weights else ""
            raise NotFittedError(
                f"method: {name} must be trained for the model before it explains; run attrib-zoo fit --method {name} "
                f"--model {options.model}{weights} --data FOLDER --output FILE.safetensors, then add --explainer FILE"
            )
        ready.setdefault(name, cls(loaded.model, _layers(options.layers), **_accepted(cls, _statistics(loaded))))
    return {name: ready[name] for name in dict.fromkeys([*names, *ready])}


# ---------------------------------------------------------------------- fit


def fit(options: Any) -> str:
    """Train an explainer on a folder of images and save it."""
    output = Path(options.output)
    if output.suffix != ".safetensors":
        raise OptionError(f"output: must end in .safetensors, got '{output}'")
    cls: Any = _method(options.method)
    if not cls.needs_fit:
        raise OptionError(
            f"method: {options.method} needs no training; use it at once: "
            f"attrib-zoo explain PHOTO --method {options.method} --model {options.model}"
        )
    training = _usable(find_photos([options.data]), options.skip_bad)
    validation = None if options.val is None else _usable(find_photos([options.val]), options.skip_bad)
    loaded = load_model(options)
    settings = _statistics(loaded) | ({} if options.recipe is None else {"recipe": options.recipe})
    explainer = cls(loaded.model, _layers(options.layers), **_accepted(cls, settings))
    writable_folder(output.parent)
    folder = None if options.checkpoint_dir is None else writable_folder(options.checkpoint_dir)
    try:
        explainer.fit(
            _loader(training, loaded, options, shuffle=True),
            epochs=options.epochs,
            max_steps=options.max_steps,
            val_loader=None if validation is None else _loader(validation, loaded, options, shuffle=False),
            seed=options.seed,
            resume_from=options.resume,
            checkpoint_dir=folder,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "with --checkpoint-dir FOLDER a fit can be continued later"
            if folder is None
            else f"continue with the same command and --resume {shlex.quote(str(folder))}"
        ) from None
    explainer.save(output)
    return f"{explainer.report()}\n\n{_next_steps(output, options, cls.__name__)}"


def _next_steps(output: Path, options: Any, kind: str) -> str:
    words = ["attrib-zoo", "explain", "PHOTO", "--model", options.model]
    words += [] if options.weights is None else ["--weights", options.weights]
    words += ["--explainer", str(output)]
    return "\n".join(
        [
            f"saved {output} ({output.stat().st_size / 1e6:.1f} MB); use it with",
            f"  {shlex.join(words)}",
            f"  {kind}.load({str(output)!r}, model).attribute(images)",
        ]
    )


def _usable(paths: list[Path], skip_bad: bool) -> list[Path]:
    """The files that begin as images do; the rest is an error, or left out."""
    good = [path for path in paths if is_photo(path)]
    bad = sorted(set(paths) - set(good))
    if bad and (not skip_bad or not good):
        raise DataError(f"{len(bad)} of {len(paths)} files are no images: {listed(bad)}; remove them, or --skip-bad")
    return good


def _loader(paths: list[Path], loaded: LoadedModel, options: Any, *, shuffle: bool) -> DataLoader[Tensor]:
    return DataLoader(
        Photos(paths, loaded.transform, skip_bad=options.skip_bad),
        batch_size=min(options.batch_size, len(paths)),
        shuffle=shuffle,
        drop_last=shuffle,
        num_workers=options.workers,
    )


# ---------------------------------------------------------------------- shared


def load_model(options: Any) -> LoadedModel:
    """The model that ``--model``, ``--weights``, ``--classes`` and ``--device`` name."""
    names = None if options.classes is None else read_class_names(options.classes)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return load(options.model, weights=options.weights, class_names=names, device=device)


def _method(name: str) -> type[Attribution]:
    known = methods()
    if name.lower() not in known:
        raise OptionError(f"method: no method {name!r}{closest(name.lower(), known)}; attrib-zoo list shows them all")
    return known[name.lower()]


def _statistics(loaded: LoadedModel) -> dict[str, Any]:
    """What trained methods must know of the images' standardisation."""
    return {"mean": loaded.mean, "std": loaded.std}


def _accepted(cls: type[Attribution], settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that the method has."""
    return {name: value for name, value in settings.items() if name in inspect.signature(cls.__init__).parameters}


def _layers(text: str | None) -> list[str | int] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    return [int(name) if name.lstrip("-").isdigit() else name for name in names]


def _device_of(loaded: LoadedModel) -> torch.device:
    return next(loaded.model.parameters()).device


def _progress(steps: range) -> Iterator[int]:
    from tqdm.auto import tqdm

    return iter(tqdm(steps, desc="explain", unit="batch", disable=None if len(steps) > 1 else True, leave=False))
