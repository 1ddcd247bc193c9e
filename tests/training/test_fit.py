"""``fit``: what it takes, what it records, what it leaves alone, and that an interruption changes no bit."""

from __future__ import annotations

import math
import random
import shutil
import signal
import threading
import warnings
from contextlib import nullcontext

import engine_cases as cases
import numpy as np
import pytest
import strategies as zoo
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from attrib_zoo import TTAME
from attrib_zoo.errors import CheckpointError, DataError, LayerError, OptionError, TrainingError
from attrib_zoo.masking import IMAGENET_MEAN as MEAN
from attrib_zoo.masking import IMAGENET_STD as STD
from attrib_zoo.masking import black, min_max, upsample
from attrib_zoo.methods.bases import trainable
from attrib_zoo.metrics import average_drop
from attrib_zoo.training.checkpoint import read
from attrib_zoo.training.data import Batches, images_of, total_steps
from attrib_zoo.training.history import History
from attrib_zoo.training.recipe import RECIPES
from attrib_zoo.training.schedule import Schedule, build

LIKE = torch.zeros(0)
IMAGES = zoo.batch(10)


class PlannedError(Exception):
    pass


class Images(Dataset):
    """Ten images, jittered by the global generator if asked; raises when so many have been read."""

    def __init__(self, ends_after=None, error=PlannedError, jitter=0.0, images=IMAGES):
        self.left, self.error, self.jitter, self.images = ends_after, error, jitter, images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if self.left is not None:
            if self.left == 0:
                raise self.error("planned")
            self.left -= 1
        return self.images[index] + self.jitter * torch.randn(3, 1, 1)


def state_of(explainer):
    return {
        **{k: v.tolist() for k, v in explainer.network_.state_dict().items()},
        "counts": explainer.class_counts_.tolist(),
        "steps": explainer.n_steps_,
        "schedule": explainer._fitted.schedule,
        "decisions": explainer._fitted.decisions,
        "history": explainer.history_.steps,
        "validation": explainer.history_.validation,
        "messages": explainer.history_.messages,
        "maps": explainer.maps(IMAGES).tolist(),
    }


def same(one, other):
    one, other = state_of(one), state_of(other)
    for name in one.keys() | other.keys():
        assert one[name] == other[name], name


# ---------------------------------------------------------------------- batches


