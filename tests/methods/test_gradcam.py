"""Grad-CAM against closed forms and against passes written out by hand, in float64."""

from __future__ import annotations

import warnings

import engine_cases as cases
import pytest
import strategies as zoo
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attrib_zoo import GradCAM
from attrib_zoo.errors import LayerError, OptionError
from attrib_zoo.methods.bases import gradient_cam as _cam


def close(found, wanted, tolerance=1e-10):
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * max(1e-30, float(wanted.abs().max())))


class Pooled(nn.Module):
    """A convolution, mean pooling and a linear head: Grad-CAM has a closed form here."""

    def __init__(self, width=6, classes=4):
        super().__init__()
        self.features = nn.Conv2d(3, width, 3, 2, 1)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def pooled(**options):
    return cases.lively(Pooled(**options)).double()


# ---------------------------------------------------------------------- closed form


@settings(max_examples=25)
@given(st.integers(1, 8), st.integers(2, 5), st.integers(1, 3), st.integers(4, 9), st.integers(4, 9), zoo.SEEDS)
def test_behind_mean_pooling_the_weights_are_the_heads_over_the_area(width, classes, n, height, length, seed):
    model = pooled(width=width, classes=classes)
    images = zoo.normal(n, 3, height, length, seed=seed)
    targets = [(seed + i) % classes for i in range(n)]
    maps = model.features(images).detach()
    area = maps.shape[2] * maps.shape[3]
    wanted = torch.stack(
        [
            sum(model.head.weight[c, d].item() / area * m[d] for d in range(width))
            for m, c in zip(maps, targets, strict=True)
        ]
    ).unsqueeze(1)
    signed = GradCAM(model, "features", relu=False, upsample=False).attribute(images, targets)
    close(signed, wanted)
    close(GradCAM(model, "features", upsample=False).attribute(images, targets), wanted.clamp(min=0))
    grown = F.interpolate(wanted.clamp(min=0), size=(height, length), mode="bilinear", align_corners=False)
    close(GradCAM(model, "features").attribute(images, targets), grown.expand(n, 3, height, length))


@pytest.mark.parametrize("score", ["softmax", "logsoftmax", "sigmoid"])
def test_scores_other_than_the_logit(score):
    """The chain rule by hand: d score / d logits times the head's weights."""
    model, images, c = pooled(), zoo.normal(3, 3, 6, 8), 2
    maps = model.features(images).detach()
    logits = model(images).detach()
    p, one = logits.softmax(1), torch.eye(4, dtype=torch.float64)[c]
    slope = {
        "softmax": p[:, c : c + 1] * (one - p),
        "logsoftmax": one - p,
        "sigmoid": one * (logits.sigmoid() * (1 - logits.sigmoid()))[:, c : c + 1],
    }[score]
    weights = slope @ model.head.weight.detach() / maps[0, 0].numel()
    wanted = torch.einsum("nd,ndhw->nhw", weights, maps).clamp(min=0).unsqueeze(1)
    close(GradCAM(model, "features", score=score, upsample=False).attribute(images, c), wanted)


def test_none_is_the_decision_of_one_logit_too():
    model, images = pooled(), zoo.normal(5, 3, 8, 8)
    close(GradCAM(model).attribute(images), GradCAM(model).attribute(images, model(images).argmax(1)), 0)
    single = zoo.OneValue(model, column=False)
    difference = GradCAM(model, "features", relu=False).attribute_many(images, [1, 0])
    towards = difference[:, 0] - difference[:, 1]
    cam = GradCAM(single, "model.features", relu=False)
    close(cam.attribute(images, 1), towards)
    close(cam.attribute(images, 0), -towards)
    sign = single(images).detach().sign()
    close(cam.attribute(images), towards * sign.view(-1, 1, 1, 1))


# ---------------------------------------------------------------------- real architectures by hand


def by_hand(model, layer, images, targets, to_map):
    """A plain backward pass with a hook; ``to_map`` says where the layer's cells lie."""
    twin = cases.out_of_place(model)
    kept = []

    def keep(_, __, out):
        out.retain_grad()
        kept.append(out)
        return out.clone()

    twin.get_submodule(layer).register_forward_hook(keep)
    twin(images.clone().requires_grad_())[range(len(images)), targets].sum().backward()
    maps, gradients = to_map(kept[-1].detach()), to_map(kept[-1].grad)
    weights = gradients.mean((2, 3))
    return torch.einsum("nd,ndhw->nhw", weights, maps).unsqueeze(1)


def token_grid(prefix, h, w):
    """Row by row, token by token."""

    def to_map(tokens):
        found = torch.zeros(len(tokens), tokens.shape[2], h, w, dtype=tokens.dtype)
        for row in range(h):
            for column in range(w):
                found[:, :, row, column] = tokens[:, prefix + row * w + column]
        return found

    return to_map


def distilled():
    from timm.models.deit import VisionTransformerDistilled

    return cases.lively(
        VisionTransformerDistilled(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=5)
    )


