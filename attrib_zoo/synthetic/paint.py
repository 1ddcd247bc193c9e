"""How a scene is made: from uniform numbers to objects with positions and colours, and from these to pixels."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attrib_zoo.synthetic.shapes import DISTRACTORS, SHAPES

COLOURS = {
    "red": (0.90, 0.12, 0.12),
    "yellow": (0.93, 0.86, 0.12),
    "green": (0.15, 0.72, 0.20),
    "cyan": (0.12, 0.82, 0.88),
    "blue": (0.15, 0.22, 0.92),
    "magenta": (0.88, 0.18, 0.82),
}
"""The classes of ``cue="colour"`` and their pure colour (RGB in 0...1)."""

MAX_DISTRACTORS = 3  # at most, and at least one
MAX_OBJECTS = 3  # at most
_SLOTS = MAX_DISTRACTORS + MAX_OBJECTS  # painted in this order: objects lie on top
_TRIES = 12  # positions tried per thing
_FIELD = 6  # cells per side of a smooth random field
_COLUMNS = 1024  # uniform numbers per image; more than are needed below
MARK = 6  # owner of the mark's pixels: the slot after the last
_MARK_CELLS = 3  # per side of the mark, black and white in turn
_MARK_WIDTH = 3 / 16  # of the image
_OUTLINES = (*SHAPES.values(), *DISTRACTORS.values())


class Things(NamedTuple):
    """What is in the images, whatever their size: one row per image, one column per slot."""

    outline: Tensor  # (N, M) index into _OUTLINES
    centre: Tensor  # (N, M, 2) in half-widths of the image
    radius: Tensor  # (N, M) in half-widths of the image
    angle: Tensor  # (N, M)
    colours: Tensor  # (N, M, 2, 3)
    texture: Tensor  # (N, M) 0 stripes, 1 checker, 2 smooth noise, 3 plain
    wave: Tensor  # (N, M, 3) direction, frequency, phase of a stripe
    field: Tensor  # (N, M, 6, 6)
    ground: Tensor  # (N, 2, 3) colours of the background
    ground_field: Tensor  # (N, 6, 6)
    there: Tensor  # (N, M) bool
    label: Tensor  # (N, M) class, -1 for distractors

    def part(self, rows: slice, device: torch.device | str | None) -> Things:
        """Some of the images, on that device."""
        return Things(*(column[rows].to(device) for column in self))


class Uniform:
    """A table of uniform numbers, one row per image, handed out column by column.

    The first n images are the same however many follow, and no option shifts the numbers of the others.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.table = torch.rand(n, _COLUMNS, generator=torch.Generator().manual_seed(seed))
        self.used = 0

    def take(self, *shape: int) -> Tensor:
        """The next numbers of every image, ``(N, *shape)``."""
        start, self.used = self.used, self.used + math.prod(shape)
        return self.table[:, start : self.used].reshape(-1, *shape)


