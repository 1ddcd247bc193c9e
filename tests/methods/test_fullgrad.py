"""FullGrad: the terms add up to the score, and the map is what the paper makes of them."""

from __future__ import annotations

import warnings

import cam_cases as nets
import engine_cases as cases
import pytest
import strategies as zoo
import torch
import torch.nn.functional as F
from cam_cases import close
from torch import nn

from attrib_zoo import FullGrad
from attrib_zoo.errors import OptionError, UnsupportedModelError


class Plain(nn.Module):
    """Convolution with a bias, batch normalisation, ReLU, pooling, twice; two linear layers."""

    def __init__(self, *, bias=True, activation=nn.ReLU):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, 1, 1, bias=bias), nn.BatchNorm2d(4) if bias else nn.Identity()
        self.conv2 = nn.Conv2d(4, 5, 3, 1, 1, bias=bias)
        self.act = activation(inplace=True) if activation is nn.ReLU else activation()
        self.pool = nn.MaxPool2d(2)
        self.fc1, self.fc2 = nn.Linear(5, 6, bias=bias), nn.Linear(6, 3, bias=bias)

    def forward(self, x):
        x = self.pool(self.act(self.bn1(self.conv1(x))))
        x = self.act(self.conv2(x))
        return self.fc2(self.act(self.fc1(x.mean((2, 3)))))


def by_hand(model, image, target):
    """The terms of one image by a forward pass in which each bias is a tensor of its own at each place.

    The gradient with respect to such a tensor is that with respect to the layer's output.
    """
    x = image[None].clone().requires_grad_()
    scale = model.bn1.weight / (model.bn1.running_var + model.bn1.eps).sqrt()
    shift = model.bn1.bias - model.bn1.running_mean * scale
    h, w = image.shape[-2:]

    def spread(bias, *size):
        return bias.detach().view(1, -1, *[1] * len(size)).expand(1, len(bias), *size).clone().requires_grad_()

    biases = [
        spread(model.conv1.bias, h, w),
        spread(shift, h, w),
        spread(model.conv2.bias, h // 2, w // 2),
        spread(model.fc1.bias),
        spread(model.fc2.bias),
    ]
    z = F.conv2d(x, model.conv1.weight, padding=1) + biases[0]
    z = F.max_pool2d((z * scale.view(1, -1, 1, 1) + biases[1]).relu(), 2)
    z = (F.conv2d(z, model.conv2.weight, padding=1) + biases[2]).relu()
    z = (F.linear(z.mean((2, 3)), model.fc1.weight) + biases[3]).relu()
    score = (F.linear(z, model.fc2.weight) + biases[4])[0, target]
    score.backward()
    terms = [(t * t.grad)[0].detach() for t in (x, *biases)]
    close(sum(t.sum() for t in terms), score.detach())  # Eq. 3
    return terms


def psi(term):
    term = term.abs()
    return (term - term.min()) / (term.max() - term.min())


def by_formula(model, image, target, *, align_corners=False):
    heat = torch.zeros(image.shape[-2:], dtype=image.dtype)
    for term in by_hand(model, image, target)[:4]:  # the linear layers have no place
        for channel in psi(term):
            heat += F.interpolate(
                channel[None, None], size=image.shape[-2:], mode="bilinear", align_corners=align_corners
            )[0, 0]
    return heat


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_map_by_hand(align_corners, seed):
    model = cases.lively(Plain(), seed).double()
    images, targets = zoo.normal(3, 3, 8, 12, seed=seed), [0, 2, 1]
    found = FullGrad(model, align_corners=align_corners).attribute(images, targets)
    wanted = [by_formula(model, x, t, align_corners=align_corners) for x, t in zip(images, targets, strict=True)]
    close(found, torch.stack(wanted).unsqueeze(1).expand(3, 3, 8, 12))


class Checked(FullGrad):
    """Keeps what it hands to the check of the sum."""

    def _check_sum(self, scores, terms):
        self.seen = sum(term.flatten(1).sum(1) for term in terms), scores
        super()._check_sum(scores, terms)


def densenet():
    """timm's, whose batch normalisations activate too."""
    return cases.densenet()


@pytest.mark.parametrize("build", [Plain, cases.resnet, cases.bottleneck, densenet])
def test_the_terms_add_up_to_the_score(build):
    model = cases.lively(build()).double()
    images = zoo.normal(2, 3, 32, 48)
    for target in (0, 2):
        explainer = Checked(model)
        explainer.attribute(images, target)
        found, score = explainer.seen
        close(score, model(images)[:, target].detach())
        close(found, score)


def test_without_biases_it_is_the_gradient_times_the_image():
    model, images = nets.lively(Plain(bias=False)), zoo.normal(2, 3, 8, 12)
    leaf = images.clone().requires_grad_()
    model(leaf)[:, 1].sum().backward()
    wanted = torch.stack([psi(term).sum(0, keepdim=True) for term in (leaf * leaf.grad).detach()])
    close(FullGrad(model).attribute(images, 1), wanted.expand(2, 3, 8, 12))


def test_a_larger_head_changes_nothing():
    model, images = nets.lively(Plain()), zoo.normal(2, 3, 8, 12)
    before = FullGrad(model).attribute(images, 1)
    with torch.no_grad():
        model.fc2.weight.mul_(1e-8)
        model.fc2.bias.mul_(1e-8)
    close(FullGrad(model).attribute(images, 1), before)


def test_a_network_with_implicit_biases_is_told_how_much_is_missing():
    model, images = cases.lively(Plain(activation=nn.SiLU)), zoo.normal(2, 3, 8, 12).float()
    with pytest.warns(UserWarning, match=r"FullGrad: the terms must add up .* up to \d+% is missing; Plain") as said:
        assert FullGrad(model).attribute(images, 1).any()
    assert [w.filename for w in said] == [__file__]


@pytest.mark.parametrize(
    ("build", "size"),
    [(cases.vit, 32), (cases.swin, 16), (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)), 16)],
)
def test_what_has_no_constant_biases_is_refused(build, size):
    model = build()
    with (
        cases.untouched(model),
        pytest.raises(
            UnsupportedModelError, match=r"FullGrad: needs .* got (LayerNorm|GroupNorm|Attention) at '.*; use"
        ),
    ):
        FullGrad(model, libra=False).attribute(cases.images(2, size), 1)


