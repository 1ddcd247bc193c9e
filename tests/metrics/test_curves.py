"""Insertion, deletion, and the share of confidence lost on few pixels: by hand on linear models."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from attrib_zoo import synthetic
from attrib_zoo.errors import InputError, OptionError, TargetError
from attrib_zoo.masking import black
from attrib_zoo.metrics import (
    average_drop,
    deletion,
    deletion_curve,
    drop_rate,
    increase_in_confidence,
    increase_rate,
    insertion,
    insertion_curve,
)
from attrib_zoo.metrics._scores import blur


class Linear(nn.Module):
    """Two logits, the weighted sum of the pixels and 0; counts the images that it has seen."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.default_cfg = {"mean": (0.5, 0.4), "std": (0.25, 0.2)}
        self.seen: list[int] = []  # a list, which a mirror of the model shares

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen.append(len(inputs))
        one = (inputs * self.weight).sum((1, 2, 3))
        return torch.stack([one, 0 * one], 1)


def identity(outputs: Tensor) -> Tensor:
    return outputs


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.fixture
def case() -> tuple[Linear, Tensor, Tensor]:
    return Linear(draw(0, 2, 3, 4)), draw(1, 3, 2, 3, 4), draw(2, 3, 3, 4)


def test_a_linear_model_loses_the_removed_contributions(case: Any) -> None:
    model, inputs, maps = case
    effect = (inputs * model.weight).detach().sum(1).flatten(1)  # of each pixel on logit 0
    ordered = effect.gather(1, maps.flatten(1).argsort(1, descending=True))
    gone = torch.cat([torch.zeros(3, 1).double(), ordered.cumsum(1)], 1)
    options: dict[str, Any] = {"steps": 12, "score": identity, "baseline": "standardized"}
    removed = deletion_curve(model, inputs, maps, 0, **options)
    torch.testing.assert_close(removed, effect.sum(1, keepdim=True) - gone)
    shown = insertion_curve(model, inputs, maps, 0, **options)
    torch.testing.assert_close(shown, gone)
    area = (gone[:, 1:] + gone[:, :-1]).sum(1) / 2 / 12
    torch.testing.assert_close(insertion(model, inputs, maps, 0, **options), area)
    torch.testing.assert_close(deletion(model, inputs, maps, 0, **options), effect.sum(1) - area)
    coarse = insertion_curve(model, inputs, maps, 0, **{**options, "steps": 5})  # 0, 2, 5, 7, 10, 12 pixels
    torch.testing.assert_close(coarse, gone[:, [0, 2, 5, 7, 10, 12]])


def test_small_maps_are_enlarged_bilinearly(case: Any) -> None:
    model, inputs, _ = case
    small = draw(5, 3, 2, 2)
    large = nn.functional.interpolate(small[:, None], (3, 4), mode="bilinear")
    for curve in (insertion_curve, deletion_curve):
        options: dict[str, Any] = {"steps": 12, "score": identity}
        torch.testing.assert_close(curve(model, inputs, small, 0, **options), curve(model, inputs, large, 0, **options))


def test_what_stands_in_for_pixels(case: Any) -> None:
    model, inputs, maps = case
    fields = {
        "raw": black((0.5, 0.4), (0.25, 0.2)).double().expand_as(inputs),
        "standardized": inputs * 0,
        "blur": blur(inputs),
    }
    for name, field in fields.items():
        for curve, start, end in ((deletion_curve, inputs, field), (insertion_curve, field, inputs)):
            found = curve(model, inputs, maps, 1, steps=3, baseline=name)
            ends = torch.stack([model(image).softmax(1)[:, 1] for image in (start, end)], 1).detach()
            torch.testing.assert_close(found[:, [0, -1]], ends)
            torch.testing.assert_close(curve(model, inputs, maps, 1, steps=3, baseline=field), found)
    default = deletion_curve(model, inputs, maps, 1)
    torch.testing.assert_close(default, deletion_curve(model, inputs, maps, 1, steps=3, baseline="standardized"))
    default = insertion_curve(model, inputs, maps, 1)
    torch.testing.assert_close(default, insertion_curve(model, inputs, maps, 1, steps=3, baseline="blur"))


