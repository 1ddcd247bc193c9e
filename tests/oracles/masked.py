"""The methods that look at masked images, once more: NumPy loops at full resolution, an image and a mask at a time."""

from __future__ import annotations

import numpy as np
import torch
from engine_cases import out_of_place

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


def gradients(model, layers, image, target, probability=True):
    """Of one score at some layers: ``{layer: (D, h, w)}``, by one plain backward pass through an out-of-place copy."""
    twin, kept = out_of_place(model), {}

    def keep(name):
        def hook(_, __, out):
            out.retain_grad()
            kept[name] = out
            return out.clone()

        return hook

    for name in layers:
        twin.get_submodule(name).register_forward_hook(keep(name))
    out = twin(image[None].clone().requires_grad_())[0]
    (out.softmax(0) if probability else out)[target].backward()
    return {name: out.grad[0].numpy() for name, out in kept.items()}


def otsu(values, scale=1.0):
    """Every split of the 256 levels is tried."""
    levels = np.minimum(np.round(np.asarray(values).ravel() * 256), 255)
    best, split = -1.0, None
    for j in range(1, 256):
        below, above = levels[levels < j], levels[levels >= j]
        if len(below) and len(above):
            between = len(below) * len(above) * (below.mean() - above.mean()) ** 2
            if between > best * (1 + 1e-12):
                best, split = between, j
    if split is None:
        return None
    raised = split * scale
    return (raised if (levels >= np.round(raised)).sum() < 0.1 * len(levels) else split) / 256


def otsu_of_ratios(ratios):
    """The same for numbers in (0, 1]: 256 bins, each its lower edge."""
    levels = np.minimum(np.floor(np.asarray(ratios) * 256), 255)
    best, split = 0.0, 1
    for j in range(1, 256):
        below, above = levels[levels < j], levels[levels >= j]
        if len(below) and len(above):
            between = len(below) * len(above) * (below.mean() - above.mean()) ** 2
            if between > best * (1 + 1e-12):
                best, split = between, j
    return split / 256


def sise(model, layers, image, target, chosen, *, kind="hard", scale=1.0, temperature=100.0, hidden=0.0, passes=None):
    """``chosen(ratios)`` gives the maps that are masks; every mask is made and kept."""
    size, total = image.shape[1:], None
    slopes = gradients(model, layers, image, target)
    for layer in layers:
        alpha, maps = slopes[layer].mean((1, 2)), features(model, layer, image)
        if alpha.max() <= 0:
            continue
        visible = np.zeros(size)
        for k in np.flatnonzero(chosen(alpha / alpha.max())):
            mask = stretch(enlarge(maps[k], size))
            if mask.sum() > 0:
                visible += score_of(model, show(image, mask, hidden), target) * mask / mask.sum()
                if passes is not None:
                    passes.append((layer, k))
        visible = stretch(visible)
        if total is None:
            total = visible
            continue
        if kind == "simple":
            total = (total + visible) * visible
        else:
            limit = otsu(visible, scale)
            if kind == "hard":
                total = (total + visible) * (visible > limit)
            else:
                total = (total + visible) / (1 + np.exp(-temperature * (visible - limit)))
    return total


def poly_cam(model, layers, image, target, variant="pm", lnorm=True, perc=0.1, full_range=False, upsampled=True):
    """From the deepest layer to the first of ``layers``; the denominators of the published formula."""
    size, previous, base = image.shape[1:], None, score_of(model, image, target)

    def normed(grid):
        low, high = np.percentile(grid, [perc, 100 - perc])
        return np.clip((grid - low) / max(high - low if full_range else high, 1e-12), 0, 1)

    for layer in layers[::-1]:
        maps = features(model, layer, image)
        heat = np.zeros(maps.shape[1:])
        for grid in maps:
            mask = enlarge(normed(grid), size)
            weight = 0.0
            if "p" in variant:
                weight += score_of(model, show(image, mask), target)
            if "m" in variant:
                weight += base - score_of(model, show(image, 1 - mask), target)
            heat += max(weight, 0) * grid
        heat = np.maximum(heat, 0)
        if previous is not None:
            if lnorm:
                heat = heat / np.maximum(enlarge(enlarge(heat, previous.shape), heat.shape), 1e-12)
            heat = heat * enlarge(previous, heat.shape)
        previous = np.maximum(heat, 0)
    return enlarge(normed(previous), size) if upsampled else normed(previous)


def sidu(model, layer, image, sigma=0.25, threshold=0.1, scaled=False, classes=softmax):
    size, maps, clean = image.shape[1:], features(model, layer, image), classes(logits(model, image))
    masks = [enlarge(((stretch(grid) if scaled else grid) > threshold).astype(float), size) for grid in maps]
    found = [classes(logits(model, show(image, mask))) for mask in masks]
    unique = np.array([sum(np.linalg.norm(a - b) for b in found) for a in found])
    unique = stretch(unique)
    similar = np.array([np.exp(-(np.linalg.norm(clean - a) ** 2) / (2 * sigma**2)) for a in found])
    return sum(s * u * mask for s, u, mask in zip(similar, unique, masks, strict=True))
