"""Score-CAM against a loop at full resolution, its variants against the libraries they come from, and its passes."""

from __future__ import annotations

import engine_cases as cases
import numpy as np
import perturbation_cases as passes
import pytest
import strategies as zoo
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from perturbation_cases import Counted, close

from attrib_zoo import ScoreCAM
from attrib_zoo.errors import OptionError
from attrib_zoo.masking import black, blur, channel_stats

LAYER = "stages.2"


def scorecam_at_full_resolution(
    model, layer, image, target, score="softmax", hidden=0.0, channel_softmax=False, base=False, mask=None
):
    """The map at full resolution; features must not be negative."""
    size, maps = image.shape[1:], passes.features(model, layer, image)
    mask = mask or (lambda grid: passes.stretch(passes.enlarge(grid, size)))
    weights, total = {}, np.zeros(size)
    for k, grid in enumerate(maps):
        if grid.min() < grid.max():
            weights[k] = passes.score_of(model, passes.show(image, mask(grid), hidden), target, score)
    if base:
        weights = {k: weight - passes.score_of(model, image, target, score) for k, weight in weights.items()}
    if channel_softmax:
        weights = dict(zip(weights, passes.softmax(np.array(list(weights.values()))), strict=True))
    for k, weight in weights.items():
        total += weight * passes.enlarge(maps[k], size)
    return np.maximum(total, 0)


@pytest.fixture
def model():
    return zoo.small_cnn().double()


