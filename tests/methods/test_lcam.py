"""L-CAM's steps against networks, masks, losses and gradients written out by hand from the paper's equations."""

from __future__ import annotations

import itertools
import math

import cam_cases as nets
import engine_cases as cases
import pytest
import strategies as zoo
import torch
import torch.nn.functional as F
from cam_cases import close
from torch import nn

from attrib_zoo import LCAMFm, LCAMImg
from attrib_zoo.backbone.capture import run
from attrib_zoo.errors import OptionError, UnsupportedModelError
from attrib_zoo.masking import IMAGENET_MEAN, IMAGENET_STD
from attrib_zoo.training.schedule import Schedule, build
from attrib_zoo.training.session import ground

BLACK = torch.tensor([-m / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)]).double().view(1, 3, 1, 1)


class Staged(nn.Module):
    """Features behind a ReLU, a max-pooling, and a head that is not linear, so that masks change decisions."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 5, 3, 1, 1),
            nn.BatchNorm2d(5),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        self.fc1, self.fc2 = nn.Linear(5, 6), nn.Linear(6, 4)

    def trunk(self, x, depth=5):
        for module in self.features[:depth]:
            x = module(x)
        return x

    def tail(self, maps, depth=5):
        for module in self.features[depth:]:
            maps = module(maps)
        return self.fc2(self.fc1(maps.mean((2, 3))).relu())

    def forward(self, x):
        return self.tail(self.trunk(x))


def model_and_images():
    """The images are decided differently."""
    model, images = nets.lively(Staged()), zoo.normal(3, 3, 16, 20)
    with torch.no_grad():
        model.fc2.weight.mul_(10)
        model.fc2.bias.sub_(model(images).mean(0))
    return model, images


def fitted(cls, model, images, **options):
    """A head with random weights: two steps of the paper's schedule."""
    explainer = cls(model, start="random", **options)
    return zoo.fit(explainer, [images], max_steps=2, schedule="paper")


def logistic(c):
    return 1 / (1 + math.exp(-c))


def total_variation(grid):
    """Eq. 8, value by value."""
    total = 0.0
    for p, q in itertools.product(range(len(grid)), range(len(grid[0]))):
        if q + 1 < len(grid[0]):
            total += (grid[p][q] - grid[p][q + 1]) ** 2
        if p + 1 < len(grid):
            total += (grid[p][q] - grid[p + 1][q]) ** 2
    return total


def by_hand(explainer, model, images, *, fm, depth=5):
    """Features, the own map before the sigmoid, and the logits of what is masked; weights as a leaf."""
    fuser = explainer.network_.fuser
    weight = fuser.weight.detach()[:, :, 0, 0].clone().requires_grad_()
    bias = fuser.bias.detach().clone().requires_grad_()
    features = model.trunk(images, depth).detach()
    decided = model(images).argmax(1)
    maps, seen = [], []
    for x, a, y in zip(images, features, decided.tolist(), strict=True):
        heat = sum(weight[y, k] * a[k] for k in range(len(a))) + bias[y]
        mask = torch.sigmoid(heat)
        if fm:
            seen.append(model.tail(torch.stack([a_k * mask for a_k in a])[None], depth))
        else:
            large = F.interpolate(mask[None, None], size=x.shape[1:], mode="bilinear", align_corners=False)
            seen.append(model(large * x[None] + (1 - large) * BLACK))
        maps.append(heat)
    return weight, bias, decided, torch.stack(maps), torch.cat(seen)


def loss_of(maps, logits, decided, *, ce_only=False, tv=0.01, av=2.0, ce=1.5, power=0.3):
    parts = []
    for heat, u, y in zip(maps, logits, decided.tolist(), strict=True):
        entropy = torch.logsumexp(u, 0) - u[y]
        mask = torch.sigmoid(heat)
        across = (mask[:, 1:] - mask[:, :-1]).square().sum() + (mask[1:] - mask[:-1]).square().sum()
        parts.append(entropy if ce_only else tv * across + av * (mask**power).mean() + ce * entropy)
    return sum(parts) / len(parts)


