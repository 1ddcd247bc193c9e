"""Files: whole or not at all, read back to the bit, and refused with a reason where they do not belong."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict
from pathlib import Path

import engine_cases as cases
import pytest
import strategies as zoo
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from attrib_zoo import TTAME
from attrib_zoo.backbone.grid import Grid
from attrib_zoo.errors import BackboneMismatchError, CheckpointError, DataError, UnsupportedModelError
from attrib_zoo.training import checkpoint as files
from attrib_zoo.training.checkpoint import (
    FORMAT,
    Checkpoint,
    fingerprint,
    flatten_optimizer,
    read,
    restore_optimizer,
    write,
)
from attrib_zoo.training.recipe import RECIPES

IMAGES = zoo.batch(6)


@pytest.fixture(scope="module")
def explainer():
    """Fitted with options that are not the defaults, validated, with a class that never came up."""
    model = zoo.small_cnn()
    with torch.no_grad():
        model.head.bias[2] -= 1e4
    shown = {"upsample": False, "smooth": 3, "scale": "rank"}
    statistics = {"mean": (0.1, 0.2, 0.3), "std": (1, 2, 3)}
    made = TTAME(model, ["stages.2", "stages.0"], recipe="paper", skip=False, lambda_tv=1.5, **statistics, **shown)
    return zoo.fit(made, IMAGES.split(3), epochs=2, val_loader=[IMAGES])


@pytest.fixture
def saved(explainer, tmp_path):
    return explainer.save(tmp_path / "explainer.safetensors")


def equal(one, other):
    assert one.options() == other.options()
    assert torch.equal(one.maps(IMAGES), other.maps(IMAGES))
    assert torch.equal(one.attribute(IMAGES), other.attribute(IMAGES))
    assert torch.equal(one.class_counts_, other.class_counts_)
    assert (one.n_steps_, one.schedule_) == (other.n_steps_, other.schedule_)
    assert one.history_ == other.history_
    assert one._fitted.decisions == other._fitted.decisions
    assert one._fitted.layers == other._fitted.layers
    assert one.report() == other.report()


# ---------------------------------------------------------------------- an explainer and its file


def test_what_is_loaded_is_what_was_saved(explainer, saved):
    loaded = TTAME.load(saved, explainer.model)
    equal(loaded, explainer)
    assert loaded.is_fitted
    assert not loaded.network_.training
    assert loaded.history_.validation
    assert loaded.history_.messages
    assert loaded.upsample is False
    with pytest.warns(UserWarning, match="class 2 never came up in fit"):
        loaded.attribute(IMAGES, 2)
    equal(TTAME.load(loaded.save(saved.with_name("again.safetensors")), explainer.model), explainer)


@pytest.mark.parametrize("fact", ["quantities", "schedule", "steps"])
def test_a_file_that_lacks_a_fact(explainer, saved, fact):
    found = read(saved)
    del found.facts[fact]
    write(saved, found)
    with pytest.raises(CheckpointError, match=f"incomplete, '{fact}' is not in it; fit again"):
        TTAME.load(saved, explainer.model)


def test_a_loaded_explainer_can_be_fitted_again(explainer, saved):
    model = explainer.model
    again, new = TTAME.load(saved, model), TTAME(model, ["stages.0", "stages.2"], **explainer.options())
    for each in (again, new):
        zoo.fit(each, [IMAGES], max_steps=2)
    equal(again, new)


def test_loaded_onto_the_same_model_in_a_wrapper(explainer, saved):
    equal(TTAME.load(str(saved), nn.DataParallel(explainer.model)), explainer)


def test_the_file_is_plain_and_says_what_it_is(explainer, saved):
    with safe_open(str(saved), "pt") as file:
        facts = json.loads(file.metadata()["attrib_zoo"])
        names = set(file.keys())
    assert facts["format"] == FORMAT
    assert (facts["method"], facts["model"], facts["num_classes"]) == ("TTAME", "SmallCNN", 5)
    assert facts["library"]
    assert facts["layers"] == [["stages.0", None], ["stages.2", None]]
    assert facts["channels"] == [4, 8]
    assert facts["options"]["recipe"]["skip"] is False
    assert facts["decisions"]["mean"] == [0.1, 0.2, 0.3]
    assert facts["backbone"] == fingerprint(explainer.model)
    assert {"class_counts", "network/fuser.weight", "history/loss"} <= names
    assert not any("model" in name or "stages" in name for name in names)  # the backbone is not in it
    assert saved.stat().st_size < 40_000


@pytest.mark.parametrize("recipe", RECIPES)
def test_files_have_all_fields_of_a_recipe(recipe, tmp_path):
    """What a name stands for may change, what was fitted does not."""
    images = zoo.normal(2, 3, 32, 32).float()
    made = zoo.fit(TTAME(cases.vit(global_pool="token"), recipe=recipe), [images], max_steps=1)
    facts = read(made.save(tmp_path / "x.safetensors")).facts
    assert facts["options"]["recipe"] == asdict(RECIPES[recipe])
    assert TTAME.load(tmp_path / "x.safetensors", made.model).options()["recipe"] == recipe


def test_a_file_from_before_likeness_has_the_mean_filter_of_its_time(tmp_path):
    images = zoo.normal(4, 3, 32, 32).float()
    model = cases.vit(global_pool="token")
    before = RECIPES["attended"].but(alike=1, smooth=3)
    made = zoo.fit(TTAME(model, recipe=before), [images], max_steps=0)
    saved = read(made.save(tmp_path / "now.safetensors"))
    assert saved.facts["options"]["smooth"] == 3
    saved.facts["options"]["recipe"] = "attended"
    write(tmp_path / "then.safetensors", saved)
    loaded = TTAME.load(tmp_path / "then.safetensors", model)
    assert loaded.recipe == before
    assert torch.equal(loaded.attribute(images), made.attribute(images))


def test_a_layout_that_was_said_by_hand_is_kept(tmp_path):
    model = zoo.small_vit()
    grid = Grid("tokens", prefix=1, hw=(8, 8))
    made = zoo.fit(TTAME(model, ("blocks.1", grid), recipe="paper"), [IMAGES], max_steps=1)
    loaded = TTAME.load(made.save(tmp_path / "x.safetensors"), model)
    assert loaded._fitted.layers == (("blocks.1", grid),)
    assert torch.equal(loaded.maps(IMAGES), made.maps(IMAGES))


def test_saving_over_a_file_replaces_it(explainer, saved):
    os.link(saved, saved.with_name("kept"))  # whoever has the old one open keeps it
    before = saved.read_bytes()
    explainer.save(saved)
    assert saved.read_bytes() == before
    assert saved.stat().st_ino != saved.with_name("kept").stat().st_ino
    assert sorted(p.name for p in saved.parent.iterdir()) == ["explainer.safetensors", "kept"]


# ---------------------------------------------------------------------- files that do not belong


def test_another_backbone(explainer, saved):
    other = zoo.small_cnn()
    with torch.no_grad():
        other.stages[1][1].running_mean[0] += 1e-6
    words = r"was fitted for SmallCNN with other weights than this SmallCNN has; load the weights it was fitted for"
    with cases.untouched(other), pytest.raises(BackboneMismatchError, match=words):
        TTAME.load(saved, other)
    with pytest.warns(UserWarning, match=words) as caught:
        loaded = TTAME.load(saved, other, strict_backbone=False)
    assert caught[0].filename == __file__
    assert torch.equal(loaded.network_.fuser.weight, explainer.network_.fuser.weight)
    with pytest.raises(BackboneMismatchError, match="fitted for SmallCNN with other weights than this TinyViT has"):
        TTAME.load(saved, zoo.small_vit())


def test_another_number_of_classes(saved):
    other = zoo.small_cnn(classes=7)
    with pytest.warns(UserWarning, match="other weights"):
        loaded = TTAME.load(saved, other, strict_backbone=False)
    with pytest.raises(UnsupportedModelError, match="must have the 5 classes that TTAME was fitted for, got 7"):
        loaded.attribute(IMAGES, 0)


def test_another_class(explainer, saved):
    facts = {**read(saved).facts, "method": "LCAM"}
    other = write(saved.with_name("other.safetensors"), Checkpoint(read(saved).tensors, facts))
    with pytest.raises(
        CheckpointError, match=r"other.safetensors must be a checkpoint of TTAME, got one of LCAM; use LCAM.load"
    ):
        TTAME.load(other, explainer.model)


def test_a_newer_format(explainer, saved, monkeypatch):
    monkeypatch.setattr(files, "FORMAT", FORMAT + 1)
    newer = explainer.save(saved.with_name("newer.safetensors"))
    monkeypatch.undo()
    with pytest.raises(
        CheckpointError, match=rf"is of format {FORMAT + 1}, this version reads up to {FORMAT}; upgrade attrib_zoo"
    ):
        TTAME.load(newer, explainer.model)


@settings(max_examples=25)
@given(share=st.floats(0, 0.999))
def test_a_truncated_file(explainer, tmp_path_factory, share):
    path = explainer.save(tmp_path_factory.getbasetemp() / "whole.safetensors")
    data = path.read_bytes()
    cut = path.with_name("cut.safetensors")
    cut.write_bytes(data[: int(share * len(data))])
    with pytest.raises(
        CheckpointError, match=r"cut.safetensors must be a whole safetensors file, .* copy it again, or fit again"
    ):
        TTAME.load(cut, explainer.model)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda p: p.write_bytes(b""), "whole safetensors file"),
        (lambda p: p.write_text("not a checkpoint"), "whole safetensors file"),
        (lambda p: torch.save({"a": torch.ones(2)}, p), "whole safetensors file"),
        (
            lambda p: save_file({"a": torch.ones(2)}, p),
            "must be a checkpoint of attrib_zoo; it is .* of something else",
        ),
        (lambda p: save_file({"a": torch.ones(2)}, p, {"format": "pt"}), "of something else"),
        (lambda p: save_file({"a": torch.ones(2)}, p, {"attrib_zoo": "{"}), "whole safetensors file"),
        (lambda p: save_file({"a": torch.ones(2)}, p, {"attrib_zoo": "[1]"}), "of something else"),
        (
            lambda p: save_file({"a": torch.ones(2)}, p, {"attrib_zoo": '{"format": 1}'}),
            "checkpoint of TTAME, got one of None",
        ),
        (lambda p: p.mkdir(), "must be a checkpoint file, got .*, which is not there"),
        (lambda p: None, "must be a checkpoint file, got .*, which is not there"),
    ],
    ids=[
        "empty",
        "text",
        "pickle",
        "foreign",
        "foreign with metadata",
        "broken facts",
        "no facts",
        "bare",
        "folder",
        "missing",
    ],
)
def test_foreign_files(content, words, tmp_path):
    path = tmp_path / "file.safetensors"
    content(path)
    with pytest.raises(CheckpointError, match=words):
        TTAME.load(path, zoo.small_cnn())


# ---------------------------------------------------------------------- writing


DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
NAMES = st.text("abc/._0", min_size=1, max_size=12)


@settings(max_examples=25)
@given(
    st.dictionaries(NAMES, st.tuples(st.lists(st.integers(0, 3), max_size=3), st.sampled_from(DTYPES)), max_size=4),
    st.text(),
)
def test_whatever_is_written_is_read_to_the_bit(tmp_path_factory, shapes, note):
    tensors = {k: (100 * zoo.normal(*shape)).abs().to(dtype) for k, (shape, dtype) in shapes.items()}
    path = write(
        tmp_path_factory.getbasetemp() / "any.safetensors", Checkpoint(tensors, {"note": note, "n": [1, None]})
    )
    found = read(path)
    assert found.facts == {"format": FORMAT, "note": note, "n": [1, None]}
    assert found.tensors.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found.tensors[name].dtype == value.dtype
        assert torch.equal(found.tensors[name], value)


def test_views_and_shared_tensors_are_written(tmp_path):
    base = torch.arange(6.0).view(2, 3)
    found = read(
        write(tmp_path / "x", Checkpoint({"a": base.T, "b": base, "c": base, "d": base[:, 1].requires_grad_()}))
    )
    assert torch.equal(found.tensors["a"], base.T)
    assert torch.equal(found.tensors["c"], base)
    assert found.tensors["d"].tolist() == [1, 4]


def test_part_strips_the_prefix():
    saved = Checkpoint({"network/a.b": torch.ones(1), "network2/a": torch.ones(1), "history/x/y": torch.ones(1)})
    assert list(saved.part("network")) == ["a.b"]
    assert list(saved.part("history")) == ["x/y"]


def fails(error):
    def fail(*_, **__):
        raise error

    return fail


FAILURES = {
    "disk full": (files.os, "fsync", OSError(28, "No space left"), DataError, r"\(No space left\); make the folder"),
    "renaming fails": (Path, "replace", OSError(13, "Permission denied"), DataError, r"\(Permission denied\)"),
    "no temporary file": (Path, "open", OSError(30, "Read-only file system"), DataError, "Read-only"),
    "Ctrl-C": (files.os, "fsync", KeyboardInterrupt(), KeyboardInterrupt, ""),
}  # fmt: skip


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("there", [True, False], ids=["over a file", "a new file"])
def test_a_failure_while_writing_leaves_no_half_file(explainer, tmp_path, monkeypatch, failure, there):
    path = tmp_path / "explainer.safetensors"
    if there:
        path.write_bytes(b"the old one")
    holder, name, error, wanted, words = FAILURES[failure]
    monkeypatch.setattr(holder, name, fails(error))
    with pytest.raises(wanted, match=words or None):
        explainer.save(path)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == (["explainer.safetensors"] if there else [])
    if there:
        assert path.read_bytes() == b"the old one"


def test_folders_that_cannot_be_written(explainer, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    words = r"path: must be a file in a folder that exists and can be written, got {} \(.*\); make the folder"
    for target in (tmp_path / "nowhere" / "x", tmp_path / "file" / "x", tmp_path / "folder"):
        with pytest.raises(DataError, match=words.format(target)):
            explainer.save(target)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(explainer, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(DataError, match="Permission denied"):
            explainer.save(tmp_path / "x.safetensors")
        with pytest.raises(DataError, match="checkpoint_dir: must be a folder that exists and can be written"):
            zoo.fit(TTAME(explainer.model, recipe="paper"), [IMAGES], max_steps=1, checkpoint_dir=tmp_path)
    finally:
        tmp_path.chmod(0o700)


def test_a_checkpoint_folder_without_permission_is_refused_before_training(explainer, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    seen = []
    handle = explainer.model.register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(DataError, match=r"checkpoint_dir: must be a folder that exists and can be written"):
        zoo.fit(TTAME(explainer.model, recipe="paper"), [IMAGES], max_steps=1, checkpoint_dir=tmp_path)
    handle.remove()
    assert not seen


def test_ctrl_c_while_a_checkpoint_is_written_leaves_one(tmp_path, monkeypatch):
    model = zoo.small_cnn()
    plain, calls = os.fsync, []

    def fsync(handle):
        calls.append(handle)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        plain(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)
    made = TTAME(model, recipe="paper")
    with pytest.raises(KeyboardInterrupt):
        zoo.fit(made, [IMAGES], max_steps=9, checkpoint_dir=tmp_path, checkpoint_every=2)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    assert TTAME.load(tmp_path / "checkpoint.safetensors", model).n_steps_ == made.n_steps_ == 6


# ---------------------------------------------------------------------- fingerprints


def test_fingerprints_are_of_values_names_shapes_and_types():
    model = zoo.small_cnn()
    first = fingerprint(model)
    assert first == fingerprint(zoo.small_cnn())
    model.train()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.requires_grad_(False)
    assert fingerprint(model) == first
    found = {first}
    for change in (
        lambda m: m.head.bias.data.view(-1)[:1].add_(1e-6),
        lambda m: m.stages[0][1].running_var[:1].add_(1e-6),
        lambda m: m.stages[0][1].num_batches_tracked.add_(1),
        lambda m: m.double(),
        lambda m: m.half(),
        lambda m: setattr(m, "heads", m.__dict__["_modules"].pop("head")),
        lambda m: setattr(m.head, "weight", nn.Parameter(m.head.weight.data.view(8, 5))),
        lambda m: m.register_buffer("more", torch.zeros(0)),
    ):
        changed = zoo.small_cnn()
        change(changed)
        found.add(fingerprint(changed))
    assert len(found) == 9


def test_fingerprints_do_not_depend_on_what_is_compiled():
    """A fit runs an eager mirror, so that its fingerprint has the names without the compiler's wrappers."""
    model = zoo.small_cnn()
    before = fingerprint(model)
    model.stages = torch.compile(model.stages)
    model.head = torch.compile(model.head)
    assert fingerprint(model) == before


