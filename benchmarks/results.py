"""The tables of docs/results: every method times every measure, on real images, one file of results per method.

    export ATTRIB_ZOO_DATA=FOLDER
    python benchmarks/train_backbone.py resnet10t --output WORK     # and: vit
    python benchmarks/results.py resnet10t --work WORK [--methods GradCAM TTAME ...] [--images 100]
    python benchmarks/results.py squeezenet --work WORK
    python benchmarks/results.py squeezenet --work WORK/beside --beside --images 60 --methods GradCAM ...
    python benchmarks/results.py squeezenet resnet10t vit --work WORK --write

``squeezenet``: 250 photographs of ImageNet at 224 pixels, SqueezeNet 1.1 with ImageNet weights; trained explainers are
fitted on Tiny-ImageNet enlarged to 224. The others: 500 validation images of Tiny-ImageNet-50 with their boxes at 64
pixels, backbones and explainers trained on its training images. The model's own decision is explained. Stop and run
again at will; ``--images`` stops a slow method early, and a later run without it goes on. ``--write`` makes
``docs/results/CASE.md`` and ``.png`` of what is there, and ``benchmarks/results/CASE.json`` with the numbers.
``--beside`` measures SRG under three other rules of hiding and the grid pointing game instead, in a folder of its own.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from dots import picture
from measure import data, setting, table, unpacked
from real_data import enlarged
from train_backbone import BACKBONES, read, standardised

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision import transforms

from attrib_zoo import metrics, models
from attrib_zoo.attribution import Attribution
from attrib_zoo.benchmark import Measure, Table, evaluate
from attrib_zoo.benchmark.measures import TRUTH, Question, chosen
from attrib_zoo.benchmark.records import Records
from attrib_zoo.cli.shared import methods
from attrib_zoo.errors import UnsupportedModelError
from attrib_zoo.models.photos import Photos
from attrib_zoo.training.recipe import RECIPES

ROOT = Path(__file__).resolve().parent.parent
FAITHFUL = ["ad", "ic", "drop", "increase", "road", "insertion", "deletion"]
PLACE = ["ebpg", "miou", "bbox", "pointing"]
FIRST = ("TTAME", "LCAMImg", "LCAMFm", "GradCAM", "GradCAMPlusPlus", "ScoreCAM", "RISE")
OPTIONS: dict[str, dict[str, Any]] = {"RISE": {"n_masks": 1000}, "LCAMImg": {"start": "random"}}
RELEASED = {"variation": "sum", "border_penalty": 0.3, "area_offset": 5e-4}
COLD = "TTAME, paper"
VARIANTS: dict[str, dict[str, Any]] = {
    "TTAME, rows": {"recipe": "rows"},
    "TTAME, positive": {"scale": "positive"},
    "TTAME, smooth 3": {"recipe": RECIPES["attended"].but(alike=1, smooth=3)},
    "TTAME, no filter": {"recipe": RECIPES["attended"].but(alike=1)},
    "TTAME, 150 steps": {},
    COLD: {"recipe": "paper"},
    "LCAMImg, rows": {"start": "rows"},
    "GradCAM, smooth 3": {"smooth": 3},
    "GenericAttention, smooth 3": {"smooth": 3},
    "GenericAttention, libra": {"libra": True},
}
TRANSFORMERS = (
    "GenericAttention, smooth 3",
    "GenericAttention, libra",
    "TTAME, smooth 3",
    "TTAME, no filter",
)  # the variants for them alone
LEFT_OUT = {"ExtremalPerturbation": "left out unless asked for, as it takes 800 optimiser steps for each image"}
SEEDS = ("TTAME, seed 1", "TTAME, seed 2")


@dataclass
class Case:
    """A model, the images that are explained, and those that explainers are fitted on.

    Attributes:
        model: in eval mode.
        images: gives an image, or a dict with its boxes.
        training: batches for the fits.
        steps: of a fit; a T-TAME that starts from rows has its own number, none, unless its name says so.
        starts: T-TAME starts from rows here by itself.
        measures: names of families, or measures.
        kind: ``"cnn"`` or ``"vit"``.
        says: what was measured, in a sentence.
        more: rows beside one for each method: a method with another seed, or one of ``VARIANTS``.
    """

    model: nn.Module
    images: Dataset[Any]
    training: Callable[[], DataLoader[Any]]
    steps: int
    measures: list[str | Measure]
    kind: str
    says: str
    starts: bool = False
    more: tuple[str, ...] = SEEDS


class Boxed(Dataset[dict[str, Tensor]]):
    """Standardised images with their box."""

    def __init__(self, images: Tensor, boxes: Tensor) -> None:
        self.images, self.boxes = images, boxes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.images[index], "boxes": self.boxes[index]}


def drawn(count: int, most: int) -> list[int]:
    """Which images, the same every time."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most].tolist()


