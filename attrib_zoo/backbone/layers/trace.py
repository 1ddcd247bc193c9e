"""A forward pass observed: which modules ran, inside which, what they output and what of it the result needs.

It is a real pass over one image in eval mode without a graph. A pass over fake tensors would be free, but whatever a
model caches during a pass (a position table in ``functools.lru_cache``, a rotary embedding stored on a module) would
then stay fake; and a pass of one image costs less than the first explanation.

One image is enough to identify the batch axis. An output whose first axis is a multiple of the batch, such as windows,
has length 1 there exactly where it would have length N for N images; what has length 1 for every N, such as a table of
positions, does not depend on the images, as the data flow of the pass shows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar, cast
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from attrib_zoo.backbone.capture import call_model, frozen, select_args
from attrib_zoo.backbone.grid import Grid
from attrib_zoo.backbone.layers.extents import Extents
from attrib_zoo.backbone.module import original, refuse_shards
from attrib_zoo.backbone.nested import elements, items, replaced, tensors
from attrib_zoo.backbone.randomness import Draws
from attrib_zoo.backbone.watching import Watching
from attrib_zoo.errors import InputError

BATCH = 1

_T = TypeVar("_T")


@dataclass(eq=False)
class Output:
    """One output tensor of one call.

    Attributes:
        element: its place in a tuple, list or dict; None where the output is the tensor itself.
        shape: with the trace's batch of 1.
        same: whether the call got this tensor, or a view of it, as input and returns it.
        order: equal for outputs whose entries lie in the same places: each was made from the other's entry by entry.
        on_path: whether the model's outputs depend on it.
        grid: how it holds a map; None where it does not.
        hw: rows and columns of that map.
        channels: C of that map.
    """

    element: int | str | None
    shape: tuple[int, ...]
    node: int | None
    same: bool = False
    order: Hashable = None
    on_path: bool = False
    grid: Grid | None = None
    hw: tuple[int, int] = (0, 0)
    channels: int = 0


@dataclass(eq=False)
class Call:
    """One run of one module.

    Attributes:
        name: dotted path of the module in the unwrapped model; empty for the model itself.
        reference: to the module, weak, since a trace is kept for as long as its model lives.
        number: which run of this module it is, counted from 0.
        begin: the clock when it began; ``end`` when it ended.
        parent: the call that it ran inside.
        children: the calls that ran directly inside it.
        outputs: its tensors, not deeper than one level of tuple, list or dict.
        cut: everything that reaches the model's outputs passes through this call's outputs.
    """

    name: str
    reference: ReferenceType[nn.Module] = field(repr=False)
    number: int
    begin: int
    parent: Call | None = None
    end: int = 0
    children: list[Call] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    cut: bool = False

    @property
    def module(self) -> nn.Module:
        """The user's own module whose mirror ran."""
        return _alive(self.reference)

    def inside(self) -> Iterator[Call]:
        """All calls within this one, in the order in which they began."""
        for child in self.children:
            yield child
            yield from child.inside()


@dataclass(eq=False)
class Trace:
    """The record of one forward pass.

    Attributes:
        size: (H, W) of the input.
        root: the call of the model itself.
        sizes: ``(clock, (h, w))``: the spatial sizes seen during the pass.
        extents: what grids of each size cover of the image.
        derived: conclusions drawn from it, kept here so that each is drawn once.
    """

    size: tuple[int, int]
    root: Call
    sizes: list[tuple[int, tuple[int, int]]]
    extents: Extents = field(repr=False)
    derived: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @property
    def model(self) -> nn.Module:
        """The user's own model, unwrapped. The pass ran on its mirror; the calls name the user's own modules."""
        return self.root.module

    def once(self, question: Hashable, find: Callable[[], _T]) -> _T:
        """What ``find`` concludes from this trace; computed once."""
        if question not in self.derived:
            return cast("_T", self.derived.setdefault(question, find()))  # two threads agree on the first answer
        return cast("_T", self.derived[question])

    def calls(self) -> list[Call]:
        """Every call but the model's own, in the order in which they ended."""
        return sorted(self.root.inside(), key=lambda call: call.end)

    def count(self, module: nn.Module) -> int:
        """How often this module ran."""
        return sum(call.module is module for call in self.root.inside())


