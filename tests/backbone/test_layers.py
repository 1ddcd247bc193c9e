"""Which layers are found, how they are read, and what is said where none can be."""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_cases import lively, resnet, swin, swin_of, untouched, vit
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from attrib_zoo.backbone.capture import run
from attrib_zoo.backbone.grid import Grid, Tap
from attrib_zoo.backbone.layers import describe, look, resolve
from attrib_zoo.backbone.layers.gridcheck import check_grids
from attrib_zoo.errors import LayerError, LayerNotFoundError, OptionError, UnsupportedModelError


def names(model: nn.Module, size: int | tuple[int, int] = 64, **options: Any) -> list[str]:
    return [tap.label for tap in resolve(model, None, images(size), **options)]


def images(size: int | tuple[int, int], count: int = 1) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(count, 3, height, width)


def hollow(build: Any, **options: Any) -> nn.Module:
    """A model of full size whose weights nobody has filled: enough to see its structure, made in no time."""
    with torch.device("meta"):
        model = build(**options)
    return model.to_empty(device="cpu").eval()


def torchvision(name: str, **options: Any) -> nn.Module:
    from torchvision import models

    return hollow(getattr(models, name), weights=None, **options)


def torchvision_vit(**options: Any) -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(**options)


def timm(name: str, **options: Any) -> nn.Module:
    from timm import create_model, is_model

    if not is_model(name):
        pytest.skip(f"this timm has no {name}")
    return create_model(name, num_classes=5, **options).eval()


# --- the defaults of the papers ---------------------------------------------------------------------------------

PAPERS = {
    "vgg16": (lambda: torchvision("vgg16"), 64, ["features.16", "features.23", "features.30"]),
    "resnet50": (lambda: torchvision("resnet50"), 64, ["layer2", "layer3", "layer4"]),
    "squeezenet1_1": (lambda: torchvision("squeezenet1_1"), 64, ["features.4", "features.7", "features.12"]),
    "vit_b_16": (
        lambda: torchvision("vit_b_16", image_size=32),
        32,
        [f"encoder.layers.encoder_layer_{i}" for i in (9, 10, 11)],
    ),
    "timm ViT": (lambda: vit(depth=12), 32, ["blocks.9", "blocks.10", "blocks.11"]),
}


@pytest.mark.parametrize("name", PAPERS)
def test_the_layers_of_the_papers(name):
    build, size, expected = PAPERS[name]
    assert names(build(), size, count=3) == expected


@pytest.mark.parametrize("depth", [3, 4])
@pytest.mark.parametrize("patch", [16, 32])
def test_a_patch_embedding_that_outweighs_the_blocks_is_none_of_them(patch, depth):
    """T-TAME takes the last three blocks also where they are few and narrow."""
    options = {"patch_size": patch, "num_layers": depth, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 128}
    vit_of_torchvision = hollow(torchvision_vit, image_size=64, num_classes=10, **options)
    expected = [f"encoder.layers.encoder_layer_{i}" for i in range(depth)][-3:]
    assert names(vit_of_torchvision, count=3) == expected
    of_timm = vit(img_size=64, patch_size=patch, embed_dim=24, depth=depth)
    assert names(of_timm, count=3) == [f"blocks.{i}" for i in range(depth)][-3:]


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("patch", [16, 32])
def test_a_single_block_is_read_as_one_of_several_would_be(patch, pool):
    """Not what holds it: torchvision's encoder ends in the head's norm."""
    options = {"patch_size": patch, "num_layers": 1, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 128}
    vit_of_torchvision = torchvision_vit(image_size=64, num_classes=10, **options)
    for rule in ("outputs", "live", "stages"):  # "live" is T-TAME's
        assert names(vit_of_torchvision, rule=rule) == ["encoder.layers.encoder_layer_0"]
    assert names(vit_of_torchvision, rule="norms") == ["encoder.layers.encoder_layer_0.ln_1"]
    of_timm = vit(img_size=64, patch_size=patch, embed_dim=24, depth=1, global_pool=pool)
    assert names(of_timm, count=3) == ["blocks.0"]
    assert names(of_timm, rule="norms") == ["blocks.0.norm1"]


@pytest.mark.parametrize(
    ("model", "stride", "expected"),
    [
        ("resnet18", 32, ["layer2", "layer3", "layer4"]),
        ("resnet18", 16, ["layer2", "layer3", "layer4"]),
        ("resnet18", 8, ["layer2", "layer3", "layer4"]),
        ("resnet50d", 8, ["layer2", "layer3", "layer4"]),
        ("regnetx_002", 8, ["s2", "s3", "s4"]),
        ("efficientnet_b0", 8, ["blocks.2", "blocks.4", "bn2"]),
    ],
)
def test_dilated_networks_whose_stages_share_a_grid_have_the_stages_of_the_strided_ones(model, stride, expected):
    assert names(timm(model, output_stride=stride), count=3) == expected


