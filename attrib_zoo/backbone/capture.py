"""Running a frozen model as little as the mathematics allows; everything is undone when the call ends.

Two ways to look at named layers: :func:`run` records activations and builds no graph; :func:`run_with_graph` builds
the graph from the first named layer up, so that gradients cost nothing below it and work on frozen models, under
``no_grad`` and inside ``inference_mode``.
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.grid import Tap
from attrib_zoo.backbone.mirror import Unmirrored, mirror
from attrib_zoo.backbone.module import find, is_quantised, running, unwrap
from attrib_zoo.backbone.nested import pick, put
from attrib_zoo.backbone.projections import in_one_product
from attrib_zoo.backbone.targets import check_outputs, scores_in
from attrib_zoo.backbone.vit.attended import attended_source, seen_in_pass
from attrib_zoo.errors import InputError, LayerError, ModelChangedError, UnsupportedModelError

__all__ = [
    "call_model",
    "check_gradient",
    "check_weights",
    "evaluating",
    "forward",
    "frozen",
    "run",
    "run_from_inputs",
    "run_with_graph",
    "select_args",
    "unwrap",
]

_log = logging.getLogger("attrib_zoo")

_lock = threading.RLock()  # of the three below
_switched: WeakKeyDictionary[nn.Module, _Switched] = WeakKeyDictionary()
_turns: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_stance: list[AbstractContextManager[Any] | None] = []  # torch's setting, and an entry for each thread that needs it


@contextmanager
def frozen(model: nn.Module, weights: str = "shared") -> Iterator[nn.Module]:
    """A private view of the model for the length of the block: every module in eval mode, all compiled code eager.

    What is yielded, and what :func:`unwrap` returns for the model in this thread during the block, is the model's
    :func:`~attrib_zoo.backbone.mirror.mirror`: the same weights in other modules. No other thread sees their hooks and
    modes, so that any number of threads can explain, predict with and train one model at the same time, and the user's
    modules are not touched at all.

    A model that has no mirror is switched in place, as by :func:`evaluating`; other threads that explain or call it
    then wait.

    Args:
        model: the model; wrappers are removed.
        weights: see :func:`~attrib_zoo.backbone.mirror.mirror`.
    """
    bare = unwrap(model)
    if id(bare) in running.originals:  # inside another such block
        yield bare
        return
    with _eager(), ExitStack() as stack:
        try:
            own = mirror(bare, weights)
        except Unmirrored as reason:
            _log.info("%s is explained in place, one thread at a time: %s", type(bare).__name__, reason)
            own = stack.enter_context(_alone(bare))
        running.instead[id(bare)], running.originals[id(own)] = own, bare
        try:
            yield own
        finally:
            del running.instead[id(bare)], running.originals[id(own)]
            running.known.pop(id(bare), None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Every module of the user's own model in eval mode, eager, for foreign code that runs the model itself.

    The flags are restored module by module, also after an error; where several threads are inside such blocks, by the
    last one to leave. Modules in training mode that have a ``train`` of their own are called on it before: it may drop
    what they cached in eval mode (LeViT's biases).
    """
    bare = unwrap(model)
    with _eager():
        with _lock:
            switched = _switched.get(bare)
            if switched is None:
                switched = _switched[bare] = _Switched(bare)
            switched.inside += 1
        try:
            yield bare
        finally:
            with _lock:
                switched.inside -= 1
                if not switched.inside:
                    del _switched[bare]
                    switched.back()


class _Switched:
    """A model's own modules in eval mode, and how they were before."""

    def __init__(self, bare: nn.Module) -> None:
        self.inside = 0
        modules = list(bare.modules())
        settings: list[tuple[nn.Module, str, Any]] = [(module, "training", False) for module in modules]
        settings += [(m, "_compiled_call_impl", None) for m in modules if m._compiled_call_impl is not None]
        settings += [(m, "forward", unwrap(m).__call__) for m in modules if "_orig_mod" in m._modules]
        self._before = [(module, name, getattr(module, name)) for module, name, _ in settings]
        self._caching = [m for m in modules if m.training and type(m).train is not nn.Module.train]
        for module, name, value in settings:
            setattr(module, name, value)

    def back(self) -> None:
        for module in self._caching:
            module.train()
        for module, name, value in self._before:
            setattr(module, name, value)


