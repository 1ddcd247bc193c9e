"""Is a layer's map where the image is? A test by measurement: change the image here, and see which cells change.

A layout is data that may be wrong: guessed, or given by a user with rows and columns swapped or a token too many. A map
that is read wrongly looks like any other. So a layout that could be misread is tested at its first use, on the user's
own image: a few places of the image are changed, and the change of the layer's output is compared with what each way of
reading it predicts. If another reading clearly wins, or cells change sharply in the wrong place, an error says so.
Where the test is inconclusive (the layer mixes the whole image, as the late stages of some networks with random weights
do), the map is used as it is, and a line is logged.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.capture import call_model, frozen, listening, select_args
from attrib_zoo.backbone.grid import Grid, Tap
from attrib_zoo.backbone.layers.known import known, situation
from attrib_zoo.backbone.layers.layouts import MOST_PREFIX_TOKENS, fits
from attrib_zoo.backbone.layers.lookup import nearest
from attrib_zoo.backbone.layers.trace import Trace
from attrib_zoo.backbone.module import find, original
from attrib_zoo.backbone.randomness import draws_taken_back
from attrib_zoo.errors import LayerError

__all__ = ["Verdict", "check_grids", "probe", "unchecked"]

_PLACES = ((0.21, 0.34), (0.29, 0.79), (0.66, 0.16), (0.83, 0.71))  # no flip or turn maps them onto themselves
_MORE_PLACES = tuple(((0.46 + 0.7549 * k) % 0.94, (0.46 + 0.5698 * k) % 0.94) for k in range(12))  # evenly scattered
_CELLS = (8, 8)  # how an image is divided where no layer has tokens
_SMALLEST = 1 / 16  # of the image, along each side: the place that is changed
_BROAD = 0.2  # of the image: how far a coarse answer reaches
_MARGIN = 0.15  # by which another reading must win
_CLEAR = 0.55  # score that a winning reading must reach
_SEEN = 0.15  # below, a reading explains nothing
_SURE = 0.45  # from here on four places are enough
_SHUFFLES = 19  # of the places, all of which a reading must beat: by chance one in twenty does
_FEWEST = 16  # cells: with fewer, chance alone may look like an answer
_SPARE = 0.4  # at most this share of the tokens are no patches, in a reading that nobody gave
_SHARP = 0.5  # of the change, in as few cells as the places that were changed take
_SCATTERED = 0.35  # this much of a sharp change must be explained, or these cells lie elsewhere

_IMAGES = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d)

_log = logging.getLogger("attrib_zoo")
_checking: ContextVar[bool] = ContextVar("attrib_zoo_grid_checks", default=True)


@contextmanager
def unchecked() -> Iterator[None]:
    """No layer's grid is tested inside: for a hint that is right although the test says otherwise."""
    token = _checking.set(False)
    try:
        yield
    finally:
        _checking.reset(token)


@dataclass(frozen=True)
class Reading:
    """One way to read a layer's output as a map.

    Attributes:
        kind: as in :class:`Grid`.
        start: tokens before the patches.
        hw: rows and columns.
        turned: whether the first of the two spatial axes is the columns.
        order: the tokens' permutation, where there is one.
        rest: tokens after the patches; no :class:`Grid` has any.
    """

    kind: str
    start: int
    hw: tuple[int, int]
    turned: bool = False
    order: tuple[int, ...] | None = None
    rest: int = 0

    def cells(self, change: Tensor) -> Tensor:
        """The change of each cell ``(Q, h*w)`` from the squared change ``(Q, ...)`` of the layer's output."""
        h, w = self.hw
        if change.ndim == 3:
            tokens = change.sum(2 if self.kind == "tokens" else 1)[:, self.start : self.start + h * w]
            return tokens if self.order is None else tokens[:, list(self.order)]
        image = change.sum(1 if self.kind == "nchw" else 3)
        return (image.transpose(1, 2) if self.turned else image).flatten(1)

    def __str__(self) -> str:
        h, w = self.hw
        if self.kind in ("nchw", "nhwc"):
            return f"Grid({self.kind!r})" + (" with rows and columns exchanged" if self.turned else "")
        if self.rest:
            return f"{h}x{w} patches that begin at token {self.start}, with {self.rest} other tokens behind"
        more = "" if self.order is None else ", permutation=..."
        return f"Grid({self.kind!r}, prefix={self.start}, hw=({h}, {w}){more})"


