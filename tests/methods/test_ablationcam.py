"""Ablation-CAM against closed forms and Captum's ablation of layers, and what its passes cost."""

from __future__ import annotations

import engine_cases as cases
import perturbation_cases as passes
import pytest
import strategies as zoo
import torch
from captum.attr import LayerFeatureAblation
from hypothesis import given, settings
from hypothesis import strategies as st
from perturbation_cases import close
from torch import nn

from attrib_zoo import AblationCAM
from attrib_zoo.errors import OptionError


def features(model, layer, images):
    kept = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _, __, out: kept.append(out.detach().clone()))
    model(images)
    handle.remove()
    return kept[-1]


def captum_drops(model, layer, images, target, channel_axis):
    """``y - y_k`` for each channel, (N, D)."""
    shape = features(model, layer, images).shape
    mask = torch.arange(shape[channel_axis])
    mask = mask.view([-1 if axis == channel_axis else 1 for axis in range(len(shape))])
    ablation = LayerFeatureAblation(model, model.get_submodule(layer))
    drops = ablation.attribute(images, target=target, layer_mask=mask)
    return drops.movedim(channel_axis, 1).flatten(2)[:, :, 0]


# ---------------------------------------------------------------------- closed form


@settings(max_examples=5)
@given(st.integers(1, 9), st.integers(2, 5), st.integers(1, 3), st.integers(1, 40), zoo.SEEDS)
def test_behind_mean_pooling_the_drop_is_the_maps_share_of_the_logit(width, classes, n, chunk, seed):
    model = cases.lively(zoo.SmallCNN((3, width), classes), seed % 1000).double()
    images, targets = zoo.normal(n, 3, 8, 12, seed=seed), [(seed + i) % classes for i in range(n)]
    maps, logits = features(model, "stages.1", images), model(images).detach()
    own = logits[range(n), targets]
    weights = model.head.weight[targets].detach() * maps.mean((2, 3))
    for divisor, scale in (("abs", own.abs()), ("paper", own), ("none", torch.ones_like(own))):
        explainer = AblationCAM(model, divisor=divisor, relu=False, upsample=False, chunk_size=chunk)
        wanted = torch.einsum("nd,ndhw->nhw", weights / scale[:, None], maps)
        close(explainer.attribute(images, targets)[:, 0], wanted, 1e-9)


def test_a_negative_score_keeps_the_sign_of_the_map():
    model, images = cases.lively(zoo.SmallCNN()).double(), zoo.batch(2, dtype=torch.float64)
    before = AblationCAM(model, divisor="none", relu=False).attribute(images, 1)
    with torch.no_grad():
        model.head.bias.sub_(50)
    logits = model(images)[:, 1].detach()
    assert (logits < 0).all()
    scale = logits.abs().view(-1, 1, 1, 1)
    close(AblationCAM(model, relu=False).attribute(images, 1), before / scale, 1e-8)
    close(AblationCAM(model, relu=False, divisor="paper").attribute(images, 1), -before / scale, 1e-8)
    close(AblationCAM(model).attribute(images, 1), before.clamp(min=0) / scale, 0.1)
    model.head.bias.data.fill_(0)
    model.head.weight.data.fill_(0)
    assert AblationCAM(model, divisor="paper").attribute(images, 1).abs().sum() == 0


# ---------------------------------------------------------------------- Captum


def vit():
    return cases.vit(global_pool="token")


