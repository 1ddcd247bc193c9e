"""CAM (Zhou et al., CVPR 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.capture import forward, select_args
from attrib_zoo.backbone.layers.resolve import Tap
from attrib_zoo.backbone.module import find
from attrib_zoo.backbone.replay import replay
from attrib_zoo.backbone.targets import TargetQuery, class_scores
from attrib_zoo.errors import OptionError, UnsupportedModelError, listed
from attrib_zoo.masking import at_least_float32
from attrib_zoo.methods.bases.gradient_cam import GradientCAM, differentiate
from attrib_zoo.methods.bases.one_pass import OnePass
from attrib_zoo.sharing.program import LinearMaps

_CLASSES_AT_ONCE = 64


class CAM(GradientCAM, OnePass):
    r"""The evidence for the target at each place, exact in networks that end in average pooling and a linear layer.

    .. math:: M_{i,j} = \sum_k W_{c,k} A_{k,i,j}

    (Eq. 2 of the paper), with A the D feature maps before global average pooling, ``(N, D, h, w)``, and W the weights
    of the linear layer after it, ``(K, D)``. The mean of the map is the target's logit without its bias.

    Whether a model ends this way is tested by feeding other features to the part after the layer, once per image size:
    it must depend on their averages only, and linearly. Residual networks and EfficientNets pass, in any wrapper; other
    models are refused. Where both are defined, :class:`~attrib_zoo.GradCAM` is the same up to the factor h·w.

    Args:
        model: see :class:`~attrib_zoo.attribution.Attribution`.
        layers: the layer before the pooling; ``None`` for the last convolutional stage.
        relu: ``True`` keeps positive evidence only; the paper has no ReLU.
        upsample: ``False`` returns ``(N, 1, h, w)``.
        smooth: odd side of a mean filter over the cells of the map; ``None`` for none.
        scale: ``"min-max"``, ``"rank"``, ``"positive"``, or ``None`` for the formula's own.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from attrib_zoo import CAM
        >>> model = resnet18(weights=None)
        >>> CAM(model).attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 3, 64, 64])

    References:
        B. Zhou, A. Khosla, A. Lapedriza, A. Oliva, A. Torralba: Learning Deep Features for Discriminative
        Localization. CVPR 2016.

    Deviations:
        None from the formula. The weights are read from the gradient, which at the layer is W/(h·w) everywhere, so that
        the linear layer need not be found by name.
    """

    paper: ClassVar[str] = "Zhou et al., CVPR 2016"
    models: ClassVar[tuple[str, ...]] = ("cnn",)
    cost: ClassVar[str] = "1F"

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        relu: bool = False,
        upsample: bool = True,
        smooth: int | None = None,
        scale: str | None = None,
    ) -> None:
        # without the score of the other gradient CAMs
        super().__init__(model, layers, relu=relu, upsample=upsample, smooth=smooth, scale=scale)

    def compute_maps(
        self, inputs: Tensor, query: TargetQuery, args: tuple[Any, ...], show_progress: bool
    ) -> list[Tensor]:
        self._check_heads(inputs, args)
        return super().compute_maps(inputs, query, args, show_progress)

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """The row of the linear layer."""
        return gradients.sum(dim=(-2, -1))

    def program_head(
        self, images: Tensor, taps: Sequence[Tap], outputs: Tensor, features: Sequence[Tensor]
    ) -> nn.Module:
        if len(taps) != 1:
            raise OptionError(f"layers: must be one for CAM to become a program, got {len(taps)}; name one")
        self._check_heads(images, ())
        rows, one = [], images[:1]
        for some in torch.arange(class_scores(outputs).shape[1]).split(_CLASSES_AT_ONCE):
            wanted = TargetQuery(some.tolist(), many=True)
            maps, gradients, _ = differentiate(self.model, one, (), taps, wanted.resolve, self.score)
            rows.append(self.weights(maps[0], gradients[0][:, 0]))
        return LinearMaps(torch.cat(rows), self.relu)

    def _check_heads(self, inputs: Tensor, args: tuple[Any, ...]) -> None:
        def check() -> None:
            for tap in self.taps(inputs, args):
                self._check_head(inputs, args, tap)

        self._once("head", inputs, args, check)

    def _check_head(self, inputs: Tensor, args: tuple[Any, ...], tap: Tap) -> None:
        """Refuse a model whose outputs are anything but W mean(A) + b."""
        one = select_args(args, torch.zeros(1, dtype=torch.long), len(inputs))
        with replay(self.model, inputs[:1], one, tap) as again:
            features = again.maps
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randn(2, *features.shape[1:], generator=generator).to(features)
            first, second = drawn * features.std(correction=0).clamp(min=1)
            flat = first.mean(dim=(-2, -1), keepdim=True).expand_as(first)
            probes = torch.stack([torch.zeros_like(first), first, flat, second, first + second])
            outputs = again(probes, torch.zeros(len(probes), dtype=torch.long))
        zero, one_, averaged, two, both = at_least_float32(outputs)
        off = torch.stack([one_ - averaged, both - one_ - two + zero]).abs().max()
        tolerance = max(1e-4, 8 * torch.finfo(outputs.dtype).eps)
        if float(off) > tolerance * float((outputs - zero).abs().max()):
            raise UnsupportedModelError(
                "CAM: needs global average pooling and one linear layer, and nothing else, behind the layer; behind "
                f"{tap.name!r} {type(self.model).__name__} has {listed(self._behind(inputs[:1], one, tap), 6)} "
                "(functions such as F.relu are not listed); use GradCAM or HiResCAM, which need no such head, or name "
                "the layer before the pooling"
            )

    def _behind(self, inputs: Tensor, args: Sequence[Any], tap: Tap) -> list[str]:
        """The classes of the innermost modules that run after the layer."""
        names: list[str] = []
        layer = find(self.model, tap.name)
        leaves = [module for module in self.model.modules() if not any(module.children())]
        handles = [m.register_forward_hook(lambda m, *_: names.append(type(m).__name__)) for m in leaves]
        handles.append(layer.register_forward_hook(lambda *_: names.clear()))
        try:
            forward(self.model, inputs, args)
        finally:
            for handle in handles:
                handle.remove()
        return names or ["operations that are no modules"]
