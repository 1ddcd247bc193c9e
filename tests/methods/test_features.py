"""Eigen-CAM against the decomposition of another library, in float64."""

from __future__ import annotations

import cam_cases as nets
import engine_cases as cases
import numpy as np
import pytest
import strategies as zoo
import torch
from cam_cases import close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attrib_zoo import EigenCAM


def matrix(features):
    """``(D, h, w)`` as an (h w) x D NumPy matrix, cell by cell."""
    d, h, w = features.shape
    return np.array([[features[k, i, j].item() for k in range(d)] for i in range(h) for j in range(w)])


def eigen(features):
    """The paper's: the features times the first right singular vector, by NumPy's decomposition."""
    a = matrix(features)
    heat = a @ np.linalg.svd(a)[2][0]
    return torch.tensor(heat if heat.sum() > 0 else -heat).view(features.shape[1:])


@settings(max_examples=8)
@given(st.integers(1, 20), st.integers(4, 9), st.integers(4, 9), zoo.SEEDS)
def test_eigencam_is_the_first_singular_vector(width, height, length, seed):
    """Wide and narrow matrices: either Gram matrix."""
    model = nets.lively(nets.Mixed(width, activation=nn.Tanh), seed)
    images = zoo.normal(2, 3, height, length, seed=seed)
    found = EigenCAM(model, "features", upsample=False).attribute(images)
    wanted = torch.stack([eigen(part) for part in model.features(images).detach()])
    a = [np.linalg.svd(matrix(part))[1] for part in model.features(images).detach()]
    if all(len(s) < 2 or s[1] < 0.9 * s[0] for s in a):  # two equal singular values have no first vector
        close(found[:, 0], wanted, 1e-8)


@pytest.mark.parametrize("size", [1e-20, 1e18])
def test_eigencam_at_any_size_of_the_features(size):
    features = zoo.normal(2, 3, 4, 5).abs()

    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, x):
            return self.layer(x).mean((2, 3))

    found = EigenCAM(Features(), "layer", upsample=False).attribute((features * size).float())
    close(found.double()[:, 0] / size, torch.stack([eigen(part) for part in features]), 1e-5)
    assert not EigenCAM(Features(), "layer").attribute(torch.zeros(1, 3, 4, 4)).any()


def test_eigencam_of_tokens_leaves_the_class_token_out():
    model, images = cases.vit(global_pool="token").double(), zoo.normal(2, 3, 32, 32)
    found = EigenCAM(model, upsample=False).attribute(images)
    tokens = model._pos_embed(model.patch_embed(images))
    normed = model.blocks[2].norm1(model.blocks[1](model.blocks[0](tokens))).detach()
    patches = normed[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    close(found[:, 0], torch.stack([eigen(part) for part in patches]), 1e-9)
    clipped = EigenCAM(model, relu=True, upsample=False).attribute(images)
    assert (found < 0).any()
    assert torch.equal(clipped, found.relu())


def test_the_class_does_not_matter_and_is_checked():
    model, images = nets.lively(nets.Mixed()), zoo.normal(2, 3, 8, 8)
    explainer = EigenCAM(model, "features")
    assert EigenCAM.class_agnostic
    assert torch.equal(explainer.attribute(images, 0), explainer.attribute(images, [3, 1]))
    with pytest.raises(IndexError, match="4 classes"):
        explainer.attribute(images, 4)
