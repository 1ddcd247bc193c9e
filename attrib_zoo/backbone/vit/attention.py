"""Attention matrices of unmodified vision transformers, and the gradients of scores with respect to them.

Fused attention never forms the matrices, so they are computed again from what entered each attention module and from
its weights, and the gradient with respect to them from the gradient at its output:

    A = softmax(q k^T * scale),    dS/dA = heads(G W_o) v^T.

Nothing about the model changes. Whatever these two lines do not describe (windows, relative positions, rotary
embeddings, class attention, ...) shows in the module's output, which is recomputed too: where the two differ, the model
is refused with the name of the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.capture import frozen, run, run_with_graph, select_args
from attrib_zoo.backbone.grid import Grid, Tap
from attrib_zoo.backbone.kind import attends
from attrib_zoo.backbone.layers.resolve import look
from attrib_zoo.backbone.layers.trace import Call, Trace
from attrib_zoo.backbone.module import find, unwrap
from attrib_zoo.backbone.nested import put
from attrib_zoo.backbone.randomness import draws_taken_back
from attrib_zoo.backbone.vit.attended import attended_channels, first_tensor
from attrib_zoo.backbone.vit.heads import Heads, check, heads_of, precise, refuse
from attrib_zoo.errors import UnsupportedModelError

__all__ = ["AttentionPass", "Attentions", "Matrix", "find_attention", "read_attention"]

# --- where attention is ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attentions:
    """Where a model attends, for one size of input; made by :func:`find_attention`.

    Attributes:
        taps: the output of each attention module in the order of execution, all its tokens as a 1 x T map.
        grid: where the patches lie among the T tokens.
        read: the tokens that the head reads, identified by their gradient.
    """

    taps: tuple[Tap, ...]
    grid: Grid
    read: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """T, prefix tokens included."""
        h, w = self.grid.hw or (0, 0)
        return self.grid.prefix + h * w

    @property
    def by_class_token(self) -> bool:
        """Whether the head reads prefix tokens only, as opposed to an average over patches."""
        return all(token < self.grid.prefix for token in self.read)

    def follow(self, relations: Iterable[Tensor]) -> Tensor:
        """What flows into the tokens that the head reads from each patch, through all blocks.

        The row of these tokens (the mean of their rows) in the product of all matrices, the last block's leftmost;
        multiplied from the left, so that no product of two matrices is formed.

        Args:
            relations: for each block, from the last to the first, ``(..., T, T)``; row: to, column: from.

        Returns:
            ``(..., h, w)``.
        """
        row: Tensor | None = None
        for step in relations:
            with precise(step):
                if row is None:
                    row = step[..., torch.tensor(self.read, device=step.device), :].mean(-2, keepdim=True)
                else:
                    row = row @ step
        if row is None:
            raise ValueError("there must be at least one block")
        cells = row[..., 0, self.grid.prefix :]
        return cells.reshape(*cells.shape[:-1], *(self.grid.hw or (-1, 1)))


def find_attention(
    model: nn.Module, inputs: Tensor, args: Sequence[Any] = (), traced: Trace | None = None
) -> Attentions:
    """Find and check every attention module of a model, as it runs on inputs of this size.

    Args:
        model: the classifier; wrappers are removed.
        inputs: images of the size to be explained.
        args: further arguments of its forward.
        traced: what :func:`attrib_zoo.backbone.layers.resolve.look` returned for them, to save a pass.

    Raises:
        UnsupportedModelError: there is none, or one is not plain self-attention over all tokens.
    """
    trace = traced or look(model, inputs, args)
    calls = attention_calls(trace)
    grids = [token_grid(call, trace) for call in calls]
    for call, grid in zip(calls, grids, strict=True):
        heads_of(call.module, call.name, inputs.dtype)
        if grid != grids[0]:
            raise refuse(call.name, call.module, "it sees other tokens than the blocks before it")
    for before, call in pairwise(calls):
        if block_of(before) is block_of(call) is not trace.root:
            raise refuse(call.name, call.module, f"it stands beside {before.name!r}, not behind it")
    everything = grids[0].of_all_tokens()
    taps = tuple(Tap(c.name, everything, c.outputs[0].shape[-1], c.outputs[0].element) for c in calls)
    with draws_taken_back(inputs.device), frozen(trace.model) as bare:
        one = inputs[:1], select_args(args, torch.zeros(1, dtype=torch.long, device=inputs.device), len(inputs))
        found = Attentions(taps, grids[0], _read(bare, taps[-1], grids[0].prefix, *one))
        for _ in read_attention(bare, found, *one).matrices():
            pass  # the check is in the loop itself
    return found


def attended_taps(model: nn.Module, inputs: Tensor, args: Sequence[Any] = (), count: int = 1) -> tuple[Tap, ...]:
    """What the class token takes from the patches in the last blocks, as layers to read.

    Raises:
        UnsupportedModelError: the model's attention cannot be read, or its head reads more than one class token.
    """
    bare = unwrap(model)
    found = find_attention(bare, inputs, args)
    if found.read != (0,) or not found.grid.prefix:
        raise UnsupportedModelError(
            f"model: its head must read the class token and no other, but that of {type(bare).__name__} reads "
            f"{len(found.read)} token(s); name blocks, such as layers=[-3, -2, -1]"
        )
    channels = [attended_channels(find(bare, tap.name), tap.name) for tap in found.taps]
    taps = [
        replace(tap, grid=found.grid, channels=c, attended=True) for tap, c in zip(found.taps, channels, strict=True)
    ]
    return tuple(taps[-count:])


def check_attended(model: nn.Module, taps: Sequence[Tap], inputs: Tensor, args: Sequence[Any] = ()) -> None:
    """Raise unless the attended values among these layers are what the class token takes."""
    known = attended_taps(model, inputs, args, len(list(model.modules())))
    for tap in taps:
        if tap.attended and tap not in known:
            raise UnsupportedModelError(
                f"model: {tap.label!r} is not what the class token takes from each patch in it; name one of "
                f"{', '.join(repr(own.label) for own in known)}"
            )


def attention_calls(trace: Trace) -> list[Call]:
    """The calls of attention modules in the order of execution, the outermost where one lies inside another.

    Raises:
        UnsupportedModelError: there are none.
    """
    calls = [call for call in _attending(trace.root) if call.module is not trace.model]
    if not calls:
        raise UnsupportedModelError(
            f"model: must be a vision transformer whose blocks hold attention modules, got "
            f"{type(trace.model).__name__}, which has none that is known; use GradCAM or TTAME(recipe='rows'), "
            "which explain convolutional networks too"
        )
    return calls


def _attending(call: Call) -> Iterator[Call]:
    """The outermost calls of attention modules."""
    for child in call.children:
        if attends(child.module):
            yield child
        else:
            yield from _attending(child)


def block_of(call: Call) -> Call:
    """The smallest call around an attention that everything passes through: its block."""
    while call.parent is not None and not call.cut:
        call = call.parent
    return call


def token_grid(call: Call, trace: Trace) -> Grid:
    """Where the patches lie among the output tokens of an attention module, or an error that names it."""
    if trace.count(call.module) > 1:
        raise refuse(call.name, call.module, "it runs several times in a forward pass")
    grid = call.outputs[0].grid if call.outputs else None
    if grid is None or grid.kind != "tokens" or grid.permutation is not None:
        shape = call.outputs[0].shape if call.outputs else ()
        raise refuse(call.name, call.module, f"for 2 images it puts out {shape}, not (2, tokens, channels)")
    return grid


def _read(model: nn.Module, last: Tap, prefix: int, image: Tensor, args: Sequence[Any]) -> tuple[int, ...]:
    """The tokens with a nonzero gradient after the last attention; the first token if none has one (a zero head)."""
    with run_with_graph(model, image, args, [last]) as (outputs, maps):
        scores = outputs.flatten()
        # unequal weights: the sum of a softmax has no gradient
        score = (scores * torch.linspace(1, 2, len(scores), dtype=scores.dtype, device=scores.device)).sum()
        gradient = torch.autograd.grad(score, maps[0])[0]
    read = gradient[0, :, 0].ne(0).any(0).nonzero().flatten().tolist()
    return tuple(read) or ((0,) if prefix else tuple(range(gradient.shape[-1])))


# --- one pass -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matrix:
    """What one attention module did in one pass, H heads, T tokens.

    Attributes:
        heads: its weights.
        tokens: ``(N, T, D)``, what entered it.
        q: queries ``(N, H, T, d)``; ``k`` and ``v`` likewise.
        values: A, ``(N, H, T, T)``; each row sums to 1.
        context: A v, ``(N, H, T, d)``.
        at_output: ``(M, N, T, D)``, the gradient of M scores at the module's output; None in a pass without gradients.
    """

    heads: Heads
    tokens: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    values: Tensor
    context: Tensor
    at_output: Tensor | None

    def gradients(self) -> Tensor:
        """The gradients of the M scores with respect to A, ``(M, N, H, T, T)``."""
        if self.at_output is None:
            raise ValueError("the pass recorded no gradients")
        with precise(self.v):
            return self.heads.apart(self.at_output @ self.heads.out_weight) @ self.v.transpose(-2, -1)


@dataclass(frozen=True)
class AttentionPass:
    """The attention modules in one pass of a model; made by :func:`read_attention`.

    Attributes:
        outputs: ``(N, ...)``.
        beside: for each extra tensor requested, the gradients of the M scores with respect to it, ``(M, ...)``.
    """

    outputs: Tensor
    beside: tuple[Tensor, ...]
    _modules: tuple[nn.Module, ...]
    _names: tuple[str, ...]
    _tokens: tuple[Tensor, ...]
    _mixed: tuple[Tensor | None, ...]  # (N, T, 3 H d) queries, keys and values, where a module of its own outputs them
    _found: tuple[Tensor, ...]  # (N, T, D) outputs of the modules
    _gradients: tuple[Tensor, ...] | None
    _factor: Tensor | None

    def __len__(self) -> int:
        """L, the number of attention modules."""
        return len(self._modules)

    def matrices(self) -> Iterator[Matrix]:
        """The matrices of each module, from the last to the first; each is computed when requested.

        Raises:
            UnsupportedModelError: they do not explain the module's output.
        """
        for place in reversed(range(len(self))):
            yield self._matrix(place)

    def _matrix(self, place: int) -> Matrix:
        module, name, tokens = self._modules[place], self._names[place], self._tokens[place]
        with precise(tokens), torch.no_grad():
            heads = heads_of(module, name, tokens.dtype)
            tokens = tokens.to(heads.weight.dtype)
            q, k, v = heads.split(tokens, self._mixed[place])
            values = heads.matrices(q, k)
            if place == len(self) - 1 and self._factor is not None:
                values = values * self._factor
            context = values @ v
            check(name, module, heads.project(context), self._found[place], self._tokens[place])
        gradients = None if self._gradients is None else self._gradients[place].to(tokens.dtype)
        return Matrix(heads, tokens, q, k, v, values, context, gradients)


def read_attention(
    model: nn.Module,
    found: Attentions,
    inputs: Tensor,
    args: Sequence[Any] = (),
    scores: Callable[[Tensor], Tensor] | None = None,
    *,
    last: Tensor | None = None,
    beside: Sequence[Tensor] = (),
    within: AbstractContextManager[Any] | None = None,
) -> AttentionPass:
    """One pass, with the gradients of scores at every attention module if requested.

    The graph begins after the first attention; each score costs one backward pass.

    Args:
        model: the classifier, in eval mode.
        found: where it attends.
        inputs: ``(N, C, H, W)``.
        args: further arguments of its forward.
        scores: from the outputs ``(N, ...)`` to M scores ``(N, M)``; None for a pass without a graph.
        last: ``(N,)``: the last module attends with the *constant* matrix that is its own times this factor, so that
            nothing flows back through its queries and keys.
        beside: further tensors of the graph to differentiate with respect to; a list that hooks fill during the pass.
        within: a context for the model's forward, where there are scores.
    """
    bare = unwrap(model)
    modules = tuple(find(bare, tap.name) for tap in found.taps)
    tokens: dict[nn.Module, Tensor] = {}
    mixed: dict[nn.Module | None, Tensor] = {}

    def remember(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        tokens[module] = first_tensor(given, named).detach().clone()

    def remember_mixed(module: nn.Module, _: Any, output: Tensor) -> None:
        mixed[module] = output.detach().clone()

    factor = None if last is None else last.view(-1, 1, 1, 1)
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(remember, with_kwargs=True).remove)
            qkv = module._modules.get("qkv")
            if isinstance(qkv, nn.Linear):
                stack.callback(qkv.register_forward_hook(remember_mixed).remove)
        if factor is not None:
            hook = _holding(found.taps[-1], factor)
            stack.callback(modules[-1].register_forward_hook(hook, with_kwargs=True).remove)
        gradients: tuple[Tensor, ...] | None = None
        others: tuple[Tensor, ...] = ()
        if scores is None:
            outputs, maps = run(bare, inputs, args, found.taps)
        else:
            with run_with_graph(bare, inputs, args, found.taps, within) as (outputs, maps):
                everything = _gradients(scores(outputs), [*maps, *beside])
            gradients = tuple(_tokens_of(part) for part in everything[: len(maps)])
            others = everything[len(maps) :]
    outside = [_tokens_of(map_).detach() for map_ in maps]
    inside = tuple(tokens[module] for module in modules)
    names = tuple(tap.name for tap in found.taps)
    between = tuple(mixed.get(module._modules.get("qkv")) for module in modules)
    return AttentionPass(outputs.detach(), others, modules, names, inside, between, tuple(outside), gradients, factor)


def _gradients(scores: Tensor, wanted: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``(M, N, ...)`` for each tensor; summing over the batch is exact in eval mode."""
    count = scores.shape[1]
    rows = [torch.autograd.grad(scores[:, m].sum(), wanted, retain_graph=m + 1 < count) for m in range(count)]
    return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))


def _tokens_of(maps: Tensor) -> Tensor:
    """``(..., D, 1, T)`` to ``(..., T, D)``."""
    return maps.squeeze(-2).transpose(-2, -1)


def _holding(tap: Tap, factor: Tensor) -> Callable[..., Any]:
    """A hook that puts the constant ``factor * A`` in the place of a module's own attention."""

    def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        given_tokens = first_tensor(given, named)
        own: Tensor = output if tap.element is None else output[tap.element]
        with precise(own):
            heads = heads_of(module, tap.name, own.dtype)
            q, k, v = heads.split(given_tokens.to(heads.weight.dtype))
            values = heads.matrices(q, k).detach()
            check(tap.name, module, heads.project(values @ v), own, given_tokens)
            held = heads.project(factor.to(values.dtype) * values @ v).to(own.dtype)
        return put(output, tap.element, held)

    return hook
