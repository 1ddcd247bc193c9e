"""The terms of the training losses; each names its equation in the T-TAME paper."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attrib_zoo.targets import class_scores, one_logit

FIT_SCORES = ("softmax", "sigmoid")
"""In which sense a model decides, as far as a fit can follow."""


def area(logits: Tensor, power: float, offset: float = 0.0) -> Tensor:
    """Mean of the masks' values to a power, ``E`` of Eq. 16 for each image.

    Computed from the logits: ``sigmoid(c)**p = exp(p * logsigmoid(c))`` has a finite derivative everywhere, where the
    direct power gives NaN gradients once the sigmoid underflows.

    Args:
        logits: ``(N, M, h, w)``, the attention maps before the sigmoid.
        power: λ4; below 1 it favours masks that are either open or closed.
        offset: added to the mask before the power (the released code's 5e-4); 0 in the paper.

    Returns:
        ``(N,)``.
    """
    values = torch.exp(power * F.logsigmoid(logits)) if offset == 0 else (logits.sigmoid() + offset) ** power
    return values.mean(dim=(1, 2, 3))


def variation(masks: Tensor, *, total: bool = False, border: float = 0.0) -> Tensor:
    """Squared differences of neighbouring mask values, ``V`` of Eq. 17 for each image.

    Args:
        masks: ``(N, M, h, w)`` in [0, 1].
        total: ``False`` divides by twice the number of values of one image's masks (the paper's 2S); ``True`` by 2
            only, so that the mean over the batch is the released code's sum over 2B.
        border: weight of the squared values on the first and last row and column (corners twice); 0 in the paper.

    Returns:
        ``(N,)``.
    """
    over = (1, 2, 3)
    found = masks.diff(dim=-1).square().sum(over) + masks.diff(dim=-2).square().sum(over)
    if border:
        rows = masks[..., [0, -1], :].square().sum(over)
        columns = masks[..., :, [0, -1]].square().sum(over)
        found = found + border * (rows + columns)
    return found / (2 if total else 2 * masks[0].numel())


def cross_entropy(outputs: Tensor, classes: Tensor, score: str = "softmax") -> Tensor:
    """Cross-entropy of each image's class, ``(N,)``; a model with one value z per image has the logits (0, z).

    Args:
        outputs: ``(N, K)`` logits, or one value per image.
        classes: ``(N,)``.
        score: ``"softmax"``, or ``"sigmoid"`` for the class's own binary cross-entropy.
    """
    if score == "sigmoid":
        own = class_scores(outputs.to(torch.promote_types(outputs.dtype, torch.float32)))
        return -F.logsigmoid(own.gather(1, classes.unsqueeze(1))[:, 0])
    return F.cross_entropy(two_logits(outputs), classes, reduction="none")


def two_logits(outputs: Tensor) -> Tensor:
    """``(N, K)`` logits with K ≥ 2 in float32 or better: one value z per image becomes the two logits (0, z)."""
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    if one_logit(outputs):
        z = outputs.reshape(-1)
        return torch.stack([torch.zeros_like(z), z], dim=1)
    return outputs
