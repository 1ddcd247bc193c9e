"""Integrated Grad-CAM and Smooth Grad-CAM++ against loops over their copies, one image and one copy at a time."""

from __future__ import annotations

import cam_cases as nets
import engine_cases as cases
import pytest
import strategies as zoo
import torch
from cam_cases import close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attrib_zoo import GradCAM, GradCAMPlusPlus, IntegratedGradCAM, SmoothGradCAMPlusPlus
from attrib_zoo.errors import LayerError, OptionError
from attrib_zoo.masking import IMAGENET_MEAN, IMAGENET_STD

BLACK = torch.tensor([-m / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)]).double().view(3, 1, 1)


def combined(weights, maps):
    heat = torch.zeros(maps.shape[1:], dtype=maps.dtype)
    for k in range(len(maps)):
        heat += weights[k].item() * maps[k]
    return heat


# ---------------------------------------------------------------------- Integrated Grad-CAM


def integrated(model, image, target, steps, baseline, *, subtract=True, left=False, relu=True):
    origin = model.features(baseline[None]).detach()[0]
    total = 0
    for i in range(steps):
        point = baseline + (image - baseline) * ((i if left else i + 1) / steps)
        (maps,), (slopes,) = nets.by_autograd(model, point[None], [target])
        heat = combined(slopes.mean((1, 2)), maps - origin if subtract else maps)
        total = total + (heat.clamp(min=0) if relu else heat)
    return total / steps


OPTIONS = {
    "default": ({}, {}),
    "as the authors' program": ({"rule": "left", "subtract_baseline": False}, {"subtract": False, "left": True}),
    "signed": ({"relu": False}, {"relu": False}),
}


@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=4)
@given(st.integers(1, 4), st.sampled_from([None, 1, 3]), zoo.SEEDS)
def test_integrated_by_a_loop(name, steps, chunk_size, seed):
    ours, theirs = OPTIONS[name]
    model = nets.lively(nets.Mixed(), seed)
    images, targets = zoo.normal(2, 3, 8, 9, seed=seed), [1, seed % 4]
    black = BLACK.expand(3, 8, 9)
    wanted = torch.stack(
        [integrated(model, x, t, steps, black, **theirs) for x, t in zip(images, targets, strict=True)]
    )
    explainer = IntegratedGradCAM(
        model, "features", n_steps=steps, chunk_size=chunk_size, upsample=False, baseline=BLACK, **ours
    )
    found = explainer.attribute(images, targets)
    torch.testing.assert_close(found[:, 0], wanted, rtol=1e-9, atol=1e-12)


def test_the_baselines():
    model, images = nets.lively(nets.Mixed()), zoo.normal(2, 3, 8, 9)
    own = zoo.normal(2, 3, 8, 9, seed=5)
    for given_, base in (
        ("black", BLACK.expand(2, 3, 8, 9)),
        ("mean", 0 * images),
        (0.5, 0 * images + 0.5),
        (own, own),
    ):
        wanted = torch.stack([integrated(model, x, 1, 3, b) for x, b in zip(images, base, strict=True)])
        explainer = IntegratedGradCAM(model, "features", n_steps=3, baseline=given_, upsample=False)
        close(explainer.attribute(images, 1)[:, 0], wanted, 1e-6 if given_ == "black" else 1e-10)


def test_one_step_is_grad_cam():
    model, images = nets.lively(nets.Mixed()), zoo.normal(2, 3, 8, 9)
    found = IntegratedGradCAM(model, "features", n_steps=1, subtract_baseline=False).attribute(images, [1, 2])
    close(found, GradCAM(model, "features").attribute(images, [1, 2]))


def test_integrated_closed_form_where_all_is_linear():
    """Everything grows with the step: the mean of i/n is (n + 1)/2n, times Grad-CAM of the features' difference."""
    model = nets.lively(nets.Pooled())
    model.features[1] = nn.Identity()
    images = zoo.normal(2, 3, 8, 8)
    rise = (model.features(images) - model.features(0 * images)).detach()
    plain = torch.einsum("d,ndhw->nhw", model.head.weight[2].detach(), rise).clamp(min=0) / rise[0, 0].numel()
    for steps in (1, 4, 10):
        explainer = IntegratedGradCAM(model, "features", n_steps=steps, baseline="mean", upsample=False)
        close(explainer.attribute(images, 2)[:, 0], plain * (steps + 1) / (2 * steps))


