"""T-TAME on attended values: the values and the rows against attention that is written out, and who may read them."""

from __future__ import annotations

import attention_cases as written_out
import pytest
import strategies as zoo
import torch
from attention_cases import ARCHITECTURES, assert_close, sized_images
from head_cases import mean_of_alike
from torch import nn

from attrib_zoo import RISE, TTAME, GradCAM
from attrib_zoo.backbone.capture import frozen, run
from attrib_zoo.backbone.layers.resolve import resolve
from attrib_zoo.backbone.vit.attended import attended, values_and_shares
from attrib_zoo.backbone.vit.attention import attended_taps
from attrib_zoo.errors import LayerError, UnsupportedModelError
from attrib_zoo.training.recipe import RECIPES
from attrib_zoo.training.rows import class_rows

BY_CLASS_TOKEN = [name for name, (_, _, read) in ARCHITECTURES.items() if read == [0]]


def attention_times_gradient(model: nn.Module, image: torch.Tensor, prefix: int) -> torch.Tensor:
    """For each block and class, A * dS_c/dA in the row of the class token, summed over heads: ``(L, K, h, w)``."""
    classes = len(written_out.run(model, image)[0])
    h, w = image.shape[1] // 8, image.shape[2] // 8
    found = torch.zeros(3, classes, h, w, dtype=image.dtype)
    for c in range(classes):
        matrices, gradients = written_out.with_gradients(model, image, c)
        for block, (heads, slopes) in enumerate(zip(matrices, gradients, strict=True)):
            for a, g in zip(heads, slopes, strict=True):
                found[block, c] += (a[0] * g[0])[prefix:].detach().reshape(h, w)
    return found


@pytest.mark.parametrize("name", BY_CLASS_TOKEN)
def test_rows_of_one_image_read_attention_times_gradient(name):
    make, prefix, _ = ARCHITECTURES[name]
    model, images = make().double().eval(), sized_images(name)
    with frozen(model):
        taps = attended_taps(model, images, count=3)
        rows = class_rows(model, images[:1], (), taps)
        _, seen = run(model, images[:1], (), taps)
        values = [attended(one, tap.channels) for one, tap in zip(seen, taps, strict=True)]
    wanted = attention_times_gradient(model, images[0], prefix)
    assert [tap.label for tap in taps] == [f"{tap.name}['attended']" for tap in taps]
    for weight, value, one in zip(rows.weights, values, wanted, strict=True):
        assert_close(torch.einsum("kc,chw->khw", weight, value[0]), one, 1e-8)


def test_values_add_up_to_what_the_class_token_gets():
    model, images = ARCHITECTURES["class token"][0]().double().eval(), sized_images("class token")
    kept = {}
    module = model.blocks[1].attn
    handle = module.register_forward_hook(lambda _, given, out: kept.update(given=given[0], out=out))
    model(images)
    handle.remove()
    seen = values_and_shares(module, "blocks.1.attn", kept["given"])
    values = attended(seen.transpose(1, 2).unsqueeze(-1), module.proj.in_features)[..., 0]
    torch.testing.assert_close(module.proj(values.sum(2)), kept["out"][:, 0], rtol=1e-9, atol=1e-12)


def fitted(model: nn.Module, images: torch.Tensor, **options) -> TTAME:
    return zoo.fit(TTAME(model, **options), [images], max_steps=0)


@pytest.mark.parametrize("name", [*BY_CLASS_TOKEN, "distilled", "mean of the patches", "no class token"])
def test_auto_reads_them_where_the_head_reads_one_class_token(name):
    make, _, read = ARCHITECTURES[name]
    model, images = make().eval(), sized_images(name).float()
    explainer = fitted(model, images)
    own = explainer.recipe == RECIPES["attended"]
    assert own == (read == [0])
    assert all(tap.attended == own for tap in explainer.taps(images))


def test_named_blocks_are_read_as_named():
    model, images = ARCHITECTURES["class token"][0]().eval(), sized_images("class token").float()
    explainer = fitted(model, images, layers=["blocks.1"])
    assert [tap.label for tap in explainer.taps(images)] == ["blocks.1"]
    named = fitted(model, images, layers=["blocks.1.attn['attended']", "blocks.2.attn['attended']"], recipe="attended")
    default = fitted(model, images, num_layers=2)
    assert torch.equal(named.attribute(images), default.attribute(images))


