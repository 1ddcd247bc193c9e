"""LeGrad against blocks that are written out one by one, and pooling that is written out head by head."""

from __future__ import annotations

import attention_cases as written_out
import engine_cases as cases
import pytest
import torch
from attention_cases import ARCHITECTURES, TARGETS, assert_close, sized_images, vit
from torch import Tensor, nn

from attrib_zoo import Contrast, LeGrad
from attrib_zoo.errors import OptionError, UnsupportedModelError


def start(model: nn.Module, image: Tensor) -> Tensor:
    """The tokens before the first block."""
    if hasattr(model, "blocks"):
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(image[None]))))
    return torch.cat([model.class_token, model._process_input(image[None])], 1) + model.encoder.pos_embedding


def head(model: nn.Module, tokens: Tensor) -> Tensor:
    if hasattr(model, "blocks"):
        return model.forward_head(model.norm(tokens))[0]
    return model.heads(model.encoder.ln(tokens)[:, 0])[0]


def block_by_block(model: nn.Module, image: Tensor) -> list[tuple[list[Tensor], Tensor]]:
    """For each block its matrices, which are leaves, and the logits of its tokens; blocks share no graph."""
    x, found = start(model, image).detach(), []
    for block in model.blocks if hasattr(model, "blocks") else model.encoder.layers:
        timm = hasattr(block, "attn")
        normed = (block.norm1 if timm else block.ln_1)(x)[0].detach()
        leaf = lambda _, __, matrix: matrix.detach().requires_grad_()  # noqa: E731
        matrices, out = written_out.attention(block.attn if timm else block.self_attention, 0, normed, leaf)
        if timm:
            z = x + block.ls1(out)
            z = z + block.ls2(block.mlp(block.norm2(z)))
        else:
            z = x + out
            z = z + block.mlp(block.ln_2(z))
        found.append((matrices, head(model, z)))
        x = z.detach()
    return found


