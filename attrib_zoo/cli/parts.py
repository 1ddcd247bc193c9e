"""What a job over many photographs leaves in its folder: parts, each complete or absent, and a note for each part.

The folder holds ``table/`` and ``maps/``, a file for each part; ``job/``, with the request (``job.json``) and a note
for each finished part; and ``skipped.jsonl``, the files that could not be read. A note is written last, so what it
names is complete: killing the job loses only the part in progress.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attrib_zoo.cli.stream import CHUNK, Interval
from attrib_zoo.errors import DataError, OptionError, check_choice, reason
from attrib_zoo.models.photos import writable_folder
from attrib_zoo.training.files import write_whole

MAPS, TABLES = ("safetensors", "npz"), ("jsonl", "parquet")
SKIPPED = "skipped.jsonl"
_NOTES, _FACTS = "job", "job.json"
_SECONDS = 60.0  # after which a part is written, however small
_LARGEST = 60_000.0  # float16 ends at 65504
_SMALLEST = 1e-3  # below, float16 loses digits


def check_formats(maps: str | None, table: str | None) -> None:
    """Raise for formats that cannot be written, before anything is done.

    Raises:
        OptionError: an unknown format, or one whose library is not installed.
    """
    if maps is not None:
        check_choice("maps", maps, MAPS)
    if table is not None and check_choice("table", table, TABLES) == "parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise OptionError(
                "table: parquet needs pyarrow, which is not installed; pip install 'attrib_zoo[parquet]', or use "
                "--table jsonl"
            ) from error


def halves(map: Tensor) -> tuple[Tensor, float]:
    """A map as float16, and the factor that restores it: 1, or a power of two where float16 would lose it."""
    largest = float(map.abs().max())
    power = 0
    if largest > _LARGEST or 0 < largest < _SMALLEST:
        power = int(np.floor(np.log2(largest)))
    return (map.double() * 2.0**-power).half(), 2.0**power


class Job:
    """A job's folder.

    Args:
        folder: its path; created if missing.
        facts: the request, as JSON: another job's folder is refused.
        maps: format of raw maps, ``"safetensors"`` or ``"npz"``; ``None`` writes none.
        table: format of the table, ``"jsonl"`` or ``"parquet"``; ``None`` writes none.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], maps: str | None, table: str | None) -> None:
        self.folder, self.maps, self.table = folder, maps, table
        self.facts: dict[str, Any] = json.loads(json.dumps(facts))

    def begin(self, resume: bool) -> list[Interval]:
        """Create the folder, or see what is already done; returns the finished photographs.

        Raises:
            DataError: the folder holds another job, or one that may not be resumed, or cannot be written.
        """
        note = self.folder / _NOTES / _FACTS
        if note.exists():
            if not resume:
                raise DataError(
                    f"output: '{self.folder}' holds the results of a job; continue it with --resume, or choose another "
                    "folder with --output"
                )
            self._check_same(_read(note))
        wanted = [_NOTES, *(["maps"] if self.maps else []), *(["table"] if self.table else [])]
        for name in wanted:
            writable_folder(self.folder / name)
        self.write(f"{_NOTES}/{_FACTS}", json.dumps(self.facts, indent=1))
        return [(found["start"], found["stop"]) for found in self.notes()]

    def _check_same(self, before: Any) -> None:
        before = before if isinstance(before, dict) else {}
        other = [name for name in self.facts if before.get(name) != self.facts[name]]
        if other:
            was, now = (json.dumps(facts.get(other[0]))[:100] for facts in (before, self.facts))
            raise DataError(
                f"resume: '{self.folder}' holds another job: {other[0]} was {was}, is now {now}; give the "
                "options that it was begun with, or choose another folder with --output"
            )

    def notes(self) -> Iterator[dict[str, Any]]:
        """The notes of all finished parts, in the order of their photographs."""
        for path in sorted((self.folder / _NOTES).glob("[0-9]*.json")):
            found = _read(path)
            if isinstance(found, dict) and {"start", "stop", "skipped"} <= found.keys():
                yield found

    def finish(self) -> tuple[int, int]:
        """Write the list of files that could not be read; returns how many photographs were explained and skipped."""
        lines, count = [], 0
        for note in self.notes():
            lines += [json.dumps(entry) + "\n" for entry in note["skipped"]]
            count += note["stop"] - note["start"]
        if lines:
            self.write(SKIPPED, "".join(lines))
        return count - len(lines), len(lines)

    def part(self, start: int) -> Part:
        """A new part, which begins with this photograph."""
        return Part(self, start)

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file of the folder whole or not at all.

        Raises:
            DataError: it cannot be written.
        """
        path = self.folder / name
        try:
            write_whole(path, content)
        except OSError as error:
            raise DataError(
                f"output: cannot write '{path}' ({reason(error)}); make room, then continue with the same command and "
                "--resume"
            ) from error


class Part:
    """The results since the last part, until they are written.

    Only what :meth:`reach` has confirmed is written: an interruption may come in the middle of a batch.
    """

    def __init__(self, job: Job, start: int) -> None:
        self.job, self.start = job, start
        self._begun = time.monotonic()
        self._rows: list[dict[str, Any]] = []
        self._heat: dict[str, list[Tensor]] = {}
        self._scales: dict[str, list[float]] = {}
        self._skipped: list[dict[str, str]] = []
        self._sure = (start, 0, 0)

    @property
    def stop(self) -> int:
        """One past the last photograph that is complete."""
        return self._sure[0]

    @property
    def due(self) -> bool:
        """Whether it is large or old enough to be written."""
        return self.stop - self.start >= CHUNK or time.monotonic() - self._begun > _SECONDS

    def reach(self, stop: int) -> None:
        """Confirm that all photographs before this one are in the part."""
        self._sure = stop, len(self._rows), len(self._skipped)

    def skip(self, photo: str, why: str) -> None:
        """A file that could not be read."""
        self._skipped.append({"photo": photo, "reason": why})

    def add(self, row: Mapping[str, Any], maps: Mapping[str, Tensor]) -> None:
        """Add a line of the table, and the maps ``(h, w)`` of its photograph and class, by method."""
        where: dict[str, Any] = {}
        if self.job.maps:
            where = {"file": f"maps/{self._name}.{self.job.maps}", "row": len(self._rows)}
            for name, found in maps.items():
                half, scale = halves(found)
                self._heat.setdefault(name, []).append(half)
                self._scales.setdefault(name, []).append(scale)
        self._rows.append({**row, **where})

    @property
    def _name(self) -> str:
        return f"{self.start:09d}"

    def write(self) -> Part:
        """Write it, if there is anything to write, and begin the next."""
        stop, rows, skipped = self._sure
        if stop > self.start:
            job = self.job
            if job.maps and rows:
                job.write(f"maps/{self._name}.{job.maps}", self._maps(job.maps, rows))
            if job.table and rows:
                job.write(f"table/{self._name}.{job.table}", self._table(job.table, rows))
            note = {"start": self.start, "stop": stop, "rows": rows, "skipped": self._skipped[:skipped]}
            job.write(f"{_NOTES}/{self._name}.json", json.dumps(note))
        return Part(self.job, stop)

    def _maps(self, form: str, rows: int) -> bytes:
        tensors = {name: torch.stack(found[:rows]) for name, found in self._heat.items()}
        tensors |= {f"{name}.scale": torch.tensor(scales[:rows]) for name, scales in self._scales.items()}
        if form == "npz":
            file = io.BytesIO()
            arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
            np.savez(file, **arrays)
            return file.getvalue()
        from safetensors.torch import save

        written: bytes = save(tensors)
        return written

    def _table(self, form: str, rows: int) -> bytes:
        if form == "jsonl":
            return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self._rows[:rows]).encode()
        import pyarrow
        from pyarrow import parquet

        kinds: dict[type, Any] = {int: pyarrow.int64(), float: pyarrow.float64(), str: pyarrow.string()}
        fields = [
            (name, kinds.get(type(value), pyarrow.list_(pyarrow.string()))) for name, value in self._rows[0].items()
        ]
        file = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(self._rows[:rows], pyarrow.schema(fields)), file)
        return file.getvalue()


def spelt(name: str | os.PathLike[str]) -> str:
    """A file's name as text that any table can hold, even if its bytes are not UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
