"""T-TAME against the paper: training and maps next to a plain dense implementation written out here."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import strategies as zoo
import torch
import torch.nn.functional as F
from head_cases import close, dense_branch, dense_head
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attrib_zoo import TTAME, synthetic
from attrib_zoo.errors import LayerError, OptionError, TargetError, UnsupportedModelError
from attrib_zoo.methods import ttame
from attrib_zoo.methods.ttame import extra_classes
from attrib_zoo.metrics.confidence import average_drop, increase_in_confidence


def paper(model, layers=None, **options):
    """The method of the paper; ``test_rows.py`` has what starts from the classifier's rows."""
    return TTAME(model, layers, recipe="paper", **options)


# ---------------------------------------------------------------------- Ψ


def draw(classes, count, psi="random", seed=0):
    return extra_classes(torch.as_tensor(classes), count, psi, torch.Generator().manual_seed(seed))


@settings(max_examples=50)
@given(st.data(), zoo.SEEDS)
def test_psi_holds_the_own_class_once_and_distinct_others(data, seed):
    count = data.draw(st.integers(2, 9))
    classes = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=12))
    rows, own = draw(classes, count, seed=seed)
    assert rows.shape == (len(classes), min(len(classes), count))
    for row, column, y in zip(rows.tolist(), own.tolist(), classes, strict=True):
        assert row[column] == y
        assert len(set(row)) == len(row)
        assert all(0 <= k < count for k in row)


def test_the_other_classes_are_uniform():
    count, times = 7, 1000
    found = torch.zeros(count)
    generator = torch.Generator().manual_seed(1)
    for _ in range(times):
        rows, _ = extra_classes(torch.full((3,), 4), count, "random", generator)
        found += rows[0, 1:].bincount(minlength=count)
    assert found[4] == 0
    others = torch.cat([found[:4], found[5:]])
    expected = 2 * times / 6
    assert ((others - expected) ** 2 / expected).sum() < 20.5  # chi-square, 5 degrees of freedom, p = 0.001


def test_psi_differs_between_images_and_steps_and_repeats_with_the_seed():
    rows, _ = draw([0] * 8, 1000)
    assert len({tuple(row[1:]) for row in rows.tolist()}) == 8
    again, _ = draw([0] * 8, 1000)
    other, _ = draw([0] * 8, 1000, seed=1)
    assert torch.equal(rows, again)
    assert not torch.equal(rows, other)


