"""The experiments of the SISE paper on PASCAL VOC 2007: Table 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attrib_zoo import RISE, SISE, ExtremalPerturbation, FullGrad, GradCAM, GradCAMPlusPlus, ScoreCAM, metrics
from attrib_zoo.benchmark.measures import FAMILIES, Measure
from attrib_zoo.benchmark.protocols.backbones import Backbone, check_output
from attrib_zoo.benchmark.protocols.compare import Comparison
from attrib_zoo.benchmark.protocols.datasets import VOC_CLASSES, VOCImage, VOCRegions, voc2007
from attrib_zoo.benchmark.protocols.papers import printed
from attrib_zoo.benchmark.protocols.plan import Makers, Plan, keep, measure, wanted, write
from attrib_zoo.benchmark.protocols.voc_head import give_head
from attrib_zoo.benchmark.table import Table
from attrib_zoo.errors import DataError, UnsupportedModelError
from attrib_zoo.models.photos import Photos

REGIONS = [
    Measure(
        "EBPG",  # the paper's formula: the energy as it is, without min-max
        lambda asked: asked.ask(metrics.energy_pointing_game, **asked.region(), normalize=False),
        needs="region",
    ),
    *FAMILIES["miou"],
    *FAMILIES["bbox"],
]
"""EBPG, mIoU and Bbox, for pairs of an image and a class in it."""
FAITHFULNESS = [*FAMILIES["drop"], *FAMILIES["increase"]]
"""Drop% and Increase%, for the model's top class of each image."""


def run(plan: Plan, backbone: Backbone, *, train_head: bool = False) -> Comparison:
    """Measure the methods of the paper on VOC 2007's test images, with a multi-label model.

    EBPG, mIoU and Bbox: each class present in an image, against all boxes of that class. Drop% and Increase%: the
    model's top class of each image, scores through a sigmoid, the 15 % of the pixels with the highest values kept.

    Args:
        plan: the options.
        backbone: a model with VOC's 20 classes in alphabetical order or, with ``train_head``, with any classes.
        train_head: replace the model's last layer and train it on VOC 2007 trainval.

    Returns:
        Our rows next to the printed ones; they are also in the output folder.

    Raises:
        UnsupportedModelError: a transformer.
        DataError: images are missing, the model has other classes, or the output folder belongs to another run.
        OptionError: the paper does not compare a method.
    """
    if backbone.transformer:
        raise UnsupportedModelError(
            f"backbone: the SISE paper has CNNs only (vgg16, resnet50), got {backbone.name}; SISE is not defined for "
            "transformers, whose blocks have one resolution"
        )
    images = voc2007(plan.data)[: plan.test_images]
    if not train_head:
        check_output(backbone, len(VOC_CLASSES))
    keep(plan, "sise", backbone)
    if train_head:
        give_head(
            backbone,
            voc2007(plan.data, "trainval"),
            plan.output / "head.safetensors",
            steps=plan.head_steps,
            batch_size=plan.batch_size,
            workers=plan.workers,
        )
    pairs = VOCRegions(images, backbone.whole())
    if not pairs.items:
        raise DataError(f"data: none of the {len(images)} images holds an object that is not marked difficult")
    makers = wanted(methods(plan, backbone), plan.methods)
    located = measure(makers, backbone, pairs, REGIONS, plan, "regions", score="sigmoid")
    photos = Photos([image.path for image in images], backbone.whole())
    faithful = measure(makers, backbone, photos, FAITHFULNESS, plan, "images", score="sigmoid")
    facts = [
        f"{len(images)} test images, {len(pairs.items)} pairs of an image and a class in it",
        _accuracy(faithful, images),
        "the last layer alone was trained here" if train_head else "the model is the one of --weights",
    ]
    comparison = Comparison(printed("sise", backbone.name), [located, faithful], facts)
    write(plan, comparison, located, "regions-table")
    write(plan, comparison, faithful, "images-table")
    return comparison


def _accuracy(table: Table, images: list[VOCImage]) -> str:
    decided = {row.image: row.target for row in table.records.rows.values()}
    right = sum(decided.get(i) in image.boxes for i, image in enumerate(images))
    return f"the model's top class is in the image in {100 * right / len(images):.1f} % of them"


def methods(plan: Plan, backbone: Backbone) -> Makers:
    """The columns of Table 1; where scores are confidences, through the sigmoid of a multi-label model."""
    model, cam, budget = backbone.model, backbone.cam, backbone.budget
    extremal = {key: budget[key] for key in ("max_iter", "areas", "step", "sigma", "blur") if key in budget}
    found: dict[str, Callable[[], Any]] = {
        "Grad-CAM": lambda: GradCAM(model, cam),
        "Grad-CAM++": lambda: GradCAMPlusPlus(model, cam),
        "Extremal Perturbation": lambda: ExtremalPerturbation(model, **extremal),
        "RISE": lambda: RISE(model, n_masks=budget["n_masks"], score="sigmoid", seed=plan.seed),
        "Score-CAM": lambda: ScoreCAM(model, cam, score="sigmoid"),
        "Integrated Gradient": lambda: integrated_gradients(backbone),
        "FullGrad": lambda: FullGrad(model),
        "SISE": lambda: SISE(model, score="sigmoid", grad_score="sigmoid"),
    }
    return found


def integrated_gradients(backbone: Backbone) -> Callable[[Tensor, Tensor], Tensor]:
    """Captum's integrated gradients from the mean colour, 50 steps, as ``(N, 1, H, W)``: magnitudes, summed."""
    from captum.attr import IntegratedGradients

    method = IntegratedGradients(backbone.model)
    steps = backbone.budget.get("ig_steps", 50)

    def explain(inputs: Tensor, target: Tensor) -> Tensor:
        with torch.enable_grad():
            found = method.attribute(inputs, target=target, n_steps=steps, internal_batch_size=max(16, len(inputs)))
        maps: Tensor = found.abs().sum(1, keepdim=True).detach().to(inputs.dtype)
        return maps

    return explain
