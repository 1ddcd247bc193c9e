"""What every measure that asks the model does: check the images, run altered copies in chunks, read the target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.capture import forward, frozen, select_args
from attrib_zoo.backbone.kind import is_transformer
from attrib_zoo.errors import InputError, OptionError, UnsupportedModelError
from attrib_zoo.masking import ChunkSize, black, channel_stats
from attrib_zoo.targets import Target, TargetQuery, class_scores

Masking = str | Tensor
Score = str | Callable[[Tensor], Tensor]
REDUCE = ("confidence", "accuracy")


def check_inputs(inputs: object) -> None:
    """An error for what are no images."""
    if not isinstance(inputs, Tensor) or inputs.ndim != 4 or len(inputs) == 0 or not inputs.is_floating_point():
        got = f"{inputs.dtype} {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise InputError(f"inputs: must be floating-point images (N, C, H, W), N at least 1, got {got}")


def check_masking(masking: Masking) -> None:
    """An error for a rule that does not exist."""
    if not isinstance(masking, Tensor) and masking not in ("auto", "raw", "standardized"):
        raise OptionError(f"masking: must be 'auto', 'raw', 'standardized' or a tensor, got {masking!r}")


def check_score(score: Score) -> None:
    """An error for a score that does not exist."""
    if not callable(score) and score not in ("softmax", "sigmoid"):
        raise OptionError(f"score: must be 'softmax', 'sigmoid' or a function of the outputs, got {score!r}")


def as_args(additional_forward_args: Any) -> tuple[Any, ...]:
    """Captum's ``additional_forward_args`` as a tuple."""
    if additional_forward_args is None:
        return ()
    return additional_forward_args if isinstance(additional_forward_args, tuple) else (additional_forward_args,)


def hidden_colour(model: nn.Module, masking: Masking, inputs: Tensor) -> Tensor | float:
    """The colour of a pixel that is not seen, in the inputs' space."""
    if isinstance(masking, Tensor):
        return masking.to(inputs)
    if masking == "standardized" or (masking == "auto" and is_transformer(model)):
        return 0.0
    return black(*channel_stats(model, inputs.shape[1]), like=inputs)


def run_in_chunks(model: nn.Module, images: Tensor, args: tuple[Any, ...], chunk_size: int | None) -> Tensor:
    """The outputs of all images, ``(N, ...)``."""
    found: list[Tensor] = []

    def work(part: slice) -> None:
        rows = torch.arange(part.start, part.stop, device=images.device)
        found.append(forward(model, images[part], select_args(args, rows, len(images))))

    for _ in ChunkSize(chunk_size, images).ranges(len(images), work):
        pass
    return torch.cat(found)


def select_scores(target: Target, outputs: Tensor, score: Score) -> Tensor:
    """The targeted scores, ``(N,)``."""
    if isinstance(score, str):
        return target.select(outputs, score)[:, 0]
    return target.select(score(class_scores(outputs)))[:, 0]


def agreement(target: Target, outputs: Tensor, score: Score) -> Tensor:
    """1 where the model's decision is the target, else 0: ``(N,)``; for sigmoids, where the target has 0.5 or more."""
    scores = select_scores(target, outputs, score)
    outputs = class_scores(outputs)
    if score == "sigmoid":
        return (scores >= 0.5).to(scores.dtype)
    if outputs.ndim != 2:
        raise UnsupportedModelError(
            f"reduce: 'accuracy' needs a decision between the classes of outputs (N, K), got {tuple(outputs.shape)}; "
            "use reduce='confidence', or score='sigmoid'"
        )
    outputs = outputs if isinstance(score, str) else score(outputs)
    return (outputs.argmax(1) == target.classes[:, 0].to(outputs.device)).to(scores.dtype)


def score_copies(
    model: nn.Module,
    inputs: Tensor,
    copies: int,
    make: Callable[[Tensor, Tensor], Tensor],
    target: Any,
    *,
    score: Score = "softmax",
    reduce: str = "confidence",
    chunk_size: int | None = None,
    additional_forward_args: Any = None,
) -> Tensor:
    """Scores of several altered copies of each image, ``(N, copies)``.

    Args:
        model: A classifier. It runs in eval mode and is left as it was.
        inputs: ``(N, C, H, W)``; run only if there is no target.
        copies: How many of each image.
        make: The images ``(B, C, H, W)`` of B copies: whose they are and which of its copies, both ``(B,)`` int64.
        target: In any of Captum's forms; ``None`` is the decision on the inputs.
        score: See :func:`select_scores`.
        reduce: ``"confidence"`` for the score itself, ``"accuracy"`` for :func:`agreement`.
        chunk_size: Copies per pass.
        additional_forward_args: Of each image.
    """
    check_score(score)
    if reduce not in REDUCE:
        raise OptionError(f"reduce: must be one of {', '.join(REDUCE)}, got {reduce!r}")
    args, batch = as_args(additional_forward_args), len(inputs)
    read = select_scores if reduce == "confidence" else agreement
    found: list[Tensor] = []
    resolved: Target | None = None

    def work(part: slice) -> None:
        nonlocal resolved
        index = torch.arange(part.start, part.stop, device=inputs.device)
        rows = torch.div(index, copies, rounding_mode="floor")
        outputs = forward(bare, make(rows, index % copies), select_args(args, rows, batch))
        if resolved is None:  # only the shape of the outputs counts: the target is given
            resolved = TargetQuery(target).resolve(outputs[:1].expand(batch, *outputs.shape[1:]))
        found.append(read(resolved.rows(rows), outputs, score))

    with frozen(model) as bare, torch.no_grad():
        if target is None:
            resolved = TargetQuery(None).resolve(run_in_chunks(bare, inputs, args, chunk_size))
        for _ in ChunkSize(chunk_size, inputs).ranges(batch * copies, work):
            pass
    return torch.cat(found).view(batch, copies)
