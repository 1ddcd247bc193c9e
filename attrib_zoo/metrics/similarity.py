"""How similar two maps of the same image are: by rank, by structure, by the directions of their edges.

All take two batches of maps ``(N, C, h, w)`` (channels are averaged), ``(N, 1, h, w)`` or ``(N, h, w)`` of one size,
and return ``(N,)``: 1 for equal maps, constant ones included; about 0 for unrelated ones, and exactly 0 in the two
correlations if one map is constant and the other is not; NaN where a map is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from attrib_zoo.errors import InputError
from attrib_zoo.masking import mean_ranks, min_max
from attrib_zoo.metrics._maps import finite_rows, read_maps

Similarity = Callable[[Tensor, Tensor], Tensor]


def spearman(maps: Tensor, others: Tensor, *, absolute: bool = False) -> Tensor:
    """Rank correlation: Pearson's of the ranks, with mean ranks for ties; from -1 to 1.

    Args:
        maps: The maps.
        others: The maps to compare them with.
        absolute: Rank magnitudes, which ignores the sign of the evidence.
    """
    one, two = _read(maps, others)
    if absolute:
        one, two = one.abs(), two.abs()
    found = _pearson(mean_ranks(one.flatten(1)), mean_ranks(two.flatten(1)))
    return _judged(found, one, two)


def spearman_absolute(maps: Tensor, others: Tensor) -> Tensor:
    """:func:`spearman` of the magnitudes."""
    return spearman(maps, others, absolute=True)


def ssim(maps: Tensor, others: Tensor) -> Tensor:
    """Mean structural similarity of the maps scaled to [0, 1]: 7x7 windows, unbiased variances; from -1 to 1.

    For each window, with ``c1 = 0.01^2`` and ``c2 = 0.03^2``:
    ``(2 ma mb + c1) (2 cov + c2) / ((ma^2 + mb^2 + c1) (va + vb + c2))``. Windows lie completely inside; on smaller
    maps they have the largest odd size that fits.

    References:
        Wang et al., Image quality assessment: from error visibility to structural similarity, 2004.
    """
    one, two = _read(maps, others)
    a, b = min_max(one), min_max(two)
    side = min(7, *a.shape[-2:])
    side -= 1 - side % 2

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, side, 1)

    unbiased = side**2 / max(side**2 - 1, 1)
    ma, mb = mean(a), mean(b)
    va, vb = (mean(a * a) - ma**2) * unbiased, (mean(b * b) - mb**2) * unbiased
    both = (mean(a * b) - ma * mb) * unbiased
    c1, c2 = 0.01**2, 0.03**2
    found = (2 * ma * mb + c1) * (2 * both + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return _judged(found.flatten(1).mean(1), one, two)


def hog_similarity(maps: Tensor, others: Tensor, *, cell: int = 8, bins: int = 9) -> Tensor:
    """Pearson correlation of histograms of oriented gradients; from -1 to 1.

    Central differences; in each cell the gradients' magnitudes are summed over ``bins`` equal ranges of direction
    (opposite directions are one), and the histogram is divided by its L2 norm.

    Args:
        maps: The maps.
        others: The maps to compare them with.
        cell: Side of a cell in pixels; a remainder at the right and lower border is left out. A smaller map is one
            cell.
        bins: Ranges of direction over half a turn.

    References:
        Dalal and Triggs, Histograms of oriented gradients for human detection, CVPR 2005.
    """
    one, two = _read(maps, others)
    return _judged(_pearson(*(_histograms(part, cell, bins) for part in (one, two))), one, two)


SIMILARITIES: Mapping[str, Similarity] = {
    "spearman": spearman,
    "spearman_absolute": spearman_absolute,
    "ssim": ssim,
    "hog": hog_similarity,
}
"""All of them by name."""


def _read(maps: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    batch = len(maps) if isinstance(maps, Tensor) and maps.ndim else 0
    one, two = read_maps(maps, batch), read_maps(others, batch)
    if one.shape != two.shape:
        raise InputError(
            f"maps: two maps must have one size to be compared, got {tuple(one.shape[-2:])} and "
            f"{tuple(two.shape[-2:])}; enlarge the smaller one"
        )
    dtype = torch.promote_types(one.dtype, two.dtype)
    return one.to(dtype), two.to(one.device, dtype)


def _judged(found: Tensor, one: Tensor, two: Tensor) -> Tensor:
    """1 for equal maps, NaN for those that are not finite, else the given value."""
    found = found.masked_fill((one == two).flatten(1).all(1), 1.0)
    return found.masked_fill(~(finite_rows(one) & finite_rows(two)), torch.nan)


def _pearson(one: Tensor, two: Tensor) -> Tensor:
    a, b = one - one.mean(1, keepdim=True), two - two.mean(1, keepdim=True)
    norms = a.norm(dim=1) * b.norm(dim=1)
    return (a * b).sum(1) / torch.where(norms > 0, norms, 1.0)


def _histograms(maps: Tensor, cell: int, bins: int) -> Tensor:
    """``(N, cells * bins)``."""
    down, across = torch.zeros_like(maps), torch.zeros_like(maps)
    down[..., 1:-1, :] = maps[..., 2:, :] - maps[..., :-2, :]
    across[..., 1:-1] = maps[..., 2:] - maps[..., :-2]
    direction = torch.atan2(down, across).remainder(math.pi) * (bins / math.pi)
    place = direction.floor().long().clamp(0, bins - 1)
    size = tuple(min(cell, side) for side in maps.shape[-2:])
    spread = torch.zeros_like(maps).repeat(1, bins, 1, 1).scatter_(1, place, torch.hypot(down, across))
    counts = F.avg_pool2d(spread, size)
    norm = counts.norm(dim=1, keepdim=True)
    return (counts / torch.where(norm > 0, norm, 1.0)).flatten(1)
