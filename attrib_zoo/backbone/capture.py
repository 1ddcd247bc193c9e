"""Running a frozen model as little as the mathematics allows; everything is undone when the call ends.

Two ways to look at named layers: :func:`run` records activations and builds no graph; :func:`run_with_graph` builds
the graph from the first named layer up, so that gradients cost nothing below it and work on frozen models, under
``no_grad`` and inside ``inference_mode``.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.grid import Tap
from attrib_zoo.backbone.module import find, is_quantised, unwrap
from attrib_zoo.errors import InputError, LayerError, UnsupportedModelError
from attrib_zoo.targets import check_outputs

__all__ = [
    "call_model",
    "check_gradient",
    "check_weights",
    "forward",
    "frozen",
    "run",
    "run_from_inputs",
    "run_with_graph",
    "select_args",
    "unwrap",
]


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Every module in eval mode and all compiled code eager (it fires no hooks), for the length of the block.

    The training flags are restored module by module, also after an error. Modules in training mode that have a
    ``train`` of their own are called on it before: it may drop what they cached in eval mode (LeViT's biases).
    """
    bare = unwrap(model)
    modules = list(bare.modules())
    settings: list[tuple[nn.Module, str, Any]] = [(module, "training", False) for module in modules]
    settings += [(m, "_compiled_call_impl", None) for m in modules if m._compiled_call_impl is not None]
    settings += [(m, "forward", unwrap(m).__call__) for m in modules if "_orig_mod" in m._modules]
    before = [(module, name, getattr(module, name)) for module, name, _ in settings]
    caching = [m for m in modules if m.training and type(m).train is not nn.Module.train]
    try:
        with _eager():
            for module, name, value in settings:
                setattr(module, name, value)
            yield bare
    finally:
        for module in caching:
            module.train()
        for module, name, value in before:
            setattr(module, name, value)


def _eager() -> AbstractContextManager[Any]:
    """Functions that are compiled on their own run eagerly too, where torch can say so (2.6 and later)."""
    set_stance: Callable[[str], AbstractContextManager[Any]] | None = getattr(torch.compiler, "set_stance", None)
    if set_stance is None or "torch._dynamo" not in sys.modules:
        return nullcontext()
    return set_stance("force_eager")


def forward(model: nn.Module, inputs: Tensor, args: Sequence[Any] = ()) -> Tensor:
    """One pass of the bare model, its output checked to be one tensor with a row per image."""
    return check_outputs(call_model(model, inputs, args), len(inputs))


def call_model(model: nn.Module, inputs: Tensor, args: Sequence[Any] = ()) -> Any:
    """One pass of the bare model, whatever it puts out."""
    try:
        return model(_ordinary(inputs), *map(_ordinary, args))
    except RuntimeError as error:
        expected = _channels(model)
        if expected is not None and expected != inputs.shape[1]:
            raise InputError(
                f"inputs: {type(model).__name__} takes images with {expected} channels, got {inputs.shape[1]} "
                f"(shape {tuple(inputs.shape)}); pass (N, {expected}, H, W)"
            ) from error
        own = next((p.dtype for p in model.parameters() if p.is_floating_point()), inputs.dtype)
        if own != inputs.dtype and "type" in str(error):
            raise InputError(
                f"inputs: {type(model).__name__} has weights in {own}, got images in {inputs.dtype}; pass "
                f"inputs.to({own})"
            ) from error
        raise


