"""The options of a run, and what all protocols share: keeping results, training explainers, measuring methods."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from attrib_zoo.benchmark import Table, evaluate
from attrib_zoo.benchmark.controls import CONTROLS
from attrib_zoo.benchmark.measures import Wanted
from attrib_zoo.benchmark.protocols.backbones import Backbone, check_output
from attrib_zoo.benchmark.protocols.compare import Comparison
from attrib_zoo.benchmark.protocols.datasets import Labelled, imagenet_training, imagenet_validation
from attrib_zoo.benchmark.protocols.papers import printed
from attrib_zoo.benchmark.protocols.splits import Split, choose, read_list, write_list
from attrib_zoo.benchmark.records import Records
from attrib_zoo.errors import DataError, OptionError, closest
from attrib_zoo.models.photos import Photos, writable_folder
from attrib_zoo.training.checkpoint import fingerprint
from attrib_zoo.training.data import total_steps
from attrib_zoo.training.files import write_whole
from attrib_zoo.training.schedule import LONG, Schedule

Makers = Mapping[str, Callable[[], Any]]
"""A method's name in the paper -> what makes it; a trained explainer is trained then."""


@dataclass(frozen=True)
class Plan:
    """The options of a run.

    Attributes:
        data: the data set's folder.
        output: the folder for everything; a second run continues there.
        test_images: how many images are measured; ``None`` for the paper's number.
        val_images: how many images training is validated on.
        test_list: a list of the images to measure, instead of a random set.
        val_list: as ``test_list``, for the validation images.
        labels: a list with the validation images' classes.
        methods: names as the paper prints them; ``None`` for all.
        ablations: also the variants of T-TAME's Table 6.
        recipe: ``"paper"`` or ``"released"``, for the trained explainers.
        epochs: of training; ``None`` for the paper's number.
        max_steps: of training, instead of ``epochs``.
        fit_batch_size: images per training step; ``None`` for the paper's or its code's number.
        head_steps: steps in which a multi-label head is trained.
        batch_size: images per pass elsewhere.
        workers: processes that read images.
        seed: of the split, of training, and of random maps and orders.
        progress: draw progress bars.
    """

    data: Path
    output: Path
    test_images: int | None = None
    val_images: int = 2000
    test_list: Path | None = None
    val_list: Path | None = None
    labels: Path | None = None
    methods: tuple[str, ...] | None = None
    ablations: bool = False
    recipe: str = "paper"
    epochs: int | None = None
    max_steps: int | None = None
    fit_batch_size: int | None = None
    head_steps: int = 500
    batch_size: int = 16
    workers: int = 0
    seed: int = 0
    progress: bool = True


# ---------------------------------------------------------------------- the output folder


def keep(plan: Plan, paper: str, backbone: Backbone) -> None:
    """Record what the results depend on, or refuse to continue a run that differs.

    Raises:
        DataError: the folder holds a run with other settings, or cannot be written.
    """
    told: dict[str, Any] = {"paper": paper, "backbone": backbone.name, "weights": fingerprint(backbone.model)[:16]}
    names = ("recipe", "epochs", "max_steps", "fit_batch_size", "head_steps", "seed", "val_images")
    told |= {name: getattr(plan, name) for name in names}
    told |= {name: _checksum(getattr(plan, name)) for name in ("test_list", "val_list")}
    file = writable_folder(plan.output) / "plan.json"
    if file.exists():
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"output: '{file}' is damaged ({error}); remove it, or choose another folder") from error
        differ = [
            f"{k} {told.get(k)!r} (was {before.get(k)!r})" for k in {**before, **told} if told.get(k) != before.get(k)
        ]
        if differ:
            raise DataError(
                f"output: '{plan.output}' holds another run: {', '.join(differ)}; choose another folder, or repeat "
                "that run's options"
            )
    write_whole(file, json.dumps(told, indent=1) + "\n")


def _checksum(path: Path | None) -> int | None:
    """A checksum of a list's contents; its file may move."""
    return None if path is None else zlib.crc32(repr(read_list(path)).encode())


def write(plan: Plan, comparison: Comparison, table: Table, name: str = "table") -> None:
    """Tables and comparison in all formats."""
    files = {"comparison.md": comparison.to_markdown(), "comparison.json": comparison.to_json()}
    files |= {f"{name}.md": table.to_markdown(), f"{name}.csv": table.to_csv(), f"{name}.json": table.to_json()}
    if len(table.methods) > 1:
        files[f"{name}-differences.md"] = table.differences()
    for file, text in files.items():
        write_whole(plan.output / file, text + "\n")


def slug(name: str) -> str:
    """A method's name as a file name."""
    for sign, word in {"*": "-star", "†": "-dagger", "++": "-plus-plus", " + ": "-", " ": "-"}.items():
        name = name.replace(sign, word)
    return name.lower()


# ---------------------------------------------------------------------- ImageNet


def imagenet(plan: Plan) -> tuple[Labelled, Split]:
    """ImageNet's validation images and their split; both lists are written to the output folder."""
    images = imagenet_validation(plan.data, plan.labels)
    test = 2000 if plan.test_images is None else plan.test_images
    split = choose(images.names, plan.val_images, test, plan.seed, val_list=plan.val_list, test_list=plan.test_list)
    for name, places in (("validation.txt", split.validation), ("test.txt", split.test)):
        labels = None if images.labels is None else [images.labels[i] for i in places]
        write_list(plan.output / name, [images.names[i] for i in places], labels)
    return images, split


