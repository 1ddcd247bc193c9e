"""A Contrast explains the score of a class less a share of the mean of the next ones: against plain autograd."""

from __future__ import annotations

import pytest
import strategies as zoo
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attrib_zoo
from attrib_zoo import (
    CAM,
    RISE,
    TTAME,
    Contrast,
    ExtremalPerturbation,
    FullGrad,
    GenericAttention,
    GradCAM,
    HiResCAM,
    LCAMImg,
    ScoreCAM,
    TransformerLRP,
)
from attrib_zoo.errors import TargetError
from attrib_zoo.masking import min_max

K, WEIGHT = 2, 0.7
IMAGES = zoo.batch(3, dtype=torch.float64)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return zoo.small_cnn().double().eval()


def ranked(logits: Tensor, own: int) -> list[int]:
    """The other classes, the largest logit first."""
    return [c for c in sorted(range(len(logits)), key=lambda c: -float(logits[c])) if c != own]


def score(outputs: Tensor, own: Tensor, kind: str = "logit") -> Tensor:
    """Formula by formula, image by image."""
    values = {"logit": outputs, "softmax": outputs.softmax(1), "logsoftmax": outputs.log_softmax(1)}[kind]
    found = []
    for row, logits, c in zip(values, outputs.detach(), own.tolist(), strict=True):
        rivals = ranked(logits, c)[:K]
        found.append(row[c] - WEIGHT * sum(row[j] for j in rivals) / len(rivals))
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["logit", "softmax", "logsoftmax"])
@pytest.mark.parametrize("target", [None, 3, [4, 0, 1]])
def test_gradient_methods_differentiate_the_difference(model, kind, target):
    features = model.stages(IMAGES).detach().requires_grad_()
    outputs = model.head(features.mean((2, 3)))
    own = outputs.argmax(1) if target is None else torch.tensor(target).expand(len(IMAGES))
    (slope,) = torch.autograd.grad(score(outputs, own, kind).sum(), features)
    contrast = Contrast(K, WEIGHT, target)
    grad_cam = (slope.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).relu().detach()
    found = GradCAM(model, score=kind, upsample=False).attribute(IMAGES, contrast)
    torch.testing.assert_close(found, grad_cam, rtol=1e-10, atol=1e-12)
    found = HiResCAM(model, score=kind, relu=False, upsample=False).attribute(IMAGES, contrast)
    torch.testing.assert_close(found, (slope * features).sum(1, keepdim=True).detach(), rtol=1e-10, atol=1e-12)


def test_finer_cam_is_that_of_torchcam(model):
    """On the model's decision both mean the same rivals."""
    finer = getattr(pytest.importorskip("torchcam.methods"), "FinerCAM", None)
    if finer is None:
        pytest.skip("torchcam before 0.5 has no FinerCAM")
    from torchcam.methods import GradCAM as TheirGradCAM

    for n in range(len(IMAGES)):
        one = IMAGES[n : n + 1]
        with finer(model, "stages", base_method=TheirGradCAM, gamma=WEIGHT, num_references=K) as extractor:
            outputs = model(one)
            wanted = extractor(int(outputs.argmax()), outputs)[0].detach()
        found = GradCAM(model, "stages", scale="min-max", upsample=False).attribute(one, Contrast(K, WEIGHT))[:, 0]
        torch.testing.assert_close(found, wanted.to(found).view_as(found), rtol=1e-4, atol=1e-5)


def test_cam_subtracts_rows(model):
    features, outputs = model.stages(IMAGES).detach(), model(IMAGES).detach()
    rows = []
    for logits in outputs:
        own = int(logits.argmax())
        rivals = ranked(logits, own)[:K]
        rows.append(model.head.weight[own] - WEIGHT * model.head.weight[rivals].mean(0))
    wanted = torch.einsum("nd,ndhw->nhw", torch.stack(rows), features)[:, None].detach()
    found = CAM(model, upsample=False).attribute(IMAGES, Contrast(K, WEIGHT))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:FullGrad")
