"""Methods times measures over a loader, in one pass over the data."""

from __future__ import annotations

import copy
import glob
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo.attribution import Attribution
from attrib_zoo.backbone.capture import evaluating, forward, frozen, unwrap
from attrib_zoo.backbone.targets import TargetQuery, one_logit
from attrib_zoo.benchmark.controls import beside, constant, perfect
from attrib_zoo.benchmark.cost import Cost, clock, measured, peak_bytes
from attrib_zoo.benchmark.measures import TRUTH, Explain, Measure, Question, Wanted, chosen
from attrib_zoo.benchmark.records import Records, Row
from attrib_zoo.benchmark.table import Table
from attrib_zoo.errors import DataError, InputError, OptionError, check_number
from attrib_zoo.metrics._scores import check_masking
from attrib_zoo.training import distributed
from attrib_zoo.training.checkpoint import fingerprint
from attrib_zoo.training.data import images_of
from attrib_zoo.training.locks import hold


def evaluate(
    model: nn.Module,
    methods: Mapping[str, Any],
    loader: Iterable[Any],
    metrics: Wanted | None = None,
    *,
    controls: bool = True,
    max_images: int | None = None,
    masking: str | Tensor = "auto",
    score: str = "softmax",
    seed: int = 0,
    memory: bool = False,
    path: Any = None,
    show_progress: bool = True,
) -> Table:
    """Measure methods on images: every method and every measure on every image, in one pass over the data.

    Each image's clean scores are computed once and each method's map once for all measures. Every image is explained
    for the batch's ``target`` if it gives one, and for the model's own decision otherwise, as in the papers.

    Args:
        model: the classifier that the methods explain.
        methods: name -> method: anything with ``attribute(inputs, target=)``, ours or Captum's, or a function
            ``(inputs, target) -> maps``, ``(N, C, H, W)`` or ``(N, 1, h, w)``. Measures scale a map to [0, 1], then
            enlarge it: our methods are asked for maps at the layer's resolution, whatever their ``upsample``.
        loader: batches of standardised images: tensors, tuples that start with one, or dicts with the images under
            ``"image"`` (or ``"inputs"`` ...) and, where known, ``"target"`` ``(N,)``, ``"masks"`` ``(N, H, W)`` or
            ``"boxes"`` ``(N, M, 4)`` of what is explained, ``"other_masks"`` or ``"other_boxes"`` of other objects.
            The order must be the same in a run that continues another: no shuffling.
        metrics: names of families or measures (``"ad,ic,road"``; see ``FAMILIES``), or name -> function
            ``(model, inputs, attributions, target) -> (N,)``. ``None``: AD, IC, ROAD, and everything that the data's
            regions allow.
        controls: also measure maps that every method should beat: random numbers, the edges of the image, a blob in its
            centre, and each trained explainer as it was before its fit; the true region as a map, where the data
            provides it; and the value expected by chance, where the region alone determines it.
        max_images: stop after this many.
        masking: what replaces hidden pixels in AD, IC and the families ``hiding`` and ``srg-hidden``: ``"raw"`` black,
            ``"standardized"`` the mean colour, ``"blur"``, ``"auto"`` or a tensor; see ``metrics.masked_confidence``.
            ``"auto"`` takes what the fitted explainers among the methods were fitted with; without any, the kind of
            model decides.
        score: ``"softmax"``, or ``"sigmoid"`` for multi-label models.
        seed: for ties, noise and controls; an image's draws depend only on its position in the loader.
        memory: also measure on the CPU the memory that each method holds for one image. On a GPU it is always measured,
            for the whole batch.
        path: file of per-image results, appended as they come. If it exists, a second run continues it; a file that was
            edited or lacks lines is refused, and so is a second run while the first is still running.
        show_progress: draw a progress bar.

    Returns:
        A :class:`Table`. In a ``torch.distributed`` group the batches are shared out, and every process returns the
        same table.

    Raises:
        DataError: there are no images, or the results file belongs to another run or to other images.
        OptionError: a measure does not exist, or the data does not provide what it needs.
        InputError: a method returned maps of another shape than the images.
    """
    if not methods:
        raise OptionError("methods: must name at least one method, got none")
    if max_images is not None:
        check_number("max_images", max_images, least=1)
    check_masking(masking)
    if score not in ("softmax", "sigmoid"):
        raise OptionError(f"score: must be 'softmax' or 'sigmoid', got {score!r}")
    masking = _agreed(methods, masking)
    explain = {name: as_function(name, method) for name, method in methods.items()}
    run: _Run | None = None
    seen = 0
    with nullcontext() if path is None else hold(_own_file(path), "evaluate", "path"):
        for start, batch, mine in _batches(loader, max_images, show_progress):
            if run is None:
                truth = _truth(batch)
                asked = chosen(metrics, list(truth))
                extra = beside(methods, asked, truth, seed) if controls else {}
                setting = _setting(model, methods, asked, masking, score, seed, list(extra))
                run = _Run(model, {**explain, **extra}, asked, _records(setting, path), masking, score, seed, memory)
            if mine:
                run.batch(start, batch)
            seen = start + len(images_of(batch))
        if run is None:
            raise DataError("loader: must yield at least one batch, got none; look at the folder and the batch size")
        return Table(_gathered(run.records).first(seen), run.measures)


