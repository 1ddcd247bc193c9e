"""Methods that are trained once for a model and then explain in one forward pass."""

from __future__ import annotations

import copy
import os
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from attrib_zoo.attribution import check_images, forward_args
from attrib_zoo.backbone.capture import check_gradient, run
from attrib_zoo.backbone.layers.resolve import Grid, Tap
from attrib_zoo.errors import (
    BackboneMismatchError,
    CheckpointError,
    DataError,
    OptionError,
    check_choice,
    check_number,
)
from attrib_zoo.fitted import FittedAttribution, attend, head_dtype
from attrib_zoo.masking import min_max
from attrib_zoo.metrics.confidence import average_drop, increase_in_confidence
from attrib_zoo.training import distributed
from attrib_zoo.training.checkpoint import Checkpoint, fingerprint, read, write
from attrib_zoo.training.data import Batches, check_repeatable, images_of, total_steps
from attrib_zoo.training.fit import State, Terms, autocast, tell, train
from attrib_zoo.training.history import History
from attrib_zoo.training.losses import two_logits
from attrib_zoo.training.schedule import OptimizerFactory, Schedule, build, check_optimizer
from attrib_zoo.training.session import Fitted, averages, class_count, ground

_Self = TypeVar("_Self", bound="TrainableAttribution")
_SCHEDULES = ("auto", "paper", "short")
_FEW_STEPS = {
    "short": (30, "raise max_steps or epochs"),
    "paper": (20_000, "raise epochs, or pass schedule='short'"),
    "released": (20_000, "raise epochs, or pass schedule='short'"),
}


