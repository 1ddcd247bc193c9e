"""Means over images with their bootstrap intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean over images with its 95 % bootstrap interval.

    Attributes:
        mean: the mean; NaN without images.
        low: the lower end of the interval.
        high: the upper end.
        images: how many images have a value; images where the measure is undefined have none.
    """

    mean: float
    low: float
    high: float
    images: int

    def text(self, digits: int = 2) -> str:
        """``"44.48 [40.11, 48.90]"``; a dash without images."""
        if not self.images:
            return "–"
        if math.isnan(self.low):
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"

    def short(self, digits: int = 2) -> str:
        """``"44.48 ±4.40"``: the mean and half the width of the interval."""
        if not self.images or math.isnan(self.low):
            return self.text(digits)
        return f"{self.mean:.{digits}f} ±{(self.high - self.low) / 2:.{digits}f}"


def estimate(values: Tensor, seed: int = 0) -> Estimate:
    """Mean and percentile interval of 2000 bootstrap resamples of the finite values, ``(N,)``."""
    kept = values[values.isfinite()].double()
    if len(kept) == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    if len(kept) == 1:
        return Estimate(float(kept[0]), math.nan, math.nan, 1)
    generator = torch.Generator().manual_seed(seed)
    means = torch.cat(  # in parts: all at once would be 2000 N numbers
        [
            kept[torch.randint(len(kept), (100, len(kept)), generator=generator)].mean(1)
            for _ in range(_RESAMPLES // 100)
        ]
    )
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(kept.mean()), low, high, len(kept))
