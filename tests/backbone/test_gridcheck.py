"""The test of a layer's grid: right ones pass, wrong ones are refused with what would be right, once per size."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_cases import resnet, swin, untouched, vit
from torch import Tensor, nn

from attrib_zoo import TTAME, GradCAM
from attrib_zoo.backbone.grid import Grid, Tap
from attrib_zoo.backbone.layers import gridcheck, resolve
from attrib_zoo.backbone.layers.gridcheck import check_grids, probe, unchecked
from attrib_zoo.errors import LayerError

WIDE = (32, 48)


def images(size: int | tuple[int, int], count: int = 1) -> Tensor:
    return torch.randn(count, 3, *((size, size) if isinstance(size, int) else size))


def wide_vit(**options: Any) -> nn.Module:
    return vit(img_size=WIDE, **options)


def verdict(model: nn.Module, layer: Any, inputs: Tensor, grid: Grid | None = None) -> gridcheck.Verdict:
    tap = layer if isinstance(layer, Tap) else resolve(model, layer, inputs)[0]
    return probe(model, [tap if grid is None else replace(tap, grid=grid)], inputs)[0]


class Behind(nn.Module):
    """Tokens of a ViT, changed by a function, in a layer ``mix``."""

    def __init__(self, change: Any, **options: Any) -> None:
        super().__init__()
        self.vit, self.change, self.mix = vit(class_token=False, **options), change, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.vit.blocks(self.vit.patch_embed(x))
        return self.vit.head(self.mix(self.change(tokens)).mean(1))


# --- what is right passes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "layers", "size"),
    [
        (wide_vit, ["blocks.0", "blocks.2", "blocks.2.norm1"], WIDE),
        (lambda: vit(img_size=64, reg_tokens=4), ["blocks.2"], 64),
        (lambda: vit(img_size=(48, 24), class_token=False), ["blocks.2"], (48, 24)),
        (swin, ["layers.0", "layers.1"], 16),
        (resnet, ["layer1", "layer2", "layer3", "layer4"], 64),
        (resnet, ["layer1", "layer4"], (64, 96)),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_read_rightly_is_right(build, layers, size, seed):
    torch.manual_seed(seed)
    model, inputs = build(), images(size)
    for found in probe(model, resolve(model, layers, inputs), inputs):
        assert (found.said, found.better) == ("right", ())
        assert found.own > 0.4


# --- what is wrong is refused ---------------------------------------------------------------------------------------

TURNED = tuple(torch.arange(24).view(4, 6).t().flatten().tolist())
MIXED = tuple(torch.randperm(24, generator=torch.Generator().manual_seed(3)).tolist())


WRONG = [
    Grid("tokens", 1, (6, 4)),
    Grid("tokens", 1, (3, 8)),
    Grid("tokens", 1, (2, 12)),
    Grid("tokens", 0, (5, 5)),
    Grid("tokens", 5, (4, 5)),
    Grid("tokens", 1, (4, 6), TURNED),
    Grid("tokens", 1, (4, 6), MIXED),
    Grid("channel_tokens", 0, (4, 6)),  # 24 channels look like 24 cells
]


@pytest.mark.parametrize("grid", WRONG, ids=str)
def test_a_wrong_hint_is_answered_with_the_right_one(grid):
    model, inputs = wide_vit(), images(WIDE)
    found = verdict(model, "blocks.0", inputs, grid)
    assert found.said == "wrong"
    assert "Grid('tokens', prefix=1, hw=(4, 6))" in map(str, found.better)


@pytest.mark.parametrize("grid", WRONG, ids=str)
def test_a_call_with_a_wrong_hint_names_the_right_one(grid):
    with pytest.raises(LayerError, match=r"must change where the image does.*as Grid\('tokens', prefix=1, hw=\(4, 6"):
        GradCAM(wide_vit(), ("blocks.2", grid)).attribute(images(WIDE), 0)


def test_the_refusal_says_everything():
    with pytest.raises(LayerError) as caught:
        GradCAM(wide_vit(), ("blocks.1", Grid("tokens", prefix=1, hw=(6, 4)))).attribute(images(WIDE), 0)
    said = str(caught.value)
    assert said.startswith(
        "layers: 'blocks.1' of VisionTransformer must change where the image does, but read as "
        "Grid('tokens', prefix=1, hw=(6, 4)) it does not: it does as Grid('tokens', prefix=1, hw=(4, 6))"
    )
    assert "pass layers=('blocks.1', Grid('tokens', prefix=1, hw=(4, 6))), or another layer" in said
    assert "the nearest spatial layers are 'blocks." in said
    assert said.endswith("unchecked()")


@pytest.mark.parametrize(("model", "layer", "size"), [(swin, "layers.0", 16), (resnet, "layer1", 64)])
def test_channels_first_and_channels_last(model, layer, size):
    model, inputs = model(), images(size)
    (tap,) = resolve(model, layer, inputs)
    other = "nchw" if tap.grid.kind == "nhwc" else "nhwc"
    found = verdict(model, layer, inputs, Grid(other))
    assert found.said == "wrong"
    assert str(found.better[0]) == f"Grid('{tap.grid.kind}')"


def test_patches_that_come_before_the_class_token():
    """Every cell is one token aside, which no shape tells."""
    model = Behind(lambda t: torch.cat([t, t.mean(1, keepdim=True)], 1), img_size=64).eval()
    with pytest.raises(LayerError, match="8x8 patches that begin at token 0, with 1 other tokens behind"):
        GradCAM(model, "mix").attribute(images(64), 0)


@pytest.mark.parametrize("side", [6, 8])
def test_cells_in_another_order(side):
    """As Hiera keeps them, in mask units: no other reading fits, but the changed cells lie elsewhere."""
    order = torch.arange(side * side).view(2, side // 2, 2, side // 2).permute(1, 3, 0, 2).flatten()
    model, inputs = Behind(lambda t: t[:, order], img_size=8 * side).eval(), images(8 * side)
    with pytest.raises(LayerError, match=r"a few cells elsewhere change; give the order .*permutation="):
        GradCAM(model, "mix").attribute(inputs, 0)
    right = Grid("tokens", hw=(side, side), permutation=tuple(order.argsort().tolist()))
    assert verdict(model, ("mix", right), inputs).said == "right"


def test_attention_matrices_are_no_images():
    """37 tokens by 37: the shape of a map, in a model that has no such map."""
    model, inputs = vit(img_size=48), images(48)
    model.blocks[1].attn.fused_attn = False
    with pytest.raises(LayerError, match=r"'blocks.1.attn.attn_drop' .* must change where the image does"):
        GradCAM(model, ("blocks.1.attn.attn_drop", Grid("nchw"))).attribute(inputs, 0)


# --- what cannot be told is used ------------------------------------------------------------------------------------


def test_a_layer_that_mixes_the_image_is_used_and_a_line_is_logged(caplog):
    model, inputs = Behind(lambda t: t.mean(1, keepdim=True).expand_as(t)).eval(), images(32)
    hint = ("mix", Grid("tokens", hw=(4, 4)))
    assert verdict(model, hint, inputs).said == "undecided"
    with caplog.at_level(logging.INFO, logger="attrib_zoo"):
        GradCAM(model, hint).attribute(inputs, 0)
    assert "'mix' of Behind mixes the whole image, so that its grid cannot be tested" in caplog.text


def test_chance_is_no_answer():
    """Each cell a random mixture of all, as in deep layers that nobody trained: where there are few cells, four places
    may seem to fit one reading or another."""
    found = []
    for seed in range(12):
        mixture = torch.randn(16, 16, generator=torch.Generator().manual_seed(seed))
        model = Behind(lambda t, mixture=mixture: mixture @ t).eval()
        found.append(verdict(model, ("mix", Grid("tokens", hw=(4, 4))), images(32)).said)
    assert "wrong" not in found
    assert found.count("undecided") >= 11  # one in twenty may pass


class Dead(Behind):
    """Its layer does not move at all."""

    def __init__(self) -> None:
        super().__init__(lambda t: 0 * t + 1)


def test_a_layer_that_does_not_move_is_not_judged():
    found = verdict(Dead().eval(), ("mix", Grid("tokens", hw=(4, 4))), images(32))
    assert (found.said, found.own, found.sharpness) == ("undecided", 0.0, 0.0)


def test_a_constant_image_serves():
    assert verdict(wide_vit(), "blocks.2", torch.zeros(1, 3, *WIDE)).said == "right"


def test_half_precision_serves():
    model, inputs = wide_vit().to(torch.bfloat16), images(WIDE).to(torch.bfloat16)
    assert verdict(model, "blocks.2", inputs).said == "right"
    assert verdict(model, "blocks.2", inputs, Grid("tokens", 1, (6, 4))).said == "wrong"


# --- what it costs --------------------------------------------------------------------------------------------------


class Counted(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.batches: list[int] = []  # a list, which a mirror of the model shares

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        return self.model(x)


def cost(model: Counted, call: Any) -> int:
    model.batches.clear()
    call()
    return sum(model.batches)


def test_twelve_places_more_where_four_leave_a_doubt():
    model = Counted(Behind(lambda t: t.mean(1, keepdim=True).expand_as(t)).eval())
    layers = [("model.mix", Grid("tokens", hw=(4, 4))), "model.vit.blocks.0"]
    taps = resolve(model, layers, images(32))
    assert cost(model, lambda: check_grids(model, taps[:1], images(32))) == 5  # the block alone is clear
    assert cost(model, lambda: check_grids(model, taps, images(32))) == 4 * 5
    assert cost(model, lambda: check_grids(model, taps, images(32))) == 0


def test_five_images_once_per_layer_and_size():
    model = Counted(vit(dynamic_img_size=True))
    inputs = images(32, 3)
    layer = "model.blocks.1"
    assert cost(model, lambda: GradCAM(model, layer).taps(inputs)) == 1 + 5  # traced on one image
    assert cost(model, lambda: GradCAM(model, layer).taps(inputs)) == 0  # another object
    assert cost(model, lambda: GradCAM(model, "model.blocks.2").taps(inputs)) == 0  # its cells lie as those of block 1
    assert cost(model, lambda: GradCAM(model, "model.blocks.1.mlp.fc1").taps(inputs)) == 5  # the trace is the model's
    assert cost(model, lambda: GradCAM(model, layer).taps(images(WIDE))) == 1 + 5
    assert cost(model, lambda: TTAME(model, recipe="paper").taps(inputs)) == 0


def test_nothing_where_nothing_can_be_misread():
    model = Counted(resnet())
    assert cost(model, lambda: TTAME(model, recipe="paper").taps(images(64))) == 1
    assert cost(model, lambda: GradCAM(model, ("model.layer4", Grid("nhwc"))).layers) == 0


def test_a_refused_layer_is_refused_again():
    model = wide_vit()
    for _ in range(2):
        with pytest.raises(LayerError, match="must change where the image does"):
            GradCAM(model, ("blocks.1", Grid("tokens", 1, (6, 4)))).taps(images(WIDE))


def test_it_can_be_switched_off():
    model, layer = wide_vit(), ("blocks.1", Grid("tokens", prefix=1, hw=(6, 4)))
    with unchecked():
        assert GradCAM(model, layer, upsample=False).attribute(images(WIDE), 0).shape[-2:] == (6, 4)
    with pytest.raises(LayerError):  # nothing was remembered
        GradCAM(model, layer).attribute(images(WIDE), 0)


@pytest.mark.parametrize("mode", ["plain", "inference_mode"])
def test_it_leaves_nothing_behind(mode):
    model, inputs = wide_vit().train(), images(WIDE, 2)
    model.blocks[0].eval()
    taps = resolve(model, "blocks.1", inputs)
    context = {"plain": torch.enable_grad, "inference_mode": torch.inference_mode}[mode]
    with context(), untouched(model, inputs):
        check_grids(model, taps, inputs)


def reached(model: nn.Module, call: Any) -> list[str]:
    """The layers that ran on more than one image, as a test of grids does and a trace does not."""
    seen: dict[str, None] = {}

    def note(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and len(output) > 1:
            seen[name] = None

    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: note(name, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return list(seen)


def test_blocks_are_tested_where_their_order_begins_and_the_pass_ends_there():
    """What adds to its input, or scales it, keeps every token in its place."""
    model, inputs = vit(img_size=32), images(32)
    ran = reached(model, lambda: GradCAM(model, "blocks.2").taps(inputs))
    assert ran
    assert not any(name.startswith(("blocks", "norm", "head")) for name in ran)
    model = vit(img_size=32)
    ran = reached(model, lambda: GradCAM(model, "blocks.1.attn").taps(inputs))  # attention mixes the tokens
    assert "blocks.1.attn.proj" in ran
    assert not any(name.startswith("blocks.2") for name in ran)


@pytest.mark.parametrize(
    "change",
    [lambda t: t.flip(1), lambda t: t.unflatten(1, (4, 4)).transpose(1, 2).contiguous().flatten(1, 2)],
    ids=["reversed", "columns first"],
)
def test_tokens_in_another_order_are_tested_behind_it(change):
    model, inputs = Behind(change, img_size=32).eval(), images(32)
    with pytest.raises(LayerError, match="'mix' of Behind must change where the image does"):
        GradCAM(model, ("mix", Grid("tokens", hw=(4, 4)))).taps(inputs)


class Aborted(Behind):
    """Answers an exception in its blocks with other tokens, as a model with a fallback does."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            tokens = self.vit.blocks(self.vit.patch_embed(x))
        except Exception:
            tokens = self.vit.patch_embed(x).flip(1)
        return self.vit.head(self.mix(tokens).mean(1))


def test_a_model_does_not_catch_the_end_of_the_test():
    model, inputs = Aborted(lambda t: t).eval(), images(32)
    ran = reached(model, lambda: GradCAM(model, "vit.blocks.2").taps(inputs))
    assert "mix" not in ran
