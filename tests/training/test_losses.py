"""The loss terms against sums written out value by value from Eq. 11-17 and from what the released code computes."""

from __future__ import annotations

import math

import pytest
import strategies as zoo
import torch
from hypothesis import given
from hypothesis import strategies as st

from attrib_zoo.training.losses import area, cross_entropy, two_logits, variation


def logistic(c):
    return 1 / (1 + math.exp(-c))


def paper_area(logits, power):
    """Eq. 16 for each image: S counts the values of one image's maps."""
    found = []
    for image in logits.tolist():
        total, count = 0.0, 0
        for grid in image:
            for row in grid:
                for c in row:
                    total += logistic(c) ** power
                    count += 1
        found.append(total / count)
    return found


def squared_differences(grid):
    """Between neighbours inside one map."""
    total = 0.0
    for j in range(len(grid)):
        for k in range(len(grid[0])):
            if j + 1 < len(grid):
                total += (grid[j + 1][k] - grid[j][k]) ** 2
            if k + 1 < len(grid[0]):
                total += (grid[j][k + 1] - grid[j][k]) ** 2
    return total


def paper_variation(masks):
    """Eq. 17 for each image: 1/(2S)."""
    count = masks[0].numel()
    return [sum(map(squared_differences, image)) / (2 * count) for image in masks.tolist()]


def released_variation(masks, border):
    """The sum over all maps of the batch over 2B, and the squares on each side of each map."""
    total = 0.0
    for image in masks.tolist():
        for grid in image:
            total += squared_differences(grid)
            sides = [grid[0], grid[-1], [row[0] for row in grid], [row[-1] for row in grid]]
            total += border * sum(v**2 for side in sides for v in side)
    return total / (2 * len(masks))


def close(found, wanted, tolerance=1e-10):
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------- against loops


@given(zoo.maps(most=5), st.floats(0.05, 2))
def test_area_is_equation_16(logits, power):
    close(area(logits, power), paper_area(logits, power))


@given(zoo.maps(most=5))
def test_variation_is_equation_17(logits):
    close(variation(logits.sigmoid()), paper_variation(logits.sigmoid()))


@given(zoo.maps(least=2, most=5), st.sampled_from([0.0, 0.3, 1.7]))
def test_the_released_sum_is_the_mean_over_the_batch_of_total(logits, border):
    masks = logits.sigmoid()
    close(variation(masks, total=True, border=border).mean(), released_variation(masks, border))


@pytest.mark.parametrize("shape", [(4, 4, 5, 5), (3, 1, 5, 4), (1, 4, 3, 5), (1, 1, 1, 1)])
def test_the_whole_loss_of_a_batch(shape):
    """M = B, M = 1 and B = 1."""
    logits, out = zoo.normal(*shape), zoo.normal(shape[0], 6, seed=5)
    classes = out.argmax(1).roll(1) % 6
    ce = [
        math.log(sum(math.exp(v) for v in row)) - row[y] for row, y in zip(out.tolist(), classes.tolist(), strict=True)
    ]
    e, v = paper_area(logits, 0.3), paper_variation(logits.sigmoid())
    wanted = sum(1.5 * c + 2 * (a + 0.005 * b) for c, a, b in zip(ce, e, v, strict=True)) / shape[0]
    found = 1.5 * cross_entropy(out, classes) + 2 * (area(logits, 0.3) + 0.005 * variation(logits.sigmoid()))
    close(found.mean(), wanted)


# ---------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("m", [0.02, 0.5, 0.97])
def test_a_constant_map(m):
    logits = torch.full((2, 3, 4, 6), math.log(m / (1 - m)), dtype=torch.float64)
    close(area(logits, 0.3), [m**0.3] * 2)
    close(variation(logits.sigmoid()), [0.0] * 2)
    released = 2 * area(logits, 0.3, 5e-4) + 0.01 * variation(logits.sigmoid(), total=True, border=0.3)
    close(released, [2 * (m + 5e-4) ** 0.3 + 0.01 * 0.3 * 3 * (2 * 4 + 2 * 6) * m**2 / 2] * 2)


def test_a_map_of_ones_costs_one_area_and_no_variation():
    ones = torch.full((1, 2, 3, 3), 1e3, dtype=torch.float64)
    close(area(ones, 0.3), [1.0])
    close(variation(ones.sigmoid()), [0.0])


