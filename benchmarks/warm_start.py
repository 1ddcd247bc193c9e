"""What T-TAME's start is worth on three ImageNet models, and what training adds: a page and a picture.

    export ATTRIB_ZOO_DATA=FOLDER
    python benchmarks/results.py squeezenet efficientnet vit_tiny --work WORK \
        --methods TTAME "TTAME, seed 1" "TTAME, seed 2" "TTAME, rows" GradCAM "GradCAM, smooth 3" "TTAME, paper"
    python benchmarks/results.py squeezenet --work WORK --methods RISE --images 80
    python benchmarks/warm_start.py --work WORK

Adds the per-image results that ``results.py`` left in WORK to those of ``benchmarks/results/imagenet.json`` and writes
the page of the T-TAMEs and what they are compared with. Images are split by whether the class that the model decides
for is its decision on one of the 500 photographs that fits draw from. Differences are paired, with 95 % intervals
(1.96 standard errors over images).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imagenet import CASES, ROOT, Rows, cell, load, mean, redrawn, save
from measure import table

import torch

MEASURES = ["SRG", "ROAD MoRF", "ROAD LeRF", "AD(50)", "AD(15)", "AD(100)", "insertion", "deletion", "EBPG"]
BASES = ("GradCAM", "GradCAM, smooth 3")
MORE = ("TTAME, smooth 3", "TTAME, rows", "GenericAttention", "GenericAttention, libra", "RISE")
ORDER = (
    "TTAME",
    "TTAME, seed 1",
    "TTAME, seed 2",
    "TTAME, smooth 3",
    "TTAME, no filter",
    "TTAME, positive",
    "TTAME, rows",
    "TTAME, 150 steps",
    "TTAME, 150 steps, seed 1",
    "TTAME, rows, 150 steps",
    "TTAME, paper",
    *BASES,
    "GenericAttention",
    "GenericAttention, smooth 3",
    "GenericAttention, libra",
    "RISE",
    "random map",
    "image edges",
    "centre blob",
)
PASSES = {"TTAME": 1, "GradCAM": 2, "GenericAttention": 2, "RISE": 1001}  # a backward pass counts as one
DRAWN = [method for method in ORDER if method.partition(",")[0] in PASSES and "seed" not in method]


def seen_classes(name: str, work: Path) -> list[int]:
    """The model's decisions on the photographs that fits draw from."""
    from results import CASES as LOADED
    from torch.utils.data import DataLoader

    from attrib_zoo.models.photos import Photos

    case = LOADED[name](work)
    photos: Any = case.training().dataset
    explained: Any = case.images
    whole = Photos(photos.paths, explained.dataset.photos.transform)  # no random crops
    with torch.no_grad():
        found = torch.cat([case.model(images).argmax(1) for images in DataLoader(whole, batch_size=20)])
    return sorted(set(found.tolist()))


def means(rows: Rows, images: set[int]) -> str:
    """The table of all methods on these images."""
    lines = []
    for method, found in rows.items():
        own = [found[i] for i in found if i in images]
        if len(own) > 1:
            lines.append([method, len(own), *(cell([row.get(m, math.nan) for row in own]) for m in MEASURES)])
    return table(lines, ["method", "images", *MEASURES])


def differences(rows: Rows, images: set[int], base: str) -> str:
    """The T-TAMEs minus a base, on the images that both have."""
    lines = []
    for method in rows:
        shared = [i for i in rows[method] if i in images and i in rows.get(base, {})]
        if method.startswith("TTAME") and method != base and len(shared) > 1:
            pairs = [(rows[method][i], rows[base][i]) for i in shared]
            gaps = [[a.get(m, math.nan) - b.get(m, math.nan) for a, b in pairs] for m in MEASURES]
            lines.append([method, len(shared), *(cell(gap, sign=True) for gap in gaps)])
    return table(lines, [f"minus {base}", "images", *MEASURES])