@contextmanager
def _alone(bare: nn.Module) -> Iterator[nn.Module]:
    """The model itself in eval mode, for one thread at a time; calls of it in other threads wait at its first hook."""
    with _lock:
        turn = _turns.setdefault(bare, threading.RLock())
    mine = threading.get_ident()

    def wait(_: nn.Module, __: Any) -> None:
        if threading.get_ident() != mine:
            with turn:
                pass

    with turn:
        handle = bare.register_forward_pre_hook(wait, prepend=True)
        try:
            with evaluating(bare):
                yield bare
        finally:
            handle.remove()


@contextmanager
def _eager() -> Iterator[None]:
    """Functions that are compiled on their own run eagerly too.

    The setting holds for all threads at once; so the first thread to enter makes it, and the last to leave undoes it.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with _lock:
        if not _stance:
            _stance.append(torch.compiler.set_stance("force_eager"))
        _stance.append(None)
    try:
        yield
    finally:
        with _lock:
            _stance.pop()
            if len(_stance) == 1:
                stance = _stance.pop()
                if stance is not None:
                    stance.__exit__(None, None, None)


def forward(model: nn.Module, inputs: Tensor, args: Sequence[Any] = ()) -> Tensor:
    """One pass of the bare model, its output checked to be one tensor with a row per image."""
    return check_outputs(call_model(model, inputs, args), len(inputs))


def call_model(model: nn.Module, inputs: Tensor, args: Sequence[Any] = ()) -> Any:
    """One pass of the bare model, whatever it returns; from an object with ``.logits``, only those."""
    try:
        bare = unwrap(model)
        with in_one_product(bare) if torch.is_grad_enabled() else nullcontext():
            return scores_in(bare(_ordinary(inputs), *map(_ordinary, args)))
    except RuntimeError as error:
        expected = _channels(model)
        if expected is not None and expected != inputs.shape[1]:
            raise InputError(
                f"inputs: {type(model).__name__} takes images with {expected} channels, got {inputs.shape[1]} "
                f"(shape {tuple(inputs.shape)}); pass (N, {expected}, H, W)"
            ) from error
        kinds: dict[torch.dtype, str] = {}
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                kinds.setdefault(parameter.dtype, name)
        own = next(iter(kinds), inputs.dtype)
        if len(kinds) > 1 and "type" in str(error):
            found = " and ".join(f"{kind} ({name!r})" for kind, name in kinds.items())
            raise InputError(
                f"inputs: {type(model).__name__} has weights in {found}, got images in {inputs.dtype}, and fails "
                f"({error}); pass images in the type that its first layer takes, or convert all: model.to({own})"
            ) from error
        if own != inputs.dtype and "type" in str(error):
            raise InputError(
                f"inputs: {type(model).__name__} has weights in {own}, got images in {inputs.dtype}; pass "
                f"inputs.to({own})"
            ) from error
        raise


def _ordinary(value: Any) -> Any:
    """A tensor made in inference mode cannot be part of a graph; its copy can."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _channels(model: nn.Module) -> int | None:
    """The channels that the first convolution takes, for an error message only."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return None if first is None else first.in_channels


def forward_args(additional_forward_args: Any) -> tuple[Any, ...]:
    """Captum's ``additional_forward_args``, which may be a single value or ``None``, as a tuple."""
    if additional_forward_args is None:
        return ()
    return additional_forward_args if isinstance(additional_forward_args, tuple) else (additional_forward_args,)


