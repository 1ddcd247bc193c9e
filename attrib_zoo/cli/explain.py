"""The command ``explain``: overlays, maps and tables of a few photographs or a million; returns the text to print."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from attrib_zoo.attribution import Attribution
from attrib_zoo.cli.parts import SKIPPED, Job, Part, check_formats, spelt
from attrib_zoo.cli.shared import explainers, load_model
from attrib_zoo.cli.stream import (
    Batch,
    Eye,
    Interval,
    Names,
    View,
    from_first,
    left,
    loader,
    shared_out,
    together,
    wait,
    watched,
)
from attrib_zoo.errors import DataError, OptionError, TargetError, aligned
from attrib_zoo.masking import upsample
from attrib_zoo.methods.bases.trainable import TrainableAttribution
from attrib_zoo.models import LoadedModel
from attrib_zoo.models.onepass import answer
from attrib_zoo.models.photos import cut, each_photo, own_stems, writable_folder
from attrib_zoo.training import distributed
from attrib_zoo.training.checkpoint import fingerprint
from attrib_zoo.training.locks import hold
from attrib_zoo.training.signals import Stopped
from attrib_zoo.visualize import check_colours, figure, picture, write_picture

_FEW = 64  # photographs; up to here they are held in memory and their table is printed
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class _Task:
    """What to compute for each photograph, and what to write.

    ``stems`` are the names of each photograph's pictures, ``None`` where none are drawn; ``originals`` are the
    photographs, as hashes of their paths: no picture may overwrite one. ``enlarge``: maps come at their layer's
    resolution.
    """

    names: Names
    base: str
    folder: Path
    loaded: LoadedModel
    explainers: dict[str, Attribution]
    targets: list[int] | None
    top_k: int
    contrast: int | None
    score: str
    colours: dict[str, Any]
    stems: Names | None
    originals: frozenset[int]
    enlarge: bool

    @property
    def device(self) -> torch.device:
        return next(self.loaded.model.parameters()).device

    @property
    def kinds(self) -> list[str]:
        return [*self.explainers, "compared"] if len(self.explainers) > 1 else list(self.explainers)

    def shown(self, index: int) -> str:
        """The name of a photograph in tables."""
        return spelt(os.path.relpath(Path(self.names[index]).absolute(), self.base))

    def asked(self, target: int) -> str:
        """What a class adds to the names of its pictures, so that they do not overwrite those of other classes."""
        suffix = "" if self.contrast is None else f"-contrast-{self.contrast}"
        if self.targets is None and self.top_k == 1:
            return suffix
        names = self.loaded.class_names
        name = "-".join(re.findall(r"\w+", names[target])) if names else ""
        return f"-{target}" + (f"-{cut(name, 40)}" if name else "") + suffix

    def files(self, stem: str, target: int) -> dict[str, Path]:
        """The pictures of a photograph and a class; never one of the photographs."""
        files = {kind: self.folder / f"{stem}-{kind}{self.asked(target)}.png" for kind in self.kinds}
        for file in files.values():
            if hash(os.path.realpath(file)) in self.originals:
                raise DataError(f"output: '{file}' would replace a photograph; choose another folder with --output")
        return files

    def loader(self, intervals: Sequence[Interval], options: Any) -> DataLoader[Any]:
        """A loader of these photographs and, if pictures are drawn, of what to draw on."""
        view = None if self.stems is None else Eye(replace(self.loaded, model=nn.Identity()))
        sizes = {"batch_size": options.batch_size, "workers": options.workers}
        return loader(self.names, intervals, self.loaded.transform, view, **sizes)


@dataclass(frozen=True)
class _Line:
    """The results of one photograph: for each class, each method's map ``(h, w)``, and its pictures."""

    index: int
    decision: int
    classes: list[int]
    confidence: Tensor
    maps: list[dict[str, Tensor]]
    pictures: list[list[str]]


