"""What can go wrong, and under which built-in exception a caller may also catch it.

* AttribZooError
    * InputError (ValueError): images of the wrong rank, type, size or content
    * OptionError (ValueError): a constructor or call option outside its range
    * TargetError (IndexError): no such class, or the wrong number of targets
    * LayerNotFoundError (LookupError): no layer of that name
    * LayerError (ValueError): the layer cannot be explained (not spatial, no gradient path, never ran)
    * UnsupportedModelError (ValueError): the model or its output is of a kind that the method cannot use
    * ModelChangedError (RuntimeError): another thread changed the model's weights during a call
    * NotFittedError (RuntimeError): a trainable method asked for a map before ``fit`` or ``load``
    * TrainingError (RuntimeError): ``fit`` cannot go on, or a run of which another process has stopped
    * DataError (ValueError): a loader, folder or file that cannot be used
    * CheckpointError (ValueError): a checkpoint that is damaged, or of another class or a newer format
        * BackboneMismatchError: a checkpoint that was fitted for other weights

Each message says what must be, what was got, and what to do. The functions below check options, build the phrases that
several messages share, and warn.
"""

from __future__ import annotations

import difflib
import math
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, overload


class AttribZooError(Exception):
    """Base of all errors that this library raises on purpose."""


class InputError(AttribZooError, ValueError):
    """The images are not floating-point ``(N, C, H, W)`` tensors that the model can take."""


class OptionError(AttribZooError, ValueError):
    """An option is outside its range or of the wrong type."""


class TargetError(AttribZooError, IndexError):
    """The target names no output of the model, or there are too few or too many targets."""


class LayerNotFoundError(AttribZooError, LookupError):
    """The model has no layer of that name."""


class LayerError(AttribZooError, ValueError):
    """The layer exists but cannot be explained: not spatial, no path to the score, or it never ran."""


class UnsupportedModelError(AttribZooError, ValueError):
    """The model, or what it returns, is of a kind that the method cannot use."""


class ModelChangedError(AttribZooError, RuntimeError):
    """The model's weights changed during a call, as by another thread's optimiser step."""


class NotFittedError(AttribZooError, RuntimeError):
    """A trainable method was asked for a map before it was fitted or loaded."""


class TrainingError(AttribZooError, RuntimeError):
    """Training cannot go on; the weights are those of the last good step. Or another process of a run has stopped."""


class DataError(AttribZooError, ValueError):
    """A loader, folder or file holds nothing that can be used."""


class CheckpointError(AttribZooError, ValueError):
    """The file is not a checkpoint of this method that this version can read."""


class BackboneMismatchError(CheckpointError):
    """The checkpoint was fitted for a model with other weights."""


# ---------------------------------------------------------------------- options, checked


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> Any:
    """``value`` if it is one of the choices, else an :class:`OptionError` that lists them."""
    if value not in choices:
        raise OptionError(f"{name}: must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


@overload
def check_number(name: str, value: Any, *, least: int, most: float = ..., above: bool = ...) -> int: ...
@overload
def check_number(name: str, value: Any, *, least: float, most: float = ..., above: bool = ...) -> float: ...
def check_number(name: str, value: Any, *, least: float, most: float = math.inf, above: bool = False) -> float:
    """``value`` if it is a finite number from ``least`` (or above it) to ``most``, else an :class:`OptionError`.

    Where ``least`` is an integer, so must the value be; where it is a float, a float is returned.
    """
    whole = isinstance(least, int)
    kind = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if kind and math.isfinite(value) and (value > least if above else value >= least) and value <= most:
        return int(value) if whole else float(value)
    if whole and least == 1 and most == math.inf:
        raise OptionError(f"{name}: must be a positive integer, got {value!r}")
    limits = f"{'above' if above else 'of at least'} {least:g}" + ("" if most == math.inf else f" and at most {most:g}")
    raise OptionError(f"{name}: must be {'an integer' if whole else 'a number'} {limits}, got {value!r}")


# ---------------------------------------------------------------------- pieces of messages, and warnings


def closest(name: str, known: Iterable[str]) -> str:
    """``"; closest: 'a', 'b'"``, or nothing where no name is close."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return "; closest: " + ", ".join(map(repr, close)) if close else ""


def listed(items: Sequence[object], show: int = 3) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(items) - show} more" if len(items) > show else ""
    return ", ".join(map(str, items[:show])) + more


def reason(error: BaseException) -> str:
    """The first sentence of the error at the root of a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    inner = getattr(error, "reason", None) or error
    text = str(getattr(inner, "strerror", None) or inner).strip() or type(error).__name__
    return text.splitlines()[0].split(". ")[0].rstrip(".")[:200]


def aligned(lines: Sequence[Sequence[str]], *, rule: bool = False, right: bool = False) -> list[str]:
    """Lines of cells as columns of text, two spaces apart.

    Args:
        lines: the cells; all lines have the same number.
        rule: underline the first line, the header.
        right: align all columns but the first to the right, as suits numbers.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    drawn = [*lines[:1], *([["-" * width for width in widths]] if rule else []), *lines[1:]]
    return [
        "  ".join(
            cell.rjust(width) if right and place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in drawn
    ]


def html_table(lines: Sequence[Sequence[str]], *, head: bool = False, title: str = "") -> str:
    """Lines of cells as an HTML table, for notebooks.

    Args:
        lines: the cells.
        head: the first line is a header; without it the first column is.
        title: a line above the table.
    """
    style = "text-align: left; padding: .15em .8em .15em 0; font-variant-numeric: tabular-nums;"
    style += " white-space: nowrap;" if head else ""  # on a phone such a table scrolls, and its lines stay lines
    rows = []
    for number, line in enumerate(lines):
        tags = ["th" if (number == 0 if head else place == 0) else "td" for place in range(len(line))]
        cells = [f'<{tag} style="{style}">{escape(cell)}</{tag}>' for tag, cell in zip(tags, line, strict=True)]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    above = f"<b>{escape(title)}</b>" if title else ""
    return f"{above}<table>{''.join(rows)}</table>"


def shown(text: str, most: int | None = None) -> str:
    r"""Text from a file or a file name, made safe for a terminal or a picture.

    Terminal control characters, what cannot be encoded, and what changes the writing direction are escaped (``\x1b``,
    ``\ud800``, ``\u202e``); line breaks and tabs stay where the text may be of any length.

    Args:
        text: any text.
        most: cut to one line of this many characters.
    """
    if most is None:
        return _OBEYED.sub(_escaped, text)
    cut = text if len(text) <= most else text[: most - 1] + "…"
    return _OBEYED.sub(_escaped, cut).replace("\n", r"\n").replace("\t", r"\t")


# Control characters except line breaks and tabs, changes of writing direction, and lone surrogates.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def _escaped(found: re.Match[str]) -> str:
    return found.group().encode("unicode_escape").decode()


def cell(text: str) -> str:
    """Text for a CSV file, with an apostrophe in front of what a spreadsheet would run as a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """A warning that points at the line outside this library from which it was called."""
    level = 1
    while sys._getframe(level).f_globals.get("__name__", "").partition(".")[0] == "attrib_zoo":
        level += 1
    warnings.warn(message, category, stacklevel=level + 1)
