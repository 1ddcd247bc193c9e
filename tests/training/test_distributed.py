"""Two processes on one machine: one network, averaged gradients, counts of all images, one writer."""

from __future__ import annotations

import warnings

import pytest
import strategies as zoo
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from attrib_zoo import TTAME
from attrib_zoo.errors import TrainingError
from attrib_zoo.training import distributed

IMAGES = zoo.batch(12)


def state_of(explainer):
    return {
        "network": explainer.network_.state_dict(),
        "counts": explainer.class_counts_,
        "history": explainer.history_.steps,
        "maps": explainer.maps(IMAGES),
        "schedule": explainer._fitted.schedule.facts(),
    }


# ---------------------------------------------------------------------- one process


def test_alone_everything_is_local():
    assert distributed.world_size() == 1
    assert distributed.is_first()
    network, values = nn.Linear(2, 2), torch.ones(3)
    assert distributed.total(values) is values
    assert torch.equal(distributed.mean(values), values)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    distributed.align(network)
    distributed.share(network)
    distributed.average_gradients(network)
    assert network.weight.grad is None
    with distributed.meeting() as together:
        together.ready = False
    assert not together.all_ready
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


# ---------------------------------------------------------------------- two processes


def shards(rank):
    """What one process sees; the second sees less of the bright images."""
    return [IMAGES[rank::2][:3] * (1 + rank), IMAGES[rank::2][3:]]


def plain(groups):
    return torch.optim.SGD(groups, momentum=0.0)


JOBS = {
    "short": {"max_steps": 4, "psi": "random"},
    "paper": {"max_steps": 4, "schedule": "paper", "psi": "random"},
    "one step": {"max_steps": 1, "schedule": "paper", "optimizer": plain, "lr": 10.0, "psi": "own"},
}


def fit(loader, folder=None, *, psi="own", **options):
    explainer = TTAME(zoo.small_cnn(), psi=psi, recipe="paper")
    return zoo.fit(explainer, loader, checkpoint_dir=folder, **options)