class TrainableAttribution(FittedAttribution):
    """Base of the methods with ``fit``.

    Subclasses say what the network is (:meth:`_network`), what it is trained for (:meth:`_terms`) and with which
    schedule (:meth:`_schedule`).
    """

    default_epochs: ClassVar[int] = 8

    # ------------------------------------------------------------------ hooks

    @abstractmethod
    def _terms(self, network: nn.Module, images: Tensor, args: tuple[Any, ...], generator: torch.Generator) -> Terms:
        """The loss of one batch. ``parts["everything"]`` is the loss of showing the whole image."""
        raise NotImplementedError

    @abstractmethod
    def _schedule(self, asked: str, steps: int, network: nn.Module, features: Sequence[Tensor]) -> Schedule:
        """The schedule that ``"auto"``, ``"paper"`` or ``"short"`` means for so many steps."""
        raise NotImplementedError

    @abstractmethod
    def _baseline(self, images: Tensor) -> Tensor | float:
        """What is seen where a mask is 0, in standardised space."""
        raise NotImplementedError

    def _decide(
        self, taps: Sequence[Tap], images: Tensor, num_classes: int, schedule: Schedule, steps: int
    ) -> dict[str, Any]:
        """JSON-ready decisions that depend on the model, made once per fit."""
        return {}

    # ------------------------------------------------------------------ fit

    def fit(
        self: _Self,
        loader: Iterable[Any],
        *,
        epochs: int | None = None,
        max_steps: int | None = None,
        optimizer: str | OptimizerFactory | None = None,
        lr: float | None = None,
        schedule: str | Schedule = "auto",
        val_loader: Iterable[Any] | None = None,
        precision: str | None = None,
        seed: int = 0,
        resume_from: str | os.PathLike[str] | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 500,
        show_progress: bool = True,
        additional_forward_args: Any = None,
    ) -> _Self:
        """Train the explainer for this model. The model stays frozen, in eval mode, and is given back as it was.

        Labels are not used: the model's own decision on each image is what is explained. A second fit forgets the
        first; a fit that fails leaves the explainer as it was.

        Args:
            loader: yields batches of standardised images ``(N, C, H, W)``, alone, first in a tuple, or in a dict
                under ``"image"``, ``"pixel_values"`` or the like. All images have one size.
            epochs: passes over the loader; ``None`` for the paper's number.
            max_steps: optimiser steps; beats ``epochs``, and is needed for a loader without a length.
            optimizer: ``"sgd"``, ``"adam"``, ``"adamw"`` or a function from parameter groups to an optimiser;
                ``None`` for the schedule's own.
            lr: maximal learning rate of the cycle; ``None`` for the schedule's own.
            schedule: ``"paper"`` (made for hundreds of thousands of steps), ``"short"``, or ``"auto"``: short below
                20 000 steps, but never with ``recipe="released"``; or a
                :class:`~attrib_zoo.training.schedule.Schedule` of your own.
            val_loader: images for validation after each epoch and at the end: the loss, and AD/IC at 100, 50, 15 %.
            precision: ``None`` (the model's own), ``"bf16-mixed"`` or ``"fp16-mixed"`` for the frozen model's passes.
            seed: fixes initial weights, drawn classes and the loader's order; the global generators stay untouched.
            resume_from: checkpoint of an interrupted fit with the same arguments (the file, or the folder given as
                ``checkpoint_dir``); continues to the same bits on CPU.
            checkpoint_dir: folder for ``checkpoint.safetensors``, written every ``checkpoint_every`` steps, at the
                end, and when the fit is interrupted.
            checkpoint_every: steps between checkpoints.
            show_progress: a progress bar with the parts of the loss.
            additional_forward_args: passed to the model after the images, unchanged.

        Returns:
            The explainer itself.

        Raises:
            DataError: the loader yields nothing, something else than images, or images of several sizes.
            OptionError: an option outside its range.
            TrainingError: the loss is not finite.
            CheckpointError: ``resume_from`` is no checkpoint of such a fit.
        """
        named, custom = check_optimizer(optimizer)
        if not isinstance(schedule, Schedule):
            check_choice("schedule", schedule, _SCHEDULES)
        if lr is not None and not lr > 0:
            raise OptionError(f"lr: must be positive, got {lr!r}")
        steps = total_steps(loader, self.default_epochs if epochs is None else epochs, max_steps)
        check_repeatable(val_loader)
        check_number("checkpoint_every", checkpoint_every, least=1)
        folder = None if checkpoint_dir is None else _folder(checkpoint_dir)
        asked = schedule.facts() if isinstance(schedule, Schedule) else schedule
        plan = {"steps": steps, "seed": seed, "schedule": asked, "optimizer": named, "lr": lr}
        plan["precision"] = precision
        twin = copy.copy(self)  # the fit happens here; self changes only when it has gone well
        twin._fitted, twin._resolved, twin._warned = None, {}, False
        saved = None if resume_from is None else twin._read_resume(resume_from, plan)
        with ground(self.model) as like, autocast(precision, like.device):
            batches = Batches(loader, seed, like)
            if saved is not None:
                batches.restore(saved.tensors, saved.facts["state"]["order"])
            args = forward_args(additional_forward_args)
            state = twin._begin(batches, args, plan, custom, precision == "fp16-mixed", saved)
            try:
                train(
                    state,
                    lambda network, images, generator: twin._terms(network, images, args, generator),
                    steps,
                    show_progress=show_progress,
                    validate=None if val_loader is None else (lambda: twin._validation(val_loader, seed, like, args)),
                    save=None if folder is None else (lambda: twin._checkpoint(folder, state, plan)),
                    save_every=checkpoint_every,
                )
            except KeyboardInterrupt:
                if state.step and state.whole:
                    self.__dict__.update(twin._finished(state).__dict__)
                raise
        self.__dict__.update(twin._finished(state).__dict__)
        self._judge(state.history)
        return self

    def _begin(
        self,
        batches: Batches,
        args: tuple[Any, ...],
        plan: dict[str, Any],
        custom: OptimizerFactory | None,
        scaled: bool,
        saved: Checkpoint | None,
    ) -> State:
        """The network, its optimiser and its counters before the first step, or where the checkpoint left them."""
        images = check_images(batches.peek(), type(self).__name__)
        check_gradient(self.model, images, args)
        taps = self.taps(images, args)
        outputs, features = run(self.model, images, args, taps)
        generator = torch.Generator().manual_seed(plan["seed"])
        features = [f.to(head_dtype(f)) for f in features]
        channels = tuple(f.shape[1] for f in features)
        network = self._network(channels, class_count(outputs), generator).to(features[0])
        with torch.autocast(images.device.type, enabled=False):
            asked = plan["schedule"]
            own = Schedule(**asked) if isinstance(asked, dict) else None
            schedule = own or self._schedule(asked, plan["steps"], network, features)
        schedule = replace(
            schedule,
            optimizer=plan["optimizer"] or schedule.optimizer,
            lr=float(schedule.lr if plan["lr"] is None else plan["lr"]),
        )
        layers = tuple((tap.label, tap.grid if _has_hints(self.layers) else None) for tap in taps)
        counts = torch.zeros(class_count(outputs), dtype=torch.long)
        decisions = self._decide(taps, images, len(counts), schedule, plan["steps"])
        if saved is not None:
            _check_layers(layers, saved)
            network.load_state_dict(saved.part("network"))
            schedule, counts = Schedule(**saved.facts["schedule"]), saved.tensors["class_counts"]
            decisions = saved.facts["decisions"]
        optimizer, cycle = build(network, schedule, plan["steps"], custom)
        scaler = torch.amp.GradScaler(images.device.type) if scaled else None
        state = State(network, optimizer, cycle, generator, batches, counts, scaler)
        if saved is not None:
            state.restore(Checkpoint(saved.tensors, saved.facts["state"]))
        elif plan["steps"] < _FEW_STEPS.get(schedule.name, (0, ""))[0]:
            least, advice = _FEW_STEPS[schedule.name]
            tell(
                state.history,
                f"fit: the {schedule.name!r} schedule needs at least {least} steps to train an explainer, got "
                f"{plan['steps']}: {advice}",
            )
        self._fitted = Fitted(
            network=network,
            layers=layers,
            channels=channels,
            counts=state.counts,
            schedule=schedule,
            steps=state.step,
            history=state.history,
            backbone=fingerprint(self.model) if saved is None else saved.facts["backbone"],
            decisions=decisions,
        )
        return state

    def _so_far(self: _Self, state: State) -> _Self:
        fitted = self._ready()
        fitted.steps, fitted.counts, fitted.history = state.step, state.counts, state.history
        return self

    def _finished(self: _Self, state: State) -> _Self:
        network = self._so_far(state)._ready().network.eval()
        self._complete(network)
        for parameter in network.parameters():
            parameter.grad = None
        return self

    def _judge(self, history: History) -> None:
        """Warn where the maps are no better than showing the whole image."""
        if len(history) >= 30 and history.last("loss") >= history.last("everything"):
            tell(
                history,
                f"fit: the loss at the end ({history.last('loss'):.3g}) is not below that of showing the whole image "
                f"({history.last('everything'):.3g}), so the maps say little: train for more steps, with "
                "schedule='short', or try another lr",
            )

    # ------------------------------------------------------------------ validation

    def _validation(self, loader: Iterable[Any], seed: int, like: Tensor, args: tuple[Any, ...]) -> dict[str, float]:
        """Loss and AD/IC of the network as it is, averaged over the images of one pass over the loader."""
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng([]):
            return averages(
                self._measures(images_of(batch).to(device=like.device, dtype=like.dtype), args, generator)
                for batch in loader
            )

    def _measures(self, images: Tensor, args: tuple[Any, ...], generator: torch.Generator) -> dict[str, Tensor]:
        """Per-image measures ``(N,)`` of one batch."""
        terms = self._terms(self._ready().network, images, args, generator)
        outputs, features = self._features(images, args)
        rows = terms.classes.to(images.device).unsqueeze(1)
        maps = min_max(attend(self._network_for(features), features, rows)).to(images.dtype)
        found = {"loss": terms.loss.expand(len(images))}
        if outputs.ndim == 2 and outputs.shape[1] > 1:
            hidden = self._baseline(images)
            call: dict[str, Any] = {
                "target": rows[:, 0],
                "masking": hidden if isinstance(hidden, Tensor) else "standardized",
                "clean": two_logits(outputs).softmax(1).gather(1, rows)[:, 0],
                "additional_forward_args": args,
            }
            for percent in (100, 50, 15):
                call["keep"] = percent / 100
                found[f"AD({percent})"] = 100 * average_drop(self.model, images, maps, **call)
                found[f"IC({percent})"] = 100 * increase_in_confidence(self.model, images, maps, **call)
        return found

    # ------------------------------------------------------------------ checkpoints

    def _checkpoint(self, folder: Path, state: State, plan: dict[str, Any]) -> None:
        """Everything that :meth:`save` writes, and what a resumed fit needs."""
        if not distributed.is_first():
            return
        explainer, progress = self._so_far(state)._to_checkpoint(), state.snapshot()
        facts = {**explainer.facts, "plan": plan, "state": progress.facts}
        write(folder / "checkpoint.safetensors", Checkpoint({**explainer.tensors, **progress.tensors}, facts))

    def _read_resume(self, path: str | os.PathLike[str], plan: dict[str, Any]) -> Checkpoint:
        """A checkpoint of a fit with this class, these options and this plan, for this model."""
        source = Path(path)
        saved = read(source / "checkpoint.safetensors" if source.is_dir() else source)
        facts = saved.facts
        if facts.get("method") != type(self).__name__ or "state" not in facts:
            raise CheckpointError(
                f"resume_from: {source} must be a checkpoint that {type(self).__name__}.fit wrote to checkpoint_dir, "
                f"got a file of {facts.get('method')}{'' if 'state' in facts else ' made by save'}"
            )
        if facts["backbone"] != fingerprint(self.model):
            raise BackboneMismatchError(
                f"resume_from: {source} belongs to a {facts['model']} with other weights; load those weights first"
            )
        mine = {**plan, **self.options()}
        theirs = {**facts["plan"], **facts["options"]}
        differ = [f"{k}={mine[k]!r} (was {theirs.get(k)!r})" for k in mine if mine[k] != theirs.get(k)]
        if differ:
            raise CheckpointError(f"resume_from: must be continued with the same arguments, got {', '.join(differ)}")
        return saved


def _has_hints(layers: Any) -> bool:
    """Whether the user said how a layer is laid out."""
    items = layers if isinstance(layers, (list, tuple)) else [layers]
    return any(isinstance(item, (tuple, Grid, Tap)) for item in items)


def _check_layers(layers: tuple[tuple[str, Grid | None], ...], saved: Checkpoint) -> None:
    mine, theirs = [name for name, _ in layers], [name for name, _ in saved.facts["layers"]]
    if mine != theirs:
        raise CheckpointError(f"resume_from: must be continued with the same layers, got {mine} (was {theirs})")


def _folder(path: str | os.PathLike[str]) -> Path:
    """An existing folder that can be written."""
    folder = Path(path)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise DataError(
            f"checkpoint_dir: must be a folder that exists and can be written, got {folder}; make it, or choose another"
        )
    return folder
