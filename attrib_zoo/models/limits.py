"""How large a photograph may be: refused by the memory that opening it would take, before anything is decoded."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrib_zoo.errors import DataError, OptionError

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 89_478_485
"""Pixels that a photograph may have, or come to have when its shorter side is resized; PIL takes as many."""

VARIABLE = "ATTRIB_ZOO_MAX_PIXELS"
"""The variable of the environment that changes the limit, for the library, the commands and the loader's processes."""

_SHORTER = 512  # pixels: classifiers' preprocessing and displayed pictures resize the shorter side to about this
_pil = threading.Lock()


def most_pixels() -> int:
    """The limit: :data:`MOST_PIXELS`, or the environment's.

    Raises:
        OptionError: the environment variable is not a positive integer.
    """
    said = os.environ.get(VARIABLE)
    if said is None:
        return MOST_PIXELS
    if not said.strip().isdecimal() or int(said) < 1:
        raise OptionError(f"{VARIABLE}: must be a positive whole number of pixels, got {said!r}; unset it, or mend it")
    return int(said)


def pixels_made(width: int, height: int) -> int:
    """The most pixels at once on the way from the file to the model's image.

    The larger of the file's own size and its size once the shorter side is resized: a line of 1 x 5000 pixels becomes
    512 x 2 560 000.
    """
    short, long = sorted((max(width, 1), max(height, 1)))
    return max(short * long, _SHORTER * _SHORTER * long // short)


def check_size(path: Path, width: int, height: int) -> None:
    """Raise where a photograph of this size would take too much memory.

    Raises:
        DataError: it would; the message gives the limit and how to change it.
    """
    made, most = pixels_made(width, height), most_pixels()
    if made > most:
        why = "" if made <= width * height else f", and {made / 1e6:.0f} million when its shorter side is {_SHORTER}"
        raise DataError(
            f"'{path}' has {width} x {height} = {width * height / 1e6:.3g} million pixels{why}, more than the "
            f"{most / 1e6:.0f} million allowed; crop or shrink it, or set {VARIABLE}={made} to allow it"
        )


@contextmanager
def opened(path: Path) -> Iterator[Image]:
    """An image file, opened but not decoded, after checks of its kind and size.

    Raises:
        DataError: the path is not a regular file (but a folder, a pipe, a device), or the image is too large.
    """
    from PIL import Image

    if not stat.S_ISREG(Path(path).stat().st_mode):  # a pipe would wait for a writer
        raise DataError(f"'{path}' must be a file, got a folder, a pipe or a device; give the photograph itself")
    largest = Image.MAX_IMAGE_PIXELS
    with _quiet() if largest is not None and most_pixels() > largest else nullcontext():
        try:
            file: Any = Image.open(path)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DataError(
                f"'{path}' has more than the {most_pixels() / 1e6:.0f} million pixels allowed ({error}); crop or "
                f"shrink it, or set {VARIABLE} to allow it"
            ) from error
    with file:
        check_size(path, *file.size)
        yield file


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, PIL's own limit is off in favour of this one, which the user has raised."""
    from PIL import Image

    with _pil:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before