@pytest.mark.parametrize("maps", [1, 3])
@pytest.mark.parametrize(("h", "w", "wanted"), [(6, 5, 49 / 60), (2, 2, 4 / 8), (1, 7, 6 / 14)])
def test_a_checkerboard(maps, h, w, wanted):
    board = (torch.arange(h)[:, None] + torch.arange(w)) % 2
    found = variation(board.double().expand(2, maps, h, w))
    close(found, [(h * (w - 1) + w * (h - 1)) / (2 * h * w)] * 2)
    close(found, [wanted] * 2)


def test_the_border_counts_corners_twice():
    masks = torch.zeros(1, 1, 3, 4, dtype=torch.float64)
    masks[0, 0, 0, 0] = 1
    without = variation(masks, total=True)
    close(without, [1.0])  # two differences of 1, over 2
    close(variation(masks, total=True, border=0.3) - without, [0.3 * 2 / 2])
    masks = torch.zeros(1, 1, 3, 4, dtype=torch.float64)
    masks[0, 0, 1, 1] = 1  # not on the border
    close(variation(masks, border=5.0), variation(masks))


# ---------------------------------------------------------------------- scaling


@given(zoo.maps(least=2, most=4))
def test_repeating_images_or_maps(logits):
    masks = logits.sigmoid()
    more_images, more_maps = logits.repeat(2, 1, 1, 1), logits.repeat(1, 2, 1, 1)
    for offset in (0.0, 5e-4):
        close(area(more_images, 0.3, offset).mean(), area(logits, 0.3, offset).mean())
        close(area(more_maps, 0.3, offset), area(logits, 0.3, offset))
    close(variation(more_images.sigmoid()).mean(), variation(masks).mean())
    close(variation(more_maps.sigmoid()), variation(masks))
    released = {"total": True, "border": 0.3}
    close(variation(more_images.sigmoid(), **released).mean(), variation(masks, **released).mean())
    close(variation(more_maps.sigmoid(), **released), 2 * variation(masks, **released))


# ---------------------------------------------------------------------- numbers


def test_gradients():
    logits = zoo.normal(2, 3, 4, 5).requires_grad_()
    for term in (
        lambda c: area(c, 0.3),
        lambda c: area(c, 0.3, 5e-4),
        lambda c: variation(c.sigmoid()),
        lambda c: variation(c.sigmoid(), total=True, border=0.3),
    ):
        assert torch.autograd.gradcheck(term, (logits,))


def test_the_gradient_of_the_area_is_the_closed_form():
    logits = zoo.normal(2, 3, 4, 5).requires_grad_()
    (found,) = torch.autograd.grad(area(logits, 0.3).sum(), logits)
    mask = logits.detach().sigmoid()
    close(found, 0.3 * mask**0.3 * (1 - mask) / mask[0].numel())


@given(zoo.maps(), st.floats(0.1, 1))
def test_the_form_from_logits_is_the_power(logits, power):
    close(area(logits, power), (logits.sigmoid() ** power).mean((1, 2, 3)), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [-200.0, 200.0])
@pytest.mark.parametrize("offset", [0.0, 5e-4])
def test_saturated_maps_have_finite_values_and_gradients(dtype, value, offset):
    logits = torch.full((1, 2, 3, 3), value, dtype=dtype).requires_grad_()
    loss = (area(logits, 0.3, offset) + variation(logits.sigmoid(), total=True, border=0.3)).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()


# ---------------------------------------------------------------------- decisions


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_one_value_is_two_logits(shape):
    z = zoo.normal(*shape)
    found = two_logits(z)
    assert torch.equal(found, torch.stack([torch.zeros(4, dtype=torch.float64), z.reshape(-1)], 1))
    assert torch.equal(found.argmax(1), (z.reshape(-1) > 0).long())
    y = torch.tensor([0, 1, 1, 0])
    close(
        cross_entropy(z, y),
        [math.log(1 + math.exp(v)) - v * k for v, k in zip(z.reshape(-1).tolist(), y.tolist(), strict=True)],
    )


def test_logits_are_read_in_float32_or_better():
    assert two_logits(zoo.normal(2, 3)).dtype == torch.float64
    half = torch.tensor([[0.0, 12.0]], dtype=torch.float16)
    assert two_logits(half).dtype == torch.float32
    loss = cross_entropy(half, torch.tensor([1]))  # below the resolution of half precision
    torch.testing.assert_close(loss.item(), math.log1p(math.exp(-12)), rtol=1e-2, atol=0)


@given(zoo.outputs(axes=1))
def test_cross_entropy_of_each_image(out):
    classes = out.argmin(1)
    wanted = [
        math.log(sum(math.exp(v - row[y]) for v in row)) for row, y in zip(out.tolist(), classes.tolist(), strict=True)
    ]
    close(cross_entropy(out, classes), wanted)
