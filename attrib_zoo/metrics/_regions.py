"""Where the evidence is known to be: masks as they are, boxes as masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attrib_zoo.errors import InputError
from attrib_zoo.metrics._maps import read_maps

Boxes = Tensor | Sequence[Tensor]


def box_masks(boxes: Boxes, size: Sequence[int]) -> Tensor:
    """The pixels whose centres lie in any of an image's boxes, ``(N, 1, H, W)`` bool.

    A box is ``(x1, y1, x2, y2)`` in pixels of the image: the whole image is ``(0, 0, W, H)``. What reaches beyond the
    image is cut off; a box without a pixel centre (such as all zeros) adds nothing.

    Args:
        boxes: ``(N, 4)``, ``(N, M, 4)``, or a list of N tensors ``(M, 4)`` or ``(4,)``, M of any length.
        size: ``(H, W)``.

    Raises:
        InputError: Boxes of another shape, with a corner that is not a number, or with ``x2 < x1`` or ``y2 < y1``.
    """
    rows = torch.arange(size[0]) + 0.5
    columns = torch.arange(size[1]) + 0.5
    return torch.stack([_paint(box, rows, columns) for box in boxes])[:, None]


def _paint(boxes: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    table = torch.as_tensor(boxes)
    if table.ndim not in (1, 2) or (table.shape[-1] != 4 and table.numel()):
        raise InputError(
            f"boxes: must be (N, 4), (N, M, 4) or N tensors (M, 4) of x1, y1, x2, y2, got {tuple(table.shape)} for one "
            "image"
        )
    table = table.reshape(-1, 4).double()
    if not bool(table.isfinite().all()) or bool((table[:, 2:] < table[:, :2]).any()):
        raise InputError(f"boxes: must be finite x1, y1, x2, y2 with x1 <= x2 and y1 <= y2, got {table.tolist()}")
    rows, columns = rows.to(table.device), columns.to(table.device)
    left, top, right, bottom = table[:, :, None].unbind(1)
    across = (left <= columns) & (columns < right)
    down = (top <= rows) & (rows < bottom)
    return (down[:, :, None] & across[:, None, :]).any(0)


def read_case(
    inputs: Tensor | None, attributions: Tensor, masks: Tensor | None, boxes: Boxes | None, name: str = "masks"
) -> tuple[Tensor, Tensor]:
    """The maps ``(N, 1, h, w)`` and the true region ``(N, 1, H, W)`` on their device; boxes are rasterised.

    Boxes are in pixels of the inputs, or of the maps where there are no inputs.
    """
    if isinstance(inputs, Tensor):
        batch = len(inputs)
    else:
        batch = len(attributions) if isinstance(attributions, Tensor) and attributions.ndim else 0
    maps = read_maps(attributions, batch)
    if (masks is None) == (boxes is None):
        got = "neither" if masks is None else "both"
        raise InputError(f"{name}: pass either masks or boxes of the true region, got {got}")
    if boxes is not None:
        size = maps.shape[-2:] if inputs is None else inputs.shape[-2:]
        if len(boxes) != batch:
            raise InputError(f"boxes: must hold an entry for each of N={batch} maps, got {len(boxes)}")
        return maps, box_masks(boxes, size).to(maps.device)
    if not isinstance(masks, Tensor):
        raise InputError(f"{name}: must be a tensor, got {type(masks).__name__}")
    region = masks.unsqueeze(1) if masks.ndim == 3 else masks
    if region.ndim != 4 or region.shape[:2] != (batch, 1):
        raise InputError(f"{name}: must be (N, H, W) or (N, 1, H, W) for N={batch} maps, got {tuple(masks.shape)}")
    return maps, region.to(maps.device)