@pytest.mark.parametrize(
    "batch",
    [
        IMAGES,
        (IMAGES, 0),
        [IMAGES],
        (IMAGES, "a", None),
        {"image": IMAGES, "label": 1},
        {"pixel_values": IMAGES},
        {"x": IMAGES},
    ],
)
def test_images_of_the_usual_batches(batch):
    assert images_of(batch) is IMAGES


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"picture": IMAGES, "label": 0}, r"a dict batch must hold its images .* got 'picture', 'label'"),
        ({}, "a dict batch must hold its images"),
        ((), "must be float images .* got tuple"),
        ("cat", "got str"),
        (IMAGES.numpy(), "got ndarray"),
        (IMAGES[0], r"got torch.float32 \(3, 16, 16\)"),
        ((torch.zeros(4, dtype=torch.long), IMAGES), r"got torch.int64 \(4,\)"),
        (IMAGES.to(torch.uint8), r"got torch.uint8 \(10, 3, 16, 16\); convert to tensors and standardise"),
        (IMAGES[:0], r"got torch.float32 \(0, 3, 16, 16\)"),
        ([IMAGES * float("nan")], "must be finite, got NaN or infinity"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_what_are_no_batches(batch, words):
    with pytest.raises(DataError, match=f"^loader: .*{words}"):
        images_of(batch)


@pytest.fixture(scope="module")
def earlier():
    explainer = zoo.fit(TTAME(zoo.small_cnn(), recipe="paper"), [IMAGES], max_steps=1)
    return explainer, state_of(explainer)


@pytest.mark.parametrize(
    ("loader", "options", "error", "words"),
    [
        ([], {}, DataError, r"loader: must yield at least one batch, got none; look at the folder"),
        (DataLoader(Images(images=IMAGES[:0])), {}, DataError, "at least one batch"),
        (iter([]), {"max_steps": 3}, DataError, "at least one batch"),
        (iter([IMAGES]), {}, OptionError, "max_steps: must be given for a loader without a length"),
        ([IMAGES, IMAGES[..., :8]], {}, DataError, r"the first batch had \(3, 16, 16\) and this one has \(3, 16, 8\)"),
        ([IMAGES, IMAGES[:, :1]], {}, DataError, r"one size; .* has \(1, 16, 16\)"),
        ([IMAGES, "cat"], {}, DataError, "got str"),
        ([IMAGES], {"epochs": 0}, OptionError, "epochs: must be a positive integer, got 0"),
        ([IMAGES], {"epochs": 1.5}, OptionError, "epochs: must be a positive integer, got 1.5"),
        ([IMAGES], {"max_steps": -1}, OptionError, "max_steps: must be a positive integer, got -1"),
        ([IMAGES], {"max_steps": True}, OptionError, "max_steps: must be a positive integer, got True"),
        ([IMAGES], {"lr": 0.0}, OptionError, "lr: must be positive, got 0"),
        ([IMAGES], {"lr": float("nan")}, OptionError, "lr: must be positive, got nan"),
        (
            [IMAGES],
            {"optimizer": "lion"},
            OptionError,
            "must be one of 'sgd', 'adam', 'adamw' or a function .* got 'lion'",
        ),
        ([IMAGES], {"schedule": "long"}, OptionError, "schedule: must be one of 'auto', 'paper', 'short', got 'long'"),
        ([IMAGES], {"precision": "fp8"}, OptionError, "must be one of None, 'bf16-mixed', 'fp16-mixed', got 'fp8'"),
        ([IMAGES], {"checkpoint_every": 0}, OptionError, "checkpoint_every: must be a positive integer, got 0"),
        (
            [IMAGES],
            {"checkpoint_dir": "/no/such/folder"},
            DataError,
            "must be a folder .* got /no/such/folder; make it",
        ),
        ([IMAGES], {"val_loader": []}, DataError, "val_loader: must yield at least one batch"),
        ([IMAGES], {"val_loader": iter([IMAGES])}, DataError, "val_loader: must be iterable more than once"),
        ([IMAGES], {"resume_from": "/no/such/file"}, CheckpointError, "got /no/such/file, which is not there"),
    ],
)
def test_what_cannot_be_fitted_leaves_an_earlier_fit_alone(earlier, loader, options, error, words):
    explainer, before = earlier
    with cases.untouched(explainer.model, IMAGES), pytest.raises(error, match=words):
        zoo.fit(explainer, loader, **{"epochs": 2, **options})
    assert state_of(explainer) == before


def test_the_number_of_steps():
    assert total_steps([IMAGES] * 5, 3, None) == 15
    assert total_steps([IMAGES] * 5, 3, 4) == 4
    assert total_steps(iter([IMAGES]), 3, 4) == 4


def test_batches_go_on_epoch_after_epoch_in_the_type_of_the_model():
    loader = [torch.full((1, 1, 1, 1), float(i)) for i in range(3)]
    batches = Batches(loader, 0, LIKE.double())
    assert batches.peek() == 0
    found = [next(batches) for _ in range(7)]
    assert [float(b) for b in found] == [0, 1, 2, 0, 1, 2, 0]
    assert {b.dtype for b in found} == {torch.float64}


class Counted(RandomSampler):
    """A sampler that is told the epoch, as the distributed one is."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.told = []

    def set_epoch(self, epoch):
        self.told.append(epoch)


LOADERS = {
    "a list": lambda data, own: data.images.split(3),
    "in order": lambda data, own: DataLoader(data, 3),
    "shuffled": lambda data, own: DataLoader(data, 3, shuffle=True),
    "own generator": lambda data, own: DataLoader(data, 3, shuffle=True, generator=own),
    "sampler's generator": lambda data, own: DataLoader(data, 3, sampler=RandomSampler(data, generator=own)),
    "told the epoch": lambda data, own: DataLoader(data, 3, sampler=Counted(data)),
}


def loader_of(kind, data, seed=41):
    """Another seed is the loader of another process, whose own generator is in another state."""
    return LOADERS[kind](data, torch.Generator().manual_seed(seed))


@settings(max_examples=60)
@given(st.sampled_from(sorted(LOADERS)), st.integers(0, 12), st.booleans(), st.booleans())
def test_batches_continue_anywhere_to_the_same_bits(kind, taken, peeked, jitter):
    data = Images(jitter=1.0 if jitter and kind != "a list" else 0.0)
    with torch.random.fork_rng(devices=[]):
        first = Batches(loader_of(kind, data), 7, LIKE)
        for _ in range(taken):
            next(first)
        if peeked:
            first.peek()
        tensors, facts = first.state()
        wanted = [next(first).clone() for _ in range(6)]
        torch.manual_seed(12345)
        second = Batches(loader_of(kind, data, 99), 7, LIKE)
        second.restore({k: v.clone() for k, v in tensors.items()}, facts)
        if peeked:
            second.peek()
        assert second.state()[1] == facts or taken % 4 == 0  # the end of one epoch is the start of the next
        for batch in wanted:
            assert torch.equal(next(second), batch)


def test_the_order_depends_on_seed_and_epoch():
    def order(seed, epochs=2):
        with torch.random.fork_rng(devices=[]):
            batches = Batches(DataLoader(Images(), 10, shuffle=True), seed, LIKE)
            return [next(batches) for _ in range(epochs)]

    assert torch.equal(order(1)[1], order(1)[1])
    assert not torch.equal(order(1)[0], order(1)[1])
    assert not torch.equal(order(1)[0], order(2)[0])
    sampler = Counted(Images())
    batches = Batches(DataLoader(Images(), 5, sampler=sampler), 0, LIKE)
    with torch.random.fork_rng(devices=[]):
        for _ in range(5):
            next(batches)
    assert sampler.told == [0, 1, 2]


# ---------------------------------------------------------------------- what a fit is


def test_equal_arguments_give_equal_bits_and_a_seed_another_fit():
    model = zoo.small_cnn()

    def run(**options):
        loader = DataLoader(Images(), 4, shuffle=True)
        return zoo.fit(TTAME(model, psi="random", recipe="paper"), loader, epochs=2, schedule="paper", **options)

    random.seed(1)
    first = run()
    torch.manual_seed(99)
    same(first, run())
    assert not torch.equal(first.network_.fuser.weight, run(seed=1).network_.fuser.weight)


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_the_model_comes_back_as_it_was_and_its_mode_does_not_matter(kind):
    """Dropout and BatchNorm in training mode, a gradient, a frozen parameter, a hook of the user's."""
    model = {"cnn": zoo.small_cnn, "vit": zoo.small_vit}[kind]()
    straight = zoo.fit(TTAME(model, recipe="paper"), [IMAGES], max_steps=3)
    model.train()
    next(m for m in model.modules() if isinstance(m, (nn.ReLU, nn.GELU))).eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.head.bias.requires_grad_(False)
    random.seed(3)
    np.random.seed(3)
    with cases.untouched(model, IMAGES):
        again = zoo.fit(TTAME(model, recipe="paper"), [IMAGES], max_steps=3)
    same(straight, again)


class Annotated(nn.Parameter):
    """A parameter of a class of the user's, which may hold more than its values: the model's own one is used."""


@pytest.mark.parametrize("fails", [False, True])
def test_a_parameter_of_an_unusual_class_is_frozen_for_the_fit_only(fails):
    model = zoo.small_cnn()
    weight = model.head.weight = Annotated(model.head.weight.detach())
    seen: list[bool] = []

    def note(_):
        seen.append(weight.requires_grad)
        if fails:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop") if fails else nullcontext():
        zoo.fit(TTAME(model, recipe="paper"), [IMAGES], max_steps=2, callbacks=[note])
    assert seen == [False] * (1 if fails else 2)
    assert model.head.weight is weight
    assert weight.requires_grad
    assert weight.grad is None


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_fit_works_in_any_gradient_mode(around):
    model = zoo.small_cnn()
    wanted = zoo.fit(TTAME(model, recipe="paper"), [IMAGES], max_steps=3)
    with around():
        images = IMAGES * 1  # an inference tensor, in inference mode
        found = zoo.fit(TTAME(model, recipe="paper"), [images], max_steps=3)
    same(found, wanted)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 6])
