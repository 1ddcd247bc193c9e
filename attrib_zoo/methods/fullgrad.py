"""FullGrad (Srinivas and Fleuret, NeurIPS 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrib_zoo.attribution import Attribution, GradientAttribution
from attrib_zoo.backbone.capture import run_from_inputs
from attrib_zoo.backbone.kind import attends
from attrib_zoo.backbone.layers.lookup import folded, several_views
from attrib_zoo.backbone.layers.resolve import look
from attrib_zoo.backbone.layers.trace import Trace
from attrib_zoo.backbone.libra import Balanced, Term
from attrib_zoo.backbone.module import find
from attrib_zoo.backbone.targets import TargetQuery
from attrib_zoo.errors import OptionError, UnsupportedModelError, warn
from attrib_zoo.masking import at_least_float32, min_max, upsample

_CONVOLUTION = nn.modules.conv._ConvNd
_OWN_STATISTICS = (nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


class FullGrad(Attribution, GradientAttribution):
    r"""The contributions of the pixels and of all layers' biases to the target's score, which is their sum.

    A network of convolutions, batch normalisations, linear layers and ReLUs is its gradient times its inputs plus its
    gradients times its biases (Eq. 3 of the paper), and the map gathers both kinds of terms:

    .. math:: M = \sum_c \psi\Big(x \odot \frac{\partial S}{\partial x}\Big)_c + \sum_l \sum_k
              \mathrm{up}\Big(\psi\Big(b_l \odot \frac{\partial S}{\partial z_l}\Big)\Big)_k

    with S the target's logit, x the image ``(C, H, W)``, z_l the outputs ``(D, h, w)`` of each layer that has a bias
    b_l, and ψ the absolute value scaled to [0, 1] over all channels and positions of an image. The bias of a
    convolution is its own; that of a batch normalisation in eval mode is β − μγ/√(σ² + ε). Biases of linear layers have
    no position and are left out.

    The map is at the resolution of the image, and the method reads all layers. Activations other than ReLU have
    implicit biases that are missing here: a call warns where the terms do not add up to the score.

    Networks with attention, or with layers that normalise by the statistics of the image itself, have no such sum. The
    balanced backward pass of LibraGrad (``libra``) gives them one: it treats attention weights, gates and standard
    deviations as constants, and then the pixels and everything added along the way (biases, positions, the class token)
    sum to the score again. Terms are placed at the cells of their layer; those of class tokens, of windows and of
    vectors have no position and are left out.

    Args:
        model: see :class:`~attrib_zoo.attribution.Attribution`.
        layers: not used; FullGrad reads every layer with a bias.
        align_corners: how maps are enlarged; ``True`` as in the authors' program.
        libra: ``True`` for the balanced backward pass; ``False`` for the plain one, which refuses networks without such
            a sum; ``None`` for the balanced one where the plain one would refuse.
        scale: ``"min-max"``, ``"rank"``, ``"positive"``, or ``None`` for the formula's own.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from attrib_zoo import FullGrad
        >>> model = resnet18(weights=None)
        >>> FullGrad(model).attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 3, 64, 64])

    References:
        S. Srinivas, F. Fleuret: Full-Gradient Representation for Neural Network Visualization. NeurIPS 2019.
        F. Mehri, M. Soleymani Baghshah, M. T. Pilehvar: LibraGrad: Balancing Gradient Flow for Universally Better
        Vision Transformer Attributions. CVPR 2025.

    Deviations:
        Maps are enlarged without aligned corners. No small constant in ψ; a constant map becomes zero. The map of a
        transformer sums the terms of its token layers as those of convolutions, which is in neither paper.
    """

    family: ClassVar[str] = "gradient"
    paper: ClassVar[str] = "Srinivas and Fleuret, NeurIPS 2019"
    models: ClassVar[tuple[str, ...]] = ("cnn", "vit")
    cost: ClassVar[str] = "1F + 1B"
    default_layers: ClassVar[tuple[str, int] | None] = None

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        align_corners: bool = False,
        libra: bool | None = None,
        scale: str | None = None,
    ) -> None:
        super().__init__(model, scale=scale)
        if layers is not None:
            raise OptionError(f"layers: must be None, for FullGrad reads every layer, got {layers!r}; leave it out")
        self.align_corners = bool(align_corners)
        if libra is not None and not isinstance(libra, bool):
            raise OptionError(f"libra: must be True, False or None, got {libra!r}")
        self.libra = libra

    def compute_maps(self, inputs: Tensor, query: TargetQuery, args: tuple[Any, ...], show_progress: bool) -> Tensor:
        without = self._without_sum()
        if without is not None and self.libra is False:
            raise UnsupportedModelError(
                "FullGrad: needs a network whose layers have constant biases (convolutions, batch normalisations, "
                f"ReLUs), got {without}; use libra=True, HiResCAM or LayerCAM"
            )
        if self.libra or without is not None:
            return self._balanced(inputs, query, args)
        biases = dict(_biases(self.model))
        linear = {name: isinstance(find(self.model, name), nn.Linear) for name in biases}
        found = []
        with run_from_inputs(self.model, inputs, args, list(biases)) as (outputs, images, calls):
            batches = (output.shape[0] for _, output in calls if output.ndim == 4)
            self._check_views(max(batches, default=len(inputs)) // len(inputs))
            target = query.resolve(outputs.detach())
            scores = target.select(outputs)
            reached = [images, *(output for _, output in calls)]
            factors = [images, *(_along(biases[name], output, last=linear[name]) for name, output in calls)]
            spatial = [True, *(not linear[name] and output.ndim == 4 for name, output in calls)]
            for t in range(target.count):
                more = t + 1 < target.count
                slopes = torch.autograd.grad(scores[:, t].sum(), reached, retain_graph=more, allow_unused=True)
                terms = [
                    None if g is None else at_least_float32(f.detach()) * at_least_float32(g)
                    for f, g in zip(factors, slopes, strict=True)
                ]
                self._check_sum(scores[:, t].detach(), [term for term in terms if term is not None])
                shown = [term for term, place in zip(terms, spatial, strict=True) if place and term is not None]
                found.append(self._gathered(shown, inputs))
        return torch.stack(found, 1)

    def _check_views(self, views: int) -> None:
        if views > 1:
            raise UnsupportedModelError(several_views(type(self.model).__name__, views))

    def _gathered(self, terms: list[Tensor], inputs: Tensor) -> Tensor:
        """``(N, H, W)`` from the terms ``(N, D, h, w)``; channels are summed first, since upsampling is linear."""
        heat = torch.zeros(len(inputs), 1, *inputs.shape[-2:], dtype=terms[0].dtype, device=inputs.device)
        for term in terms:
            scaled = min_max(term.abs().flatten(2).unsqueeze(1)).view_as(term).sum(1, keepdim=True)
            size = inputs.shape[-2:]
            heat += (
                F.interpolate(scaled, size=size, mode="bilinear", align_corners=True)
                if self.align_corners
                else upsample(scaled, size)
            )
        return heat[:, 0]

    def _check_sum(self, scores: Tensor, terms: list[Tensor]) -> None:
        """Warn where the terms do not add up to the score."""
        sums = torch.stack([term.flatten(1).sum(1) for term in terms])
        size = sums.abs().sum(0) + scores.abs()
        tolerance = max(1e-3, 16 * torch.finfo(scores.dtype).eps)
        off = (sums.sum(0) - scores).abs()
        if bool((off > tolerance * size).any()):
            warn(
                f"FullGrad: the terms must add up to the score, but up to {float((off / size).max()):.0%} is missing; "
                f"{type(self.model).__name__} has implicit biases (activations other than ReLU, or operations that "
                "are no modules), which are not in the map"
            )

    def _without_sum(self) -> str | None:
        """The first layer that makes the plain sum fail, in words."""
        for name, module in self.model.named_modules():
            if isinstance(module, _OWN_STATISTICS) or attends(module):
                return f"{type(module).__name__} at {name!r}"
        return None

    def _balanced(self, inputs: Tensor, query: TargetQuery, args: tuple[Any, ...]) -> Tensor:
        traced = look(self.model, inputs, args)
        self._check_views(folded(traced.calls()))
        places = _places(traced)
        terms: list[Term] = []
        found = []
        with run_from_inputs(self.model, inputs, args, (), Balanced(terms)) as (outputs, images, _):
            target = query.resolve(outputs.detach())
            scores = target.select(outputs)
            reached = [images, *(term.output for term in terms)]
            for t in range(target.count):
                more = t + 1 < target.count
                slopes = torch.autograd.grad(scores[:, t].sum(), reached, retain_graph=more, allow_unused=True)
                pixels = slopes[0]
                if pixels is None:
                    raise UnsupportedModelError("model: the gradient of its outputs must reach the images")
                parts = [at_least_float32(images.detach()) * at_least_float32(pixels)]
                shown = list(parts)
                for term, slope in zip(terms, slopes[1:], strict=True):
                    if slope is not None and slope.shape[term.batch] % len(inputs) == 0:
                        part = term.times(at_least_float32(slope), len(inputs))
                        parts.append(part)
                        shown += places.maps(part, term.last)
                self._check_sum(scores[:, t].detach(), parts)
                found.append(self._gathered(shown, inputs))
        return torch.stack(found, 1)


@dataclass(frozen=True)
class _Places:
    """The positions of the cells of a model's layers.

    Attributes:
        tokens: how many tokens a layer has -> those before the patches, and rows and columns of the patches.
        sizes: rows and columns of the maps in the pass.
    """

    tokens: dict[int, tuple[int, tuple[int, int]]]
    sizes: frozenset[tuple[int, int]]

    def maps(self, part: Tensor, last: bool | None) -> list[Tensor]:
        """Values ``(N, parts, ...)`` of a layer as a map ``(N, D, h, w)``; empty where they have no position."""
        if part.shape[1] != 1:
            return []
        values = part[:, 0]
        if values.ndim == 3 and values.shape[1] in self.tokens:
            prefix, size = self.tokens[values.shape[1]]
            return [values[:, prefix:].transpose(1, 2).unflatten(2, size)]
        if values.ndim != 4:
            return []
        if last is None:
            last = tuple(values.shape[2:]) not in self.sizes
        values = values.movedim(3, 1) if last else values
        return [values] if tuple(values.shape[2:]) in self.sizes else []


def _places(trace: Trace) -> _Places:
    tokens: dict[int, tuple[int, tuple[int, int]]] = {}
    for call in trace.root.inside():
        for output in call.outputs:
            grid = output.grid
            if grid is not None and grid.kind == "tokens" and grid.permutation is None and grid.hw is not None:
                tokens[grid.prefix + grid.hw[0] * grid.hw[1]] = grid.prefix, grid.hw
    return _Places(tokens, frozenset(size for _, size in trace.sizes))


def _biases(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The layers with a bias, and the bias ``(D,)`` that they add."""
    for name, module in model.named_modules():
        if isinstance(module, (_CONVOLUTION, nn.Linear)):
            if module.bias is not None:
                yield name, at_least_float32(module.bias.detach())
        elif isinstance(getattr(module, "running_var", None), Tensor):
            inner = [child for child, part in module.named_children() if isinstance(part, nn.Identity)]
            if inner or not any(module.children()):  # some apply an activation too; the identity before it sees the sum
                yield ".".join([name, *inner[:1]]), _shift(module)


def _shift(norm: nn.Module) -> Tensor:
    """What a batch normalisation adds: β − μγ/√(σ² + ε)."""
    values = {name: getattr(norm, name) for name in ("running_mean", "running_var", "weight", "bias")}
    mean, variance, scale, bias = (None if v is None else at_least_float32(v.detach()) for v in values.values())
    slope = (variance + norm.eps).rsqrt()  # type: ignore[operator]
    slope = slope if scale is None else slope * scale
    return -mean * slope if bias is None else bias - mean * slope  # type: ignore[operator]


def _along(bias: Tensor, output: Tensor, *, last: bool) -> Tensor:
    """The bias ``(D,)`` along the second or the last axis of an output."""
    return bias if last else bias.view(-1, *[1] * (output.ndim - 2))
