"""Photographs in files and folders: found, opened upright and in colour, and read in batches."""

from __future__ import annotations

import csv
import itertools
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from attrib_zoo.errors import DataError, InputError, OptionError, reason, warn
from attrib_zoo.metrics import box_masks
from attrib_zoo.models.limits import opened
from attrib_zoo.models.weights import address
from attrib_zoo.visualize import in_colour

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""What counts as an image in a folder; a file that is named is opened whatever it is called."""

_log = logging.getLogger(__name__)


def find_photos(places: Iterable[str | os.PathLike[str]], *, leave_out: Path | None = None) -> list[Path]:
    """All images among files and folders, each once, with folders searched recursively in alphabetical order.

    Args:
        places: files and folders.
        leave_out: a folder that is skipped, such as the output folder of an earlier run.

    Raises:
        DataError: a path does not exist, or a folder has no images.
    """
    return list(each_photo(places, leave_out=leave_out))


def each_photo(places: Iterable[str | os.PathLike[str]], *, leave_out: Path | None = None) -> Iterator[Path]:
    """What :func:`find_photos` finds, one after the other, so that a million paths need not be in memory at once."""
    seen: set[int] = set()  # hashes of their real paths, a tenth of the size of the paths
    for place in map(Path, places):
        if place.is_dir():
            photos = _in_folder(place, leave_out)
            first = next(photos, None)
            if first is None:
                raise DataError(f"no image in the folder '{place}' or below ({' '.join(SUFFIXES)}); give another one")
            photos = itertools.chain([first], photos)
        elif os.path.lexists(place):
            photos = iter([(os.path.realpath(place), place)])
        elif found := address(place):
            raise DataError(f"'{found}' is an address; nothing is downloaded: save the photograph and name the file")
        else:
            raise DataError(f"no file or folder '{place}'; look at the path")
        for real, photo in photos:
            if hash(real) not in seen:
                seen.add(hash(real))
                yield photo


def _in_folder(folder: Path, leave_out: Path | None) -> Iterator[tuple[str, Path]]:
    """The images of a folder and its subfolders, each with its real path; each folder once, whatever links lead to it.

    A broken link is included, like a damaged file; what is not a file (a pipe, a device) is not.
    """
    seen = set() if leave_out is None else {os.path.realpath(leave_out)} - {os.path.realpath(folder)}
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        real = os.path.realpath(place)
        if real in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(place) as listing:
                entries = sorted((entry for entry in listing if not entry.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            raise DataError(
                f"the folder '{place}' cannot be searched ({reason(error)}); allow it, or move it"
            ) from error
        folders = []
        for entry in entries:
            if _is_folder(entry):
                folders.append(place / entry.name)
            elif os.path.splitext(entry.name)[1].lower() in SUFFIXES and _may_be_photo(entry):  # noqa: PTH122  # quick
                whole = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)  # noqa: PTH118
                yield whole, place / entry.name
        waiting += reversed(folders)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _may_be_photo(entry: os.DirEntry[str]) -> bool:
    try:
        if entry.is_file() or (entry.is_symlink() and not Path(entry.path).exists()):
            return True
    except OSError:  # a link to itself
        return True
    _log.warning("left out: '%s' is no file", entry.path)
    return False


def open_photo(path: Path) -> Image:
    """Read a whole image in RGB, rotated upright according to its EXIF data.

    16-bit images are scaled by their full range, floating-point ones from 0 to 1. Animations and multi-page files give
    their first image and a warning.

    Raises:
        DataError: the file is not an image, is damaged, has more pixels than :mod:`attrib_zoo.models.limits` allows, or
            has an undefined white point; the message names it.
    """
    from PIL import ImageOps

    try:
        with opened(path) as file:
            frames = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)  # a camera's JPEG and its previews
            file.seek(0)
            upright = ImageOps.exif_transpose(file)
            upright.format = file.format
            found = in_colour(upright)
        if frames > 1:
            warn(f"'{path}' has {frames} frames or pages; the first is used")
        return found
    except InputError as error:
        raise DataError(f"'{path}' cannot be used: {error}") from error
    except (DataError, OptionError):
        raise
    except Exception as error:  # each of PIL's formats raises errors of its own
        raise _no_image(path, error) from error


def is_photo(path: Path) -> bool:
    """Whether the file starts like an image of an allowed size; quick, since nothing is decoded."""
    try:
        with opened(path):
            return True
    except OptionError:
        raise
    except Exception:  # as above
        return False


def _no_image(path: Path, error: Exception) -> DataError:
    from PIL import UnidentifiedImageError

    why = "unknown format" if isinstance(error, UnidentifiedImageError) else reason(error)
    return DataError(f"'{path}' is no image that can be read ({why}); remove or replace it")


class Photos(Dataset[Tensor]):
    """The photographs as standardised tensors, read on access.

    Args:
        paths: the files.
        transform: PIL image to ``(C, H, W)``.
        skip_bad: an unreadable file is logged and replaced by the next readable one, instead of raising.
    """

    def __init__(self, paths: Sequence[Path], transform: Callable[[Any], Tensor], *, skip_bad: bool = False) -> None:
        self.paths = list(paths)
        self.transform = transform
        self.skip_bad = skip_bad

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        if not -len(self.paths) <= index < len(self.paths):
            raise IndexError(f"photographs are numbered 0..{len(self.paths) - 1}, got {index}")  # ends iteration
        for i in range(len(self.paths)):
            path = self.paths[(index + i) % len(self.paths)]
            try:
                return self.transform(open_photo(path))
            except DataError as error:
                if not self.skip_bad:
                    raise
                _log.warning("skipped: %s", error)
        raise DataError("none of the images can be read; look at the folder")


def read_boxes(path: str | os.PathLike[str]) -> dict[Path, Tensor]:
    """Boxes of objects from a CSV file with the columns path, xmin, ymin, xmax, ymax; an image may have several lines.

    Args:
        path: the file. Paths in it are relative to its folder. Corners are edges in pixels of the upright photograph:
            0, 0, width, height is all of it.

    Returns:
        Absolute path -> boxes ``(M, 4)``.

    Raises:
        DataError: the file cannot be read, lacks a column, or has anything but numbers.
    """
    source, found = Path(path), defaultdict(list)
    try:
        with source.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets start a file with a byte-order mark
            for line in csv.DictReader(file):
                corners = [float(line[name]) for name in ("xmin", "ymin", "xmax", "ymax")]
                found[(source.parent / line["path"]).resolve()].append(corners)
    except OSError as error:
        raise DataError(f"boxes: '{source}' cannot be read ({reason(error)}); look at the path") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"boxes: '{source}' must be a CSV file whose first line is path,xmin,ymin,xmax,ymax and whose others hold "
            f"them, got something else ({reason(error)})"
        ) from error
    return {name: torch.tensor(boxes) for name, boxes in found.items()}


class BoxedPhotos(Dataset[dict[str, Tensor]]):
    """Photographs with the pixels of their boxes: ``{"image": (C, H, W), "masks": (H, W)}``.

    Args:
        photos: the photographs.
        boxes: from :func:`read_boxes`; a photograph without boxes has an empty mask.
        mean: per channel, of the photographs' standardisation.
        std: likewise.
    """

    def __init__(
        self, photos: Photos, boxes: Mapping[Path, Tensor], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.photos, self.boxes, self.mean, self.std = photos, boxes, mean[0], std[0]

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        from PIL import Image

        path = self.photos.paths[index]
        photo = open_photo(path)
        painted = box_masks([self.boxes.get(path.resolve(), torch.zeros(0, 4))], (photo.height, photo.width))[0, 0]
        stencil = Image.fromarray(255 * painted.byte().numpy()).convert("RGB")  # transformed like the photograph
        seen = self.photos.transform(stencil)[0] * self.std + self.mean
        return {"image": self.photos.transform(photo), "masks": seen > 0.5}


_LONGEST = 140  # bytes of a stem: file systems allow 255, and more is appended


def own_stems(paths: Sequence[Path]) -> list[str]:
    """A file name for each photograph, without suffix: its own, cut if very long, and numbered if already taken."""
    short = [cut(path.stem, _LONGEST) for path in paths]
    taken = {stem.casefold() for stem in short}
    used: set[str] = set()
    numbers: dict[str, int] = {}  # the last number used for each name, so that many equal names stay fast
    stems = []
    for own in short:
        stem, number = own, numbers.get(own.casefold(), 1)
        while stem.casefold() in used or (number > 1 and stem.casefold() in taken):
            number += 1
            stem = f"{own}-{number}"
        numbers[own.casefold()] = number
        used.add(stem.casefold())
        stems.append(stem)
    return stems


def cut(name: str, most: int) -> str:
    """The name's first characters, as many as fit into this many bytes in a file system."""
    return os.fsencode(name)[:most].decode(errors="ignore") if len(os.fsencode(name)) > most else name


def writable_folder(path: str | os.PathLike[str]) -> Path:
    """The folder, created if missing, after a test that files can be written there.

    Raises:
        DataError: it cannot be created or written to.
    """
    folder = Path(path)
    probe = folder / f".attrib-zoo-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DataError(f"cannot write into the folder '{folder}' ({reason(error)}); choose another one") from error
    return folder