def work(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {"size": distributed.world_size(), "first": distributed.is_first()}
    mine = torch.tensor([1.0, 10.0]) * (rank + 1)
    found["total"], found["mean"], found["mine"] = distributed.total(mine), distributed.mean(mine), mine
    norm = nn.BatchNorm2d(2)
    norm.running_mean.fill_(rank + 5)
    distributed.share(norm)
    found["shared"] = norm.running_mean

    for name, options in JOBS.items():
        own = folder / f"{name} {rank}"
        own.mkdir()
        found[name] = state_of(fit(shards(rank), own, **options))
    sampler = DistributedSampler(TensorDataset(IMAGES), shuffle=True, seed=3)
    found["sampled"] = state_of(fit(DataLoader(TensorDataset(IMAGES), 3, sampler=sampler), epochs=2))

    spoilt = shards(rank) if rank == 0 else [IMAGES[:3], 3e38 * IMAGES[:3].sign()]
    try:
        fit(spoilt, max_steps=2)
    except TrainingError as error:
        found["error"] = str(error)
    with pytest.raises(KeyboardInterrupt):
        fit(Stopping(shards(rank), 3), folder / f"short {rank}", max_steps=4, psi="random")
    dist.barrier()  # the first process has written its checkpoint
    resumed = fit(shards(rank), resume_from=folder / "short 0", max_steps=4, psi="random")
    alone = {"resume_from": folder / "short 0"} if rank == 0 else {}
    try:
        fit(shards(rank), max_steps=4, psi="random", **alone)
    except TrainingError as error:
        found["apart"] = str(error)
    found["resumed"] = state_of(resumed)
    torch.save(found, folder / f"found {rank}")
    dist.destroy_process_group()


class Stopping:
    """Raises Ctrl-C in both processes after so many batches."""

    def __init__(self, batches, after):
        self.batches, self.after = batches, after

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches:
            if self.after == 0:
                raise KeyboardInterrupt
            self.after -= 1
            yield batch


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    processes.spawn(work, (folder,), nprocs=2)
    return folder, [torch.load(folder / f"found {rank}", weights_only=False) for rank in (0, 1)]


@pytest.mark.slow
def test_sums_means_and_buffers(ranks):
    for rank, found in enumerate(ranks[1]):
        assert found["size"] == 2
        assert found["first"] is (rank == 0)
        assert found["total"].tolist() == [3, 30]
        assert found["mean"].tolist() == [1.5, 15]
        assert found["mine"].tolist() == [1 + rank, 10 * (1 + rank)]  # not changed in place
        assert found["shared"].tolist() == [5, 5]


@pytest.mark.slow
@pytest.mark.parametrize("job", [*JOBS, "sampled", "resumed"])
def test_both_processes_end_with_the_same_explainer(ranks, job):
    one, other = (found[job] for found in ranks[1])
    for name, value in one["network"].items():
        assert torch.equal(value, other["network"][name]), name
    assert torch.equal(one["maps"], other["maps"])
    assert torch.equal(one["counts"], other["counts"])
    assert one["history"] == other["history"]
    assert one["schedule"] == other["schedule"]


@pytest.mark.slow
def test_every_image_is_counted(ranks):
    model = zoo.small_cnn()
    decided = sum(model(batch).argmax(1).bincount(minlength=5) for rank in (0, 1) for batch in shards(rank))
    assert ranks[1][0]["paper"]["counts"].tolist() == (2 * decided).tolist()
    assert ranks[1][0]["sampled"]["counts"].sum() == 2 * len(IMAGES)


@pytest.mark.slow
def test_a_step_is_the_mean_of_the_two_processes_steps(ranks):
    """Plain SGD from equal weights: the weights move by the mean of what each would have moved alone."""
    with torch.random.fork_rng(devices=[]):
        alone = [fit(shards(rank), **JOBS["one step"]) for rank in (0, 1)]
        start = fit(shards(0), **{**JOBS["one step"], "lr": 1e-30})
    together = ranks[1][0]["one step"]
    first = dict(start.network_.named_parameters())
    moved = 0.0
    for name, value in first.items():
        steps = [dict(each.network_.named_parameters())[name] - value for each in alone]
        torch.testing.assert_close(together["network"][name] - value, (steps[0] + steps[1]) / 2, rtol=1e-4, atol=1e-6)
        moved = max(moved, float((steps[0] - steps[1]).detach().abs().max()))
    assert moved > 1e-3
    for name, value in alone[0].network_.named_buffers():  # batch statistics are the first process's
        torch.testing.assert_close(together["network"][name], value, rtol=1e-5, atol=1e-6)
    losses = [each.history_["loss"][0] for each in alone]
    assert together["history"]["loss"][0] == pytest.approx(sum(losses) / 2, rel=1e-6)


@pytest.mark.slow
def test_only_the_first_process_writes(ranks):
    folder, (first, _) = ranks
    for job in JOBS:
        assert [p.name for p in (folder / f"{job} 0").iterdir()] == ["checkpoint.safetensors"]
        assert not list((folder / f"{job} 1").iterdir())
    loaded = TTAME.load(folder / "paper 0" / "checkpoint.safetensors", zoo.small_cnn())
    assert torch.equal(loaded.maps(IMAGES), first["paper"]["maps"])


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_stops_both(ranks):
    for found in ranks[1]:
        assert "must be finite, but at step 2 loss" in found["error"]


@pytest.mark.slow
def test_an_interrupted_fit_resumes_to_the_same_bits(ranks):
    for found in ranks[1]:
        for name, value in found["short"]["network"].items():
            assert torch.equal(found["resumed"]["network"][name], value), name
        assert found["resumed"]["history"] == found["short"]["history"]
        assert torch.equal(found["resumed"]["counts"], found["short"]["counts"])


@pytest.mark.slow
def test_processes_that_start_at_different_steps_are_stopped(ranks):
    for found in ranks[1]:
        assert "must start at the same step, got 3, 0; give each of them the same checkpoint" in found["apart"]
