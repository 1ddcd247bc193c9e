"""The progress bar of the methods that make many passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(total: int, label: str, unit: str = "pass") -> Iterator[Callable[[int], None]]:
    """A bar on the standard error stream; yields a function that takes the number of steps done since its last call.

    Args:
        total: steps in all.
        label: the bar's name; without one there is no bar.
        unit: what a step is.
    """
    if not label:
        yield lambda _: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=label, unit=unit, leave=False, mininterval=0.5) as bar:

        def step(count: int) -> None:
            bar.update(count)

        yield step
