"""Photographs in files and folders: found, opened upright and in colour, and read in batches."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import Dataset

from attrib_zoo.errors import DataError
from attrib_zoo.wording import reason

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""What counts as an image in a folder; a file that is named is opened whatever it is called."""

_log = logging.getLogger(__name__)


def find_photos(places: Iterable[str | os.PathLike[str]], *, leave_out: Path | None = None) -> list[Path]:
    """All images among files and folders, each once, folders searched to the bottom in alphabetical order.

    Args:
        places: files and folders.
        leave_out: a folder that is not searched, where pictures of an earlier run may lie.

    Raises:
        DataError: a place that does not exist, or a folder without images.
    """
    found: dict[Path, Path] = {}
    for place in map(Path, places):
        if place.is_dir():
            photos = _in_folder(place, leave_out)
            if not photos:
                raise DataError(f"no image in the folder '{place}' or below ({' '.join(SUFFIXES)}); give another one")
        elif place.exists():
            photos = [place]
        else:
            raise DataError(f"no file or folder '{place}'; look at the path")
        for photo in photos:
            found.setdefault(photo.resolve(), photo)
    return list(found.values())


def _in_folder(folder: Path, leave_out: Path | None) -> list[Path]:
    without = None if leave_out is None else leave_out.resolve()
    photos: list[Path] = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and Path(place, f).resolve() != without)
        photos += [
            Path(place, f) for f in sorted(files) if Path(f).suffix.lower() in SUFFIXES and not f.startswith(".")
        ]
    return photos


def open_photo(path: Path) -> Image:
    """Read an image whole, turned upright as its camera noted, in RGB.

    Raises:
        DataError: the file is no image, or is damaged; the message names it.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file)
            return upright.convert("RGBA").convert("RGB") if "transparency" in upright.info else upright.convert("RGB")
    except Exception as error:  # each format of PIL has its own kinds
        raise _no_image(path, error) from error


def is_photo(path: Path) -> bool:
    """Whether the file begins as an image does; quick, as nothing is decoded."""
    from PIL import Image

    try:
        with Image.open(path):
            return True
    except Exception:  # as above
        return False


def _no_image(path: Path, error: Exception) -> DataError:
    from PIL import UnidentifiedImageError

    why = "unknown format" if isinstance(error, UnidentifiedImageError) else reason(error)
    return DataError(f"'{path}' is no image that can be read ({why}); remove or replace it")


class Photos(Dataset[Tensor]):
    """The photographs as standardised tensors, read when they are asked for.

    Args:
        paths: the files.
        transform: PIL image to ``(C, H, W)``.
        skip_bad: a file that cannot be read gives its place to the next one that can, and is logged, instead of
            raising.
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


def own_stems(paths: Sequence[Path]) -> list[str]:
    """A file name for each photograph, without suffix: its own, and numbered where an earlier one has it."""
    taken = {path.stem.casefold() for path in paths}
    used: set[str] = set()
    stems = []
    for path in paths:
        stem, number = path.stem, 1
        while stem.casefold() in used or (number > 1 and stem.casefold() in taken):
            number += 1
            stem = f"{path.stem}-{number}"
        used.add(stem.casefold())
        stems.append(stem)
    return stems


def writable_folder(path: str | os.PathLike[str]) -> Path:
    """The folder, made if need be, after a test that files can be written there.

    Raises:
        DataError: it cannot be made or written.
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
