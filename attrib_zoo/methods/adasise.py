"""Ada-SISE (Sudhakar et al., ICASSP 2021)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attrib_zoo.methods.bases.blockwise import BlockwiseSampling, otsu_of_counts
from attrib_zoo.methods.bases.perturbation import Baseline

_BINS = 256


class AdaSISE(BlockwiseSampling):
    r"""SISE with fewer masks: every stage sets its own threshold for a feature map's gradient.

    .. math:: m_k \text{ is used where } \frac{\alpha_k}{\beta} > \tau_l, \qquad
              \tau_l = \mathrm{Otsu}\Big\{\frac{\alpha_k}{\beta} : \alpha_k > 0\Big\}

    with alpha_k the mean gradient of the target's probability at the k-th feature map of stage l and beta the largest
    one. Everything else is as in :class:`SISE`; the map with the largest gradient is always used.

    Args:
        model: see :class:`~attrib_zoo.attribution.Attribution`.
        layers: see :class:`~attrib_zoo.attribution.Attribution`. Default: the end of every stage, as for
            :class:`SISE`.
        score: what weights the masks: ``"softmax"``, ``"logit"``, ``"logsoftmax"`` or ``"sigmoid"``.
        grad_score: what is differentiated, with the same choices.
        fusion: ``"hard"``, ``"soft"`` or ``"simple"``, see :class:`SISE`.
        otsu_scale: factor of the fusion's threshold, see :class:`SISE`.
        temperature: steepness of the ``"soft"`` sigmoid.
        baseline: what is shown where a mask is 0: ``"mean"`` (0, the mean colour), ``"black"``, ``"blur"``, a number,
            or a tensor that broadcasts to the inputs.
        chunk_size: masked images per forward pass; ``None``: 32, fewer where memory runs out.
        scale: ``"min-max"``, ``"rank"``, ``"positive"``, or ``None`` for the formula's own.

    Example:
        >>> import torch
        >>> from attrib_zoo import AdaSISE
        >>> from attrib_zoo.synthetic import tiny_cnn
        >>> AdaSISE(tiny_cnn(width=4)).attribute(torch.rand(2, 3, 32, 32), target=3).shape
        torch.Size([2, 3, 32, 32])

    References:
        M. Sudhakar, S. Sattarzadeh, K. N. Plataniotis, J. Jang, Y. Jeong, H. Kim: Ada-SISE: Adaptive Semantic Input
        Sampling for Efficient Explanation of Convolutional Neural Networks. ICASSP 2021.

    Deviations:
        The histogram for Otsu's method has 256 bins on [0, 1]; the paper leaves this open. Otherwise as for
        :class:`SISE`. The map is at the resolution of the image, so there is no ``upsample``.
    """

    paper: ClassVar[str] = "Sudhakar et al., ICASSP 2021"
    cost: ClassVar[str] = "1F + 1B + about half of the masked passes of SISE"

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
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

    def select(self, ratios: Tensor) -> Tensor:
        """Above Otsu's threshold of the positive ratios."""
        bins = (ratios * _BINS).clamp(0, _BINS - 1).long()
        counts = torch.zeros(len(ratios), _BINS, dtype=torch.long, device=ratios.device)
        counts.scatter_add_(1, bins, (ratios > 0).long())
        limits = otsu_of_counts(counts).to(ratios.dtype) / _BINS
        return ratios > limits.unsqueeze(1)
