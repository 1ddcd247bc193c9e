"""Running a model again from one layer, with another activation there, without the cost of the layers before it.

The whole model is called again, but every module that had finished before the layer returns its recorded output, so
only the part after the layer computes; functional operations between modules still run. Nothing is traced and nothing
is split by hand. Where this cannot reproduce the model, it is noticed, and the whole model runs instead.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.capture import forward, listening, select_args
from attrib_zoo.backbone.grid import Tap
from attrib_zoo.backbone.module import find, unwrap
from attrib_zoo.backbone.nested import map_tensors, tensors
from attrib_zoo.errors import InputError, LayerError

_log = logging.getLogger(__name__)

_Records = dict[nn.Module, list[Any]]


class Replay:
    """One clean pass, and the means to run it again from a layer; made by :func:`replay`.

    Attributes:
        outputs: the model's clean outputs ``(N, ...)``.
        maps: the layer's own activation ``(N, C, h, w)``, as the rest of the model sees it.
        shortcut: whether only the part after the layer runs. It becomes false, for good, where the model does
            something that recorded outputs cannot reproduce; the results are the same, at the price of full passes.
    """

    def __init__(self, model: nn.Module, inputs: Tensor, args: Sequence[Any], tap: Tap) -> None:
        self._model, self._inputs, self._args, self._tap = model, inputs, args, tap
        self._records, self._replayed_tap, activation, self.outputs = _record(model, inputs, args, tap)
        self.maps = tap.grid.to_map(activation)
        self._copies = False
        self.shortcut = True
        self._check_itself(activation)

    def __call__(self, maps: Tensor, rows: Tensor) -> Tensor:
        """The outputs ``(M, ...)`` of M passes in which other maps replace the layer's own.

        Rows that all belong to one image share its records without a copy; with several images they are gathered.
        The model's own forward hooks run again, on M rows.

        Args:
            maps: ``(M, C, h, w)``; prefix tokens stay as they are. Where they require grad, the outputs can be
                differentiated with respect to them.
            rows: ``(M,)`` int64, the image that each map belongs to.
        """
        if len(maps) != len(rows):
            raise InputError(f"rows: must name an image for each of the {len(maps)} maps, got {len(rows)}; pass (M,)")
        outputs = self._from_layer(maps, rows, lambda _: True) if self._records else None
        if outputs is None:
            outputs = self._pass(maps, _Rows(rows, len(self.outputs), copies=True), self._tap)
        return outputs

    def _check_itself(self, activation: Tensor) -> None:
        """The layer's own maps, in another order (for one image, twice), must give the clean outputs."""
        # Reversed, so that records given back to the wrong image show; in their own order they would not.
        count = len(self.outputs)
        rows = torch.arange(count - 1, -1, -1) if count > 1 else torch.zeros(2, dtype=torch.long)
        at = rows.to(self.outputs.device)
        tolerance = _tolerance(self.outputs, activation, same_size=count > 1)

        def close(outputs: Tensor) -> bool:
            error = (outputs - self.outputs[at]).abs().max()
            return bool(error <= tolerance * self.outputs.abs().max())

        self._from_layer(self.maps[rows.to(self.maps.device)], rows, close)

    def _from_layer(self, maps: Tensor, rows: Tensor, accept: Callable[[Tensor], bool]) -> Tensor | None:
        """Replay, first on views of the records and, where the model writes into them, on copies."""
        for copies in (False, True)[self._copies :]:
            self._copies = copies
            try:
                outputs = self._replay(maps, rows)
                if accept(outputs) and not self._spoilt():
                    return outputs
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:
                _log.debug("replay from %r, copies=%s: %s", self._tap.name, copies, error)
        self.shortcut = False
        self._records = {}
        _log.info("%s cannot be run from %r alone; running all of it", type(self._model).__name__, self._tap.name)
        return None

    def _spoilt(self) -> bool:
        """Whether the model has written into a record, so that the next replay would start from something else."""
        return any(tensor._version for outputs in self._records.values() for tensor in tensors(outputs))

    def _replay(self, maps: Tensor, rows: Tensor) -> Tensor:
        taken = _Rows(rows, len(self.outputs), copies=self._copies)
        queues = {module: deque(outputs) for module, outputs in self._records.items()}
        with ExitStack() as stack:
            for module, queue in queues.items():
                stack.enter_context(_answering(module, queue, taken))
            outputs = self._pass(maps, taken, self._replayed_tap)
        if any(queues.values()):  # unused records: this batch size took another way through the model
            raise LayerError(f"{type(self._model).__name__} runs other modules for {len(rows)} images")
        return outputs

    def _pass(self, maps: Tensor, rows: _Rows, tap: Tap) -> Tensor:
        """One call of the model in which ``maps`` replace the tap's output; the graph begins there."""

        def put_in(_: int, activation: Tensor) -> Tensor:
            # On from here, and off before: autograd then records nothing of the layers that are replayed. The block
            # around the pass restores the mode. The copy lets later modules work in place without changing ``maps``.
            torch.set_grad_enabled(maps.requires_grad)
            return tap.grid.from_map(maps, activation).clone()

        with torch.inference_mode(False), torch.no_grad(), listening(self._model, (tap,), put_in):
            inputs = rows.take(self._inputs)
            return forward(self._model, inputs, select_args(self._args, rows.rows, rows.batch))

    def _close(self) -> None:
        self._records = {}


