"""Poly-CAM against a transcription map by map, and its passes."""

from __future__ import annotations

import numpy as np
import perturbation_cases as passes
import pytest
import strategies as zoo
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from perturbation_cases import LAYERS, Counted, close

from attrib_zoo import PolyCAM
from attrib_zoo.errors import OptionError, UnsupportedModelError


def polycam_map_by_map(
    model, layers, image, target, variant="pm", lnorm=True, perc=0.1, full_range=False, upsampled=True
):
    """From the deepest layer to the first of ``layers``; the denominators of the published formula."""
    size, previous, base = image.shape[1:], None, passes.score_of(model, image, target)

    def normed(grid):
        low, high = np.percentile(grid, [perc, 100 - perc])
        return np.clip((grid - low) / max(high - low if full_range else high, 1e-12), 0, 1)

    for layer in layers[::-1]:
        maps = passes.features(model, layer, image)
        heat = np.zeros(maps.shape[1:])
        for grid in maps:
            mask = passes.enlarge(normed(grid), size)
            weight = 0.0
            if "p" in variant:
                weight += passes.score_of(model, passes.show(image, mask), target)
            if "m" in variant:
                weight += base - passes.score_of(model, passes.show(image, 1 - mask), target)
            heat += max(weight, 0) * grid
        heat = np.maximum(heat, 0)
        if previous is not None:
            if lnorm:
                heat = heat / np.maximum(passes.enlarge(passes.enlarge(heat, previous.shape), heat.shape), 1e-12)
            heat = heat * passes.enlarge(previous, heat.shape)
        previous = np.maximum(heat, 0)
    return passes.enlarge(normed(previous), size) if upsampled else normed(previous)


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
        wanted = polycam_map_by_map(model, LAYERS, images[n], target, **options)
        assert wanted.std() > 0
        close(found[n, 0], wanted)
        close(small[n, 0], polycam_map_by_map(model, LAYERS[1:], images[n], target, upsampled=False, **options))
    assert found.max() <= 1


@pytest.mark.parametrize(
    ("build", "names", "count"),
    [
        (passes.resnet50, "relu layer1 layer2 layer3 layer4", 3904),
        (passes.vgg16, "features.3 features.8 features.15 features.22 features.29", 1472),
    ],
)
def test_the_feature_maps_that_the_paper_counts(build, names, count):
    taps = PolyCAM(build()).taps(torch.randn(1, 3, passes.SIZE, passes.SIZE))
    assert [tap.name for tap in taps] == names.split()
    assert sum(tap.channels for tap in taps) == count


@pytest.mark.parametrize(("variant", "times"), [("p", 1), ("m", 1), ("pm", 2)])
def test_a_pass_for_each_map_whatever_the_number_of_targets(variant, times):
    model, images = zoo.small_cnn(), zoo.batch(2)
    counted = Counted(model)
    explainer = PolyCAM(counted, [f"model.{layer}" for layer in LAYERS], variant=variant)
    explainer.attribute(images, 0)
    counted.images = 0
    explainer.attribute_many(images, [0, 1, 2])
    alive = sum(
        (abs(passes.features(model, layer, image)).max((1, 2)) > 0).sum() for layer in LAYERS for image in images
    )
    assert counted.images == 2 + times * alive
    assert alive > 2 * 4


@settings(max_examples=5)
@given(st.permutations(range(8)), st.integers(1, 40))
def test_order_chunks_and_company_say_nothing(order, chunk):
    model, images = zoo.small_cnn().double(), zoo.batch(3, dtype=torch.float64)
    wanted = [PolyCAM(model, LAYERS).attribute(images[n : n + 1], n)[0] for n in range(3)]
    passes.reorder_last_stage(model, order)
    close(PolyCAM(model, LAYERS, chunk_size=chunk).attribute(images, [0, 1, 2]), torch.stack(wanted))


def test_transformers_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"PolyCAM refines from coarse to fine.*ScoreCAM"):
        PolyCAM(zoo.small_vit()).attribute(zoo.batch(1), 0)


@pytest.mark.parametrize("options", [{"variant": "mp"}, {"perc": 51.0}, {"perc": None}], ids=str)
def test_wrong_options(options):
    (name,) = options
    with pytest.raises(OptionError, match=f"{name}: must be"):
        PolyCAM(zoo.small_cnn(), **options)
