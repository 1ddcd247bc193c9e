"""Attention rollout (Abnar and Zuidema, ACL 2020)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from attrib_zoo.backbone.targets import TargetQuery
from attrib_zoo.backbone.vit.attention import read_attention
from attrib_zoo.methods.bases.attention import AttentionMethod, attention_for, not_zero, positive, with_identity


class AttentionRollout(AttentionMethod):
    r"""How much of each patch can have reached the class token through the attention of all blocks.

    .. math:: J = \bar A_L \cdots \bar A_1, \qquad
              \bar A_l = \mathrm{rownorm}\Big(I + \frac{1}{H} \sum_h A_l^{(h)}\Big), \qquad M = J_{\mathrm{class}}

    with :math:`A_l^{(h)}` the T x T attention of head h in block l, rownorm the division of each row by its sum, and M
    the class token's row of J at the h x w patches. All values are positive and the whole row sums to 1.

    The map does not depend on the target, so it shows where the model attends and not what supports a class. With
    ``gradient=True`` it does: :math:`\mathrm{ReLU}(A \odot \partial S_c / \partial A)` replaces A.

    Runs on unmodified timm and torchvision ViTs with fused attention. The matrices are recomputed from each
    block's input and checked against its output; a model that they do not reproduce is refused.

    Args:
        model: see :class:`~attrib_zoo.attribution.Attribution`.
        layers: must be ``None``: every attention block is read.
        gradient: weight attention by the gradient of the target's logit ("gradient rollout").
        mean_pooling: also explain models whose head averages tokens: the mean over their rows of J.
        upsample: ``False`` returns ``(N, 1, h, w)``.
        smooth: odd side of a mean filter over the cells of the map; ``None`` for none.
        scale: ``"min-max"``, ``"rank"``, ``"positive"``, or ``None`` for the formula's own.

    Example:
        >>> import torch
        >>> from timm.models import VisionTransformer
        >>> from attrib_zoo import AttentionRollout
        >>> model = VisionTransformer(img_size=64, embed_dim=24, depth=2, num_heads=2)
        >>> AttentionRollout(model).attribute(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 3, 64, 64])

    References:
        S. Abnar, W. Zuidema: Quantifying Attention Flow in Transformers. ACL 2020.

    Deviations:
        Where the head reads several class tokens (distilled DeiT), the map is the mean of their rows. Averaged tokens
        and the gradient are not in the paper. Windows and hierarchies (Swin) have no rollout and are refused.
    """

    paper: ClassVar[str] = "Abnar and Zuidema, ACL 2020"
    cost: ClassVar[str] = "1F (with gradient: 1F + 1B)"
    class_agnostic: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        gradient: bool = False,
        mean_pooling: bool = False,
        upsample: bool = True,
        smooth: int | None = None,
        scale: str | None = None,
    ) -> None:
        super().__init__(model, layers, mean_pooling=mean_pooling, upsample=upsample, smooth=smooth, scale=scale)
        self.gradient = bool(gradient)
        if self.gradient:
            self.class_agnostic = False  # type: ignore[misc]  # the class attribute holds for the default options

    def compute_maps(self, inputs: Tensor, query: TargetQuery, args: tuple[Any, ...], show_progress: bool) -> Tensor:
        found = self.attention(inputs, args)
        if self.gradient:
            attended = attention_for(self.model, found, inputs, args, query)
            shares = (positive(block.gradients(), block.values) for block in attended.matrices())
            maps = found.follow(with_identity(share, normalise=True) for share in shares)
            return not_zero(maps.transpose(0, 1), self.get_name())
        attended = read_attention(self.model, found, inputs, args)
        count = query.resolve(attended.outputs).count
        means = (block.values.mean(-3) for block in attended.matrices())
        maps = found.follow(with_identity(mean, normalise=True) for mean in means)
        return maps.unsqueeze(1).expand(-1, count, -1, -1)
