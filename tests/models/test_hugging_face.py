"""Hugging Face's image classifiers as they are: against the timm model with the same weights, and from a folder."""

import json
import re

import pytest
import torch
from torch import nn

import attrib_zoo
from attrib_zoo import models
from attrib_zoo.backbone.layers import describe
from attrib_zoo.benchmark import evaluate
from attrib_zoo.cli import main
from attrib_zoo.errors import DataError, OptionError, UnsupportedModelError
from attrib_zoo.methods import list_methods

transformers = pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
timm = pytest.importorskip("timm")

SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 64,
    "patch_size": 8,
    "num_labels": 5,
}


def awake(model):
    """Weights under which attention and scores depend on the image; those that the library draws hardly do."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(0, 1.5 / module.in_features**0.5, generator=generator)
    for name, parameter in model.named_parameters():
        if re.search("token|position|bias", name):
            parameter.data.normal_(0, 0.2, generator=generator)
    return model.eval()


def classifier(kind, **options):
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**options)
    return awake(getattr(transformers, kind + "ForImageClassification")(config))


def images(count=2, side=64):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def taken(state, rules, kept):
    """A timm state from Hugging Face's names: queries, keys and values become one matrix."""
    found = {}
    for name, value in state.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        found[name] = value
    for name in [n for n in found if n.endswith("attn.q_proj.weight")]:
        for part in ("weight", "bias"):
            stem = name.removesuffix("q_proj.weight")
            found[f"{stem}qkv.{part}"] = torch.cat([found.pop(f"{stem}{letter}_proj.{part}") for letter in "qkv"])
    assert set(found) == set(kept), set(found) ^ set(kept)
    return found


BLOCKS = [
    (r"layers\.", "blocks."),
    (r"attention\.o_proj", "attn.proj"),
    (r"attention\.(.)_proj", r"attn.\1_proj"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.distillation_token", "dist_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("layernorm", "norm"),
]
TINY = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "mlp_ratio": 2, "num_classes": 5}


def vit_pair():
    ours = classifier("ViT", **SMALL)
    theirs = timm.models.vision_transformer.VisionTransformer(**TINY, norm_layer=nn.LayerNorm)
    rules = [(r"^vit\.", ""), *BLOCKS, ("^classifier", "head")]
    theirs.load_state_dict(taken(ours.state_dict(), rules, theirs.state_dict()))
    return ours, theirs


def deit_pair():
    torch.manual_seed(0)
    ours = awake(transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**SMALL)))
    theirs = timm.models.deit.VisionTransformerDistilled(**TINY, norm_layer=nn.LayerNorm)
    rules = [(r"^deit\.", ""), *BLOCKS, ("^cls_classifier", "head"), ("^distillation_classifier", "head_dist")]
    theirs.load_state_dict(taken(ours.state_dict(), rules, theirs.state_dict()))
    return ours, theirs


def swin_pair():
    shared = {"embed_dim": 24, "num_heads": [2, 2, 4], "window_size": 4, "patch_size": 2}
    ours = classifier("Swin", depths=[1, 1, 2], image_size=64, num_labels=5, **shared)
    theirs = timm.models.swin_transformer.SwinTransformer(
        img_size=64, depths=(1, 1, 2), num_classes=5, norm_layer=nn.LayerNorm, **shared
    )
    rules = [
        (r"^swin\.", ""),
        (r"encoder\.layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample"),
        (r"encoder\.layers", "layers"),
        (r"attention\.o_proj", "attn.proj"),
        (r"attention\.(.)_proj", r"attn.\1_proj"),
        (r"attention\.relative_position_bias\.relative", "attn.relative"),
        *BLOCKS[3:5],
        ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
        ("embeddings.norm", "patch_embed.norm"),
        ("layernorm", "norm"),
        ("^classifier", "head.fc"),
    ]
    theirs.load_state_dict(taken(ours.state_dict(), rules, theirs.state_dict()))
    return ours, theirs


PAIRS = {"vit": vit_pair, "deit": deit_pair, "swin": swin_pair}
GRADIENT = ["GradCAM", "HiResCAM", "LayerCAM"]
ATTENTION = ["AttentionRollout", "GenericAttention", "TransformerLRP", "IIA"]
BLOCK = {"swin": ("swin.encoder.layers.1.blocks.0", "layers.1.blocks.0")}  # tokens here, images there


