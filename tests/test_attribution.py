"""The base class by itself: bad input beyond the contract suite, options, layers, and what subclasses may do."""

from __future__ import annotations

import warnings

import engine_cases as cases
import pytest
import strategies as zoo
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attrib_zoo import RISE, TTAME, GradCAM
from attrib_zoo.attribution import Attribution, check_images
from attrib_zoo.backbone.capture import forward_args, run
from attrib_zoo.backbone.targets import TargetQuery
from attrib_zoo.errors import (
    AttribZooError,
    InputError,
    LayerError,
    LayerNotFoundError,
    NotFittedError,
    OptionError,
    TargetError,
    UnsupportedModelError,
    check_choice,
)
from attrib_zoo.masking import mean_filter, rank_scale, upsample


class Sum(Attribution):
    """The smallest method: the sum of the layer's maps, for each target times (class + 1)."""

    def compute_maps(self, inputs, query, args, show_progress):
        outputs, features = run(self.model, inputs, args, self.taps(inputs, args))
        self.seen = (inputs.is_inference(), inputs.requires_grad, torch.is_grad_enabled(), self.model.training)
        target = query.resolve(outputs)
        return features[0].sum(1, keepdim=True) * (target.classes + 1)[:, :, None, None]


class Plus(Sum):
    """A method with options of its own."""

    def __init__(self, model, layers=None, *, amount=1.0, mode="a", upsample=True):
        super().__init__(model, layers, upsample=upsample)
        self.amount = amount
        self.mode = check_choice("mode", mode, ("a", "b"))


IMAGES = zoo.batch(4)


# ---------------------------------------------------------------------- the call


@settings(max_examples=20)
@given(st.data())
def test_one_hook_gives_both_calls(data):
    model = zoo.small_cnn()
    explainer = Sum(model, data.draw(st.sampled_from(["stages.0", "stages.2"])), upsample=data.draw(st.booleans()))
    table = data.draw(st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=2), min_size=4, max_size=4))
    many = explainer.attribute_many(IMAGES, table)
    single = [explainer.attribute(IMAGES, [row[t] for row in table]) for t in (0, 1)]
    assert torch.equal(many, torch.stack(single, 1))
    with torch.no_grad():
        maps = model.stages[0](IMAGES).sum(1, keepdim=True)
    if explainer.layers == "stages.0":  # as large as the image
        wanted = maps * (torch.tensor([row[0] for row in table]) + 1).view(-1, 1, 1, 1)
        torch.testing.assert_close(single[0], wanted.expand_as(single[0]))


def test_the_hook_finds_eval_mode_and_no_graph():
    model = zoo.small_cnn().train()
    explainer = Sum(model, "stages.1")
    for inputs in (IMAGES.clone().requires_grad_(), IMAGES):
        explainer.attribute(inputs, 1)
        assert explainer.seen == (False, False, False, False)
    with torch.inference_mode():
        made_inside = IMAGES * 1
        explainer.attribute(made_inside, 1)
    assert explainer.seen == (False, False, False, False)
    assert model.training


def test_a_one_tuple_for_many_targets():
    explainer = Sum(zoo.small_cnn(), "stages.1")
    assert torch.equal(explainer.attribute_many((IMAGES,), [1, 2]), explainer.attribute_many(IMAGES, [1, 2]))


def test_layers_are_looked_up_once_for_each_size(monkeypatch):
    found = []
    explainer = Sum(zoo.small_cnn())
    plain = explainer.resolve_layers
    monkeypatch.setattr(explainer, "resolve_layers", lambda *args: found.append(args[0].shape) or plain(*args))
    for inputs in (IMAGES, IMAGES[:1], zoo.batch(2, size=24), IMAGES):
        explainer.attribute(inputs, 0)
    assert [tuple(shape[2:]) for shape in found] == [(16, 16), (24, 24)]


def test_forward_arguments():
    assert forward_args(None) == ()
    assert forward_args(3) == (3,)
    assert forward_args((3, 4)) == (3, 4)
    model = zoo.small_cnn()
    gain = torch.tensor([1.0, 2.0, 3.0, 4.0])
    found = Sum(model, "stages.1").attribute(IMAGES, 1, gain)
    assert torch.equal(found, Sum(model, "stages.1").attribute(IMAGES * gain.view(-1, 1, 1, 1), 1))


# ---------------------------------------------------------------------- what a subclass may do


@pytest.mark.parametrize("name", ["attribute", "attribute_many"])
def test_the_call_is_final(name):
    with pytest.raises(TypeError, match=f"Mine: {name} is final; fill the hook compute_maps"):
        type("Mine", (Sum,), {name: lambda self: None})


