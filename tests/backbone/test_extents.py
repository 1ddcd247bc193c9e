"""Where grids lie: the map of a model that pads inside is that of the image padded outside, cut to the image."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attrib_zoo
from attrib_zoo.backbone.layers import look, resolve
from attrib_zoo.backbone.layers.extents import Extents
from attrib_zoo.backbone.layers.gridcheck import probe
from attrib_zoo.benchmark import evaluate
from attrib_zoo.masking import placed, upsample, upsampler
from attrib_zoo.metrics import average_drop, deletion

SIZE = (70, 90)
FROM_ONE_PASS = [
    ("GradCAM", {}),
    ("GradCAM", {"layers": ["blocks.1", "blocks.2.norm1"]}),
    ("LayerCAM", {"layers": ["blocks.0", "blocks.1"]}),
    ("HiResCAM", {"upsample": True, "smooth": 3, "scale": "rank"}),
    ("AblationCAM", {}),
    ("AttentionRollout", {}),
    ("GenericAttention", {}),
    ("TransformerLRP", {}),
]


def vit(**options):
    timm = pytest.importorskip("timm", reason="its models are optional")
    torch.manual_seed(0)
    options = {"depth": 3, "num_classes": 5, "embed_dim": 48, "num_heads": 3, "dynamic_img_size": True, **options}
    return timm.create_model("vit_tiny_patch16_224", **options).eval()


def images(height=SIZE[0], width=SIZE[1], count=2):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def close(found, wanted):
    """To a millionth of the largest value; and that value is no zero."""
    top = float(wanted.abs().max())
    assert top > 0
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 * top)


def enlarged(small, size):
    return F.interpolate(small, size=size, mode="bilinear", align_corners=False)


def pixels(model, size):
    """Top, bottom, left and right in pixels of the last three stages."""
    inputs = images(*size, count=1)
    traced = look(model, inputs)
    found = {}
    for tap in resolve(model, None, inputs, count=3, traced=traced):
        call = [call for call in traced.calls() if call.name == tap.name][-1]
        hw = next(output.hw for output in call.outputs if output.grid)
        whole = (size[0], size[0], size[1], size[1])
        found[hw] = tuple(round(part * side, 3) for part, side in zip(traced.extents.of(hw), whole, strict=True))
    return found


# ---------------------------------------------------------------------- padding


@pytest.mark.parametrize(("name", "options"), FROM_ONE_PASS)
def test_a_transformer_that_pads_the_image(name, options):
    model = vit(dynamic_img_pad=True)
    explainer = getattr(attrib_zoo, name)(model, **options)
    inputs = images()
    outside = F.pad(inputs, (0, 6, 0, 10))  # to 80x96
    close(explainer.attribute(inputs, target=1), explainer.attribute(outside, target=1)[:, :, :70, :90])


def test_masks_lie_where_the_map_does():
    """Score-CAM scores what each feature map shows: of the grid's part that is in the image."""
    model = vit(dynamic_img_pad=True)
    inputs, seen = images(count=1), []
    explainer = attrib_zoo.ScoreCAM(model, layers="blocks.1", variant="torchcam", chunk_size=1)
    explainer.masks = lambda maps, size: (
        seen.append((maps, attrib_zoo.ScoreCAM.masks(explainer, maps, size))) or (seen[-1][1])
    )
    explainer.attribute(inputs, target=1)
    assert len(seen) > 9
    for maps, mask in seen:
        low = maps.amin((-2, -1), keepdim=True)
        scaled = (maps - low) / (maps.amax((-2, -1), keepdim=True) - low)
        close(mask, enlarged(scaled, (80, 96))[:, :, :70, :90])