VARIANTS = {
    "default": ({}, 5),
    "cross-entropy alone": ({"ce_only": True}, 5),
    "after the pooling": ({"after_pool": True}, 6),
    "other weights": ({"lambda_tv": 0.5, "lambda_av": 0.7, "lambda_ce": 0.9, "area_power": 0.8}, 5),
}


@pytest.mark.parametrize("cls", [LCAMFm, LCAMImg])
@pytest.mark.parametrize("name", VARIANTS)
def test_one_step_by_hand(cls, name):
    options, depth = VARIANTS[name]
    model, images = model_and_images()
    explainer = fitted(cls, model, images, **options)
    assert [tap.name for tap in explainer.taps(images)] == [f"features.{depth - 1}"]
    weight, bias, decided, maps, logits = by_hand(explainer, model, images, fm=cls is LCAMFm, depth=depth)
    assert len(set(decided.tolist())) > 1
    named = {"lambda_tv": "tv", "lambda_av": "av", "lambda_ce": "ce", "area_power": "power", "ce_only": "ce_only"}
    wanted = loss_of(maps, logits, decided, **{named[k]: v for k, v in options.items() if k in named})
    slopes = torch.autograd.grad(wanted, [weight, bias])
    with ground(model):
        terms = explainer.loss_terms(explainer.network_, images, (), torch.Generator())
        fuser = explainer.network_.fuser
        found = torch.autograd.grad(terms.loss, [fuser.weight, fuser.bias])
    assert terms.classes.tolist() == decided.tolist()
    close(terms.loss.detach(), wanted.detach(), 1e-6)  # black has float32 precision
    close(found[0][:, :, 0, 0], slopes[0], 1e-6)
    close(found[1], slopes[1], 1e-6)


@pytest.mark.parametrize("cls", [LCAMFm, LCAMImg])
def test_the_parts_of_the_loss_value_by_value(cls):
    model, images = model_and_images()
    explainer = fitted(cls, model, images)
    *_, maps, _ = by_hand(explainer, model, images, fm=cls is LCAMFm)
    with ground(model):
        terms = explainer.loss_terms(explainer.network_, images, (), torch.Generator())
    grids = [[[logistic(c) for c in row] for row in heat.tolist()] for heat in maps]
    assert terms.parts["variation"].item() == pytest.approx(sum(map(total_variation, grids)) / 3, rel=1e-9)
    average = sum(sum(s**0.3 for row in grid for s in row) / maps[0].numel() for grid in grids) / 3
    assert terms.parts["area"].item() == pytest.approx(average, rel=1e-9)
    clean = F.cross_entropy(model(images), terms.classes).item()
    assert terms.parts["everything"].item() == pytest.approx(1.5 * clean + 2, rel=1e-6)


@pytest.mark.parametrize("cls", [LCAMFm, LCAMImg])
def test_the_released_loss(cls):
    """All decisions of the batch in AV and TV, the border, the offset; the mask is the own map all the same."""
    model, images = model_and_images()
    explainer = fitted(cls, model, images, recipe="released")
    weight, bias, decided, _, logits = by_hand(explainer, model, images, fm=cls is LCAMFm)
    features = model.trunk(images).detach()
    area = variation = 0.0
    for a in features:
        for y in decided.tolist():
            heat = torch.sigmoid(sum(weight[y, k] * a[k] for k in range(5)) + bias[y]).detach()
            area += ((heat + 5e-4) ** 0.3).mean().item() / 9
            sides = [heat[0], heat[-1], heat[:, 0], heat[:, -1]]
            variation += (
                total_variation(heat.tolist()) / 6 + 0.3 * sum(side.square().sum().item() for side in sides) / 6
            )
    wanted = 1.5 * F.cross_entropy(logits, decided).item() + 2 * area + 0.01 * variation
    with ground(model):
        found = explainer.loss_terms(explainer.network_, images, (), torch.Generator())
    assert found.loss.item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("cls", [LCAMFm, LCAMImg])
