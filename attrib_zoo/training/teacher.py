"""What all classes share, learnt from another method by least squares: where the model looks, whatever it decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attrib_zoo.backbone.capture import run, select_args
from attrib_zoo.backbone.grid import Tap
from attrib_zoo.errors import TrainingError
from attrib_zoo.masking import at_least_float32, mean_ranks, upsample
from attrib_zoo.training.losses import two_logits

TEACHER_IMAGES = 128
_RIDGE = 0.1  # of the mean diagonal; 0.01 to 0.1 and 64 to 900 images were measured to differ little
_AT_ONCE = 16

Teacher = Callable[[Tensor, Tensor, tuple[Any, ...]], Tensor]
"""``(images (N, C, H, W), classes (N,), further arguments)`` to maps ``(N, 1, h, w)``."""


@dataclass(frozen=True)
class Lesson:
    """A common row, in units of the rows' own maps.

    Attributes:
        common: ``(sum of C_i,)``, to be added to every class's row.
        agreement: correlation of the maps of rows plus common row with the teacher's, over all cells of all images.
        before: the same of the rows alone.
        images: how many images it was learnt from.
    """

    common: Tensor
    agreement: float
    before: float
    images: int

    def described(self, name: str) -> str:
        """In a few words, for a report."""
        return (
            f"{name} on {self.images} image{'' if self.images == 1 else 's'}, correlation with its maps "
            f"{self.before:.2f} before, {self.agreement:.2f} after"
        )


@torch.no_grad()
def place_means(
    model: Any, images: Tensor, args: Sequence[Any], taps: Sequence[Tap], *, show_progress: bool = False
) -> list[Tensor]:
    """The mean features of the images at each place, ``(C_i, h_i, w_i)`` for each layer."""
    from tqdm.auto import tqdm

    totals: list[Tensor] = []
    parts = torch.arange(len(images), device=images.device).split(_AT_ONCE)
    for rows in tqdm(parts, "places", unit="batch", leave=False, disable=not show_progress):
        features = run(model, images[rows], select_args(args, rows, len(images)), taps)[1]
        sums = [at_least_float32(f).sum(0) / len(images) for f in features]
        totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
    return totals


@torch.no_grad()
def learn_common_row(
    model: Any,
    head: Any,
    images: Tensor,
    args: Sequence[Any],
    taps: Sequence[Tap],
    teacher: Teacher,
    evidence: float,
    *,
    show_progress: bool = False,
) -> Lesson | None:
    r"""The row g that brings the maps of the decisions nearest to the teacher's.

    .. math:: \min_{\gamma, g} \sum_n \| z(T_n) - \gamma \, \bar e_n - g \bar L_n \|^2 + \rho \| g \|^2

    over images n and cells, with :math:`T_n` the teacher's map of the decision and z its ranks as normal scores,
    :math:`\bar e_n` the map of the decision's row and :math:`\bar L_n` the features, both less their mean over the
    image's cells and in units of their deviation, and ρ a tenth of the normal equations' mean diagonal. The rows then
    count ``evidence`` times what fits best: the row of class c becomes :math:`w_c + g / (\gamma \cdot evidence)`.

    Args:
        model: the frozen model.
        head: a head without branches that starts from rows.
        images: ``(N, C, H, W)``.
        args: the model's further arguments.
        taps: the layers, in the order of execution.
        teacher: gives the maps to learn from.
        evidence: how many times more the class's own row counts than in the fit.
        show_progress: draw a progress bar.

    Returns:
        ``None`` where the rows' maps are not positively related to the teacher's: there is nothing to add them to.

    Raises:
        TrainingError: the teacher's maps are not finite.
    """
    from tqdm.auto import tqdm

    sums = _Sums()
    parts = torch.arange(len(images), device=images.device).split(_AT_ONCE)
    for rows in tqdm(parts, "teacher", unit="batch", leave=False, disable=not show_progress):
        some, further = images[rows], select_args(args, rows, len(images))
        outputs, features = run(model, some, further, taps)
        features = [at_least_float32(f) for f in features]
        classes = two_logits(outputs).argmax(1)
        own = head(features, classes.unsqueeze(1))
        taught = teacher(some, classes, further)
        if not bool(torch.isfinite(taught).all()):
            raise TrainingError("fit: the teacher's maps must be finite, got NaN or infinity; choose another teacher")
        size = tuple(own.shape[-2:])
        read = head.without_places(features)
        sums.add(own.flatten(2), _whole(read, size), normal_scores(upsample(taught.to(own), size).flatten(1)))
    return sums.solve(evidence)


class _Sums:
    """The normal equations, added up batch by batch in float64 on the CPU."""

    def __init__(self) -> None:
        self.units: Tensor | None = None  # (1 + ΣC,), from the first batch
        self.gram = self.moment = torch.zeros(1, dtype=torch.double)
        self.images = self.cells = 0

    def add(self, own: Tensor, features: Tensor, wanted: Tensor) -> None:
        """Maps of the rows ``(n, 1, cells)``, features ``(n, ΣC, cells)`` and what is wanted ``(n, cells)``."""
        columns = _centred(torch.cat([own, features], dim=1)).transpose(0, 1).flatten(1)  # (1 + ΣC, n * cells)
        if self.units is None:
            spread = columns.square().mean(1).sqrt()
            self.units = spread.clamp(min=max(1e-6 * float(spread.max()), 1e-12))
        columns = columns / self.units[:, None]
        self.gram = self.gram + (columns @ columns.T).cpu().double()
        self.moment = self.moment + (columns @ wanted.flatten()).cpu().double()
        self.images += int(wanted.any(1).sum())
        self.cells = wanted.shape[1]

    def solve(self, evidence: float) -> Lesson | None:
        if self.units is None or not self.images or not float(self.gram[0, 0]) > 0:
            return None
        ridge = torch.full_like(self.moment, _RIDGE * float(self.gram.diagonal().mean()))
        ridge[0] = 0
        found = torch.linalg.solve(self.gram + ridge.diag(), self.moment)
        gain = float(found[0])
        if not gain > 0:
            return None
        found[0] = gain * evidence
        units = self.units.cpu().double()
        common = found[1:] / units[1:] * units[0] / found[0]
        alone = torch.zeros_like(found)
        alone[0] = 1
        return Lesson(common.to(self.units), self._correlation(found), self._correlation(alone), self.images)

    def _correlation(self, weights: Tensor) -> float:
        """Of the columns in this mixture with what is wanted, over all cells of all images."""
        power = float(weights @ self.gram @ weights) * self.images * self.cells
        return float(weights @ self.moment) / float(power**0.5)


def normal_scores(maps: Tensor) -> Tensor:
    """Each map's ranks as quantiles of the normal distribution, mean 0 and variance 1; zero where it is constant.

    Args:
        maps: ``(N, cells)``. Equal values have the mean of their ranks.
    """
    share = (mean_ranks(maps) + 0.5) / maps.shape[1]  # the middle of the rank's interval, in 0...1
    return _unit(_centred(torch.special.ndtri(share)))


def _centred(values: Tensor) -> Tensor:
    return values - values.mean(-1, keepdim=True)


def _unit(values: Tensor) -> Tensor:
    spread = values.std(-1, correction=0, keepdim=True)
    return torch.where(spread > 1e-6, values / spread.clamp(min=1e-6), torch.zeros_like(values))


def _whole(features: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """All layers' features at one size: ``(N, ΣC, cells)``."""
    return torch.cat([upsample(f, size).flatten(2) for f in features], dim=1)