def test_a_model_that_fails_leaves_everything_as_it_was(number):
    model = zoo.small_cnn()
    explainer = zoo.fit(TTAME(model, recipe="paper"), [IMAGES], max_steps=1)
    explainer.maps(IMAGES)
    before = state_of(explainer)
    left = [number]

    def fail(*_):
        left[0] -= 1
        if left[0] == 0:
            raise PlannedError

    handle = model.head.register_forward_hook(fail)
    with cases.untouched(model), pytest.raises(PlannedError):
        zoo.fit(explainer, [IMAGES[:5], IMAGES[5:]], max_steps=4)
    handle.remove()
    assert state_of(explainer) == before


def test_a_second_fit_forgets_the_first():
    model = zoo.small_cnn()
    explainer = zoo.fit(TTAME(model, recipe="paper"), [zoo.batch(6, seed=44)], max_steps=5, val_loader=[IMAGES])
    zoo.fit(explainer, [IMAGES], max_steps=3)
    same(explainer, zoo.fit(TTAME(model, recipe="paper"), [IMAGES], max_steps=3))


def test_the_network_is_left_in_eval_mode_without_gradients():
    explainer = zoo.fit(TTAME(zoo.small_cnn(), recipe="paper"), [IMAGES], max_steps=2)
    assert not any(module.training for module in explainer.network_.modules())
    assert all(parameter.grad is None for parameter in explainer.network_.parameters())


def test_forward_arguments_reach_every_pass():
    model = zoo.small_cnn()
    seen = []
    handle = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1:]))
    found = zoo.fit(
        TTAME(model, recipe="paper"), [IMAGES], max_steps=2, val_loader=[IMAGES[:4]], additional_forward_args=0.5
    )
    handle.remove()
    assert set(seen) == {(0.5,)}

    class Halved(zoo.SmallCNN):
        def forward(self, x):
            return super().forward(x, 0.5)

    other = Halved().eval()
    other.load_state_dict(model.state_dict())
    wanted = zoo.fit(TTAME(other, recipe="paper"), [IMAGES], max_steps=2, val_loader=[IMAGES[:4]])
    assert found.history_.steps == wanted.history_.steps
    assert found.history_.validation == wanted.history_.validation


def test_another_thread_may_fit():
    model = zoo.small_cnn()
    found = []
    thread = threading.Thread(target=lambda: found.append(zoo.fit(TTAME(model, recipe="paper"), [IMAGES], max_steps=2)))
    thread.start()
    thread.join()
    same(found[0], zoo.fit(TTAME(model, recipe="paper"), [IMAGES], max_steps=2))


def test_nothing_is_learned_from_maps_of_one_cell():
    """Batch normalisation would have one value per channel in a last batch of one image."""
    model = zoo.small_cnn((4, 6, 8, 8, 8))  # 16 px end in 1x1
    assert (
        zoo.fit(TTAME(model, recipe="paper"), [IMAGES[:4], IMAGES[4:5]], epochs=1).network_.fuser.in_channels
        == 6 + 8 + 8
    )
    with pytest.raises(LayerError, match=r"layers: 'stages.4' has a map of one cell on these images"):
        zoo.fit(TTAME(model, "stages.4", recipe="paper"), [IMAGES[:4]], epochs=1)


# ---------------------------------------------------------------------- history


def test_history_has_every_step():
    explainer = zoo.fit(TTAME(zoo.small_cnn(), recipe="paper"), IMAGES.split(4), epochs=3, schedule="paper")
    history = explainer.history_
    assert explainer.n_steps_ == len(history) == 9
    assert set(history.steps) == {"loss", "ce", "area", "variation", "mask", "everything", "lr"}
    assert {len(values) for values in history.steps.values()} == {9}
    for loss, ce, area, variation in zip(*(history[k] for k in ("loss", "ce", "area", "variation")), strict=True):
        assert loss == pytest.approx(1.5 * ce + 2 * (area + 0.005 * variation), rel=1e-6)
    model = explainer.model
    with torch.no_grad():
        for step, images in enumerate(IMAGES.split(4)):  # the loss of showing everything
            out = model(images)
            ce = -out.log_softmax(1).amax(1).mean()
            assert history["everything"][step] == pytest.approx(1.5 * float(ce) + 2, rel=1e-5)
    decided = model(IMAGES).argmax(1).bincount(minlength=5)
    assert explainer.class_counts_.tolist() == (3 * decided).tolist()


def test_the_mean_of_the_last_share_of_the_steps():
    history = History({"loss": [float(i) for i in range(40)]})
    assert history.last("loss") == 37.5
    assert history.last("loss", 0.5) == 29.5
    assert history.last("loss", 1e-9) == 39
    assert len(History()) == 0


def test_the_report_in_full():
    explainer = zoo.fit(TTAME(zoo.small_cnn(), recipe="paper"), IMAGES.split(5), epochs=2, val_loader=[IMAGES])
    lines = explainer.report().splitlines()
    assert lines[0] == "TTAME for SmallCNN, layers stages.0, stages.1, stages.2"
    assert lines[1].split() == ["steps", "4", "(short", "schedule,", "adam,", "max", "lr", "0.1)"]
    seen = int((explainer.class_counts_ > 0).sum())
    assert lines[2].split() == f"images 20, classes seen {seen} of 5".split()
    assert lines[3].startswith("  last tenth   loss ")
    assert f"loss {explainer.history_['loss'][-1]:.3g}, ce {explainer.history_['ce'][-1]:.3g}" in lines[3]
    assert "lr" not in lines[3]
    assert lines[4].startswith("  validation   loss ")
    assert "AD(15)" in lines[4]
    assert "IC(100)" in lines[4]
    assert lines[5] == f"  warning      {explainer.history_.messages[0]}"
    assert len(lines) == 6
    assert repr(explainer).endswith(f"fitted: 4 steps, short schedule, masking raw, psi own, {seen} of 5 classes seen")


