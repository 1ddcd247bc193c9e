"""The balanced backward pass: the same outputs to the last bit, and a sum that is complete, in float64."""

from __future__ import annotations

import attention_cases as written_out
import engine_cases as cases
import pytest
import strategies as zoo
import torch
import torch.nn.functional as F
from attention_cases import ARCHITECTURES, TARGETS, sized_images
from cam_cases import close
from captum.attr import InputXGradient
from torch import Tensor, nn

from attrib_zoo import GenericAttention, GradCAM, HiResCAM, LayerCAM
from attrib_zoo.backbone.libra import Balanced, Term


def gated():
    """SwiGLU and rotary embeddings."""
    from timm.models.eva import Eva

    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    return cases.lively(Eva(**shape, swiglu_mlp=True, use_rot_pos_emb=True))


def convnext():
    from timm.models.convnext import ConvNeXt

    return cases.lively(ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 12, 12), num_classes=5))


def squeezed():
    """Hard swishes, and gates of squeezed channels."""
    import timm

    return cases.lively(timm.create_model("mobilenetv3_small_050", num_classes=5))


def mixer():
    from timm.models.mlp_mixer import MlpMixer

    return cases.lively(MlpMixer(img_size=32, patch_size=8, embed_dim=24, num_blocks=2, num_classes=5))


MODELS = {
    **{name: build for name, (build, _, _) in ARCHITECTURES.items()},
    "windows": cases.swin,
    "attention pooling": lambda: cases.vit(global_pool="map", class_token=False),
    "residual": cases.resnet,
    "gated": gated,
    "ConvNeXt": convnext,
    "squeezed": squeezed,
    "mixer": mixer,
}


def balanced_sum(model: nn.Module, images: Tensor, target: int) -> tuple[Tensor, Tensor, Tensor]:
    """Plain outputs, balanced outputs, and the sum of all terms of the target."""
    plain = model(images).detach()
    leaf, terms = images.clone().requires_grad_(), list[Term]()
    with Balanced(terms):
        outputs = model(leaf)
    slopes = torch.autograd.grad(outputs[:, target].sum(), [leaf, *(t.output for t in terms)], allow_unused=True)
    total = (leaf.detach() * slopes[0]).flatten(1).sum(1)
    for term, slope in zip(terms, slopes[1:], strict=True):
        if slope is not None:
            total = total + term.times(slope, len(images)).flatten(1).sum(1)
    return plain, outputs.detach(), total


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_the_same_and_the_sum_is_complete(name):
    model = MODELS[name]().double().eval()
    size = 16 if name == "windows" else 32
    images = sized_images(name) if name in ARCHITECTURES else zoo.normal(2, 3, size, size)
    plain, balanced, total = balanced_sum(model, images, 2)
    if name in ("torchvision", "attention pooling"):  # products in another order than the fused ones
        close(balanced, plain, 1e-12)
    else:
        assert torch.equal(balanced, plain)
    close(total, plain[:, 2], 1e-8)


def test_without_balance_the_sum_of_a_transformer_is_not_its_score():
    """The test above could fail."""
    model, images = MODELS["class token"]().double(), sized_images("")
    leaf = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(leaf)[:, 2].sum(), leaf)
    with Balanced():
        outputs = model(leaf)
    (other,) = torch.autograd.grad(outputs[:, 2].sum(), leaf)
    assert float((slope - other).abs().max()) > 0.01 * float(slope.abs().max())


