"""What the tests of the perturbation methods share: pieces of NumPy references, counted passes, the papers' networks.

The references look at one image and one mask at a time, at full resolution, by loops over pixels.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from engine_cases import lively
from torch import device, nn

LAYERS = ["stages.0", "stages.1", "stages.2"]
"""Of ``strategies.small_cnn``."""


def close(found, wanted, tolerance=1e-9):
    """Equal but for a share of the largest value."""
    wanted = torch.as_tensor(wanted)
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * max(1e-30, float(wanted.abs().max())))


class Counted(nn.Module):
    """Counts the images that go through a model, and the largest batch."""

    def __init__(self, model):
        super().__init__()
        self.model, self.batches = model, []  # a list, which a mirror of the model shares

    def forward(self, x):
        self.batches.append(len(x))
        return self.model(x)

    @property
    def images(self):
        return sum(self.batches)

    @images.setter
    def images(self, start):
        self.batches[:] = [start] if start else []

    @property
    def most(self):
        return max(self.batches, default=0)


def reorder_last_stage(model, order):
    """Put the feature maps of ``small_cnn``'s last stage in another order; the outputs stay."""
    convolution, norm = model.stages[2][:2]
    with torch.no_grad():
        for parameter in (*convolution.parameters(), *norm.parameters()):
            parameter.copy_(parameter[order])
        norm.running_mean.copy_(norm.running_mean[order])
        norm.running_var.copy_(norm.running_var[order])
        model.head.weight.copy_(model.head.weight[:, order])


# ---------------------------------------------------------------------- pieces of the references


@functools.cache
def axis_weights(cells, pixels):
    """``(pixels, cells)``: how much of each cell a pixel sees; half-pixel centres, clamped at the border."""
    weights = np.zeros((pixels, cells))
    for pixel in range(pixels):
        place = min(max((pixel + 0.5) * cells / pixels - 0.5, 0.0), cells - 1.0)
        low, share = int(place), place - int(place)
        weights[pixel, low] += 1 - share
        weights[pixel, min(low + 1, cells - 1)] += share
    return weights


def enlarge(grid, size):
    """Bilinear interpolation by its definition."""
    grid = np.asarray(grid)
    return axis_weights(grid.shape[0], size[0]) @ grid @ axis_weights(grid.shape[1], size[1]).T


def stretch(grid):
    low, high = grid.min(), grid.max()
    return (grid - low) / (high - low) if high > low else np.zeros_like(grid)


def features(model, layer, image):
    """``(D, h, w)`` of one image, by a plain hook."""
    kept = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _, __, out: kept.append(out.detach().clone()))
    with torch.no_grad():
        model(image[None])
    handle.remove()
    return kept[-1][0].numpy()


def logits(model, image):
    with torch.no_grad():
        return model(image[None])[0].numpy()


def softmax(values):
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def score_of(model, image, target, score="softmax"):
    values = logits(model, image)
    return {"softmax": softmax, "logit": lambda v: v, "sigmoid": lambda v: 1 / (1 + np.exp(-v))}[score](values)[target]


def show(image, mask, hidden=0.0):
    mask = torch.tensor(mask, dtype=image.dtype)
    return image * mask + hidden * (1 - mask)


# ---------------------------------------------------------------------- networks of the papers, with random weights

SIZE = 64
"""Of the images, in pixels: the last stage of the CNNs still has 2 x 2 cells."""


def _filled(model):
    return lively(model.to_empty(device="cpu"))


def vgg16():
    """VGG16 with one linear layer behind its features."""
    from torchvision.models import vgg16

    with device("meta"):
        model = vgg16(weights=None)
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier = nn.Linear(512, 5)
    return _filled(model)


def resnet50():
    from torchvision.models import resnet50

    with device("meta"):
        model = resnet50(weights=None, num_classes=5)
    return _filled(model)


def vit_b():
    """Two blocks as wide as those of ViT-B, with slim MLPs."""
    from torchvision.models.vision_transformer import VisionTransformer

    with device("meta"):
        model = VisionTransformer(SIZE, 16, 2, 12, 768, 64, num_classes=5)
    return _filled(model)
