"""What T-TAME learns from another method before its first step: the common row, who may teach, bad input."""

from __future__ import annotations

import math

import pytest
import strategies as zoo
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from attrib_zoo import TTAME, GenericAttention
from attrib_zoo.backbone.capture import frozen, run
from attrib_zoo.backbone.layers.resolve import resolve
from attrib_zoo.errors import OptionError, TrainingError, UnsupportedModelError
from attrib_zoo.training.head import AttentionHead
from attrib_zoo.training.recipe import RECIPES, Recipe
from attrib_zoo.training.rows import start_from_rows
from attrib_zoo.training.teacher import learn_common_row, normal_scores

IMAGES = zoo.batch(20, dtype=torch.float64)  # two chunks


def started(images: torch.Tensor = IMAGES):
    """A transformer in float64, its taps, and a head that starts from its rows."""
    model = zoo.small_vit().double().eval()
    with frozen(model):
        taps = resolve(model, None, images, count=3, rule="live")
        features = run(model, images, (), taps)[1]
        head = AttentionHead([f.shape[1] for f in features], 5, branches=False).double()
        start_from_rows(model, head, images, (), taps, show_progress=False)
    return model, taps, head


def lesson_of(teacher, images: torch.Tensor = IMAGES, evidence: float = 6.0):
    model, taps, head = started(images)
    with frozen(model):
        return learn_common_row(model, head, images, (), taps, teacher, evidence), head


def generic(images: torch.Tensor, classes: torch.Tensor, args: tuple) -> torch.Tensor:
    return GenericAttention(zoo.small_vit().double().eval(), upsample=False).attribute(images, classes)[:, :1]


# ---------------------------------------------------------------------- the common row


def test_the_common_row_is_the_ridge_regression_by_hand():
    """Cell by cell from the formula, with scipy's ranks and quantiles, and one dense system for all images."""
    lesson, head = lesson_of(generic)
    model, taps, _ = started()
    with torch.no_grad():
        outputs, features = run(model, IMAGES, (), taps)
        classes = outputs.argmax(1)
        weight = head.fuser.weight[:, :, 0, 0]
        rows, columns, wanted = [], [], []
        taught = generic(IMAGES, classes, ())
    for n in range(len(IMAGES)):
        whole = torch.cat([f[n].flatten(1) for f in features])  # (ΣC, cells), one size in this model
        rows.append(weight[classes[n]] @ whole)
        columns.append(whole)
        ranks = (torch.tensor(stats.rankdata(taught[n].flatten())) - 0.5) / whole.shape[1]
        scores = torch.tensor(stats.norm.ppf(ranks))
        wanted.append((scores - scores.mean()) / scores.std(correction=0))
    own = torch.cat([row - row.mean() for row in rows])
    matrix = torch.cat([w - w.mean(1, keepdim=True) for w in columns], dim=1).T
    first = 16 * columns[0].shape[1]  # units are those of the first chunk
    unit, units = own[:first].square().mean().sqrt(), matrix[:first].square().mean(0).sqrt()
    system = torch.cat([(own / unit)[:, None], matrix / units], dim=1)
    gram = system.T @ system
    ridge = 0.1 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.double)
    ridge[0, 0] = 0
    found = torch.linalg.solve(gram + ridge, system.T @ torch.cat(wanted))
    expected = found[1:] / units * unit / (found[0] * 6)
    torch.testing.assert_close(lesson.common, expected, rtol=1e-9, atol=1e-12)
    mixed = own + matrix @ expected
    correlation = torch.corrcoef(torch.stack([mixed, torch.cat(wanted)]))[0, 1]
    assert lesson.agreement == pytest.approx(float(correlation), abs=1e-9)
    assert lesson.before == pytest.approx(float(torch.corrcoef(torch.stack([own, torch.cat(wanted)]))[0, 1]), abs=1e-9)
    assert lesson.images == 20


def test_a_teacher_that_follows_one_channel_is_followed():
    """Where the teacher adds a channel of the last layer to the class's map, the common row is that channel's."""
    model, taps, head = started()

    def teacher(images, classes, args):
        features = run(model, images, (), taps)[1]
        own = head(features, classes[:, None])
        return own / own.std() + features[-1][:, 3:4] / features[-1][:, 3].std()

    with frozen(model):
        lesson = learn_common_row(model, head, IMAGES, (), taps, teacher, 1.0)
    effect = lesson.common * torch.cat([f.std(dim=(0, 2, 3)) for f in run(model, IMAGES, (), taps)[1]])
    assert int(effect.abs().argmax()) % 16 == 3  # the residual stream has the channel in every layer
    assert lesson.agreement > max(0.9, lesson.before + 0.1)