def elementwise(function, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    with Balanced():
        y = function(leaf)
    return torch.autograd.grad(y.sum(), leaf)[0]


def test_each_rule_by_hand():
    x = torch.tensor([[-2.0, 0.5, 3.0, 7.0]], dtype=torch.float64)
    for function in (F.gelu, F.silu, F.hardswish, torch.tanh, F.relu6, F.mish):
        close(elementwise(function, x), function(x) / x, 1e-12)
    close(elementwise(F.gelu, torch.zeros(1, 2, dtype=torch.float64)), torch.full((1, 2), 0.5).double(), 1e-6)
    for module in (nn.Hardswish(inplace=True), nn.ReLU6(inplace=True), nn.SiLU(inplace=True)):
        close(elementwise(lambda t, m=module: m(t * 1), x), module(x.clone()) / x, 1e-12)
    close(elementwise(lambda t: t * t, x), x, 1e-12)  # half to each of the two

    def in_place(t):
        y, z = t * 1, t * 3
        y.mul_(z)
        return y

    close(elementwise(in_place, x), 3 * x, 1e-12)
    close(elementwise(lambda t: t / (t * t).sum().sqrt(), x), torch.ones(1, 4).double() / x.norm(), 1e-12)
    close(elementwise(lambda t: t * torch.sigmoid(t), x), torch.sigmoid(x), 1e-12)
    deviation = (x.var(1, unbiased=False) + 1e-5).sqrt()
    slope = elementwise(lambda t: F.layer_norm(t, (4,))[:, 0], x)
    close(slope, (torch.tensor([[0.75, -0.25, -0.25, -0.25]]).double() / deviation), 1e-12)


def test_weights_have_no_gradient_and_nothing_stays_behind():
    model = MODELS["class token"]().double()
    with Balanced():
        outputs = model(sized_images(""))
    assert not outputs.requires_grad
    assert model(sized_images("")).requires_grad


# ---------------------------------------------------------------------- methods


def constants(model: nn.Module, tokens: Tensor, first: int) -> Tensor:
    """The rest of a timm ViT behind the input of a block, with its constants detached by hand."""

    def norm(layer, x):
        middle = x - x.mean(2, keepdim=True)
        return middle / (middle.square().mean(2, keepdim=True) + layer.eps).sqrt().detach() * layer.weight + layer.bias

    for block in model.blocks[first:]:
        heads = block.attn.qkv(norm(block.norm1, tokens)).unflatten(2, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        weights = (heads[0] @ heads[1].transpose(2, 3) / heads.shape[-1] ** 0.5).softmax(3).detach()
        tokens = tokens + block.attn.proj((weights @ heads[2]).transpose(1, 2).flatten(2))
        hidden = block.mlp.fc1(norm(block.norm2, tokens))
        tokens = tokens + block.mlp.fc2(hidden * (F.gelu(hidden) / hidden).detach())
    return model.head(norm(model.norm, tokens)[:, 0])


@pytest.mark.parametrize("cls", [GradCAM, HiResCAM, LayerCAM])
def test_gradient_cams_with_balanced_gradients(cls):
    model, images = cases.vit(global_pool="token").double(), sized_images("")
    tokens = model.blocks[0](model._pos_embed(model.patch_embed(images))).detach().requires_grad_()
    scores = constants(model, tokens, 1)
    (slope,) = torch.autograd.grad(scores[0, TARGETS[0]] + scores[1, TARGETS[1]], tokens)
    a, g = (part[:, 1:].transpose(1, 2).unflatten(2, (4, 4)).detach() for part in (tokens, slope))
    formula = {
        GradCAM: lambda: g.mean((2, 3), keepdim=True) * a,
        HiResCAM: lambda: g * a,
        LayerCAM: lambda: g.relu() * a,
    }[cls]
    found = cls(model, "blocks.0", relu=True, libra=True, upsample=False).attribute(images, TARGETS)
    close(found, formula().sum(1, keepdim=True).relu(), 1e-9)
    assert float((found - cls(model, "blocks.0", relu=True, upsample=False).attribute(images, TARGETS)).abs().max()) > 0


def test_attention_times_balanced_gradients():
    """GAE with gradients in which the attention of later blocks is constant: blocks one by one."""
    model, images = cases.vit(global_pool="token").double(), sized_images("")
    found = GenericAttention(model, libra=True, upsample=False).attribute(images, TARGETS)
    for n, target in enumerate(TARGETS):
        x, relevance = model._pos_embed(model.patch_embed(images[n : n + 1])), torch.eye(17, dtype=torch.float64)
        for place, block in enumerate(model.blocks):
            leaf = lambda _, __, matrix: matrix.detach().requires_grad_()  # noqa: E731
            matrices, out = written_out.attention(block.attn, 0, block.norm1(x)[0].detach(), leaf)
            middle = x.detach() + out
            normed = middle - middle.mean(2, keepdim=True)
            deviation = (normed.square().mean(2, keepdim=True) + block.norm2.eps).sqrt().detach()
            hidden = block.mlp.fc1(normed / deviation * block.norm2.weight + block.norm2.bias)
            z = middle + block.mlp.fc2(hidden * (F.gelu(hidden) / hidden).detach())
            slopes = torch.autograd.grad(constants(model, z, place + 1)[0, target], matrices)
            relevance = relevance + written_out.positive_mean([m.detach() for m in matrices], list(slopes)) @ relevance
            x = z.detach()
        close(found[n, 0], relevance[0, 1:].view(4, 4), 1e-9)


def test_captums_input_times_gradient_is_complete_up_to_the_biases():
    """The documented way to input times gradient: any of Captum's gradient methods inside the context."""
    model, images = MODELS["no bias"]().double(), sized_images("")
    with Balanced():
        found = InputXGradient(model).attribute(images.clone().requires_grad_(), target=2).detach()
    leaf, terms = images.clone().requires_grad_(), list[Term]()
    with Balanced(terms):
        outputs = model(leaf)
    slopes = torch.autograd.grad(outputs[:, 2].sum(), [t.output for t in terms], allow_unused=True)
    rest = sum(t.times(s, 2).flatten(1).sum(1) for t, s in zip(terms, slopes, strict=True) if s is not None)
    close(found.flatten(1).sum(1) + rest, outputs[:, 2].detach(), 1e-9)