@pytest.fixture(scope="module")
def pairs():
    """In float64: shares of sums that nearly cancel, in TransformerLRP, amplify the rounding of float32."""
    found = {name: make() for name, make in PAIRS.items()}
    for ours, theirs in found.values():
        for module in theirs.eval().modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = next(m for m in ours.modules() if isinstance(m, nn.LayerNorm)).eps
        ours.double()
        theirs.double()
    return found


@pytest.mark.parametrize(
    ("pair", "name"),
    [(p, n) for p in ("vit", "deit") for n in GRADIENT + ATTENTION] + [("swin", n) for n in GRADIENT],
)
def test_maps_are_those_of_timm_with_the_same_weights(pairs, pair, name):
    inputs = images().double()
    outputs, wanted = (model(inputs) for model in pairs[pair])
    torch.testing.assert_close(outputs.logits, wanted, rtol=1e-6, atol=1e-9)
    kind = getattr(attrib_zoo, name)
    options = {**kind.cheap_options, **({"relu": False} if name == "GradCAM" else {})}
    for target in (1, None):
        found, wanted = (
            kind(model, layer, **options).attribute(inputs, target=target)
            for model, layer in zip(pairs[pair], BLOCK.get(pair, (None, None)), strict=True)
        )
        top = float(wanted.abs().max())
        assert float(wanted.std()) > 1e-3 * top > 0
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 * top)


@pytest.mark.parametrize("pair", ["vit", "deit"])
def test_ttame_starts_from_the_same_rows(pairs, pair):
    ours, theirs = pairs[pair]
    inputs = images(4).double()
    found, wanted = (
        attrib_zoo.TTAME(m, recipe="rows").fit([inputs] * 2, max_steps=0, show_progress=False).attribute(inputs, 2)
        for m in (ours, theirs)
    )
    assert float(wanted.std()) > 0.05
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------- where there is no twin


def others():
    return {
        "Beit": SMALL,
        "Dinov2WithRegisters": {**SMALL, "num_register_tokens": 3},
        "ResNet": {"embedding_size": 16, "hidden_sizes": [16, 32, 48], "depths": [1, 1, 1], "num_labels": 5},
        "ConvNext": {"hidden_sizes": [16, 24, 32], "depths": [1, 1, 1], "num_stages": 3, "num_labels": 5},
    }


@pytest.mark.filterwarnings("ignore:.*nowhere negative", "ignore:RefineCAM. the map is exactly zero")
@pytest.mark.parametrize("kind", others())
def test_the_map_is_that_of_the_logits_alone(kind):
    """As it is and wrapped, for every method; a model that returns a tensor is what all other tests are about."""

    class Logits(nn.Sequential):
        def forward(self, x):
            return self[0](x).logits

    model = classifier(kind, **others()[kind])
    inputs = images()
    seen = 0
    for name, cls in list_methods().items():
        if cls.needs_fit or name in ("RISE", "ExtremalPerturbation", "SmoothGradCAMPlusPlus", "IntegratedGradCAM"):
            continue
        options = {**cls.cheap_options, **({"mean_pooling": True} if name in ATTENTION else {})}
        try:
            wanted = cls(Logits(model), **options).attribute(inputs, target=1)
        except UnsupportedModelError:
            with pytest.raises(UnsupportedModelError):
                cls(model, **options).attribute(inputs, target=1)
            continue
        seen += 1
        torch.testing.assert_close(cls(model, **options).attribute(inputs, target=1), wanted, rtol=1e-5, atol=1e-6)
    assert seen >= 8


def test_registers_are_no_cells():
    model = classifier("Dinov2WithRegisters", **SMALL, num_register_tokens=3)
    rows = describe(model, images()).rows
    assert {(row.tap.grid.prefix, row.hw) for row in rows if row.tap.grid.is_tokens} >= {(4, (8, 8))}
    assert all(row.hw == (8, 8) for row in rows)


def test_relative_positions_are_refused_by_name():
    """Their bias is no part of softmax(q k^T); so the matrices would not be those of the model."""
    model = classifier("Beit", **SMALL, use_relative_position_bias=True)
    with pytest.raises(UnsupportedModelError, match=r"beit\.layers\.\d\.attention.*BeitAttention"):
        attrib_zoo.GenericAttention(model, mean_pooling=True).attribute(images(), target=1)


