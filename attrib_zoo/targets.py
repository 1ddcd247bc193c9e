"""Which output is explained: every target form of Captum, per example, on any output of a model."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attrib_zoo.errors import TargetError, UnsupportedModelError

SCORES = ("logit", "softmax", "logsoftmax", "sigmoid")
_FORMS = "an int, a list or 1-D tensor of N ints, a tuple of ints, a list of N tuples, or None"


@dataclass(frozen=True)
class Target:
    """One or more outputs of each example, checked against the model's output.

    Attributes:
        index: ``(N, T, d)`` int64 positions in the ``d`` axes that follow the batch axis; of a model with one logit
            per example ``(N, T, 1)``, the class 0 or 1.
    """

    index: Tensor

    @property
    def count(self) -> int:
        """T, the number of targets of each example."""
        return self.index.shape[1]

    @property
    def classes(self) -> Tensor:
        """``(N, T)``: the position on the first output axis; 0 or 1 for one logit per example."""
        return self.index[..., 0]

    def select(self, outputs: Tensor, score: str = "logit") -> Tensor:
        """The targeted scores, ``(N, T)``, of outputs ``(N, ...)``.

        Args:
            outputs: what the model returned.
            score: as in :func:`class_scores`.
        """
        scores = class_scores(outputs, score)
        rows = torch.arange(len(scores), device=scores.device).unsqueeze(1)
        index = self.index.to(scores.device)
        where = (rows, *index.unbind(-1))
        return scores[where]

    def rows(self, rows: Tensor) -> Target:
        """The targets of these examples, in this order (for masked copies: ``rows`` says whose copy each is)."""
        return Target(self.index[rows.to(self.index.device)])


@dataclass(frozen=True)
class TargetQuery:
    """What the caller asked for, before the model's output is known.

    Attributes:
        target: any of Captum's forms, or ``None`` for the model's own decision; 0 or 1 for one logit per example.
        many: ``target`` lists several targets per example (see :meth:`Attribution.attribute_many`).
    """

    target: Any = None
    many: bool = False

    def resolve(self, outputs: Tensor) -> Target:
        """Check the request against the clean outputs ``(N, ...)`` and turn it into positions."""
        if self.many:
            return _many(self.target, outputs)
        return Target(_positions(self.target, outputs).unsqueeze(1))


def one_logit(outputs: Tensor) -> bool:
    """Whether the model gives one value per example, ``(N,)`` or ``(N, 1)``: the logit of class 1 against class 0."""
    return outputs.shape[1:].numel() == 1


def class_scores(outputs: Tensor, score: str = "logit") -> Tensor:
    """The scores of all classes, ``(N, K, ...)``.

    One logit ``z`` per example stands for two classes, with the logits ``-z`` and ``z``, and the probabilities
    ``sigmoid(-z)`` and ``sigmoid(z)``.

    Args:
        outputs: what the model returned, ``(N, K, ...)``, or one logit per example.
        score: ``"logit"`` (the outputs as they are), ``"softmax"`` or ``"logsoftmax"`` over the first output axis, or
            ``"sigmoid"``, for classes that do not exclude each other; all but the logits in float32 or better.
    """
    if score != "logit":
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    if one_logit(outputs):
        outputs = torch.stack([-outputs.reshape(-1), outputs.reshape(-1)], 1)
        functions = {"softmax": torch.sigmoid, "logsoftmax": F.logsigmoid, "sigmoid": torch.sigmoid}
        return outputs if score == "logit" else functions[score](outputs)
    if score == "sigmoid":
        return outputs.sigmoid()
    if score == "logit":
        return outputs
    return outputs.softmax(1) if score == "softmax" else outputs.log_softmax(1)


def check_outputs(outputs: object, batch: int) -> Tensor:
    """The model's output as one floating-point tensor with the batch first, or a clear error."""
    if not isinstance(outputs, Tensor):
        advice = "wrap it in a module whose forward returns the scores alone"
        if isinstance(getattr(outputs, "logits", None), Tensor):
            advice += ": class Logits(torch.nn.Sequential): forward = lambda self, x: self[0](x).logits"
        raise UnsupportedModelError(
            f"model: must return one tensor of scores (N, K), got {type(outputs).__name__}; {advice}"
        )
    if outputs.ndim == 0 or outputs.shape[0] != batch:
        raise UnsupportedModelError(
            f"model: must return one row of scores per image (N={batch}), got shape {tuple(outputs.shape)}; "
            "wrap it in a module whose forward returns (N, K)"
        )
    if not outputs.is_floating_point():
        raise UnsupportedModelError(
            f"model: must return floating-point scores, got {outputs.dtype}; return the logits, not the decision"
        )
    return outputs


