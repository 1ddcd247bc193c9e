"""A model's mirror: modules of its own around the same weights, for one call in one thread.

Modes and hooks belong to module objects, and every thread shares these. Switching a model to eval mode for an
explanation would also switch it for a thread that is training it, and a hook fires in the passes of all threads. So
nothing about the user's modules is ever changed: a call runs on copies of them, which cost some microseconds each. They
are
shallow: the dictionaries of parameters and buffers are the very same objects, so that a replaced head, a moved model or
    a swapped parameter is seen at once, and no memory is spent.

A copy must not lead back to the originals, whose modes and hooks differ. References to modules of the
model are therefore followed wherever Python gives access: in containers, bound methods, partial functions, closures
and weak references, where they are redirected to the mirror; and in any other object, where they cannot be, so that
such a model has no mirror.
"""

from __future__ import annotations

import logging
import sysconfig
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

__all__ = ["Unmirrored", "mirror"]

_HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
_STANDARD = frozenset(nn.Module().__dict__)  # the attributes of every module; all others are the user's
_PLAIN = frozenset(
    {
        bool,
        bytes,
        complex,
        float,
        int,
        str,
        type,
        type(None),
        types.BuiltinFunctionType,
        types.ModuleType,
        torch.device,
        torch.dtype,
        torch.Generator,
        torch.memory_format,
        torch.Size,
        Tensor,
        nn.Parameter,
        torch.fx.Graph,  # it refers to its module, but no forward pass uses that
    }
)
_CONTAINERS = (list, tuple, set, frozenset, dict, OrderedDict)
_MUTABLE = (list, set, dict, OrderedDict)
_LEAVES = (Tensor, type, types.ModuleType, logging.Logger)
_INSTALLED = ("site-packages", "dist-packages", sysconfig.get_path("stdlib"))
_MOST_OBJECTS = 20_000  # reached from a foreign object, such as a trainer; beyond that no mirror is made


class Unmirrored(Exception):  # an answer, not an error: the caller falls back
    """The model has no mirror; the message says which part of it leads back to the model itself."""


def mirror(model: nn.Module, weights: str = "shared") -> nn.Module:
    """The model's modules copied, in eval mode, compiled ones eager.

    Args:
        model: the model.
        weights: ``"shared"``: the parameters and buffers are the model's own; ``"fixed"``: they share its memory, but
            its ordinary parameters have no gradient; ``"copied"``: they are copies.

    Raises:
        Unmirrored: something in it refers to its modules in a way that cannot be redirected.
    """
    root = _Mirror(model).root
    if weights != "shared":
        _detach(root, copied=weights == "copied")
    return root


def _detach(root: nn.Module, *, copied: bool) -> None:
    """Give the mirror tensors of its own, over the same memory or over a copy; tied weights stay tied."""
    done: dict[int, Tensor] = {}

    def own(tensor: Tensor | None, *, copied: bool) -> Tensor | None:
        if tensor is None or (type(tensor) not in (Tensor, nn.Parameter) and not copied):
            return tensor  # a subclass of parameter, which may hold more than its values
        if id(tensor) not in done:
            alone = tensor.detach().clone() if copied else tensor.detach()
            if isinstance(tensor, nn.Parameter):
                alone = nn.Parameter(alone, requires_grad=copied and tensor.requires_grad)
            done[id(tensor)] = alone
        return done[id(tensor)]

    for module in root.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for name, tensors in (("_parameters", module._parameters), ("_buffers", module._buffers)):
            if copied or name == "_parameters":
                module.__dict__[name] = {key: own(value, copied=copied) for key, value in tensors.copy().items()}