# ---------------------------------------------------------------------- transformers, by a balanced backward pass


def terms_by_hand(model, image, target):
    """Pixels and all that a timm ViT with a class token adds, each times its gradient; what is constant is detached."""
    held = []

    def add(z, constant):
        spread = constant.detach().expand_as(z)
        held.append((spread, torch.zeros_like(z).requires_grad_()))
        return z + spread + held[-1][1]

    def norm(layer, x):
        middle = x - x.mean(2, keepdim=True)
        deviation = (middle.square().mean(2, keepdim=True) + layer.eps).sqrt().detach()
        return add(middle / deviation * layer.weight.detach(), layer.bias)

    def linear(layer, x):
        return add(x @ layer.weight.detach().T, layer.bias)

    x = image[None].clone().requires_grad_()
    proj = model.patch_embed.proj
    z = add(F.conv2d(x, proj.weight.detach(), stride=proj.stride), proj.bias.view(1, -1, 1, 1))
    tokens = z.flatten(2).transpose(1, 2)
    nothing = torch.zeros_like(model.cls_token)
    row = torch.cat([model.cls_token, torch.zeros_like(tokens)], 1)
    tokens = add(add(torch.cat([nothing, tokens], 1), row), model.pos_embed)
    for block in model.blocks:
        mixed = linear(block.attn.qkv, norm(block.norm1, tokens))
        heads = mixed.unflatten(2, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = heads[0].detach(), heads[1].detach(), heads[2]
        context = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(3) @ v
        tokens = tokens + linear(block.attn.proj, context.transpose(1, 2).flatten(2))
        hidden = linear(block.mlp.fc1, norm(block.norm2, tokens))
        gate = 0.5 * (1 + torch.erf(hidden / 2**0.5)).detach()
        tokens = tokens + linear(block.mlp.fc2, hidden * gate)
    vector = norm(model.norm, tokens)[:, 0]
    score = linear(model.head, vector)[0, target]
    slopes = torch.autograd.grad(score, [x, *(e for _, e in held)])
    terms = [(value * slope)[0].detach() for value, slope in zip([x, *(c for c, _ in held)], slopes, strict=True)]
    close(sum(term.sum() for term in terms), score.detach())
    return terms


def token_map(model, image, target):
    heat = torch.zeros(image.shape[-2:], dtype=image.dtype)
    for term in terms_by_hand(model, image, target):
        if term.ndim == 2:  # tokens, the class token before the patches
            term = term[1:].T.unflatten(1, (4, 4))
        if term.ndim == 3:
            for channel in psi(term) if term.abs().max() > term.abs().min() else 0 * term:
                heat += F.interpolate(channel[None, None], size=image.shape[-2:], mode="bilinear")[0, 0]
    return heat


def test_a_transformer_by_hand():
    model, images, targets = cases.vit(global_pool="token", depth=2).double(), zoo.normal(2, 3, 32, 32), [0, 3]
    with cases.untouched(model, images):
        found = FullGrad(model).attribute(images, targets)
    wanted = [token_map(model, x, t) for x, t in zip(images, targets, strict=True)]
    close(found, torch.stack(wanted).unsqueeze(1).expand(2, 3, 32, 32))
    many = FullGrad(model).attribute_many(images, [[1, 0], [2, 3]])
    close(many[:, 1], found)


@pytest.mark.parametrize("build", [cases.resnet, lambda: cases.lively(Plain())])
def test_behind_relus_the_balanced_pass_is_the_plain_one(build):
    """The same terms; sums and positions of theirs may be split otherwise, and these networks have none."""
    model, images = build().double(), zoo.normal(2, 3, 32, 32)
    close(FullGrad(model, libra=True).attribute(images, 1), FullGrad(model).attribute(images, 1))


def test_a_gated_network_is_complete_when_balanced():
    model, images = cases.lively(Plain(activation=nn.SiLU)).double(), zoo.normal(2, 3, 8, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FullGrad(model, libra=True).attribute(images, 1).any()


def test_libra_is_one_of_three():
    with pytest.raises(OptionError, match="libra: must be True, False or None, got 'yes'"):
        FullGrad(Plain(), libra="yes")


def test_it_has_no_layers_to_choose():
    with pytest.raises(OptionError, match=r"layers: must be None, for FullGrad reads every layer, got 'conv1'"):
        FullGrad(Plain(), "conv1")
