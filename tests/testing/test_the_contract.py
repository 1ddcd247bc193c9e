"""Does the contract suite bite? One deliberately wrong class for each fault, and the checks that must catch it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from captum.attr import Attribution, LayerGradCam, PerturbationAttribution
from contract_samples import SmallCAM, SmallMasks, SmallTrained, both, transparent
from torch import Tensor, nn

from attrib_zoo.errors import UnsupportedModelError
from attrib_zoo.testing import CHECKS, ContractError, Inapplicable, check_attribution

FAULTS = []
"""(wrong class, name of a check, words of its reason)"""


def caught_by(**reasons):
    """``check="part of the reason"`` for each check that must catch the class."""

    def register(cls):
        FAULTS.extend((cls, name, words) for name, words in reasons.items())
        return cls

    return register


# ---------------------------------------------------------------------- the call


@caught_by(
    captum_subclass="subclass of captum.attr.Attribution",
    wrapped="__wrapped__",
    signature="expected exactly inputs, target, additional_forward_args",
    tuples="",
    input_shape="expected shape",
    noise_tunnel="AttributeError",
)
class NoBaseClass:
    def __init__(self, model):
        self.forward_func = model

    def get_name(self):
        return "NoBaseClass"

    multiplies_by_inputs = False

    def attribute(self, inputs, target):
        return SmallCAM(self.forward_func).attribute(inputs, target)[:, :1]


@caught_by(wrapped="functools.wraps", noise_tunnel="__wrapped__")
class Undecorated(SmallCAM):
    def attribute(self, inputs, target=None, additional_forward_args=None, *, show_progress=False):
        return SmallCAM.attribute(self, inputs, target, additional_forward_args)


@caught_by(signature="expected exactly", tuples="", forward_args="additional_forward_args", noise_tunnel="")
class NoTuplesNoArguments(SmallCAM):
    @transparent
    def attribute(self, inputs, target=None):
        return (
            SmallCAM.attribute(self, inputs, target)[0]
            if isinstance(inputs, tuple)
            else SmallCAM.attribute(self, inputs, target)
        )


@caught_by(signature="expected exactly")
class ExtraKeyword(SmallCAM):
    @transparent
    def attribute(self, inputs, target=None, additional_forward_args=None, box=None, *, show_progress=False):
        return SmallCAM.attribute(self, inputs, target, additional_forward_args)


@caught_by(signature="by name in another order")
class ProgressChangesTheMap(SmallCAM):
    @transparent
    def attribute(self, inputs, target=None, additional_forward_args=None, *, show_progress=False):
        found = SmallCAM.attribute(self, inputs, target, additional_forward_args)
        return found * 2 if show_progress else found


@caught_by(signature="unknown keyword")
class SwallowsKeywords(SmallCAM):
    @transparent
    def attribute(self, inputs, target=None, additional_forward_args=None, *, show_progress=False, **ignored):
        return SmallCAM.attribute(self, inputs, target, additional_forward_args)

    attribute.__signature__ = inspect.signature(SmallCAM.attribute)


@caught_by(wrapped=r"inner\(found, \(case.inputs,\)", noise_tunnel=r"\(N, C, H, W\)")
class TuplesInTheDecorator(SmallCAM):
    def attribute(self, inputs, target=None, additional_forward_args=None, *, show_progress=False):
        return SmallCAM.attribute(self, (inputs,), target, additional_forward_args)[0]

    @functools.wraps(attribute)
    def outer(self, inputs, *args, inner=attribute, **kwargs):
        return (
            (inner(self, *inputs, *args, **kwargs),)
            if isinstance(inputs, tuple)
            else inner(self, inputs, *args, **kwargs)
        )

    attribute = outer


@caught_by(tuples="a list: expected an error")
class TakesLists(SmallCAM):
    def images(self, inputs):
        return super().images(tuple(inputs) if isinstance(inputs, list) else inputs)


@caught_by(tuples="a 1-tuple: expected a 1-tuple", sensitivity_max="must match", noise_tunnel="1-tuple")
class TupleAnsweredWithTensor(SmallCAM):
    @transparent
    def attribute(self, inputs, target=None, additional_forward_args=None, *, show_progress=False):
        found = SmallCAM.attribute(self, inputs, target, additional_forward_args)
        return found[0] if isinstance(found, tuple) else found


@caught_by(plain_tensor="contiguous", sensitivity_max="view")
class ExpandedChannels(SmallCAM):
    def finish(self, heat, images):
        return super().finish(heat, images)[:, :1].expand_as(images)


@caught_by(input_shape="expected shape", infidelity="")
class OneChannel(SmallCAM):
    def finish(self, heat, images):
        return super().finish(heat, images)[:, :1].contiguous()


@caught_by(input_shape="expected shape", infidelity="", layer_resolution="enlarged")
class LayerSized(SmallCAM):
    def finish(self, heat, images):
        return heat


@caught_by(input_shape="same map in every channel")
class ChannelsDiffer(SmallCAM):
    def finish(self, heat, images):
        return super().finish(heat, images) * (torch.arange(images.shape[1]).view(1, -1, 1, 1) + 1)


@caught_by(input_shape="all zero", informative="all zero", visualization="all zero")
class AlwaysZero(SmallCAM):
    def cam(self, activation, gradient):
        return super().cam(activation, gradient) * 0


@caught_by(informative="constant over space")
class NoMap(SmallCAM):
    def cam(self, activation, gradient):
        return (activation * gradient).sum((1, 2, 3), keepdim=True).abs()


@caught_by(informative="class_agnostic = True")
class AgnosticUnsaid(SmallCAM):
    def cam(self, activation, gradient):
        return activation.mean(1, keepdim=True)


@caught_by(informative="class_agnostic is True")
class AgnosticUntrue(SmallCAM):
    class_agnostic = True


@caught_by(no_grad="does not require grad", noise_tunnel="does not require grad")
class NoEnableGrad(SmallCAM):
    def explain(self, images, target, args):
        with torch.set_grad_enabled(self.outside):
            return super().explain(images, target, args)

    @transparent
    def attribute(self, inputs, target=None, additional_forward_args=None, *, show_progress=False):
        self.outside = torch.is_grad_enabled()
        return SmallCAM.attribute(self, inputs, target, additional_forward_args)


@caught_by(inference_mode="RuntimeError")
class StaysInInferenceMode(SmallCAM):
    def explain(self, images, target, args):
        with torch.inference_mode(self.outside), torch.enable_grad():
            return super().explain(images, target, args)

    @transparent
    def attribute(self, inputs, target=None, additional_forward_args=None, *, show_progress=False):
        self.outside = torch.is_inference_mode_enabled()
        return SmallCAM.attribute(self, inputs, target, additional_forward_args)


@caught_by(plain_tensor="detached")
class GraphLeaksOut(SmallCAM):
    def finish(self, heat, images):
        return super().finish(heat, images) + 0 * images


@caught_by(captum_subclass="get_name")
class SpacedName(SmallCAM):
    get_name = Attribution.get_name


@caught_by(captum_subclass="forward_func")
class WrapsTheModel(SmallCAM):
    def __init__(self, model):
        super().__init__(nn.Sequential(model))


@caught_by(captum_subclass="inherited from Captum's PerturbationAttribution")
class BasesInTheWrongOrder(PerturbationAttribution, SmallCAM):
    upsample = True
    layers = None


@caught_by(convergence_delta="has_convergence_delta")
class ClaimsDelta(SmallCAM):
    def has_convergence_delta(self):
        return True


@caught_by(convergence_delta="compute_convergence_delta")
class ComputesDelta(SmallCAM):
    def compute_convergence_delta(self, *args, **kwargs):
        return torch.zeros(3)


# ---------------------------------------------------------------------- targets


@caught_by(target_forms="", batch_independence="", bad_target="", noise_tunnel="")
class AllColumns(SmallCAM):
    """``out[:, target]``, as right in shape as can be."""

    def scores(self, target, outputs):
        return outputs[:, self.index(None, outputs) if target is None else target].sum(-1)


@caught_by(target_forms="tuples are not supported")
class NoTupleTargets(SmallCAM):
    def index(self, target, outputs):
        if isinstance(target, tuple):
            raise TypeError("target: tuples are not supported")
        return super().index(target, outputs)


@caught_by(bad_target="target=-1: expected an error")
class NegativeTargets(SmallCAM):
    def index(self, target, outputs):
        return super().index(target % outputs.shape[1] if isinstance(target, int) and target < 0 else target, outputs)


@caught_by(bad_target="target=5")
class NoRangeCheck(SmallCAM):
    def index(self, target, outputs):
        return torch.as_tensor(target).expand(len(outputs)).clamp(0, outputs.shape[1] - 1)


@caught_by(bad_target="5 classes")
class WordlessRangeCheck(SmallCAM):
    def index(self, target, outputs):
        try:
            return super().index(target, outputs)
        except IndexError:
            raise IndexError("bad target") from None


@caught_by(own_decision="target=None against the argmax")
class ExplainsTheLeastLikely(SmallCAM):
    def index(self, target, outputs):
        return super().index(outputs.argmin(1) if target is None else target, outputs)


@caught_by(finds_evidence="expected more of the map on it")
class EvidenceAgainst(SmallCAM):
    def cam(self, activation, gradient):
        return super().cam(activation, -gradient)


@caught_by(finds_evidence="the weaker patch")
class AlwaysTheDecision(SmallCAM):
    def scores(self, target, outputs):
        self.index(target, outputs)
        return super().scores(None, outputs)


@caught_by(own_decision="target=None with forward arguments")
class DecidesWithoutArguments(SmallCAM):
    def explain(self, images, target, args):
        if target is None:
            target = self.index(None, self.model(images))
        return super().explain(images, target, args)


@caught_by(own_decision="target=None against the argmax")
class DecidesPerMask(SmallMasks):
    """Each masked copy is scored for its own decision."""

    def index(self, target, outputs):
        self.asked = target is not None
        return super().index(target, outputs)

    def one_chunk(self, images, shown, rows, cols, index, args):
        if self.asked:
            return super().one_chunk(images, shown, rows, cols, index, args)
        return self.model(images[rows] * shown[cols], *self.expand(args, rows)).amax(1)


@caught_by(single_output="")
class ArgmaxOfOneValue(SmallCAM):
    def index(self, target, outputs):
        return super().index(outputs.argmax(1) if target is None else target, outputs)


@caught_by(single_output="target=None against the sign of the logit")
class OneValueIsAlwaysPositive(SmallCAM):
    def index(self, target, outputs):
        single = target is None and outputs[0].numel() == 1
        return super().index(1 if single else target, outputs)


@caught_by(single_output="class 0 of the one logit z against that of the logits -z and z")
class OneValueIsNeverNegated(SmallCAM):
    def scores(self, target, outputs):
        return outputs.flatten() if outputs[0].numel() == 1 else super().scores(target, outputs)


@caught_by(several_targets="at once against one after the other")
class SeveralTransposed(SmallCAM):
    def attribute_many(self, inputs, targets, additional_forward_args=None):
        return super().attribute_many(inputs, targets, additional_forward_args).flip(1)


# ---------------------------------------------------------------------- batches


@caught_by(batch_independence="against alone", forward_args="against alone", sensitivity_max="differ by")
class MinMaxOverTheBatch(SmallCAM):
    def cam(self, activation, gradient):
        heat = super().cam(activation, gradient)
        return heat / heat.max()


@caught_by(batch_independence="against alone")
class OtherMasksForEachImage(SmallMasks):
    def explain(self, images, target, args):
        if len(images) == 1:
            return super().explain(images, target, args)
        index = self.index(target, self.model(images, *args))
        rows = [self.expand(args, [n]) for n in range(len(images))]
        maps = []
        for n, row in enumerate(rows):
            self.seed, before = self.seed + n, self.seed
            maps.append(super().explain(images[n : n + 1], index[n : n + 1], row))
            self.seed = before
        return torch.cat(maps)


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


@caught_by(chunk_size="against the default")
class DropsTheLastChunk(SmallMasks):
    def all_scores(self, images, masks, index, args):
        found = super().all_scores(images, masks, index, args).clone()
        total = found.numel()
        size = self.chunk_size or total
        found.view(-1)[total // size * size :] = 0
        return found


@caught_by(chunk_size="against the default")
class SoftmaxOverTheChunk(SmallMasks):
    def combine(self, scores, masks):
        size = min(self.chunk_size or len(masks), len(masks))
        weights = torch.cat([part.softmax(1) for part in scores.split(size, 1)], 1)
        return torch.einsum("nm,mchw->nchw", weights.to(masks), masks)


@caught_by(out_of_memory="CUDA out of memory")
class GivesUpOnMemory(SmallMasks):
    def one_chunk(self, *args):
        try:
            return super().one_chunk(*args)
        except torch.cuda.OutOfMemoryError as error:
            raise RuntimeError(str(error)) from None


@caught_by(out_of_memory="differ by")
class LosesTheFailedChunk(SmallMasks):
    def one_chunk(self, images, shown, rows, cols, index, args):
        try:
            return super().one_chunk(images, shown, rows, cols, index, args)
        except torch.cuda.OutOfMemoryError:
            return torch.zeros(len(rows))


# ---------------------------------------------------------------------- types and numbers


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


@caught_by(finite="all zero: expected finite maps")
class MinMaxOfAConstant(SmallCAM):
    def cam(self, activation, gradient):
        heat = super().cam(activation, gradient) + 1e-6 * activation.sum(1, keepdim=True)
        low, high = heat.amin((2, 3), keepdim=True), heat.amax((2, 3), keepdim=True)
        return (heat - low) / (high - low)


@caught_by(finite="finite maps", visualization="")
class NotANumberInTheCorner(SmallCAM):
    def finish(self, heat, images):
        out = super().finish(heat, images)
        out[:, :, 0, 0] = float("nan")
        return out


@caught_by(infidelity="differ by")
class GrowsWithTheBatch(SmallCAM):
    def cam(self, activation, gradient):
        return super().cam(activation, gradient) * len(activation)


@pytest.mark.gpu
def test_a_result_on_the_wrong_device():
    class OnTheCPU(SmallCAM):
        def finish(self, heat, images):
            return super().finish(heat, images).cpu()

    with pytest.raises(ContractError, match="on the GPU"):
        CHECKS["gpu"](OnTheCPU)


# ---------------------------------------------------------------------- what is left behind


@caught_by(nothing_left="hooks", nothing_left_on_error="hooks", bad_target="hooks")
class HookStays(SmallCAM):
    def run(self, images, args):
        self.layer().register_forward_hook(lambda *_: None)
        return super().run(images, args)


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


@caught_by(no_warning="expected one warning of negative features")
class SilentAboutNegativeFeatures(SmallCAM):
    nonnegative = True


@caught_by(no_warning="look out")
class Warns(SmallCAM):
    def explain(self, images, target, args):
        warnings.warn("look out", stacklevel=2)
        return super().explain(images, target, args)


# ---------------------------------------------------------------------- unusual models and inputs


@caught_by(bad_inputs="an image without the batch axis")
class TakesOneImage(SmallCAM):
    def images(self, inputs):
        return super().images(inputs[None] if isinstance(inputs, Tensor) and inputs.ndim == 3 else inputs)


@caught_by(bad_inputs="NaN in an image: expected an error")
class TakesNaN(SmallCAM):
    def images(self, inputs):
        return super().images(inputs.nan_to_num() if isinstance(inputs, Tensor) else inputs)


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


@caught_by(plain_callable="AttributeError")
class TakesFunctions(SmallCAM):
    def __init__(self, model, layers=None, *, upsample=True):
        Attribution.__init__(self, model)
        self.layers, self.upsample = layers, upsample


# ---------------------------------------------------------------------- options and layers


@caught_by(options="upsample: expected a keyword-only parameter")
class PositionalOption(SmallCAM):
    def __init__(self, model, layers=None, upsample=True):
        super().__init__(model, layers, upsample=upsample)


@caught_by(options="seed=object\\(\\): expected an error")
class UncheckedOption(SmallMasks):
    def __init__(self, model, *, seed=0, upsample=True):
        super().__init__(model, upsample=upsample)
        self.seed = seed


@caught_by(options="expected repr to show upsample=False")
class SilentRepr(SmallCAM):
    __repr__ = object.__repr__


@caught_by(layers="an unknown layer")
class WordlessLookup(SmallCAM):
    def layer(self):
        return dict(self.model.named_modules())[self.layers] if isinstance(self.layers, str) else super().layer()


@caught_by(layers="a layer that never runs")
class LayerNeverRan(SmallCAM):
    def run(self, images, args):
        try:
            return super().run(images, args)
        except ValueError:
            return self.model(images, *args), [][0]


@caught_by(layers="a module against its name")
class ModuleIgnored(SmallCAM):
    def layer(self):
        return self.model.get_submodule("stages.1") if isinstance(self.layers, nn.Module) else super().layer()


@caught_by(layers="a layer for a method that reads none")
class LayersForgotten(SmallCAM):
    def taps(self, inputs):
        return ()

    def layer(self):
        return self.model.get_submodule(self.model.explained)


@caught_by(in_place_followers="in-place ReLU")
class NoCloneInTheHook(SmallCAM):
    def run(self, images, args):
        kept = []
        handle = self.layer().register_forward_hook(lambda module, inputs, output: kept.append(output))
        try:
            outputs = self.model(images, *args)
        finally:
            handle.remove()
        return outputs, kept[0]


@caught_by(layer_resolution="enlarged")
class AlignsCorners(SmallCAM):
    def finish(self, heat, images):
        if self.upsample:
            heat = F.interpolate(heat, images.shape[2:], mode="bilinear", align_corners=True)
            return heat.expand_as(images).contiguous()
        return super().finish(heat, images)


@caught_by(layer_resolution="a layer's resolution")
class IgnoresUpsample(SmallCAM):
    def finish(self, heat, images):
        return (
            F.interpolate(heat, images.shape[2:], mode="bilinear")
            .expand(-1, 3 if self.upsample else 1, -1, -1)
            .contiguous()
        )


@caught_by(flips="mirrored")
class RowsAndColumnsSwapped(SmallCAM):
    def cam(self, activation, gradient):
        return super().cam(activation, gradient).transpose(2, 3)


@caught_by(flips="on nhwc")
class SwappedOnChannelsLast(SmallCAM):
    def grid(self, activation, images):
        found = super().grid(activation, images)
        last = activation.ndim == 4 and activation.shape[-1] == found.shape[1]
        return found.transpose(2, 3) if last else found


@caught_by(flips="on registers")
class OnePrefixToken(SmallCAM):
    def grid(self, activation, images):
        if activation.ndim == 3:
            h, w = images.shape[2] // 8, images.shape[3] // 8
            return activation[:, 1 : 1 + h * w].unflatten(1, (h, w)).permute(0, 3, 1, 2)
        return super().grid(activation, images)


@caught_by(flips="on vit")
class TokensReadByColumns(SmallCAM):
    def grid(self, activation, images):
        if activation.ndim == 3:
            h, w = images.shape[2] // 8, images.shape[3] // 8
            return activation[:, -h * w :].unflatten(1, (w, h)).permute(0, 3, 2, 1)
        return super().grid(activation, images)


# ---------------------------------------------------------------------- trained methods


@caught_by(unfitted="expected the message to name")
class WordlessBeforeFit(SmallTrained):
    def ready(self):
        if self.network_ is None:
            raise RuntimeError("not ready")


@caught_by(unfitted="attribute before fit: expected an error")
class AnswersBeforeFit(SmallTrained):
    def ready(self):
        if self.network_ is None:
            self.fit([torch.rand(1, 3, 32, 32)])


@caught_by(unfitted="expected attribute.__wrapped__", wrapped="__wrapped__")
class ChecksFittedInAnOverride(SmallTrained):
    def attribute(self, inputs, target=None, additional_forward_args=None, *, show_progress=False):
        SmallTrained.ready(self)
        return SmallTrained.attribute(self, inputs, target, additional_forward_args)

    def ready(self):
        pass


@caught_by(fit_returns_self="return self")
class FitReturnsNothing(SmallTrained):
    def fit(self, *args, **kwargs):
        super().fit(*args, **kwargs)
        return None


@caught_by(fit_returns_self="end in '_', got losses")
class PlainNames(SmallTrained):
    def fit(self, *args, **kwargs):
        super().fit(*args, **kwargs)
        self.losses = []
        return self


@caught_by(fit_returns_self="Raised ValueError: loader")
class ImagesAlone(SmallTrained):
    def batch(self, batch):
        return super().batch(None if isinstance(batch, (tuple, list, dict)) else batch)


@caught_by(refit="second fit against")
class ContinuesTheFirstFit(SmallTrained):
    def start(self, loader, seed, resume_from):
        found = super().start(loader, seed, resume_from)
        if self.previous is not None:
            self.network_ = self.previous
        return found

    previous = None

    def fit(self, *args, **kwargs):
        type(self).previous = self.network_
        try:
            return super().fit(*args, **kwargs)
        finally:
            type(self).previous = None


@caught_by(fit_leaves_model="torch's global generator")
class FitSeedsTheGlobalGenerator(SmallTrained):
    def fit(self, *args, seed=0, **kwargs):
        torch.manual_seed(seed)
        return super().fit(*args, seed=seed, **kwargs)


@caught_by(fit_leaves_model="buffer stages.0.1.running_mean")
class FitMovesBatchNorm(SmallTrained):
    def step(self, images):
        self.model.train()
        super().step(images)
        self.model.eval()


@caught_by(fit_leaves_model="fitted with the model in training mode")
class FitsInTheGivenMode(SmallTrained):
    """Dropout runs; BatchNorm's statistics are restored afterwards, so only the values tell."""

    def train_all(self, *args):
        saved = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        super().train_all(*args)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(saved[name])

    @contextlib.contextmanager
    def quiet(self):
        flags = [(module, module.training) for module in self.model.modules()]
        self.model.train(self.model.head.training)
        try:
            yield
        finally:
            for module, flag in flags:
                module.training = flag


