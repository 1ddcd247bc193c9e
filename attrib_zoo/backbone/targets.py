"""Which output is explained: every target form of Captum, per example, on any output of a model."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attrib_zoo.errors import TargetError, UnsupportedModelError, check_number
from attrib_zoo.masking import at_least_float32, wide_dtype

SCORES = ("logit", "softmax", "logsoftmax", "sigmoid")
_FORMS = "an int, a list or 1-D tensor of N ints, a tuple of ints, a list of N tuples, None, or a Scalar"


@dataclass(frozen=True)
class Contrast:
    r"""A target: why this class and not those that come next.

    Explains the score of a class minus a share of the mean score of its closest rivals,

    .. math:: S_c - \frac{w}{k} \sum_{j \in R} S_j

    with R the k classes other than c that have the largest logits on the clean image; they stay the same for all
    altered copies of it. ``target=Contrast(3)`` with :class:`~attrib_zoo.GradCAM` is Finer-CAM (Zhang et al., CVPR
    2025). Supported by every method whose map comes from scores or their gradients, and by trained explainers, which
    combine the maps of the classes in the same way before scaling; not by :class:`~attrib_zoo.TransformerLRP`, whose
    rules start from positive relevance only. In :meth:`Attribution.attribute_many`, and in lists with an entry for each
    image, it may be used wherever a class may.

    Args:
        k: the number of rival classes; all others, if there are fewer.
        weight: w, the weight of their mean; 0 explains the class alone.
        target: c, in any of Captum's forms; ``None`` for the model's own decision.

    Example:
        >>> import torch
        >>> from attrib_zoo import Contrast, GradCAM
        >>> from attrib_zoo.synthetic import tiny_cnn
        >>> GradCAM(tiny_cnn()).attribute(torch.rand(2, 3, 32, 32), target=Contrast(2)).shape
        torch.Size([2, 3, 32, 32])
    """

    k: int = 3
    weight: float = 0.6
    target: Any = None

    def __post_init__(self) -> None:
        check_number("k", self.k, least=1)
        check_number("weight", self.weight, least=0.0)
        if isinstance(self.target, Contrast):
            raise TargetError(f"target: a Contrast must name a class, got another one: {self.target!r}")


class Scalar:
    """A target that is not a class: any function from the outputs to one value per image.

    For the score of a region in a segmentation or of a box, a similarity to a text or to another image, an energy. The
    model must return one tensor with a row for each image, ``(N, ...)``; wrap it if it returns anything else. Supported
    by every method whose map comes from scores or their gradients, in :meth:`Attribution.attribute_many` together with
    other functions, and by the measures. The value itself is differentiated or compared: the option ``score`` of a
    method has no effect. Methods that handle classes only, including the trained ones, refuse it.

    A plain function of the outputs may also be passed as a target directly.

    Args:
        function: takes the outputs ``(M, ...)`` of M passes, followed by the ``per_image`` values of these images;
            returns ``(M,)``. Row m may depend only on row m of its arguments, since methods change the order and the
            number of rows. It must be differentiable for methods that use gradients.
        *per_image: tensors ``(N, ...)`` with a row for each image, which is passed to ``function`` for all copies of
            that image in the pass; anything else is passed unchanged.

    Example:
        >>> import torch
        >>> from attrib_zoo import GradCAM, Scalar
        >>> from attrib_zoo.synthetic import tiny_cnn
        >>> wanted = torch.rand(2, 6)
        >>> similar = Scalar(lambda outputs, vector: torch.cosine_similarity(outputs, vector), wanted)
        >>> GradCAM(tiny_cnn()).attribute(torch.rand(2, 3, 32, 32), target=similar).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(self, function: Callable[..., Tensor], *per_image: Any) -> None:
        if not callable(function):
            raise TargetError(f"target: a Scalar must be given a function of the outputs, got {function!r}")
        self.function = function
        self.per_image = per_image

    def __repr__(self) -> str:
        name = getattr(self.function, "__name__", type(self.function).__name__)
        return f"Scalar({', '.join([name, *(f'<{len(t)} rows>' for t in self.per_image if isinstance(t, Tensor))])})"

    def check(self, outputs: Tensor) -> None:
        """Raise unless the function returns one value for each row of the clean outputs ``(N, ...)``."""
        short = [len(t) for t in self.per_image if isinstance(t, Tensor) and (t.ndim == 0 or len(t) != len(outputs))]
        if short:
            raise TargetError(
                f"target: each tensor of a Scalar must have a row for each of the {len(outputs)} images, got "
                f"{short[0]} rows; let the function itself hold what is the same for all"
            )
        found = self.value(outputs)
        if not isinstance(found, Tensor) or found.shape != (len(outputs),) or not found.is_floating_point():
            got = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise TargetError(
                f"target: its function must return one floating-point value for each of the {len(outputs)} rows of the "
                f"outputs {tuple(outputs.shape)}, got {got}; reduce all other axes"
            )

    def value(self, outputs: Tensor) -> Tensor:
        """``(M,)`` of outputs ``(M, ...)``."""
        held = (t.to(outputs.device) if isinstance(t, Tensor) else t for t in self.per_image)
        return self.function(outputs, *held)

    def rows(self, rows: Tensor) -> Scalar:
        """The same for these images, in this order."""
        return Scalar(self.function, *(t[rows.to(t.device)] if isinstance(t, Tensor) else t for t in self.per_image))


