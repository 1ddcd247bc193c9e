"""Measures against hand-made values and brute force in float64."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import engine_cases as cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attrib_zoo import synthetic
from attrib_zoo.backbone.kind import is_transformer
from attrib_zoo.errors import InputError, OptionError, TargetError
from attrib_zoo.masking import black
from attrib_zoo.metrics import (
    average_drop,
    energy_pointing_game,
    increase_in_confidence,
    masked_confidence,
)
from attrib_zoo.metrics._maps import top_pixels

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


class Probe(nn.Module):
    """A small model without symmetry; counts the images that it has seen."""

    def __init__(self, classes: int = 4, size: int = 6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(classes, 3 * size * size, generator=generator).double() * 0.3)
        self.drop = nn.Dropout(0.5)
        self.default_cfg = {"mean": MEAN, "std": STD}
        self.seen: list[int] = []  # a list, which a mirror of the model shares

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen.append(len(inputs))
        return torch.tanh(self.drop(inputs.flatten(1)) @ self.weight.T) * 2


@pytest.fixture
def case() -> tuple[Probe, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(5, 3, 6, 6, generator=generator).double()
    maps = torch.randn(5, 3, 3, generator=generator).double()
    return Probe().eval(), inputs, maps, torch.tensor([0, 3, 1, 2, 2])


def by_hand(model: nn.Module, image: Tensor, grid: Tensor, target: int, keep: float, raw: bool) -> tuple[float, float]:
    """p and p' of one image, in NumPy, pixel by pixel."""
    values = grid.numpy()
    scaled = (values - values.min()) / (values.max() - values.min())
    large = F.interpolate(torch.tensor(scaled)[None, None], image.shape[-2:], mode="bilinear")[0, 0].numpy()
    limit = np.quantile(large, 1 - keep)
    x = image.numpy().copy()
    for channel, row, column in np.ndindex(*x.shape):
        m = large[row, column] if large[row, column] >= limit else 0.0
        if raw:
            pixel = (x[channel, row, column] * STD[channel] + MEAN[channel]) * m
            x[channel, row, column] = (pixel - MEAN[channel]) / STD[channel]
        else:
            x[channel, row, column] *= m

    def probability(picture: np.ndarray) -> float:
        with torch.no_grad():
            logits = model(torch.tensor(picture)[None])[0].tolist()
        return math.exp(logits[target]) / sum(math.exp(value) for value in logits)

    return probability(image.numpy()), probability(x)


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.15])
@pytest.mark.parametrize("masking", ["raw", "standardized"])
def test_drop_and_increase_by_hand(case: Any, keep: float, masking: str) -> None:
    model, inputs, maps, target = case
    pairs = [
        by_hand(model, x, m, t, keep, masking == "raw") for x, m, t in zip(inputs, maps, target.tolist(), strict=True)
    ]
    drop = [max(0.0, p - q) / p for p, q in pairs]
    rise = [float(q > p) for p, q in pairs]
    assert 0 < sum(rise) < 5  # both kinds are there
    options = {"keep": keep, "masking": masking}
    torch.testing.assert_close(
        average_drop(model, inputs, maps, target, **options),
        torch.tensor(drop, dtype=torch.float64),
        rtol=0,
        atol=1e-12,
    )
    assert increase_in_confidence(model, inputs, maps, target, **options).tolist() == rise