def test_psi_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    draw([1, 2], 5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_psi_is_the_same_on_every_device():
    for psi in ("random", "batch", "own"):
        classes = torch.tensor([3, 1, 4, 1])
        here, there = (extra_classes(c, 9, psi, torch.Generator().manual_seed(5)) for c in (classes, classes.cuda()))
        for one, other in zip(here, there, strict=True):
            assert torch.equal(one, other.cpu())


def test_psi_of_the_batch_and_of_the_image_alone():
    rows, own = draw([3, 1, 3], 5, "batch")
    assert rows.tolist() == [[3, 1, 3]] * 3
    assert own.tolist() == [0, 1, 2]
    rows, own = draw([3, 1, 3], 5, "own")
    assert rows.tolist() == [[3], [1], [3]]
    assert own.tolist() == [0, 0, 0]


# ---------------------------------------------------------------------- training, written out


def hand_features(model, names, images):
    """Activations by plain hooks; patch tokens behind one class token become a square grid, row by row."""
    kept, handles = {}, []
    for name in names:
        layer = model.get_submodule(name)
        handles.append(layer.register_forward_hook(lambda _, __, out, name=name: kept.__setitem__(name, out.clone())))
    with torch.no_grad():
        out = model(images)
    for handle in handles:
        handle.remove()
    found = []
    for name in names:
        value = kept[name]
        if value.ndim == 3:
            side = math.isqrt(value.shape[1] - 1)
            grid = torch.zeros(len(value), value.shape[2], side, side, dtype=value.dtype)
            for token in range(side * side):
                grid[:, :, token // side, token % side] = value[:, 1 + token]
            value = grid
        found.append(value)
    return out, found


def one_cycle(step, total, peak):
    """Learning rate and momentum of PyTorch's OneCycle with the released numbers, from the formulas."""

    def cosine(start, end, share):
        return end + (start - end) * (1 + math.cos(math.pi * share)) / 2

    top, last = 0.3 * total - 1, total - 1
    if step <= top:
        return cosine(peak / 25, peak, step / top), cosine(0.95, 0.85, step / top)
    share = (step - top) / (last - top)
    return cosine(peak, peak / 25 / 1e4, share), cosine(0.85, 0.95, share)


class HandSGD:
    """Nesterov, weight decay on all but biases."""

    def __init__(self, decay):
        self.decay, self.momentum = decay, {}

    def step(self, name, value, gradient, lr, momentum):
        if not name.endswith("bias"):
            gradient = gradient + self.decay * value
        held = self.momentum.get(name)
        held = gradient.clone() if held is None else momentum * held + gradient
        self.momentum[name] = held
        value -= lr * (gradient + momentum * held)


class HandAdam:
    def __init__(self):
        self.moments, self.count = {}, {}

    def step(self, name, value, gradient, lr, beta1):
        first, second = self.moments.get(name, (torch.zeros_like(value), torch.zeros_like(value)))
        count = self.count[name] = self.count.get(name, 0) + 1
        first, second = beta1 * first + (1 - beta1) * gradient, 0.999 * second + 0.001 * gradient**2
        self.moments[name] = first, second
        value -= lr * (first / (1 - beta1**count)) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)


def hand_loss(model, images, features, state, rows, classes, recipe, baseline):
    """Eq. 11-17, or the released code's constants; dense head, all classes."""
    everything = dense_head(state, features, True)
    c = torch.stack([maps[row] for maps, row in zip(everything, rows, strict=True)])
    e = 1 / (1 + (-c).exp())
    own = torch.stack([1 / (1 + (-maps[y]).exp()) for maps, y in zip(everything, classes, strict=True)])[:, None]
    mask = F.interpolate(own, size=images.shape[-2:], mode="bilinear", align_corners=False)
    logits = model(mask * images + (1 - mask) * baseline)
    ce = (logits.exp().sum(1).log() - logits[range(len(images)), classes]).mean()
    dy, dx = e[:, :, 1:] - e[:, :, :-1], e[:, :, :, 1:] - e[:, :, :, :-1]
    if recipe == "paper":
        size = e[0].numel()
        area = (e**0.3).sum((1, 2, 3)) / size
        variation = ((dy**2).sum((1, 2, 3)) + (dx**2).sum((1, 2, 3))) / (2 * size)
        return 1.5 * ce + 2 * (area.mean() + 0.005 * variation.mean()), ce
    sides = [e[:, :, 0], e[:, :, -1], e[:, :, :, 0], e[:, :, :, -1]]
    border = sum((side**2).sum() for side in sides)
    total = ((dy**2).sum() + (dx**2).sum() + 0.3 * border) / (2 * len(images))
    return 1.5 * ce + 2 * ((e + 5e-4) ** 0.3).mean() + 0.01 * total, ce


def hand_fit(model, names, batches, state, psis, schedule, recipe, baseline):
    """Train the dense head; gives each step's loss and cross-entropy, and the final tensors."""
    state = {k: v.clone() for k, v in state.items()}
    trained = [k for k in state if "running" not in k and "num_batches" not in k]
    optimizer = HandAdam() if schedule == "short" else HandSGD(5e-4)
    if schedule == "short":  # a common row plus a row per class, in units of each layer's reach
        features = hand_features(model, names, batches[0])[1]
        reach = [float(dense_branch(state, i, x, True).abs().sum(1).mean()) for i, x in enumerate(features)]
        unit = torch.cat(
            [torch.full((x.shape[1],), 1 / a, dtype=torch.float64) for x, a in zip(features, reach, strict=True)]
        )
        state["fuser.weight"], state["fuser.bias"] = 0 * state["fuser.weight"], 0 * state["fuser.bias"]
        state["common"] = torch.zeros(len(unit) + 1, dtype=unit.dtype)
        trained.append("common")
    losses, rates, count = [], [], len(psis)

    def effective(values):
        if schedule != "short":
            return values
        weight = (values["fuser.weight"] + values["common"][:-1].view(1, -1, 1, 1)) * unit.view(1, -1, 1, 1)
        return {**values, "fuser.weight": weight, "fuser.bias": values["fuser.bias"] + values["common"][-1]}

    for step in range(count):
        images = batches[step % len(batches)]
        clean, features = hand_features(model, names, images)
        leaves = {k: v.detach().requires_grad_(k in trained) for k, v in state.items()}
        loss, ce = hand_loss(model, images, features, effective(leaves), psis[step], clean.argmax(1), recipe, baseline)
        gradients = torch.autograd.grad(loss, [leaves[k] for k in trained])
        with torch.no_grad():
            state = {k: v.detach().clone() for k, v in leaves.items()}
            for i, x in enumerate(features):  # running statistics
                conv = torch.einsum("oc,nchw->onhw", state[f"branches.{i}.conv.weight"][:, :, 0, 0], x).flatten(1)
                conv = conv + state[f"branches.{i}.conv.bias"][:, None]
                for name, now in (("running_mean", conv.mean(1)), ("running_var", conv.var(1))):
                    state[f"branches.{i}.norm.{name}"].mul_(0.9).add_(0.1 * now)
            for name, gradient in zip(trained, gradients, strict=True):
                peak = {"short": 1e-3 if name.startswith("branches") else 0.1}.get(schedule, 1e-3)
                lr, momentum = one_cycle(step, count, peak)
                optimizer.step(name, state[name], gradient, lr, momentum)
            rates.append(one_cycle(step, count, 0.1 if schedule == "short" else 1e-3)[0])
        losses.append((loss.item(), ce.item()))
    return losses, rates, {k: v for k, v in effective(state).items() if k != "common"}


class Watched(TTAME):
    """Keeps the network's first weights."""

    def build_network(self, *args):
        network = super().build_network(*args)
        self.first = {k: v.clone() for k, v in network.state_dict().items()}
        return network


RUNS = {
    "cnn": (zoo.small_cnn, ("stages.0", "stages.1", "stages.2"), 5, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "vit": (zoo.small_vit, ("blocks.0", "blocks.1", "blocks.2"), 4, None, None),
}


@pytest.mark.parametrize("recipe", ["paper", "released", "short"])
@pytest.mark.parametrize("kind", RUNS)
def test_training_is_that_of_the_dense_head_by_hand(kind, recipe, monkeypatch):
    build, names, steps, mean, std = RUNS[kind]
    model = build().double()
    batches = [zoo.batch(4, seed=s, dtype=torch.float64) for s in (3, 4)]
    psis = []

    def remembered(*args):
        psis.append(extra_classes(*args)[0])
        return extra_classes_again(psis[-1], args)

    def extra_classes_again(rows, args):
        own = torch.arange(len(rows)) if args[2] == "batch" else torch.zeros(len(rows), dtype=torch.long)
        return rows, own

    monkeypatch.setattr(ttame, "extra_classes", remembered)
    explainer = Watched(model, recipe="released" if recipe == "released" else "paper")
    zoo.fit(explainer, batches, max_steps=steps, schedule="short" if recipe == "short" else "paper")
    if recipe == "released" and kind == "vit":
        names = tuple(f"{name}.norm1" for name in names)
    baseline = 0.0
    if kind == "cnn":
        baseline = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float64).view(1, 3, 1, 1)
    first = {k: v.double() for k, v in explainer.first.items()}
    losses, rates, last = hand_fit(
        model, names, batches, first, psis, recipe, "released" if recipe == "released" else "paper", baseline
    )
    history = explainer.history_
    torch.testing.assert_close(history["loss"], [loss for loss, _ in losses], rtol=1e-7, atol=0)
    torch.testing.assert_close(history["ce"], [ce for _, ce in losses], rtol=1e-7, atol=0)
    torch.testing.assert_close(history["lr"], rates, rtol=1e-9, atol=0)
    found = explainer.network_.state_dict()
    assert found.keys() == last.keys()
    for name, value in last.items():
        if "num_batches" not in name:
            close(found[name].double(), value.double(), 1e-6)
    assert len(losses) == steps
    assert abs(losses[-1][0] - losses[0][0]) > 1e-3  # something was trained


def test_momentum_is_cycled_too():
    seen = []

    class Watching(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(self.param_groups[0]["momentum"])
            return super().step(closure)

    explainer = zoo.fit(
        paper(zoo.small_cnn()), [zoo.batch()], max_steps=10, schedule="paper", lr=0.01,
        optimizer=lambda groups: Watching(groups, momentum=0.9),
    )  # fmt: skip
    torch.testing.assert_close(seen, [one_cycle(s, 10, 0.01)[1] for s in range(10)], rtol=1e-9, atol=0)
    torch.testing.assert_close(
        explainer.history_["lr"], [one_cycle(s, 10, 0.01)[0] for s in range(10)], rtol=1e-9, atol=0
    )
    assert seen[0] == 0.95
    assert min(seen) == pytest.approx(0.85, abs=0.01)


# ---------------------------------------------------------------------- fitted explainers


@pytest.fixture(scope="module")
def cnn():
    model = zoo.small_cnn().double()
    return zoo.fit(paper(model), [zoo.batch(64, seed=9, dtype=torch.float64)], max_steps=8, lr=0.5)


@pytest.fixture(scope="module")
def vit():
    model = zoo.small_vit().double()
    return zoo.fit(paper(model), [zoo.batch(64, seed=9, dtype=torch.float64)], max_steps=8, lr=0.5)


@pytest.fixture(params=["cnn", "vit"])
def fitted(request):
    return request.getfixturevalue(request.param)


def names_of(explainer):
    return RUNS["vit" if hasattr(explainer.model, "blocks") else "cnn"][1]


def hand_maps(explainer, images):
    """Min-max of the dense head's logits in eval mode, ``(N, K, h, w)``."""
    _, features = hand_features(explainer.model, names_of(explainer), images)
    c = dense_head(explainer.network_.state_dict(), features, False).detach()
    low, high = c.flatten(2).min(2).values[..., None, None], c.flatten(2).max(2).values[..., None, None]
    return (c - low) / (high - low)


IMAGES = zoo.batch(5, seed=21, dtype=torch.float64)
TARGETS = [2, 0, 4, 4, 1]


# ---------------------------------------------------------------------- inference


def test_maps_are_min_max_first_and_bilinear_second(fitted):
    wanted = hand_maps(fitted, IMAGES)
    close(fitted.maps(IMAGES), wanted, 1e-10)
    chosen = wanted[range(5), TARGETS][:, None]
    grown = F.interpolate(chosen, size=(16, 16), mode="bilinear", align_corners=False)
    close(fitted.attribute(IMAGES, TARGETS), grown.expand(5, 3, 16, 16), 1e-10)
    close(fitted.attribute(IMAGES, 3)[:, :1], F.interpolate(wanted[:, 3:4], size=(16, 16), mode="bilinear"), 1e-10)


def test_many_targets_share_the_pass_and_give_the_same_maps(fitted):
    table = [[0, 3], [1, 1], [4, 2], [2, 0], [3, 4]]
    passes = count_passes(fitted.model)
    many = fitted.attribute_many(IMAGES, table)
    assert passes.stop() == 1
    for column in (0, 1):
        close(many[:, column], fitted.attribute(IMAGES, [row[column] for row in table]), 1e-12)


def test_every_image_gets_its_own_map(fitted):
    together = fitted.attribute(IMAGES, TARGETS)
    for i, target in enumerate(TARGETS):
        close(together[i : i + 1], fitted.attribute(IMAGES[i : i + 1], target), 1e-10)


class count_passes:
    def __init__(self, model):
        self.count = 0
        self.handle = model.register_forward_hook(self)

    def __call__(self, *_):
        self.count += 1

    def stop(self):
        self.handle.remove()
        return self.count


@pytest.mark.parametrize("target", [None, 1, TARGETS])
def test_one_pass_through_the_model_for_each_call(fitted, target):
    fitted.attribute(IMAGES, target)  # layers are found at the first call for a size
    passes = count_passes(fitted.model)
    fitted.attribute(IMAGES, target)
    assert passes.stop() == 1


def test_only_the_wanted_row_is_computed(fitted):
    before = fitted.attribute(IMAGES, 2)
    weight = fitted.network_.fuser.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[[0, 1, 3, 4]] = float("nan")
        assert torch.equal(fitted.attribute(IMAGES, 2), before)
        weight[2] += 1
        changed = fitted.attribute(IMAGES, 2)
        weight.copy_(kept)
    assert not torch.allclose(changed, before)


def test_layer_resolution(fitted):
    small = paper(fitted.model, upsample=False)
    small._fitted = fitted._fitted
    close(small.attribute(IMAGES, TARGETS), hand_maps(fitted, IMAGES)[range(5), TARGETS][:, None], 1e-10)


def test_constant_maps_are_zero(cnn):
    weight = cnn.network_.fuser.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[2] = 0
        found = cnn.attribute(IMAGES, [2, 1, 2, 2, 2])
        weight.copy_(kept)
    assert (found[[0, 2, 3, 4]] == 0).all()
    assert found[1].amax() > 0


def test_another_size_is_explained_by_the_same_head(cnn):
    images = F.interpolate(IMAGES, size=(24, 40), mode="bicubic")
    wanted = hand_maps(cnn, images)
    assert wanted.shape[-2:] == (24, 40)
    close(cnn.maps(images), wanted, 1e-10)


def test_the_head_keeps_its_precision_inside_autocast():
    model = zoo.small_cnn()
    explainer = zoo.fit(paper(model), [zoo.batch()], max_steps=3)
    seen = []
    handle = explainer.network_.branches[0].conv.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        found = explainer.attribute(IMAGES.float(), TARGETS)
        explainer.maps(IMAGES.float())
    handle.remove()
    assert len(seen) >= 2
    assert set(seen) == {torch.float32}
    assert found.dtype == torch.float32
    assert (found - explainer.attribute(IMAGES.float(), TARGETS)).abs().mean() < 0.1


# ---------------------------------------------------------------------- decisions and layers


def test_layers_and_masking_by_kind_of_model(cnn, vit):
    assert [name for name, _ in cnn._fitted.layers] == ["stages.0", "stages.1", "stages.2"]
    assert [name for name, _ in vit._fitted.layers] == ["blocks.0", "blocks.1", "blocks.2"]
    assert (cnn._fitted.decisions["masking"], vit._fitted.decisions["masking"]) == ("raw", "standardized")
    assert "masking raw" in repr(cnn)
    assert "masking standardized" in repr(vit)
    torch.testing.assert_close(cnn._fitted.decisions["mean"], [0.485, 0.456, 0.406])
    torch.testing.assert_close(vit._fitted.decisions["mean"], [0.5] * 3)  # its own default_cfg


@pytest.mark.parametrize("count", [1, 2])
def test_num_layers_leaves_the_earliest_out(count):
    for model, names in ((zoo.small_cnn(), RUNS["cnn"][1]), (zoo.small_vit(), RUNS["vit"][1])):
        explainer = paper(model, num_layers=count)
        assert tuple(tap.name for tap in explainer.taps(zoo.batch(2))) == names[-count:]


def test_the_released_recipe_reads_the_norms_of_vision_transformers():
    taps = TTAME(zoo.small_vit(), recipe="released").taps(zoo.batch(2))
    assert [tap.name for tap in taps] == [f"blocks.{i}.norm1" for i in range(3)]
    taps = TTAME(zoo.small_cnn(), recipe="released").taps(zoo.batch(2))
    assert [tap.name for tap in taps] == ["stages.0", "stages.1", "stages.2"]


def test_the_order_in_which_layers_are_listed_does_not_matter():
    model, loader = zoo.small_cnn(), [zoo.batch()]
    one, other = (
        zoo.fit(paper(model, layers), loader, max_steps=3)
        for layers in (["stages.2", "stages.0"], ["stages.0", "stages.2"])
    )
    assert torch.equal(one.attribute(loader[0]), other.attribute(loader[0]))


@pytest.mark.parametrize(
    ("rule", "mean", "std"), [("raw", None, None), ("standardized", None, None), ("raw", (0.1, 0.2, 0.3), (1, 2, 3))]
)
def test_what_the_model_is_shown(rule, mean, std):
    """The masked pass sees the mask of the own class over black, or over the mean colour."""
    model = zoo.small_cnn().double()
    images = zoo.batch(4, dtype=torch.float64)
    seen = []
    explainer = Watched(model, masking=rule, mean=mean, std=std, recipe="paper")
    handle = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    zoo.fit(explainer, [images], max_steps=1, schedule="paper")
    handle.remove()
    first = {k: v.double() for k, v in explainer.first.items()}
    clean, features = hand_features(model, RUNS["cnn"][1], images)
    own = dense_head(first, features, True).sigmoid()[range(4), clean.argmax(1)][:, None]
    mask = F.interpolate(own, size=(16, 16), mode="bilinear")
    mean, std = mean or (0.485, 0.456, 0.406), std or (0.229, 0.224, 0.225)
    mu, sigma = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (mean, std))
    raw = images * sigma + mu
    wanted = (mask * raw - mu) / sigma if rule == "raw" else mask * images
    close(seen[-1], wanted, 1e-7)
    assert not torch.allclose(seen[-1], images)
    assert explainer._fitted.decisions["masking"] == rule


def test_statistics_must_fit_the_channels():
    explainer = paper(zoo.small_cnn(channels=1), mean=(0.5, 0.5), std=(1, 1))
    with pytest.raises(
        OptionError, match=r"mean, std: must have one value for each of the 1 channels, got \(0.5, 0.5\)"
    ):
        zoo.fit(explainer, [zoo.batch(channels=1)], max_steps=1)
    grey = zoo.fit(paper(zoo.small_cnn(channels=1)), [zoo.batch(channels=1)], max_steps=1)
    assert grey._fitted.decisions["mean"] == [0.5]


# ---------------------------------------------------------------------- options


def test_recipes_are_the_table_of_constants():
    model = zoo.small_cnn()
    names = ("variation", "border_penalty", "area_offset", "psi")

    def values(explainer):
        return [getattr(explainer.recipe, name) for name in names]

    ours, released = paper(model), TTAME(model, recipe="released")
    assert values(ours) == ["mean", 0, 0, "auto"]
    assert values(released) == ["sum", 0.3, 5e-4, "batch"]
    for recipe in (ours.recipe, released.recipe):
        assert (recipe.lambda_ce, recipe.lambda_tv, recipe.lambda_variation, recipe.area_power) == (1.5, 2, 0.005, 0.3)
    assert values(TTAME(model, recipe="released", psi="own", border_penalty=0)) == ["sum", 0, 5e-4, "own"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recipe": "papers"}, r"recipe: must be one of 'auto', 'rows', 'attended', 'paper', 'released', got 'papers'"),
        ({"variation": "median"}, "variation: must be one of 'mean', 'sum'"),
        ({"variation": ""}, "variation: must be one of"),
        ({"psi": "max"}, "psi: must be one of 'auto', 'random', 'batch', 'own'"),
        ({"num_layers": 0}, "num_layers: must be a positive integer, got 0"),
        ({"branch_activation": "gelu"}, "branch_activation: must be one of 'relu', 'sigmoid'"),
        ({"masking": "black"}, "masking: must be one of 'auto', 'raw', 'standardized'"),
        ({"lambda_ce": -1}, "lambda_ce: must be a number of at least 0, got -1"),
        ({"lambda_tv": float("nan")}, "lambda_tv: must be a number"),
        ({"lambda_variation": "0.1"}, "lambda_variation: must be a number"),
        ({"area_power": 0}, "area_power: must be a number of at least 1e-06"),
        ({"border_penalty": True}, "border_penalty: must be a number"),
        ({"area_offset": -1e-3}, "area_offset: must be a number"),
        ({"mean": (0.5,)}, "mean, std: must be given both or neither"),
        ({"mean": (0.5,), "std": (0,)}, r"std: must be positive, got \[0.0\]"),
        ({"mean": 0.5, "std": (1,)}, "mean: must be a number for each channel, got 0.5"),
        ({"mean": "ab", "std": (1,)}, "mean: must be a number for each channel"),
    ],
)
def test_options_outside_their_range(options, words):
    with pytest.raises(OptionError, match=words):
        TTAME(zoo.small_cnn(), **{"recipe": "paper", **options})


