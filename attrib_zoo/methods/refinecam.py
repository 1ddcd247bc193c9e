"""RefineCAM (Domeniconi et al., 2026)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attrib_zoo.errors import check_choice, warn
from attrib_zoo.masking import min_max
from attrib_zoo.masking import upsample as enlarge
from attrib_zoo.methods.bases.gradient_cam import GradientCAM
from attrib_zoo.methods.gradcam_plus_plus import plus_plus_weights

BASES = ("GradCAMPlusPlus", "GradCAM", "HiResCAM", "LayerCAM")


class RefineCAM(GradientCAM):
    r"""Where the maps of coarse and fine layers agree: the detail of a fine map within the region of a coarse one.

    .. math:: M = \mathrm{minmax}\Big(\prod_l \mathrm{up}\big(\mathrm{minmax}(\mathrm{ReLU}(M_l))\big)\Big)

    with :math:`M_l` the class activation map of layer l, ``(N, h_l, w_l)``, by Grad-CAM++ or another formula. All
    layers share one pass. The map lies in [0, 1], and is zero wherever one of the layers has no evidence.

    Defined for CNNs. The default layers are the ends of the last four stages. On a plain transformer, whose blocks have
    one resolution, the first norms of the last four blocks are read; their maps often agree nowhere; then the map is
    zero, with a warning.

    Args:
        model: see :class:`~attrib_zoo.attribution.Attribution`.
        layers: see :class:`~attrib_zoo.attribution.Attribution`; the map has the resolution of the finest.
        base: the method whose formula gives the map of a layer: ``"GradCAMPlusPlus"``, ``"GradCAM"``, ``"HiResCAM"`` or
            ``"LayerCAM"``. For signed features use ``"HiResCAM"``.
        score: what is differentiated: ``"logit"``, ``"softmax"``, ``"logsoftmax"`` or ``"sigmoid"``.
        upsample: ``False`` returns ``(N, 1, h, w)``.
        smooth: odd side of a mean filter over the cells of each layer's map; ``None`` for none.
        scale: ``"min-max"``, ``"rank"``, ``"positive"``, or ``None`` for the formula's own, which is min-max.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from attrib_zoo import RefineCAM
        >>> model = resnet18(weights=None)
        >>> RefineCAM(model).attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 3, 64, 64])

    References:
        L. Domeniconi, A. Stramiglio, M. Lombardi, S. Salti: How to Evaluate and Refine your CAM. arXiv:2605.14641,
        2026.

    Deviations:
        Written from descriptions of the method (the product of maps that are scaled to [0, 1], Grad-CAM++ by default),
        not from the paper's numbered equations. Maps are scaled at the resolution of their layer, and their product is
        computed at that of the finest; a constant map becomes zero.
    """

    paper: ClassVar[str] = "Domeniconi et al., arXiv 2026"
    models: ClassVar[tuple[str, ...]] = ("cnn",)
    default_layers: ClassVar[tuple[str, int] | None] = ("norms", 4)
    own_scale: ClassVar[str | None] = "min-max"

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        base: str = "GradCAMPlusPlus",
        score: str = "logit",
        upsample: bool = True,
        smooth: int | None = None,
        scale: str | None = None,
    ) -> None:
        super().__init__(model, layers, relu=True, score=score, upsample=upsample, smooth=smooth, scale=scale)
        self.base = check_choice("base", base, BASES)
        self.nonnegative = base == "GradCAMPlusPlus"  # type: ignore[misc]  # depends on an option here

    def combine(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """One layer's map by the formula of ``base``."""
        if self.base in ("HiResCAM", "LayerCAM"):
            slopes = gradients if self.base == "HiResCAM" else gradients.relu()
            return (slopes * activations).sum(1)
        weights = gradients.mean((-2, -1)) if self.base == "GradCAM" else plus_plus_weights(activations, gradients)
        return torch.einsum("md,mdhw->mhw", weights, activations)

    def layer_map(self, activation: Tensor, gradient: Tensor) -> Tensor:
        return min_max(super().layer_map(activation, gradient))

    def fuse(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """The product of the maps, at the resolution of the finest."""
        finest = [max(heat.shape[axis] for heat in maps) for axis in (-2, -1)]
        found = torch.stack([enlarge(heat, finest) for heat in maps]).prod(0)
        if not bool(found.any()):
            warn(f"{type(self).__name__}: the map is exactly zero: no place has evidence in all {len(maps)} layers")
        return found
