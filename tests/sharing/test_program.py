"""The module says what ``attribute`` says, alone, compiled, copied, moved and from several threads."""

from __future__ import annotations

import copy
import pickle
import types
from concurrent.futures import ThreadPoolExecutor

import engine_cases as cases
import export_cases as some
import pytest
import strategies as zoo
import torch
from torch import nn

from attrib_zoo import CAM, TTAME, GradCAM
from attrib_zoo.backbone.grid import Grid, Tap
from attrib_zoo.errors import BackboneMismatchError, InputError, NotFittedError, OptionError, UnsupportedModelError
from attrib_zoo.masking import rank_scale
from attrib_zoo.sharing.program import ClassMaps, Enlargement, Reading, Standardise, counted_ranks
from attrib_zoo.training.recipe import RECIPES

each = pytest.mark.parametrize("make", some.EXPLAINERS.values(), ids=some.EXPLAINERS)


def close(found, wanted, tolerance=1e-6):
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


def check(explainer, images, tolerance=1e-6):
    """The module's three outputs for the decided classes and for others."""
    module = explainer.as_module(images)
    with torch.no_grad():
        wanted = explainer.model(images)
        logits, maps, classes = module(images)
        close(logits, wanted)
        assert torch.equal(classes, wanted.argmax(1))
        close(maps, explainer.attribute(images)[:, :1], tolerance)
        others = (wanted.argmax(1) + 1 + torch.arange(len(images)) % 3) % wanted.shape[1]
        logits, maps, classes = module(images, others)
        close(maps, explainer.attribute(images, others)[:, :1], tolerance)
        assert torch.equal(classes, others)
    assert float(maps.std()) > 0.01
    return module


@each
def test_it_says_what_attribute_says(make):
    check(make(), some.images())