@caught_by(fit_leaves_model="gradient of parameter")
class FitUsesTheModelsGradients(SmallTrained):
    def step(self, images):
        super().step(images)
        for parameter in self.model.parameters():
            parameter.grad = None


@caught_by(fit_leaves_model="value of parameter")
class FitTrainsTheModel(SmallTrained):
    def step(self, images):
        super().step(images)
        with torch.no_grad():
            self.model.head.bias.add_(0.01)


@caught_by(fit_leaves_model="requires_grad of parameter")
class FitUnfreezes(SmallTrained):
    def step(self, images):
        super().step(images)
        self.model.requires_grad_(True)


@caught_by(fit_leaves_model_on_error="hooks|training")
class FailedFitLeavesAMess(SmallTrained):
    def train_all(self, *args):
        handle = self.layer().register_forward_hook(lambda *_: None)
        super().train_all(*args)
        handle.remove()


@caught_by(fit_leaves_model_on_error="the maps after failed fits")
class FailedFitForgetsTheFirst(SmallTrained):
    def fit(self, loader, **kwargs):
        def watched():
            for batch in loader:
                self.network_.weight.data *= 0.5
                yield batch

        if self.network_ is None:
            return super().fit(loader, **kwargs)
        return super().fit(list(watched()), **kwargs)