def test_more_steps_come_closer_to_the_integral():
    model, images = nets.lively(nets.Mixed()), zoo.normal(2, 3, 8, 9)
    maps = {n: IntegratedGradCAM(model, "features", n_steps=n).attribute(images, 1) for n in (4, 16, 64, 512)}
    errors = [float((maps[n] - maps[512]).abs().max()) for n in (4, 16, 64)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


# ---------------------------------------------------------------------- Smooth Grad-CAM++


def smooth(model, image, target, copies, *, first=False, local=False):
    """The formula over given noisy copies of one image."""
    maps = model.features(image[None]).detach()[0]
    slopes = [nets.by_autograd(model, copy[None], [target])[1][0] for copy in copies]
    d1, d2, d3 = (sum(g**p for g in slopes) / len(slopes) for p in (1, 2, 3))
    weights = torch.zeros(len(maps), dtype=maps.dtype)
    for k in range(len(maps)):
        for i in range(maps.shape[1]):
            for j in range(maps.shape[2]):
                spread = (maps[k] * d3[k]).sum() if local else maps[k].sum() * d3[k, i, j]
                under = 2 * d2[k, i, j] + spread
                if under > 0:
                    weights[k] += (d1 if first else d2)[k, i, j] / under * d1[k, i, j].clamp(min=0)
    return combined(weights, maps).clamp(min=0)


@pytest.mark.parametrize("alpha", ["paper", "local"])
@pytest.mark.parametrize("numerator", ["second", "first"])
@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize("size", [1.0, 1e-7])
def test_smooth_by_a_loop(alpha, numerator, chunk_size, size):
    model = nets.lively(nets.Mixed())
    with torch.no_grad():
        model.head.weight.mul_(size)
    images, targets = zoo.normal(2, 3, 8, 9), [1, 3]
    explainer = SmoothGradCAMPlusPlus(
        model, "features", n_samples=4, alpha=alpha, numerator=numerator, chunk_size=chunk_size, upsample=False
    )
    noise = explainer._noise(torch.arange(4), images[:1])
    wanted = []
    for x, target in zip(images, targets, strict=True):
        copies = x + 0.15 * (x.max() - x.min()) * noise
        wanted.append(smooth(model, x, target, copies, first=numerator == "first", local=alpha == "local"))
    close(explainer.attribute(images, targets)[:, 0], torch.stack(wanted))


def test_the_noise_is_standard_normal_seeded_and_its_own():
    model, images = nets.lively(nets.Mixed()), zoo.normal(1, 3, 64, 64)
    noise = SmoothGradCAMPlusPlus(model)._noise(torch.arange(25), images)
    assert noise.shape == (25, 3, 64, 64)
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 1) < 0.01
    assert abs(float((noise[0] * noise[1]).mean())) < 0.03
    torch.testing.assert_close(SmoothGradCAMPlusPlus(model)._noise(torch.tensor([7, 2]), images), noise[[7, 2]])
    first, again, other = (
        SmoothGradCAMPlusPlus(model, "features", n_samples=2, seed=seed).attribute(images[..., :8, :8], 1)
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 1e-3 * first.abs().max()


def test_without_noise_it_is_grad_cam_plus_plus():
    model, images = cases.resnet().double(), zoo.normal(2, 3, 48, 64)
    for layers in ("layer3", ["layer2", "layer4"]):
        for alpha in ("paper", "local"):
            found = SmoothGradCAMPlusPlus(model, layers, noise=0.0, n_samples=2, alpha=alpha).attribute(images, [1, 3])
            close(found, GradCAMPlusPlus(model, layers, alpha=alpha).attribute(images, [1, 3]))


def test_several_targets_share_the_copies():
    model, images = nets.lively(nets.Mixed()), zoo.normal(2, 3, 8, 9)
    for explainer in (
        SmoothGradCAMPlusPlus(model, "features", n_samples=3),
        IntegratedGradCAM(model, "features", n_steps=3),
    ):
        explainer.taps(images)  # the layer is found, and its grid tested, once
        seen: list[int] = []
        with model.features.register_forward_hook(lambda _, x, __, seen=seen: seen.append(len(x[0]))):
            many = explainer.attribute_many(images, [[1, 0, 3], [2, 2, 1]])
            once = sum(seen)
        close(many[:, 2], explainer.attribute(images, [3, 1]))
        assert once <= 2 * (3 + 2)  # the copies, the clean image, a baseline


# ---------------------------------------------------------------------- what cannot be


def test_features_that_the_score_does_not_read():
    model = nets.lively(nets.Mixed())
    with torch.no_grad():
        model.head.weight[1] = 0
    token = cases.vit(global_pool="token")
    last = f"blocks.{len(token.blocks) - 1}"
    for cls, short in ((SmoothGradCAMPlusPlus, {"n_samples": 2}), (IntegratedGradCAM, {"n_steps": 2})):
        with pytest.warns(UserWarning, match=f"{cls.__name__}: the gradient at 'features' is exactly zero") as said:
            assert not cls(model, "features", **short).attribute(zoo.normal(2, 3, 8, 8), 1).any()
        assert [w.filename for w in said] == [__file__]
    with pytest.raises(LayerError, match="use the first normalisation layer"):
        IntegratedGradCAM(token, last, n_steps=2).attribute(cases.images(1), 1)


def test_options():
    model = nets.Mixed()
    for options, words in (
        ({"n_steps": 0}, r"n_steps: must be a positive integer, got 0"),
        (
            {"baseline": "white"},
            r"baseline: must be 'mean', 'black', 'blur', a finite number .* got 'white'",
        ),
        ({"rule": "middle"}, r"rule: must be one of 'right', 'left', got 'middle'"),
        ({"chunk_size": 0}, r"chunk_size: must be a positive integer or None, got 0"),
    ):
        with pytest.raises(OptionError, match=words):
            IntegratedGradCAM(model, **options)
    for options, words in (
        ({"n_samples": 2.5}, r"n_samples: must be a positive integer, got 2.5"),
        ({"noise": -1}, r"noise: must be a number of at least 0, got -1"),
        ({"seed": "x"}, r"seed: must be an integer, got 'x'"),
    ):
        with pytest.raises(OptionError, match=words):
            SmoothGradCAMPlusPlus(model, **options)
    wrong = IntegratedGradCAM(nets.lively(nets.Mixed()), "features", baseline=torch.zeros(3, 9, 9))
    with pytest.raises(OptionError, match=r"baseline: must broadcast to the inputs \(2, 3, 8, 8\), got"):
        wrong.attribute(zoo.normal(2, 3, 8, 8), 1)