def lay_out(uniform: Uniform, cue: str, num_classes: int, fewest: int, most: int) -> Things:
    """Decide what is where; every call draws the same numbers, whatever the options."""
    take = uniform.take
    is_object = torch.arange(_SLOTS) >= MAX_DISTRACTORS

    amount_distractors = 1 + (take() * MAX_DISTRACTORS).long()
    amount_objects = fewest + (take() * (most - fewest + 1)).long()
    rank = torch.cat([torch.arange(MAX_DISTRACTORS), torch.arange(MAX_OBJECTS)])
    there = rank < torch.where(is_object, amount_objects[:, None], amount_distractors[:, None])

    classes = take(len(SHAPES))[:, :num_classes].argsort(1)[:, :MAX_OBJECTS]
    classes = F.pad(classes, (MAX_DISTRACTORS, MAX_OBJECTS - classes.shape[1]), value=-1)
    any_shape = (take(_SLOTS) * len(SHAPES)).long()
    any_distractor = len(SHAPES) + (take(_SLOTS) * len(DISTRACTORS)).long()
    shape = classes if cue == "shape" else any_shape
    outline = torch.where(is_object, shape, any_distractor)

    radius = (0.34 + 0.18 * take(_SLOTS)) * torch.where(is_object, 1.0, 0.8)
    angle = (2 * take(_SLOTS) - 1) * torch.where(is_object, 0.45, math.pi)
    centre = _place(2 * take(_SLOTS, _TRIES, 2) - 1, radius, there)

    spread = 0.9 if cue == "shape" else 0.1  # of the background's hue
    grey = 0.12 + 0.4 * take(1, 1)  # too dark to pass for yellow or cyan
    ground = grey + (take(1, 3) - 0.5) * spread + (take(2, 3) - 0.5) * 0.5 * spread + (take(2, 1) - 0.5) * 0.2
    ground = ground.clamp(0, 1)
    pair = _away_from(ground.mean(1), take(_SLOTS, 2, 8, 3))
    greys = _away_from(ground.mean(1), take(_SLOTS, 2, 8, 1).expand(-1, -1, -1, -1, 3))
    if cue == "colour":
        pure = torch.tensor(list(COLOURS.values()))[classes.clamp(min=0) % len(COLOURS)][:, :, None]
        pair = torch.where(is_object[:, None, None], 0.75 * pure + 0.25 * pair, greys)
    return Things(
        outline=outline,
        centre=centre,
        radius=radius,
        angle=angle,
        colours=pair,
        texture=(take(_SLOTS) * 4).long(),
        wave=take(_SLOTS, 3),
        field=take(_SLOTS, _FIELD, _FIELD),
        ground=ground,
        ground_field=take(_FIELD, _FIELD),
        there=there,
        label=classes,
    )


def _place(tries: Tensor, radius: Tensor, there: Tensor) -> Tensor:
    """Take, per object, the first position that is clear of the earlier ones, else the clearest.

    Objects choose before distractors. ``tries`` is ``(N, M, 12, 2)`` in -1...1.
    """
    positions = tries * (1 - 0.9 * radius)[:, :, None, None]
    centre = torch.zeros_like(positions[:, :, 0])
    placed: list[int] = []
    for slot in (*range(MAX_DISTRACTORS, _SLOTS), *range(MAX_DISTRACTORS)):
        gap = torch.full_like(positions[:, slot, :, 0], 0.08)  # wide enough
        for other in placed:
            distance = (positions[:, slot] - centre[:, other, None]).norm(dim=-1)
            free = distance - (radius[:, slot] + radius[:, other])[:, None]
            gap = torch.where(there[:, other, None], torch.minimum(gap, free), gap)
        best = gap.argmax(1)
        centre[:, slot] = positions[torch.arange(len(best)), slot, best]
        placed.append(slot)
    return centre


def place_marks(uniform: Uniform, things: Things) -> Tensor:
    """The position of each image's mark, ``(N, 2)``: the corner with the lowest x and y, in widths of the image.

    On a grid of sixteenths, so that its cells are whole pixels at 16, 32, 48 ... px. It is drawn after everything else,
    so that the objects are the same with and without it.
    """
    steps = round((1 - _MARK_WIDTH) * 16) + 1
    corners = (uniform.take(_TRIES, 2) * steps).floor() / 16
    centres = 2 * (corners + _MARK_WIDTH / 2) - 1
    distance = (centres[:, :, None] - things.centre[:, None]).norm(dim=-1)
    free = distance - things.radius[:, None] - _MARK_WIDTH * math.sqrt(2)
    is_object = torch.arange(_SLOTS) >= MAX_DISTRACTORS
    free = free.masked_fill(~(things.there & is_object)[:, None], math.inf)
    best = free.amin(2).clamp(max=0.1).argmax(1)
    return corners[torch.arange(len(best)), best]


def _stamp(images: Tensor, owner: Tensor, corners: Tensor, marked: Tensor) -> Tensor:
    """Paint the marks of some images over everything else: a small board of black and white squares."""
    size = images.shape[-1]
    axis = (torch.arange(size, device=images.device) + 0.5) / size
    across, down = (((axis - corner[:, None]) / _MARK_WIDTH * _MARK_CELLS).floor() for corner in corners.unbind(1))
    x, y = across[:, None, :], down[:, :, None]
    inside = (x >= 0) & (x < _MARK_CELLS) & (y >= 0) & (y < _MARK_CELLS) & marked[:, None, None]
    owner[inside] = MARK
    return torch.where(inside[:, None], ((x + y) % 2)[:, None], images)


