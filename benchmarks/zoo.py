"""All methods on three ImageNet models, side by side, and where their order depends on how pixels are hidden: a page.

    export ATTRIB_ZOO_DATA=FOLDER
    python benchmarks/results.py squeezenet efficientnet vit_tiny --work WORK --images 100
    python benchmarks/results.py squeezenet efficientnet vit_tiny --work WORK/beside --beside --images 60
    python benchmarks/zoo.py --work WORK [--randomised METHOD ...] [--masks METHOD ...]

Stop and run again at will; slow methods on fewer images, with ``--methods`` and ``--images``. Adds what is in WORK to
``benchmarks/results/imagenet.json`` and writes ``docs/results/zoo.md`` from that, and the table of
``docs/how-to/which-method.md``. ``--randomised`` compares maps before and after the weights are re-initialised,
``--masks`` holds the transformer's maps against the masks of COCO objects.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from imagenet import ROOT, CASES, Numbers, Rows, cell, load, mean, redrawn, save
from measure import table, unpacked

import torch
from torch import Tensor

from attrib_zoo.training.recipe import RECIPES, Recipe

BASES = ("TTAME", "GradCAM, smooth 3")
FAITHFUL = ["ROAD MoRF", "ROAD LeRF", "insertion", "deletion", "AD(100)", "AD(50)", "AD(15)", "IC(50)"]
PLACE = ["EBPG", "pointing game", "Bbox"]
RULES = {"SRG": "imputed (ROAD)", "SRG, black": "black", "SRG, mean": "mean colour", "SRG, blur": "blurred"}
LOW = {"ROAD MoRF", "deletion", "AD(100)", "AD(50)", "AD(15)"}
FIRST = ("TTAME", "LCAMImg", "LCAMFm", "GradCAM", "GradCAMPlusPlus", "ScoreCAM", "RISE")
CONTROLS = ("TTAME, paper, untrained", "centre blob", "image edges", "random map", "perfect map", "chance")
HIDDEN = ("TTAME, 150 steps", "TTAME, rows, 150 steps")  # of the page on starting from rows alone
GUIDE = ROOT / "docs" / "how-to" / "which-method.md"
_RESAMPLES = 2000


def order(rows: Rows) -> list[str]:
    """Methods as the tables have them: the best known first, then by name, controls last."""

    def key(name: str) -> tuple[int, int, str, bool, str]:
        plain = name.partition(", ")[0]
        last = CONTROLS.index(name) if name in CONTROLS else -1
        return last, FIRST.index(plain) if plain in FIRST else len(FIRST), plain, plain != name, name

    return sorted((name for name in rows if not name.startswith(HIDDEN)), key=key)


def column(rows: dict[int, dict[str, float]], measure: str) -> list[float]:
    """One measure of all images."""
    return [row.get(measure, math.nan) for row in rows.values()]


def gain(rows: Rows, method: str, other: str, measure: str = "SRG") -> str:
    """A method minus another, on the images that both have."""
    base = rows.get(other, {})
    shared = [i for i in rows[method] if i in base]
    if method == other:
        return ""
    return cell([rows[method][i].get(measure, math.nan) - base[i].get(measure, math.nan) for i in shared], sign=True)


def faithfulness(known: Numbers) -> str:
    """What hiding pixels by the map does to the decision."""
    lines = []
    for method in order(known.rows):
        rows = known.rows[method]
        if method == "chance":  # of regions alone
            continue
        lines.append(
            [
                method,
                len(rows),
                cell(column(rows, "SRG")),
                *(gain(known.rows, method, base) for base in BASES),
                *(cell(column(rows, m)) for m in FAITHFUL),
            ]
        )
    return table(
        lines, ["method", "images", "SRG ↑", *(f"minus {base}" for base in BASES), *(arrowed(m) for m in FAITHFUL)]
    )


def arrowed(measure: str) -> str:
    """The measure with the direction that is better."""
    return f"{measure} {'↓' if measure in LOW else '↑'}"


def place(known: Numbers) -> str:
    """Against boxes; what a map costs; whether the weights matter."""
    random = {**{method: similar for method, _, _, similar in known.checks}, **known.more.get("randomised", {})}
    lines = []
    for method in order(known.rows):
        rows, cost = known.rows[method], known.costs.get(method, {})
        grid = column(known.beside.get(method, {}), "grid pointing")
        passes = f"{cost['forward']:.4g} + {cost['backward']:.4g}" if cost and method not in CONTROLS else "–"
        time = f"{cost['times_forward']:.3g}" if cost and method not in CONTROLS else "–"
        lines.append(
            [
                method,
                *(cell(column(rows, m)) for m in PLACE),
                cell(grid) + (f" ({sum(not math.isnan(v) for v in grid)})" if mean(grid)[0] == mean(grid)[0] else ""),
                random.get(method, "–"),
                passes,
                time,
            ]
        )
    head = [*(f"{m} ↑" for m in PLACE), "grid pointing ↑ (mosaics)", "after randomisation", "passes", "x forward"]
    return table(lines, ["method", *head])


def ranks(rows: Sequence[dict[int, dict[str, float]]], measure: str, images: list[int]) -> list[str]:
    """The rank of each by its mean, 1 the best, with its 95 % interval over images drawn with replacement."""
    values = torch.tensor([[found[i].get(measure, math.nan) for i in images] for found in rows], dtype=torch.double)
    if measure in LOW:
        values = -values
    known = ~values.isnan().all(1)
    drawn = torch.randint(len(images), (_RESAMPLES, len(images)), generator=torch.Generator().manual_seed(0))
    means = torch.stack([value[drawn].nanmean(1) for value in values[known]])  # (methods, resamples)

    def places(found: Tensor) -> Tensor:
        return found.argsort(0, descending=True).argsort(0) + 1

    at = places(values[known].nanmean(1))
    low, high = places(means).double().quantile(torch.tensor([0.025, 0.975], dtype=torch.double), dim=1)
    cells = iter([f"{int(m)} [{round(float(a))}, {round(float(b))}]" for m, a, b in zip(at, low, high, strict=True)])
    return [next(cells) if has else "–" for has in known.tolist()]


def rules(known: Numbers) -> tuple[str, int]:
    """Ranks by SRG under each rule of hiding, on the images that all of these methods have; and how many those are."""
    chosen = [m for m in order(known.beside) if m in known.rows]
    if len(chosen) < 2:
        return "", 0
    both = [{i: {**known.rows[m].get(i, {}), **row} for i, row in known.beside[m].items()} for m in chosen]
    images = sorted(set.intersection(*(set(found) for found in both)))
    images = [i for i in images if all("SRG" in found[i] for found in both)]
    for found in both:
        for row in found.values():
            row["insertion - deletion"] = row.get("insertion", math.nan) - row.get("deletion", math.nan)
    measures = [*RULES, "insertion - deletion", "AD(50)"]
    columns = [ranks(both, measure, images) for measure in measures]
    lines = [[method, *cells] for method, *cells in zip(chosen, *columns, strict=True)]
    return table(lines, ["method", *RULES.values(), "insertion - deletion", "AD(50), black"]), len(images)


def shares(known: Numbers) -> list[int]:
    """The numbers of images to rank on: all, and as many as most methods have, but no more than 60 are needed."""
    counts = sorted(len(rows) for rows in known.rows.values())
    return sorted({counts[-1], min(60, counts[len(counts) // 2])}, reverse=True)


def everywhere(known: Numbers, least: int) -> tuple[str, int]:
    """Ranks by the measures of the first tables, of the methods with at least this many images."""
    chosen = [m for m in order(known.rows) if len(known.rows[m]) >= least and m not in CONTROLS]
    images = sorted(set.intersection(*(set(known.rows[m]) for m in chosen)))
    measures = ["SRG", "insertion", "deletion", "AD(50)", "AD(15)", "EBPG", "pointing game"]
    columns = [ranks([known.rows[m] for m in chosen], measure, images) for measure in measures]
    return table([[m, *cells] for m, *cells in zip(chosen, *columns, strict=True)], ["method", *measures]), len(images)


def randomised(name: str, work: Path, methods: list[str], count: int = 16) -> dict[str, str]:
    """Rank correlation of each method's maps with those of the same model with its weights re-initialised."""
    from results import CASES as LOADED
    from results import made

    from attrib_zoo import metrics

    case = LOADED[name](work)
    images = torch.stack([case.images[i]["image"] for i in range(count)])
    other = redrawn(case.model)
    with torch.no_grad():
        target = case.model(images).argmax(1)
    found = {}
    for method in methods:
        maps = []
        for model in (case.model, other):
            here = copy.copy(case)
            here.model = model
            explainer = made(method, here, work / "nowhere")
            explainer.upsample = False
            maps.append(
                torch.cat([explainer.attribute(x, t) for x, t in zip(images.split(8), target.split(8), strict=True)])
            )
        similar, spread = mean(metrics.spearman(*maps).tolist())
        found[method] = f"{similar:.2f} ± {spread:.2f}"
        print(name, method, found[method], flush=True)
    return found


