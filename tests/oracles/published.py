"""The networks of the papers with random weights and without the part that no test needs: quick on small images."""

from __future__ import annotations

from engine_cases import lively
from torch import device, nn

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