@caught_by(bad_loader="an empty loader")
class TakesAnEmptyLoader(SmallTrained):
    def fit(self, loader, **kwargs):
        return super().fit(loader or [torch.rand(1, 3, 32, 32)], **kwargs)


@caught_by(bad_loader="images of two sizes: expected an error")
class TakesTwoSizes(SmallTrained):
    def batch(self, batch):
        self.__dict__.pop("size", None)
        return super().batch(batch)


@caught_by(finds_evidence="expected more of the map on it")
class RowOffByOneInFit(SmallTrained):
    def step(self, images):
        self.network_.weight.data = self.network_.weight.data.roll(1, 0)
        self.momentum = self.momentum.roll(1, 0)
        super().step(images)
        self.network_.weight.data = self.network_.weight.data.roll(-1, 0)
        self.momentum = self.momentum.roll(-1, 0)


@caught_by(finds_evidence="expected more of the map on it")
class RowOffByOneInAttribute(SmallTrained):
    def row(self, index):
        return (index + 1) % len(self.network_.weight)


@caught_by(resume="resumed in the second epoch")
class ForgetsTheMomentum(SmallTrained):
    def start(self, *args):
        found = super().start(*args)
        self.momentum = torch.zeros_like(self.momentum)
        return found


@caught_by(resume="resumed in the second epoch")
class StartsTheEpochAgain(SmallTrained):
    def start(self, *args):
        return super().start(*args) // 3 * 3


