"""The encoding check: masks that carry the class are caught, masks that do not are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attrib_zoo.errors import InputError, OptionError
from attrib_zoo.metrics import encoding_check
from attrib_zoo.metrics.encoding import _folds, _guessed

CLASSES = torch.arange(60) % 3


def honest(seed: int = 0, count: int = 60) -> Tensor:
    return torch.rand(count, 7, 7, generator=torch.Generator().manual_seed(seed))


def cheating(seed: int = 0) -> Tensor:
    """One cell of the first row is among the highest: that of the class."""
    maps = honest(seed)
    maps[torch.arange(60), 0, CLASSES] += 1
    maps[torch.arange(60), 0, (CLASSES + 1) % 3] -= 1
    maps[torch.arange(60), 0, (CLASSES + 2) % 3] -= 1
    return maps


def test_maps_without_the_class_are_at_chance() -> None:
    found = encoding_check(honest(), CLASSES)
    assert found.accuracy <= found.limit
    assert found.chance == pytest.approx(1 / 3, abs=0.05)
    assert found.chance < found.limit < 0.55
    assert bool(found.used.all())
    assert found.accuracy == pytest.approx(found.correct.double().mean().item())


def test_maps_that_carry_the_class_are_caught_by_their_shape_alone() -> None:
    found = encoding_check(cheating(), CLASSES)
    assert found.accuracy > 0.9 > found.limit
    scaled = encoding_check((5 * cheating()).exp(), CLASSES)  # the order is all that a mask keeps
    assert torch.equal(scaled.correct, found.correct)
    gap, low, high = found.minus(encoding_check(honest(), CLASSES))
    assert gap == pytest.approx(found.accuracy - encoding_check(honest(), CLASSES).accuracy)
    assert 0 < low <= gap <= high
    assert encoding_check(honest(1), CLASSES).minus(encoding_check(honest(2), CLASSES))[1] < 0


def test_values_below_the_mask_do_not_count() -> None:
    maps = honest()
    keep = maps.flatten(1).argsort(1, descending=True)[:, :8]  # ceil(0.15 * 49)
    masks = torch.zeros(60, 49).scatter_(1, keep, 1.0).view(60, 7, 7)
    told = masks * 10 + 0.001 * CLASSES.view(-1, 1, 1)  # the class, in values alone
    assert torch.equal(encoding_check(told, CLASSES).correct, encoding_check(masks, CLASSES).correct)


def test_the_classifier_is_ridge_regression_with_its_best_ridge_by_leave_one_out() -> None:
    """Against solving for each ridge and each left-out mask again."""
    generator = torch.Generator().manual_seed(3)
    seen = torch.rand(12, 5, generator=generator, dtype=torch.float64)
    labels = torch.arange(12) % 2
    fold = torch.arange(12) % 3
    squares = (seen[:, None] - seen[None]).square().sum(2)
    kernel = (-squares / squares[squares > 0].median()).exp()
    targets = torch.nn.functional.one_hot(labels, 2).double()
    wanted = torch.empty(12, dtype=torch.long)
    for part in range(3):
        train = (fold != part).nonzero()[:, 0]
        mean = targets[train].mean(0)

        def solve(rows: Tensor, ridge: float, mean: Tensor = mean, count: int = len(train)) -> Tensor:
            inner = kernel[rows][:, rows] + ridge * count * torch.eye(len(rows), dtype=torch.float64)
            return torch.linalg.solve(inner, targets[rows] - mean)

        errors = {}
        for ridge in (1e-3, 1e-2, 1e-1, 1.0):
            left = [train[train != row] for row in train]
            missed = [
                targets[row] - mean - kernel[row, rest] @ solve(rest, ridge)
                for row, rest in zip(train, left, strict=True)
            ]
            errors[ridge] = float(torch.stack(missed).square().mean())
        best = min(errors, key=lambda ridge: errors[ridge])
        inside = (fold == part).nonzero()[:, 0]
        wanted[inside] = (kernel[inside][:, train] @ solve(train, best) + mean).argmax(1)
    assert torch.equal(_guessed(seen, labels[None], fold, 2)[0], wanted)


def test_maps_of_one_image_stay_in_one_fold() -> None:
    images = torch.arange(20).repeat_interleave(3)
    fold = _folds(CLASSES, images, 5, torch.Generator().manual_seed(0))
    assert all(len(fold[images == image].unique()) == 1 for image in range(20))
    assert fold.bincount().tolist() == [12] * 5
    alone = _folds(CLASSES, torch.arange(60), 5, torch.Generator().manual_seed(0))
    assert all((alone[kind == CLASSES].bincount() == 4).all() for kind in range(3))


def test_rare_classes_and_maps_that_are_not_finite_are_left_out() -> None:
    maps, classes = honest(), CLASSES.clone()
    classes[:3] = 9
    maps[7] = torch.nan
    found = encoding_check(maps, classes)
    assert (~found.used).nonzero()[:, 0].tolist() == [0, 1, 2, 7]
    assert not bool(found.correct[~found.used].any())


def test_the_seed_fixes_everything() -> None:
    first, again, other = (encoding_check(honest(), CLASSES, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.correct, again.correct)
    assert (first.accuracy, first.chance, first.limit) == (again.accuracy, again.chance, again.limit)
    assert first.chance != other.chance


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"classes": CLASSES[:9]}, InputError, "classes: must be an integer tensor"),
        ({"classes": CLASSES.double()}, InputError, "classes: must be an integer tensor"),
        ({"classes": torch.arange(60)}, InputError, "at least two with 5 images or more"),
        ({"classes": CLASSES * 0}, InputError, "at least two with 5 images"),
        ({"groups": torch.arange(9)}, InputError, "groups: must be an integer tensor"),
        ({"folds": 1}, OptionError, "folds"),
        ({"keep": 0.0}, OptionError, "keep"),
        ({"deals": 3}, OptionError, "deals"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        encoding_check(honest(), **{"classes": CLASSES, **change})


def test_checks_of_other_images_are_not_compared() -> None:
    with pytest.raises(InputError, match="other: must be of the same 60 masks"):
        encoding_check(honest(), CLASSES).minus(encoding_check(honest()[:30], CLASSES[:30]))
