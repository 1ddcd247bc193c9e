"""Grad-CAM++, HiResCAM, LayerCAM and XGrad-CAM against loops written from the papers, and against each other."""

from __future__ import annotations

import warnings

import cam_cases as nets
import engine_cases as cases
import numpy as np
import pytest
import strategies as zoo
import torch
import torch.nn.functional as F
from cam_cases import close
from captum.attr import LayerGradientXActivation
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attrib_zoo import GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, XGradCAM
from attrib_zoo.errors import OptionError, UnsupportedModelError
from attrib_zoo.methods.bases import gradient_cam as _cam

# ---------------------------------------------------------------------- the formulas, number by number


def cells(maps):
    return [(k, i, j) for k in range(maps.shape[0]) for i in range(maps.shape[1]) for j in range(maps.shape[2])]


def weighted(maps, weights, relu=True):
    heat = torch.zeros(maps.shape[1:], dtype=maps.dtype)
    for k, i, j in cells(maps):
        heat[i, j] += weights[k] * maps[k, i, j]
    return heat.clamp(min=0) if relu else heat


def plus_plus(maps, slopes, *, local=False):
    """Eq. 19 of the paper as it is printed, without the exponential's factors."""
    weights = [0.0] * len(maps)
    for k, i, j in cells(maps):
        g = slopes[k, i, j].item()
        if g == 0:
            continue
        if local:
            third = sum(maps[k, a, b].item() * slopes[k, a, b].item() ** 3 for _, a, b in cells(maps[:1]))
        else:
            third = sum(maps[k, a, b].item() for _, a, b in cells(maps[:1])) * g**3
        under = 2 * g**2 + third
        if under > 0:
            weights[k] += g**2 / under * max(g, 0)
    return weighted(maps, weights)


def hires(maps, slopes):
    heat = torch.zeros(maps.shape[1:], dtype=maps.dtype)
    for k, i, j in cells(maps):
        heat[i, j] += slopes[k, i, j] * maps[k, i, j]
    return heat


def layer(maps, slopes):
    heat = torch.zeros(maps.shape[1:], dtype=maps.dtype)
    for k, i, j in cells(maps):
        heat[i, j] += max(slopes[k, i, j].item(), 0) * maps[k, i, j]
    return heat.clamp(min=0)


def xgrad(maps, slopes, *, absolute=False):
    weights = []
    for one, slope in zip(maps, slopes, strict=True):
        values = one.flatten().tolist()
        total = sum(abs(v) for v in values) if absolute else sum(values)
        share = sum(a * g for a, g in zip(values, slope.flatten().tolist(), strict=True))
        weights.append(share / total if total else 0.0)
    return weighted(maps, weights)


FORMULAS = {
    "++": (GradCAMPlusPlus, {}, plus_plus),
    "++ local": (GradCAMPlusPlus, {"alpha": "local"}, lambda a, g: plus_plus(a, g, local=True)),
    "hires": (HiResCAM, {}, hires),
    "layer": (LayerCAM, {}, layer),
    "xgrad": (XGradCAM, {}, xgrad),
    "xgrad abs": (XGradCAM, {"denominator": "abs"}, lambda a, g: xgrad(a, g, absolute=True)),
}
each = pytest.mark.parametrize(("cls", "options", "formula"), FORMULAS.values(), ids=FORMULAS)


@each
@settings(max_examples=5)
@given(st.integers(1, 5), st.integers(4, 9), st.integers(4, 9), zoo.SEEDS)
def test_the_formula_by_loops(cls, options, formula, width, height, length, seed):
    model = nets.lively(nets.Mixed(width), seed)
    images, targets = zoo.normal(2, 3, height, length, seed=seed), [seed % 4, 1]
    maps, slopes = nets.by_autograd(model, images, targets)
    wanted = torch.stack([formula(a, g) for a, g in zip(maps, slopes, strict=True)]).unsqueeze(1)
    found = cls(model, "features", upsample=False, **options).attribute(images, targets)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@each
