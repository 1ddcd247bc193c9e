"""RISE against masks and sums made pixel by pixel, and what its randomness may depend on."""

from __future__ import annotations

import numpy as np
import perturbation_cases as passes
import pytest
import strategies as zoo
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from perturbation_cases import Counted, close
from torch import nn

from attrib_zoo import RISE
from attrib_zoo.errors import OptionError
from attrib_zoo.methods.rise import RandomMasks
from attrib_zoo.testing.colours import ColourNet, colour_scenes


def mask_of(cells, offset, size):
    """One mask from its grid: every pixel interpolated by itself, with mirrored borders."""
    s = len(cells)
    cell = [-(-length // s) for length in size]

    def mirror(i):
        return -i if i < 0 else 2 * (s - 1) - i if i >= s else i

    def neighbours(pixel, axis):
        place = (pixel + 0.5) * s / ((s + 1) * cell[axis]) - 0.5
        low = int(np.floor(place))
        return (mirror(low), 1 - (place - low)), (mirror(low + 1), place - low)

    out = np.zeros(size)
    for i in range(size[0]):
        for j in range(size[1]):
            for row, share in neighbours(i + offset[0], 0):
                for column, part in neighbours(j + offset[1], 1):
                    out[i, j] += share * part * cells[row][column]
    return out


def rise_by_a_loop(model, image, target, masks, p1, score="softmax", hidden=0.0):
    total = sum(passes.score_of(model, passes.show(image, mask, hidden), target, score) * mask for mask in masks)
    return total / (len(masks) * p1)


def drawn(count, s, p1, seed, size):
    """The masks of a seed, one after the other: two numbers for the place, s*s for the cells."""
    numbers = torch.rand(count, s * s + 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cell = [-(-length // s) for length in size]
    return [
        mask_of((row[2:].view(s, s) < p1).double().tolist(), [int(row[i] * cell[i]) for i in range(2)], size)
        for row in numbers
    ]


@settings(max_examples=12)
@given(st.integers(2, 8), st.integers(3, 20), st.integers(3, 20), st.floats(0.1, 1), zoo.SEEDS)
def test_masks_are_grids_enlarged_with_mirrored_borders(s, height, width, p1, seed):
    wanted = drawn(3, s, p1, seed, (height, width))
    made = RandomMasks(3, s, p1, seed, torch.zeros(1, 3, height, width, dtype=torch.float64))
    close(made(0, 3), torch.stack([torch.tensor(mask) for mask in wanted]), 1e-12)
    close(made(1, 2), torch.tensor(wanted[1])[None], 1e-12)
    assert made(0, 3).min() >= 0
    assert made(0, 3).max() <= 1 + 1e-12


@pytest.mark.parametrize(
    "options", [{}, {"score": "logit"}, {"baseline": 0.6}, {"p1": 0.2, "s": 3, "seed": 9}], ids=str
)
def test_against_a_loop(options):
    model, images = zoo.small_cnn().double(), zoo.normal(3, 3, 16, 12)
    found = RISE(model, n_masks=20, **options).attribute(images, [1, 4, 0])
    p1 = options.get("p1", 0.5)
    masks = drawn(20, options.get("s", 7), p1, options.get("seed", 0), (16, 12))
    told = {"score": options.get("score", "softmax"), "hidden": options.get("baseline", 0.0)}
    for n, target in enumerate([1, 4, 0]):
        close(found[n, 0], rise_by_a_loop(model, images[n], target, masks, p1, **told))


def test_the_mean_of_the_masks_is_p1():
    masks = RandomMasks(4000, 7, 0.3, 0, torch.zeros(1, 3, 28, 28))(0, 4000)
    error = masks.std(0) / 4000**0.5
    assert ((masks.mean(0) - 0.3).abs() < 5 * error).all()
    assert masks.mean(0).sub(0.3).abs().mean() < 0.01


def test_a_constant_classifier_gives_the_mean_mask():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = nn.Parameter(torch.tensor([0.0, 2.0]))

        def forward(self, x):
            return self.scores.expand(len(x), -1)

    images = torch.zeros(1, 3, 14, 14)
    heat = RISE(Constant(), n_masks=30).attribute(images, 1)
    mean = RandomMasks(30, 7, 0.5, 0, images)(0, 30).mean(0)
    close(heat[0, 0], mean * torch.tensor([0.0, 2.0]).softmax(0)[1] / 0.5, 1e-5)


def test_seeds_make_the_masks_and_masks_the_maps():
    images, classes, _ = colour_scenes(2)
    explainers = [RISE(ColourNet(), n_masks=500, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (explainer.attribute(images, classes[:, 0]) for explainer in explainers)
    assert torch.equal(again, first)
    assert not torch.allclose(other, first)
    for n in range(2):
        assert torch.corrcoef(torch.stack([other[n, 0].flatten(), first[n, 0].flatten()]))[0, 1] > 0.5


def test_more_masks_begin_with_the_same():
    like = torch.zeros(1, 3, 14, 14)
    assert torch.equal(RandomMasks(50, 7, 0.5, 3, like)(0, 20), RandomMasks(20, 7, 0.5, 3, like)(0, 20))


@pytest.mark.parametrize(("n_masks", "options"), [(8000, {}), (4000, {"n_masks": 4000})], ids=["default", "VGG16"])
def test_the_passes_of_the_papers(n_masks, options):
    class Mean(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    counted = Counted(Mean())
    RISE(counted, chunk_size=500, **options).attribute_many(torch.randn(1, 3, 7, 7), [0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
    assert counted.images == 1 + n_masks
    assert counted.most == 500


@settings(max_examples=6)
@given(st.integers(1, 60), st.integers(1, 4))
def test_chunks_and_company_say_nothing(chunk, count):
    model, images = zoo.small_cnn().double(), zoo.batch(4, dtype=torch.float64)
    together = RISE(model, n_masks=13, chunk_size=chunk).attribute(images[:count], 2)
    for n in range(count):
        close(together[n], RISE(model, n_masks=13).attribute(images[n : n + 1], 2)[0])


def test_a_progress_bar(capsys):
    RISE(zoo.small_cnn(), n_masks=10).attribute(zoo.batch(2), 0, show_progress=True)
    shown = capsys.readouterr().err
    assert "RISE" in shown
    assert "/20" in shown
    RISE(zoo.small_cnn(), n_masks=10).attribute(zoo.batch(2), 0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": "stages.2"}, "layers: must be None, for RISE looks at no layer, got 'stages.2'"),
        ({"n_masks": 0}, "n_masks: must be a positive integer, got 0"),
        ({"n_masks": 10.0}, "n_masks: must be a positive integer"),
        ({"s": 1}, "s: must be an integer of at least 2"),
        ({"p1": 0}, "p1: must be a number above 0 and at most 1, got 0"),
        ({"p1": 1.5}, "p1: must be"),
        ({"seed": True}, "seed: must be an integer"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(OptionError, match=words):
        RISE(zoo.small_cnn(), **options)
