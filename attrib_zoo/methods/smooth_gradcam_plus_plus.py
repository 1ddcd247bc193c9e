"""Smooth Grad-CAM++ (Omeiza et al., 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.capture import select_args
from attrib_zoo.backbone.targets import TargetQuery
from attrib_zoo.errors import check_choice, check_number
from attrib_zoo.masking import ChunkSize
from attrib_zoo.methods.bases.gradient_cam import GradientCAM, check_gradients, check_seed, differentiate, each_chunk


class SmoothGradCAMPlusPlus(GradientCAM):
    r"""Grad-CAM++ with gradients averaged over noisy copies of the image.

    .. math:: M = \mathrm{ReLU}\Big(\sum_k w_k A_k\Big), \quad
              w_k = \sum_{i,j} \alpha_{k,i,j} \,\mathrm{ReLU}(D^1_{k,i,j}), \quad
              \alpha_{k,i,j} = \frac{D^2_{k,i,j}}{2 D^2_{k,i,j} + D^3_{k,i,j} \sum_{a,b} A_{k,a,b}}

    with A the D feature maps of the clean image, ``(N, D, h, w)``, and :math:`D^p` the mean over n noisy copies of
    the p-th power of the gradient of the target's logit. The noise is Gaussian, with a standard deviation that is a
    share of the image's range. It is drawn with ``seed`` and shared by all images, so that an image's map does not
    depend on its batch. Without noise this is :class:`~attrib_zoo.GradCAMPlusPlus`.

    The target ``None`` is resolved once, on the clean image. Where a feature map has a negative sum, a call warns, as
    there.

    Args:
        model: see :class:`~attrib_zoo.attribution.Attribution`.
        layers: see :class:`~attrib_zoo.attribution.Attribution`; several layers give the mean of their maps.
        n_samples: n, the noisy copies.
        noise: standard deviation of the noise, as a share of the image's largest minus its smallest value.
        alpha: ``"paper"``: the formula above; ``"local"``: the sum over positions of A D³ instead of D³ times the sum
            of A, as in torch-cam.
        numerator: of α, ``"second"``: D², as above; ``"first"``: D¹, as the paper prints it.
        seed: for the noise.
        chunk_size: how many copies go through the model at once; ``None`` finds it. Never changes a map.
        relu: the paper's ReLU of the sum; ``False`` keeps negative evidence.
        score: what is differentiated: ``"logit"`` (paper), ``"softmax"``, ``"logsoftmax"`` or ``"sigmoid"``.
        upsample: ``False`` returns ``(N, 1, h, w)``.
        smooth: odd side of a mean filter over the cells of the map; ``None`` for none.
        scale: ``"min-max"``, ``"rank"``, ``"positive"``, or ``None`` for the formula's own.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from attrib_zoo import SmoothGradCAMPlusPlus
        >>> model = resnet18(weights=None)
        >>> SmoothGradCAMPlusPlus(model, n_samples=4).attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 3, 64, 64])

    References:
        D. Omeiza, S. Speakman, C. Cintas, K. Weldemariam: Smooth Grad-CAM++: An Enhanced Inference Level
        Visualization Technique for Deep Convolutional Neural Network Models. arXiv:1908.01224, 2019.

    Deviations:
        The numerator of α: the printed first derivative does not give Grad-CAM++ when there is no noise, and changes
        with the unit of the gradient. Where the denominator is not positive, α is 0. No small constants.
    """

    paper: ClassVar[str] = "Omeiza et al., arXiv 2019"
    cost: ClassVar[str] = "(1 + n)(F + B after the layer), n = 25"
    nonnegative: ClassVar[bool] = True
    cheap_options: ClassVar[Mapping[str, Any]] = {"n_samples": 3}

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        n_samples: int = 25,
        noise: float = 0.15,
        alpha: str = "paper",
        numerator: str = "second",
        seed: int = 0,
        chunk_size: int | None = None,
        relu: bool = True,
        score: str = "logit",
        upsample: bool = True,
        smooth: int | None = None,
        scale: str | None = None,
    ) -> None:
        super().__init__(model, layers, relu=relu, score=score, upsample=upsample, smooth=smooth, scale=scale)
        check_number("n_samples", n_samples, least=1)
        self.n_samples = n_samples
        self.noise = check_number("noise", noise, least=0.0)
        self.alpha = check_choice("alpha", alpha, ("paper", "local"))
        self.numerator = check_choice("numerator", numerator, ("second", "first"))
        self.seed = check_seed(seed)
        ChunkSize(chunk_size)
        self.chunk_size = chunk_size

    def compute_maps(
        self, inputs: Tensor, query: TargetQuery, args: tuple[Any, ...], show_progress: bool
    ) -> list[Tensor]:
        taps = self.taps(inputs, args)
        clean, gradients, target = differentiate(self.model, inputs, args, taps, query.resolve, self.score)
        self.check_features(clean, taps)
        units = [_largest(g) for g in gradients]  # powers of values up to about 1 stay finite in any precision
        powers = [torch.zeros(3, *g.shape, dtype=g.dtype, device=g.device) for g in gradients]
        spread = self.noise * (inputs.amax((1, 2, 3)) - inputs.amin((1, 2, 3))).view(-1, 1, 1, 1)

        def add(rows: Tensor, numbers: Tensor) -> None:
            at = rows.to(inputs.device)
            noisy = inputs[at] + spread[at] * self._noise(numbers, inputs)
            extra = select_args(args, rows, len(inputs))
            here = target.rows(rows)
            _, found, _ = differentiate(self.model, noisy, extra, taps, lambda _: here, self.score)
            shares = [g / unit[:, at] for g, unit in zip(found, units, strict=True)]
            for total, share in zip(powers, shares, strict=True):
                for p in range(3):
                    total[p].index_add_(1, at, share ** (p + 1))

        label = type(self).__name__ if show_progress else ""
        each_chunk(inputs, self.n_samples, add, chunk_size=self.chunk_size, label=label)
        check_gradients([total[1] for total in powers], taps, type(self).__name__)
        each = zip(clean, powers, units, strict=True)
        return [self._heat(a, p / self.n_samples, u) for a, p, u in each]

    def _noise(self, numbers: Tensor, like: Tensor) -> Tensor:
        """Standard normal images ``(M, C, H, W)``, each determined by its number alone."""
        seeds = torch.randint(2**62, (self.n_samples,), generator=torch.Generator().manual_seed(self.seed))
        drawn = {
            number: torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(int(seeds[number])))
            for number in numbers.unique().tolist()
        }
        return torch.stack([drawn[number] for number in numbers.tolist()]).to(like)

    def _heat(self, activation: Tensor, powers: Tensor, unit: Tensor) -> Tensor:
        """Maps ``(N, T, h, w)`` of activations ``(N, D, h, w)`` and means of powers ``(3, T, N, D, h, w)``."""
        first, second, third = powers
        if self.alpha == "local":
            under = 2 * second + unit * (third * activation).sum(dim=(-2, -1), keepdim=True)
        else:
            under = 2 * second + unit * third * activation.sum(dim=(-2, -1), keepdim=True)
        over = second * unit if self.numerator == "second" else first
        share = torch.where(under > 0, over / under.where(under > 0, torch.ones_like(under)), 0)
        heat = torch.einsum("tnd,ndhw->nthw", (share * first.relu()).sum(dim=(-2, -1)), activation)
        return heat.relu() if self.relu else heat


def _largest(gradients: Tensor) -> Tensor:
    """The largest absolute value of each example, ``(T, N, 1, 1, 1)``; 1 where all are zero."""
    top = gradients.abs().amax(dim=(-3, -2, -1), keepdim=True)
    return top.where(top > 0, torch.ones_like(top))