def test_only_the_order_of_the_teachers_values_counts():
    first, _ = lesson_of(generic)
    second, _ = lesson_of(lambda *given: generic(*given).clamp(min=0).pow(0.3) * 7 - 2)
    torch.testing.assert_close(first.common, second.common, rtol=1e-8, atol=1e-12)


def test_evidence_divides_the_common_row():
    once, twice = lesson_of(generic, evidence=1.0)[0], lesson_of(generic, evidence=2.0)[0]
    torch.testing.assert_close(once.common, 2 * twice.common)


def test_a_teacher_that_contradicts_the_rows_teaches_nothing():
    model, taps, head = started()

    def against(images, classes, args):
        return -head(run(model, images, (), taps)[1], classes[:, None])

    with frozen(model):
        assert learn_common_row(model, head, IMAGES, (), taps, against, 6.0) is None
        flat = learn_common_row(model, head, IMAGES, (), taps, lambda x, *_: torch.ones(len(x), 1, 8, 8), 6.0)
    assert flat is None


def test_maps_that_are_not_finite_are_refused():
    with pytest.raises(TrainingError, match=r"the teacher's maps must be finite, got NaN or infinity"):
        lesson_of(lambda images, *_: torch.full((len(images), 1, 8, 8), math.nan))


@settings(max_examples=40)
@given(zoo.SEEDS, st.integers(2, 30))
def test_normal_scores_are_the_quantiles_of_the_ranks(seed, count):
    values = zoo.normal(3, count, seed=seed).round(decimals=1)  # with ties
    found = normal_scores(values)
    for row, given_values in zip(found, values, strict=True):
        scores = torch.tensor(stats.norm.ppf((stats.rankdata(given_values) - 0.5) / count))
        spread = scores.std(correction=0)
        expected = (scores - scores.mean()) / spread if spread > 1e-6 else torch.zeros_like(scores)
        torch.testing.assert_close(row, expected, rtol=1e-6, atol=1e-9)


def test_normal_scores_of_a_constant_are_zero():
    assert torch.equal(normal_scores(torch.full((2, 9), 3.0)), torch.zeros(2, 9))


# ---------------------------------------------------------------------- in a fit


def test_what_a_place_has_in_every_image_is_forgotten():
    """By hand: features less their mean over images at each place, the channel's mean over places kept."""
    model, images = zoo.small_vit(), IMAGES.float()
    recipe = RECIPES["rows"].but(contrast=0, smooth=1)
    plain, without = (
        zoo.fit(TTAME(model, recipe=some, upsample=False), [images])
        for some in (recipe, recipe.but(forget_places=True))
    )
    with frozen(model):
        features = run(model, images, (), resolve(model, None, images, count=3, rule="live"))[1]
    rows = plain.network_.fuser.weight[:, :, 0, 0].detach()
    assert torch.equal(rows, without.network_.fuser.weight[:, :, 0, 0])
    whole = torch.cat(features, dim=1)
    bias = whole.mean(0) - whole.mean((0, 2, 3))[:, None, None]
    assert float(bias.abs().max()) > 0.1
    raw = torch.einsum("kc,nchw->nkhw", rows, whole - bias)
    low, high = raw.amin((2, 3), keepdim=True), raw.amax((2, 3), keepdim=True)
    torch.testing.assert_close(without.maps(images), (raw - low) / (high - low), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(without.maps(images), plain.maps(images), atol=0.01)
    assert zoo.fit(TTAME(model, recipe=recipe.but(forget_places=True)), [images[:4]]).network_.places == []


def test_forgotten_places_are_in_the_file_and_fit_other_sizes(tmp_path):
    from timm.models import VisionTransformer

    model = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=5, dynamic_img_size=True
    ).eval()
    explainer = zoo.fit(TTAME(model, upsample=False), [IMAGES.float()])
    again = TTAME.load(explainer.save(tmp_path / "taught.safetensors"), model)
    assert again.network_.places == ["place0", "place1"]
    assert torch.equal(again.attribute(IMAGES.float()), explainer.attribute(IMAGES.float()))
    assert again.attribute(zoo.batch(2, size=24)).shape[-2:] == (6, 6)


def test_every_class_gets_the_same_row_on_top_of_its_own():
    model = zoo.small_vit()
    plain = zoo.fit(TTAME(model, recipe=RECIPES["rows"].but(contrast=0)), [IMAGES.float()])
    taught = zoo.fit(TTAME(model, recipe=RECIPES["taught"].but(contrast=0)), [IMAGES.float()])
    moved = (taught.network_.fuser.weight - plain.network_.fuser.weight)[:, :, 0, 0].detach()
    assert float(moved.abs().max()) > 0.01
    torch.testing.assert_close(moved, moved[:1].expand_as(moved), rtol=1e-4, atol=1e-5)