class Merging(nn.Module):
    """Swin's: odd grids get a row or column of zeros behind, then 2x2 cells become one."""

    def __init__(self, channels, where):
        super().__init__()
        self.mix, self.where = nn.Linear(4 * channels, 2 * channels, bias=False), where

    def forward(self, x):
        h, w = x.shape[1] % 2, x.shape[2] % 2
        before = self.where == "before"
        x = F.pad(x, (0, 0, w * before, w * (not before), h * before, h * (not before)))
        n, rows, columns, c = x.shape
        x = x.reshape(n, rows // 2, 2, columns // 2, 2, c).permute(0, 1, 3, 2, 4, 5).flatten(3)
        return self.mix(x)


class Merges(nn.Module):
    """Padding with zeros anywhere is padding the image with zeros, since nothing has a bias."""

    def __init__(self, where):
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, 4, bias=False)
        self.first, self.second = Merging(6, where), Merging(12, where)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = self.patches(x).permute(0, 2, 3, 1)
        x = self.second(self.first(x).relu()).relu()
        return self.head(x.sum((1, 2)))


@pytest.mark.parametrize("where", ["behind", "before"])
@pytest.mark.parametrize("layer", ["first", "second"])
def test_patches_that_are_merged(where, layer):
    torch.manual_seed(0)
    model, inputs = Merges(where).eval(), images(44, 72)  # 11x18 cells of 4 pixels
    rows, columns = (4, 0) if layer == "first" else (4, 8)  # to 6x9 cells of 8 pixels, and 3x5 of 16
    outside = F.pad(inputs, (0, columns, 0, rows) if where == "behind" else (columns, 0, rows, 0))
    top, left = (0, 0) if where == "behind" else (rows, columns)
    whole = attrib_zoo.GradCAM(model, layers=layer).attribute(outside, target=2)
    found = attrib_zoo.GradCAM(model, layers=layer).attribute(inputs, target=2)
    close(found, whole[:, :, top : top + 44, left : left + 72])


def test_layers_that_cover_more_and_less_are_joined_where_they_lie():
    torch.manual_seed(0)
    model, inputs = Merges("before").eval(), images(44, 72)
    one, two = (attrib_zoo.GradCAM(model, layers=layer).attribute(inputs, target=2) for layer in ("first", "second"))
    close(attrib_zoo.GradCAM(model, layers=["first", "second"]).attribute(inputs, target=2), (one + two) / 2)


def test_swin_with_odd_grids():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.SwinTransformer([4, 4], 12, [1, 1, 1, 1], [1, 2, 3, 4], [7, 7], num_classes=5).eval()
    inputs = images()
    for layer, cell in (("features.3", 8), ("features.5", 16), ("features.7", 32)):
        explainer = attrib_zoo.GradCAM(model, layers=layer)
        full = explainer.attribute(inputs, target=1)
        explainer.upsample = False
        small = explainer.attribute(inputs, target=1)
        h, w = small.shape[-2:]
        assert (h, w) == (-(-68 // cell), -(-88 // cell)), "the patches of 4 pixels leave 2 at both borders out"
        edge = F.pad(enlarged(small, (h * cell, w * cell)), (0, 8, 0, 8), mode="replicate")
        close(full[:, :1], edge[:, :, :70, :90])


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate"])
def test_padding_on_all_sides(mode):
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 6, 8, 8), nn.ReLU(), nn.Conv2d(6, 6, 3, 1, 1), nn.ReLU())
            self.head = nn.Linear(6, 5)

        def forward(self, x):
            return self.head(self.net(F.pad(x, PADS, mode=mode)).mean((2, 3)))

    PADS = (5, 9, 3, 7)  # 30x34 to 40x48
    torch.manual_seed(0)
    model, inputs = Padded().eval(), images(30, 34)
    explainer = attrib_zoo.GradCAM(model, layers="net.3", upsample=False)
    small = explainer.attribute(inputs, target=1)
    explainer.upsample = True
    close(explainer.attribute(inputs, target=1)[:, :1], enlarged(small, (40, 48))[:, :, 3:33, 5:39])


