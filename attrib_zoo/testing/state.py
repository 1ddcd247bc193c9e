"""What a call must leave as it was: a snapshot of model, images and process, to be compared afterwards."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_globals

_PLAIN = (bool, int, float, str, type(None))
_INNER = ("_parameters", "_buffers", "_modules", "_is_full_backward_hook")  # the last outlives a removed hook


class Snapshot:
    """The state of a model, some tensors and the process.

    Hooks, attributes (also an instance-level ``forward`` or a flag such as ``fused_attn``), identities and training
    flags of each module; values, gradients and flags of parameters and buffers; values, versions and flags of the
    tensors; gradient mode, the global generators of torch, NumPy and Python, torch's global switches (threads,
    deterministic algorithms, cuDNN, TF32, default type and device) and the warning filters.

    Args:
        model: the model.
        tensors: what else must not change, by the name to report.
    """

    def __init__(self, model: nn.Module, **tensors: Tensor) -> None:
        self._model = model
        self._tensors = tensors
        torch.rand(())  # a method that seeds the generator may have run before, with the same seed
        self._before = self._look()

    def _look(self) -> dict[str, Any]:
        return {**_process(), **content(self._model, self._tensors)}

    def changes(self) -> list[str]:
        """What differs now, as short sentences; empty if nothing does."""
        return differences(self._before, self._look())


def content(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state of the model and of the tensors, under the names to report."""
    state = {}
    for name, module in model.named_modules(remove_duplicate=False):
        state.update(_module(name or "the model", module))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        state.update(_tensor(f"parameter {name}", parameter))
    for name, buffer in model.named_buffers(remove_duplicate=False):
        state.update(_tensor(f"buffer {name}", buffer))
    for name, tensor in tensors.items():
        state.update(_tensor(name, tensor))
        if not tensor.is_inference():
            state[f"version of {name}"] = tensor._version
    return state


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs between two states, as short sentences; empty if nothing does."""
    found = [f"{key} is gone" for key in before if key not in after]
    found += [f"{key} is new ({_short(after[key])})" for key in after if key not in before]
    found += [
        f"{key} changed" + _from_to(old, after[key])
        for key, old in before.items()
        if key in after and not _equal(old, after[key])
    ]
    return found


def _from_to(old: Any, new: Any) -> str:
    return f" from {old!r} to {new!r}" if isinstance(old, _PLAIN) and isinstance(new, _PLAIN) else ""


def _short(value: Any) -> str:
    return repr(value) if isinstance(value, _PLAIN) else type(value).__name__


def _equal(old: Any, new: Any) -> bool:
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return old.shape == new.shape and old.dtype == new.dtype and bool(torch.equal(old, new))
    if isinstance(old, np.ndarray) and isinstance(new, np.ndarray):
        return bool(np.array_equal(old, new))
    if isinstance(old, (*_PLAIN, tuple)):
        return type(old) is type(new) and bool(old == new)
    return old is new


def _module(name: str, module: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {f"identity of {name}": module, f"class of {name}": type(module)}
    state[f"class-level forward of {name}"] = type(module).forward
    for key, value in vars(module).items():
        if "hooks" in key and isinstance(value, Mapping):
            state[f"number of {key} of {name}"] = len(value)
        elif key not in _INNER:
            state[f"attribute {key} of {name}"] = value
    return state


def _tensor(name: str, tensor: Tensor) -> dict[str, Any]:
    return {
        f"identity of {name}": tensor if tensor.is_leaf else None,
        f"value of {name}": tensor.detach().clone(),
        f"requires_grad of {name}": tensor.requires_grad,
        f"gradient of {name}": None if not tensor.is_leaf or tensor.grad is None else tensor.grad.clone(),
        f"number of hooks on {name}": len(tensor._backward_hooks or ()),
    }


def _of(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    return (lambda: getattr(owner, name)), (lambda value: setattr(owner, name, value))


def _default_device() -> torch.device:
    try:
        return torch.get_default_device()
    except AttributeError:  # torch 2.6 after set_default_device(None)
        return torch.empty(0).device


def _set_default_device(device: str | None) -> None:
    torch.set_default_device(device)
    try:
        torch.get_default_device()
    except AttributeError:  # torch 2.6 cannot read back that there is none: as if it had never been set
        del torch._GLOBAL_DEVICE_CONTEXT.device_context


_SWITCHES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch.set_num_threads": (torch.get_num_threads, torch.set_num_threads),
    "torch.use_deterministic_algorithms": (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    ),
    "torch.set_default_device": (
        lambda: str(_default_device()),
        lambda value: _set_default_device(None if value == "cpu" else value),
    ),
    "torch.set_default_dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch.autograd.set_detect_anomaly": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "torch.set_float32_matmul_precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "torch.backends.cudnn.enabled": _of(torch.backends.cudnn, "enabled"),
    "torch.backends.cudnn.benchmark": _of(torch.backends.cudnn, "benchmark"),
    "torch.backends.cudnn.deterministic": _of(torch.backends.cudnn, "deterministic"),
    "torch.backends.cudnn.allow_tf32": _of(torch.backends.cudnn, "allow_tf32"),
    "torch.backends.cuda.matmul.allow_tf32": _of(torch.backends.cuda.matmul, "allow_tf32"),
    "torch.backends.cuda.enable_flash_sdp": (
        torch.backends.cuda.flash_sdp_enabled,
        torch.backends.cuda.enable_flash_sdp,
    ),
    "torch.backends.cuda.enable_math_sdp": (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
}
"""What a call may not leave switched, by the name under which it is switched: how it is read, and how it is set."""


def _settings() -> dict[str, Any]:
    found = {}
    for name, (look, _) in _SWITCHES.items():
        with suppress(AttributeError, RuntimeError):  # not in this version, or under torch's newer names
            found[name] = look()
    return found


@contextmanager
def settings_kept() -> Iterator[None]:
    """Restores global switches that a class leaves changed, so that each of its calls is checked anew."""
    before = _settings()
    try:
        yield
    finally:
        after = _settings()
        for name, value in before.items():
            if after.get(name) != value:
                _SWITCHES[name][1](value)


def _process() -> dict[str, Any]:
    state: dict[str, Any] = {
        "gradient mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        **_settings(),
        "warnings.filters": tuple(map(str, warnings.filters)),
        "torch's global generator": torch.get_rng_state(),
        "Python's global generator": random.getstate(),
        "nn.Module.__call__": nn.Module.__call__,
        "F.scaled_dot_product_attention": F.scaled_dot_product_attention,
        "F.softmax": F.softmax,
    }
    for i, part in enumerate(np.random.get_state()):
        state[f"NumPy's global generator ({i})"] = part
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for i, rng in enumerate(torch.cuda.get_rng_state_all()):
            state[f"generator of cuda:{i}"] = rng
    for key, value in vars(module_globals).items():
        if key.startswith("_global_") and isinstance(value, Mapping):
            state[f"number of {key}"] = len(value)
    return state
