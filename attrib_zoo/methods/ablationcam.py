"""Ablation-CAM (Desai and Ramaswamy, WACV 2020)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.grid import Grid, Tap
from attrib_zoo.backbone.replay import Replay, replay
from attrib_zoo.backbone.targets import TargetQuery
from attrib_zoo.errors import check_choice
from attrib_zoo.masking import ChunkSize, at_least_float32
from attrib_zoo.methods.bases.perturbation import Perturbation
from attrib_zoo.methods.bases.progress import progress


class AblationCAM(Perturbation):
    r"""Regions whose feature maps the target's score drops without; no gradients.

    .. math:: M = \mathrm{ReLU}\Big(\sum_k w_k A_k\Big), \qquad w_k = \frac{y_c - y_c^{(k)}}{|y_c|}

    with A the D feature maps of the layer, ``(N, D, h, w)``, y_c the target's logit and y_c^(k) the logit with map k
    set to zero everywhere (for tokens, at the class and register tokens too). One forward pass; each of the D ablations
    runs only the layers after it, in chunks, and serves all targets of :meth:`attribute_many`.

    Args:
        model: see :class:`~attrib_zoo.attribution.Attribution`.
        layers: see :class:`~attrib_zoo.attribution.Attribution`; several layers give the mean of their maps. Default:
            the last convolutional stage; the first normalisation layer of the last block of a transformer with a class
            token.
        score: ``"logit"`` (paper), ``"softmax"``, ``"logsoftmax"`` or ``"sigmoid"``.
        divisor: what the drop is divided by: ``"abs"``, the score's absolute value; ``"paper"``, the score, which
            inverts the map where it is negative; ``"none"``. A score of exactly 0 is not divided by.
        fill: what an ablated map is set to: ``"zero"`` (paper), or ``"mean"``, its own mean over space.
        relu: the paper's ReLU; ``False`` keeps negative evidence.
        chunk_size: ablations per pass; ``None``: 32, fewer where memory runs out.
        upsample: ``False`` returns ``(N, 1, h, w)``.
        smooth: odd side of a mean filter over the cells of the map; ``None`` for none.
        scale: ``"min-max"``, ``"rank"``, ``"positive"``, or ``None`` for the formula's own.

    Example:
        >>> import torch
        >>> from attrib_zoo import AblationCAM
        >>> from attrib_zoo.synthetic import tiny_cnn
        >>> AblationCAM(tiny_cnn(size=64)).attribute(torch.rand(2, 3, 64, 64), target=3).shape
        torch.Size([2, 3, 64, 64])

    References:
        S. Desai, H. G. Ramaswamy: Ablation-CAM: Visual Explanations for Deep Convolutional Network via Gradient-free
        Localization. WACV 2020.

    Deviations:
        The drop is divided by the absolute score; for a positive score that is the paper's formula, for a negative one
        the paper's map would show evidence against the class. Feature maps that ablation does not change get no pass.
        The paper covers CNNs only. The map is raw.
    """

    paper: ClassVar[str] = "Desai and Ramaswamy, WACV 2020"
    cost: ClassVar[str] = "1F + 1F after the layer for each feature map, for all targets"
    default_layers: ClassVar[tuple[str, int] | None] = ("gradient", 1)

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        score: str = "logit",
        divisor: str = "abs",
        fill: str = "zero",
        relu: bool = True,
        chunk_size: int | None = None,
        upsample: bool = True,
        smooth: int | None = None,
        scale: str | None = None,
    ) -> None:
        super().__init__(
            model, layers, score=score, chunk_size=chunk_size, upsample=upsample, smooth=smooth, scale=scale
        )
        self.divisor = check_choice("divisor", divisor, ("abs", "paper", "none"))
        self.fill = check_choice("fill", fill, ("zero", "mean"))
        self.relu = bool(relu)

    def compute_maps(
        self, inputs: Tensor, query: TargetQuery, args: tuple[Any, ...], show_progress: bool
    ) -> list[Tensor]:
        heats = []
        for tap in self.taps(inputs, args):
            with replay(self.model, inputs, args, _with_prefix(tap)) as again:
                weights = self._weights(again, query, show_progress)
                maps = at_least_float32(_patches(again.maps, tap.grid))
            heat = torch.einsum("ndt,ndhw->nthw", weights, maps)
            heats.append(heat.relu() if self.relu else heat)
        return heats

    def _weights(self, again: Replay, query: TargetQuery, show_progress: bool) -> Tensor:
        """How much of the score each ablation removes, ``(N, D, T)``."""
        target = query.resolve(again.outputs)
        clean = self.read(again.outputs, target)
        maps = again.maps
        filling = maps.mean((-2, -1)) if self.fill == "mean" else maps.new_zeros(maps.shape[:2])
        images, channels = (maps != filling[:, :, None, None]).flatten(2).any(2).nonzero(as_tuple=True)
        ablated = clean.unsqueeze(1).repeat(1, maps.shape[1], 1)

        def work(part: slice) -> None:
            n, k = images[part], channels[part]
            without = _rows(maps, n)
            without[torch.arange(len(n)), k] = filling[n, k, None, None]
            ablated[n, k] = self.read(again(without, n), target.rows(n))

        with progress(len(images), self.get_name() if show_progress else "") as done:
            for count in ChunkSize(self.chunk_size).ranges(len(images), work):
                done(count)
        scale = {"abs": clean.abs(), "paper": clean, "none": torch.ones_like(clean)}[self.divisor]
        return (clean.unsqueeze(1) - ablated) / scale.where(scale != 0, 1).unsqueeze(1)


def _rows(maps: Tensor, rows: Tensor) -> Tensor:
    """A copy of these rows in the memory format of the layer's own output, which saves the replay one copy."""
    order = [0, *sorted((1, 2, 3), key=maps.stride, reverse=True)]
    return maps.permute(order)[rows].permute([order.index(axis) for axis in range(4)])


def _with_prefix(tap: Tap) -> Tap:
    """The tap with all tokens as one row of cells, since an ablation spares none."""
    grid = tap.grid
    if not grid.is_tokens or grid.hw is None:
        return tap
    return replace(tap, grid=grid.of_all_tokens())


def _patches(maps: Tensor, grid: Grid) -> Tensor:
    """The cells that the tap itself reads, ``(N, D, h, w)``."""
    if not grid.is_tokens:
        return maps
    tokens = maps.squeeze(2)
    return grid.to_map(tokens.transpose(1, 2) if grid.kind == "tokens" else tokens)
