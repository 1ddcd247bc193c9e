"""What every measure does with the maps it is given: read them, bring them to the images' size, rank their pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attrib_zoo.errors import InputError, OptionError
from attrib_zoo.masking import min_max, upsample

TIES = ("threshold", "random", "stable")


def read_maps(attributions: Tensor, batch: int) -> Tensor:
    """One map per image, ``(N, 1, h, w)``, in float32 or better.

    Takes ``(N, C, h, w)``, whose channels are averaged (they are equal in the maps of this library; a signed map
    stays signed), ``(N, 1, h, w)`` and ``(N, h, w)``.
    """
    if not isinstance(attributions, Tensor) or attributions.ndim not in (3, 4) or len(attributions) != batch:
        got = tuple(attributions.shape) if isinstance(attributions, Tensor) else type(attributions).__name__
        raise InputError(
            f"attributions: must be maps (N, C, H, W), (N, 1, h, w) or (N, h, w) for N={batch} images, got {got}"
        )
    maps = attributions.detach()
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    return maps.unsqueeze(1) if maps.ndim == 3 else maps.mean(1, keepdim=True)


def scale_maps(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps ``(N, 1, h, w)`` in [0, 1] at the images' size: min-max first, upsampling second, as the papers do."""
    return upsample(min_max(maps), size)


def finite_rows(maps: Tensor) -> Tensor:
    """Which maps hold finite numbers only, ``(N,)`` bool; no measure of the others means anything."""
    return maps.isfinite().flatten(1).all(1)


def top_pixels(maps: Tensor, keep: float, ties: str, seed: int) -> Tensor:
    """The fraction ``keep`` of the pixels with the highest values, ``(N, 1, H, W)`` bool.

    Args:
        maps: ``(N, 1, H, W)``.
        keep: Fraction of the pixels, above 0 and at most 1.
        ties: ``"threshold"`` keeps all that reach the linearly interpolated quantile, so equal values stay together
            and more than ``keep`` may remain; ``"random"`` and ``"stable"`` keep exactly ``ceil(keep * H * W)``
            pixels and take equal values in a random order of each image or in raster order.
        seed: Of the random orders, one per image; image i of a batch gets the i-th.
    """
    if not 0 < keep <= 1:
        raise OptionError(f"keep: must be a fraction above 0 and at most 1 (0.15 keeps 15 % of the pixels), got {keep}")
    if ties not in TIES:
        raise OptionError(f"ties: must be one of {', '.join(TIES)}, got {ties!r}")
    values = maps.flatten(1)
    if ties == "threshold":
        limits = torch.stack([torch.quantile(row, 1 - keep) for row in values])  # row by row: its input is limited
        return (values >= limits[:, None]).view_as(maps)
    count = math.ceil(keep * values.shape[1] - 1e-9)
    order = torch.arange(values.shape[1], device=values.device).expand_as(values)
    if ties == "random":
        generator = torch.Generator().manual_seed(seed)
        order = torch.rand(values.shape, generator=generator).argsort(1).to(values.device)
    ranked = order.gather(1, values.gather(1, order).argsort(dim=1, descending=True, stable=True))
    kept = torch.zeros_like(values, dtype=torch.bool).scatter(1, ranked[:, :count], True)
    return kept.view_as(maps)