@caught_by(save_load="without pickle|cannot read")
class SavesAPickle(SmallTrained):
    def write(self, path, step=0):
        torch.save({"weight": self.network_.weight.detach()}, path)


@caught_by(save_load="loaded against saved")
class SavesHalf(SmallTrained):
    def write(self, path, step=0):
        weight = self.network_.weight.data
        self.network_.weight.data = weight.half().to(weight)
        super().write(path, step)
        self.network_.weight.data = weight


@caught_by(save_load="torch's global generator")
class LoadDrawsFromTheGlobalGenerator(SmallTrained):
    @classmethod
    def load(cls, path, model, *, strict_backbone=True):
        torch.rand(1)
        return super().load(path, model, strict_backbone=strict_backbone)


@caught_by(save_load="one file")
class LeavesATemporaryFile(SmallTrained):
    def write(self, path, step=0):
        super().write(Path(f"{path}.tmp"), step)
        super().write(path, step)


@caught_by(other_backbone="one weight changed: expected an error")
class TakesAnyBackbone(SmallTrained):
    def fingerprint(self):
        return "same"


@caught_by(other_backbone="one BatchNorm mean changed: expected an error")
class LooksAtParametersOnly(SmallTrained):
    def fingerprint(self):
        return str(sum(float(p.double().sum()) for p in self.model.parameters()))


