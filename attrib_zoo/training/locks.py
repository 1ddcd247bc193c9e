"""One run at a time in a folder or on a file: the second one learns who holds the lock."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from attrib_zoo.errors import DataError, reason

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows has no such locks; nothing is locked there
    fcntl = None

NAME = ".attrib-zoo.lock"
"""The file that holds a folder; it is there for as long as a run is, or was when it was killed."""

_PATIENCE = 2.0  # seconds within which the lock of a dead or leaving owner must become free
_held: set[Path] = set()  # by this process, which its own locks do not shut out
_gate = threading.Lock()


@contextmanager
def hold(place: str | os.PathLike[str], doing: str, option: str = "output") -> Iterator[None]:
    """Lock a folder, or a file that will be written, for this process until the block ends.

    It is an operating-system lock on an open file, ``.attrib-zoo.lock`` in the folder or ``.NAME.lock`` next to the
    file. The system releases it when the process ends, however it ends; so a file that a killed run left behind locks
    nobody out, and the next run takes it over. A loader's worker processes do not keep it alive. On a file system
    without locks nothing is locked.

    A command that writes into a folder wraps all of its work, from the first look at the folder to the last file::

        folder = writable_folder(options.output)
        with hold(folder, "explain"):
            ...

    Args:
        place: a folder that exists, or a file in one.
        doing: what the holder does, in one word, for the second run's error.
        option: the option that named the path, for the error.

    Raises:
        DataError: another run holds the lock; the message says which process on which machine, since when.
    """
    target = Path(os.path.realpath(place))
    path = target / NAME if target.is_dir() else target.with_name(f".{target.name[:200]}.lock")
    handle = _taken(path, place, doing, option)
    try:
        yield
    finally:
        _free(path, handle)


def _taken(path: Path, place: str | os.PathLike[str], doing: str, option: str) -> int | None:
    """The open file with the lock on it; ``None`` where there are no locks."""
    if fcntl is None:
        return None
    with _gate:
        if path in _held:
            raise _occupied(place, option, "this very process")
        _held.add(path)
    try:
        return _lock(path, place, doing, option)
    except BaseException:
        _held.discard(path)
        raise


def _lock(path: Path, place: str | os.PathLike[str], doing: str, option: str) -> int | None:
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            must = "a folder" if path.name == NAME else "a file in a folder"
            raise DataError(
                f"{option}: must be {must} that can be written, got '{place}' ({reason(error)}); make the folder, make "
                "room, or choose another"
            ) from error
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = _owner(handle)
            os.close(handle)
            if time.monotonic() > end or _lives(owner):
                raise _occupied(place, option, _described(owner)) from None
            time.sleep(0.1)
            continue
        except OSError:  # no locks on this file system
            os.close(handle)
            return None
        if _is_still(path, handle):
            break
        os.close(handle)  # the holder removed the file just after it was opened
    about = {"pid": os.getpid(), "host": socket.gethostname(), "doing": doing, "since": time.time()}
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(about).encode(), 0)
    return handle


def _free(path: Path, handle: int | None) -> None:
    if handle is not None:
        with suppress(OSError):
            path.unlink()  # before the lock is released, so that the next run creates a new file
        os.close(handle)
    _held.discard(path)


def _is_still(path: Path, handle: int) -> bool:
    """Whether the path still leads to the open file."""
    try:
        there, ours = path.stat(), os.fstat(handle)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def _owner(handle: int) -> dict[str, Any]:
    """What the holder wrote about itself; empty if it has not done so yet."""
    try:
        found = json.loads(os.pread(handle, 4096, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _lives(owner: dict[str, Any]) -> bool:
    """Whether waiting for the lock is pointless: its holder is known and not known to be dead."""
    pid = owner.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    if owner.get("host") != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _described(owner: dict[str, Any]) -> str:
    if "pid" not in owner:
        return "another process"
    since = owner.get("since")
    told = time.strftime(", since %Y-%m-%d %H:%M:%S", time.localtime(since)) if isinstance(since, float) else ""
    return f"process {owner['pid']!r} on {owner.get('host')!r} ({owner.get('doing')}{told})"


def _occupied(place: str | os.PathLike[str], option: str, who: str) -> DataError:
    return DataError(
        f"{option}: '{place}' is in use by {who}; wait until it has ended, stop it, or choose another place"
    )
