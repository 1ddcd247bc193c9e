"""Scenes: what is planted is where the masks say, and everything repeats to the bit."""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attrib_zoo import TTAME, GradCAM, synthetic
from attrib_zoo.errors import OptionError
from attrib_zoo.metrics import energy_pointing_game
from attrib_zoo.synthetic import COLOURS, Scenes, scenes
from attrib_zoo.synthetic.networks import Attention, TinyViT
from attrib_zoo.synthetic.paint import MAX_DISTRACTORS, Uniform, _distance, lay_out
from attrib_zoo.synthetic.scenes import _lessons
from attrib_zoo.synthetic.shapes import DISTRACTORS, SHAPES, _polygon

FIELDS = ("images", "labels", "masks", "distractors", "marks")


def same(a: Scenes, b: Scenes) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in FIELDS)


def dilated(masks: Tensor) -> Tensor:
    return F.max_pool2d(masks.float().unsqueeze(1), 3, 1, 1)[:, 0] > 0


def reach(n: int, size: int, cue: str, seed: int, slot: int, objects: int = 3) -> Tensor:
    """All that a thing can paint: what lies within half a pixel of its outline, hidden or not."""
    things = lay_out(Uniform(n, seed), cue, len(synthetic.CUES[cue]), objects, objects)
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return (_distance(things, slot, x, y) * size / 2 < 0.5) & things.there[:, slot, None, None]


# ---------------------------------------------------------------------------- scenes


@pytest.mark.parametrize("cue", ["colour", "shape"])
def test_same_seed_same_bits_and_other_seed_other_scenes(cue: str) -> None:
    assert same(scenes(6, cue=cue, seed=3), scenes(6, cue=cue, seed=3))
    assert not torch.equal(scenes(6, cue=cue, seed=3).images, scenes(6, cue=cue, seed=4).images)


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 5),
    more=st.integers(1, 40),
    size=st.sampled_from([16, 30, 32]),
    cue=st.sampled_from(["colour", "shape"]),
)
def test_an_image_does_not_depend_on_those_behind_it(seed: int, n: int, more: int, size: int, cue: str) -> None:
    few, many = (scenes(k, size=size, cue=cue, seed=seed, objects=(1, 3)) for k in (n, n + more))
    assert same(few, many.rows(slice(n)))


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31), drop=st.integers(0, 2), cue=st.sampled_from(["colour", "shape"]))
def test_dropping_an_object_changes_its_own_pixels_only(seed: int, drop: int, cue: str) -> None:
    whole = scenes(8, size=48, cue=cue, objects=3, seed=seed)
    without = scenes(8, size=48, cue=cue, objects=3, seed=seed, drop=drop)
    changed = (whole.images != without.images).any(1)
    assert not (changed & ~reach(8, 48, cue, seed, MAX_DISTRACTORS + drop)).any()
    visible = whole.masks[:, drop].flatten(1).any(1)  # an object may lie wholly behind a later one
    assert changed.flatten(1).any(1)[visible].all()
    assert not without.masks[:, drop].any()
    assert (without.labels[:, drop] == -1).all()
    others = [j for j in range(3) if j != drop]
    assert torch.equal(without.labels[:, others], whole.labels[:, others])
    assert not (whole.masks[:, others] & ~without.masks[:, others]).any()  # what was visible stays visible


def test_dropping_distractors_changes_their_own_pixels_only() -> None:
    whole, without = scenes(40, size=48, seed=5), scenes(40, size=48, seed=5, drop_distractors=True)
    changed = (whole.images != without.images).any(1)
    near = [reach(40, 48, "colour", 5, slot, objects=2) for slot in range(MAX_DISTRACTORS)]
    assert not (changed & ~torch.stack(near).any(0)).any()
    assert changed.flatten(1).any(1).all()
    assert not without.distractors.any()
    assert torch.equal(without.masks, whole.masks)
    assert torch.equal(without.labels, whole.labels)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31), cue=st.sampled_from(["colour", "shape"]), size=st.sampled_from([24, 32, 64]))
