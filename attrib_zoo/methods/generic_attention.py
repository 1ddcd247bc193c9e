"""Generic attention explainability, GAE (Chefer, Gur and Wolf, ICCV 2021)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from attrib_zoo.attribution import GradientAttribution
from attrib_zoo.backbone.targets import TargetQuery
from attrib_zoo.methods.bases.attention import AttentionMethod, attention_for, not_zero, positive, with_identity


class GenericAttention(AttentionMethod, GradientAttribution):
    r"""Which patches reach the class token through attention that raises the target's score, block by block.

    .. math:: R_0 = I, \qquad R_l = R_{l-1} + C_l R_{l-1}, \qquad
              C_l = \frac{1}{H} \sum_h \mathrm{ReLU}\Big(A_l^{(h)} \odot \frac{\partial S_c}{\partial A_l^{(h)}}\Big),
              \qquad M = (R_L)_{\mathrm{class}}

    (Eq. 5 and 6 of the paper, self-attention), with :math:`A_l^{(h)}` the T x T attention of head h in block l, S_c
    the target's logit, and M the class token's row of R at the h x w patches. Also known as GAE or
    "Transformer-MM-Explainability". It uses attention and its gradient alone, no relevance propagation.

    Runs on unmodified timm and torchvision ViTs with fused attention, frozen or not. The matrices are recomputed from
    each block's input and checked against its output; a model that they do not reproduce is refused.

    Args:
        model: see :class:`~attrib_zoo.attribution.Attribution`.
        layers: must be ``None``: every attention block is read.
        mean_pooling: also explain models whose head averages tokens: the mean over their rows of R.
        libra: gradients of a backward pass that is balanced as in LibraGrad (CVPR 2025): it treats attention weights,
            gates and standard deviations as constants.
        upsample: ``False`` returns ``(N, 1, h, w)``.
        smooth: odd side of a mean filter over the cells of the map; ``None`` for none.
        scale: ``"min-max"``, ``"rank"``, ``"positive"``, or ``None`` for the formula's own.

    Example:
        >>> import torch
        >>> from timm.models import VisionTransformer
        >>> from attrib_zoo import GenericAttention
        >>> model = VisionTransformer(img_size=64, embed_dim=24, depth=2, num_heads=2)
        >>> GenericAttention(model).attribute(torch.rand(2, 3, 64, 64), target=[3, 7]).shape
        torch.Size([2, 3, 64, 64])

    References:
        H. Chefer, S. Gur, L. Wolf: Generic Attention-model Explainability for Interpreting Bi-Modal and
        Encoder-Decoder Transformers. ICCV 2021.

    Deviations:
        None from the formula. Where the head reads several class tokens (distilled DeiT), the map is the mean of
        their rows; averaged tokens are not in the paper. Windows and hierarchies (Swin) are refused.
    """

    paper: ClassVar[str] = "Chefer et al., ICCV 2021"
    cost: ClassVar[str] = "1F + 1B"

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        mean_pooling: bool = False,
        libra: bool = False,
        upsample: bool = True,
        smooth: int | None = None,
        scale: str | None = None,
    ) -> None:
        super().__init__(model, layers, mean_pooling=mean_pooling, upsample=upsample, smooth=smooth, scale=scale)
        self.libra = bool(libra)

    def compute_maps(self, inputs: Tensor, query: TargetQuery, args: tuple[Any, ...], show_progress: bool) -> Tensor:
        found = self.attention(inputs, args)
        attended = attention_for(self.model, found, inputs, args, query, libra=self.libra)
        shares = (positive(block.gradients(), block.values) for block in attended.matrices())
        maps = found.follow(with_identity(share, normalise=False) for share in shares)
        return not_zero(maps.transpose(0, 1), self.get_name())