def trace(model: nn.Module, inputs: Tensor, args: Sequence[Any] = ()) -> Trace:
    """Run the model once on the first image and record what happens.

    Hooks, modes and random state are as before when it returns, also if the model raises.

    Args:
        model: the user's model; wrappers are removed.
        inputs: ``(N, C, H, W)``.
        args: further arguments of its forward; tensors with N rows are cut to the same example.
    """
    if inputs.ndim != 4 or not len(inputs):
        raise InputError(f"inputs: must be images (N, C, H, W) with N > 0, got shape {tuple(inputs.shape)}")
    own = original(model)
    rows = torch.zeros(BATCH, dtype=torch.long, device=inputs.device)
    draws = Draws(inputs.device)
    with torch.inference_mode(False), torch.no_grad(), frozen(model) as bare:
        refuse_shards(bare)
        images = inputs.detach()[rows]
        flow = Flow(images, draws)
        recorder = _Recorder(flow, dict(_layers(own)))
        with ExitStack() as stack:
            for name, module in _layers(bare):
                recorder.names[module] = name
                stack.callback(module.register_forward_pre_hook(recorder.begin, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(recorder.end).remove)
            stack.callback(draws.take_back)
            stack.enter_context(flow)
            outputs = call_model(bare, images, select_args(args, rows, len(inputs)))
        _mark_paths(recorder.root, flow, outputs)
    return Trace((inputs.shape[2], inputs.shape[3]), recorder.root, flow.sizes, flow.extents)


def layer_names(model: nn.Module) -> dict[str, nn.Module]:
    """Dotted path to module for every layer of an unwrapped model, as if no submodule were compiled."""
    return {name: module for name, module in _layers(model) if name}


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if "_orig_mod" not in module._modules:  # torch.compile's wrapper, whose content comes next
            yield ".".join(part for part in name.split(".") if part != "_orig_mod"), module


class _Recorder:
    """The hooks that build the tree of calls."""

    def __init__(self, flow: Flow, modules: dict[str, nn.Module]) -> None:
        self.names: dict[nn.Module, str] = {}  # of what runs
        self.root: Call
        self._modules = modules
        self._flow = flow
        self._running: list[Call] = []
        self._given: list[tuple[set[int | None], set[int | None]]] = []
        self._runs: dict[nn.Module, int] = {}

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        number = self._runs[module] = self._runs.get(module, -1) + 1
        parent = self._running[-1] if self._running else None
        self._flow.clock += 1
        name = self.names[module]
        call = Call(name, ref(self._modules[name]), number, self._flow.clock, parent)
        if parent is None:
            self.root = call
        self._running.append(call)
        given = list(tensors((args, kwargs)))
        self._given.append(({self._flow.node(tensor) for tensor in given}, {_address(tensor) for tensor in given}))
        self._flow.sizes.extend((call.begin, pair) for pair in _pairs((args, kwargs)))

    def end(self, module: nn.Module, _: Any, output: Any) -> Any:
        while self._running[-1].name != self.names[module]:  # a call that raised inside a try block of the model's own
            self._running.pop()
            self._given.pop()
        call, (nodes, places) = self._running.pop(), self._given.pop()
        call.end = self._flow.clock = self._flow.clock + 1
        if call.parent is not None:
            call.parent.children.append(call)
        found = elements(output)
        nodes.discard(None)
        same = {key for key, tensor in found.items() if self._flow.node(tensor) in nodes}
        own = self._own(output, found, places, nodes | {None})
        call.outputs = [
            Output(
                element,
                tuple(tensor.shape),
                self._flow.node(tensor),
                same=element in same,
                order=self._flow.order(tensor),
            )
            for element, tensor in (found if own is output else elements(own)).items()
        ]
        return own

    def _own(
        self,
        output: Any,
        found: Mapping[int | str | None, Tensor],
        given: set[int | None],
        nodes: set[int | None],
    ) -> Any:
        """The output with a node of its own for each tensor, which stands for what the module returns.

        A tensor that shares its memory, because it was also an input or is returned twice, is copied: otherwise
        operations on the other one would count for this one. For all others a new node is enough, also where the
        module has worked in place: its input is then what it returns.
        """
        places = [_address(tensor) for tensor in found.values()]
        shared = [
            place in given and self._flow.node(t) in nodes for place, t in zip(places, found.values(), strict=True)
        ]
        if any(place is None or places.count(place) > 1 for place in places) or any(shared):
            return _copied(output)
        for tensor in found.values():
            self._flow.renew(tensor)
        return output


def _copied(output: Any) -> Any:
    """The output with each tensor copied, so that a node of its own stands for what the module returns."""
    if isinstance(output, Tensor):
        return output.clone()
    copies = {place: tensor.clone() for place, tensor in elements(output).items()}
    return replaced(output, copies) if copies else output


def _pairs(value: Any) -> Iterator[tuple[int, int]]:
    """Adjacent integers among the arguments: models pass (h, w) along with their tokens."""
    entries = [entry for _, entry in items(value)]
    for first, second in pairwise(entries):
        if type(first) is int and type(second) is int:
            yield first, second
    for entry in entries:
        yield from _pairs(entry)


def _mark_paths(root: Call, flow: Flow, outputs: Any) -> None:
    """Fill in what reaches the model's outputs, and what everything passes through."""
    sinks = [node for tensor in tensors(outputs) if (node := flow.node(tensor)) is not None]
    through, total = flow.paths(sinks)
    for call in root.inside():
        for output in call.outputs:
            output.on_path = not total if output.node is None else through[output.node] > 0 or not total
        nodes = {output.node for output in call.outputs if output.node is not None}
        call.cut = not total or sum(through[node] for node in nodes) == total


# ---------------------------------------------------------------------- what the outputs depend on

_ENTRYWISE_OPERATORS = ("clone", "_to_copy", "layer_norm", "batch_norm", "group_norm")  # and those that torch marks
_SPATIAL_OPERATORS = ("conv", "pool2d", "upsample", "batch_norm")


class Flow(Watching):
    """While active, numbers every operation on something made from the input: its node, later than its parents.

    A tensor stands for its storage: views share a node, an in-place write gives the storage a new one.

    Attributes:
        sizes: ``(clock, (h, w))`` of each 4-D output of a convolution, pooling, resizing or batch norm.
        clock: operations seen so far.
        extents: what grids of each size cover of the source.
    """

    def __init__(self, source: Tensor, draws: Draws) -> None:
        super().__init__()
        self._draws = draws  # watched here, since a dispatch mode of its own would cost every operation once more
        self.clock = 0
        self.sizes: list[tuple[int, tuple[int, int]]] = []
        self._parents: list[tuple[int, ...]] = [()]  # node 0 is the source
        self._orders = [0]  # for each node the first one whose entries lie in the same places of their memory
        self._nodes: dict[int | None, tuple[StorageWeakRef, int]] = {}
        self._operators: dict[Any, _Operator] = {}
        self._batch = len(source)
        self.extents = Extents((source.shape[-2], source.shape[-1]))
        self._set(source, 0)

    def node(self, tensor: Tensor) -> int | None:
        """The node that made what the tensor holds now; None if it does not depend on the input."""
        found = self._nodes.get(_address(tensor))
        return None if found is None else found[1]

    def order(self, tensor: Tensor) -> Hashable:
        """Equal for two tensors of one shape if each entry of one was made from the entry in its place of the other."""
        node = self.node(tensor)
        return None if node is None else (self._orders[node], tuple(tensor.shape), _places(tensor))

    def renew(self, tensor: Tensor) -> None:
        """Give the tensor's contents a node of their own, as a copy would have."""
        node = self.node(tensor)
        if node is not None:
            self._parents.append((node,))
            self._orders.append(self._orders[node])
            self._set(tensor, len(self._parents) - 1)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and record what its outputs depend on."""
        kwargs = kwargs or {}
        self.clock += 1
        given = [(tensor, _address(tensor)) for tensor in tensors((*args, *kwargs.values()))]
        nodes = self._nodes
        parents = {nodes[place][1] for _, place in given if place in nodes}
        out = self._draws.call(func, args, kwargs)
        if not parents:
            return out
        operator = self._operators.get(func) or self._operators.setdefault(func, _Operator(func))
        results = [out] if isinstance(out, Tensor) else list(tensors(out))
        before = {None, *(place for _, place in given)}
        written = [tensor for tensor in results if _address(tensor) not in before]
        for position, name in operator.writes:
            written += tensors(args[position] if position < len(args) else kwargs.get(name))
        if written:
            node = len(self._parents)
            self._parents.append(tuple(parents))
            kept = self._kept(given, _places(results[0])) if operator.entrywise and results else ()
            self._orders.append(min((node, *kept)))
            for tensor in written:
                self._set(tensor, node)
        if operator.spatial:
            self._note_size(results)
        if operator.placed:
            self.extents.see(operator.name, args, results)
        return out

    def _kept(self, given: Iterable[tuple[Tensor, int | None]], where: Hashable) -> Iterator[int]:
        """The orders of what an entry-by-entry operation was given, where it lies as its result does."""
        for tensor, place in given:
            if place in self._nodes and _places(tensor) == where:
                yield self._orders[self._nodes[place][1]]

    def paths(self, sinks: Iterable[int]) -> tuple[list[int], int]:
        """For each node, how many ways from the source to the sinks lead through it; and how many there are.

        A node with all of them is a cut: nothing reaches the outputs except through it.
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
        if (place := _address(tensor)) is not None:
            key = StorageWeakRef(tensor.untyped_storage())
            self._nodes[place] = (key, node)  # the weak reference keeps the address from being reused

    def _note_size(self, results: list[Tensor]) -> None:
        for tensor in results[:1]:
            if tensor.ndim == 4 and len(tensor) == self._batch:
                self.sizes.append((self.clock, (tensor.shape[2], tensor.shape[3])))


class _Operator:
    """What is asked of every call of an operator, found once: most operators run many times in a pass."""

    def __init__(self, func: Any) -> None:
        self.name = str(func)
        schema = getattr(func, "_schema", None)
        arguments = enumerate(schema.arguments) if schema is not None else ()
        self.writes = [(i, a.name) for i, a in arguments if a.alias_info and a.alias_info.is_write]  # in place
        self.spatial = any(word in self.name for word in _SPATIAL_OPERATORS) and "backward" not in self.name
        self.placed = Extents.concerns(self.name)
        self.entrywise = torch.Tag.pointwise in getattr(func, "tags", ()) or any(
            word in self.name for word in _ENTRYWISE_OPERATORS
        )


def _places(tensor: Tensor) -> Hashable:
    """Where in its memory each entry of a tensor lies."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.storage_offset(), tuple(size for size in sizes if size[0] != 1)


def _alive(reference: ReferenceType[nn.Module]) -> nn.Module:
    module = reference()
    if module is None:
        raise RuntimeError("the model of this trace is gone; hold on to the model for as long as to what was traced")
    return module


def _address(tensor: Tensor) -> int | None:
    """What distinguishes a tensor's memory from that of all other live tensors; None where it has none of its own."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and opaque tensors have none
        return None
