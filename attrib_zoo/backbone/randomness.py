"""Restoring torch's global generators, which all threads share, after a pass that draws from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from attrib_zoo.backbone.watching import Watching


@contextmanager
def draws_taken_back(device: torch.device) -> Iterator[None]:
    """Reset the global generators of the CPU and of this device, if this thread has drawn from them.

    ``torch.random.fork_rng`` resets them in any case, and so undoes the draws of other threads too, which would then
    get the same numbers again. A model in eval mode hardly ever draws.
    """
    draws = Draws(device)
    try:
        with _Watch(draws):
            yield
    finally:
        draws.take_back()


class Draws:
    """The generators' states before a thread's first draw, for operations that run through :meth:`call`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._before: tuple[Tensor, ...] | None = None

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation; a dispatch mode calls this, so operations of other threads do not pass here."""
        if self._before is not None or torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        before = self._states()
        result = func(*args, **kwargs)
        # attention has the tag for its dropout, which draws nothing in eval mode
        if not all(map(torch.equal, before, self._states())):
            self._before = before
        return result

    def _states(self) -> tuple[Tensor, ...]:
        here = (torch.get_rng_state(),)
        return here if self._device is None else (*here, torch.cuda.get_rng_state(self._device))

    def take_back(self) -> None:
        """Reset the generators if anything was drawn."""
        if self._before is not None:
            torch.set_rng_state(self._before[0])
            if self._device is not None:
                torch.cuda.set_rng_state(self._before[1], self._device)


class _Watch(Watching):
    def __init__(self, draws: Draws) -> None:
        super().__init__()
        self._draws = draws

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._draws.call(func, args, kwargs or {})