def test_explaining_is_the_scaled_map_enlarged(cls):
    model, images = model_and_images()
    explainer = fitted(cls, model, images)
    *_, maps, _ = by_hand(explainer, model, images, fm=cls is LCAMFm)
    scaled = torch.stack([(heat - heat.min()) / (heat.max() - heat.min()) for heat in maps]).detach()
    large = F.interpolate(scaled[:, None], size=images.shape[-2:], mode="bilinear", align_corners=False)
    close(explainer.attribute(images), large.expand_as(images))
    assert sum(p.numel() for p in explainer.network_.parameters()) == 4 * (5 + 1)


def test_feature_masks_cost_the_trunk_once_and_no_gradient_there():
    model, images = model_and_images()
    explainer = fitted(LCAMFm, model, images)
    ran, graphs = [], []
    for module in (model.features[0], model.features[2]):
        plain = module._conv_forward
        module._conv_forward = lambda *a, plain=plain: (ran.append(1), plain(*a))[1]
    with model.features[2].register_forward_hook(lambda _, __, out: graphs.append(out.requires_grad)), ground(model):
        explainer.loss_terms(explainer.network_, images, (), torch.Generator())
    assert len(ran) == 2
    assert not any(graphs)


# ---------------------------------------------------------------------- layers and models


@pytest.mark.parametrize("cls", [LCAMFm, LCAMImg])
def test_the_layers_of_the_paper(cls):
    vgg, resnet, images = cases.lively(cases.SmallVGG()), cases.resnet(), cases.images(2, 64)
    assert [tap.name for tap in cls(vgg).taps(images)] == ["features.29"]
    assert [tap.name for tap in cls(vgg, after_pool=True).taps(images)] == ["features.30"]
    assert [tap.name for tap in cls(resnet).taps(images)] == ["layer4"]
    with pytest.raises(UnsupportedModelError, match=r"after_pool: needs a model .* ResNet ends in 'layer4'"):
        cls(resnet, after_pool=True).taps(images)
    with pytest.raises(OptionError, match=f"layers: {cls.__name__} reads one layer, got 2; name one, or use TTAME"):
        cls(resnet, ["layer3", "layer4"]).taps(images)


def test_transformers():
    images = cases.images(4)
    for model in (cases.vit(global_pool="token"), cases.vit()):
        with pytest.raises(UnsupportedModelError, match="LCAMFm: masks the feature maps of a convolutional network"):
            zoo.fit(LCAMFm(model), [images], max_steps=1)
        explainer = zoo.fit(LCAMImg(model), [images], max_steps=2)
        assert "masking standardized" in repr(explainer)
        assert explainer.maps(images).shape == (4, 5, 4, 4)


def test_a_mask_of_the_mean_colour():
    model, images = model_and_images()
    black, mean = (fitted(LCAMImg, model, images, masking=rule) for rule in ("auto", "standardized"))
    assert black.baseline_of(images).shape == (1, 3, 1, 1)
    assert mean.baseline_of(images) == 0


# ---------------------------------------------------------------------- schedules


