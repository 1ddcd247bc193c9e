"""Eigen-CAM and deep feature factorization against decompositions of other libraries, in float64."""

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

from attrib_zoo import DeepFeatureFactorization, EigenCAM
from attrib_zoo.errors import OptionError
from attrib_zoo.methods.factorization import factors, start


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


@pytest.mark.parametrize("cls", [EigenCAM, DeepFeatureFactorization])
def test_the_class_does_not_matter_and_is_checked(cls):
    model, images = nets.lively(nets.Mixed()), zoo.normal(2, 3, 8, 8)
    explainer = cls(model, "features")
    assert cls.class_agnostic
    assert torch.equal(explainer.attribute(images, 0), explainer.attribute(images, [3, 1]))
    with pytest.raises(IndexError, match="4 classes"):
        explainer.attribute(images, 4)


# ---------------------------------------------------------------------- factorisation


@pytest.mark.parametrize(("m", "d", "k"), [(12, 7, 3), (6, 20, 2), (9, 9, 5)])
def test_the_factors_are_those_of_scikit_learn(m, d, k):
    """The same updates from the same start, by its own program."""
    nmf = pytest.importorskip("sklearn.decomposition").NMF
    a = zoo.normal(2, m, d, seed=m).relu() + 0.01
    lefts, rights = start(a, k)
    found, directions = factors(a, k, 60)
    for n in range(2):
        top = float(a[n].max())
        begin = start(a[n : n + 1] / top, k)
        solver = nmf(k, init="custom", solver="cd", max_iter=60, tol=0)
        left = solver.fit_transform(a[n].numpy() / top, W=begin[0][0].numpy().copy(), H=begin[1][0].numpy().copy())
        right = solver.components_
        length = np.linalg.norm(right, axis=1)
        order = np.argsort(-((left * length) ** 2).sum(0))
        close(found[n], torch.tensor((left * length * top)[:, order]), 1e-8)
        close(directions[n], torch.tensor((right / length[:, None])[order]), 1e-8)
    assert (lefts > 0).all()
    assert (rights > 0).all()


def test_the_start_is_that_of_scikit_learn():
    initialise = pytest.importorskip("sklearn.decomposition._nmf")._initialize_nmf
    a = zoo.normal(1, 11, 8).relu()
    left, right = initialise(a[0].numpy(), 3, init="nndsvda", eps=1e-6, random_state=0)
    found = start(a, 3)
    close(found[0][0], torch.tensor(left), 1e-6)
    close(found[1][0], torch.tensor(right), 1e-6)


def test_parts_that_were_put_in_are_found():
    """Two disjoint parts with directions of their own: exact up to the order, the stronger first."""
    shares = torch.zeros(1, 12, 2, dtype=torch.float64)
    shares[0, :5, 0], shares[0, 5:, 1] = 1 + torch.arange(5.0), 4 + torch.arange(7.0)
    directions = torch.tensor([[[0.6, 0.8, 0, 0], [0, 0, 0, 1.0]]], dtype=torch.float64)
    found, rows = factors(shares @ directions, 2, 500)
    close(found, shares.flip(2), 1e-6)
    close(rows, directions.flip(1), 1e-6)


def test_one_direction_of_positive_features_is_eigencam():
    model, images = nets.lively(nets.Mixed(5)), zoo.normal(2, 3, 8, 10)
    one = DeepFeatureFactorization(model, "features", n_factors=1, upsample=False).attribute(images)
    close(one, EigenCAM(model, "features", upsample=False).attribute(images), 1e-6)


def test_images_are_factorised_alone_by_attribute_and_together_by_factorize():
    model, images = nets.lively(nets.Mixed(6)), zoo.normal(3, 3, 8, 8)
    explainer = DeepFeatureFactorization(model, "features", n_factors=2, factor=1, upsample=False)
    together = explainer.attribute(images)
    close(together[1:2], explainer.attribute(images[1:2]), 1e-9)
    with cases.untouched(model, images):
        maps, directions = explainer.factorize(images)
    features = model.features(images).detach()
    rows = features.permute(0, 2, 3, 1).reshape(1, 48, 6)
    shares, wanted = factors(rows, 2, 50)
    close(directions, wanted[0])
    close(maps, shares[0].view(3, 4, 4, 2).permute(0, 3, 1, 2))
    again = torch.einsum("nkhw,kd->ndhw", maps, directions)
    assert float((again - features).norm()) < 0.6 * float(features.norm())


def test_the_numbers_are_checked():
    for name, value, said in [
        ("n_factors", 0, "n_factors: must be a positive integer, got 0"),
        ("n_iter", True, "n_iter: must be a positive integer, got True"),
        ("factor", 4, "factor: must be below n_factors=4, got 4"),
    ]:
        with pytest.raises(OptionError, match=said):
            DeepFeatureFactorization(nets.Mixed(), "features", **{name: value})
    few = DeepFeatureFactorization(nets.Mixed(), "features", n_factors=17)
    with pytest.raises(OptionError, match="n_factors: must be at most 16, the number of cells, got 17"):
        few.attribute(torch.rand(1, 3, 8, 8))
