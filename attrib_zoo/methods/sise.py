"""SISE (Sattarzadeh et al., AAAI 2021)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from attrib_zoo.errors import OptionError, check_number
from attrib_zoo.methods.bases.blockwise import BlockwiseSampling
from attrib_zoo.methods.bases.perturbation import Baseline


class SISE(BlockwiseSampling):
    r"""Feature maps of all stages through which the model still sees the target, fused into a finely detailed map.

    .. math:: V_l(\lambda) = \sum_{k:\ \alpha_k > \mu \beta}
              S_c\big(x \odot m_k + b \odot (1 - m_k)\big) \, \frac{m_k(\lambda)}{\sum_\lambda m_k(\lambda)}, \qquad
              E \leftarrow (E + V_l) \odot [V_l > \mathrm{Otsu}(V_l)]

    (Eq. 6 to 12 of the paper), with m_k the k-th feature map of stage l, enlarged and scaled to [0, 1], alpha_k the
    mean gradient of the target's probability at it and beta the largest one of the stage, b the baseline, and E the sum
    that is accumulated from the shallow stages to the deep ones. V_l is scaled to [0, 1] before it is added, so E lies
    between 0 and the number of stages. One forward and one backward pass find the maps; each chosen map costs one
    forward pass, in chunks. Several targets share them.

    About half of the 3904 feature maps of ResNet-50 and the 1472 of VGG16 have a positive gradient. No mask is kept.

    Args:
        model: see :class:`~attrib_zoo.attribution.Attribution`.
        layers: see :class:`~attrib_zoo.attribution.Attribution`. Default: the end of every stage; in networks that
            halve their maps by max-pooling only, such as VGG, the poolings.
        mu: a feature map needs more than this share of the largest mean gradient.
        score: what weights the masks: ``"softmax"``, ``"logit"``, ``"logsoftmax"`` or ``"sigmoid"`` (for multi-label
            models).
        grad_score: what is differentiated, with the same choices.
        fusion: ``"hard"`` multiplies by a binary mask (paper); ``"soft"`` by a sigmoid around the threshold; and
            ``"simple"`` by V_l itself.
        otsu_scale: the threshold is raised by this factor where less than a tenth of the pixels would stay above the
            raised one; ``None``: 1 (paper), and 1.5 for ``"soft"``.
        temperature: steepness of the ``"soft"`` sigmoid.
        baseline: what is shown where a mask is 0: ``"mean"`` (0, the mean colour), ``"black"``, ``"blur"``, a number,
            or a tensor that broadcasts to the inputs.
        chunk_size: masked images per forward pass; ``None``: 32, fewer where memory runs out.
        scale: ``"min-max"``, ``"rank"``, ``"positive"``, or ``None`` for the formula's own.

    Example:
        >>> import torch
        >>> from attrib_zoo import SISE
        >>> from attrib_zoo.synthetic import tiny_cnn
        >>> SISE(tiny_cnn(width=4)).attribute(torch.rand(2, 3, 32, 32), target=3).shape
        torch.Size([2, 3, 32, 32])

    References:
        S. Sattarzadeh, M. Sudhakar, A. Lem, S. Mehryar, K. N. Plataniotis, J. Jang, H. Kim, Y. Jeong, S. Lee, K. Bae:
        Explaining Convolutional Neural Networks through Attribution-Based Input Sampling and Block-Wise Feature
        Aggregation. AAAI 2021.

    Deviations:
        V_l is scaled to [0, 1] before the fusion, as in the authors' code; the paper does not mention it. Sum and mean
        are then the same. ``fusion="soft"`` is the authors' code. No constant is added to denominators; constant maps
        get no pass, and a stage without a positive gradient is left out. The map is at the resolution of the image, so
        there is no ``upsample``. CNNs only: the blocks of a plain vision transformer have one resolution.
    """

    paper: ClassVar[str] = "Sattarzadeh et al., AAAI 2021"
    cost: ClassVar[str] = "1F + 1B + 1F for each feature map of all stages with a positive gradient"

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        mu: float = 0.0,
        score: str = "softmax",
        grad_score: str = "softmax",
        fusion: str = "hard",
        otsu_scale: float | None = None,
        temperature: float = 100.0,
        baseline: Baseline = "mean",
        chunk_size: int | None = None,
        scale: str | None = None,
    ) -> None:
        super().__init__(
            model,
            layers,
            score=score,
            grad_score=grad_score,
            fusion=fusion,
            otsu_scale=otsu_scale,
            temperature=temperature,
            baseline=baseline,
            chunk_size=chunk_size,
            scale=scale,
        )
        self.mu = check_number("mu", mu, least=0.0, most=1.0)
        if self.mu == 1:
            raise OptionError(
                f"mu: must be a number of at least 0 and below 1, got {mu!r}; no feature map has more than the largest "
                "gradient, so that none would be left"
            )

    def select(self, ratios: Tensor) -> Tensor:
        """Eq. 7: more than ``mu`` of the largest."""
        return ratios > self.mu
