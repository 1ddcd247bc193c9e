"""What several commands need: the model, the methods and the explainers that their options name."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Sequence
from typing import Any

import torch

import attrib_zoo
from attrib_zoo.attribution import Attribution
from attrib_zoo.errors import CheckpointError, NotFittedError, OptionError, check_choice, closest
from attrib_zoo.models import LoadedModel, load, read_class_names
from attrib_zoo.training import checkpoint

SCORES = ("softmax", "sigmoid")
"""What --score may be: the model decides for one of all classes, or for each class by itself."""


def methods() -> dict[str, type[Attribution]]:
    """Every exported method by the name it has on the command line: its class name in lower case."""
    exported = vars(attrib_zoo).values()
    found = [cls for cls in exported if isinstance(cls, type) and issubclass(cls, Attribution) and cls.family]
    return {cls.__name__.lower(): cls for cls in sorted(found, key=lambda cls: (cls.family, cls.__name__))}


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text under their headers."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    lines = [headers, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def list_methods(options: Any) -> str:
    """The methods, as their classes describe them."""
    rows = [
        (name, cls.family, " ".join(cls.models), "yes" if cls.needs_fit else "no", cls.cost, cls.paper)
        for name, cls in methods().items()
    ]
    note = "cost per image: F a forward pass, B a backward pass"
    return table(("method", "family", "models", "fit first", "cost", "paper"), rows) + f"\n\n{note}"


def explainers(options: Any, loaded: LoadedModel) -> dict[str, Attribution]:
    """The methods of ``--method`` and ``--explainer`` by name, ready to explain."""
    names = [name.strip().lower() for name in (options.method or "").split(",") if name.strip()]
    ready: dict[str, Attribution] = {}
    cls: Any
    for file in (options.explainer or "").split(","):
        if file.strip():
            kind = str(checkpoint.read(file.strip()).facts.get("method", ""))
            cls = methods().get(kind.lower())
            if cls is None:
                raise CheckpointError(f"explainer: '{file}' is of the method {kind!r}, which is not installed")
            ready[kind.lower()] = cls.load(file.strip(), loaded.model)
    settings = settings_of(loaded, options)
    for name in names or ([] if ready else ["gradcam"]):
        cls = method_of(name)
        if name not in ready and cls.needs_fit:
            weights = f" --weights {shlex.quote(options.weights)}" if options.weights else ""
            raise NotFittedError(
                f"method: {name} must be trained for the model before it explains; run attrib-zoo fit --method {name} "
                f"--model {options.model}{weights} --data FOLDER --output FILE.safetensors, then add --explainer FILE"
            )
        ready.setdefault(name, cls(loaded.model, layers_of(options.layers), **accepted(cls, settings)))
    return {name: ready[name] for name in dict.fromkeys([*names, *ready])}


def load_model(options: Any) -> LoadedModel:
    """The model that ``--model``, ``--weights``, ``--classes`` and ``--device`` name."""
    names = None if options.classes is None else read_class_names(options.classes)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return load(options.model, weights=options.weights, class_names=names, device=device)


def method_of(name: str) -> type[Attribution]:
    """The method of that name on the command line."""
    known = methods()
    if name.lower() not in known:
        raise OptionError(f"method: no method {name!r}{closest(name.lower(), known)}; attrib-zoo list shows them all")
    return known[name.lower()]


def settings_of(loaded: LoadedModel, options: Any) -> dict[str, Any]:
    """What methods must know of the images' standardisation, and of the sense in which the model decides."""
    return {"mean": loaded.mean, "std": loaded.std, "score": check_choice("score", options.score, SCORES)}


def accepted(cls: type[Attribution], settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that the method has; a score only where it reads probabilities anyway."""
    known = inspect.signature(cls.__init__).parameters
    return {
        name: value
        for name, value in settings.items()
        if name in known and (name != "score" or known[name].default in SCORES)
    }


def layers_of(text: str | None) -> list[str | int] | None:
    """The layers of ``--layers``, names or indices."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    return [int(name) if name.lstrip("-").isdigit() else name for name in names]
