"""Extremal perturbations against loops and torch's SGD, and on models whose evidence is known."""

from __future__ import annotations

import math

import engine_cases as cases
import pytest
import strategies as zoo
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from perturbation_cases import close
from torch import nn

from attrib_zoo import ExtremalPerturbation
from attrib_zoo.errors import OptionError, UnsupportedModelError
from attrib_zoo.masking import blur
from attrib_zoo.methods.extremal import SmoothMask, area_error

SMALL = {"step": 3, "sigma": 4.0, "blur": 2.0}


# ---------------------------------------------------------------------- the reference: loops over pixels and parameters


def mask_by_pixels(grid, size, step, sigma):
    """A pixel at a time; differentiable."""
    margin, reach = math.ceil(sigma), 1 + math.ceil(sigma / step)
    first = [length / 2 - (count - 1) / 2 * step for length, count in zip(size, grid.shape, strict=True)]
    rows = []
    for y in range(-margin, size[0] + margin):
        row = []
        for x in range(-margin, size[1] + margin):
            found = []
            near = [
                min(range(count), key=lambda i, p=p, f=f: abs(p + 0.5 - f - i * step))
                for p, f, count in zip((y, x), first, grid.shape, strict=True)
            ]
            for i in range(grid.shape[0]):
                for j in range(grid.shape[1]):
                    dy, dx = (abs(p + 0.5 - f - c * step) for p, f, c in zip((y, x), first, (i, j), strict=True))
                    if (dy <= reach * step or i == near[0]) and (dx <= reach * step or j == near[1]):
                        z = math.hypot(dy, dx) / sigma
                        found.append(math.exp(-2 * max(z - 0.5, 0) ** 2) * grid[i, j])
            found = torch.stack(found)
            row.append((found * (20 * found).softmax(0)).sum())
        rows.append(torch.stack(row))
    return torch.stack(rows)


def shown_by_pixels(image, mask, strongest):
    """A pixel at a time: between the two levels of blur that its mask lies between."""
    levels = [blur(image[None], strongest * (1 - level / 7))[0] for level in range(8)]
    out = torch.zeros_like(image)
    columns = []
    for y in range(mask.shape[0]):
        for x in range(mask.shape[1]):
            place = 7 * mask[y, x]
            low = min(int(place.detach()), 6)
            columns.append(levels[low][:, y, x] * (low + 1 - place) + levels[low + 1][:, y, x] * (place - low))
    return torch.stack(columns, 1).view_as(out)


def area_error_by_sorting(values, share):
    """Sorted pixels against a step; equal ones share what stands at their places."""
    values = sorted(values, key=lambda value: float(value.detach()))
    zeros = math.floor((1 - share) * len(values))
    groups = {}
    for place, value in enumerate(values):
        groups.setdefault(round(float(value.detach()) * 2**10), []).append(place)
    total = 0
    for places in groups.values():
        wanted = sum(place >= zeros for place in places) / len(places)
        total = total + sum((values[place] - wanted) ** 2 for place in places)
    return total / len(values)


def optimised_by_torch(gain, size, share, *, step, sigma, max_iter, variant="preserve"):
    """``gain(mask, flip)``; the mask after ``max_iter`` steps of torch's SGD."""
    margin = math.ceil(sigma)
    grid = torch.ones([math.ceil(length / step) for length in size], dtype=torch.float64, requires_grad=True)
    sgd = torch.optim.SGD([grid], lr=0.01, momentum=0.9, dampening=0.9)

    def crop(wide):
        return wide[margin : margin + size[0], margin : margin + size[1]]

    for number in range(max_iter):
        wide = mask_by_pixels(grid, size, step, sigma)
        mask, flip = crop(wide), number % 2 == 0
        good = gain(mask, flip) if variant != "delete" else 0
        bad = gain(1 - mask, flip) if variant != "preserve" else 0
        loss = bad - good + 300 * 1.0035**number * area_error_by_sorting(list(wide.flatten()), share)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        grid.data.clamp_(0, 1)
    return crop(mask_by_pixels(grid.detach(), size, step, sigma))