OPTIONS = [
    {"smooth": 3},
    {"smooth": 1, "scale": "rank"},
    {"scale": "positive"},
    {"scale": "min-max", "upsample": False},
    {"smooth": 5, "scale": "rank", "upsample": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("make", [some.EXPLAINERS["rows"], some.EXPLAINERS["CAM"]], ids=["rows", "CAM"])
def test_with_every_option_of_the_map(make, options):
    check(make(**options), some.images())


def test_the_rivals_of_the_start_rows_are_taken_away():
    images, without = some.images(), some.rows(some.vit())
    without.recipe = without.recipe.but(contrast=0)
    assert (without.as_module(images)(images)[1] - check(some.rows(some.vit()), images)(images)[1]).abs().max() > 0.05
    check(without, images)


def test_more_rivals_than_there_are_classes():
    explainer = some.rows()
    explainer.recipe = explainer.recipe.but(contrast=9, contrast_weight=0.9)
    check(explainer, some.images())


@pytest.mark.parametrize(("grids", "alike"), [([(2, 6), (4, 3), (1, 1)], 1), ([(4, 6), (4, 3), (2, 6)], 3)])
def test_layers_of_other_sizes(grids, alike):
    """The map is as high as the highest and as wide as the widest; cells are compared by layers that are both."""
    explainer = some.paper()
    network, places = explainer.network_, [Enlargement(grid, (4, 6)) for grid in grids]
    network.alike = alike
    features = [zoo.normal(2, c, *hw).float() for c, hw in zip(network.channels, grids, strict=True)]
    classes = torch.tensor([1, 4])
    with torch.no_grad():
        found = ClassMaps(network, places, 0, 0.0)(torch.zeros(2, 5), classes, features)
        close(found, network(features, classes[:, None]))
    assert found.shape == (2, 1, 4, 6)


@pytest.mark.parametrize("layers", [["stages.1", "stages.2"], ["stages.2"]])
def test_maps_averaged_over_cells_that_are_alike(layers):
    explainer = TTAME(some.cnn(), layers, recipe=RECIPES["rows"].but(alike=3))
    check(zoo.fit(explainer, [some.images()], max_steps=0), some.images())


def test_another_size_than_that_of_the_example():
    module, explainer = some.rows().as_module(some.images()), some.rows()
    larger = zoo.normal(2, 3, 48, 40).float()
    close(module(larger)[1], explainer.attribute(larger)[:, :1])


class Padded(nn.Module):
    """Makes its images larger, above and to the left, before it looks at them."""

    def __init__(self):
        super().__init__()
        self.inner = some.cnn()

    def forward(self, x):
        return self.inner(nn.functional.pad(x, (4, 0, 4, 0)))


@pytest.mark.parametrize("recipe", ["rows", "paper"])
def test_a_model_that_pads(recipe):
    explainer, images = getattr(some, recipe)(Padded(), layers=["inner.stages.1", "inner.stages.2"]), some.images()
    module = check(explainer, images)
    moved = module(images)[1]
    assert module.enlarge.rows is not None
    module.enlarge.rows = None
    assert float((module(images)[1] - moved).abs().max()) > 0.1, "as if the cells lay over all of the image"


def dynamic_vit(**options):
    return cases.vit(global_pool="token", dynamic_img_size=True, **options)


@pytest.mark.parametrize("size", [(19, 45), (40, 24), (32, 32)])
def test_position_means_at_other_sizes_than_that_of_the_fit(size):
    model = dynamic_vit(patch_size=4, dynamic_img_pad=True)
    explainer = zoo.fit(TTAME(model, recipe="attended"), [zoo.normal(32, 3, 33, 46).float()], max_steps=0)
    check(explainer, zoo.normal(3, 3, *size, seed=4).float())


@pytest.mark.parametrize("column", [False, True])
def test_one_logit(column):
    model, images = zoo.OneValue(some.cnn(), column=column), some.images(6)
    with torch.no_grad():
        model.model.head.bias[1] -= model(images).median() + 1e-3
    explainer = some.rows(model)
    logits, maps, classes = explainer.as_module()(images)
    assert logits.shape == ((6, 1) if column else (6,))
    assert torch.equal(classes, (logits.reshape(-1) > 0).long())
    assert set(classes.tolist()) == {0, 1}
    close(maps, explainer.attribute(images)[:, :1])
    close(CAM(model).as_module()(images, 1 - classes)[1], CAM(model).attribute(images, 1 - classes)[:, :1], 1e-5)


LAYOUTS = {
    "nchw": (Grid(), lambda m: m),
    "nhwc": (Grid("nhwc"), lambda m: m.permute(0, 2, 3, 1)),
    "tokens": (Grid("tokens", 2, (3, 4)), lambda m: torch.cat([m[:, :, :2, 0], m.flatten(2)], 2).transpose(1, 2)),
    "channel_tokens": (
        Grid("channel_tokens", 1, (3, 4)),
        lambda m: torch.cat([m[:, :, :1, 0], m.flatten(2)], 2),
    ),
    "in another order": (
        Grid("tokens", 0, (3, 4), tuple(range(11, -1, -1))),
        lambda m: m.flatten(2).flip(2).transpose(1, 2),
    ),
}


@pytest.mark.parametrize(("grid", "lay"), LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_and_the_run_that_is_meant(grid, lay):
    maps = zoo.normal(2, 5, 3, 4)
    reading = Reading(Tap("x", grid, 5, calls=3, call=-2), (24, 32))
    runs = [lay(maps * factor) for factor in (0, 1, 2)]
    assert torch.equal(reading(runs, (2, 3, 24, 32)), maps)


def test_tokens_of_larger_images_make_larger_maps():
    reading = Reading(Tap("x", Grid("tokens", 1, (3, 4)), 5), (24, 32))
    maps = zoo.normal(2, 5, 5, 6)
    tokens = torch.cat([maps[:, :, :1, 0], maps.flatten(2)], 2).transpose(1, 2)
    assert torch.equal(reading([tokens], (2, 3, 40, 48)), maps)


@pytest.mark.parametrize("hw", [(1, 1), (3, 5)])
def test_ranks_by_counting_are_ranks_by_searching(hw):
    maps = zoo.normal(2, 1, *hw).round(decimals=1)  # with ties
    assert torch.equal(counted_ranks(maps), rank_scale(maps))


# ---------------------------------------------------------------------- a module of its own


def test_nothing_of_the_model_is_its_own():
    """Moved, switched, trained on or thrown away: the model does not notice."""
    explainer, images = some.rows(), some.images()
    model = explainer.model.train()
    before = {name: (t.dtype, t.data_ptr(), t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()}
    module = explainer.as_module().double()
    close(module(images.double())[1], explainer.attribute(images)[:, :1].double(), 1e-5)
    after = {name: (t.dtype, t.data_ptr(), t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()}
    assert after == before
    assert model.training
    assert not module.model.training
    assert not any(m._forward_hooks for m in model.modules())
    assert next(explainer.network_.parameters()).dtype == torch.float32


@pytest.mark.gpu
def test_moved_to_a_gpu():
    explainer, images = some.rows(), some.images()
    logits, maps, classes = explainer.as_module().to("cuda")(images.cuda())
    close(maps.cpu(), explainer.attribute(images)[:, :1], 1e-4)
    assert torch.equal(classes.cpu(), logits.argmax(1).cpu())
    assert next(explainer.model.parameters()).device.type == "cpu"


def test_it_costs_no_memory_until_it_is_moved():
    explainer = some.rows()
    module = explainer.as_module()
    assert module.model.head.weight.data_ptr() == explainer.model.head.weight.data_ptr()
    assert module.head.network.fuser.weight.data_ptr() == explainer.network_.fuser.weight.data_ptr()
    assert not any(p.requires_grad for p in module.parameters())


def test_copies_and_pickles_listen_to_themselves():
    module, images = some.rows().as_module(), some.images()
    wanted = module(images)[1]
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(images)[1], wanted)
        with torch.no_grad():
            twin.model.head.weight.zero_()
        assert torch.equal(module(images)[1], wanted)
        listeners = [hook for m in twin.modules() for hook in m._forward_hooks.values()]
        assert listeners
        assert all(hook.heard is twin._heard for hook in listeners)


def test_threads_do_not_hear_each_other():
    module = some.rows().as_module()
    photos = some.images(48).split(1)
    wanted = [module(photo)[1] for photo in photos]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda photo: module(photo)[1], list(photos) * 4))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted * 4, strict=True))
    assert not module._heard._passes


