"""Which torchvision and timm classifiers work, found by running them: one row per model, in a CSV that can be resumed.

    python benchmarks/coverage.py                            # all of them: days on a laptop; stop and resume at will
    python benchmarks/coverage.py --sample --minutes 10      # one small member of each family
    python benchmarks/coverage.py --models resnet50 tv:vit_b_16
    python benchmarks/coverage.py --summary                  # write docs/explanation/coverage.md from the rows

Weights are random, the image too. A model is run at 128 px where it takes that, else at its own size, and must pass:
the three layers of T-TAME are found; no grid is refused (``gridcheck``), where that cannot be told with the statistics
of the images in its batch norms; Grad-CAM; Score-CAM with four masks; one training step of T-TAME and a map. Models
with more weights than ``--largest`` are only resolved, without memory, on the meta device, and marked so.
"""

from __future__ import annotations

import argparse
import csv
import signal
import sys
import textwrap
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import measure

import timm
import torch
import torchvision
from torch import Tensor, nn

from attrib_zoo import TTAME, GradCAM, ScoreCAM
from attrib_zoo.backbone.layers.gridcheck import probe
from attrib_zoo.backbone.layers import look, resolve

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "benchmarks" / "results" / "coverage.csv"
PAGE = ROOT / "docs" / "explanation" / "coverage.md"
STEPS = ("layers", "grid", "gradcam", "masks", "ttame")
FIELDS = ("library", "family", "model", "size", "millions", "run", *STEPS, "chosen", "reason", "seconds")
SMALL = (128, 112)  # the second for patches of 14
CLASSES = 10
SMALL_WORDS = (
    "test_",
    "atto",
    "femto",
    "pico",
    "xxs",
    "xx_small",
    "nano",
    "tiny",
    "_ti_",
    "_xs",
    "small",
    "400mf",
    "_s",
    "18",
)


class FourMasks(ScoreCAM):
    """Score-CAM with four of its masks."""

    def alive(self, maps: Tensor) -> Tensor:
        """The first four that are not constant."""
        found = super().alive(maps)
        return found & (found.cumsum(1) <= 4)


# ---------------------------------------------------------------------- the models


def listed() -> list[tuple[str, str, str]]:
    """``(library, family, name)`` of every classification model of both libraries; a family is a source file."""
    found = []
    for name in torchvision.models.list_models(module=torchvision.models):
        builder = torchvision.models.get_model_builder(name)
        found.append(("torchvision", builder.__module__.rpartition(".")[2], name))
    for family in timm.list_modules():
        found += [("timm", family, name) for name in timm.list_models(module=family)]
    return found


def sample(models: Sequence[tuple[str, str, str]], rows: Sequence[dict[str, str]] = ()) -> list[tuple[str, str, str]]:
    """One of each family: the one that took least time of those that ``rows`` has in full, else small by its name."""
    families: dict[tuple[str, str], list[str]] = defaultdict(list)
    for library, family, name in models:
        families[library, family].append(name)
    took = {(row["library"], row["model"]): float(row["seconds"]) for row in rows if row["run"] == "full"}

    def smallness(library: str, name: str) -> tuple[float, int, int, str]:
        rank = next((i for i, word in enumerate(SMALL_WORDS) if word in name), len(SMALL_WORDS))
        return took.get((library, name), float("inf")), rank, len(name), name

    def smallest(library: str, names: Sequence[str]) -> str:
        return min(names, key=lambda name: smallness(library, name))

    return [(library, family, smallest(library, names)) for (library, family), names in families.items()]


def build(library: str, name: str, **options: Any) -> nn.Module:
    """The model with random weights, in eval mode."""
    if library == "torchvision":
        extra = {"init_weights": False, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
        return torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **extra).eval()
    return timm.create_model(name, num_classes=CLASSES, **options).eval()


def awake(model: nn.Module) -> nn.Module:
    """The model with random weights where linear layers begin at zero: behind such a head nothing has a gradient."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not bool(module.weight.any()):
            nn.init.normal_(module.weight, std=0.02)
    return model


def measured(model: nn.Module, images: Tensor) -> nn.Module:
    """The model with batch norms that have the statistics of these images, as training would give them.

    Where they divide by a variance that was never measured, activations grow or fade from layer to layer, until a
    change of the image is less than their rounding, and no cell answers to a place.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of what is seen
        norm.train()
    with torch.no_grad():
        model(images)
    return model.eval()


def without_memory(library: str, name: str) -> nn.Module:
    """The model on the meta device; in memory where it computes with tensors while it is built."""
    try:
        with torch.device("meta"):
            return build(library, name)
    except (NotImplementedError, RuntimeError):
        return build(library, name)


