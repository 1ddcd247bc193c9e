"""Weights of classifiers: read from a file, loaded into a model, or downloaded without a long wait when offline."""

from __future__ import annotations

import inspect
import io
import pickle
import re
import socket
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo.errors import DataError, listed, reason

TIMEOUT = 20.0
"""Seconds of silence after which a download is given up."""


_PROGRAMS = {
    "/code/": ("a TorchScript archive", "torch.jit.load(path).state_dict()"),
    "/models/model.json": ("an exported program", "torch.export.load(path).state_dict"),
    "serialized_exported_program": ("an exported program", "torch.export.load(path).state_dict"),  # before torch 2.8
}
"""By the name of an entry: archives of torch that are no state dict, and how to get that."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file or a PyTorch state dict; no code in the file is run.

    Wrappers that training scripts put around a state dict (``"state_dict"``, ``"model"``, DataParallel's ``module.``)
    are removed.

    Raises:
        DataError: the file is missing, damaged, or not a state dict.
    """
    if not path.is_file():
        if found := address(path):
            raise DataError(f"weights: '{found}' is an address; nothing is downloaded from there: give a file's path")
        raise DataError(f"weights: no file '{path}'; give a safetensors file or a PyTorch state dict")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            _refuse_programs(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"weights: '{path}' is damaged, or holds Python objects, which are not loaded for safety; "
            "save the tensors alone: torch.save(model.state_dict(), path)"
        ) from error
    except DataError:
        raise
    except Exception as error:  # whatever the two readers raise for a broken file
        raise DataError(f"weights: cannot read '{path}' ({reason(error)}); it is damaged or cut off") from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(
            f"weights: '{path}' must hold named tensors, got other things in a {type(state).__name__}; "
            "save them with torch.save(model.state_dict(), path)"
        )
    for prefix in ("module.", "_orig_mod."):
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def address(path: Path) -> str | None:
    """What was given as a path is an address, ``scheme://...``: that, with both slashes; else ``None``."""
    found = re.match(r"([a-z][a-z0-9+.-]+):/+(.*)", str(path), re.IGNORECASE)
    return None if found is None else f"{found[1]}://{found[2]}"


def _refuse_programs(path: Path) -> None:
    """Raise for archives of torch that hold code next to their tensors."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    for mark, (kind, tensors) in _PROGRAMS.items():
        if any(mark in name for name in names):
            raise DataError(
                f"weights: '{path}' is {kind}, which holds code; save its tensors alone: "
                f"torch.save({tensors}, other_path)"
            )


def _without_prefix(state: dict[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The part of a file that is the model, where a trainer stores it under a prefix (Lightning: ``model.``).

    Raises:
        DataError: there are several such parts, such as the weights and their moving average.
    """
    if any(key in wanted for key in state):
        return state
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        at = key.find(".") + 1
        while at and key[at:] not in wanted:
            at = key.find(".", at) + 1
        if at:
            parts.setdefault(key[:at], {})[key[at:]] = value
    most = max(map(len, parts.values()), default=0)
    if 2 * most < len(wanted):  # names that happen to be alike: a file of another architecture
        return state
    whole = [prefix for prefix, part in parts.items() if len(part) == most]
    if len(whole) > 1:
        raise DataError(
            f"weights: '{path}' holds the model's tensors {len(whole)} times, under {' and '.join(map(repr, whole))}; "
            "save those that are wanted, without what stands before their names"
        )
    prefix = whole[0]
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def fit_into(build: Callable[..., nn.Module], path: Path, num_classes: int | None) -> tuple[nn.Module, int | None]:
    """Build a model and load a file's weights into it, with every tensor matched.

    Args:
        build: makes the model for a number of classes, or for its own number if ``None``; and, where possible, for a
            number of image bands given as ``channels=``.
        path: the file.
        num_classes: number of classes; ``None``: as many as in the file.

    Returns:
        The model, and its number of classes if that is not the model's own.

    Raises:
        DataError: the file cannot be read, or is of another architecture.
    """
    state = read_weights(path)
    model = build(num_classes)
    state = _without_prefix(state, model.state_dict(), path)
    if num_classes is None:
        num_classes = _classes_in(state, model.state_dict())
        model = model if num_classes is None else build(num_classes)
    channels = _channels_in(state, model.state_dict())
    if channels is not None and "channels" in inspect.signature(build).parameters:
        model = build(num_classes, channels=channels)
    wanted = model.state_dict()
    faults = {
        "missing": [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")],
        "not in the model": [key for key in state if key not in wanted],
        "of another shape": [
            f"{key} {_shape(state[key])} for {_shape(wanted[key])}"
            for key in wanted
            if key in state and state[key].shape != wanted[key].shape
        ],
    }
    if any(faults.values()):
        found = "; ".join(f"{fault} {len(keys)} ({listed(keys)})" for fault, keys in faults.items() if keys)
        raise DataError(
            f"weights: '{path}' does not fit the model, tensors {found}; is it a file of another architecture?"
        )
    model.load_state_dict(state, strict=False)
    return model, num_classes


def _classes_in(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> int | None:
    """The number of classes in the file, if it differs only in the length of the last layer."""
    bands = _other_bands(state, wanted)
    differ = [(state[key].shape, wanted[key].shape) for key in wanted if key in state and key not in bands]
    differ = [(ours, theirs) for ours, theirs in differ if ours != theirs]
    lengths = {(ours[:1], theirs[:1]) for ours, theirs in differ}
    if len(lengths) != 1 or any(ours[1:] != theirs[1:] for ours, theirs in differ):
        return None
    (ours, _), *_ = lengths
    return ours[0] if ours else None


def _other_bands(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """The convolutions on colour images that differ in their input channels and in nothing else."""
    return [
        key
        for key in wanted
        if key in state and wanted[key].ndim == 4 and wanted[key].shape[1] == 3 and state[key].ndim == 4
        if state[key].shape[1] != 3 and state[key][:, 0].shape == wanted[key][:, 0].shape
    ]


def _channels_in(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> int | None:
    """The number of image bands that the file is for, if it is not that of colour images."""
    found = {state[key].shape[1] for key in _other_bands(state, wanted)}
    return found.pop() if len(found) == 1 else None


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "one number"


@contextmanager
def download(name: str) -> Iterator[None]:
    """Inside, connections time out after :data:`TIMEOUT`, and any failure becomes one sentence.

    Raises:
        DataError: the weights are unavailable.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        with redirect_stdout(io.StringIO()):  # torch prints the address; its progress bar goes to stderr
            yield
    except Exception as error:  # network, hub, disk: each library raises errors of its own
        raise DataError(
            f"weights: cannot get the pretrained weights of {name} ({reason(error)}); "
            "connect to the network, or pass a file: weights=FILE (on the command line --weights FILE)"
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def ask_hub(repository: str, filename: str | None) -> None:
    """Raise at once if weights that are not in the cache are unreachable; timm itself retries for a minute."""
    import huggingface_hub as hub
    from huggingface_hub.utils import HfHubHTTPError

    files = [filename] if filename else ["model.safetensors", "pytorch_model.bin"]
    if any(isinstance(hub.try_to_load_from_cache(repository, file), str) for file in files):
        return
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(repository, "config.json"), timeout=TIMEOUT)
    except HfHubHTTPError:
        return  # the hub answered; its answer about the weights is for timm to handle