def test_a_pass_that_fails_leaves_nothing_behind():
    module = some.rows().as_module()
    with pytest.raises(RuntimeError):
        module(torch.zeros(1, 7, 32, 32))
    assert not module._heard._passes
    module.model(some.images())  # the model alone: nobody listens
    assert not module._heard._passes


class Pair(nn.Module):
    """Puts out a dictionary, and the map that counts is in it."""

    def forward(self, x):
        return {"other": x * 0, "map": x}


class Nested(nn.Module):
    """A layer that runs twice and puts out more than a map."""

    def __init__(self):
        super().__init__()
        self.inner, self.pair = some.cnn(), Pair()

    def forward(self, x):
        maps = self.inner.stages(self.inner.stem(self.pair(x)["map"]))
        return self.inner.head(self.pair(maps)["map"].mean((2, 3)))


def test_an_entry_of_a_layer_that_runs_twice():
    check(some.rows(Nested(), "pair"), some.images())


def test_an_in_place_module_behind_the_layer_does_not_change_the_map():
    """torchvision's ReLU works in place on what bn1 put out."""
    explainer = some.rows(cases.resnet(), ["layer2.0.bn1"])
    check(explainer, some.images(size=64))


def test_under_autocast_the_map_keeps_its_precision():
    explainer, images = some.rows(), some.images()
    with torch.autocast("cpu", torch.bfloat16):
        found = explainer.as_module(images)(images)[1]
        close(found, explainer.attribute(images)[:, :1])


def test_half_precision():
    explainer = some.rows(some.cnn().bfloat16())
    images = some.images().bfloat16()
    found = explainer.as_module()(images)[1]
    assert found.dtype == torch.bfloat16
    close(found, explainer.attribute(images)[:, :1], 0.02)


# ---------------------------------------------------------------------- compiled


@each
def test_it_compiles_without_a_break(make):
    torch._dynamo.reset()
    explainer, images = make(), some.images()
    module = explainer.as_module()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    with torch.no_grad():
        for found, wanted in zip(compiled(images), module(images), strict=True):
            close(found, wanted, 1e-5)
        close(compiled(images, torch.tensor([0, 4, 2]))[1], module(images, torch.tensor([0, 4, 2]))[1], 1e-5)
    close(module(images)[1], explainer.attribute(images)[:, :1])  # the module itself still works


