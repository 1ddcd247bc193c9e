"""Does a map's shape alone encode the class? A classifier that sees nothing but binary masks tries to guess it.

An explainer that is trained to preserve a decision could learn to encode the class in the shape of its map instead of
showing where the evidence is. Then the masks of its highest pixels predict the class without the image. Objects have
typical shapes and positions, so masks of honest maps are somewhat predictive too: compare with those of a method that
cannot encode anything, such as RISE.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attrib_zoo.errors import InputError, check_number
from attrib_zoo.metrics._maps import Seed, finite_rows, read_maps, top_pixels

_CELLS = 14  # the largest number of rows and columns of the masks that the classifier sees
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
_RESAMPLES = 2000


@dataclass(frozen=True)
class EncodingCheck:
    """How well a classifier guesses classes from masks that it was not trained on.

    Attributes:
        accuracy: share of the masks whose class it guessed correctly.
        chance: the same for randomly permuted classes, the mean over all permutations.
        limit: the 95th percentile of these permutations: above it, the masks carry information about the class.
        correct: ``(N,)`` bool: which masks were guessed correctly; those left out are False.
        used: ``(N,)`` bool: which took part: finite maps of classes with ``folds`` images or more.
        groups: ``(N,)``, which image each mask belongs to.
    """

    accuracy: float
    chance: float
    limit: float
    correct: Tensor
    used: Tensor
    groups: Tensor

    def minus(self, other: EncodingCheck, *, seed: int = 0) -> tuple[float, float, float]:
        """How much higher the accuracy is than for the masks of another explainer, on the same images and classes.

        Args:
            other: the check of maps of the same images and classes, in the same order.
            seed: for the resampling.

        Returns:
            The difference of the accuracies over the maps that both used, and its 95 % interval: a bootstrap over
            images.
        """
        if self.correct.shape != other.correct.shape or not torch.equal(self.groups, other.groups):
            raise InputError(
                f"other: must be of the same {len(self.correct)} masks in the same order, got {len(other.correct)} (or "
                "other images)"
            )
        both = self.used & other.used
        if not bool(both.any()):
            raise InputError("other: must share masks that took part in both checks, got none")
        gap = (self.correct[both].double() - other.correct[both].double()).cpu()
        _, image = self.groups[both].cpu().unique(return_inverse=True)
        images = int(image.max()) + 1
        sums = torch.zeros(images, dtype=torch.float64).index_add_(0, image, gap)
        sizes = torch.zeros(images, dtype=torch.float64).index_add_(0, image, torch.ones_like(gap))
        drawn = torch.randint(images, (_RESAMPLES, images), generator=torch.Generator().manual_seed(seed))
        found = sums[drawn].sum(1) / sizes[drawn].sum(1)
        low, high = torch.quantile(found, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return float(gap.mean()), low, high


def encoding_check(
    attributions: Tensor,
    classes: Tensor,
    *,
    groups: Tensor | None = None,
    keep: float = 0.15,
    folds: int = 5,
    deals: int = 200,
    ties: str = "random",
    seed: int = 0,
) -> EncodingCheck:
    """Guess the class of each map from the binary mask of its highest pixels, by cross-validation.

    The classifier is kernel ridge regression on the class indicators, with a Gaussian kernel as wide as the median
    distance of the masks; its ridge is chosen on the training part of each fold by the leave-one-out error. It sees
    masks of the same area, reduced to 14 x 14 cells where they are larger, and neither values nor the image.

    Args:
        attributions: The maps: ``(N, C, H, W)`` (channels are averaged), ``(N, 1, h, w)`` or ``(N, h, w)``.
        classes: ``(N,)`` integers: the class that each map explains. Several maps of one image, each of another class,
            are the strictest test, since all classes then share the same objects and positions.
        groups: ``(N,)`` integers: which image a map belongs to; maps of one image fall into one fold. ``None``: each
            map has an image of its own.
        keep: Fraction of the pixels in a mask, above 0 and at most 1.
        folds: Number of cross-validation folds. Classes with fewer images are left out.
        deals: Random permutations of the classes from which chance is estimated.
        ties: Which of equal values belong to a mask; see :func:`~attrib_zoo.metrics.miou`.
        seed: For folds, ties and permutations.

    Returns:
        An :class:`EncodingCheck`.

    Raises:
        InputError: The classes or groups do not match the maps, or there are fewer than two classes with ``folds``
            images.
        OptionError: An option is outside its range.

    Example:
        >>> found = encoding_check(torch.rand(40, 7, 7), torch.arange(40) % 2, deals=50)
        >>> found.chance < 0.7, found.correct.shape
        (True, torch.Size([40]))
    """
    check_number("folds", folds, least=2)
    check_number("deals", deals, least=20)
    count = len(attributions) if isinstance(attributions, Tensor) and attributions.ndim else 0
    maps = read_maps(attributions, count).cpu()
    labels = _integers("classes", classes, count)
    images = torch.arange(count) if groups is None else _integers("groups", groups, count)
    used = _used(labels, images, finite_rows(maps), folds)
    kinds, y = labels[used].unique(return_inverse=True)
    if len(kinds) < 2:
        raise InputError(
            f"classes: must hold at least two with {folds} images or more (as many as folds), got {len(kinds)}; give "
            "more images, fewer folds, or coarser classes"
        )
    seen = _seen(maps[used], keep, ties, [seed + i for i in torch.nonzero(used)[:, 0].tolist()])
    generator = torch.Generator().manual_seed(seed)
    fold = _folds(y, images[used], folds, generator)
    dealt = torch.cat([y.unsqueeze(0), _dealt(y, fold, deals, generator)])
    right = _guessed(seen, dealt, fold, len(kinds)) == dealt
    rates = right.double().mean(1)
    correct = torch.zeros(count, dtype=torch.bool)
    correct[used] = right[0]
    limit = float(torch.quantile(rates[1:], 0.95))
    return EncodingCheck(float(rates[0]), float(rates[1:].mean()), limit, correct, used, images)


def _integers(name: str, values: Tensor, count: int) -> Tensor:
    whole = isinstance(values, Tensor) and not (values.is_floating_point() or values.is_complex())
    if not whole or values.shape != (count,):
        got = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise InputError(f"{name}: must be an integer tensor ({count},), one for each map, got {got}")
    return values.detach().cpu().long()


def _used(labels: Tensor, images: Tensor, finite: Tensor, folds: int) -> Tensor:
    """Finite maps of classes with at least ``folds`` images."""
    used = finite.clone()
    for kind in labels.unique():
        own = finite & (labels == kind)
        if len(images[own].unique()) < folds:
            used &= labels != kind
    return used


def _seen(maps: Tensor, keep: float, ties: str, seeds: Seed) -> Tensor:
    """The classifier's input for each map, ``(N, D)`` float64."""
    masks = top_pixels(maps, keep, ties, seeds).double()
    height, width = (min(_CELLS, side) for side in masks.shape[-2:])
    return F.adaptive_avg_pool2d(masks, (height, width)).flatten(1)


