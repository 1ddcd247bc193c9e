"""The call: its signature, what goes in, what comes out, and which output is explained."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import warnings
from typing import Any

import numpy as np
import torch
from captum.attr import Attribution, FeatureAblation
from torch import Tensor, nn

from attrib_zoo.errors import UnsupportedModelError
from attrib_zoo.testing.benches import CLASSES, MODELS
from attrib_zoo.testing.colours import ColourNet, colour_scenes
from attrib_zoo.testing.state import Snapshot
from attrib_zoo.testing.suite import Case, Inapplicable, check, different, expect, raises, same, unchanged

_ALL = tuple(MODELS)
_PARAMETERS = {
    "inputs": (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty),
    "target": (inspect.Parameter.POSITIONAL_OR_KEYWORD, None),
    "additional_forward_args": (inspect.Parameter.POSITIONAL_OR_KEYWORD, None),
    "show_progress": (inspect.Parameter.KEYWORD_ONLY, False),
}


@check()
def captum_subclass(case: Case) -> None:
    """The object is a ``captum.attr.Attribution`` for this model, named after its class."""
    found = case.explainer
    expect(isinstance(found, Attribution), "expected a subclass of captum.attr.Attribution")
    expect(found.forward_func is case.model, "expected forward_func to be the model that the factory was given")
    expect(
        found.get_name() == type(found).__name__, f"expected get_name() to be the class name, got {found.get_name()!r}"
    )
    expect(type(found.multiplies_by_inputs) is bool, "expected multiplies_by_inputs to be True or False")
    if found.multiplies_by_inputs:
        owner = next(c for c in type(found).__mro__ if "multiplies_by_inputs" in vars(c))
        expect(
            not owner.__module__.startswith("captum."),
            f"multiplies_by_inputs is True, inherited from Captum's {owner.__name__}: put your base before it, or say "
            "it in the class; maps and masks are no factors of the input",
        )


@check()
def convergence_delta(case: Case) -> None:
    """The object claims no completeness; NoiseTunnel would unpack a delta, and a user would trust it."""
    found = case.explainer
    expect(found.has_convergence_delta() is False, "expected has_convergence_delta() to be False")
    heat, zero = case.maps, torch.zeros_like(case.maps)
    computed = functools.partial(found.compute_convergence_delta, heat, zero, case.inputs, target=0)
    raises(computed, what="compute_convergence_delta")
    raises(found.attribute_future, what="attribute_future")


@check()
def wrapped(case: Case) -> None:
    """``attribute.__wrapped__`` does all the work; NoiseTunnel and TCAV call nothing else."""
    found = case.explainer
    inner: Any = getattr(type(found).attribute, "__wrapped__", None)
    expect(inner is not None, "expected attribute.__wrapped__; decorate attribute with a functools.wraps wrapper")
    same(inner(found, case.inputs, target=case.targets), case.maps, "__wrapped__ with a tensor", 0)
    boxed = inner(found, (case.inputs,), target=case.targets)
    expect(isinstance(boxed, tuple) and len(boxed) == 1, "__wrapped__ with a 1-tuple: expected a 1-tuple")
    same(boxed[0], case.maps, "__wrapped__ with a 1-tuple", 0)


@check()
def signature(case: Case) -> None:
    """``attribute(inputs, target=None, additional_forward_args=None, *, show_progress=False)``, all by name."""
    found = case.explainer
    parameters = inspect.signature(found.attribute).parameters
    shown = {name: (p.kind, p.default) for name, p in parameters.items()}
    expect(shown == _PARAMETERS, f"expected exactly {', '.join(_PARAMETERS)}, got {inspect.signature(found.attribute)}")
    gates = case.bench.gates
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        named = found.attribute(
            show_progress=True, additional_forward_args=gates, target=case.targets, inputs=case.inputs
        )
    same(named, found.attribute(case.inputs, case.targets, gates), "by name in another order", 0)
    try:
        found.attribute(case.inputs, target=0, no_such_keyword=1)
    except TypeError:
        return
    expect(False, "an unknown keyword: expected TypeError")


@check("cnn", "vit")
def tuples(case: Case) -> None:
    """A tensor gives a tensor, a 1-tuple a 1-tuple of the same values; anything else is refused."""
    boxed = case.explainer.attribute((case.inputs,), target=case.targets)
    expect(isinstance(boxed, tuple) and len(boxed) == 1, f"a 1-tuple: expected a 1-tuple, got {type(boxed).__name__}")
    same(boxed[0], case.maps, "a 1-tuple", 0)
    two = (case.inputs, case.inputs)
    raises(lambda: case.explainer.attribute(two, target=0), "(N, C, H, W)", what="a tuple of two tensors")
    raises(lambda: case.explainer.attribute([case.inputs], target=0), "(N, C, H, W)", what="a list")


@check(*_ALL)
def input_shape(case: Case) -> None:
    """The map has the shape of the input, the same in every channel, as Captum's own methods return it.

    At square, wide, tall and odd sizes, including sizes that are no multiple of a cell.
    """
    for size in ((32, 32), (32, 48), (48, 32), (45, 33)):
        sized = case.at(size)
        found = sized.maps
        expect(bool(found.any()), "the maps are all zero")
        expect(
            found.shape == sized.inputs.shape, f"expected shape {tuple(sized.inputs.shape)}, got {tuple(found.shape)}"
        )
        expect(bool((found == found[:, :1]).all()), "expected the same map in every channel")
    per_channel = torch.arange(3).view(1, 3, 1, 1)
    beside = FeatureAblation(sized.model).attribute(sized.inputs, target=[0, 1, 2], feature_mask=per_channel)
    expect(beside.shape == found.shape, "expected the shape of FeatureAblation's answer to the same call")


@check(*_ALL)
def informative(case: Case) -> None:
    """Maps are not all zero, and two targets give two maps, unless the class says ``class_agnostic = True``."""
    zero, one = (case.explainer.attribute(case.inputs, target=t) for t in (0, 1))
    if not (zero.any() and one.any()):  # behind a ReLU a random network may leave nothing of one class, but not of four
        several = [case.explainer.attribute(case.inputs, target=t) for t in range(CLASSES)]
        several = [maps for maps in several if maps.any()]
        expect(len(several) > 1, "the maps are all zero")
        zero, one = several[:2]
    expect(float((zero - zero.mean((2, 3), keepdim=True)).abs().max()) > 0, "the maps are constant over space")
    if getattr(case.explainer, "class_agnostic", False):
        same(one, zero, "class_agnostic is True, so targets 0 and 1", 1e-5)
    else:
        different(zero, one, "targets 0 and 1 (a class-agnostic method says class_agnostic = True)")


@check("cnn")
def finds_evidence(case: Case) -> None:
    """Of two coloured patches, the map of a colour's class lies on that colour, in a net that counts colours."""
    if getattr(case.explainer, "class_agnostic", False):
        raise Inapplicable("a class-agnostic map lies on both")
    # at the odd size in the quadrants that swapped axes exchange, so that little is enough to tell
    for size, quadrants, least in (((32, 32), range(4), 0.52), ((45, 33), (1, 2), 0.5)):
        images, classes, places = colour_scenes(48, size, quadrants)
        explainer = case.build(ColourNet())
        if case.fits(explainer):
            case.fit(explainer, list(images.split(16)), epochs=5)
        for j, which in enumerate(("stronger", "weaker")):
            heat = explainer.attribute(images[:12], target=classes[:12, j])[:, :1].clamp_min(0)
            own, other = (float((heat * places[:12, k : k + 1]).sum()) for k in (j, 1 - j))
            share = own / max(own + other, 1e-30)
            where = f"images of {size}, the class of the {which} patch"
            expect(share > least, f"{where}: expected more of the map on it, got {share:.0%}")


