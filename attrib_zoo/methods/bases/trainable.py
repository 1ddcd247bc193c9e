"""Methods that are trained once for a model and then explain in one forward pass."""

from __future__ import annotations

import copy
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.capture import forward, forward_args, frozen, run, select_args
from attrib_zoo.backbone.grid import Tap
from attrib_zoo.backbone.module import original
from attrib_zoo.backbone.targets import Target, TargetQuery, class_list
from attrib_zoo.errors import BackboneMismatchError, OptionError, check_choice, check_number, warn
from attrib_zoo.masking import at_least_float32
from attrib_zoo.methods.bases.fitted import FittedAttribution
from attrib_zoo.sharing.program import ClassMaps, Enlargement, own_modules
from attrib_zoo.training import distributed, resume, session, validation
from attrib_zoo.training.callbacks import Callback, Watchers, check_callbacks
from attrib_zoo.training.checkpoint import Checkpoint, fingerprint, write
from attrib_zoo.training.data import check_repeatable, total_steps
from attrib_zoo.training.fit import State, Terms, autocast, train
from attrib_zoo.training.maps import begun, check_same, class_count, head_maps, in_parts, is_small
from attrib_zoo.training.schedule import OptimizerFactory, Schedule, check_optimizer
from attrib_zoo.training.vetting import believing
from attrib_zoo.training.watch import Watch

IMAGES_PER_CLASS = 100  # with fewer in a fit, a row of weights for each class costs the maps more than it teaches

_Self = TypeVar("_Self", bound="TrainableAttribution")
_SCHEDULES = ("auto", "paper", "short")


