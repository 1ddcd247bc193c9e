"""A fit from its first step to its file: how it begins, validates, resumes, and what it leaves in the explainer."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from attrib_zoo.attribution import check_images
from attrib_zoo.backbone.capture import check_gradient, frozen, run
from attrib_zoo.backbone.grid import Grid, Tap
from attrib_zoo.errors import (
    BackboneMismatchError,
    CheckpointError,
    DataError,
    InputError,
    LayerError,
    UnsupportedModelError,
    warn,
)
from attrib_zoo.masking import at_least_float32, free_bytes
from attrib_zoo.metrics.confidence import average_drop, increase_in_confidence
from attrib_zoo.targets import Target, TargetQuery, class_scores
from attrib_zoo.training import distributed
from attrib_zoo.training.checkpoint import Checkpoint, Fitted, alike, fingerprint, read
from attrib_zoo.training.data import Batches, images_of, shape_of
from attrib_zoo.training.fit import State, Terms, tell
from attrib_zoo.training.history import History
from attrib_zoo.training.locks import hold
from attrib_zoo.training.losses import two_logits
from attrib_zoo.training.recipe import as_recipe
from attrib_zoo.training.schedule import OptimizerFactory, Schedule, build
from attrib_zoo.training.vetting import believing, told_unsealed, vet, vet_state

_FEW_STEPS = {
    "short": (30, "raise max_steps or epochs"),
    "paper": (20_000, "raise epochs, or pass schedule='short'"),
    "released": (20_000, "raise epochs, or pass schedule='short'"),
}


class Explainer(Protocol):
    """What a fit needs from an explainer; implemented by ``TrainableAttribution`` of ``methods.bases.trainable``."""

    @property
    def model(self) -> nn.Module:
        """The frozen model."""

    @property
    def layers(self) -> Any:
        """As the user gave them."""

    def taps(self, inputs: Tensor, args: Sequence[Any] = ()) -> tuple[Tap, ...]:
        """The layers, resolved."""

    def placed(self, inputs: Tensor, args: Sequence[Any] = ()) -> AbstractContextManager[None]:
        """Inside, maps are enlarged to the part of the image that their grids cover."""

    def options(self) -> dict[str, Any]:
        """The options of its constructor."""

    def _ready(self) -> Fitted: ...

    def _features(self, inputs: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, list[Tensor]]: ...

    def _network_for(self, features: Sequence[Tensor]) -> nn.Module: ...

    def _as_asked(self, maps: Tensor) -> Tensor: ...

    def choose_targets(self, outputs: Tensor, query: TargetQuery) -> Target:
        """As :class:`TrainableAttribution` has it."""

    def _class_maps(self, network: nn.Module, features: Sequence[Tensor], target: Target) -> Tensor: ...

    def build_network(self, channels: Sequence[int], num_classes: int, generator: torch.Generator | None) -> nn.Module:
        """As :class:`TrainableAttribution` has it."""

    def loss_terms(
        self, network: nn.Module, images: Tensor, args: tuple[Any, ...], generator: torch.Generator
    ) -> Terms:
        """As :class:`TrainableAttribution` has it."""

    def choose_schedule(self, asked: str, steps: int, network: nn.Module, features: Sequence[Tensor]) -> Schedule:
        """As :class:`TrainableAttribution` has it."""

    def baseline_of(self, images: Tensor) -> Tensor | float:
        """As :class:`TrainableAttribution` has it."""

    @property
    def start_images(self) -> int:
        """As :class:`TrainableAttribution` has it."""

    def start_network(
        self, network: nn.Module, images: Tensor, args: tuple[Any, ...], taps: Sequence[Tap], show_progress: bool
    ) -> tuple[dict[str, Any], list[str]]:
        """As :class:`TrainableAttribution` has it."""

    def decide(
        self, taps: Sequence[Tap], images: Tensor, num_classes: int, schedule: Schedule, steps: int
    ) -> dict[str, Any]:
        """As :class:`TrainableAttribution` has it."""


# ---------------------------------------------------------------------- begin


@contextmanager
def ground(model: nn.Module) -> Iterator[Tensor]:
    """The context of a fit: the model frozen, gradients on, the global generators restored afterwards.

    Yields:
        An empty tensor with the model's device and floating-point dtype.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with (
        frozen(model, "fixed") as own,
        torch.random.fork_rng(devices),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        first = next((p for p in own.parameters() if p.is_floating_point()), torch.zeros(0))
        trainable = [parameter for parameter in own.parameters() if parameter.requires_grad]  # of unusual classes
        try:
            for parameter in trainable:
                parameter.requires_grad = False
            yield first.new_zeros(0)
        finally:
            for parameter in trainable:
                parameter.requires_grad = True