def _nothing() -> Tensor:
    return torch.empty(0)


@dataclass(frozen=True)
class Target:
    """One or more outputs of each example, checked against the model's output.

    Attributes:
        index: ``(N, T, d)`` int64 positions in the ``d`` axes that follow the batch axis; for a model with one logit
            per example ``(N, T, 1)``, the class 0 or 1.
        others: ``(N, T, k)``: positions on the first output axis of the classes that a :class:`Contrast` subtracts;
            k = 0 where there is none.
        shares: ``(N, T, k)``: the factor of each of their scores in the subtraction, the weight over their number; 0
            pads targets that subtract fewer than others.
    """

    index: Tensor
    others: Tensor = field(default_factory=_nothing)  # filled below
    shares: Tensor = field(default_factory=_nothing)

    def __post_init__(self) -> None:
        if self.others.ndim == 1:
            empty = self.index.new_zeros(*self.index.shape[:2], 0)
            object.__setattr__(self, "others", empty)
            object.__setattr__(self, "shares", empty.float())

    @property
    def contrasts(self) -> bool:
        """Whether other classes are subtracted from any of the targets."""
        return self.others.shape[2] > 0

    @property
    def terms(self) -> Tensor:
        """``(N, T, 1 + k)``: the class of each target, followed by those that are subtracted."""
        return torch.cat([self.classes.unsqueeze(2), self.others], dim=2)

    def combine(self, values: Tensor) -> Tensor:
        """The values of the targets, ``(N, T, ...)``, from those of their :attr:`terms`, ``(N, T, 1 + k, ...)``.

        The first minus the others times their shares.
        """
        if not self.contrasts:
            return values[:, :, 0]
        shares = self.shares.to(values).view(*self.shares.shape, *[1] * (values.ndim - 3))
        return values[:, :, 0] - (shares * values[:, :, 1:]).sum(2)

    def against(self, logits: Tensor, k: int, weight: float) -> Target:
        """The same classes, each minus ``weight`` times the mean of the k others with the largest logits ``(N, K)``."""
        k = min(k, logits.shape[1] - 1)
        rest = logits.detach().unsqueeze(1).expand(-1, self.count, -1).scatter(2, self.classes.unsqueeze(2), -torch.inf)
        others = rest.topk(k, dim=2).indices
        shares = torch.full(others.shape, weight / k, device=logits.device, dtype=wide_dtype(logits.dtype))
        return Target(self.index, others, shares)

    @property
    def count(self) -> int:
        """T, the number of targets of each example."""
        return self.index.shape[1]

    @property
    def classes(self) -> Tensor:
        """``(N, T)``: the position on the first output axis; 0 or 1 for one logit per example."""
        return self.index[..., 0]

    def select(self, outputs: Tensor, score: str = "logit") -> Tensor:
        """The targeted scores, ``(N, T)``, of outputs ``(N, ...)``; differences of scores for contrasts.

        Args:
            outputs: what the model returned.
            score: as in :func:`class_scores`.
        """
        scores = class_scores(outputs, score)
        rows = torch.arange(len(scores), device=scores.device).unsqueeze(1)
        index = self.index.to(scores.device)
        where = (rows, *index.unbind(-1))
        if not self.contrasts:
            return scores[where]
        deeper = (place.unsqueeze(2) for place in index.unbind(-1)[1:])
        where = (rows.unsqueeze(2), self.terms.to(scores.device), *deeper)
        return self.combine(scores[where])

    def rows(self, rows: Tensor) -> Target:
        """The targets of these examples, in this order (for masked copies: ``rows`` says whose copy each is)."""
        rows = rows.to(self.index.device)
        return Target(self.index[rows], self.others[rows], self.shares[rows])

    def one_of(self, rows: Tensor, columns: Tensor) -> Target:
        """One target each of these examples: that in the column of the same place, both ``(M,)``."""
        at = rows.to(self.index.device), columns.to(self.index.device)
        return Target(*(part[at].unsqueeze(1) for part in (self.index, self.others, self.shares)))


