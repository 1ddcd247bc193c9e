"""The grid pointing game: mosaics of images of different classes, and the share of a map inside the target cell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrib_zoo.errors import InputError, OptionError, check_number
from attrib_zoo.metrics._maps import Seed, finite_rows, read_maps, uniform
from attrib_zoo.metrics._scores import check_inputs


@dataclass(frozen=True)
class Mosaics:
    """Mosaics of ``side`` x ``side`` images, each with the class of one of them as target.

    Attributes:
        inputs: ``(M, C, H, W)``, the mosaics.
        target: ``(M,)``, the target class.
        cell: ``(M,)``, its cell, counted row by row from 0.
        image: ``(M,)``, the index of its image.
        members: ``(M, side**2)``, the indices of the images in the cells.
        classes: ``(M, side**2)``, their classes, all different.
        side: images along each side.
    """

    inputs: Tensor
    target: Tensor
    cell: Tensor
    image: Tensor
    members: Tensor
    classes: Tensor
    side: int

    def __len__(self) -> int:
        return len(self.inputs)


def grid_mosaics(
    inputs: Tensor,
    classes: Tensor,
    confidence: Tensor | None = None,
    *,
    least: float = 0.5,
    side: int = 2,
    shrink: bool = True,
    seed: Seed = 0,
) -> Mosaics:
    """A mosaic for each image on which the model is confident, filled with images of other, distinct classes.

    Args:
        inputs: ``(N, C, H, W)``, standardised as the model expects.
        classes: ``(N,)``, what each image shows; the model's decision where there is no label.
        confidence: ``(N,)``, the probability of that class. Images below ``least`` take no part; ``None`` takes all.
        least: see ``confidence``.
        side: images along each side, 2 in the usual game.
        shrink: ``True`` resizes mosaics to the size of the images, so that they fit any model; ``False`` keeps the
            images' size, so that a mosaic is ``side`` times as large, as in the paper, for models that take images of
            any size.
        seed: for positions and partners: one int per image (its number in the data set), or an int, to which image i
            adds i.

    Returns:
        :class:`Mosaics` of M <= N: an image gets no mosaic where fewer than ``side**2 - 1`` other classes take part.

    Raises:
        InputError: classes or confidences do not match the images.
        OptionError: an option is outside its range, or the images do not divide into cells.

    Example:
        >>> mosaics = grid_mosaics(torch.randn(5, 3, 32, 32), torch.arange(5))
        >>> mosaics.inputs.shape, mosaics.classes.shape
        (torch.Size([5, 3, 32, 32]), torch.Size([5, 4]))

    References:
        Böhle et al., Convolutional dynamic alignment networks for interpretable classifications, CVPR 2021.
    """
    check_inputs(inputs)
    check_number("side", side, least=2)
    check_number("least", least, least=0.0, most=1.0)
    batch, height, width = len(inputs), *inputs.shape[-2:]
    _per_image("classes", classes, batch)
    if classes.is_floating_point():
        raise InputError(f"classes: must be integers, got {classes.dtype}")
    if confidence is not None:
        _per_image("confidence", confidence, batch)
    if shrink and (height % side or width % side):
        raise OptionError(
            f"side: must divide the images, {height} x {width}, got {side}; crop them, or use shrink=False"
        )
    labels = classes.cpu()
    sure = torch.ones(batch, dtype=torch.bool) if confidence is None else confidence.cpu() >= least
    draws = uniform(seed, (batch, batch + 1))
    rows = [_members(i, labels, sure, draws[i], side**2) for i in range(batch) if bool(sure[i])]
    kept = [(image, cell, members) for image, cell, members in rows if members]
    image, cell = (torch.tensor([row[i] for row in kept], dtype=torch.long) for i in (0, 1))
    members = torch.tensor([row[2] for row in kept], dtype=torch.long).view(len(kept), side**2)
    size = (height // side, width // side)
    small = F.interpolate(inputs.detach(), size, mode="bilinear", antialias=True) if shrink else inputs.detach()
    return Mosaics(
        _tiled(small[members.to(inputs.device)], side),
        classes[image.to(classes.device)],
        cell,
        image,
        members,
        labels[members],
        side,
    )


def grid_pointing_game(
    model: nn.Module | None,
    inputs: Tensor | None,
    attributions: Tensor,
    target: Any = None,
    *,
    cell: Tensor,
    side: int = 2,
    normalize: bool = True,
) -> Tensor:
    """Share of a mosaic's positive evidence that lies in the target cell: ``sum_cell E+ / sum E+``; higher is better.

    Chance, and the value of a map that detects objects but not classes, is ``1 / side**2``. Make the mosaics with
    :func:`grid_mosaics`, and explain their targets.

    Args:
        model: Not used; there for a uniform signature.
        inputs: Not used.
        attributions: The maps of the mosaics: ``(N, C, H, W)`` (channels are averaged), ``(N, 1, h, w)`` or
            ``(N, h, w)``; smaller ones are used at their size, with a map cell that overlaps two members divided
            between them by area.
        target: Not used; the maps belong to it already.
        cell: ``(N,)``, the target cell of each mosaic, counted row by row from 0.
        side: Images along each side.
        normalize: Subtract the minimum of a map that is positive everywhere, so that a constant offset (RISE has a
            large one) does not count. ``False`` takes values as they are, as in the paper.

    Returns:
        ``(N,)``: 0 for a map without positive values, NaN where the map is not finite.

    Raises:
        InputError: The maps or cells do not match the mosaics.

    References:
        Böhle et al., Convolutional dynamic alignment networks for interpretable classifications, CVPR 2021.
    """
    count = len(attributions) if isinstance(attributions, Tensor) and attributions.ndim else 0
    maps = read_maps(attributions, count if inputs is None else len(inputs))
    check_number("side", side, least=2)
    _per_image("cell", cell, len(maps))
    asked = cell.to(maps.device).long()
    if bool(((asked < 0) | (asked >= side**2)).any()):
        raise InputError(f"cell: must be in 0..{side**2 - 1} for side={side}, got {sorted(set(cell.tolist()))}")
    if normalize:
        maps = maps - maps.amin((-2, -1), keepdim=True).clamp(min=0)
    energy = F.adaptive_avg_pool2d(_finer(maps.clamp(min=0), side), side).flatten(1)
    total = energy.sum(1)
    share = energy.gather(1, asked.unsqueeze(1))[:, 0] / torch.where(total > 0, total, 1.0)
    return share.masked_fill(~finite_rows(maps), torch.nan)


def _finer(maps: Tensor, side: int) -> Tensor:
    """Each value repeated along an axis that ``side`` does not divide, so that no value lies in two members."""
    for axis in (-2, -1):
        if maps.shape[axis] % side:
            maps = maps.repeat_interleave(side, axis)
    return maps


def _members(asked: int, labels: Tensor, sure: Tensor, draw: Tensor, cells: int) -> tuple[int, int, list[int]]:
    """The target image, its cell, and the images of all cells; no images where there are too few other classes."""
    cell = int(draw[-1] * cells)
    seen = {int(labels[asked])}
    others: list[int] = []
    for image in draw[:-1].argsort().tolist():
        if len(others) < cells - 1 and bool(sure[image]) and int(labels[image]) not in seen:
            seen.add(int(labels[image]))
            others.append(image)
    if len(others) < cells - 1:
        return asked, cell, []
    return asked, cell, [*others[:cell], asked, *others[cell:]]


def _tiled(members: Tensor, side: int) -> Tensor:
    """``(M, side**2, C, h, w)`` to ``(M, C, side * h, side * w)``, row by row."""
    rows = members.unflatten(1, (side, side))  # (M, down, across, C, h, w)
    tiled: Tensor = rows.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3).contiguous()
    return tiled


def _per_image(name: str, values: Any, batch: int) -> None:
    if not isinstance(values, Tensor) or values.shape != (batch,):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InputError(f"{name}: must be a tensor with one value for each of the {batch} images, got {got}")