def test_blur_is_a_gaussian_of_the_image() -> None:
    image = draw(3, 1, 2, 9, 14)
    weight = torch.tensor([[math.exp(-(a * a + b * b) / 50) for b in range(-5, 6)] for a in range(-5, 6)]).double()
    found = blur(image)
    for row, column in ((0, 0), (4, 7), (8, 13)):
        total, norm = torch.zeros(2).double(), 0.0
        for a in range(-5, 6):
            for b in range(-5, 6):
                if 0 <= row + a < 9 and 0 <= column + b < 14:
                    total += weight[a + 5, b + 5] * image[0, :, row + a, column + b]
                    norm += weight[a + 5, b + 5].item()
        torch.testing.assert_close(found[0, :, row, column], total / norm)
    torchvision = pytest.importorskip("torchvision")
    large = draw(4, 2, 3, 24, 24)
    theirs = torchvision.transforms.functional.gaussian_blur(large, [11, 11], [5.0, 5.0])
    torch.testing.assert_close(blur(large)[..., 5:-5, 5:-5], theirs[..., 5:-5, 5:-5])


def test_no_target_is_the_decision_on_the_whole_image(case: Any) -> None:
    model, inputs, maps = case
    decision = model(inputs).argmax(1)
    assert len(set(decision.tolist())) == 2
    torch.testing.assert_close(deletion(model, inputs, maps), deletion(model, inputs, maps, decision))
    model.seen.clear()
    deletion(model, inputs, maps, decision, steps=4)
    assert sum(model.seen) == 3 * 5  # the curve, and no pass besides


def test_equal_values_go_as_asked(case: Any) -> None:
    model, inputs, _ = case
    maps = torch.zeros(3, 3, 4)
    maps[:, 0, 0] = 1.0
    effect = (inputs * model.weight).detach().sum(1).flatten(1)
    options: dict[str, Any] = {"steps": 12, "score": identity, "baseline": "standardized"}
    together = insertion_curve(model, inputs, maps, 0, ties="threshold", **options)
    torch.testing.assert_close(together[:, 1], effect[:, 0])
    torch.testing.assert_close(together[:, 2:], effect.sum(1, keepdim=True).expand(3, 11))
    raster = insertion_curve(model, inputs, maps, 0, ties="stable", **options)
    torch.testing.assert_close(raster[:, 1:], effect.cumsum(1))
    drawn = insertion_curve(model, inputs, maps, 0, **options)
    torch.testing.assert_close(drawn[:, 1], effect[:, 0])
    steps = drawn.diff(dim=1)  # each pixel enters once, on its own
    torch.testing.assert_close(steps.sort(1).values, effect.sort(1).values)
    assert not torch.equal(drawn, insertion_curve(model, inputs, maps, 0, seed=5, **options))


@given(seed=st.integers(0, 10_000), chunk=st.integers(1, 9), measure=st.sampled_from([insertion, deletion]))
def test_batching_and_order_preserving_changes_are_irrelevant(seed: int, chunk: int, measure: Any) -> None:
    model = Linear(draw(seed + 1, 2, 3, 4) / 3)
    inputs = draw(seed, 3, 2, 3, 4)
    maps = torch.randint(0, 5, (3, 3, 4), generator=torch.Generator().manual_seed(seed)).double()
    options: dict[str, Any] = {"steps": 4, "chunk_size": chunk}
    found = measure(model, inputs, maps, 0, seed=[4, 4, 9], **options)
    alone = [measure(model, inputs[i : i + 1], maps[i : i + 1], 0, seed=s, **options) for i, s in enumerate((4, 4, 9))]
    torch.testing.assert_close(found, torch.cat(alone))
    torch.testing.assert_close(measure(model, inputs, maps.exp(), 0, seed=[4, 4, 9], **options), found)
    assert ((found >= 0) & (found <= 1)).all()


def test_the_right_order_is_the_best() -> None:
    model = Linear(draw(0, 2, 3, 4) / 3)
    inputs = draw(1, 20, 2, 3, 4)
    right = (inputs * model.weight).detach().sum(1)
    options: dict[str, Any] = {"steps": 12, "baseline": "standardized"}
    for other in (-right, draw(9, 20, 3, 4)):
        assert (insertion(model, inputs, right, 0, **options) > insertion(model, inputs, other, 0, **options)).all()
        assert (deletion(model, inputs, right, 0, **options) < deletion(model, inputs, other, 0, **options)).all()


