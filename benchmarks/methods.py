"""What every method costs: samples through the model, time in plain forward passes, memory; and the peers.

    python benchmarks/methods.py [--models resnet18 vit_tiny_patch16_224] [--methods GradCAM ...] [--masks 200]

One process, one thread, random weights, one image of 224 px. The time of a method of many masks is also given as a
multiple of (its masked passes x one batched forward pass per image). grad-cam and torchcam are measured beside ours
where they are installed. RISE runs with ``--masks`` masks: its cost is linear in them.
"""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections.abc import Callable

from measure import setting, table, times

import torch
from torch import Tensor, nn

import attrib_zoo
from attrib_zoo import models
from attrib_zoo.attribution import Attribution
from attrib_zoo.benchmark.cost import measured, peak_bytes
from attrib_zoo.cli.shared import methods
from attrib_zoo.errors import AttribZooError

HEAD = ["method", "by", "forward", "backward", "x forward", "x its passes", "peak MB"]
SLOW = ("ExtremalPerturbation",)
TARGET = 3


def few(cls: type[Attribution], masks: int) -> dict[str, int]:
    """RISE takes thousands of masks; fewer tell as much about its cost."""
    return {"n_masks": masks} if cls.__name__ == "RISE" else {}


def ours(model: nn.Module, images: Tensor, masks: int) -> dict[str, Callable[[], Tensor]]:
    """Every method that is defined for the model and needs no training, as a call."""
    found: dict[str, Callable[[], Tensor]] = {}
    for cls in methods().values():
        if cls.needs_fit or cls.__name__ in SLOW:
            continue
        explainer = cls(model, **few(cls, masks))
        with contextlib.suppress(AttribZooError):  # layers are found once per model, which is no part of a map's cost
            explainer.taps(images)
        found[cls.__name__] = lambda explainer=explainer: explainer.attribute(images, TARGET)
    for cls in (attrib_zoo.GradCAM, attrib_zoo.HiResCAM, attrib_zoo.GenericAttention):
        balanced = cls(model, libra=True)
        found[f"{cls.__name__}(libra=True)"] = lambda balanced=balanced: balanced.attribute(images, TARGET)
    finer, contrast = attrib_zoo.GradCAM(model), attrib_zoo.Contrast(3, target=TARGET)
    found["GradCAM, Contrast(3)"] = lambda: finer.attribute(images, contrast)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "vit_tiny_patch16_224"])
    parser.add_argument("--masks", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", help="only these, such as GradCAM ScoreCAM")
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"attrib_zoo {attrib_zoo.__version__}; {setting()}")
    for name in options.models:
        model, size = models.unloaded(name)
        torch.manual_seed(0)
        images = torch.randn(1, *size)
        batch = torch.randn(32, *size)
        calls = {(n, "ours"): call for n, call in ours(model, images, options.masks).items()}
        if not options.no_peers:
            calls |= peers(model, images) | legrad(model, images)
        rows = []
        for key, call in calls.items():
            if options.methods and key[0] not in options.methods:
                continue
            try:
                rows.append(row(key, call, model, images, batch, options.rounds))
            except Exception as error:  # a refusal of ours, or whatever a peer runs into
                print(f"   {' '.join(key)}: {type(error).__name__}: {str(error)[:100]}", flush=True)
        print(f"\n{name}\n")
        print(table(rows, HEAD))
        print()
        print(several(model, images, options.masks, options.rounds))


def plain(model: nn.Module, images: Tensor) -> Callable[[], object]:
    """A forward pass without a graph."""

    def call() -> object:
        with torch.no_grad():
            return model(images)

    return call


def row(
    key: tuple[str, str],
    call: Callable[[], Tensor],
    model: nn.Module,
    images: Tensor,
    batch: Tensor,
    rounds: int,
) -> list[object]:
    """One line of the table."""
    _, cost = measured(call, model, 1)
    own = cost.seconds
    once, batched = times([plain(model, images), plain(model, batch)], rounds)
    many = cost.forward > 40
    if own < 60 * once:  # what is longer is timed once
        own, once = times([call, plain(model, images)], rounds)
    each = f"{own / (cost.forward * batched / len(batch)):.2f}" if many else ""
    peak = peak_bytes(call) / 1e6
    line = [*key, cost.forward, cost.backward, f"{own / once:.2f}", each, f"{peak:.1f}"]
    print("  ", *line, flush=True)
    return line