def draw(cases: dict[str, tuple[Rows, set[int], set[int]]], path: Path) -> None:
    """SRG against passes through the model, a panel for each model and for classes seen and not seen."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(cases), figsize=(4 * len(cases), 7), sharex=True, squeeze=False)
    colours = dict(zip(DRAWN, plt.get_cmap("tab20").colors, strict=False))  # type: ignore[attr-defined]
    for column, (name, (rows, seen, unseen)) in enumerate(cases.items()):
        for row, (title, images) in enumerate((("in the fit's photographs", seen), ("not in them", unseen))):
            axis = axes[row, column]
            for place, method in enumerate(m for m in DRAWN if m in rows):
                values = [rows[method][i]["SRG"] for i in rows[method] if i in images]
                if len(values) < 2:
                    continue
                middle, half = mean(values)
                at = PASSES[method.partition(",")[0]] * 1.06**place  # side by side where the cost is the same
                label = f"{method} ({len(values)})"
                axis.errorbar(at, middle, half, fmt="o", capsize=3, color=colours[method], label=label)
            axis.set_xscale("log")
            axis.set_title(f"{CASES[name]}: {title}", fontsize=10)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7, loc="best")
            if row:
                axis.set_xlabel("passes through the model for one map")
            if not column:
                axis.set_ylabel("SRG = LeRF - MoRF, points")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


CHECKED = ("TTAME", "TTAME, positive", "TTAME, rows", "GradCAM", "GradCAM, smooth 3", "GenericAttention")


def checks(name: str, work: Path, methods: Sequence[str], count: int = 96) -> list[list[object]]:
    """Grid pointing, the encoding check and model randomisation, on the first images that results.py drew."""
    from results import CASES as LOADED
    from results import made
    from torch.utils.data import DataLoader, Subset

    from attrib_zoo import TTAME, metrics
    from attrib_zoo.attribution import Attribution

    case = LOADED[name](work)
    model, kept = case.model, range(count)
    images = torch.cat([batch["image"] for batch in DataLoader(Subset(case.images, kept), batch_size=16)])
    with torch.no_grad():
        scores = torch.cat([model(part) for part in images.split(16)]).softmax(1)
    sure, decided = scores.max(1)
    mosaics = metrics.grid_mosaics(images, decided, sure, least=0.5)
    asked = mosaics.target
    kinds = decided.bincount(minlength=scores.shape[1]).topk(5).indices
    asked_for = [method for method in methods if method != "GenericAttention" or case.kind == "vit"]
    explainers = {method: made(method, case, work / name) for method in asked_for}
    other = redrawn(model)
    found: list[list[object]] = []
    for method, explainer in explainers.items():
        explainer.upsample = False
        maps = torch.cat(
            [explainer.attribute(x, t) for x, t in zip(mosaics.inputs.split(16), asked.split(16), strict=True)]
        )
        grid = metrics.grid_pointing_game(None, None, maps, cell=mosaics.cell)
        several = torch.cat([explainer.attribute_many(x, kinds.tolist())[:, :, 0] for x in images[:60].split(20)])
        guessed = metrics.encoding_check(
            several.flatten(0, 1), kinds.repeat(60), groups=torch.arange(60).repeat_interleave(5)
        )
        plain = explainer.attribute(images[:32], decided[:32])
        if isinstance(explainer, TTAME):
            random: Attribution = TTAME(other, recipe=explainer.recipe, upsample=False)
            random.fit([images[32:64]], show_progress=False)  # type: ignore[attr-defined]
        else:
            random = type(explainer)(other, smooth=explainer.smooth, upsample=False)
        after = random.attribute(images[:32], decided[:32])
        similar = metrics.spearman(plain, after)
        value, half = mean((100 * grid).tolist())
        alike, spread = mean(similar.tolist())
        found.append(
            [
                method,
                f"{value:.1f} ± {half:.1f} ({len(grid)})",
                f"{100 * guessed.accuracy:.1f} (chance {100 * guessed.chance:.1f})",
                f"{alike:.2f} ± {spread:.2f}",
            ]
        )
    return found


def main() -> None:
    """Write docs/results/warm_start.md and .png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--checks", nargs="*", metavar="METHOD", help="grid pointing, encoding, randomisation too")
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="of --checks")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    options = parser.parse_args()
    numbers = load()
    cases: dict[str, tuple[Rows, set[int], set[int]]] = {}
    lines = [
        "# T-TAME from the classifier's rows, on three ImageNet models",
        "",
        "Validation images of ImageNet; the model's own decision is explained; explainers are fitted on 500 other",
        "photographs. `TTAME` is `TTAME(model).fit(loader)` as it comes: rows and no step, on the transformer rows of",
        "what the class token takes from each patch. Means ± half the 95 % interval over images; a star: the",
        "interval of the paired difference excludes 0; –: not measured. ROAD at 20, 50 and 80 %; SRG is its",
        "LeRF - MoRF. RISE is on the first of the same images: compare it in *minus RISE* alone. Written by",
        "`benchmarks/warm_start.py`; what it says is in",
        "[starting from rows](../explanation/starting-from-rows.md).",
        "",
        "![SRG against passes](warm_start.png)",
        "",
    ]
    for name, title in CASES.items():
        known = numbers[name]
        known.merge(options.work, name)
        if not known.seen:
            known.seen = seen_classes(name, options.work)
        if options.checks is not None and name in options.cases:
            found = {line[0]: line for line in (*known.checks, *checks(name, options.work, options.checks or CHECKED))}
            known.checks = list(found.values())
        rows: Rows = {m: known.rows[m] for m in ORDER if m in known.rows}
        targets = {i: int(row["target"]) for found in rows.values() for i, row in found.items()}
        seen = {i for i, target in targets.items() if target in set(known.seen)}
        cases[name] = rows, seen, set(targets) - seen
        lines += [f"## {title}", ""]
        if known.checks:
            head = ["method", "grid pointing, % (mosaics)", "class guessed from the mask, %", "after randomisation"]
            lines += [table(known.checks, head), ""]
        for part, images in (
            ("All images", set(targets)),
            ("Classes that the model decides for on the fit's photographs", seen),
            ("Other classes", set(targets) - seen),
        ):
            lines += [f"### {part} ({len(images)})", "", means(rows, images), ""]
            lines += [
                line for base in (*BASES, *MORE) if base in rows for line in (differences(rows, images, base), "")
            ]
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "warm_start.md").write_text("\n".join(lines), encoding="utf-8")
    save(numbers)
    draw(cases, options.output / "warm_start.png")


if __name__ == "__main__":
    main()
