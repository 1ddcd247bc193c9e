"""Photographs as a stream: their names in little memory, each decoded once, shared out among torchrun's processes."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from attrib_zoo.errors import AttribZooError, DataError, reason
from attrib_zoo.models import LoadedModel
from attrib_zoo.models.photos import open_photo
from attrib_zoo.training import distributed
from attrib_zoo.visualize import Box

Interval = tuple[int, int]
"""Photographs by their numbers, from the first to before the second."""

CHUNK = 512
"""Photographs that a process takes at a time, and as many as one file of maps holds."""

_LARGEST = 2048  # pixels of the longer side of a photograph that is drawn on
_BICUBIC = 3  # PIL's name for it
_Value = TypeVar("_Value")


class Names(Sequence[str]):
    """Many file names as one string of bytes: 60 bytes each where a list of paths takes 500.

    Worker processes share it; a list would be copied into each, because of its reference counts.
    """

    def __init__(self, names: Iterable[str | os.PathLike[str]]) -> None:
        text, ends = bytearray(), array("q", [0])
        for name in names:
            text += os.fsencode(name)
            ends.append(len(text))
        self._text, self._ends = bytes(text), ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return os.fsdecode(self._text[self._ends[index] : self._ends[index + 1]])

    def digest(self) -> str:
        """A checksum of all names and their order."""
        return hashlib.sha256(self._text + self._ends.tobytes()).hexdigest()[:32]


View = tuple[Tensor, Box]
"""A photograph for the eye, uint8 ``(3, H, W)``, and the part of it that the model sees."""


@dataclass
class Batch:
    """A batch of photographs from the loader.

    Attributes:
        interval: their numbers.
        good: the numbers of those that could be read.
        images: ``(N, C, H, W)`` of the good ones; ``None`` where there is none.
        views: the photographs to draw on, and the part that the model sees; ``None`` where no picture is drawn.
        wrong: number -> what is wrong with the file.
    """

    interval: Interval
    good: list[int] = field(default_factory=list)
    images: Tensor | None = None
    views: list[View | None] = field(default_factory=list)
    wrong: dict[int, str] = field(default_factory=dict)


@dataclass
class Eye:
    """The photograph to draw on, and the part that the model sees; sent to worker processes, so it holds no model."""

    loaded: LoadedModel
    known: dict[tuple[int, int], Box] = field(default_factory=dict)

    def __call__(self, photo: Any) -> View:
        """The photograph, reduced if it is large."""
        if photo.size not in self.known:
            self.known = {photo.size: self.loaded.seen(photo)}
        box, scale = self.known[photo.size], min(1.0, _LARGEST / max(photo.size))
        size = max(1, round(photo.width * scale)), max(1, round(photo.height * scale))
        small = photo.resize(size, _BICUBIC) if scale < 1 else photo
        across, down = small.width / photo.width, small.height / photo.height
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)
        return pixels, (box[0] * across, box[1] * down, box[2] * across, box[3] * down)


_Item = tuple[int, Tensor | None, View | None, str]


class _Reader(Dataset[_Item]):
    """Each photograph decoded once, both for the model and for drawing."""

    def __init__(self, names: Names, transform: Callable[[Any], Tensor], view: Callable[[Any], View] | None) -> None:
        self.names, self.transform, self.view = names, transform, view

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> _Item:
        path = Path(self.names[index])
        try:
            photo = open_photo(path)
        except DataError as error:
            return index, None, None, str(error)
        try:
            image = self.transform(photo)
            view = None if self.view is None else self.view(photo)
        except Exception as error:  # such as a photograph of one pixel by a million
            return index, None, None, f"'{path}' cannot be brought to the model's size ({reason(error)}); remove it"
        return index, image, view, ""


class _Steps:
    """Batches of numbers that cross neither interval boundaries nor multiples of the batch size.

    A map may differ in its last bits with the other images of its batch, so a photograph has the same ones however
    often a job was stopped, and whichever process takes it.
    """

    def __init__(self, intervals: Sequence[Interval], batch_size: int) -> None:
        self.intervals, self.batch_size = intervals, batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for start, stop in self.intervals:
            for batch in range(*_batches((start, stop), self.batch_size)):
                first = batch * self.batch_size
                yield list(range(max(start, first), min(first + self.batch_size, stop)))

    def __len__(self) -> int:
        return sum(len(range(*_batches(interval, self.batch_size))) for interval in self.intervals)


def _batches(interval: Interval, batch_size: int) -> Interval:
    """The batches, by their numbers, that some photograph of the interval is in."""
    return interval[0] // batch_size, -(-interval[1] // batch_size)


def _collate(items: Sequence[_Item]) -> Batch:
    batch = Batch((items[0][0], items[-1][0] + 1))
    images = []
    for index, image, view, wrong in items:
        if image is None:
            batch.wrong[index] = wrong
        else:
            images.append(image)
            batch.good.append(index)
            batch.views.append(view)
    batch.images = torch.stack(images) if images else None
    return batch


def loader(
    names: Names,
    intervals: Sequence[Interval],
    transform: Callable[[Any], Tensor],
    view: Callable[[Any], View] | None,
    *,
    batch_size: int,
    workers: int,
) -> DataLoader[Any]:
    """Batches of the photographs in these intervals, in their order; ``workers`` processes prefetch a little."""
    steps: Any = _Steps(intervals, batch_size)
    reader = _Reader(names, transform, view)
    return DataLoader(reader, batch_sampler=steps, num_workers=workers, collate_fn=_collate)


def watched(batches: DataLoader[Any]) -> Iterator[Batch]:
    """The loader's batches; a worker process that dies gives a readable error.

    Raises:
        DataError: a worker died.
    """
    it = iter(batches)
    while True:
        try:
            batch = next(it)
        except StopIteration:
            return
        except RuntimeError as error:
            if "worker" not in str(error):
                raise
            raise DataError(
                f"workers: a process that reads photographs ended ({reason(error)}), as when memory runs out; use "
                "fewer --workers"
            ) from error
        yield batch


# ---------------------------------------------------------------------- several processes


def left(count: int, done: Iterable[Interval]) -> list[Interval]:
    """The photographs out of ``count`` that are not done."""
    found, first = [], 0
    for start, stop in sorted(done):
        if first < start:
            found.append((first, start))
        first = max(first, stop)
    return [*found, (first, count)] if first < count else found


def shared_out(intervals: Sequence[Interval], batch_size: int) -> list[Interval]:
    """This process's share, in pieces of whole batches; no process has more than one batch more than another."""
    size, rank = distributed.world_size(), distributed.rank()
    whole = sum(len(range(*_batches(interval, batch_size))) for interval in intervals)
    turns = max(1, round(whole * batch_size / (size * CHUNK)))
    piece, rest = divmod(whole, size * turns)
    pieces = iter([piece] * (size * turns) + [rest // size] * size + [1] * (rest % size))
    found, number, room = [], -1, 0
    for start, stop in intervals:
        batch, end = _batches((start, stop), batch_size)
        while batch < end:
            while not room:
                number, room = number + 1, next(pieces)
            taken = min(room, end - batch)
            if number % size == rank:
                found.append((max(start, batch * batch_size), min(stop, (batch + taken) * batch_size)))
            batch, room = batch + taken, room - taken
    return found


@contextmanager
def together() -> Iterator[None]:
    """Join the processes that ``torchrun`` started; does nothing for a single process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", timeout=timedelta(days=365))  # the first to finish waits for the last
    try:
        yield
    finally:
        dist.destroy_process_group()


def from_first(find: Callable[[], _Value]) -> _Value:
    """What the first process computes, in all of them; also its error."""
    held: tuple[Any, AttribZooError | None] = (None, None)
    if distributed.is_first():
        try:
            held = find(), None
        except AttribZooError as error:
            if distributed.world_size() == 1:
                raise
            held = None, error
    value, raised = distributed.everyone(held)[0]  # with the patience of `together`
    if raised is not None:
        raise raised
    found: _Value = value
    return found


def wait() -> None:
    """Wait until all processes are here, however long that takes."""
    distributed.everyone(None)