def explain(options: Any) -> str:
    """Write overlays, maps and tables of photographs, and say what the model saw in them."""
    check_formats(options.maps, options.table)
    colours = {"alpha": options.alpha, "colormap": check_colours(options.alpha, options.colormap)}
    if options.target is not None and options.top_k > 1:
        raise OptionError("top_k: explains the classes that the model ranks first; leave it or --target out")
    with together():
        names = from_first(lambda: Names(each_photo(options.photos, leave_out=Path(options.output))))
        few = len(names) <= _FEW and distributed.world_size() == 1
        task = _task(options, names, colours)
        if few and not (options.maps or options.table or options.resume):
            return _few(options, task)
        return _job(options, task, few)


def _task(options: Any, names: Names, colours: dict[str, Any]) -> _Task:
    loaded = load_model(options)
    targets = None if options.target is None else _targets(loaded, options.target)
    if options.top_k > loaded.num_classes:
        raise OptionError(f"top_k: the model has {loaded.num_classes} classes, got {options.top_k}")
    ready = explainers(options, loaded)
    for explainer in ready.values():
        explainer.upsample = not (options.maps or options.no_pictures)
    pictures = not options.no_pictures
    task = _Task(
        names=names,
        base=_base(names),
        folder=Path(options.output),
        loaded=loaded,
        explainers=ready,
        targets=targets,
        top_k=options.top_k,
        contrast=options.contrast,
        score=options.score,
        colours=colours,
        stems=Names(own_stems([Path(name) for name in names])) if pictures else None,
        originals=frozenset(hash(os.path.realpath(name)) for name in names) if pictures else frozenset(),
        enlarge=bool(options.maps),
    )
    if pictures and len(names) <= _FEW and options.top_k == 1:  # before anything is written
        for stem in task.stems or ():
            for target in targets or [0]:
                task.files(stem, target)
    return task


def _base(names: Names) -> str:
    """The folder that contains all photographs, directly or below."""
    base = ""
    for name in names:
        parent = str(Path(name).absolute().parent)
        if parent != base:
            base = os.path.commonpath([base or parent, parent])
    return base


def _targets(loaded: LoadedModel, text: str) -> list[int]:
    """The classes of ``--target``: one, whose name may contain commas, or several separated by commas."""
    try:
        return [loaded.class_index(text)]
    except TargetError:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if len(parts) < 2:
            raise
    return list(dict.fromkeys(loaded.class_index(part) for part in parts))


# ---------------------------------------------------------------------- a few photographs


def _few(options: Any, task: _Task) -> str:
    """Read all photographs, then draw and print: whatever cannot be read is found before anything is written."""
    batches = list(watched(task.loader([(0, len(task.names))], options)))
    wrong = [why for batch in batches for why in batch.wrong.values()]
    if wrong and not options.skip_bad:
        raise DataError(wrong[0])
    if len(wrong) == len(task.names):
        raise DataError(f"none of the photographs can be read, {len(wrong)} in all; the first: {wrong[0]}")
    with nullcontext() if task.stems is None else hold(writable_folder(task.folder), "explain"):
        before = set() if task.stems is None else {file.name for file in task.folder.iterdir()}
        lines = [line for batch in _progress(batches, len(batches)) for line in _lines(task, batch)]
    pictures = [name for line in lines for names in line.pictures for name in names]
    old = len(before.intersection(pictures))
    told = f"{len(pictures)} picture{'s' * (len(pictures) > 1)} in {task.folder}{os.sep}"
    drawn = [told + (f", {old} of them in place of an earlier run's" if old else "")] if pictures else []
    return "\n".join([*_table(task, lines), "", *_reads(task), *drawn, *(f"left out: {why}" for why in wrong)])


