"""The methods that look at masked images, once more: NumPy loops at full resolution, an image and a mask at a time."""

from __future__ import annotations

import numpy as np
import torch

# ---------------------------------------------------------------------- pieces


def enlarge(grid, size):
    """Bilinear, half-pixel centres, clamped at the border: the definition, pixel by pixel."""
    grid = np.asarray(grid)
    (h, w), (height, width) = grid.shape, size
    out = np.zeros(size)
    for i in range(height):
        for j in range(width):
            y = min(max((i + 0.5) * h / height - 0.5, 0.0), h - 1.0)
            x = min(max((j + 0.5) * w / width - 0.5, 0.0), w - 1.0)
            top, left = int(y), int(x)
            bottom, right, dy, dx = min(top + 1, h - 1), min(left + 1, w - 1), y - top, x - left
            out[i, j] = (grid[top, left] * (1 - dx) + grid[top, right] * dx) * (1 - dy)
            out[i, j] += (grid[bottom, left] * (1 - dx) + grid[bottom, right] * dx) * dy
    return out


def stretch(grid):
    low, high = grid.min(), grid.max()
    return (grid - low) / (high - low) if high > low else np.zeros_like(grid)


def features(model, layer, image):
    """``(D, h, w)`` of one image, by a plain hook."""
    kept = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _, __, out: kept.append(out.detach().clone()))
    with torch.no_grad():
        model(image[None])
    handle.remove()
    return kept[-1][0].numpy()


def logits(model, image):
    with torch.no_grad():
        return model(image[None])[0].numpy()


def softmax(values):
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def score_of(model, image, target, score="softmax"):
    values = logits(model, image)
    return {"softmax": softmax, "logit": lambda v: v, "sigmoid": lambda v: 1 / (1 + np.exp(-v))}[score](values)[target]


def show(image, mask, hidden=0.0):
    mask = torch.tensor(mask, dtype=image.dtype)
    return image * mask + hidden * (1 - mask)


# ---------------------------------------------------------------------- methods


def score_cam(model, layer, image, target, score="softmax", hidden=0.0, channel_softmax=False, base=False, mask=None):
    """The map at full resolution; features must not be negative."""
    size, maps = image.shape[1:], features(model, layer, image)
    mask = mask or (lambda grid: stretch(enlarge(grid, size)))
    weights, total = {}, np.zeros(size)
    for k, grid in enumerate(maps):
        if grid.min() < grid.max():
            weights[k] = score_of(model, show(image, mask(grid), hidden), target, score)
    if base:
        weights = {k: weight - score_of(model, image, target, score) for k, weight in weights.items()}
    if channel_softmax:
        weights = dict(zip(weights, softmax(np.array(list(weights.values()))), strict=True))
    for k, weight in weights.items():
        total += weight * enlarge(maps[k], size)
    return np.maximum(total, 0)


def rise_mask(cells, offset, size):
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


def rise(model, image, target, masks, p1, score="softmax", hidden=0.0):
    total = sum(score_of(model, show(image, mask, hidden), target, score) * mask for mask in masks)
    return total / (len(masks) * p1)
