"""Relevance propagation through a pre-norm ViT, one image and one target at a time, every product written out.

Written from the rules of Chefer et al. (CVPR 2021) as sums over single products, without a line of the library.
"""

from __future__ import annotations

import torch
from oracles import explicit_vit
from torch import Tensor, nn


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """The authors' division: clamped from both sides, so b + 1e-9; nothing where b is nothing."""
    below = b.clamp(min=1e-9) + b.clamp(max=1e-9)
    below = below + below.eq(0) * 1e-9
    return a / below * b.ne(0)


def through_linear(relevance: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
    """Token by token: R_i = sum_j max(0, x_i w_ji) / sum_i max(0, x_i w_ji) R_j."""
    rows = []
    for token, share in zip(inputs, relevance, strict=True):
        products = (weight * token).clamp(min=0)
        rows.append(products.T @ ratio(share, products.sum(1)))
    return torch.stack(rows)


def through_sum(relevance: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    of_a, of_b = a * ratio(relevance, a + b), b * ratio(relevance, a + b)
    size_a, size_b = of_a.sum().abs(), of_b.sum().abs()
    goal_a, goal_b = (ratio(size, size_a + size_b) * relevance.sum() for size in (size_a, size_b))
    return of_a * ratio(goal_a, of_a.sum()), of_b * ratio(goal_b, of_b.sum())


def through_product(relevance: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """z_ik = sum_j a_ij b_jk: half of a_ij b_jk / z_ik R_ik to each of the two factors."""
    share = ratio(relevance, a @ b)
    parts = a[:, :, None] * b[None] * share[:, None, :]
    return parts.sum(2) / 2, parts.sum(0) / 2


def joined(values: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return values * ratio(one, values) + values * ratio(other, values)


def parts_of(model: nn.Module) -> list[dict[str, object]]:
    """The same names for timm's and torchvision's blocks."""
    if hasattr(model, "blocks"):
        return [
            {
                "norm1": b.norm1, "attention": b.attn, "qkv": b.attn.qkv.weight, "bias": b.attn.qkv.bias,
                "proj": b.attn.proj, "ls1": b.ls1, "norm2": b.norm2, "fc1": b.mlp.fc1, "act": b.mlp.act,
                "fc2": b.mlp.fc2, "ls2": b.ls2, "q_norm": b.attn.q_norm, "k_norm": b.attn.k_norm,
            }
            for b in model.blocks
        ]  # fmt: skip
    same = nn.Identity()
    return [
        {
            "norm1": b.ln_1, "attention": b.self_attention, "qkv": b.self_attention.in_proj_weight,
            "bias": b.self_attention.in_proj_bias, "proj": b.self_attention.out_proj, "ls1": same, "norm2": b.ln_2,
            "fc1": b.mlp[0], "act": b.mlp[1], "fc2": b.mlp[3], "ls2": same, "q_norm": same, "k_norm": same,
        }
        for b in model.encoder.layers
    ]  # fmt: skip


def tokens_of(model: nn.Module, image: Tensor) -> Tensor:
    if hasattr(model, "blocks"):
        return model._pos_embed(model.patch_embed(image[None]))[0]
    x = model._process_input(image[None])
    return (torch.cat([model.class_token, x], 1) + model.encoder.pos_embedding)[0]


@torch.no_grad()
def relevance_of_matrices(model: nn.Module, image: Tensor, target: int, start: int = 0) -> dict[int, list[Tensor]]:
    """The relevance of each head's matrix in each block from ``start`` on."""
    x = tokens_of(model, image)
    saved = []
    for part in parts_of(model):
        heads = part["attention"].num_heads
        normed = part["norm1"](x)
        q, k, v = (
            [piece.reshape(len(x), heads, -1)[:, h] for h in range(heads)]
            for piece in (normed @ part["qkv"].T + part["bias"]).chunk(3, 1)
        )
        q, k = [part["q_norm"](p) for p in q], [part["k_norm"](p) for p in k]
        matrices = [torch.softmax(a @ b.T * a.shape[1] ** -0.5, 1) for a, b in zip(q, k, strict=True)]
        context = torch.cat([m @ p for m, p in zip(matrices, v, strict=True)], 1)
        f = part["ls1"](part["proj"](context))
        middle = x + f
        hidden = part["norm2"](middle)
        active = part["act"](part["fc1"](hidden))
        g = part["ls2"](part["fc2"](active))
        saved.append((part, x, normed, q, k, v, matrices, context, f, middle, hidden, active, g))
        x = middle + g
    relevance = through_head(model, x, target)
    found = {}
    for number in reversed(range(len(saved))):
        part, x, normed, q, k, v, matrices, context, f, middle, hidden, active, g = saved[number]
        direct, branch = through_sum(relevance, middle, g)
        branch = through_linear(branch, active, part["fc2"].weight)
        branch = through_linear(branch, hidden, part["fc1"].weight)
        relevance = joined(middle, direct, branch)
        direct, branch = through_sum(relevance, x, f)
        branch = through_linear(branch, context, part["proj"].weight).chunk(len(q), 1)
        to_q, to_k, to_v = [], [], []
        found[number] = []
        for h in range(len(q)):
            matrix, value = through_product(branch[h], matrices[h], v[h])
            query, key = through_product(matrix, q[h], k[h].T)
            found[number].append(matrix)
            to_q.append(query), to_k.append(key.T), to_v.append(value)
        if number == start:
            return found
        branch = through_linear(torch.cat([*to_q, *to_k, *to_v], 1), normed, part["qkv"])
        relevance = joined(x, direct, branch)
    raise AssertionError


def through_head(model: nn.Module, x: Tensor, target: int) -> Tensor:
    relevance = torch.zeros_like(x)
    if not hasattr(model, "blocks"):
        vector, layers = model.encoder.ln(x)[0], list(model.heads)
        inputs = []
        for layer in layers:
            inputs.append(vector)
            vector = layer(vector)
        share = one_hot(vector, target)
        for layer, given in zip(layers[::-1], inputs[::-1], strict=True):
            if isinstance(layer, nn.Linear):
                share = through_linear(share[None], given[None], layer.weight)[0]
        relevance[0] = share
    elif hasattr(model, "head_dist"):
        for token, head in enumerate((model.head, model.head_dist)):
            given = model.norm(x)[token]
            share = 0.5 * one_hot(head(given), target)
            relevance[token] = through_linear(share[None], given[None], head.weight)[0]
    elif model.global_pool == "avg":
        patches = x[model.num_prefix_tokens :]
        given = model.fc_norm(patches.mean(0))
        share = through_linear(one_hot(model.head(given), target)[None], given[None], model.head.weight)[0]
        relevance[model.num_prefix_tokens :] = patches * ratio(share, patches.sum(0))
    else:
        given = model.norm(x)[0]
        relevance[0] = through_linear(one_hot(model.head(given), target)[None], given[None], model.head.weight)[0]
    return relevance


def one_hot(scores: Tensor, target: int) -> Tensor:
    return torch.eye(len(scores), dtype=scores.dtype)[target]


def transformer_lrp(model: nn.Module, image: Tensor, target: int, start: int = 0, *, row_norm: bool = False) -> Tensor:
    """The product of the blocks' factors."""
    _, gradients = explicit_vit.with_gradients(model, image, target)
    relevance = relevance_of_matrices(model, image, target, start)
    eye = torch.eye(len(gradients[0][0]), dtype=image.dtype)
    total = eye
    for number in sorted(relevance):
        factor = eye + explicit_vit.positive_mean(relevance[number], gradients[number])
        if row_norm:
            factor = factor / factor.sum(1)[:, None]
        total = factor @ total
    return total
