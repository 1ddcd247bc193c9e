"""Does the suite notice faults in what a call takes and returns?"""

from __future__ import annotations

import functools
import inspect
import warnings

import torch
import torch.nn.functional as F
from captum.attr import PerturbationAttribution
from contract_samples import SmallCAM, SmallMasks, SmallTrained, transparent
from planted_faults import assert_caught, caught_by, planted_in
from torch import Tensor, nn

from attrib_zoo.testing import CHECKS


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


@caught_by(informative="all zero")
class OfOneClassOnly(SmallCAM):
    explained = (3,)

    @transparent
    def attribute(self, inputs, target=None, additional_forward_args=None, *, show_progress=False):
        found = SmallCAM.attribute(self, inputs, target, additional_forward_args)
        return found if target in self.explained else found * 0


class OfThreeClassesOnly(OfOneClassOnly):
    explained = (1, 2, 3)


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


@caught_by(plain_tensor="detached")
class GraphLeaksOut(SmallCAM):
    def finish(self, heat, images):
        return super().finish(heat, images) + 0 * images


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


@caught_by(single_output="class 0 of the one logit z against that of the logits -z and 0")
class OneValueIsNeverNegated(SmallCAM):
    def scores(self, target, outputs):
        return outputs.flatten() if outputs[0].numel() == 1 else super().scores(target, outputs)


@caught_by(several_targets="at once against one after the other")
class SeveralTransposed(SmallCAM):
    def attribute_many(self, inputs, targets, additional_forward_args=None):
        return super().attribute_many(inputs, targets, additional_forward_args).flip(1)


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


@caught_by(no_warning="expected one warning of negative features")
class SilentAboutNegativeFeatures(SmallCAM):
    nonnegative = True


@caught_by(no_warning="look out")
class Warns(SmallCAM):
    def explain(self, images, target, args):
        warnings.warn("look out", stacklevel=2)
        return super().explain(images, target, args)


@caught_by(bad_inputs="an image without the batch axis")
class TakesOneImage(SmallCAM):
    def images(self, inputs):
        return super().images(inputs[None] if isinstance(inputs, Tensor) and inputs.ndim == 3 else inputs)


@caught_by(bad_inputs="NaN in an image: expected an error")
class TakesNaN(SmallCAM):
    def images(self, inputs):
        return super().images(inputs.nan_to_num() if isinstance(inputs, Tensor) else inputs)


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


@caught_by(input_shape="expected shape")
class EnlargesByAFactor(SmallCAM):
    """By the stride of the layer: right at all sizes that are multiples of it."""

    def finish(self, heat, images):
        if self.upsample:
            heat = F.interpolate(heat, scale_factor=8, mode="bilinear", align_corners=False)
            return heat.expand(-1, images.shape[1], -1, -1).to(images.dtype).contiguous()
        return super().finish(heat, images)


def test_a_class_without_evidence_may_have_an_empty_map():
    CHECKS["informative"](OfThreeClassesOnly)


@planted_in(__name__)
def test_the_check_catches_the_fault_for_its_reason(cls, name, words):
    assert_caught(cls, name, words)