class _Run:
    """The state of one evaluation."""

    def __init__(
        self,
        model: nn.Module,
        explain: Mapping[str, Explain | None],
        measures: list[Measure],
        records: Records,
        masking: str | Tensor,
        score: str,
        seed: int,
        memory: bool,
    ) -> None:
        self.model, self.explain, self.measures, self.records = model, explain, measures, records
        self.masking, self.score, self.seed, self.memory = masking, score, seed, memory
        self._rehearsed: set[str] = set()

    def batch(self, start: int, batch: Any) -> None:
        """Explain and measure a batch; methods whose results are in the file already are skipped."""
        images = images_of(batch)
        digests = _digests(images, batch)
        missing = [name for name in self.explain if not self._known(name, start, digests)]
        if not missing:
            return
        inputs = images.to(next((p for p in unwrap(self.model).parameters()), images))
        target, clean, plain = self._clean(inputs, batch.get("target") if isinstance(batch, Mapping) else None)
        truth = _truth(batch)
        seeds = [self.seed + start + row for row in range(len(inputs))]
        for name in missing:
            explain = self.explain[name] or perfect(truth)
            maps, cost = self._explained(name, explain, inputs, target, plain)
            asked = Question(self.model, explain, inputs, maps, target, clean, seeds, truth, self.masking, self.score)
            rows = [Row(name, start + i, d, int(target[i]), float(clean[i])) for i, d in enumerate(digests)]
            with _placed(explain, inputs):
                for measure in self.measures:
                    compute = measure.chance if explain is constant else measure.compute
                    if measure.elsewhere and self.explain[name] is None:
                        compute = None
                    found = maps.new_full((len(inputs),), torch.nan) if compute is None else compute(asked)
                    _enter(measure, found, rows)
            self.records.add(rows, name, cost)

    def _explained(
        self, name: str, explain: Explain, inputs: Tensor, target: Tensor, plain: float
    ) -> tuple[Tensor, Cost]:
        """A method's maps and their cost, compared with a plain pass."""
        with evaluating(self.model) as bare, torch.enable_grad():  # Captum's gradient methods need both
            peak = self._rehearse(name, partial(explain, inputs[:1], target[:1]), inputs.device)
            maps, cost = measured(partial(explain, inputs, target), bare, len(inputs))
        cost.plain, cost.peak = plain, peak if cost.peak is None else cost.peak
        return _checked(maps, inputs, name), cost

    def _rehearse(self, name: str, call: Callable[[], Tensor], device: torch.device) -> int | None:
        """Explain one image before the clock starts: what is found out once per model is not part of a map's cost."""
        if name in self._rehearsed:
            return None
        self._rehearsed.add(name)
        call()
        return peak_bytes(call) if self.memory and device.type == "cpu" else None

    def _known(self, name: str, start: int, digests: list[int]) -> bool:
        """Whether the file holds this batch of this method, for the very same images."""
        rows = [self.records.rows.get((name, start + i)) for i in range(len(digests))]
        for row, digest in zip(rows, digests, strict=True):
            if row is not None and row.digest != digest:
                raise DataError(
                    f"loader: image {row.image} must be the one of the results file, got another (or another target or "
                    "region of it); give the same images in the same order (shuffle=False, no random transforms), or "
                    "another path"
                )
        return all(row is not None for row in rows)

    def _clean(self, inputs: Tensor, wanted: Any) -> tuple[Tensor, Tensor, float]:
        """Targets, their scores, and the time of a plain pass."""
        with frozen(self.model) as bare, torch.no_grad():
            if not self._rehearsed:
                forward(bare, inputs)
            start = clock(inputs.device)
            outputs = forward(bare, inputs)
            plain = clock(inputs.device) - start
        foreign = [n for n, e in self.explain.items() if isinstance(e, _Attribute) and e.is_captums]
        if one_logit(outputs) and foreign:
            raise OptionError(
                f"methods: {foreign[0]!r} of Captum explains outputs as they are, and the model has one logit for two "
                "classes; evaluate a model that returns torch.stack([-z, z], 1), whose decisions are the same"
            )
        found = TargetQuery(wanted).resolve(outputs)
        if outputs.ndim > 2:
            raise OptionError(f"model: must return (N, K) scores to be evaluated, got {tuple(outputs.shape)}")
        return found.classes[:, 0], found.select(outputs, self.score)[:, 0], plain