class TrainableAttribution(FittedAttribution):
    """Base of the methods with ``fit``: trained once for a model, then they explain in one forward pass.

    A small network reads the frozen model's features and returns a map per class, scaled to [0, 1] over space.
    Subclasses define the network (:meth:`build_network`), its loss (:meth:`loss_terms`), its schedule
    (:meth:`choose_schedule`) and what is shown where a mask is 0 (:meth:`baseline_of`).

    Attributes:
        network_: the trained network, in eval mode.
        history_: every step's loss, its parts and the learning rate; validations; warnings.
        class_counts_: ``(K,)``, how many training images the model assigned to each class. The row of a class with 0 is
            untrained.
        n_steps_: optimiser steps taken.
        schedule_: name of the schedule that was used.
    """

    default_epochs: ClassVar[int] = 8

    # ------------------------------------------------------------------ hooks

    @abstractmethod
    def loss_terms(
        self, network: nn.Module, images: Tensor, args: tuple[Any, ...], generator: torch.Generator
    ) -> Terms:
        """The loss of one batch. ``parts["everything"]`` is the loss of showing the whole image."""
        raise NotImplementedError

    @abstractmethod
    def choose_schedule(self, asked: str, steps: int, network: nn.Module, features: Sequence[Tensor]) -> Schedule:
        """The schedule that ``"auto"``, ``"paper"`` or ``"short"`` stands for with this many steps."""
        raise NotImplementedError

    @abstractmethod
    def baseline_of(self, images: Tensor) -> Tensor | float:
        """What is shown where a mask is 0, in standardised space."""
        raise NotImplementedError

    def start_network(
        self, network: nn.Module, images: Tensor, args: tuple[Any, ...], taps: Sequence[Tap], show_progress: bool
    ) -> tuple[dict[str, Any], list[str]]:
        """Initialise a new network from what the model knows.

        Called where :attr:`start_images` asks for images, before the schedule is chosen; returns decisions, as
        :meth:`decide` does, and warnings.
        """
        return {}, []

    def settle(self, images: Tensor, args: tuple[Any, ...], steps: int, saved: Checkpoint | None) -> None:
        """Decide, before anything else of a fit, what depends on its size; ``images`` are the first batch."""

    def unsettle(self) -> None:
        """Take back what :meth:`settle` decided in an earlier fit; called at the start of each."""

    def shows_few(self, images: Tensor, args: tuple[Any, ...], steps: int) -> bool:
        """Whether a fit of so many steps, whose first batch is given, shows too few images to train a row per class."""
        one = select_args(args, torch.zeros(1).long(), len(images))
        return steps * len(images) < IMAGES_PER_CLASS * class_count(forward(self.model, images[:1], one))

    @property
    def start_images(self) -> int:
        """How many images :meth:`start_network` needs; 0 where the network starts from random weights."""
        return 0

    @property
    def most_steps(self) -> int | None:
        """The largest number of steps of a fit without ``epochs`` and ``max_steps``; ``None`` for all of its epochs."""
        return None

    def unasked_steps(self, steps: int) -> int:
        """The steps of a fit without ``epochs`` and ``max_steps``, after :meth:`settle`."""
        return steps

    def decide(
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
        callbacks: Sequence[Callback] = (),
        show_progress: bool = True,
        additional_forward_args: Any = None,
    ) -> _Self:
        """Train the explainer for this model. The model stays frozen, in eval mode, and is given back as it was.

        Labels are not used: the model's own decision on each image is explained. A second fit discards the first; a fit
        that fails leaves the explainer as it was.

        Args:
            loader: yields batches of standardised images ``(N, C, H, W)``, alone, first in a tuple, or in a dict
                under ``"image"``, ``"pixel_values"`` or the like. All images have one size.
            epochs: passes over the loader; ``None`` for the paper's number.
            max_steps: optimiser steps; overrides ``epochs``, and is needed for a loader without a length.
            optimizer: ``"sgd"``, ``"adam"``, ``"adamw"`` or a function from parameter groups to an optimiser;
                ``None`` for the schedule's own.
            lr: maximal learning rate of the cycle; ``None`` for the schedule's own.
            schedule: ``"paper"`` (made for hundreds of thousands of steps), ``"short"``, or ``"auto"``: short below
                20 000 steps, but never with ``recipe="released"``; or a
                :class:`~attrib_zoo.training.schedule.Schedule` of your own.
            val_loader: images for validation after each epoch and at the end: the loss, and AD/IC at 100, 50, 15 %.
            precision: ``None`` (the model's own), ``"bf16-mixed"`` or ``"fp16-mixed"`` for the frozen model's passes.
            seed: fixes initial weights, drawn classes and the loader's order; the global generators stay untouched.
            resume_from: checkpoint of an interrupted fit with the same arguments and a loader of the same shape (the
                file, or the folder given as ``checkpoint_dir``, which may still be empty); the fit continues to bitwise
                the same result on a CPU, and warns if the loader's images differ.
            checkpoint_dir: folder for ``checkpoint.safetensors``, written every ``checkpoint_every`` steps, at the
                end, and when the fit is interrupted: by an error, Ctrl-C, SIGTERM or SIGHUP. It is locked to one fit at
                a time.
            checkpoint_every: steps between checkpoints.
            callbacks: functions called with a :class:`~attrib_zoo.training.callbacks.Progress` after each
                step and each validation, and may stop the fit.
            show_progress: a progress bar with the parts of the loss.
            additional_forward_args: passed to the model after the images, unchanged.

        Returns:
            The explainer itself.

        Raises:
            DataError: the loader yields nothing, something other than images, or images of several sizes; or another
                fit is writing to ``checkpoint_dir``.
            OptionError: an option outside its range.
            TrainingError: the loss is not finite; or another of several processes has stopped or hangs.
            CheckpointError: ``resume_from`` is not a checkpoint of such a fit.
        """
        named, custom = check_optimizer(optimizer)
        asked = _asked(schedule, lr)
        twin = copy.copy(self)  # the fit works on this copy; self changes only once it has succeeded
        twin._fitted, twin._resolved, twin._warned, twin._strict = None, {}, False, True
        twin.unsettle()
        passes, most = (self.default_epochs, twin.most_steps) if epochs is None else (epochs, None)
        steps = total_steps(loader, passes, max_steps, least=0 if twin.start_images else 1, most=most)
        steps = session.agreed_steps(steps)
        check_repeatable(val_loader)
        check_callbacks(callbacks)
        check_number("checkpoint_every", checkpoint_every, least=1)
        folder = None if checkpoint_dir is None else session.writable(checkpoint_dir)
        plan = session.plan_of(
            loader, steps=steps, seed=seed, schedule=asked, optimizer=named, lr=lr, precision=precision
        )
        unasked = epochs is None and max_steps is None
        with session.reserved(folder), session.ground(self.model) as like, autocast(precision, like.device):
            saved = None if resume_from is None else resume.read_resume(twin, resume_from, plan, folder, unasked)
            batches = session.batches_of(loader, seed, like, saved)
            args = forward_args(additional_forward_args)
            twin.settle(batches.peek(), args, steps, saved)
            if unasked:
                plan["steps"] = steps = twin.unasked_steps(steps) if saved is None else saved.facts["plan"]["steps"]
            state, twin._fitted = session.begin(
                twin, batches, args, plan, custom, precision == "fp16-mixed", saved, show_progress
            )
            if saved is not None:
                with believing(saved, "resume_from"):
                    resume.try_out(twin)
            try:
                train(
                    state,
                    lambda network, images, generator: twin._terms(network, images, args, generator),
                    steps,
                    show_progress=show_progress,
                    validate=None
                    if val_loader is None
                    else (lambda: validation.validate(twin, val_loader, seed, like, args)),
                    save=None if folder is None else (lambda: twin._checkpoint(folder, state, plan)),
                    save_every=checkpoint_every,
                    watchers=Watchers(callbacks, twin._explaining(state.network)),
                )
            except KeyboardInterrupt:
                if state.step and state.whole:
                    self.__dict__.update(twin._finished(state).__dict__)
                raise
        self.__dict__.update(twin._finished(state).__dict__)
        validation.judge(state.history)
        return self

    def _terms(self, network: nn.Module, images: Tensor, args: tuple[Any, ...], generator: torch.Generator) -> Terms:
        with self.placed(images, args):
            return self.loss_terms(network, images, args, generator)

    def _explaining(self, network: nn.Module) -> Callable[[Tensor, Any], Tensor]:
        """A function for callbacks that explains in the middle of a fit, without changing it."""
        shown = copy.copy(self)
        shown._warned = True  # no warning that a class has not come up yet

        def explain(images: Tensor, target: Any = None) -> Tensor:
            training = network.training
            network.eval()
            try:
                maps: Tensor = shown.attribute(images, target)
                return maps
            finally:
                network.train(training)

        return explain

    def _so_far(self: _Self, state: State) -> _Self:
        fitted = self._ready()
        fitted.steps, fitted.counts, fitted.history = state.step, state.counts, state.history
        return self

    def _finished(self: _Self, state: State) -> _Self:
        fitted = self._so_far(state)._ready()
        network = fitted.network.eval()
        self.finish_network(network)
        self._watch = Watch(original(self.model), fitted.backbone)
        for parameter in network.parameters():
            parameter.grad = None
        return self

    def _checkpoint(self, folder: Path, state: State, plan: dict[str, Any]) -> None:
        """Write everything that :meth:`save` writes, and what a resumed fit needs."""
        if not distributed.is_first():
            return
        explainer, progress = resume.to_checkpoint(self, self._so_far(state)._ready()), state.snapshot()
        facts = {**explainer.facts, "plan": plan, "state": progress.facts}
        write(folder / resume.CHECKPOINT, Checkpoint({**explainer.tensors, **progress.tensors}, facts))

    # ------------------------------------------------------------------ explain

    def compute_maps(self, inputs: Tensor, query: TargetQuery, args: tuple[Any, ...], show_progress: bool) -> Tensor:
        outputs, features = self._features(inputs, args)
        self._check_model()
        target = self.choose_targets(outputs, query)
        self._warn_unseen(target.classes)
        return self._class_maps(self._network_for(features), features, target)

    def choose_targets(self, outputs: Tensor, query: TargetQuery) -> Target:
        """What is explained: by default the call's targets; a method may contrast them with other classes."""
        return query.resolve(outputs)

    @property
    def rivals(self) -> tuple[int, float]:
        """How many other classes :meth:`choose_targets` subtracts from a plain target, and with which weight."""
        return 0, 0.0

    @staticmethod
    def _class_maps(network: nn.Module, features: Sequence[Tensor], target: Target) -> Tensor:
        """The targets' maps ``(N, T, h, w)``, before smoothing and scaling."""
        rows = target.terms
        found = head_maps(network, features, rows.flatten(1))
        return target.combine(found.unflatten(1, rows.shape[1:]))

    def all_maps(self, outputs: Tensor, maps: Tensor) -> Tensor:
        """The maps ``(N, K, h, w)`` of all classes, from the network's own."""
        return maps

    def program_head(
        self, images: Tensor, taps: Sequence[Tap], outputs: Tensor, features: Sequence[Tensor]
    ) -> nn.Module:
        check_same(type(self).__name__, self._ready(), outputs, taps)
        sizes = [f.shape[-2:] for f in features]
        whole = [max(size[axis] for size in sizes) for axis in (0, 1)]
        places = [Enlargement(size, whole, self.extents(images).of) for size in sizes]
        return ClassMaps(own_modules(self._network_for(features)), places, *self.rivals)

    def some_maps(self, outputs: Tensor, network: nn.Module, features: Sequence[Tensor], classes: Tensor) -> Tensor:
        """The same for the classes ``(M,)`` alone, as ``(N, M, h, w)``; override it together with :meth:`all_maps`."""
        return head_maps(network, features, classes.expand(len(outputs), -1))

    def maps(
        self, inputs: Any, additional_forward_args: Any = None, *, classes: Sequence[int] | Tensor | None = None
    ) -> Tensor:
        """The maps of all classes, or of some, from one forward pass, at the resolution of the layers.

        Many maps are computed in parts, so that they take little more memory than they occupy themselves.

        Args:
            inputs: as in :meth:`attribute`.
            additional_forward_args: as in :meth:`attribute`.
            classes: which ones, in this order; ``None`` for all K.

        Returns:
            ``(N, K, h, w)``, or ``(N, len(classes), h, w)``, in [0, 1], scaled as ``scale`` says; untrained where
            ``class_counts_ == 0``.

        Raises:
            TargetError: the model has no such class.
            InputError: the maps do not fit into the free memory.
        """
        self.check_ready()
        images, _ = self._images(inputs)
        wanted = None if classes is None else class_list(classes, self._ready().num_classes).to(images.device)
        with frozen(self.model), torch.inference_mode(False), torch.no_grad():
            clean = images.clone() if images.is_inference() else images.detach()
            outputs, features = self._features(clean, forward_args(additional_forward_args))
            self._check_model()
            network, features = begun(self._network_for(features), features)
            base = TrainableAttribution
            at_once = type(self).some_maps is base.some_maps and type(self).all_maps is not base.all_maps
            if at_once or (wanted is None and is_small(network, features, self._ready().num_classes)):
                maps = self.all_maps(outputs, head_maps(network, features, None))
                return self._as_asked(maps if wanted is None else maps[:, wanted]).to(images.dtype)
            every = torch.arange(self._ready().num_classes, device=images.device) if wanted is None else wanted
            return in_parts(
                lambda part: self._as_asked(self.some_maps(outputs, network, features, part)), every, images.dtype
            )

    def _features(self, inputs: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, list[Tensor]]:
        """Outputs and features of one pass, checked to be those of the layers that the network was trained on."""
        self._ready()
        taps = self.taps(inputs, args)
        outputs, features = run(self.model, inputs, args, taps)
        check_same(type(self).__name__, self._ready(), outputs, taps)
        return outputs, [at_least_float32(f) for f in features]

    def _check_model(self) -> None:
        """Raise if the model's weights differ from those of the fit, which a call's features cannot show.

        Raises:
            BackboneMismatchError: they differ; only a warning where the explainer was loaded for other weights anyway.
        """
        model = original(self.model)  # a mirror's weights may be copies
        if self._watch is None or not self._watch.noticed(model):
            return
        kind = type(model).__name__
        message = (
            f"{type(self).__name__} was fitted for other weights than this {kind} has now, so its maps would explain a "
            "model that is gone; give the model the weights it was fitted for, or fit again"
        )
        if self._strict:
            raise BackboneMismatchError(
                message + "; save it and load it with strict_backbone=False to use it all the same"
            )
        warn(message)
        self._watch = Watch(model, fingerprint(model))  # one warning for each change

    def _network_for(self, features: Sequence[Tensor]) -> nn.Module:
        return self._ready().network.to(features[0])

    def _warn_unseen(self, rows: Tensor) -> None:
        unseen = [c for c in rows.unique().tolist() if not self.has_map_of(c)]
        if unseen and not self._warned:
            self._warned = True
            warn(
                f"{type(self).__name__}: class {', '.join(map(str, unseen[:5]))}{' ...' if len(unseen) > 5 else ''} "
                "never came up in fit, so its map is untrained; fit on images of it (class_counts_ has the counts)"
            )

    def resolve_layers(self, inputs: Tensor, args: Sequence[Any]) -> tuple[Tap, ...]:
        if self._fitted is None:
            return super().resolve_layers(inputs, args)
        return self._tested(self.named_layers(), inputs, args)


def _asked(schedule: str | Schedule, lr: float | None) -> str | dict[str, Any]:
    """The schedule as it is written to a checkpoint, once it and the learning rate are such."""
    if lr is not None and not lr > 0:
        raise OptionError(f"lr: must be positive, got {lr!r}")
    return schedule.facts() if isinstance(schedule, Schedule) else check_choice("schedule", schedule, _SCHEDULES)