def test_the_formula_on_signed_features(cls, options, formula):
    """Tanh features: sums of both signs, denominators of both signs."""
    model = nets.lively(nets.Mixed(6, activation=nn.Tanh))
    images, targets = zoo.normal(3, 3, 7, 8), [0, 2, 1]
    maps, slopes = nets.by_autograd(model, images, targets)
    assert (maps.sum((2, 3)) < 0).any()
    explainer = cls(model, "features", upsample=False, **options)
    if cls.nonnegative and "denominator" not in options:
        with pytest.warns(UserWarning, match=f"{cls.__name__}: derived for features that are nowhere negative") as said:
            found = explainer.attribute(images, targets)
        assert [w.filename for w in said] == [__file__]
    else:
        found = explainer.attribute(images, targets)
    wanted = torch.stack([formula(a, g) for a, g in zip(maps, slopes, strict=True)]).unsqueeze(1)
    close(found, wanted)


def test_plus_plus_by_hand():
    """One feature map of 2x2 cells: A = (1, 2; 3, 4), gradient = (.5, -1; 0, 2)."""
    maps = torch.tensor([[[[1.0, 2], [3, 4]]]], dtype=torch.float64)
    slopes = torch.tensor([[[[0.5, -1], [0, 2]]]], dtype=torch.float64)
    weight = 0.5 / (2 + 10 * 0.5) + 2 / (2 + 10 * 2)
    found = GradCAMPlusPlus(nets.Pooled()).combine(maps, slopes)
    close(found, weight * maps[:, 0])
    third = 1 * 0.5**3 - 2 * 1**3 + 4 * 2**3
    weight = 0.5**2 / (2 * 0.5**2 + third) * 0.5 + 2**2 / (2 * 2**2 + third) * 2
    close(GradCAMPlusPlus(nets.Pooled(), alpha="local").combine(maps, slopes), weight * maps[:, 0])


@pytest.mark.parametrize("alpha", ["paper", "local"])
@pytest.mark.parametrize("size", [1e-9, 1e-3, 1e3])
def test_plus_plus_at_any_size_of_the_gradient(alpha, size):
    """No small constant beside g²: float32 and float64 agree for gradients of 1e-9 too, where g³ has no float32."""
    model = nets.Pooled()
    maps, slopes = zoo.normal(2, 3, 4, 4).abs(), size * zoo.normal(2, 3, 4, 4, seed=1)
    explainer = GradCAMPlusPlus(model, alpha=alpha)
    wanted = torch.stack([plus_plus(a, g, local=alpha == "local") for a, g in zip(maps, slopes, strict=True)])
    close(explainer.combine(maps, slopes).relu(), wanted)
    close(explainer.combine(maps.float(), slopes.float()).relu().double(), wanted, 1e-5)


@pytest.mark.parametrize("alpha", ["paper", "local"])
def test_plus_plus_of_no_gradient_is_zero(alpha):
    maps = zoo.normal(2, 3, 4, 4).abs()
    assert not GradCAMPlusPlus(nets.Pooled(), alpha=alpha).combine(maps, 0 * maps).any()


def test_plus_plus_does_not_overflow_at_large_logits():
    model = nets.lively(nets.Mixed()).float()
    with torch.no_grad():
        model.head.bias.fill_(200)
    found = GradCAMPlusPlus(model, "features").attribute(zoo.normal(2, 3, 8, 8).float(), 1)
    assert found.isfinite().all()
    assert found.any()


# ---------------------------------------------------------------------- against each other and other libraries


def test_behind_mean_pooling_they_agree():
    model, images, targets = nets.lively(nets.Pooled()), zoo.normal(3, 3, 8, 10), [0, 3, 1]
    maps = model.features(images).detach()
    wanted = torch.einsum("nd,ndhw->nhw", model.head.weight.detach()[targets], maps).unsqueeze(1) / maps[0, 0].numel()
    for cls in (GradCAM, HiResCAM, XGradCAM):
        close(cls(model, "features", relu=False, upsample=False).attribute(images, targets), wanted)
    both = [GradCAMPlusPlus(model, "features", alpha=a).attribute(images, targets) for a in ("paper", "local")]
    close(*both)