def _table(task: _Task, lines: Sequence[_Line]) -> list[str]:
    """What the model saw in each photograph, as columns of text."""
    name = task.loaded.class_name
    headers = ["photo", "top-1 class", "confidence"] if task.top_k == 1 else ["photo", f"top-{task.top_k} classes"]
    headers += [f"explained: {name(target)}" for target in task.targets or ()]
    rows = []
    for line in lines:
        row = [task.shown(line.index)]
        if task.top_k > 1:
            row.append(", ".join(f"{name(c)} {float(line.confidence[c]):.1%}" for c in line.classes))
        else:
            row += [name(line.decision), f"{float(line.confidence[line.decision]):.1%}"]
        row += [f"{float(line.confidence[target]):.1%}" for target in task.targets or ()]
        if task.stems is not None:
            asked = [task.asked(target) for target in line.classes]
            row.append(f"{task.stems[line.index]}-{_either(task.kinds)}{_either(asked)}.png")
        rows.append(row)
    return aligned([[*headers, "files"] if task.stems is not None else headers, *rows], rule=True)


def _either(words: Sequence[str]) -> str:
    """Several file endings in a shell's brace notation."""
    return words[0] if len(words) == 1 else f"{{{','.join(words)}}}"


def _reads(task: _Task) -> list[str]:
    """Which layers each method reads."""
    size = torch.zeros(1, *task.loaded.input_size, device=task.device)
    room = max(map(len, task.explainers))
    read = {name: ", ".join(tap.name for tap in explainer.taps(size)) for name, explainer in task.explainers.items()}
    return [f"{name:{room}} reads {layers}" for name, layers in read.items() if layers]


# ---------------------------------------------------------------------- a job


def _job(options: Any, task: _Task, few: bool) -> str:
    """Go through the photographs in parts, each written when complete, with the folder locked."""
    with ExitStack() as stack:
        from_first(lambda: stack.enter_context(hold(writable_folder(task.folder), "explain")))
        return _parts(options, task, few)


def _parts(options: Any, task: _Task, few: bool) -> str:
    """The parts of a job; returns what to print."""
    job = Job(task.folder, _facts(options, task), options.maps, options.table or (None if few else "jsonl"))
    done = from_first(lambda: job.begin(options.resume))
    mine = shared_out(left(len(task.names), done), options.batch_size)
    try:
        lines = _run(options, task, job, mine, keep=few and not options.resume)
    except KeyboardInterrupt as stop:
        signal = getattr(stop, "signal", None)
        raise Stopped("the same command continues with --resume", signal=signal) from None
    wait()
    explained, skipped = from_first(job.finish)
    if not distributed.is_first():
        return ""
    if not explained:
        raise DataError(f"none of the photographs can be read, {skipped} in all; see '{task.folder / SKIPPED}'")
    left_out = f", {skipped} left out: {task.folder / SKIPPED}" if skipped else ""
    written = [f"table: {task.folder}/table/*.{job.table}"] if job.table else []
    written += [f"maps: {task.folder}/maps/*.{job.maps}"] if job.maps else []
    written += [f"pictures: {task.folder}/*.png"] if task.stems is not None else []
    table = [*_table(task, lines), ""] if lines else []
    told = f"{explained} photograph{'s' * (explained != 1)} explained{left_out}"
    return "\n".join([*table, *_reads(task), told, *written])


def _facts(options: Any, task: _Task) -> dict[str, Any]:
    """What identifies a job."""
    networks = {
        name: fingerprint(explainer.network_)
        for name, explainer in task.explainers.items()
        if isinstance(explainer, TrainableAttribution)
    }
    return {
        "photos": len(task.names),
        "names": task.names.digest(),
        "model": options.model,
        "weights": fingerprint(task.loaded.model),
        "methods": {name: repr(explainer) for name, explainer in task.explainers.items()},
        "explainers": networks,
        "targets": task.targets,
        "top_k": task.top_k,
        "contrast": task.contrast,
        "score": task.score,
        "maps": options.maps,
        "table": options.table,
        "pictures": task.stems is not None,
    }


