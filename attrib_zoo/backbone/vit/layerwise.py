"""What the tokens of every block would score if the head read them there, and how attention led to that score.

The layers after the last block are run again with the tokens of each block in their place. The gradient of that score
goes back within its own block only: no gradient passes from one block to another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.capture import listening
from attrib_zoo.backbone.grid import Grid, Tap
from attrib_zoo.backbone.layers.resolve import look
from attrib_zoo.backbone.layers.trace import Call, Trace
from attrib_zoo.backbone.module import find
from attrib_zoo.backbone.nested import pick
from attrib_zoo.backbone.replay import Replay, replay
from attrib_zoo.backbone.targets import Target
from attrib_zoo.backbone.vit.attention import (
    Attentions,
    attention_calls,
    block_of,
    find_attention,
    read_attention,
    token_grid,
)
from attrib_zoo.backbone.vit.heads import check, precise, refuse
from attrib_zoo.masking import wide_dtype

Resolve = Callable[[Tensor], Target]


@dataclass(frozen=True)
class Layers:
    """The blocks of a vision transformer and what reads their tokens, for one size of input.

    Attributes:
        blocks: the outputs of the blocks in the order of execution, all tokens as a 1 x T map.
        grid: where the patches lie among the T tokens.
        attentions: the self-attention of each block; None where attention pooling follows the blocks.
        pool: the name of that attention pooling.
    """

    blocks: tuple[Tap, ...]
    grid: Grid
    attentions: Attentions | None
    pool: str | None

    def cells(self, rows: Tensor) -> Tensor:
        """From values ``(..., T)`` of all tokens, or of all but the prefix, those of the patches, ``(..., h, w)``."""
        h, w = self.grid.hw or (0, 0)
        patches: Tensor = rows[..., rows.shape[-1] - h * w :].unflatten(-1, (h, w))
        return patches


def find_layers(model: nn.Module, inputs: Tensor, args: Sequence[Any] = ()) -> Layers:
    """Find the blocks of a model, as it runs on inputs of this size.

    Raises:
        UnsupportedModelError: it has no attention that can be read, or blocks that see different tokens.
    """
    trace = look(model, inputs, args)
    calls = attention_calls(trace)
    pool = calls.pop() if len(calls) > 1 and _pools(calls[-1]) else None
    found = find_attention(model, inputs, args, trace) if pool is None else None
    grid = found.grid if found is not None else _common_grid(calls, trace)
    everything = grid.of_all_tokens()
    blocks = [_block(call, trace) for call in calls]
    taps = tuple(Tap(b.name, everything, b.outputs[0].shape[-1], b.outputs[0].element) for b in blocks)
    return Layers(taps, grid, found, None if pool is None else pool.name)


def _pools(call: Call) -> bool:
    """Whether an attention has queries of its own and reads the tokens with keys and values."""
    parts = [call.module._modules.get(name) for name in ("kv", "proj")]
    return all(isinstance(part, nn.Linear) for part in parts) and hasattr(call.module, "latent")


def _common_grid(calls: Sequence[Call], trace: Trace) -> Grid:
    grids = [token_grid(call, trace) for call in calls]
    for call, grid in zip(calls, grids, strict=True):
        if grid != grids[0]:
            raise refuse(call.name, call.module, "it sees other tokens than the blocks before it")
    return grids[0]


def _block(call: Call, trace: Trace) -> Call:
    block = block_of(call)
    if block is trace.root or block is call:
        raise refuse(call.name, call.module, "no module around it stands for its block")
    return block


def layer_gradients(
    model: nn.Module,
    layers: Layers,
    inputs: Tensor,
    args: Sequence[Any],
    resolve: Resolve,
    start: int = 0,
) -> Iterator[Tensor]:
    """The gradients of each block's own scores with respect to attention, from the last block to the first.

    Args:
        model: the frozen model.
        layers: its blocks.
        inputs: ``(N, C, H, W)``.
        args: further arguments of its forward.
        resolve: the M targets of each image, given the outputs.
        start: the first block that takes part.

    Yields:
        ``(M, N, H, Q, T)`` for each block: of H heads, Q queries (all tokens, or those of the pooling) and T tokens.
    """
    tokens: dict[int, Tensor] = {}
    with ExitStack() as stack:
        with _collecting(model, layers.blocks, tokens):
            again = stack.enter_context(replay(model, inputs, args, layers.blocks[-1]))
        target = resolve(again.outputs)
        places = range(len(layers.blocks))[start:][::-1]
        if layers.pool is not None:
            for place in places:
                yield _at_pool(model, layers, again, tokens[place], target)
            return
        slopes = {place: _slopes(again, tokens[place], target)[1] for place in places}
    yield from _within_blocks(model, layers, inputs, args, slopes)


@contextmanager
def _collecting(model: nn.Module, taps: Sequence[Tap], tokens: dict[int, Tensor]) -> Iterator[None]:
    """Keeps the output of each block's first run."""

    def hook_for(position: int, tap: Tap) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if position not in tokens:
                tokens[position] = tap.grid.to_map(pick(output, tap.element)).detach().clone()

        return hook

    with ExitStack() as stack:
        for position, tap in enumerate(taps):
            stack.callback(find(model, tap.name).register_forward_hook(hook_for(position, tap)).remove)
        yield


