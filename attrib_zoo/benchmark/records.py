"""Per-image results, written to a file as they come: an interrupted run continues where it stopped."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attrib_zoo.benchmark.cost import Cost
from attrib_zoo.errors import DataError, reason, warn
from attrib_zoo.training.signals import held

FORMAT = 2
"""Of new files, whose lines have seals: a checksum of the line and of all before it. 1, of version 0.1, has none."""


@dataclass
class Row:
    """The results of one method on one image.

    Attributes:
        method: its name.
        image: the image's position in the loader.
        digest: a checksum of the image, its target and its regions, so that a different loader is noticed.
        target: the class that was explained.
        clean: the target's score on the whole image.
        values: measure -> number; NaN where undefined.
        curves: measure -> its values along the curve.
    """

    method: str
    image: int
    digest: int
    target: int
    clean: float
    values: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)


class Records:
    """Rows and costs in memory and, with a path, in a file of one JSON object per line.

    Args:
        setting: what the results depend on: model, methods, measures, seeds. A file with another setting is refused.
        path: the file, created if missing; ``None`` keeps nothing.
        beside: files of other processes, to read as well.

    Raises:
        DataError: the file belongs to another run, was edited, lacks lines, or cannot be read or written.
    """

    def __init__(
        self, setting: Mapping[str, Any], path: str | os.PathLike[str] | None = None, beside: Iterable[Path] = ()
    ) -> None:
        self.setting = json.loads(json.dumps(setting))
        self.rows: dict[tuple[str, int], Row] = {}
        self.costs: dict[str, Cost] = {}
        self._seal: str | None = ""  # of the file's last line; None where its lines have none
        self.path = None if path is None else Path(path)
        if self.path is None:
            return
        for file in beside:
            self._read(file)
        self._begun = self._read(self.path)
        self._write([])  # fails before any work if it cannot be written

    def add(self, rows: Iterable[Row], method: str, cost: Cost) -> None:
        """Keep a batch of one method; the file gets all of it or nothing."""
        found = list(rows)
        self._keep(found, method, cost)
        if self.path is not None:
            head = [] if self._begun else [{"format": FORMAT, "setting": self.setting}]
            self._write([*head, {"rows": [_packed(row) for row in found], "method": method, "cost": cost.facts()}])
            self._begun = True

    def first(self, count: int) -> Records:
        """The results for the first images of the loader, in their order."""
        part = Records(self.setting)
        part.rows = {key: row for key, row in sorted(self.rows.items(), key=lambda item: item[0][1]) if key[1] < count}
        part.costs = dict(self.costs)
        return part

    def merge(self, other: Records) -> None:
        """Take over the results of another process."""
        new = {key: row for key, row in other.rows.items() if key not in self.rows}
        self.rows |= new
        for method, cost in other.costs.items():
            self.costs[method] = self.costs.get(method, Cost()) + cost

    def _keep(self, rows: list[Row], method: str, cost: Cost) -> None:
        if all((row.method, row.image) in self.rows for row in rows):
            return
        self.rows |= {(row.method, row.image): row for row in rows}
        self.costs[method] = self.costs.get(method, Cost()) + cost

    def _write(self, lines: list[dict[str, Any]]) -> None:
        if self.path is None:
            return
        text, seal = "", self._seal
        for line in lines:
            written, seal = _sealed(line, seal)
            text += written
        try:
            with held(), self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise self._unwritable(error) from error
        self._seal = seal

    def _read(self, path: Path) -> bool:
        """Take over a file, and say whether it existed. A file that holds no results of this run is not touched."""
        if not path.exists():
            return False
        try:
            data = path.read_bytes()
            whole, begun = data[: data.rfind(b"\n") + 1], data[data.rfind(b"\n") + 1 :]
            texts = whole.decode().split("\n")[:-1]
            lines = [json.loads(text) for text in texts]
        except OSError as error:
            raise DataError(f"path: '{path}' cannot be read ({reason(error)}); choose another file") from error
        except (ValueError, RecursionError) as error:
            raise self._strange(path) from error
        seal: str | None = ""
        if lines:
            self._check(path, lines[0])
            seal = _last_seal(path, texts, lines[0])
        elif begun and not json.dumps({"format": FORMAT}).startswith(begun[:12].decode("utf-8", "replace")):
            raise self._strange(path)
        try:
            for line in lines[1:]:
                self._keep([_unpacked(row) for row in line["rows"]], line["method"], Cost(**line["cost"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise self._strange(path) from error
        if path == self.path:
            self._seal = seal
        if begun and path == self.path:  # a last line without a line end was being written when the run stopped
            try:
                os.truncate(path, len(whole))
            except OSError as error:
                raise self._unwritable(error) from error
        return bool(lines)

    def _check(self, path: Path, head: Any) -> None:
        """Raise for the first line of another run's file, or of a file of another kind."""
        if (
            not isinstance(head, dict)
            or head.get("format") not in (1, FORMAT)
            or not isinstance(head.get("setting"), dict)
        ):
            raise self._strange(path)
        told = head["setting"]
        other = sorted(k for k in {*told, *self.setting} if told.get(k) != self.setting.get(k))
        if other:
            first = other[0]
            raise DataError(
                f"path: '{path}' is of another run: {', '.join(other)} differ ({first}: {told.get(first)!r}, now "
                f"{self.setting.get(first)!r}); choose another file, or remove it"
            )

    def _strange(self, path: Path) -> DataError:
        return DataError(
            f"path: '{path}' must be a results file of this version, got something else; choose another file, or "
            "remove it"
        )

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(
            f"path: must be a file in a folder that can be written, got '{self.path}' ({reason(error)}); make the "
            "folder, make room, or choose another"
        )