@pytest.fixture
def images():
    return zoo.batch(3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, {}),
        ({"score": "logit"}, {"score": "logit"}),
        ({"score": "sigmoid"}, {"score": "sigmoid"}),
        ({"channel_softmax": True}, {"channel_softmax": True}),
        ({"subtract_base": True}, {"base": True}),
        (
            {"subtract_base": True, "channel_softmax": True, "score": "logit"},
            {"channel_softmax": True, "score": "logit"},
        ),
        ({"baseline": 0.7}, {"hidden": 0.7}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:ScoreCAM. no weight is positive")
def test_against_a_loop_at_full_resolution(model, images, options, told):
    with torch.no_grad():  # a dead map in the middle
        model.stages[2][1].weight[3], model.stages[2][1].bias[3] = 0, 0.4
    found = ScoreCAM(model, LAYER, **options).attribute(images, [1, 4, 0])
    for n, target in enumerate([1, 4, 0]):
        close(found[n, 0], scorecam_at_full_resolution(model, LAYER, images[n], target, **told))
    assert found.std() > 0 or "subtract_base" in options


def test_what_is_seen_where_a_mask_is_zero(model, images):
    each, one = zoo.normal(3, 3, 16, 16, seed=5), zoo.normal(1, 3, 1, 1, seed=6)
    dark, dull = black(*channel_stats(model, 3), like=images), blur(images, 16 / 11)
    for baseline, hidden in (("black", dark), ("blur", dull), (each, each), (one, one)):
        found = ScoreCAM(model, LAYER, baseline=baseline).attribute(images, 2)
        for n in range(3):
            close(
                found[n, 0],
                scorecam_at_full_resolution(model, LAYER, images[n], 2, hidden=hidden[min(n, len(hidden) - 1)]),
            )


def test_torchcams_variant_scales_before_it_enlarges(model, images):
    found = ScoreCAM(model, LAYER, variant="torchcam").attribute(images, 1)
    for n in range(3):
        wanted = scorecam_at_full_resolution(
            model,
            LAYER,
            images[n],
            1,
            score="logit",
            channel_softmax=True,
            mask=lambda grid: passes.enlarge(passes.stretch(grid), (16, 16)),
        )
        close(found[n, 0], wanted)


def test_torchcam_itself(model, images):
    methods = pytest.importorskip("torchcam.methods")
    with methods.ScoreCAM(model, LAYER) as theirs:
        outputs = model(images)
        wanted = theirs([1, 2, 3], outputs, normalized=False)[0]
    found = ScoreCAM(model, LAYER, variant="torchcam", upsample=False).attribute(images, [1, 2, 3])
    close(found[:, 0], wanted, 1e-5)


def test_pytorch_grad_cam_itself(model, images):
    library = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, images = model.float(), images.float()
    found = ScoreCAM(model, LAYER, variant="pytorch-grad-cam", upsample=False).attribute(images, [1, 2, 3])
    theirs = library.ScoreCAM(model, [model.get_submodule(LAYER)])
    targets = [ClassifierOutputTarget(c) for c in (1, 2, 3)]
    with torch.no_grad():
        maps = torch.stack([torch.tensor(passes.features(model, LAYER, image)) for image in images])
        weights = theirs.get_cam_weights(images, None, targets, maps.numpy(), None)
    wanted = np.einsum("nd,ndhw->nhw", np.asarray(weights), maps.numpy()).clip(0)
    close(found[:, 0], wanted, 1e-4)


def test_tokens_are_maps(images):
    model = zoo.small_vit().double()
    found = ScoreCAM(model, "blocks.2.norm1", upsample=False).attribute(images, 2)
    for n in range(3):
        tokens = passes.features(model, "blocks.2.norm1", images[n])  # (1 + 64, D): the class token, then 8x8 patches
        maps = tokens[1:].T.reshape(-1, 8, 8)
        scores = [
            passes.score_of(model, passes.show(images[n], passes.stretch(passes.enlarge(grid, (16, 16)))), 2)
            for grid in maps
        ]
        close(found[n, 0], np.maximum(np.tensordot(scores, maps, 1), 0))


def test_several_layers_give_the_mean(model, images):
    both = ScoreCAM(model, ["stages.1", "stages.2"]).attribute(images, 1)
    close(
        both, (ScoreCAM(model, "stages.1").attribute(images, 1) + ScoreCAM(model, "stages.2").attribute(images, 1)) / 2
    )


# ---------------------------------------------------------------------- passes


@pytest.mark.parametrize(
    ("build", "layer", "width"),
    [
        (passes.vgg16, "features.29", 512),
        (passes.resnet50, "layer4", 2048),
        (passes.vit_b, "encoder.layers.encoder_layer_1.ln_1", 768),
    ],
)
def test_as_many_masks_as_the_papers_count(build, layer, width):
    """512, 2048 and 768: the feature maps of the default layers."""
    (tap,) = ScoreCAM(build()).taps(torch.randn(1, 3, passes.SIZE, passes.SIZE))
    assert (tap.name, tap.channels) == (layer, width)


@pytest.mark.parametrize("targets", [[1], [1, 2, 3, 4, 0, 1, 2, 3, 4, 0]])
def test_ten_targets_take_the_passes_of_one(model, images, targets):
    counted = Counted(model)
    explainer = ScoreCAM(counted, "model.stages.2", chunk_size=5)
    explainer.attribute(images, 0)
    counted.images = 0
    alive = sum((passes.features(model, LAYER, image).std((1, 2)) > 0).sum() for image in images)
    explainer.attribute_many(images, targets)
    assert counted.images == 3 + alive
    assert counted.most == 5


def test_constant_maps_get_no_pass_and_all_constant_maps_give_zero(model, images):
    with torch.no_grad():
        model.stages[2][1].weight.zero_()
    counted = Counted(model)
    explainer = ScoreCAM(counted, "model.stages.2")
    explainer.attribute(images, 0)
    counted.images = 0
    for options in ({}, {"channel_softmax": True}):
        explainer = ScoreCAM(counted, "model.stages.2", **options)
        assert explainer.attribute(images, 0).abs().sum() == 0


def test_dead_maps_do_not_shift_the_softmax(model, images):
    with torch.no_grad():
        model.stages[2][1].weight[3], model.stages[2][1].bias[3] = 0, 0.4
    explainer = ScoreCAM(model, LAYER, variant="torchcam")
    wanted = explainer.attribute(images, 1)
    with torch.no_grad():
        model.head.bias.sub_(5000)
    close(explainer.attribute(images, 1), wanted, 1e-8)


# ---------------------------------------------------------------------- properties


@settings(max_examples=6)
@given(st.permutations(range(8)), st.integers(1, 30))
def test_the_order_of_the_maps_and_the_chunks_say_nothing(order, chunk):
    model, images = zoo.small_cnn().double(), zoo.batch(2, dtype=torch.float64)
    wanted = ScoreCAM(model).attribute(images, [0, 3])
    passes.reorder_last_stage(model, order)
    close(ScoreCAM(model, chunk_size=chunk).attribute(images, [0, 3]), wanted)


def test_weights_that_are_all_negative_are_told():
    model = zoo.small_cnn()
    with torch.no_grad():
        model.head.bias.sub_(100)
    with pytest.warns(UserWarning, match="ScoreCAM: no weight is positive") as caught:
        heat = ScoreCAM(model, score="logit").attribute(zoo.batch(2), 0)
    assert heat.abs().sum() == 0
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "captum"}, "variant: must be one of 'paper', 'pytorch-grad-cam', 'torchcam', got 'captum'"),
        ({"score": "p"}, "score: must be one of"),
        ({"channel_softmax": 1}, "channel_softmax: must be True, False or None, got 1"),
        ({"baseline": "white"}, "baseline: must be 'mean', 'black', 'blur', a finite number or a tensor"),
        ({"baseline": float("nan")}, "baseline: must be"),
        ({"chunk_size": 0}, "chunk_size: must be a positive integer"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(OptionError, match=words):
        ScoreCAM(zoo.small_cnn(), **options)


def test_a_baseline_that_does_not_fit():
    explainer = ScoreCAM(zoo.small_cnn(), baseline=torch.zeros(2, 3, 16, 16))
    with pytest.raises(
        OptionError, match=r"baseline: must broadcast to the inputs \(3, 3, 16, 16\), got \(2, 3, 16, 16\)"
    ):
        explainer.attribute(zoo.batch(3), 0)


def test_memory_is_bounded_by_the_chunk():
    """The largest tensor that a call makes holds a chunk of images, not all masks."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    model, images = cases.lively(zoo.SmallCNN((4, 4, 64))), zoo.batch(2, 64)
    explainer = ScoreCAM(model, chunk_size=4)
    explainer.attribute(images, 0)
    with Largest():
        explainer.attribute(images, 0)
    assert largest <= 4 * 4 * 64 * 64 * 4  # four images of four channels, in float32
