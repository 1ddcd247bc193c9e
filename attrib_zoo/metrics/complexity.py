"""How simple a map is: concentrated on few pixels, smooth. Neither says whether it is correct."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo.masking import upsample
from attrib_zoo.metrics._maps import finite_rows, read_maps, scale_maps


def sparseness(
    model: nn.Module | None,
    inputs: Tensor | None,
    attributions: Tensor,
    target: Any = None,
    *,
    normalize: bool = False,
) -> Tensor:
    """Gini index of the map's magnitudes: 0 if all pixels are equal, near 1 if one pixel holds everything.

    With the n magnitudes in ascending order, ``|E|_1 <= ... <= |E|_n``, it is
    ``sum_k (2k - n - 1) |E|_k / (n sum_k |E|_k)``.

    Args:
        model: Not used; there for a uniform signature.
        inputs: The images, to whose size smaller maps are enlarged bilinearly; ``None`` takes maps as they are.
        attributions: The maps: ``(N, C, H, W)`` (channels are averaged), ``(N, 1, h, w)`` or ``(N, h, w)``.
        target: Not used; the maps belong to it already.
        normalize: Scale each map to [0, 1] first, so that a constant offset does not count.

    Returns:
        ``(N,)``, from 0 to 1 - 1/n; 0 for a map of zeros, NaN for one that is not finite.

    References:
        Chalasani et al., Concise explanations of neural networks using adversarial training, ICML 2020.
    """
    maps, size = _read(inputs, attributions)
    values = (scale_maps(maps, size) if normalize else upsample(maps, size)).abs().flatten(1).sort(1).values
    n = values.shape[1]
    weights = 2 * torch.arange(1, n + 1, device=values.device, dtype=values.dtype) - n - 1
    total = n * values.sum(1)
    return ((values * weights).sum(1) / torch.where(total > 0, total, 1.0)).masked_fill(~finite_rows(maps), torch.nan)


def total_variation(model: nn.Module | None, inputs: Tensor | None, attributions: Tensor, target: Any = None) -> Tensor:
    """Mean absolute difference of neighbouring pixels of the map scaled to [0, 1]; 0 is flat, lower is smoother.

    ``(sum |E[i+1, j] - E[i, j]| + sum |E[i, j+1] - E[i, j]|) / (number of these pairs)``.

    Args:
        model: Not used.
        inputs: As in :func:`sparseness`.
        attributions: The maps.
        target: Not used.

    Returns:
        ``(N,)``, from 0 to 1; 0 for a constant map, NaN for one that is not finite.
    """
    maps, size = _read(inputs, attributions)
    scaled = scale_maps(maps, size)
    steps = [scaled.diff(dim=axis).abs().flatten(1) for axis in (-2, -1)]
    pairs = sum(step.shape[1] for step in steps)
    found = (steps[0].sum(1) + steps[1].sum(1)) / max(pairs, 1)
    return found.masked_fill(~finite_rows(maps), torch.nan)


def _read(inputs: Tensor | None, attributions: Tensor) -> tuple[Tensor, tuple[int, int]]:
    batch = len(attributions) if isinstance(attributions, Tensor) and attributions.ndim else 0
    maps = read_maps(attributions, batch if inputs is None else len(inputs))
    height, width = maps.shape[-2:] if inputs is None else inputs.shape[-2:]
    return maps, (height, width)