def _sealed(line: Mapping[str, Any], before: str | None) -> tuple[str, str | None]:
    """A line of the file and its seal, a checksum of the line and of the seal before it."""
    text = json.dumps(line)
    if before is None:
        return text + "\n", None
    seal = _seal_of(text[:-1], before)
    return f'{text[:-1]}{_MARK}{seal}"}}\n', seal


def _last_seal(path: Path, texts: list[str], head: Mapping[str, Any]) -> str | None:
    """The seal of the last line, with all lines checked."""
    if head["format"] == 1:
        warn(
            f"path: '{path}' was begun by version 0.1, whose lines have no checksums: an edited or deleted line cannot "
            "be told; remove it to measure anew"
        )
        return None
    seal = ""
    for number, text in enumerate(texts, start=1):
        body, mark, told = text.rpartition(_MARK)
        seal = _seal_of(body, seal)
        if not mark or told != f'{seal}"}}':
            raise DataError(
                f"path: line {number} of '{path}' is not as it was written, or lines before it are missing or moved; "
                "bring back the file as it was, or remove it and measure anew"
            )
    return seal


_MARK = ', "seal": "'


def _seal_of(body: str, before: str) -> str:
    return hashlib.sha256(f"{before}\n{body}".encode()).hexdigest()[:16]


def _packed(row: Row) -> dict[str, Any]:
    """A row as JSON, which has no NaN."""
    values = {name: _number(value) for name, value in row.values.items()}
    curves = {name: [_number(value) for value in curve] for name, curve in row.curves.items()}
    return {**vars(row), "values": values, "curves": curves, "clean": _number(row.clean)}


def _unpacked(found: dict[str, Any]) -> Row:
    values = {name: _nan(value) for name, value in found["values"].items()}
    curves = {name: [_nan(value) for value in curve] for name, curve in found["curves"].items()}
    return Row(**{**found, "values": values, "curves": curves, "clean": _nan(found["clean"])})


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _nan(value: float | None) -> float:
    return math.nan if value is None else value
