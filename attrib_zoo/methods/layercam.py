"""LayerCAM (Jiang et al., IEEE TIP 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attrib_zoo.errors import check_number
from attrib_zoo.masking import upsample as enlarge
from attrib_zoo.methods.bases.gradient_cam import GradientCAM


class LayerCAM(GradientCAM):
    r"""Where features are active that locally raise the target's score; sharp at shallow layers too.

    Each cell of each feature map has its own weight, the positive part of the gradient:

    .. math:: M_{i,j} = \mathrm{ReLU}\Big(\sum_k \mathrm{ReLU}\Big(\frac{\partial S_c}{\partial A_{k,i,j}}\Big)
              A_{k,i,j}\Big)

    with A the D feature maps of a layer, ``(N, D, h, w)``, and S_c the target's logit. The maps of several layers are
    scaled and fused into one, by the maximum of the enlarged maps at each pixel:

    .. math:: \hat M = \max_l \; \mathrm{up}\Big(\tanh \frac{\gamma M_l}{\max M_l}\Big)

    The default layer is that of :class:`~attrib_zoo.GradCAM`; all named layers share one pass.

    Args:
        model: see :class:`~attrib_zoo.attribution.Attribution`.
        layers: see :class:`~attrib_zoo.attribution.Attribution`; for finer maps name shallow and deep ones, such as
            ``["layer2", "layer3", "layer4"]``.
        gamma: γ, how far the scaling of several layers saturates.
        relu: the paper's ReLU of the sum; ``False`` keeps negative values, which only signed features have.
        score: what is differentiated: ``"logit"`` (paper), ``"softmax"``, ``"logsoftmax"`` or ``"sigmoid"``.
        libra: gradients of a backward pass that is balanced as in LibraGrad (CVPR 2025): it treats attention weights,
            gates and standard deviations as constants. For transformers and gated networks; changes nothing after
            ReLUs.
        upsample: ``False`` returns ``(N, 1, h, w)``.
        smooth: odd side of a mean filter over the cells of the map; ``None`` for none.
        scale: ``"min-max"``, ``"rank"``, ``"positive"``, or ``None`` for the formula's own.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from attrib_zoo import LayerCAM
        >>> model = resnet18(weights=None)
        >>> LayerCAM(model, ["layer2", "layer4"]).attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 3, 64, 64])

    References:
        P.-T. Jiang, C.-B. Zhang, Q. Hou, M.-M. Cheng, Y. Wei: LayerCAM: Exploring Hierarchical Class Activation Maps
        for Localization. IEEE Transactions on Image Processing, 2021.

    Deviations:
        With several layers all are scaled, including the deepest. With ``relu=False`` a map is scaled by its largest
        absolute value. A map that is zero stays zero. The map of a single layer is raw. The paper covers CNNs only.
    """

    paper: ClassVar[str] = "Jiang et al., IEEE TIP 2021"

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        gamma: float = 2.0,
        relu: bool = True,
        score: str = "logit",
        libra: bool = False,
        upsample: bool = True,
        smooth: int | None = None,
        scale: str | None = None,
    ) -> None:
        super().__init__(
            model, layers, relu=relu, score=score, libra=libra, upsample=upsample, smooth=smooth, scale=scale
        )
        self.gamma = check_number("gamma", gamma, least=1e-6)

    def combine(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """The positive gradient times the activation, summed over the feature maps."""
        return (gradients.relu() * activations).sum(1)

    def fuse(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Scale each layer's map, enlarge it, and take the largest."""
        return torch.stack([enlarge(self._scaled(heat), size) for heat in maps]).amax(0)

    def _scaled(self, heat: Tensor) -> Tensor:
        top = heat.abs().amax(dim=(-2, -1), keepdim=True)
        return (self.gamma * heat / top.where(top > 0, torch.ones_like(top))).tanh()
