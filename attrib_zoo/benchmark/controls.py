"""Maps that explain nothing, to bracket every score: what a measure gives to them is its zero."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attrib_zoo.benchmark.measures import Explain


def chance(seed: int) -> Explain:
    """Random numbers on a 7x7 grid, enlarged: as coarse as a CAM, and knowing nothing."""

    def explain(inputs: Tensor, target: Tensor) -> Tensor:
        maps = []
        for image in inputs.detach().float().cpu():  # drawn from the image, so that its batch does not matter
            generator = torch.Generator().manual_seed(seed + zlib.crc32(image.numpy().tobytes()))
            maps.append(torch.rand(1, 7, 7, generator=generator))
        coarse = torch.stack(maps).to(inputs)
        return F.interpolate(coarse, size=inputs.shape[-2:], mode="bilinear", align_corners=False)

    return explain


def edges(_: int) -> Explain:
    """The strength of the image's edges (Sobel, over all channels): sees objects, but neither model nor class."""

    def explain(inputs: Tensor, target: Tensor) -> Tensor:
        grey = inputs.float().mean(1, keepdim=True)
        across = grey.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
        kernels = torch.stack([across, across.T])[:, None]
        return F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), kernels).norm(dim=1, keepdim=True)

    return explain


CONTROLS: dict[str, Callable[[int], Explain]] = {"random map": chance, "image edges": edges}