@check()
def plain_tensor(case: Case) -> None:
    """The result is contiguous, detached from every graph and ready for ``.numpy()`` and ``.view``."""
    for inputs in (case.inputs, case.inputs.clone().requires_grad_()):
        found = case.explainer.attribute(inputs, target=case.targets)
        expect(found.is_contiguous(), "expected a contiguous tensor, not an expanded view")
        expect(not found.requires_grad and found.grad_fn is None, "expected a tensor detached from the graph")
        same(torch.from_numpy(found.numpy().copy()), case.maps, "input that asks for gradients", 0)


@check("cnn", "vit")
def no_grad(case: Case) -> None:
    """The same map inside ``torch.no_grad()``, where Captum's NoiseTunnel and metrics call."""
    with torch.no_grad():
        same(case.explainer.attribute(case.inputs, target=case.targets), case.maps, "under no_grad", 0)


@check("cnn", "vit")
def target_forms(case: Case) -> None:
    """All of Captum's ways to name the same targets give the same map, also NumPy's integers."""
    ask = case.explainer.attribute
    wanted = ask(case.inputs, target=1)
    everywhere: list[Any] = [torch.tensor(1), torch.tensor([1]), [1, 1, 1], torch.tensor([1, 1, 1]), (1,), [(1,)] * 3]
    for form in [*everywhere, np.int64(1), np.array([1, 1, 1])]:
        same(ask(case.inputs, target=form), wanted, f"target={form!r} against target=1", 0)
    each = [2, 0, 1]
    wanted = ask(case.inputs, target=each)
    for form in (torch.tensor(each), [(t,) for t in each], np.array(each), [torch.tensor(t) for t in each]):
        same(ask(case.inputs, target=form), wanted, f"target={form!r} against target={each}", 0)