@settings(max_examples=5)
@given(st.integers(3, 9), st.integers(3, 9), st.integers(1, 4), st.floats(0.7, 5), zoo.SEEDS)
def test_smooth_masks_pixel_by_pixel(height, width, step, sigma, seed):
    smooth = SmoothMask((height, width), step, sigma, torch.zeros((), dtype=torch.float64))
    grid = zoo.normal(2, *smooth.cells, seed=seed).sigmoid()
    wanted = torch.stack([mask_by_pixels(one, (height, width), step, sigma) for one in grid])
    close(smooth(grid), wanted)
    assert smooth.crop(smooth(grid)).shape == (2, height, width)


@settings(max_examples=20)
@given(st.integers(2, 30), st.floats(0.05, 1), st.booleans(), zoo.SEEDS)
def test_the_area_error_and_its_gradient(count, share, ties, seed):
    values = zoo.normal(2, count, seed=seed).sigmoid()
    values = ((values * 4).round() / 4 if ties else values).requires_grad_()
    shares = torch.tensor([share, 0.3], dtype=torch.float64)
    found = area_error(values, shares)
    wanted = torch.stack([area_error_by_sorting(list(row), a) for row, a in zip(values, (share, 0.3), strict=True)])
    close(found.detach(), wanted.detach())
    close(torch.autograd.grad(found.sum(), values)[0], torch.autograd.grad(wanted.sum(), values)[0])


@pytest.mark.parametrize("options", [{}, {"variant": "delete"}, {"variant": "dual", "contrastive": True}], ids=str)
def test_the_optimisation_against_torchs(options):
    model, images = zoo.small_cnn().double(), zoo.batch(2, 8, dtype=torch.float64)
    explainer = ExtremalPerturbation(model, max_iter=4, areas=(0.2, 0.5), **SMALL, **options)
    found = explainer.attribute(images, [1, 4])
    assert found.std() > 1e-3
    for n, target in enumerate([1, 4]):

        def gain(mask, flip, image=images[n], target=target):
            shown = shown_by_pixels(image, mask, 2.0)
            logits = model((shown.flip(2) if flip else shown)[None])[0]
            others = torch.cat([logits[:target], logits[target + 1 :]])
            return logits[target] - (others.max() if "contrastive" in options else 0)

        wanted = [
            optimised_by_torch(
                gain, (8, 8), area, step=3, sigma=4.0, max_iter=4, variant=options.get("variant", "preserve")
            )
            for area in (0.2, 0.5)
        ]
        close(found[n, 0], sum(wanted) / 2)


class Block(nn.Module):
    """The score of class 1 is the sum of a block of pixels that alternate, so that a blur takes it away."""

    def __init__(self, rows, columns):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 32, 32))
        signs = (torch.arange(32)[:, None] + torch.arange(32)) % 2 * 2.0 - 1
        self.weight.data[0, rows, columns] = signs[rows, columns] / 20

    def forward(self, x):
        score = (x * self.weight).sum((1, 2, 3))
        return torch.stack([0 * score, score], 1)


def checkerboard():
    return ((torch.arange(32)[:, None] + torch.arange(32)) % 2 * 2.0 - 1).expand(1, 3, 32, 32).clone()


def test_the_mask_lies_on_the_evidence_and_has_its_area():
    rows, columns = slice(4, 16), slice(16, 28)
    model, share = Block(rows, columns), 144 / 40**2  # of the image and the margin of 4 pixels around it
    explainer = ExtremalPerturbation(model, areas=(share,), max_iter=300, step=3, sigma=4.0, blur=3.0)
    with cases.untouched(model):
        heat = explainer.attribute(checkerboard(), 1)
    heat = heat[0, 0]
    assert heat.min() >= 0
    assert heat.max() <= 1
    assert heat[rows, columns].sum() > 0.7 * heat.sum()  # of 14 % of the image; the rest is the slope of the mask
    assert heat[rows, columns].mean() > 0.8
    smooth = max(float(heat.diff(dim=axis).abs().max()) for axis in (0, 1))
    assert smooth < 0.5
    assert abs(float(heat.sum()) / 40**2 - share) < 0.015


