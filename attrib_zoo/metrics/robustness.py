"""Captum's two measures, with the signature of all others here: a perturbation, seeds per image, and a fixed target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from captum.metrics import infidelity as captum_infidelity
from captum.metrics import sensitivity_max as captum_sensitivity_max
from torch import Tensor, nn

from attrib_zoo.backbone.capture import forward, forward_args, frozen
from attrib_zoo.backbone.targets import TargetQuery, class_scores
from attrib_zoo.errors import InputError, OptionError
from attrib_zoo.masking import ChunkSize, at_least_float32, upsample
from attrib_zoo.metrics._maps import Seed, finite_rows, read_maps, seeds_of
from attrib_zoo.metrics._scores import check_inputs, run_in_chunks

SCORES = ("logit", "softmax", "sigmoid")
PERTURBATIONS = ("noise", "square")


def infidelity(
    model: nn.Module,
    inputs: Tensor,
    attributions: Tensor,
    target: Any = None,
    *,
    perturbation: str = "noise",
    noise: float = 0.003,
    square: int | None = None,
    samples: int = 10,
    normalize: bool = True,
    score: str = "logit",
    seed: Seed = 0,
    chunk_size: int | None = None,
    additional_forward_args: Any = None,
) -> Tensor:
    """How badly a map predicts the effect of a perturbation on the score; lower is better.

    ``E_I[(beta I . E - (f(x) - f(x - I)))^2]``, computed by ``captum.metrics.infidelity``. The map is used as it is,
    channel by channel; a single channel is repeated.

    Args:
        model: A classifier. It runs in eval mode and is left as it was.
        inputs: ``(N, C, H, W)``, standardised as the model expects.
        attributions: The maps: ``(N, C, H, W)``, ``(N, 1, h, w)`` or ``(N, h, w)``; smaller ones are enlarged
            bilinearly.
        target: In any of Captum's forms; ``None`` is the model's own decision on the whole image.
        perturbation: ``"noise"``: I is Gaussian noise; ``"square"``: I replaces a random square of the image by the
            mean colour.
        noise: Standard deviation of the noise; 0.003 in Captum's example.
        square: Side of the square in pixels; a quarter of the image's shorter side when ``None``.
        samples: Perturbations per image.
        normalize: ``beta`` is the factor that fits an image's map best, so that the scale of a map (which is
            meaningless in most methods) does not count. ``False`` is ``beta = 1``, Captum's default.
        score: f: ``"logit"``, ``"softmax"`` or ``"sigmoid"``.
        seed: For the perturbations: one int per image, or an int, to which image i adds i.
        chunk_size: Images per forward pass; ``None``: whole batches of copies up to 32 images, at least one.
        additional_forward_args: As in :meth:`Attribution.attribute`.

    Returns:
        ``(N,)``; NaN where the map is not finite.

    References:
        Yeh et al., On the (in)fidelity and sensitivity of explanations, NeurIPS 2019.
    """
    check_inputs(inputs)
    _check(samples, score)
    maps = _all_channels(attributions, inputs)
    perturb = _perturbation(perturbation, noise, square, inputs, seed)
    args = forward_args(additional_forward_args)

    with frozen(model) as bare, torch.no_grad():
        fixed = _fixed(bare, inputs, target, args, chunk_size)

        def ask(images: Tensor, *rest: Any) -> Tensor:
            outputs = forward(bare, images, rest)
            return class_scores(at_least_float32(outputs), score)

        found: Tensor = captum_infidelity(
            ask,
            perturb,
            inputs.detach(),
            torch.nan_to_num(maps),
            additional_forward_args=args or None,
            target=fixed,
            n_perturb_samples=samples,
            max_examples_per_batch=_at_once(len(inputs), samples, chunk_size),
            normalize=normalize,
        )
    found = found.clamp(min=0)  # a sum of squares, up to rounding
    return found.masked_fill(~finite_rows(maps).to(found.device), torch.nan)


def sensitivity_max(
    model: nn.Module,
    inputs: Tensor,
    attributions: Tensor | None,
    target: Any = None,
    *,
    explain: Callable[[Tensor, Any], Tensor],
    radius: float = 0.02,
    samples: int = 10,
    seed: Seed = 0,
    chunk_size: int | None = None,
    additional_forward_args: Any = None,
) -> Tensor:
    """How much a map can change when the image hardly does; lower is better.

    ``max |E(x + d) - E(x)| / |E(x)|`` over ``samples`` draws of d, uniform in ``-radius...radius`` in each value,
    computed by ``captum.metrics.sensitivity_max``. A map of zeros is not divided by its norm.

    Args:
        model: A classifier, to decide on the target where none is given.
        inputs: ``(N, C, H, W)``, standardised as the model expects.
        attributions: Not used, and may be None: the maps of the original images come from ``explain`` too.
        target: In any of Captum's forms; ``None`` is the model's own decision on the original image. It is the same for
            the changed images.
        explain: The method, from ``(inputs, target)`` to maps, e.g. ``GradCAM(model).attribute``.
        radius: Largest change of a value, in standardised space.
        samples: Perturbed copies per image.
        seed: For the perturbations: one int per image, or an int, to which image i adds i.
        chunk_size: Images per call of ``explain``; ``None``: whole batches of copies up to 32 images, at least one.
        additional_forward_args: For the model, where there is no target.

    Returns:
        ``(N,)``.

    References:
        Yeh et al., On the (in)fidelity and sensitivity of explanations, NeurIPS 2019.
    """
    check_inputs(inputs)
    _check(samples, "logit")
    if not radius > 0:
        raise OptionError(f"radius: must be above 0, got {radius}")
    with frozen(model) as bare, torch.no_grad():
        fixed = _fixed(bare, inputs, target, forward_args(additional_forward_args), chunk_size)
    draw = _Draws(seed, len(inputs))

    def shake(repeated: Tensor) -> Tensor:
        return repeated + draw(repeated, lambda shape, maker: (2 * torch.rand(shape, generator=maker) - 1) * radius)

    def ask(images: Any, target: Any = None) -> tuple[Tensor]:
        image = images[0] if isinstance(images, tuple) else images
        maps = upsample(read_maps(explain(image, target), len(image)), image.shape[-2:])
        return (maps,)  # Captum iterates over a bare tensor

    found: Tensor = captum_sensitivity_max(
        ask,
        inputs.detach(),
        shake,
        n_perturb_samples=samples,
        max_examples_per_batch=_at_once(len(inputs), samples, chunk_size),
        target=fixed,
    )
    return found


class _Draws:
    """Random tensors of one image's shape for copies ordered by image; each image from its own seed."""

    def __init__(self, seed: Seed, batch: int) -> None:
        self._makers = [torch.Generator().manual_seed(value) for value in seeds_of(seed, batch)]

    def __call__(self, repeated: Tensor, one: Callable[[tuple[int, ...], torch.Generator], Tensor]) -> Tensor:
        each = len(repeated) // len(self._makers)
        shape = tuple(repeated.shape[1:])
        return torch.stack([one(shape, maker) for maker in self._makers for _ in range(each)]).to(repeated)