def _run(options: Any, task: _Task, job: Job, mine: Sequence[Interval], *, keep: bool) -> list[_Line]:
    """Explain these photographs; complete parts are written, however the run ends."""
    kept: list[_Line] = []
    batches = task.loader(mine, options)
    part = job.part(0)
    try:
        for batch in _progress(watched(batches), len(batches)):
            if part.stop != batch.interval[0]:
                part.write()
                part = job.part(batch.interval[0])
            if batch.wrong and not options.skip_bad:
                why = next(iter(batch.wrong.values()))
                raise DataError(f"{why}, or leave it out with --skip-bad; --resume continues")
            lines = _lines(task, batch)
            for index, why in batch.wrong.items():
                part.skip(task.shown(index), why)
            for line in lines:
                _note(task, part, line)
            part.reach(batch.interval[1])
            kept += lines if keep else []
            if part.due:
                part = part.write()
    except BaseException:
        with suppress(DataError):  # the first error is the one to report
            part.write()
            job.finish()
        raise
    part.write()
    return kept


def _note(task: _Task, part: Part, line: _Line) -> None:
    for i, target in enumerate(line.classes):
        row: dict[str, Any] = {
            "photo": task.shown(line.index),
            "class": target,
            "name": task.loaded.class_name(target),
            "confidence": round(float(line.confidence[target]), 6),
            "decision": line.decision,
        }
        if task.stems is not None:
            row["pictures"] = line.pictures[i]
        part.add(row, line.maps[i])


# ---------------------------------------------------------------------- a batch


def _lines(task: _Task, batch: Batch) -> list[_Line]:
    """Explain and draw the photographs of a batch."""
    if batch.images is None:
        return []
    found = answer(
        task.explainers,
        batch.images.to(task.device),
        targets=task.targets,
        top_k=task.top_k,
        contrast=task.contrast,
        score=task.score,
        show_progress=sys.stderr.isatty(),  # slow methods draw a bar of their own
    )
    confidence, decisions, classes = found.confidence.float().cpu(), found.decision.tolist(), found.classes.tolist()
    maps = {name: heat.float().cpu() for name, heat in found.maps.items()}
    lines = []
    for i, index in enumerate(batch.good):
        each = [{name: heat[i, t] for name, heat in maps.items()} for t in range(len(classes[i]))]
        line = _Line(index, decisions[i], classes[i], confidence[i], each, [])
        view = batch.views[i]
        if view is not None:
            line.pictures.extend(_draw(task, line, view, batch.images.shape[-2:]))
        lines.append(line)
    return lines


def _draw(task: _Task, line: _Line, view: View, size: Sequence[int]) -> Iterator[list[str]]:
    """The pictures of a photograph, for each class, the part that the model saw outlined; returns their names."""
    name, stem = task.loaded.class_name, "" if task.stems is None else task.stems[line.index]
    photo, box = view
    decided = f"{name(line.decision)}  {float(line.confidence[line.decision]):.0%}"
    for target, maps in zip(line.classes, line.maps, strict=True):
        files = task.files(stem, target)
        title = decided
        if task.targets is not None or task.top_k > 1:
            title = f"explained: {name(target)}  {float(line.confidence[target]):.0%}      decided: {decided}"
        heats = {key: heat.clamp(min=0) for key, heat in maps.items()}  # the evidence for the class
        if task.enlarge:
            heats = {key: upsample(heat[None, None], size)[0, 0] for key, heat in heats.items()}
        headings = {key: _heading(task.explainers[key], target) for key in heats}
        for key, heat in heats.items():
            drawn = picture(photo, heat, f"{title}\n{headings[key]}", box=box, **task.colours)
            write_picture(files[key], drawn.save)
        if len(heats) > 1:
            columns = {headings[key]: [heat] for key, heat in heats.items()}
            figure([photo], columns, titles=[title], path=files["compared"], boxes=[box], **task.colours)
        yield [file.name for file in files.values()]


def _heading(explainer: Attribution, target: int) -> str:
    unseen = isinstance(explainer, TrainableAttribution) and not explainer.has_map_of(target)
    return explainer.get_name() + (" (not trained on this class)" if unseen else "")


def _progress(batches: Iterable[_Value], count: int) -> Iterator[_Value]:
    from tqdm.auto import tqdm

    off = None if count > 1 and distributed.is_first() else True
    return iter(tqdm(batches, total=count, desc="explain", unit="batch", disable=off, leave=False))
