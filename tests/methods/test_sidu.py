"""SIDU against a loop over all pairs of masks."""

from __future__ import annotations

import numpy as np
import perturbation_cases as passes
import pytest
import strategies as zoo
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from perturbation_cases import Counted, close
from torch import nn

from attrib_zoo import SIDU
from attrib_zoo.errors import OptionError, UnsupportedModelError


def sidu_over_all_pairs(model, layer, image, sigma=0.25, threshold=0.1, scaled=False, classes=passes.softmax):
    size, maps, clean = image.shape[1:], passes.features(model, layer, image), classes(passes.logits(model, image))
    masks = [
        passes.enlarge(((passes.stretch(grid) if scaled else grid) > threshold).astype(float), size) for grid in maps
    ]
    found = [classes(passes.logits(model, passes.show(image, mask))) for mask in masks]
    unique = np.array([sum(np.linalg.norm(a - b) for b in found) for a in found])
    unique = passes.stretch(unique)
    similar = np.array([np.exp(-(np.linalg.norm(clean - a) ** 2) / (2 * sigma**2)) for a in found])
    return sum(s * u * mask for s, u, mask in zip(similar, unique, masks, strict=True))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, {}),
        ({"sigma": 0.8, "threshold": 0.3}, {"sigma": 0.8, "threshold": 0.3}),
        ({"threshold_on": "minmax", "threshold": 0.5}, {"scaled": True, "threshold": 0.5}),
        ({"score": "sigmoid"}, {"classes": lambda v: 1 / (1 + np.exp(-v))}),
    ],
    ids=["paper", "wide", "minmax", "sigmoid"],
)
def test_against_a_loop(options, told):
    model, images = zoo.small_cnn().double(), zoo.batch(3, dtype=torch.float64)
    found = SIDU(model, **options).attribute(images, 2)
    for n in range(3):
        wanted = sidu_over_all_pairs(model, "stages.2", images[n], **told)
        assert wanted.std() > 0
        close(found[n, 0], wanted)


@settings(max_examples=5)
@given(st.permutations(range(8)), st.integers(1, 20))
def test_order_chunks_and_targets_say_nothing(order, chunk):
    model, images = zoo.small_cnn().double(), zoo.batch(2, dtype=torch.float64)
    wanted = SIDU(model).attribute(images, 0)
    passes.reorder_last_stage(model, order)
    close(SIDU(model, chunk_size=chunk).attribute_many(images, [3, 1]), torch.stack([wanted, wanted], 1))


def test_equal_predictions_give_zero_and_one_warning():
    class Constant(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return 0 * self.model(x)

    with pytest.warns(UserWarning, match="SIDU: no mask of some image is unlike the others") as caught:
        assert SIDU(Constant(zoo.small_cnn()), "model.stages.2").attribute(zoo.batch(2), 0).abs().sum() == 0
    assert len(caught) == 1


def test_one_pass_for_each_feature_map():
    model, images = Counted(zoo.small_cnn()), zoo.batch(3)
    explainer = SIDU(model, "model.stages.2")
    explainer.attribute(images, 0)
    model.images = 0
    explainer.attribute_many(images, [0, 1, 2])
    assert model.images == 3 + 3 * 8


def test_transformers_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"SIDU cuts feature maps.*both signs.*ScoreCAM"):
        SIDU(zoo.small_vit()).attribute(zoo.batch(1), 0)


@pytest.mark.parametrize("options", [{"sigma": 0.0}, {"threshold": "0.1"}, {"threshold_on": "z"}], ids=str)
def test_wrong_options(options):
    (name,) = options
    with pytest.raises(OptionError, match=f"{name}: must be"):
        SIDU(zoo.small_cnn(), **options)