def test_options_are_json_and_make_the_same_explainer():
    model = zoo.small_cnn()
    first = TTAME(model, recipe="released", mean=(0.1, 0.2, 0.3), std=(1, 1, 1), skip=False, score="sigmoid")
    again = TTAME(model, **json.loads(json.dumps(first.options())))
    assert again.score == "sigmoid"
    assert again.options() == first.options()


@pytest.mark.parametrize(
    "options",
    [{"skip": False}, {"skip": False, "batch_norm": False}, {"branch_activation": "sigmoid"}, {"num_layers": 1}],
)
def test_the_variants_of_table_6_train_and_explain(options):
    model = zoo.small_cnn().double()
    explainer = zoo.fit(paper(model, **options), [zoo.batch(dtype=torch.float64)], max_steps=5, lr=0.5)
    names = RUNS["cnn"][1][-options.get("num_layers", 3) :]
    _, features = hand_features(model, names, IMAGES)
    branch = {"skip": options.get("skip", True), "activation": options.get("branch_activation", "relu")}
    c = dense_head(explainer.network_.state_dict(), features, False, **branch).detach()[:, 1:2]
    low, high = c.amin((2, 3), keepdim=True), c.amax((2, 3), keepdim=True)
    small = F.interpolate((c - low) / (high - low), size=(16, 16), mode="bilinear")
    close(explainer.attribute(IMAGES, 1)[:, :1], small, 1e-10)