@pytest.mark.parametrize(("build", "name"), [(cases.resnet, "layer3"), (lambda: nets.lively(nets.Mixed()), "features")])
def test_hirescam_is_captums_layer_gradient_times_activation(build, name):
    model, images, targets = build().double(), zoo.normal(2, 3, 32, 32), [1, 3]
    twin = cases.out_of_place(model)
    captum = LayerGradientXActivation(twin, twin.get_submodule(name)).attribute(images, target=targets)
    wanted = captum.sum(1, keepdim=True).detach()
    close(HiResCAM(model, name, upsample=False).attribute(images, targets), wanted)
    close(HiResCAM(model, name, upsample=False, relu=True).attribute(images, targets), wanted.clamp(min=0))


def test_hirescam_sums_to_the_logit_where_all_behind_is_linear():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).double()
    images = zoo.normal(3, 3, 8, 8)
    for target in range(5):
        heat = HiResCAM(model, "1", upsample=False).attribute(images, target)
        close(heat.sum((1, 2, 3)), (model(images)[:, target] - model[3].bias[target]).detach())


def test_layercam_is_hirescam_where_no_gradient_is_negative():
    model = nets.lively(nets.Pooled())
    with torch.no_grad():
        model.head.weight.abs_()
    images = zoo.normal(2, 3, 8, 8)
    close(LayerCAM(model, "features").attribute(images, 1), HiResCAM(model, "features", relu=True).attribute(images, 1))


def test_grad_cam_the_package_agrees_where_it_follows_the_papers():
    peers = pytest.importorskip("pytorch_grad_cam")
    model, images, targets = nets.lively(nets.Mixed()), zoo.normal(2, 3, 8, 8), [0, 2]
    maps, slopes = nets.by_autograd(model, images, targets)
    for cls in (HiResCAM, LayerCAM, XGradCAM):
        peer = getattr(peers, cls.__name__)(model=model, target_layers=[model.features])
        wanted = peer.get_cam_image(images, model.features, targets, maps.numpy(), slopes.numpy(), False)
        found = cls(model, "features", upsample=False).attribute(images, targets)
        close(found[:, 0].relu(), torch.from_numpy(np.maximum(wanted, 0)), 1e-6)  # they add 1e-7 to a denominator


# ---------------------------------------------------------------------- several layers


@pytest.mark.parametrize("gamma", [2.0, 0.5])
def test_layercam_fuses_layers_by_the_largest_scaled_value(gamma):
    model, images, targets = cases.resnet().double(), zoo.normal(2, 3, 64, 48), [1, 3]
    names = ["layer2", "layer3", "layer4"]
    grown, sizes = [], []
    for name in names:
        heat = LayerCAM(model, name, upsample=False).attribute(images, targets)
        sizes.append(tuple(heat.shape[-2:]))
        for n in range(2):
            heat[n] = torch.tanh(gamma * heat[n] / heat[n].max())
        grown.append(F.interpolate(heat, size=(64, 48), mode="bilinear", align_corners=False))
    assert len(set(sizes)) == 2
    wanted = torch.maximum(torch.maximum(grown[0], grown[1]), grown[2])
    found = LayerCAM(model, names[::-1], gamma=gamma).attribute(images, targets)
    close(found, wanted.expand(2, 3, 64, 48))
    many = LayerCAM(model, names, gamma=gamma).attribute_many(images, [[1, 0], [3, 3]])
    close(many[:, 0], found)


def test_layercam_of_several_layers_without_evidence_is_zero():
    model, images = nets.lively(nets.Mixed()), zoo.normal(2, 3, 8, 8)
    with torch.no_grad():
        model.head.weight[1] = 0
    with pytest.warns(UserWarning, match="exactly zero"):
        found = LayerCAM(model, ["features.0", "features"]).attribute(images, 1)
    assert not found.any()


# ---------------------------------------------------------------------- where XGrad-CAM is defined


