"""safetensors files with a checksum of their whole content, written tensor by tensor, without a full copy."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

KEY, SEAL = "attrib_zoo", "sha256"
"""The names in the file's metadata of the facts and of the checksum."""

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_NAMES = {name: dtype for dtype, name in _TYPES.items()}
_EMPTY = "0" * 64


class SealError(ValueError):
    """The content does not match its checksum."""


class _Digest:
    """SHA-256 over the facts, and over name, dtype, shape and bytes of each tensor in file order."""

    def __init__(self, facts: str) -> None:
        self._sum = hashlib.sha256(facts.encode())

    def begin(self, name: str, tensor: Tensor) -> None:
        self._sum.update(f"\n{name}|{_TYPES[tensor.dtype]}|{tuple(tensor.shape)}\n".encode())

    def add(self, data: memoryview) -> None:
        self._sum.update(data)

    def text(self) -> str:
        return self._sum.hexdigest()


def write_sealed(file: BinaryIO, tensors: Mapping[str, Tensor], facts: str) -> None:
    """Write a safetensors file of these tensors, with the facts and a checksum of both in its metadata.

    Args:
        file: open for writing, and seekable.
        tensors: any of the common types, on any device.
        facts: JSON.

    Raises:
        TypeError: a tensor has a dtype that the format does not support.
    """
    order = _in_order(tensors)
    entries: dict[str, object] = {"__metadata__": {SEAL: _EMPTY, KEY: facts}}
    place = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _TYPES:
            raise TypeError(f"{name} is of type {tensor.dtype}, which safetensors files do not have")
        end = place + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)
    digest = _Digest(facts)
    for name in order:
        digest.begin(name, tensors[name])
        data = _bytes(tensors[name])
        digest.add(data)
        file.write(data)
    file.seek(8 + header.index(_EMPTY.encode()))
    file.write(digest.text().encode())


def read_metadata(path: Path) -> tuple[str | None, str | None]:
    """The facts and the checksum of a safetensors file, if present; no tensor is read."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt", device="cpu") as file:
        metadata = file.metadata() or {}
    return metadata.get(KEY), metadata.get(SEAL)


def read_tensors(path: Path, facts: str, seal: str | None) -> dict[str, Tensor]:
    """The tensors of a file, in memory of their own, after a check of the checksum.

    Each is read into its own memory. A mapped file, which safetensors has, would be held twice: its pages and a copy.

    Args:
        path: the file, of which :func:`read_metadata` has read the header.
        facts: from :func:`read_metadata`.
        seal: likewise; ``None`` for a file without a checksum, which is trusted.

    Raises:
        SealError: the checksum is not that of the content; or a tensor is of another type, or not as large as the
            header says.
    """
    found: dict[str, Tensor] = {}
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start, end = file.tell(), file.seek(0, 2)
        for name, entry in header.items():
            if name != "__metadata__":
                found[name] = _read_one(file, name, entry, start, end)
    if seal is None:
        return found
    digest = _Digest(facts)
    for name in _in_order(found):
        digest.begin(name, found[name])
        digest.add(_bytes(found[name]))
    if digest.text() != seal:
        raise SealError("its checksum is not that of its content")
    return found


def _read_one(file: BufferedReader, name: str, entry: dict[str, Any], start: int, end: int) -> Tensor:
    """A tensor of a file whose tensors lie between these places; its memory is asked for only if it is all there."""
    if entry["dtype"] not in _NAMES:
        raise SealError(f"{name} is of type {entry['dtype']}")
    dtype, (first, last) = _NAMES[entry["dtype"]], entry["data_offsets"]
    if not 0 <= first <= last <= end - start or last - first != math.prod(entry["shape"]) * dtype.itemsize:
        raise SealError(f"{name} is not as large as its header says")
    tensor = torch.empty(entry["shape"], dtype=dtype)
    file.seek(start + first)
    if last > first and file.readinto(_bytes(tensor)) != last - first:
        raise SealError(f"{name} is cut off")
    return tensor


def _in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Wide dtypes first, so that each tensor is aligned for its dtype."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of the values; for a CPU tensor without a copy."""
    whole = tensor.detach().cpu().contiguous()
    return whole.reshape(-1).view(torch.uint8).numpy().data if whole.numel() else memoryview(b"")
