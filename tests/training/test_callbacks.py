"""Who watches a fit is told everything, changes nothing, and may end it."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import engine_cases as cases
import pytest
import strategies as zoo
import torch

from attrib_zoo import TTAME
from attrib_zoo.errors import OptionError
from attrib_zoo.synthetic import tiny_cnn
from attrib_zoo.training import callbacks, distributed
from attrib_zoo.training.callbacks import EarlyStopping, Progress, Watchers

LOADER = [zoo.normal(4, 3, 32, 32, seed=seed).float() for seed in range(4)]
PHOTOS = LOADER[0][:2]


def fitted(watchers=(), recipe="paper", steps=12, **options):
    """A short fit with branches, whose batch normalisation would notice a pass too many."""
    with torch.random.fork_rng([]):
        model = cases.lively(tiny_cnn(num_classes=5, width=4))
        explainer = TTAME(model, recipe=recipe, num_layers=2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # so few steps, and what the best of them was
            return explainer.fit(LOADER, max_steps=steps, callbacks=watchers, show_progress=False, **options)


def state(explainer):
    return {name: tensor.clone() for name, tensor in explainer.network_.state_dict().items()}


def same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_every_step_and_every_validation_is_told_in_order():
    told = []
    explainer = fitted([told.append], val_loader=LOADER[:1])
    history = explainer.history_
    assert [(p.event, p.step) for p in told] == [
        *(("step", n) for n in range(1, 5)),
        ("validation", 4),
        *(("step", n) for n in range(5, 9)),
        ("validation", 8),
        *(("step", n) for n in range(9, 13)),
        ("validation", 12),
    ]
    assert {p.steps for p in told} == {12}
    for progress in told:
        if progress.event == "step":
            wanted = {name: values[progress.step - 1] for name, values in history.steps.items()}
        else:
            wanted = next(v for v in history.validation if v["step"] == progress.step)
            wanted = {name: value for name, value in wanted.items() if name != "step"}
        assert progress.numbers == wanted


def test_watching_and_explaining_change_nothing_about_the_fit():
    seen = []

    def watch(progress):
        seen.append(progress.explain(PHOTOS, target=1))
        progress.numbers.clear()

    same(state(fitted([watch], val_loader=LOADER[:1])), state(fitted(val_loader=LOADER[:1])))
    assert len(seen) == 15
    assert not torch.equal(seen[0], seen[-1])


@pytest.mark.parametrize("recipe", ["paper", "rows"])
def test_what_is_explained_at_the_end_is_what_the_explainer_explains(recipe):
    seen = {}

    def watch(progress):
        seen[progress.event, progress.step] = progress.explain(PHOTOS, target=0)

    explainer = fitted([watch], recipe, val_loader=LOADER[:1])
    step = next((int(re.search(r"after (\d+)", m)[1]) for m in explainer.history_.messages if "best after" in m), 12)
    explainer._warned = True
    torch.testing.assert_close(explainer.attribute(PHOTOS, target=0), seen["validation", step], rtol=0, atol=1e-5)


def test_a_stop_ends_the_fit_after_that_step_with_its_last_validation(tmp_path):
    steps = []

    def stop(progress):
        steps.append(progress.step)
        if progress.event == "step" and progress.step == 7:
            progress.stop("seven is enough")

    explainer = fitted([stop], val_loader=LOADER[:1], checkpoint_dir=tmp_path)
    assert explainer.n_steps_ == 7
    assert steps == [1, 2, 3, 4, 4, 5, 6, 7, 7]
    assert [v["step"] for v in explainer.history_.validation] == [4, 7]
    assert "fit: stopped after 7 of 12 steps: seven is enough" in explainer.history_.messages
    assert explainer.history_["loss"] == fitted().history_["loss"][:7]
    assert TTAME.load(tmp_path / "checkpoint.safetensors", explainer.model).n_steps_ == 7


def test_a_stop_at_a_validation():
    explainer = fitted([lambda p: p.stop() if p.event == "validation" and p.step == 8 else None], val_loader=LOADER[:1])
    assert explainer.n_steps_ == 8
    assert [v["step"] for v in explainer.history_.validation] == [4, 8]
    assert any("after 8 of 12 steps: a callback asked for it" in m for m in explainer.history_.messages)


def test_a_stopped_fit_goes_on_where_it_stopped(tmp_path):
    fitted([lambda p: p.stop() if p.step == 5 else None], checkpoint_dir=tmp_path)
    model = cases.lively(tiny_cnn(num_classes=5, width=4))
    explainer = TTAME(model, recipe="paper", num_layers=2)
    explainer.fit(LOADER, max_steps=12, resume_from=tmp_path, show_progress=False)
    same(state(explainer), state(fitted()))


def test_a_callback_that_fails_ends_the_fit_and_leaves_the_last_whole_step(tmp_path):
    def fail(progress):
        if progress.step == 3:
            raise ZeroDivisionError("mine")

    model = cases.lively(tiny_cnn(num_classes=5, width=4))
    explainer = TTAME(model, recipe="paper", num_layers=2)
    with pytest.warns(match="at least 30 steps"), pytest.raises(ZeroDivisionError, match="mine"):
        explainer.fit(LOADER, max_steps=12, callbacks=[fail], checkpoint_dir=tmp_path, show_progress=False)
    assert not explainer.is_fitted
    assert TTAME.load(tmp_path / "checkpoint.safetensors", model).n_steps_ == 3


@pytest.mark.parametrize("wrong", ["watch", [3], 5, [EarlyStopping]])
def test_what_is_no_callback(wrong):
    with pytest.raises(OptionError, match=r"callbacks: must be a list of functions that take a training"):
        TTAME(tiny_cnn()).fit(LOADER, callbacks=wrong)


def test_one_function_will_do():
    assert callbacks.check_callbacks(print) == (print,)
    assert callbacks.check_callbacks(None) == ()


def test_the_first_process_calls_and_all_stop(monkeypatch):
    called = []
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    monkeypatch.setattr(distributed, "everyone", lambda mine: [["the first says so"], mine])
    assert Watchers([called.append]).tell("step", 1, 2, {}) == "the first says so"
    assert called == []
    monkeypatch.setattr(distributed, "everyone", lambda mine: [mine, ["nobody asks me"]][:1])
    assert Watchers([called.append]).tell("step", 1, 2, {}) is None


# ---------------------------------------------------------------------- early stopping


def validations(stopping, values, name="loss"):
    """After how many validations it stops, or None."""
    for count, value in enumerate(values, start=1):
        progress = Progress("validation", count, 99, {name: value}, lambda *_: None)
        stopping(Progress("step", count, 99, {name: -1e9}, lambda *_: None))  # steps do not count
        stopping(progress)
        if progress._stopped is not None:
            return count
    return None


@pytest.mark.parametrize(
    ("options", "values", "wanted"),
    [
        ({"patience": 2}, [5, 4, 4, 4.5, 3], 4),
        ({"patience": 2}, [5, 4, 4.5, 3, 3.5, 2], None),
        ({"patience": 1, "least": 0.5}, [5, 4, 3.6, 1], 3),
        ({"patience": 2, "least": 0.5}, [5, 4.8, 4.4, 4.0, 3.95], 5),
        ({"patience": 3}, [float("nan")] * 5, 3),
        ({"patience": 1, "rising": True}, [1, 2, 3, 2, 9], 4),
    ],
    ids=str,
)
def test_when_it_stops(options, values, wanted):
    assert validations(EarlyStopping(**options), values) == wanted


def test_increases_in_confidence_rise():
    assert validations(EarlyStopping("IC(15)", patience=1), [1, 2, 3, 2], "IC(15)") == 4
    assert validations(EarlyStopping("AD(15)", patience=1), [1, 2], "AD(15)") == 2


def test_it_stops_a_real_fit():
    explainer = fitted([EarlyStopping(patience=1, least=1e9)], val_loader=LOADER[:1])
    assert explainer.n_steps_ == 8
    assert any(re.search(r"loss was not better than [\d.]+ in 1 validations", m) for m in explainer.history_.messages)


def test_a_measure_that_there_is_not():
    with pytest.raises(OptionError, match=r"measure: must be one of 'loss', got 'AD\(7\)'"):
        validations(EarlyStopping("AD(7)"), [1.0])
    with pytest.raises(OptionError, match="patience: must be a positive integer"):
        EarlyStopping(patience=0)


# ---------------------------------------------------------------------- as the page says


def test_the_tensorboard_of_the_page(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    page = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "watch-a-fit.md"
    (code,) = re.findall(r"```python\n(from torch.utils.tensorboard.*?)```", page.read_text("utf-8"), re.DOTALL)
    space = {}
    exec(code, space)
    explainer = fitted([space["TensorBoard"](str(tmp_path), PHOTOS)], val_loader=LOADER[:1])
    written = EventAccumulator(str(tmp_path)).Reload()
    losses = [(event.step, event.value) for event in written.Scalars("step/loss")]
    assert [step for step, _ in losses] == list(range(1, 13))
    assert [value for _, value in losses] == pytest.approx(explainer.history_["loss"])
    measured = [event.value for event in written.Scalars("validation/AD(15)")]
    assert measured == pytest.approx([v["AD(15)"] for v in explainer.history_.validation])
    assert [event.step for event in written.Images("maps")] == [4, 8, 12]


def logged(path):
    """The rows of an offline run's file, a log of protocol buffers in blocks of 32 kB, step by step."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, rows = path.read_bytes(), 7, b"", {}
    while at < len(data):
        if 32768 - at % 32768 < 7:  # no place for another header
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # all of a record, or its last part
            history = Record.FromString(whole).history
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in history.item}
            rows.setdefault(items.pop("_step", None), {}).update(items)
            whole = b""
    return rows


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of wandb itself
def test_the_weights_and_biases_of_the_page(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    page = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "watch-a-fit.md"
    (code,) = re.findall(r"```python\n(import wandb.*?)```", page.read_text("utf-8"), re.DOTALL)
    explainer = TTAME(cases.lively(tiny_cnn(num_classes=5, width=4)), recipe="paper", num_layers=2)
    short = "fit(loader, max_steps=6, val_loader=loader[:1], show_progress=False,"
    exec(code.replace("fit(loader,", short), {"explainer": explainer, "loader": LOADER})
    wandb.teardown()
    (path,) = tmp_path.rglob("run-*.wandb")
    rows, history = logged(path), explainer.history_
    assert [rows[step]["step/loss"] for step in range(1, 7)] == pytest.approx(history["loss"])
    for measured in history.validation:
        assert rows[measured["step"]]["validation/AD(15)"] == pytest.approx(measured["AD(15)"])
