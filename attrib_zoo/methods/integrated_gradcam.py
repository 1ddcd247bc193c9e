"""Integrated Grad-CAM (Sattarzadeh et al., ICASSP 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.capture import run, select_args
from attrib_zoo.backbone.targets import TargetQuery
from attrib_zoo.errors import check_choice, check_number
from attrib_zoo.masking import ChunkSize
from attrib_zoo.methods.bases.gradient_cam import GradientCAM, check_gradients, differentiate, each_chunk
from attrib_zoo.methods.bases.perturbation import Baseline, check_baseline, resolve_baseline


class IntegratedGradCAM(GradientCAM):
    r"""Grad-CAM averaged while the image fades in from a baseline, so that saturated scores count too.

    .. math:: M = \frac1n \sum_{i=1}^{n} \mathrm{ReLU}\Big(\sum_k w_k(\gamma_i) \big(A_k(\gamma_i) - A_k(b)\big)\Big),
              \quad \gamma_i = b + \frac{i}{n} (x - b)

    with A(γ) the D feature maps of the layer for the image γ, ``(N, D, h, w)``, w the gradient of the target's logit
    averaged over space, as in :class:`~attrib_zoo.GradCAM`, and b the baseline. The sum approximates the integral along
    the path. The target ``None`` is resolved once, on the clean image.

    Args:
        model: see :class:`~attrib_zoo.attribution.Attribution`.
        layers: see :class:`~attrib_zoo.attribution.Attribution`; several layers give the mean of their maps.
        n_steps: n, the points on the path.
        baseline: b: ``"black"``, ``"mean"`` (0, the mean colour), ``"blur"`` (the image itself, blurred), a number,
            or a tensor that broadcasts to the inputs.
        subtract_baseline: ``False`` weights the feature maps themselves instead of their difference from the
            baseline's.
        rule: ``"right"``: the points above; ``"left"``: from the baseline up to one step before the image.
        chunk_size: how many points go through the model at once; ``None`` finds it. Never changes a map.
        relu: the paper's ReLU, at each point; ``False`` keeps negative evidence.
        score: what is differentiated: ``"logit"`` (paper), ``"softmax"``, ``"logsoftmax"`` or ``"sigmoid"``.
        upsample: ``False`` returns ``(N, 1, h, w)``.
        smooth: odd side of a mean filter over the cells of the map; ``None`` for none.
        scale: ``"min-max"``, ``"rank"``, ``"positive"``, or ``None`` for the formula's own.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from attrib_zoo import IntegratedGradCAM
        >>> model = resnet18(weights=None)
        >>> IntegratedGradCAM(model, n_steps=4).attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 3, 64, 64])

    References:
        S. Sattarzadeh, M. Sudhakar, K. N. Plataniotis, J. Jang, Y. Jeong, H. Kim: Integrated Grad-CAM:
        Sensitivity-Aware Visual Explanation of Deep Convolutional Networks via Integrated Gradient-Based Scoring.
        ICASSP 2021.

    Deviations:
        The paper states an integral; the points are this library's choice. The authors' code corresponds to
        ``rule="left", subtract_baseline=False``. The map is raw.
    """

    paper: ClassVar[str] = "Sattarzadeh et al., ICASSP 2021"
    cost: ClassVar[str] = "(2 + n)F + nB after the layer, n = 50"
    cheap_options: ClassVar[Mapping[str, Any]] = {"n_steps": 4}

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        n_steps: int = 50,
        baseline: Baseline = "black",
        subtract_baseline: bool = True,
        rule: str = "right",
        chunk_size: int | None = None,
        relu: bool = True,
        score: str = "logit",
        upsample: bool = True,
        smooth: int | None = None,
        scale: str | None = None,
    ) -> None:
        super().__init__(model, layers, relu=relu, score=score, upsample=upsample, smooth=smooth, scale=scale)
        check_number("n_steps", n_steps, least=1)
        self.n_steps = n_steps
        self.baseline = check_baseline(baseline)
        self.subtract_baseline = bool(subtract_baseline)
        self.rule = check_choice("rule", rule, ("right", "left"))
        ChunkSize(chunk_size)
        self.chunk_size = chunk_size

    def compute_maps(
        self, inputs: Tensor, query: TargetQuery, args: tuple[Any, ...], show_progress: bool
    ) -> list[Tensor]:
        taps = self.taps(inputs, args)
        target = query.resolve(run(self.model, inputs, args)[0])
        start = torch.zeros_like(inputs) + resolve_baseline(self.baseline, self.model, inputs)
        _, origins = run(self.model, start, args, taps)
        totals: list[Tensor] = []
        alive: list[Tensor] = []

        def add(rows: Tensor, numbers: Tensor) -> None:
            at = rows.to(inputs.device)
            shares = ((numbers + (self.rule == "right")).double() / self.n_steps).to(inputs).view(-1, 1, 1, 1)
            here = target.rows(rows)
            points = torch.lerp(start[at], inputs[at], shares)
            extra = select_args(args, rows, len(inputs))
            maps, gradients, _ = differentiate(self.model, points, extra, taps, lambda _: here, self.score)
            if self.subtract_baseline:
                maps = [m - origin[at] for m, origin in zip(maps, origins, strict=True)]
            found = [self.layer_map(m, g) for m, g in zip(maps, gradients, strict=True)]
            if not totals:
                totals.extend(heat.new_zeros(len(inputs), *heat.shape[1:]) for heat in found)
                alive.extend(g.new_zeros(()) for g in gradients)
            for total, heat in zip(totals, found, strict=True):
                total.index_add_(0, at, heat)
            for seen, g in zip(alive, gradients, strict=True):
                seen += g.any()

        label = type(self).__name__ if show_progress else ""
        each_chunk(inputs, self.n_steps, add, chunk_size=self.chunk_size, label=label)
        check_gradients(alive, taps, type(self).__name__)
        return [total / self.n_steps for total in totals]

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """The gradient averaged over space."""
        return gradients.mean(dim=(-2, -1))
