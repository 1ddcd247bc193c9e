"""Batches of images from whatever a loader yields, in an order that a resumed fit can repeat."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from attrib_zoo.errors import DataError, OptionError, check_number

_KEYS = ("image", "images", "pixel_values", "inputs", "input", "x", "img")
_EMPTY = "loader: must yield at least one batch, got none; look at the folder, the sampler and the batch size"


def images_of(batch: Any) -> Tensor:
    """The images of a batch: the tensor itself, the first entry of a tuple, or a dict's image entry."""
    found = batch
    if isinstance(batch, Mapping):
        keys = [key for key in _KEYS if key in batch]
        if not keys:
            raise DataError(
                f"loader: a dict batch must hold its images under one of {', '.join(map(repr, _KEYS))}, got "
                f"{', '.join(map(repr, list(batch)[:6]))}; rename the key or yield the images alone"
            )
        found = batch[keys[0]]
    elif isinstance(batch, (tuple, list)) and batch:
        found = batch[0]
    if not isinstance(found, Tensor) or found.ndim != 4 or not found.is_floating_point() or len(found) == 0:
        got = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise DataError(
            f"loader: batches must be float images (N, C, H, W), or a tuple or dict that starts with them, got {got}; "
            "convert to tensors and standardise in the dataset's transform"
        )
    if not bool(torch.isfinite(found).all()):
        raise DataError("loader: images must be finite, got NaN or infinity; look at the dataset and its transform")
    return found


def total_steps(
    loader: Iterable[Any], epochs: int, max_steps: int | None, *, least: int = 1, most: int | None = None
) -> int:
    """``max_steps``, at least ``least``; else epochs times the loader's length, but at most ``most``."""
    check_number("epochs", epochs, least=1)
    if max_steps is not None:
        check_number("max_steps", max_steps, least=least)
    length = _length(loader)
    if length == 0:
        raise DataError(_EMPTY)
    if max_steps is not None:
        return max_steps
    if length is None and most is None:
        raise OptionError(
            "max_steps: must be given for a loader without a length, since the schedule needs the number of steps"
        )
    planned = [] if length is None else [epochs * length]
    return min(planned if most is None else [*planned, most])


def check_repeatable(val_loader: Iterable[Any] | None) -> None:
    """Raise if the loader cannot be iterated again after each epoch, as validation does."""
    if isinstance(val_loader, Iterator):
        raise DataError(
            "val_loader: must be iterable more than once, since it is read after each epoch, got "
            f"{type(val_loader).__name__}; pass a list or a DataLoader"
        )
    if val_loader is not None and _length(val_loader) == 0:
        raise DataError(f"val_{_EMPTY}")


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None


def checksum(images: Tensor | None) -> dict[str, int] | None:
    """How many images, and a checksum of their values, which is the same on all devices."""
    if images is None:
        return None
    return {"images": len(images), "crc": zlib.crc32(images.detach().float().cpu().contiguous().numpy().data)}


def shape_of(loader: Iterable[Any]) -> dict[str, int | None]:
    """What must match when a fit is continued: batches and images per epoch, images per batch."""
    size, images = getattr(loader, "batch_size", None), _length(getattr(loader, "dataset", None))
    return {"batches": _length(loader), "batch_size": size if isinstance(size, int) else None, "images": images}


