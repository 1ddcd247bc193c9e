"""Explainers that were trained: how they explain, what they remember, and their files."""

from __future__ import annotations

import copy
import os
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from attrib_zoo.attribution import Attribution, forward_args
from attrib_zoo.backbone.capture import frozen, run
from attrib_zoo.backbone.layers.resolve import Tap
from attrib_zoo.errors import (
    BackboneMismatchError,
    CheckpointError,
    LayerError,
    NotFittedError,
    UnsupportedModelError,
)
from attrib_zoo.masking import min_max
from attrib_zoo.targets import TargetQuery
from attrib_zoo.training.checkpoint import Checkpoint, fingerprint, read, write
from attrib_zoo.training.history import History
from attrib_zoo.training.session import Fitted, class_count

_Self = TypeVar("_Self", bound="FittedAttribution")


class FittedAttribution(Attribution):
    """A small network reads the frozen model's features and gives a map per class, scaled to [0, 1] over space.

    Attributes:
        network_: the trained network, in eval mode.
        history_: every step's loss, its parts and the learning rate; validations; warnings.
        class_counts_: ``(K,)``, how many training images the model assigned to each class. A class with 0 has an
            untrained row.
        n_steps_: optimiser steps taken.
        schedule_: name of the schedule that was used.
    """

    needs_fit: ClassVar[bool] = True
    cost: ClassVar[str] = "1F"

    def __init__(self, model: nn.Module, layers: Any = None, *, upsample: bool = True) -> None:
        super().__init__(model, layers, upsample=upsample)
        self._fitted: Fitted | None = None
        self._warned = False

    @abstractmethod
    def _network(self, channels: Sequence[int], num_classes: int, generator: torch.Generator | None) -> nn.Module:
        """A network ``(features, rows) -> (N, M, h, w)`` for layers with these channels, drawn from the generator."""
        raise NotImplementedError

    def _complete(self, network: nn.Module) -> None:
        """Bring a trained network into the form in which it explains."""

    # ------------------------------------------------------------------ explain

    def _check_ready(self) -> None:
        self._ready()

    def _ready(self) -> Fitted:
        if self._fitted is None:
            name = type(self).__name__
            raise NotFittedError(
                f"{name} must be trained for this model before it can explain: call fit(loader), or load a file with "
                f"{name}.load(path, model)"
            )
        return self._fitted

    def _maps(self, inputs: Tensor, query: TargetQuery, args: tuple[Any, ...], show_progress: bool) -> Tensor:
        outputs, features = self._features(inputs, args)
        target = query.resolve(outputs)
        one_value = outputs.ndim == 1 or outputs.shape[1] == 1
        rows = torch.ones_like(target.classes) if one_value else target.classes
        self._warn_unseen(rows)
        return min_max(attend(self._network_for(features), features, rows))

    def maps(self, inputs: Any, additional_forward_args: Any = None) -> Tensor:
        """The maps of all classes from one forward pass, at the resolution of the layers.

        Args:
            inputs: as in :meth:`attribute`.
            additional_forward_args: as in :meth:`attribute`.

        Returns:
            ``(N, K, h, w)``, each map scaled to [0, 1]. Rows of classes with ``class_counts_ == 0`` are untrained.
        """
        self._check_ready()
        images, _ = self._images(inputs)
        with frozen(self.model), torch.inference_mode(False), torch.no_grad():
            clean = images.clone() if images.is_inference() else images.detach()
            _, features = self._features(clean, forward_args(additional_forward_args))
            return min_max(attend(self._network_for(features), features, None)).to(images.dtype)

    def _features(self, inputs: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, list[Tensor]]:
        """Outputs and features of one pass, checked to be those that the network was trained on."""
        fitted = self._ready()
        outputs, features = run(self.model, inputs, args, self.taps(inputs, args))
        if class_count(outputs) != fitted.num_classes:
            raise UnsupportedModelError(
                f"model: must have the {fitted.num_classes} classes that {type(self).__name__} was fitted for, "
                f"got {class_count(outputs)}; fit again for the changed model"
            )
        channels = tuple(f.shape[1] for f in features)
        if channels != fitted.channels:
            raise LayerError(
                f"layers: must have {fitted.channels} channels as in fit, got {channels}; "
                "fit again for the changed model"
            )
        return outputs, [f.to(head_dtype(f)) for f in features]

    def _network_for(self, features: Sequence[Tensor]) -> nn.Module:
        return self._ready().network.to(features[0])

    def _warn_unseen(self, rows: Tensor) -> None:
        counts = self._ready().counts
        unseen = [c for c in rows.unique().tolist() if counts[c] == 0]
        if unseen and not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self).__name__}: class {', '.join(map(str, unseen[:5]))}{' ...' if len(unseen) > 5 else ''} "
                "never came up in fit, so its map is untrained; fit on images of it (class_counts_ has the counts)",
                UserWarning,
                stacklevel=6,
            )

    def _resolve(self, inputs: Tensor, args: Sequence[Any]) -> tuple[Tap, ...]:
        if self._fitted is None:
            return super()._resolve(inputs, args)
        return self._tested(self._asked_layers(), inputs, args)

    def _asked_layers(self) -> Any:
        """Those of the fit, so that an explainer and what is loaded from its file are known as one."""
        if self._fitted is None:
            return self.layers
        return [name if grid is None else (name, grid) for name, grid in self._fitted.layers]

    # ------------------------------------------------------------------ what was learned

    @property
    def is_fitted(self) -> bool:
        """Whether the explainer was fitted or loaded."""
        return self._fitted is not None

    @property
    def network_(self) -> nn.Module:
        """The trained network."""
        return self._ready().network

    @property
    def history_(self) -> History:
        """The record of the fit."""
        return self._ready().history

    @property
    def class_counts_(self) -> Tensor:
        """``(K,)``: how many training images the model assigned to each class."""
        return self._ready().counts

    @property
    def n_steps_(self) -> int:
        """Optimiser steps taken."""
        return self._ready().steps

    @property
    def schedule_(self) -> str:
        """Name of the schedule that was used."""
        return self._ready().schedule.name

    def report(self) -> str:
        """The fit in a few lines: steps, schedule, loss, classes seen, validation, warnings."""
        fitted = self._ready()
        seen = int((fitted.counts > 0).sum())
        lines = [
            f"{type(self).__name__} for {type(self.model).__name__}, layers {', '.join(n for n, _ in fitted.layers)}",
            f"  steps        {fitted.steps} ({fitted.schedule.name} schedule, {fitted.schedule.optimizer}, "
            f"max lr {fitted.schedule.lr:.3g})",
            f"  images       {int(fitted.counts.sum())}, classes seen {seen} of {fitted.num_classes}",
        ]
        if len(fitted.history):
            parts = ", ".join(f"{k} {fitted.history.last(k):.3g}" for k in fitted.history.steps if k != "lr")
            lines.append(f"  last tenth   {parts}")
        if fitted.history.validation:
            last = fitted.history.validation[-1]
            lines.append("  validation   " + ", ".join(f"{k} {v:.4g}" for k, v in last.items() if k != "step"))
        lines += [f"  warning      {message}" for message in fitted.history.messages]
        return "\n".join(lines)

    def __repr__(self) -> str:
        text = super().__repr__()
        if self._fitted is None:
            return text
        seen = int((self._fitted.counts > 0).sum())
        decided = "".join(f", {k} {v}" for k, v in self._fitted.decisions.items() if isinstance(v, str))
        return (
            f"{text} fitted: {self._fitted.steps} steps, {self._fitted.schedule.name} schedule{decided}, "
            f"{seen} of {self._fitted.num_classes} classes seen"
        )

    def untrained(self: _Self, seed: int = 0) -> _Self:
        """The same explainer with weights that nobody has trained: what it gains by its fit is the difference.

        Args:
            seed: of the weights.

        Returns:
            A copy; the explainer itself stays as it is.
        """
        fitted = self._ready()
        network = self._network(fitted.channels, fitted.num_classes, torch.Generator().manual_seed(seed)).eval()
        twin = copy.copy(self)
        twin._fitted = replace(fitted, network=network, steps=0, history=History())
        twin._complete(network)
        network.to(next(fitted.network.parameters()))
        return twin

    # ------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the fitted explainer to one safetensors file, whole or not at all.

        Args:
            path: the file; its folder must exist.

        Returns:
            The path.
        """
        self._ready()
        return write(path, self._to_checkpoint())

    @classmethod
    def load(
        cls: type[_Self], path: str | os.PathLike[str], model: nn.Module, *, strict_backbone: bool = True
    ) -> _Self:
        """Read a fitted explainer for the model that it was fitted for.

        Args:
            path: a file that :meth:`save` or a fit's checkpoints wrote.
            model: the model, with the same weights as in fit.
            strict_backbone: ``False`` warns instead of raising where the model's weights differ.

        Raises:
            CheckpointError: damaged, of another class, or of a newer format.
            BackboneMismatchError: the model has other weights.
        """
        saved = read(path)
        facts = saved.facts
        if facts.get("method") != cls.__name__:
            raise CheckpointError(
                f"path: {path} must be a checkpoint of {cls.__name__}, got one of {facts.get('method')}; "
                f"use {facts.get('method')}.load"
            )
        explainer = cls(model, [layer for layer, _ in facts["layers"]], **facts["options"])
        if fingerprint(explainer.model) != facts["backbone"]:
            message = (
                f"path: {path} was fitted for {facts['model']} with other weights than this "
                f"{type(explainer.model).__name__} has; load the weights it was fitted for, or fit again"
            )
            if strict_backbone:
                raise BackboneMismatchError(message + " (strict_backbone=False loads it all the same)")
            warnings.warn(message, UserWarning, stacklevel=2)
        network = explainer._network(facts["channels"], facts["num_classes"], torch.Generator())
        try:
            explainer._fitted = Fitted.read(saved, network)
        except KeyError as missing:
            raise CheckpointError(f"path: {path} is incomplete, {missing} is not in it; fit again") from missing
        explainer._complete(network)
        return explainer

    def _to_checkpoint(self) -> Checkpoint:
        from attrib_zoo import __version__

        fitted = self._ready()
        return Checkpoint(
            {**fitted.tensors(), **fitted.history.tensors()},
            {
                "method": type(self).__name__,
                "library": __version__,
                "model": type(self.model).__name__,
                "options": self.options(),
                **fitted.facts(),
            },
        )


def attend(network: nn.Module, features: Sequence[Tensor], rows: Tensor | None) -> Tensor:
    """The network's maps ``(N, M, h, w)``; it keeps its own precision inside autocast."""
    with torch.autocast(features[0].device.type, enabled=False):
        maps: Tensor = network(features, rows)
    return maps


def head_dtype(features: Tensor) -> torch.dtype:
    """The head computes in float32, or in float64 for float64 models."""
    return torch.promote_types(features.dtype, torch.float32)
