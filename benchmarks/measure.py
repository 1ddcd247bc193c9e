"""What the benchmarks share: the data, tables, and ratios that hold on a busy machine (CPU time, one thread)."""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import contextlib
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

torch.set_num_threads(1)


def clock() -> float:
    """Seconds of work of this process; on a GPU, wall time after everything queued is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def times(functions: Sequence[Callable[[], object]], rounds: int = 5) -> list[float]:
    """Median seconds of each function, run in turn ``rounds`` times after one warm-up."""
    found: list[list[float]] = [[] for _ in functions]
    for round_ in range(rounds + 1):
        for function, seconds in zip(functions, found, strict=True):
            start = clock()
            function()
            if round_:
                seconds.append(clock() - start)
    return [statistics.median(seconds) for seconds in found]


def saved_bytes(function: Callable[[], object], model: torch.nn.Module) -> int:
    """Bytes that autograd keeps for backward while ``function`` runs; each storage once, weights not counted."""
    weights = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept.values())


def data() -> Path:
    """The folder of real data, from the environment variable ``ATTRIB_ZOO_DATA``."""
    folder = os.environ.get("ATTRIB_ZOO_DATA")
    if not folder:
        raise SystemExit("ATTRIB_ZOO_DATA: must name the folder of real data, got nothing; see CONTRIBUTING.md")
    return Path(folder)


def unpacked(name: str) -> Path:
    """The folder of an archive of the data, unpacked once into ``ATTRIB_ZOO_CACHE`` (``~/.cache/attrib_zoo``)."""
    cache = Path(os.environ.get("ATTRIB_ZOO_CACHE", Path.home() / ".cache" / "attrib_zoo"))
    if not (cache / name).is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=cache) as beside,  # whole or not there, for others that look meanwhile
            tarfile.open(data() / f"{name}.tar.gz") as archive,
        ):
            archive.extractall(beside, filter="data")
            with contextlib.suppress(OSError):  # another was faster
                (Path(beside) / name).rename(cache / name)
    return cache / name


def setting() -> str:
    """The machine and versions in a line."""
    import captum
    import torchvision

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU, 1 thread"
    return f"{device}; torch {torch.__version__}, torchvision {torchvision.__version__}, captum {captum.__version__}"


def table(rows: Sequence[Sequence[object]], head: Sequence[str]) -> str:
    """A Markdown table; a number and its interval stay on one line."""
    cells = [[str(cell).replace(" ± ", "\u00a0±\u00a0") for cell in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)