def test_a_progress_bar_with_the_parts_of_the_loss(capsys, monkeypatch):
    for name in ("COLUMNS", "LINES"):
        monkeypatch.setenv(name, "200")  # tqdm cuts the line off at the width of the terminal
    with pytest.warns(UserWarning, match="at least 30"):
        TTAME(zoo.small_cnn(), recipe="paper").fit([IMAGES], max_steps=3)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "3/3" in shown.err
    for part in ("loss=", "ce=", "area=", "variation=", "mask="):
        assert part in shown.err
    zoo.fit(TTAME(zoo.small_cnn(), recipe="paper"), [IMAGES], max_steps=1)
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------- advice


def advice(explainer, loader, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        explainer.fit(loader, show_progress=False, **options)
    messages = [str(w.message) for w in caught]
    assert explainer.history_.messages == messages
    assert {w.filename for w in caught} <= {__file__}
    return messages


def test_too_few_steps_are_said_with_what_to_pass():
    model = zoo.small_cnn()
    [short] = advice(TTAME(model, recipe="paper"), [IMAGES], max_steps=29)
    assert short.endswith(
        "'short' schedule needs at least 30 steps to train an explainer, got 29: raise max_steps or epochs"
    )
    [paper] = advice(TTAME(model, recipe="paper"), [IMAGES], max_steps=2, schedule="paper")
    assert paper.startswith("fit: the 'paper' schedule needs at least 20000 steps")
    assert paper.endswith("raise epochs, or pass schedule='short'")
    [released] = advice(TTAME(model, recipe="released"), [IMAGES], max_steps=2)
    assert released.startswith("fit: the 'released' schedule needs at least 20000 steps")
    assert released.endswith("raise epochs, or pass schedule='short'")


def test_a_fit_that_learned_nothing_says_so_and_is_kept():
    explainer = TTAME(zoo.small_cnn(), recipe="paper")
    [message] = advice(explainer, [IMAGES], max_steps=30, lr=1e-9)
    last = [sum(explainer.history_[k][-3:]) / 3 for k in ("loss", "everything")]
    assert last[0] >= last[1]
    assert f"({last[0]:.3g}) is not below that of showing the whole image ({last[1]:.3g})" in message
    strict = TTAME(zoo.small_cnn(), recipe="paper")
    with pytest.raises(UserWarning, match="not below"):  # warnings are errors here
        strict.fit([IMAGES], max_steps=30, lr=1e-9, show_progress=False)
    assert strict.is_fitted


def test_a_loader_that_ends_early_is_said():
    explainer = TTAME(zoo.small_cnn(), recipe="paper")
    messages = advice(explainer, iter(IMAGES.split(5)), max_steps=40)
    assert messages == [
        "fit: the loader ended after 2 of 40 steps and cannot start again; the learning rate has not come down: pass a "
        "loader that can be iterated more than once, or max_steps as it is"
    ]
    assert explainer.n_steps_ == 2


# ---------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("recipe", "schedule", "steps", "name"),
    [
        ("paper", "auto", 19_999, "short"),
        ("paper", "auto", 20_000, "paper"),
        ("paper", "paper", 40, "paper"),
        ("paper", "short", 20_000, "short"),
        ("released", "auto", 40, "released"),
        ("released", "auto", 20_000, "released"),
        ("released", "paper", 40, "released"),
        ("released", "short", 20_000, "short"),
    ],
)
def test_which_schedule(recipe, schedule, steps, name):
    explainer = TTAME(zoo.small_cnn(), recipe=recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the iterator ends early
        explainer.fit(iter([IMAGES]), max_steps=steps, schedule=schedule, show_progress=False)
    assert explainer.schedule_ == name
    assert f"{name} schedule" in repr(explainer)
    chosen = explainer._fitted.schedule
    if name != "short":
        assert (chosen.optimizer, chosen.lr, chosen.weight_decay) == ("sgd", 1e-3, 5e-4)
    else:
        assert (chosen.optimizer, chosen.weight_decay) == ("adam", 0)


def test_biases_are_not_decayed_and_all_else_is():
    model = nn.Module()
    model.branches = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    model.fuser = nn.Conv2d(2, 3, 1)
    schedule = Schedule("paper", "sgd", 0.5, weight_decay=5e-4, branch_lr=0.1)
    optimizer, _ = build(model, schedule, 10, None)
    decays = {id(p): (g["weight_decay"], g["max_lr"]) for g in optimizer.param_groups for p in g["params"]}
    assert len(decays) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        decay = 0 if name.endswith("bias") else 5e-4
        assert decays[id(parameter)] == (decay, 0.1 if name.startswith("branches") else 0.5), name
    assert (optimizer.defaults["nesterov"], optimizer.defaults["momentum"]) == (True, 0.9)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_one_pass_over_the_parameters_is_the_step_of_pytorchs_default(name):
    plain = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(301, 17, generator=generator)
    ours, theirs = (nn.ParameterList([nn.Parameter(first.clone())]) for _ in range(2))
    optimizer, cycle = build(ours, Schedule("paper", name, 1e-2, weight_decay=5e-4), 60, None)
    groups = [{k: v for k, v in g.items() if k in plain([torch.zeros(1)]).defaults} for g in optimizer.param_groups]
    default = plain([{**groups[0], "params": list(theirs), "fused": None}])
    for _ in range(60):
        grad = 1e-3 * torch.randn(first.shape, generator=generator)
        grad[torch.randint(301, (200,), generator=generator)] = 0  # rows that a batch does not touch
        for parameters, each in ((ours, optimizer), (theirs, default)):
            parameters[0].grad = grad.clone()
            each.step()
        cycle.step() if cycle.last_epoch < 59 else None
        for key in ("lr", "momentum", "betas"):
            if key in default.param_groups[0]:
                default.param_groups[0][key] = optimizer.param_groups[0][key]
    assert optimizer.param_groups[0]["fused"]
    assert not torch.equal(ours[0], first)
    assert torch.allclose(ours[0], theirs[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("schedule", ["short", "paper"])
def test_any_number_of_steps_has_a_cycle(steps, schedule):
    explainer = zoo.fit(TTAME(zoo.small_cnn(), recipe="paper"), [IMAGES[:2]], max_steps=steps, schedule=schedule)
    rates = explainer.history_["lr"]
    assert len(rates) == steps
    assert rates[0] == pytest.approx(explainer._fitted.schedule.lr / 25)
    if steps >= 4:
        assert rates[-1] == pytest.approx(rates[0] / 1e4)
        assert max(rates) > rates[0]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_named_optimisers(name):
    explainer = zoo.fit(TTAME(zoo.small_cnn(), recipe="paper"), [IMAGES], max_steps=2, optimizer=name, lr=1e-3)
    assert (explainer._fitted.schedule.optimizer, explainer._fitted.schedule.lr) == (name, 1e-3)


def test_an_optimiser_of_ones_own():
    seen = []

    def make(groups):
        groups = list(groups)
        seen.extend(parameter for group in groups for parameter in group["params"])
        return torch.optim.Adagrad(groups, lr=123.0)  # has neither momentum nor betas to cycle

    explainer = zoo.fit(TTAME(zoo.small_cnn(), recipe="paper"), [IMAGES], max_steps=6, optimizer=make, lr=0.01)
    assert len(seen) == len({id(p) for p in seen}) == 15  # 3 branches x 4, fuser x 2, common
    assert max(explainer.history_["lr"]) <= 0.01
    assert "custom" in explainer.report()


# ---------------------------------------------------------------------- precision


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16-mixed"])
def test_mixed_precision_is_for_the_models_passes_only(precision):
    model = zoo.small_cnn()
    seen = {"model": [], "head": []}
    handle = model.stages[1][0].register_forward_hook(lambda _, __, out: seen["model"].append(out.dtype))

    class Watched(TTAME):
        def build_network(self, *args):
            network = super().build_network(*args)
            network.branches[1].conv.register_forward_hook(lambda _, __, out: seen["head"].append(out.dtype))
            return network

    explainer = zoo.fit(
        Watched(model, recipe="paper"), [IMAGES], max_steps=3, precision=precision, val_loader=[IMAGES[:4]]
    )
    handle.remove()
    lower = torch.bfloat16 if precision == "bf16-mixed" else torch.float16
    assert lower in seen["model"]
    assert set(seen["head"]) == {torch.float32}
    full = zoo.fit(TTAME(model, recipe="paper"), [IMAGES], max_steps=3)
    assert explainer.history_["loss"] != full.history_["loss"]
    torch.testing.assert_close(explainer.history_["loss"][0], full.history_["loss"][0], rtol=0.05, atol=0)
    if precision == "bf16-mixed":
        assert explainer.history_["lr"] == full.history_["lr"]
    else:  # the first gradients, scaled by 2**16, overflow: the step is left out and the cycle waits for it
        assert explainer.history_["lr"][1] == explainer.history_["lr"][0]


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16-mixed"])
@pytest.mark.parametrize("masking", ["raw", "standardized"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_mixed_precision_in_all_recipes(recipe, masking, precision):
    images = zoo.normal(8, 3, 32, 32).float()
    model = cases.vit(global_pool="token") if recipe == "attended" else zoo.small_cnn()
    options = {"recipe": recipe, "masking": masking, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    plain = zoo.fit(TTAME(model, **options), [images], max_steps=1)
    torch.use_deterministic_algorithms(True)  # fills memory that nobody has written with nan
    try:
        mixed = zoo.fit(TTAME(model, **options), [images], max_steps=4, precision=precision)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(math.isfinite, mixed.history_["loss"]))
    torch.testing.assert_close(mixed.history_["loss"][0], plain.history_["loss"][0], rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_another_precision(dtype):
    model = zoo.small_cnn().to(dtype)
    explainer = zoo.fit(TTAME(model, recipe="paper"), [IMAGES], max_steps=2, val_loader=[IMAGES])
    assert explainer.network_.fuser.weight.dtype == (torch.float32 if dtype == torch.bfloat16 else torch.float64)
    assert explainer.attribute(IMAGES.to(dtype), 0).dtype == dtype
    assert all(map(math.isfinite, explainer.history_["loss"]))


# ---------------------------------------------------------------------- a loss that is not finite


def test_a_loss_that_is_not_finite_stops_at_the_last_good_step(tmp_path):
    model = zoo.small_cnn()
    spoilt = [IMAGES[:5], IMAGES[5:], 3e38 * IMAGES[:5].sign()]
    explainer = zoo.fit(TTAME(model, recipe="paper"), [IMAGES], max_steps=1)
    before = state_of(explainer)
    with pytest.raises(TrainingError, match=r"finite, but at step 3 loss, .* is not \(.*those of the step before"):
        zoo.fit(explainer, spoilt, max_steps=3, checkpoint_dir=tmp_path)
    assert state_of(explainer) == before
    saved = TTAME.load(tmp_path / "checkpoint.safetensors", model)
    straight = TTAME(model, recipe="paper")
    with pytest.raises(KeyboardInterrupt):
        zoo.fit(straight, Stopping(spoilt, 2), max_steps=3)
    assert torch.equal(saved.maps(IMAGES), straight.maps(IMAGES))
    assert saved.n_steps_ == 2


class Stopping:
    """A list of batches that raises after so many."""

    def __init__(self, batches, after, error=KeyboardInterrupt):
        self.batches, self.after, self.error = batches, after, error

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches:
            if self.after == 0:
                raise self.error
            self.after -= 1
            yield batch


# ---------------------------------------------------------------------- validation


def hand_confidence(explainer, images, keep):
    """AD and IC by the papers' formulas, image by image."""
    model, decided = explainer.model, explainer._fitted.decisions
    drops, rises = [], []
    for image in images.split(1):
        with torch.no_grad():
            before = model(image).softmax(1)[0]
            y = int(before.argmax())
            heat = upsample(min_max(explainer.maps(image)[:, y : y + 1]), image.shape[-2:])
            limit = torch.quantile(heat.flatten(), 1 - keep)
            mask = heat * (heat >= limit)
            colour = black(decided["mean"], decided["std"], image) if decided["masking"] == "raw" else 0 * image
            after = model(mask * image + (1 - mask) * colour).softmax(1)[0, y]
        drops.append(max(0.0, float(before[y] - after)) / float(before[y]))
        rises.append(float(after > before[y]))
    return 100 * sum(drops) / len(drops), 100 * sum(rises) / len(rises)


@pytest.mark.parametrize(
    "options", [{}, {"masking": "standardized"}, {"mean": (0.1, 0.9, 0.5), "std": (0.5, 0.2, 1.0)}]
)
def test_validation_measures_the_explainer_as_it_is(options):
    model = zoo.small_cnn()
    held_out = zoo.batch(7, seed=5)
    explainer = zoo.fit(
        TTAME(model, **options, recipe="paper"), [IMAGES], max_steps=6, val_loader=[(held_out[:4], 0), held_out[4:]]
    )
    found = explainer.history_.validation[-1]
    assert set(found) == {"step", "loss", *(f"{m}({k})" for m in ("AD", "IC") for k in (100, 50, 15))}
    for percent in (100, 50, 15):
        drop, rise = hand_confidence(explainer, held_out, percent / 100)
        assert found[f"AD({percent})"] == pytest.approx(drop, abs=1e-3)
        assert found[f"IC({percent})"] == pytest.approx(rise, abs=1e-3)


def test_validation_runs_after_each_epoch_and_once_at_the_end():
    model = zoo.small_cnn()
    validated = zoo.fit(TTAME(model, recipe="paper"), IMAGES.split(4), max_steps=8, val_loader=[IMAGES[:3]])
    assert [v["step"] for v in validated.history_.validation] == [3, 6, 8]
    whole = zoo.fit(TTAME(model, recipe="paper"), IMAGES.split(4), max_steps=6, val_loader=[IMAGES[:3]])
    assert [v["step"] for v in whole.history_.validation] == [3, 6]
    plain = zoo.fit(TTAME(model, recipe="paper"), IMAGES.split(4), max_steps=8)
    assert plain.history_.steps == validated.history_.steps  # validation changes nothing
    assert torch.equal(plain.maps(IMAGES), validated.maps(IMAGES))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_validation_of_one_logit_is_of_the_decided_side(score):
    single = zoo.OneValue(zoo.small_cnn(), column=True)
    explainer = zoo.fit(TTAME(single, recipe="paper", score=score), [IMAGES], max_steps=2, val_loader=[IMAGES])
    maps = TTAME.attribute(explainer, IMAGES)
    small = explainer.maps(IMAGES)[range(len(IMAGES)), (single(IMAGES)[:, 0] > 0).long()]
    torch.testing.assert_close(maps[:, 0], upsample(small[:, None], (16, 16))[:, 0], rtol=1e-4, atol=1e-5)
    last = explainer.history_.validation[-1]
    for keep in (100, 50, 15):
        drop = average_drop(single, IMAGES, small, keep=keep / 100, masking=black(MEAN, STD, IMAGES), score="sigmoid")
        assert last[f"AD({keep})"] == pytest.approx(100 * float(drop.mean()), rel=1e-4)


def test_a_multi_label_fit_keeps_the_class_s_own_probability():
    """With score='sigmoid' the loss is -log sigmoid of the decided logit of the masked image, whatever the others."""
    model = zoo.small_cnn()
    explainers = {s: TTAME(model, recipe="paper", psi="own", score=s) for s in ("softmax", "sigmoid")}
    fitted = {s: zoo.fit(explainer, [IMAGES], max_steps=1) for s, explainer in explainers.items()}
    with torch.no_grad():
        outputs = model(black(MEAN, STD, IMAGES).lerp(IMAGES, torch.full((1, 1, 1, 1), 0.5)))  # masks start at 0.5
        own = model(IMAGES).argmax(1, keepdim=True)
        wanted = {"softmax": outputs.log_softmax(1), "sigmoid": outputs.sigmoid().log()}
    for score, explainer in fitted.items():
        ce = -wanted[score].gather(1, own).mean()
        assert explainer.history_["ce"][0] == pytest.approx(float(ce), rel=1e-5)


def test_the_validation_loss_uses_running_statistics_and_the_masked_image():
    model = zoo.small_cnn()
    explainer = zoo.fit(TTAME(model, psi="own", recipe="paper"), [IMAGES], max_steps=5, val_loader=[IMAGES])
    with torch.no_grad():
        y = model(IMAGES).argmax(1)
        features, kept = [], []
        handles = [s.register_forward_hook(lambda _, __, out: kept.append(out.clone())) for s in model.stages]
        model(IMAGES)
        for handle in handles:
            handle.remove()
        features = kept
        own = explainer.network_.eval()(features, y[:, None])
        mask = upsample(own.sigmoid(), (16, 16))
        colour = black((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), IMAGES)
        ce = nn.functional.cross_entropy(model(mask * IMAGES + (1 - mask) * colour), y)
        e = own.sigmoid()
        change = e.diff(dim=2).square().sum((1, 2, 3)) + e.diff(dim=3).square().sum((1, 2, 3))
        wanted = 1.5 * ce + 2 * ((e**0.3).mean() + 0.005 * (change / (2 * 16 * 16)).mean())
    assert explainer.history_.validation[-1]["loss"] == pytest.approx(float(wanted), rel=1e-5)


# ---------------------------------------------------------------------- interruption


def run(loader, folder=None, *, model=None, **options):
    explainer = TTAME(model or zoo.small_cnn(), psi="random", recipe="paper")
    more = {} if folder is None else {"checkpoint_dir": folder}
    return explainer, {"loader": loader, "epochs": 3, **more, **options}


@pytest.mark.parametrize("error", [KeyboardInterrupt, PlannedError])
@pytest.mark.parametrize(
    ("kind", "ends_after"),
    [("shuffled", 3), ("shuffled", 20), ("own generator", 11), ("sampler's generator", 24), ("told the epoch", 16)],
)
def test_an_interrupted_fit_resumes_to_the_same_bits(kind, ends_after, error, tmp_path):
    """In the first epoch, in the second, at its end, in the third; the last batch of an epoch is a smaller one."""
    explainer, options = run(loader_of(kind, Images(jitter=0.1)))
    straight = zoo.fit(explainer, **options)
    explainer, options = run(loader_of(kind, Images(ends_after, error, jitter=0.1)), tmp_path, checkpoint_every=100)
    with pytest.raises(error):
        zoo.fit(explainer, **options)
    assert explainer.is_fitted == (error is KeyboardInterrupt)
    explainer, options = run(loader_of(kind, Images(jitter=0.1), 99), resume_from=tmp_path)
    same(zoo.fit(explainer, **options), straight)


def test_every_regular_checkpoint_resumes_to_the_same_bits(tmp_path, monkeypatch):
    """As after a power cut: what lies in the folder is whichever file was written last."""
    kept = []
    plain = trainable.write

    def write(path, checkpoint):
        plain(path, checkpoint)
        kept.append(shutil.copy(path, tmp_path / f"{len(kept)}.safetensors"))

    monkeypatch.setattr(trainable, "write", write)

    def loader():
        return DataLoader(Images(jitter=0.1), 3, shuffle=True)

    explainer, options = run(loader(), tmp_path, checkpoint_every=1, epochs=2, val_loader=[IMAGES[:4]])
    straight = zoo.fit(explainer, **options)
    monkeypatch.undo()
    assert len(kept) == 9
    for path in kept[::2]:
        explainer, options = run(loader(), resume_from=path, epochs=2, val_loader=[IMAGES[:4]])
        same(zoo.fit(explainer, **options), straight)


@pytest.mark.parametrize("ends_after", [2, 5, 11])
def test_an_interruption_of_the_validation_loses_nothing(ends_after, tmp_path):
    """After the first epoch, after the second, at the end: no step is taken twice, no measure is missing."""

    def go(folder=None, stop=None, **more):
        held_out = DataLoader(Images(stop, KeyboardInterrupt, images=IMAGES[:4]), 2)
        explainer, options = run(DataLoader(Images(), 3, shuffle=True), folder, val_loader=held_out, **more)
        return explainer, lambda: zoo.fit(explainer, **options)

    straight = go()[1]()
    interrupted, fit = go(tmp_path, ends_after)
    with pytest.raises(KeyboardInterrupt):
        fit()
    assert interrupted.n_steps_ == 4 * (1 + ends_after // 4)
    same(go(resume_from=tmp_path)[1](), straight)


@pytest.mark.parametrize("error", [KeyboardInterrupt, PlannedError])
@pytest.mark.parametrize("place", ["clean pass", "masked pass", "backward"])
def test_an_interruption_inside_a_step_leaves_no_trace_of_it(place, error, tmp_path):
    """The running statistics of the head move in the forward pass, before the step is complete."""
    model = zoo.small_cnn()
    passes = {"clean pass": 11, "masked pass": 12, "backward": 12}[place]  # two before the first step, two a step

    def fail(*_):
        raise error

    def hook(_, __, out):
        nonlocal passes
        passes -= 1
        if passes == 0:
            if place != "backward":
                fail()
            out.register_hook(fail)

    explainer, options = run(DataLoader(Images(), 3, shuffle=True), tmp_path, model=model)
    twin, others = run(DataLoader(Images(), 3, shuffle=True), model=model)
    straight = zoo.fit(twin, **others)
    handle = model.head.register_forward_hook(hook)
    with pytest.raises(error):
        zoo.fit(explainer, **options)
    handle.remove()
    file = TTAME.load(tmp_path / "checkpoint.safetensors", model)
    assert file.n_steps_ == 4
    resumed, others = run(DataLoader(Images(), 3, shuffle=True), model=model, resume_from=tmp_path)
    same(zoo.fit(resumed, **others), straight)
    if error is KeyboardInterrupt:
        same(explainer, file)


class Sluggish(torch.optim.SGD):
    """Ctrl-C arrives in the middle of its third step."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        if self.steps == 3:
            signal.raise_signal(signal.SIGINT)
        return super().step(closure)


def test_ctrl_c_in_the_middle_of_a_step_leaves_a_whole_one(tmp_path):
    def optimizer(groups, kind=torch.optim.SGD):
        return kind(groups, momentum=0.9)

    handler = signal.getsignal(signal.SIGINT)
    explainer, options = run(IMAGES.split(3), tmp_path, optimizer=lambda groups: optimizer(groups, Sluggish), lr=0.01)
    with pytest.raises(KeyboardInterrupt):
        zoo.fit(explainer, **options)
    assert signal.getsignal(signal.SIGINT) is handler
    assert explainer.n_steps_ == len(explainer.history_) == 3
    straight, options = run(IMAGES.split(3), optimizer=optimizer, lr=0.01)
    zoo.fit(straight, **options)
    resumed, options = run(IMAGES.split(3), resume_from=tmp_path, optimizer=optimizer, lr=0.01)
    same(zoo.fit(resumed, **options), straight)


@pytest.mark.parametrize("schedule", ["short", "paper"])
def test_ctrl_c_leaves_a_usable_explainer(schedule, tmp_path):
    """What was trained so far; without a checkpoint folder too; an earlier fit is replaced."""
    model = zoo.small_cnn()
    explainer = zoo.fit(TTAME(model, recipe="paper"), [zoo.batch(6, seed=8)], max_steps=2)
    with cases.untouched(model), pytest.raises(KeyboardInterrupt):
        zoo.fit(explainer, Stopping(IMAGES.split(5), 7), epochs=9, schedule=schedule)
    assert explainer.n_steps_ == len(explainer.history_) == 7
    assert int(explainer.class_counts_.sum()) == 35
    assert not explainer.network_.training
    explainer.save(tmp_path / "it.safetensors")
    same(TTAME.load(tmp_path / "it.safetensors", model), explainer)
    before_the_first = TTAME(model, recipe="paper")
    with pytest.raises(KeyboardInterrupt):
        zoo.fit(before_the_first, Stopping([IMAGES], 0), epochs=3)
    assert not before_the_first.is_fitted


def test_a_checkpoint_from_the_middle_explains(tmp_path):
    """Of a short fit, whose file holds a common row beside those of the classes."""
    model = zoo.small_cnn()
    explainer = TTAME(model, recipe="paper")
    with pytest.raises(KeyboardInterrupt):
        zoo.fit(explainer, Stopping(IMAGES.split(5), 5), epochs=9, checkpoint_dir=tmp_path)
    file = tmp_path / "checkpoint.safetensors"
    assert read(file).tensors["network/common"].abs().max() > 0
    loaded = TTAME.load(file, model)
    same(loaded, explainer)
    assert set(loaded.network_.state_dict()) == set(explainer.network_.state_dict())
    assert not any(name.endswith(("common", "scale")) for name in loaded.network_.state_dict())
    same(TTAME.load(loaded.save(tmp_path / "again.safetensors"), model), explainer)


def test_a_finished_fit_resumes_to_itself(tmp_path):
    explainer, options = run(IMAGES.split(5), tmp_path, val_loader=[IMAGES[:3]])
    finished = zoo.fit(explainer, **options)
    explainer, options = run(IMAGES.split(5), resume_from=tmp_path, val_loader=[IMAGES[:3]])
    same(zoo.fit(explainer, **options), finished)


def test_what_was_decided_from_the_first_batch_stays_decided(tmp_path):
    """Which classes Ψ takes follows from the size of the first batch; a resumed fit may begin with a smaller one."""
    model = zoo.OneValue(zoo.small_cnn(), column=False)
    loader = [IMAGES[:9], IMAGES[9:]]
    options = {"max_steps": 24, "schedule": "short"}  # 24 x 9 images for 2 classes are enough, 24 x 1 are few
    straight = zoo.fit(TTAME(model, recipe="paper"), loader, **options)
    assert straight._fitted.decisions["psi"] == "random"
    with pytest.raises(PlannedError):
        zoo.fit(TTAME(model, recipe="paper"), Stopping(loader, 1, PlannedError), checkpoint_dir=tmp_path, **options)
    same(zoo.fit(TTAME(model, recipe="paper"), loader, resume_from=tmp_path, **options), straight)


def test_a_disk_that_fills_up_stops_the_fit_and_leaves_the_last_file(tmp_path, monkeypatch):
    model = zoo.small_cnn()
    plain, calls = trainable.write, []

    def write(path, checkpoint):
        calls.append(path)
        if len(calls) > 1:
            raise DataError("no room")
        return plain(path, checkpoint)

    monkeypatch.setattr(trainable, "write", write)
    with pytest.raises(DataError, match="no room"):
        zoo.fit(TTAME(model, recipe="paper"), [IMAGES], max_steps=4, checkpoint_dir=tmp_path, checkpoint_every=1)
    assert TTAME.load(tmp_path / "checkpoint.safetensors", model).n_steps_ == 1


# ---------------------------------------------------------------------- resumed with something else


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model = zoo.small_cnn()
    with pytest.raises(PlannedError):
        zoo.fit(TTAME(model, recipe="paper"), Stopping([IMAGES] * 4, 2, PlannedError), epochs=1, checkpoint_dir=folder)
    return folder / "checkpoint.safetensors", model


@pytest.mark.parametrize(
    ("init", "options", "words"),
    [
        ({}, {"epochs": 2}, r"same arguments, got steps=8 \(was 4\)"),
        ({}, {"seed": 3}, r"seed=3 \(was 0\)"),
        ({}, {"schedule": "short"}, r"schedule='short' \(was 'auto'\)"),
        ({}, {"lr": 0.2}, r"lr=0.2 \(was None\)"),
        ({}, {"optimizer": "adam"}, r"optimizer='adam' \(was None\)"),
        ({}, {"optimizer": torch.optim.SGD}, r"optimizer='custom' \(was None\)"),
        ({}, {"precision": "bf16-mixed"}, r"precision='bf16-mixed' \(was None\)"),
        ({"lambda_ce": 3, "skip": False}, {}, r"skip=False \(was True\), lambda_ce=3.0 \(was 1.5\)"),
        ({"recipe": "auto", "psi": "own"}, {}, r"psi='own' \(was '"),
        (
            {"layers": ["stages.0", "stages.2"]},
            {},
            r"same layers, got \['stages.0', 'stages.2'\] \(was \['stages.0', 'stages.1'",
        ),
    ],
)
def test_a_fit_is_resumed_with_the_same_arguments_only(checkpoint, init, options, words):
    path, model = checkpoint
    explainer = TTAME(model, **{"recipe": "paper", **init})
    with cases.untouched(model), pytest.raises(CheckpointError, match=words):
        zoo.fit(explainer, [IMAGES] * 4, resume_from=path, **{"epochs": 1, **options})
    assert not explainer.is_fitted


def test_vision_transformers_are_not_resumed_on_other_blocks_of_the_same_width(tmp_path):
    model = zoo.small_vit()
    with pytest.raises(PlannedError):
        zoo.fit(
            TTAME(model, [-1], recipe="paper"),
            Stopping([IMAGES] * 4, 2, PlannedError),
            epochs=1,
            checkpoint_dir=tmp_path,
        )
    with pytest.raises(CheckpointError, match=r"same layers, got \['blocks.1'\] \(was \['blocks.2'\]\)"):
        zoo.fit(TTAME(model, [-2], recipe="paper"), [IMAGES] * 4, epochs=1, resume_from=tmp_path)


def test_a_fit_is_not_resumed_for_other_weights_or_from_another_file(checkpoint, tmp_path):
    path, model = checkpoint
    other = zoo.SmallCNN()
    with pytest.raises(CheckpointError, match=r"belongs to a SmallCNN with other weights; load those weights first"):
        zoo.fit(TTAME(other, recipe="paper"), [IMAGES] * 4, epochs=1, resume_from=path)
    saved = TTAME.load(path, model).save(tmp_path / "saved.safetensors")
    with pytest.raises(
        CheckpointError, match=r"must be a checkpoint that TTAME.fit wrote .* got a file of TTAME made by save"
    ):
        zoo.fit(TTAME(model, recipe="paper"), [IMAGES] * 4, epochs=1, resume_from=saved)
    with pytest.raises(CheckpointError, match=r"got .*checkpoint.safetensors, which is not there"):
        zoo.fit(TTAME(model, recipe="paper"), [IMAGES] * 4, epochs=1, resume_from=tmp_path)


# ---------------------------------------------------------------------- loaders without a length


class Stream(IterableDataset):
    def __iter__(self):
        yield from IMAGES


def test_a_stream_needs_the_number_of_steps_and_is_begun_again():
    model = zoo.small_cnn()
    stream = DataLoader(Stream(), 4)
    with pytest.raises(OptionError, match="max_steps: must be given"):
        zoo.fit(TTAME(model, recipe="paper"), stream)
    found = zoo.fit(TTAME(model, recipe="paper"), stream, max_steps=7)
    same(found, zoo.fit(TTAME(model, recipe="paper"), IMAGES.split(4), max_steps=7))