@dataclass(frozen=True)
class Verdict:
    """What the test says about one layer.

    Attributes:
        tap: the layer.
        said: ``"right"``, ``"wrong"`` or ``"undecided"``.
        own: how well its reading predicts which cells change: 1 perfectly, 0 not at all.
        other: the same for the best other reading, 0 where there is none.
        better: the readings that clearly win.
        sharpness: share of the change in the cells that change most, as many as were changed in the image; a quarter
            of the places have no more.
    """

    tap: Tap
    said: str
    own: float
    other: float
    better: tuple[Reading, ...]
    sharpness: float


def check_grids(
    model: nn.Module,
    taps: Sequence[Tap],
    inputs: Tensor,
    args: Sequence[Any] = (),
    *,
    traced: Trace | None = None,
    everything: bool = True,
) -> None:
    """Refuse a layer whose map is not where the image is; each layer once per model and input size.

    One pass over five images, three more in case of doubt; none for layers that were tested before. Where ``traced``
    shows that a layer is made cell by cell from an earlier one, as the blocks of a transformer are by adding to their
    input, the earlier one is tested, and the pass ends there.

    Args:
        model: the classifier; wrappers are removed.
        taps: the resolved layers.
        inputs: images ``(N, C, H, W)``; the first is used.
        args: further arguments of the model's forward.
        traced: what ``look`` returned; names the layers to use instead, and shows which layouts are beyond doubt.
        everything: ``False`` skips what is beyond doubt: images of a size that convolutions of this pass output, which
            no other layout fits.

    Raises:
        LayerError: a map is not spatial, or its layout is misread.
    """
    if not _checking.get():
        return
    bare = original(model)
    done: set[Tap] = known(bare).get(("tested grids", situation(inputs, args)), set)
    open_taps = taps
    if not everything and traced is not None:
        open_taps = [tap for tap in taps if not _beyond_doubt(traced, tap)]
    tested: dict[Tap, Tap] = {}  # of layers with one order of cells the last, by the first of them
    for tap in open_taps:
        tested[tap if traced is None else _first_like(traced, tap)] = tap
    firsts = [first for first in tested if first not in done]
    if not firsts:
        return
    for verdict in probe(bare, firsts, inputs, args, traced=traced):
        named = replace(verdict, tap=tested[verdict.tap])
        if verdict.said == "wrong":
            raise LayerError(_refusal(bare, named, traced))
        if verdict.said == "undecided":
            _log.info(
                "layers: %r of %s mixes the whole image, so that its grid cannot be tested",
                named.tap.label,
                type(bare).__name__,
            )
        done.add(verdict.tap)


def _first_like(traced: Trace, tap: Tap) -> Tap:
    """The first layer whose cells are made into this one's cell by cell: it mixes least, and costs least to reach."""
    calls = traced.calls()
    of_tap = [call for call in calls if call.name == tap.name]
    wanted = next((o.order for o in of_tap[tap.call % tap.calls].outputs if o.element == tap.element), None)
    if wanted is None:
        return tap
    call, output = next((c, o) for c in calls for o in c.outputs if o.order == wanted)
    runs = traced.count(call.module)
    number = -1 if call.number == runs - 1 else call.number
    return replace(tap, name=call.name, element=output.element, calls=runs, call=number)