def _away_from(ground: Tensor, tries: Tensor) -> Tensor:
    """Take, of the colours tried ``(N, M, 2, 8, 3)``, the first that is 0.45 away from the background ``(N, 3)``."""
    distance = (tries - ground[:, None, None, None]).norm(dim=-1).clamp(max=0.45)
    best = distance.argmax(-1)[..., None, None].expand(*tries.shape[:3], 1, 3)
    return tries.gather(3, best).squeeze(3)


def render(things: Things, noise: Tensor, corners: Tensor, marked: Tensor) -> tuple[Tensor, Tensor]:
    """Paint the images ``(N, 3, S, S)`` and say which slot owns each pixel ``(N, S, S)``, -1 for the background.

    ``corners`` ``(N, 2)`` are those of :func:`place_marks`, ``marked`` ``(N,)`` says which images get the mark.
    """
    size = noise.shape[-1]
    axis = (torch.arange(size, device=noise.device) + 0.5) * (2 / size) - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    ground = enlarge(things.ground_field, size)[:, None]
    first, second = things.ground[:, :, :, None, None].unbind(1)
    images = first + (second - first) * ground
    owner = torch.full_like(things.label[:, 0], -1)[:, None, None].expand(-1, size, size).clone()
    for slot in range(_SLOTS):
        if not things.there[:, slot].any():
            continue
        outside = _distance(things, slot, x, y) * (size / 2)  # in pixels
        cover = ((0.5 - outside).clamp(0, 1) * things.there[:, slot, None, None])[:, None]
        first, second = things.colours[:, slot, :, :, None, None].unbind(1)
        paint = first + (second - first) * _pattern(things, slot, x, y)[:, None]
        images = images * (1 - cover) + paint * cover  # exact where the cover is 0 or 1
        owner[cover[:, 0] > 0.5] = slot
    if marked.any():
        images = _stamp(images, owner, corners, marked)
    return (images + noise * (0.04 if size <= 48 else 0.06)).clamp(0, 1), owner


def enlarge(field: Tensor, size: int) -> Tensor:
    """A random field ``(N, h, w)`` as a smooth one ``(N, S, S)``."""
    return F.interpolate(field[:, None], (size, size), mode="bicubic", align_corners=False)[:, 0]


def _distance(things: Things, slot: int, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance ``(N, S, S)`` to the outline of a slot, in half-widths of the image."""
    out = x.new_empty(len(things.label), *x.shape)
    for number in things.outline[:, slot].unique().tolist():
        rows = things.outline[:, slot] == number
        cx, cy = things.centre[rows, slot, :, None, None].unbind(1)
        radius = things.radius[rows, slot, None, None]
        cos, sin = (f(things.angle[rows, slot, None, None]) for f in (torch.cos, torch.sin))
        u, v = (x - cx) / radius, (y - cy) / radius
        out[rows] = _OUTLINES[number](cos * u + sin * v, cos * v - sin * u) * radius
    return out


def _pattern(things: Things, slot: int, x: Tensor, y: Tensor) -> Tensor:
    """The texture of a slot, ``(N, S, S)`` in 0...1: how much of its second colour to use."""
    direction, frequency, phase = things.wave[:, slot, :, None, None].unbind(1)
    cos, sin = torch.cos(direction * math.pi), torch.sin(direction * math.pi)
    along, across = (cos * x + sin * y) * (9 + 9 * frequency), (cos * y - sin * x) * (9 + 9 * frequency)
    stripes = torch.sin(along + 6.3 * phase)
    checker = stripes * torch.sin(across + 6.3 * phase)
    smooth = enlarge(things.field[:, slot], x.shape[-1])
    kinds = torch.stack([(4 * stripes).sigmoid(), (4 * checker).sigmoid(), smooth, torch.zeros_like(smooth)], 1)
    kind = things.texture[:, slot, None, None, None].expand(-1, 1, *x.shape)
    return kinds.gather(1, kind)[:, 0].clamp(0, 1)