def test_xgradcam_refuses_layers_that_are_signed_by_construction():
    images = cases.images(2)
    words = r"XGradCAM: needs a layer whose features are nowhere negative, got .*; use HiResCAM or LayerCAM, or denom"
    for model, size in ((cases.vit(), 32), (cases.swin(), 16)):
        with cases.untouched(model), pytest.raises(UnsupportedModelError, match=words):
            XGradCAM(model).attribute(images[..., :size, :size], 1)
        assert XGradCAM(model, denominator="abs").attribute(images[..., :size, :size], 1).any()


def test_xgradcam_of_a_dead_map():
    """A map that is zero everywhere has the weight 0, and spoils nothing."""
    model, images = nets.lively(nets.Mixed(3)), zoo.normal(2, 3, 8, 8)
    with torch.no_grad():
        model.features[0].weight[1] = 0
        model.features[0].bias[1] = -1
    maps, slopes = nets.by_autograd(model, images, [0, 1])
    assert not maps[:, 1].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = XGradCAM(model, "features", upsample=False).attribute(images, [0, 1])
    close(found, torch.stack([xgrad(a, g) for a, g in zip(maps, slopes, strict=True)]).unsqueeze(1))


# ---------------------------------------------------------------------- properties

CLASSES = [GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, XGradCAM]
all_of_them = pytest.mark.parametrize("cls", CLASSES)


@all_of_them
@settings(max_examples=5)
@given(st.permutations(range(5)), zoo.SEEDS)
def test_the_order_of_the_feature_maps_is_irrelevant(cls, order, seed):
    model = nets.lively(nets.Mixed(5), seed)
    images = zoo.normal(2, 3, 8, 6, seed=seed)
    before = cls(model, "features").attribute(images, 2)
    with torch.no_grad():
        model.features[0].weight.copy_(model.features[0].weight[order])
        model.features[0].bias.copy_(model.features[0].bias[order])
        model.mix.weight.copy_(model.mix.weight[:, order])
    torch.testing.assert_close(cls(model, "features").attribute(images, 2), before, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cls", [GradCAM, HiResCAM, LayerCAM, XGradCAM])  # the weights of ++ are not linear
@settings(max_examples=5)
@given(st.floats(1e-3, 1e3), zoo.SEEDS)
def test_a_larger_head_gives_a_larger_map(cls, factor, seed):
    model = nets.lively(nets.Mixed(bias=False), seed)
    images = zoo.normal(2, 3, 8, 6, seed=seed)
    before = cls(model, "features").attribute(images, 2)
    with torch.no_grad():
        model.head.weight.mul_(factor)
    torch.testing.assert_close(cls(model, "features").attribute(images, 2), factor * before, rtol=1e-9, atol=1e-15)


@all_of_them
def test_mirrored_images_give_mirrored_maps_on_a_symmetric_net(cls):
    model = nets.lively(nets.Mixed())
    with torch.no_grad():
        for conv in (model.features[0], model.mix):
            conv.weight.add_(conv.weight.flip(3).clone())
        head = model.head.weight.view(-1, 5, 2, 2)
        head.add_(head.flip(3).clone())
    images = zoo.normal(2, 3, 8, 15)  # an odd width: stride 2 then has a centre
    close(cls(model, "features").attribute(images.flip(3), 1).flip(3), cls(model, "features").attribute(images, 1))


# ---------------------------------------------------------------------- options


def test_options():
    with pytest.raises(OptionError, match=r"alpha: must be one of 'paper', 'local', got 'global'"):
        GradCAMPlusPlus(nets.Mixed(), alpha="global")
    with pytest.raises(OptionError, match=r"gamma: must be a number of at least 1e-06, got 0"):
        LayerCAM(nets.Mixed(), gamma=0)
    with pytest.raises(OptionError, match=r"denominator: must be one of 'sum', 'abs', got 'mean'"):
        XGradCAM(nets.Mixed(), denominator="mean")


def test_a_method_without_a_formula_is_told_what_to_fill():
    class Empty(_cam.GradientCAM):
        pass

    with pytest.raises(NotImplementedError, match="Empty must fill weights, or combine"):
        Empty(nets.lively(nets.Mixed())).attribute(zoo.normal(1, 3, 8, 8), 1)