@dataclass(frozen=True)
class Functions(Target):
    """Functions of the outputs as targets, instead of classes.

    Attributes:
        scalars: T functions.
        columns: ``(N,)``, which of them each example has, where it has only one.
    """

    scalars: tuple[Scalar, ...] = ()
    columns: Tensor | None = None

    @property
    def classes(self) -> Tensor:
        """There are none.

        Raises:
            TargetError: always.
        """
        raise TargetError(
            "target: must be a class, for what was asked knows classes only (a trained explainer, a measure of the "
            f"model's decision, a reward against other classes), got {self.scalars[0]!r}; use a method that reads "
            "scores or their gradients, such as GradCAM or RISE"
        )

    def select(self, outputs: Tensor, score: str = "logit") -> Tensor:
        """The values, ``(N, T)``."""
        found = torch.stack([scalar.value(outputs) for scalar in self.scalars], 1)
        return found if self.columns is None else found.gather(1, self.columns.to(found.device).unsqueeze(1))

    def rows(self, rows: Tensor) -> Functions:
        """The targets of these examples, in this order."""
        columns = None if self.columns is None else self.columns[rows.to(self.columns.device)]
        scalars = tuple(scalar.rows(rows) for scalar in self.scalars)
        return Functions(self.index[rows.to(self.index.device)], scalars=scalars, columns=columns)

    def one_of(self, rows: Tensor, columns: Tensor) -> Functions:
        """One target each of these examples: that in the column of the same place, both ``(M,)``."""
        scalars = tuple(scalar.rows(rows) for scalar in self.scalars)
        return Functions(self.index[rows.to(self.index.device)][:, :1], scalars=scalars, columns=columns)


@dataclass(frozen=True)
class TargetQuery:
    """What the caller requested, before the model's output is known.

    Attributes:
        target: any of Captum's forms, a :class:`Contrast`, a :class:`Scalar`, or ``None`` for the model's own
            decision; 0 or 1 for one logit per example.
        many: ``target`` lists several targets per example (see :meth:`Attribution.attribute_many`).
    """

    target: Any = None
    many: bool = False

    def resolve(self, outputs: Tensor) -> Target:
        """Check the request against the clean outputs ``(N, ...)`` and turn it into positions."""
        columns = _columns(self.target, outputs) if self.many else [self.target]
        if any(_is_scalar(column) for column in columns):
            return _values(columns, outputs)
        return _joined([_column(column, outputs) for column in columns])


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
        outputs = at_least_float32(outputs)
    if one_logit(outputs):
        outputs = torch.stack([-outputs.reshape(-1), outputs.reshape(-1)], 1)
        functions = {"softmax": torch.sigmoid, "logsoftmax": F.logsigmoid, "sigmoid": torch.sigmoid}
        return outputs if score == "logit" else functions[score](outputs)
    if score == "sigmoid":
        return outputs.sigmoid()
    if score == "logit":
        return outputs
    return outputs.softmax(1) if score == "softmax" else outputs.log_softmax(1)