class Inside(nn.Module):
    """A classifier behind what makes its images larger."""

    def __init__(self, net, pads, how="pad"):
        super().__init__()
        self.net, self.pads, self.how = net, pads, how

    def forward(self, x):
        left, right, top, bottom = self.pads
        if self.how == "canvas":
            h, w = x.shape[-2:]
            whole = x.new_zeros(len(x), 3, top + h + bottom, left + w + right)
            whole[:, :, top : top + h, left : left + w] = x
            return self.net(whole.to(memory_format=torch.channels_last))
        if self.how == "channels-last canvas":
            h, w = x.shape[-2:]
            whole = torch.zeros(len(x), 3, top + h + bottom, left + w + right).to(memory_format=torch.channels_last)
            whole[:, :, top : top + h, left : left + w].copy_(x)
            return self.net(whole)
        if self.how == "concatenation":
            n, c, _, w = x.shape
            x = torch.cat([x.new_zeros(n, c, top, w), x, x.new_zeros(n, c, bottom, w)], dim=2)
            sides = [x.new_zeros(n, c, x.shape[2], side) for side in (left, right)]
            return self.net(torch.cat([sides[0], x, sides[1]], dim=-1))
        return self.net(F.pad(x, self.pads, mode="reflect" if self.how == "mirror" else "constant"))


def small_cnn(kernel=3, padding=1):
    convolutions = (nn.Conv2d(3, 8, kernel, 4, padding), nn.ReLU(), nn.Conv2d(8, 8, kernel, 4, padding), nn.ReLU())
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def of_timm(name):
    return pytest.importorskip("timm", reason="its models are optional").create_model(name, num_classes=5)


NETS = {
    "windows that leave pixels out": small_cnn,
    "windows that overlap, without padding": lambda: small_cnn(6, 0),
    "ResNet": lambda: of_timm("test_resnet"),
    "padding for each convolution": lambda: of_timm("test_efficientnet"),
    "padding by an operator for each convolution": lambda: of_timm("tf_mobilenetv3_small_minimal_100"),
    "mirrored for each blur": lambda: of_timm("resnetblur18"),
    "ConvNeXt": lambda: of_timm("test_convnext"),
    "ViT": lambda: vit(),
}


@pytest.mark.parametrize("how", ["pad", "mirror", "canvas", "channels-last canvas", "concatenation"])
@pytest.mark.parametrize("net", NETS)
def test_any_network_behind_padding(net, how):
    """A letterbox: the map is that of the padded image, cut to the image."""
    torch.manual_seed(0)
    net, pads, inputs = NETS[net]().eval(), (16, 48, 24, 40), images(64, 96)
    inside = attrib_zoo.LayerCAM(Inside(net, pads, how)).attribute(inputs, target=1)
    outside = F.pad(inputs, pads, mode="reflect" if how == "mirror" else "constant")
    close(inside, attrib_zoo.LayerCAM(net).attribute(outside, target=1)[:, :, 24:88, 16:112])


@pytest.mark.parametrize("pads", [(0, 0, 16, 16), (0, 5, 0, 7), (1, 1, 1, 1)])
@pytest.mark.parametrize("net", ["ResNet", "ViT", "windows that leave pixels out"])
def test_padding_to_a_square_and_by_a_few_pixels(net, pads):
    if net == "ViT" and sum(pads) % 16:
        pytest.skip("its patches would not fit")
    torch.manual_seed(0)
    net, inputs = NETS[net]().eval(), images(64, 96)
    left, _, top, _ = pads
    for method in (attrib_zoo.GradCAM, attrib_zoo.FullGrad):
        outside = method(net).attribute(F.pad(inputs, pads), target=1)[:, :, top : top + 64, left : left + 96]
        close(method(Inside(net, pads)).attribute(inputs, target=1), outside)


# ---------------------------------------------------------------------- cropping