def imagenet_run(
    paper: str, plan: Plan, backbone: Backbone, methods: Callable[[Sequence[Path]], Makers], metrics: Wanted
) -> Comparison:
    """The protocol of both trained explainers' papers: measure methods on random validation images.

    Args:
        paper: whose rows are printed next to ours.
        plan: the options.
        backbone: what is explained.
        methods: from the validation images to the methods.
        metrics: of the tables.
    """
    tables = printed(paper, backbone.name)
    check_output(backbone)
    keep(plan, paper, backbone)
    images, split = imagenet(plan)
    makers = wanted(methods([images.paths[i] for i in split.validation]), plan.methods)
    photos = Photos([images.paths[i] for i in split.test], backbone.for_test())
    table = measure(makers, backbone, photos, metrics, plan, "results")
    facts = [
        f"{len(split.test)} test and {len(split.validation)} validation images of {len(images.paths)}, seed {plan.seed}"
    ]
    facts += [] if plan.test_list else ["the paper's random images are others"]
    facts += [] if images.labels is None else [_accuracy(table, images, split, backbone)]
    comparison = Comparison([t for t in tables if plan.ablations or t.table != "Table 6"], [table], facts)
    write(plan, comparison, table)
    return comparison


def _accuracy(table: Table, images: Labelled, split: Split, backbone: Backbone) -> str:
    decided = {row.image: row.target for row in table.records.rows.values()}
    labels = [] if images.labels is None else [images.labels[i] for i in split.test]
    right = sum(decided.get(i) == label for i, label in enumerate(labels))
    return f"top-1 accuracy of {backbone.name} on the test images: {100 * right / len(labels):.1f} %"


def train(explainer: Any, name: str, plan: Plan, backbone: Backbone, validation: Sequence[Path], **fit: Any) -> Any:
    """The explainer, trained on ImageNet's training images; read from the output folder if it was trained before.

    Interrupted training continues from its checkpoint.

    Args:
        explainer: not fitted.
        name: of the method.
        plan: the options.
        backbone: what is explained.
        validation: images to validate the training on.
        fit: the paper's ``batch_size`` and ``epochs``, and its ``schedule`` where the explainer has another one.
    """
    file = plan.output / "explainers" / f"{slug(name)}.safetensors"
    if file.exists():
        return type(explainer).load(file, backbone.model)
    checkpoints = writable_folder(plan.output / "checkpoints" / slug(name))
    paths = imagenet_training(plan.data)
    batch = min(plan.fit_batch_size or fit["batch_size"], len(paths))
    loader = DataLoader(
        Photos(paths, backbone.for_training()), batch, shuffle=True, drop_last=True, num_workers=plan.workers
    )
    watched = DataLoader(Photos(validation, backbone.for_test()), plan.batch_size, num_workers=plan.workers)
    epochs = plan.epochs or fit["epochs"]
    explainer.fit(
        loader,
        epochs=epochs,
        schedule=_schedule(fit.get("schedule"), total_steps(loader, epochs, plan.max_steps)),
        max_steps=plan.max_steps,
        val_loader=watched if validation else None,
        seed=plan.seed,
        resume_from=checkpoints if (checkpoints / "checkpoint.safetensors").exists() else None,
        checkpoint_dir=checkpoints,
        show_progress=plan.progress,
    )
    writable_folder(file.parent)
    explainer.save(file)
    return type(explainer).load(file, backbone.model)  # as a later run will read it: its results are continued


def _schedule(own: Schedule | None, steps: int) -> Schedule | str:
    """A paper's schedule if there are enough steps for it, as ``fit`` itself chooses; the released one in any case."""
    return "auto" if own is None or (own.name == "paper" and steps < LONG) else own


# ---------------------------------------------------------------------- methods


def wanted(makers: Makers, names: Iterable[str] | None) -> Makers:
    """The methods requested, in the paper's order."""
    if names is None:
        return makers
    own = {name.casefold(): name for name in makers}
    unknown = [name for name in names if name.casefold() not in own]
    if unknown:
        raise OptionError(
            f"methods: the paper has no row {unknown[0]!r} for this backbone{closest(unknown[0], makers)}; there are "
            f"{', '.join(makers)}"
        )
    asked = {name.casefold() for name in names}
    return {name: maker for name, maker in makers.items() if name.casefold() in asked}


def measure(
    makers: Makers,
    backbone: Backbone,
    data: Any,
    metrics: Wanted,
    plan: Plan,
    folder: str,
    *,
    score: str = "softmax",
) -> Table:
    """Measure one method after another, each with a results file of its own, and the controls.

    A method whose results are in its file already costs nothing, and methods can be added later.
    """
    place = writable_folder(plan.output / folder)
    loader = DataLoader(data, plan.batch_size, num_workers=plan.workers)
    whole: Records | None = None
    measures = []
    controls: Makers = {name: (lambda make=make: make(plan.seed)) for name, make in CONTROLS.items()}  # type: ignore[misc]
    for name, maker in {**makers, **controls}.items():
        table = evaluate(
            backbone.model,
            {name: maker()},
            loader,
            metrics,
            controls=False,
            score=score,
            seed=plan.seed,
            path=place / f"{slug(name)}.jsonl",
            show_progress=plan.progress,
        )
        whole = whole or Records({**table.records.setting, "methods": {}})
        whole.setting["methods"] |= table.records.setting["methods"]
        whole.merge(table.records)
        measures = table.measures
    if whole is None:
        raise OptionError("methods: must name at least one method, got none")
    return Table(whole, measures)
