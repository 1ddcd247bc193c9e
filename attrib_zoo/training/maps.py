"""The maps that a head makes of features: of which classes, checked to be those of its fit, in parts where many."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.grid import Tap
from attrib_zoo.errors import InputError, LayerError, UnsupportedModelError
from attrib_zoo.masking import free_bytes
from attrib_zoo.training.checkpoint import Fitted
from attrib_zoo.training.head import AttentionHead
from attrib_zoo.training.losses import two_logits


def class_count(outputs: Tensor) -> int:
    """K of ``(N, K)`` logits; 2 for one value per image.

    Raises:
        UnsupportedModelError: the outputs have any other shape.
    """
    if outputs.ndim > 2:
        raise UnsupportedModelError(
            f"model: must return (N, K) logits to fit an explainer, got shape {tuple(outputs.shape)}; wrap it in a "
            "module that gives one score per class"
        )
    return two_logits(outputs).shape[1]


def check_same(name: str, fitted: Fitted, outputs: Tensor, taps: Sequence[Tap]) -> None:
    """Raise if the model's classes or channels differ from those in the fit."""
    if class_count(outputs) != fitted.num_classes:
        raise UnsupportedModelError(
            f"model: must have the {fitted.num_classes} classes that {name} was fitted for, "
            f"got {class_count(outputs)}; fit again for the changed model"
        )
    channels = tuple(tap.channels for tap in taps)
    if channels != fitted.channels:
        raise LayerError(
            f"layers: must have {fitted.channels} channels as in fit, got {channels}; fit again for the changed model"
        )


def head_maps(network: nn.Module, features: Sequence[Tensor], rows: Tensor | None) -> Tensor:
    """The network's maps ``(N, M, h, w)``; it keeps its own precision inside autocast."""
    with torch.autocast(features[0].device.type, enabled=False):
        maps: Tensor = network(features, rows)
    return maps


class _Fusing(nn.Module):
    """The half of a head that depends on the classes."""

    def __init__(self, head: AttentionHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, attended: Sequence[Tensor], rows: Tensor | None = None) -> Tensor:
        """The maps of features that :meth:`AttentionHead.attend` returned."""
        return self.head.fuse(attended, rows)


def begun(network: nn.Module, features: Sequence[Tensor]) -> tuple[nn.Module, list[Tensor]]:
    """A network and features for :func:`head_maps` with the same result, at less cost for each part of the classes."""
    if type(network) is not AttentionHead:
        return network, list(features)
    with torch.autocast(features[0].device.type, enabled=False):
        return _Fusing(network), network.attend(features)


_SMALL = 4 * 2**20  # bytes of maps that are computed at once, which takes a few times their size
_PARTS = 40  # that the maps of very many classes are split into


def is_small(network: nn.Module, features: Sequence[Tensor], classes: int) -> bool:
    """Whether the maps of all classes are small enough to exist several times."""
    one = head_maps(network, features, torch.zeros(len(features[0]), 1, dtype=torch.long, device=features[0].device))
    return one.numel() * one.element_size() * classes <= _SMALL


def in_parts(compute: Callable[[Tensor], Tensor], classes: Tensor, dtype: torch.dtype) -> Tensor:
    """Maps ``(N, M, h, w)`` of the classes ``(M,)``, computed in parts.

    Raises:
        InputError: they do not fit into the free memory.
    """
    first = compute(classes[:1])
    count, _, height, width = first.shape
    size = count * height * width * torch.empty(0, dtype=dtype).element_size()
    free = free_bytes(first.device)
    if free is not None and 1.3 * size * len(classes) > free:
        raise InputError(
            f"inputs: {count} image{'s' * (count > 1)} with maps of {len(classes)} classes, {height} x {width} each, "
            f"take {size * len(classes) / 1e9:.3g} GB, and {free / 1e9:.3g} GB of memory are free; name the classes "
            "that are wanted (classes=[...]), or pass fewer images"
        )
    found = torch.empty(count, len(classes), height, width, dtype=dtype, device=first.device)
    step = max(1, min(len(classes), max(len(classes) // _PARTS, _SMALL // 2 // max(size, 1))))
    for start in range(0, len(classes), step):
        found[:, start : start + step] = compute(classes[start : start + step])
    return found
