"""Models that nobody has seen before, and images that are not square: the map changes where the image does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from engine_cases import lively, resnet, swin_of, vit
from torch import Tensor, nn

from attrib_zoo import (
    TTAME,
    AttentionRollout,
    FullGrad,
    GenericAttention,
    GradCAM,
    LayerCAM,
    ScoreCAM,
    TransformerLRP,
)
from attrib_zoo.backbone.grid import Grid
from attrib_zoo.errors import LayerError, UnsupportedModelError
from attrib_zoo.synthetic import tiny_cnn


def moved(model: nn.Module, size: tuple[int, int], place: tuple[int, int], side: int, layer: Any = None) -> Tensor:
    """Where Grad-CAM's map of an image changes when a square at ``place`` does, ``(H, W)``."""
    base = torch.randn(1, 3, *size)
    planted = base.clone()
    top, left = place
    planted[:, :, top : top + side, left : left + side] += 4
    before, after = (GradCAM(model, layer, relu=False).attribute(x, target=2)[0, 0] for x in (base, planted))
    return (after - before).abs()


def centre(change: Tensor) -> tuple[float, float]:
    weights = change.double().square()
    rows, columns = (torch.arange(n, dtype=torch.float64) + 0.5 for n in change.shape)
    return (
        float((weights.sum(1) * rows).sum() / weights.sum()),
        float((weights.sum(0) * columns).sum() / weights.sum()),
    )


def check_places(model: nn.Module, size: tuple[int, int], side: int, near: float, layer: Any = None) -> None:
    """Four places, two of them outside of the square that a wrong aspect would see."""
    (height, width), half = size, side / 2
    for top in (0, height - side):
        for left in (0, width - side):
            y, x = centre(moved(model, size, (top, left), side, layer))
            assert abs(y - top - half) < near, (top, left, y, x)
            assert abs(x - left - half) < near, (top, left, y, x)


# --- images that are not square -------------------------------------------------------------------------------------

WIDE, TALL = (64, 128), (128, 64)


@pytest.mark.parametrize("size", [WIDE, TALL])
def test_a_cnn(size):
    check_places(resnet(), size, side=16, near=20, layer="layer2")
    check_places(resnet(), size, side=16, near=24)


@pytest.mark.parametrize("size", [WIDE, TALL])
def test_a_vit_of_dynamic_size(size):
    check_places(vit(img_size=64, dynamic_img_size=True), size, side=16, near=16)
    check_places(vit(img_size=64, dynamic_img_size=True, reg_tokens=4), size, side=16, near=16)


@pytest.mark.parametrize("size", [WIDE, TALL])
def test_a_swin(size):
    """With random weights a window answers as a whole: a window is 16 pixels wide in the first stage, then 32."""
    check_places(swin_of(size), size, side=16, near=16, layer="layers.0")
    check_places(swin_of(size), size, side=16, near=32, layer="layers.1")


# --- a network of one's own -----------------------------------------------------------------------------------------


class Net(nn.Module):
    """Convolutions with names of their own, functions instead of modules, two classes of stages."""

    def __init__(self) -> None:
        super().__init__()
        self.eyes = nn.Conv2d(3, 8, 3, 2, 1)
        self.brain = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(2, b)) for a, b in ((8, 12), (12, 16))
        )
        self.mouth = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.eyes(x))
        for part in self.brain:
            x = nn.functional.gelu(part(x))
        return self.mouth(x.amax((2, 3)))


def test_a_cnn_of_ones_own_needs_no_hint():
    model, inputs = lively(Net()), torch.randn(2, 3, 48, 64)
    assert [tap.name for tap in TTAME(model, recipe="paper").taps(inputs)] == ["eyes", "brain.0", "brain.1"]
    assert [tap.name for tap in GradCAM(model).taps(inputs)] == ["brain.1"]
    for method in (GradCAM, LayerCAM, ScoreCAM):
        assert method(model).attribute(inputs, target=[0, 3]).any()


