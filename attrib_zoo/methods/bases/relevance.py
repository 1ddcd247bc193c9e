"""Rules that propagate relevance from the output of a layer back to its inputs (Chefer et al., CVPR 2021, Section 3.1).

Relevance has a leading axis of M targets: ``(M, N, T, D)`` where values are ``(N, T, D)``.
"""

from __future__ import annotations

from torch import Tensor

_LEAST = 1e-9


def divide(a: Tensor, b: Tensor) -> Tensor:
    """``a / (b + 1e-9)``, as in the authors' method, and 0 where b is 0."""
    away = b + _LEAST
    away.masked_fill_(away == 0, _LEAST)
    return (a / away).masked_fill_(b == 0, 0)


def linear(relevance: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
    """The share of each input in the sum of a linear layer, positive products only (alpha 1, beta 0; no bias)."""
    plus, minus = inputs.clamp(min=0), inputs.clamp(max=0)
    weight_plus, weight_minus = weight.clamp(min=0), weight.clamp(max=0)
    total = plus @ weight_plus.T + minus @ weight_minus.T
    share = relevance / total.add_(_LEAST)  # where nothing is positive, nothing is shared either
    return (share @ weight_plus).mul_(plus).add_((share @ weight_minus).mul_(minus))


def add(relevance: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The shares of two summands, in proportion to their absolute sums, for each image."""
    share = divide(relevance, a + b)
    of_a, of_b = share * a, share.mul_(b)
    sum_a, sum_b, total = (part.sum((-2, -1), keepdim=True) for part in (of_a, of_b, relevance))
    absolute = sum_a.abs() + sum_b.abs()
    to_a, to_b = (divide(part.abs(), absolute) * total for part in (sum_a, sum_b))
    return of_a.mul_(divide(to_a, sum_a)), of_b.mul_(divide(to_b, sum_b))


def matmul(relevance: Tensor, a: Tensor, b: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
    """Half to each factor of ``product = a @ b``."""
    share = divide(relevance, product).div_(2)
    return (share @ b.transpose(-2, -1)).mul_(a), (a.transpose(-2, -1) @ share).mul_(b)


def clone(values: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """What flows back to values that were used twice."""
    return divide(one + other, values).mul_(values)


def mean(relevance: Tensor, tokens: Tensor) -> Tensor:
    """The share of each token ``(N, R, D)`` in the mean over tokens, from ``(M, N, D)``."""
    return tokens * divide(relevance, tokens.sum(-2)).unsqueeze(-2)