def timm_test_vit():
    import timm

    return cases.lively(timm.create_model("test_vit", pretrained=False, num_classes=5, img_size=64))


ARCHITECTURES = {
    "resnet": (cases.resnet, "layer4", 64, lambda maps: maps),
    "test_vit": (timm_test_vit, None, 64, None),
    "class and distillation token": (distilled, "blocks.2.norm1", 32, token_grid(2, 4, 4)),
    "registers": (lambda: cases.vit(reg_tokens=4, global_pool="token"), "blocks.2.norm1", 32, token_grid(5, 4, 4)),
    "not square": (
        lambda: cases.vit(img_size=(32, 56), global_pool="token"),
        "blocks.2.norm1",
        (32, 56),
        token_grid(1, 4, 7),
    ),
    "mean of the tokens": (cases.vit, "blocks.2", 32, token_grid(1, 4, 4)),
    "channels last": (cases.swin, "layers.1", 16, lambda maps: maps.permute(0, 3, 1, 2)),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_default_layer_by_hand(name):
    build, layer, size, to_map = ARCHITECTURES[name]
    model = build().double()
    if layer is None:  # as timm says itself
        layer = f"blocks.{len(model.blocks) - 1}.norm1"
        to_map = token_grid(model.num_prefix_tokens, *model.patch_embed.grid_size)
    h, w = (size, size) if isinstance(size, int) else size
    images, targets = zoo.normal(2, 3, h, w), [1, 3]
    wanted = by_hand(model, layer, images, targets, to_map)
    assert wanted.std() > 0
    found = GradCAM(model, relu=False, upsample=False).attribute(images, targets)
    close(found, wanted, 1e-9)
    grown = F.interpolate(wanted.clamp(min=0), size=(h, w), mode="bilinear", align_corners=False)
    close(GradCAM(model).attribute(images, targets), grown.expand(2, 3, h, w), 1e-9)


def test_several_layers_give_the_mean_of_their_maps():
    model, images, targets = cases.resnet().double(), zoo.normal(2, 3, 64, 48), [1, 3]
    names = ["layer4", "layer2", "layer3"]
    each = [by_hand(model, name, images, targets, lambda maps: maps).clamp(min=0) for name in names]
    assert len({m.shape[-2:] for m in each}) > 1
    grown = [F.interpolate(m, size=(64, 48), mode="bilinear", align_corners=False) for m in each]
    found = GradCAM(model, names).attribute(images, targets)
    close(found[:, :1], sum(grown) / 3, 1e-9)
    largest = tuple(max(m.shape[i] for m in each) for i in (-2, -1))
    grown = [F.interpolate(m, size=largest, mode="bilinear", align_corners=False) for m in each]
    close(GradCAM(model, names, upsample=False).attribute(images, targets), sum(grown) / 3, 1e-9)


# ---------------------------------------------------------------------- several targets


class NoVmap(torch.autograd.Function):
    """Doubles; its backward looks at a value, which batched gradients do not allow."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient if gradient.sum().item() < 1e9 else gradient


class Stubborn(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return NoVmap.apply(self.model(x))


def vit():
    return cases.vit(global_pool="token")


@pytest.mark.parametrize(
    "build", [cases.resnet, vit, cases.swin, lambda: Stubborn(cases.resnet())], ids=["cnn", "vit", "swin", "no vmap"]
)
def test_several_targets_are_the_single_ones(build):
    model = build().double()
    size = 16 if "Swin" in type(model).__name__ else 32
    images = zoo.normal(3, 3, size, size)
    table = [[0, 4, 4], [2, 1, 3], [3, 3, 0]]
    explainer = GradCAM(model)
    many = explainer.attribute_many(images, table)
    assert many.shape == (3, 3, 3, size, size)
    for t in range(3):
        close(many[:, t], explainer.attribute(images, [row[t] for row in table]))
    close(explainer.attribute_many(images, [2]), explainer.attribute(images, 2).unsqueeze(1))


def test_the_loop_is_taken_where_batched_gradients_fail(monkeypatch):
    calls = []
    plain = torch.autograd.grad

    def counted(*args, **options):
        calls.append(options.get("is_grads_batched", False))
        return plain(*args, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    model, images = pooled(), zoo.normal(2, 3, 8, 8)
    GradCAM(model, "features").attribute_many(images, [0, 1, 2])
    assert calls == [True]
    calls.clear()
    GradCAM(Stubborn(model), "model.features").attribute_many(images, [0, 1, 2])
    assert calls == [True, False, False, False]


@pytest.mark.parametrize("build", [pooled, lambda: Stubborn(pooled())])
def test_more_targets_than_fit_in_one_go(build, monkeypatch):
    monkeypatch.setattr(_cam, "_TARGETS_AT_ONCE", 3)
    model, images = build(), zoo.normal(2, 3, 8, 8)
    targets = [0, 1, 2, 3, 3, 2, 1, 0]
    explainer = GradCAM(model, -1 if isinstance(model, Pooled) else "model.features")
    many = explainer.attribute_many(images, targets)
    for t, target in enumerate(targets):
        close(many[:, t], explainer.attribute(images, target))


# ---------------------------------------------------------------------- no gradient


def test_a_layer_whose_patch_tokens_the_head_does_not_read():
    model = vit()
    words = r"at the patch tokens of 'blocks\.2' is exactly zero; .* use the first normalisation layer"
    with cases.untouched(model), pytest.raises(LayerError, match=words):
        GradCAM(model, "blocks.2").attribute(cases.images(2), 1)
    assert GradCAM(model, "blocks.1").attribute(cases.images(2), 1).amax() > 0


def test_a_score_that_does_not_change_is_said_once_and_gives_zero():
    model = pooled()
    with torch.no_grad():
        model.head.weight[2] = 0
    images = zoo.normal(2, 3, 8, 8)
    with pytest.warns(
        UserWarning, match=r"GradCAM: the gradient at 'features' is exactly zero, so the map is zero"
    ) as caught:
        found = GradCAM(model, "features").attribute(images, 2)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert not found.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GradCAM(model, "features").attribute(images, [2, 1])  # one of the two has a gradient


def test_a_layer_beside_the_path_to_the_score():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.aside, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x):
            self.aside(x)
            return self.head(self.main(x).mean((2, 3)))

    model = Aside()
    with cases.untouched(model):
        with pytest.raises(LayerError, match=r"no gradient path from 'aside'"):
            GradCAM(model, "aside").attribute(cases.images(2), 1)
        with pytest.raises(LayerError, match=r"no gradient path from 'aside' to the score; the outputs do not use"):
            GradCAM(model, ["aside", "main"]).attribute(cases.images(2), 1)
        with pytest.raises(LayerError, match=r"no gradient path from 'aside'"):
            GradCAM(model, ["aside", "main"]).attribute_many(cases.images(2), [1, 2])


def test_a_layer_behind_which_gradients_are_off():
    class Closed(Pooled):
        def forward(self, x):
            maps = self.features(x)
            with torch.no_grad():
                return self.head(maps.mean((2, 3)))

    with pytest.raises(LayerError, match=r"no gradient path from 'features' .*no_grad"):
        GradCAM(Closed(), "features").attribute(cases.images(2), 1)


# ---------------------------------------------------------------------- options


def test_options():
    with pytest.raises(
        OptionError, match=r"score: must be one of 'logit', 'softmax', 'logsoftmax', 'sigmoid', got 'prob'"
    ):
        GradCAM(pooled(), score="prob")


# ---------------------------------------------------------------------- it looks where the evidence is


class Spotter(nn.Module):
    """Class k answers to colour k, wherever it is: planted evidence without training."""

    def __init__(self):
        super().__init__()
        self.look = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(4)
        self.head = nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.look.weight.copy_(torch.eye(3)[:, :, None, None].expand(3, 3, 3, 3) / 9)
            self.head.weight.copy_(1.5 * torch.eye(3) - 0.5)

    def forward(self, x):
        return self.head(self.pool(self.look(x).relu()).mean((2, 3)))


@pytest.mark.parametrize("layer", ["pool", "look"])
def test_a_planted_change_moves_the_map_to_its_place(layer):
    explainer = GradCAM(Spotter(), layer)
    for row, column, colour in ((4, 20, 0), (20, 4, 1), (12, 12, 2)):
        image = torch.zeros(1, 3, 32, 32)
        image[0, colour, row : row + 8, column : column + 8] = 1
        image[0, (colour + 1) % 3, (row + 16) % 24 : (row + 16) % 24 + 8, column : column + 8] = 0.9  # other evidence
        heat = explainer.attribute(image, colour)[0, 0]
        inside = heat[row : row + 8, column : column + 8].sum() / heat.sum()
        assert inside > 0.4  # of 6 % of the image; the rest is the blur of the grid
        peak = divmod(int(heat.argmax()), 32)
        assert row <= peak[0] < row + 8
        assert column <= peak[1] < column + 8
        other = explainer.attribute(image, (colour + 1) % 3)[0, 0]
        assert other[row : row + 8, column : column + 8].sum() / other.sum() < 0.1


def test_a_local_change_of_the_image_changes_the_map_there():
    model = cases.lively(Pooled(width=8)).double()
    images = zoo.normal(1, 3, 32, 32)
    changed = images.clone()
    changed[..., 8:12, 20:24] += 3
    explainer = GradCAM(model, "features", relu=False)
    moved = (explainer.attribute(changed, 1) - explainer.attribute(images, 1)).abs()[0, 0]
    near = torch.zeros(32, 32, dtype=torch.bool)
    near[4:17, 16:29] = True  # the change, the convolution's reach and the upsampling's
    assert moved[near].max() > 0
    assert moved[~near].max() <= 1e-9 * moved.max()
