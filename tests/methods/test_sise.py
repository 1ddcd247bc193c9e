"""SISE and Ada-SISE against a transcription at full resolution, Otsu against all splits, and the papers' counts."""

from __future__ import annotations

import engine_cases as cases
import numpy as np
import perturbation_cases as passes
import pytest
import strategies as zoo
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from perturbation_cases import LAYERS, Counted, close
from torch import nn

from attrib_zoo import SISE, AdaSISE
from attrib_zoo.errors import OptionError, UnsupportedModelError
from attrib_zoo.methods.bases.blockwise import otsu

# ---------------------------------------------------------------------- the reference


def gradients(model, layers, image, target, probability=True):
    """Of one score at some layers: ``{layer: (D, h, w)}``, by one plain backward pass through an out-of-place copy."""
    twin, kept = cases.out_of_place(model), {}

    def keep(name):
        def hook(_, __, out):
            out.retain_grad()
            kept[name] = out
            return out.clone()

        return hook

    for name in layers:
        twin.get_submodule(name).register_forward_hook(keep(name))
    out = twin(image[None].clone().requires_grad_())[0]
    (out.softmax(0) if probability else out)[target].backward()
    return {name: out.grad[0].numpy() for name, out in kept.items()}


def best_split(levels, best):
    """The first of the splits of 256 levels whose variance between the two sides is largest, and above ``best``."""
    split = None
    for j in range(1, 256):
        below, above = levels[levels < j], levels[levels >= j]
        if len(below) and len(above):
            between = len(below) * len(above) * (below.mean() - above.mean()) ** 2
            if between > best * (1 + 1e-12):
                best, split = between, j
    return split


def otsu_of_all_splits(values, scale=1.0):
    """Of a map in [0, 1], rounded to levels; raised by ``scale`` where a tenth of the pixels stays below."""
    levels = np.minimum(np.round(np.asarray(values).ravel() * 256), 255)
    split = best_split(levels, -1.0)
    if split is None:
        return None
    raised = split * scale
    return (raised if (levels >= np.round(raised)).sum() < 0.1 * len(levels) else split) / 256


def otsu_of_ratios(ratios):
    """The same for numbers in (0, 1]: 256 bins, each its lower edge."""
    return (best_split(np.minimum(np.floor(np.asarray(ratios) * 256), 255), 0.0) or 1) / 256


def sise_at_full_resolution(
    model, layers, image, target, chosen, *, kind="hard", scale=1.0, temperature=100.0, hidden=0.0, counted=None
):
    """``chosen(ratios)`` gives the maps that are masks; every mask is made and kept."""
    size, total = image.shape[1:], None
    slopes = gradients(model, layers, image, target)
    for layer in layers:
        alpha, maps = slopes[layer].mean((1, 2)), passes.features(model, layer, image)
        if alpha.max() <= 0:
            continue
        visible = np.zeros(size)
        for k in np.flatnonzero(chosen(alpha / alpha.max())):
            mask = passes.stretch(passes.enlarge(maps[k], size))
            if mask.sum() > 0:
                visible += passes.score_of(model, passes.show(image, mask, hidden), target) * mask / mask.sum()
                if counted is not None:
                    counted.append((layer, k))
        visible = passes.stretch(visible)
        if total is None:
            total = visible
            continue
        if kind == "simple":
            total = (total + visible) * visible
        else:
            limit = otsu_of_all_splits(visible, scale)
            if kind == "hard":
                total = (total + visible) * (visible > limit)
            else:
                total = (total + visible) / (1 + np.exp(-temperature * (visible - limit)))
    return total


def above(limit):
    return lambda ratios: ratios > limit


def adaptive(ratios):
    return ratios > otsu_of_ratios(ratios[ratios > 0])


@pytest.fixture
def model():
    return zoo.small_cnn().double()


@pytest.fixture
def images():
    return zoo.batch(3, dtype=torch.float64)


# ---------------------------------------------------------------------- the papers' numbers


@pytest.mark.parametrize(
    ("build", "names", "count"),
    [
        (passes.resnet50, "relu layer1 layer2 layer3 layer4", 3904),
        (passes.vgg16, "features.4 features.9 features.16 features.23 features.30", 1472),
    ],
)
def test_the_feature_maps_that_the_paper_counts(build, names, count):
    taps = SISE(build()).taps(torch.randn(1, 3, passes.SIZE, passes.SIZE))
    assert [tap.name for tap in taps] == names.split()
    assert sum(tap.channels for tap in taps) == count


