"""What the class token takes from each patch through one attention module: attention times values.

Neither is a module's output, so both are computed again from the tokens that entered the module. Their products add up
to what the module changes in the class token; so a class's score reads them, in the last blocks too, whose patch tokens
it never sees.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrib_zoo.backbone.vit.heads import heads_of, precise


def values_and_shares(module: nn.Module, name: str, tokens: Tensor, mixed: Tensor | None = None) -> Tensor:
    r"""For each token j, its values :math:`v_j` of all heads, and the share :math:`A_{0j}` of it that each head takes.

    :func:`attended` multiplies them.

    Args:
        module: an attention module that ``find_attention`` has accepted.
        name: its name, for errors.
        tokens: ``(N, T, D)``, what entered it; token 0 is the class token.
        mixed: ``(N, T, 3 H d)``, its own queries, keys and values, where they are known; they are half of the cost.

    Returns:
        ``(N, T, H d + H)``: the values of all heads, then the shares; in float32 or better.
    """
    heads = heads_of(module, name, tokens.dtype)
    with precise(tokens):
        tokens = tokens.to(heads.weight.dtype)
        if mixed is not None or heads.norms != (None, None):
            q, k, v = heads.split(tokens, mixed)
            scores = (q[:, :, :1] @ k.transpose(-2, -1)).squeeze(2)
        else:
            to_q, to_k, to_v = heads.weight.chunk(3)
            q_bias, _, v_bias = (None,) * 3 if heads.bias is None else heads.bias.chunk(3)
            v = heads.apart(F.linear(tokens, to_v, v_bias))
            q = heads.apart(F.linear(tokens[:, :1], to_q, q_bias)).squeeze(2)
            # (W_k^T q) x costs one row where q (W_k x) costs all keys; their bias adds the same to every token
            asked = torch.bmm(q.transpose(0, 1), to_k.unflatten(0, (heads.count, -1))).transpose(0, 1)
            scores = torch.bmm(asked, tokens.transpose(1, 2))
        shares = (scores * heads.scale).softmax(-1)  # (N, H, T)
        return torch.cat([heads.together(v), shares.transpose(1, 2)], dim=-1)


def attended(features: Tensor, channels: int, usual: Tensor | None = None) -> Tensor:
    r""":math:`A_{0j} v_j` of all heads; the sum over the tokens j is what the output projection gets at token 0.

    Args:
        features: ``(N, H d + H, h, w)``, a map of :func:`values_and_shares`.
        channels: H d.
        usual: ``(1, H d, h, w)``: values to subtract first, :math:`A_{0j} (v_j - \bar v_j)`.

    Returns:
        ``(N, H d, h, w)``.
    """
    values, shares = features[:, :channels], features[:, channels:]
    values = values if usual is None else values - usual
    heads = shares.shape[1]
    taken: Tensor = (values.unflatten(1, (heads, channels // heads)) * shares.unsqueeze(2)).flatten(1, 2)
    return taken


def attended_source(module: nn.Module) -> nn.Module:
    """Where a hook finds what :func:`seen_in_pass` needs: the layer that computes q, k and v, or the module."""
    mixed = module._modules.get("qkv")
    return mixed if isinstance(mixed, nn.Linear) else module


def seen_in_pass(module: nn.Module, name: str, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> Tensor:
    """:func:`values_and_shares`, from the arguments of a forward hook on :func:`attended_source`."""
    mixed = None if attended_source(module) is module else output
    return values_and_shares(module, name, first_tensor(given, named), mixed)


def attended_channels(module: nn.Module, name: str) -> int:
    """H d, the channels of :func:`attended`."""
    return heads_of(module, name, next(module.parameters()).dtype).out_weight.shape[1]


def first_tensor(given: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """The tokens among the arguments of an attention module."""
    return next(value for value in (*given, *named.values()) if isinstance(value, Tensor))
