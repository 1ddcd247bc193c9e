"""XGrad-CAM (Fu et al., BMVC 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from attrib_zoo.backbone.layers.resolve import Tap
from attrib_zoo.backbone.module import find
from attrib_zoo.errors import UnsupportedModelError, check_choice
from attrib_zoo.methods.bases.gradient_cam import GradientCAM


class XGradCAM(GradientCAM):
    r"""Where the feature maps that carry the target's score are active; gradients count where the map is active.

    Grad-CAM with weights chosen so that the map nearly satisfies two axioms (sensitivity and conservation):

    .. math:: M = \mathrm{ReLU}\Big(\sum_k w_k A_k\Big), \qquad
              w_k = \sum_{i,j} \frac{A_{k,i,j}}{\sum_{a,b} A_{k,a,b}} \frac{\partial S_c}{\partial A_{k,i,j}}

    with A the D feature maps of the layer, ``(N, D, h, w)``, and S_c the target's logit. Before the ReLU the map has
    the same sum as gradient times activation.

    The default layer is that of :class:`~attrib_zoo.GradCAM`. The weights are averages only where no feature is
    negative. Tokens, channels-last features and the outputs of layer normalisations are refused, and a call warns where
    a feature map of another layer has a negative sum.

    Args:
        model: see :class:`~attrib_zoo.attribution.Attribution`.
        layers: see :class:`~attrib_zoo.attribution.Attribution`; several layers give the mean of their maps.
        denominator: ``"sum"``: the formula above; ``"abs"``: the sum of absolute values, defined for all layers.
        relu: the paper's ReLU; ``False`` keeps negative evidence.
        score: what is differentiated: ``"logit"`` (paper), ``"softmax"``, ``"logsoftmax"`` or ``"sigmoid"``.
        upsample: ``False`` returns ``(N, 1, h, w)``.
        smooth: odd side of a mean filter over the cells of the map; ``None`` for none.
        scale: ``"min-max"``, ``"rank"``, ``"positive"``, or ``None`` for the formula's own.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from attrib_zoo import XGradCAM
        >>> model = resnet18(weights=None)
        >>> XGradCAM(model).attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 3, 64, 64])

    References:
        R. Fu, Q. Hu, X. Dong, Y. Guo, Y. Gao, B. Li: Axiom-based Grad-CAM: Towards Accurate Visualization and
        Explanation of CNNs. BMVC 2020.

    Deviations:
        A feature map that sums to exactly zero has the weight 0. The map is raw.
    """

    paper: ClassVar[str] = "Fu et al., BMVC 2020"
    models: ClassVar[tuple[str, ...]] = ("cnn",)
    nonnegative: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        denominator: str = "sum",
        relu: bool = True,
        score: str = "logit",
        upsample: bool = True,
        smooth: int | None = None,
        scale: str | None = None,
    ) -> None:
        super().__init__(model, layers, relu=relu, score=score, upsample=upsample, smooth=smooth, scale=scale)
        self.denominator = check_choice("denominator", denominator, ("sum", "abs"))

    def check_features(self, activations: Sequence[Tensor], taps: Sequence[Tap]) -> None:
        """Refuse features that are signed by construction."""
        if self.denominator == "abs":
            return
        for tap in taps:
            module = find(self.model, tap.name)
            if tap.grid.kind != "nchw" or isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
                raise UnsupportedModelError(
                    f"XGradCAM: needs a layer whose features are nowhere negative, got {tap.name!r} "
                    f"({type(module).__name__}, {tap.grid.kind}); use HiResCAM or LayerCAM, or denominator='abs'"
                )
        super().check_features(activations, taps)

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """The gradient averaged over space, weighted by the activations."""
        total = (activations.abs() if self.denominator == "abs" else activations).sum(dim=(-2, -1))
        share = (activations * gradients).sum(dim=(-2, -1)) / total.where(total != 0, 1)
        return share.where(total != 0, 0)
