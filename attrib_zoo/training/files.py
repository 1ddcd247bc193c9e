"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, content: str | bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file so that whoever opens it finds the old content or all of the new one, even after a crash.

    The content goes to a temporary file in the same folder, which then takes the path's place. A link stays a link,
    and a file that is replaced keeps its permissions.

    Args:
        path: the file; its folder must exist.
        content: bytes, text (as UTF-8), or a function that writes to the open file.

    Raises:
        OSError: it cannot be written; what stood at the path before is still there.
    """
    target = Path(os.path.realpath(path))
    # not named after the target, whose name may be as long as the file system allows
    temporary = target.with_name(f".{secrets.token_hex(6)}.part")
    try:
        with temporary.open("xb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # before the rename, or a crash can leave the new name with no content
        if target.exists():
            shutil.copymode(target, temporary)
        temporary.replace(target)
    except BaseException:
        with suppress(OSError):  # the first error is the one to report
            temporary.unlink(missing_ok=True)
        raise
