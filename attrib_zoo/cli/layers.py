"""The command ``layers``: which layers a model has, and which methods explain them; returns the text to print."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from attrib_zoo.backbone.kind import is_transformer
from attrib_zoo.backbone.layers import describe
from attrib_zoo.cli.shared import methods
from attrib_zoo.errors import AttribZooError, OptionError, reason
from attrib_zoo.models import unloaded


def layers(options: Any) -> str:
    """Which layers of a model can be explained, and which method takes which by default."""
    asked = None if options.size is None else _size(options.size)
    model, size = unloaded(options.model)
    if asked is not None:
        size = (size[0], *asked)
    try:
        with torch.no_grad():
            description = describe(model.eval(), torch.zeros(1, *size))
    except (AssertionError, RuntimeError) as error:  # the model's own error message
        if isinstance(error, AttribZooError) or asked is None:
            raise
        raise OptionError(
            f"size: {options.model} takes no images of {options.size} ({reason(error)}); choose another --size, or "
            "leave it out"
        ) from error
    return f"{description}\n\n{_takers(model)}"


def _size(text: str) -> tuple[int, int]:
    """``"160x256"`` as height and width; one number is both."""
    height, _, width = text.partition("x")
    if not (height.isdigit() and (width or height).isdigit() and int(height) and int(width or height)):
        raise OptionError(f"size: must be a height and a width such as 160x256, or one number, got {text!r}")
    return int(height), int(width or height)


def _takers(model: nn.Module) -> str:
    """Which method takes which of the defaults in the table, for the methods that fit this kind of model."""
    kind = "vit" if is_transformer(model) else "cnn"
    by_rule: dict[str, list[str]] = {}
    for cls in methods().values():
        if kind not in cls.models:
            continue
        rule = cls(model).layer_rule()
        counted = rule is not None and rule[0] in ("outputs", "norms")
        name = "no layers" if rule is None else f"{rule[0]} ({rule[1]})" if counted else rule[0]
        by_rule.setdefault(name, []).append(cls.__name__)
    width = max(map(len, by_rule))
    lines = [f"  {rule:{width}}  {', '.join(names)}" for rule, names in sorted(by_rule.items())]
    return "\n".join(["taken by default:", *lines])