def scores_in(outputs: Any) -> Any:
    """The scores in what a model returns: ``outputs.logits`` of Hugging Face's classifiers, else all of it."""
    logits = None if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    return logits if isinstance(logits, Tensor) else outputs


def class_list(classes: Sequence[int] | Tensor, count: int) -> Tensor:
    """A caller's list of classes as a tensor ``(M,)``, each from 0 to ``count - 1``.

    Raises:
        TargetError: it holds anything else, or nothing.
    """
    found = classes.tolist() if isinstance(classes, Tensor) else list(classes)
    numbers = [_int(entry) for entry in found] if isinstance(found, list) else []
    if not numbers or not all(0 <= number < count for number in numbers):
        raise TargetError(f"classes: must be one or more classes in 0..{count - 1}, got {classes!r}")
    return torch.tensor(numbers)


def check_outputs(outputs: object, batch: int) -> Tensor:
    """The model's output as one floating-point tensor with the batch first, or a clear error."""
    outputs = scores_in(outputs)
    if not isinstance(outputs, Tensor):
        raise UnsupportedModelError(
            f"model: must return one tensor of scores (N, K), or an object that has them as .logits, got "
            f"{type(outputs).__name__}; wrap it in a module whose forward returns the scores alone"
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
        value = value.item()  # reveals a bool or a float
    if isinstance(value, (bool, float)):
        raise TargetError(f"target: must be an integer class, got {value!r}; pass {_FORMS}")
    try:
        return operator.index(value)
    except TypeError:
        raise TargetError(f"target: must be an integer class, got {value!r}; pass {_FORMS}") from None


def _columns(targets: Any, outputs: Tensor) -> list[list[Any]]:
    """``(T,)`` targets for every image, or ``(N, T)`` with a row for each, as T lists of N."""
    form = "a list of T classes for every image, or N lists of T classes"
    if hasattr(targets, "tolist") and hasattr(targets, "dtype"):  # a tensor, or NumPy without importing it
        targets = targets.tolist()
    if not isinstance(targets, Sequence) or isinstance(targets, (str, bytes)) or len(targets) == 0:
        raise TargetError(f"targets: must be {form}, got {targets!r}")
    if not all(isinstance(row, (list, Tensor)) for row in targets):
        return [_spread(entry, len(outputs)) for entry in targets]
    table = [row.tolist() if isinstance(row, Tensor) else row for row in targets]
    if len(table) != len(outputs) or len({len(row) for row in table}) != 1 or not table[0]:
        raise TargetError(
            f"targets: must be {form}; got {len(table)} lists of lengths {sorted({len(r) for r in table})} "
            f"for {len(outputs)} images"
        )
    return [list(column) for column in zip(*table, strict=True)]


def _spread(entry: Any, batch: int) -> Any:
    """One of ``attribute_many``'s targets for every image: a contrast may itself hold a target per image."""
    return entry if isinstance(entry, Contrast) or _is_scalar(entry) else [entry] * batch


# ---------------------------------------------------------------------- functions of the outputs


def _is_scalar(target: Any) -> bool:
    return isinstance(target, Scalar) or callable(target)


def _values(columns: Sequence[Any], outputs: Tensor) -> Functions:
    if not all(_is_scalar(column) for column in columns):
        raise TargetError("targets: must be classes, or functions of the outputs, but not both in one call")
    scalars = tuple(column if isinstance(column, Scalar) else Scalar(column) for column in columns)
    for scalar in scalars:
        scalar.check(outputs)
    index = torch.zeros(len(outputs), len(scalars), 1, dtype=torch.long, device=outputs.device)
    return Functions(index, scalars=scalars)


# ---------------------------------------------------------------------- contrasts


def _column(target: Any, outputs: Tensor) -> Target:
    """One target of each example: a class, a contrast, or a list of both."""
    if isinstance(target, list) and any(_is_scalar(entry) for entry in target):
        raise TargetError(
            "target: one function stands for all images, got a list of them; give it what differs between images as "
            "tensors, Scalar(function, tensor)"
        )
    if isinstance(target, Contrast):
        place = _positions(target.target, outputs)
        return _contrasted(place, [target] * len(outputs), outputs)
    if isinstance(target, list) and any(isinstance(entry, Contrast) for entry in target):
        if len(target) != len(outputs):
            raise TargetError(
                f"target: must hold one entry for each of the {len(outputs)} images, got {len(target)}; a Contrast may "
                "stand for all of them"
            )
        place = torch.cat([_own(entry, outputs[row : row + 1]) for row, entry in enumerate(target)])
        return _contrasted(place, target, outputs)
    return Target(_positions(target, outputs).unsqueeze(1))


def _own(entry: Any, outputs: Tensor) -> Tensor:
    """The position ``(1, d)`` that an entry of a list refers to in its example's outputs ``(1, ...)``."""
    target = entry.target if isinstance(entry, Contrast) else entry
    if target is None and not isinstance(entry, Contrast):
        raise TargetError(f"target: must be an integer class, got {target!r}; pass {_FORMS}")
    return _positions(target, outputs)


def _contrasted(place: Tensor, entries: Sequence[Any], outputs: Tensor) -> Target:
    """The targets at these positions ``(N, d)``, with the rivals of those entries that are contrasts."""
    if one_logit(outputs) or outputs.shape[1] == 1:
        raise TargetError(
            "target: a Contrast needs at least two classes with outputs of their own, got outputs of shape "
            f"{tuple(outputs.shape)}; pass the class alone (of one logit 0, 1 or None)"
        )
    asked = [(entry.k, float(entry.weight)) if isinstance(entry, Contrast) else (0, 0.0) for entry in entries]
    count = outputs.shape[1]
    kept = [min(k, count - 1) for k, _ in asked]
    shares = torch.tensor(
        [[weight / max(k, 1)] * k + [0.0] * (max(kept) - k) for k, (_, weight) in zip(kept, asked, strict=True)],
        dtype=torch.promote_types(outputs.dtype, torch.float32),
        device=outputs.device,
    )
    rows = torch.arange(len(outputs), device=outputs.device)
    where = (rows, *place.unbind(1)[1:])
    logits = outputs.movedim(1, -1)[where]  # (N, K), at the position's further axes
    rivals = torch.arange(count - 1, device=outputs.device).expand(len(outputs), -1)
    rivals = rivals + (rivals >= place[:, :1]).long()  # all classes except its own
    best = logits.gather(1, rivals).topk(max(kept), dim=1).indices
    return Target(place.unsqueeze(1), rivals.gather(1, best).unsqueeze(1), shares.unsqueeze(1))


def _joined(columns: Sequence[Target]) -> Target:
    """Targets ``(N, 1)`` side by side; those that subtract fewer classes are padded with the first, times 0."""
    width = max(column.others.shape[2] for column in columns)
    index = torch.cat([column.index for column in columns], dim=1)
    if not width:
        return Target(index)
    filled = []
    for column in columns:
        missing = width - column.others.shape[2]
        own = column.classes.unsqueeze(2).expand(-1, -1, missing)
        nothing = column.shares.new_zeros(own.shape)
        filled.append((torch.cat([column.others, own], dim=2), torch.cat([column.shares, nothing], dim=2)))
    others, shares = (torch.cat(parts, dim=1) for parts in zip(*filled, strict=True))
    return Target(index, others, shares)