class Batches(Iterator[Tensor]):
    """The loader's images, epoch after epoch, in an order fixed by a seed; can start in the middle of an epoch.

    Ends only where a loader that cannot restart is exhausted.

    Args:
        loader: any iterable of batches.
        seed: the loader's sampling and transforms draw from the global CPU generator, which is set from this seed
            and the epoch; the caller restores it.
        like: images are moved to this tensor's device and dtype.
    """

    def __init__(self, loader: Iterable[Any], seed: int, like: Tensor) -> None:
        self.loader = loader
        self.seed = seed
        self.like = like
        self.epoch = 0
        self.position = 0  # number of batches taken in this epoch
        self.per_epoch = _length(loader)
        self._pending: list[Tensor] = []
        self._size: torch.Size | None = None
        self._epoch_start = [g.get_state() for g in self._generators()]
        self.last: Tensor | None = None  # the batch taken last
        self._expected: Mapping[str, Any] | None = None  # the checksum of that batch in the fit that is continued
        self.news: list[str] = []
        self._stream = self._endless()

    def __next__(self) -> Tensor:
        self.last = self._pending.pop(0) if self._pending else next(self._stream)
        return self.last

    def peek(self, images: int = 1) -> Tensor:
        """The next batch without consuming it, or the next so many ``images`` of this epoch.

        With a loader of unknown length these come from no more than one batch.
        """
        while sum(map(len, self._pending)) < images and (not self._pending or self._within_epoch):
            batch = next(self._stream, None)
            if batch is None:
                break
            self._pending.append(batch)
        if not self._pending:
            raise DataError(_EMPTY)
        return self._pending[0] if images == 1 else torch.cat(self._pending)[:images]

    @property
    def _within_epoch(self) -> bool:
        """Whether this epoch is known to have more batches."""
        return self.per_epoch is not None and self.position < self.per_epoch

    @property
    def between_epochs(self) -> bool:
        """Whether the next batch is the first of an epoch."""
        return self.per_epoch is not None and (self.position - len(self._pending)) % self.per_epoch == 0

    def _endless(self) -> Iterator[Tensor]:
        while True:
            skip, self.position = self.position, 0
            for images in self._one_epoch():
                self.position += 1
                if self.position == skip:
                    self._compare(images)
                if self.position > skip:
                    yield self._checked(images).to(device=self.like.device, dtype=self.like.dtype)
            if self.position == 0 or isinstance(self.loader, Iterator):
                return
            self.epoch += 1
            self.position = 0
            self._epoch_start = [g.get_state() for g in self._generators()]

    def _one_epoch(self) -> Iterator[Tensor]:
        torch.default_generator.manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        sampler = getattr(self.loader, "sampler", None)
        set_epoch = getattr(sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(self.epoch)
        yield from map(images_of, self.loader)

    def _compare(self, images: Tensor) -> None:
        """Record if the batch before the interruption differs from the one in the fit that is continued."""
        self.last = images.to(device=self.like.device, dtype=self.like.dtype)
        found = checksum(self.last)
        if found is not None and self._expected is not None and self._expected != found:
            self.news.append(
                f"fit: the loader's batches must be those of the fit that is continued, but number {self.position} of "
                f"this epoch differs ({found['images']} images, were {self._expected['images']}"
                f"{'' if found['images'] != self._expected['images'] else ', with other pixels'}): the result will not "
                "be that of a fit that was never interrupted"
            )

    def _checked(self, images: Tensor) -> Tensor:
        if self._size is None:
            self._size = images.shape[1:]
        if images.shape[1:] != self._size:
            raise DataError(
                f"loader: all images must have one size; the first batch had {tuple(self._size)} and this one has "
                f"{tuple(images.shape[1:])}: resize and crop in the dataset's transform"
            )
        return images.clone() if images.is_inference() else images  # an inference tensor cannot be part of a graph

    def _generators(self) -> list[torch.Generator]:
        """The generators that the loader itself draws from."""
        sampler = getattr(self.loader, "sampler", None)
        inner = getattr(getattr(self.loader, "batch_sampler", None), "sampler", None)
        found = [getattr(holder, "generator", None) for holder in (self.loader, sampler, inner)]
        return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The position before the next batch, as tensors and JSON-ready facts."""
        tensors = {f"loader/{i}": state for i, state in enumerate(self._epoch_start)}
        return tensors, {"epoch": self.epoch, "position": self.position - len(self._pending)}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], *, compare: bool = True) -> None:
        """Continue at the position from :meth:`state`; call it before the first batch is taken.

        Args:
            tensors: from :meth:`state`.
            facts: likewise; with ``"last"``, the :func:`checksum` of the batch before, that batch is compared.
            compare: whether this process saw that batch.
        """
        self.epoch, self.position = facts["epoch"], facts["position"]
        self._expected = facts.get("last") if compare else None
        for i, generator in enumerate(self._generators()):
            if f"loader/{i}" in tensors:
                generator.set_state(tensors[f"loader/{i}"])
        self._epoch_start = [g.get_state() for g in self._generators()]