# ---------------------------------------------------------------------- models with one value per image


@pytest.mark.parametrize("column", [False, True], ids=["(N,)", "(N, 1)"])
def test_one_value_per_image_is_the_two_logits_zero_and_z(column):
    """The same fit as for a model that outputs (0, z): two classes, and None follows the sign."""
    inner = zoo.small_cnn()

    class TwoLogits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = inner

        def forward(self, x):
            out = self.model(x)
            z = out[:, 1] - out[:, 0]
            return torch.stack([torch.zeros_like(z), z], 1)

    images = zoo.batch(8)
    single = zoo.OneValue(inner, column=column)
    one, two = (zoo.fit(paper(model), [images], max_steps=4) for model in (single, TwoLogits()))
    z = single(images).detach().reshape(-1)
    assert one.class_counts_.tolist() == [4 * int((z <= 0).sum()), 4 * int((z > 0).sum())]
    assert one.history_["loss"] == two.history_["loss"]
    assert len(set((z > 0).tolist())) == 2
    for target in (None, 0, 1):
        assert torch.equal(one.attribute(images, target), two.attribute(images, target))
    assert torch.equal(one.maps(images), two.maps(images))
    assert one.maps(images).shape[1] == 2
    with pytest.raises(TargetError):
        one.attribute(images, 2)


