"""Skeleton of the gradient CAMs: one forward, one backward to the layer; a method says how to combine the two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attrib_zoo.attribution import Attribution, GradientAttribution
from attrib_zoo.backbone.capture import run_with_graph
from attrib_zoo.backbone.layers.resolve import Tap
from attrib_zoo.backbone.libra import Balanced
from attrib_zoo.backbone.targets import SCORES, Target, TargetQuery
from attrib_zoo.errors import LayerError, OptionError, check_choice, warn
from attrib_zoo.masking import ChunkSize, at_least_float32
from attrib_zoo.methods.bases.progress import progress

_TARGETS_AT_ONCE = 16


class GradientCAM(Attribution, GradientAttribution):
    """Base of the class activation maps that weight a layer's feature maps by the score's gradient.

    Subclasses implement :meth:`weights` (one weight per feature map) or, where the weight varies over space,
    :meth:`combine`; those with a rule of their own for several layers override ``fuse``. Tokens, NHWC layers, batches
    and several targets are handled here.

    Args:
        model: see :class:`Attribution`.
        layers: see :class:`Attribution`; several layers give the mean of their upsampled maps.
        relu: keep positive evidence only.
        score: what is differentiated: ``"logit"``, ``"softmax"``, ``"logsoftmax"`` or ``"sigmoid"``.
        libra: gradients of a balanced backward pass; see :mod:`attrib_zoo.backbone.libra`.
        upsample: see :class:`Attribution`.
        smooth: see :class:`Attribution`.
        scale: see :class:`Attribution`.

    Attributes:
        nonnegative: the formula divides by sums of feature maps and is derived for features after a ReLU; where a map
            has a negative sum, a call warns.
    """

    family: ClassVar[str] = "gradient CAM"
    cost: ClassVar[str] = "1F + 1B after the layer"
    default_layers: ClassVar[tuple[str, int] | None] = ("gradient", 1)
    nonnegative: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        relu: bool = True,
        score: str = "logit",
        libra: bool = False,
        upsample: bool = True,
        smooth: int | None = None,
        scale: str | None = None,
    ) -> None:
        super().__init__(model, layers, upsample=upsample, smooth=smooth, scale=scale)
        self.relu = bool(relu)
        self.score = check_choice("score", score, SCORES)
        self.libra = bool(libra)

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """The weight of each feature map.

        Args:
            activations: ``(M, D, h, w)``.
            gradients: ``(M, D, h, w)``, of the score with respect to the activations.

        Returns:
            ``(M, D)``.
        """
        raise NotImplementedError(f"{type(self).__name__} must fill weights, or combine")

    def combine(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """The map before the ReLU, ``(M, h, w)``: the weighted sum of the feature maps."""
        return torch.einsum("md,mdhw->mhw", self.weights(activations, gradients), activations)

    def check_features(self, activations: Sequence[Tensor], taps: Sequence[Tap]) -> None:
        """Refuse or warn where the formula does not fit the layers' outputs ``(N, D, h, w)``."""
        if self.nonnegative:
            warn_negative(activations, taps, type(self).__name__)

    def compute_maps(
        self, inputs: Tensor, query: TargetQuery, args: tuple[Any, ...], show_progress: bool
    ) -> list[Tensor]:
        taps = self.taps(inputs, args)
        maps, gradients, _ = differentiate(self.model, inputs, args, taps, query.resolve, self.score, libra=self.libra)
        check_gradients(gradients, taps, type(self).__name__)
        self.check_features(maps, taps)
        return [self.layer_map(a, g) for a, g in zip(maps, gradients, strict=True)]

    def layer_map(self, activation: Tensor, gradient: Tensor) -> Tensor:
        """``(N, D, h, w)`` activations and ``(T, N, D, h, w)`` gradients to ``(N, T, h, w)`` maps."""
        count = len(gradient)
        heat = self.combine(activation.expand(count, *activation.shape).flatten(0, 1), gradient.flatten(0, 1))
        heat = heat.relu() if self.relu else heat
        return heat.view(count, -1, *heat.shape[1:]).transpose(0, 1)


def differentiate(
    model: nn.Module,
    inputs: Tensor,
    args: Sequence[Any],
    taps: Sequence[Tap],
    resolve: Callable[[Tensor], Target],
    score: str,
    *,
    libra: bool = False,
) -> tuple[list[Tensor], list[Tensor], Target]:
    """One forward pass, and one backward pass to the layers.

    Args:
        model: the frozen model.
        inputs: ``(N, C, H, W)``.
        args: the model's further arguments.
        taps: the layers.
        resolve: the targets, given the outputs.
        score: what is differentiated; one of :data:`~attrib_zoo.backbone.targets.SCORES`.
        libra: whether the backward pass is balanced.

    Returns:
        For each layer the activations ``(N, D, h, w)`` and the gradients ``(T, N, D, h, w)``, in float32 or better,
        and the targets.
    """
    with run_with_graph(model, inputs, args, taps, Balanced() if libra else None) as (outputs, maps):
        target = resolve(outputs.detach())
        gradients = _gradients(target.select(outputs, score), maps, taps)
    return [at_least_float32(m.detach()) for m in maps], [at_least_float32(g) for g in gradients], target


