"""A fitted explainer notices that its model is no longer the one that it was fitted for."""

import copy

import pytest
import strategies as zoo
import torch
from torch import nn

from attrib_zoo import TTAME
from attrib_zoo.backbone.capture import frozen
from attrib_zoo.backbone.module import original
from attrib_zoo.errors import BackboneMismatchError
from attrib_zoo.training import watch as watching
from attrib_zoo.training.checkpoint import fingerprint
from attrib_zoo.training.watch import Watch

IMAGES = zoo.batch(4)
SEEN = int(zoo.small_cnn()(IMAGES).argmax(1)[0])  # a class of the fit, which no warning is about
WORDS = r"TTAME was fitted for other weights than this SmallCNN has now"


@pytest.fixture(scope="module")
def fitted():
    return zoo.fit(TTAME(zoo.small_cnn()), IMAGES.split(2), epochs=1)


@pytest.fixture
def explainer(fitted):
    return copy.deepcopy(fitted)


def quiet(model: nn.Module) -> None:
    """Through ``.data``, which torch's counter of writes does not see."""
    for parameter in model.parameters():
        parameter.data.normal_()


def top_only(model: nn.Module) -> None:
    model.head.reset_parameters()


def statistics(model: nn.Module) -> None:
    model.stages[1][1].running_mean[0] += 1e-3


def pointed_elsewhere(model: nn.Module) -> None:
    model.head.bias.data = torch.randn_like(model.head.bias)


def loaded(model: nn.Module) -> None:
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})


QUIET = {  # each through ``.data``, of one tensor
    "bias": lambda m: m.head.bias.data.zero_(),
    "normalisation": lambda m: m.stages[1][1].weight.data.normal_(),
    "means": lambda m: m.stages[1][1].running_mean.data.add_(1),
    "variances": lambda m: m.stages[2][1].running_var.data.fill_(5.0),
    "a filter": lambda m: m.stages[1][0].weight.data[3].zero_(),
    "pruned": lambda m: m.stages[2][0].weight.data.mul_(m.stages[2][0].weight.abs() > 0.1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("change", QUIET)
def test_changes_of_one_tensor_that_torch_does_not_count(change, layout, dtype):
    model = zoo.small_cnn().to(dtype, memory_format=layout)
    watch = Watch(model, fingerprint(model))
    assert not watch.noticed(model)
    with torch.no_grad():
        QUIET[change](model)
    assert watch.noticed(model)


@pytest.mark.parametrize("lay", [lambda w: w.mT.contiguous().mT, lambda w: torch.cat([w, w], 1)[:, : w.shape[1]]])
def test_weights_that_are_not_dense_are_sampled_where_they_lie(lay):
    model = zoo.small_cnn()
    model.head.weight = nn.Parameter(lay(model.head.weight.detach()))
    assert not model.head.weight.is_contiguous()
    watch = Watch(model, fingerprint(model))
    assert not watch.noticed(model)
    model.head.weight.data[2].zero_()
    assert watch.noticed(model)


@pytest.mark.parametrize("change", [quiet, top_only, statistics, pointed_elsewhere, loaded])
def test_other_weights_in_place_are_refused(explainer, change):
    before = copy.deepcopy(explainer.model.state_dict())
    maps = explainer.attribute(IMAGES, SEEN)
    with torch.no_grad():
        change(explainer.model)
    for call in (lambda: explainer.attribute(IMAGES, SEEN), lambda: explainer.maps(IMAGES)):
        with pytest.raises(BackboneMismatchError, match=WORDS):
            call()
    explainer.model.load_state_dict(before)
    assert torch.equal(explainer.attribute(IMAGES, SEEN), maps)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.load_state_dict(copy.deepcopy(m.state_dict())),
        lambda m: m.double(),
        lambda m: m.bfloat16(),
        lambda m: m.requires_grad_(False),
        lambda m: m.train(),
    ],
)
def test_the_same_weights_loaded_again_converted_or_frozen_are_the_same_model(explainer, change):
    change(explainer.model)
    x = IMAGES.to(next(explainer.model.parameters()).dtype)
    assert torch.isfinite(explainer.attribute(x, SEEN)).all()


def test_a_conversion_does_not_hide_a_change(explainer):
    top_only(explainer.model.double())
    with pytest.raises(BackboneMismatchError, match=WORDS):
        explainer.attribute(IMAGES.double(), SEEN)


@pytest.mark.parametrize("weights", ["shared", "fixed", "copied"])
def test_a_mirror_is_watched_as_the_model_that_it_mirrors(explainer, weights, monkeypatch):
    maps = explainer.attribute(IMAGES, 1)
    with monkeypatch.context() as patched, frozen(explainer.model, weights):
        patched.setattr(watching, "fingerprint", lambda _: pytest.fail("all weights were read"))
        assert torch.equal(explainer.attribute(IMAGES, 1), maps)
    with frozen(explainer.model, weights):
        top_only(original(explainer.model))
        with pytest.raises(BackboneMismatchError, match=WORDS):
            explainer.attribute(IMAGES, 1)


def test_what_was_loaded_for_other_weights_warns_once_for_each_change(explainer, tmp_path):
    path = explainer.save(tmp_path / "explainer.safetensors")
    other = zoo.small_cnn()
    top_only(other)
    with pytest.warns(UserWarning, match="other weights"):
        loose = TTAME.load(path, other, strict_backbone=False)
    maps = loose.attribute(IMAGES, SEEN)  # the model is what it was when the user said that it would do
    for _ in range(2):
        top_only(other)
        with pytest.warns(UserWarning, match=WORDS):
            loose.attribute(IMAGES, SEEN)
        assert loose.attribute(IMAGES, SEEN).shape == maps.shape


def test_a_loaded_explainer_is_as_strict_as_a_fitted_one(explainer, tmp_path):
    model = copy.deepcopy(explainer.model)
    again = TTAME.load(explainer.save(tmp_path / "explainer.safetensors"), model)
    top_only(model)
    with pytest.raises(BackboneMismatchError, match=WORDS):
        again.attribute(IMAGES, SEEN)


def test_an_unchanged_model_is_not_read(monkeypatch):
    model = zoo.small_cnn()
    watch = Watch(model, fingerprint(model))
    monkeypatch.setattr(watching, "fingerprint", lambda _: pytest.fail("all weights were read"))
    assert not watch.noticed(model)
