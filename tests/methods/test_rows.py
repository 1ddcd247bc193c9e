"""T-TAME that starts from the classifier's rows: the rows, the start, the fold, contrast, training, bad input."""

from __future__ import annotations

import copy
import math
import warnings
from functools import partial

import pytest
import strategies as zoo
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attrib_zoo import TTAME, synthetic
from attrib_zoo.backbone.capture import frozen, run
from attrib_zoo.backbone.layers.resolve import resolve
from attrib_zoo.backbone.targets import Contrast
from attrib_zoo.errors import OptionError, TrainingError
from attrib_zoo.methods.ttame import less_rivals
from attrib_zoo.training.losses import gone, order_mask
from attrib_zoo.training.recipe import RECIPES, Recipe
from attrib_zoo.training.rows import class_rows

IMAGES = zoo.batch(6, dtype=torch.float64)


def double(kind: str, **options) -> nn.Module:
    make = zoo.small_cnn if kind == "cnn" else zoo.small_vit
    return make(**options).double().eval()


def taps_of(model: nn.Module, images: torch.Tensor = IMAGES):
    return resolve(model, None, images, count=3, rule="live")


def rows_of(model: nn.Module, images: torch.Tensor = IMAGES, **options):
    with frozen(model):
        return class_rows(model, images, (), taps_of(model, images), **options)


def at_start(model: nn.Module, images: torch.Tensor = IMAGES, **options) -> TTAME:
    return zoo.fit(TTAME(model, upsample=False, **{"recipe": "rows", **options}), [images], max_steps=0)


# ---------------------------------------------------------------------- rows