def coarse(fractions: tuple[float, ...] = (0.2, 0.5, 0.8), steps: int = 5) -> list[str | Measure]:
    """``FAITHFUL`` with a third of the points of each curve, for images of 224 pixels, and SRG = LeRF - MoRF."""
    grid = tuple(i / steps for i in range(steps + 1))

    def asked(function: Callable[..., Tensor], **options: Any) -> Callable[[Question], Tensor]:
        return lambda question: question.shared(function, **options, seed=tuple(question.seeds))

    morf, lerf = (asked(metrics.road_curve, order=order, fractions=fractions) for order in ("morf", "lerf"))
    insertion, deletion = (asked(f, steps=steps) for f in (metrics.insertion_curve, metrics.deletion_curve))
    return [
        "ad",
        "ic",
        Measure("ROAD MoRF", morf, lower=True, points=fractions),
        Measure("ROAD LeRF", lerf, points=fractions),
        Measure("SRG", lambda question: lerf(question).mean(1) - morf(question).mean(1)),
        Measure("insertion", insertion, points=grid, area=True),
        Measure("deletion", deletion, lower=True, points=grid, area=True),
    ]


RULES = {"black": "raw", "mean": "standardized", "blur": "blur"}


def beside(fractions: tuple[float, ...] = (0.2, 0.5, 0.8)) -> list[str | Measure]:
    """SRG with pixels hidden by other rules than ROAD's imputation, and the grid pointing game."""

    def gap(rule: str) -> Callable[[Question], Tensor]:
        def compute(question: Question) -> Tensor:
            options = {"fractions": fractions, "hiding": rule, "seed": tuple(question.seeds)}
            lerf, morf = (question.shared(metrics.road_curve, order=order, **options) for order in ("lerf", "morf"))
            return (lerf - morf).mean(1)

        return compute

    return [*(Measure(f"SRG, {name}", gap(rule)) for name, rule in RULES.items()), "grid"]


class ValidationBoxes(Dataset[dict[str, Tensor]]):
    """Images of ImageNet's validation set with the boxes of their objects, 227 x 227, made 224 x 224."""

    def __init__(self, loaded: models.LoadedModel) -> None:
        folder = unpacked("imagenet_val_boxes")
        found = sorted(folder.rglob("boxes.json"))[0]
        self.entries = json.loads(found.read_text())
        self.most = max(len(entry["boxes"]) for entry in self.entries)
        self.photos = Photos([found.parent / entry["file"] for entry in self.entries], enlarged(loaded))

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        boxes = torch.zeros(self.most, 4, dtype=torch.double)  # a box of zeros holds no pixel
        given = self.entries[index]["boxes"]
        boxes[: len(given)] = torch.tensor(given, dtype=torch.double) * (224 / 227)
        return {"image": self.photos[index], "boxes": boxes}


def imagenet(name: str, file: str, kind: str, says: str) -> Callable[[Path], Case]:
    """A model with ImageNet weights, explained on validation images, explainers fitted on other photographs."""

    def case(_: Path) -> Case:
        loaded = models.load(name, weights=data() / f"{file}_imagenet.safetensors")
        model = loaded.model.float()
        crops = transforms.Compose(
            [
                transforms.RandomResizedCrop(224, (0.35, 1.0), (0.8, 1.25)),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(loaded.mean, loaded.std),
            ]
        )
        paths = sorted(unpacked("imagenet_photos").glob("*/*.jpg"))
        explained = ValidationBoxes(loaded)
        return Case(
            model if kind == "vit" else model.to(memory_format=torch.channels_last),  # twice as fast on a CPU
            Subset(explained, drawn(len(explained), 300)),
            lambda: DataLoader(Photos(paths, crops), batch_size=16, shuffle=True),
            150,
            [*coarse(), "ebpg", "bbox", "pointing"],
            kind,
            f"{says} with ImageNet weights, 300 validation images with boxes at 224 pixels; explainers fitted on 500 "
            "other photographs",
            starts=True,
            more=(*SEEDS, *(name for name in VARIANTS if kind == "vit" or name not in TRANSFORMERS)),
        )

    return case


