"""How confident the model stays when it sees only what a map highlights: average drop and increase in confidence.

The image is multiplied by its map (all of it, or its highest values), the rest becomes black or the mean colour, and
the model is run again. ``p`` is the score of the target on the whole image, ``p'`` on the masked one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.capture import forward_args, frozen
from attrib_zoo.backbone.targets import TargetQuery
from attrib_zoo.errors import OptionError
from attrib_zoo.masking import blend
from attrib_zoo.metrics._maps import Seed, finite_rows, read_maps, scale_maps, top_pixels
from attrib_zoo.metrics._scores import (
    Masking,
    Score,
    check_inputs,
    check_masking,
    check_score,
    hidden,
    run_in_chunks,
    select_scores,
)

_SISE: dict[str, Any] = {"keep": 0.15, "mask": "binary", "ties": "random"}  # the options of its Drop % and Increase %


def average_drop(
    model: nn.Module,
    inputs: Tensor,
    attributions: Tensor,
    target: Any = None,
    *,
    keep: float = 1.0,
    mask: str = "soft",
    masking: Masking = "auto",
    score: Score = "softmax",
    ties: str = "threshold",
    seed: Seed = 0,
    clean: Tensor | None = None,
    chunk_size: int | None = None,
    additional_forward_args: Any = None,
) -> Tensor:
    """Loss of confidence ``max(0, p - p') / p`` of each image; lower is better. The papers print 100 times the mean.

    Eq. 18 of T-TAME, Eq. 10 of L-CAM. Where ``p`` is 0 nothing can be lost, and the value is 0. All arguments are
    those of :func:`masked_confidence`, and ``clean`` is the ``p`` of the whole images if already known.

    Returns:
        ``(N,)``, in 0...1; NaN for an image whose map holds NaN or infinity.

    Example:
        >>> from attrib_zoo import synthetic
        >>> model, data = synthetic.tiny_cnn(), synthetic.scenes(2)
        >>> average_drop(model, data.inputs, torch.rand(2, 8, 8), target=0, keep=0.5).shape
        torch.Size([2])
    """
    whole, masked = masked_confidence(
        model,
        inputs,
        attributions,
        target,
        keep=keep,
        mask=mask,
        masking=masking,
        score=score,
        ties=ties,
        seed=seed,
        clean=clean,
        chunk_size=chunk_size,
        additional_forward_args=additional_forward_args,
    )
    drop = (whole - masked).clamp(min=0)
    return drop / torch.where(drop > 0, whole, torch.ones_like(whole))


def increase_in_confidence(
    model: nn.Module,
    inputs: Tensor,
    attributions: Tensor,
    target: Any = None,
    *,
    keep: float = 1.0,
    mask: str = "soft",
    masking: Masking = "auto",
    score: Score = "softmax",
    ties: str = "threshold",
    seed: Seed = 0,
    clean: Tensor | None = None,
    chunk_size: int | None = None,
    additional_forward_args: Any = None,
) -> Tensor:
    """Whether the model is more confident on the masked image, ``p' > p``: 1 or 0 for each image; higher is better.

    Eq. 19 of T-TAME, Eq. 11 of L-CAM, which print 100 times the mean. Equal scores are no increase. All arguments
    are those of :func:`masked_confidence`, and ``clean`` is the ``p`` of the whole images if already known.

    Returns:
        ``(N,)``; NaN for an image whose map holds NaN or infinity.
    """
    whole, masked = masked_confidence(
        model,
        inputs,
        attributions,
        target,
        keep=keep,
        mask=mask,
        masking=masking,
        score=score,
        ties=ties,
        seed=seed,
        clean=clean,
        chunk_size=chunk_size,
        additional_forward_args=additional_forward_args,
    )
    rose = (masked > whole).to(whole.dtype)
    return rose.masked_fill((whole + masked).isnan(), torch.nan)


def drop_rate(model: nn.Module, inputs: Tensor, attributions: Tensor, target: Any = None, **options: Any) -> Tensor:
    """The SISE paper's Drop %: :func:`average_drop` when only the highest 15 % of the pixels are shown, unchanged.

    ``max(0, p - p') / p`` with ``p'`` the score of the image times a binary mask. The options are those of
    :func:`masked_confidence`, with ``keep=0.15``, ``mask="binary"`` and ``ties="random"`` instead of its defaults:
    even for a map that is zero almost everywhere, exactly 15 % of the pixels are shown.

    Returns:
        ``(N,)``, in 0...1; the paper prints 100 times the mean, lower is better. NaN where the map is not finite.
    """
    return average_drop(model, inputs, attributions, target, **{**_SISE, **options})


def increase_rate(model: nn.Module, inputs: Tensor, attributions: Tensor, target: Any = None, **options: Any) -> Tensor:
    """The SISE paper's Increase %: :func:`increase_in_confidence` with the options of :func:`drop_rate`.

    Returns:
        ``(N,)``, 1 or 0; the paper prints 100 times the mean, higher is better. NaN where the map is not finite.
        (Its formula sums signs; what its text and its table count are the increases.)
    """
    return increase_in_confidence(model, inputs, attributions, target, **{**_SISE, **options})


def masked_confidence(
    model: nn.Module,
    inputs: Tensor,
    attributions: Tensor,
    target: Any = None,
    *,
    keep: float = 1.0,
    mask: str = "soft",
    masking: Masking = "auto",
    score: Score = "softmax",
    ties: str = "threshold",
    seed: Seed = 0,
    clean: Tensor | None = None,
    chunk_size: int | None = None,
    additional_forward_args: Any = None,
) -> tuple[Tensor, Tensor]:
    """The scores ``p`` of the whole images and ``p'`` of the masked ones; both measures of this module come from them.

    A map is scaled to [0, 1] by its own extremes, a constant map to 0, then enlarged bilinearly if it is smaller
    than the image, and the fraction ``keep`` of its pixels is left as it is, the rest set to 0 (Eq. 20 and 21 of
    T-TAME, 1, 0.5 and 0.15 in the papers).

    Args:
        model: A classifier. It runs in eval mode and is left as it was.
        inputs: ``(N, C, H, W)``, standardised as the model expects.
        attributions: The maps: ``(N, C, H, W)`` (channels are averaged), ``(N, 1, h, w)`` or ``(N, h, w)``. Maps at the
            layer's resolution (``GradCAM(model, upsample=False)``) are scaled before they are enlarged, as in the
            papers; maps of the images' size are scaled directly.
        target: In any of Captum's forms; ``None`` is the model's own decision on the whole image. It is the same for
            the whole and the masked image.
        keep: Fraction of the pixels kept, above 0 and at most 1.
        mask: ``"soft"`` multiplies by the map's values; ``"binary"`` shows the pixels kept unchanged.
        masking: What replaces hidden pixels: ``"raw"`` black, ``"standardized"`` the mean colour (0), ``"auto"`` the
            latter for transformers and black for all other models, as in the papers (see
            ``backbone.kind.is_transformer``); ``"blur"`` the image itself under a Gaussian (11 px, sigma 5, as in
            RISE's insertion): fine detail is removed, large shapes stay. Or a tensor in the inputs' space that
            broadcasts to them, e.g. ``masking.blur(inputs, 20)``, or ``masking.black(mean, std)`` where the model does
            not carry its mean and standard deviation.
        score: ``"softmax"``, ``"sigmoid"``, or a function from the outputs ``(N, K)`` to scores of the same shape.
        ties: What happens to equal values at the threshold: ``"threshold"`` keeps them all, ``"random"`` and
            ``"stable"`` keep exactly the fraction, of equal values those that come first in a random order per image or
            in raster order.
        seed: For the random orders: one int per image (its number in the data set makes the result independent of
            batching), or an int, to which image i of the batch adds i.
        clean: ``p``, ``(N,)``, if known; the whole images are then not run, and ``target`` must be given.
        chunk_size: Images per forward pass; ``None`` chooses what is fast and fits.
        additional_forward_args: As in :meth:`Attribution.attribute`.

    Returns:
        ``p`` and ``p'``, each ``(N,)``, in float32 or better; ``p'`` is NaN where the map is not finite.

    Raises:
        InputError: The maps do not belong to the images.
        OptionError: An option is outside its range.
    """
    check_inputs(inputs)
    _check(mask, masking, score, clean, target, len(inputs))
    maps = read_maps(attributions, len(inputs)).to(inputs.device)
    shown = _shown(maps, inputs, keep, mask, ties, seed)
    args = forward_args(additional_forward_args)

    with frozen(model) as bare, torch.no_grad():
        masked_inputs = blend(inputs, shown, hidden(bare, masking, inputs))
        after = run_in_chunks(bare, masked_inputs, args, chunk_size)
        before = run_in_chunks(bare, inputs, args, chunk_size) if clean is None else after
    resolved = TargetQuery(target).resolve(before)
    masked = select_scores(resolved, after, score)
    whole = select_scores(resolved, before, score) if clean is None else clean.to(masked)
    return whole, masked.masked_fill(~finite_rows(maps), torch.nan)


def _check(mask: str, masking: Masking, score: Score, clean: Tensor | None, target: Any, batch: int) -> None:
    if mask not in ("soft", "binary"):
        raise OptionError(f"mask: must be 'soft' or 'binary', got {mask!r}")
    check_masking(masking)
    check_score(score)
    if clean is None:
        return
    if target is None:
        raise OptionError("clean: scores of the whole images say nothing without their target; pass target too")
    if clean.shape != (batch,):
        raise OptionError(f"clean: must be one score per image ({batch},), got {tuple(clean.shape)}")


def _shown(maps: Tensor, inputs: Tensor, keep: float, mask: str, ties: str, seed: Seed) -> Tensor:
    """How much of each pixel is shown, ``(N, 1, H, W)`` in 0...1 in the dtype of the inputs."""
    scaled = scale_maps(maps, inputs.shape[-2:])
    kept = top_pixels(scaled, keep, ties, seed)
    return (kept if mask == "binary" else scaled * kept).to(inputs.dtype)
