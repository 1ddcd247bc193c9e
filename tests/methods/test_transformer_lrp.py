"""Relevance propagation against every product written out, its conservation, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import engine_cases as cases
import pytest
import torch
from oracles import explicit_lrp
from test_attention import ARCHITECTURES, TARGETS, assert_close, read_out, sized_images, torchvision_vit, vit
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attrib_zoo import AttentionRollout, GenericAttention, TransformerLRP
from attrib_zoo.errors import OptionError, UnsupportedModelError
from attrib_zoo.methods.bases import relevance as rules


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
        wanted = explicit_lrp.transformer_lrp(model, images[n], target, start, row_norm=row_norm)
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