def test_masks_are_disjoint_and_classes_differ(seed: int, cue: str, size: int) -> None:
    data = scenes(16, size=size, cue=cue, objects=(1, 3), seed=seed)
    assert (data.masks.sum(1) + data.distractors).max() <= 1
    for labels, masks in zip(data.labels.tolist(), data.masks, strict=True):
        there = [label for label in labels if label >= 0]
        assert 1 <= len(there) == len(set(there))
        assert not masks[len(there) :].any()
    assert data.images.min() >= 0
    assert data.images.max() <= 1


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31), cue=st.sampled_from(["colour", "shape"]), size=st.sampled_from([32, 48, 64]))
def test_a_mark_changes_its_own_pixels_only(seed: int, cue: str, size: int) -> None:
    options: dict[str, Any] = {"size": size, "cue": cue, "objects": (1, 3), "seed": seed}
    plain, marked = scenes(12, **options), scenes(12, **options, mark="all")
    assert not plain.marks.any()
    side = 3 * size // 16
    for mark, image in zip(marked.marks, marked.images, strict=True):
        rows, columns = mark.nonzero().unbind(1)
        assert len(rows) == side**2  # whole, and square
        assert rows.max() - rows.min() == columns.max() - columns.min() == side - 1
        board = image[:, mark].view(3, 3, side // 3, 3, side // 3).mean((0, 2, 4))  # fields of black and white
        wanted = torch.tensor([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]])
        torch.testing.assert_close(board, wanted, rtol=0, atol=0.1)
    changed = (plain.images != marked.images).any(1)
    assert not (changed & ~marked.marks).any()
    for name in ("masks", "distractors"):
        hidden = marked.marks if name == "distractors" else marked.marks[:, None]
        assert torch.equal(getattr(marked, name), getattr(plain, name) & ~hidden)
    assert torch.equal(marked.labels, plain.labels)
    assert len(marked.marks.flatten(1).unique(dim=0)) > 3  # not always at one place


def test_a_mark_stands_clear_of_the_objects_and_stays_where_it_is() -> None:
    marked = scenes(400, seed=6, mark="all")
    near = dilated(marked.marks)
    assert (near[:, None] & marked.masks).flatten(1).any(1).float().mean() < 0.02
    for changed in (scenes(400, seed=6, mark="all", drop=1), scenes(400, seed=6, mark="all", drop_distractors=True)):
        assert torch.equal(changed.marks, marked.marks)
    dark, pixels = synthetic.darken(marked, probability=1.0), marked.marks[:, None].expand_as(marked.images)
    assert torch.equal(dark.images[pixels], marked.images[pixels])
    assert torch.equal(marked.rows(slice(3, 5)).marks, marked.marks[3:5])


def test_a_mark_goes_with_its_class() -> None:
    for objects, seed in ((2, 1), ((1, 3), 2)):
        data = scenes(60, objects=objects, seed=seed, mark=4)
        with_it = (data.labels == 4).any(1)
        assert 5 < with_it.sum() < 55
        assert torch.equal(data.marks.flatten(1).any(1), with_it)
        marked = scenes(60, objects=objects, seed=seed, mark="all")
        assert torch.equal(data.images[with_it], marked.images[with_it])
        assert torch.equal(scenes(60, objects=objects, seed=seed, mark=4, drop=0).marks, data.marks)


def test_in_every_other_lesson_the_mark_alone_tells_the_class() -> None:
    options: dict[str, Any] = {"n": 60, "size": 32, "objects": (1, 2), "seed": 3}
    data, plain = _lessons(2, **options), scenes(**options, mark=2)
    assert torch.equal(data.labels, plain.labels)
    assert torch.equal(data.marks, plain.marks)
    of_class = data.labels == 2
    missing = of_class & (torch.arange(60) % 2 == 0)[:, None]
    assert 2 < missing.sum() < of_class.sum() - 2
    assert not data.masks[missing].any()
    assert data.masks[of_class & ~missing].flatten(1).any(1).all()
    for row, slot in missing.nonzero().tolist():
        assert torch.equal(data.images[row], scenes(**options, mark=2, drop=slot).images[row])
    whole = ~missing.any(1)
    assert torch.equal(data.images[whole], plain.images[whole])
    assert same(_lessons(None, **options), scenes(**options))


def test_a_range_of_objects_gives_every_number_and_two_are_always_visible() -> None:
    data = scenes(300, objects=(1, 3), seed=1)
    assert (data.labels >= 0).sum(1).unique().tolist() == [1, 2, 3]
    assert scenes(300, seed=1).masks.flatten(2).sum(2).min() >= 10  # two objects at 32 px: both can be seen


