"""What a trainable class adds: ``fit``, ``save`` and ``load``."""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from attrib_zoo.testing.benches import MODELS, PlannedError
from attrib_zoo.testing.state import Snapshot
from attrib_zoo.testing.suite import Case, check, different, expect, raises, same, unchanged

_ALL = tuple(MODELS)


def _ask(case: Case, explainer: Any) -> Tensor:
    found: Tensor = explainer.attribute(case.inputs, target=case.targets)
    return found


@check(trainable=True)
def unfitted(case: Case) -> None:
    """Before ``fit`` every call raises an error with the class's name and what to call."""
    fresh = case.build(case.model)
    who = type(fresh).__name__
    raises(lambda: fresh.attribute(case.inputs, target=0), who, "fit(", "load", what="attribute before fit")
    inner: Any = getattr(type(fresh).attribute, "__wrapped__", None)
    expect(inner is not None, "expected attribute.__wrapped__ to say so as well")
    raises(lambda: inner(fresh, case.inputs, target=0), who, "fit(", what="attribute.__wrapped__ before fit")
    with _folder() as folder:
        raises(lambda: fresh.save(folder / "x.safetensors"), who, "fit(", what="save before fit")
        expect(not list(folder.iterdir()), "save before fit: expected no file")


@check(trainable=True)
def fit_returns_self(case: Case) -> None:
    """``fit`` returns the object; public attributes that it sets end in ``_``; batches may be tuples or dicts."""
    fresh = case.build(case.model)
    before = set(vars(fresh))
    expect(case.fit(fresh) is fresh, "expected fit to return self")
    named = [n for n in set(vars(fresh)) - before if not n.startswith("_") and not n.endswith("_")]
    expect(not named, f"expected names that end in '_', got {', '.join(sorted(named))}")
    wanted = _ask(case, fresh)
    labels = torch.zeros(5)
    batches: dict[str, list[Any]] = {
        "(images, labels)": [(b, labels) for b in case.bench.batches],
        "[images, labels]": [[b, labels] for b in case.bench.batches],
        "{'image': images}": [{"image": b, "label": labels} for b in case.bench.batches],
    }
    for what, loader in batches.items():
        found = case.fit(case.build(case.model), loader)
        same(_ask(case, found), wanted, f"batches {what} against images alone", 0)


@check("cnn", "vit", trainable=True)
def refit(case: Case) -> None:
    """A second ``fit`` discards the first."""
    fresh = case.fit(case.build(case.model))
    wanted = _ask(case, fresh)
    other = case.build(case.model)
    case.fit(other, [case.bench.pool[:8], case.bench.pool[8:16]], epochs=4)
    different(_ask(case, other), wanted, "two fits on other images")
    case.fit(other)
    same(_ask(case, other), wanted, "the second fit against the same fit of a new object", 0)


@check(*_ALL, trainable=True)
def fit_leaves_model(case: Case) -> None:
    """``fit`` changes nothing in the model, its images or the generators, even if the model was in training mode."""
    wanted = case.maps
    case.model.train()
    next(m for m in case.model.modules() if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm))).eval()
    for parameter in case.model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    next(case.model.parameters()).requires_grad_(False)
    before = Snapshot(case.model, images=case.bench.batches[0])
    found = case.fit(case.build(case.model))
    unchanged(before, "after fit")
    case.model.eval()
    same(_ask(case, found), wanted, "fitted with the model in training mode against eval mode", 0)


@check("cnn", trainable=True)
def fit_leaves_model_on_error(case: Case) -> None:
    """A ``fit`` that fails changes neither the model nor what was fitted before."""
    explainer, wanted = case.explainer, case.maps
    before = Snapshot(case.model)
    for number in (1, 2, 3, 4):
        case.model.fuse.forward_in = number
        raises(
            lambda: case.fit(explainer, case.bench.batches[::-1]), what=f"a failure in forward number {number} of fit"
        )
        case.model.fuse.forward_in = 0
        unchanged(before, f"after a failure in forward number {number} of fit")
    case.model.fuse.in_backward = True
    raises(lambda: case.fit(explainer, case.bench.batches[::-1]), what="a failure in backward of fit")
    case.model.fuse.in_backward = False
    unchanged(before, "after a failure in backward of fit")
    same(_ask(case, explainer), wanted, "the maps after failed fits", 0)


