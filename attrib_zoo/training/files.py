"""Files that are written completely or not at all."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

_fcntl: Any
try:
    import fcntl as _fcntl
except ImportError:  # Windows
    _fcntl = None

_PART = re.compile(r"\.[0-9a-f]{12}\.(part|new)")
_FRESH = 60.0  # seconds within which a new file gets its lock
_swept: set[Path] = set()


def write_whole(path: Path, content: str | bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file so that a reader finds either the old content or all of the new one, even after a crash.

    The content goes to a temporary file in the same folder, which then replaces the path. A link stays a link, and a
    replaced file keeps its permissions.

    Args:
        path: the file; its folder must exist.
        content: bytes, text (as UTF-8), or a function that writes to the open file.

    Raises:
        OSError: it cannot be written; the previous file is still there.
    """
    target = Path(os.path.realpath(path))
    _sweep(target.parent)
    # not named after the target, whose name may already have the maximal length
    temporary = target.with_name(f".{secrets.token_hex(6)}.part")
    # until it is locked, so that it is not taken for an abandoned one
    fresh = temporary if _fcntl is None else temporary.with_suffix(".new")
    try:
        with fresh.open("xb") as file:
            _mark(file)
            if fresh != temporary:
                os.rename(fresh, temporary)  # noqa: PTH104  # the rename that matters comes later
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # before the rename, or a crash can leave the new name with no content
            if _fcntl is not None:  # while it is open, so that it stays locked; Windows requires it closed
                _take_place(temporary, target)
        if _fcntl is None:
            _take_place(temporary, target)
    except BaseException:
        for path in (fresh, temporary):
            with suppress(OSError):  # the first error is the one to report
                path.unlink(missing_ok=True)
        raise


def _take_place(temporary: Path, target: Path) -> None:
    if target.exists():
        shutil.copymode(target, temporary)
    temporary.replace(target)


def _mark(file: BinaryIO) -> None:
    """Lock this file as being written, for as long as it is open and the process lives."""
    if _fcntl is not None:
        with suppress(OSError):  # a file system without locks
            _fcntl.flock(file.fileno(), _fcntl.LOCK_EX | _fcntl.LOCK_NB)


def _sweep(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder; once for each process and folder."""
    if _fcntl is None or folder in _swept:
        return
    _swept.add(folder)
    with suppress(OSError):
        for left in [Path(entry.path) for entry in os.scandir(folder) if _PART.fullmatch(entry.name)]:
            with suppress(OSError), left.open("rb") as file:
                _fcntl.flock(file.fileno(), _fcntl.LOCK_EX | _fcntl.LOCK_NB)  # fails while its writer is alive
                if left.suffix == ".part" or time.time() - left.stat().st_mtime > _FRESH:
                    left.unlink()
