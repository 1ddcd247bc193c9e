"""The training loop: steps, progress, validation, checkpoints, resumption."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo.errors import OptionError, TrainingError, warn
from attrib_zoo.training import distributed
from attrib_zoo.training.callbacks import STEP, VALIDATION, Watchers
from attrib_zoo.training.checkpoint import Checkpoint, alike, finite, flatten_optimizer, restore_optimizer
from attrib_zoo.training.data import Batches, checksum
from attrib_zoo.training.history import History
from attrib_zoo.training.schedule import Falling
from attrib_zoo.training.signals import held, stoppable

_VALIDATIONS = 5  # in a fit that keeps its best state, apart from the last one
PRECISIONS = (None, "bf16-mixed", "fp16-mixed")


@dataclass
class Terms:
    """One step's loss, its parts for the log, and the class counts of the images."""

    loss: Tensor
    parts: dict[str, Tensor]
    classes: Tensor  # (N,) the class that each image was masked for


Objective = Callable[[nn.Module, Tensor, torch.Generator], Terms]


@dataclass
class State:
    """Everything that changes during a fit."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    cycle: torch.optim.lr_scheduler.OneCycleLR | Falling
    generator: torch.Generator
    batches: Batches
    counts: Tensor
    scaler: torch.amp.GradScaler | None = None
    step: int = 0
    history: History = field(default_factory=History)
    whole: bool = True  # false while the weights are being changed
    keep_best: bool = False  # end with the state whose validation loss was the lowest
    best: dict[str, Tensor] = field(default_factory=dict)
    best_loss: float = math.inf
    _boundary: tuple[Tensor, dict[str, Tensor], dict[str, Any]] | None = None
    _last: Tensor | None = None  # the batch before the boundary
    _statistics: list[Tensor] = field(default_factory=list)

    def mark(self) -> None:
        """Remember the generators, the position in the data and the running statistics between two steps."""
        self._boundary = (self.generator.get_state(), *self.batches.state())
        self._last = self.batches.last
        self._statistics = [buffer.clone() for buffer in self.network.buffers()]

    @torch.no_grad()
    def rewind(self) -> None:
        """Undo the effect of an unfinished step's forward pass on the running statistics."""
        for buffer, before in zip(self.network.buffers(), self._statistics, strict=True):
            buffer.copy_(before)

    def snapshot(self) -> Checkpoint:
        """The state between two steps, ready to be written."""
        tensors, optimizer = flatten_optimizer(self.optimizer)
        if self._boundary is None:
            self.mark()
        generator, loader, order = self._boundary  # type: ignore[misc]  # set by mark
        named = {f"optimizer/{k}": v for k, v in tensors.items()}
        named |= {**loader, "generator": generator, **self.history.tensors()}
        named |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        cycle = {k: v for k, v in self.cycle.state_dict().items() if isinstance(v, (int, float, str, bool, list))}
        facts = {
            "step": self.step,
            "order": {**order, "last": checksum(self._last)},
            "optimizer": optimizer,
            "cycle": cycle,
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "best_loss": self.best_loss if self.best else None,
            **self.history.facts(),
        }
        return Checkpoint(named, facts)

    def restore(self, saved: Checkpoint) -> None:
        """Continue from :meth:`snapshot`; the network's own weights are loaded by the caller."""
        facts = saved.facts
        restore_optimizer(self.optimizer, saved.part("optimizer"), facts["optimizer"])
        _check_cycle(facts["cycle"], self.cycle.state_dict(), facts["step"])
        self.cycle.load_state_dict(facts["cycle"])
        self.generator.set_state(saved.tensors["generator"])
        if self.scaler is not None and facts["scaler"] is not None:
            self.scaler.load_state_dict(facts["scaler"])
        self.best, best_loss = saved.part("best"), facts.get("best_loss")
        self.best_loss = math.inf if best_loss is None else best_loss + 0.0
        self.step = facts["step"]
        self.history = History.read(saved.tensors, facts)
        if len(self.history) != self.step:
            raise ValueError(f"a history of {len(self.history)} steps, at step {self.step}")