def begin(
    explainer: Explainer,
    batches: Batches,
    args: tuple[Any, ...],
    plan: dict[str, Any],
    custom: OptimizerFactory | None,
    scaled: bool,
    saved: Checkpoint | None,
    show_progress: bool = False,
) -> tuple[State, Fitted]:
    """The network, its optimiser and its counters before the first step, or as the checkpoint left them."""
    images = check_images(batches.peek(), type(explainer).__name__)
    started: dict[str, Any] = {}
    told: list[str] = []
    check_gradient(explainer.model, images, args)
    taps = explainer.taps(images, args)
    outputs, features = run(explainer.model, images, args, taps)
    generator = torch.Generator().manual_seed(plan["seed"])
    features = [at_least_float32(f) for f in features]
    channels = _channels(taps, features)
    network = explainer.build_network(channels, class_count(outputs), generator).to(features[0])
    if explainer.start_images and saved is None:
        started, told = explainer.start_network(
            network, batches.peek(explainer.start_images), args, taps, show_progress
        )
    with torch.autocast(images.device.type, enabled=False):
        asked = plan["schedule"]
        own = Schedule(**asked) if isinstance(asked, dict) else None
        schedule = own or explainer.choose_schedule(asked, plan["steps"], network, features)
    schedule = replace(
        schedule,
        optimizer=plan["optimizer"] or schedule.optimizer,
        lr=float(schedule.lr if plan["lr"] is None else plan["lr"]),
    )
    layers = tuple((tap.label, tap.grid if _has_hints(explainer.layers) else None) for tap in taps)
    counts = torch.zeros(class_count(outputs), dtype=torch.long)
    decisions = {**explainer.decide(taps, images, len(counts), schedule, plan["steps"]), **started}
    if saved is not None:
        _check_layers(layers, saved)
        with believing(saved, "resume_from"):
            network.load_state_dict(saved.part("network"))  # after the schedule is chosen, which may set rows to zero
            schedule, counts = Schedule.read(saved.facts["schedule"]), saved.tensors["class_counts"]
            decisions = _decided(saved.facts["decisions"], decisions)
    with nullcontext() if saved is None else believing(saved, "resume_from"):
        optimizer, cycle = build(network, schedule, plan["steps"], custom)
    scaler = torch.amp.GradScaler(images.device.type) if scaled else None
    state = State(network, optimizer, cycle, generator, batches, counts, scaler)
    state.keep_best = explainer.start_images > 0
    for message in told:
        tell(state.history, message)
    if saved is None:
        _tell_few(state.history, schedule.name, plan["steps"])
    else:
        with believing(saved, "resume_from"):
            state.restore(Checkpoint(saved.tensors, saved.facts["state"]))
        for message in batches.news:
            tell(state.history, message)
    fitted = Fitted(
        network=network,
        layers=layers,
        channels=channels,
        counts=state.counts,
        schedule=schedule,
        steps=state.step,
        history=state.history,
        backbone=fingerprint(explainer.model) if saved is None else saved.facts["backbone"],
        decisions=decisions,
    )
    return state, fitted


def _tell_few(history: History, schedule: str, steps: int) -> None:
    """Warn if there are too few steps for a schedule."""
    least, advice = _FEW_STEPS.get(schedule, (0, ""))
    if steps < least:
        tell(
            history,
            f"fit: the {schedule!r} schedule needs at least {least} steps to train an explainer, got {steps}: {advice}",
        )


