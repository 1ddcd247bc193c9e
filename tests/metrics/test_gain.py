"""Symmetric relevance gain, and hiding by black, mean colour and blur: closed forms on a linear model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attrib_zoo.errors import OptionError
from attrib_zoo.masking import black
from attrib_zoo.metrics import (
    deletion,
    insertion,
    insertion_curve,
    masked_confidence,
    road,
    road_curve,
    symmetric_relevance_gain,
)
from attrib_zoo.metrics._scores import blur


class Linear(nn.Module):
    """Logit 0 is a weighted sum of the pixels, logit 1 is 0."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, inputs: Tensor) -> Tensor:
        one = (inputs * self.weight).sum((1, 2, 3))
        return torch.stack([one, 0 * one], 1)


def identity(outputs: Tensor) -> Tensor:
    return outputs


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.fixture
def case() -> tuple[Linear, Tensor, Tensor]:
    return Linear(draw(0, 3, 3, 4)), draw(1, 2, 3, 3, 4), draw(2, 2, 3, 4)


HIDDEN = {
    "standardized": lambda x: torch.zeros_like(x),
    "raw": lambda x: black((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), x).expand_as(x),
    "auto": lambda x: black((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), x).expand_as(x),
    "blur": blur,
}


@pytest.mark.parametrize("rule", [*HIDDEN, "tensor"])
def test_plain_removal_of_a_linear_model(case: Any, rule: str) -> None:
    """Each pixel is worth its weight times what hiding changes it by; the curves are sums of these."""
    model, inputs, maps = case
    other = draw(5, 2, 3, 3, 4) if rule == "tensor" else HIDDEN[rule](inputs)
    worth = ((inputs - other) * model.weight).detach().sum(1).flatten(1)
    ordered = worth.gather(1, maps.flatten(1).argsort(1, descending=True))
    whole = (inputs * model.weight).detach().sum((1, 2, 3))[:, None]
    shares = (0.25, 0.5, 1.0)
    places = [3, 6, 12]
    sums = torch.cat([torch.zeros(2, 1).double(), ordered.cumsum(1)], 1)
    options: dict[str, Any] = {"fractions": shares, "score": identity, "hiding": other if rule == "tensor" else rule}
    morf = road_curve(model, inputs, maps, 0, order="morf", **options)
    torch.testing.assert_close(morf, whole - sums[:, places])
    lerf = road_curve(model, inputs, maps, 0, order="lerf", **options)
    torch.testing.assert_close(lerf, whole - (sums[:, -1:] - sums[:, [12 - place for place in places]]))
    gain = symmetric_relevance_gain(model, inputs, maps, 0, **options)
    torch.testing.assert_close(gain, (lerf - morf).mean(1))
    back = symmetric_relevance_gain(model, inputs, -maps, 0, **options)
    torch.testing.assert_close(back, -gain)  # the orders change places


@pytest.mark.parametrize("rule", HIDDEN)
def test_every_masking_measure_knows_the_rules(case: Any, rule: str) -> None:
    model, inputs, maps = case
    other = HIDDEN[rule](inputs)
    _, masked = masked_confidence(model, inputs, maps, 0, keep=1.0, masking=rule, score=identity)
    low, high = maps.flatten(1).amin(1).view(2, 1, 1, 1), maps.flatten(1).amax(1).view(2, 1, 1, 1)
    mask = (maps[:, None] - low) / (high - low)
    wanted = ((mask * inputs + (1 - mask) * other) * model.weight).detach().sum((1, 2, 3))
    torch.testing.assert_close(masked, wanted)
    nothing = insertion_curve(model, inputs, maps, 0, baseline=rule, steps=1, score=identity)[:, 0]
    torch.testing.assert_close(nothing, (other * model.weight).detach().sum((1, 2, 3)))


def test_the_forms_are_differences_of_the_measures(case: Any) -> None:
    model, inputs, maps = case
    found = symmetric_relevance_gain(model, inputs, maps, 0, seed=3)
    wanted = road(model, inputs, maps, 0, order="lerf", seed=3) - road(model, inputs, maps, 0, order="morf", seed=3)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    found = symmetric_relevance_gain(model, inputs, maps, 0, form="insertion", steps=4)
    wanted = insertion(model, inputs, maps, 0, steps=4) - deletion(model, inputs, maps, 0, steps=4)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_the_right_order_gains_most(case: Any) -> None:
    model, inputs, maps = case
    right = (inputs * model.weight).detach().sum(1)
    options: dict[str, Any] = {"hiding": "standardized", "score": identity}
    best = symmetric_relevance_gain(model, inputs, right, 0, **options)
    assert (best > symmetric_relevance_gain(model, inputs, maps, 0, **options)).all()


def test_what_is_not_finite_stays_so(case: Any) -> None:
    model, inputs, maps = case
    maps = maps.clone()
    maps[0, 0, 0] = torch.nan
    assert symmetric_relevance_gain(model, inputs, maps, 0, hiding="blur").isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"form": "both"}, "form: must be one of"),
        ({"order": "morf"}, "order: must be left out"),
        ({"hiding": "grey"}, "hiding: must be one of 'auto', 'raw', 'standardized', 'blur', 'imputation' or a tensor"),
    ],
)
def test_wrong_options(case: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        symmetric_relevance_gain(*case, 0, **options)