def _check(samples: int, score: str) -> None:
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise OptionError(f"samples: must be a positive integer, got {samples!r}")
    if score not in SCORES:
        raise OptionError(f"score: must be one of {', '.join(SCORES)}, got {score!r}")


def _at_once(batch: int, samples: int, chunk_size: int | None) -> int:
    """The limit that Captum expects: at least one copy of each image, at most all copies."""
    return min(max(batch, ChunkSize(chunk_size).value), batch * samples)


def _perturbation(
    kind: str, noise: float, square: int | None, inputs: Tensor, seed: Seed
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    height, width = inputs.shape[-2:]
    side = max(1, min(height, width) // 4) if square is None else square
    if kind not in PERTURBATIONS:
        raise OptionError(f"perturbation: must be one of {', '.join(PERTURBATIONS)}, got {kind!r}")
    if not noise > 0 or not 1 <= side <= min(height, width):
        raise OptionError(
            f"noise, square: must be above 0, and a side of 1 to {min(height, width)} pixels, got {noise} and {square}"
        )
    draw = _Draws(seed, len(inputs))

    def grain(shape: tuple[int, ...], maker: torch.Generator) -> Tensor:
        return noise * torch.randn(shape, generator=maker)

    def hole(shape: tuple[int, ...], maker: torch.Generator) -> Tensor:
        top, left = (int(torch.randint(limit - side + 1, (), generator=maker)) for limit in (height, width))
        field = torch.zeros(shape)
        field[:, top : top + side, left : left + side] = 1
        return field

    def perturb(repeated: Tensor) -> tuple[Tensor, Tensor]:
        taken = draw(repeated, grain) if kind == "noise" else draw(repeated, hole) * repeated
        return taken, repeated - taken

    return perturb


def _all_channels(attributions: Tensor, inputs: Tensor) -> Tensor:
    """The maps in the shape of the inputs; unlike elsewhere, channels are not averaged."""
    maps = read_maps(attributions, len(inputs))
    if attributions.ndim == 4 and attributions.shape[1] > 1:
        if attributions.shape[1] != inputs.shape[1]:
            raise InputError(
                f"attributions: must have 1 or {inputs.shape[1]} channels, as the inputs, got {attributions.shape[1]}"
            )
        maps = attributions.detach().to(maps.dtype)
    return upsample(maps, inputs.shape[-2:]).expand_as(inputs).to(inputs.device)


def _fixed(model: nn.Module, inputs: Tensor, target: Any, args: tuple[Any, ...], chunk_size: int | None) -> Any:
    """The target in a form that Captum repeats for the copies of each image."""
    index = TargetQuery(target).resolve(run_in_chunks(model, inputs, args, chunk_size)).index[:, 0]
    return index[:, 0] if index.shape[1] == 1 else [tuple(row) for row in index.tolist()]