def test_outputs_with_more_axes_are_refused():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = zoo.small_cnn().stages

        def forward(self, x):
            return self.stages(x)

    with pytest.raises(
        UnsupportedModelError, match=r"must return \(N, K\) logits to fit an explainer, got shape \(8, 8, 4, 4\)"
    ):
        zoo.fit(paper(Dense(), "stages.1"), [zoo.batch()], max_steps=1)


# ---------------------------------------------------------------------- a model that has changed


def test_changed_models_are_refused():
    images = zoo.batch()
    explainer = zoo.fit(paper(zoo.small_cnn()), [images], max_steps=1)
    head = explainer.model.head
    explainer.model.head = nn.Linear(8, 7)
    for call in (lambda: explainer.attribute(images, 0), lambda: explainer.maps(images)):
        with pytest.raises(
            UnsupportedModelError, match=r"must have the 5 classes that TTAME was fitted for, got 7; fit again"
        ):
            call()
    explainer.model.head = head
    explainer.model.stages[1] = nn.Conv2d(4, 9, 3, 2, 1)
    explainer.model.stages[2] = nn.Conv2d(9, 8, 3, 2, 1)
    for size in (16, 24):  # a size whose layers are known, and another
        with pytest.raises(LayerError, match=r"must have \(4, 6, 8\) channels as in fit, got \(4, 9, 8\); fit again"):
            explainer.attribute(torch.randn(2, 3, size, size), 0)


