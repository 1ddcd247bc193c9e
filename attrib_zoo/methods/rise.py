"""RISE (Petsiuk, Das and Saenko, BMVC 2018)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.capture import forward
from attrib_zoo.backbone.targets import TargetQuery
from attrib_zoo.errors import OptionError, check_number
from attrib_zoo.masking import wide_dtype
from attrib_zoo.methods.bases.perturbation import Baseline, Passes, Perturbation


class RISE(Perturbation):
    r"""The mean score of the image under random masks, over the masks that show the pixel; works on black-box models.

    .. math:: M(\lambda) = \frac{1}{p_1 K} \sum_{i=1}^{K}
              S_c\big(x \odot m_i + b \odot (1 - m_i)\big) \, m_i(\lambda)

    (Eq. 6 of the paper), with S_c the target's probability, b the baseline and K masks: grids of s by s cells, each
    shown with probability p_1, enlarged bilinearly to a little more than the image and cropped at a random place. One
    forward pass for each mask, in chunks; they serve all targets of :meth:`attribute_many` together, and every image
    of a batch sees the same masks. No mask is kept.

    The map contains a large constant, about the mean score; only differences within it are meaningful.

    Args:
        model: see :class:`~attrib_zoo.attribution.Attribution`.
        layers: not used; RISE reads no layer.
        n_masks: K, 8000 as in the paper for ResNet-50 (4000 for VGG16). The error falls with its square root.
        s: cells of a mask along each side.
        p1: probability that a cell is shown.
        seed: for the masks; a larger ``n_masks`` begins with the same masks as a smaller one.
        score: ``"softmax"`` (paper), ``"logit"``, ``"logsoftmax"`` or ``"sigmoid"``.
        baseline: what is shown where a mask is 0: ``"mean"`` (0, the mean colour), ``"black"``, ``"blur"``, a number,
            or a tensor that broadcasts to the inputs.
        chunk_size: masked images per forward pass; ``None``: 32, fewer where memory runs out.
        scale: ``"min-max"``, ``"rank"``, ``"positive"``, or ``None`` for the formula's own.

    Example:
        >>> import torch
        >>> from attrib_zoo import RISE
        >>> from attrib_zoo.synthetic import tiny_cnn
        >>> RISE(tiny_cnn(), n_masks=50).attribute(torch.rand(2, 3, 32, 32), target=3).shape
        torch.Size([2, 3, 32, 32])

    References:
        V. Petsiuk, A. Das, K. Saenko: RISE: Randomized Input Sampling for Explanation of Black-box Models. BMVC 2018.

    Deviations:
        None from the formula. Grids are enlarged with mirrored borders, as the authors' resizing does. Non-square
        images get non-square cells. The map is at the resolution of the image, so there is no ``upsample``.
    """

    paper: ClassVar[str] = "Petsiuk et al., BMVC 2018"
    cost: ClassVar[str] = "1F + 8000F, for all targets"
    default_layers: ClassVar[tuple[str, int] | None] = None
    cheap_options: ClassVar[dict[str, Any]] = {"n_masks": 40}

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        n_masks: int = 8000,
        s: int = 7,
        p1: float = 0.5,
        seed: int = 0,
        score: str = "softmax",
        baseline: Baseline = "mean",
        chunk_size: int | None = None,
        scale: str | None = None,
    ) -> None:
        super().__init__(model, score=score, baseline=baseline, chunk_size=chunk_size, scale=scale)
        if layers is not None:
            raise OptionError(f"layers: must be None, for RISE looks at no layer, got {layers!r}; leave it out")
        self.n_masks = check_number("n_masks", n_masks, least=1)
        self.s = check_number("s", s, least=2)
        self.p1 = check_number("p1", p1, least=0.0, most=1.0, above=True)
        self.seed = check_number("seed", seed, least=0)

    def compute_maps(self, inputs: Tensor, query: TargetQuery, args: tuple[Any, ...], show_progress: bool) -> Tensor:
        outputs = forward(self.model, inputs, args)
        target = query.resolve(outputs)
        passes = self.passes(inputs, args, outputs, target, show_progress)
        masks = RandomMasks(self.n_masks, self.s, self.p1, self.seed, inputs)
        return self._sum(passes, masks) / (self.n_masks * self.p1)

    def _sum(self, passes: Passes, masks: RandomMasks) -> Tensor:
        """The masks weighted by the scores, ``(N, T, H, W)``."""
        clean, (height, width) = passes.clean, passes.inputs.shape[-2:]
        count, targets = clean.shape
        total = clean.new_zeros(count * targets, height * width)

        def work(part: slice) -> None:
            pairs = torch.arange(part.start, part.stop)
            number, rows = pairs // count, pairs % count  # a mask goes to all images before the next is made
            first = int(number[0])
            some = masks(first, int(number[-1]) + 1)
            scores = passes.scores(rows, some[number - first].unsqueeze(1))
            weights = scores.new_zeros(count, targets, len(some))
            weights[rows, :, number - first] = scores
            total.add_(weights.view(count * targets, -1) @ some.flatten(1).to(scores.dtype))

        passes.loop(self.n_masks * count, work)
        return total.view(count, targets, height, width)


class RandomMasks:
    """The masks of RISE, made on demand: only their grids and offsets are kept.

    Args:
        count: how many there are.
        s: cells along each side.
        p1: probability that a cell is 1.
        seed: for a generator of its own.
        like: images ``(N, C, H, W)``, for the size, the device and the type (float32 or better).
    """

    def __init__(self, count: int, s: int, p1: float, seed: int, like: Tensor) -> None:
        drawn = torch.rand(count, s * s + 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        dtype = wide_dtype(like)
        self._grids = (drawn[:, 2:] < p1).view(count, s, s).to(like.device, dtype)
        self._axes = [
            (_enlarging((s + 1) * cell, s).to(like.device, dtype), (drawn[:, i] * cell).long().to(like.device), length)
            for i, length in enumerate(like.shape[-2:])
            for cell in [math.ceil(length / s)]
        ]

    def __call__(self, start: int, stop: int) -> Tensor:
        """The masks ``(stop - start, H, W)`` in [0, 1]."""
        rows, columns = (
            matrix[offsets[start:stop, None] + torch.arange(length, device=matrix.device)]
            for matrix, offsets, length in self._axes
        )
        return rows @ self._grids[start:stop] @ columns.transpose(1, 2)


def _enlarging(length: int, cells: int) -> Tensor:
    """``(length, cells)``: bilinear interpolation of a row of cells, mirrored at the outer cells' centres."""
    position = (torch.arange(length, dtype=torch.float64) + 0.5) * cells / length - 0.5
    low = position.floor()
    matrix = torch.zeros(length, cells, dtype=torch.float64)
    for cell, share in ((low, 1 - (position - low)), (low + 1, position - low)):
        mirrored = cell.abs()
        mirrored = (cells - 1) - ((cells - 1) - mirrored).abs()
        matrix.scatter_add_(1, mirrored.long().unsqueeze(1), share.unsqueeze(1))
    return matrix