def convolutions(*channels, dilations):
    """Two strided convolutions and dilated ones."""
    shapes = [*({"stride": 2, "padding": 1},) * 2, *({"dilation": d, "padding": d} for d in dilations)]
    layers = [nn.Conv2d(*pair, 3, **shape) for pair, shape in zip(pairwise((3, *channels)), shapes, strict=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def test_a_single_dilated_convolution_is_a_stage_of_its_own():
    assert names(convolutions(4, 5, 6, 7, dilations=(2, 4)), count=3) == ["1", "2", "3"]


@pytest.mark.parametrize("dilations", [(1, 2, 5, 1, 2, 5), (1, 2, 4, 8)])
def test_layers_that_dilate_by_turns_are_no_stages(dilations):
    model = convolutions(*[4] * (2 + len(dilations)), dilations=dilations)
    assert names(model, rule="stages") == ["0", str(len(dilations) + 1)]


@pytest.mark.parametrize("model", ["skresnet18", "skresnext50_32x4d"])  # dilated by themselves, from the first block on
def test_a_pooling_before_dilated_blocks_is_no_stage(model):
    assert names(timm(model), rule="stages") == ["act1", "layer1", "layer2", "layer3", "layer4"]


@pytest.mark.parametrize(("strides", "expected"), [((2, 1, 2, 1), ["2", "3", "4"]), ((1,) * 5, ["3", "4", "5"])])
def test_blocks_of_the_last_grids_come_before_a_stem_where_there_are_few_grids(strides, expected):
    def block(stride):
        return BasicBlock(8, 8, stride, nn.Conv2d(8, 8, 1, stride) if stride > 1 else None)

    blocks = [block(stride) for stride in strides]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    assert names(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), *blocks, *head).eval(), count=3) == expected


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("vgg16", 64, "features.29"),  # the last ReLU: the pooling behind it has half the resolution
        ("vgg16_bn", 64, "features.42"),
        ("alexnet", 96, "features.11"),
        ("resnet18", 64, "layer4"),
        ("squeezenet1_1", 64, "features.12"),  # not the classifier's convolution
        ("mobilenet_v2", 64, "features.18"),
    ],
)
def test_gradient_methods_look_at_the_deepest_stage(name, size, expected):
    assert names(torchvision(name), size, rule="gradient") == [expected]


def test_gradient_methods_look_at_the_last_stage_of_a_swin_and_not_at_the_norm_behind_it():
    assert names(swin_of((32, 64)), (32, 64), rule="gradient") == ["layers.2"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vgg16", [f"features.{i}" for i in (4, 9, 16, 23, 30)]),
        ("resnet50", ["relu", "layer1", "layer2", "layer3", "layer4"]),
        ("squeezenet1_1", [f"features.{i}" for i in (1, 4, 7, 12)]),
        (
            "densenet121",
            [f"features.{part}" for part in ("relu0", "denseblock1", "denseblock2", "denseblock3", "norm5")],
        ),
        ("mobilenet_v2", [f"features.{i}" for i in (1, 3, 6, 13, 18)]),
        ("mobilenet_v3_large", [f"features.{i}" for i in (1, 3, 6, 12, 16)]),
        ("efficientnet_b0", [f"features.{i}" for i in (1, 2, 3, 5, 8)]),
    ],
)
def test_stage_ends(name, expected):
    assert names(torchvision(name), 96, rule="stages") == expected


def test_the_norms_rule_takes_the_first_norm_of_each_token_block():
    assert names(torchvision("vit_b_16", image_size=32), 32, count=3, rule="norms") == [
        f"encoder.layers.encoder_layer_{i}.ln_1" for i in (9, 10, 11)
    ]
    assert names(vit(depth=5), 32, count=3, rule="norms") == [f"blocks.{i}.norm1" for i in (2, 3, 4)]
    assert names(resnet(), count=2, rule="norms") == names(resnet(), count=2)  # images have none to take


def test_the_choice_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="attrib_zoo"):
        names(resnet(), count=2)
    assert [record.message for record in caplog.records] == ["layers of ResNet: layer3, layer4"]


# --- where there is a gradient ------------------------------------------------------------------------------------


def cls_vit(**options: Any) -> nn.Module:
    return vit(global_pool="token", **options)


