"""The experiments of the L-CAM paper: Table 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from attrib_zoo import RISE, GradCAM, GradCAMPlusPlus, LCAMFm, LCAMImg, ScoreCAM
from attrib_zoo.benchmark.protocols.backbones import Backbone
from attrib_zoo.benchmark.protocols.compare import Comparison
from attrib_zoo.benchmark.protocols.plan import Makers, Plan, imagenet_run, train
from attrib_zoo.errors import UnsupportedModelError
from attrib_zoo.training.schedule import Schedule

BATCH = 64
"""Images per training step."""
EPOCHS = {"paper": {"vgg16": 7, "resnet50": 25}, "released": {"vgg16": 8, "resnet50": 26}}
"""Recipe -> backbone -> passes over the training images."""
_DECAY: dict[str, Any] = {"weight_decay": 5e-4, "decay_biases": True, "factor": 0.75}
VGG = {
    "paper": Schedule("paper", "sgd", 1e-4, epochs=7, drops=7, **_DECAY),
    "released": Schedule("released", "sgd", 1e-2, epochs=8, drops=8, bias_scale=2.0, **_DECAY),
}
"""The learning rate on VGG-16; that of ResNet-50 is the explainers' own."""


def run(plan: Plan, backbone: Backbone) -> Comparison:
    """Train the L-CAM explainers, and measure AD and IC of all methods of the paper on random images.

    Args:
        plan: the options.
        backbone: what is explained.

    Returns:
        Our rows next to the printed ones; they are also in the output folder.

    Raises:
        UnsupportedModelError: a transformer.
        DataError: images are missing, or the output folder belongs to another run.
        OptionError: the paper does not compare a method.
    """
    if backbone.transformer:
        raise UnsupportedModelError(
            f"backbone: the L-CAM paper has CNNs only (vgg16, resnet50), got {backbone.name}; reproduce ttame has a "
            "vision transformer"
        )
    return imagenet_run("lcam", plan, backbone, lambda validation: methods(plan, backbone, validation), "ad,ic")


def methods(plan: Plan, backbone: Backbone, validation: Sequence[Path]) -> Makers:
    """The rows of Table 1; ``*`` is trained on the cross-entropy alone, ``†`` reads the last max-pooling."""
    model, cam = backbone.model, backbone.cam
    found: dict[str, Callable[[], Any]] = {
        "Grad-CAM": lambda: GradCAM(model, cam),
        "Grad-CAM++": lambda: GradCAMPlusPlus(model, cam, alpha="local"),
        "Score-CAM": lambda: ScoreCAM(model, cam),
        "RISE": lambda: RISE(model, n_masks=backbone.budget["n_masks"], seed=plan.seed),
    }
    for name, cls, star in (
        ("L-CAM-Fm*", LCAMFm, True),
        ("L-CAM-Fm", LCAMFm, False),
        ("L-CAM-Img*", LCAMImg, True),
        ("L-CAM-Img", LCAMImg, False),
    ):
        found[name] = partial(trained, cls, name, plan, backbone, validation, ce_only=star)
    if backbone.pooled is not None:
        found["L-CAM-Img†"] = partial(trained, LCAMImg, "L-CAM-Img†", plan, backbone, validation, pooled=True)
    return found


def trained(
    cls: type[LCAMFm] | type[LCAMImg],
    name: str,
    plan: Plan,
    backbone: Backbone,
    validation: Sequence[Path],
    *,
    ce_only: bool = False,
    pooled: bool = False,
) -> Any:
    """An L-CAM explainer, trained as the paper says."""
    options: dict[str, Any] = {"recipe": plan.recipe, "start": "random", "ce_only": ce_only}
    if cls is LCAMImg:
        options |= {"mean": backbone.mean, "std": backbone.std}
    explainer = cls(backbone.model, backbone.pooled if pooled else backbone.lcam, **options)
    epochs = EPOCHS[plan.recipe].get(backbone.name, cls.default_epochs)
    schedule = VGG[plan.recipe] if backbone.name == "vgg16" else None
    return train(explainer, name, plan, backbone, validation, epochs=epochs, batch_size=BATCH, schedule=schedule)
