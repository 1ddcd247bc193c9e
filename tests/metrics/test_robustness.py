"""Captum's measures through our call: the formulas by hand, seeds, batches, what cannot be."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attrib_zoo import GradCAM, synthetic
from attrib_zoo.errors import InputError, OptionError
from attrib_zoo.metrics import infidelity, sensitivity_max


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


class Linear(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw(0, classes, 2, 6, 6))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.einsum("nchw,kchw->nk", inputs, self.weight)


@pytest.fixture
def case() -> tuple[Linear, Tensor, Tensor]:
    return Linear(), draw(1, 4, 2, 6, 6), torch.tensor([0, 2, 1, 1])


@pytest.mark.parametrize("perturbation", ["noise", "square"])
def test_the_weights_of_a_linear_model_foretell_everything(case: Any, perturbation: str) -> None:
    model, inputs, target = case
    right = model.weight.detach()[target]
    options: dict[str, Any] = {"perturbation": perturbation, "noise": 0.5}
    assert infidelity(model, inputs, right, target, normalize=False, **options).max() < 1e-10
    assert infidelity(model, inputs, 7 * right, target, **options).max() < 1e-10
    assert (infidelity(model, inputs, 7 * right, target, normalize=False, **options) > 1e-3).all()
    assert (infidelity(model, inputs, draw(9, 4, 6, 6), target, **options) > 1e-3).all()
    decision = model(inputs).argmax(1)
    assert infidelity(model, inputs, model.weight.detach()[decision], **options).max() < 1e-10


def test_infidelity_by_hand(case: Any) -> None:
    model, inputs, target = case
    maps = draw(5, 4, 6, 6)
    options: dict[str, Any] = {"samples": 6, "score": "softmax", "seed": [3, 8, 8, 1], "noise": 0.3}
    rows = []
    for image, heat, wanted, seed in zip(inputs, maps, target, (3, 8, 8, 1), strict=True):
        maker = torch.Generator().manual_seed(seed)
        taken = torch.stack([0.3 * torch.randn(2, 6, 6, generator=maker) for _ in range(6)]).double()
        drop = (model(image[None]).softmax(1) - model(image - taken).softmax(1))[:, wanted].detach()
        told = (taken * heat).sum((1, 2, 3))
        beta = (told * drop).sum() / told.square().sum()
        rows.append([(told - drop).square().mean(), (beta * told - drop).square().mean()])
    plain, fitted = torch.tensor(rows).double().unbind(1)
    torch.testing.assert_close(infidelity(model, inputs, maps, target, normalize=False, **options), plain)
    found = infidelity(model, inputs, maps, target, **options)
    torch.testing.assert_close(found, fitted)
    torch.testing.assert_close(infidelity(model, inputs, 50 * maps, target, **options), fitted)
    for chunk in (1, 8, 9):
        torch.testing.assert_close(infidelity(model, inputs, maps, target, chunk_size=chunk, **options), fitted)
    options["seed"] = 8
    alone = infidelity(model, inputs[1:2], maps[1:2], target[1:2], **options)
    torch.testing.assert_close(alone, fitted[1:2])


def test_squares_by_hand(case: Any) -> None:
    model, _, target = case
    inputs = draw(1, 4, 2, 6, 6)
    heat = draw(5, 4, 6, 6)
    options: dict[str, Any] = {"perturbation": "square", "normalize": False, "samples": 40}
    whole = infidelity(model, inputs, heat, target, square=6, **options)  # takes everything away
    told = (inputs * heat[:, None]).sum((1, 2, 3))
    drop = (model(inputs) - model(inputs * 0)).gather(1, target[:, None])[:, 0].detach()
    torch.testing.assert_close(whole, (told - drop).square())
    tall = torch.zeros(1, 2, 6, 6).double()
    tall[0, 0, 5] = 1  # the last row is taken away too, whole pixels at a time
    one = (tall * model.weight.detach()).sum(1)[0, 5]
    found = infidelity(model, tall, torch.zeros(1, 6, 6).double(), 0, square=1, **{**options, "samples": 4000})
    torch.testing.assert_close(found, one.square().sum()[None] / 36, rtol=0.3, atol=0)
    wide = nn.functional.pad(inputs, (0, 2))  # a quarter of the shorter side, at least a pixel

    class Wide(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return model(images[..., :6])

    maps = nn.functional.pad(heat, (0, 2))
    default = infidelity(Wide(), wide, maps, target, **options)
    torch.testing.assert_close(default, infidelity(Wide(), wide, maps, target, square=1, **options))


def test_channels_count_one_by_one(case: Any) -> None:
    model, inputs, target = case
    maps = draw(5, 4, 2, 6, 6)
    options: dict[str, Any] = {"normalize": False, "noise": 0.3}
    mean = maps.mean(1)
    assert not torch.allclose(
        infidelity(model, inputs, maps, target, **options), infidelity(model, inputs, mean, target, **options)
    )
    same = infidelity(model, inputs, mean[:, None].expand(4, 2, 6, 6), target, **options)
    torch.testing.assert_close(infidelity(model, inputs, mean, target, **options), same)
    mean[2, 0, 0] = math.nan
    assert infidelity(model, inputs, mean, target).isnan().tolist() == [False, False, True, False]
    assert infidelity(model, inputs, mean[:, :1, :1] * 0, target).isfinite().tolist() == [True, True, False, True]


def test_sensitivity_by_hand(case: Any) -> None:
    model, inputs, target = case

    def explain(images: Tensor, wanted: Tensor) -> Tensor:
        return (images**2 * model.weight.detach()[wanted]).sum(1)

    rows = []
    for image, wanted, seed in zip(inputs, target, (5, 6, 7, 8), strict=True):
        maker = torch.Generator().manual_seed(seed)
        clean = explain(image[None], wanted[None])
        moved = [image + 0.1 * (2 * torch.rand(2, 6, 6, generator=maker) - 1).double() for _ in range(4)]
        rows.append(max((explain(m[None], wanted[None]) - clean).norm() / clean.norm() for m in moved))
    options: dict[str, Any] = {"explain": explain, "radius": 0.1, "samples": 4, "seed": 5}
    found = sensitivity_max(model, inputs, None, target, **options)
    torch.testing.assert_close(found, torch.stack(rows), rtol=1e-6, atol=0)
    torch.testing.assert_close(sensitivity_max(model, inputs, None, target, chunk_size=5, **options), found)
    still = sensitivity_max(model, inputs, None, target, explain=lambda images, wanted: torch.ones(len(images), 3, 3))
    assert still.tolist() == [0.0] * 4
    decided = sensitivity_max(model, inputs, None, **options)
    torch.testing.assert_close(decided, sensitivity_max(model, inputs, None, model(inputs).argmax(1), **options))


def test_a_method_of_ours() -> None:
    model, data = synthetic.tiny_cnn(), synthetic.scenes(2)
    model.train()
    explainer, state = GradCAM(model), torch.get_rng_state()
    for target in (None, 1, [0, 2]):
        maps = explainer.attribute(data.inputs, target)
        found = sensitivity_max(model, data.inputs, maps, target, explain=explainer.attribute, samples=3)
        again = sensitivity_max(model, data.inputs, maps, target, explain=explainer.attribute, samples=3)
        assert torch.equal(found, again)
        assert (found >= 0).all()
        assert found.max() > 0  # a map that is zero (Grad-CAM clips) stays zero
        assert infidelity(model, data.inputs, maps, target, samples=3).isfinite().all()
    assert model.training
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"perturbation": "blur"}, OptionError, "perturbation: must be one of noise, square"),
        ({"noise": 0.0}, OptionError, "noise, square: must be above 0, and a side of 1 to 6 pixels, got 0.0 and None"),
        ({"square": 7}, OptionError, "got 0.003 and 7"),
        ({"samples": 0}, OptionError, "samples: must be a positive integer, got 0"),
        ({"score": "margin"}, OptionError, "score: must be one of logit, softmax, sigmoid"),
        ({"attributions": torch.ones(4, 3, 6, 6)}, InputError, "attributions: must have 1 or 2 channels"),
        ({"attributions": torch.ones(3, 6, 6)}, InputError, "for N=4 images"),
    ],
)
def test_bad_arguments(case: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    model, inputs, target = case
    arguments: dict[str, Any] = {"attributions": torch.ones(4, 6, 6), **change}
    with pytest.raises(error, match=re.escape(message)):
        infidelity(model, inputs, target=target, **arguments)
    with pytest.raises(OptionError, match="radius: must be above 0"):
        sensitivity_max(model, inputs, None, target, explain=lambda x, t: x, radius=0)


class Both(Linear):
    """One logit z as the two logits -z/2 and z/2, whose softmax is the sigmoid of z."""

    def forward(self, inputs: Tensor) -> Tensor:
        z = super().forward(inputs)
        return torch.cat([-z / 2, z / 2], 1)


def test_one_logit_is_two_classes(case: Any) -> None:
    _, inputs, _ = case
    maps = draw(5, 4, 6, 6)
    signs = Linear(1)(inputs).detach()[:, 0].sign()
    assert len(set(signs.tolist())) == 2
    for target in (None, 0, 1):
        wanted = infidelity(Both(1), inputs, maps, target, score="softmax", noise=0.3)
        torch.testing.assert_close(infidelity(Linear(1), inputs, maps, target, score="softmax", noise=0.3), wanted)
    weight = Linear(1).weight.detach().expand(4, 2, 6, 6)
    options: dict[str, Any] = {"noise": 0.5, "normalize": False}
    assert infidelity(Linear(1), inputs, weight, 1, **options).max() < 1e-10
    assert infidelity(Linear(1), inputs, -weight, 0, **options).max() < 1e-10
    assert infidelity(Linear(1), inputs, weight * signs.view(-1, 1, 1, 1), **options).max() < 1e-10
