"""What a fit needs from an explainer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.grid import Tap
from attrib_zoo.backbone.targets import Target, TargetQuery
from attrib_zoo.training.checkpoint import Fitted
from attrib_zoo.training.fit import Terms
from attrib_zoo.training.schedule import Schedule


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
