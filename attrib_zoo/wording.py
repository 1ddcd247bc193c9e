"""Pieces of error messages, and warnings."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable, Sequence


def closest(name: str, known: Iterable[str]) -> str:
    """``"; closest: 'a', 'b'"``, or nothing where no name is close."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return "; closest: " + ", ".join(map(repr, close)) if close else ""


def listed(items: Sequence[object], show: int = 3) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(items) - show} more" if len(items) > show else ""
    return ", ".join(map(str, items[:show])) + more


def reason(error: BaseException) -> str:
    """The first sentence of what lies at the bottom of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    inner = getattr(error, "reason", None) or error
    text = str(getattr(inner, "strerror", None) or inner).strip() or type(error).__name__
    return text.splitlines()[0].split(". ")[0].rstrip(".")[:200]


def warn(message: str) -> None:
    """A ``UserWarning`` that points at the line outside this library from which it was called."""
    level = 1
    while sys._getframe(level).f_globals.get("__name__", "").partition(".")[0] == "attrib_zoo":
        level += 1
    warnings.warn(message, UserWarning, stacklevel=level + 1)
