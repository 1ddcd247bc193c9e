"""How a check is written, run and reported."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import traceback
import unittest
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo.errors import UnsupportedModelError
from attrib_zoo.synthetic.networks import seeded
from attrib_zoo.testing.benches import MODELS, Bench, BenchModel, bench
from attrib_zoo.testing.state import Snapshot, content, differences, settings_kept

Factory = Callable[..., Any]
Check = Callable[[Factory], None]

_SEED = 918_273_645  # no seed that a method would choose

CHECKS: dict[str, Check] = {}
"""Name -> check, in the order in which they run. ``check(factory)`` returns or raises :class:`ContractError`."""


class ContractError(AssertionError):
    """One or more checks failed.

    Attributes:
        failures: name of the check -> what was expected and what was found.
    """

    def __init__(self, subject: str, failures: Mapping[str, str]) -> None:
        self.failures = dict(failures)
        lines = "".join(f"\n  {name}: {reason}" for name, reason in self.failures.items())
        super().__init__(f"{subject} breaks the contract in {len(self.failures)} check(s){lines}")


class Inapplicable(unittest.SkipTest):
    """The check does not apply to this class; pytest and unittest report it as skipped, with the reason."""


class _Broken(Exception):
    """A check's finding."""


class Case:
    """One factory on one bench: what a check works with.

    Attributes:
        factory: the class under test, or a callable that makes it from a model.
        bench: the model and its images; this case's own.
        targets: ``[0, 1, 2]``.
    """

    def __init__(
        self, factory: Factory, name: str, size: tuple[int, int] = (32, 32), dtype: torch.dtype = torch.float32
    ) -> None:
        self.factory = factory
        self.name = name
        self.targets = [0, 1, 2]
        self._others: list[Case] = []
        self._kind = (name, size, dtype)
        # What a method finds out about a model takes longer than most checks, so they hand it on while it is unchanged.
        self.bench, self._content = _free.pop(self._kind) if self._kind in _free else _noted(bench(*self._kind))

    def release(self) -> None:
        """Leave the benches of this case to the next one, unless they have changed."""
        if not differences(self._content, _noted(self.bench)[1]):
            _free[self._kind] = self.bench, self._content
        for other in self._others:
            other.release()

    @property
    def model(self) -> BenchModel:
        """The bench's model."""
        return self.bench.model

    @property
    def inputs(self) -> Tensor:
        """The bench's three images."""
        return self.bench.inputs

    @functools.cached_property
    def explainer(self) -> Any:
        """The object under test, ready to explain; a trained one is fitted once, and each check gets a copy of it."""
        found = self.build(self.model)
        if not self.fits(found):
            return found
        fits = _fits.setdefault(self.factory, {})
        if self._kind not in fits:
            own = bench(*self._kind).model
            fits[self._kind] = own, self.ready(own)
        return _moved(*fits[self._kind], self.model)

    @functools.cached_property
    def maps(self) -> Tensor:
        """Its maps of targets 0, 1 and 2 for the three images."""
        found: Tensor = self.explainer.attribute(self.inputs, target=self.targets)
        return found

    def at(self, size: tuple[int, int] = (32, 32), dtype: torch.dtype = torch.float32) -> Case:
        """The same factory on a bench of another size or type."""
        self._others.append(Case(self.factory, self.name, size, dtype))
        return self._others[-1]

    def build(self, model: nn.Module, **options: Any) -> Any:
        """A new object, not fitted; for a slow method with the class's ``cheap_options``."""
        if options:
            self.needs(*options)
        return self.factory(model, **{**_cheap(self.factory), **options})

    def ready(self, model: nn.Module, **options: Any) -> Any:
        """A new object; one with a ``fit`` is fitted on the bench's two batches first."""
        found = self.build(model, **options)
        return self.fit(found) if self.fits(found) else found

    @staticmethod
    def fits(explainer: Any) -> bool:
        """Whether it is trainable."""
        return callable(getattr(explainer, "fit", None))

    def fit(self, explainer: Any, loader: Iterable[Any] | None = None, epochs: int = 2, **options: Any) -> Any:
        """Fit on the bench's two batches, or on ``loader``; what ``fit`` returned."""
        loader = self.bench.batches if loader is None else loader
        return explainer.fit(loader, epochs=epochs, show_progress=False, **options)

    def needs(self, *options: str) -> None:
        """Raise :class:`Inapplicable` unless the class has these options and the factory takes them."""
        for option in options:
            if option not in self.parameters():
                raise Inapplicable(f"{type(self.build(self.model)).__name__} has no option {option!r}")
        try:
            inspect.signature(self.factory).bind(None, **dict.fromkeys(options))
        except TypeError:
            raise Inapplicable(
                f"the factory takes no {', '.join(options)}; pass the class itself or a functools.partial of it"
            ) from None

    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The constructor's parameters, ``self`` and the model left out."""
        named = list(inspect.signature(type(self.build(self.model)).__init__).parameters.items())
        return dict(named[2:])