def test_without_the_hook_there_is_no_object():
    with pytest.raises(TypeError, match="compute_maps"):
        Attribution(zoo.small_cnn())


def test_a_method_that_reads_no_layer():
    class Blind(Sum):
        default_layers = None

    assert Blind(zoo.small_cnn()).taps(IMAGES) == ()


def test_repr_and_options_show_what_was_changed():
    model = zoo.small_cnn()
    assert repr(Plus(model)) == "Plus(SmallCNN, layers=None)"
    assert repr(Plus(model, "stages.1", amount=2.0)) == "Plus(SmallCNN, layers='stages.1', amount=2.0)"
    assert repr(Plus(nn.DataParallel(model), model.stages[1])) == "Plus(SmallCNN, layers=<Sequential>)"
    assert repr(Plus(model, [model.stages[1], -1])) == "Plus(SmallCNN, layers=[<Sequential>, -1])"
    assert repr(Plus(model, amount=torch.ones(2))).endswith("amount=<tensor (2,)>)")
    assert Plus(model, mode="b").options() == {"amount": 1.0, "mode": "b", "upsample": True}
    with pytest.raises(OptionError, match=r"mode: must be one of 'a', 'b', got 'c'"):
        Plus(model, mode="c")


def test_each_layers_map_is_smoothed_then_joined_then_scaled():
    model, layers = zoo.small_cnn(), ["stages.1", "stages.2"]
    parts = [GradCAM(model, name, upsample=False).attribute(IMAGES, 1) for name in layers]
    joined = [
        torch.stack([upsample(mean_filter(part, 3), size) for part in parts]).mean(0) for size in ((16, 16), (8, 8))
    ]
    options = {"smooth": 3, "scale": "rank"}
    found = GradCAM(model, layers, **options).attribute(IMAGES, 1)
    torch.testing.assert_close(found, rank_scale(joined[0]).expand_as(IMAGES))
    found = GradCAM(model, layers, **options, upsample=False).attribute(IMAGES, 1)
    torch.testing.assert_close(found, rank_scale(joined[1]))


def test_a_trained_map_can_keep_its_zero():
    """T-TAME's raw map is not scaled first: its negative cells are dark, the others keep their ratios."""
    model = zoo.small_cnn()
    classes = torch.arange(len(IMAGES)) % 5
    trained = zoo.fit(TTAME(model, recipe="rows", scale="positive", upsample=False), [IMAGES])
    target = trained.choose_targets(model(IMAGES), TargetQuery(classes))
    raw = mean_filter(trained._class_maps(trained.network_, trained._features(IMAGES, ())[1], target), 3).detach()
    assert bool((raw < 0).any())
    assert bool((raw > 0).any())
    wanted = raw.clamp(min=0) / raw.clamp(min=0).amax((-2, -1), keepdim=True).clamp(min=1e-12)
    torch.testing.assert_close(trained.attribute(IMAGES, classes)[:, :1], wanted)


@pytest.mark.parametrize("smooth", [0, 2, -3, 3.0, True, "3"])
def test_smooth_must_be_odd(smooth):
    with pytest.raises(OptionError, match="smooth: must be an odd number of cells"):
        GradCAM(zoo.small_cnn(), smooth=smooth)


def test_smooth_and_scale_are_options_like_others():
    model = zoo.small_cnn()
    explainer = GradCAM(model, smooth=5, scale="min-max")
    assert repr(explainer) == "GradCAM(SmallCNN, layers=None, smooth=5, scale='min-max')"
    assert GradCAM(model, **explainer.options()).options() == explainer.options()
    with pytest.raises(OptionError, match="scale: must be one of 'min-max', 'rank', 'positive', got 'ranks'"):
        GradCAM(model, scale="ranks")
    trained = zoo.fit(TTAME(model, smooth=3, scale="rank"), [IMAGES], max_steps=2)
    every = trained.maps(IMAGES)
    cells = every.shape[-2] * every.shape[-1]
    assert every.flatten(2).sum(2).flatten().tolist() == pytest.approx([cells / 2] * (4 * 5), rel=1e-4)


def test_names_of_captum():
    explainer = Sum(zoo.small_cnn())
    assert explainer.get_name() == Sum.get_name() == "Sum"
    with pytest.raises(OptionError, match=r"GradCAM: device_ids must be left out: of a DataParallel model"):
        GradCAM(zoo.small_cnn(), device_ids=[0])
    assert not explainer.has_convergence_delta()
    with pytest.raises(NotImplementedError, match="Sum promises no completeness"):
        explainer.compute_convergence_delta(IMAGES, IMAGES, IMAGES)
    with pytest.raises(NotImplementedError, match="attribute_future is not supported"):
        explainer.attribute_future()


