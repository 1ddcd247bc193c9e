"""Does the suite notice what a call leaves behind, and models and types that a method handles wrongly?"""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from captum.attr import Attribution
from contract_samples import SmallCAM, SmallMasks, transparent
from planted_faults import assert_caught, caught_by, planted_in
from torch import Tensor

from attrib_zoo.testing import CHECKS, ContractError


@caught_by(inference_mode="RuntimeError")
class StaysInInferenceMode(SmallCAM):
    def explain(self, images, target, args):
        with torch.inference_mode(self.outside), torch.enable_grad():
            return super().explain(images, target, args)

    @transparent
    def attribute(self, inputs, target=None, additional_forward_args=None, *, show_progress=False):
        self.outside = torch.is_inference_mode_enabled()
        return SmallCAM.attribute(self, inputs, target, additional_forward_args)


@caught_by(forward_args="with and without the forward argument")
class IgnoresArguments(SmallCAM):
    def explain(self, images, target, args):
        return super().explain(images, target, ())


@caught_by(forward_args="in the batch against alone", noise_tunnel="", chunk_size="with a forward argument")
class RepeatsArgumentsInTheWrongOrder(SmallMasks):
    """``repeat`` where the images are repeated by ``repeat_interleave``."""

    def expand(self, args, rows):
        return [a.repeat(len(rows))[: len(rows)] if isinstance(a, Tensor) and a.ndim else a for a in args]


@caught_by(forward_args="tensor of dimension 0")
class ExpandsEverything(SmallMasks):
    def expand(self, args, rows):
        return [a[rows] for a in args]


@caught_by(float64="float64 in: got torch.float32", half_precision="got torch.float32")
class AlwaysFloat32(SmallCAM):
    def finish(self, heat, images):
        return super().finish(heat, images).float()


@caught_by(float64="pass through float32")
class RoundedToFloat32(SmallCAM):
    def cam(self, activation, gradient):
        return super().cam(activation, gradient).float().to(activation)


@caught_by(half_precision="finite")
class EpsilonBelowHalfPrecision(SmallCAM):
    def cam(self, activation, gradient):
        heat = super().cam(activation, gradient)
        return (heat - heat) / (heat - heat + 1e-9) + heat


@pytest.mark.gpu
def test_a_result_on_the_wrong_device():
    class OnTheCPU(SmallCAM):
        def finish(self, heat, images):
            return super().finish(heat, images).cpu()

    with pytest.raises(ContractError, match="on the GPU"):
        CHECKS["gpu"](OnTheCPU)


@caught_by(nothing_left_on_error="hooks")
class HookStaysOnError(SmallCAM):
    def run(self, images, args):
        handle = self.layer().register_forward_hook(lambda *_: None)
        found = super().run(images, args)
        handle.remove()
        return found


@caught_by(nothing_left_on_error="forward number 2")
class HookStaysOnLaterError(SmallCAM):
    def run(self, images, args):
        super().run(images, args)
        handle = self.layer().register_forward_hook(lambda *_: None)
        found = super().run(images, args)
        handle.remove()
        return found


@caught_by(nothing_left_on_error="failure in backward")
class HookStaysOnErrorInBackward(SmallCAM):
    def explain(self, images, target, args):
        outputs, activation = self.run(images.requires_grad_(), args)
        scores = self.scores(target, outputs)
        handle = self.layer().register_forward_hook(lambda *_: None)
        (gradient,) = torch.autograd.grad(scores.sum(), activation)
        handle.remove()
        return self.cam(self.grid(activation.detach(), images), self.grid(gradient, images))


@caught_by(nothing_left="gradient of parameter", nothing_left_on_error="gradient of parameter")
class UsesBackward(SmallCAM):
    def explain(self, images, target, args):
        outputs, activation = self.run(images.requires_grad_(), args)
        activation.retain_grad()
        self.scores(target, outputs).sum().backward()
        return self.cam(self.grid(activation.detach(), images), self.grid(activation.grad, images))