_free: dict[tuple[Any, ...], tuple[Bench, dict[str, Any]]] = {}


def _noted(made: Bench) -> tuple[Bench, dict[str, Any]]:
    """The bench, and the content that it has now."""
    tensors = {"inputs": made.inputs, "gates": made.gates, "pool": made.pool}
    tensors.update({f"batch {i}": batch for i, batch in enumerate(made.batches)})
    return made, {**content(made.model, tensors), **{f"fuse.{k}": v for k, v in vars(made.model.fuse).items()}}


def expect(condition: bool, reason: str) -> None:
    """Fail the running check unless ``condition``."""
    if not condition:
        raise _Broken(reason)


def same(found: Any, wanted: Tensor, what: str, rtol: float = 1e-5) -> None:
    """Fail unless ``found`` has the shape and values of ``wanted``.

    The scale of ``rtol`` is the range of ``wanted``, but at least a hundredth of its largest value, so that maps close
    to a constant can also be distinguished. ``rtol=0`` requires bitwise equality.
    """
    expect(isinstance(found, Tensor), f"{what}: expected a tensor, got {type(found).__name__}")
    expect(found.shape == wanted.shape, f"{what}: expected shape {tuple(wanted.shape)}, got {tuple(found.shape)}")
    low, high = float(wanted.min()), float(wanted.max())
    scale = max(high - low, 0.01 * abs(high), 0.01 * abs(low), 1e-30)
    gap = float((found.double() - wanted.double()).abs().max())
    expect(
        gap <= rtol * scale, f"{what}: expected equal values (within {rtol:g} of {scale:.3g}), they differ by {gap:.3g}"
    )


def different(found: Tensor, other: Tensor, what: str, by: float = 1e-3) -> None:
    """Fail unless the maps differ by more than ``by`` times their range."""
    scale = max(float(found.max() - found.min()), float(other.max() - other.min()), 1e-30)
    gap = float((found - other).abs().max())
    expect(gap > by * scale, f"{what}: expected different maps, they differ by {gap:.3g} only")


def raises(call: Callable[[], Any], *words: str, what: str) -> Exception:
    """Fail unless ``call`` deliberately raises an error whose message contains each of ``words``, in any case.

    ``"a|b"`` accepts either. ``AttributeError`` and ``KeyError`` do not count as answers to a user.
    """
    try:
        call()
    except (AttributeError, KeyError) as error:
        raise _Broken(f"{what}: expected an error that explains, got {type(error).__name__}: {error}") from error
    except Exception as error:
        text = str(error).lower()
        for word in words:
            expect(
                any(option.lower() in text for option in word.split("|")),
                f"{what}: expected the message to name {word!r}, got {type(error).__name__}: {error}",
            )
        return error
    raise _Broken(f"{what}: expected an error, none was raised")


def unchanged(before: Snapshot, when: str) -> None:
    """Fail if anything that ``before`` holds has changed."""
    changes = before.changes()
    shown = "; ".join(changes[:4]) + ("" if len(changes) <= 4 else f"; and {len(changes) - 4} more")
    expect(not changes, f"{when}: expected nothing to change: {shown}")


def check(*benches: str, trainable: bool = False) -> Callable[[Callable[[Case], None]], Check]:
    """Add a check to :data:`CHECKS` under its function's name.

    Args:
        benches: the benches to run on; none for the first one that the class supports.
        trainable: only for classes with a ``fit``.
    """

    def register(body: Callable[[Case], None]) -> Check:
        name = body.__name__

        @functools.wraps(body)
        def run(factory: Factory) -> None:
            supported = _supported(factory)
            chosen = [b for b in benches if b in supported] if benches else supported[:1]
            if not chosen:
                raise Inapplicable(f"{_subject(factory)} does not support the models of this check")
            for bench_name in chosen:
                case = Case(factory, bench_name)
                if trainable and not case.fits(case.build(case.model)):
                    raise Inapplicable(f"{_subject(factory)} has no fit")
                _run(name, body, case)

        del run.__wrapped__  # its signature is (factory)
        CHECKS[name] = run
        return run

    return register


