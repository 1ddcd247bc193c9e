"""Which tensors of a forward pass the outputs are made of, seen below autograd.

No graph is built and nothing is kept but numbers: the model may be frozen, work in ``no_grad`` blocks, detach or
checkpoint, and still it shows what came from the input and what reaches the outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

_SPATIAL_OPERATORS = ("conv", "pool2d", "upsample", "batch_norm")


class Flow(TorchDispatchMode):
    """While active, numbers every operation on something made from the input: its node, later than its parents.

    A tensor stands for its storage: views share a node, writing in place gives the storage a new one.

    Attributes:
        sizes: ``(clock, (h, w))`` of each 4-D output of a convolution, pooling, resizing or batch norm.
        clock: operations seen so far.
    """

    def __init__(self, source: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.clock = 0
        self.sizes: list[tuple[int, tuple[int, int]]] = []
        self._parents: list[tuple[int, ...]] = [()]  # node 0 is the source
        self._nodes: dict[int, tuple[StorageWeakRef, int]] = {}
        self._written: dict[Any, list[tuple[int, str]]] = {}
        self._batch = len(source)
        self._set(source, 0)

    def node(self, tensor: Tensor) -> int | None:
        """The node that made what the tensor holds now; None if it does not depend on the input."""
        key = _storage(tensor)
        return self._nodes[key.cdata][1] if key is not None and key.cdata in self._nodes else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note what its outputs are made of."""
        kwargs = kwargs or {}
        self.clock += 1
        sources = list(tensors((args, kwargs)))
        parents = {node for tensor in sources if (node := self.node(tensor)) is not None}
        out = func(*args, **kwargs)
        if not parents:
            return out
        before = {key.cdata for tensor in sources if (key := _storage(tensor)) is not None}
        results = list(tensors(out))
        fresh = [t for t in results if (key := _storage(t)) is not None and key.cdata not in before]
        written = [*fresh, *self._written_by(func, args, kwargs)]
        if written:
            self._parents.append(tuple(parents))
            for tensor in written:
                self._set(tensor, len(self._parents) - 1)
        self._note_size(str(func), results)
        return out

    def paths(self, sinks: Iterable[int]) -> tuple[list[int], int]:
        """For each node, how many ways from the source to the sinks lead through it; and how many there are.

        A node with all of them is a cut: nothing reaches the outputs but through it.
        """
        forward = [1] + [0] * (len(self._parents) - 1)
        for node, parents in enumerate(self._parents[1:], start=1):
            forward[node] = sum(forward[parent] for parent in parents)
        backward = [0] * len(self._parents)
        for sink in set(sinks):
            backward[sink] += 1
        for node in range(len(self._parents) - 1, 0, -1):
            for parent in self._parents[node]:
                backward[parent] += backward[node]
        return [ahead * behind for ahead, behind in zip(forward, backward, strict=True)], backward[0]

    def _set(self, tensor: Tensor, node: int) -> None:
        key = _storage(tensor)
        if key is not None:
            self._nodes[key.cdata] = (key, node)  # the weak reference keeps the address from being used again

    def _written_by(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
        """The arguments that an operation works on in place."""
        if func not in self._written:
            schema = getattr(func, "_schema", None)
            arguments = enumerate(schema.arguments) if schema is not None else ()
            self._written[func] = [(i, a.name) for i, a in arguments if a.alias_info and a.alias_info.is_write]
        for position, name in self._written[func]:
            yield from tensors(args[position] if position < len(args) else kwargs.get(name))

    def _note_size(self, operator: str, results: list[Tensor]) -> None:
        if any(word in operator for word in _SPATIAL_OPERATORS) and "backward" not in operator:
            for tensor in results[:1]:
                if tensor.ndim == 4 and len(tensor) == self._batch:
                    self.sizes.append((self.clock, (tensor.shape[2], tensor.shape[3])))


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, Mapping):
        yield from tensors(list(value.values()))


def _storage(tensor: Tensor) -> StorageWeakRef | None:
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):  # sparse and opaque tensors have none
        return None
