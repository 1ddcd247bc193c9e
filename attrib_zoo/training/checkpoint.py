"""One safetensors file for a fitted explainer: tensors, JSON metadata, and the fingerprint of its model's weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.grid import Grid
from attrib_zoo.errors import CheckpointError, DataError
from attrib_zoo.training.files import write_whole
from attrib_zoo.training.history import History
from attrib_zoo.training.schedule import Schedule

FORMAT = 1


@dataclass
class Checkpoint:
    """What is written and read: named tensors and JSON-ready facts."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name starts with ``prefix/``, without it."""
        return {k.removeprefix(prefix + "/"): v for k, v in self.tensors.items() if k.startswith(prefix + "/")}


def write(path: str | os.PathLike[str], checkpoint: Checkpoint) -> Path:
    """Write the file whole or not at all.

    Raises:
        DataError: the folder does not exist or cannot be written, or the disk is full.
    """
    target = Path(path)
    data = packed(checkpoint)
    try:
        write_whole(target, data)
    except OSError as error:
        raise DataError(
            f"path: must be a file in a folder that exists and can be written, got {target} ({error.strerror}); "
            "make the folder, make room, or choose another"
        ) from error
    return target


def packed(checkpoint: Checkpoint) -> bytes:
    """What :func:`write` puts into the file."""
    from safetensors.torch import save

    metadata = {"attrib_zoo": json.dumps({"format": FORMAT, **checkpoint.facts})}
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in checkpoint.tensors.items()}
    return save(tensors, metadata)


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a file that :func:`write` made.

    Raises:
        CheckpointError: no such file, damaged, not ours, or of a newer format.
    """
    from safetensors import SafetensorError, safe_open

    source = Path(path)
    if not source.is_file():
        raise CheckpointError(f"path: must be a checkpoint file, got {source}, which is not there; look at the path")
    try:
        with safe_open(str(source), framework="pt", device="cpu") as file:
            facts = json.loads((file.metadata() or {}).get("attrib_zoo", "null"))
            if not isinstance(facts, dict):
                raise CheckpointError(
                    f"path: {source} must be a checkpoint of attrib_zoo; it is a safetensors file of something else"
                )
            if facts.get("format", 0) > FORMAT:
                raise CheckpointError(
                    f"path: {source} is of format {facts['format']}, this version reads up to {FORMAT}; "
                    "upgrade attrib_zoo"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise CheckpointError(
            f"path: {source} must be a whole safetensors file, but it cannot be read ({error}); "
            "it is damaged or cut off: copy it again, or fit again"
        ) from error
    return Checkpoint(tensors, facts)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of the model's parameters and buffers."""
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
    """The ordinary tensors that hold the values: of a sharded one all of it, of a quantised one what is inside."""
    gather, flatten = (getattr(tensor, name, None) for name in ("full_tensor", "__tensor_flatten__"))
    if callable(gather):  # every process takes part
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
    """Inverse of :func:`flatten_optimizer`."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **facts["scalars"]}.items():
        index, name = key.split("/", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": facts["groups"]})


@dataclass
class Fitted:
    """A trained network and all that must be known to use it.

    Attributes:
        network: maps features and wanted classes to attention maps.
        layers: names of the layers that it reads, each with the layout that the user gave, if any.
        channels: of each layer.
        counts: ``(K,)`` training images that the model assigned to each class.
        schedule: how it was optimised.
        steps: optimiser steps taken.
        history: what happened.
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
        facts = saved.facts
        network.load_state_dict(saved.part("network"))
        network.eval()
        return cls(
            network=network,
            layers=tuple((name, None if grid is None else Grid.from_dict(grid)) for name, grid in facts["layers"]),
            channels=tuple(facts["channels"]),
            counts=saved.tensors["class_counts"],
            schedule=Schedule(**facts["schedule"]),
            steps=facts["steps"],
            history=History.read(saved.tensors, facts),
            backbone=facts["backbone"],
            decisions=facts["decisions"],
        )
