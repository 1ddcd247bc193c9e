"""What a map costs: samples through the model, time, and memory; counted while the method runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from attrib_zoo.backbone.capture import unwrap
from attrib_zoo.backbone.watching import Watching


@dataclass
class Cost:
    """Sums over images; two of them can be added.

    Attributes:
        images: images explained.
        forward: samples that went through the model, masked copies included; a pass that starts at a layer counts
            as a whole one.
        backward: samples whose outputs were differentiated.
        seconds: time of the calls: processor time of this process, on a GPU wall time.
        plain: time of one plain forward pass of the same images.
        peak: largest number of bytes that a call held beyond what was there before; ``None`` where not measured.
    """

    images: int = 0
    forward: int = 0
    backward: int = 0
    seconds: float = 0.0
    plain: float = 0.0
    peak: int | None = None

    def __add__(self, other: Cost) -> Cost:
        peaks = [cost.peak for cost in (self, other) if cost.peak is not None]
        return Cost(
            self.images + other.images,
            self.forward + other.forward,
            self.backward + other.backward,
            self.seconds + other.seconds,
            self.plain + other.plain,
            max(peaks, default=None),
        )

    @property
    def times_forward(self) -> float:
        """The time as a multiple of a plain forward pass of the same images."""
        return self.seconds / self.plain if self.plain > 0 else float("nan")

    def facts(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def clock(device: torch.device) -> float:
    """Seconds: processor time on a CPU, which other load hardly changes; on a GPU, wall time with its queue empty."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def timed(function: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    """The result and the seconds that it took."""
    start = clock(device)
    result = function()
    return result, clock(device) - start


def measured(function: Callable[[], Tensor], model: nn.Module, images: int) -> tuple[Tensor, Cost]:
    """Run a call that explains this many images; its result and its cost (without ``plain``)."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    cost = Cost(images)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with _counting(model, cost):
        result, cost.seconds = timed(function, device)
    if device.type == "cuda":
        cost.peak = torch.cuda.max_memory_allocated(device) - before
    return result, cost


@contextmanager
def _counting(model: nn.Module, cost: Cost) -> Iterator[None]:
    def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
        cost.forward += len(args[0]) if args and isinstance(args[0], Tensor) else 0

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(back)

    def back(gradient: Tensor) -> None:
        cost.backward += len(gradient)

    bare = unwrap(model)
    handles = [bare.register_forward_pre_hook(enter), bare.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def peak_bytes(function: Callable[[], Any]) -> int:
    """The largest number of bytes held at once by tensors made while a function ran.

    Memory that a single operation uses internally is not seen. Run it separately from a timing: it slows small
    operations.
    """
    mode = _Held()
    with mode:
        function()
    return mode.peak


class _Held(Watching):
    """Adds up the live storages that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        self._live = {key: (ref, size) for key, (ref, size) in self._live.items() if not ref.expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given:  # views and in-place results are what was given
                    self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result