def tiny(name: str) -> Callable[[Path], Case]:
    """Tiny-ImageNet-50 with boxes."""

    def case(work: Path) -> Case:
        folder = unpacked("tiny_imagenet_50")
        model = BACKBONES[name][0]().eval()
        model.load_state_dict(load_file(work / f"{name}.safetensors"))
        facts = json.loads((work / f"{name}.json").read_text())
        images, _, paths = read(folder / "val")
        with (folder / "boxes.csv").open(newline="") as file:
            found = {
                row["path"]: [int(row[k]) for k in ("xmin", "ymin", "xmax", "ymax")] for row in csv.DictReader(file)
            }
        boxes = torch.tensor([found[path.relative_to(folder).as_posix()] for path in paths])
        boxes[:, 2:] += 1  # the file names the last pixel
        chosen = drawn(len(images), 500)

        def training() -> DataLoader[Any]:
            return DataLoader(TensorDataset(standardised(read(folder / "train")[0])), batch_size=32, shuffle=True)

        return Case(
            model.to(memory_format=torch.channels_last),
            Boxed(standardised(images[chosen]), boxes[chosen, None].double()),
            training,
            780,
            [*FAITHFUL, *PLACE],
            "vit" if name.startswith("vit") else "cnn",
            f"{name} trained on Tiny-ImageNet-50 ({facts['accuracy']} % right), 500 validation images at 64 pixels",
        )

    return case


CASES: dict[str, Callable[[Path], Case]] = {
    "squeezenet": imagenet("squeezenet1_1", "squeezenet1_1", "cnn", "SqueezeNet 1.1"),
    "efficientnet": imagenet("tf_efficientnet_lite0", "tf_efficientnet_lite0", "cnn", "EfficientNet-Lite0"),
    "vit_tiny": imagenet("vit_tiny_patch16_224", "vit_tiny_patch16_224", "vit", "ViT-Ti/16"),
    "resnet10t": tiny("resnet10t"),
    "vit": tiny("vit"),
}


def names(case: Case) -> list[str]:
    """Methods that are defined for the model, the best known first."""
    known = [cls.__name__ for cls in methods().values() if case.kind in cls.models and cls.__name__ not in LEFT_OUT]
    rest = sorted(set(known) - set(FIRST))
    return [*(name for name in FIRST if name in known), *rest, *case.more]


def slug(name: str) -> str:
    """The name as a file's."""
    return name.replace(", ", "-").replace(" ", "")


def made(name: str, case: Case, folder: Path) -> Attribution:
    """The method; trained ones from their file, or fitted now."""
    variant, _, seed = name.partition(", seed ")
    plain, _, change = variant.partition(", ")
    if change and variant not in VARIANTS:
        raise KeyError(f"no variant {variant!r}; there are {', '.join(VARIANTS)}")
    cls: Any = next(cls for cls in methods().values() if cls.__name__ == plain)
    options = OPTIONS.get(plain, {}) | VARIANTS.get(variant, {})
    if not cls.needs_fit:
        return cls(case.model, **options)
    kept = folder / f"{slug(name)}.safetensors"
    if kept.exists():
        return cls.load(kept, case.model)
    explainer = cls(case.model, **options)
    starts = case.starts and plain == "TTAME" and variant not in ("TTAME, 150 steps", COLD)
    explainer.fit(case.training(), max_steps=None if starts else case.steps, seed=int(seed or 0))
    explainer.save(kept)
    return explainer


def measure(name: str, case: Case, folder: Path, batch: int, most: int | None) -> None:
    """Measure a method; what its file holds is not measured again."""
    path = folder / f"{slug(name)}.jsonl"
    try:
        explainer = made(name, case, folder)
        loader = DataLoader(case.images, batch_size=batch)
        first = name == COLD  # on fewer images, as the controls cost a map each
        evaluate(case.model, {name: explainer}, loader, case.measures, controls=first, max_images=most, path=path)
    except UnsupportedModelError as error:
        path.with_suffix(".refused").write_text(str(error), encoding="utf-8")
        return
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True)
    facts = {"commit": commit.strip(), "setting": setting(), "options": repr(explainer)}
    if explainer.needs_fit:
        facts |= {"fit": explainer.report(), "classes seen": (explainer.class_counts_ > 0).tolist()}
    path.with_suffix(".facts.json").write_text(json.dumps(facts), encoding="utf-8")


