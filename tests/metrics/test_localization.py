"""Measures against the true region: values by hand, controls, ties, and what cannot be measured."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attrib_zoo import synthetic
from attrib_zoo.errors import InputError, OptionError
from attrib_zoo.metrics import (
    bbox_score,
    box_masks,
    class_discrimination,
    energy_pointing_game,
    miou,
    pointing_game,
    sparseness,
    total_variation,
)
from attrib_zoo.metrics._maps import ranks

LADDER = torch.arange(16.0).view(1, 4, 4)
MEASURES = (energy_pointing_game, miou, bbox_score, pointing_game)


def region(*pixels: tuple[int, int]) -> Tensor:
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    for row, column in pixels:
        mask[0, row, column] = True
    return mask


# ---------------------------------------------------------------------------- by hand


def test_iou_by_hand() -> None:
    mask = region((3, 3), (3, 2), (0, 0))  # the top 20 % of 16 pixels are 4: the last row
    assert miou(None, None, LADDER, masks=mask).tolist() == pytest.approx([2 / 5])
    assert miou(None, None, LADDER, masks=mask, keep=1.0).tolist() == pytest.approx([3 / 16])


def test_bbox_by_hand() -> None:
    mask = region((3, 3), (3, 2), (0, 0))
    assert bbox_score(None, None, LADDER, masks=mask).tolist() == pytest.approx([2 / 3])  # 15, 14 and not 13
    steps = torch.tensor([[[0.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 2]]])  # 2, and all three ones
    assert bbox_score(None, None, steps, masks=mask, ties="threshold").tolist() == pytest.approx([2 / 4])


@pytest.mark.parametrize(
    ("tolerance", "hits"), [(0, [0, 0]), (0.9, [0, 0]), (1, [1, 0]), (1.4, [1, 0]), (1.5, [1, 1]), (15, [1, 1])]
)
def test_pointing_by_hand(tolerance: float, hits: list[float]) -> None:
    masks = torch.cat([region((3, 2)), region((2, 2))])  # 1 and sqrt(2) pixels from the peak
    maps = LADDER.expand(2, 4, 4)
    assert pointing_game(None, None, maps, masks=masks, tolerance=tolerance).tolist() == hits
    strict = pointing_game(None, None, maps, masks=torch.cat([region((3, 3)), region((0, 0))]), tolerance=0)
    assert strict.tolist() == [1.0, 0.0]


def test_pointing_tolerates_15_pixels_in_any_direction() -> None:
    maps = torch.zeros(2, 3, 40)
    maps[:, 0, 5] = 1
    masks = torch.zeros(2, 3, 40)
    masks[0, 0, 20], masks[1, 0, 21] = 1, 1
    assert pointing_game(None, None, maps, masks=masks).tolist() == [1.0, 0.0]
    assert pointing_game(None, None, maps.mT, masks=masks.mT).tolist() == [1.0, 0.0]


def test_weights_of_masks_count_from_a_half_up() -> None:
    weights = torch.zeros(2, 4, 4)
    weights[0, 3, 2:], weights[1, 3, 2:] = torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.49])
    maps = LADDER.expand(2, 4, 4)
    assert miou(None, None, maps, masks=weights).tolist() == pytest.approx([2 / 4, 1 / 4])
    assert bbox_score(None, None, maps, masks=weights).tolist() == [1.0, 0.0]
    assert pointing_game(None, None, maps, masks=weights, tolerance=0).tolist() == [1.0, 0.0]
    faint = energy_pointing_game(None, None, LADDER, masks=weights[1:] / 10)  # here they weigh
    assert faint.tolist() == pytest.approx([(14 * 0.05 + 15 * 0.049) / 120])


def test_discrimination_by_hand() -> None:
    asked, others = region((3, 3), (0, 1)), region((1, 0), (2, 0))
    found = class_discrimination(None, None, LADDER, masks=asked, other_masks=others)
    assert found.tolist() == pytest.approx([16 / (16 + 12)])
    raised = class_discrimination(None, None, 5 * LADDER + 1, masks=asked, other_masks=others)
    assert raised.tolist() == pytest.approx([16 / (16 + 12)])  # min-max first, unless asked not to
    as_it_is = class_discrimination(None, None, LADDER + 1, masks=asked, other_masks=others, normalize=False)
    assert as_it_is.tolist() == pytest.approx([18 / (18 + 14)])
    nothing = class_discrimination(None, None, LADDER * 0, masks=asked, other_masks=others)
    assert nothing.tolist() == [0.5]
    unknown = class_discrimination(None, None, LADDER, masks=asked, other_masks=region())
    assert math.isnan(unknown.item())


def test_sparseness_by_hand() -> None:
    maps = torch.tensor([[[1.0, 1], [1, 1]], [[0, 0], [-4, 0]], [[1, 2], [3, 4]], [[0, 0], [0, 0]]])
    by_hand = [0, 3 / 4, (-3 * 1 - 2 + 3 + 3 * 4) / (4 * 10), 0]
    assert sparseness(None, None, maps).tolist() == pytest.approx(by_hand)
    gini = sum(abs(a - b) for a in range(1, 5) for b in range(1, 5)) / (2 * 4 * 10)  # mean difference over the mean
    assert by_hand[2] == pytest.approx(gini)
    scaled = sparseness(None, None, maps + 7, normalize=True)
    assert scaled[2].item() == pytest.approx((-3 * 0 - 1 + 2 + 3 * 3) / (4 * 6))


def test_variation_by_hand() -> None:
    maps = torch.tensor([[[0.0, 2], [4, 2]], [[3, 3], [3, 3]], [[1, 0], [0, 1]]])
    assert total_variation(None, None, maps).tolist() == pytest.approx([(2 + 2 + 4 + 0) / 4 / 4, 0.0, 1.0])
    stripes = torch.tensor([[[0.0, 1, 0], [0, 1, 0]]])  # four steps across, three flat ones down
    assert total_variation(None, None, stripes).tolist() == pytest.approx([4 / 7])


def test_complexity_is_measured_at_the_size_of_the_images() -> None:
    maps, inputs = torch.rand(2, 3, 3), torch.zeros(2, 3, 12, 12)
    large = torch.nn.functional.interpolate(maps[:, None], (12, 12), mode="bilinear")
    torch.testing.assert_close(sparseness(None, inputs, maps), sparseness(None, inputs, large))
    assert (total_variation(None, inputs, maps) < total_variation(None, None, maps)).all()
    maps[0, 1, 1] = math.nan
    assert sparseness(None, inputs, maps).isnan().tolist() == [True, False]
    assert total_variation(None, inputs, maps).isnan().tolist() == [True, False]


# ---------------------------------------------------------------------------- boxes


def test_boxes_cover_pixel_centres() -> None:
    masks = box_masks(torch.tensor([[[1, 0, 3, 2], [0, 0, 0, 0]], [[0.5, 2.6, 1.5, 99], [-9, -9, 0.6, 0.6]]]), (4, 5))
    expected = torch.zeros(2, 1, 4, 5, dtype=torch.bool)
    expected[0, 0, 0:2, 1:3] = True
    expected[1, 0, 3, 0] = True
    expected[1, 0, 0, 0] = True
    assert torch.equal(masks, expected)
    assert box_masks(torch.tensor([[0, 0, 5, 4]]), (4, 5)).all()
    between = box_masks(torch.tensor([[0.5, 0.5, 1.5, 1.5], [1.2, 1.2, 1.8, 1.8], [0.6, 0.6, 1.4, 1.4]]), (4, 5))
    assert between.nonzero().tolist() == [[0, 0, 0, 0], [1, 0, 1, 1]]  # a centre on the upper or left side counts
    assert not box_masks([torch.zeros(0, 4), torch.tensor([9, 9, 12, 12])], (4, 5)).any()


@pytest.mark.parametrize("measure", MEASURES)
def test_boxes_are_their_masks(measure: Any) -> None:
    boxes = [
        torch.tensor([[2, 2, 9, 7], [20, 3, 28, 30]]),
        torch.tensor([[0, 0, 5, 5]]),
        torch.tensor([[40, 0, 50, 9]]),
    ]
    inputs, maps = torch.zeros(3, 3, 32, 40), torch.rand(3, 8, 10)
    found = measure(None, inputs, maps, boxes=boxes)
    expected = measure(None, None, maps, masks=box_masks(boxes, (32, 40)))
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found.isnan().tolist() == [False, False, True]  # outside the image


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "masks: pass either masks or boxes of the true region, got neither"),
        ({"masks": torch.ones(2, 4, 4), "boxes": torch.ones(2, 4)}, "got both"),
        ({"masks": torch.ones(3, 4, 4)}, "masks: must be (N, H, W) or (N, 1, H, W) for N=2 maps, got (3, 4, 4)"),
        ({"masks": "here"}, "masks: must be a tensor, got str"),
        ({"boxes": torch.ones(3, 4)}, "boxes: must hold an entry for each of N=2 maps, got 3"),
        ({"boxes": torch.ones(2, 5)}, "boxes: must be (N, 4), (N, M, 4) or N tensors (M, 4)"),
        ({"boxes": torch.tensor([[0, 0, 1, 1], [3, 0, 1, 1]])}, "x1 <= x2 and y1 <= y2"),
        ({"boxes": torch.full((2, 4), math.nan)}, "boxes: must be finite"),
    ],
)
def test_regions_that_cannot_be(options: dict[str, Any], message: str) -> None:
    for measure in MEASURES:
        with pytest.raises(InputError, match=re.escape(message)):
            measure(None, None, torch.rand(2, 4, 4), **options)


def test_options_that_cannot_be() -> None:
    maps, masks = torch.rand(2, 4, 4), torch.ones(2, 4, 4)
    with pytest.raises(OptionError, match="tolerance: must be a distance"):
        pointing_game(None, None, maps, masks=masks, tolerance=-1)
    with pytest.raises(OptionError, match="ties: must be one of"):
        bbox_score(None, None, maps, masks=masks, ties="all")
    with pytest.raises(OptionError, match="keep: must be a fraction"):
        miou(None, None, maps, masks=masks, keep=20)
    with pytest.raises(OptionError, match="seed: must be an int, or one int for each of the 2 images"):
        miou(None, None, maps, masks=masks, seed=[1, 2, 3])
    with pytest.raises(InputError, match="for N=3 images"):
        miou(None, torch.zeros(3, 3, 4, 4), maps, masks=masks)


@pytest.mark.parametrize("measure", MEASURES)
def test_what_cannot_be_measured_is_nan(measure: Any) -> None:
    maps, masks = torch.rand(4, 6, 6), torch.rand(4, 6, 6) > 0.5
    maps[1, 2, 2], maps[2, 0, 0] = math.nan, math.inf
    masks[3] = False
    assert measure(None, None, maps, masks=masks).isnan().tolist() == [False, True, True, True]


# ---------------------------------------------------------------------------- controls


def test_controls() -> None:
    data = synthetic.scenes(300, seed=8)
    masks, others = data.masks[:, 0], data.masks[:, 1]
    area = masks.double().mean().item()
    noise = torch.rand(300, 32, 32, generator=torch.Generator().manual_seed(0))
    anything = data.masks.any(1).double()
    constant = torch.ones(300, 32, 32)
    for maps in (noise, constant):  # equal values are drawn, so a constant map is a random map
        assert bbox_score(None, None, maps, masks=masks).mean().item() == pytest.approx(area, rel=0.1)
        assert pointing_game(None, None, maps, masks=masks, tolerance=0).mean().item() == pytest.approx(area, abs=0.04)
        overlap = area * 0.2 / (area + 0.2)
        assert miou(None, None, maps, masks=masks).mean().item() == pytest.approx(overlap, rel=0.2)
    right = masks.double()
    assert bbox_score(None, None, right, masks=masks).tolist() == [1.0] * 300
    assert pointing_game(None, None, right, masks=masks, tolerance=0).tolist() == [1.0] * 300
    shown = math.ceil(0.2 * 32 * 32)  # more than any object has
    torch.testing.assert_close(miou(None, None, right, masks=masks), right.sum((1, 2)) / shown)
    one = class_discrimination(None, None, anything, masks=masks, other_masks=others)
    two = class_discrimination(None, None, anything, masks=others, other_masks=masks)
    torch.testing.assert_close(one + two, torch.ones(300).double())  # class-blind: 0.5 over both questions
    assert class_discrimination(None, None, right, masks=masks, other_masks=others).tolist() == [1.0] * 300


def test_ties_of_the_peak() -> None:
    maps = torch.zeros(1, 2, 4)
    maps[0, :, 1:3] = 1.0
    masks = torch.zeros(1, 2, 4)
    masks[0, 1, 2] = 1
    options: dict[str, Any] = {"masks": masks, "tolerance": 0}
    assert pointing_game(None, None, maps, ties="threshold", **options).item() == 0.25
    assert pointing_game(None, None, maps, ties="stable", **options).item() == 0.0
    drawn = [pointing_game(None, None, maps, seed=seed, **options).item() for seed in range(200)]
    assert np.mean(drawn) == pytest.approx(0.25, abs=0.08)


# ---------------------------------------------------------------------------- properties


@given(seed=st.integers(0, 10_000), levels=st.integers(2, 40), ties=st.sampled_from(["random", "stable", "threshold"]))
def test_only_the_order_counts(seed: int, levels: int, ties: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(0, levels, (3, 6, 5), generator=generator).double() / levels
    masks = torch.rand(3, 6, 5, generator=generator) > 0.6
    options: dict[str, Any] = {"masks": masks, "ties": ties, "seed": seed}
    for measure in (bbox_score, pointing_game):
        extra = {"tolerance": 1.0} if measure is pointing_game else {}
        expected = measure(None, None, maps, **options, **extra)
        for changed in (maps.exp(), 5 * maps - 3, maps**3):
            torch.testing.assert_close(measure(None, None, changed, **options, **extra), expected, equal_nan=True)
    if ties != "threshold":  # whose limit is an interpolated value
        torch.testing.assert_close(
            miou(None, None, maps.exp(), **options), miou(None, None, maps, **options), equal_nan=True
        )


@given(seed=st.integers(0, 10_000), ties=st.sampled_from(["random", "stable", "threshold"]))
def test_seeds_of_images_make_batching_irrelevant(seed: int, ties: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(0, 3, (4, 6, 5), generator=generator).double()
    masks = torch.rand(4, 6, 5, generator=generator) > 0.5
    seeds = [7, 3, 3, 11]
    for measure in (miou, bbox_score, pointing_game):
        extra = {"tolerance": 0.0} if measure is pointing_game else {}
        together = measure(None, None, maps, masks=masks, ties=ties, seed=seeds, **extra)
        alone = [
            measure(None, None, maps[i : i + 1], masks=masks[i : i + 1], ties=ties, seed=seeds[i], **extra)
            for i in range(4)
        ]
        torch.testing.assert_close(together, torch.cat(alone), equal_nan=True)


@given(seed=st.integers(0, 10_000), levels=st.integers(1, 40))
def test_ranks(seed: int, levels: int) -> None:
    maps = torch.randint(0, levels, (2, 1, 4, 5), generator=torch.Generator().manual_seed(seed)).double()
    together = ranks(maps, "threshold", 0)
    values = maps.flatten(1)
    higher = (values[:, None, :] > values[:, :, None]).sum(2).view_as(maps)
    assert torch.equal(together, higher)
    for ties in ("random", "stable"):
        own = ranks(maps, ties, seed)
        assert torch.equal(own.flatten(1).sort(1).values, torch.arange(20).expand(2, 20))
        assert (own >= higher).all()
    first = ranks(maps * 0, "stable", 0)
    assert torch.equal(first.flatten(1), torch.arange(20).expand(2, 20))


@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 100), shift=st.floats(-50, 50))
def test_sparseness_and_variation_properties(seed: int, scale: float, shift: float) -> None:
    maps = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(seed)).double()
    torch.testing.assert_close(sparseness(None, None, scale * maps), sparseness(None, None, maps))
    torch.testing.assert_close(total_variation(None, None, scale * maps + shift), total_variation(None, None, maps))
    torch.testing.assert_close(sparseness(None, None, maps.flip(1)), sparseness(None, None, maps))
    assert (sparseness(None, None, maps**3) > sparseness(None, None, maps)).all()  # sharper is sparser
