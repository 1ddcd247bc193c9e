"""ROAD: the score after the most, or the least, relevant pixels are removed and filled in from their surroundings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.capture import unwrap
from attrib_zoo.errors import OptionError
from attrib_zoo.masking import channel_stats, upsample
from attrib_zoo.metrics._maps import Seed, finite_rows, normal, ranks, read_maps
from attrib_zoo.metrics._scores import Masking, Score, check_inputs, check_masking, hidden, score_copies
from attrib_zoo.metrics.imputation import linear_imputation

FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
ORDERS = ("morf", "lerf")
SPACES = ("raw", "standardized")


def road(model: nn.Module, inputs: Tensor, attributions: Tensor, target: Any = None, **options: Any) -> Tensor:
    """Mean score over the fractions removed, most relevant first (MoRF, lower is better) or last (LeRF, higher).

    The mean of :func:`road_curve` over its fractions, Eq. 22 (``order="morf"``) and Eq. 23 (``order="lerf"``) of T-TAME
    for one image, with all of its options. ``reduce="accuracy"`` gives the share of the fractions at which the model's
    decision is still the target.

    Returns:
        ``(N,)``; NaN where the map is not finite.

    Example:
        >>> from attrib_zoo import synthetic
        >>> model, data = synthetic.tiny_cnn(), synthetic.scenes(2)
        >>> road(model, data.inputs, torch.rand(2, 8, 8), target=0, order="lerf").shape
        torch.Size([2])
    """
    return road_curve(model, inputs, attributions, target, **options).mean(1)


def road_curve(
    model: nn.Module,
    inputs: Tensor,
    attributions: Tensor,
    target: Any = None,
    *,
    order: str = "morf",
    fractions: Sequence[float] = FRACTIONS,
    hiding: Masking = "imputation",
    noise: float = 0.01,
    noise_space: str = "raw",
    tolerance: float = 1e-4,
    reduce: str = "confidence",
    score: Score = "softmax",
    ties: str = "random",
    seed: Seed = 0,
    chunk_size: int | None = None,
    additional_forward_args: Any = None,
) -> Tensor:
    """The score with each fraction of the pixels removed by noisy linear imputation, or plainly hidden.

    Removed pixels are filled in by :func:`linear_imputation`, and Gaussian noise is added to them alone; that is ROAD.
    With ``hiding`` they become black, the mean colour or blurred instead, without noise: plain MoRF and LeRF curves.

    Args:
        model: A classifier. It runs in eval mode and is left as it was.
        inputs: ``(N, C, H, W)``, standardised as the model expects.
        attributions: The maps: ``(N, C, H, W)`` (channels are averaged), ``(N, 1, h, w)`` or ``(N, h, w)``; smaller
            ones are enlarged bilinearly.
        target: In any of Captum's forms; ``None`` is the model's own decision on the whole image.
        order: ``"morf"`` removes the most relevant pixels first, ``"lerf"`` the least relevant.
        fractions: Shares of the pixels that are removed, each from 0 to 1.
        hiding: ``"imputation"`` (ROAD), or what replaces removed pixels, as ``masking`` in
            :func:`~attrib_zoo.metrics.masked_confidence`: ``"raw"`` black, ``"standardized"`` the mean colour,
            ``"auto"`` one of the two, ``"blur"``, or a tensor. ``noise``, ``noise_space`` and ``tolerance`` then have
            no effect.
        noise: Standard deviation of the noise, 0.01 in the paper.
        noise_space: The scale of ``noise``: ``"raw"`` images in [0, 1], so that it is divided by the standard
            deviations the inputs were standardised with, or ``"standardized"`` inputs as they are.
        tolerance: Largest error of the imputation, as a share of the image's standard deviation.
        reduce: ``"confidence"`` for the score, as in the papers; ``"accuracy"`` for whether the model's decision is
            the target (1 or 0), as in released code.
        score: ``"softmax"``, ``"sigmoid"``, or a function from the outputs ``(N, K)`` to scores of the same shape.
        ties: The order of equal values: ``"random"`` and ``"stable"`` remove exactly the fraction (to a pixel), in a
            random order per image or in raster order; with ``"threshold"`` all equal values at the limit are removed,
            so that LeRF removes 60 % or more of a map that is 60 % zeros at once.
        seed: For the random orders and the noise: one int per image (its number in the data set makes the result
            independent of batching), or an int, to which image i adds i.
        chunk_size: Images per forward pass and per solution; ``None`` chooses what is fast and fits.
        additional_forward_args: As in :meth:`Attribution.attribute`.

    Returns:
        ``(N, P)`` for P fractions; NaN where the map is not finite.

    Raises:
        InputError: The maps do not belong to the images.
        OptionError: An option is outside its range.

    References:
        Rong et al., A consistent and efficient evaluation strategy for attribution methods, ICML 2022.
    """
    check_inputs(inputs)
    _check(order, fractions, noise, noise_space)
    check_masking(hiding, "hiding", ("imputation",))
    images, size = inputs.detach(), inputs.shape[-2] * inputs.shape[-1]
    maps = read_maps(attributions, len(images)).to(images.device)
    relevance = upsample(maps.nan_to_num(), images.shape[-2:])
    places = ranks(relevance if order == "morf" else -relevance, ties, seed)
    counts = torch.tensor([round(fraction * size) for fraction in fractions], device=images.device)
    imputed = isinstance(hiding, str) and hiding == "imputation"
    if imputed:
        grain = _grain(model, images, noise, noise_space, seed)
    else:
        other = torch.as_tensor(hidden(unwrap(model), hiding, images)).to(images).expand_as(images)

    def make(rows: Tensor, which: Tensor) -> Tensor:
        removed = places[rows] < counts[which].view(-1, 1, 1, 1)
        if not imputed:
            return torch.where(removed, other[rows], images[rows])
        filled = linear_imputation(images[rows], removed, tolerance=tolerance)
        return torch.where(removed, filled + grain[rows], filled)

    curve = score_copies(
        model,
        images,
        len(counts),
        make,
        target,
        score=score,
        reduce=reduce,
        chunk_size=chunk_size,
        additional_forward_args=additional_forward_args,
    )
    return curve.masked_fill(~finite_rows(maps)[:, None], torch.nan)


def _check(order: str, fractions: Sequence[float], noise: float, noise_space: str) -> None:
    if order not in ORDERS:
        raise OptionError(f"order: must be one of {', '.join(ORDERS)}, got {order!r}")
    if not len(fractions) or not all(0 <= fraction <= 1 for fraction in fractions):
        raise OptionError(f"fractions: must be shares of the pixels from 0 to 1 (0.1 for 10 %), got {fractions!r}")
    if not noise >= 0:
        raise OptionError(f"noise: must be a standard deviation of 0 or more, got {noise}")
    if noise_space not in SPACES:
        raise OptionError(f"noise_space: must be one of {', '.join(SPACES)}, got {noise_space!r}")


def _grain(model: nn.Module, images: Tensor, noise: float, space: str, seed: Seed) -> Tensor:
    """The noise of each image, ``(N, C, H, W)``: the same at every fraction."""
    grain = noise * normal(seed, images.shape)
    if space == "raw":
        _, std = channel_stats(unwrap(model), images.shape[1])
        grain = grain / torch.tensor(std).view(1, -1, 1, 1)
    return grain.to(images)