# ---------------------------------------------------------------------- images


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (None, "must be a tensor .* got NoneType"),
        (IMAGES.numpy(), "got ndarray"),
        ([IMAGES], "got list of 1"),
        ((IMAGES, IMAGES), "got tuple of 2; .* goes into additional_forward_args"),
        ((), "got tuple of 0"),
        ({"image": IMAGES}, "got dict"),
        (IMAGES[0], r"must have 4 axes .* got shape \(3, 16, 16\); add the batch axis with inputs\[None\]"),
        (IMAGES[0, 0], r"must have 4 axes .* got shape \(16, 16\); pass one float tensor"),
        (IMAGES[None], r"must have 4 axes .* of frames or views explain the network inside, .*inputs\.flatten\(0, 1\)"),
        (IMAGES.to(torch.uint8), r"must be floating-point .* got torch.uint8; convert with .float\(\)"),
        (IMAGES.to(torch.complex64), "got torch.complex64"),
        (IMAGES[:0], r"at least one .* got shape \(0, 3, 16, 16\)"),
        (IMAGES[:, :, :0], "at least one"),
        (IMAGES.masked_fill(IMAGES > 2, float("inf")), "must be finite .* look at the preprocessing"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_what_are_no_images(inputs, words):
    explainer = Sum(zoo.small_cnn())
    for call in (explainer.attribute, explainer.attribute_many):
        with pytest.raises(InputError, match=f"^Sum: inputs .*{words}"):
            call(inputs, [1])


def test_images_that_pass_are_the_same_object():
    assert check_images(IMAGES, "Sum") is IMAGES


def test_the_wrong_number_of_channels_names_the_right_one():
    model = zoo.small_cnn()
    with (
        cases.untouched(model),
        pytest.raises(InputError, match=r"SmallCNN takes images with 3 channels, got 1 .* pass \(N, 3, H, W\)"),
    ):
        GradCAM(model).attribute(IMAGES[:, :1], 0)


@pytest.mark.parametrize(("weights", "images"), [("float32", "float64"), ("float64", "float32"), ("half", "float32")])
def test_images_of_another_type_than_the_weights_are_told_both(weights, images):
    model = getattr(zoo.small_cnn(), weights.replace("float32", "float").replace("float64", "double"))()
    own = "float16" if weights == "half" else weights
    words = rf"has weights in torch\.{own}, got images in torch\.{images}; pass inputs\.to\(torch\.{own}\)"
    with cases.untouched(model), pytest.raises(InputError, match=words):
        GradCAM(model).attribute(IMAGES.to(getattr(torch, images)), 0)


@pytest.mark.parametrize("method", [GradCAM, RISE])
def test_a_model_of_two_types_names_both(method):
    model = zoo.small_cnn()
    model.head.half()
    words = r"has weights in torch.float32 \('stages.*'\) and torch.float16 \('head.weight'\), got images in torch"
    with pytest.raises(InputError, match=words):
        method(model).attribute(IMAGES, 0)


# ---------------------------------------------------------------------- models


class Returns(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.model = zoo.small_cnn()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(self.model(x))


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (lambda out: (out, out), "must return one tensor of scores .* got tuple; wrap it"),
        (lambda out: {"logits": out}, "got dict; wrap it"),
        (lambda out: out.argmax(1), "floating-point scores, got torch.int64"),
        (lambda out: out.mean(), r"one row of scores per image \(N=\d\), got shape \(\)"),
        (lambda out: out[:1], r"one row of scores per image"),
    ],
    ids=["tuple", "dict", "decision", "number", "one row"],
)
@pytest.mark.parametrize("method", [GradCAM, Sum])
def test_models_that_return_no_scores(method, wrap, words):
    model = Returns(wrap)
    with cases.untouched(model), pytest.raises(UnsupportedModelError, match=words):
        method(model, "model.stages.1").attribute(IMAGES, 0)


@pytest.mark.parametrize("method", [GradCAM, TTAME])
def test_things_that_are_no_modules(method):
    for model in (lambda x: x, None, "resnet50", zoo.SmallCNN):
        with pytest.raises(UnsupportedModelError, match=r"nn\.Module"):
            method(model)


