"""Options of constructors and functions, checked: the value, or an error that says what it must be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, overload

from attrib_zoo.errors import OptionError


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
