"""Attention whose weights are frozen, at the cost of attention whose weights are not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def in_one_product(model: nn.Module) -> Iterator[None]:
    """Have ``nn.MultiheadAttention`` project all tokens of a batch in one matrix product, for passes with a graph.

    With ``batch_first`` the module turns ``(N, T, D)`` into a view ``(T, N, D)`` that is not contiguous. Where the
    projection's weights have a gradient, torch copies such an input and multiplies once; where they are frozen, it
    multiplies T small matrices, which takes five times as long. So tokens are laid out as the module will read them.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention) and module.batch_first and _frozen(module):
                handle = module.register_forward_pre_hook(_laid_out, with_kwargs=True)
                stack.callback(handle.remove)
        yield


def _frozen(module: nn.MultiheadAttention) -> bool:
    return module.in_proj_weight is not None and not module.in_proj_weight.requires_grad


def _laid_out(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    done: dict[int, Tensor] = {}  # the module tells self-attention by the identity of its arguments

    def laid_out(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim != 3 or not value.is_floating_point():
            return value
        if id(value) not in done:
            done[id(value)] = value.transpose(0, 1).contiguous().transpose(0, 1)
        return done[id(value)]

    tokens = ("query", "key", "value")
    return (
        (*map(laid_out, given[:3]), *given[3:]),
        {name: laid_out(value) if name in tokens else value for name, value in named.items()},
    )
