"""CAM against the head's own weights, and where it refuses."""

from __future__ import annotations

import cam_cases as nets
import engine_cases as cases
import pytest
import strategies as zoo
import torch
from cam_cases import close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attrib_zoo import CAM, GradCAM, HiResCAM, XGradCAM
from attrib_zoo.errors import UnsupportedModelError


def resnet():
    return cases.resnet().double()


@settings(max_examples=8)
@given(st.integers(1, 6), st.integers(2, 5), st.integers(4, 9), st.integers(4, 9), zoo.SEEDS)
def test_the_weights_of_the_class_times_the_feature_maps(width, classes, height, length, seed):
    model = nets.lively(nets.Pooled(width, classes), seed)
    images, targets = zoo.normal(2, 3, height, length, seed=seed), [seed % classes, 0]
    maps = model.features(images).detach()
    wanted = torch.zeros(2, 1, *maps.shape[2:], dtype=maps.dtype)
    for n, target in enumerate(targets):
        for k in range(width):
            wanted[n, 0] += model.head.weight[target, k].item() * maps[n, k]
    found = CAM(model, "features", upsample=False).attribute(images, targets)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    clipped = CAM(model, "features", upsample=False, relu=True).attribute(images, targets)
    torch.testing.assert_close(clipped, wanted.clamp(min=0), rtol=1e-10, atol=1e-12)


def test_the_mean_of_the_map_is_the_logit_without_its_bias():
    model, images = resnet(), zoo.normal(2, 3, 64, 48)
    for target in range(cases.CLASSES):
        heat = CAM(model, upsample=False).attribute(images, target)
        close(heat.mean((1, 2, 3)), (model(images)[:, target] - model.fc.bias[target]).detach())


@pytest.mark.parametrize("cls", [GradCAM, HiResCAM, XGradCAM])
def test_it_is_the_gradient_cams_times_the_area(cls):
    model, images, targets = resnet(), zoo.normal(2, 3, 64, 48), [1, 3]
    found = CAM(model, upsample=False).attribute(images, targets)
    other = cls(model, relu=False, upsample=False).attribute(images, targets)
    close(found, other[0, 0].numel() * other)


def test_several_targets_and_wrappers():
    model, images = resnet(), zoo.normal(2, 3, 32, 32)
    many = CAM(model).attribute_many(images, [0, 4])
    close(many[:, 1], CAM(model).attribute(images, 4))
    single = zoo.OneValue(model, column=False)
    towards = CAM(model).attribute(images, 1) - CAM(model).attribute(images, 0)
    close(CAM(single).attribute_many(images, [0, 1]), torch.stack([-towards, towards], 1))


class Headed(nn.Module):
    """Features, and another head each time."""

    def __init__(self, head, *, pool=True):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1) if pool else nn.Identity()
        self.flatten = nn.Flatten()
        self.head = head

    def forward(self, x):
        return self.head(self.flatten(self.pool(self.features(x))))


HEADS = {
    "two linear layers": Headed(nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))),
    "a norm": Headed(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3))),
    "no pooling": Headed(nn.Linear(64, 3), pool=False),
    "softmax": Headed(nn.Sequential(nn.Linear(4, 3), nn.Softmax(1))),
}


@pytest.mark.parametrize("name", HEADS)
def test_another_head_is_refused(name):
    model = cases.lively(HEADS[name])
    words = r"CAM: needs global average pooling and one linear layer.* behind 'features' Headed has .*Linear.*; use"
    with cases.untouched(model), pytest.raises(UnsupportedModelError, match=words):
        CAM(model, "features").attribute(zoo.normal(2, 3, 8, 8).float(), 1)


def test_a_linear_head_in_any_form_is_not():
    images = zoo.normal(2, 3, 8, 8).float()
    model = cases.lively(Headed(nn.Sequential(nn.Dropout(), nn.BatchNorm1d(4), nn.Linear(4, 6), nn.Linear(6, 3))))
    heat = CAM(model, "features", upsample=False).attribute(images, 1)
    bias = model.head(torch.zeros(1, 4))[0, 1]
    close(heat.mean((1, 2, 3)), (model(images)[:, 1] - bias).detach(), 1e-5)


@pytest.mark.parametrize(("build", "size"), [(cases.vit, 32), (cases.swin, 16)])
def test_transformers_are_refused(build, size):
    with pytest.raises(UnsupportedModelError, match="use GradCAM or HiResCAM, which need no such head"):
        CAM(build()).attribute(cases.images(2, size), 1)


def test_the_check_is_made_once_per_image_size(monkeypatch):
    checked = []
    plain = CAM._check_head
    monkeypatch.setattr(CAM, "_check_head", lambda self, *rest: (checked.append(1), plain(self, *rest)))
    explainer = CAM(nets.lively(nets.Pooled()), "features")
    for size in (8, 8, 10, 8):
        explainer.attribute(zoo.normal(1, 3, size, 8), 1)
    assert len(checked) == 2