def masks(work: Path, methods: list[str]) -> dict[str, list[float]]:
    """Energy inside the objects' masks and the pointing game, in percent, of COCO photographs on the transformer."""
    from results import CASES as LOADED
    from results import made
    from PIL import Image

    from attrib_zoo import metrics
    from attrib_zoo.models.photos import Photos

    case = LOADED["vit_tiny"](work)
    told = sorted(unpacked("coco_masks").rglob("masks.json"))[0]
    entries = json.loads(told.read_text(encoding="utf-8"))
    explained: Any = case.images
    images = torch.stack(list(Photos([told.parent / e["file"] for e in entries], explained.dataset.photos.transform)))
    size = images.shape[-2:]
    inside = torch.stack([torch.from_numpy(_mask(Image.open(told.parent / e["mask"]), size)) for e in entries])
    target = torch.tensor([e["label"] for e in entries])
    found = {"area": (100 * inside.double().mean((1, 2))).tolist()}
    for method in methods:
        explainer = made(method, case, work / "vit_tiny")
        maps = torch.cat([explainer.attribute(x, t) for x, t in zip(images.split(8), target.split(8), strict=True)])
        energy = metrics.energy_pointing_game(None, images, maps, target, masks=inside)
        point = metrics.pointing_game(None, images, maps, target, masks=inside)
        found[method] = [round(100 * float(v), 2) for v in energy]
        found[f"{method}: pointing"] = [round(100 * float(v), 2) for v in point]
        print(method, cell(found[method]), cell(found[f"{method}: pointing"]), flush=True)
    return found