@check(trainable=True)
def bad_loader(case: Case) -> None:
    """A loader without images, or with bad ones, is refused in a sentence that names it."""
    image = case.inputs
    bad: dict[str, list[Any]] = {
        "an empty loader": [],
        "batches without the batch axis": [image[0]],
        "batches of integers": [(image * 20).to(torch.uint8)],
        "batches that are no images": ["cat"],
        "images of two sizes": [image, image[:, :, :24]],
        "NaN in the images": [image * float("nan")],
    }
    before = Snapshot(case.model)
    for what, loader in bad.items():
        raises(functools.partial(case.fit, case.build(case.model), loader), "loader", what=what)
    unchanged(before, "after bad loaders")


class _Images(Dataset[Tensor]):
    """Ten images; raises after a given number of reads."""

    def __init__(self, images: Tensor, ends_after: int | None = None) -> None:
        self.images = images
        self.left = ends_after

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        if self.left is not None:
            if self.left == 0:
                raise PlannedError("planned failure in the dataset")
            self.left -= 1
        return self.images[index]


@check("cnn", "vit", trainable=True)
def resume(case: Case) -> None:
    """An interrupted and resumed fit gives bitwise the same result as an uninterrupted one."""
    images = torch.cat(case.bench.batches)

    def loader(ends_after: int | None = None) -> Any:
        return DataLoader(_Images(images, ends_after), batch_size=4, shuffle=True)

    wanted = _ask(case, case.fit(case.build(case.model), loader(), epochs=3))
    with _folder() as folder:
        saving = {"checkpoint_dir": folder, "checkpoint_every": 2}
        raises(
            lambda: case.fit(case.build(case.model), loader(18), epochs=3, **saving),
            what="a dataset that fails after 18 images",
        )
        resumed = case.fit(case.build(case.model), loader(), epochs=3, resume_from=folder)
    same(_ask(case, resumed), wanted, "resumed in the second epoch against uninterrupted", 0)


@check(*_ALL, trainable=True)
def save_load(case: Case) -> None:
    """``load`` restores bitwise what ``save`` wrote, from a file without pickle."""
    explainer = case.explainer
    before = Snapshot(case.model)
    with _folder() as folder:
        path = folder / "explainer.safetensors"
        explainer.save(path)
        expect([p.name for p in folder.iterdir()] == [path.name], "expected save to write one file")
        data = path.read_bytes()
        expect(data[:2] not in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"), "expected a file without pickle")
        loaded = type(explainer).load(path, case.model)
        same(_ask(case, loaded), case.maps, "loaded against saved", 0)
        expect(loaded.forward_func is case.model, "expected load to use the model that it was given")
        expect(
            repr(loaded).count("(") > 0 and type(loaded) is type(explainer), "expected load to return the same class"
        )
        path.write_bytes(data[: len(data) // 2])
        raises(lambda: type(explainer).load(path, case.model), path.name, what="a file cut in half")
        raises(
            lambda: type(explainer).load(folder / "none.safetensors", case.model), "none.safetensors", what="no file"
        )
        nowhere = folder / "nowhere" / "x.safetensors"
        raises(lambda: explainer.save(nowhere), "nowhere", what="a folder that is not there")
    unchanged(before, "after save and load")


@check("cnn", trainable=True)
def other_backbone(case: Case) -> None:
    """A checkpoint is refused by a model with other weights; ``strict_backbone=False`` warns and loads it."""
    changes: dict[str, Callable[[], Any]] = {
        "one weight changed": lambda: next(case.model.parameters()).view(-1)[:1].add_(1e-3),
        "one BatchNorm mean changed": lambda: next(case.model.buffers()).view(-1)[:1].add_(1e-3),
    }
    for what, change in changes.items():
        explainer = case.ready(case.model)
        with _folder() as folder:
            path = folder / "explainer.safetensors"
            explainer.save(path)
            with torch.no_grad():
                change()
            raises(functools.partial(type(explainer).load, path, case.model), "weights", what=what)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                loaded = type(explainer).load(path, case.model, strict_backbone=False)
            expect(any("weights" in str(w.message) for w in caught), f"{what}: expected strict_backbone=False to warn")
            expect(bool(torch.isfinite(_ask(case, loaded)).all()), f"{what}: expected maps all the same")


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
