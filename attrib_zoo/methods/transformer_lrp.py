"""Relevance propagation for transformers (Chefer, Gur and Wolf, CVPR 2021)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attrib_zoo.attribution import GradientAttribution
from attrib_zoo.backbone.layers.resolve import look
from attrib_zoo.backbone.module import find
from attrib_zoo.backbone.targets import Functions, Target, TargetQuery
from attrib_zoo.backbone.vit.attention import AttentionPass, Attentions, Matrix, read_attention
from attrib_zoo.backbone.vit.heads import precise
from attrib_zoo.backbone.vit.prenorm import Block, PreNorm, Values, take_apart
from attrib_zoo.errors import OptionError, TargetError, UnsupportedModelError
from attrib_zoo.methods.bases import relevance as rules
from attrib_zoo.methods.bases.attention import AttentionMethod, not_zero, positive, with_identity


class TransformerLRP(AttentionMethod, GradientAttribution):
    r"""The patches to which the score's relevance flows back, through every layer and along relevant attention.

    .. math:: M = (\bar A_L \cdots \bar A_s)_{\mathrm{class}}, \qquad \bar A_l = I + \frac{1}{H} \sum_h \mathrm{ReLU}
              \Big(\frac{\partial S_c}{\partial A_l^{(h)}} \odot R_{A_l^{(h)}}\Big)

    (Eq. 13 and 14 of the paper), with :math:`A_l^{(h)}` the T x T attention of head h in block l, S_c the target's
    logit, and R the relevance that reaches it from a one at the target, by the rules of deep Taylor decomposition:
    positive products only in linear layers, sums and matrix products in proportion, each image by itself.

    Runs on unmodified timm and torchvision ViTs with fused attention, frozen or not. Attention and the structure of the
    blocks are checked numerically; a model that is built otherwise is refused.

    **Patent notice.** Layer-wise relevance propagation is patented: US 12,061,966 and EP 3271863. Whether these
    patents cover the rules used here is not settled; find out before you use them beyond personal or scientific
    purposes. :class:`~attrib_zoo.GenericAttention` uses no relevance propagation.

    Args:
        model: see :class:`~attrib_zoo.attribution.Attribution`.
        layers: must be ``None``: every attention block is read.
        start_layer: s, the first block that takes part, counted from 0.
        row_norm: divide the rows of each factor by their sums.
        mean_pooling: also explain models whose head averages tokens: relevance is shared among them, and the map is
            the mean over their rows.
        upsample: ``False`` returns ``(N, 1, h, w)``.
        smooth: odd side of a mean filter over the cells of the map; ``None`` for none.
        scale: ``"min-max"``, ``"rank"``, ``"positive"``, or ``None`` for the formula's own.

    Example:
        >>> import torch
        >>> from timm.models import VisionTransformer
        >>> from attrib_zoo import TransformerLRP
        >>> model = VisionTransformer(img_size=64, embed_dim=24, depth=2, num_heads=2)
        >>> TransformerLRP(model).attribute(torch.rand(2, 3, 64, 64), target=[3, 7]).shape
        torch.Size([2, 3, 64, 64])

    References:
        H. Chefer, S. Gur, L. Wolf: Transformer Interpretability Beyond Attention Visualization. CVPR 2021.

    Deviations:
        Sums are balanced for each image; the authors' code balances over the batch and gives one map for it. LayerScale
        and norms of queries and keys, not in the paper, pass relevance on as LayerNorm does. Distilled DeiT gives half
        the relevance to each head, and the map is the mean of the two tokens' rows. Averaged tokens are not in the
        paper. Computed in float32 or better, whatever the model's precision; shares of sums that nearly cancel amplify
        rounding, so that a model in half precision can get a different map than in float32.
    """

    family: ClassVar[str] = "relevance propagation"
    paper: ClassVar[str] = "Chefer et al., CVPR 2021"
    cost: ClassVar[str] = "1F + 1B + about 4F"

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        start_layer: int = 0,
        row_norm: bool = False,
        mean_pooling: bool = False,
        upsample: bool = True,
        smooth: int | None = None,
        scale: str | None = None,
    ) -> None:
        super().__init__(model, layers, mean_pooling=mean_pooling, upsample=upsample, smooth=smooth, scale=scale)
        if isinstance(start_layer, bool) or not isinstance(start_layer, int) or start_layer < 0:
            raise OptionError(f"start_layer: must be 0 or the number of a later block, got {start_layer!r}")
        self.start_layer = start_layer
        self.row_norm = bool(row_norm)

    def compute_maps(self, inputs: Tensor, query: TargetQuery, args: tuple[Any, ...], show_progress: bool) -> Tensor:
        found, parts = self._apart(inputs, args)
        values = Values()
        with precise(inputs):  # shares of sums that nearly cancel do not survive autocast
            with values.listening(self.model, parts):
                attended = read_attention(
                    self.model,
                    found,
                    inputs,
                    args,
                    lambda outputs: _alone(query.resolve(outputs.detach())).select(outputs),
                    beside=values.scores,
                )
            maps = found.follow(self._steps(found, parts, values, attended))
        return not_zero(maps.transpose(0, 1), self.get_name())

    def _apart(self, inputs: Tensor, args: tuple[Any, ...]) -> tuple[Attentions, PreNorm]:
        """Where the model attends and how it is built, for inputs of this shape; computed once per shape."""
        found = self.attention(inputs, args)
        trace = look(self.model, inputs, args)
        parts = self._once("blocks", inputs, args, lambda: take_apart(trace, found, inputs, args))
        if self.start_layer >= len(parts.blocks):
            raise OptionError(
                f"start_layer: must be below {len(parts.blocks)}, the number of blocks of "
                f"{type(self.model).__name__}, got {self.start_layer}"
            )
        return found, parts

    def _steps(self, found: Attentions, parts: PreNorm, values: Values, attended: AttentionPass) -> Iterator[Tensor]:
        """The factors of the product, from the last block to the first that takes part."""
        relevance: Tensor | None = None
        rows: list[int] | slice = list(found.read)
        numbered = zip(range(len(parts.blocks))[::-1], attended.matrices(), strict=True)
        for number, matrix in numbered:
            dtype = matrix.values.dtype
            if relevance is None:
                relevance = _from_scores(self.model, found, parts, values, attended.beside, dtype)
            first = number == self.start_layer
            block = parts.blocks[number]
            relevance, at_matrix = _through_block(self.model, block, values, matrix, relevance, rows, first)
            rows = slice(None)
            yield with_identity(positive(matrix.gradients(), at_matrix), normalise=self.row_norm)
            if first:
                return


def _alone(target: Target) -> Target:
    """The targets, if they are classes and none contrasts."""
    if isinstance(target, Functions):
        raise TargetError(
            "target: TransformerLRP starts from a relevance of one at a class, and has no rule for a function of the "
            "outputs; use GenericAttention, LeGrad or GradCAM, or name a class"
        )
    if target.contrasts:
        raise TargetError(
            "target: TransformerLRP starts from a relevance of one at a class, and has no rule for the negative one of "
            "a Contrast; use GenericAttention, GradCAM, IIA or TTAME, or name the class alone"
        )
    return target


def _from_scores(
    model: nn.Module,
    found: Attentions,
    parts: PreNorm,
    values: Values,
    gradients: tuple[Tensor, ...],
    dtype: torch.dtype,
) -> Tensor:
    """Relevance of the tokens after the last block that are read, ``(M, N, R, D)``; the others have none.

    A head starts with the gradient of the score at its output: a one at the target, a half where two heads are
    averaged.
    """
    tokens = values.out_of(parts.tokens, dtype)[:, list(found.read)]
    relevance = tokens.new_zeros(len(gradients[0]), *tokens.shape)
    for head, gradient in zip(parts.heads, gradients, strict=True):
        if bool((gradient < 0).any()):
            raise UnsupportedModelError(
                f"model: must put out the logits of its linear head {head.linears[-1]!r}, for which a relevance of one "
                "is defined; something behind it, such as a softmax, mixes the classes: pass the model without it (of "
                "one logit class 0 is its negation: ask for target=1, or use GenericAttention)"
            )
        share = gradient.to(dtype)
        for name in reversed(head.linears):
            share = rules.linear(share, values.into(name, dtype), _weight(model, name, dtype))
        if head.token is None:
            relevance += rules.mean(share, tokens)
        else:
            relevance[:, :, found.read.index(head.token)] += share
    return relevance


def _through_block(
    model: nn.Module,
    block: Block,
    values: Values,
    matrix: Matrix,
    relevance: Tensor,
    rows: list[int] | slice,
    first: bool,
) -> tuple[Tensor, Tensor]:
    """Relevance of a block's input, ``(M, N, T, D)``, and of its attention matrices, ``(M, N, H, T, T)``.

    Up to the matrices, tokens are independent, so only those with relevance, R of them at ``rows``, are processed. In
    the first block that takes part, nothing is computed below the matrices.
    """
    dtype, heads = matrix.values.dtype, matrix.heads
    start, middle = values.into(block.name, dtype), values.into(block.norm, dtype)[:, rows]
    kept, share = rules.add(relevance, middle, values.out_of(block.last[0], dtype, block.last[1])[:, rows])
    for name in reversed(block.linears):
        share = rules.linear(share, values.into(name, dtype)[:, rows], _weight(model, name, dtype))
    relevance = rules.clone(middle, kept, share)
    kept, share = rules.add(relevance, start[:, rows], values.out_of(block.branch[0], dtype, block.branch[2])[:, rows])
    context, q, keys = matrix.context[:, :, rows], matrix.q[:, :, rows], matrix.k.transpose(-2, -1)
    share = heads.apart(rules.linear(share, heads.together(context), heads.out_weight))
    at_rows, at_v = rules.matmul(share, matrix.values[:, :, rows], matrix.v, context)
    at_matrix = _at(rows, at_rows, matrix.tokens.shape[1])
    if first:
        return relevance, at_matrix
    at_q, at_k = rules.matmul(at_rows, q, keys, q @ keys)
    at_parts = (_at(rows, at_q, matrix.tokens.shape[1]), at_k.transpose(-2, -1), at_v)
    at_qkv = torch.cat([heads.together(part) for part in at_parts], -1)
    share = rules.linear(at_qkv, matrix.tokens, heads.weight)
    return rules.clone(start, _at(rows, kept, matrix.tokens.shape[1]), share), at_matrix


def _at(rows: list[int] | slice, values: Tensor, count: int) -> Tensor:
    """``(..., R, D)`` at their rows of ``(..., T, D)``, zeros elsewhere."""
    if isinstance(rows, slice):
        return values
    full = values.new_zeros(*values.shape[:-2], count, values.shape[-1])
    full[..., rows, :] = values
    return full


def _weight(model: nn.Module, name: str, dtype: torch.dtype) -> Tensor:
    weight: Any = find(model, name).weight
    return weight.detach().to(dtype)  # type: ignore[no-any-return]
