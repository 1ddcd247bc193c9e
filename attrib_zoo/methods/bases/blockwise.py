"""What SISE and Ada-SISE share: feature maps of all stages as masks, and the fusion of their maps."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.capture import run_with_graph
from attrib_zoo.backbone.layers.resolve import Tap
from attrib_zoo.backbone.targets import SCORES, TargetQuery
from attrib_zoo.errors import check_choice, check_number, warn
from attrib_zoo.masking import at_least_float32, min_max, upsample
from attrib_zoo.methods.bases.gradient_cam import _gradients
from attrib_zoo.methods.bases.perturbation import (
    Baseline,
    Passes,
    Perturbation,
    read_scores,
    refuse_transformers,
)

_BINS = 256
FUSIONS = ("hard", "soft", "simple")


class BlockwiseSampling(Perturbation):
    """Base of SISE: scores of images masked by chosen feature maps of every stage, fused from shallow to deep.

    Subclasses implement :meth:`select`. See :class:`~attrib_zoo.methods.sise.SISE` for the options.
    """

    models: ClassVar[tuple[str, ...]] = ("cnn",)
    default_layers: ClassVar[tuple[str, int] | None] = ("stages", 1)

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
        super().__init__(model, layers, score=score, baseline=baseline, chunk_size=chunk_size, scale=scale)
        self.grad_score = check_choice("grad_score", grad_score, SCORES)
        self.fusion = check_choice("fusion", fusion, FUSIONS)
        if otsu_scale is not None:
            check_number("otsu_scale", otsu_scale, least=1.0)
        self.otsu_scale = otsu_scale
        self.temperature = check_number("temperature", temperature, least=0.0, above=True)

    @abstractmethod
    def select(self, ratios: Tensor) -> Tensor:
        """Which feature maps become masks.

        Args:
            ratios: ``(B, D)``, the mean gradient of each map divided by the largest of its layer, which is positive.

        Returns:
            ``(B, D)``, booleans.
        """
        raise NotImplementedError

    def resolve_layers(self, inputs: Tensor, args: Any) -> tuple[Tap, ...]:
        """The end of every stage; transformers, whose blocks have one resolution, are refused."""
        refuse_transformers(
            self, "fuses maps of different resolutions, and all blocks of a vision transformer have one"
        )
        return super().resolve_layers(inputs, args)

    def compute_maps(self, inputs: Tensor, query: TargetQuery, args: tuple[Any, ...], show_progress: bool) -> Tensor:
        """Mask by the chosen feature maps of each layer, and fuse the layers' maps from shallow to deep."""
        taps = self.taps(inputs, args)
        with run_with_graph(self.model, inputs, args, taps) as (outputs, layers):
            target = query.resolve(outputs.detach())
            scores = read_scores(outputs, target, self.grad_score)
            gradients = [at_least_float32(g).mean((-2, -1)) for g in _gradients(scores, layers, taps)]
            layers = [at_least_float32(maps.detach()) for maps in layers]
            outputs = outputs.detach()
        passes = self.passes(inputs, args, outputs, target, show_progress)
        fused = Fusion(self.fusion, self.otsu_scale, self.temperature)
        for tap, maps, means in zip(taps, layers, gradients, strict=True):
            chosen = self._chosen(maps, means.movedim(0, 2))
            passes.label = f"{self.get_name()} {tap.label}" if show_progress else ""
            fused.add(self._one_layer(maps, chosen, passes), chosen.any(1))
        if not bool(fused.started.all()):
            warn(
                f"{self.get_name()}: no layer has a feature map with a positive gradient for some target, so it is zero"
            )
        if fused.raised:
            warn(f"{self.get_name()}: the raised threshold is above 1, so most of the map is gone; use otsu_scale=1")
        return fused.total

    def _chosen(self, maps: Tensor, means: Tensor) -> Tensor:
        """``(N, D, T)`` booleans: selected by the mean gradients ``(N, D, T)``, and not constant over space."""
        largest = means.amax(1, keepdim=True)
        ratios = means / largest.where(largest > 0, 1)
        kept = self.select(ratios.movedim(1, 2).flatten(0, 1)).view(len(means), -1, means.shape[1]).movedim(2, 1)
        varied = maps.amax((-2, -1)) > maps.amin((-2, -1))
        return kept & (largest > 0) & varied.unsqueeze(2)

    def _one_layer(self, maps: Tensor, chosen: Tensor, passes: Passes) -> Tensor:
        """The visualisation maps ``(N, T, H, W)`` in [0, 1], Eq. 12: scores times masks over their sizes."""
        size = passes.inputs.shape[-2:]
        factor = maps.new_zeros(maps.shape[:2])

        def masks(n: Tensor, k: Tensor) -> Tensor:
            large = upsample(maps[n, k].unsqueeze(1), size)
            least = large.amin((-2, -1), keepdim=True)
            span = large.amax((-2, -1), keepdim=True) - least
            large = (large - least) / span.where(span > 0, 1)
            sums = large.sum((-3, -2, -1))
            factor[n, k] = ((sums > 0) / (span.view(-1) * sums).where(sums > 0, 1)).to(factor.dtype)
            return large

        scores = passes.table(chosen.any(2), masks)
        weights = scores.where(chosen, 0) * factor.unsqueeze(2)
        above = maps - maps.amin((-2, -1), keepdim=True)  # the scaling would remove it too, but less precisely
        return min_max(upsample(torch.einsum("ndt,ndhw->nthw", weights, above), size))


