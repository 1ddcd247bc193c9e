"""Poly-CAM (Englebert, Cornu and De Vleeschouwer, ICPR 2022)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.capture import run
from attrib_zoo.backbone.layers.resolve import Tap
from attrib_zoo.backbone.targets import TargetQuery
from attrib_zoo.errors import check_choice, check_number
from attrib_zoo.masking import at_least_float32, upsample
from attrib_zoo.methods.bases.perturbation import Baseline, Passes, Perturbation, refuse_transformers


class PolyCAM(Perturbation):
    r"""Maps of all stages, each weighted by what its feature maps show or hide, multiplied from coarse to fine.

    .. math:: M_l = \mathrm{ReLU}\Big(\sum_k w_k A_k\Big), \qquad
              P_l = U(P_{l+1}) \odot \frac{M_l}{U(D(M_l))}, \qquad
              w_k = \begin{cases}
                S_c(x \odot m_k) & \text{p} \\
                \mathrm{ReLU}\big(S_c(x) - S_c(x \odot (1 - m_k))\big) & \text{m} \\
                \mathrm{ReLU}\big(S_c(x \odot m_k) + S_c(x) - S_c(x \odot (1 - m_k))\big) & \text{pm}
              \end{cases}

    with A the feature maps of stage l, m_k the k-th of them scaled to [0, 1] by its percentiles and enlarged, S_c the
    target's probability, U and D bilinear resizing to the size of stage l and of the deeper stage l + 1. The result is
    the last P, scaled by its percentiles. One forward pass, and one for each feature map of every stage (two for
    ``"pm"``): 1472 for VGG16 and 3904 for ResNet-50, in chunks. Several targets share them.

    The coarser maps of the paper use fewer layers: pass ``layers`` with the deepest ones only.

    Args:
        model: see :class:`~attrib_zoo.attribution.Attribution`.
        layers: see :class:`~attrib_zoo.attribution.Attribution`. Default: the last layer of every stage, before its
            pooling.
        variant: ``"pm"``, ``"p"`` (what is shown) or ``"m"`` (what is hidden).
        lnorm: divide each map by its own coarse version before it is multiplied.
        perc: percentile below which a map becomes 0 and, from the top, above which it becomes 1.
        full_range: divide by the difference of both percentiles instead of by the upper one.
        score: ``"softmax"``, ``"logit"``, ``"logsoftmax"`` or ``"sigmoid"``.
        baseline: what is shown where a mask is 0: ``"mean"`` (0, the mean colour), ``"black"``, ``"blur"``, a number,
            or a tensor that broadcasts to the inputs.
        chunk_size: masked images per forward pass; ``None``: 32, fewer where memory runs out.
        upsample: ``False`` returns ``(N, 1, h, w)`` at the resolution of the finest layer.
        smooth: odd side of a mean filter over the cells of the map; ``None`` for none.
        scale: ``"min-max"``, ``"rank"``, ``"positive"``, or ``None`` for the formula's own.

    Example:
        >>> import torch
        >>> from attrib_zoo import PolyCAM
        >>> from attrib_zoo.synthetic import tiny_cnn
        >>> PolyCAM(tiny_cnn(width=4), variant="p").attribute(torch.rand(2, 3, 32, 32), target=3).shape
        torch.Size([2, 3, 32, 32])

    References:
        A. Englebert, O. Cornu, C. De Vleeschouwer: Poly-CAM: High resolution class activation map for convolutional
        neural networks. ICPR 2022.

    Deviations:
        Division by zero gives 0 in place of a small constant in the denominator. Feature maps that are zero
        everywhere get no pass. CNNs only: the blocks of a plain vision transformer have one resolution.
    """

    paper: ClassVar[str] = "Englebert et al., ICPR 2022"
    models: ClassVar[tuple[str, ...]] = ("cnn",)
    cost: ClassVar[str] = "1F + 2F (variants p, m: 1F) for each feature map of all stages"
    default_layers: ClassVar[tuple[str, int] | None] = ("unpooled", 1)

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        variant: str = "pm",
        lnorm: bool = True,
        perc: float = 0.1,
        full_range: bool = False,
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
        self.variant = check_choice("variant", variant, ("pm", "p", "m"))
        self.lnorm = bool(lnorm)
        self.perc = check_number("perc", perc, least=0.0, most=50.0)
        self.full_range = bool(full_range)

    def resolve_layers(self, inputs: Tensor, args: Any) -> tuple[Tap, ...]:
        refuse_transformers(
            self, "refines from coarse to fine, and all blocks of a vision transformer have one resolution"
        )
        return super().resolve_layers(inputs, args)

    def compute_maps(self, inputs: Tensor, query: TargetQuery, args: tuple[Any, ...], show_progress: bool) -> Tensor:
        taps = self.taps(inputs, args)
        outputs, layers = run(self.model, inputs, args, taps)
        passes = self.passes(inputs, args, outputs, query.resolve(outputs), show_progress)
        coarse: Tensor | None = None
        for tap, maps in zip(taps[::-1], layers[::-1], strict=True):
            passes.label = f"{self.get_name()} {tap.label}" if show_progress else ""
            maps = at_least_float32(maps)
            heat = torch.einsum("ndt,ndhw->nthw", self._weights(maps, passes), maps).relu()
            coarse = heat if coarse is None else self._refine(coarse, heat)
        return coarse if coarse is None else self._scale(coarse)  # type: ignore[return-value]  # taps are never none

    def _weights(self, maps: Tensor, passes: Passes) -> Tensor:
        """``(N, D, T)``."""
        alive = maps.ne(0).flatten(2).any(2)
        size, base = passes.inputs.shape[-2:], passes.clean.unsqueeze(1)

        def masks(n: Tensor, k: Tensor) -> Tensor:
            return upsample(self._scale(maps[n, k].unsqueeze(1)), size)

        shown = passes.table(alive, masks) if "p" in self.variant else torch.zeros_like(base)
        if self.variant == "p":
            return shown
        hidden = passes.table(alive, lambda n, k: 1 - masks(n, k))
        return (shown + base - hidden).relu().where(alive.unsqueeze(2), 0)

    def _refine(self, coarse: Tensor, heat: Tensor) -> Tensor:
        """The finer map, divided by its own coarse version, times the coarser map."""
        if self.lnorm:
            local = upsample(upsample(heat, coarse.shape[-2:]), heat.shape[-2:])
            heat = torch.where(local > 0, heat / local.where(local > 0, 1), 0)
        return (heat * upsample(coarse, heat.shape[-2:])).relu()

    def _scale(self, maps: Tensor) -> Tensor:
        """Each map of ``(..., h, w)`` between its percentiles, cut off at 0 and 1."""
        values = maps.flatten(-2).sort(-1).values
        low, high = (_at(values, share)[..., None, None] for share in (self.perc / 100, 1 - self.perc / 100))
        span = high - low if self.full_range else high
        return torch.where(span > 0, (maps - low) / span.where(span > 0, 1), (maps > low).to(maps.dtype)).clamp(0, 1)


def _at(values: Tensor, share: float) -> Tensor:
    """The quantile of sorted values, interpolated linearly."""
    place = share * (values.shape[-1] - 1)
    low = int(place)
    high = min(low + 1, values.shape[-1] - 1)
    return torch.lerp(values[..., low], values[..., high], place - low)
