"""How sure the model stays when it sees only what a map points at: average drop and increase in confidence.

The image is multiplied by its map (all of it, or its highest values), the rest becomes black or the mean colour, and
the model is asked again. ``p`` is the score of the target on the whole image, ``p'`` on the masked one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.capture import forward, frozen, select_args
from attrib_zoo.backbone.kind import is_transformer
from attrib_zoo.errors import InputError, OptionError
from attrib_zoo.masking import ChunkSize, black, blend, channel_stats
from attrib_zoo.metrics._maps import finite_rows, read_maps, scale_maps, top_pixels
from attrib_zoo.targets import Target, TargetQuery

Masking = str | Tensor
Score = str | Callable[[Tensor], Tensor]


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
    seed: int = 0,
    clean: Tensor | None = None,
    chunk_size: int | None = None,
    additional_forward_args: Any = None,
) -> Tensor:
    """Loss of confidence ``max(0, p - p') / p`` of each image; lower is better. The papers print 100 times the mean.

    Eq. 18 of T-TAME, Eq. 10 of L-CAM. Where ``p`` is 0 nothing can be lost, and the value is 0. All arguments are
    those of :func:`masked_confidence`, and ``clean`` is the ``p`` of the whole images if it is known already.

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
    seed: int = 0,
    clean: Tensor | None = None,
    chunk_size: int | None = None,
    additional_forward_args: Any = None,
) -> Tensor:
    """Whether the model is surer of the masked image, ``p' > p``: 1 or 0 for each image; higher is better.

    Eq. 19 of T-TAME, Eq. 11 of L-CAM, which print 100 times the mean. Equal scores are no increase. All arguments
    are those of :func:`masked_confidence`, and ``clean`` is the ``p`` of the whole images if it is known already.

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
    seed: int = 0,
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
        inputs: ``(N, C, H, W)``, standardised as the model wants them.
        attributions: The maps: ``(N, C, H, W)`` (channels are averaged), ``(N, 1, h, w)`` or ``(N, h, w)``.
        target: In any of Captum's forms; ``None`` is the model's own decision on the whole image. It is the same for
            the whole and the masked image.
        keep: Fraction of the pixels kept, above 0 and at most 1.
        mask: ``"soft"`` multiplies by the map's values; ``"binary"`` shows the pixels kept unchanged.
        masking: What replaces hidden pixels: ``"raw"`` black, ``"standardized"`` the mean colour (0), ``"auto"`` the
            latter for transformers and black for all other models, as the papers do (see
            ``backbone.kind.is_transformer``). Or a tensor in the inputs' space that broadcasts to them, e.g.
            ``masking.black(mean, std)`` where the model does not carry its mean and standard deviation.
        score: ``"softmax"``, ``"sigmoid"``, or a function from the outputs ``(N, K)`` to scores of the same shape.
        ties: What happens to equal values at the limit: ``"threshold"`` keeps them all, ``"random"`` and
            ``"stable"`` keep exactly the fraction, in a random order of each image or in raster order.
        seed: Of the random orders.
        clean: ``p``, ``(N,)``, if it is known; the whole images are then not run, and ``target`` must be given.
        chunk_size: Images per forward pass; 32 or fewer as memory allows when ``None``.
        additional_forward_args: As in :meth:`Attribution.attribute`.

    Returns:
        ``p`` and ``p'``, each ``(N,)``, in float32 or better; ``p'`` is NaN where the map is not finite.

    Raises:
        InputError: The maps do not belong to the images.
        OptionError: An option is outside its range.
    """
    if not isinstance(inputs, Tensor) or inputs.ndim != 4 or len(inputs) == 0 or not inputs.is_floating_point():
        got = f"{inputs.dtype} {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise InputError(f"inputs: must be floating-point images (N, C, H, W), N at least 1, got {got}")
    _check(mask, masking, score, clean, target, len(inputs))
    maps = read_maps(attributions, len(inputs)).to(inputs.device)
    shown = _shown(maps, inputs, keep, mask, ties, seed)
    args = additional_forward_args
    args = () if args is None else args if isinstance(args, tuple) else (args,)

    with frozen(model) as bare, torch.no_grad():
        hidden = _hidden(bare, masking, inputs)
        after = _outputs(bare, blend(inputs, shown, hidden), args, chunk_size)
        before = _outputs(bare, inputs, args, chunk_size) if clean is None else after
    resolved = TargetQuery(target).resolve(before)
    masked = _select(resolved, after, score)
    whole = _select(resolved, before, score) if clean is None else clean.to(masked)
    return whole, masked.masked_fill(~finite_rows(maps), torch.nan)


def _check(mask: str, masking: Masking, score: Score, clean: Tensor | None, target: Any, batch: int) -> None:
    if mask not in ("soft", "binary"):
        raise OptionError(f"mask: must be 'soft' or 'binary', got {mask!r}")
    if not isinstance(masking, Tensor) and masking not in ("auto", "raw", "standardized"):
        raise OptionError(f"masking: must be 'auto', 'raw', 'standardized' or a tensor, got {masking!r}")
    if not callable(score) and score not in ("softmax", "sigmoid"):
        raise OptionError(f"score: must be 'softmax', 'sigmoid' or a function of the outputs, got {score!r}")
    if clean is None:
        return
    if target is None:
        raise OptionError("clean: scores of the whole images say nothing without their target; pass target too")
    if clean.shape != (batch,):
        raise OptionError(f"clean: must be one score per image ({batch},), got {tuple(clean.shape)}")


def _shown(maps: Tensor, inputs: Tensor, keep: float, mask: str, ties: str, seed: int) -> Tensor:
    """What is seen of each pixel, ``(N, 1, H, W)`` in 0...1 in the dtype of the inputs."""
    scaled = scale_maps(maps, inputs.shape[-2:])
    kept = top_pixels(scaled, keep, ties, seed)
    return (kept if mask == "binary" else scaled * kept).to(inputs.dtype)


def _hidden(model: nn.Module, masking: Masking, inputs: Tensor) -> Tensor | float:
    """The colour of a pixel that is not seen, in the inputs' space."""
    if isinstance(masking, Tensor):
        return masking.to(inputs)
    if masking == "standardized" or (masking == "auto" and is_transformer(model)):
        return 0.0
    return black(*channel_stats(model, inputs.shape[1]), like=inputs)


def _outputs(model: nn.Module, images: Tensor, args: tuple[Any, ...], chunk_size: int | None) -> Tensor:
    found: list[Tensor] = []

    def work(part: slice) -> None:
        rows = torch.arange(part.start, part.stop, device=images.device)
        found.append(forward(model, images[part], select_args(args, rows, len(images))))

    for _ in ChunkSize(chunk_size).ranges(len(images), work):
        pass
    return torch.cat(found)


def _select(target: Target, outputs: Tensor, score: Score) -> Tensor:
    """The targeted scores, ``(N,)``."""
    if isinstance(score, str):
        return target.select(outputs, score)[:, 0]
    return target.select(score(outputs))[:, 0]
