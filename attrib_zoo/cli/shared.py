"""What several commands need: the model, the methods and the explainers that their options name."""

from __future__ import annotations

import importlib
import inspect
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from attrib_zoo.attribution import SCALES, Attribution, check_smooth
from attrib_zoo.errors import CheckpointError, NotFittedError, OptionError, aligned, check_choice, closest
from attrib_zoo.methods import list_methods
from attrib_zoo.models import LoadedModel, load, read_class_names
from attrib_zoo.training import checkpoint

SCORES = ("softmax", "sigmoid")
"""What --score may be: the model decides for one of all classes, or for each class by itself."""


def methods() -> dict[str, type[Attribution]]:
    """Every method of the library by the name it has on the command line: its class name in lower case."""
    known = sorted(list_methods().values(), key=lambda cls: (cls.family, cls.__name__))
    return {cls.__name__.lower(): cls for cls in known}


def overview(options: Any) -> str:
    """The methods, as their classes describe them."""
    rows = [
        (name, cls.family, " ".join(cls.models), "yes" if cls.needs_fit else "no", cls.cost, cls.paper)
        for name, cls in methods().items()
    ]
    head = ("method", "family", "models", "fit first", "cost", "paper")
    agnostic = ", ".join(name for name, cls in methods().items() if cls.class_agnostic)
    notes = [
        "cost per image: F a forward pass, B a backward pass",
        f"class-agnostic, so that they explain no decision: {agnostic}",
    ]
    return "\n".join([*aligned([head, *rows], rule=True), "", *notes])


def explainers(options: Any, loaded: LoadedModel) -> dict[str, Attribution]:
    """The methods of ``--method`` and ``--explainer`` by name, ready to explain."""
    asked = [name.strip() for name in (options.method or "").split(",") if name.strip()]
    named: dict[str, Any] = {}
    spelt: dict[str, str] = {}
    for name in asked:
        cls: Any = method_of(name)
        key = cls.__name__.lower()
        if named.setdefault(key, cls) is not cls:
            raise OptionError(f"method: each must have a name of its own, got {spelt[key]} and {name}; rename a class")
        spelt.setdefault(key, name)
    ready: dict[str, Attribution] = {}
    for file in (options.explainer or "").split(","):
        if file.strip():
            kind = str(checkpoint.read_facts(file.strip()).get("method", ""))
            cls = {**methods(), **named}.get(kind.lower())
            if cls is None:
                raise CheckpointError(
                    f"explainer: '{file}' is of the method {kind!r}, which is not part of attrib_zoo; add --method "
                    f"package.module:{kind}"
                )
            ready[kind.lower()] = cls.load(file.strip(), loaded.model)
    settings = settings_of(loaded, options)
    if not named and not ready:
        named["gradcam"], spelt["gradcam"] = method_of("gradcam"), "gradcam"
    for key, cls in named.items():
        if key not in ready and cls.needs_fit:
            weights = f" --weights {shlex.quote(options.weights)}" if options.weights else ""
            raise NotFittedError(
                f"method: {spelt[key]} must be trained for the model before it explains; run attrib-zoo fit --method "
                f"{spelt[key]} --model {options.model}{weights} --data FOLDER --output FILE.safetensors, then add "
                "--explainer FILE"
            )
        ready.setdefault(key, cls(loaded.model, layers_of(options.layers), **accepted(cls, settings)))
    for name, explainer in ready.items():
        _shape(name, explainer, options.smooth, options.scale)
    return {name: ready[name] for name in dict.fromkeys([*named, *ready])}


def _shape(name: str, explainer: Attribution, smooth: int | None, scale: str | None) -> None:
    """Give an explainer, new or loaded, the ``--smooth`` and ``--scale`` requested."""
    if smooth is not None:
        if "smooth" not in explainer.options():
            raise OptionError(
                f"smooth: {name} makes its map at the resolution of the image, so there are no cells to average over; "
                "leave the method or --smooth out"
            )
        explainer.smooth = check_smooth(smooth)
    if scale is not None:
        explainer.scale = check_choice("scale", scale, tuple(SCALES))


def load_model(options: Any) -> LoadedModel:
    """The model that ``--model``, ``--weights``, ``--classes`` and ``--device`` name."""
    names = None if options.classes is None else read_class_names(options.classes)
    device = options.device
    if device == "auto":
        own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # torchrun: a process for each GPU
        device = own if torch.cuda.is_available() else "cpu"
    return load(options.model, weights=options.weights, class_names=names, device=device)


def method_of(name: str) -> type[Attribution]:
    """The method of that name on the command line, or the class that ``package.module:Class`` names."""
    if ":" in name:
        return _imported(name)
    known = methods()
    if name.lower() not in known:
        raise OptionError(
            f"method: no method {name!r}{closest(name.lower(), known)}; attrib-zoo list shows them all, and a class of "
            "your own is package.module:Class"
        )
    return known[name.lower()]


def _imported(name: str) -> type[Attribution]:
    """A class of the user's own, from an installed package or a file in the current folder."""
    module_name, _, class_name = name.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:  # as with python -m; a console script looks in its own folder instead
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise OptionError(
            f"method: cannot import {module_name!r} ({error}); give package.module:Class of an installed package or of "
            "a file in the current folder"
        ) from error
    cls = getattr(module, class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, Attribution)) or inspect.isabstract(cls):
        own = [
            key
            for key, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, Attribution) and value.__module__ == module.__name__
        ]
        raise OptionError(
            f"method: {class_name!r} of {module_name!r} must be a subclass of attrib_zoo.methods.Attribution that "
            f"fills its hooks; the module has {', '.join(own) or 'none'}"
        )
    return cls


def settings_of(loaded: LoadedModel, options: Any) -> dict[str, Any]:
    """What methods need to know about the images' standardisation, and about how the model decides."""
    return {"mean": loaded.mean, "std": loaded.std, "score": check_choice("score", options.score, SCORES)}


def accepted(cls: type[Attribution], settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that the method accepts; a score only where it reads probabilities anyway."""
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