def test_maps_in_all_forms_give_the_same(case: Any) -> None:
    model, inputs, maps, target = case
    expected = average_drop(model, inputs, maps, target)
    for form in (maps.unsqueeze(1), maps.unsqueeze(1).expand(-1, 3, -1, -1), 7 * maps - 3):
        torch.testing.assert_close(average_drop(model, inputs, form, target), expected, rtol=0, atol=1e-12)
    other = maps.flip(1).sin()
    signed = torch.stack([maps + other, maps - 2 * other, maps + other], 1)  # channels are averaged, signs kept
    torch.testing.assert_close(average_drop(model, inputs, signed, target), expected, rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    keep=st.sampled_from([0.05, 0.15, 0.5, 1.0]),
    mask=st.sampled_from(["soft", "binary"]),
    ties=st.sampled_from(["threshold", "stable"]),
    chunk=st.integers(1, 7),
)
def test_a_batch_is_its_images_one_by_one(seed: int, keep: float, mask: str, ties: str, chunk: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = Probe().eval()
    inputs = torch.randn(5, 3, 6, 6, generator=generator).double()
    maps = torch.randint(0, 4, (5, 6, 6), generator=generator).double()
    options: dict[str, Any] = {"keep": keep, "mask": mask, "ties": ties}
    together = average_drop(model, inputs, maps, 1, chunk_size=chunk, **options)
    alone = [average_drop(model, inputs[i : i + 1], maps[i : i + 1], 1, **options) for i in range(5)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-12)
    assert ((together >= 0) & (together <= 1)).all()


def test_showing_everything_neither_drops_nor_increases(case: Any) -> None:
    model, inputs, maps, target = case
    options = {"mask": "binary", "keep": 1.0}
    assert average_drop(model, inputs, maps, target, **options).tolist() == [0.0] * 5
    assert increase_in_confidence(model, inputs, maps, target, **options).tolist() == [0.0] * 5


@pytest.mark.parametrize("constant", [0.0, 1.0, -3.0])
def test_a_constant_map_shows_nothing(case: Any, constant: float) -> None:
    model, inputs, maps, target = case
    for masking, shown in (("raw", black(MEAN, STD).double().expand_as(inputs)), ("standardized", inputs * 0)):
        _, masked = masked_confidence(model, inputs, torch.full_like(maps, constant), target, masking=masking)
        expected = model(shown).softmax(1).gather(1, target[:, None])[:, 0]
        torch.testing.assert_close(masked, expected.detach(), rtol=0, atol=1e-12)


def test_a_score_of_zero_cannot_drop() -> None:
    class Certain(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            sign = torch.where(inputs.flatten(1).sum(1) > 50, 1.0, -1.0).double() * 2000
            return torch.stack([sign, -sign], 1)

    inputs = torch.ones(1, 3, 6, 6).double()
    maps = torch.eye(6).double()[None]
    whole, masked = masked_confidence(Certain(), inputs, maps, 1, masking="standardized")
    assert (whole.item(), masked.item()) == (0.0, 1.0)
    assert average_drop(Certain(), inputs, maps, 1, masking="standardized").item() == 0.0
    assert increase_in_confidence(Certain(), inputs, maps, 1, masking="standardized").item() == 1.0
    assert average_drop(Certain(), inputs, maps, 0, masking="standardized").item() == 1.0


def test_a_map_that_is_not_finite_is_not_hidden(case: Any) -> None:
    model, inputs, maps, target = case
    maps = maps.clone()
    maps[1, 0, 0], maps[3, 2, 2] = math.nan, math.inf
    for measure in (average_drop, increase_in_confidence):
        assert measure(model, inputs, maps, target).isnan().tolist() == [False, True, False, True, False]


def test_no_target_is_the_decision_on_the_whole_image(case: Any) -> None:
    model, inputs, maps, _ = case
    decision = model(inputs).argmax(1)
    options = {"masking": "raw", "keep": 0.15}
    _, masked = masked_confidence(model, inputs, maps, **options)
    _, expected = masked_confidence(model, inputs, maps, decision, **options)
    torch.testing.assert_close(masked, expected, rtol=0, atol=0)
    weight = black(MEAN, STD).double()
    assert (model(inputs).argmax(1) != model(weight.expand_as(inputs)).argmax(1)).any()  # it would matter


def test_known_scores_save_the_pass_over_the_whole_images(case: Any) -> None:
    model, inputs, maps, target = case
    whole, _ = masked_confidence(model, inputs, maps, target)
    expected = average_drop(model, inputs, maps, target)
    model.seen.clear()
    found = average_drop(model, inputs, maps, target, clean=whole)
    assert sum(model.seen) == 5
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert increase_in_confidence(model, inputs, maps, target, clean=whole * 0).tolist() == [1.0] * 5


def test_scores(case: Any) -> None:
    model, inputs, maps, target = case
    logits = model(inputs).detach().gather(1, target[:, None])[:, 0]
    whole, _ = masked_confidence(model, inputs, maps, target, score="sigmoid")
    torch.testing.assert_close(whole, 1 / (1 + (-logits).exp()))
    whole, _ = masked_confidence(model, inputs, maps, target, score=lambda outputs: outputs + 10)
    torch.testing.assert_close(whole, logits + 10)


def test_one_logit_has_the_confidence_of_the_decided_side(case: Any) -> None:
    _, inputs, maps, _ = case
    model = Probe(classes=1).eval()
    z = model(inputs).detach()[:, 0]
    assert len(set((z > 0).tolist())) == 2
    for target, sure in ((None, z.abs().sigmoid()), (0, (-z).sigmoid()), (1, z.sigmoid())):
        for score in ("softmax", "sigmoid"):
            whole, masked = masked_confidence(model, inputs, maps, target, score=score)
            torch.testing.assert_close(whole, sure)
            drop = average_drop(model, inputs, maps, target, score=score)
            torch.testing.assert_close(drop, ((whole - masked) / whole).clamp(min=0))


def test_a_colour_may_stand_for_hidden_pixels(case: Any) -> None:
    model, inputs, maps, target = case
    raw = average_drop(model, inputs, maps, target, masking="raw")
    torch.testing.assert_close(average_drop(model, inputs, maps, target, masking=black(MEAN, STD)), raw)
    model.default_cfg = {}
    imagenet = black((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(
        average_drop(model, inputs, maps, target), average_drop(model, inputs, maps, target, masking=imagenet)
    )


@pytest.mark.parametrize(
    ("build", "rule"), [(synthetic.tiny_cnn, "raw"), (synthetic.tiny_vit, "standardized")], ids=["cnn", "vit"]
)
def test_the_kind_of_model_decides_what_hides(build: Callable[[], nn.Module], rule: str) -> None:
    model, data = build(), synthetic.scenes(3)
    maps = torch.rand(3, 8, 8)
    found = {m: average_drop(model, data.inputs, maps, 0, masking=m) for m in ("auto", "raw", "standardized")}
    assert torch.equal(found["auto"], found[rule])
    assert not torch.equal(found["raw"], found["standardized"])


def test_nothing_is_left_behind(case: Any) -> None:
    model, inputs, maps, target = case
    model.train()
    model.drop.eval()
    inputs, maps = inputs.requires_grad_(), maps.requires_grad_()
    before = torch.get_rng_state()
    found = average_drop(model, inputs, maps, target, ties="random", keep=0.3)
    assert not found.requires_grad
    assert (model.training, model.drop.training) == (True, False)
    assert torch.equal(before, torch.get_rng_state())
    assert inputs.grad is None
    model.drop.train()  # in training mode the whole model is still asked in eval mode
    torch.testing.assert_close(average_drop(model, inputs, maps, target, ties="random", keep=0.3), found)


def test_extra_arguments_go_with_their_images() -> None:
    class Shifted(Probe):
        def forward(self, inputs: Tensor, shift: Tensor, scale: float) -> Tensor:  # type: ignore[override]
            return super().forward(inputs) * scale + shift[:, None] * torch.arange(4)

    generator = torch.Generator().manual_seed(3)
    inputs, shift = torch.randn(4, 3, 6, 6, generator=generator).double(), torch.rand(4, generator=generator).double()
    maps = torch.rand(4, 6, 6, generator=generator)
    model = Shifted().eval()
    found = average_drop(model, inputs, maps, 1, additional_forward_args=(shift, 2.0), chunk_size=3)
    for i in range(4):
        one = slice(i, i + 1)
        alone = average_drop(model, inputs[one], maps[one], 1, additional_forward_args=(shift[one], 2.0))
        torch.testing.assert_close(found[one], alone)


def test_half_precision_is_scored_in_single() -> None:
    model = synthetic.tiny_cnn().bfloat16()
    data = synthetic.scenes(3)
    found = average_drop(model, data.inputs.bfloat16(), torch.rand(3, 8, 8).bfloat16(), 0)
    assert found.dtype == torch.float32
    assert found.isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keep": 0.0}, OptionError, "keep: must be a fraction above 0 and at most 1"),
        ({"keep": 15}, OptionError, "keep: must be a fraction above 0 and at most 1"),
        ({"mask": "hard"}, OptionError, "mask: must be 'soft' or 'binary', got 'hard'"),
        (
            {"masking": "black"},
            OptionError,
            "masking: must be one of 'auto', 'raw', 'standardized', 'blur' or a tensor",
        ),
        ({"score": "logit"}, OptionError, "score: must be 'softmax', 'sigmoid' or a function"),
        ({"ties": "none"}, OptionError, "ties: must be one of threshold, random, stable"),
        ({"clean": torch.ones(4)}, OptionError, "clean: must be one score per image (5,), got (4,)"),
        ({"clean": torch.ones(5), "target": None}, OptionError, "pass target too"),
        ({"attributions": torch.ones(4, 6, 6)}, InputError, "for N=5 images, got (4, 6, 6)"),
        ({"attributions": None}, InputError, "attributions: must be maps"),
        ({"inputs": torch.ones(0, 3, 6, 6)}, InputError, "N at least 1"),
        ({"inputs": torch.ones(5, 3, 6, 6, dtype=torch.uint8)}, InputError, "floating-point images"),
        ({"target": 4}, TargetError, "target: must be a class in 0..3"),
    ],
)
def test_bad_arguments(case: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    model, inputs, maps, target = case
    arguments = {"inputs": inputs, "attributions": maps, "target": target, **change}
    with pytest.raises(error, match=re.escape(message)):
        average_drop(model, **arguments)


# ---------------------------------------------------------------------------- ranking


@settings(max_examples=60, deadline=None)
@given(
    levels=st.integers(1, 30),
    keep=st.floats(0.01, 1.0),
    ties=st.sampled_from(["random", "stable"]),
    seed=st.integers(0, 10_000),
)
def test_exact_ranks_keep_exactly_the_fraction(levels: int, keep: float, ties: str, seed: int) -> None:
    maps = torch.randint(0, levels, (3, 1, 7, 5), generator=torch.Generator().manual_seed(seed)).double()
    kept = top_pixels(maps, keep, ties, seed)
    assert kept.flatten(1).sum(1).tolist() == [math.ceil(keep * 35 - 1e-9)] * 3
    for row, chosen in zip(maps, kept, strict=True):
        if not chosen.all():
            assert row[chosen].min() >= row[~chosen].max()
    assert torch.equal(kept, top_pixels(torch.exp(maps), keep, ties, seed))  # only the order counts


def test_ties_by_each_rule() -> None:
    maps = torch.tensor([[3.0, 1, 1, 1], [1, 0, 0, 0]])[None, None].repeat(2, 1, 1, 1)
    assert top_pixels(maps, 0.375, "threshold", 0)[0, 0].tolist() == [[True] * 4, [True, False, False, False]]
    assert top_pixels(maps, 0.375, "stable", 0)[0, 0].tolist() == [[True, True, True, False], [False] * 4]
    draws = torch.cat([top_pixels(maps, 0.375, "random", seed) for seed in range(400)]).float()
    rate = draws.mean(0)[0]
    assert rate[0, 0] == 1.0  # the highest always,
    assert rate[1, 1:].max() == 0.0  # the lowest never,
    torch.testing.assert_close(rate[[0, 0, 0, 1], [1, 2, 3, 0]], torch.full((4,), 0.5), rtol=0, atol=0.08)
    first, second = draws.view(400, 2, 8).unbind(1)
    assert (first != second).any(1).float().mean() > 0.5  # each image has its own order
    assert torch.equal(top_pixels(maps, 0.375, "random", 7), top_pixels(maps, 0.375, "random", 7))


def test_the_threshold_is_the_interpolated_quantile() -> None:
    maps = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 6, 10]).view(1, 1, 3, 3)
    assert top_pixels(maps, 0.15, "threshold", 0).sum() == 3  # position 6.8 lies between 6 and 6: both stay
    assert top_pixels(maps, 0.1, "threshold", 0).sum() == 1  # position 7.2: the limit is 6.8
    assert top_pixels(maps, 0.5, "threshold", 0).sum() == 5  # position 4: the limit is a value, which stays


# ---------------------------------------------------------------------------- energy


def game(maps: Any, masks: Any, **options: Any) -> list[float]:
    found = energy_pointing_game(
        None, None, torch.as_tensor(maps).double(), masks=torch.as_tensor(masks).bool(), **options
    )
    return found.tolist()


def test_energy_by_hand() -> None:
    maps = [[[1.0, 2, 3, 4], [5, 6, 7, 8], [1, 1, 1, 1], [9, 1, 1, 1]]]
    mask = torch.zeros(1, 4, 4)
    mask[0, 1, 1:3] = 1
    total, inside = 52, 13
    assert game(maps, mask, normalize=False) == pytest.approx([inside / total])
    assert game(maps, mask) == pytest.approx([(inside - 2) / (total - 16)])  # the minimum, 1, is taken off
    assert game([[[-2.0, 2], [0, 4]]], [[[1, 0], [0, 0]]], normalize=False) == pytest.approx([2 / 8])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 100), shift=st.floats(-50, 50))