# ---------------------------------------------------------------------- classes that never came up


def only(model, classes):
    """The same model, that never decides for other classes."""
    with torch.no_grad():
        model.head.bias[[k for k in range(5) if k not in classes]] -= 1e4
    return model


def test_unseen_classes_are_counted_and_said_once():
    images = zoo.batch(16)
    explainer = zoo.fit(paper(only(zoo.small_cnn(), (0, 2, 3))), [images], max_steps=2)
    decided = explainer.model(images).argmax(1).bincount(minlength=5)
    assert explainer.class_counts_.tolist() == (2 * decided).tolist()
    assert [k for k in range(5) if decided[k] == 0] == [1, 4]
    explainer.attribute(images)
    explainer.attribute(images, 2)
    explainer.maps(images)
    with pytest.warns(UserWarning, match=r"TTAME: class 1, 4 never came up in fit, so its map is untrained") as caught:
        explainer.attribute(images, [1, 4] * 8)
    assert caught[0].filename == __file__
    explainer.attribute(images, 1)
    assert "3 of 5 classes seen" in repr(explainer)
    assert "images       32, classes seen 3 of 5" in explainer.report()


@pytest.mark.parametrize("psi", ["own", "batch", "auto"])
def test_an_unseen_class_gets_the_common_map(psi):
    """Its own row never left zero, so the folded row is the common one, which every image trained."""
    images = zoo.batch(16)
    explainer = zoo.fit(paper(only(zoo.small_cnn(), (0, 2, 3)), psi=psi), [images], max_steps=6)
    weight, bias = explainer.network_.fuser.weight, explainer.network_.fuser.bias
    assert torch.equal(weight[1], weight[4])
    assert bias[1] == bias[4]
    assert weight[1].abs().max() > 0
    assert not torch.allclose(weight[0], weight[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = explainer.attribute(images, 1)
    assert torch.equal(found, explainer.attribute(images, 4))
    assert found.amax() > 0


# ---------------------------------------------------------------------- it learns


@pytest.fixture(scope="module")
def learned():
    """A classifier that has seen black regions, two explainers for it, and scenes that neither has seen."""
    model = synthetic.trained("cnn", size=16)
    images = synthetic.scenes(192, size=16, seed=3).inputs.split(16)
    fitted = paper(model).fit(images, max_steps=100, show_progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        untrained = zoo.fit(paper(model), images, max_steps=1, schedule="paper", lr=1e-12)
    fresh = synthetic.scenes(96, size=16, seed=77)
    return fitted, untrained, fresh.rows(synthetic.recognised(model, fresh))


def test_after_a_short_fit_the_loss_is_below_that_of_showing_everything(learned):
    history = learned[0].history_
    assert history.messages == []
    assert history.last("loss") < 0.6 * history.last("everything")
    assert history.last("mask") < 0.5
    assert history.last("everything") < 3.5


def test_after_a_short_fit_confidence_rises_more_often_than_before(learned):
    fitted, untrained, fresh = learned
    measures = []
    for explainer in (fitted, untrained):
        heat = explainer.attribute(fresh.inputs)
        call = {"keep": 0.15, "target": None}
        drop = average_drop(explainer.model, fresh.inputs, heat, **call).mean()
        rise = increase_in_confidence(explainer.model, fresh.inputs, heat, **call).mean()
        measures.append((float(drop), float(rise)))
    (drop, rise), (drop_before, rise_before) = measures
    assert rise > rise_before + 0.05
    assert drop < drop_before - 0.05


def test_after_a_short_fit_the_brightest_pixels_lie_on_the_object_asked_for(learned):
    """Two objects are in each scene, and the map goes with the question."""
    fitted, _, fresh = learned
    for which in (0, 1):
        heat = fitted.attribute(fresh.inputs, fresh.labels[:, which])[:, 0]
        limit = torch.quantile(heat.flatten(1), 0.85, dim=1)[:, None, None]
        top = heat >= limit
        inside, beside = ((top & fresh.masks[:, i]).sum((1, 2)) / top.sum((1, 2)) for i in (which, 1 - which))
        share = fresh.masks[:, which].float().mean()
        assert inside.mean() > 2 * share
        assert inside.mean() > 2 * beside.mean()


def test_another_head_or_another_network_gives_another_map(learned):
    """The sanity check of Fig. 17: what was learned, by the head and by the model, is in the map."""
    fitted, untrained, fresh = learned
    images = fresh.inputs[:16]
    before = fitted.attribute(images, 1)[:, 0].flatten(1)
    model = synthetic.trained("cnn", size=16)
    other = paper(model)
    other._fitted = fitted._fitted
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.normal_(0, float(module.weight.std()), generator=generator)
    for changed in (untrained, other):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            after = changed.attribute(images, 1)[:, 0].flatten(1)
        ranks = [torch.stack([row.argsort().argsort() for row in heat]).double() for heat in (before, after)]
        correlation = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(*ranks, strict=True)]
        assert sum(correlation) / len(correlation) < 0.5