# ---------------------------------------------------------------------- the formula


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, {}),
        ({"mu": 0.4}, {"chosen": above(0.4)}),
        ({"fusion": "soft"}, {"kind": "soft", "scale": 1.5}),
        ({"fusion": "soft", "temperature": 7.0, "otsu_scale": 1.0}, {"kind": "soft", "temperature": 7.0}),
        ({"fusion": "hard", "otsu_scale": 1.5}, {"scale": 1.5}),
        ({"fusion": "simple"}, {"kind": "simple"}),
        ({"baseline": 0.4}, {"hidden": 0.4}),
    ],
    ids=["paper", "mu", "authors", "soft", "raised", "simple", "baseline"],
)
def test_sise_against_a_transcription(model, images, options, told):
    with torch.no_grad():  # a dead map in the middle
        model.stages[1][1].weight[3], model.stages[1][1].bias[3] = 0, 0.4
    found = SISE(model, LAYERS, **options).attribute(images, [1, 4, 0])
    assert found.std() > 0
    for n, target in enumerate([1, 4, 0]):
        wanted = sise_at_full_resolution(model, LAYERS, images[n], target, **{"chosen": above(0), **told})
        close(found[n, 0], wanted)


def test_ada_sise_against_a_transcription(model, images):
    found = AdaSISE(model, LAYERS).attribute(images, [1, 4, 0])
    counted = []
    for n, target in enumerate([1, 4, 0]):
        close(found[n, 0], sise_at_full_resolution(model, LAYERS, images[n], target, adaptive, counted=counted))
    assert {layer for layer, _ in counted} == set(LAYERS)


def test_real_blocks():
    model, images = cases.resnet().double(), zoo.normal(1, 3, 64, 48)
    names = ["relu", "layer1", "layer2", "layer4"]
    found = SISE(model, names).attribute(images, 2)
    close(found[0, 0], sise_at_full_resolution(model, names, images[0], 2, above(0)), 1e-8)


# ---------------------------------------------------------------------- Otsu


@settings(max_examples=25)
@given(st.integers(1, 3), st.integers(2, 60), st.sampled_from([1.0, 1.5]), zoo.SEEDS)
def test_otsu_tries_all_splits(count, length, scale, seed):
    maps = zoo.normal(count, length, seed=seed).square()
    maps = (maps - maps.amin(1, keepdim=True)) / (maps.amax(1, keepdim=True) - maps.amin(1, keepdim=True))
    found = otsu(maps, scale)
    for value, row in zip(found.tolist(), maps.numpy(), strict=True):
        assert value == otsu_of_all_splits(row, scale)


@given(st.floats(0, 0.48), st.floats(0.52, 1))
def test_otsu_lies_between_two_levels(low, high):
    maps = torch.tensor([[low] * 5 + [high] * 3], dtype=torch.float64)
    assert low <= otsu(maps)[0] <= high + 1 / 512


# ---------------------------------------------------------------------- selection


def test_passes_are_the_selected_maps(model, images):
    counted = Counted(model)
    for cls, options, chosen in (
        (SISE, {}, above(0)),
        (SISE, {"mu": 0.5}, above(0.5)),
        (AdaSISE, {}, adaptive),
    ):
        explainer = cls(counted, [f"model.{layer}" for layer in LAYERS], chunk_size=5, **options)
        explainer.attribute(images, 4)
        counted.images, selected = 0, []
        explainer.attribute(images, 4)
        for image in images:
            sise_at_full_resolution(model, LAYERS, image, 4, chosen, counted=selected)
        assert counted.images == 3 + len(selected)


def test_several_targets_share_the_passes(model, images):
    counted = Counted(model)
    explainer = SISE(counted)
    wanted = [explainer.attribute(images, target) for target in (0, 3)]
    counted.images = 0
    found = explainer.attribute_many(images, [0, 3, 0, 3])
    for t in range(4):
        close(found[:, t], wanted[t % 2])
    assert counted.images <= 3 + 3 * (4 + 6 + 8)


def ratios_of(explainer, monkeypatch, images, target):
    seen = []
    select = type(explainer).select

    def spy(self, ratios):
        kept = select(self, ratios)
        seen.append((ratios.clone(), kept.clone()))
        return kept

    monkeypatch.setattr(type(explainer), "select", spy)
    explainer.attribute(images, target)
    monkeypatch.undo()
    return seen


def test_a_larger_mu_keeps_fewer_and_at_last_the_largest_only(model, images, monkeypatch):
    kept = [ratios_of(SISE(model, LAYERS, mu=mu), monkeypatch, images, 4) for mu in (0.0, 0.3, 0.7, 1 - 1e-9)]
    for fewer, more in zip(kept[1:], kept, strict=False):
        for (_, small), (_, large) in zip(fewer, more, strict=True):
            assert (small <= large).all()
    for ratios, last in kept[-1]:
        assert torch.equal(last, ratios == 1)
    adaptively = ratios_of(AdaSISE(model, LAYERS), monkeypatch, images, 4)
    for (ratios, few), (_, many) in zip(adaptively, kept[0], strict=True):
        assert (few <= many).all()
        assert few[ratios == 1].all()
    assert sum(int(few.sum()) for _, few in adaptively) < sum(int(many.sum()) for _, many in kept[0])