@caught_by(nothing_left="value of inputs")
class MasksInPlace(SmallCAM):
    def images(self, inputs):
        images = super().images(inputs)
        with torch.no_grad():
            return images.mul_(0.999)


@caught_by(nothing_left="requires_grad of inputs")
class ChangesRequiresGrad(SmallCAM):
    def images(self, inputs):
        images = super().images(inputs)
        return images if images.is_inference() else images.requires_grad_(not images.requires_grad)


@caught_by(nothing_left="fused_attn")
class FusedAttentionStaysOff(SmallCAM):
    def explain(self, images, target, args):
        for module in self.model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        return super().explain(images, target, args)


@caught_by(nothing_left="attribute forward")
class ForwardStaysPatched(SmallCAM):
    def explain(self, images, target, args):
        layer = self.layer()
        layer.forward = layer.forward
        return super().explain(images, target, args)


@caught_by(nothing_left="gradient mode")
class GradientModeStays(SmallCAM):
    @transparent
    def attribute(self, inputs, target=None, additional_forward_args=None, *, show_progress=False):
        torch.set_grad_enabled(True)
        return SmallCAM.attribute(self, inputs, target, additional_forward_args)


@caught_by(nothing_left="torch's global generator")
class SeedsTheGlobalGenerator(SmallMasks):
    def masks(self, images):
        torch.manual_seed(self.seed)
        return super().masks(images)


@caught_by(train_mode="training of")
class StaysInEvalMode(SmallCAM):
    def quiet(self):
        self.model.eval()
        return contextlib.nullcontext()


@caught_by(train_mode="training of")
class RestoresOneFlagForAll(SmallCAM):
    @contextlib.contextmanager
    def quiet(self):
        flag = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(flag)


@caught_by(train_mode="buffer")
class MovesBatchNorm(SmallCAM):
    def quiet(self):
        return contextlib.nullcontext()