def _folds(labels: Tensor, images: Tensor, folds: int, generator: torch.Generator) -> Tensor:
    """The fold of each map: images in random order within each class (an image's first), assigned in turn."""
    names, image = images.unique(return_inverse=True)
    first = torch.full((len(names),), len(labels)).scatter_reduce(0, image, torch.arange(len(labels)), "amin")
    order = torch.randperm(len(names), generator=generator)
    order = order[labels[first[order]].argsort(stable=True)]
    fold = torch.empty(len(names), dtype=torch.long)
    fold[order] = torch.arange(len(names)) % folds
    return fold[image]


def _dealt(labels: Tensor, fold: Tensor, deals: int, generator: torch.Generator) -> Tensor:
    """The labels permuted within each fold, ``(deals, N)``.

    Across folds, a class would be rarer in the training part exactly where it is more frequent in the rest, and
    accuracy would fall below chance.
    """
    keys = fold + torch.rand(deals, len(fold), generator=generator, dtype=torch.float64)
    places = fold.argsort(stable=True).expand(deals, -1)
    return torch.empty_like(places).scatter_(1, places, labels[keys.argsort(1)])


def _guessed(seen: Tensor, dealt: Tensor, fold: Tensor, kinds: int) -> Tensor:
    """The guessed class of each map, for each permutation of the classes, ``(R, N)``; a fold is solved once for all."""
    squares = torch.cdist(seen, seen).square()
    median = squares[squares > 0].median() if bool((squares > 0).any()) else squares.new_tensor(1.0)
    kernel = (-squares / median).exp()
    targets = F.one_hot(dealt, kinds).double()  # (R, N, K)
    guessed = torch.empty_like(dealt)
    for part in fold.unique():
        inside, train = fold == part, fold != part
        values, vectors = torch.linalg.eigh(kernel[train][:, train])
        known = targets[:, train]
        middle = known.mean(1, keepdim=True)
        turned = vectors.T @ (known - middle)
        best = torch.full((len(dealt),), torch.inf, dtype=torch.float64)
        scores = targets.new_zeros(len(dealt), int(inside.sum()), kinds)
        for ridge in _RIDGES:
            inverse = 1 / (values.clamp(min=0) + ridge * len(values))
            weights = vectors @ (inverse.unsqueeze(1) * turned)  # (R, n, K)
            own = (vectors.square() * inverse).sum(1).view(1, -1, 1)  # the diagonal of the inverse
            error = (weights / own).square().mean((1, 2))
            better = error < best
            best = torch.where(better, error, best)
            found = kernel[inside][:, train] @ weights + middle
            scores = torch.where(better.view(-1, 1, 1), found, scores)
        guessed[:, inside] = scores.argmax(2)
    return guessed