def by_autograd(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """The definition, one class and one image at a time, through the blocks of the tiny transformer by hand."""
    names = [tap.name for tap in taps_of(model, images)]
    found = {name: 0 for name in names}
    for image in images:
        kept: dict[str, torch.Tensor] = {}

        def keep(_, __, output, name, kept=kept):
            kept[name] = output

        handles = [model.get_submodule(n).register_forward_hook(partial(keep, name=n)) for n in names]
        scores = model(image[None].clone().requires_grad_())[0]
        for handle in handles:
            handle.remove()
        for name in names:
            gradients = torch.stack(
                [torch.autograd.grad(score, kept[name], retain_graph=True)[0][0] for score in scores]
            )
            patches = gradients[:, -64:] if gradients.ndim == 3 else gradients.flatten(2).transpose(1, 2)
            found[name] = found[name] + patches.mean(1) / len(images)
    return [found[name] for name in names]


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_rows_are_mean_gradients(kind):
    model = double(kind)
    rows = rows_of(model)
    for weight, expected in zip(rows.weights, by_autograd(model, IMAGES), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-10, atol=1e-14)


def test_rows_of_pooling_and_a_linear_layer_are_its_weights_from_two_images():
    model = double("cnn")
    rows = rows_of(model)
    assert rows.exact
    assert rows.images == 1
    height, width = run(model, IMAGES, (), taps_of(model))[1][0].shape[-2:]
    torch.testing.assert_close(rows.weights[0], model.head.weight.detach() / (height * width))


@pytest.mark.parametrize("classes", [5, 40])  # fewer and more than channels: differentiated from either side
@pytest.mark.parametrize("last", [nn.Identity, nn.ReLU])
def test_rows_of_a_convolution_to_class_maps_are_its_weights(classes, last):
    """As SqueezeNet ends: a 1x1 convolution, perhaps a ReLU, then the mean over space."""
    features = nn.Sequential(nn.Conv2d(3, 12, 3, 2), nn.ReLU(), nn.Conv2d(12, 12, 3, 2), nn.ReLU())
    head = nn.Conv2d(12, classes, 1)
    nn.init.constant_(head.bias, 3.0)  # some classes are above zero everywhere
    model = nn.Sequential(features, head, last(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().eval()
    with frozen(model):
        rows = class_rows(model, IMAGES, (), resolve(model, "0", IMAGES))
    height, width = features(IMAGES).shape[-2:]
    assert (rows.through, rows.exact) == ("classifier", True)
    torch.testing.assert_close(rows.weights[0], head.weight.detach().flatten(1) / (height * width))


def test_class_by_class_is_the_same_as_through_the_classifier():
    """A scaled output hides the linear layer, so that every class is differentiated by itself."""

    class Scaled(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, x):
            return 2 * self.body(x)

    model = double("vit")
    through, whole = rows_of(model), rows_of(Scaled(model))
    assert (through.through, whole.through) == ("classifier", "outputs")
    for one, two in zip(through.weights, whole.weights, strict=True):
        torch.testing.assert_close(2 * one, two, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("last", [nn.Softmax(1), nn.Sigmoid()])
def test_what_follows_the_classifier_does_not_squash_the_rows(last):
    model = double("vit")
    squashed = rows_of(nn.Sequential(model, last))
    for one, two in zip(rows_of(model).weights, squashed.weights, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-13)


def test_a_small_budget_shares_the_outputs_out_and_leaves_none_without():
    model = double("vit")
    images = zoo.batch(24, dtype=torch.float64)
    whole, some = rows_of(model, images), rows_of(model, images, budget=1.0)
    assert some.images == 5  # 24 images, one of five outputs each
    for full, drawn in zip(whole.weights, some.weights, strict=True):
        assert drawn.any(1).all()
        similar = F.cosine_similarity(full, drawn, dim=1)
        assert similar.mean() > 0.5


@pytest.mark.parametrize(("gradients", "each"), [(6, 1), (12, 2), (27, 5), (31, 5)])
def test_a_budget_is_so_many_gradients_over_all_images(gradients, each, monkeypatch):
    monkeypatch.setattr("attrib_zoo.training.rows._affordable", lambda *_: gradients)
    rows = rows_of(double("vit"))  # 6 images, 5 outputs: 30 gradients in all
    assert rows.images == math.ceil(6 * each / 5)


@settings(max_examples=8, deadline=None)
@given(st.permutations(range(5)))
def test_permuted_classes_permute_the_maps(order):
    model = double("vit")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.weight.copy_(model.head.weight[list(order)])
        other.head.bias.copy_(model.head.bias[list(order)])
    torch.testing.assert_close(
        at_start(other).maps(IMAGES), at_start(model).maps(IMAGES)[:, list(order)], rtol=1e-8, atol=1e-10
    )


# ---------------------------------------------------------------------- the map at the start


def by_hand(model: nn.Module, images: torch.Tensor, classes: torch.Tensor, *, contrast: int, smooth: int):
    """Rows centred, layers of one spread, rivals taken away, the mean filter, min-max: written out."""
    outputs, features = run(model, images, (), taps_of(model))
    total = 0
    for weight, maps in zip(by_autograd(model, images), features, strict=True):
        weight = weight - weight.mean(0)
        spread = torch.stack([torch.tensordot(weight[c], f, 1).std(correction=0) for c, f in
                              zip(outputs.argmax(1), maps, strict=True)]).mean()  # fmt: skip
        total = total + torch.einsum("kc,nchw->nkhw", weight / spread, maps)
    found = []
    for scores, every, c in zip(outputs, total, classes.tolist(), strict=True):
        heat = every[c]
        rivals = [k for k in scores.argsort(descending=True).tolist() if k != c][:contrast]
        if rivals:
            heat = heat - 0.6 * every[rivals].mean(0)
        padded = F.pad(heat, [smooth // 2] * 4, value=torch.nan)
        heat = padded.unfold(0, smooth, 1).unfold(1, smooth, 1).flatten(2).nanmean(2)
        found.append((heat - heat.min()) / (heat.max() - heat.min()))
    return torch.stack(found).unsqueeze(1)


@pytest.mark.parametrize("kind", ["cnn", "vit"])
@pytest.mark.parametrize(("contrast", "smooth"), [(0, 1), (3, 3), (2, 1), (9, 5)])
def test_the_start_is_the_map_of_the_rows(kind, contrast, smooth):
    model = double(kind)
    recipe = RECIPES["rows"].but(contrast=contrast, smooth=smooth)
    explainer = at_start(model, recipe=recipe)
    classes = torch.tensor([0, 1, 2, 3, 4, 0])
    expected = by_hand(model, IMAGES, classes, contrast=min(contrast, 4), smooth=smooth)
    torch.testing.assert_close(explainer.attribute(IMAGES, classes), expected, rtol=0, atol=1e-10)


def test_every_class_has_its_map_at_the_start():
    explainer = at_start(double("vit"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        every = explainer.maps(IMAGES)
        for k in range(5):
            torch.testing.assert_close(every[:, [k]], explainer.attribute(IMAGES, k), rtol=0, atol=1e-12)
    assert explainer.class_counts_.tolist() == [0] * 5
    assert explainer.n_steps_ == 0


def test_the_contrast_of_the_recipe_is_the_target_contrast():
    model = double("vit")
    contrasted = at_start(model)
    plain = at_start(model, recipe=RECIPES["rows"].but(contrast=0))
    torch.testing.assert_close(contrasted.attribute(IMAGES, 2), plain.attribute(IMAGES, Contrast(3, 0.6, 2)))
    assert (contrasted.attribute(IMAGES, Contrast(1, 0.9)) - contrasted.attribute(IMAGES)).abs().max() > 1e-3


@settings(max_examples=30, deadline=None)
@given(zoo.SEEDS, st.integers(2, 7), st.integers(1, 8))
def test_all_maps_less_their_rivals(seed, count, k):
    maps, outputs = zoo.normal(3, count, 2, 4, seed=seed), zoo.normal(3, count, seed=seed + 1)
    found = less_rivals(maps, outputs, k, 0.7)
    for n in range(3):
        order = outputs[n].argsort(descending=True).tolist()
        for c in range(count):
            rivals = [j for j in order if j != c][:k]
            torch.testing.assert_close(found[n, c], maps[n, c] - 0.7 * maps[n, rivals].mean(0))


def test_layers_are_blocks_that_the_class_token_still_reads():
    model = zoo.small_vit(depth=4)
    assert [tap.name for tap in TTAME(model, recipe="rows").taps(zoo.batch(2))] == ["blocks.0", "blocks.1", "blocks.2"]
    assert [tap.name for tap in TTAME(zoo.small_cnn(), recipe="rows").taps(zoo.batch(2))] == ["stages.2"]


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_the_fold_changes_no_map(kind):
    """What is trained as a shared correction is one ordinary convolution in the end."""
    seen = {}

    class Watched(TTAME):
        def finish_network(self, network):
            _, features = self._features(IMAGES, ())
            seen["before"] = network(features)
            super().finish_network(network)
            seen["after"] = network(features)

    zoo.fit(Watched(double(kind), recipe="rows"), [IMAGES], max_steps=6, lr=0.05)
    torch.testing.assert_close(seen["before"], seen["after"], rtol=0, atol=1e-10)
    assert seen["after"].std() > 0


def test_classes_that_never_come_up_move_too_and_the_best_of_them_all_is_free():
    model = double("vit")
    start, explainer = at_start(model), TTAME(model, upsample=False, recipe="rows")
    zoo.fit(explainer, [IMAGES], max_steps=8, lr=0.02)
    unseen = (explainer.class_counts_ == 0).nonzero().flatten().tolist()
    assert unseen, "the images of this test must leave a class out"
    moved = (explainer.maps(IMAGES) - start.maps(IMAGES)).abs().flatten(2).amax(2).amin(0)
    assert (moved[unseen] > 1e-3).all()


@pytest.mark.filterwarnings("ignore:fit. validation was best")
def test_training_lowers_the_order_loss():
    model, scenes = synthetic.trained("cnn", size=16), synthetic.scenes(64, size=16)
    loader, options = scenes.inputs.split(16), {"max_steps": 60, "val_loader": [scenes.inputs]}
    explainer = zoo.fit(TTAME(model, recipe="rows"), loader, lr=0.01, **options)
    losses = [entry["loss"] for entry in explainer.history_.validation]
    assert explainer.history_.validation[0]["step"] == 0
    assert min(losses) < losses[0] - 0.001


def test_the_best_state_is_kept_and_said():
    """A rate that wrecks the rows ends at the rows."""
    model = double("vit")
    explainer = TTAME(model, upsample=False, recipe="rows")
    with pytest.warns(
        UserWarning, match=r"validation was best after 0 of 10 steps .* nothing that was trained is kept"
    ):
        zoo.fit(explainer, [IMAGES], max_steps=10, lr=50.0, val_loader=[IMAGES])
    torch.testing.assert_close(explainer.maps(IMAGES), at_start(model).maps(IMAGES), rtol=0, atol=1e-10)
    assert any("did not pay" in message for message in explainer.history_.messages)


class Stopping:
    """A loader that raises after some batches."""

    def __init__(self, batches, after):
        self.batches, self.after = batches, after

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for number, images in enumerate(self.batches):
            if number == self.after:
                raise RuntimeError("planned")
            yield images


def test_an_interrupted_fit_goes_on_to_the_same_bits(tmp_path):
    model = zoo.small_vit()
    batches = list(zoo.batch(64, seed=3).split(4))
    options = {"max_steps": 12, "val_loader": [batches[0]]}
    straight = zoo.fit(TTAME(model, recipe="rows"), batches, **options)
    with pytest.raises(RuntimeError, match="planned"):
        zoo.fit(TTAME(model, recipe="rows"), Stopping(batches, 10), checkpoint_dir=tmp_path, **options)
    again = zoo.fit(TTAME(model, recipe="rows"), batches, resume_from=tmp_path, **options)
    assert again.history_.validation == straight.history_.validation
    for name, weight in straight.network_.state_dict().items():
        assert torch.equal(weight, again.network_.state_dict()[name])


def test_a_saved_explainer_is_the_same_and_knows_its_recipe(tmp_path):
    model, images = zoo.small_vit(), IMAGES.float()
    explainer = zoo.fit(TTAME(model, recipe=RECIPES["rows"].but(contrast=2), upsample=False), [images], max_steps=2)
    again = TTAME.load(explainer.save(tmp_path / "rows.safetensors"), model)
    assert again.recipe == explainer.recipe
    assert torch.equal(again.attribute(images, 1), explainer.attribute(images, 1))


# ---------------------------------------------------------------------- the loss


@settings(max_examples=40, deadline=None)
@given(zoo.SEEDS, st.floats(0.05, 0.95))
def test_the_order_mask_opens_that_share_of_the_cells(seed, share):
    maps = zoo.normal(2, 1, 9, 11, seed=seed)
    mask = order_mask(maps, torch.full((2,), share))
    shown = (mask > 0.5).flatten(1).double().mean(1)
    assert ((shown - share).abs() < 2 / 99).all()
    order = maps.flatten(1).argsort(1)
    assert (mask.flatten(1).gather(1, order).diff(dim=1) >= 0).all()
    torch.testing.assert_close(order_mask(7 * maps - 3, torch.full((2,), share)), mask)  # no scale, no offset


def test_the_order_mask_by_hand():
    maps = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]], dtype=torch.float64)
    limit, spread = 1.5, maps.std(correction=0)
    expected = 1 / (1 + torch.exp(-(maps - limit) / (0.5 * spread)))
    torch.testing.assert_close(order_mask(maps, torch.tensor([0.5])), expected)
    assert torch.equal(order_mask(torch.ones(1, 1, 2, 2), torch.tensor([0.3])), torch.full((1, 1, 2, 2), 0.5))


@settings(max_examples=30, deadline=None)
@given(zoo.SEEDS)
def test_gone_is_minus_the_log_of_what_is_left(seed):
    logits = zoo.normal(4, 6, seed=seed)
    classes = logits.argmin(1)
    expected = -torch.log1p(-logits.softmax(1)[range(4), classes])
    torch.testing.assert_close(gone(logits, classes), expected)
    certain = torch.tensor([[200.0, 0.0]], dtype=torch.float64)
    assert gone(certain, torch.tensor([0])).item() == pytest.approx(200)


# ---------------------------------------------------------------------- recipes


def test_recipes_are_values():
    recipe = RECIPES["rows"].but(contrast=1, smooth=None)
    assert (recipe.contrast, recipe.smooth) == (1, 3)
    assert RECIPES["rows"].facts() == "rows"
    assert Recipe(**recipe.facts()) == recipe
    assert "contrast          1   (paper: 0)" in str(recipe)
    with pytest.raises(AttributeError):
        recipe.contrast = 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Recipe("mine", start="zero"), "start: must be one of 'random', 'rows', got 'zero'"),
        (lambda: Recipe("mine", smooth=2), "smooth: must be an odd number of cells, got 2"),
        (lambda: Recipe("mine", alike=4), "alike: must be an odd number of cells, got 4"),
        (lambda: Recipe("mine", alike=True), "alike: must be an odd number of cells, got True"),
        (lambda: Recipe("mine", smooth=3.0), "smooth: must be an odd number of cells, got 3.0"),
        (
            lambda: TTAME(zoo.small_cnn(), recipe={"name": "mine", "colour": 1}),
            "a field that this version does not know",
        ),
        (
            lambda: TTAME(zoo.small_cnn(), recipe="cold"),
            "recipe: must be one of 'auto', 'rows', 'attended', 'paper', 'released', got 'cold'",
        ),
        (lambda: zoo.fit(TTAME(zoo.small_cnn(), recipe="paper"), [IMAGES.float()], max_steps=0), "max_steps: must be"),
    ],
)
def test_bad_recipes(make, words):
    with pytest.raises(OptionError, match=words):
        make()


# ---------------------------------------------------------------------- bad input


def test_a_head_of_zeros_starts_at_zero_and_says_so():
    model = double("cnn")
    nn.init.zeros_(model.head.weight)
    explainer = TTAME(model, recipe="rows")
    with pytest.warns(UserWarning, match="no class has a gradient at the layers that are read"):
        zoo.fit(explainer, [IMAGES], max_steps=0)
    assert torch.equal(explainer.maps(IMAGES), torch.zeros(6, 5, 4, 4, dtype=torch.float64))


def test_a_class_without_a_gradient_starts_as_the_mean_of_the_others():
    model = double("cnn")
    with torch.no_grad():
        model.head.weight[3] = 0
    explainer = TTAME(model, upsample=False, recipe=RECIPES["rows"].but(contrast=0, smooth=1))
    with pytest.warns(UserWarning, match="class 3 has no gradient"):
        zoo.fit(explainer, [IMAGES], max_steps=0)
    mean = model.head.weight[[0, 1, 2, 4]].mean(0).detach()
    features = run(model, IMAGES, (), taps_of(model))[1][0]
    heat = torch.einsum("c,nchw->nhw", mean, features)
    low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    torch.testing.assert_close(explainer.attribute(IMAGES, 3)[:, 0], (heat - low) / (high - low))


def test_rows_that_are_not_finite_are_refused_and_nothing_is_kept():
    model = double("vit")
    explainer = at_start(model)
    before = explainer.maps(IMAGES)
    with torch.no_grad():
        model.head.weight[2] = torch.nan
    with pytest.raises(TrainingError, match=r"finite|must be finite"):
        zoo.fit(explainer, [IMAGES], max_steps=0)
    with torch.no_grad():
        model.head.weight[2] = 0.1
    assert before.isfinite().all()


@pytest.mark.parametrize("column", [True, False])
def test_one_value_per_image_has_two_rows_that_are_each_other_s_negative(column):
    model = zoo.OneValue(double("cnn"), column=column)
    explainer = at_start(model, recipe=RECIPES["rows"].but(smooth=1))
    maps = explainer.maps(IMAGES)
    assert maps.shape[1] == 2
    torch.testing.assert_close(maps[:, 0], 1 - maps[:, 1])
    weight = model.model.head.weight[1] - model.model.head.weight[0]
    heat = torch.einsum("c,nchw->nhw", weight.detach(), run(model, IMAGES, (), taps_of(model))[1][0])
    low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    torch.testing.assert_close(maps[:, 1], (heat - low) / (high - low))


def test_a_loader_of_one_image_and_a_model_in_training_mode():
    model = zoo.small_vit().train()
    buffers = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    explainer = zoo.fit(TTAME(model, upsample=False, recipe="rows"), [zoo.batch(1)], max_steps=2)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in model.state_dict().items())
    assert explainer.maps(zoo.batch(2)).isfinite().all()


def test_a_loader_without_a_length_needs_no_steps():
    def stream():
        for seed in range(3):
            yield zoo.batch(2, seed=seed)

    explainer = TTAME(zoo.small_cnn(), recipe="rows").fit(stream(), show_progress=False)
    assert explainer.n_steps_ == 0
    assert explainer.maps(zoo.batch(2)).shape[1] == 5


# ---------------------------------------------------------------------- which recipe


def test_the_recipe_follows_the_images_per_class(tmp_path):
    """Few images per class start from rows, 100 and more train the paper's rows; the file says which it was."""
    model, images = zoo.small_cnn(), zoo.batch(10)
    few, many = TTAME(model), TTAME(model)
    assert few.options()["recipe"] == "auto"
    zoo.fit(few, [images], max_steps=49)
    zoo.fit(many, [images], max_steps=50)
    assert (few.recipe.name, many.recipe.name) == ("rows", "paper")
    assert many.network_.branches
    assert not few.network_.branches
    for explainer in (few, many):
        again = TTAME.load(explainer.save(tmp_path / "explainer.safetensors"), model)
        assert again.recipe == explainer.recipe
        assert torch.equal(again.attribute(images), explainer.attribute(images))
    zoo.fit(many, [images], max_steps=0)  # decided anew, as if it had not been fitted before
    assert (many.recipe.name, many.n_steps_) == ("rows", 0)


def test_an_interrupted_fit_keeps_the_recipe_that_it_came_to(tmp_path):
    model, batches = zoo.small_cnn(), list(zoo.batch(60, seed=3).split(4))
    with pytest.raises(RuntimeError, match="planned"):
        zoo.fit(TTAME(model), Stopping(batches, 14), max_steps=15, checkpoint_dir=tmp_path)
    again = zoo.fit(TTAME(model), batches, max_steps=15, resume_from=tmp_path)
    straight = zoo.fit(TTAME(model), batches, max_steps=15)
    assert again.recipe == straight.recipe
    assert torch.equal(again.network_.fuser.weight, straight.network_.fuser.weight)


def test_options_of_an_unfitted_explainer_make_the_same_one():
    explainer = TTAME(zoo.small_cnn(), skip=False, smooth=5)
    again = TTAME(zoo.small_cnn(), **explainer.options())
    assert again.options() == explainer.options()
    assert again.recipe == explainer.recipe
