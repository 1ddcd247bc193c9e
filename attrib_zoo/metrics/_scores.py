"""What every measure that runs the model does: check the images, run altered copies in chunks, read the target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrib_zoo.backbone.capture import forward, forward_args, frozen, select_args
from attrib_zoo.backbone.kind import is_transformer
from attrib_zoo.backbone.targets import Functions, Target, TargetQuery, class_scores
from attrib_zoo.errors import InputError, OptionError, UnsupportedModelError
from attrib_zoo.masking import ChunkSize, black, channel_stats

Masking = str | Tensor
Score = str | Callable[[Tensor], Tensor]
MASKINGS = ("auto", "raw", "standardized", "blur")
REDUCE = ("confidence", "accuracy")


def check_inputs(inputs: object) -> None:
    """Raise for anything but images."""
    if not isinstance(inputs, Tensor) or inputs.ndim != 4 or len(inputs) == 0 or not inputs.is_floating_point():
        got = f"{inputs.dtype} {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise InputError(f"inputs: must be floating-point images (N, C, H, W), N at least 1, got {got}")


def check_masking(masking: Masking, name: str = "masking", more: tuple[str, ...] = ()) -> None:
    """Raise for a rule that does not exist; ``name`` is the option, ``more`` are rules that only it has."""
    if not isinstance(masking, Tensor) and masking not in MASKINGS + more:
        rules = ", ".join(map(repr, MASKINGS + more))
        raise OptionError(f"{name}: must be one of {rules} or a tensor that broadcasts to the inputs, got {masking!r}")


def check_score(score: Score) -> None:
    """Raise for a score that does not exist."""
    if not callable(score) and score not in ("softmax", "sigmoid"):
        raise OptionError(f"score: must be 'softmax', 'sigmoid' or a function of the outputs, got {score!r}")


def hidden(model: nn.Module, masking: Masking, inputs: Tensor) -> Tensor | float:
    """What hidden pixels become, in the inputs' space; broadcasts to them."""
    if isinstance(masking, Tensor):
        return masking.to(inputs)
    if masking == "blur":
        return blur(inputs)
    if masking == "standardized" or (masking == "auto" and is_transformer(model)):
        return 0.0
    return black(*channel_stats(model, inputs.shape[1]), like=inputs)


def blur(images: Tensor, kernel: int = 11, sigma: float = 5.0) -> Tensor:
    """Images ``(N, C, H, W)`` under a Gaussian of ``kernel`` pixels; at the border over the pixels that exist."""
    offsets = torch.arange(kernel, device=images.device, dtype=torch.float64) - kernel // 2
    weights = (-(offsets**2) / (2 * sigma**2)).exp().to(images)
    out = images
    for axis in (-2, -1):
        shape, padding = ((kernel, 1), (kernel // 2, 0)) if axis == -2 else ((1, kernel), (0, kernel // 2))
        line = weights.view(1, 1, *shape)
        flat = out.flatten(0, 1)[:, None]
        there = F.conv2d(torch.ones_like(flat[:1]), line, padding=padding)
        out = (F.conv2d(flat, line, padding=padding) / there)[:, 0].view_as(images)
    return out


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
    if isinstance(target, Functions):
        return target.select(outputs)[:, 0]
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
        copies: Number of copies of each image.
        make: The images ``(B, C, H, W)`` of B copies: the arguments are their images and the numbers of the copies,
            both ``(B,)`` int64.
        target: In any of Captum's forms; ``None`` is the decision on the inputs.
        score: See :func:`select_scores`.
        reduce: ``"confidence"`` for the score itself, ``"accuracy"`` for :func:`agreement`.
        chunk_size: Copies per pass.
        additional_forward_args: For each image.
    """
    check_score(score)
    if reduce not in REDUCE:
        raise OptionError(f"reduce: must be one of {', '.join(REDUCE)}, got {reduce!r}")
    args, batch = forward_args(additional_forward_args), len(inputs)
    read = select_scores if reduce == "confidence" else agreement
    found: list[Tensor] = []
    resolved: Target | None = None

    def work(part: slice) -> None:
        nonlocal resolved
        index = torch.arange(part.start, part.stop, device=inputs.device)
        rows = torch.div(index, copies, rounding_mode="floor")
        outputs = forward(bare, make(rows, index % copies), select_args(args, rows, batch))
        if resolved is None:  # only the shape of the outputs matters here: the target is given
            resolved = TargetQuery(target).resolve(outputs[:1].expand(batch, *outputs.shape[1:]))
        found.append(read(resolved.rows(rows), outputs, score))

    with frozen(model) as bare, torch.no_grad():
        if target is None:
            resolved = TargetQuery(None).resolve(run_in_chunks(bare, inputs, args, chunk_size))
        for _ in ChunkSize(chunk_size, inputs).ranges(batch * copies, work):
            pass
    return torch.cat(found).view(batch, copies)
