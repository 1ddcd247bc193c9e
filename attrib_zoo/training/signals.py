"""Signals that ask a run to stop: they wait while something is saved, and SIGTERM and SIGHUP act like Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STOPPING = tuple(
    number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None
)
"""Ctrl-C, what schedulers and ``kill`` send, and what a closed terminal sends."""


class Stopped(KeyboardInterrupt):
    """A run was asked to stop; ``signal`` is the name of the signal where it was not Ctrl-C."""

    def __init__(self, *said: str, signal: str | None = None) -> None:
        super().__init__(*said)
        self.signal = signal


class _Guard:
    """The state of signal handling in one process."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.held = 0  # depth of nested blocks that must not be interrupted
        self.waiting: int | None = None
        self.stopping = False  # after the first signal, further ones are ignored
        self.before: dict[int, Any] = {}

    def __call__(self, number: int, frame: Any) -> None:
        if os.getpid() != self.process:  # a loader's worker, which inherited this handler
            raise KeyboardInterrupt
        if self.stopping:
            return
        if self.held:
            self.waiting = number
            return
        self.stop(number)

    def stop(self, number: int) -> None:
        before = self.before.get(number)
        if callable(before) and before is not signal.default_int_handler:  # the user's own handler, which may continue
            self.waiting = None
            before(number, None)
            return
        self.stopping = True
        raise Stopped(signal=None if number == signal.SIGINT else signal.Signals(number).name)

    def release(self) -> None:
        self.held -= 1
        if not self.held and self.waiting is not None and not self.stopping:
            number, self.waiting = self.waiting, None
            self.stop(number)


_guard: _Guard | None = None


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise :class:`KeyboardInterrupt` like Ctrl-C, once: further ones are dropped.

    So whatever is saved on the way out is saved, however often Ctrl-C is pressed. The caller's own handlers stay in
    charge if there are any, and ignored signals stay ignored (``nohup``). Threads other than the main one get no
    signals, and nothing changes for them. May be nested; the outermost block restores the handlers.
    """
    global _guard
    if _guard is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    guard = _Guard()
    try:
        _guard = guard
        for number in STOPPING:
            before = signal.getsignal(number)
            if before in (None, signal.SIG_IGN):  # set outside Python, or ignored
                continue
            guard.before[number] = before
            signal.signal(number, guard)
        yield
    finally:
        _guard = None
        for number, before in guard.before.items():
            signal.signal(number, before)


@contextmanager
def held() -> Iterator[None]:
    """Inside, Ctrl-C waits, and in :func:`stoppable` the other signals too; they are delivered when the block ends."""
    guard = _guard
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if guard is not None:
        guard.held += 1
        try:
            yield
        finally:
            guard.release()
        return
    with _held_alone():
        yield


@contextmanager
def _held_alone() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        yield
        return
    caught: list[tuple[Any, ...]] = []
    collect: Callable[..., None] = lambda *event: caught.append(event)  # noqa: E731
    signal.signal(signal.SIGINT, collect)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if caught:
        handler(*caught[0])


def stay_deaf() -> None:
    """Ignore stop signals from here on; for a command that has been stopped and is finishing."""
    if threading.current_thread() is threading.main_thread():
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)
