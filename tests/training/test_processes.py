"""Two processes of which one has fewer batches, raises, hangs or dies: the other ends with a sentence, and soon."""

from __future__ import annotations

import os
import time
import warnings

import pytest
import strategies as zoo
import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from attrib_zoo import TTAME
from attrib_zoo.cli import stream
from attrib_zoo.errors import DataError, OptionError, TrainingError
from attrib_zoo.training import distributed
from attrib_zoo.training.locks import hold

IMAGES = zoo.batch(16)
PATIENCE = 4.0


class Trouble:
    """Batches for one process; in the second one, something happens before the third."""

    def __init__(self, rank, what):
        self.rank, self.what, self.left = rank, what, 2

    def __len__(self):
        return 8

    def __iter__(self):
        for batch in IMAGES[self.rank :: 2].split(1):
            if self.rank and self.left == 0:
                self.what()
            self.left -= 1
            yield batch


def fails():
    raise ValueError("no more photographs")


def freezes():
    time.sleep(2.5 * PATIENCE)


def fit(loader, folder=None, psi="own", **options):
    explainer = TTAME(zoo.small_cnn(), psi=psi, recipe="paper", batch_norm=options.pop("batch_norm", True))
    return zoo.fit(explainer, loader, checkpoint_dir=folder, **{"max_steps": 8, "schedule": "short", **options})


def attempt(found, name, work):
    begun = time.monotonic()
    try:
        found[name] = work()
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
    found[f"{name} took"] = time.monotonic() - begun


def meet(rank, folder, name):
    dist.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=2)


def work(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    meet(rank, folder, "one")
    found = {}

    def state(explainer):
        return {"maps": explainer.maps(IMAGES), "steps": explainer.n_steps_, "messages": explainer.history_.messages}

    parts = list(IMAGES.split(2))
    mine = parts[:5] if rank == 0 else parts[5:8]
    attempt(found, "uneven", lambda: state(fit(mine, epochs=2, max_steps=None)))
    attempt(found, "uneven streams", lambda: state(fit(iter(mine), max_steps=8)))
    attempt(found, "locked", lambda: _locked(rank, folder))
    for name, more in (("short", {"batch_norm": False}), ("normed", {})):
        shards = [batch[rank::2] for batch in IMAGES.split(8)]
        attempt(found, name, lambda shards=shards, more=more: state(fit(shards, max_steps=40, **more)))
    os.environ[distributed.VARIABLE] = str(PATIENCE)
    for name, what in (("raises", fails), ("freezes", freezes), ("dies", lambda: os._exit(9))):
        dist.destroy_process_group()
        meet(rank, folder, name)
        place = folder / f"{name} {rank}"
        place.mkdir()
        if name == "dies":
            torch.save(found, folder / f"found {rank}")
        attempt(found, name, lambda what=what, place=place: state(fit(Trouble(rank, what), place, checkpoint_every=1)))
        time.sleep(2.5 * PATIENCE if name == "freezes" and rank == 0 else 0)
    torch.save(found, folder / f"found {rank}")
    os._exit(0)  # a group whose other half is gone is not left in good order


def _locked(rank, folder):
    place = folder / "locked"
    if rank == 0:
        place.mkdir()
        with hold(place, "another fit"):
            dist.barrier()
            fit(IMAGES.split(4), place)
    else:
        dist.barrier()
        fit(IMAGES.split(4), place)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    context = processes.get_context("spawn")
    started = [context.Process(target=work, args=(rank, folder)) for rank in (0, 1)]
    for process in started:
        process.start()
    for process in started:
        process.join(600)
        process.kill()
    assert [process.exitcode for process in started] == [0, 9]
    return folder, [torch.load(folder / f"found {rank}", weights_only=False) for rank in (0, 1)]


@pytest.mark.slow
def test_uneven_loaders_take_the_steps_of_the_longest(ranks):
    first, second = (found["uneven"] for found in ranks[1])
    assert first["steps"] == second["steps"] == 10  # 2 epochs of 5 batches; the other has 3
    assert torch.equal(first["maps"], second["maps"])


@pytest.mark.slow
def test_uneven_streams_end_together(ranks):
    first, second = (found["uneven streams"] for found in ranks[1])
    assert first["steps"] == second["steps"] == 3
    assert torch.equal(first["maps"], second["maps"])
    assert "the loader ended after 3 of 8 steps" in first["messages"][-1]


@pytest.mark.slow
def test_a_folder_that_is_held_stops_both(ranks):
    for found in ranks[1]:
        assert found["locked"].startswith("DataError: checkpoint_dir: ")
        assert "is in use by this very process" in found["locked"]
        assert found["locked took"] < 30


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("raises", "TrainingError: fit: process 1 has stopped (ValueError: no more photographs), so all stop; mend"),
        ("freezes", "TrainingError: fit: another process has stopped or has not answered for 4 seconds ("),
        ("dies", "TrainingError: fit: another process has stopped or has not answered for 4 seconds ("),
    ],
)
def test_the_other_process_ends_with_a_sentence_and_a_whole_checkpoint(ranks, what, said):
    folder, (first, _) = ranks
    assert first[what].startswith(said)
    assert "\n" not in first[what]
    assert first[f"{what} took"] < 60
    loaded = TTAME.load(folder / f"{what} 0" / "checkpoint.safetensors", zoo.small_cnn())
    assert loaded.n_steps_ == 2


@pytest.mark.slow
def test_the_one_that_raises_raises_its_own_error(ranks):
    assert ranks[1][1]["raises"] == "ValueError: no more photographs"
    assert ranks[1][1]["freezes"].startswith("TrainingError: ")


@pytest.mark.slow
def test_two_processes_of_half_the_batch_are_one_of_the_whole(ranks):
    """But for the branches' batch statistics, which each process takes from its own half."""
    apart = {}
    for name in ("short", "normed"):
        alone = fit(IMAGES.split(8), max_steps=40, batch_norm=name == "normed").maps(IMAGES)
        apart[name] = float((ranks[1][0][name]["maps"] - alone).abs().max())
    assert apart["short"] < 1e-5
    assert apart["normed"] > 1e-2  # as docs/how-to/several-gpus.md says


# ---------------------------------------------------------------------- alone


def test_the_patience_is_a_number_of_seconds(monkeypatch):
    assert distributed.patience() == distributed.PATIENCE < 60
    monkeypatch.setenv(distributed.VARIABLE, "7.5")
    assert distributed.patience() == 7.5
    for wrong in ("soon", "0", "-1", "nan", "inf"):
        monkeypatch.setenv(distributed.VARIABLE, wrong)
        with pytest.raises(OptionError, match=r"ATTRIB_ZOO_PATIENCE: must be a positive number of seconds"):
            distributed.patience()


def test_an_evaluation_and_a_job_end_with_one_sentence_too(monkeypatch):
    def gone(found, value):
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1. Stack trace: ...\n  1 of 20")

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gone)
    words = r"^another process of this run has stopped \(Connection closed by peer .*\), so this one stops too; [^\n]*$"
    for meet in (lambda: distributed.everyone(1), stream.wait):
        with pytest.raises(TrainingError, match=words):
            meet()


def test_what_the_group_says_becomes_one_sentence():
    words = (
        r"has not answered for 50 seconds \(Connection closed by peer\), so this one stops too; look at its messages"
    )
    with pytest.raises(TrainingError, match=words), distributed._answered():
        raise RuntimeError("Connection closed by peer. Stack trace: ...\n  1 of 20")
    with pytest.raises(DataError), distributed._answered():
        raise DataError("of another kind")