def _ordinary(value: Any) -> Any:
    """A tensor that was made in inference mode can be part of no graph; its copy can."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _channels(model: nn.Module) -> int | None:
    """The channels that the first convolution takes, for an error message only."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return None if first is None else first.in_channels


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
        in-place module behind the layer cannot change it.
    """
    maps: dict[int, Tensor] = {}

    def keep(position: int, activation: Tensor) -> None:
        maps[position] = taps[position].grid.to_map(activation).clone()

    with torch.inference_mode(False), torch.no_grad(), listening(model, taps, keep):
        outputs = forward(unwrap(model), inputs.detach(), args)
    return outputs, [maps[position] for position in range(len(taps))]


def check_weights(bare: nn.Module) -> None:
    """Raise where the weights can be part of no graph."""
    if any(tensor.is_inference() for tensor in (*bare.parameters(), *bare.buffers())):
        raise UnsupportedModelError(
            "model: its weights were created under torch.inference_mode, where gradients cannot exist; "
            "build or load the model outside inference_mode"
        )
    quantised = {name: type(m).__module__ for name, m in bare.named_modules() if is_quantised(m)}
    if quantised:
        fixed = [name for name, kind in quantised.items() if ".dynamic" not in kind]
        raise UnsupportedModelError(_quantised(fixed[0]) if fixed else _without_gradient(next(iter(quantised))))


def check_gradient(model: nn.Module, inputs: Tensor, args: Sequence[Any] = ()) -> None:
    """Raise where the gradient of the outputs does not reach the images; one pass and its backward, on one image.

    What is trained through such a model would see its own regularisers only.

    Raises:
        UnsupportedModelError: some layer has no gradient.
        LayerError: the outputs have no graph at all.
    """
    rows = torch.zeros(1, dtype=torch.long, device=inputs.device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with run_from_inputs(model, inputs[:1], select_args(args, rows, len(inputs)), ()) as (outputs, images, _):
            gradient = torch.autograd.grad(outputs.float().sum(), images, allow_unused=True)[0]
    unknown = [str(w.message).split(": an autograd kernel")[0] for w in caught if "autograd kernel" in str(w.message)]
    if gradient is None or unknown:
        what = f"the operator {unknown[0]} has none" if unknown else "it ends on the way (a detach()?)"
        raise UnsupportedModelError(
            f"model: the gradient of its outputs must reach the images, but {what}; pass a model of ordinary "
            "floating-point layers, or use a method that needs no gradient"
        )


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
    model: nn.Module, inputs: Tensor, args: Sequence[Any], taps: Sequence[Tap]
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """One pass whose graph starts at the first tap to run; gradients are enabled inside the block.

    Yields:
        The outputs ``(N, ...)`` and, for each tap, its map ``(N, C, h, w)`` in the graph: differentiate with
        ``torch.autograd.grad(scores, maps)``. Prefix tokens are not part of a map.

    Raises:
        LayerError: a layer never ran, or the outputs do not depend on it.
    """
    bare = unwrap(model)
    check_weights(bare)
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
        with torch.no_grad(), listening(bare, taps, keep):
            outputs = forward(bare, inputs.detach(), args)
        if not outputs.requires_grad:
            raise LayerError(
                f"layers: no gradient path from {_names(taps)} to the outputs of {type(bare).__name__}; a no_grad "
                "block or reentrant checkpointing lies behind the layer, or the outputs do not use it: "
                "name another layer"
            )
        with torch.enable_grad(), _plain_checkpointing(bare):
            yield outputs, [maps[position] for position in range(len(taps))]


@contextmanager
def run_from_inputs(
    model: nn.Module, inputs: Tensor, args: Sequence[Any], names: Sequence[str]
) -> Iterator[tuple[Tensor, Tensor, list[tuple[str, Tensor]]]]:
    """One pass whose graph starts at the images; gradients are enabled inside the block.

    Yields:
        The outputs ``(N, ...)``, the images ``(N, C, H, W)`` in the graph, and for each call of each named module, in
        the order of execution, its name and what it put out, in the graph and as it was before anything behind it
        worked in place.

    Raises:
        LayerError: the outputs do not depend on the images.
    """
    bare = unwrap(model)
    check_weights(bare)
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
            outputs = forward(bare, images.clone(), args)
        if not outputs.requires_grad:
            raise LayerError(
                f"model: no gradient path from the images to the outputs of {type(bare).__name__}; a no_grad block "
                "lies between: take it out, or use a method that needs no gradient"
            )
        with _plain_checkpointing(bare):
            yield outputs, images, seen


@contextmanager
def _plain_checkpointing(model: nn.Module) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "heckpoint" not in str(error):
            raise
        raise UnsupportedModelError(
            f"model: {type(model).__name__} uses reentrant checkpointing, which cannot give the gradient of a layer; "
            "switch checkpointing off, or use checkpoint(..., use_reentrant=False)"
        ) from error


def _names(taps: Sequence[Tap]) -> str:
    return ", ".join(repr(tap.name) for tap in taps)


@contextmanager
def listening(model: nn.Module, taps: Sequence[Tap], keep: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """Hooks on the taps for the length of one pass; ``keep(position, activation)`` may return a replacement."""
    bare = unwrap(model)
    counts = [0] * len(taps)

    def hook_for(position: int, tap: Tap) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            counts[position] += 1
            if counts[position] - 1 != tap.call % tap.calls:
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
            handle = find(bare, tap.name).register_forward_hook(hook_for(position, tap))
            stack.callback(handle.remove)
        yield
    for count, tap in zip(counts, taps, strict=True):
        if count != tap.calls:
            raise LayerError(
                f"layers: {tap.name!r} must run {tap.calls} time(s) in a forward pass, ran {count}; "
                "name a layer that runs for every input"
            )


def pick(output: Any, element: int | str | None) -> Any:
    """The tensor that a tap means, out of a module's output."""
    return output if element is None else output[element]


def put(output: Any, element: int | str | None, tensor: Tensor) -> Any:
    """A module's output with one element replaced; the original container is left as it is."""
    if element is None:
        return tensor
    if isinstance(output, tuple):
        items = [tensor if position == element else item for position, item in enumerate(output)]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    changed = copy.copy(output)
    changed[element] = tensor
    return changed
