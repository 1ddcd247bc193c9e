"""Linear imputation as one linear system per image, solved by conjugate gradients under a multigrid preconditioner.

Each removed pixel is the weighted mean of its eight neighbours in the image (1/6 for the four nearest, 1/12 for the
diagonal ones, the weights renormalised at the border): a Poisson problem whose boundary values are the kept pixels.
Times 12 its operator on the removed pixels is ``A x = free * (d x - S x)``, with ``S`` the sum over the 3x3
neighbourhood under ``[1 2 1]^T [1 2 1]``, and ``d`` the product of ``1 + 2 + 1`` or, at the border, ``2 + 1`` along
both axes. ``A`` is symmetric and positive definite if any pixel is kept.

The preconditioner is one V-cycle: Jacobi (which damps every short wave to a third on this stencil, undamped) before
and after, bilinear prolongation, its transpose as restriction, and the same stencil on each coarser grid, where a
cell is free if all that it covers is. In two dimensions that stencil needs no scaling between grids. So the cost is
linear in the number of pixels, and all images, channels and fractions are solved together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_COARSEST = 64


class Stencil:
    """``-A x`` on one grid, into preallocated buffers.

    Args:
        free: ``(B, 1, h, w)``, 1 where a pixel is unknown and 0 where it is known.
        total: ``(h, w)``, the d of the module docstring.
        channels: C of the vectors ``x``: ``(B, C, h, w)``.
    """

    def __init__(self, free: Tensor, total: Tensor, channels: int) -> None:
        batch, _, height, width = free.shape
        self.free, self.total = free, total
        self.inverse = free / (total - 4).clamp(min=1)  # of the diagonal; a grid of one pixel has none
        padded = free.new_zeros(batch, channels, height + 2, width + 2)
        self.x = padded[..., 1:-1, 1:-1]
        self._rows = padded[..., :-2, :], padded[..., 1:-1, :], padded[..., 2:, :]
        self._down = free.new_empty(batch, channels, height, width + 2)
        self._columns = self._down[..., :-2], self._down[..., 1:-1], self._down[..., 2:]
        self._out = free.new_empty(batch, channels, height, width)

    def negative(self) -> Tensor:
        """``-A x`` of what is in :attr:`x`; the same buffer at each call."""
        torch.add(self._rows[0], self._rows[2], out=self._down).add_(self._rows[1], alpha=2)
        torch.add(self._columns[0], self._columns[2], out=self._out).add_(self._columns[1], alpha=2)
        return self._out.addcmul_(self.x, self.total, value=-1).mul_(self.free)


class VCycle:
    """An approximate inverse of ``A``, symmetric and positive definite."""

    def __init__(self, free: Tensor, total: Tensor, channels: int) -> None:
        self._grids = [Stencil(free, total, channels)]
        while free.shape[-2] * free.shape[-1] > _COARSEST:
            size = [(side + 1) // 2 for side in free.shape[-2:]]
            free = -F.adaptive_max_pool2d(-free, size)
            if not bool(free.any()):
                break
            self._grids.append(Stencil(free, totals(size, free), channels))
        self._inverse = _dense_inverse(self._grids[-1])

    def __call__(self, residual: Tensor) -> Tensor:
        """An approximation of the solution of ``A z = residual``; the same buffer at each call."""
        return self._cycle(0, residual)

    def _cycle(self, depth: int, residual: Tensor) -> Tensor:
        grid, last = self._grids[depth], depth == len(self._grids) - 1
        if last and self._inverse is not None:
            return (residual.flatten(2) @ self._inverse).view_as(residual)
        torch.mul(residual, grid.inverse, out=grid.x)
        if not last:
            coarse = self._grids[depth + 1].free
            rest = grid.negative().add_(residual)
            shape = [*residual.shape[:2], *coarse.shape[-2:]]
            summed = torch.ops.aten.upsample_bilinear2d_backward(rest, residual.shape[-2:], shape, False)
            step = self._cycle(depth + 1, summed.mul_(coarse)).contiguous()
            grid.x.addcmul_(F.interpolate(step, size=residual.shape[-2:], mode="bilinear"), grid.free)
        grid.x.addcmul_(grid.negative().add_(residual), grid.inverse)
        return grid.x


def totals(size: list[int] | tuple[int, ...], like: Tensor) -> Tensor:
    """The d of the module docstring, ``(h, w)``."""
    sides = []
    for length in size:
        side = like.new_full((length,), 4.0)
        side[0] -= 1
        side[-1] -= 1
        sides.append(side)
    return sides[0][:, None] * sides[1]


def _dense_inverse(grid: Stencil) -> Tensor | None:
    """``(B, n, n)``, of ``A`` on a grid of few pixels, zero on the known ones; None on a large grid."""
    batch, _, height, width = grid.free.shape
    n = height * width
    if n > _COARSEST:
        return None
    every = Stencil(torch.ones_like(grid.free[:1]).expand(n, 1, height, width), grid.total, 1)
    every.x.copy_(torch.eye(n, dtype=grid.free.dtype, device=grid.free.device).view(n, 1, height, width))
    free = grid.free.view(batch, n)
    both = free[:, :, None] * free[:, None, :]
    found: Tensor = torch.linalg.inv(both * -every.negative().flatten(1) + torch.diag_embed(1 - free))
    return found * both


def solve(guess: Tensor, free: Tensor, total: Tensor, tolerance: Tensor, most: int = 100) -> tuple[Tensor, int]:
    """Fill the free pixels of ``guess`` so that each is the mean of its neighbours.

    Args:
        guess: ``(B, C, h, w)``; exact on the known pixels, approximate on the free ones.
        free: ``(B, 1, h, w)``, 0 or 1; where an image has free pixels it has known ones too.
        total: From :func:`totals` of the whole image; this may be a part of it surrounded by known pixels.
        tolerance: ``(B, 1, 1, 1)``; the iteration stops when no estimated error, ``V-cycle(residual)``, is above it.
        most: The largest number of iterations.

    Returns:
        The images and the number of iterations.
    """
    channels = guess.shape[1]
    inverse, stencil = VCycle(free, total, channels), Stencil(free, total, channels)
    stencil.x.copy_(guess)
    residual = stencil.negative().clone()
    stencil.x.zero_()
    change, before, tiny = torch.zeros_like(residual), None, torch.finfo(guess.dtype).tiny
    done = 0
    while True:
        step = inverse(residual)
        if done >= most or bool((step.abs().amax((1, 2, 3), keepdim=True) <= tolerance).all()):
            return guess + change.add_(step), done
        along = (residual * step).sum((2, 3), keepdim=True)
        stencil.x.mul_(0.0 if before is None else along / before.clamp(min=tiny)).add_(step)
        bent = stencil.negative()
        before = along
        length = along / (stencil.x * bent).sum((2, 3), keepdim=True).neg_().clamp_(min=tiny)
        change.addcmul_(stencil.x, length)
        residual.addcmul_(bent, length)
        done += 1