def _agreed(methods: Mapping[str, Any], masking: str | Tensor) -> str | Tensor:
    """How the fitted explainers hid pixels, where the caller leaves the measures' hiding open."""
    if isinstance(masking, Tensor) or masking != "auto":
        return masking
    found = {name: method.masking_ for name, method in methods.items() if getattr(method, "is_fitted", False)}
    kinds = {name: rule if isinstance(rule, str) else str(rule.flatten().tolist()) for name, rule in found.items()}
    if len(set(kinds.values())) > 1:
        raise OptionError(
            "masking: must be given where the fitted explainers hid pixels in several ways, got 'auto' and "
            f"{', '.join(f'{name}: {kind}' for name, kind in kinds.items())}; pass masking='raw' or 'standardized'"
        )
    return next(iter(found.values()), masking)


def _enter(measure: Measure, found: Tensor, rows: list[Row]) -> None:
    """Write a measure's numbers, ``(N,)`` or ``(N, P)``, into the rows of N images."""
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if not isinstance(found, Tensor) or found.ndim not in (1, 2) or len(found) != len(rows):
        raise OptionError(f"metrics: {measure.name!r} must give one number per image, ({len(rows)},), got {shape}")
    curves = found.detach().double().cpu()
    numbers = measure.number(curves)
    for i, row in enumerate(rows):
        row.values[measure.name] = float(numbers[i])
        if found.ndim == 2:
            row.curves[measure.name] = curves[i].tolist()


def as_function(name: str, method: Any) -> Explain:
    """A method as ``(inputs, target) -> maps``."""
    attribute = getattr(method, "attribute", None)
    if attribute is not None:
        return _Attribute(method)
    if not callable(method):
        raise OptionError(
            f"methods: {name!r} must have attribute(inputs, target=) or be a function (inputs, target), got "
            f"{type(method).__name__}"
        )
    found: Explain = method
    return found


class _Attribute:
    """An attribution object as a function; ours return their maps before upsampling.

    The measures scale a map and then enlarge it, once, as the papers do; an enlarged map has lost its extremes.
    """

    def __init__(self, method: Any) -> None:
        self.method = method
        if isinstance(method, Attribution):
            self.method = copy.copy(method)
            self.method.upsample = False
        self.is_captums = type(method).__module__.startswith("captum.")

    def __call__(self, inputs: Tensor, target: Tensor) -> Tensor:
        with warnings.catch_warnings() if self.is_captums else nullcontext():
            if self.is_captums:  # Captum warns about what it then does by itself
                warnings.filterwarnings("ignore", message="Input Tensor .* did not already require gradients")
            found = self.method.attribute(inputs, target=target)
        maps: Tensor = found[0] if isinstance(found, tuple) else found
        return maps


def _placed(explain: Explain, inputs: Tensor) -> AbstractContextManager[None]:
    """Inside, maps of our methods lie where their grids do, also where the model pads or crops."""
    method = getattr(explain, "method", getattr(explain, "__self__", None))  # of an untrained twin
    return method.placed(inputs) if isinstance(method, Attribution) else nullcontext()


