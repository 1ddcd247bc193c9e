"""A classifier that explains itself: one ``nn.Module``, images in, logits and the map of the predicted class out.

An explainer's call works on the model from outside: it makes a mirror, resolves targets, sets and removes hooks. None
of that can be compiled or exported. Here all of it has happened already: the modules are the program's own, the layers
and layouts are known, and what remains is tensor arithmetic that ``torch.compile(fullgraph=True)`` and ``torch.export``
can trace completely.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrib_zoo.attribution import SCALES
from attrib_zoo.backbone.grid import Tap
from attrib_zoo.backbone.mirror import Unmirrored, mirror
from attrib_zoo.backbone.module import find, unwrap
from attrib_zoo.backbone.nested import pick
from attrib_zoo.backbone.targets import one_logit, scores_in
from attrib_zoo.backbone.vit.attended import attended_source, seen_in_pass
from attrib_zoo.errors import UnsupportedModelError, reason
from attrib_zoo.masking import Extent, alike_filter, at_least_float32, mean_filter, moving
from attrib_zoo.training.head import AttentionHead, finest
from attrib_zoo.training.losses import two_logits

PREPROCESSING = (None, "float", "uint8")
"""What ``preprocess`` may be: nothing; standardise images in [0, 1]; standardise images in 0..255."""


class ExplainingModel(nn.Module):
    """A frozen classifier with the explanation of its decision: ``module(images)`` or ``module(images, target)``.

    It is self-contained: a plain module in eval mode whose parameters require no gradient, safe to compile, export,
    move, copy and call from several threads. Until it is moved, its tensors share the memory of the model and the
    explainer it was made from, so it costs no memory, and in-place changes of their weights show here too.

    Args:
        model: a private module, as made by :func:`own_modules`.
        readings: one for each layer that is read, in the order of execution.
        head: ``(outputs, classes (N,), features) -> (N, 1, h, w)``, the map before smoothing and scaling.
        smooth: side of the mean filter; 1 for none.
        scale: ``None``, or how the values are scaled: ``"min-max"``, ``"rank"``, ``"positive"``.
        enlarge: brings maps to the size of the images; ``None`` leaves them as they are.

    Attributes:
        prepare: applied to the images first, or ``None``.
    """

    def __init__(
        self,
        model: nn.Module,
        readings: Sequence[Reading],
        head: nn.Module,
        *,
        smooth: int = 1,
        scale: str | None = None,
        enlarge: Enlargement | None = None,
    ) -> None:
        super().__init__()
        self.prepare: nn.Module | None = None
        self.model = model
        self.readings = nn.ModuleList(readings)
        self.head = head
        self.smooth, self.scale, self.enlarge = smooth, scale, enlarge
        self.by_counting = False  # ranks without searching, which ONNX lacks
        self._heard = Heard()
        for position, reading in enumerate(readings):
            module = find(model, reading.name)
            listener = Listener(self._heard, position, reading, module if reading.attended else None)
            source = attended_source(module) if reading.attended else module
            source.register_forward_hook(listener, with_kwargs=reading.attended)
        self.eval()

    def forward(self, images: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """One pass.

        Args:
            images: ``(N, C, H, W)``, standardised, or as ``preprocess`` says.
            target: ``(N,)`` int64, the class to explain on each image; ``None`` for the model's own decision.

        Returns:
            The model's outputs; the map, ``(N, 1, H, W)`` or, with ``upsample=False``, ``(N, 1, h, w)``; and the
            explained class of each image, ``(N,)`` int64.
        """
        images = images if self.prepare is None else self.prepare(images)
        heard = self._heard.begin(len(self.readings))
        try:
            outputs = scores_in(self.model(images))
        finally:
            self._heard.end()
        classes = decision(outputs) if target is None else target
        with _full_precision(images.device.type):
            features = [reading(runs, images.shape) for reading, runs in zip(self.readings, heard, strict=True)]
            maps = mean_filter(self.head(outputs, classes, features), self.smooth)
            if self.scale is not None:
                counted = self.scale == "rank" and self.by_counting
                maps = counted_ranks(maps) if counted else SCALES[self.scale](maps)
            if self.enlarge is not None:
                maps = self.enlarge(maps, images.shape[-2:])
        return outputs, maps.to(images.dtype), classes


def decision(outputs: Tensor) -> Tensor:
    """The class ``(N,)`` that the model decides for: the argmax, or the sign of one logit."""
    if one_logit(outputs):
        return (outputs.reshape(-1) > 0).long()
    return outputs.argmax(dim=1)


def own_modules(model: nn.Module) -> nn.Module:
    """Private modules in eval mode around the same weights; where that is impossible, a deep copy.

    Raises:
        UnsupportedModelError: the model can be neither mirrored nor copied.
    """
    bare = unwrap(model)
    try:
        own = mirror(bare, "fixed")
    except Unmirrored:
        try:
            return copy.deepcopy(bare).eval().requires_grad_(False)
        except Exception as error:
            raise UnsupportedModelError(
                f"model: must allow copy.deepcopy to become a program, but {type(bare).__name__} does not "
                f"({reason(error)}); take out what refers to its modules from outside"
            ) from error
    for module in own.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            module.__dict__["_buffers"] = module._buffers.copy()  # because to(device) writes into it
    return own


# ---------------------------------------------------------------------- listening to layers


class Heard:
    """The layers' outputs in the current pass, separate for each thread.

    An object, and not a dictionary of the module: tracers replace those by copies.
    """

    def __init__(self) -> None:
        self._passes: dict[int, list[list[Tensor]]] = {}

    def begin(self, layers: int) -> list[list[Tensor]]:
        """Start listening: returns a list for each layer, which its runs fill."""
        found: list[list[Tensor]] = [[] for _ in range(layers)]
        self._passes[_thread()] = found
        return found

    def end(self) -> None:
        """Stop listening."""
        del self._passes[_thread()]

    def add(self, position: int, activation: Tensor) -> None:
        """Record a layer's run; outside a pass of the program it is ignored."""
        found = self._passes.get(_thread())
        if found is not None:
            found[position].append(activation.clone())  # later layers may work in place


