"""Predictions and maps from one pass: for every method they are the model's and the method's own."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from captum.attr import Attribution

import attrib_zoo
from attrib_zoo import Contrast, GradCAM, HiResCAM
from attrib_zoo.errors import OptionError, TargetError
from attrib_zoo.models.onepass import answer
from attrib_zoo.testing.benches import bench

METHODS = {
    name: thing
    for name, thing in sorted(vars(attrib_zoo).items())
    if inspect.isclass(thing) and issubclass(thing, Attribution) and not inspect.isabstract(thing)
}


@pytest.mark.parametrize("name", METHODS)
def test_outputs_and_maps_of_every_method(name: str) -> None:
    method = METHODS[name]
    found = bench("cnn" if "cnn" in method.models else "vit")
    explainer = method(found.model, **method.cheap_options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method.needs_fit:
            explainer.fit(found.batches, max_steps=1, show_progress=False)
        said = answer({"x": explainer}, found.inputs, top_k=2)
        with torch.no_grad():
            shares = found.model(found.inputs).softmax(1)
        best = shares.topk(2).indices
        wanted = explainer.attribute_many(found.inputs, best)[:, :, 0]
    assert torch.equal(said.classes, best)
    assert torch.equal(said.decision, best[:, 0])
    assert torch.allclose(said.confidence, shares, atol=1e-6)
    assert torch.allclose(said.maps["x"].to(wanted), wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-5)
    assert len(set(said.decision.tolist())) > 1


def test_contrast_targets_and_several_explainers() -> None:
    found = bench("cnn")
    methods = {"a": GradCAM(found.model), "b": HiResCAM(found.model, upsample=False)}
    said = answer(methods, found.inputs, targets=[2, 0], contrast=2)
    for name, method in methods.items():
        for column, target in enumerate((2, 0)):
            wanted = method.attribute(found.inputs, Contrast(2, target=target))[:, 0]
            assert torch.allclose(said.maps[name][:, column], wanted, atol=1e-6)
    each = torch.arange(len(found.inputs)).remainder(3).view(-1, 1)
    said = answer({"a": methods["a"]}, found.inputs, targets=each, score="sigmoid")
    assert torch.allclose(said.maps["a"][:, 0], methods["a"].attribute(found.inputs, each[:, 0])[:, 0], atol=1e-6)
    assert torch.allclose(said.confidence, found.model(found.inputs).sigmoid(), atol=1e-6)


def test_what_cannot_be_asked_is_said() -> None:
    found = bench("cnn")
    explainer = {"a": GradCAM(found.model)}
    count = found.model(found.inputs).shape[1]
    with pytest.raises(OptionError, match=f"top_k: the model has {count} classes, got 99"):
        answer(explainer, found.inputs, top_k=99)
    with pytest.raises(TargetError, match=f"must be a class in 0..{count - 1}"):
        answer(explainer, found.inputs, targets=[count])
    with pytest.raises(OptionError, match="must hold at least one explainer, got none"):
        answer({}, found.inputs)
