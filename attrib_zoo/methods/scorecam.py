"""Score-CAM (Wang et al., CVPR Workshops 2020), and the two other variants in use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrib_zoo.backbone.targets import Target
from attrib_zoo.errors import OptionError, check_choice, warn
from attrib_zoo.masking import min_max, upsample
from attrib_zoo.methods.bases.perturbation import Baseline, PerturbationCAM, read_scores

_VARIANTS = ("paper", "pytorch-grad-cam", "torchcam")


class ScoreCAM(PerturbationCAM):
    r"""Where the feature maps through which the model still sees the target are active; no gradients.

    .. math:: M = \mathrm{ReLU}\Big(\sum_k w_k A_k\Big), \qquad
              w_k = S_c\big(x \odot H_k + b \odot (1 - H_k)\big), \qquad
              H_k = \frac{U(A_k) - \min U(A_k)}{\max U(A_k) - \min U(A_k)}

    with A the D feature maps of the layer, ``(N, D, h, w)``, U bilinear upsampling to the image, S_c the target's
    probability and b the baseline. One forward pass, and one for each feature map that is not constant, in chunks; they
    serve all targets of :meth:`attribute_many` together. Only the scores of each mask are kept.

    Published pass counts are D: 512 for VGG16, 2048 for ResNet-50, 768 for ViT-B/16.

    Args:
        model: see :class:`~attrib_zoo.attribution.Attribution`.
        layers: see :class:`~attrib_zoo.attribution.Attribution`; several layers give the mean of their maps. Default:
            the last convolutional stage; the first normalisation layer of the last block of a transformer with a class
            token.
        variant: ``"paper"``; ``"pytorch-grad-cam"``: logits, a softmax over the feature maps, and masks enlarged with
            ``align_corners=True``; ``"torchcam"``: logits, a softmax over the feature maps, and masks that are scaled
            before they are enlarged.
        score: ``"softmax"``, ``"logit"``, ``"logsoftmax"`` or ``"sigmoid"``; ``None`` for the variant's own.
        channel_softmax: a softmax of the scores over the feature maps; ``None`` is the variant's own.
        subtract_base: subtract the score of the whole image from the scores; no effect under ``channel_softmax``.
        baseline: what is shown where a mask is 0: ``"mean"`` (0, the mean colour), ``"black"``, ``"blur"``, a number,
            or a tensor that broadcasts to the inputs.
        chunk_size: masked images per forward pass; ``None``: 32, fewer where memory runs out.
        upsample: ``False`` returns ``(N, 1, h, w)``.
        smooth: odd side of a mean filter over the cells of the map; ``None`` for none.
        scale: ``"min-max"``, ``"rank"``, ``"positive"``, or ``None`` for the formula's own.

    Example:
        >>> import torch
        >>> from attrib_zoo import ScoreCAM
        >>> from attrib_zoo.synthetic import tiny_cnn
        >>> images = torch.rand(2, 3, 64, 64)
        >>> ScoreCAM(tiny_cnn(size=64)).attribute_many(images, [3, 5]).shape
        torch.Size([2, 2, 3, 64, 64])

    References:
        H. Wang, Z. Wang, M. Du, F. Yang, Z. Zhang, S. Ding, P. Mardziel, X. Hu: Score-CAM: Score-Weighted Visual
        Explanations for Convolutional Neural Networks. CVPR Workshops 2020.

    Deviations:
        Weights are probabilities without a softmax over the feature maps, as in the authors' code; the paper's
        increase of confidence subtracts the score of an empty image, a constant. The ReLU comes before upsampling,
        which is the same unless features are negative. Constant feature maps get no pass and no weight, including in a
        softmax over the feature maps, and no constant is added to denominators. The map is raw.
    """

    paper: ClassVar[str] = "Wang et al., CVPR Workshops 2020"

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        variant: str = "paper",
        score: str | None = None,
        channel_softmax: bool | None = None,
        subtract_base: bool = False,
        baseline: Baseline = "mean",
        chunk_size: int | None = None,
        upsample: bool = True,
        smooth: int | None = None,
        scale: str | None = None,
    ) -> None:
        self.variant = check_choice("variant", variant, _VARIANTS)
        super().__init__(
            model,
            layers,
            score="softmax" if score is None else score,
            baseline=baseline,
            chunk_size=chunk_size,
            upsample=upsample,
            smooth=smooth,
            scale=scale,
        )
        self.score = score
        if channel_softmax is not None and not isinstance(channel_softmax, bool):
            raise OptionError(f"channel_softmax: must be True, False or None, got {channel_softmax!r}")
        self.channel_softmax = channel_softmax
        self.subtract_base = bool(subtract_base)

    def read(self, outputs: Tensor, target: Target) -> Tensor:
        """The variant's own scores unless others are requested."""
        return read_scores(outputs, target, self.score or ("softmax" if self.variant == "paper" else "logit"))

    def masks(self, maps: Tensor, size: Sequence[int]) -> Tensor:
        """Enlarged, then scaled; torchcam scales first."""
        if self.variant == "torchcam":
            return upsample(min_max(maps), size)
        if self.variant == "pytorch-grad-cam":
            return min_max(F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=True))
        return super().masks(maps, size)

    def weights(self, scores: Tensor, clean: Tensor, alive: Tensor) -> Tensor:
        """The scores, or their softmax over the maps that are not constant."""
        alive = alive.unsqueeze(-1)
        if self.subtract_base:
            scores = scores - clean.unsqueeze(1)
        if self.variant != "paper" if self.channel_softmax is None else self.channel_softmax:
            highest = scores.masked_fill(~alive, -torch.inf).amax(1, keepdim=True)
            shares = (scores - highest.where(highest > -torch.inf, 0)).exp().where(alive, 0)
            total = shares.sum(1, keepdim=True)
            return shares / total.where(total > 0, 1)
        weights = scores.where(alive, 0)
        if bool(alive.any()) and not bool((weights > 0).any()):
            warn(f"{self.get_name()}: no weight is positive, so it is zero; use channel_softmax=True or a probability")
        return weights
