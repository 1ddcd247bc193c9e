"""Passes whose backward is balanced: the outputs are the same, and gradient times input, with biases, adds up to them.

A network of affine layers and ReLUs is its gradient times its inputs plus its gradients times its biases. Transformers
and gated networks are not, since they multiply what depends on the image by what depends on the image: attention
weights, gates of activations, standard deviations. LibraGrad (Mehri, Soleymani Baghshah and Pilehvar, CVPR 2025) cuts
or scales these paths in the backward pass alone, so that the sum is complete again:

* the weights of attention (all of softmax) and gates (sigmoid) are constants;
* an activation f(x) = x · (f(x)/x) is x times a constant gate, and a norm divides by a constant deviation;
* a product of two things that both depend on the image gives each factor half of its gradient.

It works on functions, not on modules: whatever class a model has, these are the functions that it calls. What is
written in another way (a scripted function, a softmax of exponentials) goes unseen; the sum then shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attrib_zoo.backbone.nested import map_tensors

_CONSTANT = {"softmax", "_softmax", "sigmoid", "sigmoid_", "hardsigmoid", "rsqrt", "sqrt", "reciprocal"}
_GATED = {"gelu", "silu", "mish", "hardswish", "tanh", "elu", "selu", "celu", "relu6", "hardtanh", "softsign"}
_PRODUCTS = {"mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__", "matmul", "__matmul__", "bmm", "einsum"}
_QUOTIENTS = {"div", "div_", "true_divide", "__truediv__", "__itruediv__", "divide"}
_SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_DIFFERENCES = {"sub": 1, "sub_": 1, "subtract": 1, "__sub__": 1, "__isub__": 1, "__rsub__": -1, "rsub": -1}
_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}


@dataclass(frozen=True)
class Term:
    """A constant that the network adds somewhere.

    Attributes:
        output: what it was added to, with it, in the graph.
        constant: what was added; broadcasts to ``output``.
        last: True if channels are the last axis of ``output``, False if the second; None where unknown.
        batch: the axis of ``output`` that counts the images, or the parts of images (windows) one image after another.
    """

    output: Tensor
    constant: Tensor
    last: bool | None
    batch: int = 0

    def times(self, slope: Tensor, count: int) -> Tensor:
        """Gradient ``slope`` at the output times the constant, ``(count, parts, ...)``."""
        apart: Tensor = (self.constant.to(slope) * slope).movedim(self.batch, 0).unflatten(0, (count, -1))
        return apart


class Balanced(TorchFunctionMode):
    """Inside this context, torch's functions give the same values with a balanced backward pass.

    Weights are treated as constants: only what depends on the images has gradients.

    Args:
        terms: a list that is filled with the constants that are added to what depends on the images, in the order of
            execution; None leaves them out.
    """

    def __init__(self, terms: list[Term] | None = None) -> None:
        super().__init__()
        self.terms = terms

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        kwargs = kwargs or {}
        if name in ("__get__", "__set__", "requires_grad_", "detach", "size", "dim", "is_floating_point"):
            return func(*args, **kwargs)
        args, kwargs = _fixed(args), _fixed(kwargs)
        rule = _RULES.get(name)
        found = func(*args, **kwargs) if rule is None else rule(func, args, kwargs)
        if name == "multi_head_attention_forward" and self.terms is not None and found[0].requires_grad:
            self.terms.append(Term(found[0], _of_heads(args, kwargs), True, batch=found[0].ndim - 2))
            return (found[0].clone(), *found[1:])
        if self.terms is None or not (isinstance(found, Tensor) and found.requires_grad):
            return found
        added = _added(name, found, args, kwargs)
        if added is None:
            return found
        self.terms.append(Term(found, *added))
        return found.clone()  # later operations may work in place


def _fixed(values: Any) -> Any:
    """Weights without their gradients."""
    return map_tensors(values, lambda t: t.detach() if isinstance(t, nn.Parameter) else t)


def _with_value(value: Tensor, way: Tensor) -> Tensor:
    """The value of the first, to the last bit, with the gradient of the second."""
    return value.detach() + (way - way.detach())


def _depends(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


# ---------------------------------------------------------------------- rules


def _constant(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs).detach()


def _gated(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    x = args[0] if args else kwargs["input"]
    if not _depends(x):
        return func(*args, **kwargs)
    rest = args[1:]
    named = {key: value for key, value in kwargs.items() if key not in ("input", "inplace")}
    still = x.detach()
    value = func(still.clone(), *rest, **named)  # which may work in place
    at_zero = func(torch.full_like(still, 1e-3), *rest, **named)
    at_zero = (at_zero - func(torch.full_like(still, -1e-3), *rest, **named)) / 2e-3
    gate = torch.where(still == 0, at_zero, value / still.where(still != 0, torch.ones_like(still)))
    return _with_value(value, x * gate)


def _product(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    operands = [value for value in _flat(args) if _depends(value)]
    if len(operands) < 2:
        return func(*args, **kwargs)
    share = 1 / len(operands)
    shared = map_tensors(args, lambda t: _with_value(t, share * t) if t.requires_grad else t)
    if getattr(func, "__name__", "") in ("mul_", "__imul__"):
        return args[0].copy_(torch.mul(*shared))  # in place on the intended tensor
    return func(*shared, **kwargs)


def _flat(args: Any) -> list[Any]:
    return [entry for value in args for entry in (_flat(value) if isinstance(value, (list, tuple)) else [value])]


def _quotient(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    under = args[1] if len(args) > 1 else kwargs.get("other")
    return func(args[0], under.detach(), *args[2:], **kwargs) if _depends(under) else func(*args, **kwargs)


def _attention(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Queries and keys are constants; the values are not."""
    args = tuple(a.detach() if i < 2 and isinstance(a, Tensor) else a for i, a in enumerate(args))
    return func(*args, **{k: v.detach() if k in ("query", "key") else v for k, v in kwargs.items()})


