"""Rows of class maps that need no training: what the classifier itself reads from a layer, for every class."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.capture import run, run_with_graph, select_args
from attrib_zoo.backbone.grid import Tap
from attrib_zoo.backbone.module import find, unwrap
from attrib_zoo.backbone.vit.heads import heads_of
from attrib_zoo.errors import TrainingError, listed
from attrib_zoo.masking import at_least_float32
from attrib_zoo.training.losses import two_logits
from attrib_zoo.training.schedule import Schedule

ROW_IMAGES = 32  # the most that class_rows takes, as far as its budget allows
PLACE_IMAGES = 400  # that place_means takes: with 100, 24 instead of 21 % of the maps gave their class away (chance 20)
_RATE = 0.012  # divided by the square root of the channels, so that a step turns rows of any length equally far
_BUDGET = 1e12  # floating-point operations of all backward passes together: about half a minute of one core
_CHUNK_BYTES = 64 * 2**20  # size of the gradients that one call returns
_MOST_AT_ONCE = 64
_AT_ONCE = 16  # images in a pass
_EXACT = 1e-4  # rows of two images that differ by less, relative to the largest weight, come from a linear tail


@dataclass(frozen=True)
class Rows:
    """What each class reads from each layer.

    Attributes:
        weights: for each layer ``(K, C_i)``, or ``None`` where the outputs have no gradient to its map.
        images: the number of images that each weight is averaged over.
        exact: whether the gradient is independent of the image, so that one sufficed.
        through: ``"classifier"``: via the last linear layer's inputs; ``"outputs"``: class by class.
    """

    weights: tuple[Tensor | None, ...]
    images: int
    exact: bool
    through: str

    def described(self) -> str:
        """A short description for a report."""
        if self.exact:
            return "exact: after the layer, the model is linear"
        return f"mean gradients of {self.images} image{'' if self.images == 1 else 's'}, through its {self.through}"


def class_rows(
    model: nn.Module,
    images: Tensor,
    args: Sequence[Any],
    taps: Sequence[Tap],
    *,
    budget: float = _BUDGET,
    show_progress: bool = False,
) -> Rows:
    r"""The gradient of each class's score with respect to a layer's map, averaged over positions and images.

    .. math:: w_c = \mathbb{E}_x \frac{1}{hw} \sum_{i,j} \frac{\partial S_c}{\partial A_{\cdot,i,j}}

    up to a factor common to all classes; of attended values, which add up to the class token's context, the gradient at
    that context. Where the model ends in a linear layer (or a 1x1 convolution to class maps),
    :math:`S = W z + b`, only the D gradients of z are taken if D < K, and :math:`w_c = W_c\, \mathbb{E}[\partial z]`:
    the same by the chain rule, at a cost that does not grow with the number of classes.

    Args:
        model: the frozen model.
        images: ``(N, C, H, W)``; as many are used as the budget allows, and one where the tail is linear.
        args: the model's further arguments.
        taps: the layers, in the order of execution.
        budget: floating-point operations to spend. Beyond it each image contributes the gradients of only a part of the
            outputs, in turn, so that all classes are covered equally.
        show_progress: draw a progress bar.

    Raises:
        TrainingError: a gradient is not finite.
    """
    total: list[Tensor | None] = [None] * len(taps)
    counts: Tensor | None = None
    first: list[Tensor | None] = []
    share, exact, through = 1.0, False, "outputs"
    weight: Tensor | None = None
    from tqdm.auto import tqdm

    for number in tqdm(range(len(images)), "rows", unit="image", leave=False, disable=not show_progress):
        rows = torch.tensor([number], device=images.device)
        with _graph(model, images[number : number + 1], select_args(args, rows, len(images)), taps) as (readout, maps):
            values, weight, through = readout
            if counts is None:
                counts = torch.zeros(len(values), device=values.device)
                share = _affordable(values, maps, budget) / (len(values) * len(images))
            taken = _turn(len(values), number, min(1.0, max(share, 1 / len(images))), values.device)
            found = _gradients(values, maps, taken, [tap.attended for tap in taps])
        found = [
            _at_values(model, tap, gradient) if tap.attended and gradient is not None else gradient
            for tap, gradient in zip(taps, found, strict=True)
        ]
        counts[taken] += 1
        for i, gradient in enumerate(found):
            if gradient is None:
                continue
            if not bool(torch.isfinite(gradient).all()):
                raise TrainingError(
                    f"fit: the gradients of the classes at {taps[i].name!r} must be finite to start from them, got NaN "
                    "or infinity; look at the model's weights and at the images, or start with recipe='paper'"
                )
            whole = total[i]
            if whole is None:
                whole = total[i] = gradient.new_zeros(len(counts), gradient.shape[1])
            whole[taken] += gradient
        if number == 0:
            first = [None if t is None else t.clone() for t in total]
        if number == 1 and share >= 1 and _same(first, total):
            total, exact = first, True
            counts = torch.ones_like(counts)
            break
    if counts is None:
        raise TrainingError("fit: needs at least one image to start from the classes' rows, got none")
    means = [None if t is None else t / counts.clamp(min=1)[:, None] for t in total]
    weights = tuple(None if m is None else (m if weight is None else weight.to(m) @ m) for m in means)
    return Rows(weights, int(counts.max()), exact, through)


def starting_rows(rows: Rows, features: Sequence[Tensor], classes: Tensor) -> tuple[list[Tensor], list[int]]:
    """Initial rows for maps: centred over the classes, with equal spread for each layer's maps.

    What all classes read in common says nothing about any one of them, so their mean row is subtracted. A layer's maps
    are divided by their mean standard deviation over space, so that no layer dominates another.

    Args:
        rows: the result of :func:`class_rows`.
        features: ``(N, C_i, h_i, w_i)`` of some images, for each layer.
        classes: ``(N,)``, the decisions on them.

    Returns:
        For each layer ``(K, C_i)``, zero where the outputs have no gradient to it; and the classes without a row
        anywhere, which have the mean row instead.
    """
    known = [weight for weight in rows.weights if weight is not None]
    count = len(known[0]) if known else 0
    silent = torch.zeros(count, dtype=torch.bool)
    if count > 2:  # with two classes, one may be the other's negative
        silent = torch.stack([~weight.any(1) for weight in known]).all(0).cpu()
    started = []
    for weight, maps in zip(rows.weights, features, strict=True):
        if weight is None or bool(silent.all()):
            started.append(maps.new_zeros(count, maps.shape[1]))
            continue
        weight = weight.to(maps)
        speaking = ~silent.to(weight.device)
        mean = weight[speaking].mean(0)
        centred = torch.where(speaking[:, None], weight - mean, mean)
        spread = torch.einsum("nc,nchw->nhw", centred[classes], maps).flatten(1).std(1, correction=0).mean()
        started.append(centred / spread if float(spread) > 0 else centred)
    return started, silent.nonzero().flatten().tolist()


def start_from_rows(
    model: nn.Module,
    network: nn.Module,
    images: Tensor,
    args: Sequence[Any],
    taps: Sequence[Tap],
    *,
    show_progress: bool,
) -> tuple[dict[str, Any], list[str]]:
    """Initialise an attention head without branches with the model's rows; returns decisions and warnings."""
    head: Any = network
    rows = class_rows(model, images, args, taps, show_progress=show_progress)
    outputs, features = run(model, images, args, taps)
    features = [at_least_float32(f) for f in features]
    started, silent = starting_rows(rows, head.read(features), two_logits(outputs).argmax(1))
    if not any(bool(weight.any()) for weight in started):
        return {}, [
            "fit: no class has a gradient at the layers that are read (a head of zeros, or layers that the outputs "
            "do not use), so there are no rows to start from: the maps start at zero, and only training makes them"
        ]
    head.start_from(started, head.reach(features))
    told = []
    if silent:
        told.append(
            f"fit: class {listed(silent, 5)} has no gradient on the {rows.images} images that the rows were taken "
            "from, so its map starts as the mean of all classes'; fit on images of it, or on more images"
        )
    return {"rows": rows.described()}, told