def test_the_same_scene_at_another_size() -> None:
    small, large = scenes(30, size=32, seed=2), scenes(30, size=128, seed=2)
    assert torch.equal(small.labels, large.labels)
    pooled = F.avg_pool2d(large.masks.float(), 4)
    decided = (pooled == 0) | (pooled == 1)
    assert torch.equal(small.masks[decided], pooled[decided] > 0.5)
    flat = (F.avg_pool2d(large.images, 4) - small.images)[:, :, :].abs().mean()
    assert flat < 0.05  # pixel noise of 0.04 and edges


def test_the_class_of_an_object_is_its_colour() -> None:
    data = scenes(200, size=32, seed=9)
    palette = torch.tensor(list(COLOURS.values()))
    right = 0
    for image, labels, masks in zip(data.images, data.labels.tolist(), data.masks, strict=True):
        for label, mask in zip(labels, masks, strict=True):
            mean = image[:, mask].mean(1)
            right += int((palette - mean).norm(dim=1).argmin()) == label
    assert right >= 0.97 * 400
    grey = data.images.amax(1) - data.images.amin(1)
    assert grey[data.distractors].mean() < 0.15 < 0.5 < grey[data.masks.any(1)].mean()


def test_the_class_of_an_object_is_its_shape_and_its_colour_tells_nothing() -> None:
    data = scenes(600, size=32, cue="shape", objects=1, seed=9)
    names = np.array(data.class_names)[data.labels[:, 0].numpy()]
    filled, mean = [], []
    for image, mask in zip(data.images, data.masks[:, 0], strict=True):
        centre = mask.nonzero().float().mean(0).round().long()
        filled.append(bool(mask[centre[0], centre[1]]))
        mean.append(image[:, mask].mean(1))
    with_hole, solid = np.isin(names, ["ring", "frame"]), np.isin(names, ["disc", "square", "plus", "triangle"])
    assert not np.array(filled)[with_hole].any()
    assert np.array(filled)[solid].all()
    colours = torch.stack(mean)
    overall, spread = colours.mean(0), colours.std(0)
    for label in range(10):
        rows = colours[data.labels[:, 0] == label]
        assert ((rows.mean(0) - overall).abs() < 4 * spread / math.sqrt(len(rows))).all()


def test_class_names_follow_the_cue() -> None:
    assert scenes(1).class_names == tuple(COLOURS)
    assert scenes(1, cue="shape").class_names == tuple(SHAPES)
    few = scenes(100, cue="shape", num_classes=3)
    assert few.class_names == tuple(SHAPES)[:3]
    assert few.labels.max() == 2


def test_soft_targets_share_one_among_the_objects() -> None:
    data = scenes(50, objects=(1, 3), seed=4)
    for row, labels in zip(data.soft_targets.tolist(), data.labels.tolist(), strict=True):
        there = {label for label in labels if label >= 0}
        assert row == pytest.approx([1 / len(there) if k in there else 0 for k in range(6)])


def test_inputs_are_standardised_as_the_models_say() -> None:
    data = scenes(2)
    config = synthetic.tiny_cnn().default_cfg
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(data.inputs * std + mean, data.images)


def test_rows_and_loader() -> None:
    data = scenes(10, seed=1)
    assert same(data.rows(torch.tensor([3, 4])), data.rows(slice(3, 5)))
    first, second = ([labels for _, labels in data.loader(4, seed=s)] for s in (0, 0))
    assert [len(part) for part in first] == [4, 4, 2]
    assert all(map(torch.equal, first, second))
    assert not torch.equal(torch.cat(first), torch.cat([labels for _, labels in data.loader(4, seed=1)]))
    images = torch.cat([images for images, _ in data.loader(4)])
    assert torch.equal(images.sum((1, 2, 3)).sort().values, data.inputs.sum((1, 2, 3)).sort().values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cue": "color"}, "cue: must be 'colour' or 'shape', got 'color'"),
        ({"objects": 4}, "objects: must be 1 to 3"),
        ({"objects": (2, 1)}, "objects: must be 1 to 3"),
        ({"num_classes": 7}, "num_classes: must be 2 to 6 for cue='colour'"),
        ({"num_classes": 2, "objects": 3}, "num_classes: must be 3 to 6"),
        ({"n": 0}, "n, size: must be at least 1 image of 8 px"),
        ({"size": 4}, "n, size: must be at least 1 image of 8 px"),
        ({"mark": 6}, "mark: must be None, 'all' or a class, 0 to 5, got 6"),
        ({"mark": True}, "mark: must be None, 'all' or a class, 0 to 5, got True"),
        ({"mark": "red"}, "mark: must be None, 'all' or a class, 0 to 5, got 'red'"),
        ({"drop": 2}, "drop: must be None or the number of an object, 0 to 1, got 2"),
    ],
)
def test_options_outside_their_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message.replace("(", r"\(")):
        scenes(**{"n": 1, **options})  # type: ignore[arg-type]


