"""Plain pre-norm transformers taken apart, for methods that go backwards through every layer by rules of their own.

A block is ``x1 = x0 + f(norm(x0))`` with attention in f, and ``x2 = x1 + g(norm(x1))`` with linear layers one after
the other in g; what else is in f and g (activation, LayerScale, dropout) works on each value alone. After the blocks
come layers of that kind, a read-out of the class token or a mean of tokens, and linear layers. All of this is found in
one pass and checked numerically; a model that is built otherwise is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.capture import frozen, run, select_args
from attrib_zoo.backbone.layers.stages import is_norm
from attrib_zoo.backbone.layers.trace import Call, Trace
from attrib_zoo.backbone.module import find
from attrib_zoo.backbone.nested import pick
from attrib_zoo.backbone.randomness import draws_taken_back
from attrib_zoo.backbone.vit.attention import Attentions
from attrib_zoo.backbone.vit.heads import close
from attrib_zoo.errors import UnsupportedModelError

_INSTEAD = "use GenericAttention, which needs attention and its gradient only"


@dataclass(frozen=True)
class Block:
    """The names of the parts of one block, dotted paths of modules.

    Attributes:
        name: the block; its input is x0.
        branch: the module that outputs f(norm(x0)), which entry of its output that is, and which of its runs.
        norm: the norm of the second branch; its input is x1.
        linears: the linear layers of the second branch, in the order of execution.
        last: the module that outputs g(norm(x1)), and which of its runs: one dropout may follow both branches.
    """

    name: str
    branch: tuple[str, int | str | None, int]
    norm: str
    linears: tuple[str, ...]
    last: tuple[str, int]


@dataclass(frozen=True)
class Head:
    """One path from the tokens to scores.

    Attributes:
        linears: its linear layers, in the order of execution.
        token: the token that it reads; None for the mean of all tokens read.
    """

    linears: tuple[str, ...]
    token: int | None


@dataclass(frozen=True)
class PreNorm:
    """A transformer taken apart; made by :func:`take_apart`.

    Attributes:
        blocks: in the order of execution.
        tokens: the module whose output ``(N, T, D)`` the heads read.
        heads: one, or two for distilled models.
    """

    blocks: tuple[Block, ...]
    tokens: str
    heads: tuple[Head, ...]


class Values:
    """Inputs and outputs of the parts during one pass; filled by :meth:`listening`."""

    def __init__(self) -> None:
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[tuple[str, int], Tensor] = {}
        self.scores: list[Tensor] = []

    def into(self, name: str, dtype: torch.dtype) -> Tensor:
        """The first argument of a module."""
        return self._inputs[name].to(dtype)

    def out_of(self, name: str, dtype: torch.dtype, run: int = 0) -> Tensor:
        """The output of a module in one of its runs."""
        return self._outputs[name, run].to(dtype)

    @contextmanager
    def listening(self, model: nn.Module, parts: PreNorm) -> Iterator[None]:
        """Hooks for one pass; the heads' outputs stay in their graph, in :attr:`scores`."""
        with ExitStack() as stack:

            def keep_input(name: str) -> None:
                def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
                    self._inputs[name] = _first(given, named).detach().clone()

                stack.callback(find(model, name).register_forward_pre_hook(hook, with_kwargs=True).remove)

            def keep_output(name: str, element: int | str | None = None, run: int = 0) -> None:
                runs = iter(range(run, -1, -1))

                def hook(_: nn.Module, __: Any, output: Any) -> None:
                    if next(runs, None) == 0:
                        self._outputs[name, run] = pick(output, element).detach().clone()

                stack.callback(find(model, name).register_forward_hook(hook).remove)

            def keep_scores(_: nn.Module, __: Any, output: Tensor) -> Tensor:
                self.scores.append(output)
                return output.clone()

            for block in parts.blocks:
                for name in (block.name, block.norm, *block.linears):
                    keep_input(name)
                keep_output(*block.branch)
                keep_output(block.last[0], None, block.last[1])
            keep_output(parts.tokens)
            for head in parts.heads:
                for name in head.linears:
                    keep_input(name)
                stack.callback(find(model, head.linears[-1]).register_forward_hook(keep_scores).remove)
            yield


