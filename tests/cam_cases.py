"""A small network whose gradients vary over space, and its activations and gradients by plain autograd."""

from __future__ import annotations

import engine_cases as cases
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mixed(nn.Module):
    """Features behind an in-place ReLU; then a convolution, so that no two cells of a map have the same gradient."""

    def __init__(self, width: int = 4, classes: int = 4, *, activation: type[nn.Module] = nn.ReLU, bias: bool = True):
        super().__init__()
        act = activation(inplace=True) if activation is nn.ReLU else activation()
        self.features = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), act)
        self.mix = nn.Conv2d(width, 5, 3, 1, 1, bias=bias)
        self.head = nn.Linear(20, classes, bias=bias)

    def behind(self, maps: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.mix(maps).relu(), 2).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.features(x))


class Pooled(nn.Module):
    """Global average pooling and one linear layer behind the features."""

    def __init__(self, width: int = 4, classes: int = 4):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(inplace=True))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    return cases.lively(model, seed).double()


def by_autograd(model: Mixed, images: Tensor, targets: list[int]) -> tuple[Tensor, Tensor]:
    """Features ``(N, D, h, w)`` and the gradients of each image's target logit, one image at a time."""
    maps = model.features(images).detach()
    slopes = []
    for one, target in zip(maps, targets, strict=True):
        leaf = one[None].clone().requires_grad_()
        model.behind(leaf)[0, target].backward()
        slopes.append(leaf.grad[0])
    model.zero_grad()
    return maps, torch.stack(slopes)


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-10) -> None:
    assert wanted.abs().max() > 0
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))
