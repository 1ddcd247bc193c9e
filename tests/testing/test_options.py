"""Does the suite notice faults in a constructor's options and in how layers are read?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from captum.attr import Attribution
from contract_samples import SmallCAM, SmallMasks
from planted_faults import assert_caught, caught_by, planted_in
from torch import nn


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


@caught_by(plain_callable="AttributeError")
class TakesFunctions(SmallCAM):
    def __init__(self, model, layers=None, *, upsample=True):
        Attribution.__init__(self, model)
        self.layers, self.upsample = layers, upsample


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


@caught_by(smoothing="smooth=3 against")
class CountsTheOutside(SmallCAM):
    def smoothed(self, heat):
        return F.avg_pool2d(heat, self.smooth or 1, 1, (self.smooth or 1) // 2)


@caught_by(scaling="the ranks of the default map")
class EqualValuesInOrder(SmallCAM):
    def ranks(self, values):
        return values.argsort(dim=1, stable=True).argsort(1).to(values.dtype) / (values.shape[1] - 1)


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


@caught_by(layer_resolution="rows before columns")
class SwapsAxes(SmallCAM):
    """Rows and columns in the wrong order; what is enlarged has the right shape all the same."""

    def explain(self, images, target, args):
        return super().explain(images, target, args).transpose(2, 3)


@caught_by(layer_resolution="at .45, 33.")
class EnlargesToWholeCells(SmallCAM):
    """To a multiple of the cells, cut to the image: what the default map of an odd size is not."""

    def finish(self, heat, images):
        if self.upsample:
            h, w = (8 * -(-side // 8) for side in images.shape[2:])
            heat = F.interpolate(heat, (h, w), mode="bilinear", align_corners=False)
            heat = heat[:, :, : images.shape[2], : images.shape[3]].expand_as(images)
            return heat.to(images.dtype).contiguous()
        return super().finish(heat, images)


class WithoutAnOption(SmallCAM):
    """A class that has no map of its own resolution to compare with."""

    def __init__(self, model, layers=None):
        super().__init__(model, layers)


@caught_by(smooth_enlargement="enlarge maps bilinearly")
class BlocksWithoutAnOption(WithoutAnOption):
    """The nearest cell's value."""

    def finish(self, heat, images):
        return F.interpolate(heat, images.shape[2:], mode="nearest").expand_as(images).to(images.dtype).contiguous()


@caught_by(smooth_enlargement="align_corners=True")
class AlignsCornersWithoutAnOption(WithoutAnOption):
    def finish(self, heat, images):
        heat = F.interpolate(heat, images.shape[2:], mode="bilinear", align_corners=True)
        return heat.expand_as(images).to(images.dtype).contiguous()


@caught_by(layer_resolution="enlarged against the default map")
class BlocksWithAnOption(SmallCAM):
    def finish(self, heat, images):
        if self.upsample:
            heat = F.interpolate(heat, images.shape[2:], mode="nearest").expand_as(images)
        return heat.to(images.dtype).contiguous()


@caught_by(flips="images of .48, 32. mirrored")
class SwapsAxesOfTallImages(WithoutAnOption):
    """Rows and columns by their lengths."""

    def explain(self, images, target, args):
        heat = super().explain(images, target, args)
        return heat.transpose(2, 3) if heat.shape[2] > heat.shape[3] else heat


@caught_by(finds_evidence="images of .45, 33.")
class SwapsAxesOfOddImages(WithoutAnOption):
    """Where the image is no multiple of a cell."""

    def explain(self, images, target, args):
        heat = super().explain(images, target, args)
        return heat.transpose(2, 3) if images.shape[2] % 8 else heat


@planted_in(__name__)
def test_the_check_catches_the_fault_for_its_reason(cls, name, words):
    assert_caught(cls, name, words)