@check(*_ALL)
def batch_independence(case: Case) -> None:
    """Each image of a batch gets the same map as alone."""
    for dtype, rtol in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        sized = case.at((32, 48), dtype)
        for i, target in enumerate(sized.targets):
            alone = sized.explainer.attribute(sized.inputs[i : i + 1], target=target)
            same(sized.maps[i : i + 1], alone, f"image {i} of the batch against alone, {dtype}", rtol)


@check("cnn", "vit")
def own_decision(case: Case) -> None:
    """``target=None`` explains the predicted class, with the same forward arguments."""
    ask, gates = case.explainer.attribute, case.bench.gates
    decided = case.bench.decisions(case.inputs)
    with torch.no_grad():
        gated = case.model(case.inputs, gates).argmax(1)
    expect(
        len(set(decided.tolist())) > 1 and not torch.equal(decided, gated),
        "fault of the suite: decisions do not differ",
    )
    same(ask(case.inputs), ask(case.inputs, target=decided), "target=None against the argmax", 1e-6)
    wanted = ask(case.inputs, target=gated, additional_forward_args=gates)
    same(ask(case.inputs, additional_forward_args=gates), wanted, "target=None with forward arguments", 1e-6)


class _OneOutput(nn.Module):
    """A logit and a constant, as one value per image or as the two that stand for the same decision."""

    def __init__(self, model: nn.Module, form: str, offset: float) -> None:
        super().__init__()
        self.model = model
        self.form = form
        self.offset = offset

    def forward(self, inputs: Tensor, *args: Any) -> Tensor:
        out: Tensor = self.model(inputs, *args)
        z = out[:, 1] - self.offset
        two = {"negative": (-z, 0 * z), "positive": (0 * z, z)}
        return (
            {"vector": z, "column": z[:, None]}[self.form] if self.form not in two else torch.stack(two[self.form], 1)
        )


def _takes(explainer: Any, inputs: Tensor, **call: Any) -> bool:
    try:
        explainer.attribute(inputs, **call)
    except UnsupportedModelError:
        return False
    return True


@check("cnn", "vit")
def single_output(case: Case) -> None:
    """A model with one logit per image, (N,) or (N, 1), has the classes 0 and 1, and None follows the sign."""
    with torch.no_grad():
        z = case.model(case.inputs)[:, 1]
    offset = float(z.mean())  # so that both decisions occur
    decided = (z > offset).long().tolist()
    single = [case.ready(_OneOutput(case.model, form, offset)) for form in ("vector", "column")]
    negated = _takes(single[0], case.inputs, target=0)  # for instance, no relevance is defined for a negated logit
    decision: Any = None if negated else 1
    vector, column = (explainer.attribute(case.inputs, target=decision) for explainer in single)
    expect(bool(vector.any()), "the maps are all zero")
    same(column, vector, "the output (N, 1) against (N,)", 1e-6)
    for explainer in single if negated else ():
        asked = explainer.attribute(case.inputs, target=decided)
        same(vector, asked, "target=None against the sign of the logit", 1e-6)
    if not case.fits(case.explainer):  # two fits need not agree
        # these logits have the class's own value, z or -z, and its probability too
        for target, form, logits in ((0, "negative", "-z and 0"), (1, "positive", "0 and z"))[0 if negated else 1 :]:
            wanted = case.ready(_OneOutput(case.model, form, offset)).attribute(case.inputs, target=target)
            found = single[0].attribute(case.inputs, target=target)
            same(found, wanted, f"class {target} of the one logit z against that of the logits {logits}", 1e-6)


