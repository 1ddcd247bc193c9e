"""How the contract suite judges: right classes pass, each check has a planted fault, errors name all that failed."""

from __future__ import annotations

import functools
import importlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from captum.attr import Attribution, LayerGradCam
from contract_samples import SmallCAM, SmallMasks, SmallTrained
from planted_faults import PLANTED, assert_caught, caught_by, planted_in
from torch import nn

from attrib_zoo.errors import UnsupportedModelError
from attrib_zoo.testing import CHECKS, ContractError, Inapplicable, check_attribution
from attrib_zoo.testing.suite import Case


@caught_by(input_shape="expected shape", infidelity="")
class OneChannel(SmallCAM):
    def finish(self, heat, images):
        return super().finish(heat, images)[:, :1].contiguous()


@caught_by(captum_subclass="get_name")
class SpacedName(SmallCAM):
    get_name = Attribution.get_name


@caught_by(nothing_left="hooks", nothing_left_on_error="hooks", bad_target="hooks")
class HookStays(SmallCAM):
    def run(self, images, args):
        self.layer().register_forward_hook(lambda *_: None)
        return super().run(images, args)


@planted_in(__name__)
def test_the_check_catches_the_fault_for_its_reason(cls, name, words):
    assert_caught(cls, name, words)


# ---------------------------------------------------------------------- right classes


RIGHT = (SmallCAM, SmallMasks, SmallTrained)


report = functools.cache(check_attribution)


@pytest.mark.parametrize("cls", RIGHT)
def test_a_right_class_passes(cls):
    assert list(report(cls)) == list(CHECKS)
    assert all(result == "passed" or result.startswith("skipped: ") for result in report(cls).values())


class SmallWhole(SmallCAM):
    """Its map comes at the size of the image only."""

    def __init__(self, model, layers=None):
        super().__init__(model, layers)


def test_each_check_applies_to_a_right_class():
    passed = {name for cls in RIGHT for name, result in report(cls).items() if result == "passed"}
    CHECKS["smooth_enlargement"](SmallWhole)
    assert set(CHECKS) - passed <= {"gpu", "smooth_enlargement"}


def test_regions_of_one_value_are_said_to_be_meant():
    class Regions(SmallWhole):
        def finish(self, heat, images):
            return F.interpolate(heat, images.shape[2:], mode="nearest").expand_as(images).contiguous()

    with pytest.raises(ContractError, match="enlarge maps bilinearly"):
        CHECKS["smooth_enlargement"](Regions)
    Regions.piecewise_constant = True
    with pytest.raises(Inapplicable, match="piecewise constant"):
        CHECKS["smooth_enlargement"](Regions)


def test_every_check_has_a_planted_fault():
    for part in ("calls", "traces", "consumers", "options", "fitted"):
        importlib.import_module(f"test_{part}")
    assert set(CHECKS) - {name for _, name, _ in PLANTED} == {"gpu"}, (
        "plant a fault: a class with @caught_by(name_of_the_check=...)"
    )


CHANGES = {
    "nothing": lambda bench: None,
    "a weight": lambda bench: bench.model.head.weight.data.add_(1),
    "a gradient": lambda bench: bench.model(bench.inputs).sum().backward(),
    "a mode": lambda bench: bench.model.dropout.train(),
    "a hook": lambda bench: bench.model.head.register_forward_hook(lambda *_: None),
    "an attribute": lambda bench: setattr(bench.model, "seen", True),
    "a module": lambda bench: setattr(bench.model, "idle", nn.Linear(2, 2)),
    "a planned failure": lambda bench: setattr(bench.model.fuse, "rows", 4),
    "the images": lambda bench: bench.inputs.add_(0),
    "a batch": lambda bench: bench.batches[1].mul_(2),
}


@pytest.mark.parametrize("what", CHANGES)
def test_the_next_check_gets_the_same_bench_unless_something_was_changed(what):
    case = Case(SmallCAM, "cnn")
    CHANGES[what](case.bench)
    case.release()
    following = Case(SmallCAM, "cnn")
    assert (following.model is case.model) == (what == "nothing")
    assert torch.equal(following.maps, Case(SmallCAM, "cnn").maps)


def test_a_trained_class_is_fitted_once_for_each_bench_and_explains_the_model_of_each_case():
    fits = []

    class Counted(SmallTrained):
        def fit(self, loader, **options):
            fits.append(self.model)
            return super().fit(loader, **options)

    one, two = Case(Counted, "cnn"), Case(Counted, "cnn")
    assert torch.equal(one.maps, two.maps)
    assert (one.explainer.forward_func, two.explainer.forward_func) == (one.model, two.model)
    assert one.explainer is not two.explainer
    assert len(fits) == 1
    assert fits[0] not in (one.model, two.model)
    assert Case(Counted, "vit").maps.shape == one.maps.shape
    assert len(fits) == 2


def test_two_cases_at_a_time_have_a_bench_each():
    case = Case(SmallCAM, "cnn")
    assert case.at().model is not case.model


class MeanMap(SmallCAM):
    """A class-agnostic method that says so."""

    class_agnostic = True

    def cam(self, activation, gradient):
        return activation.abs().mean(1, keepdim=True)


class ForTransformers(SmallCAM):
    models = ("vit",)

    def __init__(self, model, layers=None, *, upsample=True):
        super().__init__(model, layers, upsample=upsample)
        assert not isinstance(model, nn.Module) or any(isinstance(m, nn.LayerNorm) for m in model.modules())