@torch.no_grad()
def place_means(
    model: Any, images: Tensor, args: Sequence[Any], taps: Sequence[Tap], *, show_progress: bool = False
) -> list[Tensor]:
    """The mean features of the images at each place, ``(C_i, h_i, w_i)`` for each layer."""
    from tqdm.auto import tqdm

    totals: list[Tensor] = []
    parts = torch.arange(len(images), device=images.device).split(_AT_ONCE)
    for rows in tqdm(parts, "places", unit="batch", leave=False, disable=not show_progress):
        features = run(model, images[rows], select_args(args, rows, len(images)), taps)[1]
        sums = [at_least_float32(f).sum(0) / len(images) for f in features]
        totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
    return totals


def rows_schedule(channels: Sequence[int]) -> Schedule:
    """The schedule for training the shared correction of the rows."""
    return Schedule("rows", "adam", _RATE / max(channels) ** 0.5)


def _same(first: Sequence[Tensor | None], both: Sequence[Tensor | None]) -> bool:
    """Whether the second image gave the same as the first."""
    for one, two in zip(first, both, strict=True):
        if one is None or two is None:
            continue
        if float((two - 2 * one).abs().max()) > _EXACT * float(one.abs().max()):
            return False
    return True


def _turn(count: int, number: int, share: float, device: torch.device) -> Tensor:
    """Which outputs this image covers: all, or the next part of them in a fixed random order."""
    if share >= 1:
        return torch.arange(count, device=device)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    part = math.ceil(count * share)
    places = (torch.arange(part) + number * part) % count
    return order[places].sort().values.to(device)