def test_patches_that_leave_pixels_out():
    """Beyond the grid the map is that of the nearest cells; the model does not see these pixels."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 16, 16), nn.ReLU(), nn.Conv2d(6, 6, 3, 1, 1), nn.ReLU())
    model, inputs = nn.Sequential(net, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)).eval(), images()
    explainer = attrib_zoo.GradCAM(model, layers="0.3")
    whole = explainer.attribute(inputs[:, :, :64, :80], target=1)
    close(explainer.attribute(inputs, target=1), F.pad(whole, (0, 10, 0, 6), mode="replicate"))


def test_a_cut_inside_the_model():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 6, 8, 8), nn.ReLU())
            self.head = nn.Linear(6, 5)

        def forward(self, x):
            return self.head(self.net(x[:, :, 4:36, 3:-5]).mean((2, 3)))

    torch.manual_seed(0)
    model, inputs = Cut().eval(), images(44, 56)
    explainer = attrib_zoo.GradCAM(model, layers="net.1", upsample=False)
    small = explainer.attribute(inputs, target=1)
    assert small.shape[-2:] == (4, 6)
    explainer.upsample = True
    found = explainer.attribute(inputs, target=1)[:, :1]
    close(found[:, :, 4:36, 3:51], enlarged(small, (32, 48)))


@pytest.mark.parametrize("net", NETS)
def test_a_cut_by_negative_padding(net):
    torch.manual_seed(0)
    net, inputs = NETS[net]().eval(), images(96, 128)
    inside = attrib_zoo.LayerCAM(Inside(net, (-32, -32, -16, -16))).attribute(inputs, target=1)
    close(inside[:, :, 16:80, 32:96], attrib_zoo.LayerCAM(net).attribute(inputs[:, :, 16:80, 32:96], target=1))


# ---------------------------------------------------------------------- what each kind of network covers


def test_windows_that_overlap_are_spread_over_the_image():
    torchvision = pytest.importorskip("torchvision")
    timm = pytest.importorskip("timm")
    whole = (0, 70, 0, 90)
    for model in (
        torchvision.models.resnet18(),
        timm.create_model("resnet18d"),  # a pooling that tiles in its shortcuts
        timm.create_model("test_efficientnet"),
        timm.create_model("tf_efficientnet_b0"),  # pads before its convolutions
        timm.create_model("resnetblur18"),
    ):
        assert set(pixels(model.eval(), SIZE).values()) == {whole}, type(model).__name__


def test_tiles_cover_what_they_cover():
    timm = pytest.importorskip("timm")
    torchvision = pytest.importorskip("torchvision")
    assert pixels(timm.create_model("test_convnext").eval(), SIZE) == {
        (8, 11): (0, 64, 0, 88),
        (4, 5): (0, 64, 0, 80),
        (2, 2): (0, 64, 0, 64),
    }
    assert pixels(torchvision.models.vgg11().eval(), SIZE)[2, 2] == (0, 64, 0, 64)
    assert pixels(timm.create_model("swinv2_cr_tiny_224", strict_img_size=False).eval(), SIZE)[3, 3] == (0, 96, 0, 96)


@pytest.mark.parametrize("name", ["test_convnext", "test_vit", "test_resnet", "test_efficientnet", "test_nfnet"])
def test_images_that_fit_are_covered_exactly(name):
    timm = pytest.importorskip("timm")
    options = {"dynamic_img_size": True} if "vit" in name else {}
    found = pixels(timm.create_model(name, **options).eval(), (96, 128))
    assert set(found.values()) == {(0, 96, 0, 128)}


def test_a_shift_is_no_padding():
    """NASNet crops on one side and pads on the other: the grid stays where it is."""
    extents = Extents((32, 32))
    given = torch.zeros(1, 3, 32, 32)
    extents.see("aten.constant_pad_nd.default", (given, [-1, 1, -1, 1]), [given])
    assert extents.of((32, 32)) == (0, 1, 0, 1)


def test_the_test_of_grids_knows_what_they_cover():
    """The cells that answer are those where the image changed, on the padded grid."""
    model, inputs = vit(dynamic_img_pad=True, patch_size=32), images(65, 65, count=1)  # 3x3 cells over 96x96 pixels
    traced = look(model, inputs)
    taps = resolve(model, ["patch_embed"], inputs)
    (with_it,), (without,) = probe(model, taps, inputs, traced=traced), probe(model, taps, inputs)
    assert with_it.own > without.own + 0.03
    assert with_it.own > 0.94


# ---------------------------------------------------------------------- enlarging


def test_a_grid_onto_another():
    covers = {(2, 2): (0.0, 1.5, 0.0, 1.0), (6, 4): (-0.25, 1.25, 0.0, 1.0)}
    maps = torch.rand(1, 1, 2, 2, dtype=torch.float64)
    with placed(lambda size: covers[size]):
        found = upsample(maps, (6, 4))
        kept = upsampler()
    torch.testing.assert_close(kept(maps, (6, 4)), found, rtol=0, atol=0)
    rows = [(-0.25 + (i + 0.5) * 0.25) / 1.5 * 2 - 0.5 for i in range(6)]
    rows = [min(max(row, 0), 1) for row in rows]
    wide = enlarged(maps, (2, 4))[0, 0]
    wanted = torch.stack([(1 - row) * wide[0] + row * wide[1] for row in rows])
    torch.testing.assert_close(found[0, 0], wanted)
    torch.testing.assert_close(upsample(maps, (6, 4)), enlarged(maps, (6, 4)))


@pytest.mark.filterwarnings("ignore:fit")
def test_ttame_hides_where_its_map_lies():
    model, inputs = vit(dynamic_img_pad=True), images(count=4)
    shown = []
    explainer = attrib_zoo.TTAME(model, recipe="paper")
    explainer.fit([inputs] * 2, max_steps=2, show_progress=False)
    small = explainer.maps(inputs)
    full = explainer.attribute(inputs, target=1)
    close(full[:, :1], enlarged(small[:, 1:2], (80, 96))[:, :, :70, :90])
    handle = model.patch_embed.register_forward_pre_hook(lambda _, args: shown.append(args[0].detach().clone()))
    generator = torch.Generator().manual_seed(0)
    terms = explainer._terms(explainer.network_, inputs, (), generator)
    handle.remove()
    features = explainer._features(inputs, ())[1]
    own = explainer.network_(features, terms.classes[:, None].to(inputs.device)).sigmoid()
    close(shown[-1], inputs * enlarged(own, (80, 96))[:, :, :70, :90].detach())


@pytest.mark.filterwarnings("ignore:fit")
def test_validation_measures_maps_where_they_lie():
    model, inputs = vit(dynamic_img_pad=True), images(count=4)
    explainer = attrib_zoo.TTAME(model, recipe="paper")
    explainer.fit([inputs] * 2, max_steps=2, val_loader=[inputs], show_progress=False)
    own = model(inputs).argmax(1)
    maps = explainer.maps(inputs)[torch.arange(4), own].unsqueeze(1)
    call = {"target": own, "masking": "standardized"}
    with explainer.placed(inputs):
        wanted = 100 * float(average_drop(model, inputs, maps, **call).mean())
    stretched = 100 * float(average_drop(model, inputs, maps, **call).mean())
    found = explainer.history_.validation[-1]["AD(100)"]
    assert found == pytest.approx(wanted, abs=1e-3)
    assert found != pytest.approx(stretched, abs=1e-2)


def test_measures_enlarge_as_the_method_does():
    model, inputs = vit(dynamic_img_pad=True), images(count=3)
    explainer = attrib_zoo.GradCAM(model)
    target = torch.tensor([0, 1, 2])
    table = evaluate(
        model,
        {"cam": explainer},
        [{"image": inputs, "target": target}],
        metrics={"lost": deletion},
        controls=False,
        show_progress=False,
    )
    maps = explainer.attribute(inputs, target=target)
    wanted = deletion(model, inputs, maps, target=target)
    stretched = deletion(
        model, inputs, attrib_zoo.GradCAM(model, upsample=False).attribute(inputs, target=target), target=target
    )
    found = float(table.values("cam", "lost").mean())
    assert found == pytest.approx(float(wanted.mean()), rel=1e-5)
    assert found != pytest.approx(float(stretched.mean()), rel=1e-4)