def _positions(target: Any, outputs: Tensor) -> Tensor:
    """One target per example as ``(N, d)`` positions."""
    if target is None:
        return _decision(outputs)
    binary = one_logit(outputs)
    limits = (2,) if binary else tuple(outputs.shape[1:])
    axes = len(limits)
    rows = _per_example(target, len(outputs))
    if any(len(row) != axes for row in rows):
        raise TargetError(
            f"target: must index {axes} axis(es) of an output of shape {tuple(outputs.shape)} "
            f"({limits[0]} classes), got {target!r}; pass {_FORMS}"
        )
    for row in rows:
        if any(not 0 <= i < limit for i, limit in zip(row, limits, strict=True)):
            shown = row[0] if axes == 1 else row
            if binary:
                raise TargetError(
                    "target: must be 0 or 1 (the model has one logit, whose sign decides between 2 classes: 0 is the "
                    f"negated logit), got {shown}"
                )
            raise TargetError(
                f"target: must be a class in 0..{limits[0] - 1} (the model has {limits[0]} classes"
                f"{'' if axes == 1 else f', output shape {tuple(outputs.shape)}'}), got {shown}"
            )
    return torch.tensor(rows, dtype=torch.long, device=outputs.device).view(len(outputs), axes)


def _decision(outputs: Tensor) -> Tensor:
    """The model's own decision: the argmax, or the sign of one logit."""
    if one_logit(outputs):
        return (outputs.reshape(-1, 1) > 0).long()  # a tie goes to class 0, as in the argmax of (-z, z)
    if outputs.ndim > 2:
        raise TargetError(
            f"target: must be given for an output of shape {tuple(outputs.shape)}, where 'the model's decision' "
            "is not one class; pass a tuple with one index for each axis after the batch"
        )
    return outputs.argmax(dim=1, keepdim=True)


def _per_example(target: Any, batch: int) -> list[tuple[int, ...]]:
    """Any of Captum's forms as one tuple of ints for each of ``batch`` examples."""
    if isinstance(target, Tensor):
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool or target.ndim > 1:
            raise TargetError(
                f"target: must be an integer tensor of shape () or (N,), got {target.dtype} {tuple(target.shape)}; "
                f"pass {_FORMS}"
            )
        target = target.tolist()
        if isinstance(target, list) and len(target) == 1:
            target = target[0]
    elif hasattr(target, "tolist") and hasattr(target, "dtype"):  # NumPy, without importing it
        target = target.tolist()
    if isinstance(target, list):
        if len(target) != batch:
            raise TargetError(
                f"target: must hold one entry for each of the {batch} images, got {len(target)}; pass {_FORMS}"
            )
        return [_row(entry) for entry in target]
    return [_row(target)] * batch


def _row(entry: Any) -> tuple[int, ...]:
    if isinstance(entry, tuple):
        return tuple(_int(i) for i in entry)
    return (_int(entry),)


def _int(value: Any) -> int:
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()  # a bool or a float then shows itself
    if isinstance(value, (bool, float)):
        raise TargetError(f"target: must be an integer class, got {value!r}; pass {_FORMS}")
    try:
        return operator.index(value)
    except TypeError:
        raise TargetError(f"target: must be an integer class, got {value!r}; pass {_FORMS}") from None


def _many(targets: Any, outputs: Tensor) -> Target:
    """``(T,)`` targets for every image, or ``(N, T)`` with a row for each."""
    form = "a list of T classes for every image, or N lists of T classes"
    if hasattr(targets, "tolist") and hasattr(targets, "dtype"):  # a tensor, or NumPy without importing it
        targets = targets.tolist()
    if not isinstance(targets, Sequence) or isinstance(targets, (str, bytes)) or len(targets) == 0:
        raise TargetError(f"targets: must be {form}, got {targets!r}")
    if all(isinstance(row, (list, Tensor)) for row in targets):
        table = [row.tolist() if isinstance(row, Tensor) else row for row in targets]
        if len(table) != len(outputs) or len({len(row) for row in table}) != 1 or not table[0]:
            raise TargetError(
                f"targets: must be {form}; got {len(table)} lists of lengths {sorted({len(r) for r in table})} "
                f"for {len(outputs)} images"
            )
        columns = [list(column) for column in zip(*table, strict=True)]
    else:
        columns = [[entry] * len(outputs) for entry in targets]
    return Target(torch.stack([_positions(column, outputs) for column in columns], dim=1))