def _slopes(again: Replay, maps: Tensor, target: Target, beside: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
    """The scores of other tokens in the place of the last block's, and their gradient at them, or at ``beside``.

    ``beside`` is filled by hooks while the scores are computed.

    Returns:
        ``(N, M)`` and ``(M, ...)``.
    """
    leaf = maps.clone().requires_grad_()
    with torch.enable_grad():
        scores = target.select(again(leaf, torch.arange(len(maps))))
        to = beside[0] if beside else leaf
        count = scores.shape[1]
        parts = [torch.autograd.grad(scores[:, m].sum(), to, retain_graph=m + 1 < count)[0] for m in range(count)]
    return scores.detach(), torch.stack(parts)


def _within_blocks(
    model: nn.Module, layers: Layers, inputs: Tensor, args: Sequence[Any], slopes: dict[int, Tensor]
) -> Iterator[Tensor]:
    """From the gradients ``(M, N, D, 1, T)`` at the blocks' outputs to those at their attention."""
    held: dict[int, Tensor] = {}
    last = len(layers.blocks) - 1

    def keep(position: int, activation: Tensor) -> Tensor | None:
        held[position] = layers.blocks[position].grid.to_map(activation)
        return activation if position == last else activation.detach()

    def scores(_: Tensor) -> Tensor:
        shape = next(iter(slopes.values())).shape
        own = [
            (maps * slopes.get(place, maps.new_zeros(shape)).to(maps)).flatten(2).sum(2) for place, maps in held.items()
        ]
        return torch.stack(own).sum(0).transpose(0, 1)

    found = cast(Attentions, layers.attentions)
    with listening(model, layers.blocks, keep):
        attended = read_attention(model, found, inputs, args, scores)
    for place, matrix in zip(range(last + 1)[::-1], attended.matrices(), strict=True):
        if place not in slopes:
            return
        yield matrix.gradients()


def _at_pool(model: nn.Module, layers: Layers, again: Replay, maps: Tensor, target: Target) -> Tensor:
    """The gradients ``(M, N, H, Q, T)`` at the attention with which a pooling reads these tokens."""
    name = layers.pool or ""
    module: Any = find(model, name)
    patches = math.prod(layers.grid.hw or ())
    seen: dict[str, Tensor] = {}
    beside: list[Tensor] = []

    def keep_input(_: nn.Module, given: tuple[Any, ...]) -> None:
        beside[:] = [given[0]]

    def keep_output(part: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            seen[part] = output.detach().clone()

        return hook

    with ExitStack() as stack:
        stack.callback(module.proj.register_forward_pre_hook(keep_input).remove)
        for part in ("q", "kv"):
            stack.callback(module._modules[part].register_forward_hook(keep_output(part)).remove)
        _, slopes = _slopes(again, maps, target, beside)
    with precise(maps):
        heads = module.num_heads
        wide = wide_dtype(maps.dtype)
        query, key, value = (_apart(part.to(wide), heads) for part in (seen["q"], *seen["kv"].chunk(2, -1)))
        query, key = (_normed(module, norm, part) for norm, part in (("q_norm", query), ("k_norm", key)))
        matrix = (query @ key.transpose(-2, -1) * value.shape[-1] ** -0.5).softmax(-1)
        if matrix.shape[-1] not in (maps.shape[-1], patches):
            raise refuse(name, module, f"it reads {matrix.shape[-1]} of {maps.shape[-1]} tokens")
        again_context = (matrix @ value).transpose(-3, -2).flatten(-2)
        check(name, module, again_context, beside[0].detach(), maps)
        return _apart(slopes.to(wide), heads) @ value.transpose(-2, -1)


def _apart(tokens: Tensor, heads: int) -> Tensor:
    """``(..., T, H d)`` to ``(..., H, T, d)``."""
    apart: Tensor = tokens.unflatten(-1, (heads, -1)).transpose(-3, -2)
    return apart


def _normed(module: nn.Module, name: str, parts: Tensor) -> Tensor:
    norm = module._modules.get(name)
    if norm is None:
        return parts
    own = next(norm.parameters(), parts).dtype
    return cast(Tensor, norm(parts.to(own))).to(parts.dtype)
