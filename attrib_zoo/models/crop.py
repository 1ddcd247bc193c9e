"""Where in a photograph the model looks: the part that its preprocessing keeps, found by sending a ramp through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attrib_zoo.masking import upsample

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, as shares of the photograph's width and height; it may reach beyond the photograph."""

_SIDE = 768  # pixels of the ramp's longer side


def seen(view: Callable[[Any], Tensor], width: int, height: int) -> Box:
    """The part of a photograph of this size that a preprocessing keeps, whatever it is made of.

    An image whose red rises from left to right and whose green from top to bottom goes through it; what comes out
    says where each pixel came from.

    Args:
        view: PIL image to ``(3, H, W)`` in [0, 1], as ``LoadedModel.view``.
        width: of the photograph.
        height: of the photograph.
    """
    from PIL import Image

    scale = min(1.0, _SIDE / max(width, height))
    ramp = np.zeros((max(1, round(height * scale)), max(1, round(width * scale)), 3), dtype=np.uint8)
    ramp[..., 0] = np.rint(255 * (np.arange(ramp.shape[1]) + 0.5) / ramp.shape[1])
    ramp[..., 1] = np.rint(255 * (np.arange(ramp.shape[0]) + 0.5) / ramp.shape[0])[:, None]
    found = view(Image.fromarray(ramp)).double()
    (left, right), (top, bottom) = _ends(found[0].median(0).values), _ends(found[1].median(1).values)
    return left, top, right, bottom


def _ends(values: Tensor) -> tuple[float, float]:
    """Where a ramp begins and ends, by a line through its middle: at the borders a filter bends it."""
    count = len(values)
    inner = slice(count // 8, count - count // 8) if count >= 16 else slice(0, count)
    places = torch.arange(count, dtype=torch.float64)[inner] + 0.5
    known = values[inner]
    keep = (known > 2 / 255) & (known < 253 / 255) if bool((known > 2 / 255).any()) else torch.ones_like(known).bool()
    places, known = places[keep], known[keep]
    if len(places) < 2:
        return 0.0, 1.0
    spread = places - places.mean()
    slope = float((spread * (known - known.mean())).sum() / spread.square().sum())
    start = float(known.mean()) - slope * float(places.mean())
    return start, start + slope * count


def placed(map: Tensor, box: Box, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A map of the part laid out over the whole photograph.

    Args:
        map: ``(h, w)``, at any resolution.
        box: of :func:`seen`.
        size: height and width of the photograph.

    Returns:
        The map ``(H, W)``, 0 outside of the part, and whether each pixel is inside, ``(H, W)``.
    """
    height, width = size
    left, right = (round(share * width) for share in (box[0], box[2]))
    top, bottom = (round(share * height) for share in (box[1], box[3]))
    right, bottom = max(right, left + 1), max(bottom, top + 1)
    large = upsample(map[None, None], (bottom - top, right - left))[0, 0]
    whole = torch.zeros(height, width, dtype=large.dtype)
    inside = torch.zeros(height, width, dtype=torch.bool)
    first, last = slice(max(top, 0), min(bottom, height)), slice(max(left, 0), min(right, width))
    whole[first, last] = large[first.start - top : first.stop - top, last.start - left : last.stop - left]
    inside[first, last] = True
    return whole, inside
