"""What was found out about a model: shared by all of its explainers, and forgotten when the model changes.

A first call traces the model, tests layouts and finds which layers have gradients. None of it depends on the explainer,
so it is kept here, per model, and not in an explainer. It is kept for the user's own model and is valid for every
mirror of it, since it names layers and does not hold them. A model may change between two calls, though: a head is
replaced, a block added, a layer pruned. Each question therefore compares the model's structure with the one that the
answers are about, which costs far less than a pass.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from attrib_zoo.backbone.module import original, running

_T = TypeVar("_T")

# Answers must hold their model's modules weakly, and nothing of its mirrors: a strong reference from a value to its key
# would keep both for ever.
_models: WeakKeyDictionary[nn.Module, Known] = WeakKeyDictionary()
_lock = threading.Lock()


class Known:
    """The answers about a model of one structure.

    Attributes:
        version: an object of its own for each structure; a different one means that the model has changed.
    """

    def __init__(self, structure: list[Any], modules: list[nn.Module]) -> None:
        self.version = object()
        self._structure = structure
        self._modules = [weakref.ref(module) for module in modules]
        self._found: dict[Hashable, Any] = {}

    def describes(self, structure: list[Any]) -> bool:
        """Whether this is still the structure; the address of a dead module, reused by a new one, does not count."""
        return self._structure == structure and all(module() is not None for module in self._modules)

    def get(self, question: Hashable, find: Callable[[], _T]) -> _T:
        """The answer, computed the first time it is asked for."""
        with _lock:
            if question in self._found:
                return cast("_T", self._found[question])
        # Without the lock, since ``find`` runs the model: two threads may both run it, and agree on the first answer.
        found = find()
        with _lock:
            return cast("_T", self._found.setdefault(question, found))


def known(model: nn.Module) -> Known:
    """What is known of the model as it is now; for a mirror, what is known of the user's own model.

    A call compares the structure once, at its first question: the mirror that it runs does not change.
    """
    bare = original(model)
    if id(bare) in running.known:
        return cast("Known", running.known[id(bare)])
    modules = _modules(bare)
    structure = [_own_structure(module) for module in modules]
    with _lock:
        found = _models.get(bare)
        if found is None or not found.describes(structure):
            found = _models[bare] = Known(structure, modules)
    if running.instead.get(id(bare), bare) is not bare:
        running.known[id(bare)] = found
    return found


def situation(inputs: Tensor, args: Sequence[Any] = ()) -> Hashable:
    """What of a call decides how the model runs: the kind of its images and further arguments, not their number."""
    return tuple(inputs.shape[1:]), inputs.dtype, inputs.device, tuple(_kind(arg) for arg in args)


def _kind(arg: Any) -> Hashable:
    if isinstance(arg, Tensor):
        return tuple(arg.shape[1:]), arg.dtype
    if isinstance(arg, (str, int, float, type(None))):
        return arg
    return type(arg).__module__, type(arg).__qualname__


def _modules(bare: nn.Module) -> list[nn.Module]:
    """All modules, each once, in the order of the tree; like ``modules()``, at a third of its cost."""
    found = {bare: None}
    waiting = [bare]
    while waiting:
        for child in waiting.pop()._modules.copy().values():  # another thread may be changing the model
            if child is not None and child not in found:
                found[child] = None
                waiting.append(child)
    return list(found)


def _own_structure(module: nn.Module) -> tuple[Any, ...]:
    """Which module it is, under which names it holds which others, the shapes of its weights, and its switches.

    Switches are words and booleans, such as timm's ``global_pool``. Numbers are left out, since some models count calls
    or record sizes as they run; so are private attributes and those that change during a call.
    """
    switches = tuple(
        value
        for name, value in vars(module).copy().items()
        if type(value) in _SWITCHES and name != "training" and name[0] != "_"
    )
    shapes = tuple(None if weight is None else weight.shape for weight in module._parameters.copy().values())
    return id(module), tuple([(name, id(child)) for name, child in module._modules.copy().items()]), shapes, switches


_SWITCHES = (str, bool)