@caught_by(other_backbone="expected strict_backbone=False to warn")
class LoadsWithoutAWord(SmallTrained):
    @classmethod
    def load(cls, path, model, *, strict_backbone=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return super().load(path, model, strict_backbone=strict_backbone)


# ---------------------------------------------------------------------- the tests


@pytest.mark.parametrize(("cls", "name", "words"), FAULTS, ids=[f"{c.__name__}-{n}" for c, n, _ in FAULTS])
def test_the_check_catches_the_fault_for_its_reason(cls, name, words):
    with pytest.raises(ContractError, match=words or None) as caught:
        CHECKS[name](cls)
    assert list(caught.value.failures) == [name]
    assert cls.__name__ in str(caught.value)


RIGHT = (SmallCAM, SmallMasks, SmallTrained)
report = functools.cache(check_attribution)


@pytest.mark.parametrize("cls", RIGHT)
def test_a_right_class_passes(cls):
    assert list(report(cls)) == list(CHECKS)
    assert all(result == "passed" or result.startswith("skipped: ") for result in report(cls).values())


def test_each_check_applies_to_a_right_class():
    passed = {name for cls in RIGHT for name, result in report(cls).items() if result == "passed"}
    assert set(CHECKS) - passed <= {"gpu"}


def test_every_check_has_a_planted_fault():
    without = set(CHECKS) - {name for _, name, _ in FAULTS}
    assert without == {"gpu"}, "plant a fault: a class with @caught_by(name_of_the_check=...)"


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
    with pytest.raises(ContractError, match=r"on cnn: .* no such features"):
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
        index, outputs = self.index(target, outputs), both(outputs)
        return outputs.softmax(1).gather(1, index[:, None])[:, 0]


class ProbableAlways(Probable):
    def scores(self, target, outputs):
        return super().scores(target, outputs) if outputs.ndim == 1 else 2 * super().scores(target, outputs)


def test_one_value_is_compared_with_the_logit():
    CHECKS["single_output"](Probable)
    with pytest.raises(ContractError, match=r"the output \(N, 1\) against \(N,\)"):
        CHECKS["single_output"](ProbableAlways)
