"""What a method has once it is trained: its network, what was learned, and the files that hold both."""

from __future__ import annotations

import copy
import os
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.module import unwrap
from attrib_zoo.errors import BackboneMismatchError, CheckpointError, NotFittedError, warn
from attrib_zoo.masking import black, channel_stats
from attrib_zoo.methods.bases.one_pass import OnePass
from attrib_zoo.sharing import card, repository
from attrib_zoo.training import resume, validation
from attrib_zoo.training.checkpoint import Fitted, fingerprint, packed, read, write
from attrib_zoo.training.history import History
from attrib_zoo.training.vetting import believing, told_unsealed, vet, vet_network
from attrib_zoo.training.watch import Watch

_Self = TypeVar("_Self", bound="FittedAttribution")


class FittedAttribution(OnePass):
    """Base of :class:`TrainableAttribution`: everything about a fitted explainer but how it is fitted and explains."""

    needs_fit: ClassVar[bool] = True
    own_scale: ClassVar[str | None] = "min-max"
    cost: ClassVar[str] = "1F"

    def __init__(self, model: nn.Module, layers: Any = None, **shown: Any) -> None:
        super().__init__(model, layers, **shown)
        self._fitted: Fitted | None = None
        self._watch: Watch | None = None
        self._strict = True
        self._warned = False

    @abstractmethod
    def build_network(self, channels: Sequence[int], num_classes: int, generator: torch.Generator | None) -> nn.Module:
        """A network ``(features, rows) -> (N, M, h, w)`` for layers with these channels, drawn from the generator."""
        raise NotImplementedError

    def finish_network(self, network: nn.Module) -> None:
        """Convert a trained network into the form used for explaining."""

    def check_ready(self) -> None:
        self._ready()

    def _ready(self) -> Fitted:
        if self._fitted is None:
            name = type(self).__name__
            raise NotFittedError(
                f"{name} must be trained for this model before it can explain: call fit(loader), or load a file with "
                f"{name}.load(path, model)"
            )
        return self._fitted

    # ------------------------------------------------------------------ what was learned

    def named_layers(self) -> Any:
        """The layers of the fit, so that an explainer and its reloaded copy show the same ones."""
        if self._fitted is None:
            return self.layers
        return [name if grid is None else (name, grid) for name, grid in self._fitted.layers]

    def has_map_of(self, target: int) -> bool:
        """Whether the map of this class is trained: ``fit`` saw the class, or gave every class a map."""
        ready = self._ready()
        return "rows" in ready.decisions or bool(ready.counts[target])

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

    @property
    def masking_(self) -> str | Tensor:
        """How the fit hid pixels, as ``masking`` of the measures, which should hide them in the same way.

        ``"raw"`` or ``"standardized"``; black as a tensor ``(1, C, 1, 1)`` where the fit was given a standardisation
        other than the model's own; ``"auto"`` for a method that hides no pixels.
        """
        decided = self._ready().decisions
        rule: str = decided.get("masking", "auto")
        if rule != "raw":
            return rule
        mean, std = tuple(decided["mean"]), tuple(decided["std"])
        own = tuple(map(tuple, channel_stats(self.model, len(mean))))
        return rule if (mean, std) == own else black(mean, std, torch.zeros(1, len(mean), 1, 1))

    def report(self) -> str:
        """The fit in a few lines: steps, schedule, loss, classes seen, validation, warnings."""
        return validation.report(self, self._ready())

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
        """The same explainer with untrained weights: the difference is what the fit contributes.

        Args:
            seed: for the weights.

        Returns:
            A copy; the explainer itself stays as it is.
        """
        fitted = self._ready()
        network = self.build_network(fitted.channels, fitted.num_classes, torch.Generator().manual_seed(seed)).eval()
        twin = copy.copy(self)
        twin._fitted = replace(fitted, network=network, steps=0, history=History())
        twin.finish_network(network)
        network.to(next(fitted.network.parameters()))
        return twin

    # ------------------------------------------------------------------ files

    def written_options(self) -> dict[str, Any]:
        """The options as a file has them: nothing in it may come to mean something else in a later version."""
        return self.options()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the fitted explainer to one safetensors file, completely or not at all.

        Args:
            path: the file; its folder must exist.

        Returns:
            The path.
        """
        return write(path, resume.to_checkpoint(self, self._ready()))

    def save_pretrained(self, folder: str | os.PathLike[str], **about: Any) -> Path:
        """Write what :meth:`push_to_hub` uploads into a folder: the explainer and its card.

        Args:
            folder: made where there is none.
            about: what the card says beside what the explainer knows by itself; see
                :class:`attrib_zoo.sharing.card.About`.

        Returns:
            The folder.
        """
        told, saved = card.about(**about), resume.to_checkpoint(self, self._ready())
        return repository.write_folder(folder, packed(saved), card.card(saved, told, Path(folder).name))

    def push_to_hub(
        self,
        repo: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        message: str = "A fitted explainer",
        token: str | bool | None = None,
        endpoint: str | None = None,
        **about: Any,
    ) -> str:
        """Share the explainer and its card on the Hugging Face Hub, in one commit.

        Args:
            repo: ``"owner/name"``; made where there is none.
            private: of a new repository; ``None`` for the owner's default.
            revision: a branch, made where there is none; ``None`` for the main one.
            message: of the commit.
            token: ``None`` for that of ``hf auth login``.
            endpoint: another server than ``HF_ENDPOINT`` says; needs huggingface_hub 1.3.3.
            about: what the card says beside what the explainer knows by itself; see
                :class:`attrib_zoo.sharing.card.About`.

        Returns:
            The commit's address.

        Raises:
            NotFittedError: there is nothing to share yet.
            OptionError: something that the card has no place for.
            DataError: the Hub did not take it.
        """
        told, saved = card.about(**about), resume.to_checkpoint(self, self._ready())
        return repository.upload(
            repo,
            packed(saved),
            card.card(saved, told, repo),
            message=message,
            private=private,
            revision=revision,
            token=token,
            endpoint=endpoint,
        )

    @classmethod
    def from_pretrained(
        cls: type[_Self],
        repo_or_folder: str | os.PathLike[str],
        model: nn.Module,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        endpoint: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        strict_backbone: bool = True,
    ) -> _Self:
        """Read a shared explainer, from a folder or from the Hugging Face Hub, for the model it was fitted for.

        Args:
            repo_or_folder: a folder that exists, else a repository ``"owner/name"``.
            model: as in :meth:`load`.
            revision: a branch, a tag or a commit; a commit's hash is for ever the same explainer.
            token: ``None`` for that of ``hf auth login``.
            endpoint: another server than ``HF_ENDPOINT`` says.
            cache_dir: where downloads are kept; ``None`` for the Hub's own place.
            strict_backbone: as in :meth:`load`.

        Raises:
            CheckpointError: there is no explainer, or one of another class.
            BackboneMismatchError: the model has other weights.
        """
        path = repository.fetch(repo_or_folder, revision=revision, token=token, endpoint=endpoint, cache_dir=cache_dir)
        try:
            return cls.load(path, model, strict_backbone=strict_backbone)
        except CheckpointError as error:
            text = str(error).replace(f"path: {path}", f"repo_or_folder: the explainer in {repo_or_folder}")
            raise type(error)(text.replace(".load", ".from_pretrained")) from error

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
            CheckpointError: damaged, edited, of another class, or of a newer format. A file of version 0.1 has no
                checksum by which damage could be told, and a warning says so.
            BackboneMismatchError: the model has other weights.
        """
        saved = read(path)
        facts = saved.facts
        if facts.get("method") != cls.__name__:
            raise CheckpointError(
                f"path: {path} must be a checkpoint of {cls.__name__}, got one of {facts.get('method')}; "
                f"use {facts.get('method')}.load"
            )
        vet(saved)
        unwrap(model)  # says what cannot be explained; all that fails from here on is the file's fault
        with believing(saved):
            explainer = cls(model, [layer for layer, _ in facts["layers"]], **facts["options"])
        weights = fingerprint(explainer.model)
        if weights != facts["backbone"]:
            message = (
                f"path: {path} was fitted for {facts['model']} with other weights than this "
                f"{type(explainer.model).__name__} has; load the weights it was fitted for, or fit again"
            )
            if strict_backbone:
                raise BackboneMismatchError(message + " (strict_backbone=False loads it all the same)")
            warn(message)
        vet_network(saved, explainer.build_network)
        with believing(saved):
            network = explainer.build_network(facts["channels"], facts["num_classes"], torch.Generator())
            explainer._fitted = Fitted.read(saved, network)
            explainer.finish_network(network)
            resume.try_out(explainer)
        told_unsealed(saved)
        explainer._strict = strict_backbone
        explainer._watch = Watch(explainer.model, weights)
        return explainer