def probe(
    model: nn.Module,
    taps: Sequence[Tap],
    inputs: Tensor,
    args: Sequence[Any] = (),
    *,
    traced: Trace | None = None,
) -> list[Verdict]:
    """Change four places of the first image, and say for each layer whether the right cells change.

    Cells may agree by chance, the more so where there are few. So layers that are not clearly right get twelve more
    places, four in a pass. For a model that pads or crops, the trace says what its grids cover.
    """
    finest = max((grid for tap in taps if (grid := tap.grid.hw) is not None), default=_CELLS)
    changes, boxes = _moved(model, taps, inputs, args, _PLACES, finest)
    shape = inputs.shape
    verdicts = [_judge(tap, change, boxes, shape, traced) for tap, change in zip(taps, changes, strict=True)]
    unsure = [i for i, verdict in enumerate(verdicts) if verdict.said != "right" or verdict.own < _SURE]
    if not unsure:
        return verdicts
    passes = [(boxes, [changes[i] for i in unsure])]
    for start in range(0, len(_MORE_PLACES), len(_PLACES)):
        places = _MORE_PLACES[start : start + len(_PLACES)]
        more, where = _moved(model, [taps[i] for i in unsure], inputs, args, places, finest)
        passes.append((where, more))
    everywhere = torch.cat([where for where, _ in passes])
    for position, i in enumerate(unsure):
        change = torch.cat([found[position] for _, found in passes])
        verdicts[i] = _judge(taps[i], change, everywhere, shape, traced)
    return verdicts


def _moved(
    model: nn.Module,
    taps: Sequence[Tap],
    inputs: Tensor,
    args: Sequence[Any],
    places: Sequence[tuple[float, float]],
    finest: tuple[int, int],
) -> tuple[list[Tensor], Tensor]:
    """For each layer the squared change ``(Q, ...)`` of its output by each place, and where these are ``(Q, 4)``."""
    rows = torch.zeros(1 + len(places), dtype=torch.long, device=inputs.device)
    outputs: dict[int, Tensor] = {}

    def keep(position: int, activation: Tensor) -> None:
        taps[position].grid.to_map(activation)  # refuses what has another shape
        output = activation.detach().to(torch.float64)
        outputs[position] = (output[1:] - output[:1]).square()
        if len(outputs) == len(taps) and bare is not own:
            raise _Enough  # what a mirror would do from here on is of no interest

    own = original(model)
    with torch.inference_mode(False), torch.no_grad(), draws_taken_back(inputs.device), frozen(model) as bare:
        images, boxes = _changed(inputs.detach()[rows], places, finest)
        with suppress(_Enough), listening(bare, taps, keep):
            call_model(bare, images, select_args(args, rows, len(inputs)))
    return [outputs[position] for position in range(len(taps))], boxes


class _Enough(BaseException):
    """Ends a pass; no ``Exception``, which a model may catch."""