class Picky(SmallCAM):
    """Refuses the channels-last model, and explains the other convolutional one."""

    models = ("cnn",)
    refused: tuple[str, ...] = ("nhwc",)

    def explain(self, images, target, args):
        if getattr(self.forward_func, "layout", None) in self.refused:
            raise UnsupportedModelError("no such features")
        return super().explain(images, target, args)


class TooPicky(Picky):
    refused = ("nchw", "nhwc")


def test_a_class_may_refuse_one_bench_of_a_kind_but_not_all():
    CHECKS["input_shape"](Picky)
    with pytest.raises(ContractError, match=r"(?s)on cnn: .* no such features"):
        CHECKS["input_shape"](TooPicky)


class Warned(SmallCAM):
    """Says where features are negative."""

    nonnegative = True

    def cam(self, activation, gradient):
        if activation.sum((2, 3)).amin() < 0:
            warnings.warn("negative features", stacklevel=2)
        return super().cam(activation, gradient)


def test_a_formula_for_nonnegative_features_says_so():
    CHECKS["no_warning"](Warned)


def test_what_a_class_says_of_itself_is_respected():
    CHECKS["informative"](MeanMap)
    for name in ("informative", "layers", "flips", "captum_subclass"):
        CHECKS[name](ForTransformers)
    with pytest.raises(Inapplicable, match="does not support"):
        CHECKS["in_place_followers"](ForTransformers)


def test_the_factory_may_be_a_partial_or_a_function():
    CHECKS["layer_resolution"](functools.partial(SmallCAM, layers=None))
    with pytest.raises(Inapplicable, match="takes no upsample; pass the class itself"):
        CHECKS["layer_resolution"](lambda model: SmallCAM(model))
    with pytest.raises(ContractError, match=r"OneChannel breaks .*\s+input_shape"):
        CHECKS["input_shape"](functools.partial(OneChannel, upsample=True))
    with pytest.raises(ContractError, match="input_shape"):
        CHECKS["input_shape"](lambda model: OneChannel(model))


def test_skip_leaves_out_what_it_names():
    result = check_attribution(SpacedName, skip=set(CHECKS) - {"signature"})
    assert result["captum_subclass"] == "skipped: as asked"
    assert result["signature"] == "passed"
    with pytest.raises(ValueError, match="no check no_such_check; there are captum_subclass"):
        check_attribution(SmallCAM, skip=["no_such_check"])


@pytest.mark.parametrize(
    "name", ["tuples", "input_shape", "sensitivity_max", "infidelity", "train_mode", "own_decision"]
)
def test_captums_own_grad_cam_is_judged_too(name):
    with pytest.raises(ContractError, match=name):
        CHECKS[name](lambda model: LayerGradCam(model, model.get_submodule(model.explained)))


def test_every_failed_check_is_listed_in_one_error():
    with pytest.raises(ContractError, match=r"HookStays breaks the contract in \d+ check\(s\)") as caught:
        check_attribution(HookStays)
    assert {"nothing_left", "nothing_left_on_error", "bad_target"} <= set(caught.value.failures)
    assert "signature" not in caught.value.failures
    for name, reason in caught.value.failures.items():
        assert f"{name}: {reason}" in str(caught.value)


class Long(SmallMasks):
    """Takes its time unless it is told to hurry."""

    cheap_options = {"patience": 1}  # noqa: RUF012

    def __init__(self, model, layers=None, *, patience=1000, chunk_size=None, seed=0, upsample=True):
        super().__init__(model, chunk_size=chunk_size, seed=seed, upsample=upsample)
        self.patience = patience

    def explain(self, images, target, args):
        if self.patience > 10:
            raise TimeoutError("too long for a test")
        return super().explain(images, target, args)


def test_long_methods_are_asked_with_their_cheap_options():
    CHECKS["tuples"](Long)
    CHECKS["chunk_size"](Long)
    CHECKS["tuples"](functools.partial(Long, seed=1))
    with pytest.raises(ContractError, match="too long for a test"):
        CHECKS["tuples"](functools.partial(Long, patience=20))


def test_a_method_that_reads_no_layer_is_not_asked_about_layers():
    class Blind(Long):
        default_layers = None

    for name in ("layers", "in_place_followers"):
        with pytest.raises(Inapplicable, match="Blind reads no layers"):
            CHECKS[name](Blind)


class Probable(SmallCAM):
    """The gradient of the probability."""

    def __init__(self, model, layers=None, *, score="softmax", upsample=True):
        super().__init__(model, layers, upsample=upsample)
        self.score = score

    def scores(self, target, outputs):
        if self.score != "softmax":
            return super().scores(target, outputs)
        index = self.index(target, outputs)
        if outputs[0].numel() == 1:  # the probability of one logit z is that of the logits 0 and z
            outputs = torch.stack([0 * outputs.flatten(), outputs.flatten()], 1)
        return outputs.softmax(1).gather(1, index[:, None])[:, 0]


class ProbableAlways(Probable):
    def scores(self, target, outputs):
        return super().scores(target, outputs) if outputs.ndim == 1 else 2 * super().scores(target, outputs)


def test_one_value_is_compared_with_the_logit():
    CHECKS["single_output"](Probable)
    with pytest.raises(ContractError, match=r"the output \(N, 1\) against \(N,\)"):
        CHECKS["single_output"](ProbableAlways)
