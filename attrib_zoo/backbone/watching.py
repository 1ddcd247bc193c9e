"""Dispatch modes that may be active in several threads at once."""

from __future__ import annotations

import threading
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_lock = threading.Lock()
_active: list[Watching] = []
_found: list[bool] = []


class Watching(TorchDispatchMode):
    """A dispatch mode that leaves nothing behind, whichever thread ends first.

    torch notes for the whole process, not for each thread, that a mode is active, and a mode that ends puts back the
    notes that it found. If the modes of two threads overlap, the second one finds those of the first and leaves them
    for good; then ``torch.compile`` compiles nothing any more. So the last to end puts back what the first one found.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def __enter__(self) -> Any:
        with _lock:
            entered = super().__enter__()  # type: ignore[no-untyped-call]
            if not _active:
                _found[:] = [notes[-1] for notes in self._notes()]
            _active.append(self)
            return entered

    def __exit__(self, *error: Any) -> None:
        with _lock:
            _active.remove(self)
            for notes, found in zip(self._notes(), _found, strict=True):
                notes[-1] = found or bool(_active)
            super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _notes(self) -> list[list[bool]]:
        """What torch puts back at the end of the mode: a list for each note, since a mode may be entered twice."""
        return [kept for name, kept in vars(self).items() if name.startswith("old_") and name.endswith("_flags")]
