"""SIDU (Muddamsetty et al., ICIP 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.layers.resolve import Tap
from attrib_zoo.backbone.targets import Target, class_scores
from attrib_zoo.errors import check_choice, check_number, warn
from attrib_zoo.masking import at_least_float32, min_max, upsample
from attrib_zoo.methods.bases.perturbation import Baseline, PerturbationCAM, refuse_transformers


class SIDU(PerturbationCAM):
    r"""Regions that reproduce the prediction by themselves and differ from the others; the same for every target.

    .. math:: M = \sum_i w_i m_i, \qquad
              w_i = \exp\Big(-\frac{\lVert P - P_i \rVert^2}{2 \sigma^2}\Big) \cdot U_i, \qquad
              U_i = \sum_j \lVert P_i - P_j \rVert

    with m_i the i-th feature map of the layer above a threshold, 0 or 1, enlarged bilinearly; P the probabilities of
    all classes and P_i those of the image under m_i; U is scaled to [0, 1]. One forward pass, and one for each feature
    map, in chunks. No mask is kept.

    Args:
        model: see :class:`~attrib_zoo.attribution.Attribution`.
        layers: see :class:`~attrib_zoo.attribution.Attribution`; several layers give the mean of their maps. Default:
            the last convolutional stage.
        sigma: width of the similarity.
        threshold: above which a cell of a feature map is part of its mask. The map depends on it strongly.
        threshold_on: ``"raw"``, the values as they are (the authors' code), or ``"minmax"``, each feature map scaled to
            [0, 1]; try 0.5 then.
        score: what is compared: ``"softmax"``, ``"logit"``, ``"logsoftmax"`` or ``"sigmoid"`` of all outputs.
        baseline: what is shown where a mask is 0: ``"mean"`` (0, the mean colour), ``"black"``, ``"blur"``, a number,
            or a tensor that broadcasts to the inputs.
        chunk_size: masked images per forward pass; ``None``: 32, fewer where memory runs out.
        upsample: ``False`` returns ``(N, 1, h, w)``.
        smooth: odd side of a mean filter over the cells of the map; ``None`` for none.
        scale: ``"min-max"``, ``"rank"``, ``"positive"``, or ``None`` for the formula's own.

    Example:
        >>> import torch
        >>> from attrib_zoo import SIDU
        >>> from attrib_zoo.synthetic import tiny_cnn
        >>> explainer = SIDU(tiny_cnn(size=64), threshold_on="minmax", threshold=0.5)
        >>> explainer.attribute(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 3, 64, 64])

    References:
        S. M. Muddamsetty, N. S. J. Mohammad, T. B. Moeslund: SIDU: Similarity Difference and Uniqueness Method for
        Explainable AI. ICIP 2020.

    Deviations:
        The target is checked and then ignored: the similarity is that of the whole class vector, as in the paper (the
        authors' code has one for each class). Masks are not divided by their number. The map is raw.
    """

    paper: ClassVar[str] = "Muddamsetty et al., ICIP 2020"
    models: ClassVar[tuple[str, ...]] = ("cnn",)
    cost: ClassVar[str] = "1F + 1F for each feature map"
    class_agnostic: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        sigma: float = 0.25,
        threshold: float = 0.1,
        threshold_on: str = "raw",
        score: str = "softmax",
        baseline: Baseline = "mean",
        chunk_size: int | None = None,
        upsample: bool = True,
        smooth: int | None = None,
        scale: str | None = None,
    ) -> None:
        super().__init__(
            model,
            layers,
            score=score,
            baseline=baseline,
            chunk_size=chunk_size,
            upsample=upsample,
            smooth=smooth,
            scale=scale,
        )
        self.sigma = check_number("sigma", sigma, least=0.0, above=True)
        self.threshold = check_number("threshold", threshold, least=-torch.inf)
        self.threshold_on = check_choice("threshold_on", threshold_on, ("raw", "minmax"))

    def resolve_layers(self, inputs: Tensor, args: Any) -> tuple[Tap, ...]:
        refuse_transformers(self, "cuts feature maps at a threshold, and those of a vision transformer have both signs")
        return super().resolve_layers(inputs, args)

    def read(self, outputs: Tensor, target: Target) -> Tensor:
        """All scores of each pass, ``(M, K)``."""
        return at_least_float32(class_scores(outputs, self.score or "softmax")).reshape(len(outputs), -1)

    def alive(self, maps: Tensor) -> Tensor:
        """All: a mask that shows nothing or everything is compared with the others too."""
        return torch.ones(maps.shape[:2], dtype=torch.bool, device=maps.device)

    def shown(self, maps: Tensor) -> Tensor:
        """The binary masks."""
        return ((min_max(maps) if self.threshold_on == "minmax" else maps) > self.threshold).to(maps.dtype)

    def masks(self, maps: Tensor, size: Sequence[int]) -> Tensor:
        """The binary masks, enlarged."""
        return upsample(self.shown(maps), size)

    def weights(self, scores: Tensor, clean: Tensor, alive: Tensor) -> Tensor:
        """Similarity to the clean prediction times difference from the other masks."""
        similar = (-(scores - clean.unsqueeze(1)).square().sum(2) / (2 * self.sigma**2)).exp()
        unique = torch.cdist(scores, scores, compute_mode="donot_use_mm_for_euclid_dist").sum(2)
        scaled = min_max(unique.unsqueeze(1)).squeeze(1)
        if not bool(scaled.any(1).all()):
            warn(f"{self.get_name()}: no mask of some image is unlike the others, so it is zero; try another threshold")
        return (similar * scaled).unsqueeze(2)