def _thread() -> int:
    """The current thread; traced code has no threads."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


class Listener:
    """A forward hook; an object, so that a copied or pickled program has its own."""

    def __init__(self, heard: Heard, position: int, reading: Reading, attention: nn.Module | None) -> None:
        self.heard, self.position, self.attention = heard, position, attention
        self.name, self.element = reading.name, reading.element

    def __call__(self, _: nn.Module, given: Any, *rest: Any) -> None:
        """Keep the layer's output, or what the class token takes from each patch through an attention module."""
        if self.attention is None:
            found = pick(rest[-1], self.element)
        else:
            found = seen_in_pass(self.attention, self.name, given, *rest)
        self.heard.add(self.position, found)


class Reading(nn.Module):
    """From a layer's outputs in all its runs to its map ``(N, C, h, w)``, in float32 or better.

    Args:
        tap: the layer.
        size: (H, W) of the images that it was resolved on.
    """

    def __init__(self, tap: Tap, size: Sequence[int]) -> None:
        super().__init__()
        grid = tap.grid
        self.name, self.element, self.run = tap.name, tap.element, tap.call % tap.calls
        self.kind, self.prefix, self.hw, self.size = grid.kind, grid.prefix, grid.hw, tuple(size)
        self.attended = tap.attended
        self.order: Tensor | None
        self.register_buffer("order", None if grid.permutation is None else torch.tensor(grid.permutation))

    def forward(self, runs: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The map, given the shape ``(N, C, H, W)`` of the images."""
        activation = runs[self.run]
        if self.kind == "nchw":
            return at_least_float32(activation)
        if self.kind == "nhwc":
            return at_least_float32(activation.permute(0, 3, 1, 2))
        channel_major = activation.transpose(1, 2) if self.kind == "tokens" else activation
        cells = channel_major[:, :, self.prefix :]
        if self.order is not None:
            cells = cells[:, :, self.order]
        return at_least_float32(cells.unflatten(2, self._cells(shape)))

    def _cells(self, shape: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the tokens: as resolved, or with cells of the same size in pixels."""
        rows, columns = self.hw  # type: ignore[misc]  # set for resolved tokens
        height, width = self.size
        if self.order is not None or height % rows or width % columns:
            return rows, columns
        return shape[-2] // (height // rows), shape[-1] // (width // columns)


# ---------------------------------------------------------------------- maps of classes


class ClassMaps(nn.Module):
    """The target class's map from a trained network, minus a share of its rivals' mean map.

    Args:
        network: ``(features, rows (N, M)) -> (N, M, h, w)``; private modules.
        places: the position of each layer's map among the others.
        rivals: how many classes are subtracted, those with the largest logits.
        weight: the weight of their mean.
    """

    def __init__(self, network: nn.Module, places: Sequence[Enlargement], rivals: int, weight: float) -> None:
        super().__init__()
        self.network = network
        self.places = nn.ModuleList(places)
        rows, columns = ([place.before[axis] for place in places] for axis in (0, 1))
        self.largest = rows.index(max(rows)), columns.index(max(columns))  # here: torch 2.6 cannot trace max(key=)
        self.finest = finest(list(zip(rows, columns, strict=True)))
        self.rivals, self.weight = rivals, weight

    def forward(self, outputs: Tensor, classes: Tensor, features: Sequence[Tensor]) -> Tensor:
        """``(N, 1, h, w)``."""
        rows = classes.unsqueeze(1)
        logits = two_logits(outputs)
        rivals = min(self.rivals, logits.shape[1] - 1)
        if not rivals:
            return self._maps(features, rows)
        others = logits.scatter(1, rows, -torch.inf).topk(rivals, dim=1).indices
        found = self._maps(features, torch.cat([rows, others], dim=1))
        return found[:, :1] - (self.weight / rivals * found[:, 1:]).sum(1, keepdim=True)

    def _maps(self, features: Sequence[Tensor], rows: Tensor) -> Tensor:
        """``(N, M, h, w)``: as the network computes it; its own code may depend on sizes and cannot be traced."""
        if not isinstance(self.network, AttentionHead):
            maps: Tensor = self.network(features, rows)
            return maps
        network = self.network
        attended = network.read(features)
        if network.branches:
            attended = [branch(x) for branch, x in zip(network.branches, attended, strict=True)]
        fuser: Any = network.fuser
        weight, bias = fuser.weight.flatten(1)[rows], fuser.bias[rows]
        weights = weight.split([x.shape[1] for x in attended], dim=2)
        parts = [torch.bmm(w, x.flatten(2)).unflatten(2, x.shape[2:]) for w, x in zip(weights, attended, strict=True)]
        size = (parts[self.largest[0]].shape[2], parts[self.largest[1]].shape[3])
        logits = sum(place(part, size) for place, part in zip(self.places, parts, strict=True))
        whole: Tensor = logits + bias[:, :, None, None]
        if network.alike == 1:
            return whole
        return alike_filter(whole, network.likeness(features, self.finest))


class LinearMaps(nn.Module):
    """The map of CAM: a row of the classifier's matrix times the features.

    Args:
        weight: ``(K, D)``.
        relu: keep positive evidence only.
    """

    def __init__(self, weight: Tensor, relu: bool) -> None:
        super().__init__()
        self.weight: Tensor
        self.register_buffer("weight", weight)
        self.relu = relu

    def forward(self, outputs: Tensor, classes: Tensor, features: Sequence[Tensor]) -> Tensor:
        """``(N, 1, h, w)``."""
        (maps,) = features
        heat: Tensor = torch.bmm(self.weight[classes].unsqueeze(1), maps.flatten(2)).unflatten(2, maps.shape[2:])
        return heat.relu() if self.relu else heat


class Standardise(nn.Module):
    """``(x - mean) / std`` per channel, of images in [0, 1] or of bytes.

    Args:
        mean: C numbers.
        std: C numbers.
        like: a tensor with the dtype and device of the model.
        unit: the value of white: 1 or 255.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], like: Tensor, unit: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", like.new_tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", like.new_tensor(std).view(1, -1, 1, 1))
        self.unit = unit

    def forward(self, images: Tensor) -> Tensor:
        """``(N, C, H, W)``."""
        images = images.to(self.mean.dtype)
        return (images / self.unit - self.mean) / self.std


def counted_ranks(maps: Tensor) -> Tensor:
    """The result of :func:`~attrib_zoo.masking.rank_scale`, by comparing all pairs of cells: (h·w)² comparisons."""
    values = maps.flatten(2)
    cells = values.shape[2]
    if cells == 1:
        return torch.full_like(maps, 0.5)
    below = (values.unsqueeze(2) < values.unsqueeze(3)).to(maps.dtype).sum(3)
    reached = (values.unsqueeze(2) <= values.unsqueeze(3)).to(maps.dtype).sum(3)
    return ((below + reached - 1) / 2 / (cells - 1)).view(maps.shape)


class Enlargement(nn.Module):
    """Maps resized from one size to another: ``masking.upsample`` with all decisions made in advance.

    Args:
        before: (h, w) of the maps for the images that the program was made with.
        after: the size that they are enlarged to for these images.
        extent_of: the part of the image that a grid of this size covers. Where the two cover different parts, the sizes
            are fixed.
    """

    def __init__(
        self,
        before: Sequence[int],
        after: Sequence[int],
        extent_of: Callable[[tuple[int, int]], Extent] = lambda _: (0.0, 1.0, 0.0, 1.0),
    ) -> None:
        super().__init__()
        self.before, self.after = (before[0], before[1]), (after[0], after[1])
        moved = None if self.before == self.after else moving(self.before, self.after, extent_of)
        self.rows: Tensor | None
        self.columns: Tensor | None
        for name, weights in zip(("rows", "columns"), moved or (None, None), strict=True):
            self.register_buffer(name, None if weights is None else weights.to(torch.get_default_dtype()))

    def forward(self, maps: Tensor, size: Sequence[int]) -> Tensor:
        """``(N, C, h, w)`` to ``(N, C, *size)``."""
        if self.before == self.after:
            return maps
        if self.rows is not None and self.columns is not None:
            return self.rows.to(maps) @ maps @ self.columns.mT.to(maps)
        return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def _full_precision(device: str) -> AbstractContextManager[Any]:
    """Outside any autocast: the map keeps its own precision."""
    if torch.compiler.is_compiling() or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
