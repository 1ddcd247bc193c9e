"""Base of the methods that read attention matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attrib_zoo.attribution import Attribution
from attrib_zoo.backbone.libra import Balanced
from attrib_zoo.backbone.targets import TargetQuery
from attrib_zoo.backbone.vit.attention import AttentionPass, Attentions, find_attention, read_attention
from attrib_zoo.errors import OptionError, UnsupportedModelError, warn


class AttentionMethod(Attribution):
    """Base of the methods that follow tokens through all attention blocks of a vision transformer.

    Args:
        model: see :class:`Attribution`.
        layers: must be ``None``: every attention block is read.
        mean_pooling: also explain models whose head averages tokens; see :meth:`attention`.
        upsample: see :class:`Attribution`.
        smooth: see :class:`Attribution`.
        scale: see :class:`Attribution`.
    """

    family: ClassVar[str] = "attention"
    models: ClassVar[tuple[str, ...]] = ("vit",)
    default_layers: ClassVar[tuple[str, int] | None] = None

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        mean_pooling: bool = False,
        upsample: bool = True,
        smooth: int | None = None,
        scale: str | None = None,
    ) -> None:
        super().__init__(model, layers, upsample=upsample, smooth=smooth, scale=scale)
        if layers is not None and self.default_layers is None:
            raise self._reads_all_layers()
        self.mean_pooling = bool(mean_pooling)

    def _reads_all_layers(self) -> OptionError:
        return OptionError(
            f"layers: must be None for {type(self).__name__}, which reads the attention of every block, "
            f"got {self.layers!r}; leave it out"
        )

    def attention(self, inputs: Tensor, args: Sequence[Any]) -> Attentions:
        """Where the model attends on inputs of this shape; computed once per shape.

        Raises:
            UnsupportedModelError: it has no attention that can be read, or its head averages tokens and
                ``mean_pooling`` is off.
        """
        found = self._once("attention", inputs, args, lambda: find_attention(self.model, inputs, args))
        if not (found.by_class_token or self.mean_pooling):
            raise UnsupportedModelError(
                f"model: {type(self).__name__} is defined for a head that reads a class token, the head of "
                f"{type(self.model).__name__} reads {len(found.read)} of {found.tokens} tokens; pass "
                "mean_pooling=True for the mean over them, which goes beyond the paper, or use GradCAM or TTAME"
            )
        return found


def not_zero(maps: Tensor, who: str) -> Tensor:
    """The maps; called by ``compute_maps``, it warns once where they are all zero."""
    if not bool(maps.any()):
        warn(
            f"{who}: the map is exactly zero, since the score does not change with what is read of these "
            "images; is the head of the model untrained?",
        )
    return maps


def attention_for(
    model: nn.Module,
    found: Attentions,
    inputs: Tensor,
    args: Sequence[Any],
    query: TargetQuery,
    *,
    libra: bool = False,
) -> AttentionPass:
    """One pass with the gradients of the targets' logits, from a balanced backward pass if ``libra`` is set."""

    def scores(outputs: Tensor) -> Tensor:
        return query.resolve(outputs.detach()).select(outputs)

    return read_attention(model, found, inputs, args, scores, within=Balanced() if libra else None)


def positive(gradients: Tensor, values: Tensor) -> Tensor:
    """The mean over heads of the positive part of gradient times value, ``(..., H, T, T)`` to ``(..., T, T)``."""
    return (gradients * values).relu_().mean(-3)


def with_identity(relations: Tensor, *, normalise: bool) -> Tensor:
    """``relations + I``, for the residual connection; its rows divided by their sums if ``normalise``."""
    kept = relations + torch.eye(relations.shape[-1], dtype=relations.dtype, device=relations.device)
    return kept / kept.sum(-1, keepdim=True) if normalise else kept