@contextmanager
def replay(model: nn.Module, inputs: Tensor, args: Sequence[Any], tap: Tap) -> Iterator[Replay]:
    """Record one clean pass without a graph and yield what runs it again from the tapped layer.

    Call it, and what it yields, inside :func:`attrib_zoo.backbone.capture.frozen`. The records, about the size of all
    module outputs before the layer, are freed when the block ends.

    Raises:
        LayerError: the layer never ran, or its output has not one row per image.
    """
    with torch.inference_mode(False), torch.no_grad():
        again = Replay(unwrap(model), inputs.detach(), args, tap)
    try:
        yield again
    finally:
        again._close()


def _record(model: nn.Module, inputs: Tensor, args: Sequence[Any], tap: Tap) -> tuple[_Records, Tap, Tensor, Tensor]:
    """One pass; the records, the tap as a replay will see it, the layer's activation and the model's outputs."""
    recorder = _Recorder(model, tap)
    activations: list[Tensor] = []

    def keep(_: int, activation: Tensor) -> None:
        if activation.shape[:1] != inputs.shape[:1]:
            raise LayerError(
                f"layers: {tap.name!r} must put out one row for each of the {len(inputs)} images, got shape "
                f"{tuple(activation.shape)}; it works on parts of an image, so name the block around it"
            )
        activations.append(activation.clone())

    with recorder.listening(model), listening(model, (tap,), keep):
        outputs = forward(model, inputs.clone(), args)
    records = recorder.records()
    earlier = len(records[recorder.layer]) - 1
    replayed = replace(tap, call=earlier, calls=earlier + tap.calls - tap.call % tap.calls)
    return records, replayed, activations[0], outputs


class _Recorder:
    """Keeps the outputs of the largest calls that had finished when the layer's chosen call ended.

    A call that ends replaces the calls inside it. Modules that enclose the layer have not finished, so they are not
    kept: their own code runs again. Calls inside any other module are not even copied; should the layer turn out to run
        there as well, they run again too.
    """

    def __init__(self, model: nn.Module, tap: Tap) -> None:
        path = tap.name.split(".")
        self.layer = find(model, tap.name)
        self._enclosing = {find(model, ".".join(path[:depth])) for depth in range(len(path))}
        self._calls_left = tap.call % tap.calls + 1
        self._others = 0  # running calls of modules that do not enclose the layer
        self._running: list[int] = []  # for each running call, how many had finished when it began
        self._finished: list[tuple[nn.Module, Any]] = []

    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        """Hooks on every module; they see outputs before the user's hooks, which will run again in a replay.

        Scripted modules take no hooks and run again; a compiled module is seen inside its wrapper.
        """
        with ExitStack() as stack:
            for module in model.modules():
                if not isinstance(module, torch.jit.ScriptModule) and "_orig_mod" not in module._modules:
                    stack.callback(module.register_forward_pre_hook(self._begin).remove)
                    stack.callback(module.register_forward_hook(self._end, prepend=True).remove)
            yield

    def _begin(self, module: nn.Module, _: Any) -> None:
        if self._calls_left:
            self._running.append(len(self._finished))
            self._others += module not in self._enclosing

    def _end(self, module: nn.Module, _: Any, output: Any) -> None:
        if not self._calls_left:
            return
        del self._finished[self._running.pop() :]
        self._others -= module not in self._enclosing
        if module is self.layer:
            self._calls_left -= 1
        if not self._others or not self._calls_left:
            self._finished.append((module, map_tensors(output, Tensor.clone)))

    def records(self) -> _Records:
        """The outputs of each module in the order of its calls; the layer's own, chosen call is its last."""
        records: _Records = {}
        for module, output in self._finished:
            records.setdefault(module, []).append(output)
        return records


@contextmanager
def _answering(module: nn.Module, queue: deque[Any], rows: _Rows) -> Iterator[None]:
    """The module returns its recorded outputs, one per call; once they are used up, it runs as usual.

    A module that is used on both sides of the layer (the ReLU of a residual block) needs the second half.
    """
    own = vars(module)
    before = {"forward": own["forward"]} if "forward" in own else {}
    live = module.forward

    def answer(*args: Any, **kwargs: Any) -> Any:
        return map_tensors(queue.popleft(), rows.take) if queue else live(*args, **kwargs)

    own["forward"] = answer
    try:
        yield
    finally:
        del own["forward"]
        own.update(before)


class _Rows:
    """Which recorded image each row of a replay belongs to."""

    def __init__(self, rows: Tensor, batch: int, *, copies: bool) -> None:
        self.rows, self.batch = rows, batch
        images = set(rows.tolist())
        self._only = images.pop() if len(images) == 1 else None
        self._copies = copies or len(rows) == 1  # one row expanded to one row is no new tensor

    def take(self, tensor: Tensor) -> Tensor:
        """These rows of a recorded tensor; a tensor that is not per image (a table) is returned unchanged."""
        if tensor.ndim == 0 or len(tensor) != self.batch:
            return tensor
        if self._only is None:
            return tensor[self.rows.to(tensor.device)]
        view = tensor[self._only].expand(len(self.rows), *tensor.shape[1:])
        return view.clone() if self._copies else view


def _tolerance(outputs: Tensor, activation: Tensor, *, same_size: bool) -> float:
    """How far rounding may move the outputs, relative to the largest."""
    step = max(torch.finfo(outputs.dtype).eps, torch.finfo(activation.dtype).eps)
    if outputs.is_cuda and not same_size:  # another batch size may choose another kernel, one of them TF32
        step = max(step, 2.0**-10)
    return float(step**0.5)
