"""Outlines of the objects in a scene, as signed distances: negative inside, in units of the object's half-width.

Ten object shapes and four distractors. Each is a function of the local coordinates ``x`` and ``y`` (any equal shapes;
the object is centred at the origin and extends to about 1; ``y`` points down, as rows do).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Outline = Callable[[Tensor, Tensor], Tensor]
Point = tuple[float, float]


def _segment(x: Tensor, y: Tensor, start: Point, end: Point) -> Tensor:
    """Distance to a line segment."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = ((x - start[0]) * dx + (y - start[1]) * dy) / (dx * dx + dy * dy)
    along = along.clamp(0, 1)
    return torch.hypot(x - start[0] - along * dx, y - start[1] - along * dy)


def _polyline(points: Sequence[Point], thickness: float) -> Outline:
    """A stroke along the points."""

    def outline(x: Tensor, y: Tensor) -> Tensor:
        pieces = [_segment(x, y, a, b) for a, b in pairwise(points)]
        return torch.stack(pieces).amin(0) - thickness

    return outline


def _polygon(points: Sequence[Point]) -> Outline:
    """A closed polygon, filled by the even-odd rule (so it may cross itself)."""

    def outline(x: Tensor, y: Tensor) -> Tensor:
        distance = torch.full_like(x, math.inf)
        inside = torch.zeros_like(x, dtype=torch.bool)
        for (ax, ay), (bx, by) in zip(points, [*points[1:], points[0]], strict=True):
            distance = torch.minimum(distance, _segment(x, y, (ax, ay), (bx, by)))
            if ay != by:
                crosses = (ay > y) != (by > y)
                inside ^= crosses & (x < (bx - ax) * (y - ay) / (by - ay) + ax)
        return torch.where(inside, -distance, distance)

    return outline


def _circle(radius: float, cx: float = 0.0, cy: float = 0.0) -> Outline:
    return lambda x, y: torch.hypot(x - cx, y - cy) - radius


def _shell(outline: Outline, half_width: float) -> Outline:
    """The band around an outline."""
    return lambda x, y: outline(x, y).abs() - half_width


def _without(outline: Outline, hole: Outline) -> Outline:
    return lambda x, y: torch.maximum(outline(x, y), -hole(x, y))


def _box(half_width: float, half_height: float) -> list[Point]:
    return [
        (-half_width, -half_height),
        (half_width, -half_height),
        (half_width, half_height),
        (-half_width, half_height),
    ]


def _spikes(count: int, outer: float, inner: float) -> list[Point]:
    """Corners on two circles alternately, the first one at the top."""
    turns = [math.pi * (k / count - 0.5) for k in range(2 * count)]
    radii = [outer, inner] * count
    return [(r * math.cos(t), r * math.sin(t)) for r, t in zip(radii, turns, strict=True)]


def _blob(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.65 - 0.15 * torch.sin(5 * torch.atan2(y, x))


def _dots(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_circle(0.34, -0.55)(x, y), _circle(0.34, 0.55)(x, y))


_ARM = 0.33
_PLUS = [(-_ARM, -0.95), (_ARM, -0.95), (_ARM, -_ARM), (0.95, -_ARM), (0.95, _ARM), (_ARM, _ARM)]
_PLUS += [(-px, -py) for px, py in _PLUS]
_ELL = [(-0.75, -0.9), (-0.15, -0.9), (-0.15, 0.3), (0.75, 0.3), (0.75, 0.9), (-0.75, 0.9)]
_TRIANGLE = [(math.sin(t), -math.cos(t)) for t in (0, 2 * math.pi / 3, 4 * math.pi / 3)]

SHAPES: dict[str, Outline] = {
    "disc": _circle(0.85),
    "ring": _shell(_circle(0.7), 0.22),
    "square": _polygon(_box(0.75, 0.75)),
    "frame": _shell(_polygon(_box(0.66, 0.66)), 0.18),
    "triangle": _polygon(_TRIANGLE),
    "plus": _polygon(_PLUS),
    "star": _polygon(_spikes(5, 1.0, 0.45)),
    "crescent": _without(_circle(0.9), _circle(0.72, 0.45)),
    "ell": _polygon(_ELL),
    "hourglass": _polygon([(-0.8, -0.9), (0.8, -0.9), (-0.8, 0.9), (0.8, 0.9)]),
}
"""The ten object shapes by name."""

DISTRACTORS: dict[str, Outline] = {
    "bar": _polygon(_box(0.95, 0.16)),
    "blob": _blob,
    "dots": _dots,
    "zigzag": _polyline([(-0.9, 0.3), (-0.45, -0.3), (0.0, 0.3), (0.45, -0.3), (0.9, 0.3)], 0.12),
}
"""Four things of no class."""