def candidates(library: str, name: str, bare: nn.Module) -> Iterator[tuple[nn.Module, tuple[int, int, int]]]:
    """Models and ``(C, H, W)`` to try, cheapest first; timm's models of a fixed size are built for a smaller one."""
    config = getattr(bare, "pretrained_cfg", None) or {}
    own = tuple(config.get("input_size") or (3, 224, 224))
    fixed = config.get("fixed_input_size")
    for size in SMALL if own[1] > SMALL[0] else ():
        with suppress(Exception):
            yield build(library, name, **({"img_size": size} if fixed else {})), (own[0], size, size)
    yield build(library, name), own


# ---------------------------------------------------------------------- one model


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise a TimeoutError inside when it takes more CPU time."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def said(error: BaseException) -> str:
    """The error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def run(library: str, family: str, name: str, *, largest: float, seconds: int) -> dict[str, Any]:
    """The row of one model."""
    row: dict[str, Any] = dict.fromkeys(FIELDS, "")
    row.update(library=library, family=family, model=name)
    start = time.process_time()
    try:
        with at_most(seconds):
            bare = without_memory(library, name)
            millions = sum(p.numel() for p in bare.parameters()) / 1e6
            row.update(millions=f"{millions:.1f}", run="full" if millions <= largest else "resolution only")
            if millions <= largest:
                torch.manual_seed(0)
                model, images, scores = smallest(library, name, bare)
                if scores.ndim == 2:
                    steps(awake(model), images, row)
                else:
                    row.update(run="no classifier", reason=f"puts out {tuple(scores.shape)} for 2 images, no scores")
            else:
                device = next(bare.parameters()).device
                own = (getattr(bare, "pretrained_cfg", None) or {}).get("input_size") or (3, 224, 224)
                resolved(bare, torch.zeros(1, *own, device=device), row)
    except Exception as error:
        row["reason"] = row["reason"] or said(error)
    row["seconds"] = f"{time.process_time() - start:.1f}"
    return row


def resolved(model: nn.Module, images: Tensor, row: dict[str, Any]) -> Any:
    """Find the layers of T-TAME."""
    row["size"] = f"{images.shape[2]}x{images.shape[3]}"
    traced = look(model, images)
    taps = resolve(model, None, images, count=3, traced=traced)
    row["chosen"] = " ".join(tap.label for tap in taps)
    row["layers"] = "ok" if len(taps) == 3 else f"{len(taps)} layers"
    return taps


def smallest(library: str, name: str, bare: nn.Module) -> tuple[nn.Module, Tensor, Tensor]:
    """The model, images of the smallest size that it takes, and its outputs; else the error of its own size."""
    for model, shape in candidates(library, name, bare):
        images = torch.randn(2, *shape)
        try:
            with torch.no_grad():
                return model, images, model(images)
        except Exception as error:
            refused = error
    raise refused


def steps(model: nn.Module, images: Tensor, row: dict[str, Any]) -> None:
    """Run all that the model must pass, and note how each went."""
    taps = resolved(model, images, row)
    gradient = resolve(model, None, images, rule="gradient")
    chosen = list(dict.fromkeys([*taps, *gradient]))
    verdicts = probe(model, chosen, images)
    if any(verdict.said != "right" for verdict in verdicts):
        verdicts = probe(measured(model, images), chosen, images)
    row["grid"] = " ".join(verdict.said for verdict in verdicts)
    tests: dict[str, Callable[[], Tensor]] = {
        "gradcam": lambda: GradCAM(model).attribute(images, 1),
        "masks": lambda: FourMasks(model).attribute(images, 1),
        "ttame": lambda: TTAME(model).fit([images], max_steps=1, show_progress=False).attribute(images),
    }
    reasons = ["grid: read wrongly"] if "wrong" in row["grid"] else []
    for step, test in tests.items():
        problem = tried(test, images)
        row[step] = "failed" if problem else "ok"
        reasons += [f"{step}: {problem}"] if problem else []
    row["reason"] = "; ".join(reasons)


def tried(test: Callable[[], Tensor], images: Tensor) -> str:
    """What is wrong with the map, nothing if it is one."""
    try:
        heat = test()
    except TimeoutError:
        raise
    except Exception as error:
        return said(error)
    right = heat.shape == images.shape and bool(torch.isfinite(heat).all())
    return "" if right else "not a finite map of the images' shape"


# ---------------------------------------------------------------------- rows


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: dict[str, Any]) -> None:
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)


# ---------------------------------------------------------------------- the page


def passed(row: dict[str, str]) -> bool:
    """Whether all that was run went well."""
    return not row["reason"] and row["layers"] == "ok"


def page(rows: Sequence[dict[str, str]], total: dict[str, int]) -> str:
    """The summary, as Markdown."""
    full = [row for row in rows if row["run"] == "full"]
    good = [row for row in full if passed(row)]
    only = [row for row in rows if row["run"] == "resolution only"]
    other = [row for row in rows if row["run"] == "no classifier"]
    bad = [row for row in rows if not passed(row) and row not in other]
    verdicts = Counter(verdict for row in full for verdict in row["grid"].split())
    families = {(row["library"], row["family"]) for row in rows}
    of = " and ".join(f"{sum(r['library'] == lib for r in rows)} of {count} of {lib}" for lib, count in total.items())
    lines = [
        "# Coverage",
        "",
        "Written by `python benchmarks/coverage.py --summary` from [the rows](../../benchmarks/results/coverage.csv), "
        "one per model.",
        "",
        f"**{len(rows)} models were examined**: {of}. They come from {len(families)} families (source files of the "
        "two libraries). What was not run is not claimed.",
        "",
        f"* {len(good)} of the {len(full)} that were run in full pass everything: three layers found, Grad-CAM, "
        "Score-CAM with four masks, a training step of T-TAME and a map.",
        f"* {len(only)} were too large and only resolved, on the meta device.",
        f"* {len(other)} output no scores, so they are not classifiers: "
        f"{', '.join(r['model'] for r in other) or 'none'}.",
        f"* Of {sum(verdicts.values())} layers whose grid was tested, {verdicts['right']} are right, "
        f"{verdicts['undecided']} undecided and {verdicts['wrong']} wrong. Undecided: with random weights the layer "
        "mixes the whole image, so that no cell answers to one place.",
        "",
        "Weights and images are random, at 128 pixels where the model takes that, else at its own size; so this shows "
        "that layers, layouts and gradients are right, not that maps are good. Where the statistics that batch norm is "
        "made with leave a grid undecided, it gets those of the images.",
        "",
        "| library | family | models | pass | resolved only | undecided grid | refused or failed |",
        "|---|---|---|---|---|---|---|",
    ]
    members_of: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        members_of[row["library"], row["family"]].append(row)
    for (library, family), members in sorted(members_of.items()):
        counts = (
            len(members),
            sum(passed(row) and row["run"] == "full" for row in members),
            sum(row["run"] == "resolution only" for row in members),
            sum("undecided" in row["grid"] for row in members),
            sum(row in bad for row in members),
        )
        lines.append(f"| {library} | {family} | " + " | ".join(map(str, counts)) + " |")
    lines += ["", "## Refused or failed", ""]
    lines += [f"* `{row['model']}` ({row['library']}): {row['reason'] or row['layers']}"[:300] for row in bad]
    lines += [] if bad else ["None of those that were run."]
    return "\n".join(wrapped(line) for line in lines) + "\n"


def wrapped(line: str) -> str:
    """The line in pieces of at most 120 characters; rows of tables stay whole."""
    if line.startswith("|") or not line:
        return line
    return textwrap.fill(line, 120, subsequent_indent="  " * line.startswith("* "), break_on_hyphens=False)


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="names; torchvision's begin with tv:")
    parser.add_argument("--sample", action="store_true", help="one small member of each family")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of CPU time, then stop")
    parser.add_argument("--seconds", type=int, default=600, help="of CPU time per model")
    parser.add_argument("--largest", type=float, default=150, help="million weights that are run in full")
    parser.add_argument("--output", type=Path, default=ROWS)
    parser.add_argument("--summary", action="store_true", help="only write the page")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    everything = listed()
    wanted = sample(everything, read(ROWS)) if args.sample else everything
    if args.models:
        names = {("torchvision", n[3:]) if n.startswith("tv:") else ("timm", n) for n in args.models}
        wanted = [entry for entry in everything if (entry[0], entry[2]) in names]
    done = {(row["library"], row["model"]) for row in read(args.output)}
    for library, family, name in [] if args.summary else wanted:
        if (library, name) in done:
            continue
        if time.process_time() > 60 * args.minutes:
            print("out of time; run again to go on")
            break
        row = run(library, family, name, largest=args.largest, seconds=args.seconds)
        append(args.output, row)
        print(f"{library} {name}: {row['reason'] or 'ok'} [{row['grid']}] {row['seconds']} s", flush=True)
    total = Counter(library for library, _, _ in everything)
    PAGE.write_text(page(read(args.output), total), encoding="utf-8")
    print(measure.setting(), file=sys.stderr)


if __name__ == "__main__":
    main()
