"""Who asks a fit to stop finds it saved: Ctrl-C, SIGTERM and SIGHUP, once or many times."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import strategies as zoo
import torch

from attrib_zoo import TTAME
from attrib_zoo.errors import CheckpointError, DataError
from attrib_zoo.training import checkpoint as files
from attrib_zoo.training import locks
from attrib_zoo.training.files import _mark, _sweep, _swept, write_whole
from attrib_zoo.training.signals import STOPPING, Stopped, held, stoppable

IMAGES = zoo.batch(12)
LOADER = IMAGES.split(3)
PLAN = {"max_steps": 8, "schedule": "short"}
NAMES = [signal.Signals(number).name for number in STOPPING]

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has other signals")


@pytest.fixture(autouse=True)
def _handlers_are_put_back():
    before = [signal.getsignal(number) for number in STOPPING]
    yield
    assert [signal.getsignal(number) for number in STOPPING] == before


def send(name, times=1):
    for _ in range(times):
        os.kill(os.getpid(), getattr(signal, name))


# ---------------------------------------------------------------------- the blocks


@pytest.mark.parametrize("name", NAMES)
def test_each_signal_is_an_interrupt_that_says_its_name(name):
    with pytest.raises(KeyboardInterrupt) as found, stoppable():
        send(name)
    assert isinstance(found.value, Stopped)
    assert found.value.signal == (None if name == "SIGINT" else name)


def test_after_the_first_signal_the_others_are_dropped():
    steps = []

    def work():
        with stoppable(), stoppable():
            try:
                send("SIGTERM")
            finally:
                for name in NAMES * 3:
                    send(name)
                steps.append("saved")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == ["saved"]


@pytest.mark.parametrize("name", NAMES)
def test_signals_wait_while_something_is_saved(name):
    steps = []

    def work():
        with stoppable(), held():
            with held():
                send(name, times=5)
            steps.append("inner")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == ["inner"]


def test_ctrl_c_waits_outside_of_a_stoppable_block_too():
    steps = []

    def work():
        with held():
            send("SIGINT", times=2)
            steps.append("saved")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == ["saved"]


def test_handlers_of_the_users_own_are_called_and_what_is_ignored_stays_so():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *event: seen.append(event[0]))
    hup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            send("SIGTERM")
            assert seen == [signal.SIGTERM]
            with held():
                send("SIGTERM")
                assert len(seen) == 1
            assert len(seen) == 2
            send("SIGHUP")
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGHUP, hup)


def test_other_threads_change_nothing():
    found = []

    def work():
        before = signal.getsignal(signal.SIGTERM)
        with stoppable(), held():
            found.append(signal.getsignal(signal.SIGTERM) is before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [True]


# ---------------------------------------------------------------------- fits


class Signalled:
    """Batches, and signals before one of them."""

    def __init__(self, at, name, times=1):
        self.left, self.name, self.times = at, name, times

    def __len__(self):
        return len(LOADER)

    def __iter__(self):
        for batch in LOADER:
            if self.left == 0:
                send(self.name, self.times)
            self.left -= 1
            yield batch


@pytest.mark.parametrize("name", NAMES)
def test_a_fit_that_is_told_to_stop_continues_to_the_same_bits(name, tmp_path):
    model = zoo.small_cnn()
    straight = zoo.fit(TTAME(model, recipe="paper"), LOADER, **PLAN)
    with pytest.raises(KeyboardInterrupt):
        zoo.fit(TTAME(model, recipe="paper"), Signalled(5, name, times=5), checkpoint_dir=tmp_path, **PLAN)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    resumed = zoo.fit(TTAME(model, recipe="paper"), LOADER, resume_from=tmp_path, **PLAN)
    assert torch.equal(resumed.maps(IMAGES), straight.maps(IMAGES))


@pytest.mark.parametrize("name", NAMES)
def test_signals_while_a_checkpoint_is_written_lose_nothing(name, tmp_path, monkeypatch):
    model = zoo.small_cnn()
    plain, calls = files.write_sealed, []

    def write(*args):
        calls.append(args)
        if len(calls) == 2:
            send(name, times=5)
        plain(*args)
        if len(calls) == 2:
            send(name, times=5)

    monkeypatch.setattr(files, "write_sealed", write)
    made = TTAME(model, recipe="paper")
    with pytest.raises(KeyboardInterrupt):
        zoo.fit(made, LOADER, checkpoint_dir=tmp_path, checkpoint_every=2, **PLAN)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    assert TTAME.load(tmp_path / "checkpoint.safetensors", model).n_steps_ == made.n_steps_ == 4


def test_without_a_folder_sigterm_ends_the_process_as_ever(monkeypatch):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(signal.getsignal(signal.SIGTERM)))
    try:
        handler = signal.getsignal(signal.SIGTERM)
        zoo.fit(TTAME(zoo.small_cnn(), recipe="paper"), Signalled(3, "SIGTERM"), **PLAN)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [handler]


# ---------------------------------------------------------------------- what a killed fit leaves, and a new one finds


def test_an_empty_folder_is_resumed_from_the_start_with_a_word(tmp_path):
    model = zoo.small_cnn()
    straight = zoo.fit(TTAME(model, recipe="paper"), LOADER, **PLAN)
    for more in ({}, {"checkpoint_dir": tmp_path}):
        (tmp_path / locks.NAME).touch()  # as a killed fit leaves it
        with pytest.warns(
            UserWarning, match=r"resume_from: no checkpoint in the folder .* yet, so the fit starts anew"
        ):
            made = zoo.fit(TTAME(model, recipe="paper"), LOADER, resume_from=tmp_path, **more, **PLAN)
        assert torch.equal(made.maps(IMAGES), straight.maps(IMAGES))


def test_temporary_files_of_killed_saves_are_swept_away(tmp_path):
    mine = tmp_path / ".aaaaaaaaaaaa.part.txt"  # of another kind
    kinds = (("a", "part"), ("b", "part"), ("c", "new"), ("d", "new"), ("e", "part"))
    dead, empty, fresh, old, alive = (tmp_path / f".{letter * 12}.{kind}" for letter, kind in kinds)
    for path in (mine, dead, alive):
        path.write_text("half a checkpoint")
    empty.touch()
    fresh.touch()  # its writer may be about to mark it
    old.touch()
    os.utime(old, (1, 1))
    with alive.open("rb") as file:
        _mark(file)
        _swept.discard(tmp_path)
        write_whole(tmp_path / "x", "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([mine.name, fresh.name, alive.name, "x"])
    _sweep(tmp_path)  # once for each folder
    assert alive.exists()


def test_another_fit_into_the_same_folder_is_refused(tmp_path):
    model = zoo.small_cnn()
    words = r"checkpoint_dir: '.*' is in use by this very process"
    with locks.hold(tmp_path, "fit"), pytest.raises(DataError, match=words):
        zoo.fit(TTAME(model, recipe="paper"), LOADER, checkpoint_dir=tmp_path, **PLAN)
    zoo.fit(TTAME(model, recipe="paper"), LOADER, checkpoint_dir=tmp_path, **PLAN)


# ---------------------------------------------------------------------- resumed with other data


def stopped(folder, loader):
    class Ends(list):
        def __iter__(self):
            yield from list.__iter__(self)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zoo.fit(TTAME(zoo.small_cnn(), recipe="paper"), Ends(loader), checkpoint_dir=folder, **PLAN)


def test_a_loader_of_another_shape_is_refused(tmp_path):
    stopped(tmp_path, LOADER)
    with pytest.raises(CheckpointError, match=r"continued with the same arguments, got batches=2 \(was 4\)"):
        zoo.fit(TTAME(zoo.small_cnn(), recipe="paper"), IMAGES.split(6), resume_from=tmp_path, **PLAN)
    dataset = torch.utils.data.DataLoader(IMAGES, 3)
    with pytest.raises(CheckpointError, match=r"got batch_size=3 \(was None\), images=12 \(was None\)"):
        zoo.fit(TTAME(zoo.small_cnn(), recipe="paper"), dataset, resume_from=tmp_path, **PLAN)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ([*LOADER[:3], LOADER[0]], r"number 4 of this epoch differs \(3 images, were 3, with other pixels\)"),
        ([*LOADER[:3], IMAGES[:2]], r"number 4 of this epoch differs \(2 images, were 3\)"),
    ],
)
def test_other_images_are_told_of(tmp_path, other, words):
    stopped(tmp_path, LOADER)
    with pytest.warns(UserWarning, match=rf"fit: the loader's batches must be those .* {words}: the result will not"):
        made = TTAME(zoo.small_cnn(), recipe="paper").fit(other, resume_from=tmp_path, show_progress=False, **PLAN)
    assert any("will not be that" in message for message in made.history_.messages)