def test_few_pixels_by_hand(case: Any) -> None:
    model, inputs, maps = case
    top = torch.zeros(3, 12).scatter(1, maps.flatten(1).topk(2).indices, 1.0).view(3, 1, 3, 4).double()  # ceil(1.8)
    colour = black((0.5, 0.4), (0.25, 0.2)).double()
    shown = inputs * top + colour * (1 - top)
    whole, masked = (model(images).softmax(1)[:, 0].detach() for images in (inputs, shown))
    torch.testing.assert_close(drop_rate(model, inputs, maps, 0), (whole - masked).clamp(min=0) / whole)
    assert increase_rate(model, inputs, maps, 0).tolist() == (masked > whole).double().tolist()
    soft = average_drop(model, inputs, maps, 0, keep=0.15, ties="random")
    torch.testing.assert_close(drop_rate(model, inputs, maps, 0, mask="soft"), soft)
    flat = maps * 0  # a constant map shows two pixels too, not all of them
    assert (drop_rate(model, inputs, flat, 0) != 0).any()
    everything = {"keep": 1.0}
    assert drop_rate(model, inputs, maps, 0, **everything).tolist() == [0.0] * 3
    assert increase_in_confidence(model, inputs, maps, 0, mask="binary").tolist() == [0.0] * 3


def test_what_is_not_finite_stays_so(case: Any) -> None:
    model, inputs, maps = case
    maps[1, 0, 0] = math.nan
    for measure in (insertion, deletion, drop_rate, increase_rate):
        assert measure(model, inputs, maps, 0).isnan().tolist() == [False, True, False]


def test_multi_label_and_single_outputs(case: Any) -> None:
    _, inputs, maps = case

    class One(Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs)[:, :1]

    model = One(draw(0, 2, 3, 4))
    z = model(inputs)[:, 0].detach()
    assert len(set((z > 0).tolist())) == 2  # both decisions
    for target, wanted in ((None, z.abs().sigmoid()), (0, (-z).sigmoid()), (1, z.sigmoid())):
        for score in ("softmax", "sigmoid"):
            curve = deletion_curve(model, inputs, maps, target, score=score, steps=2)
            torch.testing.assert_close(curve[:, 0], wanted)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"steps": 0}, OptionError, "steps: must be an integer from 1 to the number of pixels (12), got 0"),
        ({"steps": 13}, OptionError, "got 13"),
        ({"steps": 2.0}, OptionError, "got 2.0"),
        (
            {"baseline": "white"},
            OptionError,
            "baseline: must be one of 'auto', 'raw', 'standardized', 'blur' or a tensor",
        ),
        ({"score": "logit"}, OptionError, "score: must be 'softmax', 'sigmoid' or a function"),
        ({"ties": "first"}, OptionError, "ties: must be one of"),
        ({"attributions": torch.ones(2, 3, 4)}, InputError, "for N=3 images, got (2, 3, 4)"),
        ({"inputs": torch.ones(3, 4)}, InputError, "inputs: must be floating-point images"),
        ({"target": 2}, TargetError, "target: must be a class in 0..1"),
        ({"target": [0, 1]}, TargetError, "one entry for each of the 3 images"),
    ],
)
def test_bad_arguments(case: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    model, inputs, maps = case
    arguments = {"inputs": inputs, "attributions": maps, "target": 0, **change}
    for measure in (insertion, deletion):
        with pytest.raises(error, match=re.escape(message)):
            measure(model, **arguments)


def test_nothing_is_left_behind() -> None:
    model, data, maps = synthetic.tiny_cnn(), synthetic.scenes(2), torch.rand(2, 8, 8)
    model.train()
    state = torch.get_rng_state()
    found = deletion(model, data.inputs.requires_grad_(), maps, 0, steps=3)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert (found.requires_grad, found.dtype) == (False, torch.float32)
    half = deletion(model.bfloat16(), data.inputs.bfloat16(), maps.bfloat16(), 0, steps=3)
    assert half.dtype == torch.float32
    assert half.isfinite().all()
