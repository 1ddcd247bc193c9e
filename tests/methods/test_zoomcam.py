"""Zoom-CAM against a loop, its default layers, and its properties."""

from __future__ import annotations

from itertools import pairwise

import engine_cases as cases
import pytest
import strategies as zoo
import torch
import torch.nn.functional as F
from cam_cases import close

from attrib_zoo import HiResCAM, ZoomCAM
from attrib_zoo.errors import UnsupportedModelError


def vgg():
    return cases.lively(cases.SmallVGG()).double()


def resnet():
    return cases.resnet().double()


def scaled(heat):
    """Min-max over each image's map."""
    out = heat.clone()
    for n in range(len(heat)):
        low, high = heat[n].min(), heat[n].max()
        out[n] = (heat[n] - low) / (high - low) if high > low else 0
    return out


def by_loop(model, layers, images, targets):
    """Layers from fine to coarse."""
    fused = None
    for name in reversed(layers):
        heat = scaled(HiResCAM(model, name, upsample=False).attribute(images, targets).clamp(min=0))
        if fused is None:
            fused = heat
        else:
            fused = F.interpolate(fused, size=heat.shape[-2:], mode="bilinear", align_corners=False).max(heat)
    return F.interpolate(fused, size=images.shape[-2:], mode="bilinear", align_corners=False).expand_as(images)


VGG_LAYERS = [f"features.{i}" for i in (1, 3, 6, 8, 11, 13, 15, 18, 20, 22, 25, 27, 29)]
NETS = {
    "vgg": (vgg, VGG_LAYERS),
    "resnet": (resnet, ["relu", "layer1", "layer3", "layer4"]),  # its second and third stage share a grid
}


@pytest.mark.parametrize("name", NETS)
def test_the_default_layers_fused_by_a_loop(name):
    build, layers = NETS[name]
    model, images, targets = build(), zoo.normal(2, 3, 64, 32), [1, 3]
    explainer = ZoomCAM(model)
    assert [tap.name for tap in explainer.taps(images)] == layers
    close(explainer.attribute(images, targets), by_loop(model, layers, images, targets), 1e-9)


def test_one_layer_is_hirescam_scaled():
    model, images, targets = resnet(), zoo.normal(2, 3, 64, 48), [1, 3]
    heat = HiResCAM(model, "layer3", relu=True, upsample=False).attribute(images, targets)
    close(ZoomCAM(model, "layer3", upsample=False).attribute(images, targets), scaled(heat))


def test_a_coarser_layer_never_lowers_a_value():
    model, images = resnet(), zoo.normal(2, 3, 64, 48)
    layers = ["layer1", "layer2", "layer4"]
    maps = [ZoomCAM(model, layers[: i + 1], upsample=False).attribute(images, 2) for i in range(3)]
    for less, more in pairwise(maps):
        assert (more >= less).all()
        assert (more > less).any()
    assert maps[-1].min() >= 0
    assert maps[-1].max() == 1


def test_the_size_of_the_logits_is_irrelevant():
    model, images = resnet(), zoo.normal(2, 3, 64, 48)
    before = ZoomCAM(model).attribute(images, 2)
    with torch.no_grad():
        model.fc.weight.mul_(1e-6)
    close(ZoomCAM(model).attribute(images, 2), before)


@pytest.mark.parametrize(("build", "size"), [(cases.vit, 32), (cases.swin, 16)])
def test_transformers_are_refused_unless_layers_are_named(build, size):
    model, images = build(), cases.images(2, size)
    with pytest.raises(UnsupportedModelError, match=r"ZoomCAM: needs convolutional stages .* or name the layers"):
        ZoomCAM(model).attribute(images, 1)
    assert ZoomCAM(model, [-2, -1]).attribute(images, 1).any()