def _mask(image: Any, size: tuple[int, int]) -> Any:
    """The mask at the images' size."""
    import numpy as np

    return np.asarray(image.convert("L").resize((size[1], size[0]), 0)) > 127


def page(numbers: dict[str, Numbers]) -> str:
    """The page, as Markdown."""
    lines = [
        "# All methods on three ImageNet models",
        "",
        "Validation images of ImageNet with boxes; the model's own decision is explained. The first of the same 300",
        "images for every method; slow methods have fewer, as the column says, so compare means across rows with care:",
        "*minus ...* is SRG's difference on the images that both have; a star: its 95 % interval excludes 0.",
        "Means ± half the 95 % interval over images. SRG is LeRF - MoRF of ROAD at 20, 50 and 80 % of the pixels.",
        "The perfect map is the box itself.",
        "TTAME is `TTAME(model).fit(loader)` by default; LCAMImg took 150 steps, from random weights unless it says",
        "rows. Trained explainers saw 500 other photographs. Controls that know nothing of the model stand last.",
        "ExtremalPerturbation, with 800 steps for each area of each image, was not measured.",
        "[Which method should I use?](../how-to/which-method.md) says what follows from it; `benchmarks/results.py`",
        "and `benchmarks/zoo.py` make it.",
        "",
    ]
    for name, title in CASES.items():
        known = numbers[name]
        lines += [f"## {title}", "", "### Hiding pixels by the map", "", faithfulness(known), ""]
        lines += ["### Boxes, cost, and whether the weights matter", ""]
        lines += ["Passes: samples forward + backward through the model for one map. x forward: processor time as a"]
        lines += ["multiple of a plain pass. After randomisation: rank correlation of the maps with those of the model"]
        lines += ["after its weights were re-initialised; near 0 is right.", "", place(known), ""]
        for count, ranked in {count: ranked for ranked, count in (everywhere(known, n) for n in shares(known))}.items():
            lines += [f"### Ranks on the {count} images that all of these have", ""]
            lines += [
                "1 is the best, with 95 % intervals over images; where intervals overlap, the images cannot tell."
            ]
            lines += ["", ranked, ""]
        ranked, count = rules(known)
        if count:
            lines += [f"### Does the order depend on how pixels are hidden? ({count} images)", ""]
            lines += ["Ranks by SRG, with what was removed imputed, black, the mean colour or blurred."]
            lines += ["", ranked, ""]
        held = known.more.get("masks")
        if held:
            lines += ["### Energy inside objects' masks (26 COCO photographs)", ""]
            area, _ = mean(held["area"])
            lines += [f"The objects fill {area:.1f} % of the photographs, so a map that knows nothing has that energy"]
            lines += ["inside. The photographs were chosen by this model, as it names their object.", ""]
            kept = [m for m in held if m != "area" and not m.endswith(": pointing")]
            rows = [[m, cell(held[m]), cell(held[f"{m}: pointing"])] for m in order({m: {} for m in kept})]
            lines += [table(rows, ["method", "energy inside, %", "pointing game, %"]), ""]
    return "\n".join(lines)


