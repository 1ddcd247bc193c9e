"""How much of a map lies where the evidence is known to be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo.errors import InputError
from attrib_zoo.masking import upsample
from attrib_zoo.metrics._maps import finite_rows, read_maps, scale_maps


def energy_pointing_game(
    model: nn.Module | None,
    inputs: Tensor | None,
    attributions: Tensor,
    target: Any = None,
    *,
    masks: Tensor,
    normalize: bool = True,
) -> Tensor:
    """Share of each map's energy that falls on the true region: ``sum |E * G| / sum |E|``; higher is better.

    Chance is the region's share of the image, and so is the value of a map without structure. Compare it on images
    with several objects: a map of *any* object also scores above chance.

    Args:
        model: Not used; there so that all measures are called alike.
        inputs: Not used.
        attributions: The maps: ``(N, C, H, W)`` (channels are averaged), ``(N, 1, h, w)`` or ``(N, h, w)``; smaller
            ones are enlarged bilinearly to the size of the masks.
        target: Not used; the maps are of it already.
        masks: The true region, ``(N, H, W)`` or ``(N, 1, H, W)``, bool or weights in 0...1.
        normalize: Scale each map to [0, 1] first, so that a constant under it does not count, which makes methods
            comparable. ``False`` takes the values as they are, as the paper that defines the measure does.

    Returns:
        ``(N,)``: 0 for a map without energy, NaN where the region is empty or the map is not finite.

    References:
        Energy-based pointing game: Wang et al., Score-CAM, CVPR workshops 2020.
    """
    batch = len(attributions) if isinstance(attributions, Tensor) else 0
    region = masks.unsqueeze(1) if masks.ndim == 3 else masks
    if region.ndim != 4 or region.shape[:2] != (batch, 1):
        raise InputError(f"masks: must be (N, H, W) or (N, 1, H, W) for N={batch} maps, got {tuple(masks.shape)}")
    maps = read_maps(attributions, batch)
    size = region.shape[-2:]
    energy = (scale_maps(maps, size) if normalize else upsample(maps, size)).abs()
    inside = (energy * region.to(energy)).flatten(1).sum(1)
    total = energy.flatten(1).sum(1)
    share = inside / torch.where(total > 0, total, torch.ones_like(total))
    meaningful = finite_rows(maps) & (region.flatten(1) > 0).any(1).to(maps.device)
    return share.masked_fill(~meaningful, torch.nan)