def _run(name: str, body: Callable[[Case], None], case: Case) -> None:
    try:
        with seeded(_SEED), settings_kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body(case)
        case.release()
    except _Broken as broken:
        reason = f"on {case.name}: {broken}"
        raise ContractError(_subject(case.factory), {name: reason}) from broken.__cause__
    except (ContractError, Inapplicable):
        raise
    except Exception as error:
        raised = f"{type(error).__name__}: {error}"
        reason = f"on {case.name}: {inspect.getdoc(body)} Raised {raised}, in: {_line(error, body)}"
        raise ContractError(_subject(case.factory), {name: reason}) from error


def _line(error: Exception, body: Callable[[Case], None]) -> str:
    """The line of the check that was running."""
    file = inspect.getsourcefile(body)
    lines = [frame.line or "" for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return lines[-1] if lines else "its preparation"


def _inner(factory: Factory) -> Any:
    return factory.func if isinstance(factory, functools.partial) else factory


def _cheap(factory: Factory) -> dict[str, Any]:
    """The class's ``cheap_options`` that a partial has not fixed; none for a callable that is not a class."""
    options: Mapping[str, Any] = getattr(_inner(factory), "cheap_options", {})
    fixed = factory.keywords if isinstance(factory, functools.partial) else {}
    return {name: value for name, value in options.items() if name not in fixed}


def _subject(factory: Factory) -> str:
    return getattr(_inner(factory), "__name__", type(factory).__name__)


def _supported(factory: Factory) -> list[str]:
    """The benches that the class explains: those of the kinds of model that it supports; all, if it declares none.

    A class may refuse one bench of a kind by :class:`~attrib_zoo.errors.UnsupportedModelError`, where its mathematics
    needs more than the kind promises, such as features after a ReLU; but not all of a kind.
    """
    kinds: Collection[str] | None = getattr(_inner(factory), "models", None)
    if kinds is None:
        kinds = getattr(factory(bench("cnn").model), "models", ("cnn", "vit"))
    names = [name for name, (kind, _) in MODELS.items() if kind in kinds]
    accepted = [name for name in names if not _refuses(factory, name)]
    missing = {MODELS[name][0] for name in names} - {MODELS[name][0] for name in accepted}
    return names if missing else accepted


_fits: weakref.WeakKeyDictionary[Factory, dict[Any, tuple[nn.Module, Any]]] = weakref.WeakKeyDictionary()


def _moved(model: nn.Module, explainer: Any, other: nn.Module) -> Any:
    """A copy of the explainer that explains ``other``, an equal model, in the place of its own."""
    pairs = itertools.chain(
        zip(model.modules(), other.modules(), strict=True),
        zip(model.parameters(), other.parameters(), strict=True),
        zip(model.buffers(), other.buffers(), strict=True),
    )
    places: dict[int, Any] = {id(old): new for old, new in pairs}
    return copy.deepcopy(explainer, places)


_answers: weakref.WeakKeyDictionary[Factory, dict[str, bool]] = weakref.WeakKeyDictionary()


def _refuses(factory: Factory, name: str) -> bool:
    """Whether an ordinary call on the bench raises an UnsupportedModelError; tried once."""
    known = _answers.setdefault(factory, {})
    if name not in known:
        case = Case(factory, name)
        try:
            with seeded(_SEED), settings_kept(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                case.build(case.model).attribute(case.inputs, target=case.targets)
        except UnsupportedModelError:
            known[name] = True
        except Exception:  # the checks will report it better
            known[name] = False
        known.setdefault(name, False)
    return known[name]


def check_attribution(factory: Factory, *, skip: Collection[str] = ()) -> dict[str, str]:
    """Run every check and raise one error that lists all that failed.

    Args:
        factory: the class, a :func:`functools.partial` of it, or any callable from a model to a ready object.
            Checks that vary an option need one that takes the class's options by keyword. A class with a ``fit``
            is fitted on two small batches wherever a ready object is needed.
        skip: names of checks to leave out.

    Returns:
        Name of each check -> ``"passed"``, or ``"skipped: ..."`` with the reason.

    Raises:
        ContractError: with the name of each failed check and what it expected.
        ValueError: ``skip`` names no check.
    """
    unknown = sorted(set(skip) - set(CHECKS))
    if unknown:
        raise ValueError(f"skip: no check {', '.join(unknown)}; there are {', '.join(CHECKS)}")
    report: dict[str, str] = {}
    failures: dict[str, str] = {}
    for name, run in CHECKS.items():
        if name in skip:
            report[name] = "skipped: as asked"
            continue
        try:
            run(factory)
        except ContractError as error:
            failures.update(error.failures)
        except Inapplicable as reason:
            report[name] = f"skipped: {reason}"
        else:
            report[name] = "passed"
    if failures:
        raise ContractError(_subject(factory), failures)
    return report
