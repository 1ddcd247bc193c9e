"""How much of a map lies where the evidence is known to be, by masks or boxes.

All take ``(model, inputs, attributions, target)`` as every measure does, though only the maps and the true region
count. An image without a true region, or whose map is not finite, gets NaN: exclude it from the mean, and report that.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrib_zoo.errors import OptionError
from attrib_zoo.masking import upsample
from attrib_zoo.metrics._maps import Seed, finite_rows, ranks, scale_maps, top_pixels
from attrib_zoo.metrics._regions import Boxes, read_case


def energy_pointing_game(
    model: nn.Module | None,
    inputs: Tensor | None,
    attributions: Tensor,
    target: Any = None,
    *,
    masks: Tensor | None = None,
    boxes: Boxes | None = None,
    normalize: bool = True,
) -> Tensor:
    """Share of each map's energy that falls on the true region: ``sum |E * G| / sum |E|``; higher is better.

    Chance is the region's share of the image; a constant map gets it with ``normalize=False``, and 0 otherwise, since
    scaled to [0, 1] it has no energy. Where the region fills the image, every map with energy gets 1. Use images with
    several objects: a map of *any* object also scores above chance.

    Args:
        model: Not used; there for a uniform signature.
        inputs: Not used, except for the size of the image that ``boxes`` refer to.
        attributions: The maps: ``(N, C, H, W)`` (channels are averaged), ``(N, 1, h, w)`` or ``(N, h, w)``; smaller
            ones are enlarged bilinearly to the size of the masks.
        target: Not used; the maps belong to it already.
        masks: The true region, ``(N, H, W)`` or ``(N, 1, H, W)``, bool or weights in 0...1.
        boxes: Instead of masks, boxes ``(x1, y1, x2, y2)`` in pixels of the inputs (of the maps, if there are no
            inputs): ``(N, 4)``, ``(N, M, 4)`` or N tensors ``(M, 4)``. What lies outside the image is cut off.
        normalize: Scale each map to [0, 1] first, so that a constant offset does not count, which makes methods
            comparable. ``False`` takes the values as they are, as in the paper that defines the measure.

    Returns:
        ``(N,)``: 0 for a map without energy, NaN where the region is empty or the map is not finite.

    References:
        Energy-based pointing game: Wang et al., Score-CAM, CVPR workshops 2020.
    """
    maps, region = read_case(inputs, attributions, masks, boxes)
    return _energy_share(maps, region, normalize).masked_fill(~_meaningful(maps, region), torch.nan)


def class_discrimination(
    model: nn.Module | None,
    inputs: Tensor | None,
    attributions: Tensor,
    target: Any = None,
    *,
    masks: Tensor | None = None,
    boxes: Boxes | None = None,
    other_masks: Tensor | None = None,
    other_boxes: Boxes | None = None,
    normalize: bool = True,
) -> Tensor:
    """Energy on the target object as a share of that on all objects: ``e / (e + o)``; higher is better.

    ``e`` and ``o`` are the :func:`energy_pointing_game` of the target object and of all other objects in the image. A
    map that detects objects but not classes has 0.5 on average (over images where each object is the target once).

    Args:
        model: Not used.
        inputs: As in :func:`energy_pointing_game`, like ``attributions``, ``target`` and ``normalize``.
        attributions: The maps of the target object's class.
        target: Not used.
        masks: The target object.
        boxes: Instead of masks.
        other_masks: All other objects, in the form of ``masks``.
        other_boxes: Instead of other masks.
        normalize: Scale each map to [0, 1] first.

    Returns:
        ``(N,)``: 0.5 for a map without energy on either, NaN where either region is empty or the map is not finite.
    """
    maps, region = read_case(inputs, attributions, masks, boxes)
    _, rest = read_case(inputs, attributions, other_masks, other_boxes, "other_masks")
    asked, other = _energy_share(maps, region, normalize), _energy_share(maps, rest, normalize)
    both = asked + other
    share = torch.where(both > 0, asked / torch.where(both > 0, both, 1.0), 0.5)
    return share.masked_fill(~(_meaningful(maps, region) & _meaningful(maps, rest)), torch.nan)


def miou(
    model: nn.Module | None,
    inputs: Tensor | None,
    attributions: Tensor,
    target: Any = None,
    *,
    masks: Tensor | None = None,
    boxes: Boxes | None = None,
    keep: float = 0.2,
    ties: str = "random",
    seed: Seed = 0,
) -> Tensor:
    """Intersection over union of the map's highest pixels ``S`` and the true region: ``|S & G| / |S | G|``.

    The SISE paper takes the top 20 % and prints 100 times the mean; higher is better.

    Args:
        model: Not used.
        inputs: As in :func:`energy_pointing_game`, like ``attributions``, ``target`` and ``boxes``.
        attributions: The maps.
        target: Not used.
        masks: The true region; weights count from 0.5 up.
        boxes: Instead of masks.
        keep: Fraction of the pixels in ``S``, above 0 and at most 1.
        ties: What happens to equal values at the threshold: ``"random"`` and ``"stable"`` take exactly the fraction, in
            a random order per image or in raster order; ``"threshold"`` takes them all.
        seed: For the random orders: one int per image, or an int, to which image i adds i.

    Returns:
        ``(N,)``; NaN where the region is empty or the map is not finite.
    """
    maps, region = read_case(inputs, attributions, masks, boxes)
    inside = region >= 0.5 if region.is_floating_point() else region.bool()
    chosen = top_pixels(upsample(maps.nan_to_num(), inside.shape[-2:]), keep, ties, seed)
    share = _count(chosen & inside, maps) / _count(chosen | inside, maps)
    return share.masked_fill(~_meaningful(maps, inside), torch.nan)


def bbox_score(
    model: nn.Module | None,
    inputs: Tensor | None,
    attributions: Tensor,
    target: Any = None,
    *,
    masks: Tensor | None = None,
    boxes: Boxes | None = None,
    ties: str = "random",
    seed: Seed = 0,
) -> Tensor:
    """Share of the map's N highest pixels that lie in the true region of N pixels; higher is better.

    Schulz et al.'s measure for boxes, applied to masks in the SISE paper; chance is the region's share of the image.

    Args:
        model: Not used.
        inputs: As in :func:`miou`, as all that follows.
        attributions: The maps.
        target: Not used.
        masks: The true region; weights count from 0.5 up.
        boxes: Instead of masks.
        ties: As in :func:`miou`; with ``"threshold"`` the share is that of all pixels taken.
        seed: For the random orders.

    Returns:
        ``(N,)``; NaN where the region is empty or the map is not finite.
    """
    maps, region = read_case(inputs, attributions, masks, boxes)
    inside = region >= 0.5 if region.is_floating_point() else region.bool()
    order = ranks(upsample(maps.nan_to_num(), inside.shape[-2:]), ties, seed)
    chosen = order < inside.sum((1, 2, 3), keepdim=True)
    share = _count(chosen & inside, maps) / _count(chosen, maps).clamp(min=1)
    return share.masked_fill(~_meaningful(maps, inside), torch.nan)


def pointing_game(
    model: nn.Module | None,
    inputs: Tensor | None,
    attributions: Tensor,
    target: Any = None,
    *,
    masks: Tensor | None = None,
    boxes: Boxes | None = None,
    tolerance: float = 15.0,
    ties: str = "random",
    seed: Seed = 0,
) -> Tensor:
    """Whether the highest point of the map lies on the true region or near it: 1 or 0; higher is better.

    The usual protocol averages over the images of each class first and then over the classes, and takes each class in
    an image as target once.

    Args:
        model: Not used.
        inputs: As in :func:`miou`, as all that follows.
        attributions: The maps.
        target: Not used.
        masks: The true region; weights count from 0.5 up.
        boxes: Instead of masks.
        tolerance: Distance in pixels that still counts as a hit: usually 15, which is large for images below 224 px; 0
            for a strict game.
        ties: Which of several highest pixels counts: ``"random"`` and ``"stable"`` take one, drawn or the first;
            ``"threshold"`` takes all, and the value is the share of them that hit.
        seed: For the draws: one int per image, or an int, to which image i adds i.

    Returns:
        ``(N,)``; NaN where the region is empty or the map is not finite.

    References:
        Zhang et al., Top-down neural attention by excitation backprop, IJCV 2018.
    """
    if not tolerance >= 0:
        raise OptionError(f"tolerance: must be a distance of 0 or more pixels, got {tolerance}")
    maps, region = read_case(inputs, attributions, masks, boxes)
    inside = region >= 0.5 if region.is_floating_point() else region.bool()
    peak = ranks(upsample(maps.nan_to_num(), inside.shape[-2:]), ties, seed) == 0
    share = _count(peak & _widen(inside, tolerance), maps) / _count(peak, maps)
    return share.masked_fill(~_meaningful(maps, inside), torch.nan)


def _energy_share(maps: Tensor, region: Tensor, normalize: bool) -> Tensor:
    size = region.shape[-2:]
    energy = (scale_maps(maps, size) if normalize else upsample(maps, size)).abs()
    inside = (energy * region.to(energy)).flatten(1).sum(1)
    total = energy.flatten(1).sum(1)
    return inside / torch.where(total > 0, total, torch.ones_like(total))


def _meaningful(maps: Tensor, region: Tensor) -> Tensor:
    """Images with a region and a finite map, ``(N,)`` bool."""
    return finite_rows(maps) & (region.flatten(1) > 0).any(1)


def _count(pixels: Tensor, like: Tensor) -> Tensor:
    return pixels.flatten(1).sum(1).to(like.dtype)


def _widen(region: Tensor, reach: float) -> Tensor:
    """All pixels at most ``reach`` away from the region, centre to centre."""
    radius = min(int(reach), max(region.shape[-2:]))
    if radius == 0:
        return region
    steps = torch.arange(-radius, radius + 1, device=region.device)
    disc = (steps[:, None] ** 2 + steps[None] ** 2 <= reach**2).float()
    return F.conv2d(region.float(), disc[None, None], padding=radius) > 0.5
