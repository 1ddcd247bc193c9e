"""What is found out about a model is shared by its explainers, and found again when the model has changed."""

import copy
import gc
import weakref
from collections.abc import Callable

import engine_cases as cases
import pytest
import torch
from torch import Tensor, nn

from attrib_zoo import CAM, GradCAM, LayerCAM, TransformerLRP
from attrib_zoo.backbone.capture import frozen
from attrib_zoo.backbone.layers import look, resolve
from attrib_zoo.backbone.layers.known import known


class Passes:
    """Counts the images that go through a model."""

    def __init__(self, model: nn.Module) -> None:
        self.images = 0
        model.register_forward_pre_hook(self._count)

    def _count(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.images += len(inputs[0])

    def of(self, call: Callable[[], object]) -> int:
        before = self.images
        call()
        return self.images - before


def images(size: int = 64, count: int = 1) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_a_second_explainer_of_a_model_runs_it_as_often_as_a_second_call():
    model = cases.resnet()
    passes, x = Passes(model), images()
    assert passes.of(lambda: GradCAM(model).attribute(x, 1)) == 2  # the trace, and the call
    assert passes.of(lambda: GradCAM(model).attribute(x, 1)) == 1
    assert passes.of(lambda: LayerCAM(model, "layer2").attribute(x, 1)) == 1
    assert passes.of(lambda: GradCAM(model).attribute(images(96), 1)) == 2  # another size may have other layouts


def test_what_is_tested_of_tokens_is_shared_too():
    model = cases.vit()
    passes, x = Passes(model), images(32)
    first = passes.of(lambda: GradCAM(model).attribute(x, 1))
    assert first > 5  # the trace, the gradients, the places of the grid test, and the call
    assert passes.of(lambda: GradCAM(model).attribute(x, 1)) == 1


def test_the_layers_with_gradients_are_asked_for_once():
    model = cases.vit(depth=4, class_token=True, global_pool="token")
    passes, x = Passes(model), images(32)
    for count in (1, 3):
        passes.of(lambda n=count: resolve(model, None, x, count=n, rule="live"))
        assert passes.of(lambda n=count: resolve(model, None, x, count=n, rule="live")) == 0
    assert passes.of(lambda: resolve(model, None, x, count=2, rule="live")) == 1


@pytest.mark.parametrize("weights", ["shared", "fixed", "copied"])
def test_what_is_found_out_in_a_mirror_is_known_of_the_model(weights):
    model = cases.vit()
    x = images(32)
    before = known(model).version
    with frozen(model, weights) as mirror:
        assert mirror is not model
        assert known(mirror).version is known(model).version is before
        inside = look(mirror, x)
        gone = weakref.ref(mirror), weakref.ref(mirror.blocks)
    del mirror
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    assert look(model, x) is inside
    assert inside.model is model
    assert {call.module for call in inside.calls()} <= set(model.modules())
    with frozen(model, weights) as again:
        assert look(again, x) is inside


def widened(model: nn.Module) -> None:
    model.layer4 = nn.Sequential(model.layer4, nn.Conv2d(20, 24, 1), nn.BatchNorm2d(24), nn.Conv2d(24, 20, 1)).eval()


def replaced(model: nn.Module) -> None:
    model.layer4 = nn.Sequential(*model.layer3[:0], nn.Conv2d(16, 20, 3, 2, 1)).eval()


def shortened(model: nn.Module) -> None:
    model.layer4 = nn.Sequential(nn.Identity())
    model.fc = nn.Linear(16, 4)


CHANGES = {"a module added": widened, "a stage replaced": replaced, "a stage taken out": shortened}


@pytest.mark.parametrize("change", CHANGES)
def test_an_explainer_reads_the_layers_of_the_model_as_it_is(change):
    model, x = cases.resnet(), images()
    explainer = GradCAM(model)
    explainer.attribute(x, 1)
    CHANGES[change](model)
    fresh = GradCAM(copy.deepcopy(model))
    assert explainer.taps(x) == fresh.taps(x)
    torch.testing.assert_close(explainer.attribute(x, 1), fresh.attribute(x, 1), rtol=0, atol=0)


def test_a_module_that_takes_the_address_of_another_is_another():
    model = cases.resnet()
    before = known(model).version
    state = copy.deepcopy(model.fc)
    del model.fc
    for _ in range(20):  # the allocator gives the freed memory to one of the next
        model.fc = copy.deepcopy(state)
        assert known(model).version is not before
        before = known(model).version
        del model.fc


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "pooling", "max"),
        lambda m: setattr(m.layer1, "flag", True),
        lambda m: setattr(m.fc, "weight", nn.Parameter(m.fc.weight[:3].detach())),
        lambda m: m.layer1.register_module("more", nn.ReLU()),
    ],
)
def test_switches_shapes_and_names_are_part_of_the_structure(change):
    model = cases.resnet()
    before = known(model).version
    assert known(model).version is before
    change(model)
    assert known(model).version is not before


@pytest.mark.parametrize(
    "touch",
    [
        lambda m: m.train(),
        lambda m: m.requires_grad_(False),
        lambda m: m.double(),
        lambda m: nn.init.normal_(m.fc.weight),
        lambda m: m.register_forward_hook(lambda *_: None),
        lambda m: GradCAM(m).attribute(images(), 1),
    ],
)
def test_modes_weights_and_calls_are_not(touch):
    model = cases.resnet()
    before = known(model).version
    touch(model)
    assert known(model).version is before


def test_a_model_is_freed_although_much_is_known_of_it():
    model = cases.resnet()
    GradCAM(model).attribute(images(), 1)
    look(model, images())
    gone = weakref.ref(model), weakref.ref(model.layer4)
    del model
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_the_head_that_cam_needs_is_checked_again_when_it_changes():
    model, x = cases.resnet(), images()
    explainer = CAM(model)
    explainer.attribute(x, 1)
    model.fc = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 4))
    with pytest.raises(Exception, match="CAM"):
        explainer.attribute(x, 1)


def test_attention_is_found_again_when_blocks_are_taken_out():
    model, x = cases.vit(depth=4, class_token=True, global_pool="token"), images(32)
    explainer = TransformerLRP(model)
    explainer.attribute(x, 1)
    model.blocks = model.blocks[:2]
    fresh = TransformerLRP(copy.deepcopy(model))
    torch.testing.assert_close(explainer.attribute(x, 1), fresh.attribute(x, 1), rtol=0, atol=0)