@caught_by(deterministic="a second call")
class UnseededMasks(SmallMasks):
    def masks(self, images):
        return torch.rand(10, 1, images.shape[2] // 8, images.shape[3] // 8)


@caught_by(deterministic="a second call")
class ForgetsItsSeed(SmallMasks):
    def masks(self, images):
        self.seed += 1
        return super().masks(images)


@caught_by(keeps_no_tensor="more tensors alive")
class KeepsEveryResult(SmallCAM):
    def finish(self, heat, images):
        self.results = [*getattr(self, "results", []), heat]
        return super().finish(heat, images)


@caught_by(frozen_parameters="does not require grad")
class NeedsTrainableParameters(SmallCAM):
    def run(self, images, args):
        return super().run(images.detach(), args)


@caught_by(copies="after copy.deepcopy|AttributeError|pickle")
class HoldsAClosure(SmallCAM):
    def __init__(self, model, layers=None, *, upsample=True):
        super().__init__(model, layers, upsample=upsample)
        self.call = lambda *args: model(*args)


@caught_by(copies="a model of its own")
class CopyKeepsTheModel(SmallCAM):
    def __deepcopy__(self, memo):
        return type(self)(self.forward_func, self.layers, upsample=self.upsample)


@caught_by(compiled_models="no layer", data_parallel="in DataParallel")
class DoesNotUnwrap(SmallCAM):
    model = property(lambda self: self.forward_func)

    def grid(self, activation, images):
        bench = next(module for module in self.model.modules() if hasattr(module, "explained"))
        return super().grid(activation, images) if bench is self.forward_func else activation.new_zeros(3, 1, 4, 4)


@caught_by(scripted_models="expected an error that explains")
class TakesScriptedModels(SmallCAM):
    def __init__(self, model, layers=None, *, upsample=True):
        Attribution.__init__(self, model)
        self.layers, self.upsample = layers, upsample

    def layer(self):
        return {id(m): m for m in self.model.modules() if not isinstance(m, torch.jit.ScriptModule)}["no such layer"]


@caught_by(train_mode="without a target")
class TrainsWithoutATarget(SmallCAM):
    """Eval mode only where a target is given."""

    def explain(self, images, target, args):
        if target is None:
            for module, flag in self.flags:
                module.training = flag
        return super().explain(images, target, args)

    @contextlib.contextmanager
    def quiet(self):
        self.flags = [(module, module.training) for module in self.model.modules()]
        kept = [(name, buffer.clone()) for name, buffer in self.model.named_buffers()]
        with super().quiet():
            yield
        for (_, before), buffer in zip(kept, self.model.buffers(), strict=True):
            buffer.copy_(before)
        del self.flags


class Viewing(SmallCAM):
    """Reads the images through a view of their memory."""

    layouts: tuple[str, ...] = ()

    def images(self, inputs):
        images = super().images(inputs)
        return images if images.requires_grad else self.read(images)

    def read(self, images):
        return images


@caught_by(memory_layouts="view")
class ViewsItsImages(Viewing):
    def read(self, images):
        return images.view(len(images), -1).view(images.shape)


@caught_by(memory_layouts="channels last")
class ReadsMemoryInOrder(Viewing):
    def read(self, images):
        c, h, w = images.shape[1:]
        return images.as_strided(images.shape, (c * h * w, h * w, w, 1), images.storage_offset())


@caught_by(memory_layouts="a slice of larger images")
class ForgetsTheOffset(Viewing):
    def read(self, images):
        return images.as_strided(images.shape, images.stride(), 0)


@caught_by(memory_layouts="view")
class ViewsSlices(Viewing):
    """Knows of channels last, and takes everything else for rows after rows."""

    def read(self, images):
        if images.is_contiguous(memory_format=torch.channels_last):
            return images
        return images.view(-1).view(images.shape)


@caught_by(keeps_no_tensor="hold its graph")
class KeepsTheLastGraph(SmallCAM):
    """In a global of its module, so that no two calls' graphs are alive at once."""

    def scores(self, target, outputs):
        global LAST
        LAST = super().scores(target, outputs)
        return LAST


LAST = None


class LeavesASwitch(SmallCAM):
    """``switch(value)`` before the call, and nothing after it."""

    switch = value = None

    def explain(self, images, target, args):
        type(self).switch(self.value)
        return super().explain(images, target, args)


def benchmark(value):
    torch.backends.cudnn.benchmark = value


@caught_by(nothing_left=r"cudnn\.benchmark changed")
class LeavesCudnn(LeavesASwitch):
    switch, value = staticmethod(benchmark), True


def deterministic(value):
    torch.backends.cudnn.deterministic = value


@caught_by(nothing_left=r"cudnn\.deterministic changed")
class LeavesCudnnDeterministic(LeavesASwitch):
    switch, value = staticmethod(deterministic), True


@caught_by(nothing_left="use_deterministic_algorithms changed")
class LeavesDeterminism(LeavesASwitch):
    switch, value = staticmethod(torch.use_deterministic_algorithms), True


@caught_by(nothing_left="set_num_threads changed")
class LeavesThreads(LeavesASwitch):
    switch, value = staticmethod(torch.set_num_threads), 3


@caught_by(nothing_left=r"warnings\.filters changed")
class LeavesWarnings(LeavesASwitch):
    switch, value = staticmethod(lambda _: warnings.filterwarnings("ignore", message="left behind")), None


@caught_by(nothing_left="set_default_device changed")
class LeavesTheDevice(LeavesASwitch):
    switch, value = staticmethod(torch.set_default_device), "cpu:0"


def test_what_a_class_leaves_on_is_put_back():
    before = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    for cls in (LeavesCudnn, LeavesDeterminism, LeavesThreads, LeavesTheDevice):
        for _ in range(2):  # seen at every call, although it was on before the second
            assert_caught(cls, "nothing_left", "changed")
    assert before == (
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
    )
    assert torch.get_default_device() == torch.device("cpu")


@planted_in(__name__)
def test_the_check_catches_the_fault_for_its_reason(cls, name, words):
    assert_caught(cls, name, words)
