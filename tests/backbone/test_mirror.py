"""The mirror of a model: the same weights and code, and no way back to the user's own modules."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any

import engine_cases as cases
import pytest
import torch
from torch import Tensor, nn

from attrib_zoo import GradCAM
from attrib_zoo.backbone.capture import frozen
from attrib_zoo.backbone.mirror import Unmirrored, mirror
from attrib_zoo.backbone.module import find, original, unwrap
from attrib_zoo.testing.state import Snapshot

SCRIPTING = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A small network whose attributes the tests add to."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu().mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    model(torch.randn(16, 3, 8, 8))
    return model


def ran(model: nn.Module, running: nn.Module) -> bool:
    """Whether a pass of ``running`` runs modules of ``model``."""
    calls: list[nn.Module] = []
    handles = [module.register_forward_pre_hook(lambda m, _: calls.append(m)) for module in model.modules()]
    running(IMAGES)
    for handle in handles:
        handle.remove()
    return bool(calls)


def test_same_outputs_other_modules_and_nothing_touched():
    model = net().train()
    model.norm.eval()
    wanted = copy.deepcopy(model).eval()(IMAGES)
    before = Snapshot(model)
    found = mirror(model)
    assert torch.equal(found(IMAGES), wanted)
    assert not any(module.training for module in found.modules())
    assert not {*found.modules()} & {*model.modules()}
    assert not ran(model, found)
    assert before.changes() == []


def test_weights_are_shared_also_those_that_come_later():
    model = net()
    found = mirror(model)
    model.last.weight = nn.Parameter(torch.ones(5, 4))
    assert found.last.weight is model.last.weight
    assert all(a is b for a, b in zip(found.buffers(), model.buffers(), strict=True))


def test_tied_modules_stay_tied():
    model = net()
    model.again = model.first
    found = mirror(model)
    assert found.again is found.first
    assert found.again is not model.first


def test_weights_of_its_own():
    model = net()
    model.last.twin = model.last.weight
    fixed, copied = mirror(model, "fixed"), mirror(model, "copied")
    assert not any(p.requires_grad for p in fixed.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert fixed.last.weight.data_ptr() == model.last.weight.data_ptr()
    assert fixed.last.twin is fixed.last.weight
    with torch.no_grad():
        model.last.weight.zero_()
    assert not fixed.last.weight.any()
    assert copied.last.weight.any()


def in_a_list(model: Net) -> None:
    model.parts = [model.first, {"last": (model.last,)}]
    model.forward = functools.partial(lambda parts, x: parts[1]["last"][0](parts[0](x).mean((2, 3))), model.parts)


def as_bound_method(model: Net) -> None:
    old = model.forward
    model.forward = lambda x: 2 * old(x)


def with_a_default(model: Net) -> None:
    model.forward = lambda x, layer=model.last: layer(x.mean((2, 3)).repeat(1, 2)[:, :4])


def by_its_own_method(model: Net) -> None:
    model.kept = model.last.forward
    model.forward = functools.partial(Net.forward, model)


def by_weak_reference(model: Net) -> None:
    model.last.__dict__["parent"] = weakref.ref(model)
    model.last.forward = functools.partial(
        lambda layer, x: layer.parent().norm.weight.sum() + nn.functional.linear(x, layer.weight), model.last
    )


def in_a_cycle(model: Net) -> None:
    model.parts = [model.first]
    model.parts.append(model.parts)


@pytest.mark.parametrize(
    "arrange", [in_a_list, as_bound_method, with_a_default, by_its_own_method, by_weak_reference, in_a_cycle]
)
def test_references_lead_to_the_mirror(arrange: Callable[[Net], None]):
    model = net().eval()
    arrange(model)
    wanted = model(IMAGES)
    before = Snapshot(model)
    found = mirror(model)
    assert torch.equal(found(IMAGES), wanted)
    assert not ran(model, found)
    assert before.changes() == []


class Holder:
    def __init__(self, model: nn.Module) -> None:
        self.model = model


class Slots(nn.Module):
    __slots__ = ("kept",)


class Releasing(nn.Module):
    def __del__(self) -> None:
        pass


def held(model: Net) -> None:
    model.owner = Holder(model)


def held_deep(model: Net) -> None:
    model.owner = {"trainer": [Holder(Holder(model.last))]}


def slots(model: Net) -> None:
    model.part = Slots()


def releasing(model: Net) -> None:
    model.part = Releasing()


def scripted(model: Net) -> None:
    model.last = torch.jit.script(model.last).train()


def a_global(model: Net) -> None:
    names: dict[str, Any] = {"old": model.forward}
    exec("def forward(x): return 2 * old(x)", names)
    model.forward = names["forward"]


def lazy(model: Net) -> None:
    model.last = nn.LazyLinear(5)


@SCRIPTING
@pytest.mark.parametrize("arrange", [held, held_deep, slots, releasing, scripted, a_global, lazy])
def test_what_cannot_be_redirected_has_no_mirror(arrange: Callable[[Net], None]):
    model = net().train()
    arrange(model)
    with pytest.raises(Unmirrored):
        mirror(model)


@pytest.mark.parametrize("arrange", [held, held_deep, slots, releasing, a_global])
def test_without_a_mirror_the_maps_are_the_same(arrange: Callable[[Net], None]):
    model = net().train()
    wanted = GradCAM(copy.deepcopy(model), "norm").attribute(IMAGES, target=1)
    if arrange is a_global:
        wanted = 2 * wanted
    arrange(model)
    before = Snapshot(model)
    torch.testing.assert_close(GradCAM(model, "norm").attribute(IMAGES, target=1), wanted)
    assert before.changes() == []


@SCRIPTING
def test_a_scripted_part_in_eval_mode_is_shared():
    model = net().eval()
    model.last = torch.jit.script(model.last)
    found = mirror(model)
    assert torch.equal(found(IMAGES), model(IMAGES))


class TestHooks:
    def test_of_the_user_answer_too(self):
        model, seen = net().eval(), []
        model.last.register_forward_hook(lambda m, _, out: seen.append(out) or 2 * out)
        model.first.register_forward_pre_hook(lambda m, args, kwargs: seen.append(args), with_kwargs=True)
        found = mirror(model)
        assert torch.equal(found(IMAGES), model(IMAGES))
        assert len(seen) == 4

    def test_of_a_module_on_itself_answer_as_the_mirror(self):
        class Doubling(nn.Linear):
            def double(self, _: nn.Module, __: Any, output: Tensor) -> Tensor:
                modes.append(self.training)
                return 2 * output

        modes: list[bool] = []
        model = net().train()
        model.last = Doubling(4, 5)
        model.last.register_forward_hook(model.last.double)
        mirror(model)(IMAGES)
        assert modes == [False]

    def test_on_the_mirror_are_not_on_the_model(self):
        model = net()
        before = Snapshot(model)
        found = mirror(model)
        for module in found.modules():
            module.register_forward_hook(lambda *_: None)
            module.register_forward_pre_hook(lambda *_: None, with_kwargs=True)
            module.register_full_backward_hook(lambda *_: None)
        assert before.changes() == []

    @pytest.mark.parametrize("make", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
    def test_that_make_the_weight(self, make: Callable[..., nn.Module]):
        model = net()
        model.last = make(model.last)
        model.train()
        before = Snapshot(model)
        wanted = copy.deepcopy(model).eval()(IMAGES)
        assert torch.equal(mirror(model)(IMAGES), wanted)
        assert before.changes() == []


class TestFrozen:
    def test_unwrap_and_find_give_the_mirror_inside_and_the_model_outside(self):
        model = cases.resnet().train()
        with frozen(model) as running:
            assert unwrap(model) is running is not model
            assert find(model, "layer4") is running.layer4
            assert original(running) is original(model) is model
            with frozen(model) as again, frozen(running) as third:
                assert again is third is running
            assert unwrap(model) is running
        assert unwrap(model) is model

    def test_compiled_parts_are_looked_through(self):
        model = net().eval()
        wanted = model(IMAGES)
        model.last = torch.compile(model.last, backend="eager")
        model.first.compile(backend="eager")
        compiled = torch.compile(model, backend="eager")
        compiled(IMAGES)
        with frozen(compiled) as running:
            assert type(running.last) is nn.Linear
            assert torch.equal(running(IMAGES), wanted)
            assert not ran(model, running)