def test_energy_is_a_share(seed: int, scale: float, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(2, 5, 7, generator=generator).double()
    owner = torch.randint(0, 3, (2, 5, 7), generator=generator)
    owner[:, 0, :3] = torch.arange(3)  # none is empty
    shares = [torch.tensor(game(maps, owner == part)) for part in range(3)]
    torch.testing.assert_close(sum(shares), torch.ones(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.tensor(game(scale * maps + shift, owner == 0)), shares[0])


def test_energy_of_controls() -> None:
    data = synthetic.scenes(200, seed=8)
    masks = data.masks[:, 0]
    area = masks.double().mean().item()
    noise = torch.rand(200, 32, 32, generator=torch.Generator().manual_seed(0))
    assert np.mean(game(noise, masks)) == pytest.approx(area, rel=0.03)
    assert game(masks, masks) == [1.0] * 200
    assert game(~masks, masks) == [0.0] * 200
    assert np.mean(game(torch.ones_like(noise), masks, normalize=False)) == pytest.approx(area)


def test_energy_without_energy_or_region() -> None:
    maps = torch.rand(4, 4, 4)
    maps[0], maps[3, 0, 0] = 0.0, math.nan
    masks = torch.ones(4, 4, 4)
    masks[1] = 0
    found = game(maps, masks)
    assert found[0] == 0.0
    assert math.isnan(found[1])
    assert found[2] == pytest.approx(1.0)
    assert math.isnan(found[3])


def test_energy_of_small_maps_is_that_of_the_enlarged_ones() -> None:
    generator = torch.Generator().manual_seed(2)
    maps, masks = torch.randn(3, 2, 4, generator=generator).double(), torch.rand(3, 8, 16, generator=generator) > 0.6
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    large = F.interpolate(((maps - low) / (high - low))[:, None], (8, 16), mode="bilinear")[:, 0]
    expected = (large * masks).sum((1, 2)) / large.sum((1, 2))
    assert game(maps, masks) == pytest.approx(expected.tolist(), abs=1e-12)


def test_energy_refuses_masks_of_other_images() -> None:
    with pytest.raises(InputError, match=r"masks: must be \(N, H, W\) or \(N, 1, H, W\) for N=2 maps, got \(3, 4, 4\)"):
        energy_pointing_game(None, None, torch.rand(2, 4, 4), masks=torch.ones(3, 4, 4))


# ---------------------------------------------------------------------------- kind of model


@pytest.mark.parametrize(
    ("name", "transformer"),
    [
        ("resnet18", False),
        ("vgg16", False),  # most of its weights are linear
        ("convnext_tiny", False),  # linear layers, no attention
        ("squeezenet1_1", False),
        ("vit_b_16", True),
        ("swin_t", True),
    ],
)
def test_kinds_of_torchvision_models(name: str, transformer: bool) -> None:
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        assert is_transformer(torchvision.models.get_model(name)) is transformer


@pytest.mark.parametrize(
    ("name", "transformer"),
    [
        ("deit_tiny_distilled_patch16_224", True),
        ("levit_128", True),
        ("hiera_tiny_224", True),
        ("tnt_s_patch16_224", True),
        ("resnet50_clip", False),  # attention pooling only
        ("seresnet50", False),
        ("poolformer_s12", False),
    ],
)
def test_kinds_of_timm_models(name: str, transformer: bool) -> None:
    pytest.importorskip("timm")
    assert is_transformer(cases.hollow(name)) is transformer


def test_the_kind_is_seen_through_wrappers() -> None:
    assert is_transformer(nn.DataParallel(synthetic.tiny_vit()))
    assert not is_transformer(nn.DataParallel(synthetic.tiny_cnn()))
