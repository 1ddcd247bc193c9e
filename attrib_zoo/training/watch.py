"""Is a model still the one that an explainer was fitted for? Checked at every call, so it must cost next to nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo.training.checkpoint import fingerprint

_SAMPLE = 64  # values of each tensor


class Watch:
    """Notices that a model's weights have changed since the watch began.

    A call compares the addresses of the weights, torch's count of writes to them, and 64 values of each, since writes
    through ``.data`` are not counted; of these, one that changes few values of a large tensor can go unnoticed. Only if
    something differs are all weights read: they may have been moved, reloaded or converted to another floating-point
    dtype, which does not change the model.

    Args:
        model: the user's own model, unwrapped: the weights of a mirror may be copies.
        backbone: its fingerprint, by ``training.checkpoint.fingerprint``.
    """

    def __init__(self, model: nn.Module, backbone: str) -> None:
        self._backbone = backbone
        self._values, self._types = _values(model), _types(model)
        self._seen = _state(model)

    def noticed(self, model: nn.Module) -> bool:
        """Whether the model now has other weights."""
        state = _state(model)
        if state == self._seen:
            return False
        if fingerprint(model) != self._backbone and not self._converted(model):
            return True
        self._seen = state
        return False

    def _converted(self, model: nn.Module) -> bool:
        """Whether the weights are the result of a conversion: of another dtype, and equal up to its rounding."""
        types, values = _types(model), _values(model)
        if types == self._types or len(types) != len(self._types) or len(values) != len(self._values):
            return False
        coarsest = max((torch.finfo(kind) for kind in (*types, *self._types)), key=lambda info: info.eps)
        return torch.allclose(values, self._values, rtol=2 * coarsest.eps, atol=coarsest.tiny, equal_nan=True)


def _state(model: nn.Module) -> tuple[list[tuple[int, int]], list[bytes]]:
    """Addresses, counts of writes, and the values of a sample, which lies evenly over the memory of each tensor.

    What lies between the values of a tensor that is not dense may be sampled too; if it changes, all weights are read.
    """
    samples: dict[Any, list[Tensor]] = defaultdict(list)
    places = []
    for tensor in _tensors(model):
        places.append(_place(tensor))
        if tensor.numel() and not tensor.is_quantized:
            length = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
            step = -(-length // _SAMPLE)
            samples[tensor.device, tensor.dtype].append(tensor.detach().as_strided((-(-length // step),), (step,)))
    return places, [torch.cat(found).cpu().view(torch.uint8).numpy().tobytes() for found in samples.values()]


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, except sharded and other special tensors, which cannot be read cheaply."""
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None or type(tensor) not in (Tensor, nn.Parameter):
                continue
            if tensor.layout is torch.strided and not tensor.is_meta:
                yield tensor


def _place(tensor: Tensor) -> tuple[int, int]:
    """Its address and its count of writes, which a tensor made in inference mode does not have."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


def _matrices(model: nn.Module) -> Iterator[Tensor]:
    return (t for t in _tensors(model) if t.is_floating_point() and t.ndim > 1 and t.numel() and not t.is_quantized)


def _types(model: nn.Module) -> list[torch.dtype]:
    return [matrix.dtype for matrix in _matrices(model)]


def _values(model: nn.Module) -> Tensor:
    """The value in the middle of each weight matrix, in float64 on the CPU: one copy from each device and dtype."""
    places: dict[Any, list[int]] = defaultdict(list)
    found: dict[Any, list[Tensor]] = defaultdict(list)
    count = 0
    for place, matrix in enumerate(_matrices(model)):
        middle = sum(stride * (size // 2) for size, stride in zip(matrix.shape, matrix.stride(), strict=True))
        key = matrix.device, matrix.dtype
        places[key].append(place)  # a view launches no kernel, so that a GPU has one launch and not one per matrix
        found[key].append(matrix.detach().as_strided((), (), matrix.storage_offset() + middle))
        count = place + 1
    values = torch.zeros(count, dtype=torch.float64)
    for key, scalars in found.items():
        values[places[key]] = torch.stack(scalars).cpu().to(torch.float64)
    return values