@pytest.mark.parametrize(
    ("build", "prefix", "expected"),
    [
        (vit, 1, "blocks.2"),  # averaged patches
        (cls_vit, 1, "blocks.2.norm1"),  # the class token alone is read
        (lambda: cls_vit(reg_tokens=4), 5, "blocks.2.norm1"),
        (lambda: vit(reg_tokens=4, class_token=False), 4, "blocks.2"),
        (lambda: vit(class_token=False), 0, "blocks.2"),
    ],
    ids=["average", "class token", "registers", "average and registers", "no prefix"],
)
def test_the_deepest_layer_with_a_gradient(build, prefix, expected):
    model = build()
    (tap,) = resolve(model, None, images(32), rule="gradient")
    assert (tap.name, tap.grid) == (expected, Grid("tokens", prefix, (4, 4)))


def test_a_distilled_vit_has_two_prefix_tokens():
    from timm.models.deit import VisionTransformerDistilled

    model = lively(
        VisionTransformerDistilled(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5)
    )
    (tap,) = resolve(model, None, images(32), rule="gradient")
    assert (tap.name, tap.grid.prefix) == ("blocks.1.norm1", 2)


def test_post_norm_blocks_step_back_a_block():
    """Nothing in the last block but the class token's row is read, so the layer before it is meant."""
    from timm.models.vision_transformer import ResPostBlock

    assert names(cls_vit(block_fn=ResPostBlock), 32, rule="gradient") == ["blocks.1"]


def test_torchvision_vit_reads_its_class_token():
    from torchvision.models import VisionTransformer

    model = lively(VisionTransformer(32, 8, 2, 3, 24, 48, num_classes=5))
    assert names(model, 32, rule="gradient") == ["encoder.layers.encoder_layer_1.ln_1"]


def test_an_untrained_head_of_zeros_does_not_fail(caplog):
    model = cls_vit()
    nn.init.zeros_(model.head.weight)
    with caplog.at_level(logging.INFO, logger="attrib_zoo"):
        assert names(model, 32, rule="gradient") == ["blocks.2.norm1"]
    assert "no layer of VisionTransformer gets a gradient; is its head untrained?" in caplog.text


def test_the_probe_leaves_nothing_behind():
    model, inputs = cls_vit(), images(32)
    model.blocks[1].eval()
    model.head.train()
    with untouched(model, inputs):
        resolve(model, None, inputs, rule="gradient")


def test_a_softmax_output_is_no_obstacle():
    """Its sum is constant, so a plain sum of the outputs would have no gradient."""
    model = nn.Sequential(vit(), nn.Softmax(1))
    assert names(model, 32, rule="gradient") == ["0.blocks.2"]


# --- what layouts are read ------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Patches as tokens, in a layout of one's choice, each carrying its own position."""

    def __init__(self, prefix: int = 1, kind: str = "tokens", patch: int = 8) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 6, patch, patch)
        self.extra = nn.Parameter(torch.randn(1, prefix, 6))
        self.place = Place(prefix, kind)
        self.head = nn.Linear(6, 5)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.extra.expand(len(x), -1, -1), tokens], 1)
        tokens = self.place(tokens if self.kind == "tokens" else tokens.transpose(1, 2))
        return self.head(tokens.mean(1 if self.kind == "tokens" else 2))


class Place(nn.Module):
    """Puts each patch's number into every channel, behind the prefix."""

    def __init__(self, prefix: int, kind: str) -> None:
        super().__init__()
        self.prefix, self.axis = prefix, 1 if kind == "tokens" else 2

    def forward(self, x: Tensor) -> Tensor:
        number = torch.arange(x.shape[self.axis], dtype=x.dtype) - self.prefix
        return 0 * x + number.view(1, -1, 1) if self.axis == 1 else 0 * x + number


