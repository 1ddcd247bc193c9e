"""HiResCAM (Draelos and Carin, 2020)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from attrib_zoo.methods.bases.gradient_cam import GradientCAM


class HiResCAM(GradientCAM):
    r"""Where the features add to the target's score, cell by cell, without averaging the gradient.

    .. math:: M_{i,j} = \sum_k \frac{\partial S_c}{\partial A_{k,i,j}} A_{k,i,j}

    with A the D feature maps of the layer, ``(N, D, h, w)``, and S_c the target's logit. Where everything after the
    layer is linear, the map is exact: its sum over space is the logit without its bias. Grad-CAM averages a gradient
    that varies over space, and so highlights positions that did not contribute; this map does not. Both agree before
    global average pooling.

    The default layer is that of :class:`~attrib_zoo.GradCAM`. The map also suits the signed features of vision
    transformers.

    Args:
        model: see :class:`~attrib_zoo.attribution.Attribution`.
        layers: see :class:`~attrib_zoo.attribution.Attribution`; several layers give the mean of their maps.
        relu: ``True`` keeps positive evidence only; the paper needs no ReLU.
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
        >>> from attrib_zoo import HiResCAM
        >>> model = resnet18(weights=None)
        >>> HiResCAM(model).attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 3, 64, 64])

    References:
        R. L. Draelos, L. Carin: Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional neural
        networks. arXiv:2011.08891, 2020.

    Deviations:
        None from the formula. The paper covers CNNs only. The map is raw.
    """

    paper: ClassVar[str] = "Draelos and Carin, arXiv 2020"

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        relu: bool = False,
        score: str = "logit",
        libra: bool = False,
        upsample: bool = True,
        smooth: int | None = None,
        scale: str | None = None,
    ) -> None:
        super().__init__(
            model, layers, relu=relu, score=score, libra=libra, upsample=upsample, smooth=smooth, scale=scale
        )

    def combine(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """Gradient times activation, summed over the feature maps."""
        return (gradients * activations).sum(1)
