"""Zoom-CAM (Shi et al., ICPR 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from attrib_zoo.backbone.kind import is_transformer
from attrib_zoo.backbone.layers.resolve import Tap
from attrib_zoo.errors import UnsupportedModelError
from attrib_zoo.masking import min_max
from attrib_zoo.masking import upsample as enlarge
from attrib_zoo.methods.bases.gradient_cam import GradientCAM


class ZoomCAM(GradientCAM):
    r"""The strongest evidence for the target at any scale: gradient times activation of all stages, fused.

    Each layer's map is gradient times activation, scaled to [0, 1] over space; from the coarsest to the finest, the map
    so far is enlarged and merged with the next by the larger value at each position:

    .. math:: M_l = \mathrm{minmax}\Big(\mathrm{ReLU}\Big(\sum_k \frac{\partial S_c}{\partial A^l_k} \odot A^l_k\Big)
              \Big), \qquad E \leftarrow \max(\mathrm{up}(E), M_l)

    with :math:`A^l` the feature maps of layer l, ``(N, D, h, w)``, and S_c the target's logit. The map lies in [0, 1].

    The default layers are all stage ends; in networks whose stages end in max-pooling (VGG) every convolution after
    its ReLU. All blocks of a vision transformer have the same resolution, so there is nothing to zoom into: such models
    are refused unless layers are named.

    Args:
        model: see :class:`~attrib_zoo.attribution.Attribution`.
        layers: see :class:`~attrib_zoo.attribution.Attribution`; the map has the resolution of the first one.
        relu: the paper's ReLU; ``False`` scales signed maps.
        score: what is differentiated: ``"logit"`` (paper), ``"softmax"``, ``"logsoftmax"`` or ``"sigmoid"``.
        libra: gradients of a backward pass that is balanced as in LibraGrad (CVPR 2025); for gated networks.
        upsample: ``False`` returns ``(N, 1, h, w)``.
        smooth: odd side of a mean filter over the cells of the map; ``None`` for none.
        scale: ``"min-max"``, ``"rank"``, ``"positive"``, or ``None`` for the formula's own.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from attrib_zoo import ZoomCAM
        >>> model = resnet18(weights=None)
        >>> ZoomCAM(model).attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 3, 64, 64])

    References:
        X. Shi, S. Khademi, Y. Li, J. van Gemert: Zoom-CAM: Generating Fine-grained Pixel Annotations from Image
        Labels. ICPR 2020.

    Deviations:
        Maps are divided by their range, which is their maximum wherever a map touches zero. A constant map becomes
        zero. Layers of networks other than VGG-16 and ResNet follow the stage rule.
    """

    paper: ClassVar[str] = "Shi et al., ICPR 2020"
    models: ClassVar[tuple[str, ...]] = ("cnn",)
    default_layers: ClassVar[tuple[str, int] | None] = ("fine", 1)

    def resolve_layers(self, inputs: Tensor, args: Sequence[Any]) -> tuple[Tap, ...]:
        taps = super().resolve_layers(inputs, args)
        if self.layers is None and (is_transformer(self.model) or any(tap.grid.is_tokens for tap in taps)):
            raise UnsupportedModelError(
                f"ZoomCAM: needs convolutional stages of several resolutions, got {type(self.model).__name__} with "
                "self-attention; use LayerCAM or HiResCAM, or name the layers"
            )
        return taps

    def combine(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """Gradient times activation, summed over the feature maps."""
        return (gradients * activations).sum(1)

    def layer_map(self, activation: Tensor, gradient: Tensor) -> Tensor:
        return min_max(super().layer_map(activation, gradient))

    def fuse(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """From coarse to fine, the larger of the enlarged map and the next."""
        fused = maps[-1]
        for finer in maps[-2::-1]:
            fused = torch.maximum(enlarge(fused, finer.shape[-2:]), finer)
        return fused