def several(model: nn.Module, images: Tensor, masks: int, rounds: int) -> str:
    """Ten targets of an image in one call against one target."""
    rows = []
    for cls in (attrib_zoo.GradCAM, attrib_zoo.ScoreCAM, attrib_zoo.RISE):
        explainer = cls(model, **few(cls, masks))
        with contextlib.suppress(AttribZooError):  # layers are found once per model, which is no part of a map's cost
            explainer.taps(images)
        one, ten = times(
            [lambda e=explainer: e.attribute(images, 3), lambda e=explainer: e.attribute_many(images, list(range(10)))],
            rounds if cls is attrib_zoo.GradCAM else 1,
        )
        rows.append([cls.__name__, f"{ten / one:.2f}"])
    return table(rows, ["10 targets against 1", "ratio"])


def peers(model: nn.Module, images: Tensor) -> dict[tuple[str, str], Callable[[], Tensor]]:
    """The same methods of grad-cam and torchcam, at the same layer."""
    found: dict[tuple[str, str], Callable[[], Tensor]] = {}
    taps = attrib_zoo.GradCAM(model).taps(images)
    layer = model.get_submodule(taps[0].name)
    tokens = taps[0].grid.is_tokens
    try:
        import pytorch_grad_cam as theirs
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError:
        theirs = None

    def reshape(activation: Tensor) -> Tensor:
        cells = activation[:, taps[0].grid.prefix :].transpose(1, 2)
        return cells.reshape(*cells.shape[:2], *taps[0].grid.hw)

    for name in (
        "GradCAM",
        "GradCAMPlusPlus",
        "HiResCAM",
        "LayerCAM",
        "XGradCAM",
        "FullGrad",
        "ScoreCAM",
        "AblationCAM",
        "EigenCAM",
    ):
        if theirs is None or (tokens and name in ("FullGrad", "XGradCAM")):
            continue

        def call(name: str = name) -> Tensor:
            options = {"reshape_transform": reshape} if tokens else {}
            with getattr(theirs, name)(model, [layer], **options) as cam:
                return torch.from_numpy(cam(images, [ClassifierOutputTarget(TARGET)]))

        found[name, "grad-cam"] = call
    if theirs is not None:
        options = {"reshape_transform": reshape} if tokens else {}

        def factorise() -> Tensor:
            made = theirs.DeepFeatureFactorization(model, layer, **options)
            return torch.from_numpy(made(images, n_components=4)[1][0])

        def refine() -> Tensor:
            several = [model.get_submodule(tap.name) for tap in attrib_zoo.RefineCAM(model).taps(images)]
            return torch.from_numpy(
                theirs.RefineCAM(model, several, **options)(images, [ClassifierOutputTarget(TARGET)])
            )

        found["DeepFeatureFactorization", "grad-cam"] = factorise
        found["RefineCAM", "grad-cam"] = refine
    if not tokens:
        found |= torchcams(model, images, taps[0].name)
    return found


def torchcams(model: nn.Module, images: Tensor, layer: str) -> dict[tuple[str, str], Callable[[], Tensor]]:
    """Torchcam's methods; it knows no tokens."""
    try:
        from torchcam import methods as theirs
    except ImportError:
        return {}
    found: dict[tuple[str, str], Callable[[], Tensor]] = {}
    names = {"GradCAM": "GradCAM", "GradCAMpp": "GradCAMPlusPlus", "LayerCAM": "LayerCAM", "XGradCAM": "XGradCAM"}
    for name, ours_name in {**names, "ScoreCAM": "ScoreCAM"}.items():

        def call(name: str = name) -> Tensor:
            with getattr(theirs, name)(model, layer) as cam, torch.set_grad_enabled(name != "ScoreCAM"):
                return cam(TARGET, model(images))[0]

        found[ours_name, "torchcam"] = call

    def refine() -> Tensor:
        several = [tap.name for tap in attrib_zoo.RefineCAM(model).taps(images)]
        with theirs.RefineCAM(model, several) as cam:
            return cam(TARGET, model(images))[0]

    found["RefineCAM", "torchcam"] = refine
    return found


def legrad(model: nn.Module, images: Tensor) -> dict[tuple[str, str], Callable[[], Tensor]]:
    """Torchcam's LeGrad, which knows torchvision's transformers."""
    blocks = getattr(getattr(model, "encoder", None), "layers", None)
    try:
        from torchcam.methods import LeGrad
    except ImportError:
        return {}
    if blocks is None:
        return {}

    def call() -> Tensor:
        with LeGrad(model, list(blocks)) as cam:
            model(images)
            return cam(TARGET)[0]

    return {("LeGrad", "torchcam"): call}


if __name__ == "__main__":
    main()