class Patches(nn.Module):
    """A vision transformer of one's own, without a convolution: nothing shows the size of its grid."""

    def __init__(self, size: tuple[int, int] = (50, 70), patch: int = 10, dim: int = 24) -> None:
        super().__init__()
        count = size[0] // patch * (size[1] // patch)
        self.patch = patch
        self.embed = nn.Linear(3 * patch * patch, dim)
        self.special = nn.Parameter(torch.zeros(1, 3, dim))  # a class token and two more
        self.where = nn.Parameter(torch.zeros(1, count + 3, dim))
        layer = nn.TransformerEncoderLayer(dim, 3, 2 * dim, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        p = self.patch
        cells = x.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        tokens = torch.cat([self.special.expand(len(x), -1, -1), self.embed(cells)], 1) + self.where
        return self.head(self.norm(self.encoder(tokens)).mean(1))


def own_vit() -> nn.Module:
    torch.manual_seed(0)
    return lively(Patches())


def test_a_vit_of_ones_own_takes_one_hint():
    """``prefix`` is all that must be said: the patches have the image's aspect."""
    hint = ("encoder.layers.1", Grid("tokens", prefix=3))
    model, inputs = own_vit(), torch.randn(2, 3, 50, 70)
    (tap,) = GradCAM(model, hint).taps(inputs)
    assert tap.grid == Grid("tokens", prefix=3, hw=(5, 7))
    check_places(model, (50, 70), side=10, near=12, layer=hint)
    names = [(f"encoder.layers.{i}", Grid("tokens", prefix=3)) for i in (0, 1)]
    assert [tap.grid.hw for tap in TTAME(model, names, recipe="paper").taps(inputs)] == [(5, 7), (5, 7)]


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        (Grid("tokens", prefix=3, hw=(7, 5)), r"it does as Grid\('tokens', prefix=3, hw=\(5, 7\)\)"),
        (Grid("tokens", prefix=2, hw=(4, 9)), r"Grid\('tokens', prefix=3, hw=\(5, 7\)\)"),
        (Grid("tokens", prefix=1), "tokens need hw=|must have"),  # 37 is prime
        (Grid("tokens", prefix=4, hw=(5, 7)), r"must have 4 \+ 5x7 = 39 tokens, got shape"),
    ],
)
def test_a_wrong_hint_is_refused(grid, says):
    with pytest.raises(LayerError, match=says):
        GradCAM(own_vit(), ("encoder.layers.1", grid)).attribute(torch.randn(1, 3, 50, 70), 0)


def test_without_the_hint_it_says_what_to_give():
    """Strides of 10 are no usual ones, so a size is not guessed."""
    with pytest.raises((LayerError, UnsupportedModelError), match=r"Grid\("):
        GradCAM(own_vit(), "encoder.layers.1").attribute(torch.randn(1, 3, 50, 70), 0)


# ---------------------------------------------------------------------- views folded into the batch


class FiveCrops(nn.Module):
    """Averages the scores of four corners and the centre, as a test-time augmentation does."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        h, w = x.shape[2] // 4, x.shape[3] // 4
        views = [x[:, :, a : a + 3 * h, b : b + 3 * w] for a, b in ((0, 0), (0, w), (h, 0), (h, w), (h // 2, w // 2))]
        return self.net(torch.stack(views, 1).flatten(0, 1)).unflatten(0, (len(x), 5)).mean(1)


@pytest.mark.parametrize("layers", [None, "net.stages.1"])
def test_views_in_the_batch_are_told_from_a_layer_without_a_map(layers):
    net = tiny_cnn()
    images = torch.rand(2, 3, 32, 32)
    with pytest.raises((UnsupportedModelError, LayerError), match=r"there are 5 for one: it folds views") as caught:
        GradCAM(FiveCrops(net), layers).attribute(images, target=1)
    assert "explain the network inside" in str(caught.value)
    for libra in (True, False):
        with pytest.raises(UnsupportedModelError, match=r"there are 5 for one: it folds views"):
            FullGrad(FiveCrops(net), libra=libra).attribute(images, target=1)
    assert GradCAM(net).attribute(images[:, :, :24, :24], target=1).any()


# ---------------------------------------------------------------------- adapters


class Adapted(nn.Module):
    """What LoRA makes of a linear layer: the layer itself, and a product of two small matrices beside it."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.base_layer = layer
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))

    def merged(self):
        merged = copy.deepcopy(self.base_layer)
        merged.weight.data += self.up.weight.data @ self.down.weight.data
        return merged


def test_attention_methods_ask_for_merged_adapters():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=5).eval()
    merged, images = copy.deepcopy(model), torch.randn(2, 3, 64, 64)
    for block, whole in zip(model.blocks, merged.blocks, strict=True):
        block.attn.qkv = Adapted(block.attn.qkv)
        whole.attn.qkv = block.attn.qkv.merged()
    for kind in (AttentionRollout, GenericAttention, TransformerLRP):
        with pytest.raises(UnsupportedModelError, match=r"adapters \(LoRA\).*model\.merge_and_unload\(\)"):
            kind(model).attribute(images, target=1)
        assert kind(merged).attribute(images, target=1).any()
    for kind in (GradCAM, LayerCAM):
        found, wanted = (kind(m).attribute(images, target=1) for m in (model, merged))
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))


def test_adapters_of_peft_are_merged_as_the_error_says():
    peft = pytest.importorskip("peft", reason="it makes the adapters")
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=5).eval()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False)).eval()
    images = torch.randn(2, 3, 64, 64)
    with pytest.raises(UnsupportedModelError, match=r"model\.merge_and_unload\(\)"):
        GenericAttention(adapted).attribute(images, target=1)
    cam = GradCAM(adapted).attribute(images, target=1)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(GradCAM(merged).attribute(images, target=1), cam, rtol=1e-3, atol=1e-6)
    assert GenericAttention(merged).attribute(images, target=1).any()