def _affordable(values: Tensor, maps: Sequence[Tensor], budget: float) -> float:
    """How many gradients the budget allows; one is computed to measure its cost."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(values[0], maps, retain_graph=True, allow_unused=True)
    return budget / max(int(counter.get_total_flops()), sum(m.numel() for m in maps))


def _gradients(values: Tensor, maps: Sequence[Tensor], taken: Tensor, at_first: Sequence[bool]) -> list[Tensor | None]:
    """For each map the gradients of some of the values, ``(len(taken), C_i)``: averaged over space, or at token 0."""
    at_once = max(1, min(_MOST_AT_ONCE, _CHUNK_BYTES // max(1, 4 * sum(m.numel() for m in maps))))
    parts: list[list[Tensor | None]] = []
    for some in taken.split(at_once):
        columns = torch.zeros(len(some), len(values), dtype=values.dtype, device=values.device)
        columns[torch.arange(len(some)), some] = 1
        found: Sequence[Tensor | None]
        try:
            found = torch.autograd.grad(
                values, maps, columns, retain_graph=True, is_grads_batched=True, allow_unused=True
            )
        except RuntimeError:  # an operation without a batching rule
            each = [torch.autograd.grad(values, maps, c, retain_graph=True, allow_unused=True) for c in columns]
            found = tuple(None if g[0] is None else torch.stack(g) for g in zip(*each, strict=True))
        parts.append(
            [
                None if g is None else g[:, 0, :, 0, 0] if first else g.mean(dim=(1, -2, -1))
                for g, first in zip(found, at_first, strict=True)
            ]
        )
    return [
        None if column[0] is None else torch.cat([c for c in column if c is not None])
        for column in zip(*parts, strict=True)
    ]


# ---------------------------------------------------------------------- the classifier

_Readout = tuple[Tensor, Tensor | None, str]


def _in_graph(tap: Tap) -> Tap:
    """What the gradient is taken at: of attended values, the output of their attention module, all of its tokens."""
    return replace(tap, grid=tap.grid.of_all_tokens(), attended=False) if tap.attended else tap


def _at_values(model: nn.Module, tap: Tap, gradient: Tensor) -> Tensor:
    """From the class token's gradient behind an attention module, ``(M, D)``, to that at its attended values.

    These add up to the class token's context, which the output projection reads: each value has the context's gradient.
    """
    weight = heads_of(find(unwrap(model), tap.name), tap.name, gradient.dtype).out_weight
    return gradient @ weight.to(gradient)


@contextmanager
def _graph(
    model: nn.Module, image: Tensor, args: Sequence[Any], taps: Sequence[Tap]
) -> Iterator[tuple[_Readout, list[Tensor]]]:
    """One pass on one image: what the scores are linear in, the weights, and the layers' maps in the graph."""
    bare = unwrap(model)
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []
    heads = [module for module in bare.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    handles = [m.register_forward_hook(lambda m, i, o: seen.append((m, i[0], o))) for m in heads]
    try:
        with run_with_graph(model, image, args, [_in_graph(tap) for tap in taps]) as (outputs, maps):
            yield _readout(outputs, seen[-1] if seen else None), maps
    finally:
        for handle in handles:
            handle.remove()


def _readout(outputs: Tensor, last: tuple[nn.Module, Tensor, Tensor] | None) -> _Readout:
    """The inputs of the classifying layer and its weights, or the outputs themselves."""
    logits = two_logits(outputs)[0]
    plain: _Readout = (logits, None, "outputs")
    if last is None:
        return plain
    module, inputs, found = last
    if outputs.ndim != 2 or outputs.shape[1] < 2 or len(found) != len(outputs) or found.shape[1] != outputs.shape[1]:
        return plain
    if isinstance(module, nn.Linear) and inputs.ndim == 2:
        read, weight = inputs[0], module.weight
        scores = found
    elif isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1:
        read, weight = inputs[0].mean(dim=(-2, -1)), module.weight.flatten(1)
        scores = found.mean(dim=(-2, -1))
        rectified = found.relu().mean(dim=(-2, -1))
        scores = rectified if torch.allclose(rectified, outputs, rtol=1e-3, atol=1e-5) else scores
    else:
        return plain
    # a softmax or a sigmoid after the classifier orders the classes as the classifier does
    candidates = (scores, scores.softmax(1), scores.sigmoid())
    if not any(torch.allclose(c.detach().float(), outputs.detach().float(), rtol=1e-3, atol=1e-5) for c in candidates):
        return plain
    if len(read) >= len(logits):
        return (scores[0] if isinstance(module, nn.Linear) else found[0].mean(dim=(-2, -1))), None, "classifier"
    return read, weight.detach(), "classifier"