_MOVES = ("last_epoch", "_step_count", "_last_lr")  # of a scheduler's state; everything else follows from the schedule


def _check_cycle(saved: dict[str, Any], own: dict[str, Any], step: int) -> None:
    """Raise if a saved learning rate is not that of this schedule at this step."""
    plain = json.loads(json.dumps({name: own[name] for name in own if name in saved}))
    for name, value in saved.items():
        moves = name in _MOVES and alike(value, own.get(name)) and (name == "_last_lr" or value <= step + 1)
        if name not in own or not (moves or name.startswith("_get_lr") or value == plain[name]):
            raise ValueError(f"the learning rate's {name} cannot be {value!r}")


def autocast(precision: str | None, device: torch.device) -> AbstractContextManager[Any]:
    """The context in which the frozen model runs in lower precision; the head and the loss never do."""
    if precision not in PRECISIONS:
        raise OptionError(f"precision: must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")
    if precision is None:
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16-mixed" else torch.float16)


def train(
    state: State,
    objective: Objective,
    steps: int,
    *,
    show_progress: bool,
    validate: Callable[[], dict[str, float]] | None = None,
    save: Callable[[], None] | None = None,
    save_every: int = 500,
    watchers: Watchers | None = None,
) -> None:
    """Run the loop from ``state.step`` to ``steps``; on any error the last complete step is saved first.

    Args:
        state: where to start; changed in place.
        objective: the loss of a batch.
        steps: where to stop.
        show_progress: draw a progress bar.
        validate: measures the current network, called after each epoch and at the end.
        save: writes :meth:`State.snapshot`.
        save_every: steps between two checkpoints.
        watchers: the callbacks for steps and validations, which may end the loop.
    """
    watchers = watchers or Watchers()
    stop: str | None = None
    _start_together(state)
    distributed.align(state.network)
    state.network.train()
    state.mark()
    with _progress(steps, state.step, show_progress) as report, stoppable() if save is not None else nullcontext():
        try:
            while state.step < steps:
                if stop is None and validate is not None and _is_due(state, steps):
                    stop = _validate(state, validate, watchers, steps)
                if stop is not None:
                    state.history.messages.append(f"fit: stopped after {state.step} of {steps} steps: {stop}")
                    break
                terms = _next_loss(state, objective)
                if terms is None:
                    state.rewind()  # another process ran out of batches, after this one's forward pass
                    tell(state.history, _ended_early(state, steps))
                    break
                numbers = _one_step(state, terms)
                report(numbers)
                if save is not None and state.step % save_every == 0:
                    save()
                stop = watchers.tell(STEP, state.step, steps, numbers)
            distributed.share(state.network)
            state.network.eval()
            if validate is not None:
                _validate(state, validate, watchers, steps)
                _return_to_best(state)
            if save is not None:
                save()
        except BaseException:
            if state.whole:
                state.rewind()
                if save is not None and state.step > 0 and finite(state.network.state_dict()):
                    save()
            raise


def _start_together(state: State) -> None:
    """Raise in every process if they are at different steps; later in the fit they would hang."""
    found = distributed.everyone(state.step, patient=False)
    if len(set(found)) > 1:
        raise TrainingError(
            f"resume_from: all processes must start at the same step, got {', '.join(map(str, found))}; give each of "
            "them the same checkpoint, in a folder that all can read"
        )


def _next_loss(state: State, objective: Objective) -> Terms | None:
    """The loss of the next batch; ``None`` if the loader is exhausted, here or in another process."""
    with distributed.meeting() as together:
        images = next(state.batches, None)
        terms = None if images is None else objective(state.network, images, state.generator)
        together.ready = terms is not None
    return terms if together.all_ready else None


