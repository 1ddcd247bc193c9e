"""One deliberately wrong class for each fault of a method, and the checks of the contract that must catch it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attrib_zoo.testing import CHECKS, ContractError

PLANTED: list[tuple[type, str, str]] = []
"""(wrong class, name of a check, words of its reason), of all files that have been imported."""


def caught_by(**reasons: str) -> Callable[[type], type]:
    """``check="part of the reason"`` for each check that must catch the class."""

    def register(cls: type) -> type:
        PLANTED.extend((cls, name, words) for name, words in reasons.items())
        return cls

    return register


def planted_in(module: str) -> pytest.MarkDecorator:
    """Parametrise a test with the faults of one file; below the last of its classes."""
    own = [fault for fault in PLANTED if fault[0].__module__ == module]
    assert own, f"no fault is planted in {module}"
    ids = [f"{cls.__name__}-{name}" for cls, name, _ in own]
    return pytest.mark.parametrize(("cls", "name", "words"), own, ids=ids)


def assert_caught(cls: type, name: str, words: str) -> None:
    """The check fails, for the reason that was meant."""
    with pytest.raises(ContractError, match=words or None) as caught:
        CHECKS[name](cls)
    assert list(caught.value.failures) == [name]
    assert cls.__name__ in str(caught.value)
