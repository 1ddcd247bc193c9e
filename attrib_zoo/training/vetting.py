"""The content of a checkpoint is checked before it is trusted, and before memory is allocated for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo.errors import CheckpointError, reason, warn
from attrib_zoo.training.checkpoint import Checkpoint

_FACTS: dict[str, type | tuple[type, ...]] = {
    "method": str,
    "model": str,
    "options": dict,
    "layers": list,
    "channels": list,
    "num_classes": int,
    "schedule": dict,
    "steps": int,
    "backbone": str,
    "decisions": dict,
    "quantities": list,
    "validation": list,
    "messages": list,
}
_STATE: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "order": dict,
    "optimizer": dict,
    "cycle": dict,
    "scaler": (dict, type(None)),
    "quantities": list,
    "validation": list,
    "messages": list,
}
_WEIGHTS = (torch.float32, torch.float64)
_FREE = 2**26  # elements that a network may always have if its shapes are unknown before it is built

Build = Callable[[Sequence[int], int, "torch.Generator | None"], nn.Module]


@contextmanager
def believing(saved: Checkpoint, option: str = "path") -> Iterator[None]:
    """Inside, any failure caused by a checkpoint's content becomes a :class:`CheckpointError` that says what to do."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # a wrong value can cause any error
        raise _damaged(saved, option, f"{type(error).__name__}: {reason(error)}") from error


def vet(saved: Checkpoint, option: str = "path") -> None:
    """Check the facts and tensors of an explainer's file.

    Raises:
        CheckpointError: a fact is missing or has another form than was written; weights are not finite or have another
            dtype; counts or variances are negative.
    """
    facts = saved.facts
    _vet_facts(saved, facts, _FACTS, option)
    if not re.fullmatch(r"[0-9a-f]{64}", facts["backbone"]):
        raise _damaged(saved, option, "the fingerprint of its model is none")
    counts = [facts["num_classes"], facts["steps"] + 1, *facts["channels"]]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in counts):
        raise _damaged(saved, option, "classes, steps and channels must be whole numbers")
    if len(facts["layers"]) != len(facts["channels"]) or not all(map(_is_layer, facts["layers"])):
        raise _damaged(saved, option, "its layers are no names with their layouts")
    seen = saved.tensors.get("class_counts")
    if seen is None or seen.dtype != torch.int64 or tuple(seen.shape) != (facts["num_classes"],) or seen.min() < 0:
        raise _damaged(saved, option, f"it must count the images of its {facts['num_classes']} classes")
    for name, tensor in saved.tensors.items():
        if name.startswith(("network/", "best/")):
            _vet_weight(saved, name, tensor, option)
    _vet_history(saved, facts, option)


def vet_state(saved: Checkpoint, option: str = "resume_from") -> None:
    """Check what a fit needs to continue: its counters, its optimiser, its position in the data.

    Args:
        saved: a checkpoint that :func:`vet` has passed.
        option: the option that named the file.

    Raises:
        CheckpointError: as :func:`vet`.
    """
    state = saved.facts["state"]
    if not isinstance(state, dict) or not isinstance(saved.facts.get("plan"), dict):
        raise _damaged(saved, option, "it does not say where its fit stands")
    _vet_facts(saved, state, _STATE, option)
    order = [state["order"].get(name) for name in ("epoch", "position")]
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**62 for n in order):
        raise _damaged(saved, option, f"its place in the data is {state['order']}")
    last = state["order"].get("last")
    if last is not None and not (
        isinstance(last, dict) and all(isinstance(last.get(n), int) for n in ("images", "crc"))
    ):
        raise _damaged(saved, option, f"its last batch was {last!r}")
    if not isinstance(state.get("best_loss"), (int, float, type(None))):
        raise _damaged(saved, option, f"its best loss is {state['best_loss']!r}")
    _vet_history(saved, state, option)
    steps = saved.facts["plan"].get("steps")
    if not isinstance(steps, int) or not 0 <= state["step"] <= steps or state["step"] != saved.facts["steps"]:
        raise _damaged(saved, option, f"it stands at step {state['step']} of {steps}")
    generator = saved.tensors.get("generator")
    if generator is None or generator.dtype != torch.uint8:
        raise _damaged(saved, option, "the state of its random generator is not in it")
    for name, tensor in saved.part("optimizer").items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise _damaged(saved, option, f"the optimiser's {name} is not finite")


