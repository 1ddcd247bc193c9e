"""Attention with frozen weights: the same values as unfrozen, in one matrix product for all tokens of a batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import VisionTransformer

from attrib_zoo import TTAME, GradCAM
from attrib_zoo.backbone.capture import call_model, frozen
from attrib_zoo.backbone.projections import in_one_product


class Products(TorchDispatchMode):
    """The shapes of all batched matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bmm.default:
            self.shapes.append(tuple(args[1].shape))
        return func(*args, **(kwargs or {}))


def small() -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5).eval()
    nn.init.normal_(model.heads[-1].weight)
    return model


def tokenwise(model: nn.Module, images: Tensor) -> int:
    """How many products multiply each token's small matrix by the whole projection."""
    with Products() as seen:
        call_model(model, images).sum().backward()
    return sum(shape[1:] == (16, 48) for shape in seen.shapes)


def test_the_products_of_frozen_attention_are_those_of_trainable_attention():
    model = small()
    images = torch.randn(4, 3, 32, 32, requires_grad=True)
    assert tokenwise(model, images) == 0
    expected, images.grad = images.grad, None
    model.requires_grad_(False)
    with Products() as seen:
        model(images)
    assert any(shape[1:] == (16, 48) for shape in seen.shapes), "torch has mended it: this module can go"
    assert tokenwise(model, images) == 0
    torch.testing.assert_close(images.grad, expected)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("own", ["all", "values", "none"])
@pytest.mark.parametrize("named", [False, True])
def test_attention_of_other_arguments_keeps_its_values(own, named):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64).eval().requires_grad_(False)
    query, key, value = torch.randn(3, 2, 5, 8, dtype=torch.float64, requires_grad=True).unbind()
    given = {"all": (query, key, value), "values": (query, key, key), "none": (query, query, query)}[own]
    mask = torch.rand(5, 5) < 0.3
    mask.fill_diagonal_(False)

    def call() -> Tensor:
        if named:
            return module(query=given[0], key=given[1], value=given[2], attn_mask=mask)[0]
        return module(*given, attn_mask=mask)[0]

    expected = call()
    with in_one_product(module):
        found = call()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found.shape == expected.shape


def test_a_fit_and_gradient_methods_use_it():
    model = small()
    images = torch.randn(4, 3, 32, 32)
    with Products() as seen:
        TTAME(model).fit([images], max_steps=1, show_progress=False)
        GradCAM(model.requires_grad_(False)).attribute(images, 0)
    assert not any(shape[1:] == (16, 48) for shape in seen.shapes)


def test_a_pass_without_a_graph_is_left_alone():
    model = small().requires_grad_(False)
    with frozen(model) as bare, torch.no_grad():
        hooked = []
        attention = bare.encoder.layers[0].self_attention
        attention.register_forward_hook(lambda m, *_: hooked.append(len(m._forward_pre_hooks)))
        call_model(bare, torch.randn(2, 3, 32, 32))
    assert hooked == [0]
