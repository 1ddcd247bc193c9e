"""Finding modules in the user's model, whatever it is wrapped in."""

from __future__ import annotations

import re
import sys
import threading
from typing import Any

import torch
from torch import nn

from attrib_zoo.errors import LayerNotFoundError, UnsupportedModelError

_NO_LAYERS = re.compile("Float|PackedParams")


class Running(threading.local):
    """The models that this thread runs at the moment, in the form in which it runs them.

    Attributes:
        instead: by the id of a model, what runs in its place: its mirror or, where it has none, the model itself.
        originals: by the id of what runs, the model.
        known: by the id of a model, what is known of it; see ``backbone.layers.known``.
    """

    def __init__(self) -> None:
        self.instead: dict[int, nn.Module] = {}
        self.originals: dict[int, nn.Module] = {}
        self.known: dict[int, Any] = {}


running = Running()


def unwrap(model: nn.Module) -> nn.Module:
    """The eager module inside DataParallel, DistributedDataParallel, Opacus' GradSampleModule and ``torch.compile``.

    ``model.forward``, as Captum's users pass it, stands for the model.

    Inside :func:`attrib_zoo.backbone.capture.frozen`, in the same thread, the mirror of that module.

    Raises:
        UnsupportedModelError: for anything that is no module, and for scripted and traced models, which do not run
            hooks.
    """
    owner = getattr(model, "__self__", None)
    if isinstance(owner, nn.Module) and getattr(model, "__name__", "") in ("forward", "__call__", "_wrapped_call_impl"):
        model = owner
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"model: must be a torch.nn.Module, whose layers can be found, got {type(model).__name__}; "
            "wrap the function in a module"
        )
    while True:
        if isinstance(model, torch.jit.ScriptModule):
            raise UnsupportedModelError(
                "model: scripted and traced models run no hooks, so their layers cannot be seen; "
                "pass the original eager module"
            )
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif type(model).__name__ == "GradSampleModule" and "_module" in model._modules:
            model = model._module  # type: ignore[assignment]  # its hooks record in training mode only
        elif "_orig_mod" in model._modules:
            model = model._orig_mod  # type: ignore[assignment]  # torch.compile's wrapper
        else:
            return running.instead.get(id(model), model)


def original(model: nn.Module) -> nn.Module:
    """The user's own module, unwrapped, also where its mirror runs: the key of caches and identity checks."""
    bare = unwrap(model)
    return running.originals.get(id(bare), bare)


def find(model: nn.Module, name: str) -> nn.Module:
    """The module of that dotted name, seen through compiled submodules.

    Raises:
        LayerNotFoundError: there is none.
    """
    module = unwrap(model)
    for part in name.split(".") if name else []:
        child = module._modules.get(part)
        if child is None:
            raise LayerNotFoundError(f"layers: no layer {name!r} in {type(unwrap(model)).__name__}")
        module = unwrap(child)
    return module


def is_quantised(module: nn.Module) -> bool:
    """One of torch's int8 layers; neither the float modules that they are made from, nor a container of weights."""
    kind = type(module)
    return (
        kind.__module__.startswith("torch.") and "quantized" in kind.__module__ and not _NO_LAYERS.search(kind.__name__)
    )


def refuse_shards(model: nn.Module) -> None:
    """Raise for FullyShardedDataParallel, in which the weights of all layers are pieces of one flat tensor.

    Raises:
        UnsupportedModelError: a part of the model is wrapped in it.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # imported if such a model exists
    if fsdp is not None and any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        raise UnsupportedModelError(
            "model: FullyShardedDataParallel flattens the weights of its layers, which must be told apart; use "
            "torch.distributed.fsdp.fully_shard instead, or explain an ordinary copy of the model that has loaded "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) of "
            "torch.distributed.checkpoint.state_dict, or use RISE, which looks at no layer"
        )