def vet_network(saved: Checkpoint, build: Build, option: str = "path") -> None:
    """Compare the shapes that the header implies with the tensors present, before any memory is allocated.

    The network is built without storage. Where that is impossible, its size is only bounded, by what the file itself
    holds.

    Raises:
        CheckpointError: the file's tensors do not match such a network.
    """
    channels, classes = saved.facts["channels"], saved.facts["num_classes"]
    weights = saved.part("network")
    held = sum(tensor.numel() for tensor in weights.values())
    try:
        with torch.device("meta"), torch.random.fork_rng([]):
            probe = build(channels, classes, None)
        hollow = all(tensor.is_meta for tensor in probe.state_dict().values())
    except Exception:  # building it needs values; any other failure recurs below
        hollow = False
    if not hollow:
        if classes * sum(channels) > max(_FREE, 4 * held):
            raise _damaged(
                saved, option, f"{classes} classes of {sum(channels)} channels do not fit its {held} weights"
            )
        return
    own = {name: tensor.dtype.is_floating_point for name, tensor in probe.state_dict().items()}
    wrong = [name for name, tensor in weights.items() if own.get(name, True) is not tensor.is_floating_point()]
    if wrong:
        raise _damaged(saved, option, f"{wrong[0]} is of type {weights[wrong[0]].dtype}")
    try:
        probe.load_state_dict(weights, assign=True)  # checks names and shapes; nothing is copied
    except Exception as error:
        raise _damaged(saved, option, f"its tensors are of another network: {_told(error)}") from error


def told_unsealed(saved: Checkpoint, option: str = "path") -> None:
    """Warn if a file of version 0.1 has no checksum, once it has proved usable."""
    if not saved.sealed:
        warn(
            f"{option}: {saved.source} was written by version 0.1, which kept no checksum: if a bit of it has changed, "
            "nobody can tell; save it again with the explainer's save(path) to give it one"
        )


def _damaged(saved: Checkpoint, option: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{option}: {saved.source} must be a checkpoint as it was written, but it cannot be used ({why}); it is "
        "damaged or was edited: copy it again, or fit again"
    )


def _vet_facts(
    saved: Checkpoint, facts: Mapping[str, Any], kinds: Mapping[str, type | tuple[type, ...]], option: str
) -> None:
    for name, kind in kinds.items():
        if name not in facts:
            raise CheckpointError(f"{option}: {saved.source} is incomplete, {name!r} is not in it; fit again")
        if not isinstance(facts[name], kind) or (kind is int and isinstance(facts[name], bool)):
            raise _damaged(saved, option, f"{name!r} is a {type(facts[name]).__name__}")


def _is_layer(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 2
        and isinstance(entry[0], str)
        and (entry[1] is None or isinstance(entry[1], dict))
    )


def _vet_weight(saved: Checkpoint, name: str, tensor: Tensor, option: str) -> None:
    if not tensor.is_floating_point():
        if tensor.dtype != torch.int64 or (
            name.endswith("num_batches_tracked") and tensor.numel() and tensor.min() < 0
        ):
            raise _damaged(saved, option, f"{name} is of type {tensor.dtype}, or below zero")
        return
    if tensor.dtype not in _WEIGHTS:
        raise _damaged(saved, option, f"{name} is of type {tensor.dtype}; weights are float32 or float64")
    if not bool(torch.isfinite(tensor).all()):
        raise _damaged(saved, option, f"{name} is not finite")
    if name.endswith("running_var") and tensor.numel() and float(tensor.min()) < 0:
        raise _damaged(saved, option, f"{name} is a variance below zero")


def _vet_history(saved: Checkpoint, facts: Mapping[str, Any], option: str) -> None:
    names = facts["quantities"]
    found = [saved.tensors.get(f"history/{name}") for name in names]
    if any(t is None or t.ndim != 1 or t.dtype != torch.float64 for t in found):
        raise _damaged(saved, option, "its history is incomplete")
    entries = facts["validation"]
    if not all(
        isinstance(entry, dict) and "step" in entry and all(map(_is_number, entry.values())) for entry in entries
    ):
        raise _damaged(saved, option, "its validations are no numbers")
    if not all(isinstance(text, str) for text in facts["messages"]):
        raise _damaged(saved, option, "its messages are no text")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _told(error: BaseException) -> str:
    """PyTorch's message about the first tensor that does not fit."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[1] if len(lines) > 1 else lines[0] if lines else type(error).__name__)[:200]
