"""Several processes: joins a ``torch.distributed`` group where there is one; otherwise everything is local.

A fit communicates through a group of its own with a short timeout, so that a process that raises, hangs or dies ends
the others with a readable error instead of an abort or a wait of half an hour.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from attrib_zoo.errors import OptionError, TrainingError, reason

_Value = TypeVar("_Value")

PATIENCE = 50.0
"""Seconds in which a process of a fit waits for the others."""

VARIABLE = "ATTRIB_ZOO_PATIENCE"
"""The variable of the environment that changes it."""

_groups: list[tuple[Any, Any]] = []  # the default group, and the one with the short timeout made for it


def world_size() -> int:
    """Processes in the default group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes files and draws the progress bar."""
    return world_size() == 1 or dist.get_rank() == 0


def rank() -> int:
    """The number of this process; 0 where there is one."""
    return dist.get_rank() if world_size() > 1 else 0


def patience() -> float:
    """Seconds within which the other processes must answer.

    Raises:
        OptionError: the environment variable is not a positive number.
    """
    said = os.environ.get(VARIABLE, str(PATIENCE))
    try:
        found = float(said)
    except ValueError:
        found = 0.0
    if not 0 < found < 1e6:
        raise OptionError(f"{VARIABLE}: must be a positive number of seconds, got {said!r}; unset it, or mend it")
    return found


# ---------------------------------------------------------------------- values


def total(values: Tensor) -> Tensor:
    """The sum over the processes."""
    if world_size() == 1:
        return values
    values = values.clone()
    _add_up(values)
    return values


def mean(values: Tensor) -> Tensor:
    """The mean over the processes."""
    return total(values) / world_size()


def everyone(value: _Value, *, patient: bool = True) -> list[_Value]:
    """The values of all processes, in the order of their ranks, on each of them.

    Args:
        value: anything that can be pickled.
        patient: wait as long as the default group; otherwise with the timeout of a fit.

    Raises:
        TrainingError: another process has stopped.
    """
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    if not patient:
        with _answered():
            dist.all_gather_object(found, value, group=_side())
        return found
    try:
        dist.all_gather_object(found, value)
    except RuntimeError as error:
        raise TrainingError(
            f"another process of this run has stopped ({reason(error)}), so this one stops too; look at its messages, "
            "and start all of them again: what has been written is not done anew"
        ) from error
    return found


# ---------------------------------------------------------------------- networks


@torch.no_grad()
def align(network: nn.Module) -> None:
    """Give every process the first one's weights and buffers."""
    if world_size() > 1:
        with _answered():
            for tensor in (*network.parameters(), *network.buffers()):
                dist.broadcast(tensor.data, 0, group=_group_of(tensor))


@torch.no_grad()
def share(network: nn.Module) -> None:
    """Give every process the first one's buffers (batch statistics are local during training)."""
    if world_size() > 1:
        with _answered():
            for buffer in network.buffers():
                dist.broadcast(buffer, 0, group=_group_of(buffer))


@torch.no_grad()
def average_gradients(network: nn.Module) -> None:
    """Make each gradient its mean over the processes; only the trained network has any."""
    if world_size() == 1:
        return
    for parameter in network.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad /= world_size()
            _add_up(parameter.grad)


# ---------------------------------------------------------------------- agreement


class Meeting:
    """What the processes agree on before they continue together.

    Attributes:
        ready: whether this process can continue.
        all_ready: whether all of them can; known once the block has ended.
    """

    def __init__(self) -> None:
        self.ready = True
        self.all_ready = True


@contextmanager
def meeting() -> Iterator[Meeting]:
    """A block after which the processes wait for each other; if one raises, all raise.

    Raises:
        TrainingError: another process raised in its block, or did not arrive within :func:`patience`.
    """
    here = Meeting()
    try:
        yield here
    except BaseException as error:
        if world_size() > 1:
            with suppress(Exception):  # the first error is the one to report
                _meet(here, f"{type(error).__name__}: {reason(error)}")
        raise
    if world_size() > 1:
        _meet(here, None)
    else:
        here.all_ready = here.ready


def _meet(here: Meeting, failure: str | None) -> None:
    flags = torch.tensor([float(failure is not None), float(not here.ready)])
    _add_up(flags)
    here.all_ready = not flags[1]
    if flags[0]:
        found = [(number, said) for number, said in enumerate(everyone(failure, patient=False)) if said is not None]
        if failure is None:
            number, said = found[0]
            raise TrainingError(
                f"fit: process {number} has stopped ({said}), so all stop; mend what it says, and continue from the "
                "last checkpoint if there is one"
            )


# ---------------------------------------------------------------------- groups


def _add_up(values: Tensor) -> None:
    with _answered():
        dist.all_reduce(values, group=_group_of(values))


def _group_of(tensor: Tensor) -> Any:
    """The group with the short timeout for CPU tensors; GPU tensors use the group with their own backend."""
    return _side() if tensor.device.type == "cpu" else None


def _side() -> Any:
    """The group with the short timeout; all processes create it, at the same point of a fit."""
    world = dist.group.WORLD
    if not _groups or _groups[0][0] is not world:
        made = dist.new_group(backend="gloo", timeout=timedelta(seconds=patience()))
        _groups[:] = [(world, made)]
    return _groups[0][1]


@contextmanager
def _answered() -> Iterator[None]:
    """Inside, a process that is gone or hangs gives a one-sentence error."""
    try:
        yield
    except RuntimeError as error:
        raise TrainingError(
            f"fit: another process has stopped or has not answered for {patience():.0f} seconds ({reason(error)}), so "
            "this one stops too; look at its messages, and continue from the last checkpoint if there is one (where it "
            f"was only slow, set {VARIABLE} to more seconds)"
        ) from error