@pytest.mark.parametrize("prefix", [0, 1, 2, 5, 10])
@pytest.mark.parametrize("kind", ["tokens", "channel_tokens"])
@pytest.mark.parametrize("size", [(32, 32), (24, 48), (48, 24)])
def test_tokens_carrying_their_number_come_out_in_rows(prefix, kind, size):
    if kind == "channel_tokens" and prefix > 1:
        pytest.skip("too rare to be guessed: a user gives the layout")
    model, inputs = Tokens(prefix, kind), images(size)
    (tap,) = resolve(model, "place", inputs)
    assert tap.grid == Grid(kind, prefix, (size[0] // 8, size[1] // 8))
    _, (maps,) = run(model, inputs, (), (tap,))
    cells = torch.arange(maps[0, 0].numel(), dtype=maps.dtype).view(size[0] // 8, -1)
    assert torch.equal(maps, cells.expand_as(maps))


def test_nhwc_is_told_from_nchw_by_the_sizes_of_the_pass():
    model, inputs = swin_of((32, 64)), images((32, 64))
    taps = resolve(model, None, inputs, count=3)
    assert taps == tuple(Tap(f"layers.{i}", Grid("nhwc"), 8 * 2**i) for i in range(3))
    (embedded,) = resolve(model, "patch_embed.proj", inputs)
    assert embedded == Tap("patch_embed.proj", Grid("nchw"), 8)
    _, maps = run(model, inputs, (), taps)
    own = model.layers[0](model.patch_embed(inputs))
    assert own.shape == (1, 8, 16, 8)  # eight channels in eight rows: NCHW would fit a square image
    assert torch.equal(maps[0], own.permute(0, 3, 1, 2))


class Several(nn.Module):
    """Puts out two streams of different size, as a list or as a dict, and one that nobody reads."""

    def __init__(self, mapping: bool) -> None:
        super().__init__()
        self.body = _Streams(mapping)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        fine, coarse = list(self.body(x).values())[:2] if self.body.mapping else self.body(x)[:2]
        return self.head(torch.cat([fine.mean((2, 3)), coarse.mean((2, 3))], 1))


class _Streams(nn.Module):
    def __init__(self, mapping: bool) -> None:
        super().__init__()
        self.mapping = mapping
        self.fine, self.coarse = nn.Parameter(torch.rand(4, 3, 4, 4)), nn.Parameter(torch.rand(8, 3, 8, 8))

    def forward(self, x: Tensor) -> Any:
        fine, coarse = F.conv2d(x, self.fine, stride=4), F.conv2d(x, self.coarse, stride=8)
        streams = {"fine": fine, "coarse": coarse, "aside": x[:, :1] * 2}
        return streams if self.mapping else list(streams.values())


@pytest.mark.parametrize("mapping", [False, True])
def test_streams_of_one_layer_are_told_apart(mapping):
    model, inputs = Several(mapping).eval(), images(32)
    taps = resolve(model, None, inputs, count=2)
    keys = ("fine", "coarse") if mapping else (0, 1)
    assert [(tap.name, tap.element, tap.channels) for tap in taps] == [("body", keys[0], 4), ("body", keys[1], 8)]
    _, maps = run(model, inputs, (), taps)
    assert torch.equal(maps[0], F.conv2d(inputs, model.body.fine, stride=4))
    assert torch.equal(maps[1], F.conv2d(inputs, model.body.coarse, stride=8))
    assert resolve(model, [tap.label for tap in reversed(taps)], inputs) == taps
    assert resolve(model, "body", inputs) == taps[1:]
    with pytest.raises(LayerError, match=r"'body' puts out no tensor at \[7\]; it has"):
        resolve(model, "body[7]", inputs)


class Wrapped(nn.Module):
    """A convolution before and a backbone that gives a vector: the stages are inside the backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.adapt, self.backbone = nn.Conv2d(3, 3, 1), resnet()

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(self.adapt(x))


def test_a_backbone_inside_a_model_is_looked_into():
    assert names(Wrapped(), count=3) == ["backbone.layer1", "backbone.layer3", "backbone.layer4"]
    assert names(Wrapped(), rule="gradient") == ["backbone.layer4"]


@pytest.mark.parametrize("size", [96, 112, 128, 160])
def test_a_state_is_no_map_though_it_has_as_many_tokens(size):
    """EfficientViM's stages hand on 49, 25 and 9 states beside their images; norms of them are read by the head."""
    model = timm("efficientvim_m1")
    for rule, count in (("outputs", 3), ("stages", 1), ("gradient", 1)):
        taps = resolve(model, None, images(size), rule=rule, count=count)
        assert {tap.grid for tap in taps} == {Grid("nchw")}
        assert not any(tap.name in ("norm.0", "norm.1", "norm.2") for tap in taps)


class Aside(nn.Module):
    """Runs a branch that its output does not read, detaches, and works without a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unread = (nn.Conv2d(c, 4, 3, 2, 1) for c in (3, 4, 4))
        self.head = nn.Linear(4, 5)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        x = self.second(F.relu_(self.first(x)).detach())
        self.unread(x)
        return self.head(x.mean((2, 3)))


def test_what_the_outputs_do_not_read_is_no_default():
    assert names(Aside(), count=3) == ["first", "second"]
    assert resolve(Aside(), "unread", images(64))[0].channels == 4  # who names it gets it


class Recurrent(nn.Module):
    """One block that runs three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 4, 3, 1, 1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = self.block(x).tanh()
        return self.head(x.mean((2, 3)))


def test_a_layer_that_runs_several_times(caplog):
    model, inputs = Recurrent().eval(), images(32)
    with caplog.at_level(logging.INFO, logger="attrib_zoo"):
        (last,) = resolve(model, "block", inputs)
    assert (last.calls, last.call) == (3, -1)
    assert "'block' runs 3 times in a pass; the last run is explained" in caplog.text
    taps = resolve(model, None, inputs, count=3)
    assert [(tap.name, tap.call) for tap in taps] == [("block", 0), ("block", 1), ("block", -1)]
    assert resolve(model, list(taps), inputs) == taps
    _, maps = run(model, inputs, (), taps)
    assert torch.equal(maps[0], model.block(model.stem(inputs)))
    assert torch.equal(maps[1], model.block(maps[0].tanh()))
    assert "block (run 2 of 3)" in str(describe(model, inputs))


# --- mask units -------------------------------------------------------------------------------------------------


def hiera(**options: Any) -> nn.Module:
    from timm.models.hiera import Hiera

    shape = {"img_size": (64, 64), "embed_dim": 8, "num_heads": 1, "stages": (1, 1, 1, 1), "mask_unit_size": (8, 8)}
    return lively(Hiera(num_classes=5, **{**shape, **options}))


def test_mask_units_that_cannot_be_undone_are_refused():
    model = hiera()
    del model.reroll
    with pytest.raises(LayerError, match=r"'blocks\.0' of Hiera must put out a map"):
        resolve(model, "blocks.0", images(64))


# --- every family -----------------------------------------------------------------------------------------------

QUICK = {
    "test_resnet": 64, "test_vit": 160, "test_vit2": 64, "test_efficientnet": 64, "test_byobnet": 64,
    "test_mambaout": 64, "test_convnext": 64,
    "tv squeezenet1_1": 96, "tv mobilenet_v3_small": 96, "tv shufflenet_v2_x0_5": 96,
}  # fmt: skip
FAMILIES = {
    "resnet10t": 96, "test_vit3": 160, "test_nfnet": 96, "test_coatnet": 160, "test_vit_relpos": 160, "levit_128s": 224,
    "pvt_v2_b0": 96, "pit_ti_224": 224, "crossvit_tiny_240": 240, "hrnet_w18_small": 96, "mobilevit_xxs": 128,
    "edgenext_xx_small": 128, "poolformer_s12": 96, "xcit_nano_12_p16_224": 96, "twins_svt_small": 96,
    "tiny_vit_5m_224": 224, "mobilenetv4_conv_small": 128, "ghostnet_050": 96, "repvit_m0_9": 96, "visformer_tiny": 224,
    "hiera_tiny_224": 224, "mvitv2_tiny": 224, "deit_tiny_distilled_patch16_224": 224, "resmlp_12_224": 224,
    "vit_tiny_r_s16_p8_224": 224, "focalnet_tiny_srf": 96, "dla46_c": 96, "selecsls42": 128, "tv densenet121": 96,
    "tv googlenet": 96, "tv efficientnet_b0": 96, "tv regnet_y_400mf": 96, "tv swin_t": 96, "tv convnext_tiny": 96,
    "tv maxvit_t": 224, "tv mnasnet0_5": 96, "tv resnet18": 96,
}  # fmt: skip


def family(name: str) -> nn.Module:
    if not name.startswith("tv "):
        return timm(name)
    from torchvision import models

    extra = {"init_weights": False} if name == "tv googlenet" else {}
    return models.get_model(name[3:], weights=None, num_classes=5, **extra).eval()


MIXED = ("levit_128s", "tiny_vit_5m_224", "visformer_tiny")
"""With random weights the later stages of these mix the whole image: only their first map says where."""


def check_family(name: str, size: int) -> None:
    """Three maps, none finer than the one before, and each changes where the image does."""
    model, inputs = family(name), images(size)
    taps = resolve(model, None, inputs, count=3)
    _, maps = run(model, inputs, (), taps)
    assert len(maps) >= 3
    check_grids(model, taps, inputs)
    sizes = [found.shape[2] for found in maps]
    assert sizes == sorted(sizes, reverse=True) or name.startswith("crossvit")  # two streams side by side
    far = size - size // 4
    found = {}
    for top in (0, far):
        for left in (0, far):
            changed = inputs.clone()
            changed[:, :, top : top + size // 4, left : left + size // 4] += 3.0
            _, moved = run(model, changed, (), taps)
            found[top, left] = [centre((a - b).abs().sum(1)[0]) for a, b in zip(moved, maps, strict=True)]
    for i, tap in enumerate(taps[:1] if name in MIXED else taps):
        for here in (0, far):
            assert found[0, here][i][0] < found[far, here][i][0], tap
            assert found[here, 0][i][1] < found[here, far][i][1], tap


def centre(change: Tensor) -> list[float]:
    """Where a map changed, per axis: -1 is the first row or column, 1 the last."""
    change = change.double() ** 2 / (change.double() ** 2).sum()
    axes = [torch.linspace(-1, 1, size, dtype=torch.float64) for size in change.shape]
    return [(change.sum(1) * axes[0]).sum().item(), (change.sum(0) * axes[1]).sum().item()]


@pytest.mark.parametrize("name", QUICK)
def test_families(name):
    check_family(name, QUICK[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_more_families(name):
    check_family(name, FAMILIES[name])


def test_a_patch_moves_its_own_token():
    """Off by one in the prefix, or rows for columns, and another cell would move most."""
    model, inputs = vit(img_size=(32, 48), reg_tokens=2), images((32, 48))
    taps = resolve(model, None, inputs, count=3)
    _, maps = run(model, inputs, (), taps)
    for row in range(4):
        for column in range(6):
            changed = inputs.clone()
            changed[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1
            _, moved = run(model, changed, (), taps)
            for before, after in zip(maps, moved, strict=True):
                change = (after - before).abs().sum(1)[0]
                assert divmod(int(change.argmax()), 6) == (row, column)


# --- what the user names ----------------------------------------------------------------------------------------


def test_ways_to_name_a_layer():
    model, inputs = resnet(), images(64)
    by_name = resolve(model, "layer3", inputs)
    assert by_name == (Tap("layer3", Grid(), 16),)
    assert resolve(model, model.layer3, inputs) == by_name
    assert resolve(model, ["layer3"], inputs) == by_name
    assert resolve(model, ("layer3", Grid("nchw")), inputs) == by_name
    assert resolve(model, by_name[0], inputs) == by_name
    assert resolve(nn.DataParallel(model), "module.layer3", inputs) == by_name
    assert resolve(nn.DataParallel(model), "layer3", inputs) == by_name
    assert resolve(torch.compile(model, backend="eager"), "layer3", inputs) == by_name
    assert [tap.name for tap in resolve(model, ["layer4", model.layer1], inputs)] == ["layer1", "layer4"]


def test_a_compiled_submodule_keeps_its_name():
    model, inputs = resnet(), images(64)
    model.layer3 = torch.compile(model.layer3, backend="eager")
    assert resolve(model, "layer3", inputs) == resolve(model, model.layer3, inputs) == (Tap("layer3", Grid(), 16),)
    assert names(model, count=2) == ["layer3", "layer4"]


def test_negative_indices_count_stages_or_blocks():
    assert [tap.name for tap in resolve(resnet(), [-1, -2], images(64))] == ["layer3", "layer4"]
    assert [tap.name for tap in resolve(vit(depth=5), [-1, -5], images(32))] == ["blocks.0", "blocks.4"]
    with pytest.raises(LayerNotFoundError, match=r"between -\d and -1 \(the last\), got 0; it counts in .*'layer4'"):
        resolve(resnet(), 0, images(64))
    with pytest.raises(LayerNotFoundError, match="got -9"):
        resolve(resnet(), -9, images(64))


def test_a_hint_says_how_to_read_what_cannot_be_guessed():
    model, inputs = Tokens(prefix=3, kind="channel_tokens"), images(32)
    with pytest.raises(LayerError, match=r"'place' of Tokens must put out a map, got \(N, 6, 19\)"):
        resolve(model, "place", inputs)
    hint = Grid("channel_tokens", 3, (4, 4))
    (tap,) = resolve(model, ("place", hint), inputs)
    assert (tap.grid, tap.channels) == (hint, 6)
    _, (maps,) = run(model, inputs, (), (tap,))
    assert torch.equal(maps[0, 5], torch.arange(16.0).view(4, 4))
    with pytest.raises(LayerError, match=r"must put out what the given layout says, but does not; .* = 18 tokens"):
        resolve(model, ("place", Grid("channel_tokens", 2, (4, 4))), inputs)


def test_a_hint_without_a_size_takes_the_size_found():
    (tap,) = resolve(vit(), ("blocks.1", Grid("tokens", prefix=1)), images(32))
    assert tap.grid == Grid("tokens", 1, (4, 4))
    with pytest.raises(LayerError, match="must put out a map"):
        resolve(Tokens(prefix=3, kind="channel_tokens"), "place", images(32))  # none is found there by itself
    (tap,) = resolve(Tokens(prefix=3, kind="channel_tokens"), ("place", Grid("channel_tokens", 3)), images(32))
    assert tap.grid == Grid("channel_tokens", 3, (4, 4))


@pytest.mark.parametrize(
    ("layers", "error", "says"),
    [
        ("layer5", LayerNotFoundError, "no layer 'layer5' in ResNet; closest: 'layer4', 'layer3', 'layer2'"),
        ("", LayerNotFoundError, "no layer '' in ResNet; closest: .*'layer4', 'avgpool', 'fc'"),
        (nn.Conv2d(1, 1, 1), LayerNotFoundError, "the Conv2d must be part of the ResNet to explain, but is not"),
        ("fc", LayerError, r"'fc' of ResNet must put out a map, got \(N, 5\); the nearest spatial layers are 'layer4'"),
        (["layer4", "layer3", "layer4"], OptionError, "each must be given once, got 'layer4' twice"),
        (["layer4", -1], OptionError, "each must be given once"),
        ([], OptionError, "must name at least one layer, got an empty list"),
        (1.5, OptionError, "must be names, modules, negative indices or .*, got 1.5 of type float"),
        (True, OptionError, "got True of type bool"),
    ],
)
def test_layers_that_cannot_be(layers, error, says):
    with pytest.raises(error, match=says):
        resolve(resnet(), layers, images(64))


def test_a_map_of_one_cell_is_taken_by_name():
    (tap,) = resolve(resnet(), "avgpool", images(64))
    assert (tap.grid, tap.channels) == (Grid("nchw"), 20)


def test_options_that_cannot_be():
    with pytest.raises(OptionError, match=r"rule: must be one of 'outputs', .*, got 'last'"):
        resolve(resnet(), None, images(64), rule="last")
    with pytest.raises(OptionError, match="count: must be 1 or more layers, got 0"):
        resolve(resnet(), None, images(64), count=0)


def test_five_near_layers_are_named_and_each_of_them_works():
    with pytest.raises(LayerError) as caught:
        resolve(resnet(), "fc", images(64))
    near = str(caught.value).split("the nearest spatial layers are ")[1].split(";")[0].replace("'", "").split(", ")
    assert len(near) == 5
    for name in near:
        resolve(resnet(), name, images(64))


def test_a_container_that_never_runs_names_its_parts():
    model = vit()
    model.blocks = nn.ModuleList(model.blocks)
    model.forward_features = lambda x, **_: _through(model, x)
    with pytest.raises(LayerError, match=r"'blocks' \(ModuleList\) must run .* never called; .*'blocks.1', 'blocks.2'"):
        resolve(model, "blocks", images(32))


def _through(model: Any, x: Tensor) -> Tensor:
    x = model._pos_embed(model.patch_embed(x))
    for block in model.blocks:
        x = block(x)
    return model.norm(x)


class Spare(nn.Module):
    """Has a layer that never runs, and no layer that is spatial."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.spare = nn.Linear(3 * 64, 5), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(x.flatten(1))


def test_a_layer_that_never_runs():
    with pytest.raises(LayerError, match=r"'spare' \(Conv2d\) must run in the forward pass, but is never called"):
        resolve(Spare(), "spare", images(8))


@pytest.mark.parametrize("rule", ["outputs", "norms", "gradient", "stages"])
def test_a_model_without_maps(rule):
    with pytest.raises(UnsupportedModelError, match=r"no layer of Spare puts out a map at input size 8x8; .*Grid\("):
        resolve(Spare(), None, images(8), rule=rule)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_scripted_models_are_refused():
    with pytest.raises(UnsupportedModelError, match="scripted and traced models run no hooks"):
        resolve(torch.jit.trace(resnet(), images(64)), None, images(64))


def test_a_small_network_gives_what_it_has(caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    with caplog.at_level(logging.INFO, logger="attrib_zoo"):
        assert names(model, 16, count=3) == ["1"]
    assert "Sequential has 1 layers to explain, not 3" in caplog.text


# --- describe -------------------------------------------------------------------------------------------------


def test_describe_is_a_table():
    text = str(describe(cls_vit(depth=4), images(32)))
    lines = [line.split() for line in text.splitlines()]
    assert text.startswith("VisionTransformer at 32x32\nlayer ")
    assert ["blocks.0", "Block", "tokens", "4x4", "24", "1", "yes"] in lines
    assert ["blocks.2", "Block", "tokens", "4x4", "24", "1", "yes", "outputs", "(3)"] in lines
    assert ["blocks.3.norm1", "LayerNorm", "tokens", "4x4", "24", "1", "yes", "norms", "(3),", "gradient"] in lines
    assert [
        "blocks.3",
        "Block",
        "tokens",
        "4x4",
        "24",
        "1",
        "no",
        "outputs",
        "(3),",
        "stages",
    ] in lines  # only its class token is read


class Ends(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


def test_a_description_does_not_guess_gradients():
    model = cls_vit()
    nn.init.zeros_(model.head.weight)
    assert {row.gradient for row in describe(model, images(32)).rows} == {None}
    assert {row.gradient for row in describe(nn.Sequential(resnet(), Ends()), images(64)).rows} == {None}
    assert {row.gradient for row in describe(resnet(), images(64)).rows} == {True}


def test_every_name_in_a_description_resolves():
    for model, size in ((resnet(), 64), (swin(), 16), (vit(), 32)):
        for row in describe(model, images(size)).rows:
            assert resolve(model, row.tap.label, images(size)) == (row.tap,)


# --- nothing is left behind -------------------------------------------------------------------------------------


class Fails(nn.Module):
    """Raises in the middle of its n-th pass."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.model, self.at = cls_vit(), at
        self.passes: list[None] = []  # a list, which a mirror of the model shares
        self.model.blocks[1].register_forward_pre_hook(self.count)

    def count(self, *_: Any) -> None:
        self.passes.append(None)
        if len(self.passes) == self.at:
            raise ArithmeticError("the model's own")

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


@pytest.mark.parametrize("at", [1, 2])
def test_a_model_that_raises_is_left_as_it_was(at):
    model, inputs = Fails(at), images(32)
    model.model.blocks[0].eval()
    with untouched(model, inputs), pytest.raises(ArithmeticError, match="the model's own"):
        resolve(model, None, inputs, rule="gradient")


@pytest.mark.parametrize("mode", ["plain", "no_grad", "inference_mode"])
def test_tracing_leaves_nothing_behind(mode):
    model, inputs = resnet().train(), images(64, count=3)
    model.layer1.eval()
    context = {"plain": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[mode]
    with context(), untouched(model, inputs):
        taps = resolve(model, None, inputs, count=3)
    assert taps == resolve(resnet(), None, images(64), count=3)


class Remembers(nn.Module):
    """Keeps tables from its passes, as models do: in a dict, on a module and in the module of a function."""

    tables: dict[int, Tensor] = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 4, 3, 1, 1), nn.Linear(4, 5)
        self.cache: dict[str, Tensor] = {}
        self.rope: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.rope is None:
            self.rope = torch.linspace(0, 1, x.shape[-1])
        bias = self.cache.setdefault("bias", self.stem.bias.sum() + torch.ones(1))
        table = self.tables.setdefault(x.shape[-1], torch.linspace(1, 2, x.shape[-1]))
        return self.head(self.body(x * table + self.rope + bias).mean((2, 3)))


def test_what_a_model_remembers_from_the_trace_is_real():
    Remembers.tables.clear()
    model, inputs = Remembers().eval(), images(32)
    resolve(model, None, inputs, rule="gradient")
    for kept in (*model.cache.values(), *Remembers.tables.values()):
        assert type(kept) is Tensor
        assert kept.grad_fn is None
    assert model.rope is None  # set on the mirror that ran, and gone with it
    kept = model(inputs)
    Remembers.tables.clear()
    fresh = Remembers().eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(inputs), kept)


class Scaled(nn.Module):
    """Takes a factor per image and a table beside the images."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []
        self.model = resnet()

    def forward(self, x: Tensor, factor: Tensor, table: Tensor, power: int) -> Tensor:
        self.seen.append((len(x), len(factor), len(table)))
        return self.model(x * factor.view(-1, 1, 1, 1) ** power + table.sum())


@pytest.mark.parametrize("count", [1, 2, 5])
def test_arguments_per_image_follow_the_batch_of_the_trace(count):
    model = Scaled().eval()
    taps = resolve(model, None, images(64, count), (torch.rand(count), torch.rand(7), 2), count=2)
    assert [tap.name for tap in taps] == ["model.layer3", "model.layer4"]
    assert model.seen == [(1, 1, 7)]


def test_one_look_serves_several_questions():
    model, inputs = resnet(), images(64)
    passes: list[Any] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    traced = look(model, inputs)
    assert [tap.name for tap in resolve(model, -1, inputs, traced=traced)] == ["layer4"]
    assert [tap.name for tap in resolve(model, None, inputs, count=2, traced=traced)] == ["layer3", "layer4"]
    assert len(passes) == 1


def test_half_precision_and_channels_last():
    model = resnet().to(torch.bfloat16).to(memory_format=torch.channels_last)
    inputs = images(64).to(torch.bfloat16).to(memory_format=torch.channels_last)
    assert [tap.name for tap in resolve(model, None, inputs, count=2)] == ["layer3", "layer4"]


def test_notebooks_show_the_layers_as_a_table():
    found = describe(cls_vit(depth=4), images(32))
    text = found._repr_html_()
    assert text.count("<tr>") == 1 + len(found.rows) > 2
    assert text.count("<th ") == len(str(found).splitlines()[1].split()) - 1  # "taken by" is one head
    assert all(f">{row.tap.label}</td>" in text for row in found.rows)
