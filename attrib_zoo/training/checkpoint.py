"""One safetensors file for a fitted explainer: tensors, JSON metadata, and the fingerprint of its model's weights."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.grid import Grid
from attrib_zoo.errors import CheckpointError, DataError
from attrib_zoo.training.files import write_whole
from attrib_zoo.training.history import History
from attrib_zoo.training.recipe import read_written
from attrib_zoo.training.schedule import Schedule
from attrib_zoo.training.sealed import SealError, read_metadata, read_tensors, write_sealed
from attrib_zoo.training.signals import held

FORMAT = 2
"""Of the files that are written: 1, of version 0.1, had no checksum."""


@dataclass
class Checkpoint:
    """The contents of a file: named tensors and JSON-ready facts.

    Attributes:
        tensors: by name.
        facts: by name.
        source: the file that it was read from.
        sealed: whether a checksum confirmed the contents; files of version 0.1 have none.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    sealed: bool = True

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start with ``prefix/``, with the prefix removed."""
        return {k.removeprefix(prefix + "/"): v for k, v in self.tensors.items() if k.startswith(prefix + "/")}


def write(path: str | os.PathLike[str], checkpoint: Checkpoint) -> Path:
    """Write the file completely or not at all; Ctrl-C is delayed until then.

    Raises:
        DataError: the folder does not exist or cannot be written, or the disk is full.
    """
    target = Path(path)
    try:
        with held():
            write_whole(target, lambda file: write_sealed(file, checkpoint.tensors, _text(checkpoint)))
    except OSError as error:
        raise DataError(
            f"path: must be a file in a folder that exists and can be written, got {target} ({error.strerror}); "
            "make the folder, make room, or choose another"
        ) from error
    return target


def packed(checkpoint: Checkpoint) -> bytes:
    """The bytes that :func:`write` writes."""
    file = io.BytesIO()
    write_sealed(file, checkpoint.tensors, _text(checkpoint))
    return file.getvalue()


def _text(checkpoint: Checkpoint) -> str:
    return json.dumps({"format": FORMAT, **checkpoint.facts})


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a file that :func:`write` made.

    Raises:
        CheckpointError: the file is missing, damaged, not ours, or of a newer format.
    """
    source = Path(path)
    with _readable(source):
        text, seal = read_metadata(source)
        facts = _facts(source, text, seal)
        return Checkpoint(read_tensors(source, text or "", seal), facts, str(source), seal is not None)


def read_facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The facts in a file; its tensors are not read, and its checksum is not compared.

    Raises:
        CheckpointError: as :func:`read`.
    """
    source = Path(path)
    with _readable(source):
        return _facts(source, *read_metadata(source))


@contextmanager
def _readable(source: Path) -> Iterator[None]:
    """Inside, any failure caused by the file's bytes becomes one error."""
    from safetensors import SafetensorError

    if not source.is_file():
        raise CheckpointError(f"path: must be a checkpoint file, got {source}, which is not there; look at the path")
    try:
        yield
    except CheckpointError:
        raise
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, OSError, MemoryError) as error:
        why = "its facts are nested too deeply" if isinstance(error, RecursionError) else error
        raise CheckpointError(
            f"path: {source} must be a whole safetensors file, but it cannot be read ({why}); "
            "it is damaged or cut off: copy it again, or fit again"
        ) from error


def _facts(source: Path, text: str | None, seal: str | None) -> dict[str, Any]:
    facts = json.loads(text or "null")
    number = facts.get("format") if isinstance(facts, dict) else None
    if not isinstance(facts, dict) or not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise CheckpointError(
            f"path: {source} must be a checkpoint of attrib_zoo; it is a safetensors file of something else"
        )
    if number > FORMAT:
        raise CheckpointError(
            f"path: {source} is of format {number}, this version reads up to {FORMAT}; upgrade attrib_zoo"
        )
    if number > 1 and seal is None:
        raise SealError("its checksum is missing")
    options = facts.get("options")
    if isinstance(options, dict) and "recipe" in options:
        options["recipe"] = read_written(options["recipe"])
    return facts


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the model's parameters and buffers."""
    digest = hashlib.sha256()
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()}  # compiled or not
    for name, tensor in sorted(state.items()):
        if not isinstance(tensor, Tensor):
            continue
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
        for data in _plain(tensor.detach()):
            whole = data.cpu().contiguous()
            digest.update(whole.reshape(-1).view(torch.uint8).numpy().data if whole.numel() else b"")
    return digest.hexdigest()


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The ordinary tensors that hold the values: of a sharded tensor the whole, of a quantised one its contents."""
    gather, flatten = (getattr(tensor, name, None) for name in ("full_tensor", "__tensor_flatten__"))
    if callable(gather):  # a collective operation: every process takes part
        yield gather()
    elif callable(flatten):
        for name in flatten()[0]:
            yield from _plain(getattr(tensor, name))
    else:
        yield tensor


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as named tensors and JSON-ready facts."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{name}"] = value
            else:
                scalars[f"{index}/{name}"] = value
    return tensors, {"scalars": scalars, "groups": state["param_groups"]}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Inverse of :func:`flatten_optimizer`.

    Raises:
        ValueError: the state belongs to other parameters, or to another optimiser.
    """
    _check_groups(optimizer, facts["groups"])
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **facts["scalars"]}.items():
        index, name = key.split("/", 1)
        state.setdefault(int(index), {})[name] = value
    _check_state(optimizer, state)
    optimizer.load_state_dict({"state": state, "param_groups": facts["groups"]})


_LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "momentum_buffer")  # whose shapes PyTorch itself does not check


def _check_groups(optimizer: torch.optim.Optimizer, groups: Any) -> None:
    own = optimizer.state_dict()["param_groups"]
    if not isinstance(groups, list) or [set(group) for group in groups] != [set(group) for group in own]:
        raise ValueError("the optimiser's settings are those of another one")
    for mine, theirs in zip(own, groups, strict=True):
        for name, value in mine.items():
            most = 1.0 if name == "betas" or "momentum" in name else 1e9
            if value is None or isinstance(value, bool):  # with "fused" or without, a fit goes on as it was begun
                same = theirs[name] is value or (name == "fused" and theirs[name] in (None, True, False))
            else:
                same = alike(theirs[name], value, most)
            if not same:
                raise ValueError(f"the optimiser's {name} must be like {value!r}, got {theirs[name]!r}")


def _check_state(optimizer: torch.optim.Optimizer, state: Mapping[int, Mapping[str, Any]]) -> None:
    sizes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    if any(set(values) != set(next(iter(state.values()))) for values in state.values()):
        raise ValueError("the optimiser's state is incomplete")
    for index, values in state.items():
        for name, value in values.items():
            if name in _LIKE_PARAMETER and value is not None and getattr(value, "shape", None) != sizes[index]:
                raise ValueError(f"the optimiser's {name} must have the shape of its parameter, {tuple(sizes[index])}")


def alike(saved: Any, own: Any, most: float = 1e9, least: float = 0.0) -> bool:
    """Whether a saved value has the form of our own: a number within limits, a list of as many such, ..."""
    if isinstance(own, bool) or isinstance(saved, bool):
        return isinstance(own, bool) and isinstance(saved, bool)
    if isinstance(own, (int, float)):
        return isinstance(saved, (int, float)) and least <= saved <= most
    if isinstance(own, (list, tuple)):
        same = isinstance(saved, (list, tuple)) and len(saved) == len(own)
        return same and all(alike(one, other, most, least) for one, other in zip(saved, own, strict=True))
    return own is None or saved is None or isinstance(saved, type(own))


def finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether all floating-point values are numbers."""
    return all(bool(torch.isfinite(t).all()) for t in tensors.values() if t.is_floating_point())


@dataclass
class Fitted:
    """A trained network and everything needed to use it.

    Attributes:
        network: maps features and requested classes to attention maps.
        layers: names of the layers that it reads, each with its user-given layout, if any.
        channels: the channels of each layer.
        counts: ``(K,)`` training images that the model assigned to each class.
        schedule: how it was optimised.
        steps: optimiser steps taken.
        history: the record of the fit.
        backbone: fingerprint of the model's weights.
        decisions: what the method decided from the model, e.g. the masking rule.
    """

    network: nn.Module
    layers: tuple[tuple[str, Grid | None], ...]
    channels: tuple[int, ...]
    counts: Tensor
    schedule: Schedule
    steps: int
    history: History
    backbone: str
    decisions: dict[str, Any]

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.counts)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to write."""
        return {**{f"network/{k}": v for k, v in self.network.state_dict().items()}, "class_counts": self.counts}

    def facts(self) -> dict[str, Any]:
        """The JSON-ready facts to write."""
        return {
            "layers": [[name, None if grid is None else grid.to_dict()] for name, grid in self.layers],
            "channels": list(self.channels),
            "num_classes": self.num_classes,
            "schedule": self.schedule.facts(),
            "steps": self.steps,
            "backbone": self.backbone,
            "decisions": self.decisions,
            **self.history.facts(),
        }

    @classmethod
    def read(cls, saved: Checkpoint, network: nn.Module) -> Fitted:
        """Inverse of :meth:`tensors` and :meth:`facts`; the network is filled with the saved weights."""
        facts, weights = saved.facts, saved.part("network")
        wide = next((w.dtype for w in weights.values() if w.is_floating_point()), torch.float32)
        network.to(wide).load_state_dict(weights)
        network.eval()
        return cls(
            network=network,
            layers=tuple((name, None if grid is None else Grid.from_dict(grid)) for name, grid in facts["layers"]),
            channels=tuple(facts["channels"]),
            counts=saved.tensors["class_counts"],
            schedule=Schedule.read(facts["schedule"]),
            steps=facts["steps"],
            history=History.read(saved.tensors, facts),
            backbone=facts["backbone"],
            decisions=facts["decisions"],
        )
