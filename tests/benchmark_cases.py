"""What the tests of the benchmark share: cheap methods, a loader that can stop, tables made by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import strategies as zoo
import torch
from torch import Tensor, nn

from attrib_zoo.benchmark import Measure, Table
from attrib_zoo.benchmark.cost import Cost
from attrib_zoo.benchmark.records import Records, Row

IMAGES = zoo.batch(7)
SETTING = {
    "model": "Net",
    "weights": "0123",
    "masking": "auto",
    "score": "softmax",
    "seed": 0,
    "attrib_zoo": "1",
    "torch": "2",
}


def brightness(inputs: Tensor, target: Tensor) -> Tensor:
    """A method that is a plain function; its maps depend on the image alone."""
    return inputs.sum(1, keepdim=True)


def darkness(inputs: Tensor, target: Tensor) -> Tensor:
    return -brightness(inputs, target)


CHEAP = {"brightness": brightness, "darkness": darkness}


class Counted:
    """Remembers how many images a method was asked for."""

    def __init__(self, method: Any = brightness) -> None:
        self.method, self.images = method, 0

    def __call__(self, inputs: Tensor, target: Tensor) -> Tensor:
        self.images += len(inputs)
        return self.method(inputs, target)


class Batches:
    """Batches of so many images; counts those it gave, and raises Ctrl-C instead of the one after ``stop``."""

    def __init__(self, size: int, images: Tensor = IMAGES, stop: int | None = None) -> None:
        self.parts, self.stop, self.given = images.split(size), stop, 0

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Any]:
        for part in self.parts:
            if self.given == self.stop:
                raise KeyboardInterrupt
            self.given += 1
            yield part


class Linear(nn.Module):
    """Two logits: the mean of the image, and nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, inputs: Tensor) -> Tensor:
        mean = self.gain * inputs.mean((1, 2, 3))
        return torch.stack([mean, torch.zeros_like(mean)], 1)


def numbers(table: Table) -> dict[tuple[str, str], Tensor]:
    """All per-image values."""
    return {(method, m.name): table.values(method, m.name) for method in table.methods for m in table.measures}


def assert_same(one: Table, two: Table, exact: bool = True) -> None:
    """The same rows, to the bit or up to the rounding of another batch."""
    assert one.methods == two.methods
    assert one.images == two.images
    assert [m.name for m in one.measures] == [m.name for m in two.measures]
    found = numbers(two)
    for key, values in numbers(one).items():
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-3}
        torch.testing.assert_close(found[key], values, equal_nan=True, **tolerance)
    for (method, image), row in one.records.rows.items():
        other = two.records.rows[method, image]
        assert (row.target, row.digest) == (other.target, other.digest)
        assert row.curves.keys() == other.curves.keys()


def by_hand(
    found: Mapping[str, Sequence[float]], measures: Sequence[Measure] = (), curve: Sequence[float] = ()
) -> Table:
    """A table of one measure, or of those given with the same values."""
    chosen = list(measures) or [Measure("score", lambda asked: asked.clean, percent=False)]
    records = Records(SETTING)
    for i, (method, values) in enumerate(found.items()):
        rows = [
            Row(
                method,
                image,
                0,
                image % 3,
                0.5,
                {m.name: value for m in chosen},
                {m.name: [value * c for c in curve] for m in chosen if m.points},
            )
            for image, value in enumerate(values)
        ]
        n = len(values)
        records.add(rows, method, Cost(n, (i + 1) * n, i * n, 0.5 * (i + 1), 0.25, None if i else 3_000_000))
    return Table(records, chosen)
