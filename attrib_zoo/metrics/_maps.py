"""What every measure does with its maps: read them, resize them to the images, rank their pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attrib_zoo.errors import InputError, OptionError
from attrib_zoo.masking import at_least_float32, min_max, upsample

TIES = ("threshold", "random", "stable")

Seed = int | Sequence[int] | Tensor
"""Of random orders and noise: one int per image, or an int, to which image i of the batch adds i."""

_OTHER = 0x2545F491  # within the low 32 bits, all that a generator reads of its seed


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
    maps = at_least_float32(maps)
    return maps.unsqueeze(1) if maps.ndim == 3 else maps.mean(1, keepdim=True)


def scale_maps(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps ``(N, 1, h, w)`` in [0, 1] at the images' size: min-max first, upsampling second, as the papers do.

    The only place where measures scale. Upsampling removes a map's extremes, so a second scaling afterwards would give
    other values: pass maps at the layer's resolution (``upsample=False``).
    """
    return upsample(min_max(maps), size)


def finite_rows(maps: Tensor) -> Tensor:
    """Which maps hold finite numbers only, ``(N,)`` bool; for the others every measure is meaningless."""
    return maps.isfinite().flatten(1).all(1)


def check_ties(ties: str) -> None:
    """Raise for a rule that does not exist."""
    if ties not in TIES:
        raise OptionError(f"ties: must be one of {', '.join(TIES)}, got {ties!r}")


def seeds_of(seed: Seed, batch: int) -> list[int]:
    """One seed per image: the given ones, or ``seed``, ``seed + 1``, ..."""
    if isinstance(seed, int) and not isinstance(seed, bool):
        return [seed + row for row in range(batch)]
    found = [int(value) for value in seed] if isinstance(seed, (list, tuple, range, Tensor)) else []
    if len(found) != batch:
        raise OptionError(f"seed: must be an int, or one int for each of the {batch} images, got {seed!r}")
    return found


def uniform(seed: Seed, shape: Sequence[int]) -> Tensor:
    """Uniform random numbers ``(N, ...)`` on the CPU, each image from its own seed."""
    makers = [torch.Generator().manual_seed(value) for value in seeds_of(seed, shape[0])]
    return torch.stack([torch.rand(*shape[1:], generator=maker) for maker in makers])


def normal(seed: Seed, shape: Sequence[int]) -> Tensor:
    """Standard normal random numbers ``(N, ...)`` on the CPU, each image from its own seed.

    They are independent of :func:`uniform` of the same seed: the noise must not correlate with the order of ties.
    """
    makers = [torch.Generator().manual_seed(value ^ _OTHER) for value in seeds_of(seed, shape[0])]
    return torch.stack([torch.randn(*shape[1:], generator=maker) for maker in makers])


def ranks(maps: Tensor, ties: str, seed: Seed) -> Tensor:
    """How many pixels come before each pixel, from the highest value down: ``(N, 1, H, W)`` int64.

    Args:
        maps: ``(N, 1, H, W)``.
        ties: ``"random"`` and ``"stable"`` give each pixel a rank of its own and break ties in a random order per image
            or in raster order, the first pixel first; ``"threshold"`` gives ties the rank of their first, so that they
            stay together.
        seed: For the random orders: one int per image, or an int, to which image i adds i.
    """
    check_ties(ties)
    values = maps.flatten(1)
    if ties == "threshold":
        ascending = values.sort(1).values
        reached = torch.searchsorted(ascending, values.contiguous(), right=True)
        return (values.shape[1] - reached).view_as(maps)
    order = torch.arange(values.shape[1], device=values.device).expand_as(values)
    if ties == "random":
        order = uniform(seed, values.shape).argsort(1).to(values.device)
    ranked = order.gather(1, values.gather(1, order).argsort(dim=1, descending=True, stable=True))
    places = torch.arange(values.shape[1], device=values.device).expand_as(values)
    return torch.empty_like(ranked).scatter_(1, ranked, places).view_as(maps)


def top_pixels(maps: Tensor, keep: float, ties: str, seed: Seed) -> Tensor:
    """The fraction ``keep`` of the pixels with the highest values, ``(N, 1, H, W)`` bool.

    Args:
        maps: ``(N, 1, H, W)``.
        keep: Fraction of the pixels, above 0 and at most 1.
        ties: ``"threshold"`` keeps all pixels that reach the linearly interpolated quantile, so ties stay together and
            more than ``keep`` may remain; ``"random"`` and ``"stable"`` keep exactly ``ceil(keep * H * W)`` pixels, see
            :func:`ranks`.
        seed: For the random orders, see :func:`ranks`.
    """
    if not 0 < keep <= 1:
        raise OptionError(f"keep: must be a fraction above 0 and at most 1 (0.15 keeps 15 % of the pixels), got {keep}")
    check_ties(ties)
    values = maps.flatten(1)
    if ties == "threshold":
        limits = torch.stack([torch.quantile(row, 1 - keep) for row in values])  # row by row: its input size is limited
        return (values >= limits[:, None]).view_as(maps)
    return ranks(maps, ties, seed) < math.ceil(keep * values.shape[1] - 1e-9)