def called(name: str) -> str:
    """A row's name as the call that makes the explainer."""
    from results import OPTIONS, VARIANTS

    plain = name.partition(", ")[0]
    given = OPTIONS.get(plain, {}) | VARIANTS.get(name, {})
    return f"`{plain}({', '.join(f'{key}={_written(value)}' for key, value in given.items())})`".replace("()", "")


def _written(value: Any) -> str:
    """An option as code."""
    if not isinstance(value, Recipe):
        return json.dumps(value).replace("true", "True")
    usual = RECIPES[value.name]
    changed = {
        f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) != getattr(usual, f.name)
    }
    return f'RECIPES["{value.name}"].but({", ".join(f"{name}={_written(entry)}" for name, entry in changed.items())})'


def summary(numbers: dict[str, Numbers]) -> str:
    """SRG of every method minus T-TAME's, a line for each."""
    from attrib_zoo.cli.shared import methods

    classes = {cls.__name__: cls for cls in methods().values()}
    kinds = {name: "vit" if name.startswith("vit") else "cnn" for name in CASES}
    names = order({name: {} for known in numbers.values() for name in known.rows})
    lines = []
    for name in names:
        cls = classes.get(name.partition(", ")[0])
        if name == BASES[0]:
            first = [f"{cell(column(known.rows[name], 'SRG'))} ({len(known.rows[name])})" for known in numbers.values()]
            lines.append([f"{called(name)} itself", *first])
        elif cls is not None and name not in CONTROLS and ", seed " not in name:
            cells = [
                f"{gain(known.rows, name, BASES[0])} ({len(known.rows[name])})".replace("*", "\\*")
                if name in known.rows
                else ("–" if kinds[case] in cls.models else "not defined")
                for case, known in numbers.items()
            ]
            steps = ", 150 steps" * (name == "TTAME, paper" or name.startswith("LCAM"))
            says = steps + ", which explains no class" * cls.class_agnostic
            lines.append([called(name) + says, *cells])
    return table(lines, ["", *CASES.values()])


def between(
    text: str, found: str, start: str = "<!-- table of benchmarks/zoo.py -->", end: str = "<!-- end -->"
) -> str:
    """A page with what stands between two marks replaced."""
    head, _, rest = text.partition(start)
    return f"{head}{start}\n\n{found}\n\n{end}{rest.partition(end)[2]}"


def main() -> None:
    """Write docs/results/zoo.md and the table of docs/how-to/which-method.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--randomised", nargs="+", metavar="METHOD", help="compare these after randomisation")
    parser.add_argument("--masks", nargs="+", metavar="METHOD", help="hold these against masks, on the transformer")
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="of --randomised")
    options = parser.parse_args()
    numbers = load()
    for name, known in numbers.items():
        known.merge(options.work, name)
        if options.randomised and name in options.cases:
            known.more.setdefault("randomised", {}).update(randomised(name, options.work, options.randomised))
    if options.masks:
        numbers["vit_tiny"].more.setdefault("masks", {}).update(masks(options.work, options.masks))
    save(numbers)
    numbers = load()  # as rounded there, so that the pages are what anybody finds from the file
    (ROOT / "docs" / "results" / "zoo.md").write_text(page(numbers), encoding="utf-8")
    GUIDE.write_text(between(GUIDE.read_text(encoding="utf-8"), summary(numbers)), encoding="utf-8")


if __name__ == "__main__":
    main()