def _decided(saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The decisions of the fit that is continued, checked to have the form of this fit's own."""
    wrong = [name for name, value in own.items() if not alike(saved[name], value, math.inf, -math.inf)]
    if wrong:
        raise ValueError(f"{wrong[0]} cannot be {saved[wrong[0]]!r}")
    return saved


def _channels(taps: Sequence[Tap], features: Sequence[Tensor]) -> tuple[int, ...]:
    """C of each layer; raises where there is nothing to learn."""
    for tap, feature in zip(taps, features, strict=True):
        if feature.shape[-2:].numel() == 1:
            raise LayerError(
                f"layers: {tap.label!r} has a map of one cell on these images, from which no explainer can learn where "
                "to look; name a layer before it, or fit on larger images"
            )
    return tuple(f.shape[1] for f in features)


def _has_hints(layers: Any) -> bool:
    """Whether the user gave the layout of a layer."""
    items = layers if isinstance(layers, (list, tuple)) else [layers]
    return any(isinstance(item, (tuple, Grid, Tap)) for item in items)


def class_count(outputs: Tensor) -> int:
    """K of ``(N, K)`` logits; 2 for one value per image.

    Raises:
        UnsupportedModelError: the outputs have any other shape.
    """
    if outputs.ndim > 2:
        raise UnsupportedModelError(
            f"model: must return (N, K) logits to fit an explainer, got shape {tuple(outputs.shape)}; wrap it in a "
            "module that gives one score per class"
        )
    return two_logits(outputs).shape[1]


def check_same(name: str, fitted: Fitted, outputs: Tensor, features: Sequence[Tensor]) -> None:
    """Raise if the model's classes or channels differ from those in the fit."""
    if class_count(outputs) != fitted.num_classes:
        raise UnsupportedModelError(
            f"model: must have the {fitted.num_classes} classes that {name} was fitted for, "
            f"got {class_count(outputs)}; fit again for the changed model"
        )
    channels = tuple(f.shape[1] for f in features)
    if channels != fitted.channels:
        raise LayerError(
            f"layers: must have {fitted.channels} channels as in fit, got {channels}; fit again for the changed model"
        )


def head_maps(network: nn.Module, features: Sequence[Tensor], rows: Tensor | None) -> Tensor:
    """The network's maps ``(N, M, h, w)``; it keeps its own precision inside autocast."""
    with torch.autocast(features[0].device.type, enabled=False):
        maps: Tensor = network(features, rows)
    return maps


_SMALL = 64 * 2**20  # bytes of maps that are computed at once
_PARTS = 40  # that the maps of all classes are split into; computing a part takes a few times its size


def is_small(network: nn.Module, features: Sequence[Tensor], classes: int) -> bool:
    """Whether the maps of all classes are small enough to exist several times."""
    one = head_maps(network, features, torch.zeros(len(features[0]), 1, dtype=torch.long, device=features[0].device))
    return one.numel() * one.element_size() * classes <= _SMALL


def in_parts(compute: Callable[[Tensor], Tensor], classes: Tensor, dtype: torch.dtype) -> Tensor:
    """Maps ``(N, M, h, w)`` of the classes ``(M,)``, computed in parts.

    Raises:
        InputError: they do not fit into the free memory.
    """
    first = compute(classes[:1])
    count, _, height, width = first.shape
    size = count * height * width * torch.empty(0, dtype=dtype).element_size()
    free = free_bytes(first.device)
    if free is not None and 1.3 * size * len(classes) > free:
        raise InputError(
            f"inputs: {count} image{'s' * (count > 1)} with maps of {len(classes)} classes, {height} x {width} each, "
            f"take {size * len(classes) / 1e9:.3g} GB, and {free / 1e9:.3g} GB of memory are free; name the classes "
            "that are wanted (classes=[...]), or pass fewer images"
        )
    found = torch.empty(count, len(classes), height, width, dtype=dtype, device=first.device)
    step = max(1, min(len(classes), max(len(classes) // _PARTS, _SMALL // 32 // max(size, 1))))
    for start in range(0, len(classes), step):
        found[:, start : start + step] = compute(classes[start : start + step])
    return found


# ---------------------------------------------------------------------- validate


def validate(
    explainer: Explainer, loader: Iterable[Any], seed: int, like: Tensor, args: tuple[Any, ...]
) -> dict[str, float]:
    """Loss and AD/IC of the current network, averaged over the images of one pass over the loader."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng([]):
        return averages(
            _measures(explainer, images_of(batch).to(device=like.device, dtype=like.dtype), args, generator)
            for batch in loader
        )


def _measures(
    explainer: Explainer, images: Tensor, args: tuple[Any, ...], generator: torch.Generator
) -> dict[str, Tensor]:
    """Per-image measures ``(N,)`` of one batch."""
    with explainer.placed(images, args):
        return _measured(explainer, images, args, generator)


def _measured(
    explainer: Explainer, images: Tensor, args: tuple[Any, ...], generator: torch.Generator
) -> dict[str, Tensor]:
    terms = explainer.loss_terms(explainer._ready().network, images, args, generator)
    outputs, features = explainer._features(images, args)
    rows = terms.classes.to(images.device).unsqueeze(1)
    target = explainer.choose_targets(outputs, TargetQuery(rows[:, 0]))
    found_maps = explainer._class_maps(explainer._network_for(features), features, target)
    maps = explainer._as_asked(found_maps).to(images.dtype)
    found = {"loss": terms.loss.expand(len(images))}
    hidden, score = explainer.baseline_of(images), getattr(explainer, "score", "softmax")
    call: dict[str, Any] = {
        "target": rows[:, 0],
        "masking": hidden if isinstance(hidden, Tensor) else "standardized",
        "score": score,
        "clean": class_scores(outputs, score).gather(1, rows)[:, 0],
        "additional_forward_args": args,
    }
    for percent in (100, 50, 15):
        call["keep"] = percent / 100
        found[f"AD({percent})"] = 100 * average_drop(explainer.model, images, maps, **call)
        found[f"IC({percent})"] = 100 * increase_in_confidence(explainer.model, images, maps, **call)
    return found


def averages(found: Iterable[dict[str, Tensor]]) -> dict[str, float]:
    """Means over images of per-image measures ``(N,)`` that come batch by batch."""
    sums: dict[str, float] = {}
    count = 0
    for measures in found:
        count += len(next(iter(measures.values())))
        for name, values in measures.items():
            sums[name] = sums.get(name, 0.0) + float(values.double().sum())
    return {name: value / count for name, value in sums.items()} if count else {}


def judge(history: History) -> None:
    """Warn if the maps are no better than showing the whole image."""
    compared = "everything" in history.steps  # losses that depend on the order alone have no such bound
    if compared and len(history) >= 30 and history.last("loss") >= history.last("everything"):
        tell(
            history,
            f"fit: the loss at the end ({history.last('loss'):.3g}) is not below that of showing the whole image "
            f"({history.last('everything'):.3g}), so the maps say little: train for more steps, with "
            "schedule='short', or try another lr",
        )


def report(explainer: Explainer, fitted: Fitted) -> str:
    """The fit in a few lines."""
    seen = int((fitted.counts > 0).sum())
    lines = [
        f"{type(explainer).__name__} for {type(explainer.model).__name__}, "
        f"layers {', '.join(n for n, _ in fitted.layers)}",
        f"  steps        {fitted.steps} ({fitted.schedule.name} schedule, {fitted.schedule.optimizer}, "
        f"max lr {fitted.schedule.lr:.3g})",
        f"  images       {int(fitted.counts.sum())}, classes seen {seen} of {fitted.num_classes}",
    ]
    started = [fitted.decisions[name] for name in ("rows", "teacher") if name in fitted.decisions]
    lines += [f"  {'start' if i == 0 else '':12} {text}" for i, text in enumerate(started)]
    if len(fitted.history):
        parts = ", ".join(f"{k} {fitted.history.last(k):.3g}" for k in fitted.history.steps if k != "lr")
        lines.append(f"  last tenth   {parts}")
    if fitted.history.validation:
        last = fitted.history.validation[-1]
        lines.append("  validation   " + ", ".join(f"{k} {v:.4g}" for k, v in last.items() if k != "step"))
    lines += [f"  warning      {message}" for message in fitted.history.messages]
    return "\n".join(lines)


# ---------------------------------------------------------------------- checkpoints and resuming


def to_checkpoint(explainer: Explainer, fitted: Fitted) -> Checkpoint:
    """Everything that makes up a fitted explainer, ready to be written."""
    from attrib_zoo import __version__

    return Checkpoint(
        {**fitted.tensors(), **fitted.history.tensors()},
        {
            "method": type(explainer).__name__,
            "library": __version__,
            "model": type(explainer.model).__name__,
            "options": explainer.options(),
            **fitted.facts(),
        },
    )


CHECKPOINT = "checkpoint.safetensors"
"""The file in ``checkpoint_dir``."""


def read_resume(
    explainer: Explainer, path: str | os.PathLike[str], plan: dict[str, Any], folder: Path | None, any_steps: bool
) -> Checkpoint | None:
    """A checkpoint of a fit with this class, these options and this plan (except its steps), for this model.

    ``None``, with a warning, for a folder in which no fit has written a checkpoint yet: an empty one, or the one where
    this fit writes its own.
    """
    source = Path(path)
    if source.is_dir() and not (source / CHECKPOINT).exists():
        own = folder is not None and os.path.realpath(folder) == os.path.realpath(source)
        if own or all(entry.name.startswith(".") for entry in list(source.iterdir())):
            warn(f"resume_from: no checkpoint in the folder {source} yet, so the fit starts anew")
            return None
    saved = read(source / CHECKPOINT if source.is_dir() else source)
    facts = saved.facts
    if facts.get("method") != type(explainer).__name__ or "state" not in facts:
        raise CheckpointError(
            f"resume_from: {source} must be a checkpoint that {type(explainer).__name__}.fit wrote to checkpoint_dir, "
            f"got a file of {facts.get('method')}{'' if 'state' in facts else ' made by save'}"
        )
    vet(saved, "resume_from")
    vet_state(saved, "resume_from")
    if facts["backbone"] != fingerprint(explainer.model):
        raise BackboneMismatchError(
            f"resume_from: {source} belongs to a {facts['model']} with other weights; load those weights first"
        )
    plan = {name: value for name, value in plan.items() if name != "steps" or not any_steps}
    if not saved.sealed:  # version 0.1 did not record the loader
        plan = {name: value for name, value in plan.items() if name in facts["plan"]}
    mine = {**plan, **_spelt_out(explainer.options())}
    with believing(saved, "resume_from"):
        theirs = {**facts["plan"], **_spelt_out(facts["options"])}
    if mine.get("recipe") == "auto":  # what it became in the fit that is continued, except for options given explicitly
        mine = {name: value for name, value in mine.items() if value is not None and name != "recipe"} | plan
    differ = [f"{k}={mine[k]!r} (was {theirs.get(k)!r})" for k in mine if mine[k] != theirs.get(k)]
    if differ:
        raise CheckpointError(f"resume_from: must be continued with the same arguments, got {', '.join(differ)}")
    told_unsealed(saved, "resume_from")
    return saved


def _spelt_out(options: dict[str, Any]) -> dict[str, Any]:
    """Options with T-TAME's recipe replaced by its fields, so that each can be compared and named."""
    recipe = options.get("recipe")
    if recipe == "auto" or "masking" not in options or "ce_only" in options:
        return options
    rest = {name: value for name, value in options.items() if name != "recipe"}
    return {**rest, **asdict(as_recipe(recipe)), "name": "recipe"}  # type: ignore[arg-type]  # as it was written


def _check_layers(layers: tuple[tuple[str, Grid | None], ...], saved: Checkpoint) -> None:
    mine, theirs = [name for name, _ in layers], [name for name, _ in saved.facts["layers"]]
    if mine != theirs:
        raise CheckpointError(f"resume_from: must be continued with the same layers, got {mine} (was {theirs})")


@contextmanager
def reserved(folder: Path | None) -> Iterator[None]:
    """Locks the checkpoint folder for this fit; if the first process cannot, none continues.

    Raises:
        DataError: another fit is writing there.
    """
    problem: DataError | None = None
    with ExitStack() as stack:
        if folder is not None and distributed.is_first():
            try:
                stack.enter_context(hold(folder, "fit", "checkpoint_dir"))
            except DataError as error:
                problem = error
        told = [found for found in distributed.everyone(problem, patient=False) if found is not None]
        if told:
            raise told[0]
        yield


def agreed_steps(steps: int) -> int:
    """The steps of a fit in several processes, whose loaders may differ in length: as many as the longest has."""
    found = distributed.everyone(steps, patient=False)
    if len(set(found)) > 1:
        warn(
            f"loader: the loaders of the processes make {', '.join(map(str, found))} steps; all take {max(found)}, and "
            "the shorter ones begin anew (a DistributedSampler gives each the same number)"
        )
    return max(found)


def plan_of(loader: Iterable[Any], **asked: Any) -> dict[str, Any]:
    """What a fit must have in common with one that it continues, besides the explainer's options."""
    return {**asked, **shape_of(loader), "processes": distributed.world_size()}


def batches_of(loader: Iterable[Any], seed: int, like: Tensor, saved: Checkpoint | None) -> Batches:
    """The loader's batches from the beginning, or from the position of a checkpoint."""
    batches = Batches(loader, seed, like)
    if saved is not None:
        with believing(saved, "resume_from"):
            batches.restore(saved.tensors, saved.facts["state"]["order"], compare=distributed.is_first())
    return batches


def try_out(explainer: Any) -> None:
    """Access the attributes of a loaded explainer, so that an impossible value raises here and not at a later call."""
    known = {name.replace("_orig_mod.", "") for name, _ in explainer.model.named_modules()} - {""}
    missing = [name for name, _ in explainer._ready().layers if re.sub(r"\[[^[]*\]$", "", name) not in known]
    if missing:
        raise ValueError(f"the model has no layer {missing[0]!r}")
    explainer.report()
    repr(explainer)
    if explainer.masking_ not in ("raw", "standardized", "blur", "auto"):
        torch.as_tensor(explainer.masking_)
    explainer.has_map_of(0)


def writable(path: str | os.PathLike[str]) -> Path:
    """An existing folder that can be written to."""
    folder = Path(path)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise DataError(
            f"checkpoint_dir: must be a folder that exists and can be written, got {folder}; make it, or choose another"
        )
    return folder
