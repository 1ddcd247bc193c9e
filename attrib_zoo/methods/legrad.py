"""LeGrad (Bousselham et al., ICCV 2025)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attrib_zoo.attribution import GradientAttribution
from attrib_zoo.backbone.targets import TargetQuery
from attrib_zoo.backbone.vit.layerwise import find_layers, layer_gradients
from attrib_zoo.errors import OptionError
from attrib_zoo.masking import at_least_float32
from attrib_zoo.methods.bases.attention import AttentionMethod, not_zero


class LeGrad(AttentionMethod, GradientAttribution):
    r"""The patches that each block's attention should attend to more for its tokens to score higher.

    .. math:: M = \frac{1}{L} \sum_l \frac{1}{H Q} \sum_{h, q} \mathrm{ReLU}\Big(\frac{\partial s_l}{\partial
              A_l^{(h)}}\Big)_{q}, \qquad s_l = \mathrm{head}(Z_l)_c

    with :math:`A_l^{(h)}` the Q x T attention of head h in block l, :math:`Z_l` the tokens ``(N, T, D)`` that the block
    outputs, and s_l the target's score when the model's own head, its last norm included, reads them; M is taken at the
    h x w patches. The gradient alone is the signal, without the attention as a factor; and it stays within its block,
    so that every block contributes its own evidence.

    The head may read a class token or the mean of tokens: then the queries q are all tokens of the block. Where
    attention pooling follows the blocks (``global_pool="map"`` of timm, SigLIP), A_l is the attention with which the
    pooling would read Z_l, and its own queries are q.

    Runs on unmodified timm and torchvision ViTs with fused attention, frozen or not. The matrices are recomputed from
    each block's input and checked against its output; a model that they do not reproduce is refused.

    Args:
        model: see :class:`~attrib_zoo.attribution.Attribution`.
        layers: must be ``None``: the attention of every block is read, from ``start_layer`` on.
        start_layer: the first block that takes part, counted from 0.
        upsample: ``False`` returns ``(N, 1, h, w)``.
        smooth: odd side of a mean filter over the cells of the map; ``None`` for none.
        scale: ``"min-max"``, ``"rank"``, ``"positive"``, or ``None`` for the formula's own.

    Example:
        >>> import torch
        >>> from timm.models import VisionTransformer
        >>> from attrib_zoo import LeGrad
        >>> model = VisionTransformer(img_size=64, embed_dim=24, depth=2, num_heads=2)
        >>> LeGrad(model).attribute(torch.rand(2, 3, 64, 64), target=[3, 7]).shape
        torch.Size([2, 3, 64, 64])

    References:
        W. Bousselham, A. Boggust, S. Chaybouti, H. Strobelt, H. Kuehne: LeGrad: An Explainability Method for Vision
        Transformers via Feature Formation Sensitivity. ICCV 2025.

    Deviations:
        The map is raw: the paper scales it to [0, 1] at the end. Written from the description of the method, not from
        the numbered equations. Windows and hierarchies (Swin) are refused: their blocks output other tokens than the
        head reads, so that they have no score.
    """

    paper: ClassVar[str] = "Bousselham et al., ICCV 2025"
    cost: ClassVar[str] = "2F + the head for each block + about B/2"

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        start_layer: int = 0,
        upsample: bool = True,
        smooth: int | None = None,
        scale: str | None = None,
    ) -> None:
        super().__init__(model, layers, mean_pooling=True, upsample=upsample, smooth=smooth, scale=scale)
        if isinstance(start_layer, bool) or not isinstance(start_layer, int) or start_layer < 0:
            raise OptionError(f"start_layer: must be 0 or the number of a later block, got {start_layer!r}")
        self.start_layer = start_layer

    def compute_maps(self, inputs: Tensor, query: TargetQuery, args: tuple[Any, ...], show_progress: bool) -> Tensor:
        layers = self._once("blocks of tokens", inputs, args, lambda: find_layers(self.model, inputs, args))
        if self.start_layer >= len(layers.blocks):
            raise OptionError(
                f"start_layer: must be below {len(layers.blocks)}, the number of blocks of "
                f"{type(self.model).__name__}, got {self.start_layer}"
            )
        found = layer_gradients(self.model, layers, inputs, args, query.resolve, self.start_layer)
        rows = [at_least_float32(gradient).relu().mean((-3, -2)) for gradient in found]
        return not_zero(layers.cells(torch.stack(rows).mean(0)).transpose(0, 1), self.get_name())