class Stages(nn.Module):
    """Two stages whose sums are the logits, with a sign for each stage."""

    def __init__(self, signs):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU())
        self.signs = signs

    def forward(self, x):
        one = self.one(x)
        two = self.two(one.detach())
        score = self.signs[0] * one.sum((1, 2, 3)) + self.signs[1] * two.sum((1, 2, 3))
        return torch.stack([score, -score], 1) / 100


def test_a_layer_without_a_positive_gradient_is_left_out():
    images = zoo.normal(2, 3, 16, 16)
    for signs, layers in (((1, -1), ["one"]), ((-1, 1), ["two"]), ((1, 1), ["one", "two"])):
        model = cases.lively(Stages(signs)).double()
        both = SISE(model, ["one", "two"], grad_score="logit").attribute(images, 0)
        close(both, SISE(model, layers, grad_score="logit").attribute(images, 0))
        assert both.std() > 0
    model = cases.lively(Stages((-1, -1))).double()
    with pytest.warns(UserWarning, match="SISE: no layer has a feature map with a positive gradient") as caught:
        assert SISE(model, ["one", "two"]).attribute(images, 0).abs().sum() == 0
    assert len(caught) == 1
    assert caught[0].filename == __file__


# ---------------------------------------------------------------------- properties


@settings(max_examples=5)
@given(st.permutations(range(8)), st.integers(1, 40))
def test_order_chunks_and_company_say_nothing(order, chunk):
    model, images = zoo.small_cnn().double(), zoo.batch(3, dtype=torch.float64)
    wanted = [SISE(model, LAYERS).attribute(images[n : n + 1], n)[0] for n in range(3)]
    passes.reorder_last_stage(model, order)
    close(SISE(model, LAYERS, chunk_size=chunk).attribute(images, [0, 1, 2]), torch.stack(wanted))


# ---------------------------------------------------------------------- models and options


def test_transformers_are_refused_unless_layers_are_named():
    model, images = zoo.small_vit(), zoo.batch(1)
    for cls in (SISE, AdaSISE):
        with pytest.raises(
            UnsupportedModelError, match=f"{cls.__name__} fuses maps of different resolutions.*ScoreCAM"
        ):
            cls(model).attribute(images, 0)
    with pytest.warns(UserWarning, match="SISE: it fuses.*no better than chance"):
        heat = SISE(model, ["blocks.0.norm1", "blocks.1.norm1"]).attribute(images, 0)
    assert heat.std() > 0


def test_a_raised_threshold_above_one_is_told():
    """Levels .7 and .95 of the specification: nothing is left above 1.055."""
    maps = torch.tensor([[0.0] * 30 + [0.7] * 50 + [0.95] * 5 + [1.0]], dtype=torch.float64)
    assert otsu(maps, 1.5)[0] == otsu_of_all_splits(maps.numpy(), 1.5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mu": -0.1}, "mu: must be a number of at least 0 and at most 1, got -0.1"),
        ({"mu": "0"}, "mu: must be a number"),
        ({"fusion": "sum"}, "fusion: must be one of 'hard', 'soft', 'simple', got 'sum'"),
        ({"grad_score": "p"}, "grad_score: must be one of"),
        ({"otsu_scale": 0.5}, "otsu_scale: must be a number of at least 1,"),
        ({"temperature": 0}, "temperature: must be a number above 0,"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(OptionError, match=words):
        SISE(zoo.small_cnn(), **options)


def test_a_feature_map_at_the_limit_is_left_out():
    """Eq. 7 says more than mu; and more than 1 is nothing."""
    select = SISE(zoo.small_cnn(), mu=0.5).select
    assert select(torch.tensor([[0.25, 0.5, 0.75, 1.0]])).tolist() == [[False, False, True, True]]
    assert SISE(zoo.small_cnn()).select(torch.tensor([[-1.0, 0.0, 1e-9]])).tolist() == [[False, False, True]]
    with pytest.raises(OptionError, match=r"mu: must be a number of at least 0 and below 1, got 1.0; no feature map"):
        SISE(zoo.small_cnn(), mu=1.0)


def test_ratios_are_counted_in_the_bin_that_they_lie_in():
    """Ada-SISE's histogram cuts off; rounding would move every second ratio into the next bin, and the threshold."""
    generator = torch.Generator().manual_seed(0)
    explainer, told = AdaSISE(zoo.small_cnn()), 0
    for _ in range(60):
        ratios = torch.rand(9, generator=generator, dtype=torch.float64) ** 2
        ratios[0] = 1.0
        found = explainer.select(ratios.unsqueeze(0))[0]
        assert found.tolist() == adaptive(ratios.numpy()).tolist()
        rounded = (ratios * 256).round().clamp(0, 255) / 256
        told += found.tolist() != adaptive(rounded.numpy()).tolist()
    assert told, "fault of the test: rounding must change some selection"
