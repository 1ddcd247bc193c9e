"""Grad-CAM++ (Chattopadhay et al., WACV 2018)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attrib_zoo.errors import check_choice
from attrib_zoo.methods.bases.gradient_cam import GradientCAM


class GradCAMPlusPlus(GradientCAM):
    r"""Where the feature maps that support the target are active, each weighted by position.

    Grad-CAM with a weight for each position of the positive gradient, meant for several objects of a class:

    .. math:: M = \mathrm{ReLU}\Big(\sum_k w_k A_k\Big), \quad
              w_k = \sum_{i,j} \alpha_{k,i,j} \,\mathrm{ReLU}(g_{k,i,j}), \quad
              \alpha_{k,i,j} = \frac{g_{k,i,j}^2}{2 g_{k,i,j}^2 + g_{k,i,j}^3 \sum_{a,b} A_{k,a,b}}

    (Eq. 19 of the paper for α), with A the D feature maps of the layer, ``(N, D, h, w)``, and g the gradient of the
    target's logit with respect to them.

    The default layer is that of :class:`~attrib_zoo.GradCAM`. The derivation assumes features after a ReLU. Where a
    feature map sums to a negative number, as on the LayerNorm features of vision transformers, a call warns.

    Args:
        model: see :class:`~attrib_zoo.attribution.Attribution`.
        layers: see :class:`~attrib_zoo.attribution.Attribution`; several layers give the mean of their maps.
        alpha: ``"paper"``: the formula above; ``"local"``: the sum over positions of A g³ instead of g³ times the sum
            of A, as in several other implementations. Both agree where the gradient is the same everywhere.
        relu: the paper's ReLU of the sum; ``False`` keeps negative evidence.
        score: what is differentiated: ``"logit"`` (paper), ``"softmax"``, ``"logsoftmax"`` or ``"sigmoid"``.
        upsample: ``False`` returns ``(N, 1, h, w)``.
        smooth: odd side of a mean filter over the cells of the map; ``None`` for none.
        scale: ``"min-max"``, ``"rank"``, ``"positive"``, or ``None`` for the formula's own.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from attrib_zoo import GradCAMPlusPlus
        >>> model = resnet18(weights=None)
        >>> GradCAMPlusPlus(model).attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 3, 64, 64])

    References:
        A. Chattopadhay, A. Sarkar, P. Howlader, V. N. Balasubramanian: Grad-CAM++: Generalized Gradient-based Visual
        Explanations for Deep Convolutional Networks. WACV 2018.

    Deviations:
        The paper differentiates exp(S), which multiplies a map by a positive number; this is left out, since it
        overflows. Numerator and denominator of α are divided by g² first, so that no small constant is needed that
        would distort the weights. Where the denominator is not positive, α is 0. The map is raw.
    """

    paper: ClassVar[str] = "Chattopadhay et al., WACV 2018"
    nonnegative: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        alpha: str = "paper",
        relu: bool = True,
        score: str = "logit",
        upsample: bool = True,
        smooth: int | None = None,
        scale: str | None = None,
    ) -> None:
        super().__init__(model, layers, relu=relu, score=score, upsample=upsample, smooth=smooth, scale=scale)
        self.alpha = check_choice("alpha", alpha, ("paper", "local"))

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """The positive gradient summed over space, weighted by α."""
        return plus_plus_weights(activations, gradients, local=self.alpha == "local")


def plus_plus_weights(activations: Tensor, gradients: Tensor, *, local: bool = False) -> Tensor:
    """The weight ``(M, D)`` of each feature map: the positive gradient summed over space, weighted by α.

    Args:
        activations: ``(M, D, h, w)``.
        gradients: ``(M, D, h, w)``.
        local: see ``alpha`` of :class:`GradCAMPlusPlus`.
    """
    if local:
        top = gradients.abs().amax(dim=(-3, -2, -1), keepdim=True)
        unit = gradients / top.where(top > 0, torch.ones_like(top))  # its cube is finite in any precision
        square = unit.square()
        under = 2 * square + top * (activations * unit * square).sum(dim=(-2, -1), keepdim=True)
    else:
        square = torch.ones_like(gradients)
        under = 2 + gradients * activations.sum(dim=(-2, -1), keepdim=True)
    share = torch.where(under > 0, square / under.where(under > 0, torch.ones_like(under)), 0)
    return (share * gradients.relu()).sum(dim=(-2, -1))
