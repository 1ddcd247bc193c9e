"""Watching a fit: functions called after every step and every validation, which may end it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from attrib_zoo.errors import OptionError, check_number
from attrib_zoo.training import distributed

STEP, VALIDATION = "step", "validation"


@dataclass
class Progress:
    """The state that a callback receives, once after each step and once after each validation.

    Attributes:
        event: ``"step"`` or ``"validation"``.
        step: how many steps have been taken.
        steps: how many there will be, unless a callback stops the fit.
        numbers: for a step ``loss``, its parts and ``lr``; for a validation ``loss``, ``AD(100)``, ``IC(100)`` and so
            on.
    """

    event: str
    step: int
    steps: int
    numbers: dict[str, float]
    _explain: Callable[[Tensor, Any], Tensor] = field(repr=False)
    _stopped: str | None = field(default=None, repr=False)

    def stop(self, why: str = "a callback asked for it") -> None:
        """End the fit after this step; the final validation, checkpoint and warnings still happen."""
        self._stopped = str(why)

    def explain(self, images: Tensor, target: Any = None) -> Tensor:
        """Maps of the explainer in its current state, as from its ``attribute``."""
        return self._explain(images, target)


Callback: TypeAlias = Callable[[Progress], object]
"""Anything that can be called with a :class:`Progress`; what it returns is not looked at."""


class EarlyStopping:
    """A callback that ends a fit whose validations stop improving.

    Args:
        measure: a number of the validations: ``"loss"``, ``"AD(15)"``, ``"IC(15)"`` and so on.
        patience: how many validations in a row may fail to improve on the best.
        least: the smallest improvement that counts.
        rising: whether larger is better; ``None``: true for ``"IC(...)"`` only.
    """

    def __init__(
        self, measure: str = "loss", *, patience: int = 3, least: float = 0.0, rising: bool | None = None
    ) -> None:
        self.measure = measure
        self.patience = check_number("patience", patience, least=1)
        self.least = check_number("least", least, least=0.0)
        self.rising = measure.startswith("IC") if rising is None else bool(rising)
        self.best, self.failed = -math.inf, 0

    def __call__(self, progress: Progress) -> None:
        """Evaluate a validation."""
        if progress.event != VALIDATION:
            return
        if self.measure not in progress.numbers:
            raise OptionError(f"measure: must be one of {', '.join(map(repr, progress.numbers))}, got {self.measure!r}")
        value = progress.numbers[self.measure] * (1 if self.rising else -1)
        better = value > self.best + (self.least if math.isfinite(self.best) else 0.0)
        self.failed = 0 if better else self.failed + 1
        self.best = max(self.best, value) if better else self.best
        if self.failed >= self.patience:
            progress.stop(f"{self.measure} was not better than {abs(self.best):.4g} in {self.failed} validations")


class Watchers:
    """The callbacks of one fit; of several processes the first one calls them, and all learn whether to stop."""

    def __init__(
        self, callbacks: Iterable[Callback] = (), explain: Callable[[Tensor, Any], Tensor] | None = None
    ) -> None:
        self._callbacks = check_callbacks(callbacks)
        self._explain = explain or _nobody

    def tell(self, event: str, step: int, steps: int, numbers: dict[str, float]) -> str | None:
        """Call all of them; returns the reason to stop, or ``None``."""
        if not self._callbacks:
            return None
        reasons: list[str] = []
        if distributed.is_first():
            for callback in self._callbacks:
                progress = Progress(event, step, steps, dict(numbers), self._explain)
                callback(progress)
                reasons += [] if progress._stopped is None else [progress._stopped]
        return next((why for found in distributed.everyone(reasons) for why in found), None)


def check_callbacks(callbacks: Any) -> tuple[Callback, ...]:
    """``callbacks`` if they are functions, else an error that says what came."""
    if callbacks is None:
        return ()
    given = list(callbacks) if isinstance(callbacks, Iterable) else [callbacks]
    for callback in given:
        if not callable(callback) or isinstance(callback, type):
            raise OptionError(
                "callbacks: must be a list of functions that take a training.callbacks.Progress, got "
                f"{callback!r} in it"
            )
    return tuple(given)


def _nobody(images: Tensor, target: Any) -> Tensor:
    raise OptionError("explain: must be asked in a fit of an explainer; here only a network is trained")