def test_fingerprints_do_not_depend_on_memory_layout():
    model = zoo.small_cnn()
    assert fingerprint(model.to(memory_format=torch.channels_last)) == fingerprint(zoo.small_cnn())


# ---------------------------------------------------------------------- optimisers


@pytest.mark.parametrize(
    "kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop]
)
def test_optimisers_continue_from_their_flat_state(kind, tmp_path):
    def make():
        weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
        more = {"momentum": 0.9} if kind in (torch.optim.SGD, torch.optim.RMSprop) else {}
        return weights, kind([{"params": weights[:1], "lr": 0.1}, {"params": weights[1:], "lr": 0.2}], lr=0.3, **more)

    def step(weights, optimizer, count):
        for i in range(count):
            for weight in weights:
                weight.grad = torch.sin(weight.detach() + i)
            optimizer.step()

    straight, optimizer = make()
    step(straight, optimizer, 3)
    tensors, facts = flatten_optimizer(optimizer)
    file = read(write(tmp_path / "x", Checkpoint(tensors, facts)))
    resumed, other = make()
    for weight, value in zip(resumed, straight, strict=True):
        weight.data.copy_(value.data)
    restore_optimizer(other, file.tensors, file.facts)
    for weights, each in ((straight, optimizer), (resumed, other)):
        step(weights, each, 2)
    for one, two in zip(straight, resumed, strict=True):
        assert torch.equal(one, two)
    assert [g["lr"] for g in other.param_groups] == [0.1, 0.2]