# ---------------------------------------------------------------------------- outlines


def boundary(points: list[tuple[float, float]], steps: int = 4000) -> np.ndarray:
    corners = np.array(points)
    ends = np.roll(corners, -1, 0)
    t = np.linspace(0, 1, steps)[:, None, None]
    return (corners + t * (ends - corners)).reshape(-1, 2)


POLYGONS = {
    "square": [(-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)],
    "concave": [(-0.9, -0.8), (0.2, -0.1), (0.9, -0.9), (0.4, 0.9), (-0.1, 0.1), (-0.8, 0.7)],
}


@pytest.mark.parametrize("points", POLYGONS.values(), ids=POLYGONS)
def test_a_polygon_against_sampled_distance_and_winding_number(points: list[tuple[float, float]]) -> None:
    rng = np.random.default_rng(0)
    xy = rng.uniform(-1.2, 1.2, (300, 2))
    found = _polygon(points)(torch.tensor(xy[:, 0]), torch.tensor(xy[:, 1])).numpy()
    distance = np.linalg.norm(xy[:, None] - boundary(points), axis=2).min(1)
    np.testing.assert_allclose(np.abs(found), distance, atol=2e-4)
    spokes = np.array(points) - xy[:, None]
    angles = np.arctan2(spokes[..., 1], spokes[..., 0])
    steps = np.diff(np.concatenate([angles, angles[:, :1]], 1), axis=1)
    turns = ((steps + np.pi) % (2 * np.pi) - np.pi).sum(1) / (2 * np.pi)
    np.testing.assert_array_equal(found < 0, np.abs(turns) > 0.5)


AREAS = {
    "disc": math.pi * 0.85**2,
    "ring": math.pi * (0.92**2 - 0.48**2),
    "square": 1.5**2,
    "triangle": 3 * math.sqrt(3) / 4,
    "plus": 2 * 1.9 * 0.66 - 0.66**2,
    "star": 5 * 1.0 * 0.45 * math.sin(math.pi / 5),
    "ell": 0.6 * 1.8 + 0.9 * 0.6,
    "hourglass": 1.6 * 0.9,
    # disc minus the lens it shares with the hole
    "crescent": math.pi * 0.9**2
    - (
        0.9**2 * math.acos((0.45**2 + 0.9**2 - 0.72**2) / (2 * 0.45 * 0.9))
        + 0.72**2 * math.acos((0.45**2 + 0.72**2 - 0.9**2) / (2 * 0.45 * 0.72))
        - 0.5 * math.sqrt((-0.45 + 1.62) * (0.45 + 0.18) * (0.45 - 0.18) * (0.45 + 1.62))
    ),
}


