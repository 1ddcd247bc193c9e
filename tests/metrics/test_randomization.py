"""Similarities of maps against brute force, and what randomising a model does to maps that read it, or do not."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attrib_zoo import TTAME, GradCAM, synthetic
from attrib_zoo.errors import BackboneMismatchError, InputError, LayerNotFoundError, OptionError
from attrib_zoo.metrics import (
    hog_similarity,
    model_randomization,
    randomization_order,
    repeatability,
    spearman,
    spearman_absolute,
    ssim,
)

ALL = (spearman, spearman_absolute, ssim, hog_similarity)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


# ---------------------------------------------------------------------------- similarities


def ranks_by_hand(values: np.ndarray) -> list[float]:
    return [np.mean([i for i, other in enumerate(sorted(values)) if other == value]) for value in values]


def ssim_by_hand(a: np.ndarray, b: np.ndarray, side: int) -> float:
    a, b = ((m - m.min()) / (m.max() - m.min()) for m in (a, b))
    found = []
    for row in range(a.shape[0] - side + 1):
        for column in range(a.shape[1] - side + 1):
            p, q = (m[row : row + side, column : column + side].ravel() for m in (a, b))
            covariance = np.cov(p, q)
            top = (2 * p.mean() * q.mean() + 1e-4) * (2 * covariance[0, 1] + 9e-4)
            found.append(top / ((p.mean() ** 2 + q.mean() ** 2 + 1e-4) * (covariance[0, 0] + covariance[1, 1] + 9e-4)))
    return float(np.mean(found))


def hog_by_hand(m: np.ndarray) -> np.ndarray:
    height, width = m.shape
    out = []
    for top in range(0, height - 7, 8):
        for left in range(0, width - 7, 8):
            histogram = np.zeros(9)
            for i in range(top, top + 8):
                for j in range(left, left + 8):
                    down = m[i + 1, j] - m[i - 1, j] if 0 < i < height - 1 else 0.0
                    across = m[i, j + 1] - m[i, j - 1] if 0 < j < width - 1 else 0.0
                    angle = math.degrees(math.atan2(down, across)) % 180
                    histogram[int(angle // 20)] += math.hypot(down, across)
            out.append(histogram / np.linalg.norm(histogram))
    return np.concatenate(out)


def test_similarities_by_hand() -> None:
    maps = torch.stack([draw(0, 19, 26), draw(1, 19, 26).round()])
    others = torch.stack([maps[0] + draw(2, 19, 26), (maps[1] + draw(3, 19, 26)).round()])
    for a, b, rho, rho_abs, structure, hog in zip(maps, others, *(f(maps, others) for f in ALL), strict=True):
        x, y = a.numpy(), b.numpy()
        assert rho.item() == pytest.approx(np.corrcoef(*map(ranks_by_hand, (x.ravel(), y.ravel())))[0, 1])
        assert rho_abs.item() == pytest.approx(np.corrcoef(*map(ranks_by_hand, map(abs, (x.ravel(), y.ravel()))))[0, 1])
        assert structure.item() == pytest.approx(ssim_by_hand(x, y, 7))
        assert hog.item() == pytest.approx(np.corrcoef(hog_by_hand(x), hog_by_hand(y))[0, 1])
        assert 0.1 < rho < 0.99
    small = ssim(maps[:1, :4, :9], others[:1, :4, :9])
    assert small.item() == pytest.approx(ssim_by_hand(*(m[0, :4, :9].numpy() for m in (maps, others)), 3))
    stats = pytest.importorskip("scipy.stats")
    assert spearman(maps, others)[1].item() == pytest.approx(stats.spearmanr(maps[1].ravel(), others[1].ravel())[0])


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000))
def test_similarity_properties(seed: int) -> None:
    a, b = draw(seed, 3, 12, 17), draw(seed + 1, 3, 12, 17)
    for similarity in ALL:
        assert similarity(a, a).tolist() == [1.0] * 3
        torch.testing.assert_close(similarity(a, b), similarity(b, a))
        alone = [similarity(a[i : i + 1], b[i : i + 1]) for i in range(3)]
        torch.testing.assert_close(similarity(a, b), torch.cat(alone))
        torch.testing.assert_close(similarity(7 * a, b), similarity(a, b))
        assert (similarity(a, b).abs() < 1).all()
    torch.testing.assert_close(spearman(a.exp(), b), spearman(a, b))
    torch.testing.assert_close(spearman(-a, b), -spearman(a, b))
    torch.testing.assert_close(spearman_absolute(-a, b), spearman_absolute(a, b))
    torch.testing.assert_close(ssim(a - 9, b), ssim(a, b))


def test_maps_without_structure_are_like_themselves_alone() -> None:
    flat, other = torch.ones(1, 9, 9), draw(1, 1, 9, 9)
    for similarity in ALL:
        assert similarity(flat, flat).item() == 1.0
        assert similarity(flat, other).abs().item() < 0.02
        other[0, 0, 0] = math.nan
        assert similarity(other, other).isnan().all()
        other[0, 0, 0] = 0.0
    with pytest.raises(InputError, match=r"two maps must have one size to be compared, got \(9, 9\) and \(8, 8\)"):
        ssim(flat, torch.ones(1, 8, 8))


# ---------------------------------------------------------------------------- randomisation


def saliency(model: nn.Module, seed: int) -> Any:
    del seed

    def explain(inputs: Tensor, target: Any) -> Tensor:
        leaf = inputs.detach().requires_grad_()
        scores = model(leaf).gather(1, torch.as_tensor(target).expand(len(inputs))[:, None]).sum()
        return torch.autograd.grad(scores, leaf)[0].mean(1)

    return explain


def edges(model: nn.Module, seed: int) -> Any:
    return lambda inputs, target: inputs.mean(1).diff(dim=-1)


def features(model: nn.Module, seed: int) -> Any:
    """Reads the model up to its stages, never its head: as a trained explainer with its own weights."""
    return lambda inputs, target: model.stages(model.stem(inputs)).detach()[:, :8].mean(1)


def noisy(model: nn.Module, seed: int) -> Any:
    """As a refit: its own chance on top of what it reads."""
    own = draw(seed, 1, 32, 32)
    return lambda inputs, target: saliency(model, seed)(inputs, target) * 200 + own.float()


@pytest.fixture(scope="module")
def data() -> synthetic.Scenes:
    return synthetic.scenes(3, seed=4)


def test_the_order_is_that_of_the_run_backwards(data: synthetic.Scenes) -> None:
    cnn = [f"stages.{stage}.{layer}.0" for stage in (2, 1) for layer in (2, 1)]
    cnn = ["head", *cnn, "stages.0.1.0", "stages.0.0.0", "stem.0"]
    assert randomization_order(synthetic.tiny_cnn(), data.inputs) == cnn
    block = [f"blocks.0.{name}" for name in ("mlp.2", "mlp.0", "attn.proj", "attn.qkv")]
    vit = ["head", *block, "patch_embed", ""]
    assert randomization_order(synthetic.tiny_vit(depth=1), data.inputs) == vit

    class Backwards(nn.Module):  # registered against its order; torch's attention, whose output layer never runs itself
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(8, 4)
            self.scale = nn.Parameter(torch.ones(8, 1, 1))
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.first = nn.Conv2d(3, 8, 8, 8)

        def forward(self, inputs: Tensor) -> Tensor:
            tokens = (self.first(inputs) * self.scale).flatten(2).mT
            return self.last(self.attention(tokens, tokens, tokens)[0].mean(1))

    order = randomization_order(Backwards(), data.inputs)
    assert order == ["last", "attention.out_proj", "attention", "first"]


@pytest.mark.parametrize("build", [synthetic.tiny_cnn, synthetic.tiny_vit])
def test_layers_are_randomised_one_after_the_other(build: Any, data: synthetic.Scenes) -> None:
    model = build()
    for value in model.parameters():
        value.data.add_(0.01)  # as if trained
    kept = copy.deepcopy(model.state_dict())
    states = []

    def spy(found: nn.Module, seed: int) -> Any:
        states.append(copy.deepcopy(found.state_dict()))
        return saliency(found, seed)

    state = torch.get_rng_state()
    result = model_randomization(model, data.inputs, spy, 1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert list(result.layers) == randomization_order(model, data.inputs)
    assert len(states) == len(result.layers) + 1
    for name, before, after in zip(result.layers, states[:-1], states[1:], strict=True):
        changed = {key for key in kept if not torch.equal(before[key], after[key])}
        assert changed
        assert {key.rpartition(".")[0] for key in changed} == {name}
    drawn = [value for key, value in states[-1].items() if key.endswith("qkv.weight") or "stages.2.1.0" in key]
    assert len({tuple(value.flatten()[:4].tolist()) for value in drawn}) == len(drawn)  # each layer its own seed
    again = model_randomization(model, data.inputs, saliency, 1)
    assert all(torch.equal(value, again.similarity[name]) for name, value in result.similarity.items())
    other = model_randomization(model, data.inputs, saliency, 1, seed=1)
    assert not torch.equal(other.similarity["spearman"], again.similarity["spearman"])


def test_what_reads_the_model_changes_and_what_does_not_stays(data: synthetic.Scenes) -> None:
    model = synthetic.trained("cnn")
    target = data.labels[:, 0]
    layers = ["head", "stages.2", "stages.1", "stages.0", "stem"]
    cam = model_randomization(model, data.inputs, lambda m, seed: GradCAM(m).attribute, target, layers=layers)
    assert cam.similarity["spearman"].shape == (5, 3)
    assert cam.similarity["spearman"][-1].mean() < 0.6
    assert cam.unseen == ()
    assert cam.floor is None
    blind = model_randomization(model, data.inputs, edges, target, layers=layers)
    assert blind.unseen == tuple(layers)
    assert all((curve == 1).all() for curve in blind.similarity.values())
    kept = model_randomization(model, data.inputs, features, target, layers=layers)
    assert kept.unseen == ("head",)
    assert kept.similarity["ssim"][0].tolist() == [1.0] * 3
    assert kept.similarity["ssim"][1:].max() < 1


def test_what_reads_the_head_alone_does_not_see_the_rest(data: synthetic.Scenes) -> None:
    def head(model: nn.Module, seed: int) -> Any:
        weight = model.get_submodule("head").weight.detach().clone()
        return lambda inputs, target: inputs.mean(1, keepdim=True).pow(1 + weight.abs().sum())

    layers = ["head", "stages.2", "stem"]
    result = model_randomization(synthetic.tiny_cnn(), data.inputs.abs(), head, 1, layers=layers)
    assert result.unseen == ("stages.2", "stem"), "what changes is seen against the step before, not the first maps"
    assert result.similarity["ssim"].max() < 1


def test_tokens_are_drawn_as_at_the_beginning(data: synthetic.Scenes) -> None:
    model, given = synthetic.tiny_vit(), []

    def remember(found: nn.Module, seed: int) -> Any:
        given.append(found)
        return edges(found, seed)

    model.table = nn.Parameter(torch.zeros(30, 20))
    model.scale, model.scales = nn.Parameter(torch.zeros(16)), nn.Parameter(torch.zeros(16, 1))
    tokens = dict(model.named_parameters(recurse=False))
    assert len(tokens) > 3
    with torch.no_grad():
        for value in tokens.values():
            value.fill_(3.0)
    model_randomization(model, data.inputs, remember, 1, layers=[""])
    for name, value in given[-1].named_parameters(recurse=False):
        if name in ("scale", "scales"):
            assert value.eq(3.0).all(), "the scale of a channel is kept, like that of a normalisation"
            continue
        assert value.abs().max() < 0.2, name
        if value.numel() > 500:
            assert value.std().item() == pytest.approx(0.02, rel=0.1), name
        assert tokens[name].eq(3.0).all(), "the model itself keeps its own"


def test_a_refit_stands_beside_its_floor(data: synthetic.Scenes) -> None:
    model = synthetic.tiny_cnn()
    result = model_randomization(model, data.inputs, noisy, 0, refit=True, layers=["head"])
    assert result.floor is not None
    maps = [noisy(model, seed)(data.inputs, 0) for seed in (0, 1)]
    torch.testing.assert_close(result.floor["spearman"], spearman(*maps))
    assert result.floor["spearman"].max() < 0.99
    found = repeatability(model, data.inputs, noisy, 0, seeds=(0, 1, 5))
    third = noisy(model, 5)(data.inputs, 0)
    by_hand = (spearman(*maps) + spearman(maps[0], third) + spearman(maps[1], third)) / 3
    torch.testing.assert_close(found["spearman"], by_hand)
    assert repeatability(model, data.inputs, saliency, 0)["hog"].tolist() == [1.0] * 3


def test_the_target_stays_that_of_the_model_as_it_was(data: synthetic.Scenes) -> None:
    model, asked = synthetic.tiny_cnn(), []
    decision = model(data.inputs).argmax(1)

    def spy(found: nn.Module, seed: int) -> Any:
        def explain(inputs: Tensor, target: Any) -> Tensor:
            asked.append(target)
            return inputs

        return explain

    model_randomization(model, data.inputs, spy, layers=["head", "stem"])
    assert len(asked) == 3
    assert all(torch.equal(target, decision) for target in asked)


def test_what_cannot_be_randomised(data: synthetic.Scenes) -> None:
    model = synthetic.tiny_cnn()
    with pytest.raises(LayerNotFoundError, match="layers: no layer 'fc' in TinyCNN"):
        model_randomization(model, data.inputs, saliency, 0, layers=["fc"])
    with pytest.raises(OptionError, match=r"layers: 'stem.1' has no weights to randomise"):
        model_randomization(model, data.inputs, saliency, 0, layers=["stem.1"])
    for seeds in ((), (1,), (1, 1)):
        with pytest.raises(OptionError, match="seeds: must be two or more different ones"):
            repeatability(model, data.inputs, saliency, 0, seeds=seeds)
    with pytest.raises(InputError, match="inputs: must be floating-point images"):
        model_randomization(model, data.inputs[0], saliency, 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TTAME. class")  # a random head decides for few classes
def test_a_trained_explainer_sees_the_head_only_when_it_is_fitted_afresh() -> None:
    model, data = synthetic.trained("cnn"), synthetic.scenes(12, seed=4)
    loader = synthetic.scenes(256, seed=1).loader()

    def fit(found: nn.Module, seed: int) -> Any:
        return TTAME(found).fit(loader, epochs=8, seed=seed, show_progress=False).attribute

    fitted = TTAME(model).fit(loader, epochs=8, show_progress=False)

    def keep(found: nn.Module, seed: int) -> Any:
        other = copy.deepcopy(fitted)
        state = found.state_dict()
        other.model.load_state_dict(state)
        return other.attribute

    target = data.labels[:, 0]
    with pytest.raises(BackboneMismatchError, match="fitted for other weights"):  # not a silent similarity of 1
        model_randomization(model, data.inputs, keep, target, layers=["head"])
    again = model_randomization(model, data.inputs, fit, target, layers=["head"], refit=True)
    assert again.unseen == ()
    assert again.floor is not None
    assert again.similarity["spearman"].mean() < again.floor["spearman"].mean() - 0.2