@pytest.mark.parametrize(
    ("build", "layer", "axis", "size"),
    [
        (cases.resnet, "layer3", 1, 32),
        (cases.resnet, "layer4.1.conv1", 1, 32),
        (vit, "blocks.1.norm1", 2, 32),
        (cases.swin, "layers.0", 3, 16),
    ],
    ids=["stage", "before an in-place norm", "tokens", "channels last"],
)
@pytest.mark.parametrize("score", ["logit", "softmax"])
def test_against_captum(build, layer, axis, size, score):
    model = build().double()
    images = zoo.normal(2, 3, size, size)
    head = model if score == "logit" else nn.Sequential(model, nn.Softmax(1))
    place = layer if score == "logit" else f"0.{layer}"
    drops = captum_drops(head, place, images, [1, 3], axis)
    maps = features(model, layer, images)
    if axis == 2:
        maps = maps[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    maps = maps.permute(0, 3, 1, 2) if axis == 3 else maps
    wanted = torch.einsum("nd,ndhw->nhw", drops, maps)
    assert drops.std() > 1e-4
    explainer = AblationCAM(model, layer, score=score, divisor="none", relu=False, upsample=False, chunk_size=7)
    close(explainer.attribute(images, [1, 3])[:, 0], wanted, 1e-9)


def test_the_means_of_the_maps_as_filling():
    model, images = cases.lively(zoo.SmallCNN()).double(), zoo.batch(2, dtype=torch.float64)
    maps = features(model, "stages.1", images)
    tail = nn.Sequential(model.stages[2], nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.head)
    weights = torch.zeros(2, maps.shape[1], dtype=torch.float64)
    with torch.no_grad():
        for n in range(2):
            for k in range(maps.shape[1]):
                changed = maps[n : n + 1].clone()
                changed[0, k] = maps[n, k].mean()
                weights[n, k] = (tail(maps[n : n + 1]) - tail(changed))[0, 2]
    found = AblationCAM(model, "stages.1", fill="mean", divisor="none", relu=False, upsample=False)
    close(found.attribute(images, 2)[:, 0], torch.einsum("nd,ndhw->nhw", weights, maps), 1e-9)


def test_pytorch_grad_cam_where_it_is_right():
    """On maps that are not negative it sets an ablated map to 0 as well."""
    library = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, images = zoo.small_cnn((4, 6)), zoo.batch(1)
    theirs = library.AblationCAM(model, [model.stages[1]])(images, [ClassifierOutputTarget(2)])[0]
    found = AblationCAM(model, "stages.1").attribute(images, 2)[0, 0]
    found = (found - found.min()) / (found.max() - found.min())
    assert torch.corrcoef(torch.stack([found.flatten(), torch.tensor(theirs).flatten()]))[0, 1] > 0.99


# ---------------------------------------------------------------------- passes


class Steps(nn.Module):
    """Counts the images that go through the first stage and through the head."""

    def __init__(self):
        super().__init__()
        self.model = cases.lively(zoo.SmallCNN((4, 6, 8)))
        self.stem, self.head = 0, 0
        self.model.stages[0][0].register_forward_pre_hook(lambda _, x: self.add("stem", x))
        self.model.head.register_forward_pre_hook(lambda _, x: self.add("head", x))

    def add(self, name, x):
        setattr(self, name, getattr(self, name) + len(x[0]))

    def forward(self, x):
        return self.model(x)


@pytest.mark.parametrize("targets", [[1], [1, 2, 3, 4, 0, 1, 2, 3, 4, 0]])
def test_the_image_goes_through_the_first_stage_once(targets):
    model, images = Steps(), zoo.batch(3)
    with torch.no_grad():  # a dead map needs no pass
        model.model.stages[2][1].weight[2], model.model.stages[2][1].bias[2] = 0, -1
    explainer = AblationCAM(model, chunk_size=5)
    explainer.attribute(images, 0)
    alive = int((features(model, "model.stages.2", images).flatten(2).abs().sum(2) > 0).sum())
    assert alive < 24
    model.stem = model.head = 0
    explainer.attribute_many(images, targets)
    assert model.stem == 3
    assert model.head == 3 + 3 + alive  # the clean pass, the self-check of the replay, the ablations


def test_an_error_inside_a_pass_leaves_the_model_alone():
    model, images = cases.lively(zoo.SmallCNN()), zoo.batch(2)
    explainer = AblationCAM(model)
    explainer.attribute(images, 0)
    calls = iter(range(100))

    def fail(*_):
        if next(calls) == 4:
            raise KeyboardInterrupt

    handle = model.head.register_forward_pre_hook(fail)
    with cases.untouched(model, images), pytest.raises(KeyboardInterrupt):
        AblationCAM(model, chunk_size=2).attribute(images, 0)
    handle.remove()


@settings(max_examples=5)
@given(st.permutations(range(8)))
def test_the_order_of_the_maps_says_nothing(order):
    model, images = zoo.small_cnn().double(), zoo.batch(2, dtype=torch.float64)
    wanted = AblationCAM(model).attribute(images, [0, 3])
    passes.reorder_last_stage(model, order)
    close(AblationCAM(model).attribute(images, [0, 3]), wanted, 1e-8)


def test_several_layers_give_the_mean():
    model, images = zoo.small_cnn().double(), zoo.batch(2, dtype=torch.float64)
    one, two = (AblationCAM(model, layer).attribute(images, 1) for layer in ("stages.1", "stages.2"))
    close(AblationCAM(model, ["stages.2", "stages.1"]).attribute(images, 1), (one + two) / 2)


@pytest.mark.parametrize("options", [{"divisor": "y"}, {"fill": 0}, {"score": "p"}, {"chunk_size": -1}], ids=str)
def test_wrong_options(options):
    (name,) = options
    with pytest.raises(OptionError, match=f"{name}: must be"):
        AblationCAM(zoo.small_cnn(), **options)
