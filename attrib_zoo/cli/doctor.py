"""The command ``doctor``: versions, devices, caches, and what is missing; returns the text to print."""

from __future__ import annotations

import importlib
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from attrib_zoo import __version__
from attrib_zoo.errors import aligned, reason

_NEEDED = ("torch", "torchvision", "timm", "captum", "numpy", "safetensors", "matplotlib", "pillow", "jsonargparse")


def doctor(options: Any) -> str:
    """What a bug report should include, and what this machine lacks."""
    found, troubles = _versions()
    devices, more = _devices()
    sections = [
        ("versions", found),
        ("devices", devices),
        ("caches", _caches()),
        ("extras", _extras()),
    ]
    lines = []
    for title, rows in sections:
        lines += [title, *(f"  {line}" for line in aligned(rows)), ""]
    troubles += more
    lines += ["missing", *(f"  {trouble}" for trouble in troubles)] if troubles else ["nothing is missing"]
    return "\n".join(lines)


def _versions() -> tuple[list[tuple[str, str]], list[str]]:
    rows = [("attrib_zoo", __version__), ("python", f"{platform.python_version()} ({sys.executable})")]
    rows.append(("system", f"{platform.system()} {platform.release()}, {platform.machine()}"))
    troubles = []
    for name in _NEEDED:
        version = _version(name)
        rows.append((name, version or "missing"))
        if version is None:
            troubles.append(f"{name}: pip install {name}")
    return rows, troubles


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> tuple[list[tuple[str, str]], list[str]]:
    try:
        import torch
    except ImportError as error:
        return [("torch", f"cannot be loaded: {reason(error)}")], []
    rows = [("cpu", f"{os.cpu_count()} cores, torch takes {torch.get_num_threads()} threads")]
    troubles = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(i)
        rows.append((f"cuda:{i}", f"{about.name}, {about.total_memory / 2**30:.0f} GiB"))
    if torch.backends.mps.is_available():
        rows.append(("mps", "the GPU of this Mac"))
    if len(rows) == 1:
        built = (
            f"torch was built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch was built without CUDA"
        )
        rows.append(("gpu", f"none found; {built}"))
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # a package built for another torch raises RuntimeError
        troubles.append(
            f"torchvision does not fit this torch ({reason(error)}); install the pair that belongs together"
        )
    return rows, troubles


def _caches() -> list[tuple[str, str]]:
    """Where the weights of named models are stored."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    torch_home = Path(os.environ.get("TORCH_HOME", home / "torch"))
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", home / "huggingface")) / "hub"
    return [("torchvision", _folder(torch_home / "hub" / "checkpoints")), ("timm", _folder(Path(hub)))]


def _folder(path: Path) -> str:
    if not path.is_dir():
        return f"{path} (nothing yet)"
    files = [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
    size = sum(file.stat().st_size for file in files) / 1e6
    return f"{path} ({len(files)} files, {size:.0f} MB{'' if os.access(path, os.W_OK) else ', cannot be written'})"


def _extras() -> list[tuple[str, str]]:
    """The optional parts of the installed package, and what each still needs."""
    try:
        required = metadata.requires("attrib_zoo") or []
    except metadata.PackageNotFoundError:
        return [("attrib_zoo", "runs from a folder without having been installed: pip install -e .")]
    extras: dict[str, list[str]] = {}
    for line in required:
        extra = re.search(r"extra\s*==\s*[\"']([\w-]+)", line)
        name = re.match(r"[\w.-]+", line)
        if extra and name and not re.search(r"python_version|sys_platform|platform_system", line):
            extras.setdefault(extra[1], []).append(name[0])
    rows = []
    for part, names in sorted(extras.items()):
        absent = [needed for needed in names if _version(needed) is None]
        rows.append(
            (part, "complete" if not absent else f"needs {', '.join(absent)}: pip install 'attrib_zoo[{part}]'")
        )
    return rows
