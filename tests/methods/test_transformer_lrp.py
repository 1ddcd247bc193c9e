"""Relevance propagation against every product written out, its conservation, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import attention_cases as written_out
import engine_cases as cases
import pytest
import torch
from attention_cases import ARCHITECTURES, TARGETS, assert_close, read_out, sized_images, torchvision_vit, vit
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attrib_zoo import AttentionRollout, GenericAttention, TransformerLRP
from attrib_zoo.errors import OptionError, UnsupportedModelError
from attrib_zoo.methods.bases import relevance as rules

# ---------------------------------------------------------------------- the reference: sums over single products


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


def lrp_written_out(model: nn.Module, image: Tensor, target: int, start: int = 0, *, row_norm: bool = False) -> Tensor:
    """The product of the blocks' factors."""
    _, gradients = written_out.with_gradients(model, image, target)
    relevance = relevance_of_matrices(model, image, target, start)
    eye = torch.eye(len(gradients[0][0]), dtype=image.dtype)
    total = eye
    for number in sorted(relevance):
        factor = eye + written_out.positive_mean(relevance[number], gradients[number])
        if row_norm:
            factor = factor / factor.sum(1)[:, None]
        total = factor @ total
    return total


def with_representation():
    from torchvision.models.vision_transformer import VisionTransformer

    return cases.lively(VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=5, representation_size=12))


CASES = {
    **{name: (*case, {}) for name, case in ARCHITECTURES.items() if name != "no bias"},
    "two linear layers in the head": (with_representation, 1, [0], {}),
    "later blocks only": (vit, 1, [0], {"start_layer": 1}),
    "the last block only": (vit, 1, [0], {"start_layer": 2}),
    "rows normalised": (vit, 1, [0], {"row_norm": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_maps_are_those_of_every_product_written_out(case):
    build, prefix, read, options = CASES[case]
    model, images = build().double(), sized_images(case)
    explainer = TransformerLRP(model, mean_pooling=len(read) > 2, upsample=False, **options)
    with cases.untouched(model, images):
        found = explainer.attribute(images, target=TARGETS)
    start, row_norm = options.get("start_layer", 0), options.get("row_norm", False)
    for n, target in enumerate(TARGETS):
        wanted = lrp_written_out(model, images[n], target, start, row_norm=row_norm)
        assert_close(found[n, 0], read_out(wanted, prefix, read, images))
    many = explainer.attribute_many(images, [[3, 0], [1, 2]])
    assert_close(many[:, 0], found)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_every_rule_conserves_the_relevance_of_each_image():
    relevance = drawn(2, 3, 5, 7, seed=0)
    total = relevance.sum((-2, -1))
    inputs, weight = drawn(3, 5, 30, seed=1), drawn(7, 30, seed=2)
    assert_close(rules.linear(relevance, inputs, weight).sum((-2, -1)), total, 1e-6)
    a, b = rules.add(relevance, drawn(3, 5, 7, seed=3), drawn(3, 5, 7, seed=4))
    assert_close(a.sum((-2, -1)) + b.sum((-2, -1)), total, 1e-6)
    left, right = drawn(3, 5, 4, seed=5), drawn(3, 4, 7, seed=6)
    a, b = rules.matmul(relevance, left, right, left @ right)
    assert_close(a.sum((-2, -1)), total / 2, 1e-6)
    assert_close(b.sum((-2, -1)), total / 2, 1e-6)
    values = drawn(3, 5, 7, seed=7)
    assert_close(rules.clone(values, relevance, relevance).sum((-2, -1)), 2 * total, 1e-6)
    shared = rules.mean(relevance[:, :, 0], values)
    assert_close(shared.sum(-2), relevance[:, :, 0], 1e-6)


def test_division_by_nothing_gives_nothing():
    found = rules.divide(torch.ones(4, dtype=torch.float64), torch.tensor([0.0, -1e-9, 2.0, -2.0], dtype=torch.float64))
    assert torch.isfinite(found).all()
    assert found[0] == 0
    assert torch.allclose(found[2:], torch.tensor([0.5, -0.5], dtype=torch.float64))


def test_what_a_map_costs_beside_a_forward_pass():
    """In matrix products, which are counted exactly: ViT-tiny at 224 px."""
    from timm import create_model

    model, images = create_model("vit_tiny_patch16_224", depth=3, num_classes=5).eval(), cases.images(1, size=224)

    def flops(call: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    explainers = AttentionRollout(model), GenericAttention(model), TransformerLRP(model)
    for explainer in explainers:
        explainer.attribute(images, target=3)  # the attention is found once
    with torch.inference_mode():
        once = flops(lambda: model(images))
    times = [flops(lambda e=e: e.attribute(images, target=3)) / once for e in explainers]
    assert all(most >= found for most, found in zip((1.4, 2.9, 6.9), times, strict=True)), times


def test_autocast_does_not_reach_the_rules():
    model, images = vit(), cases.images()
    wanted = TransformerLRP(model).attribute(images, target=TARGETS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = TransformerLRP(model).attribute(images, target=TARGETS)
    assert_close(found, wanted, 1e-5)


# ---------------------------------------------------------------------- what is refused


class WithSoftmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = vit()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).softmax(1)


def post_norm():
    from timm.models.vision_transformer import ResPostBlock

    return vit(block_fn=ResPostBlock)


def halved():
    from timm.models.vision_transformer import Block

    class Halved(Block):
        def forward(self, x: Tensor, **_: object) -> Tensor:
            x = x + self.attn(self.norm1(x))
            return 0.5 * x + self.mlp(self.norm2(x))

    return vit(block_fn=Halved)


def gated():
    from timm.layers import SwiGLU

    return vit(mlp_layer=SwiGLU)


def convolution_in_mlp():
    model = vit()
    model.blocks[1].mlp.norm = nn.Sequential(Mixing())
    return model


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(96))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


REFUSED = {
    "norms behind the branches": (post_norm, r"'blocks\.0' \(ResPostBlock\).*use GenericAttention"),
    "a residual that is no sum": (halved, r"'blocks\.0' \(Halved\): its second sum is not x \+ mlp"),
    "a gated MLP": (gated, r"'blocks\.0\.mlp\.\w+' .* it does not work on what the layer before"),
    "an unknown mixing layer": (convolution_in_mlp, r"'blocks\.1\.mlp\.norm\.0' \(Mixing\): no rule is known"),
    "a softmax at the end": (WithSoftmax, "logits of its linear head 'inner.head'.* pass the model without it"),
    "a CNN": (cases.resnet, "vision transformer .* got ResNet"),
    "a mean head": (lambda: vit(global_pool="avg"), "pass mean_pooling=True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_built_otherwise_is_refused_by_name(case):
    build, said = REFUSED[case]
    model, images = build().eval(), cases.images()
    with cases.untouched(model, images), pytest.raises(UnsupportedModelError, match=said):
        TransformerLRP(model).attribute(images, target=0)


@pytest.mark.parametrize("wrong", [-1, 1.0, True, "1"])
def test_start_layer_is_checked(wrong):
    with pytest.raises(OptionError, match="start_layer: must be 0 or the number of a later block"):
        TransformerLRP(torchvision_vit(), start_layer=wrong)


def test_start_layer_behind_the_last_block():
    with pytest.raises(OptionError, match=r"start_layer: must be below 2, .* got 2"):
        TransformerLRP(with_representation(), start_layer=2).attribute(cases.images())


def test_the_patent_notice_is_in_the_docstring():
    assert "US 12,061,966" in TransformerLRP.__doc__
    assert "EP 3271863" in TransformerLRP.__doc__