def test_the_schedules():
    model, images = model_and_images()
    explainer = LCAMImg(model)
    features = [model.trunk(images).detach()]
    network = explainer.build_network([5], 4, torch.Generator())
    paper = explainer.choose_schedule("auto", 20_000, network, features)
    assert (paper.name, paper.optimizer, paper.lr, paper.weight_decay) == ("paper", "sgd", 1e-4, 5e-4)
    optimizer, falling = build(network, paper, 500, None)
    rates = []
    for _ in range(500):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        falling.step()
    assert rates == pytest.approx([1e-4 * 0.95 ** (step // 20) for step in range(500)])
    assert all(group["weight_decay"] == 5e-4 for group in optimizer.param_groups)
    released = LCAMImg(model, recipe="released").choose_schedule("auto", 10, network, features)
    optimizer, falling = build(network, released, 260, None)
    for _ in range(200):
        optimizer.step()
        falling.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-4 * 0.95**12, 2e-4 * 0.95**12])
    assert explainer.choose_schedule("auto", 100, network, features).name == "short"
    asked = "auto", "paper", "short"
    names = {
        name: LCAMImg(model, recipe="released").choose_schedule(name, 100, network, features).name for name in asked
    }
    assert names == {"auto": "released", "paper": "released", "short": "short"}
    assert not network.fuser.weight.any()
    assert Schedule(**paper.facts()) == paper


@pytest.mark.parametrize("cls", [LCAMFm, LCAMImg])
def test_a_short_fit_lowers_the_loss(cls):
    model = zoo.small_cnn()
    images = zoo.batch(24)
    explainer = zoo.fit(cls(model, start="random"), list(images.split(8)), max_steps=60)
    losses = explainer.history_.steps["loss"]
    assert sum(losses[-6:]) < 0.7 * sum(losses[:6])
    assert explainer.schedule_ == "short"


def test_options():
    model = Staged()
    with pytest.raises(OptionError, match=r"after_pool: must be left out where layers are given"):
        LCAMImg(model, "features.4", after_pool=True)
    with pytest.raises(OptionError, match=r"recipe: must be one of 'paper', 'released', got 'own'"):
        LCAMFm(model, recipe="own")
    with pytest.raises(OptionError, match=r"lambda_tv: must be a number of at least 0, got -1"):
        LCAMFm(model, lambda_tv=-1)
    with pytest.raises(OptionError, match=r"std: must be positive"):
        LCAMImg(model, mean=[0.5] * 3, std=[0.5, 0, 0.5])


@pytest.mark.parametrize("cls", [LCAMFm, LCAMImg])
def test_where_it_starts_follows_the_images_per_class(cls, tmp_path):
    """From rows below 100 images per class, 4 classes here; a second fit decides anew, a file keeps what it was."""
    model, images = model_and_images()
    per_step = len(images)
    most = (400 - 1) // per_step
    explainer = zoo.fit(cls(model), [images], max_steps=0)
    assert (explainer.start, explainer.schedule_) == ("rows", "rows")
    again = cls.load(explainer.save(tmp_path / "few.safetensors"), model)
    assert again.options()["start"] == "rows"
    assert torch.equal(again.attribute(images), explainer.attribute(images))
    assert zoo.fit(cls(model), [images] * most, epochs=1).start == "rows"
    enough = [images] * (most + 1)
    assert per_step * len(enough) >= 400
    assert zoo.fit(explainer, enough, epochs=1).start == "random"
    assert zoo.fit(explainer, [images], max_steps=0).start == "rows"
    assert zoo.fit(cls(model, recipe="released"), [images], max_steps=1).start == "random"
    folder = tmp_path / "fit"
    folder.mkdir()
    first = zoo.fit(cls(model), [images] * 4, max_steps=2, checkpoint_dir=folder)
    resumed = zoo.fit(cls(model), [images] * 4, max_steps=2, resume_from=folder)
    assert resumed.start == first.start == "rows"


@pytest.mark.parametrize("cls", [LCAMFm, LCAMImg])
def test_lcam_may_start_from_the_rows(cls):
    """Then its map of any class is CAM's, centred, before the first step; and unseen classes raise no warning."""
    model = zoo.small_cnn()
    images = zoo.batch(6)
    explainer = zoo.fit(cls(model, start="rows", upsample=False), [images], max_steps=0)
    features = run(model, images, (), explainer.taps(images))[1][0]
    weight = model.head.weight.detach()
    heat = torch.einsum("kc,nchw->nkhw", weight - weight.mean(0), features)
    low, high = heat.amin((2, 3), keepdim=True), heat.amax((2, 3), keepdim=True)
    torch.testing.assert_close(explainer.maps(images), (heat - low) / (high - low), rtol=1e-4, atol=1e-5)
    trained = zoo.fit(cls(model, start="rows", upsample=False), [images], max_steps=3, lr=0.05)
    assert trained.schedule_ == "rows"
    assert (trained.maps(images) - explainer.maps(images)).abs().max() > 1e-3
