"""Extremal perturbations (Fong, Patrick and Vedaldi, ICCV 2019)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attrib_zoo.attribution import Attribution, PerturbationAttribution
from attrib_zoo.backbone.capture import check_weights, forward, select_args
from attrib_zoo.backbone.targets import SCORES, Target, TargetQuery, class_scores
from attrib_zoo.errors import OptionError, TargetError, UnsupportedModelError, check_choice, check_number
from attrib_zoo.masking import ChunkSize, at_least_float32, blur, wide_dtype
from attrib_zoo.methods.bases.progress import progress

_LEVELS = 8  # of the blurred images, the last of them sharp
_COLDNESS = 20.0
_STEP, _SIGMA = 7, 21.0  # pixels, for images of 224
_RATE, _MOMENTUM, _DAMPENING = 0.01, 0.9, 0.9
_AREA_WEIGHT, _AREA_GROWTH = 300.0, 1.0035
_SAME = 2.0**10  # pixels of a mask that agree to 1 / _SAME share their rank


class ExtremalPerturbation(Attribution, PerturbationAttribution):
    r"""The smooth mask of a given area through which the model sees most of the target; the rest is blurred.

    .. math:: m_a = \arg\max_m\ \Phi_c(m \otimes x) - \lambda \lVert \mathrm{sort}(m) - r_a \rVert^2

    (Eq. 3 and 5 of the paper) over smooth masks m, found by gradient ascent, with the target's score Phi_c, r_a a step
    from 0 to 1 that leaves the share a of the pixels, and a blur of the image that grows as the mask falls. The mask
    is made of parameters on a coarse grid, each spread by a kernel of radius ``sigma`` and combined by a smooth
    maximum. The map is the mask, or the mean of the masks of all areas. One forward and one backward pass per step,
    area, image and target.

    Args:
        model: see :class:`~attrib_zoo.attribution.Attribution`.
        layers: not used; the method reads no layer.
        areas: shares of the image that a mask leaves visible.
        variant: ``"preserve"`` keeps the score with the mask; ``"delete"`` finds the mask whose removal hurts it most;
            ``"dual"`` does both.
        contrastive: the score minus the best score of any other class.
        max_iter: steps of the optimisation.
        step: spacing of the grid's parameters in pixels; ``None``: the authors' 7 for images of 224 pixels (the
            shorter side), in proportion for others, at least 1.
        sigma: radius of the kernel in pixels; ``None``: the authors' 21 at 224 pixels, in proportion for others.
        blur: standard deviation of the strongest blur in pixels; the authors' value at any size, since it must hide the
            evidence.
        score: ``"logit"``, ``"softmax"``, ``"logsoftmax"`` or ``"sigmoid"``.
        chunk_size: masks optimised at once; ``None``: 32, fewer where memory runs out.
        scale: ``"min-max"``, ``"rank"``, ``"positive"``, or ``None`` for the formula's own.

    Example:
        >>> import torch
        >>> from attrib_zoo import ExtremalPerturbation
        >>> from attrib_zoo.synthetic import tiny_cnn
        >>> explainer = ExtremalPerturbation(tiny_cnn(), max_iter=10, step=4, sigma=6.0, blur=3.0)
        >>> explainer.attribute(torch.rand(2, 3, 32, 32), target=3).shape
        torch.Size([2, 3, 32, 32])

    References:
        R. Fong, M. Patrick, A. Vedaldi: Understanding Deep Networks via Extremal Perturbations and Smooth Masks.
        ICCV 2019.

    Deviations:
        The areas' masks are averaged; the paper sums them. Pixels of a mask with equal values share their rank.
        Optimisation starts from a mask of ones and draws nothing at random. The map is at the resolution of the image,
        so there is no ``upsample``.
    """

    family: ClassVar[str] = "perturbation"
    paper: ClassVar[str] = "Fong et al., ICCV 2019"
    cost: ClassVar[str] = "800F + 800B for each area and target"
    default_layers: ClassVar[tuple[str, int] | None] = None
    cheap_options: ClassVar[dict[str, Any]] = {"max_iter": 6, "step": 8, "sigma": 8.0, "blur": 8.0}

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        areas: Sequence[float] = (0.1,),
        variant: str = "preserve",
        contrastive: bool = False,
        max_iter: int = 800,
        step: int | None = None,
        sigma: float | None = None,
        blur: float = 20.0,
        score: str = "logit",
        chunk_size: int | None = None,
        scale: str | None = None,
    ) -> None:
        super().__init__(model, scale=scale)
        if layers is not None:
            raise OptionError(
                f"layers: must be None, for ExtremalPerturbation looks at no layer, got {layers!r}; leave it out"
            )
        if not isinstance(areas, (tuple, list)) or not areas:
            raise OptionError(f"areas: must be a tuple of shares above 0 and below 1, got {areas!r}")
        self.areas = tuple(check_number("areas", area, least=0.0, most=1.0, above=True) for area in areas)
        self.variant = check_choice("variant", variant, ("preserve", "delete", "dual"))
        self.contrastive = bool(contrastive)
        self.max_iter = check_number("max_iter", max_iter, least=1)
        self.step: int | None = None if step is None else check_number("step", step, least=1)
        self.sigma: float | None = None if sigma is None else check_number("sigma", sigma, least=0.0, above=True)
        self.blur = check_number("blur", blur, least=0.0, above=True)
        self.score = check_choice("score", score, SCORES)
        self.chunk_size = chunk_size
        ChunkSize(chunk_size)

    def compute_maps(self, inputs: Tensor, query: TargetQuery, args: tuple[Any, ...], show_progress: bool) -> Tensor:
        check_weights(self.model)
        target = query.resolve(forward(self.model, inputs, args))
        count, height, width = target.count, *inputs.shape[-2:]
        scale = min(height, width) / 224
        step = max(1, round(_STEP * scale)) if self.step is None else self.step
        sigma = _SIGMA * scale if self.sigma is None else self.sigma
        smooth = SmoothMask((height, width), step, sigma, inputs)
        levels = pyramid(inputs, self.blur)
        items = torch.cartesian_prod(*map(torch.arange, (len(inputs), count, len(self.areas)))).view(-1, 3)
        found = torch.empty(len(items), height, width, dtype=smooth.dtype, device=inputs.device)

        def work(part: slice) -> None:
            rows, columns, areas = items[part].to(target.index.device).unbind(1)
            shares = torch.tensor([self.areas[area] for area in areas.tolist()], dtype=smooth.dtype)
            own = target.one_of(rows, columns)
            extra = select_args(args, rows, len(inputs))

            def gain(mask: Tensor, flip: bool) -> Tensor:
                shown = self._show(levels, rows.to(inputs.device), mask)
                outputs = forward(self.model, (shown.flip(-1) if flip else shown).to(inputs.dtype), extra)
                return self._score(outputs, own)

            found[part] = self._optimise(smooth, gain, shares.to(inputs.device), done)

        with progress(len(items) * self.max_iter, self.get_name() if show_progress else "", "step") as done:
            for _ in ChunkSize(self.chunk_size, inputs).ranges(len(items), work):
                pass
        return found.view(len(inputs), count, len(self.areas), height, width).mean(2)

    def _optimise(
        self, smooth: SmoothMask, gain: Callable[[Tensor, bool], Tensor], shares: Tensor, done: Callable[[int], Any]
    ) -> Tensor:
        """The masks ``(B, H, W)`` of the given areas ``(B,)``; ``gain`` is ``(B,)``, of masks and of being mirrored."""
        grid = torch.ones(len(shares), *smooth.cells, dtype=smooth.dtype, device=shares.device)
        velocity: Tensor | None = None
        for number in range(self.max_iter):
            with torch.enable_grad():
                wide = smooth(grid.requires_grad_())
                mask, flip = smooth.crop(wide), number % 2 == 0
                kept = gain(mask, flip) if self.variant != "delete" else 0
                gone = gain(1 - mask, flip) if self.variant != "preserve" else 0
                error = area_error(wide, shares) * (_AREA_WEIGHT * _AREA_GROWTH**number)
                (slope,) = torch.autograd.grad((error - (kept - gone)).sum(), grid)
            velocity = slope if velocity is None else _MOMENTUM * velocity + (1 - _DAMPENING) * slope
            grid = (grid.detach() - _RATE * velocity).clamp(0, 1)
            done(len(grid))
        return smooth.crop(smooth(grid))

    def _show(self, levels: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
        """The images ``rows``, at each pixel as sharp as its mask ``(B, H, W)`` says."""
        place = mask * (_LEVELS - 1)
        low = place.detach().floor().clamp(0, _LEVELS - 2).long()
        y, x = (torch.arange(length, device=mask.device) for length in mask.shape[-2:])
        index = rows[:, None, None], slice(None), y[:, None], x
        dull, sharp = (levels[index[0], low + i, :, index[2], index[3]].movedim(-1, 1) for i in (0, 1))
        share = (place - low).unsqueeze(1)
        return dull * (1 - share) + sharp * share

    def _score(self, outputs: Tensor, target: Target) -> Tensor:
        """``(B,)``."""
        found = at_least_float32(target.select(outputs, self.score))[:, 0]
        if not outputs.requires_grad:
            raise UnsupportedModelError(
                f"model: {type(self.model).__name__} must let gradients through to its input, got outputs without a "
                "graph (a no_grad block in its forward?); use RISE, which needs none"
            )
        if not self.contrastive:
            return found
        if target.contrasts:
            raise TargetError(
                "target: contrastive=True already subtracts the best other score, so the target must be a class, got a "
                "Contrast; use contrastive=False with it"
            )
        every = at_least_float32(class_scores(outputs, self.score))
        if every.ndim != 2:
            raise UnsupportedModelError(
                f"contrastive: needs several classes, outputs (N, K), got {tuple(outputs.shape)}; use contrastive=False"
            )
        return found - every.scatter(1, target.classes.to(every.device), -torch.inf).amax(1)


class SmoothMask:
    """From parameters on a coarse grid to smooth masks of an image and a margin around it.

    Args:
        size: ``(H, W)`` of the image.
        step: spacing of the parameters in pixels; their grid is centred.
        sigma: radius of the kernel, and the margin.
        like: a tensor with the device and dtype to use (float32 or better).

    Attributes:
        cells: rows and columns of the grid.
        dtype: of the masks.
    """

    def __init__(self, size: Sequence[int], step: int, sigma: float, like: Tensor) -> None:
        self.dtype = wide_dtype(like)
        self.cells = tuple(math.ceil(length / step) for length in size)
        self._size, self._margin = tuple(size), math.ceil(sigma)
        self._reach = 1 + math.ceil(sigma / step)
        axes = [self._axis(length, count, step) for length, count in zip(size, self.cells, strict=True)]
        (self._rows, down, near_rows), (self._columns, across, near_columns) = (
            tuple(part.to(like.device) for part in axis) for axis in axes
        )
        distance = (down[:, None, :, None].square() + across[None, :, None, :].square()).sqrt() / sigma
        kernel = (-2 * (distance - 0.5).clamp(min=0).square()).exp()
        near = near_rows[:, None, :, None] & near_columns[None, :, None, :]
        self._kernel = kernel.to(self.dtype).flatten(0, 1)  # (neighbours, H + 2 margin, W + 2 margin)
        self._bias = torch.zeros_like(self._kernel).masked_fill(~near.flatten(0, 1), -torch.inf)

    def _axis(self, length: int, count: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """For each neighbour and pixel: which parameter, how far, and whether it is one of the pixel's neighbours."""
        pixels = torch.arange(-self._margin, length + self._margin, dtype=torch.float64) + 0.5
        first = length / 2 - (count - 1) / 2 * step
        nearest = ((pixels - first) / step).round().clamp(0, count - 1).long()
        chosen = nearest + torch.arange(-self._reach, self._reach + 1).unsqueeze(1)
        distance = (pixels - (first + chosen * step)).abs()
        near = (chosen >= 0) & (chosen < count) & ((distance <= self._reach * step) | (chosen == nearest))
        return chosen.clamp(0, count - 1), distance, near

    def __call__(self, grid: Tensor) -> Tensor:
        """``(B, rows, columns)`` parameters to ``(B, H + 2 margin, W + 2 margin)`` masks: a smooth maximum."""
        spread = grid[:, self._rows][..., self._columns]  # (B, n, H', m, W')
        spread = spread.movedim(3, 2).flatten(1, 2) * self._kernel
        return (spread * (_COLDNESS * spread + self._bias).softmax(1)).sum(1)

    def crop(self, wide: Tensor) -> Tensor:
        """Without the margin."""
        margin = self._margin
        return wide[:, margin : margin + self._size[0], margin : margin + self._size[1]]


def pyramid(images: Tensor, strongest: float) -> Tensor:
    """``(N, 8, C, H, W)``: the images from the strongest blur to none, in float32 or better."""
    images = at_least_float32(images)
    return torch.stack([blur(images, strongest * (1 - level / (_LEVELS - 1))) for level in range(_LEVELS)], 1)


def area_error(masks: Tensor, shares: Tensor) -> Tensor:
    """How far the sorted pixels of each mask are from a step that leaves its share at 1, the mean square, ``(B,)``.

    Equal pixels share the mean of the step at their ranks, so that no order of the pixels is preferred.
    """
    values = masks.flatten(1).sort(1).values
    count = values.shape[1]
    with torch.no_grad():
        level = (values * _SAME).round()
        first = torch.searchsorted(level, level).to(values.dtype)
        last = torch.searchsorted(level, level, right=True).to(values.dtype)
        zeros = ((1 - shares) * count).floor().unsqueeze(1)
        step = (last - torch.maximum(first, zeros)).clamp(min=0) / (last - first)
    return (values - step).square().mean(1)
