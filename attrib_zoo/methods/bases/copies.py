"""Gradient CAMs over many copies of an image: points on a path, or noisy samples, in chunks that fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from attrib_zoo.errors import OptionError
from attrib_zoo.masking import ChunkSize


def each_chunk(
    inputs: Tensor,
    copies: int,
    work: Callable[[Tensor, Tensor], None],
    *,
    chunk_size: int | None,
    progress: str | None,
) -> None:
    """Call ``work(rows, numbers)`` until each image has had each copy; chunks cross the borders of images.

    Args:
        inputs: the N images, whose device and size say how many go at once.
        copies: how many of each image.
        work: takes the images ``(M,)`` and the numbers of the copies ``(M,)``; it must not add to a result before
            all that needs memory is done, since it is called again with fewer where memory runs out.
        chunk_size: M at most; ``None`` finds it.
        progress: what a progress bar is called, or ``None``.
    """

    def some(part: slice) -> None:
        pairs = torch.arange(part.start, part.stop)
        work(pairs % len(inputs), pairs // len(inputs))

    with progress_bar(len(inputs) * copies, progress) as advance:
        for done in ChunkSize(chunk_size, inputs).ranges(len(inputs) * copies, some):
            advance(done)


@contextmanager
def progress_bar(total: int, name: str | None) -> Iterator[Callable[[int], object]]:
    """A bar of so many images, or nothing where it has no name."""
    if name is None:
        yield lambda _: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=name, unit="image", leave=False) as bar:
        yield bar.update


def check_seed(seed: int) -> int:
    """``seed`` if it is an integer, else an error."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise OptionError(f"seed: must be an integer, got {seed!r}")
    return seed
