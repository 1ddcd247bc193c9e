"""Tensors in nested outputs: tuples, lists and mappings, in any mix, as modules return and take them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

_ATOMS = frozenset({type(None), bool, int, float, str, Tensor})  # most entries; a test for Mapping is slow


def items(value: Any) -> list[tuple[Any, Any]]:
    """Key and value of every entry of a tuple, list or mapping; nothing for anything else."""
    if type(value) in _ATOMS:
        return []
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    return list(value.items()) if isinstance(value, Mapping) else []


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor, at any depth."""
    if isinstance(value, Tensor):
        yield value
        return
    entries = value if type(value) in (tuple, list) else [entry for _, entry in items(value)]
    for entry in entries:
        if isinstance(entry, Tensor):
            yield entry
        elif type(entry) not in _ATOMS:
            yield from tensors(entry)


def elements(value: Any) -> dict[int | str | None, Tensor]:
    """The tensors at the first level by their key; a tensor that is the value itself has the key ``None``."""
    if isinstance(value, Tensor):
        return {None: value}
    return {place: entry for place, entry in items(value) if isinstance(entry, Tensor)}


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """The same structure with ``function`` applied to every tensor; the original containers are not changed."""
    if isinstance(value, Tensor):
        return function(value)
    if not isinstance(value, (tuple, list, Mapping)):
        return value
    return replaced(value, {place: map_tensors(entry, function) for place, entry in items(value)})


def replaced(value: Any, changes: Mapping[Any, Any]) -> Any:
    """A container of the same class with some entries replaced."""
    if isinstance(value, tuple):
        entries = [changes.get(place, entry) for place, entry in enumerate(value)]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    changed = copy.copy(value)
    for place, entry in changes.items():
        changed[place] = entry
    return changed


def pick(output: Any, element: int | str | None) -> Any:
    """The tensor that a tap means, out of a module's output."""
    return output if element is None else output[element]


def put(output: Any, element: int | str | None, tensor: Tensor) -> Any:
    """A module's output with one element replaced; the original container is not changed."""
    return tensor if element is None else replaced(output, {element: tensor})
