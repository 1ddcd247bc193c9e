"""The attention head against the dense computation: upsample every branch, concatenate, fuse all classes (Eq. 8-10)."""

from __future__ import annotations

import math

import pytest
import strategies as zoo
import torch
from head_cases import close, dense_branch, dense_head, mean_of_alike
from hypothesis import given, settings
from hypothesis import strategies as st

from attrib_zoo.errors import LayerError
from attrib_zoo.training import head as _attention_head
from attrib_zoo.training.head import AttentionHead
from attrib_zoo.training.maps import begun, head_maps


def head(channels, classes, seed=0, dtype=torch.float64, **options):
    """A head with lively norms."""
    made = AttentionHead(channels, classes, generator=torch.Generator().manual_seed(seed), **options).to(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for branch in made.branches:
            if branch.norm is not None:
                branch.norm.weight.uniform_(0.5, 1.5, generator=generator)
                branch.norm.bias.uniform_(-0.5, 0.5, generator=generator)
                branch.norm.running_mean.uniform_(-0.5, 0.5, generator=generator)
                branch.norm.running_var.uniform_(0.5, 2, generator=generator)
    return made


def leaves(made):
    """A state dict whose parameters ask for gradients and are not the head's own."""
    trained = dict(made.named_parameters())
    return {k: v.detach().clone().requires_grad_(k in trained) for k, v in made.state_dict().items()}


def compare(made, features, rows, training, tolerance, gradient_tolerance, **options):
    """Logits, gradients of every parameter and of the features, at random weights on the logits."""
    made.train(training)
    state = leaves(made)
    mine = [x.clone().requires_grad_() for x in features]
    theirs = [x.clone().requires_grad_() for x in features]
    found = made(mine, rows)
    everything = dense_head(state, theirs, training, **options)
    wanted = everything if rows is None else torch.stack([maps[r] for maps, r in zip(everything, rows, strict=True)])
    close(found, wanted, tolerance)
    weights = zoo.normal(*found.shape, seed=99, dtype=found.dtype)
    named = dict(made.named_parameters())
    ours = torch.autograd.grad((found * weights).sum(), [*mine, *named.values()])
    reference = torch.autograd.grad((wanted * weights).sum(), [*theirs, *(state[name] for name in named)])
    for one, other in zip(ours, reference, strict=True):
        close(one, other, gradient_tolerance)
    return dict(zip(named, ours[len(mine) :], strict=True))


SIZES = {
    "powers of two": ((3, 8, 8), (5, 4, 4), (2, 2, 2)),
    "not square": ((3, 6, 9), (5, 3, 5), (2, 2, 3)),
    "no whole ratio": ((3, 5, 7), (2, 7, 4), (4, 3, 3)),
    "the largest last": ((2, 3, 2), (3, 4, 4)),
    "tokens": ((4, 3, 5), (4, 3, 5), (4, 3, 5)),
    "one layer": ((6, 4, 3),),
}
ROWS = torch.tensor([[3, 16, 0, 3, 7], [1, 2, 4, 4, 4]])  # with duplicates


# ---------------------------------------------------------------------- fusion


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("shapes", SIZES.values(), ids=SIZES.keys())
def test_selected_rows_are_those_of_the_dense_head(shapes, training):
    features = [zoo.normal(2, *shape, seed=i) for i, shape in enumerate(shapes)]
    made = head([x.shape[1] for x in features], 17)
    gradients = compare(made, features, ROWS, training, 1e-12, 1e-11)
    unselected = [k for k in range(17) if k not in ROWS]
    assert gradients["fuser.weight"][unselected].abs().sum() == 0
    assert gradients["fuser.bias"][unselected].abs().sum() == 0
    assert (gradients["fuser.weight"][ROWS.unique()].flatten(1).abs().sum(1) > 0).all()
    assert gradients["fuser.weight"].layout == torch.strided  # dense, so that momentum and decay act on every row


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("shapes", SIZES.values(), ids=SIZES.keys())
def test_all_rows_are_those_of_the_dense_head(shapes, training):
    features = [zoo.normal(2, *shape, seed=i) for i, shape in enumerate(shapes)]
    compare(head([x.shape[1] for x in features], 7), features, None, training, 1e-12, 1e-11)


@pytest.mark.parametrize("shapes", SIZES.values(), ids=SIZES.keys())
def test_maps_are_averaged_over_cells_that_the_finest_layers_find_alike(shapes):
    features = [zoo.normal(2, *shape, seed=i) for i, shape in enumerate(shapes)]
    channels = [x.shape[1] for x in features]
    plain, filtered = head(channels, 17).eval(), head(channels, 17, alike=3).eval()
    size = [max(x.shape[axis] for x in features) for axis in (2, 3)]
    finest = [x for x in features if list(x.shape[2:]) == size]
    if not finest:
        with pytest.raises(LayerError, match="one of the layers must have the finest grid in both directions"):
            filtered(features)
        return
    wanted = mean_of_alike(plain(features), finest, 3)
    close(filtered(features), wanted, 1e-12)
    close(filtered(features, ROWS), torch.stack([maps[r] for maps, r in zip(wanted, ROWS, strict=True)]), 1e-12)
    close(head_maps(*begun(filtered, features), ROWS[:1].expand(2, -1)), wanted[:, ROWS[0]], 1e-12)


@settings(max_examples=20)
@given(zoo.features(), st.data())
def test_any_features_and_rows(features, data):
    classes = data.draw(st.integers(2, 5))
    one = st.lists(st.integers(0, classes - 1), min_size=3, max_size=3)
    rows = torch.tensor([data.draw(one) for _ in features[0]])
    compare(head([x.shape[1] for x in features], classes), features, rows, False, 1e-12, 1e-11)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_float32(training):
    features = [zoo.normal(2, *shape, seed=i, dtype=torch.float32) for i, shape in enumerate(SIZES["not square"])]
    made = head([3, 5, 2], 17, dtype=torch.float32)
    close(
        made.train(training)(features, ROWS).detach(),
        take(dense_head(leaves(made), features, training), ROWS).detach(),
        5e-6,
    )


def take(everything, rows):
    return torch.stack([maps[r] for maps, r in zip(everything, rows, strict=True)])


@pytest.mark.parametrize("shared", [False, True], ids=["own rows", "common row"])
def test_a_batch_in_parts_is_the_whole(monkeypatch, shared):
    """Where the gathered rows would take too much memory, the batch is cut and the rows are gathered anew."""
    features = [zoo.normal(5, *shape, seed=i) for i, shape in enumerate(SIZES["not square"])]
    rows = torch.tensor([[0, 3], [1, 1], [2, 6], [6, 5], [4, 0]])
    made = head([3, 5, 2], 7)
    if shared:
        made.share_rows([1.0, 2.0, 3.0])
        stir(made)
    made.train()
    whole = made(features, rows)
    gradients = torch.autograd.grad(whole.square().sum(), list(made.parameters()))
    for at_once in (1, 2, 4):
        monkeypatch.setattr(_attention_head, "_GATHER_BYTES", at_once * rows.shape[1] * 10 * 8)
        with torch.no_grad():
            assert torch.equal(made.train()(features, rows), whole)
        parts = made(features, rows)
        assert torch.equal(parts, whole)
        for one, other in zip(
            torch.autograd.grad(parts.square().sum(), list(made.parameters())), gradients, strict=True
        ):
            close(one, other, 1e-13)


# ---------------------------------------------------------------------- batch normalisation


def test_running_statistics_after_one_step():
    features = [zoo.normal(3, 3, 6, 9), zoo.normal(3, 5, 3, 5, seed=1)]
    made = head([3, 5], 4)
    before = {k: v.clone() for k, v in made.state_dict().items()}
    made.train()(features, torch.zeros(3, 1, dtype=torch.long))
    for i, x in enumerate(features):  # at each layer's own resolution
        conv = torch.einsum("oc,nchw->nohw", before[f"branches.{i}.conv.weight"][:, :, 0, 0], x)
        conv = (conv + before[f"branches.{i}.conv.bias"].view(1, -1, 1, 1)).transpose(0, 1).flatten(1)
        unbiased = (conv - conv.mean(1, keepdim=True)).square().sum(1) / (conv.shape[1] - 1)
        norm = made.branches[i].norm
        close(norm.running_mean, 0.9 * before[f"branches.{i}.norm.running_mean"] + 0.1 * conv.mean(1), 1e-12)
        close(norm.running_var, 0.9 * before[f"branches.{i}.norm.running_var"] + 0.1 * unbiased, 1e-12)


def test_running_statistics_stay_in_eval_mode():
    made = head([3], 4).eval()
    before = made.branches[0].norm.running_mean.clone()
    made([zoo.normal(2, 3, 4, 4)], None)
    assert torch.equal(made.branches[0].norm.running_mean, before)


# ---------------------------------------------------------------------- Table 6


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_variants(skip, batch_norm, activation, training):
    features = [zoo.normal(2, *shape, seed=i) for i, shape in enumerate(SIZES["not square"])]
    made = head([3, 5, 2], 17, skip=skip, batch_norm=batch_norm, activation=activation)
    compare(made, features, ROWS, training, 1e-12, 1e-11, skip=skip, activation=activation)


@pytest.mark.parametrize(
    ("channels", "wanted"),
    [((256, 512, 512), 1_874_664), ((512, 1024, 2048), 9_100_776), ((768, 768, 768), 4_081_384)],
    ids=["VGG-16", "ResNet-50", "ViT-B-16"],
)
def test_number_of_parameters(channels, wanted):
    with torch.device("meta"):
        made = AttentionHead(channels, 1000)
    assert sum(p.numel() for p in made.parameters()) == wanted
    assert wanted == sum(c * c + 3 * c for c in channels) + 1000 * sum(channels) + 1000
    without = AttentionHead(channels[:1], 10, batch_norm=False, skip=False)
    assert sum(p.numel() for p in without.parameters()) == channels[0] ** 2 + channels[0] + 10 * channels[0] + 10


# ---------------------------------------------------------------------- initial weights


def test_initial_weights_are_uniform_and_drawn_from_the_generator():
    state = torch.get_rng_state()
    one, same, other = (AttentionHead((64, 36), 50, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
    for conv, fan_in in ((one.branches[0].conv, 64), (one.branches[1].conv, 36), (one.fuser, 100)):
        for values in (conv.weight, conv.bias):
            bound = 1 / math.sqrt(fan_in)
            assert values.abs().max() <= bound
            assert values.min() < -0.85 * bound
            assert values.max() > 0.85 * bound
        close(conv.weight.std(), torch.tensor(1 / math.sqrt(3 * fan_in)), 0.01)
    assert not torch.equal(one.fuser.weight, other.fuser.weight)
    norm = one.branches[0].norm
    assert (norm.weight == 1).all()
    assert (norm.bias == 0).all()
    assert (norm.running_mean == 0).all()
    assert (norm.running_var == 1).all()
    assert (norm.eps, norm.momentum) == (1e-5, 0.1)


# ---------------------------------------------------------------------- a common row


def stir(made, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (made.common, made.fuser.weight, made.fuser.bias):
            parameter.uniform_(-1, 1, generator=generator)


def test_a_common_row_is_added_to_each_own_row_in_units_of_the_layers_reach():
    features = [zoo.normal(2, 3, 4, 4), zoo.normal(2, 5, 2, 2, seed=1)]
    made = head([3, 5], 6).eval()
    made.share_rows([10.0, 0.5])
    assert (made(features, None) == 0).all()  # both parts start at zero
    stir(made)
    state = {k: v.clone() for k, v in made.state_dict().items()}
    unit = torch.tensor([1 / 10.0] * 3 + [1 / 0.5] * 5, dtype=torch.float64)
    state["fuser.weight"] = (made.fuser.weight[:, :, 0, 0] + made.common[:-1])[:, :, None, None] * unit.view(
        1, -1, 1, 1
    )
    state["fuser.bias"] = made.fuser.bias + made.common[-1]
    everything = dense_head(state, features, False)
    close(made(features, None), everything, 1e-12)
    close(made(features, ROWS % 6), take(everything, ROWS % 6), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_folding_changes_no_bit_of_a_map(dtype):
    features = [zoo.normal(2, 3, 4, 4, dtype=dtype), zoo.normal(2, 5, 2, 2, seed=1, dtype=dtype)]
    made = head([3, 5], 6, dtype=dtype).eval()
    made.share_rows([3.0, 7.0])
    stir(made)
    before = made(features, None), made(features, ROWS % 6)
    made.fold()
    assert torch.equal(made(features, None), before[0])
    assert torch.equal(made(features, ROWS % 6), before[1])
    assert not {"common", "scale"} & made.state_dict().keys()
    assert made.fuser.weight.requires_grad
    made.fold()  # nothing left to do
    assert torch.equal(made(features, None), before[0])


def test_a_state_with_a_common_row_can_be_loaded_into_a_plain_head():
    features = [zoo.normal(2, 3, 4, 4)]
    made = head([3], 6).eval()
    made.share_rows([3.0])
    stir(made)
    other = head([3], 6, seed=8).eval()
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(features, None), made(features, None))
    other.fold()
    plain = head([3], 6, seed=9).eval()
    plain.load_state_dict(other.state_dict())
    assert torch.equal(plain(features, None), made(features, None))


def test_every_image_trains_the_common_row_and_its_classes_their_own():
    features = [zoo.normal(2, 3, 4, 4)]
    made = head([3], 6)
    made.share_rows([3.0])
    made(features, torch.tensor([[1], [4]])).sum().backward()
    assert (made.common.grad != 0).all()
    assert [k for k in range(6) if made.fuser.weight.grad[k].any()] == [1, 4]
    close(made.common.grad[:-1], made.fuser.weight.grad.sum(0)[:, 0, 0], 1e-12)


def test_reach_is_the_size_of_the_activations_in_training_mode():
    features = [zoo.normal(3, 3, 4, 4), 5 * zoo.normal(3, 5, 2, 2, seed=1)]
    made = head([3, 5], 6).eval()
    before = {k: v.clone() for k, v in made.state_dict().items()}
    found = made.reach(features)
    wanted = [float(dense_branch(before, i, x, True).abs().sum(1).mean()) for i, x in enumerate(features)]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())


def test_one_unit_in_every_weight_of_a_layer_moves_a_logit_by_about_one():
    features = [zoo.normal(8, 3, 6, 6), 500 * zoo.normal(8, 5, 6, 6, seed=1)]
    for layer in (slice(0, 3), slice(3, 8)):
        made = head([3, 5], 2).train()
        made.share_rows(made.reach(features))
        with torch.no_grad():
            made.common[layer] = 1
        moved = made(features, torch.zeros(8, 1, dtype=torch.long))
        close(moved.mean(), torch.tensor(1.0, dtype=torch.float64), 1e-9)


def test_a_default_device_that_torch_cannot_read_back(monkeypatch):
    """torch 2.6 raises after ``torch.set_default_device(None)``."""

    def no_device():
        raise AttributeError("'NoneType' object has no attribute 'device'")

    monkeypatch.setattr(torch, "get_default_device", no_device)
    conv = _attention_head._empty_conv(2, 3)
    assert conv.weight.device == torch.device("cpu")
    with torch.device("meta"):
        assert _attention_head._empty_conv(2, 3).weight.is_meta