def _changed(images: Tensor, places: Sequence[tuple[float, float]], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The image as it is and with one place changed each, ``(1 + Q, C, H, W)``; and top, bottom, left, right of each.

    A place is one cell of the grid, or as many as make a sixteenth of the image.
    """
    images = images.clone()
    span = float(images[0].to(torch.float32).std(correction=0)) or 1.0
    generator = torch.Generator().manual_seed(0)
    boxes = []
    for row, place in enumerate(places, start=1):
        (top, bottom), (left, right) = (
            _side(at, cells, full) for at, cells, full in zip(place, grid, images.shape[-2:], strict=True)
        )
        area = images[row, :, top:bottom, left:right]
        noise = torch.rand(area.shape, generator=generator) + 0.5
        area.add_((2 * span * noise).to(area))
        boxes.append((top / images.shape[2], bottom / images.shape[2], left / images.shape[3], right / images.shape[3]))
    return images, torch.tensor(boxes, dtype=torch.float64)


def _side(at: float, cells: int, full: int) -> tuple[int, int]:
    """First and last pixel of the place that begins in the cell in which ``at`` lies."""
    some = math.ceil(cells * _SMALLEST)
    first = min(int(at * cells), cells - some)
    low, high = math.ceil(first * full / cells), (first + some) * full // cells
    return (low, high) if high > low else (min(low, full - 1), min(low, full - 1) + 1)


def _judge(tap: Tap, change: Tensor, boxes: Tensor, shape: Sequence[int], traced: Trace | None) -> Verdict:
    readings = _readings(tap.grid, tuple(change.shape), (shape[2], shape[3]))
    if traced is not None:
        top, bottom, left, right = traced.extents.of(readings[0].hw)
        low = boxes.new_tensor([top, top, left, left])
        span = boxes.new_tensor([bottom - top, bottom - top, right - left, right - left])
        boxes = (boxes - low) / span  # of what the grid covers, not of the image
    predictions: dict[tuple[int, int], Tensor] = {}  # many readings have the same cells
    for reading in readings:
        if reading.hw not in predictions:
            predictions[reading.hw] = _predictions(reading.hw, boxes.to(change.device))
    scores = [_score(reading.cells(change), predictions[reading.hw]) for reading in readings]
    own, other = scores[0], max(scores[1:], default=0.0)
    sharpness = _sharpness(readings[0].cells(change), readings[0].hw, boxes)
    enough = readings[0].hw[0] * readings[0].hw[1] >= _FEWEST
    wins = enough and other >= max(own + _MARGIN, _CLEAR)
    better: tuple[Reading, ...] = ()
    if wins:
        winners = [i for i in range(1, len(readings)) if scores[i] >= max(own + _MARGIN, other - _MARGIN / 2)]
        winners.sort(key=lambda i: (readings[i].rest, -readings[i].hw[0] * readings[i].hw[1], -scores[i]))
        better = tuple(readings[i] for i in winners)
    scattered = enough and sharpness >= _SHARP and own < _SCATTERED * sharpness
    seen = own >= max(_SEEN, _by_chance(readings[0].cells(change), predictions[readings[0].hw]))
    said = "wrong" if wins or scattered else "right" if seen else "undecided"
    return Verdict(tap, said, own, other, better, sharpness)


def _readings(grid: Grid, shape: tuple[int, ...], image: tuple[int, int]) -> list[Reading]:
    """The layout given, and then all others that fit the shape and the image."""
    if len(shape) == 4:
        axes = {"nchw": (shape[2], shape[3]), "nhwc": (shape[1], shape[2])}
        found = [Reading(grid.kind, 0, axes[grid.kind])]
        for kind, (h, w) in axes.items():
            found += [Reading(kind, 0, (h, w)), Reading(kind, 0, (w, h), turned=True)]
        found = [r for r in found[1:] if r != found[0] and fits(r.hw, image)]
        return [Reading(grid.kind, 0, axes[grid.kind]), *found]
    own = Reading(grid.kind, grid.prefix, grid.hw or (1, 1), order=grid.permutation)
    found = []
    for kind, length in (("tokens", shape[1]), ("channel_tokens", shape[2])):
        for h in range(1, length + 1):
            for w in {length // h, *((length - p) // h for p in range(MOST_PREFIX_TOKENS + 1))}:
                spare = length - h * w
                if w and 0 <= spare <= min(MOST_PREFIX_TOKENS, _SPARE * length) and fits((h, w), image):
                    found += [Reading(kind, start, (h, w), rest=spare - start) for start in range(spare + 1)]
    return [own, *(reading for reading in dict.fromkeys(found) if reading != own)]


def _predictions(hw: tuple[int, int], boxes: Tensor) -> Tensor:
    """What :func:`_shares` says, centred and of length 1, for each shift of the grid: ``(9, 2, Q*h*w)``.

    Padded convolutions of stride 2 shift their input by up to half a cell, so a shift of half a cell costs nothing.
    """
    aside = [(i / 2 / hw[0], j / 2 / hw[1]) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    moved = boxes + boxes.new_tensor([[y, y, x, x] for y, x in aside]).unsqueeze(1)
    return _unit(_centred(_shares(hw, moved)).transpose(0, 1).flatten(2))


def _score(cells: Tensor, predictions: Tensor) -> float:
    """How well a reading predicts which cells ``(Q, h*w)`` change: a correlation, of sharp and of broad answers."""
    total = cells.sum(1, keepdim=True)
    if cells.shape[1] < 2 or not bool(torch.isfinite(cells).all()) or not bool((total > 0).all()):
        return 0.0
    answer = _unit(_centred(cells / total).flatten())
    return float((predictions @ answer).mean(1).max())


def _by_chance(cells: Tensor, predictions: Tensor) -> float:
    """The best score of answers that belong to other places; 0 where there are too few places to tell."""
    if len(cells) <= len(_PLACES):
        return 0.0
    generator = torch.Generator().manual_seed(0)
    shuffles = [torch.randperm(len(cells), generator=generator) for _ in range(_SHUFFLES)]
    return max(_score(cells[order.to(cells.device)], predictions) for order in shuffles)


def _shares(hw: tuple[int, int], boxes: Tensor) -> Tensor:
    """The share of each place in each cell, and how close the cell is to it: ``(2, ..., Q, h*w)``."""
    shares, nears = [], []
    for axis, count in enumerate(hw):
        low, high = boxes[..., 2 * axis, None], boxes[..., 2 * axis + 1, None]
        edges = torch.arange(count + 1, dtype=torch.float64, device=boxes.device) / count
        shares.append((torch.minimum(high, edges[1:]) - torch.maximum(low, edges[:-1])).clamp_min(0))
        centres = (edges[1:] + edges[:-1]) / 2
        nears.append((-((centres - (low + high) / 2) / _BROAD).square() / 2).exp())
    both = torch.stack([(a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2) for a, b in (shares, nears)])
    return both / both.sum(-1, keepdim=True).clamp_min(1e-300)


def _centred(answers: Tensor) -> Tensor:
    """The answers without their mean over the places: what is specific to each place."""
    return answers - answers.mean(-2, keepdim=True)


def _unit(answers: Tensor) -> Tensor:
    """Each divided by its length along the last axis; zeros stay zeros."""
    length = torch.linalg.vector_norm(answers, dim=-1, keepdim=True)
    scaled: Tensor = answers / length.masked_fill(length == 0, 1)
    return scaled


def _sharpness(cells: Tensor, hw: tuple[int, int], boxes: Tensor) -> float:
    """The share of the change that lies in as many cells as a place covers; a quarter of the places have no more."""
    total = cells.sum(1)
    if not bool(torch.isfinite(total).all()) or not bool((total > 0).all()):
        return 0.0
    covered = (_shares(hw, boxes.to(cells.device))[0] > 0).sum(1)
    ordered = cells.sort(1, descending=True).values
    shares = [float(ordered[q, : int(covered[q])].sum() / total[q]) for q in range(len(cells))]
    return sorted(shares)[len(shares) // 4 - 1]


def _beyond_doubt(traced: Trace, tap: Tap) -> bool:
    """An image that a convolution or pooling outputs, or one of the same size that cannot be read in another way."""
    if tap.grid.kind != "nchw" or tap.grid.hw is not None:
        return False
    if isinstance(find(traced.model, tap.name), _IMAGES):
        return True
    for call in traced.calls():
        for output in call.outputs:
            if call.name == tap.name and output.element == tap.element:
                if len(output.shape) != 4 or fits((output.shape[1], output.shape[2]), traced.size):
                    return False
                seen = {size for _, size in traced.sizes}
                if (output.shape[2], output.shape[3]) not in seen:
                    return False
    return True


def _refusal(model: nn.Module, verdict: Verdict, traced: Trace | None) -> str:
    tap, grid = verdict.tap, verdict.tap.grid
    own = Reading(grid.kind, grid.prefix, grid.hw or (0, 0), order=grid.permutation)
    if verdict.better:
        sayable = [reading for reading in verdict.better if not reading.rest] or verdict.better
        fitting = [str(reading) for reading in sayable[:2]]
        what = f"it does as {' or '.join(fitting)}"
        whole = not verdict.better[0].rest and not verdict.better[0].turned
        advice = f"pass layers=({tap.label!r}, {fitting[0]}), or another layer" if whole else "name another layer"
    else:
        what = "a few cells elsewhere change"
        advice = "give the order of its cells, Grid(..., permutation=...), or name another layer"
    calls = [call for call in traced.calls() if call.name == tap.name] if traced is not None else []
    near = nearest(traced, calls[-1], 5) if traced is not None and calls else []
    spatial = f"; the nearest spatial layers are {', '.join(map(repr, near))}" if near else ""
    return (
        f"layers: {tap.label!r} of {type(model).__name__} must change where the image does, but read as {own} it does "
        f"not: {what}; {advice}{spatial}; to use it as it is: with attrib_zoo.backbone.layers.gridcheck.unchecked()"
    )
