"""Skeleton of the gradient CAMs: one forward, one backward to the layer; a method says how to combine the two."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from attrib_zoo.attribution import Attribution, check_choice
from attrib_zoo.backbone.capture import run_with_graph
from attrib_zoo.backbone.layers import Tap
from attrib_zoo.errors import LayerError
from attrib_zoo.masking import upsample
from attrib_zoo.targets import SCORES, TargetQuery

if TYPE_CHECKING:

    class _GradientAttribution:
        pass

else:
    from captum.attr import GradientAttribution as _GradientAttribution

_TARGETS_AT_ONCE = 16


class GradientCAM(Attribution, _GradientAttribution):
    """Base of the class activation maps that weigh a layer's feature maps by the score's gradient.

    Subclasses fill :meth:`weights` (one weight per feature map) or, where the weight varies over space,
    :meth:`combine`. Tokens, NHWC layers, batches and several targets are handled here.

    Args:
        model: see :class:`Attribution`.
        layers: see :class:`Attribution`; several layers give the mean of their upsampled maps.
        relu: keep positive evidence only.
        score: what is differentiated: ``"logit"``, ``"softmax"``, ``"logsoftmax"`` or ``"sigmoid"``.
        upsample: see :class:`Attribution`.
    """

    family: ClassVar[str] = "gradient CAM"
    cost: ClassVar[str] = "1F + 1B behind the layer"
    default_layers: ClassVar[tuple[str, int] | None] = ("gradient", 1)

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        relu: bool = True,
        score: str = "logit",
        upsample: bool = True,
    ) -> None:
        super().__init__(model, layers, upsample=upsample)
        self.relu = bool(relu)
        self.score = check_choice("score", score, SCORES)

    @abstractmethod
    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """The weight of each feature map.

        Args:
            activations: ``(M, D, h, w)``.
            gradients: ``(M, D, h, w)``, of the score with respect to the activations.

        Returns:
            ``(M, D)``.
        """
        raise NotImplementedError

    def combine(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """The map before the ReLU, ``(M, h, w)``: the weighted sum of the feature maps."""
        return torch.einsum("md,mdhw->mhw", self.weights(activations, gradients), activations)

    def _maps(self, inputs: Tensor, query: TargetQuery, args: tuple[Any, ...], show_progress: bool) -> Tensor:
        taps = self.taps(inputs, args)
        with run_with_graph(self.model, inputs, args, taps) as (outputs, maps):
            target = query.resolve(outputs.detach())
            gradients = _gradients(target.select(outputs, self.score), maps, taps)
        _check_gradients(gradients, taps, type(self).__name__)
        size = inputs.shape[-2:] if self.upsample else torch.Size(max(m.shape[i] for m in maps) for i in (-2, -1))
        found = []
        for activation, gradient in zip(maps, gradients, strict=True):
            heat = self._one_layer(activation.detach(), gradient)
            found.append(heat if len(maps) == 1 else upsample(heat, size))
        return found[0] if len(found) == 1 else torch.stack(found).mean(0)

    def _one_layer(self, activation: Tensor, gradient: Tensor) -> Tensor:
        """``(N, D, h, w)`` activations and ``(T, N, D, h, w)`` gradients to ``(N, T, h, w)`` maps."""
        dtype = torch.promote_types(activation.dtype, torch.float32)
        count = len(gradient)
        activation = activation.to(dtype).expand(count, *activation.shape).flatten(0, 1)
        heat = self.combine(activation, gradient.to(dtype).flatten(0, 1))
        heat = heat.relu() if self.relu else heat
        return heat.view(count, -1, *heat.shape[1:]).transpose(0, 1)


def _gradients(scores: Tensor, maps: list[Tensor], taps: tuple[Tap, ...]) -> list[Tensor]:
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
    """One vector-Jacobian product for several targets, or a loop where the model has an operation without vmap."""
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


def _check_gradients(gradients: list[Tensor], taps: tuple[Tap, ...], who: str) -> None:
    """Exactly zero gradients: an error where the layer is the reason, one warning otherwise."""
    dead = [tap for gradient, tap in zip(gradients, taps, strict=True) if not bool(gradient.any())]
    for tap in dead:
        if tap.grid.prefix > 0:
            raise LayerError(
                f"layers: the gradient at the patch tokens of {tap.name!r} is exactly zero; a class-token head "
                "does not read them there: use the first normalisation layer of that block (norm1, ln_1), or "
                "layers=None"
            )
    if dead:
        warnings.warn(
            f"{who}: the gradient at {', '.join(repr(tap.name) for tap in dead)} is exactly zero, so the map is "
            "zero; the score does not change with this layer for these images",
            UserWarning,
            stacklevel=6,  # the caller of attribute
        )
