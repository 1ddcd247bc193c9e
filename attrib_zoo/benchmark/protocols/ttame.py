"""The experiments of the T-TAME paper: Tables 2 and 4 (CNNs), 3 and 5 (ViT), and 6 (ablations)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from attrib_zoo import (
    IIA,
    RISE,
    TTAME,
    AblationCAM,
    GradCAM,
    GradCAMPlusPlus,
    LCAMImg,
    ScoreCAM,
    TransformerLRP,
)
from attrib_zoo.benchmark.protocols import lcam
from attrib_zoo.benchmark.protocols.backbones import Backbone
from attrib_zoo.benchmark.protocols.compare import Comparison
from attrib_zoo.benchmark.protocols.papers import VARIANTS
from attrib_zoo.benchmark.protocols.plan import Makers, Plan, imagenet_run, train

EPOCHS = 8
"""The most that the paper tries, and what the released code takes."""
BATCH = 32
"""Of the released code."""

_OPTIONS: dict[str, dict[str, Any]] = dict(
    zip(
        VARIANTS,
        (
            {},
            {"skip": False},
            {"skip": False, "batch_norm": False},
            {"branch_activation": "sigmoid"},
            {"num_layers": 2},
            {"num_layers": 1},
        ),
        strict=True,
    )
)


def run(plan: Plan, backbone: Backbone) -> Comparison:
    """Train T-TAME and L-CAM-Img, and measure AD, IC and ROAD of all methods of the paper on random images.

    The learning rate, the number of epochs and the weights of the loss are those that the paper found on its
    validation images; ours are used to monitor the training, after each epoch, and for nothing else.

    Args:
        plan: the options.
        backbone: what is explained.

    Returns:
        Our rows next to the printed ones; they are also in the output folder.

    Raises:
        DataError: images are missing, or the output folder belongs to another run.
        OptionError: the paper does not compare a method.
    """
    return imagenet_run("ttame", plan, backbone, lambda validation: methods(plan, backbone, validation), "ad,ic,road")


def methods(plan: Plan, backbone: Backbone, validation: Sequence[Path]) -> Makers:
    """The columns of the paper's tables.

    Grad-CAM, Grad-CAM++, Score-CAM and Ablation-CAM are computed as in pytorch-grad-cam, which the paper names.
    """
    model, cam = backbone.model, backbone.cam
    found: dict[str, Callable[[], Any]] = {
        "Grad-CAM": lambda: GradCAM(model, cam),
        "Grad-CAM++": lambda: GradCAMPlusPlus(model, cam, alpha="local"),
        "Score-CAM": lambda: ScoreCAM(model, cam, variant="pytorch-grad-cam"),
        "Ablation-CAM": lambda: AblationCAM(model, cam),
        "RISE": lambda: RISE(model, n_masks=backbone.budget["n_masks"], seed=plan.seed),
    }
    if backbone.transformer:
        found["Transformer LRP"] = lambda: TransformerLRP(model)
        found["IIA"] = lambda: IIA(model)
    else:
        found["IIA"] = lambda: IIA(model, cam)
        found["L-CAM-Img"] = partial(
            lcam.trained, LCAMImg, "L-CAM-Img", plan, backbone, validation, pooled=backbone.pooled is not None
        )
    for name in VARIANTS if plan.ablations else VARIANTS[:1]:
        found[name] = partial(_trained, name, plan, backbone, validation)
    return found


def _trained(name: str, plan: Plan, backbone: Backbone, validation: Sequence[Path]) -> Any:
    """T-TAME or one of its variants; the released code reads other layers of transformers, its own default."""
    options = dict(_OPTIONS[name])
    own = backbone.attention is None or (backbone.transformer and plan.recipe == "released")
    layers = None if own or backbone.attention is None else list(backbone.attention)[-options.pop("num_layers", 3) :]
    explainer = TTAME(backbone.model, layers, recipe=plan.recipe, mean=backbone.mean, std=backbone.std, **options)
    return train(explainer, name, plan, backbone, validation, epochs=EPOCHS, batch_size=BATCH)