@check("cnn", "vit")
def bad_target(case: Case) -> None:
    """A nonexistent target is refused with the number of classes, and nothing is left behind."""
    ask = case.explainer.attribute
    before = Snapshot(case.model, inputs=case.inputs)
    absent: list[Any] = [5, -1, [0, 1, 5], [0, -1, 1], torch.tensor([0, 1, 9]), torch.tensor(5), (7,)]
    odd: list[Any] = [[0, 1], torch.tensor([0, 1, 2, 3]), [], 1.0, True, (0, 0), [(0, 0)] * 3, "cat"]
    odd += [torch.tensor([0.0, 1.0, 2.0]), torch.tensor([True, True, False])]
    for target in [*absent, *odd]:
        word = "target" if any(target is t for t in odd) else "5 classes"
        raises(functools.partial(ask, case.inputs, target=target), word, what=f"target={target!r}")
    unchanged(before, "after a bad target")


@check("cnn")
def bad_inputs(case: Case) -> None:
    """Images of the wrong rank, type or content are refused in a sentence with the class and ``(N, C, H, W)``."""
    images, who = case.inputs, type(case.explainer).__name__
    spoilt = images.clone()
    spoilt[1, 0, 3, 3] = float("nan")
    bad = {
        "an image without the batch axis": images[0],
        "five axes": images[None],
        "uint8 images": (images * 20 + 100).to(torch.uint8),
        "an empty batch": images[:0],
        "images without channels": images[:, :0],
        "NaN in an image": spoilt,
    }
    before = Snapshot(case.model)
    for what, inputs in bad.items():
        raises(functools.partial(case.explainer.attribute, inputs, target=0), who, "(N, C, H, W)", what=what)
    raises(lambda: case.explainer.attribute(images[:, :2], target=0), what="two channels for a model of three")
    unchanged(before, "after bad images")


@check(*_ALL)
def no_warning(case: Case) -> None:
    """An ordinary call gives no warning.

    A class with ``nonnegative = True``, whose formula is derived for features after a ReLU, gives one that says so
    where feature maps have negative sums.
    """
    explainer = case.explainer
    signed = getattr(explainer, "nonnegative", False) and _has_negative_sums(case)
    for target in (case.targets, None):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            case.build(case.model)
            explainer.attribute(case.inputs, target=target)
        said = [str(warning.message) for warning in caught]
        if signed:
            expect(len(said) == 1 and "negative" in said[0], f"expected one warning of negative features, got {said}")
        else:
            expect(not said, f"expected no warning, got {said}")


def _has_negative_sums(case: Case) -> bool:
    """Whether some feature map of the explained layer has a negative sum."""
    model = case.model
    seen: list[Tensor] = []
    hook = model.get_submodule(model.explained).register_forward_hook(lambda _, __, out: seen.append(out.clone()))
    with hook, torch.no_grad():
        model(case.inputs)
    axes = {"nchw": (2, 3), "nhwc": (1, 2), "tokens": (1,)}[model.layout]
    features = seen[0][:, model.prefix :] if model.layout == "tokens" else seen[0]
    return bool((features.sum(axes) < 0).any())


@check("cnn", "vit")
def several_targets(case: Case) -> None:
    """``attribute_many`` gives, in column t, the map of the t-th targets."""
    if not hasattr(case.explainer, "attribute_many"):
        raise Inapplicable("no attribute_many")
    many = case.explainer.attribute_many
    for rows, columns in (([[2, 0], [1, 1], [4, 2]], ([2, 1, 4], [0, 1, 2])), ([3, 0], (3, 0))):
        found = many(case.inputs, rows)
        expect(found.ndim == 5, f"targets {rows}: expected (N, 2, C, H, W), got {tuple(found.shape)}")
        wanted = [case.explainer.attribute(case.inputs, target=column) for column in columns]
        same(found, torch.stack(wanted, 1), f"targets {rows} at once against one after the other", 1e-5)
    raises(lambda: many(case.inputs, [0, 5]), "5 classes", what="class 5 among several")
