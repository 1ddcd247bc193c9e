"""One attention module: its weights, its heads, and whether they explain its output."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrib_zoo.errors import UnsupportedModelError
from attrib_zoo.masking import wide_dtype

_INSTEAD = "use GradCAM, RISE or TTAME, which need no attention matrices"
_TOLERANCE = 1e-4  # of the largest value; a variant that these formulas do not describe differs by far more
_ROUNDINGS = 8


def precise(tensor: Tensor) -> AbstractContextManager[Any]:
    """Autocast off: matrices are computed in the dtype of their tensors."""
    return torch.autocast(tensor.device.type, enabled=False)


def refuse(name: str, module: nn.Module, reason: str) -> UnsupportedModelError:
    """The error for a part of a model that cannot be read; raise it."""
    return UnsupportedModelError(
        f"model: every attention must be plain self-attention over all tokens, got {name!r} "
        f"({type(module).__name__}): {reason}; {_INSTEAD}"
    )


@dataclass(frozen=True)
class Heads:
    """The weights of one attention module, in the precision that its matrices are computed in.

    Attributes:
        weight: ``(3 H d, D)``, to queries, keys and values; ``bias`` likewise.
        out_weight: ``(D, H d)``, from the heads' results; ``out_bias`` likewise.
        count: H.
        scale: the factor of the dot products of queries and keys.
        norms: what normalises queries and keys, where something does.
    """

    weight: Tensor
    bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    count: int
    scale: float
    norms: tuple[nn.Module | None, nn.Module | None]

    def split(self, tokens: Tensor, mixed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens ``(N, T, D)`` to queries, keys and values ``(N, H, T, d)``; ``mixed`` are all three, where known."""
        if mixed is None:
            mixed = F.linear(tokens, self.weight, self.bias)
        q, k, v = (self.apart(part) for part in mixed.to(tokens.dtype).chunk(3, -1))
        return _normed(self.norms[0], q), _normed(self.norms[1], k), v

    def matrices(self, q: Tensor, k: Tensor) -> Tensor:
        """The attention matrices ``(N, H, T, T)``."""
        return (q * self.scale @ k.transpose(-2, -1)).softmax(-1)

    def apart(self, tokens: Tensor) -> Tensor:
        """``(..., T, H d)`` to ``(..., H, T, d)``."""
        return tokens.reshape(*tokens.shape[:-1], self.count, -1).transpose(-3, -2)

    def together(self, parts: Tensor) -> Tensor:
        """``(..., H, T, d)`` to ``(..., T, H d)``."""
        return parts.transpose(-3, -2).flatten(-2)

    def project(self, context: Tensor) -> Tensor:
        """From the heads' results, ``(N, H, T, d)``, to the module's output ``(N, T, D)``."""
        return F.linear(self.together(context), self.out_weight, self.out_bias)


def _normed(norm: nn.Module | None, parts: Tensor) -> Tensor:
    if norm is None:
        return parts
    own = next(norm.parameters(), parts).dtype
    normed: Tensor = norm(parts.to(own))
    return normed.to(parts.dtype)


def _norm(module: nn.Module, name: str) -> Any:
    norm = getattr(module, name, None)
    return None if isinstance(norm, nn.Identity) else norm


def heads_of(module: nn.Module, name: str, dtype: torch.dtype) -> Heads:
    """Read the weights of an attention module: timm's, Hugging Face's, or ``nn.MultiheadAttention``.

    Raises:
        UnsupportedModelError: it is made of other parts.
    """
    norms: tuple[Any, Any] = (None, None)
    weight: Tensor
    bias: Tensor | None
    out: nn.Linear | None
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn or not module.batch_first:
            raise refuse(name, module, "only batch_first=True with one in_proj_weight and nothing added is known")
        weight, bias, out = module.in_proj_weight, module.in_proj_bias, module.out_proj
        count = module.num_heads
    else:
        weight, bias = _projections(module, name)
        out = next((o for n in _OUT if isinstance(o := getattr(module, n, None), nn.Linear)), None)
        norms = (_norm(module, "q_norm"), _norm(module, "k_norm"))
        counts = (getattr(module, attribute, None) for attribute in ("num_heads", "num_attention_heads"))
        count = next((value for value in counts if isinstance(value, int)), 0)
    taken = weight.shape[0] // 3 if out is None else out.in_features  # without it the heads' results are the output
    if not count or weight.shape[0] % (3 * count) or weight.shape[0] != 3 * taken:
        raise refuse(name, module, "queries, keys and values must have the same size")
    scales = (getattr(module, attribute, None) for attribute in ("scale", "scaling"))
    scale = next((value for value in scales if isinstance(value, (int, float))), (taken // count) ** -0.5)
    dtype = wide_dtype(dtype)

    def exact(weights: Tensor | None) -> Any:
        return None if weights is None else weights.detach().to(dtype)

    out_weight = torch.eye(taken, device=weight.device) if out is None else out.weight
    out_bias = None if out is None else out.bias
    return Heads(exact(weight), exact(bias), exact(out_weight), exact(out_bias), count, float(scale), norms)


_SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))  # of Hugging Face, new and old
_OUT = ("proj", "o_proj", "out_proj")


def _projections(module: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the layers that turn tokens into queries, keys and values, stacked in this order."""
    qkv = getattr(module, "qkv", None)
    if isinstance(qkv, nn.Linear):
        return qkv.weight, qkv.bias
    for names in _SEPARATE:
        parts = [part for n in names if isinstance(part := getattr(module, n, None), nn.Linear)]
        if len(parts) == 3:
            biases = [part.weight.new_zeros(part.out_features) if part.bias is None else part.bias for part in parts]
            weight = torch.cat([part.weight.detach() for part in parts])
            return weight, torch.cat([bias.detach() for bias in biases])
    adapted = any(hasattr(part, "base_layer") for part in module.modules())
    if adapted:
        raise refuse(
            name,
            module,
            "its linear layers have adapters (LoRA), whose sum is explained after model = model.merge_and_unload()",
        )
    raise refuse(
        name, module, "only linear layers qkv and proj, or q_proj, k_proj, v_proj, or nn.MultiheadAttention, are known"
    )


def check(name: str, module: nn.Module, again: Tensor, output: Tensor, tokens: Tensor) -> None:
    """Refuse a module unless the output computed from its matrices is its own."""
    if again.shape != output.shape or not close(again, output, tokens):
        raise refuse(name, module, "its output is not softmax(q k^T * scale) v, projected")


def close(again: Tensor, output: Tensor, *others: Tensor) -> bool:
    """Whether two computations of a tensor agree, as precisely as the types of the tensors involved allow."""
    step = max(torch.finfo(tensor.dtype).eps for tensor in (output, *others))
    if output.is_cuda:  # TF32 where the user allows it
        step = max(step, 2.0**-10)
    error = float((again.detach() - output.detach()).abs().max())
    largest = float(output.detach().abs().max())
    return math.isfinite(error) and error <= max(_TOLERANCE, _ROUNDINGS * step) * largest
