"""Several processes: joins a ``torch.distributed`` group where there is one; otherwise everything is local."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

_Value = TypeVar("_Value")


def world_size() -> int:
    """Processes in the default group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes files and draws the progress bar."""
    return world_size() == 1 or dist.get_rank() == 0


def wrap(network: nn.Module) -> nn.Module:
    """The network with its gradients averaged over the processes; only the network, never the frozen model."""
    if world_size() == 1:
        return network
    device = next(network.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(network, device_ids=ids)


def total(values: Tensor) -> Tensor:
    """The sum over the processes."""
    if world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values


def mean(values: Tensor) -> Tensor:
    """The mean over the processes."""
    return total(values) / world_size()


def share(network: nn.Module) -> None:
    """Give every process the first one's buffers (batch statistics are local during training)."""
    if world_size() > 1:
        with torch.no_grad():
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)


def rank() -> int:
    """The number of this process; 0 where there is one."""
    return dist.get_rank() if world_size() > 1 else 0


def everyone(value: _Value) -> list[_Value]:
    """What each process holds, in the order of their numbers, on all of them."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found