class _Mirror:
    """One mirror under construction."""

    def __init__(self, model: nn.Module) -> None:
        self._copies: dict[int, nn.Module] = {}
        self._made: dict[int, Any] = {}  # what was redirected, so that shared objects stay shared
        self._clear: set[int] = set()  # objects that lead to no module of the model
        self._alive: list[Any] = []  # keeps temporary objects alive, whose addresses are remembered
        modules = self._collect(model)
        for module in modules:
            self._fill(module, self._copies[id(module)])
        self.root = self._copies[id(model)]

    def _collect(self, model: nn.Module) -> list[nn.Module]:
        """Every module once, an empty copy of it made; where ``torch.compile`` wraps one, it stands for its wrapper."""
        found: list[nn.Module] = []
        wrappers: list[nn.Module] = []
        waiting, kinds = [model], set[type]()
        while waiting:
            module = waiting.pop()
            if id(module) in self._copies:
                continue
            self._copies[id(module)] = module
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks, and its state is not in Python
                if any(part.training for part in module.modules()):
                    raise Unmirrored("it has a scripted module in training mode")
                continue
            waiting += [child for child in module._modules.copy().values() if child is not None]
            if "_orig_mod" in module._modules:
                wrappers.append(module)
                continue
            kind = type(module)
            if kind not in kinds:
                _check_kind(kind)
                kinds.add(kind)
            if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
                raise Unmirrored(f"{kind.__name__} has no weights before its first pass")
            self._copies[id(module)] = object.__new__(kind)
            found.append(module)
        for wrapper in reversed(wrappers):  # the inner of two first
            self._copies[id(wrapper)] = self._copies[id(wrapper._modules["_orig_mod"])]
        return found

    def _fill(self, module: nn.Module, copy: nn.Module) -> None:
        own = module.__dict__.copy()
        own.pop("_compiled_call_impl", None)  # set on a module that was compiled in place; it would call the original
        # caches that a module fills in eval mode would be stale the next time: a mirror must not keep them
        cautious = module.training and type(module).train is not nn.Module.train
        for name in own.keys() - _STANDARD:
            value = own[name]
            kind = type(value)
            if kind in _PLAIN:
                continue
            if not ((kind is tuple or kind is list) and _PLAIN.issuperset(map(type, value))):  # a kernel size, say
                own[name] = self._moved(value, module, name)
            if cautious and kind in _MUTABLE and own[name] is value:
                own[name] = value.copy()
        for name in _HOOKS:
            hooks = own.get(name)
            own[name] = (
                OrderedDict((key, self._hook(hook)) for key, hook in hooks.copy().items()) if hooks else (OrderedDict())
            )
        if own["_modules"]:
            copies, children = self._copies, own["_modules"].copy()
            own["_modules"] = {key: None if child is None else copies[id(child)] for key, child in children.items()}
        own["training"] = False
        object.__setattr__(copy, "__dict__", own)

    def _hook(self, hook: Any) -> Any:
        if isinstance(hook, types.MethodType) and id(hook.__self__) in self._copies:
            return types.MethodType(hook.__func__, self._copies[id(hook.__self__)])
        return hook

    # ------------------------------------------------------------------ what an attribute holds

    def _moved(self, value: Any, module: nn.Module, name: str) -> Any:
        """The value, or the same with the mirror's modules in the place of the model's."""
        if not self._leads_back(value):
            return value
        try:
            return self._redirected(value)
        except Unmirrored as error:
            raise Unmirrored(f"{type(module).__name__}.{name} {error}") from None

    def _redirected(self, value: Any) -> Any:
        if type(value) in _PLAIN or not self._leads_back(value):
            return value
        if id(value) in self._copies:
            return self._copies[id(value)]
        if id(value) not in self._made:
            self._made[id(value)] = value  # for objects that contain themselves
            self._made[id(value)] = self._rebuilt(value)
        return self._made[id(value)]

    def _rebuilt(self, value: Any) -> Any:
        kind = type(value)
        new: Any
        if kind in (dict, OrderedDict):
            new = kind((self._redirected(key), self._redirected(item)) for key, item in value.items())
        elif kind in _CONTAINERS:
            new = kind(self._redirected(item) for item in value)
        elif kind is types.MethodType:
            new = types.MethodType(value.__func__, self._redirected(value.__self__))
        elif kind is partial:
            keywords = {key: self._redirected(item) for key, item in value.keywords.items()}
            new = partial(self._redirected(value.func), *map(self._redirected, value.args), **keywords)
        elif kind is weakref.ref:
            new = weakref.ref(self._redirected(value()))
        elif kind is types.FunctionType:
            new = self._function(value)
        else:
            raise Unmirrored(f"is a {kind.__name__} that refers to modules of the model")
        return new

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        """The function with closure cells that lead to the model replaced."""
        if any(self._leads_back(value) for value in _globals_of(function)):
            raise Unmirrored("is a function that uses a global variable for a module of the model")
        cells = tuple(map(self._cell, function.__closure__ or ()))
        defaults = None if function.__defaults__ is None else tuple(map(self._redirected, function.__defaults__))
        new = types.FunctionType(function.__code__, function.__globals__, function.__name__, defaults, cells or None)
        new.__kwdefaults__ = self._redirected(function.__kwdefaults__)
        new.__dict__.update({key: value for key, value in function.__dict__.items() if key != "__wrapped__"})
        return new

    def _cell(self, cell: types.CellType) -> types.CellType:
        content = _content(cell)
        return types.CellType(self._redirected(content)) if self._leads_back(content) else cell

    def _leads_back(self, value: Any) -> bool:
        """Whether a module of the model can be reached from a value."""
        waiting, seen = [value], set[int]()
        while waiting:
            item = waiting.pop()
            if type(item) in _PLAIN or id(item) in seen or id(item) in self._clear:
                continue
            if id(item) in self._copies and isinstance(item, nn.Module):
                return True
            if isinstance(item, _LEAVES):
                continue
            seen.add(id(item))
            self._alive.append(item)
            if len(seen) > _MOST_OBJECTS:
                return True
            waiting.extend(_held(item))
        self._clear |= seen
        return False


def _check_kind(kind: type) -> None:
    """Raise for a class whose objects cannot be copied attribute by attribute."""
    for base in kind.__mro__:
        if base is not object and base is not nn.Module:
            if base.__dict__.get("__slots__"):
                raise Unmirrored(f"{kind.__name__} keeps attributes in __slots__")
            if "__del__" in base.__dict__:
                raise Unmirrored(f"{kind.__name__} releases something when it is deleted")


def _held(item: Any) -> Iterable[Any]:
    """What an object refers to, as far as Python gives access."""
    kind = type(item)
    if kind is dict or isinstance(item, dict):
        return [*item.keys(), *item.values()]
    if isinstance(item, (list, tuple, set, frozenset)):
        return list(item)
    if kind is types.MethodType:
        return (item.__self__, item.__func__)
    if kind is types.FunctionType:
        cells = [_content(cell) for cell in item.__closure__ or ()]
        return [*cells, *(item.__defaults__ or ()), *(item.__kwdefaults__ or {}).values(), *_globals_of(item)]
    if kind is partial:
        return (item.func, *item.args, *item.keywords.values())
    if isinstance(item, weakref.ref):
        return (item(),)
    slots = (name for base in kind.__mro__ for name in _names(base.__dict__.get("__slots__", ())))
    state = getattr(item, "__dict__", None)
    values = [getattr(item, name, None) for name in slots]
    return values if state is None else [*values, *dict(state).values()]


def _names(slots: Any) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _globals_of(function: Callable[..., Any]) -> list[Any]:
    """The global variables that a function names; those of installed libraries hold no module of the user's."""
    if any(place in function.__code__.co_filename for place in _INSTALLED):
        return []
    return [function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__]
