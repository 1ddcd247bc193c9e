"""Methods against ground truth, without a download: planted scenes, and a cue that a model was trained to use.

    python benchmarks/scenes.py [--images 100] [--marks 60] [--kinds cnn vit] [--output docs/results] [--work FOLDER]

For each of the two tiny models of ``attrib_zoo.synthetic`` (CNN and ViT, 32 px), fitted T-TAME and L-CAM included:
(a) every method that is defined for it, on scenes with two objects in which it names both, asked about one of them;
(b) every method on images that hold the mark, but no object, of the class that a second model was trained to find by
that mark, beside the model that never saw one. Writes ``scenes.json``, and the tables into ``scenes.md`` under its
line ``<!-- tables -->``; what stands above is kept. ``--work`` keeps per-image results, so that a run can be continued.
About 20 minutes of one CPU core.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import measure

import torch
from torch import Tensor, nn

import attrib_zoo
from attrib_zoo import metrics, synthetic
from attrib_zoo.attribution import Attribution
from attrib_zoo.benchmark import Measure, Table, evaluate
from attrib_zoo.benchmark.table import Estimate, estimate
from attrib_zoo.cli.shared import methods
from attrib_zoo.errors import UnsupportedModelError
from attrib_zoo.synthetic import Scenes, scenes

KINDS = ("cnn", "vit")
FIT_STEPS, FIT_SCENES, BATCH = 256, 1024, 16
SEEDS = {"scenes": 2, "fit": 1, "mark": 31}
RED = 0
SHORTER: dict[str, dict[str, Any]] = {"RISE": {"n_masks": 400}}
SLOW = ("ExtremalPerturbation",)  # 800 passes for each area and image
MARKER = "<!-- tables -->"


def strict(asked: Any, **options: Any) -> Tensor:
    """The pointing game without its 15 pixels of tolerance, which are half of an image of 32."""
    found: Tensor = asked.ask(metrics.pointing_game, **asked.region(), tolerance=0, seed=asked.seeds, **options)
    return found


POINTING = Measure("pointing", strict, needs="region", chance=lambda asked: strict(asked, ties="threshold"))
MEASURES = ["discrimination", "ebpg", "distractors", "miou", "bbox", POINTING]
MEASURES += ["AD(100)", "AD(50)", "AD(15)", "IC(50)", "road", "insertion", "deletion"]


def explainers(
    model: nn.Module, kind: str, seed: int, mark: int | None = None, without: Sequence[str] = ()
) -> dict[str, Attribution]:
    """Every method that is defined for the model, fitted where it must be."""
    found = {}
    for cls in methods().values():
        if kind not in cls.models or cls.__name__ in (*SLOW, *without):
            continue
        explainer = cls(model, **SHORTER.get(cls.__name__, {}))
        try:
            explainer.attribute(torch.zeros(1, 3, 32, 32), 0) if not cls.needs_fit else None
        except UnsupportedModelError as error:
            print(f"{cls.__name__}: {error}", flush=True)
            continue
        if cls.needs_fit:
            lessons = scenes(FIT_SCENES, objects=(1, 2), seed=seed + SEEDS["fit"], mark=mark)
            explainer.fit(lessons.loader(BATCH), max_steps=FIT_STEPS, seed=seed, show_progress=False)
        found[cls.__name__] = explainer
    return found


def questions(data: Scenes, target: Tensor, masks: Tensor, others: Tensor) -> list[dict[str, Tensor]]:
    """Batches of one question per image."""
    told = {"image": data.inputs, "target": target, "masks": masks, "other_masks": others}
    told["distractor_masks"] = data.distractors
    return [{key: value[i : i + BATCH] for key, value in told.items()} for i in range(0, len(data), BATCH)]


def planted(model: nn.Module, kind: str, ready: dict[str, Attribution], options: argparse.Namespace) -> Table:
    """Two objects, both of which the model names; every other image is asked about the second."""
    data = scenes(2 * options.images, seed=options.seed + SEEDS["scenes"])
    data = data.rows(synthetic.recognised(model, data)).rows(slice(options.images))
    rows, asked = torch.arange(len(data)), torch.arange(len(data)) % 2
    batches = questions(data, data.labels[rows, asked], data.masks[rows, asked], data.masks[rows, 1 - asked])
    path = options.work / f"scenes-{kind}.jsonl" if options.work else None
    return evaluate(model, ready, batches, MEASURES, seed=options.seed, path=path)


def marked(
    unmarked: nn.Module, kind: str, ready: dict[str, Attribution], options: argparse.Namespace
) -> tuple[Table, Table, dict[str, list[float]]]:
    """The mark of the red class in images without a red object, for the model that uses it and the one that does not.

    Also each model's confidence in red: without and with the mark.
    """
    seed = options.seed + SEEDS["mark"]
    rows = (scenes(2 * options.marks, seed=seed).labels != RED).all(1).nonzero()[: options.marks, 0]
    plain, data = (scenes(2 * options.marks, seed=seed, mark=mark).rows(rows) for mark in (None, "all"))
    batches = questions(data, torch.full((len(data),), RED), data.marks, data.masks.any(1))
    tables, sure = [], {}
    for name, mark in (("with", RED), ("without", None)):
        model = unmarked if mark is None else synthetic.trained(kind, seed=options.seed, mark=mark)
        with torch.no_grad():
            sure[name] = [float(model(d.inputs).softmax(1)[:, RED].mean()) for d in (plain, data)]
        path = options.work / f"mark-{kind}-{name}.jsonl" if options.work else None
        wanted = ["ebpg", "discrimination", POINTING]
        found = ready if mark is None else explainers(model, kind, options.seed, mark, options.without)
        found = {name: explainer for name, explainer in found.items() if name not in options.without}
        tables.append(evaluate(model, found, batches, wanted, seed=options.seed, path=path))
    return tables[0], tables[1], sure


def cue_rows(used: Table, unused: Table) -> Iterator[list[str]]:
    """One line per method: what it puts on the mark, with a model that uses it and with one that does not."""
    for method in used.methods:
        energy = [table.values(method, "EBPG") for table in (used, unused)]
        cells: list[Estimate] = [estimate(values) for values in (*energy, energy[0] - energy[1])]
        cells += [used.estimate(method, name) for name in ("discrimination", "pointing")]
        yield [method, *(cell.text(1) for cell in cells)]


def written(options: argparse.Namespace, found: dict[str, Any], seconds: float) -> None:
    """The JSON, and the tables under the text of the page."""
    head = {
        "images": options.images,
        "marks": options.marks,
        "seed": options.seed,
        "seeds": SEEDS,
        "fit": [FIT_STEPS, BATCH, FIT_SCENES],
    }
    record: dict[str, Any] = {"setting": measure.setting(), "attrib_zoo": attrib_zoo.__version__, **head}
    parts = [f"{measure.setting()}; seed {options.seed}; {seconds / 60:.0f} minutes of one core."]
    for kind, (table, used, unused, sure) in found.items():
        record[kind] = {"planted": json.loads(table.to_json()), "confidence in red": sure}
        record[kind] |= {"mark used": json.loads(used.to_json()), "mark unused": json.loads(unused.to_json())}
        where = Table(table.records, [m for m in table.measures if m.needs])
        says = Table(table.records, [m for m in table.measures if not m.needs])
        parts += [f"## {kind.upper()}: where the map lies", where.to_markdown()]
        parts += [f"## {kind.upper()}: what the model says", says.to_markdown()]
        lines = [f"trained {name} the mark, {a:.3f} and {b:.3f}" for name, (a, b) in sure.items()]
        names = ["method", "energy on the mark, used", "the same, not used", "difference", "of mark and objects"]
        cues = measure.table(list(cue_rows(used, unused)), [*names, "points at it"])
        parts += [
            f"## {kind.upper()}: the mark",
            "Confidence in red without and with it:\n" + "; ".join(lines) + ".",
            cues,
        ]
    (options.raw / "scenes.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    page = options.output / "scenes.md"
    text = page.read_text(encoding="utf-8").split(MARKER)[0] if page.exists() else ""
    page.write_text(text + MARKER + "\n\n" + "\n\n".join(parts) + "\n", encoding="utf-8")


def main() -> None:
    """Train, fit, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--marks", type=int, default=60, help="images with the mark")
    parser.add_argument("--without", nargs="*", default=[], metavar="METHOD", help="in (b)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="of the page")
    parser.add_argument("--raw", type=Path, default=Path("benchmarks/results"), help="of the numbers")
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for folder in (options.output, options.raw, *([options.work] if options.work else [])):
        folder.mkdir(parents=True, exist_ok=True)
    start = time.process_time()
    found = {}
    for kind in options.kinds:
        model = synthetic.trained(kind, seed=options.seed)
        ready = explainers(model, kind, options.seed)
        found[kind] = (planted(model, kind, ready, options), *marked(model, kind, ready, options))
        print(f"{kind}: {time.process_time() - start:.0f} s", flush=True)
    written(options, found, time.process_time() - start)


if __name__ == "__main__":
    main()