def test_a_model_that_raises_leaves_nothing_behind():
    class Broken(zoo.SmallCNN):
        def forward(self, x):
            self.stages(x)
            raise RuntimeError("out of luck")

    model = Broken().train()
    model.stages[1].eval()
    with cases.untouched(model, IMAGES), pytest.raises(RuntimeError, match="out of luck"):
        GradCAM(model, "stages.1").attribute(IMAGES, 0)


# ---------------------------------------------------------------------- layers


class WithSpare(zoo.SmallCNN):
    """A layer that never runs, one that runs for large images only, and one without space."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Conv2d(3, 3, 1)
        self.large = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return super().forward(self.large(x) if x.shape[-1] > 16 else x)


@pytest.mark.parametrize("method", [GradCAM, Sum])
@pytest.mark.parametrize(
    ("layers", "error", "words"),
    [
        ("stages.7", LayerNotFoundError, r"layers: no layer 'stages\.7' in WithSpare; closest: 'stages\.\d'"),
        (nn.ReLU(), LayerNotFoundError, "must be part of the WithSpare"),
        (-9, LayerNotFoundError, "an index must lie between"),
        ("head", LayerError, r"'head' of WithSpare must put out a map, got \(N, 5\); the nearest spatial layers are"),
        ("spare", LayerError, r"'spare' \(Conv2d\) must run in the forward pass, but is never called"),
        ([], OptionError, "at least one layer"),
        (["stages.1", "stages.1"], OptionError, r"each must be given once, got 'stages\.1' twice"),
        (1.5, OptionError, r"got 1\.5 of type float"),
    ],
    ids=["unknown", "foreign", "index", "not spatial", "never runs", "none", "twice", "number"],
)
def test_layers_that_cannot_serve(method, layers, error, words):
    model = WithSpare().eval()
    with cases.untouched(model), pytest.raises(error, match=words):
        method(model, layers).attribute(IMAGES, 0)


def test_a_layer_that_stops_running():
    """It ran when it was looked up, and not for a later batch of the same size."""

    class Moody(zoo.SmallCNN):
        detour = True

        def __init__(self):
            super().__init__()
            self.extra = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return super().forward(self.extra(x) if self.detour else x)

    model = Moody().eval()
    explainer = GradCAM(model, "extra")
    explainer.attribute(IMAGES, 0)
    model.detour = False
    with (
        cases.untouched(model),
        pytest.raises(
            LayerError, match=r"'extra' \(Conv2d\) must run in the forward pass, but is never called; name a"
        ),
    ):
        explainer.attribute(IMAGES, 0)


# ---------------------------------------------------------------------- not fitted


def test_an_unfitted_explainer_says_what_to_call():
    explainer = TTAME(zoo.small_cnn())
    assert not explainer.is_fitted
    calls = [
        lambda: explainer.attribute(IMAGES),
        lambda: explainer.attribute_many(IMAGES, [0]),
        lambda: explainer.maps(IMAGES),
    ]
    calls += [explainer.report, lambda: explainer.save("nowhere.safetensors")]
    for name in ("network_", "history_", "class_counts_", "n_steps_", "schedule_"):
        calls.append(lambda name=name: getattr(explainer, name))
    for call in calls:
        with pytest.raises(
            NotFittedError, match=r"TTAME must be trained .* call fit\(loader\), or load a file with TTAME\.load"
        ):
            call()
    assert repr(explainer).startswith("TTAME(SmallCNN, layers=None")


def test_every_error_is_ours_and_a_builtin_one():
    pairs = {
        InputError: ValueError, OptionError: ValueError, TargetError: IndexError, LayerNotFoundError: LookupError,
        LayerError: ValueError, UnsupportedModelError: ValueError, NotFittedError: RuntimeError,
    }  # fmt: skip
    for error, builtin in pairs.items():
        assert issubclass(error, AttribZooError)
        assert issubclass(error, builtin)


def test_an_ordinary_call_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Sum(zoo.small_cnn()).attribute(IMAGES)


def test_notebooks_show_what_an_explainer_is():
    text = GradCAM(zoo.small_cnn(), smooth=3)._repr_html_()
    for words in ("GradCAM", "smooth</th>", ">3<", "layers</th>", ">found in the model<", GradCAM.paper, GradCAM.cost):
        assert words in text
    assert "fitted" not in text
    assert "layer1" in GradCAM(zoo.small_cnn(), "layer1")._repr_html_()
    assert "layers</th>" not in RISE(zoo.small_cnn())._repr_html_()
    assert "not yet: call fit" in TTAME(zoo.small_cnn())._repr_html_()