class Fusion:
    """Fusion from shallow to deep: each map is added, and what the deeper one does not show is removed.

    Args:
        kind: ``"hard"``, ``"soft"`` or ``"simple"``.
        scale: factor of Otsu's threshold; ``None``: 1, or 1.5 for ``"soft"``.
        temperature: of the sigmoid of ``"soft"``.

    Attributes:
        total: ``(N, T, H, W)``.
        started: ``(N, T)``, whether there is a map yet.
        raised: whether a scaled threshold went above 1.
    """

    def __init__(self, kind: str, scale: float | None, temperature: float) -> None:
        self._kind, self._temperature = kind, temperature
        self._scale = scale if scale is not None else 1.5 if kind == "soft" else 1.0
        self.total = torch.zeros(())
        self.started = torch.zeros((), dtype=torch.bool)
        self.raised = False

    def add(self, deeper: Tensor, there: Tensor) -> None:
        """Fuse the next maps ``(N, T, H, W)``, in [0, 1], where the layer has any: ``there``, ``(N, T)``."""
        if self.total.ndim == 0:
            self.total, self.started = torch.zeros_like(deeper), torch.zeros_like(there)
        joined = (self.total + deeper) * self._mask(deeper)
        joined = torch.where(self.started[..., None, None], joined, deeper)
        self.total = torch.where(there[..., None, None], joined, self.total)
        self.started = self.started | there

    def _mask(self, deeper: Tensor) -> Tensor:
        if self._kind == "simple":
            return deeper
        limit = otsu(deeper.flatten(0, 1), self._scale).view(*deeper.shape[:2], 1, 1)
        self.raised = self.raised or bool((limit >= 1).any())
        if self._kind == "soft":
            return torch.sigmoid(self._temperature * (deeper - limit))
        return (deeper > limit).to(deeper.dtype)


def otsu(maps: Tensor, scale: float = 1.0) -> Tensor:
    """Otsu's threshold of each map: the level that best separates two classes of pixels.

    Args:
        maps: ``(B, ...)`` in [0, 1], in 256 bins of the values rounded to 1/256.
        scale: raises the threshold where less than a tenth of the pixels would stay above the raised one.

    Returns:
        ``(B,)``, in the type of the maps.
    """
    levels = (maps.flatten(1) * _BINS).round().clamp(0, _BINS - 1).long()
    counts = torch.zeros(len(maps), _BINS, dtype=torch.long, device=maps.device)
    counts.scatter_add_(1, levels, torch.ones_like(levels))
    best = otsu_of_counts(counts)
    wanted = (best * scale).round().unsqueeze(1)
    left = (counts * (torch.arange(_BINS, device=maps.device) >= wanted)).sum(1)
    limit = torch.where(left * 10 < counts.sum(1), best * scale, best)
    return (limit / _BINS).to(maps.dtype)


def otsu_of_counts(counts: Tensor) -> Tensor:
    """The first bin ``j`` of each histogram ``(B, n)`` that separates ``[0, j)`` best from ``[j, n)``, ``(B,)``."""
    bins = counts.shape[1]
    sums = (counts * torch.arange(bins, device=counts.device)).cumsum(1).double()
    parts = counts.cumsum(1).double()
    below, low = parts[:, :-1], sums[:, :-1]
    above, high = parts[:, -1:] - below, sums[:, -1:] - low
    gap = low / below.clamp(min=1) - high / above.clamp(min=1)
    between = below * above * gap.square()
    return between.argmax(1) + 1