def select_args(args: Sequence[Any], rows: Tensor, batch: int) -> tuple[Any, ...]:
    """Extra forward arguments for these examples: per-example tensors are gathered, the rest passes through."""

    def pick(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch:
            return value[rows.to(value.device)]
        return value

    return tuple(pick(value) for value in args)


def run(
    model: nn.Module, inputs: Tensor, args: Sequence[Any] = (), taps: Sequence[Tap] = ()
) -> tuple[Tensor, list[Tensor]]:
    """One pass without a graph.

    Returns:
        The outputs ``(N, ...)`` and, for each tap in the given order, its map ``(N, C, h, w)``: a copy, so that an
        in-place module after the layer cannot change it.
    """
    maps: dict[int, Tensor] = {}

    def keep(position: int, activation: Tensor) -> None:
        maps[position] = taps[position].grid.to_map(activation).clone()

    with torch.inference_mode(False), torch.no_grad(), listening(model, taps, keep):
        outputs = forward(unwrap(model), inputs.detach(), args)
    return outputs, [maps[position] for position in range(len(taps))]


def check_weights(bare: nn.Module) -> int:
    """Raise if the weights cannot be part of a graph; otherwise return how often they have been written to."""
    written, quantised_too = 0, False
    for module in bare.modules():  # one walk: four of torch's own cost more than the mirror
        quantised_too = quantised_too or is_quantised(module)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                if tensor.is_inference():
                    raise UnsupportedModelError(_INFERENCE)
                if isinstance(tensor, nn.Parameter):
                    written += tensor._version
    if not quantised_too:
        return written
    quantised = {name: type(m).__module__ for name, m in bare.named_modules() if is_quantised(m)}
    fixed = [name for name, kind in quantised.items() if ".dynamic" not in kind]
    raise UnsupportedModelError(_quantised(fixed[0]) if fixed else _without_gradient(next(iter(quantised))))


_INFERENCE = (
    "model: its weights were created under torch.inference_mode, where gradients cannot exist; "
    "build or load the model outside inference_mode"
)


def check_gradient(model: nn.Module, inputs: Tensor, args: Sequence[Any] = ()) -> None:
    """Raise where the gradient of the outputs does not reach the images; one pass and its backward, on one image.

    What is trained through such a model would see its own regularisers only.

    Raises:
        UnsupportedModelError: some layer has no gradient.
        LayerError: the outputs have no graph at all.
    """
    rows = torch.zeros(1, dtype=torch.long, device=inputs.device)
    unknown: list[str] = []
    with run_from_inputs(model, inputs[:1], select_args(args, rows, len(inputs)), ()) as (outputs, images, _):
        score = outputs.float().sum()
        if _has_unknown(score):
            # torch gives the operator's name only in a warning, and warnings are filtered for all threads at once:
            # so this is done only for a model that has failed
            with _lock, warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                gradient = torch.autograd.grad(score, images, allow_unused=True)[0]
            said = [str(warning.message) for warning in caught]
            unknown = [text.split(": an autograd kernel")[0] for text in said if "autograd kernel" in text]
        else:
            gradient = torch.autograd.grad(score, images, allow_unused=True)[0]
    if gradient is None or unknown:
        what = f"the operator {unknown[0]} has none" if unknown else "it ends on the way (a detach()?)"
        raise UnsupportedModelError(
            f"model: the gradient of its outputs must reach the images, but {what}; pass a model of ordinary "
            "floating-point layers, or use a method that needs no gradient"
        )


def _has_unknown(score: Tensor) -> bool:
    """Whether the graph holds an operator that has no gradient."""
    waiting, seen = [score.grad_fn], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            if "NotImplemented" in node.name():
                return True
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    return False


def _quantised(name: str) -> str:
    return (
        f"model: its layers must have gradients and floating-point maps, but it is quantised ({name!r}); pass the "
        "float model that it was made from, or use RISE, which looks at no layer"
    )


def _without_gradient(name: str) -> str:
    return (
        f"model: its layers must have gradients, but it is quantised ({name!r}); pass the float model that it was "
        "made from, or name the layer to a method without gradients, as in ScoreCAM(model, layers=...), or use RISE"
    )


@contextmanager
def run_with_graph(
    model: nn.Module,
    inputs: Tensor,
    args: Sequence[Any],
    taps: Sequence[Tap],
    within: AbstractContextManager[Any] | None = None,
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """One pass whose graph starts at the first tap to run; gradients are enabled inside the block.

    The model's own forward, and nothing else, runs ``within`` a context, where one is given.

    Yields:
        The outputs ``(N, ...)`` and, for each tap, its map ``(N, C, h, w)`` in the graph: differentiate with
        ``torch.autograd.grad(scores, maps)``. Prefix tokens are not part of a map.

    Raises:
        LayerError: a layer never ran, or the outputs do not depend on it.
    """
    bare = unwrap(model)
    written = check_weights(bare)
    maps: dict[int, Tensor] = {}

    def keep(position: int, activation: Tensor) -> Tensor:
        torch.set_grad_enabled(True)
        grid = taps[position].grid
        starts = not maps or not activation.requires_grad
        kept = activation.detach() if starts else activation
        maps[position] = grid.to_map(kept).clone()  # copies, here and below: others may work in place on both
        if starts:
            maps[position].requires_grad_()
        return grid.from_map(maps[position], kept).clone()

    with torch.inference_mode(False):
        with torch.no_grad(), listening(bare, taps, keep), in_one_product(bare), within or nullcontext():
            outputs = forward(bare, inputs.detach(), args)
        if not outputs.requires_grad:
            raise LayerError(
                f"layers: no gradient path from {_names(taps)} to the outputs of {type(bare).__name__}; a no_grad "
                "block or reentrant checkpointing lies behind the layer, or the outputs do not use it: "
                "name another layer"
            )
        with torch.enable_grad(), _explained(bare, written):
            yield outputs, [maps[position] for position in range(len(taps))]


@contextmanager
def run_from_inputs(
    model: nn.Module,
    inputs: Tensor,
    args: Sequence[Any],
    names: Sequence[str],
    within: AbstractContextManager[Any] | None = None,
) -> Iterator[tuple[Tensor, Tensor, list[tuple[str, Tensor]]]]:
    """One pass whose graph starts at the images; gradients are enabled inside the block.

    The model's own forward, and nothing else, runs ``within`` a context, where one is given.

    Yields:
        The outputs ``(N, ...)``, the images ``(N, C, H, W)`` in the graph, and for each call of each named module, in
        the order of execution, its name and its output, in the graph and as it was before any later module worked in
        place.

    Raises:
        LayerError: the outputs do not depend on the images.
    """
    bare = unwrap(model)
    written = check_weights(bare)
    seen: list[tuple[str, Tensor]] = []

    def keep_as(name: str) -> Callable[[nn.Module, Any, Any], Tensor]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            seen.append((name, output))
            return output.clone()

        return hook

    with torch.inference_mode(False), torch.enable_grad():
        images = _ordinary(inputs.detach()).clone().requires_grad_()
        with ExitStack() as stack:
            for name in names:
                stack.callback(find(bare, name).register_forward_hook(keep_as(name)).remove)
            given = images.clone()
            with within or nullcontext():
                outputs = forward(bare, given, args)
        if not outputs.requires_grad:
            raise LayerError(
                f"model: no gradient path from the images to the outputs of {type(bare).__name__}; a no_grad block "
                "lies between: take it out, or use a method that needs no gradient"
            )
        with _explained(bare, written):
            yield outputs, images, seen


@contextmanager
def _explained(model: nn.Module, written: int) -> Iterator[None]:
    """Errors of a backward pass, in terms of what the user can do."""
    try:
        yield
    except RuntimeError as error:
        if "heckpoint" in str(error):
            raise UnsupportedModelError(
                f"model: {type(model).__name__} uses reentrant checkpointing, which cannot give the gradient of a "
                "layer; switch checkpointing off, or use checkpoint(..., use_reentrant=False)"
            ) from error
        if "modified by an inplace operation" in str(error) and check_weights(model) != written:
            raise ModelChangedError(
                f"model: its weights must stay as they are during a call, but another thread has changed those of the "
                f"{type(model).__name__} (an optimiser step?); explain it between two steps, or explain "
                "copy.deepcopy(model)"
            ) from error
        raise


def _names(taps: Sequence[Tap]) -> str:
    return ", ".join(repr(tap.name) for tap in taps)


@contextmanager
def listening(model: nn.Module, taps: Sequence[Tap], keep: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """Hooks on the taps for the length of one pass; ``keep(position, activation)`` may return a replacement."""
    bare = unwrap(model)
    counts = [0] * len(taps)

    def hook_for(position: int, tap: Tap, module: nn.Module) -> Callable[..., Any]:
        def hook(_: nn.Module, given: Any, *rest: Any) -> Any:
            output = rest[-1]
            counts[position] += 1
            if counts[position] - 1 != tap.call % tap.calls:
                return None
            if tap.attended:
                keep(position, seen_in_pass(module, tap.name, given, *rest))
                return None
            activation = pick(output, tap.element)
            if not isinstance(activation, Tensor):
                raise LayerError(
                    f"layers: {tap.name!r} must put out a tensor, got {type(activation).__name__}; "
                    "name a layer whose output is one tensor"
                )
            if activation.is_quantized:
                raise UnsupportedModelError(_quantised(tap.name))
            replacement = keep(position, activation)
            return None if replacement is None else put(output, tap.element, replacement)

        return hook

    with ExitStack() as stack:
        for position, tap in enumerate(taps):
            module = find(bare, tap.name)
            source = attended_source(module) if tap.attended else module
            handle = source.register_forward_hook(hook_for(position, tap, module), with_kwargs=tap.attended)
            stack.callback(handle.remove)
        yield
    for count, tap in zip(counts, taps, strict=True):
        if count != tap.calls:
            raise LayerError(
                f"layers: {tap.name!r} must run {tap.calls} time(s) in a forward pass, ran {count}; "
                "name a layer that runs for every input"
            )
