"""A fit before its first step: its folder and plan, the frozen model, the network and where it starts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo.attribution import check_images
from attrib_zoo.backbone.capture import check_gradient, frozen, run
from attrib_zoo.backbone.grid import Grid, Tap
from attrib_zoo.errors import DataError, LayerError, warn
from attrib_zoo.masking import at_least_float32
from attrib_zoo.training import distributed
from attrib_zoo.training.checkpoint import Checkpoint, Fitted, fingerprint
from attrib_zoo.training.data import Batches, shape_of
from attrib_zoo.training.explainer import Explainer
from attrib_zoo.training.fit import State, tell
from attrib_zoo.training.history import History
from attrib_zoo.training.locks import hold
from attrib_zoo.training.maps import class_count
from attrib_zoo.training.resume import check_layers, decided
from attrib_zoo.training.schedule import OptimizerFactory, Schedule, build
from attrib_zoo.training.vetting import believing

_FEW_STEPS = {
    "short": (30, "raise max_steps or epochs"),
    "paper": (20_000, "raise epochs, or pass schedule='short'"),
    "released": (20_000, "raise epochs, or pass schedule='short'"),
}


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
        check_layers(layers, saved)
        with believing(saved, "resume_from"):
            network.load_state_dict(saved.part("network"))  # after the schedule is chosen, which may set rows to zero
            schedule, counts = Schedule.read(saved.facts["schedule"]), saved.tensors["class_counts"]
            decisions = decided(saved.facts["decisions"], decisions)
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


def _channels(taps: Sequence[Tap], features: Sequence[Tensor]) -> tuple[int, ...]:
    """C of each layer; raises where there is nothing to learn."""
    for tap, feature in zip(taps, features, strict=True):
        if feature.shape[-2:].numel() == 1:
            raise LayerError(
                f"layers: {tap.label!r} has a map of one cell on these images, from which no explainer can learn where "
                "to look; name a layer before it, or fit on larger images"
            )
    return tuple(tap.channels for tap in taps)


def _has_hints(layers: Any) -> bool:
    """Whether the user gave the layout of a layer."""
    items = layers if isinstance(layers, (list, tuple)) else [layers]
    return any(isinstance(item, (tuple, Grid, Tap)) for item in items)


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


def writable(path: str | os.PathLike[str]) -> Path:
    """An existing folder that can be written to."""
    folder = Path(path)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise DataError(
            f"checkpoint_dir: must be a folder that exists and can be written, got {folder}; make it, or choose another"
        )
    return folder