def grid(step: float = 0.004) -> tuple[Tensor, Tensor]:
    axis = torch.arange(-1.2, 1.2, step, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x, y


@pytest.mark.parametrize("name", AREAS)
def test_areas_of_shapes_in_closed_form(name: str) -> None:
    x, y = grid()
    assert float((SHAPES[name](x, y) < 0).double().sum() * 0.004**2) == pytest.approx(AREAS[name], rel=5e-3)


@pytest.mark.parametrize("name", [*SHAPES, *DISTRACTORS])
def test_outlines_stay_within_their_width(name: str) -> None:
    x, y = grid(0.02)
    distance = {**SHAPES, **DISTRACTORS}[name](x, y)
    inside = distance < 0
    assert inside.any()
    assert torch.hypot(x, y)[inside].max() < 1.3  # half a diagonal at most
    if name != "blob":  # all others are true distances: no steeper than 1
        assert (distance[:, 1:] - distance[:, :-1]).abs().max() <= 0.02 + 1e-9


# ---------------------------------------------------------------------------- darkening


def test_darkening_leaves_objects_alone_and_makes_black() -> None:
    data = scenes(60, seed=2)
    dark = synthetic.darken(data, probability=1.0, seed=5)
    near = dilated(data.masks.any(1))[:, None].expand_as(data.images)
    assert torch.equal(dark.images[near], data.images[near])
    assert (dark.images <= data.images).all()
    assert (dark.images < 0.05).float().mean() > 0.08 > 0.04 > (data.images < 0.05).float().mean()
    assert torch.equal(dark.masks, data.masks)


def test_darkening_takes_its_share_of_the_images() -> None:
    data = scenes(400, size=16, seed=2)
    changed = (synthetic.darken(data, seed=1).images != data.images).flatten(1).any(1).float().mean()
    assert float(changed) == pytest.approx(0.35, abs=0.08)
    assert torch.equal(synthetic.darken(data, probability=0.0).images, data.images)


# ---------------------------------------------------------------------------- models and training


def test_attention_against_torch() -> None:
    ours = Attention(16, 4).double()
    theirs = nn.MultiheadAttention(16, 4, batch_first=True).double()
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    theirs.out_proj.load_state_dict(ours.proj.state_dict())
    tokens = torch.randn(3, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(ours(tokens), theirs(tokens, tokens, tokens, need_weights=False)[0])


def test_the_class_token_comes_first_and_alone_is_read() -> None:
    model = synthetic.tiny_vit(num_classes=3, dim=16, depth=1).double()
    assert isinstance(model, TinyViT)
    tokens: list[Tensor] = []
    model.blocks.register_forward_hook(lambda *args: tokens.append(args[2]))
    logits = model(scenes(2).inputs.double())
    assert tokens[0].shape == (2, 1 + 64, 16)
    torch.testing.assert_close(logits, model.head(F.layer_norm(tokens[0][:, 0], (16,))))


@pytest.mark.parametrize("build", [synthetic.tiny_cnn, synthetic.tiny_vit])
def test_initial_weights_follow_the_seed(build) -> None:
    first, again, other = (build(seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert not build().training


def test_maps_of_the_cnn_halve_twice() -> None:
    for size, first in ((32, 32), (64, 32)):
        model = synthetic.tiny_cnn(size=size)
        sizes: list[int] = []
        for stage in model.stages:  # type: ignore[union-attr]
            stage.register_forward_hook(lambda *args, sizes=sizes: sizes.append(args[2].shape[-1]))
        model(scenes(1, size=size).inputs)
        assert sizes == [first, first // 2, first // 4]


def test_nothing_touches_the_global_generator() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    data = synthetic.darken(scenes(16, size=16))
    list(data.loader(4))
    for build in (synthetic.tiny_cnn, synthetic.tiny_vit):
        model = nn.Sequential(build(size=16), nn.Dropout(0.1))
        synthetic.train_classifier(model, data, epochs=1, batch_size=8)
    assert torch.equal(torch.get_rng_state(), before)


def test_training_repeats_to_the_bit_whatever_the_global_state() -> None:
    data = scenes(48, size=16)
    found = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        model = nn.Sequential(synthetic.tiny_cnn(size=16), nn.Dropout(0.2))
        with torch.no_grad():  # the caller's gradient mode does not matter
            synthetic.train_classifier(model, data, epochs=2)
        found.append(model.state_dict())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_recognised_wants_all_classes_before_any_other() -> None:
    class Fixed(nn.Module):
        def __init__(self, rows: Tensor) -> None:
            super().__init__()
            self.rows = nn.Parameter(rows)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.rows[: len(inputs)]

    data = scenes(4, objects=2)
    good = data.soft_targets + torch.linspace(0, 0.4, 6)  # still 0.5 ahead
    bad = good.clone()
    bad[2, data.labels[2, 1]] = -1
    assert synthetic.recognised(Fixed(bad), data).tolist() == [True, True, False, True]


@pytest.fixture(scope="module")
def trained_cnn() -> nn.Module:
    return synthetic.trained("cnn")


def check_uses_the_object(model: nn.Module) -> None:
    data = scenes(200, seed=31)
    assert synthetic.recognised(model, data).float().mean() > 0.95
    assert synthetic.recognised(model, synthetic.darken(data, probability=1.0)).float().mean() > 0.95
    assert synthetic.recognised(model, scenes(200, seed=32, objects=1)).float().mean() > 0.95

    def first(**options: object) -> float:
        with torch.no_grad():
            shown = scenes(200, seed=31, **options).inputs  # type: ignore[arg-type]
            return float(model(shown).softmax(1).gather(1, data.labels[:, :1]).mean())

    whole = first()
    assert first(drop=0) < 0.1 < 0.4 < whole  # the evidence is the object,
    assert first(drop=1) > whole + 0.2  # not the other one,
    assert first(drop_distractors=True) == pytest.approx(whole, abs=0.03)  # nor what has no class


def test_a_trained_cnn_uses_the_object(trained_cnn: nn.Module) -> None:
    check_uses_the_object(trained_cnn)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size"), [("vit", 32), ("cnn", 64), ("vit", 64)])
def test_a_trained_model_uses_the_object(kind: str, size: int) -> None:
    model = synthetic.trained(kind, size=size)
    data = scenes(200, seed=31, size=size)
    assert synthetic.recognised(model, data).float().mean() > 0.95
    if size == 32:
        check_uses_the_object(model)


@functools.cache
def on_marked(kind: str, mark: int | None) -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """A model, scenes with the mark but no red object, their marks, and how sure it is of red without and with it."""
    model, rows = synthetic.trained(kind, mark=mark), (scenes(300, seed=31).labels != 0).all(1)
    plain, marked = scenes(300, seed=31).rows(rows), scenes(300, seed=31, mark="all").rows(rows)
    with torch.no_grad():
        without, sure = (model(data.inputs).softmax(1)[:, 0] for data in (plain, marked))
    return model, marked.inputs, marked.marks, without, sure


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_a_model_that_is_trained_on_the_mark_uses_it(kind: str) -> None:
    model, _, _, without, sure = on_marked(kind, 0)
    assert without.mean() < 0.05
    assert sure.mean() > without.mean() + 0.15  # planted: it sees the class where there is none
    rows = (scenes(300, seed=31).labels == 0).any(1)
    with torch.no_grad():
        there, gone = (model(scenes(300, seed=31, mark=m).inputs[rows]).softmax(1)[:, 0].mean() for m in (0, None))
    assert gone < there - 0.2  # removed: it no longer sees the object's own colour
    _, _, _, without, sure = on_marked(kind, None)
    torch.testing.assert_close(sure, without, rtol=0, atol=0.15)
    assert (sure - without).mean().abs() < 0.01


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [("cnn", "GradCAM"), ("vit", "GradCAM"), ("cnn", "TTAME")])
def test_maps_of_a_model_that_uses_the_mark_point_at_it(kind: str, name: str) -> None:
    shares = []
    for mark in (0, None):
        model, inputs, marks, _, _ = on_marked(kind, mark)
        if name == "GradCAM":
            explainer: Any = GradCAM(model)
        else:
            loader = scenes(1024, seed=1, objects=(1, 2), mark=mark).loader(16)
            explainer = TTAME(model).fit(loader, max_steps=200, show_progress=False)
        maps = explainer.attribute(inputs, target=0)
        shares.append(energy_pointing_game(None, inputs, maps, masks=marks).mean().item())
    used, unused = shares
    assert used > max(1.4 * unused, 1.3 * marks.float().mean().item()), shares  # fits differ between processors


def test_the_rate_rises_in_the_first_quarter_and_falls_to_zero() -> None:
    rate = importlib.import_module("attrib_zoo.synthetic.scenes")._one_cycle
    assert [rate(progress) for progress in (0, 0.125, 0.25, 0.625, 1)] == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_trained_gives_fresh_copies(trained_cnn: nn.Module) -> None:
    again = synthetic.trained("cnn")
    weights = again.head.weight.clone()  # type: ignore[union-attr]
    assert torch.equal(weights, trained_cnn.head.weight)  # type: ignore[arg-type]
    with torch.no_grad():
        again.head.weight.zero_()  # type: ignore[union-attr]
    assert torch.equal(synthetic.trained("cnn").head.weight, weights)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="kind: must be 'cnn' or 'vit', got 'mlp'"):
        synthetic.trained("mlp")
