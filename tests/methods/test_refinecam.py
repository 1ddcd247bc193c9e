"""RefineCAM is the product of scaled maps, against loops over cells in float64."""

from __future__ import annotations

import cam_cases as nets
import engine_cases as cases
import pytest
import strategies as zoo
import torch
from cam_cases import close

import attrib_zoo
from attrib_zoo import RefineCAM
from attrib_zoo.errors import OptionError
from attrib_zoo.methods.refinecam import BASES

LAYERS = ["layer1", "layer3", "layer4"]


def scaled(heat):
    heat = heat.clamp(min=0)
    low, high = float(heat.min()), float(heat.max())
    return (heat - low) / (high - low) if high > low else 0 * heat


def bilinear(heat, size):
    """Each pixel by its four neighbours, with half-pixel centres."""
    h, w = heat.shape
    out = torch.zeros(size, dtype=heat.dtype)
    for i in range(size[0]):
        for j in range(size[1]):
            y = min(max((i + 0.5) * h / size[0] - 0.5, 0), h - 1)
            x = min(max((j + 0.5) * w / size[1] - 0.5, 0), w - 1)
            top, left = int(y), int(x)
            down, right = min(top + 1, h - 1), min(left + 1, w - 1)
            b, a = y - top, x - left
            upper = (1 - a) * heat[top, left] + a * heat[top, right]
            out[i, j] = (1 - b) * upper + b * ((1 - a) * heat[down, left] + a * heat[down, right])
    return out


@pytest.mark.parametrize("base", BASES)
@pytest.mark.filterwarnings("ignore:.*derived for features")
def test_the_map_is_the_product_of_the_scaled_maps_of_the_layers(base):
    model, images, targets = cases.resnet().double(), zoo.normal(2, 3, 32, 48), [3, 1]
    alone = [getattr(attrib_zoo, base)(model, layer, upsample=False).attribute(images, targets) for layer in LAYERS]
    wanted = []
    for n in range(2):
        total = torch.ones(8, 12, dtype=torch.float64)
        for maps in alone:
            total = total * bilinear(scaled(maps[n, 0]), (8, 12))
        wanted.append(scaled(total))
    with cases.untouched(model, images):
        found = RefineCAM(model, LAYERS, base=base, upsample=False).attribute(images, targets)
    close(found[:, 0], torch.stack(wanted))
    assert float(found.max()) == 1


def test_the_map_of_one_layer_is_that_of_its_base():
    model, images = cases.resnet().double(), zoo.normal(2, 3, 32, 32)
    alone = attrib_zoo.GradCAMPlusPlus(model, "layer3", scale="min-max", upsample=False).attribute(images, 1)
    close(RefineCAM(model, "layer3", upsample=False).attribute(images, 1), alone)


@pytest.mark.filterwarnings("ignore:.*derived for features")
def test_default_layers_are_the_ends_of_four_stages_and_four_norms():
    taps = RefineCAM(cases.resnet()).taps(cases.images())
    assert [tap.name for tap in taps] == ["layer1", "layer2", "layer3", "layer4"]
    model = cases.vit(global_pool="token", depth=5)
    assert [tap.name for tap in RefineCAM(model).taps(cases.images())] == [f"blocks.{i}.norm1" for i in range(1, 5)]


def test_layers_that_agree_nowhere_give_zero_and_a_warning():
    model = nets.lively(nets.Mixed())
    explainer = RefineCAM(model)
    one, other = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    one[..., 0], other[..., 3] = 1, 1
    with pytest.warns(UserWarning, match="RefineCAM: the map is exactly zero: no place has evidence in all 2 layers"):
        assert not explainer.fuse([one, other], (4, 4)).any()


def test_the_base_is_checked():
    with pytest.raises(OptionError, match=r"base: must be one of 'GradCAMPlusPlus', .* got 'RISE'"):
        RefineCAM(nets.Mixed(), base="RISE")