def _gradients(scores: Tensor, maps: list[Tensor], taps: Sequence[Tap]) -> list[Tensor]:
    """Gradients ``(T, N, D, h, w)`` of the scores ``(N, T)``; summing over the batch is exact in eval mode."""
    count = scores.shape[1]
    if count == 1:
        found = torch.autograd.grad(scores.sum(), maps, allow_unused=True)
        return [_connected(g, tap).unsqueeze(0) for g, tap in zip(found, taps, strict=True)]
    parts: list[tuple[Tensor | None, ...]] = []
    for first in range(0, count, _TARGETS_AT_ONCE):
        wanted = range(first, min(first + _TARGETS_AT_ONCE, count))
        parts.append(_batched(scores, maps, wanted, keep_graph=wanted.stop < count))
    return [torch.cat([_connected(part[i], tap) for part in parts]) for i, tap in enumerate(taps)]


def _batched(scores: Tensor, maps: list[Tensor], wanted: range, *, keep_graph: bool) -> tuple[Tensor | None, ...]:
    """One vector-Jacobian product for several targets, or a loop where an operation has no vmap rule."""
    columns = torch.zeros(len(wanted), *scores.shape, dtype=scores.dtype, device=scores.device)
    for row, column in enumerate(wanted):
        columns[row, :, column] = 1
    try:
        return torch.autograd.grad(scores, maps, columns, retain_graph=True, is_grads_batched=True, allow_unused=True)
    except RuntimeError:
        rows = [
            torch.autograd.grad(
                scores, maps, column, retain_graph=keep_graph or row + 1 < len(columns), allow_unused=True
            )
            for row, column in enumerate(columns)
        ]
        return tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*rows, strict=True))


def _connected(gradient: Tensor | None, tap: Tap) -> Tensor:
    if gradient is None:
        raise LayerError(
            f"layers: no gradient path from {tap.name!r} to the score; the outputs do not use this layer: "
            "name another one, or pass layers=None"
        )
    return gradient


def check_gradients(gradients: Sequence[Tensor], taps: Sequence[Tap], who: str) -> None:
    """Exactly zero gradients: an error where the layer is the cause, otherwise one warning."""
    dead = [tap for gradient, tap in zip(gradients, taps, strict=True) if not bool(gradient.any())]
    for tap in dead:
        if tap.grid.prefix > 0:
            raise LayerError(
                f"layers: the gradient at the patch tokens of {tap.name!r} is exactly zero; a class-token head "
                "does not read them there: use the first normalisation layer of that block (norm1, ln_1), or "
                "layers=None. A head whose weights are all zero, as an untrained one may be, has no gradient anywhere"
            )
    if dead:
        warn(
            f"{who}: the gradient at {', '.join(repr(tap.name) for tap in dead)} is exactly zero, so the map is "
            "zero; the score does not change with this layer for these images",
        )


def warn_negative(activations: Sequence[Tensor], taps: Sequence[Tap], who: str) -> None:
    """Warn once where a feature map that is not zero has no positive sum."""
    sums = [(a.sum(dim=(-2, -1)) <= 0) & a.ne(0).any(-1).any(-1) for a in activations]
    signed = [tap for found, tap in zip(sums, taps, strict=True) if bool(found.any())]
    if signed:
        warn(
            f"{who}: derived for features that are nowhere negative, but {', '.join(repr(tap.name) for tap in signed)} "
            "has feature maps with a negative sum; name a layer behind a ReLU, or use HiResCAM or LayerCAM",
        )


# ---------------------------------------------------------------------- many copies of an image


def each_chunk(
    inputs: Tensor,
    copies: int,
    work: Callable[[Tensor, Tensor], None],
    *,
    chunk_size: int | None,
    label: str,
) -> None:
    """Call ``work(rows, numbers)`` until all copies of all images are done; chunks may span several images.

    Args:
        inputs: the N images, whose device and size determine how many go at once.
        copies: number of copies of each image.
        work: takes the images ``(M,)`` and the numbers of the copies ``(M,)``; it must not add to a result before
            everything that needs memory is done, since it is called again with fewer copies where memory runs out.
        chunk_size: the largest M; ``None`` finds it.
        label: of the progress bar; empty for none.
    """

    def some(part: slice) -> None:
        pairs = torch.arange(part.start, part.stop)
        work(pairs % len(inputs), pairs // len(inputs))

    with progress(len(inputs) * copies, label, "image") as advance:
        for done in ChunkSize(chunk_size, inputs).ranges(len(inputs) * copies, some):
            advance(done)


def check_seed(seed: int) -> int:
    """``seed`` if it is an integer, else an error."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise OptionError(f"seed: must be an integer, got {seed!r}")
    return seed
