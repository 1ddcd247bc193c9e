"""Noisy linear imputation: what ROAD fills removed pixels with, so that the hole itself reveals nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attrib_zoo.errors import InputError, OptionError, warn
from attrib_zoo.masking import at_least_float32
from attrib_zoo.metrics._poisson import solve, totals

_MOST = 100


def linear_imputation(images: Tensor, removed: Tensor, *, tolerance: float = 1e-4) -> Tensor:
    """Replace removed pixels by the weighted means of their neighbours, each of which may be removed too.

    For each removed pixel i, over its neighbours j inside the image, ``sum_j w_ij (x_i - x_j) = 0`` with ``w`` 1/6
    for the four nearest and 1/12 for the diagonal ones: ROAD's system of equations, without its noise. The whole
    batch is solved at once on the tensors' device (image by image on a CPU, where that is faster).

    Args:
        images: ``(N, C, H, W)``, floating point. Half precision is computed in float32.
        removed: ``(N, H, W)`` or ``(N, 1, H, W)`` bool.
        tolerance: Largest error of a pixel, as a share of the image's standard deviation (estimated; the iteration's
            stopping rule).

    Returns:
        ``(N, C, H, W)`` in the dtype of the images, whose kept pixels are bitwise unchanged. A completely removed image
        becomes the mean of each channel.

    Raises:
        InputError: The mask does not belong to the images.
        OptionError: The tolerance is not above 0.

    References:
        Rong et al., A consistent and efficient evaluation strategy for attribution methods, ICML 2022.

    Example:
        >>> ramp = torch.arange(5.0).expand(1, 1, 5, 5)
        >>> hole = torch.zeros(1, 5, 5, dtype=torch.bool)
        >>> hole[0, 1:4, 1:4] = True
        >>> torch.allclose(linear_imputation(ramp * ~hole, hole), ramp, atol=1e-3)
        True
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"images: must be floating-point images (N, C, H, W), got {got}")
    mask = removed.unsqueeze(1) if removed.ndim == 3 else removed
    if mask.dtype != torch.bool or mask.shape != (len(images), 1, *images.shape[-2:]):
        raise InputError(
            f"removed: must be bool, (N, H, W) or (N, 1, H, W) for images {tuple(images.shape)}, "
            f"got {removed.dtype} {tuple(removed.shape)}"
        )
    if not tolerance > 0:
        raise OptionError(f"tolerance: must be above 0, got {tolerance}")
    work = at_least_float32(images.detach())
    mask = mask.to(work.device)
    rounding = 16 * torch.finfo(work.dtype).eps * work.abs().flatten(1).amax(1)  # the only scale in a flat image
    limit = torch.maximum(tolerance * work.flatten(1).std(1, correction=0), rounding).view(-1, 1, 1, 1)
    average = work.mean((2, 3), keepdim=True)
    nothing_kept = mask.flatten(1).all(1).view(-1, 1, 1, 1)
    free = (mask & ~nothing_kept).to(work.dtype)
    filled = _fill_apart(work, free, limit) if work.device.type == "cpu" else _fill(work, free, limit)
    filled = torch.where(nothing_kept, average, filled)
    return torch.where(mask, filled.to(images.dtype), images.detach())


def _fill_apart(images: Tensor, free: Tensor, limit: Tensor) -> Tensor:
    """One image after the other, and only the part with holes: this stays in the CPU's cache."""
    out = images.clone()
    total = totals(images.shape[-2:], images)
    for row in range(len(images)):
        one = slice(row, row + 1)
        down, across = (_span(free[row, 0].any(axis)) for axis in (1, 0))
        if down.stop:
            start = _guess(images[one], free[one])[..., down, across]
            hole = free[one, :, down, across].contiguous()
            out[one, :, down, across] = _solve(start, hole, total[down, across], limit[one])
    return out


def _span(there: Tensor) -> slice:
    """From one before the first to one after the last; ``slice(0, 0)`` if there are none."""
    places = there.nonzero()
    return slice(max(0, int(places[0]) - 1), int(places[-1]) + 2) if len(places) else slice(0, 0)


def _fill(images: Tensor, free: Tensor, limit: Tensor) -> Tensor:
    return _solve(_guess(images, free), free, totals(images.shape[-2:], images), limit)


def _solve(guess: Tensor, free: Tensor, total: Tensor, limit: Tensor) -> Tensor:
    found, done = solve(guess, free, total, limit, _MOST)
    if done >= _MOST:
        warn(
            f"imputation: not converged after {_MOST} iterations; raise the tolerance, or pass float64 images",
            RuntimeWarning,
        )
    return found


def _guess(images: Tensor, free: Tensor) -> Tensor:
    """Holes filled from means over larger and larger blocks, interpolated: close to the solution, in a few passes."""
    known = 1 - free
    values = torch.where(known > 0, images, 0.0)
    finer: list[tuple[Tensor, Tensor]] = []
    while max(known.shape[-2:]) > 1:
        finer.append((values, known))
        size = (known.shape[-2] + 1) // 2, (known.shape[-1] + 1) // 2
        values, known = F.adaptive_avg_pool2d(values, size), F.adaptive_avg_pool2d(known, size)
    filled = values / torch.where(known > 0, known, 1.0)
    for values, known in reversed(finer):
        wide = F.interpolate(filled, size=known.shape[-2:], mode="bilinear")
        filled = torch.where(known > 0, values / torch.where(known > 0, known, 1.0), wide)
    return filled
