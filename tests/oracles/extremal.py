"""Extremal perturbations once more: masks by loops over pixels and parameters, and torch's own SGD."""

from __future__ import annotations

import math

import torch

from attrib_zoo.masking import blur


def smooth_mask(grid, size, step, sigma):
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


def shown(image, mask, strongest):
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


def error(values, share):
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


def optimised(gain, size, share, *, step, sigma, max_iter, variant="preserve"):
    """``gain(mask, flip)``; the mask after ``max_iter`` steps of torch's SGD."""
    margin = math.ceil(sigma)
    grid = torch.ones([math.ceil(length / step) for length in size], dtype=torch.float64, requires_grad=True)
    sgd = torch.optim.SGD([grid], lr=0.01, momentum=0.9, dampening=0.9)

    def crop(wide):
        return wide[margin : margin + size[0], margin : margin + size[1]]

    for number in range(max_iter):
        wide = smooth_mask(grid, size, step, sigma)
        mask, flip = crop(wide), number % 2 == 0
        good = gain(mask, flip) if variant != "delete" else 0
        bad = gain(1 - mask, flip) if variant != "preserve" else 0
        loss = bad - good + 300 * 1.0035**number * error(list(wide.flatten()), share)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        grid.data.clamp_(0, 1)
    return crop(smooth_mask(grid.detach(), size, step, sigma))
