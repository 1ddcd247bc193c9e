"""What the tests of the methods draw from: outputs and targets, batches, small models whose decisions differ."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import torch
from engine_cases import lively
from hypothesis import strategies as st
from torch import Tensor, nn

SEEDS = st.integers(0, 2**31 - 1)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---------------------------------------------------------------------- outputs and targets


@st.composite
def outputs(draw: st.DrawFn, axes: int | None = None, batch: int | None = None) -> Tensor:
    """Scores ``(N, ...)`` with 1 or 2 axes behind the batch, all values different."""
    axes = axes or draw(st.integers(1, 2))
    shape = (batch or draw(st.integers(1, 5)), *(draw(st.integers(2, 6)) for _ in range(axes)))
    return normal(*shape, seed=draw(SEEDS))


@st.composite
def positions(draw: st.DrawFn, scores: Tensor) -> list[tuple[int, ...]]:
    """One place in the scores of each example."""
    place = st.tuples(*(st.integers(0, size - 1) for size in scores.shape[1:]))
    return draw(st.lists(place, min_size=len(scores), max_size=len(scores)))


# ---------------------------------------------------------------------- maps and masks


@st.composite
def maps(draw: st.DrawFn, least: int = 1, most: int = 9) -> Tensor:
    """``(N, M, h, w)`` in float64, not square in general."""
    n, m = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    h, w = draw(st.integers(least, most)), draw(st.integers(least, most))
    return normal(n, m, h, w, seed=draw(SEEDS))


@st.composite
def features(draw: st.DrawFn, batch: int | None = None) -> list[Tensor]:
    """One to three feature maps of one batch, with their own channels and sizes."""
    n = batch or draw(st.integers(2, 4))
    shapes = draw(st.lists(st.tuples(*[st.integers(1, 6)] * 3), min_size=1, max_size=3))
    return [normal(n, c, h, w, seed=draw(SEEDS)) for c, h, w in shapes]


# ---------------------------------------------------------------------- models


class SmallCNN(nn.Module):
    """Stages of convolution, BatchNorm and in-place ReLU, each half the size of the one before; pooling; linear.

    Dropout before the linear layer, and forward arguments that change every layer.
    """

    def __init__(self, widths: tuple[int, ...] = (4, 6, 8), classes: int = 5, channels: int = 3) -> None:
        super().__init__()
        sizes = (channels, *widths)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, 1 + (i > 0), 1), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
                for i, (a, b) in enumerate(pairwise(sizes))
            )
        )
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        if isinstance(gain, Tensor) and gain.ndim:
            gain = gain.view(-1, 1, 1, 1)
        return self.head(self.dropout(self.stages(x * gain).mean((2, 3))))


class OneValue(nn.Module):
    """The difference of two logits of another model, as ``(N,)`` or ``(N, 1)``."""

    def __init__(self, model: nn.Module, *, column: bool) -> None:
        super().__init__()
        self.model = model
        self.column = column

    def forward(self, x: Tensor) -> Tensor:
        out = self.model(x)
        value = out[:, 1] - out[:, 0]
        return value.unsqueeze(1) if self.column else value


def batch(
    count: int = 8, size: int = 16, channels: int = 3, seed: int = 1, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Smooth random images, so that a convolution sees more than noise."""
    coarse = normal(count, channels, 4, 4, seed=seed)
    return nn.functional.interpolate(2 * coarse, size=(size, size), mode="bicubic").to(dtype)


def decisive(model: nn.Module, images: Tensor) -> nn.Module:
    """Move the head's bias and scale so that the model decides now for this class and now for that."""
    model = lively(model)
    with torch.no_grad():
        scores = model(images)
        spread = scores.std(0).clamp(min=1e-6)
        model.head.weight.div_(spread[:, None])
        model.head.bias.copy_((model.head.bias - scores.mean(0)) / spread)
        counts = model(images).argmax(1).bincount(minlength=scores.shape[1])
    assert (counts > 0).sum() > 1, "the model decides for one class only"
    return model


def fit(explainer: Any, loader: Any, **options: Any) -> Any:
    """Fit without a progress bar and without the advice to train for longer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fit: the")
        return explainer.fit(loader, show_progress=False, **options)


def small_cnn(widths: tuple[int, ...] = (4, 6, 8), classes: int = 5, channels: int = 3) -> nn.Module:
    return decisive(SmallCNN(widths, classes, channels), batch(64, channels=channels, seed=9))


def small_vit(classes: int = 5, dim: int = 16, depth: int = 3, size: int = 16) -> nn.Module:
    from attrib_zoo import synthetic

    return decisive(synthetic.tiny_vit(classes, dim=dim, depth=depth, size=size), batch(64, size=size, seed=9))
