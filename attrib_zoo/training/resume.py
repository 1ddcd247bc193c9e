"""What a fit writes to its checkpoint, and a checkpoint compared with the fit that is to continue it."""

from __future__ import annotations

import math
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from attrib_zoo.backbone.grid import Grid
from attrib_zoo.errors import BackboneMismatchError, CheckpointError, warn
from attrib_zoo.training.checkpoint import Checkpoint, Fitted, alike, fingerprint, read
from attrib_zoo.training.explainer import Explainer
from attrib_zoo.training.recipe import as_recipe
from attrib_zoo.training.vetting import believing, told_unsealed, vet, vet_state


class Written(Protocol):
    """What a file needs of an explainer."""

    @property
    def model(self) -> nn.Module:
        """The model that it explains."""

    def written_options(self) -> dict[str, Any]:
        """The options of its constructor, as a file should have them."""


def to_checkpoint(explainer: Written, fitted: Fitted) -> Checkpoint:
    """Everything that makes up a fitted explainer, ready to be written."""
    from attrib_zoo import __version__

    return Checkpoint(
        {**fitted.tensors(), **fitted.history.tensors()},
        {
            "method": type(explainer).__name__,
            "library": __version__,
            "model": type(explainer.model).__name__,
            "options": explainer.written_options(),
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
    if mine.get("start") == "auto":  # L-CAM's, likewise
        del mine["start"]
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


def decided(saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The decisions of the fit that is continued, checked to have the form of this fit's own."""
    wrong = [name for name, value in own.items() if not alike(saved[name], value, math.inf, -math.inf)]
    if wrong:
        raise ValueError(f"{wrong[0]} cannot be {saved[wrong[0]]!r}")
    return saved


def check_layers(layers: tuple[tuple[str, Grid | None], ...], saved: Checkpoint) -> None:
    """Raise if a fit reads other layers than the one that it continues."""
    mine, theirs = [name for name, _ in layers], [name for name, _ in saved.facts["layers"]]
    if mine != theirs:
        raise CheckpointError(f"resume_from: must be continued with the same layers, got {mine} (was {theirs})")


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