@pytest.mark.parametrize("kind", [RISE, FullGrad])
def test_what_is_linear_in_the_score_subtracts_maps_of_the_same_scores(model, kind):
    """RISE sums scores times masks; FullGrad's absolute values are no difference, so only its call is looked at."""
    method = kind(model, **({"n_masks": 30} if kind is RISE else {}))
    found = method.attribute(IMAGES, Contrast(K, WEIGHT))
    assert found.isfinite().all()
    if kind is RISE:
        outputs = model(IMAGES).detach()
        own = outputs.argmax(1)
        rivals = [ranked(logits, int(c))[:K] for logits, c in zip(outputs, own, strict=True)]
        wanted = method.attribute(IMAGES, own) - WEIGHT / K * sum(
            method.attribute(IMAGES, [row[j] for row in rivals]) for j in range(K)
        )
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [LCAMImg, TTAME])
@pytest.mark.filterwarnings("ignore:.*never came up")
def test_trained_maps_are_combined_before_they_are_scaled(kind):
    model = zoo.small_cnn()
    explainer = zoo.fit(kind(model, upsample=False, recipe="paper"), [IMAGES.float()], max_steps=2)
    with torch.no_grad():
        for weights in explainer.network_.parameters():
            weights.add_(0.3 * zoo.normal(*weights.shape, seed=4, dtype=weights.dtype))
    images = IMAGES.float()
    outputs, features = explainer._features(images, ())
    raw = explainer.network_(features, None).detach()
    wanted = []
    for maps, logits in zip(raw, outputs.detach(), strict=True):
        own = int(logits.argmax())
        wanted.append(maps[own] - WEIGHT * maps[ranked(logits, own)[:K]].mean(0))
    found = explainer.attribute(images, Contrast(K, WEIGHT))
    torch.testing.assert_close(found, min_max(torch.stack(wanted)[:, None]), rtol=1e-4, atol=1e-5)


def test_several_contrasts_in_one_call_are_those_of_several_calls(model):
    method = GradCAM(model)
    asked = [Contrast(K), 2, Contrast(1, 0.3, [0, 1, 2]), Contrast(99)]
    many = method.attribute_many(IMAGES, asked)
    for column, target in enumerate(asked):
        torch.testing.assert_close(many[:, column], method.attribute(IMAGES, target))
    rows = [[Contrast(1, target=c), c] for c in (3, 0, 4)]
    mixed = method.attribute_many(IMAGES, rows)
    torch.testing.assert_close(mixed[:, 0], method.attribute(IMAGES, Contrast(1, target=[3, 0, 4])))
    torch.testing.assert_close(mixed[:, 1], method.attribute(IMAGES, [3, 0, 4]))
    each = method.attribute(IMAGES, [Contrast(1, target=3), 0, Contrast(2)])
    torch.testing.assert_close(each[0], method.attribute(IMAGES, Contrast(1, target=3))[0])
    torch.testing.assert_close(each[1], method.attribute(IMAGES, 0)[1])
    torch.testing.assert_close(each[2], method.attribute(IMAGES, Contrast(2))[2])


@pytest.mark.filterwarnings("ignore:ScoreCAM. no weight is positive")
@settings(max_examples=15)
@given(order=st.permutations(range(5)), k=st.integers(1, 6))
def test_permuted_classes_permute_the_maps(model, order, k):
    """Class ``i`` of the second model is class ``order[i]`` of the first; weight 0 is the class alone."""
    twin = zoo.SmallCNN().double().eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        twin.head.weight.copy_(model.head.weight[order])
        twin.head.bias.copy_(model.head.bias[order])
    for method in (GradCAM, ScoreCAM):
        first, second = (method(m, upsample=False) for m in (model, twin))
        wanted = first.attribute(IMAGES[:1], Contrast(k, target=order[0]))
        torch.testing.assert_close(second.attribute(IMAGES[:1], Contrast(k, target=0)), wanted, rtol=1e-8, atol=1e-10)
        alone = first.attribute(IMAGES[:1], order[0])
        torch.testing.assert_close(first.attribute(IMAGES[:1], Contrast(k, 0.0, order[0])), alone, rtol=0, atol=0)


def test_methods_that_cannot_say_who_can():
    vit = zoo.small_vit()
    images = IMAGES.float()
    assert GenericAttention(vit).attribute(images, Contrast(1)).isfinite().all()
    with pytest.raises(TargetError, match=r"negative one of a Contrast; use GenericAttention, GradCAM"):
        TransformerLRP(vit).attribute(images, Contrast(1))
    masks = ExtremalPerturbation(vit, contrastive=True, **ExtremalPerturbation.cheap_options)
    with pytest.raises(TargetError, match="use contrastive=False with it"):
        masks.attribute(images, Contrast(1))


def test_it_stands_where_users_look():
    assert attrib_zoo.Contrast is Contrast
    assert Contrast() == Contrast(3, 0.6, None)
