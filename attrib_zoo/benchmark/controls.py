"""Maps that explain nothing, and the one that knows the truth, to bracket every score."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attrib_zoo.benchmark.measures import NEEDS, Explain, Measure
from attrib_zoo.methods.bases.trainable import TrainableAttribution
from attrib_zoo.metrics import box_masks


def chance(seed: int) -> Explain:
    """Random numbers on a 7x7 grid: as coarse as a CAM, and blind."""

    def explain(inputs: Tensor, target: Tensor) -> Tensor:
        maps = []
        for image in inputs.detach().float().cpu():  # seeded by the image, so that its batch does not matter
            generator = torch.Generator().manual_seed(seed + zlib.crc32(image.numpy().tobytes()))
            maps.append(torch.rand(1, 7, 7, generator=generator))
        return torch.stack(maps).to(inputs)

    return explain


def edges(_: int) -> Explain:
    """The strength of the image's edges (Sobel, over all channels): sees objects, but neither model nor class."""

    def explain(inputs: Tensor, target: Tensor) -> Tensor:
        grey = inputs.float().mean(1, keepdim=True)
        across = grey.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
        kernels = torch.stack([across, across.T])[:, None]
        slopes = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), kernels)
        return slopes.square().sum(1, keepdim=True).sqrt()

    return explain


def blob(_: int) -> Explain:
    """A Gaussian in the middle of the image, a quarter of its sides wide: where photographers put things."""

    def explain(inputs: Tensor, target: Tensor) -> Tensor:
        down, across = (
            (-0.5 * ((torch.arange(side, device=inputs.device) + 0.5) / side - 0.5).div(0.25).square()).exp()
            for side in inputs.shape[-2:]
        )
        return (down[:, None] * across).expand(len(inputs), 1, -1, -1).contiguous()

    return explain


def constant(inputs: Tensor, target: Tensor) -> Tensor:
    """The constant map, whose value is what a measure gives by chance; see ``Measure.chance``."""
    return inputs.new_ones(len(inputs), 1, *inputs.shape[-2:])


def perfect(truth: Mapping[str, Any]) -> Explain:
    """The true region itself; repeated where each image is."""

    def explain(inputs: Tensor, target: Tensor) -> Tensor:
        told = truth.get("masks")
        region = box_masks(truth["boxes"], inputs.shape[-2:]) if told is None else told
        maps = (region.unsqueeze(1) if region.ndim == 3 else region).to(inputs, copy=True)
        maps[maps.flatten(1).amin(1) > 0, :, 0, 0] = 0  # a map of ones, scaled to [0, 1], would be one of zeros
        return maps.repeat_interleave(max(1, len(inputs) // len(maps)), 0)[: len(inputs)]

    return explain


def untrained(methods: Mapping[str, Any], seed: int) -> dict[str, Explain]:
    """An untrained twin of each trained explainer."""
    trained = {name: method for name, method in methods.items() if isinstance(method, TrainableAttribution)}
    twins = {name + UNTRAINED: method.untrained(seed) for name, method in trained.items()}
    for twin in twins.values():
        twin.upsample = False  # as the trained ones are measured
    return {name: twin.attribute for name, twin in twins.items()}


CONTROLS: dict[str, Callable[[int], Explain]] = {"random map": chance, "image edges": edges, "centre blob": blob}
"""Those that look at the image at most; name -> seed -> function."""

UNTRAINED = ", untrained"
"""Behind the name of an explainer: its twin that nobody has trained, which still reads the model."""

PERFECT = "perfect map"
"""The row of the true region itself, which no method can beat where regions are measured."""

CHANCE = "chance"
"""The row of what a map that knows nothing gets on average, by measures that can tell it: see ``Measure.chance``."""


def beside(
    methods: Mapping[str, Any], measures: Sequence[Measure], truth: Iterable[str], seed: int
) -> dict[str, Explain | None]:
    """The controls listed next to the methods; ``None``: :func:`perfect`, made anew from each batch's truth."""
    found: dict[str, Explain | None] = {**untrained(methods, seed)}
    found |= {name: make(seed) for name, make in CONTROLS.items()}
    if any(key in NEEDS["region"] for key in truth):
        found[PERFECT] = None
    if any(measure.chance for measure in measures):
        found[CHANCE] = constant
    return {name: control for name, control in found.items() if name not in methods}
