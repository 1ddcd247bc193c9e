"""Insertion and deletion: the score as the pixels appear, or disappear, from the most to the least relevant."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.capture import unwrap
from attrib_zoo.errors import OptionError
from attrib_zoo.masking import upsample
from attrib_zoo.metrics._maps import Seed, finite_rows, ranks, read_maps
from attrib_zoo.metrics._scores import Masking, Score, check_inputs, check_masking, hidden, score_copies


def insertion(model: nn.Module, inputs: Tensor, attributions: Tensor, target: Any = None, **options: Any) -> Tensor:
    """Area under the score as pixels are inserted into a blurred image, the most relevant first; higher is better.

    The trapezoidal area under :func:`insertion_curve`, whose fractions run from 0 to 1, with all of its options.

    Returns:
        ``(N,)``, in 0...1 for scores in 0...1; NaN where the map is not finite.

    References:
        Petsiuk et al., RISE: Randomized input sampling for explanation of black-box models, BMVC 2018.
    """
    return _area(insertion_curve(model, inputs, attributions, target, **options))


def deletion(model: nn.Module, inputs: Tensor, attributions: Tensor, target: Any = None, **options: Any) -> Tensor:
    """Area under the score as pixels are removed from the image, the most relevant first; lower is better.

    The trapezoidal area under :func:`deletion_curve`, whose fractions run from 0 to 1, with all of its options.

    Returns:
        ``(N,)``, in 0...1 for scores in 0...1; NaN where the map is not finite.

    References:
        Petsiuk et al., RISE: Randomized input sampling for explanation of black-box models, BMVC 2018.
    """
    return _area(deletion_curve(model, inputs, attributions, target, **options))


def insertion_curve(
    model: nn.Module,
    inputs: Tensor,
    attributions: Tensor,
    target: Any = None,
    *,
    steps: int | None = None,
    baseline: Masking = "blur",
    score: Score = "softmax",
    ties: str = "random",
    seed: Seed = 0,
    chunk_size: int | None = None,
    additional_forward_args: Any = None,
) -> Tensor:
    """The score with the ``k/steps`` most relevant pixels of the image shown, the others replaced; ``k = 0...steps``.

    Args:
        model: A classifier. It runs in eval mode and is left as it was.
        inputs: ``(N, C, H, W)``, standardised as the model expects.
        attributions: The maps: ``(N, C, H, W)`` (channels are averaged), ``(N, 1, h, w)`` or ``(N, h, w)``; smaller
            ones are enlarged bilinearly.
        target: In any of Captum's forms; ``None`` is the model's own decision on the whole image.
        steps: Number of equal steps. ``None`` is the height of the image: RISE's 224 steps of 224 pixels at 224 px.
        baseline: What replaces hidden pixels: ``"blur"`` the image under a Gaussian (11 px, sigma 5),
            ``"standardized"`` the mean colour (0), ``"raw"`` black, ``"auto"``, or a tensor that broadcasts to the
            inputs; the words are those of ``masking`` in :func:`~attrib_zoo.metrics.masked_confidence`.
        score: ``"softmax"``, ``"sigmoid"``, or a function from the outputs ``(N, K)`` to scores of the same shape.
        ties: The order of equal values: ``"random"`` and ``"stable"`` change exactly ``k/steps`` of the pixels, in a
            random order per image or in raster order; with ``"threshold"`` they change together.
        seed: For the random orders: one int per image, or an int, to which image i adds i.
        chunk_size: Images per forward pass; ``None`` chooses what is fast and fits.
        additional_forward_args: As in :meth:`Attribution.attribute`.

    Returns:
        ``(N, steps + 1)``; NaN where the map is not finite.
    """
    return _curve(
        model,
        inputs,
        attributions,
        target,
        True,
        steps,
        baseline,
        ties,
        seed,
        score=score,
        chunk_size=chunk_size,
        additional_forward_args=additional_forward_args,
    )


def deletion_curve(
    model: nn.Module,
    inputs: Tensor,
    attributions: Tensor,
    target: Any = None,
    *,
    steps: int | None = None,
    baseline: Masking = "standardized",
    score: Score = "softmax",
    ties: str = "random",
    seed: Seed = 0,
    chunk_size: int | None = None,
    additional_forward_args: Any = None,
) -> Tensor:
    """The score with the ``k/steps`` most relevant pixels of the image replaced; ``k = 0...steps``.

    All arguments are those of :func:`insertion_curve`; pixels are replaced by the mean colour, as in RISE.

    Returns:
        ``(N, steps + 1)``; NaN where the map is not finite.
    """
    return _curve(
        model,
        inputs,
        attributions,
        target,
        False,
        steps,
        baseline,
        ties,
        seed,
        score=score,
        chunk_size=chunk_size,
        additional_forward_args=additional_forward_args,
    )


def _curve(
    model: nn.Module,
    inputs: Tensor,
    attributions: Tensor,
    target: Any,
    inserting: bool,
    steps: int | None,
    baseline: Masking,
    ties: str,
    seed: Seed,
    **asking: Any,
) -> Tensor:
    check_inputs(inputs)
    check_masking(baseline, "baseline")
    size = inputs.shape[-2] * inputs.shape[-1]
    steps = inputs.shape[-2] if steps is None else steps
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= size:
        raise OptionError(f"steps: must be an integer from 1 to the number of pixels ({size}), got {steps!r}")
    maps = read_maps(attributions, len(inputs)).to(inputs.device)
    order = ranks(upsample(maps.nan_to_num(), inputs.shape[-2:]), ties, seed)
    counts = torch.tensor([round(k * size / steps) for k in range(steps + 1)], device=inputs.device)
    images = inputs.detach()
    other = torch.as_tensor(hidden(unwrap(model), baseline, images)).to(images).expand_as(images)

    def make(rows: Tensor, places: Tensor) -> Tensor:
        first = order[rows] < counts[places].view(-1, 1, 1, 1)
        return torch.where(first == inserting, images[rows], other[rows])

    curve = score_copies(model, inputs, steps + 1, make, target, **asking)
    return curve.masked_fill(~finite_rows(maps)[:, None], torch.nan)


def _area(curve: Tensor) -> Tensor:
    return torch.trapezoid(curve, dx=1 / (curve.shape[1] - 1), dim=1)