# ---------------------------------------------------------------------- the pages


def gathered(case: Case, folder: Path) -> tuple[Table, dict[str, Any]]:
    """One table of all methods that are through, and what is known of each."""
    parts, facts = [], {}
    for path in sorted(folder.glob("*.facts.json")):
        results = path.with_name(path.name.replace(".facts.json", ".jsonl"))
        with results.open(encoding="utf-8") as file:
            told = json.loads(file.readline())["setting"]
        parts.append(Records(told, results))
        facts.update(dict.fromkeys(told["methods"], json.loads(path.read_text())))
    described = {name: text for part in parts for name, text in part.setting["methods"].items()}
    controls = [name for part in parts for name in part.setting["controls"] or ()]
    whole = Records({**parts[0].setting, "methods": described, "controls": controls})
    for part in parts:
        whole.merge(part)
    whole.rows = dict(sorted(whole.rows.items(), key=lambda row: place(row[0][0], controls)))
    return Table(whole, chosen(case.measures, TRUTH)), facts


def place(name: str, controls: list[str]) -> tuple[bool, int, str]:
    """Where a method stands in the tables: the best known first, controls last."""
    order, key = (controls, name) if name in controls else (FIRST, name.partition(", ")[0])
    return name in controls, order.index(key) if key in order else len(order), name


def only(results: Table, images: set[int]) -> Table:
    """The rows of some images."""
    part = Records(results.records.setting)
    part.rows = {key: row for key, row in results.records.rows.items() if key[1] in images}
    part.costs = results.records.costs
    return Table(part, results.measures)


GROUPS = {
    "Average drop, increase in confidence": ["AD(100)", "AD(50)", "AD(15)", "IC(100)", "IC(50)", "IC(15)"],
    "ROAD, insertion and deletion; the top 15 % alone": [
        *("ROAD MoRF", "ROAD LeRF", "insertion", "deletion", "Drop%", "Increase%"),
    ],
    "Against the boxes": ["EBPG", "mIoU", "Bbox", "pointing game"],
}


NOTHING = "–"  # as a table says that there is no value


def images(results: Table, method: str) -> int:
    """How many images a method was measured on."""
    return sum(name == method for name, _ in results.records.rows)


def compact(results: Table, wanted: list[str], costs: bool = False) -> str:
    """Mean and half the interval's width of some measures, a line for each method.

    Bold is the best of the methods that were measured on all images, with all that are printed alike; nothing where a
    control that knows nothing is better.
    """
    measures = [m for m in results.measures if m.name in wanted]
    most = len(results.images)
    whole = [method for method in results.methods if images(results, method) == most]
    best = {m.name: results.best(m.name, digits=1, among=whole) for m in measures}
    rows = []
    for method in results.methods:
        cells = []
        for m in measures:
            found = results.estimate(method, m.name).short(1)
            cells.append(f"**{found}**" if method in best[m.name] else found)
        cost, fewer = results.records.costs[method], images(results, method)
        extra = [f"{cost.forward / cost.images:.4g}", f"{cost.times_forward:.3g}"] if costs else []
        if set(cells) != {NOTHING}:
            rows.append([method + f" ({fewer} images)" * (fewer < most), *cells, *extra])
    head = ["method", *(f"{m.name} {m.arrow}" for m in measures), *(["forward", "x forward"] if costs else [])]
    return table(rows, head)


COMPARED = ["AD(100)", "AD(50)", "AD(15)", "IC(50)", "ROAD MoRF", "ROAD LeRF", "insertion", "deletion", "EBPG", "Bbox"]


def apart(results: Table, base: str) -> str:
    """Every method minus one, on the images that both were measured on; a star where the interval excludes 0."""
    measures = [m for m in results.measures if m.name in COMPARED]
    rows = []
    for method in results.methods:
        if method == base:
            continue
        found = [results.difference(method, base, m.name) for m in measures]
        signs = ["+" * (e.mean > 0) + e.short(1) + "*" * (e.low > 0 or e.high < 0) for e in found]
        if set(signs) != {NOTHING}:
            rows.append([method, *signs])
    return table(rows, [f"minus {base}", *(f"{m.name} {m.arrow}" for m in measures)])


