"""Which images are for validation and which for testing: drawn with a seed, or named in lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from attrib_zoo.errors import DataError, OptionError, listed, reason
from attrib_zoo.training.files import write_whole


@dataclass(frozen=True)
class Split:
    """Positions in a sequence of images, in the order in which they are used.

    Attributes:
        validation: of the images that training is validated on.
        test: of the images that are measured.
    """

    validation: list[int]
    test: list[int]


def draw(names: Sequence[str], validation: int = 2000, test: int = 2000, seed: int = 0) -> Split:
    """Two disjoint random sets, independent of the folders that hold the images.

    The names alone, sorted, and the seed decide; a larger test set begins with the smaller one, so that a run can be
    continued with more images.

    Raises:
        DataError: fewer images than both sets together.
    """
    if validation + test > len(names):
        raise DataError(
            f"splits: {validation} validation and {test} test images are {validation + test}, got {len(names)}; "
            "give the whole validation set, or ask for fewer with --test-images and --val-images"
        )
    in_order = sorted(range(len(names)), key=lambda i: names[i])
    drawn = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    places = [in_order[i] for i in drawn]
    return Split(places[len(places) - validation :], places[:test])


def choose(
    names: Sequence[str],
    validation: int = 2000,
    test: int = 2000,
    seed: int = 0,
    *,
    val_list: Path | None = None,
    test_list: Path | None = None,
) -> Split:
    """The sets that the lists name; a set without a list is drawn from the other images.

    Raises:
        DataError: a list cannot be read or names missing images, or the sets overlap.
    """
    given_val = None if val_list is None else _places(val_list, names)
    given_test = None if test_list is None else _places(test_list, names)
    both = sorted(set(given_val or ()) & set(given_test or ()))
    if both:
        raise DataError(
            f"splits: validation and test must not share images, got {len(both)} in both lists "
            f"({listed([names[i] for i in both])})"
        )
    taken = {*(given_val or ()), *(given_test or ())}
    rest = [i for i in range(len(names)) if i not in taken]
    found = draw(
        [names[i] for i in rest],
        0 if given_val is not None else validation,
        0 if given_test is not None else test,
        seed,
    )
    return Split(
        [rest[i] for i in found.validation] if given_val is None else given_val,
        [rest[i] for i in found.test] if given_test is None else given_test,
    )


def read_list(path: Path) -> dict[str, int | None]:
    """A text file with an image name on each line, followed by its class index where known.

    Folders and the suffix of a name do not count: ``val/n01440764/ILSVRC2012_val_00000293.JPEG 0`` names the same
    image as ``ILSVRC2012_val_00000293``.

    Raises:
        DataError: it is not such a file, or a name appears twice.
    """
    form = "it must be a text file of lines 'NAME' or 'NAME LABEL', LABEL a class index from 0"
    try:
        lines = [line.split() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"list: cannot read '{path}' ({reason(error)}); {form}") from error
    found: dict[str, int | None] = {}
    for words in lines:
        if len(words) > 2 or (len(words) == 2 and not words[1].isdecimal()):
            raise DataError(f"list: '{path}' holds the line {' '.join(words)!r}; {form}")
        key = Path(words[0]).stem
        if key in found:
            raise DataError(f"list: '{path}' names {key} twice; name every image once")
        found[key] = int(words[1]) if len(words) == 2 else None
    if not found:
        raise DataError(f"list: '{path}' is empty; {form}")
    return found


def _places(path: Path, names: Sequence[str]) -> list[int]:
    """The positions of a list's images among the names."""
    place = {Path(name).stem: i for i, name in enumerate(names)}
    wanted = read_list(path)
    missing = [name for name in wanted if name not in place]
    if missing:
        raise DataError(f"list: '{path}' names {len(missing)} images that are not in the data ({listed(missing)})")
    return [place[name] for name in wanted]


def write_list(path: Path, names: Sequence[str], labels: Sequence[int] | None) -> None:
    """Write a list that :func:`read_list` reads."""
    if labels is not None and len(labels) != len(names):
        raise OptionError(f"labels: must be one for each of {len(names)} names, got {len(labels)}")
    lines = names if labels is None else [f"{name} {label}" for name, label in zip(names, labels, strict=True)]
    write_whole(path, "\n".join(lines) + "\n")
