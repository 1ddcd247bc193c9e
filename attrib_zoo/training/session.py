"""What a fit gives an explainer, and its form in a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.capture import frozen
from attrib_zoo.backbone.grid import Grid
from attrib_zoo.errors import UnsupportedModelError
from attrib_zoo.training.checkpoint import Checkpoint
from attrib_zoo.training.history import History
from attrib_zoo.training.losses import two_logits
from attrib_zoo.training.schedule import Schedule


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


def class_count(outputs: Tensor) -> int:
    """K of ``(N, K)`` logits; 2 for one value per image.

    Raises:
        UnsupportedModelError: outputs of any other shape.
    """
    if outputs.ndim > 2:
        raise UnsupportedModelError(
            f"model: must return (N, K) logits to fit an explainer, got shape {tuple(outputs.shape)}; wrap it in a "
            "module that gives one score per class"
        )
    return two_logits(outputs).shape[1]


@contextmanager
def ground(model: nn.Module) -> Iterator[Tensor]:
    """Where an explainer is trained: the model frozen, gradients on, the global generators restored afterwards.

    Yields:
        An empty tensor of the model's device and floating-point type.
    """
    parameters = list(model.parameters())
    flags = [parameter.requires_grad for parameter in parameters]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    first = next((p for p in parameters if p.is_floating_point()), torch.zeros(0))
    try:
        with (
            frozen(model),
            torch.random.fork_rng(devices),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            for parameter in parameters:
                parameter.requires_grad = False
            yield first.new_zeros(0)
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad = flag


def averages(found: Iterable[dict[str, Tensor]]) -> dict[str, float]:
    """Means over images of per-image measures ``(N,)`` that come batch by batch."""
    sums: dict[str, float] = {}
    count = 0
    for measures in found:
        count += len(next(iter(measures.values())))
        for name, values in measures.items():
            sums[name] = sums.get(name, 0.0) + float(values.double().sum())
    return {name: value / count for name, value in sums.items()} if count else {}