def page(name: str, case: Case, results: Table, facts: dict[str, Any], refused: dict[str, str]) -> str:
    """The tables of a case, as Markdown."""
    lines = [f"# {case.says}", "", f"{len(results.images)} images; the model's own decision is explained."]
    lines += ["Mean ± half the 95 % bootstrap interval; ↑ more, ↓ less is better; bold: the best on all images, with"]
    lines += ["all that are printed alike, unless a control is better.", ""]
    seen = torch.tensor(facts.get("TTAME", {}).get("classes seen", [True]))
    parts = {"": results}
    if not bool(seen.all()):
        kept = {image for (_, image), row in results.records.rows.items() if seen[row.target]}
        parts = {
            "All images": results,
            f"The {len(kept)} images of classes that came up in the fits": only(results, kept),
        }
    for title, part in parts.items():
        level = "###" if title else "##"
        lines += [f"## {title}", ""] if title else []
        for number, (group, wanted) in enumerate(GROUPS.items()):
            if any(m.name in wanted for m in results.measures):
                lines += [f"{level} {group}", "", compact(part, wanted, costs=number == 0), ""]
        lines += [f"{level} Every method minus T-TAME, on the same images", ""]
        lines += ["A star: the 95 % interval of the difference excludes 0.", ""]
        lines += [line for base in ("TTAME", *VARIANTS) if base in part.methods for line in (apart(part, base), "")]
    lines += ["forward: samples through the model for one image; x forward: time as a multiple of a plain pass.", ""]
    missing = {method: why for method, why in LEFT_OUT.items() if method not in results.methods}
    given = {method: options for method, options in (OPTIONS | VARIANTS).items() if method in results.methods}
    changed = {method: "with " + ", ".join(f"{k}={v}" for k, v in given[method].items()) for method in given}
    told = [f"* {name}: {text.removeprefix(name + ': ')}" for name, text in {**changed, **missing, **refused}.items()]
    lines += [fill(text, 120, subsequent_indent="  ") for text in told]
    lines += [f"* Trained explainers: {case.steps} steps, T-TAME's and L-CAM's short schedules"]
    curves = [f"{m.name} at {len(m.points)}" for m in results.measures if m.points]
    lines += [f"* Curves: {', '.join(curves)} shares of the pixels"]
    return "\n".join(lines) + "\n"


def write(name: str, case: Case, work: Path, output: Path, raw: Path) -> None:
    """The page, the numbers and the plots."""
    results, facts = gathered(case, work / name)
    refused = {path.stem: path.read_text() for path in sorted((work / name).glob("*.refused"))}
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.md").write_text(page(name, case, results, facts, refused), encoding="utf-8")
    told = {method: {key: fact[key] for key in fact if key != "classes seen"} for method, fact in facts.items()}
    numbers = {"case": case.says, "measured": told, **json.loads(results.to_json())}
    curved = [m for m in results.measures if m.points]
    numbers["points"] = {m.name: m.points for m in curved}
    for method, held in numbers["methods"].items():  # so that the plots can be drawn again
        held["curves"] = {m.name: [round(x, 5) for x in results.curve(method, m.name).tolist()] for m in curved}
    raw.mkdir(parents=True, exist_ok=True)
    (raw / f"{name}.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    picture(numbers).savefig(output / f"{name}.png")


def main() -> None:
    """Measure what is missing, or write the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=list(CASES))
    parser.add_argument("--work", type=Path, required=True, help="where weights, explainers and results are kept")
    parser.add_argument("--methods", nargs="+", help='such as GradCAM "TTAME, seed 1"')
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--images", type=int, help="of each method, no more than so many")
    parser.add_argument("--beside", action="store_true", help="other rules of hiding, and grid pointing, instead")
    parser.add_argument("--write", action="store_true", help="only write the pages")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results", help="of pages and plots")
    parser.add_argument("--raw", type=Path, default=ROOT / "benchmarks" / "results", help="of the numbers")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in options.cases:
        case = CASES[name](options.work)
        if options.beside:
            case.measures = beside()
        folder = options.work / name
        folder.mkdir(parents=True, exist_ok=True)
        if options.write:
            write(name, case, options.work, options.output, options.raw)
            continue
        for method in options.methods or names(case):
            start = time.process_time()
            measure(method, case, folder, options.batch, options.images)
            print(f"{name} {method}: {time.process_time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