def _checked(maps: Any, inputs: Tensor, name: str) -> Tensor:
    if not isinstance(maps, Tensor) or maps.ndim not in (3, 4) or len(maps) != len(inputs):
        got = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise InputError(
            f"methods: {name!r} must return maps (N, C, H, W), (N, 1, h, w) or (N, h, w) for N={len(inputs)} images, "
            f"got {got}"
        )
    return maps.detach()


def _truth(batch: Any) -> dict[str, Any]:
    """What a batch says about true regions."""
    return {key: batch[key] for key in TRUTH if isinstance(batch, Mapping) and key in batch}


def _digests(images: Tensor, batch: Any) -> list[int]:
    """A checksum of each image and of what the batch says about it."""
    said = [batch[key] for key in ("target", *TRUTH) if key in batch] if isinstance(batch, Mapping) else []
    told = [entry for entry in said if _per_image(entry, len(images))]
    found = []
    for i, pixels in enumerate(images.detach().float().cpu()):
        digest = 0
        for value in [pixels, *(torch.as_tensor(entry[i]) for entry in told)]:
            digest = zlib.crc32(value.detach().float().cpu().contiguous().numpy().tobytes(), digest)
        found.append(digest)
    return found


def _setting(
    model: nn.Module,
    methods: Mapping[str, Any],
    measures: list[Measure],
    masking: str | Tensor,
    score: str,
    seed: int,
    controls: list[str],
) -> dict[str, Any]:
    from attrib_zoo import __version__

    bare = unwrap(model)
    return {
        "model": type(bare).__name__,
        "weights": fingerprint(bare)[:16],
        "methods": {name: _described(name, method) for name, method in methods.items()},
        "measures": [measure.name for measure in measures],
        "masking": masking if isinstance(masking, str) else masking.tolist(),
        "score": score,
        "seed": seed,
        "controls": controls or False,
        "attrib_zoo": __version__,
        "torch": torch.__version__,
    }


def _described(name: str, method: Any) -> str:
    """Its options, and a checksum of what it learned in a fit."""
    if not hasattr(method, "options"):
        return name
    network = getattr(method, "network_", None)
    return repr(method) + (f" {fingerprint(network)[:16]}" if isinstance(network, nn.Module) else "")


def _own_file(path: Any) -> Path:
    """The results file of this process: next to that of the first one."""
    file, rank = Path(path), distributed.rank()
    return file.with_name(f"{file.stem}.{rank}{file.suffix}") if rank else file


def _records(setting: Mapping[str, Any], path: Any) -> Records:
    if path is None:
        return Records(setting)
    file = Path(path)
    if distributed.rank():
        return Records(setting, _own_file(path))
    others = file.parent.glob(f"{glob.escape(file.stem)}.[0-9]*{glob.escape(file.suffix)}")
    return Records(setting, file, sorted(others) if distributed.world_size() == 1 else ())


def _gathered(records: Records) -> Records:
    """The results of all processes."""
    if distributed.world_size() == 1:
        return records
    whole = Records(records.setting)
    for part in distributed.everyone(records):
        whole.merge(part)
    return whole


def _batches(loader: Iterable[Any], most: int | None, show_progress: bool) -> Iterator[tuple[int, Any, bool]]:
    """The batches, each with the position of its first image, and whether it belongs to this process."""
    from tqdm.auto import tqdm

    rank, world = distributed.rank(), distributed.world_size()
    length = len(loader) if isinstance(loader, Sized) else None
    start = 0
    hidden = None if show_progress and rank == 0 else True
    for number, batch in enumerate(tqdm(loader, "evaluate", length, unit="batch", disable=hidden, leave=False)):
        count = len(images_of(batch))
        kept = count if most is None else min(count, most - start)
        yield start, _rows(batch, kept) if kept < count else batch, number % world == rank
        start += kept
        if start == most:
            return


def _rows(batch: Any, count: int) -> Any:
    if isinstance(batch, Mapping):
        size = len(images_of(batch))
        return {key: value[:count] if _per_image(value, size) else value for key, value in batch.items()}
    return images_of(batch)[:count]


def _per_image(value: Any, count: int) -> bool:
    """Whether a batch's entry has one element per image."""
    if isinstance(value, Tensor):
        return value.ndim > 0 and len(value) == count
    return isinstance(value, (list, tuple)) and len(value) == count