def _norm_of(axes: Callable[[Tensor, Any, Any], list[int]], *, centred: bool = True) -> Callable[..., Any]:
    def rule(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        x = args[0] if args else kwargs["input"]
        if not _depends(x):
            return func(*args, **kwargs)
        value = func(*args, **kwargs).detach()
        names = ("normalized_shape", "weight", "bias", "eps")
        given = {**dict(zip(names, args[1:], strict=False)), **kwargs}
        over = axes(x, args, kwargs)
        middle = x - x.mean(over, keepdim=True) if centred else x
        eps = given.get("eps")
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        deviation = (middle.detach().square().mean(over, keepdim=True) + eps).sqrt()
        way = middle / deviation
        weight = given.get("weight")
        return _with_value(value, way if weight is None else way * weight)

    return rule


def _last_axes(x: Tensor, args: Any, kwargs: Any) -> list[int]:
    shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    return list(range(x.ndim - len(shape), x.ndim))


def _group_norm(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    given = {**dict(zip(("input", "num_groups", "weight", "bias", "eps"), args, strict=False)), **kwargs}
    x = given["input"]
    if not _depends(x):
        return func(*args, **kwargs)
    grouped = x.reshape(len(x), int(given["num_groups"]), -1)
    middle = grouped - grouped.mean(2, keepdim=True)
    deviation = (middle.detach().square().mean(2, keepdim=True) + given.get("eps", 1e-5)).sqrt()
    way = (middle / deviation).reshape(x.shape)
    weight = given.get("weight")
    if weight is not None:
        way = way * weight.view(1, -1, *[1] * (x.ndim - 2))
    return _with_value(func(*args, **kwargs), way)


def _normalize(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    x = args[0] if args else kwargs["input"]
    value = func(*args, **kwargs)
    if not _depends(x):
        return value
    still = x.detach()
    gate = value.detach() / still.where(still != 0, torch.ones_like(still))
    return _with_value(value, x * gate)


_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_CONSTANT, _constant),
    **dict.fromkeys(_GATED, _gated),
    **dict.fromkeys(_PRODUCTS, _product),
    **dict.fromkeys(_QUOTIENTS, _quotient),
    "scaled_dot_product_attention": _attention,
    "multi_head_attention_forward": _attention,
    "layer_norm": _norm_of(_last_axes),
    "rms_norm": _norm_of(_last_axes, centred=False),
    "group_norm": _group_norm,
    "normalize": _normalize,
}


# ---------------------------------------------------------------------- constants that are added


def _added(name: str, found: Tensor, args: Any, kwargs: Any) -> tuple[Tensor, bool | None] | None:
    """What a function added to what depends on the images, and where the channels of its output are."""
    if name == "linear":
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        return None if bias is None else (bias, True)
    if name in _CONVOLUTIONS:
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        return None if bias is None else (_second(bias, found), False)
    if name == "batch_norm":
        return _shift(found, args, kwargs), False
    if name in ("layer_norm", "group_norm"):
        place = 3
        bias = args[place] if len(args) > place else kwargs.get("bias")
        return None if bias is None else (bias, True) if name == "layer_norm" else (_second(bias, found), False)
    if name in _SUMS or name in _DIFFERENCES:
        return _of_a_sum(name, args, kwargs)
    if name in ("cat", "concat"):
        return _of_a_row(args, kwargs)
    return None


def _of_heads(args: Any, kwargs: Any) -> Tensor:
    """What attention with constant weights, whose rows sum to one, adds: the biases of values and of the output."""
    names = ["query", "key", "value", "width", "heads", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v", "zero"]
    names += ["dropout_p", "out_proj_weight", "out_proj_bias"]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    weight = given["out_proj_weight"]
    total = weight.new_zeros(len(weight)) if given["out_proj_bias"] is None else given["out_proj_bias"]
    mixed = given["in_proj_bias"]
    added: Tensor = total if mixed is None else total + weight @ mixed.chunk(3)[2]
    return added


def _second(bias: Tensor, like: Tensor) -> Tensor:
    return bias.view(1, -1, *[1] * (like.ndim - 2))


def _shift(found: Tensor, args: Any, kwargs: Any) -> Tensor:
    """What a batch normalisation in use adds."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    slope = (given["running_var"] + given.get("eps", 1e-5)).rsqrt()
    slope = slope if given.get("weight") is None else slope * given["weight"]
    shift = -given["running_mean"] * slope
    return _second(shift if given.get("bias") is None else shift + given["bias"], found)


def _of_a_sum(name: str, args: Any, kwargs: Any) -> tuple[Tensor, None] | None:
    one, other = args[0], args[1] if len(args) > 1 else kwargs.get("other")
    scale = kwargs.get("alpha", 1)
    sign = _DIFFERENCES.get(name)
    if _depends(one) and _depends(other):
        return None
    moving = one if _depends(one) else other
    fixed = other if moving is one else one
    factor = scale if fixed is other else 1
    if sign is not None:  # __sub__: one - other; rsub: other - one
        factor *= -1 if (fixed is other) == (sign == 1) else 1
    constant = fixed if isinstance(fixed, Tensor) else torch.as_tensor(fixed, dtype=moving.dtype, device=moving.device)
    return constant * factor, None


def _of_a_row(args: Any, kwargs: Any) -> tuple[Tensor, None] | None:
    """The constant parts of a concatenation, and zeros in the place of the others."""
    parts = args[0] if args else kwargs["tensors"]
    if all(_depends(part) for part in parts):
        return None
    axis = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    return torch.cat([torch.zeros_like(p) if _depends(p) else p for p in parts], axis).detach(), None
