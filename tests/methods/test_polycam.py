"""Poly-CAM against a transcription map by map, and its passes."""

from __future__ import annotations

import pytest
import strategies as zoo
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import masked, published
from torch import nn

from attrib_zoo import PolyCAM
from attrib_zoo.errors import OptionError, UnsupportedModelError

LAYERS = ["stages.0", "stages.1", "stages.2"]


def close(found, wanted, tolerance=1e-9):
    wanted = torch.as_tensor(wanted)
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * max(1e-30, float(wanted.abs().max())))


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "pm"},
        {"variant": "p"},
        {"variant": "m"},
        {"lnorm": False},
        {"perc": 5.0},
        {"full_range": True},
    ],
    ids=str,
)
def test_against_a_transcription(options):
    model, images = zoo.small_cnn().double(), zoo.batch(2, dtype=torch.float64)
    found = PolyCAM(model, LAYERS, **options).attribute(images)
    small = PolyCAM(model, LAYERS[1:], upsample=False, **options).attribute(images)
    for n, target in enumerate(model(images).argmax(1).tolist()):
        wanted = masked.poly_cam(model, LAYERS, images[n], target, **options)
        assert wanted.std() > 0
        close(found[n, 0], wanted)
        close(small[n, 0], masked.poly_cam(model, LAYERS[1:], images[n], target, upsampled=False, **options))
    assert found.max() <= 1


@pytest.mark.parametrize(
    ("build", "names", "count"),
    [
        (published.resnet50, "relu layer1 layer2 layer3 layer4", 3904),
        (published.vgg16, "features.3 features.8 features.15 features.22 features.29", 1472),
    ],
)
def test_the_feature_maps_that_the_paper_counts(build, names, count):
    taps = PolyCAM(build()).taps(torch.randn(1, 3, published.SIZE, published.SIZE))
    assert [tap.name for tap in taps] == names.split()
    assert sum(tap.channels for tap in taps) == count


class Counted(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.images = model, 0

    def forward(self, x):
        self.images += len(x)
        return self.model(x)


@pytest.mark.parametrize(("variant", "times"), [("p", 1), ("m", 1), ("pm", 2)])
def test_a_pass_for_each_map_whatever_the_number_of_targets(variant, times):
    model, images = zoo.small_cnn(), zoo.batch(2)
    counted = Counted(model)
    explainer = PolyCAM(counted, [f"model.{layer}" for layer in LAYERS], variant=variant)
    explainer.attribute(images, 0)
    counted.images = 0
    explainer.attribute_many(images, [0, 1, 2])
    alive = sum(
        (abs(masked.features(model, layer, image)).max((1, 2)) > 0).sum() for layer in LAYERS for image in images
    )
    assert counted.images == 2 + times * alive
    assert alive > 2 * 4


@settings(max_examples=5)
@given(st.permutations(range(8)), st.integers(1, 40))
def test_order_chunks_and_company_say_nothing(order, chunk):
    model, images = zoo.small_cnn().double(), zoo.batch(3, dtype=torch.float64)
    wanted = [PolyCAM(model, LAYERS).attribute(images[n : n + 1], n)[0] for n in range(3)]
    with torch.no_grad():
        for parameter in (*model.stages[2][0].parameters(), *model.stages[2][1].parameters()):
            parameter.copy_(parameter[order])
        norm = model.stages[2][1]
        norm.running_mean.copy_(norm.running_mean[order])
        norm.running_var.copy_(norm.running_var[order])
        model.head.weight.copy_(model.head.weight[:, order])
    close(PolyCAM(model, LAYERS, chunk_size=chunk).attribute(images, [0, 1, 2]), torch.stack(wanted))


def test_transformers_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"PolyCAM refines from coarse to fine.*ScoreCAM"):
        PolyCAM(zoo.small_vit()).attribute(zoo.batch(1), 0)


@pytest.mark.parametrize("options", [{"variant": "mp"}, {"perc": 51.0}, {"perc": None}], ids=str)
def test_wrong_options(options):
    (name,) = options
    with pytest.raises(OptionError, match=f"{name}: must be"):
        PolyCAM(zoo.small_cnn(), **options)
