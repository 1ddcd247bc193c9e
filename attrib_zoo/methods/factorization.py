"""Deep feature factorization (Collins, Achanta and Süsstrunk, ECCV 2018)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attrib_zoo.attribution import Attribution, check_images
from attrib_zoo.backbone.capture import forward_args, frozen, run
from attrib_zoo.backbone.targets import TargetQuery
from attrib_zoo.errors import OptionError, check_number
from attrib_zoo.masking import at_least_float32

_LEAST = 1e-12


class DeepFeatureFactorization(Attribution):
    r"""Which parts of the images share a direction of the features: a few parts, without a class.

    .. math:: \min_{P \ge 0,\, W \ge 0} \lVert A - P W \rVert_F^2

    with A the non-negative features as an (h·w) x D matrix, k rows of W, the directions (each of length 1), and P the
    share that every cell has in each of them. The map is one column of P at the h x w cells. Directions are in the
    order of their strength, the strongest first.

    :meth:`attribute` takes each image by itself and returns the map of one direction, ``factor``. :meth:`factorize`
    takes all images as one matrix, as the paper does, so that a direction means the same in each of them: k maps for
    each image, and the directions.

    **This does not explain a decision.** The directions are those of the features; no score takes part, and the map is
    the same for every class. What a direction means is for the reader to find out.

    Args:
        model: see :class:`~attrib_zoo.attribution.Attribution`.
        layers: see :class:`~attrib_zoo.attribution.Attribution`; ``None`` for the layer of
            :class:`~attrib_zoo.GradCAM`; several layers give the mean of their maps.
        n_factors: k.
        factor: which direction's map :meth:`attribute` returns, from 0, the strongest.
        n_iter: steps of the factorisation; after 50 the strongest map has a cosine of 0.997 or more with
            the one after 2000 (8 photographs each, SqueezeNet and ViT-Ti).
        upsample: ``False`` returns ``(N, 1, h, w)``.
        smooth: odd side of a mean filter over the cells of the map; ``None`` for none.
        scale: ``"min-max"``, ``"rank"``, ``"positive"``, or ``None`` for the formula's own.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from attrib_zoo import DeepFeatureFactorization
        >>> model = resnet18(weights=None)
        >>> parts, directions = DeepFeatureFactorization(model, n_factors=2).factorize(torch.rand(3, 3, 64, 64))
        >>> parts.shape, directions.shape
        (torch.Size([3, 2, 2, 2]), torch.Size([2, 512]))

    References:
        E. Collins, R. Achanta, S. Süsstrunk: Deep Feature Factorization For Concept Discovery. ECCV 2018.

    Deviations:
        Of signed features, as those of vision transformers, the positive part is factorised. Least squares by columns
        from a start by singular vectors (non-negative double singular value decomposition, zeros filled with the
        mean), so that nothing is drawn; always ``n_iter`` of them, so that no image depends on others.
    """

    family: ClassVar[str] = "features"
    paper: ClassVar[str] = "Collins et al., ECCV 2018"
    cost: ClassVar[str] = "1F"
    class_agnostic: ClassVar[bool] = True
    default_layers: ClassVar[tuple[str, int] | None] = ("gradient", 1)
    cheap_options: ClassVar[dict[str, Any]] = {"n_iter": 8}

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        n_factors: int = 4,
        factor: int = 0,
        n_iter: int = 50,
        upsample: bool = True,
        smooth: int | None = None,
        scale: str | None = None,
    ) -> None:
        super().__init__(model, layers, upsample=upsample, smooth=smooth, scale=scale)
        self.n_factors = check_number("n_factors", n_factors, least=1)
        self.n_iter = check_number("n_iter", n_iter, least=1)
        self.factor = check_number("factor", factor, least=0)
        if self.factor >= self.n_factors:
            raise OptionError(f"factor: must be below n_factors={n_factors}, got {factor}")

    def compute_maps(
        self, inputs: Tensor, query: TargetQuery, args: tuple[Any, ...], show_progress: bool
    ) -> list[Tensor]:
        outputs, features = run(self.model, inputs, args, self.taps(inputs, args))
        count = query.resolve(outputs).count
        maps = []
        for part in features:
            shares, _ = factors(_rows(part), self._fitting(part.shape[-2] * part.shape[-1]), self.n_iter)
            chosen = shares[:, :, self.factor].unflatten(1, part.shape[-2:])
            maps.append(chosen.unsqueeze(1).expand(-1, count, -1, -1))
        return maps

    def factorize(self, inputs: Tensor, additional_forward_args: Any = None) -> tuple[Tensor, Tensor]:
        """The directions that all images share, and where each of them is.

        Args:
            inputs: as in :meth:`attribute`; of one layer.
            additional_forward_args: as in :meth:`attribute`.

        Returns:
            Maps ``(N, k, h, w)`` at the layer's resolution, and directions ``(k, D)`` of length 1; the strongest
            first.
        """
        images, args = check_images(inputs, type(self).__name__), forward_args(additional_forward_args)
        with frozen(self.model), torch.inference_mode(False), torch.no_grad():
            taps = self.taps(images, args)
            if len(taps) != 1:
                raise OptionError(f"layers: factorize takes one layer, got {[tap.name for tap in taps]}; name one")
            features = run(self.model, images.detach(), args, taps)[1][0]
            n, _, h, w = features.shape
            shares, directions = factors(
                _rows(features).flatten(0, 1).unsqueeze(0), self._fitting(n * h * w), self.n_iter
            )
            return shares[0].unflatten(0, (n, h, w)).permute(0, 3, 1, 2).contiguous(), directions[0]

    def _fitting(self, cells: int) -> int:
        if self.n_factors > cells:
            raise OptionError(f"n_factors: must be at most {cells}, the number of cells, got {self.n_factors}")
        return self.n_factors


def _rows(features: Tensor) -> Tensor:
    """The positive part of ``(N, D, h, w)`` as matrices ``(N, h w, D)``."""
    return at_least_float32(features).relu().flatten(2).transpose(1, 2)


def factors(matrix: Tensor, k: int, steps: int) -> tuple[Tensor, Tensor]:
    """Non-negative factors of each matrix ``(N, m, D)``: ``(N, m, k)`` and ``(N, k, D)``, whose rows have length 1.

    Hierarchical alternating least squares, one column at a time; ordered by how much of the matrix each factor holds.
    Multiplicative updates take thousands of steps to where this is after tens, and what they have not reached by then
    depends on the last bits of the features.
    """
    size = matrix.amax((1, 2), keepdim=True)
    unit = matrix / size.where(size > 0, torch.ones_like(size))
    left, right = start(unit, k)
    for _ in range(steps):
        left = _solved(left, unit @ right.transpose(1, 2), right @ right.transpose(1, 2))
        right = _solved(right.transpose(1, 2), unit.transpose(1, 2) @ left, left.transpose(1, 2) @ left).transpose(1, 2)
    length = torch.linalg.vector_norm(right, dim=2, keepdim=True)
    right = right / length.clamp(min=_LEAST)
    left = left * length.transpose(1, 2) * size
    order = left.square().sum(1).argsort(dim=1, descending=True, stable=True)
    left = left.gather(2, order.unsqueeze(1).expand_as(left))
    return left, right.gather(1, order.unsqueeze(2).expand_as(right))


def _solved(found: Tensor, moment: Tensor, gram: Tensor) -> Tensor:
    """Each column of ``(N, m, k)`` in turn brought to its best, the others held: non-negative least squares."""
    columns = list(found.unbind(2))
    for j in range(len(columns)):
        rest = torch.stack(columns, dim=2) @ gram[:, :, j : j + 1]
        size = gram[:, j, j].view(-1, 1)
        better = (columns[j] + (moment[:, :, j] - rest[:, :, 0]) / size.clamp(min=_LEAST)).relu()
        columns[j] = torch.where(size > _LEAST, better, columns[j])
    return torch.stack(columns, dim=2)


def start(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The start by singular vectors (Boutsidis and Gallopoulos, 2008), whose zeros are the matrix' mean."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    rank = min(k, s.shape[1])
    left = matrix.new_zeros(len(matrix), matrix.shape[1], k)
    right = matrix.new_zeros(len(matrix), k, matrix.shape[2])
    left[:, :, 0], right[:, 0] = (s[:, :1].sqrt() * part.abs() for part in (u[:, :, 0], v[:, 0]))
    for j in range(1, rank):
        pairs = [(u[:, :, j].relu(), v[:, j].relu()), ((-u[:, :, j]).relu(), (-v[:, j]).relu())]
        lengths = [[torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in pair] for pair in pairs]
        first = lengths[0][0] * lengths[0][1] > lengths[1][0] * lengths[1][1]
        x, y = (torch.where(first, a, b) for a, b in zip(*pairs, strict=True))
        p, q = (torch.where(first, a, b) for a, b in zip(*lengths, strict=True))
        weight = (s[:, j : j + 1] * p * q).sqrt()
        left[:, :, j], right[:, j] = weight * x / p.clamp(min=_LEAST), weight * y / q.clamp(min=_LEAST)
    mean = matrix.mean((1, 2), keepdim=True).expand(-1, 1, 1)
    return torch.where(left < 1e-6, mean, left), torch.where(right < 1e-6, mean, right)