@pytest.mark.parametrize(("height", "width", "step", "sigma"), [(32, 48, 1, 3.0), (64, 56, 2, 5.25), (16, 16, 1, 1.5)])
def test_the_kernel_grows_with_the_image(height, width, step, sigma):
    model, images = zoo.small_cnn(), zoo.batch(1, size=64)[..., :height, :width]
    scaled = ExtremalPerturbation(model, max_iter=3).attribute(images, 1)
    assert torch.equal(scaled, ExtremalPerturbation(model, max_iter=3, step=step, sigma=sigma).attribute(images, 1))
    assert not torch.equal(
        scaled, ExtremalPerturbation(model, max_iter=3, step=step, sigma=2 * sigma).attribute(images, 1)
    )


def test_several_targets_and_chunks_are_the_single_ones():
    model, images = zoo.small_cnn().double(), zoo.batch(2, dtype=torch.float64)
    options = {"max_iter": 3, **SMALL}
    many = ExtremalPerturbation(model, chunk_size=3, areas=[0.1, 0.4], **options).attribute_many(images, [3, 0])
    for t, target in enumerate((3, 0)):
        for n in range(2):
            alone = [
                ExtremalPerturbation(model, areas=(a,), **options).attribute(images[n : n + 1], target)
                for a in (0.1, 0.4)
            ]
            close(many[n, t], (alone[0] + alone[1])[0] / 2)


def test_a_model_without_gradients():
    class Closed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = zoo.small_cnn()

        def forward(self, x):
            with torch.no_grad():
                return self.model(x)

    with pytest.raises(UnsupportedModelError, match=r"Closed must let gradients through.*use RISE"):
        ExtremalPerturbation(Closed(), max_iter=2, **SMALL).attribute(zoo.batch(1), 0)


def test_contrast_needs_classes():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = zoo.small_cnn()

        def forward(self, x):
            return self.model(x).unsqueeze(2)

    with pytest.raises(UnsupportedModelError, match=r"contrastive: needs several classes.*got \(1, 5, 1\)"):
        ExtremalPerturbation(Deep(), contrastive=True, max_iter=2, **SMALL).attribute(zoo.batch(1), (1, 0))


@pytest.mark.parametrize("target", [0, 1])
def test_contrast_of_one_logit_is_that_of_its_two_classes(target):
    class Both(nn.Module):
        def __init__(self, single):
            super().__init__()
            self.single = single

        def forward(self, x):
            z = self.single(x)
            return torch.cat([-z, z], 1)

    single = zoo.OneValue(zoo.small_cnn(), column=True)
    options = {"contrastive": True, "max_iter": 4, **SMALL}
    found = ExtremalPerturbation(single, **options).attribute(zoo.batch(1), target)
    wanted = ExtremalPerturbation(Both(single), **options).attribute(zoo.batch(1), target)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": "stages"}, "layers: must be None, for ExtremalPerturbation looks at no layer"),
        ({"areas": 0.1}, "areas: must be a tuple of shares"),
        ({"areas": ()}, "areas: must be"),
        ({"areas": (0.1, 2)}, "areas: must be a number above 0 and at most 1, got 2"),
        ({"variant": "keep"}, "variant: must be one of"),
        ({"max_iter": 0}, "max_iter: must be a positive integer"),
        ({"step": 7.0}, "step: must be a positive integer"),
        ({"sigma": 0}, "sigma: must be a number above 0,"),
        ({"blur": -1}, "blur: must be a number above 0,"),
        ({"score": "p"}, "score: must be one of"),
        ({"chunk_size": 0}, "chunk_size: must be"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(OptionError, match=words):
        ExtremalPerturbation(zoo.small_cnn(), **options)