def _first(given: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    return next(value for value in (*given, *named.values()) if isinstance(value, Tensor))


# --- taking apart ---------------------------------------------------------------------------------------------


def take_apart(trace: Trace, found: Attentions, inputs: Tensor, args: Sequence[Any] = ()) -> PreNorm:
    """Find the parts of a traced model and check them on one image.

    Raises:
        UnsupportedModelError: it is not a plain pre-norm transformer followed by linear layers.
    """
    seen = _Seen(trace, inputs, args)
    attentions = [next(c for c in trace.calls() if c.name == tap.name) for tap in found.taps]
    blocks = []
    for call, tap in zip(attentions, found.taps, strict=True):
        if call.parent is None:
            raise _refuse(call, "it is not inside a block")
        blocks.append((call.parent, _block(call, call.parent, tap.element, seen)))
    for (before, _), (after, _) in pairwise(blocks):
        if not seen.same(seen.output(before), seen.input(after)):
            raise _refuse(after, "its input is not the output of the block before it")
    tokens, heads = _heads(trace, blocks[-1][0], found, seen)
    return PreNorm(tuple(block for _, block in blocks), tokens, heads)


def _refuse(call: Call, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"model: must be a plain pre-norm vision transformer, got {call.name!r} ({type(call.module).__name__}): "
        f"{reason}; {_INSTEAD}"
    )


class _Seen:
    """Inputs and outputs of every call in a pass over one image."""

    def __init__(self, trace: Trace, inputs: Tensor, args: Sequence[Any]) -> None:
        self._values: dict[tuple[str, int], tuple[Tensor | None, Any]] = {}
        names: dict[nn.Module, str] = {}
        counts: dict[nn.Module, int] = {}

        def begin(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            number = counts[module] = counts.get(module, -1) + 1
            value = next((v for v in (*given, *named.values()) if isinstance(v, Tensor)), None)
            self._values[names[module], number] = (None if value is None else value.clone(), None)

        def end(module: nn.Module, _: Any, output: Any) -> None:
            key = names[module], counts[module]
            kept = output.clone() if isinstance(output, Tensor) else output
            self._values[key] = (self._values[key][0], kept)

        row = torch.zeros(1, dtype=torch.long, device=inputs.device)
        with draws_taken_back(inputs.device), frozen(trace.model) as model, ExitStack() as stack:
            names.update({find(model, call.name): call.name for call in trace.root.inside()})
            for module in names:
                stack.callback(module.register_forward_pre_hook(begin, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(end).remove)
            run(model, inputs[:1], select_args(args, row, len(inputs)))

    def input(self, call: Call) -> Any:
        return self._values[call.name, call.number][0]

    def output(self, call: Call) -> Any:
        return self._values[call.name, call.number][1]

    def runs(self, call: Call) -> int:
        return sum(name == call.name for name, _ in self._values)

    @staticmethod
    def same(one: Any, other: Any) -> bool:
        """Whether two values are equal up to rounding."""
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)) or one.shape != other.shape:
            return False
        return close(one, other)


def _block(attention: Call, block: Call, element: int | str | None, seen: _Seen) -> Block:
    children = block.children
    place = children.index(attention)
    norm = next((i for i in range(place + 1, len(children)) if is_norm(children[i].module)), None)
    if norm is None or norm == len(children) - 1:
        raise _refuse(block, "no second branch that begins with a norm stands behind its attention")
    branch, last = children[norm - 1], children[-1]
    entry = element if branch is attention else None
    f = seen.output(branch) if entry is None else seen.output(branch)[entry]
    start, middle = seen.input(block), seen.input(children[norm])
    if not isinstance(f, Tensor) or not seen.same(start + f, middle):
        raise _refuse(block, "its first sum is not x + attention(norm(x))")
    if not seen.same(middle + seen.output(last), seen.output(block)):
        raise _refuse(block, "its second sum is not x + mlp(norm(x))")
    leaves = [leaf for call in children[norm:] for leaf in _leaves(call)]
    for leaf, following in pairwise(leaves):
        if not seen.same(seen.output(leaf), seen.input(following)):
            raise _refuse(following, "it does not work on what the layer before it puts out")
    linears = [leaf for leaf in leaves if isinstance(leaf.module, nn.Linear)]
    unknown = [leaf for leaf in leaves if leaf not in linears and _mixes(leaf)]
    if unknown or not linears:
        raise _refuse(unknown[0] if unknown else block, "no rule is known for it")
    for part in (children[norm], *linears):
        if seen.runs(part) > 1:
            raise _refuse(part, "it runs several times in a forward pass")
    return Block(
        block.name,
        (branch.name, entry, branch.number),
        children[norm].name,
        tuple(leaf.name for leaf in linears),
        (last.name, last.number),
    )


def _leaves(call: Call) -> list[Call]:
    return [leaf for child in call.children for leaf in _leaves(child)] if call.children else [call]


def _mixes(call: Call) -> bool:
    """Whether a layer other than a linear one mixes channels or tokens: it has a matrix and is not a norm."""
    return not is_norm(call.module) and any(parameter.ndim > 1 for parameter in call.module.parameters())


def _heads(trace: Trace, block: Call, found: Attentions, seen: _Seen) -> tuple[str, tuple[Head, ...]]:
    """What follows the last block: layers on tokens, then on vectors."""
    leaves = [call for call in trace.calls() if call.begin > block.end and not call.children]
    tokens = block
    vectors: list[Call] = []
    for leaf in leaves:
        value = seen.output(leaf)
        if isinstance(value, Tensor) and value.ndim == 3 and not vectors:
            if not seen.same(seen.output(tokens), seen.input(leaf)) or _mixes(leaf):
                raise _refuse(leaf, "no rule is known for it behind the last block")
            tokens = leaf
        elif isinstance(value, Tensor) and value.ndim == 2:
            vectors.append(leaf)
        else:
            raise _refuse(leaf, "it puts out neither tokens nor one vector for each image")
    paths: list[tuple[Call, Head]] = []
    for leaf in vectors:
        value = seen.input(leaf)
        before = next((entry for entry in reversed(paths) if seen.same(seen.output(entry[0]), value)), None)
        head = before[1] if before is not None else Head((), _token(leaf, value, seen.output(tokens), found, seen))
        if isinstance(leaf.module, nn.Linear):
            head = Head((*head.linears, leaf.name), head.token)
        elif _mixes(leaf):
            raise _refuse(leaf, "no rule is known for it in the head")
        paths.append((leaf, head))
    ways = [head for _, head in paths if head.linears]
    ends = [h for h in dict.fromkeys(ways) if not any(o.linears[: len(h.linears)] == h.linears for o in ways if o != h)]
    if not ends:
        raise _refuse(block, "no linear layer on a vector stands behind it")
    return tokens.name, tuple(ends)


def _token(leaf: Call, value: Any, tokens: Tensor, found: Attentions, seen: _Seen) -> int | None:
    """Which token a vector is; None for the mean of the tokens that the head reads."""
    for token in range(found.grid.prefix):
        if seen.same(tokens[:, token], value):
            return token
    if seen.same(tokens[:, list(found.read)].mean(1), value):
        return None
    raise _refuse(leaf, "it reads neither a class token nor the mean of tokens")
