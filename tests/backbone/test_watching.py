"""Dispatch modes of several threads, which torch notes in variables of the whole process."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch.utils import _python_dispatch as notes

from attrib_zoo.backbone.watching import Watching


class Counting(Watching):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def nothing_is_noted_before_and_after():
    before = {name: value for name, value in vars(notes).items() if name.startswith("_is_in") and value is False}
    assert len(before) > 1
    yield
    assert {name: getattr(notes, name) for name in before} == before


class Inside(threading.Thread):
    """A thread that is in a mode from its start until it is told to leave."""

    def __init__(self, mode: Watching) -> None:
        super().__init__()
        self.mode, self.entered, self.told = mode, threading.Event(), threading.Event()

    def __enter__(self) -> Inside:
        self.start()
        assert self.entered.wait(30)
        return self

    def __exit__(self, *error: Any) -> None:
        self.told.set()
        self.join(30)

    def run(self) -> None:
        with self.mode:
            torch.zeros(1)
            self.entered.set()
            self.told.wait(30)


def test_the_first_to_begin_ends_first():
    first, second, other = Counting(), Counting(), Counting()
    with Inside(first) as one:
        with second:
            torch.zeros(1)
            one.__exit__()
            assert notes.is_in_torch_dispatch_mode()
            assert notes.is_in_torch_dispatch_mode(include_infra_modes=False)
        assert not notes.is_in_torch_dispatch_mode()
    with Inside(first), other:
        torch.zeros(1)
    assert first.count == 2
    assert second.count == other.count == 1


def test_functions_are_compiled_after_threads_that_overlapped():
    runs: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        runs.append("compiled")
        return graph

    with Inside(Counting()) as one, Counting():
        one.__exit__()
    torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(1))
    assert runs == ["compiled"]


def test_one_inside_another_and_inside_one_of_torch():
    class Plain(notes.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    outer, inner = Counting(), Counting()
    with Plain():
        with outer:
            with inner:
                torch.zeros(1)
            torch.zeros(1)
        assert notes.is_in_torch_dispatch_mode()
    assert (outer.count, inner.count) == (2, 1)


def test_a_mode_that_ends_by_an_error():
    with pytest.raises(ZeroDivisionError), Counting(), Counting():
        raise ZeroDivisionError