def test_the_contrast_leaves_the_common_row_as_it_was_learnt():
    """What is taken from the rivals' maps is given beforehand, so that the map is rows less rivals, plus the row."""
    model = zoo.small_vit()
    images = IMAGES.float()
    with_, without = (
        zoo.fit(TTAME(model, recipe=RECIPES["taught"].but(contrast=contrast, smooth=1)), [images])
        for contrast in (3, 0)
    )
    rows = zoo.fit(TTAME(model, recipe=RECIPES["rows"].but(contrast=0)), [images]).network_.fuser.weight[0, :, 0, 0]
    common = [explainer.network_.fuser.weight[0, :, 0, 0] - rows for explainer in (with_, without)]
    torch.testing.assert_close(common[0] * (1 - 0.6), common[1], rtol=1e-4, atol=1e-5)


def test_a_fit_that_is_told_no_steps_takes_none_and_says_what_it_started_from(tmp_path):
    model, images = zoo.small_vit(), IMAGES.float()
    explainer = TTAME(model).fit([images], show_progress=False)
    assert (explainer.recipe.name, explainer.n_steps_) == ("taught", 0)
    assert "GenericAttention on 20 images, correlation with its maps" in explainer.report()
    assert explainer.maps(images).shape[1] == 5
    again = TTAME.load(explainer.save(tmp_path / "taught.safetensors"), model)
    assert again.recipe == RECIPES["taught"]
    assert torch.equal(again.attribute(images), explainer.attribute(images))
    assert "GenericAttention on 20 images" in again.report()


def test_the_head_follows_its_teacher_closer_than_the_rows_do():
    model, images = zoo.small_vit(), IMAGES.float()
    teacher = GenericAttention(model, upsample=False).attribute(images)[:, 0].flatten(1)
    found = {}
    for name in ("rows", "taught"):
        explainer = zoo.fit(TTAME(model, recipe=RECIPES[name].but(contrast=0, smooth=1), upsample=False), [images])
        maps = explainer.attribute(images)[:, 0].flatten(1)
        found[name] = sum(stats.spearmanr(a, b).statistic for a, b in zip(maps, teacher, strict=True)) / len(images)
    assert found["taught"] > found["rows"] + 0.05


def test_auto_has_a_teacher_where_there_is_one():
    def chosen(model, images):
        return zoo.fit(TTAME(model), [images], max_steps=0).recipe.name

    assert chosen(zoo.small_vit(), IMAGES.float()) == "taught"
    assert chosen(zoo.small_cnn(), IMAGES.float()) == "rows"


def test_auto_goes_without_a_teacher_that_refuses_the_model():
    from timm.models import VisionTransformer

    pooled = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=5, class_token=False,
        global_pool="avg",
    ).eval()  # fmt: skip
    with pytest.raises(UnsupportedModelError):
        GenericAttention(pooled).attribute(IMAGES.float())
    assert zoo.fit(TTAME(pooled), [IMAGES.float()], max_steps=0).recipe.name == "rows"


def test_a_teacher_by_name():
    model, images = zoo.small_cnn(), IMAGES.float()
    explainer = zoo.fit(TTAME(model, recipe=RECIPES["rows"].but(teacher="LayerCAM")), [images])
    assert "LayerCAM on 20 images" in explainer.report() or "not positively related" in explainer.report()
    with pytest.raises(UnsupportedModelError):
        zoo.fit(TTAME(model, recipe="taught"), [images])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: zoo.fit(TTAME(zoo.small_vit(), recipe=RECIPES["rows"].but(teacher="TTAME")), [IMAGES.float()]),
            "teacher: must be one of .*'GenericAttention'.*, got 'TTAME'",
        ),
        (lambda: Recipe("mine", teacher="RISE"), "teacher: needs start='rows', got teacher='RISE' with start='random'"),
        (lambda: RECIPES["taught"].but(evidence=0), "evidence: must be"),
    ],
)
def test_bad_teachers(make, words):
    with pytest.raises(OptionError, match=words):
        make()


def test_a_resumed_fit_is_not_asked_for_its_steps(tmp_path):
    model, images = zoo.small_vit(), IMAGES.float()
    first = zoo.fit(TTAME(model), [images], checkpoint_dir=tmp_path)
    again = zoo.fit(TTAME(model), [images], resume_from=tmp_path)
    assert torch.equal(first.network_.fuser.weight, again.network_.fuser.weight)