def test_projections_of_earlier_versions():
    """Until 4.5x queries, keys and values were made in a module of their own, without the projection behind it."""

    class SelfAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_attention_heads = 4
            self.query, self.key, self.value = (nn.Linear(48, 48) for _ in range(3))

        def forward(self, x):
            q, k, v = (f(x).unflatten(2, (4, 12)).transpose(1, 2) for f in (self.query, self.key, self.value))
            found = nn.functional.scaled_dot_product_attention(q, k, v)
            return (found.transpose(1, 2).flatten(2),)

    class Before(nn.Module):
        def __init__(self, now):
            super().__init__()
            self.attention, self.dense = SelfAttention(), now.o_proj
            for old, new in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
                getattr(self.attention, old).load_state_dict(getattr(now, new).state_dict())

        def forward(self, x, *_, **__):
            return self.dense(self.attention(x)[0]), None

    model, old = classifier("ViT", **SMALL), classifier("ViT", **SMALL)
    for layer in old.vit.layers:
        layer.attention = Before(layer.attention)
    inputs = images()
    torch.testing.assert_close(old(inputs).logits, model(inputs).logits)
    for name in ("AttentionRollout", "GenericAttention", "IIA"):
        kind = getattr(attrib_zoo, name)
        found, wanted = (kind(m, **kind.cheap_options).attribute(inputs, target=1) for m in (old, model))
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


def test_measures_take_them():
    model = classifier("ViT", **SMALL)

    class Logits(nn.Sequential):
        def forward(self, x):
            return self[0](x).logits

    loader, found = [images(3)], []
    for m in (model, Logits(model)):
        table = evaluate(m, {"cam": attrib_zoo.GradCAM(m)}, loader, "ad,insertion", controls=False, show_progress=False)
        found.append(torch.cat([table.values("cam", "AD(15)"), table.values("cam", "insertion")]))
    torch.testing.assert_close(found[0], found[1])
    assert bool(found[0].isfinite().all())


# ---------------------------------------------------------------------- from a folder


@pytest.fixture
def folder(tmp_path):
    model = classifier("ViT", **SMALL)
    model.config.id2label = dict(enumerate(["cat", "dog", "hen", "owl", "pig"]))
    path = tmp_path / "animals"
    model.save_pretrained(path)
    transformers.ViTImageProcessor(
        size={"height": 64, "width": 64}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]
    ).save_pretrained(path)
    return path, model


def photo(path, size=(90, 70)):
    from PIL import Image

    noise = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(path)
    return path


def test_a_folder_is_loaded_whole(folder, tmp_path):
    from PIL import Image

    path, model = folder
    loaded = models.load(str(path))
    assert loaded.class_names == ("cat", "dog", "hen", "owl", "pig")
    assert (loaded.input_size, loaded.mean, loaded.std) == ((3, 64, 64), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    picture = Image.open(photo(tmp_path / "photo.png"))
    seen = loaded.transform(picture)
    processor = transformers.ViTImageProcessor.from_pretrained(path)
    torch.testing.assert_close(seen, processor(images=picture, return_tensors="pt")["pixel_values"][0])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (loaded.mean, loaded.std))
    torch.testing.assert_close((loaded.view(picture) - mean) / std, seen, rtol=0, atol=1e-5)
    assert loaded.transform(picture.convert("L")).shape == (3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(seen[None]).logits, model(seen[None]).logits)


def test_the_command_line_explains_from_a_folder(folder, tmp_path, capsys):
    from PIL import Image

    path, model = folder
    picture = photo(tmp_path / "photo.png")
    options = ["--model", str(path), "--method", "gradcam,transformerlrp", "--target", "owl", "--device", "cpu"]
    out = tmp_path / "out"
    assert main(["explain", str(picture), *options, "--output", str(out)]) == 0
    said = capsys.readouterr().out
    with torch.no_grad():
        share = model(models.load(str(path)).transform(Image.open(picture))[None]).logits.softmax(1)[0, 3]
    assert f"{float(share):.1%}" in said
    assert len(list(out.rglob("photo-transformerlrp-3-owl.*"))) == 1


def test_a_folder_that_lacks_something(folder, tmp_path):
    path, _ = folder
    (path / "preprocessor_config.json").unlink()
    with pytest.raises(DataError, match=r"image_processor\.save_pretrained"):
        models.load(str(path))
    (path / "model.safetensors").unlink()
    with pytest.raises(DataError, match="cannot read the Hugging Face model"):
        models.load(str(path))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(OptionError, match=r"holds no config\.json"):
        models.load(str(empty))


def test_weights_of_another_model_are_refused(folder):
    """A folder of the backbone alone would get a head of random numbers."""
    path, model = folder
    model.vit.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "id2label": {str(i): str(i) for i in range(5)}}))
    with pytest.raises(DataError, match=r"missing .*classifier"):
        models.load(str(path))
