"""Per-image results, kept in a file as they come: a run that was interrupted goes on where it stopped."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attrib_zoo.benchmark.cost import Cost
from attrib_zoo.errors import DataError

FORMAT = 1


@dataclass
class Row:
    """What one method got on one image.

    Attributes:
        method: its name.
        image: the image's place in the loader.
        digest: a checksum of the image, so that another loader is noticed.
        target: the class that was explained.
        clean: the target's score on the whole image.
        values: measure -> number; NaN where it means nothing.
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
        setting: what the results depend on: model, methods, measures, seeds. A file of another setting is refused.
        path: the file, made if it is not there; ``None`` keeps nothing.
        beside: files of other processes to read too.

    Raises:
        DataError: the file is of another run, or cannot be read or written.
    """

    def __init__(
        self, setting: Mapping[str, Any], path: str | os.PathLike[str] | None = None, beside: Iterable[Path] = ()
    ) -> None:
        self.setting = json.loads(json.dumps(setting))
        self.rows: dict[tuple[str, int], Row] = {}
        self.costs: dict[str, Cost] = {}
        self.path = None if path is None else Path(path)
        if self.path is None:
            return
        for file in beside:
            self._read(file)
        if self.path.exists() and self.path.stat().st_size:
            self._mend(self.path)
            self._read(self.path)
        else:
            self._write([{"format": FORMAT, "setting": self.setting}])

    def add(self, rows: Iterable[Row], method: str, cost: Cost) -> None:
        """Keep a batch of one method; all of it reaches the file, or none."""
        found = list(rows)
        self._keep(found, method, cost)
        if self.path is not None:
            packed = [{**vars(row), "values": _plain(row.values), "clean": _number(row.clean)} for row in found]
            self._write([{"rows": packed, "method": method, "cost": cost.facts()}])

    def merge(self, other: Records) -> None:
        """Take over what another process found."""
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
        text = "".join(json.dumps(line) + "\n" for line in lines)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise DataError(
                f"path: must be a file in a folder that can be written, got {self.path} ({error.strerror}); "
                "make the folder, make room, or choose another"
            ) from error

    def _mend(self, path: Path) -> None:
        """A last line without an end was being written when the run stopped."""
        data = path.read_bytes()
        if not data.endswith(b"\n"):
            path.write_bytes(data[: data.rfind(b"\n") + 1])

    def _read(self, path: Path) -> None:
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise DataError(f"path: {path} must be a results file, but cannot be read ({error}); remove it") from error
        if not lines:
            self._write([{"format": FORMAT, "setting": self.setting}])
            return
        head = lines[0] if isinstance(lines[0], dict) else {}
        if head.get("format") != FORMAT or "setting" not in head:
            raise DataError(f"path: {path} must be a results file of this version, got something else; choose another")
        told = head["setting"]
        other = sorted(k for k in {*told, *self.setting} if told.get(k) != self.setting.get(k))
        if other:
            first = other[0]
            raise DataError(
                f"path: {path} is of another run: {', '.join(other)} differ ({first}: {told.get(first)!r}, now "
                f"{self.setting.get(first)!r}); choose another file, or remove it"
            )
        for line in lines[1:]:
            rows = [Row(**{**row, "values": _back(row["values"]), "clean": _nan(row["clean"])}) for row in line["rows"]]
            self._keep(rows, line["method"], Cost(**line["cost"]))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _number(value) for name, value in values.items()}


def _back(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: _nan(value) for name, value in values.items()}