# ---------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize("preprocess", ["float", "uint8"])
def test_it_standardises_inside(preprocess):
    explainer = some.rows(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    photos = (zoo.normal(2, 3, 32, 32).sigmoid() * 255).to(torch.uint8)
    unit = photos.float() / 255
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
    images = (unit - mean[:, None, None]) / std[:, None, None]
    module = explainer.as_module(preprocess=preprocess)
    found = module(photos if preprocess == "uint8" else unit)
    close(found[0], explainer.model(images), 1e-5)
    close(found[1], explainer.attribute(images)[:, :1], 1e-5)


def test_without_statistics_those_of_the_model_count():
    explainer = some.rows()
    prepare = explainer.as_module(preprocess="float").prepare
    assert isinstance(prepare, Standardise)
    close(prepare.mean.flatten(), torch.tensor(explainer.model.default_cfg["mean"]))
    close(prepare.std.flatten(), torch.tensor(explainer.model.default_cfg["std"]))


# ---------------------------------------------------------------------- what cannot be a program


def test_an_explainer_that_was_not_fitted():
    with pytest.raises(NotFittedError, match="TTAME must be trained for this model before it can explain"):
        TTAME(some.cnn()).as_module()


def test_a_method_that_needs_a_gradient():
    for call in ("as_module", "export"):
        with pytest.raises(NotImplementedError, match=r"GradCAM must need one forward pass and nothing else.*use CAM"):
            getattr(GradCAM(some.cnn()), call)("model.onnx")


def test_cam_of_several_layers():
    with pytest.raises(OptionError, match="must be one for CAM to become a program, got 2; name one"):
        CAM(some.cnn(), ["stages", "stages.2"]).as_module()


def test_a_model_that_was_trained_further():
    explainer = some.rows()
    with torch.no_grad():
        explainer.model.head.weight.add_(1)
    with pytest.raises(BackboneMismatchError, match="fitted for other weights"):
        explainer.as_module()


def test_wrong_options():
    with pytest.raises(OptionError, match="preprocess: must be one of None, 'float', 'uint8', got 'bytes'"):
        some.rows().as_module(preprocess="bytes")
    with pytest.raises(InputError, match="4 axes"):
        some.rows().as_module(torch.zeros(3, 32, 32))


class Noisy(nn.Module):
    """Draws where it must not."""

    def __init__(self):
        super().__init__()
        self.inner = some.cnn()

    def forward(self, x):
        return self.inner(nn.functional.dropout(x, 0.5, training=True))


def test_a_model_that_draws_random_numbers():
    explainer = some.rows(Noisy(), "inner.stages.1")
    with pytest.raises(UnsupportedModelError, match=r"the maps of Noisy differ by .* or draws random numbers"):
        explainer.as_module()


class Scaled(nn.Module):
    """Takes more than images."""

    def __init__(self):
        super().__init__()
        self.inner = some.cnn()

    def forward(self, x, factor):
        return self.inner(x * factor)


def test_a_model_that_takes_more_than_images():
    explainer = TTAME(Scaled(), "inner.stages.2", recipe="rows")
    explainer.fit([some.images(4)], max_steps=0, additional_forward_args=2.0, **some.QUIET)
    with pytest.raises(UnsupportedModelError, match=r"must take images and nothing else.*Scaled does not.*'factor'"):
        explainer.as_module()


class Holder:
    def __init__(self, module):
        self.module = module

    def __deepcopy__(self, memo):
        raise TypeError("cannot be copied")


def test_a_model_that_has_no_mirror_and_no_copy():
    explainer = some.rows()
    module = explainer.as_module()
    explainer.model.holder = [Holder(explainer.model.stages)]
    with pytest.raises(UnsupportedModelError, match=r"must allow copy.deepcopy to become a program.*cannot be copied"):
        explainer.as_module()
    explainer.model.holder = None
    explainer.model.trainer = types.SimpleNamespace(module=explainer.model.stages)  # no mirror, but a copy
    copied = explainer.as_module()
    assert copied.model.head.weight.data_ptr() != module.model.head.weight.data_ptr()
    close(copied(some.images())[1], module(some.images())[1])