def oracle(model: nn.Module, image: Tensor, score, prefix: int, size: tuple[int, int], first: int = 0) -> Tensor:
    total, blocks = torch.zeros(size, dtype=image.dtype), block_by_block(model, image)[first:]
    for matrices, logits in blocks:
        for slope in torch.autograd.grad(score(logits), matrices):
            for query in slope:
                for i in range(size[0]):
                    for j in range(size[1]):
                        share = len(blocks) * len(matrices) * len(slope)
                        total[i, j] += max(float(query[prefix + i * size[1] + j]), 0) / share
    return total


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_maps_are_those_of_blocks_written_out(architecture):
    build, prefix, _ = ARCHITECTURES[architecture]
    model, images = build().double(), sized_images(architecture)
    size = (images.shape[2] // 8, images.shape[3] // 8)
    explainer = LeGrad(model, upsample=False)
    with cases.untouched(model, images):
        found = explainer.attribute(images, target=TARGETS)
    for n, target in enumerate(TARGETS):
        assert_close(found[n, 0], oracle(model, images[n], lambda z, t=target: z[t], prefix, size))
    many = explainer.attribute_many(images, [[3, 0], [1, 2]])
    assert_close(many[:, 0], found)
    assert_close(many[1, 1, 0], oracle(model, images[1], lambda z: z[2], prefix, size))


def test_later_blocks_alone():
    model, images = vit().double(), sized_images("")
    found = LeGrad(model, start_layer=2, upsample=False).attribute(images, 3)
    assert_close(found[0, 0], oracle(model, images[0], lambda z: z[3], 1, (4, 4), first=2))


def test_a_contrast_is_that_of_the_final_logits_in_every_block():
    model, images = vit().double(), sized_images("")
    found = LeGrad(model, upsample=False).attribute(images, Contrast(2, 0.7, 3))
    final = model(images)[0].detach()
    rivals = sorted((c for c in range(5) if c != 3), key=lambda c: -float(final[c]))[:2]
    assert_close(found[0, 0], oracle(model, images[0], lambda z: z[3] - 0.35 * z[rivals].sum(), 1, (4, 4)))


def pooled(**options):
    return cases.vit(**{"global_pool": "map", "class_token": False, **options}).double()


def at_pool(model: nn.Module, image: Tensor, target: int, prefix: int) -> Tensor:
    """The pooling's attention, head by head, with the tokens of every block.

    Newer versions of timm keep the prefix from the pooling, earlier ones (1.0.15) pool it too.
    """
    first = prefix if hasattr(model, "pool_include_prefix") else 0
    pool, x, total = model.attn_pool, start(model, image), torch.zeros(4, 4, dtype=image.dtype)
    d = 24 // pool.num_heads
    for block in model.blocks:
        x = block(x)
        kv, q = pool.kv(model.norm(x)[0, first:]).detach(), pool.q(pool.latent[0]).detach()
        leaves, contexts = [], []
        for h in range(pool.num_heads):
            query = pool.q_norm(q[:, h * d : (h + 1) * d])
            key, value = pool.k_norm(kv[:, h * d : (h + 1) * d]), kv[:, 24 + h * d : 24 + (h + 1) * d]
            leaves.append((query @ key.T / d**0.5).softmax(1).detach().requires_grad_())
            contexts.append(leaves[-1] @ value)
        z = pool.proj(torch.cat(contexts, 1))
        z = z + pool.mlp(pool.norm(z))
        logits = model.head(model.fc_norm(z[:1]))[0]
        for slope in torch.autograd.grad(logits[target], leaves):
            total += slope[0, prefix - first :].relu().view(4, 4) / (len(leaves) * len(model.blocks))
    return total


@pytest.mark.parametrize(
    ("options", "prefix"),
    [({}, 0), ({"class_token": True, "reg_tokens": 2}, 3), ({"qk_norm": True}, 0)],
    ids=["plain", "prefix", "norms"],
)
def test_attention_pooling_is_read_with_the_tokens_of_every_block(options, prefix):
    model, images = pooled(**options), sized_images("")
    explainer = LeGrad(model, upsample=False)
    with cases.untouched(model, images):
        found = explainer.attribute(images, target=TARGETS)
    for n, target in enumerate(TARGETS):
        assert_close(found[n, 0], at_pool(model, images[n], target, prefix))
    assert_close(explainer.attribute_many(images, [[0, 3], [2, 1]])[:, 1], found)


def test_pooling_of_another_formula_is_refused():
    model = pooled()
    model.attn_pool.kv.register_forward_hook(lambda _, __, out: out.flip(1))
    model.attn_pool.scale, model.attn_pool.fused_attn = 1.0, False
    with pytest.raises(UnsupportedModelError, match=r"'attn_pool' .* its output is not softmax"):
        LeGrad(model).attribute(sized_images(""), 0)


def test_windows_are_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"'layers\.0\.blocks\.0\.attn' \(WindowAttention\).* use GradCAM"):
        LeGrad(cases.swin()).attribute(cases.images(size=16), 0)


def test_a_head_of_zeros_gives_zeros_and_one_warning():
    from torchvision.models.vision_transformer import VisionTransformer

    model = VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=5).eval()
    with pytest.warns(UserWarning, match="the map is exactly zero") as told:
        assert not LeGrad(model).attribute(cases.images()).any()
    assert [w.filename for w in told] == [__file__]


def test_the_first_block_must_be_there():
    with pytest.raises(OptionError, match=r"start_layer: must be below 3, the number of blocks of VisionTransformer"):
        LeGrad(vit(), start_layer=3).attribute(cases.images(), 0)
    with pytest.raises(OptionError, match="start_layer: must be 0 or the number of a later block, got -1"):
        LeGrad(vit(), start_layer=-1)
    with pytest.raises(OptionError, match=r"layers: must be None for LeGrad"):
        LeGrad(vit(), "blocks.1")