@pytest.mark.parametrize("name", BY_CLASS_TOKEN)
def test_a_file_and_a_module_give_the_same_maps(name, tmp_path):
    model, images = ARCHITECTURES[name][0]().eval(), sized_images(name).float()
    explainer = fitted(model, images)
    maps = explainer.attribute(images)
    explainer.save(tmp_path / "e.safetensors")
    assert torch.equal(TTAME.load(tmp_path / "e.safetensors", model).attribute(images), maps)
    torch.testing.assert_close(explainer.as_module(images)(images)[1], maps[:, :1], rtol=0, atol=1e-6)
    assert float(maps.flatten(1).std(1).min()) > 0


@pytest.mark.parametrize("alike", [1, RECIPES["attended"].alike])
def test_what_a_patch_says_in_every_image_is_taken_from_its_values(alike):
    """By hand, from the queries, keys and values of every image: A (v - mean of v over the images), at each place."""
    model = ARCHITECTURES["class token"][0]().double().eval()
    torch.manual_seed(0)
    images = torch.randn(32, *sized_images("class token").shape[1:], dtype=torch.float64)
    recipe = RECIPES["attended"].but(contrast=0, alike=alike, num_layers=1)
    explainer = fitted(model, images, recipe=recipe, upsample=False)
    kept = []
    handle = model.blocks[-1].attn.register_forward_hook(lambda _, given, out: kept.append(given[0]))
    model(images)
    handle.remove()
    module, tokens = model.blocks[-1].attn, kept[0]
    q, k, v = module.qkv(tokens).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (N, H, T, d)
    shares = ((q[:, :, :1] @ k.transpose(-1, -2)) * module.scale).softmax(-1)[:, :, 0]
    said = shares[..., None] * (v - v.mean(0))
    patches = said.transpose(1, 2).flatten(2)[:, 1:].transpose(1, 2).unflatten(-1, (4, 4))  # (N, H d, h, w)
    raw = torch.einsum("kc,nchw->nkhw", explainer.network_.fuser.weight[:, :, 0, 0], patches).detach()
    if alike > 1:
        values = (v - v.mean(0)).transpose(1, 2).flatten(2)[:, 1:].transpose(1, 2).unflatten(-1, (4, 4)).detach()
        raw = mean_of_alike(raw, [values], alike)
    low, high = raw.amin((2, 3), keepdim=True), raw.amax((2, 3), keepdim=True)
    assert_close(explainer.maps(images), (raw - low) / (high - low), 1e-8)


def test_steps_train_and_keep_every_class():
    model, images = ARCHITECTURES["class token"][0]().eval(), sized_images("class token").float()
    start = fitted(model, images)
    trained = zoo.fit(TTAME(model, recipe="attended"), [images], max_steps=3)
    assert trained.n_steps_ == 3
    assert trained.maps(images).shape == start.maps(images).shape


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("blocks.1['attended']", r"\['attended'\] is read from an attention module behind a class token, such as"),
        ("blocks.1.attn.qkv['attended']", r"got 'blocks.1.attn.qkv' \(Linear\)"),
    ],
)
def test_only_attention_modules_have_them(layers, words):
    model, images = ARCHITECTURES["class token"][0]().eval(), sized_images("class token").float()
    with pytest.raises(LayerError, match=words):
        resolve(model, layers, images)


def test_others_cannot_read_them():
    model, images = ARCHITECTURES["class token"][0]().eval(), sized_images("class token").float()
    with pytest.raises(LayerError, match="only TTAME can read it; for GradCAM name the block"):
        GradCAM(model, "blocks.1.attn['attended']").attribute(images)
    assert RISE(model, n_masks=4).attribute(images).shape == images.shape


def test_a_head_that_reads_other_tokens_is_refused():
    model, images = ARCHITECTURES["mean of the patches"][0]().eval(), sized_images("class token").float()
    with pytest.raises(UnsupportedModelError, match=r"reads 16 token\(s\); name blocks"):
        attended_taps(model, images)
    with pytest.raises(UnsupportedModelError, match="reads 16"):
        fitted(model, images, layers="blocks.1.attn['attended']", recipe="attended")


@pytest.mark.parametrize(
    ("layers", "recipe"),
    [
        (None, "attended"),
        ("blocks.1.attn['attended']", "attended"),
        (["blocks.0.attn['attended']", "blocks.2.attn['attended']"], "attended"),
        (["blocks.1", "blocks.2.attn['attended']"], "rows"),
        ("blocks.1", "rows"),
    ],
)
def test_the_recipe_that_fits_the_layers(layers, recipe):
    model, images = ARCHITECTURES["class token"][0]().eval(), sized_images("class token").float()
    assert zoo.fit(TTAME(model, layers), [images]).recipe == RECIPES[recipe]
