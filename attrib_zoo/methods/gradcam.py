"""Grad-CAM (Selvaraju et al., ICCV 2017)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from attrib_zoo.methods.bases.gradient_cam import GradientCAM


class GradCAM(GradientCAM):
    r"""Where the feature maps that raise the target's score are active; one weight per map.

    .. math:: M = \mathrm{ReLU}\Big(\sum_k w_k A_k\Big), \qquad
              w_k = \frac{1}{hw} \sum_{i,j} \frac{\partial S_c}{\partial A_{k,i,j}}

    (Eq. 1 and 2 of the paper), with A the D feature maps of the layer, ``(N, D, h, w)``, and S_c the target's logit.
    One forward pass, and a backward pass through the layers after it only; works on frozen models, under
    ``no_grad`` and inside ``inference_mode``.

    The default layer is the last convolutional stage; for a vision transformer with a class token the last block's
    first normalisation layer (the patch tokens of that block's output have no gradient), otherwise the last block.
    On the LayerNorm features of vision transformers spatially averaged gradients can carry little information: compare
    with a method that does not average before you trust a map there.

    Args:
        model: see :class:`~attrib_zoo.attribution.Attribution`.
        layers: see :class:`~attrib_zoo.attribution.Attribution`; several layers give the mean of their maps.
        relu: the paper's ReLU; ``False`` keeps negative evidence.
        score: what is differentiated: ``"logit"`` (paper), ``"softmax"``, ``"logsoftmax"`` or ``"sigmoid"``.
        libra: gradients of a backward pass that is balanced as in LibraGrad (CVPR 2025): it treats attention weights,
            gates and standard deviations as constants. For transformers and gated networks; changes nothing after
            ReLUs.
        upsample: ``False`` returns ``(N, 1, h, w)``.
        smooth: odd side of a mean filter over the cells of the map; ``None`` for none.
        scale: ``"min-max"``, ``"rank"``, ``"positive"``, or ``None`` for the formula's own.

    Example:
        >>> import torch
        >>> from torchvision.models import squeezenet1_1
        >>> from attrib_zoo import GradCAM
        >>> model = squeezenet1_1(weights=None)
        >>> GradCAM(model).attribute(torch.rand(2, 3, 96, 96), target=[3, 7]).shape
        torch.Size([2, 3, 96, 96])

    References:
        R. R. Selvaraju, M. Cogswell, A. Das, R. Vedantam, D. Parikh, D. Batra: Grad-CAM: Visual Explanations from
        Deep Networks via Gradient-based Localization. ICCV 2017.

    Deviations:
        None from the formula. The paper covers CNNs only; on tokens the weights are averages over the patch tokens.
        The map is raw: scaling is left to plots and measures.
    """

    paper: ClassVar[str] = "Selvaraju et al., ICCV 2017"

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """Eq. 1: the gradient averaged over space."""
        return gradients.mean(dim=(-2, -1))
