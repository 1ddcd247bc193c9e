"""The terms of the training losses; each names its equation in the T-TAME paper."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attrib_zoo.backbone.targets import class_scores, one_logit
from attrib_zoo.masking import at_least_float32

FIT_SCORES = ("softmax", "sigmoid")
"""In which sense a model decides, as far as a fit can follow."""


def area(logits: Tensor, power: float, offset: float = 0.0) -> Tensor:
    """Mean of the masks' values raised to a power, ``E`` of Eq. 16 for each image.

    Computed from the logits: ``sigmoid(c)**p = exp(p * logsigmoid(c))`` has a finite derivative everywhere, whereas the
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
        own = class_scores(at_least_float32(outputs))
        return -F.logsigmoid(own.gather(1, classes.unsqueeze(1))[:, 0])
    return F.cross_entropy(two_logits(outputs), classes, reduction="none")


def two_logits(outputs: Tensor) -> Tensor:
    """``(N, K)`` logits with K ≥ 2 in float32 or better: one value z per image becomes the two logits (0, z)."""
    outputs = at_least_float32(outputs)
    if one_logit(outputs):
        z = outputs.reshape(-1)
        return torch.stack([torch.zeros_like(z), z], dim=1)
    return outputs


def order_mask(maps: Tensor, share: Tensor, softness: float = 0.5) -> Tensor:
    r"""Show a share of each map's cells, the highest first, with an edge soft enough to be differentiated.

    .. math:: m = \sigma\left( \frac{e - Q_{1-q}(e)}{\tau \, \mathrm{std}(e)} \right)

    with Q the quantile over the cells. Only the order and the relative distances of the values count, not their scale.

    Args:
        maps: e, ``(N, 1, h, w)``.
        share: q, ``(N,)`` in 0...1.
        softness: τ.

    Returns:
        m, ``(N, 1, h, w)`` in 0...1; 1/2 everywhere where a map is constant.
    """
    cells = maps.flatten(1)
    with torch.no_grad():
        ascending = cells.sort(1).values
        place = (1 - share.to(cells)) * (cells.shape[1] - 1)
        low = place.floor().long()
        high = (low + 1).clamp(max=cells.shape[1] - 1)
        below, above = ascending.gather(1, low[:, None]), ascending.gather(1, high[:, None])
        limit = torch.lerp(below, above, (place - low)[:, None])
        spread = cells.std(1, correction=0, keepdim=True)
        unit = softness * torch.where(spread > 0, spread, torch.ones_like(spread))
    return ((cells - limit) / unit).sigmoid().view_as(maps)


def gone(outputs: Tensor, classes: Tensor, score: str = "softmax") -> Tensor:
    """``-log(1 - p)`` of each image's class, ``(N,)``: 0 where the model no longer sees the class.

    Computed from the logits, ``log(1 - p) = logsumexp of the others - logsumexp of all``, or, for a sigmoid of z,
    ``logsigmoid(-z)``, which are finite where p rounds to 1.

    Args:
        outputs: ``(N, K)`` logits, or one value per image.
        classes: ``(N,)``.
        score: the kind of probability p: ``"softmax"``, or ``"sigmoid"`` of the class's own logit.
    """
    if score == "sigmoid":
        own = class_scores(at_least_float32(outputs))
        return -F.logsigmoid(-own.gather(1, classes.unsqueeze(1))[:, 0])
    logits = two_logits(outputs)
    others = logits.scatter(1, classes.unsqueeze(1), -torch.inf)
    return logits.logsumexp(1) - others.logsumexp(1)
