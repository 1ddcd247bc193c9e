"""Which output is explained: every target form of Captum, per example, on any output of a model."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attrib_zoo.errors import TargetError, UnsupportedModelError
from attrib_zoo.masking import at_least_float32

SCORES = ("logit", "softmax", "logsoftmax", "sigmoid")
_FORMS = "an int, a list or 1-D tensor of N ints, a tuple of ints, a list of N tuples, or None"


@dataclass(frozen=True)
class Target:
    """One or more outputs of each example, checked against the model's output.

    Attributes:
        index: ``(N, T, d)`` int64 positions in the ``d`` axes that follow the batch axis; ``d = 0`` for a model
            with one value per example.
    """

    index: Tensor

    @property
    def count(self) -> int:
        """T, the number of targets of each example."""
        return self.index.shape[1]

    @property
    def classes(self) -> Tensor:
        """``(N, T)``: the position on the first output axis (class 0 for one value per example)."""
        if self.index.shape[2] == 0:
            return self.index.new_zeros(self.index.shape[:2])
        return self.index[..., 0]

    def select(self, outputs: Tensor, score: str = "logit") -> Tensor:
        """The targeted scores, ``(N, T)``, of outputs ``(N, ...)``.

        Args:
            outputs: what the model returned.
            score: ``"logit"`` (the output as it is), ``"softmax"``, ``"logsoftmax"`` or ``"sigmoid"``, computed in
                float32 or better over the first output axis.
        """
        if score != "logit":
            outputs = at_least_float32(outputs)
            if score == "sigmoid":
                outputs = outputs.sigmoid()
            elif self.index.shape[2] == 0 or outputs.shape[1] == 1:
                raise UnsupportedModelError(
                    f"score: {score!r} needs at least two classes, got outputs of shape {tuple(outputs.shape)}; "
                    "use score='logit' or 'sigmoid'"
                )
            else:
                outputs = outputs.softmax(1) if score == "softmax" else outputs.log_softmax(1)
        if self.index.shape[2] == 0:
            return outputs.unsqueeze(1).expand(-1, self.count)
        rows = torch.arange(len(outputs), device=outputs.device).unsqueeze(1)
        index = self.index.to(outputs.device)
        where = (rows, *index.unbind(-1))
        return outputs[where]

    def rows(self, rows: Tensor) -> Target:
        """The targets of these examples, in this order (for masked copies: ``rows`` says whose copy each is)."""
        return Target(self.index[rows.to(self.index.device)])


@dataclass(frozen=True)
class TargetQuery:
    """What the caller asked for, before the model's output is known.

    Attributes:
        target: any of Captum's forms, or ``None`` for the model's own decision.
        many: ``target`` lists several targets per example (see :meth:`Attribution.attribute_many`).
    """

    target: Any = None
    many: bool = False

    def resolve(self, outputs: Tensor) -> Target:
        """Check the request against the clean outputs ``(N, ...)`` and turn it into positions."""
        if self.many:
            return _many(self.target, outputs)
        return Target(_positions(self.target, outputs).unsqueeze(1))


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
    axes = outputs.ndim - 1
    single = axes == 0 or outputs[0].numel() == 1
    if target is None:
        return _decision(outputs)
    if single and axes == 0:
        raise TargetError(
            f"target: the model gives one value per example (shape {tuple(outputs.shape)}), got {target!r}; "
            "pass target=None"
        )
    rows = _per_example(target, len(outputs))
    if any(len(row) != axes for row in rows):
        raise TargetError(
            f"target: must index {axes} axis(es) of an output of shape {tuple(outputs.shape)} "
            f"({outputs.shape[1]} classes), got {target!r}; pass {_FORMS}"
        )
    limits = tuple(outputs.shape[1:])
    for row in rows:
        if any(not 0 <= i < limit for i, limit in zip(row, limits, strict=True)):
            shown = row[0] if axes == 1 else row
            raise TargetError(
                f"target: must be a class in 0..{limits[0] - 1} (the model has {limits[0]} classes"
                f"{'' if axes == 1 else f', output shape {tuple(outputs.shape)}'}), got {shown}"
            )
    return torch.tensor(rows, dtype=torch.long, device=outputs.device).view(len(outputs), axes)


def _decision(outputs: Tensor) -> Tensor:
    """The model's own decision: the argmax, or the one value there is."""
    axes = outputs.ndim - 1
    if axes == 0 or outputs[0].numel() == 1:
        return torch.zeros(len(outputs), axes, dtype=torch.long, device=outputs.device)
    if axes > 1:
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