def _one_step(state: State, terms: Terms) -> dict[str, float]:
    names = list(terms.parts)
    values = torch.stack([terms.loss.detach(), *(terms.parts[name].detach() for name in names)]).double()
    numbers = dict(zip(["loss", *names], distributed.mean(values).tolist(), strict=True))
    bad = [name for name, value in numbers.items() if not math.isfinite(value)]
    if bad:
        raise TrainingError(
            f"fit: the loss must be finite, but at step {state.step + 1} {', '.join(bad)} is not ({numbers}); the "
            "weights are those of the step before: lower lr, or use precision=None"
        )
    (terms.loss if state.scaler is None else state.scaler.scale(terms.loss)).backward()
    distributed.average_gradients(state.network)
    seen = distributed.total(torch.bincount(terms.classes, minlength=len(state.counts)))
    with held():
        state.whole = False
        numbers["lr"] = state.optimizer.param_groups[0]["lr"]
        state.step += 1
        if _update(state) and state.step < state.cycle.total_steps:
            state.cycle.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.counts += seen.cpu()
        state.history.add(numbers)
        state.mark()
        state.whole = True
    return numbers


def _update(state: State) -> bool:
    """Update the weights; ``False`` if the scaler skipped the step because a gradient overflowed."""
    if state.scaler is None:
        state.optimizer.step()
        return True
    scale = state.scaler.get_scale()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    return state.scaler.get_scale() >= scale


def _validate(state: State, validate: Callable[[], dict[str, float]], watchers: Watchers, steps: int) -> str | None:
    """Measure the network, unless this was done at this step (before an interruption); the reason to stop, if any."""
    done = state.history.validation
    if done and done[-1]["step"] == state.step:
        return None
    training = state.network.training
    state.network.eval()
    try:
        with torch.no_grad():
            found = validate()
        done.append({"step": float(state.step), **found})
        if state.keep_best and found.get("loss", math.inf) < state.best_loss:
            state.best_loss = found["loss"]
            state.best = {name: tensor.detach().clone() for name, tensor in state.network.state_dict().items()}
        return watchers.tell(VALIDATION, state.step, steps, found)
    finally:
        state.network.train(training)


def _is_due(state: State, steps: int) -> bool:
    """Whether the network is validated before this step: at epochs and, where the best state is kept, often enough."""
    if state.keep_best:
        return state.step % max(1, steps // _VALIDATIONS) == 0
    return state.step > 0 and state.batches.between_epochs


def _return_to_best(state: State) -> None:
    """If the best state is kept and was not the last, return to it with a warning."""
    losses = {int(entry["step"]): entry["loss"] for entry in state.history.validation}
    if not state.best or losses[max(losses)] <= state.best_loss:
        return
    state.network.load_state_dict(state.best)
    step = min(losses, key=lambda step: losses[step])
    if step and losses[max(losses)] < 1.01 * state.best_loss:  # practically as good: nothing to report
        return
    kept = "nothing that was trained is kept" if step == 0 else f"the explainer is that of step {step}"
    tell(
        state.history,
        f"fit: validation was best after {step} of {state.step} steps (loss {state.best_loss:.4g}, at the end "
        f"{losses[max(losses)]:.4g}), training beyond it did not pay: {kept}",
    )


def _ended_early(state: State, steps: int) -> str:
    return (
        f"fit: the loader ended after {state.step} of {steps} steps and cannot start again; the learning rate has not "
        "come down: pass a loader that can be iterated more than once, or max_steps as it is"
    )


def tell(history: History, message: str) -> None:
    """Warn, and keep the warning in the history."""
    history.messages.append(message)
    warn(message)


@contextmanager
def _progress(steps: int, start: int, show: bool) -> Iterator[Callable[[dict[str, float]], None]]:
    if not (show and distributed.is_first()) or start >= steps:
        yield lambda numbers: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=steps, initial=start, desc="fit", unit="step", mininterval=0.5) as bar:

        def report(numbers: dict[str, float]) -> None:
            shown = {k: f"{v:.3g}" for k, v in numbers.items() if k not in ("everything", "lr")}
            bar.set_postfix(shown, refresh=False)
            bar.update()

        yield report
