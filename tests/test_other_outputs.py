"""Targets that are functions of the outputs: regions, boxes, similarities, energies, and frames of one example.

Each of the examples of docs/how-to/explain-other-outputs.md stands here against autograd that is written out.
"""

from __future__ import annotations

import attention_cases as written_out
import engine_cases as cases
import pytest
import strategies as zoo
import torch
import torch.nn.functional as F
from cam_cases import close
from torch import Tensor, nn

from attrib_zoo import (
    IIA,
    RISE,
    AblationCAM,
    Contrast,
    ExtremalPerturbation,
    GenericAttention,
    GradCAM,
    HiResCAM,
    ScoreCAM,
    TransformerLRP,
)
from attrib_zoo import Scalar as Value
from attrib_zoo.errors import TargetError
from attrib_zoo.metrics.insertion_deletion import deletion

IMAGES = zoo.batch(3, dtype=torch.float64)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return zoo.small_cnn().double().eval()


def grad_cam(features: Tensor, values: Tensor) -> Tensor:
    """``(N, 1, h, w)`` of features ``(N, D, h, w)``, leaves of a graph, and the values ``(N,)`` that it led to."""
    (slope,) = torch.autograd.grad(values.sum(), features)
    return (slope.mean((2, 3), keepdim=True) * features.detach()).sum(1, keepdim=True).relu()


# ---------------------------------------------------------------------- four models


class Segmentation(nn.Module):
    """torchvision's, its output alone."""

    def __init__(self) -> None:
        from torchvision.models.segmentation import lraspp_mobilenet_v3_large

        super().__init__()
        self.net = cases.lively(lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)["out"]


def inside(logits: Tensor, mask: Tensor) -> Tensor:
    """The mean logit of class 2 in a region ``(M, H, W)``."""
    return (logits[:, 2] * mask).sum((1, 2)) / mask.sum((1, 2))


def test_a_region_of_a_segmentation():
    model, images = Segmentation().double().eval(), zoo.normal(2, 3, 64, 64)
    mask = torch.zeros(2, 64, 64, dtype=torch.float64)
    mask[0, 8:24, 8:40] = 1
    mask[1, 40:, 40:] = 1
    with cases.untouched(model, images):
        found = GradCAM(model, "net.backbone.16", upsample=False).attribute(images, Value(inside, mask))
    backbone, head = model.net.backbone(images), model.net.classifier
    deep = backbone["high"].detach().requires_grad_()
    out = F.interpolate(head({"low": backbone["low"].detach(), "high": deep}), (64, 64), mode="bilinear")
    close(found, grad_cam(deep, inside(out, mask)), 1e-8)


class Boxes(nn.Module):
    """torchvision's detector without what comes behind its head: for each anchor 4 offsets and K scores."""

    def __init__(self) -> None:
        from torchvision.models.detection import ssdlite320_mobilenet_v3_large

        super().__init__()
        self.net = cases.lively(ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3))

    def forward(self, images: Tensor) -> Tensor:
        out = self.net.head(list(self.net.backbone(images).values()))
        return torch.cat([out["bbox_regression"], out["cls_logits"]], 2)


def of_a_box(outputs: Tensor, anchor: Tensor) -> Tensor:
    """The score of class 1 of an anchor, ``(M,)``."""
    return outputs[torch.arange(len(outputs)), anchor, 4 + 1]


def test_the_score_of_a_box():
    model, images, anchors = Boxes().double().eval(), zoo.normal(2, 3, 96, 96), torch.tensor([5, 40])
    layer = "net.backbone.features.0"
    found = HiResCAM(model, layer, relu=False, upsample=False).attribute(images, Value(of_a_box, anchors))
    kept: list[Tensor] = []
    module = model.get_submodule(layer)

    def leaf(_: nn.Module, __: object, out: Tensor) -> Tensor:
        kept.append(out.detach().requires_grad_())
        return kept[-1].clone()

    handle = module.register_forward_hook(leaf)
    outputs = model(images)
    handle.remove()
    value = outputs[0, 5, 5] + outputs[1, 40, 5]
    (slope,) = torch.autograd.grad(value, kept[0])
    close(found, (slope * kept[0]).sum(1, keepdim=True).detach(), 1e-8)
    pair = HiResCAM(model, layer, relu=False, upsample=False).attribute(images, [(5, 5), (40, 5)])
    close(found, pair, 1e-12)  # the same by Captum's tuples


def test_similarity_to_a_text_and_to_another_image():
    """A model that embeds; the text is a vector, as a text encoder gives it."""
    embed = cases.vit(global_pool="token").double()
    images, other = written_out.sized_images(""), zoo.normal(1, 3, 32, 32, seed=7)
    text = zoo.normal(5, seed=3)
    reference = embed(other)[0].detach()

    def to_text(vectors: Tensor) -> Tensor:
        return torch.cosine_similarity(vectors, text.expand_as(vectors))

    targets = [to_text, Value(lambda v, r: torch.cosine_similarity(v, r), reference.expand(2, -1).contiguous())]
    found = GenericAttention(embed, upsample=False).attribute_many(images, targets)
    for column, vector in enumerate((text, reference)):
        for n in range(2):
            image = images[n]
            held: list[Tensor] = []

            def keep(_: int, __: int, matrix: Tensor, held: list[Tensor] = held) -> Tensor:
                held.append(matrix)
                return matrix

            logits, _ = written_out.run(embed, image, keep)
            value = (logits @ vector) / logits.norm() / vector.norm()
            slopes = torch.autograd.grad(value, held)
            relevance = torch.eye(17, dtype=torch.float64)
            for block in range(3):
                part = slice(3 * block, 3 * block + 3)
                step = written_out.positive_mean([m.detach() for m in held[part]], list(slopes[part]))
                relevance = relevance + step @ relevance
            close(found[n, column, 0], relevance[0, 1:].view(4, 4).detach(), 1e-8)


# ---------------------------------------------------------------------- all methods


def energy(outputs: Tensor) -> Tensor:
    return outputs.logsumexp(1)


def weighted(outputs: Tensor, weights: Tensor) -> Tensor:
    return (outputs * weights).sum(1)


CLASSES = torch.tensor([2, 0, 4])
ONE_HOT = F.one_hot(CLASSES, 5).double()
METHODS = {
    "gradients": lambda m: HiResCAM(m),
    "masks": lambda m: RISE(m, n_masks=20, score="logit"),
    "feature maps as masks": lambda m: ScoreCAM(m, score="logit"),
    "ablation": lambda m: AblationCAM(m, score="logit"),
    "path": lambda m: IIA(m, n_steps=3),
    "optimisation": lambda m: ExtremalPerturbation(m, max_iter=3, step=4, sigma=4.0, score="logit"),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_function_that_picks_a_class_is_that_class(model, method):
    """Each image has a class of its own: rows of a Scalar follow the copies that a method makes."""
    explainer = METHODS[method](model)
    torch.manual_seed(0)
    wanted = explainer.attribute(IMAGES, CLASSES)
    torch.manual_seed(0)
    found = explainer.attribute(IMAGES, Value(weighted, ONE_HOT))
    close(found, wanted, 1e-9)
    many = explainer.attribute_many(IMAGES, [energy, Value(weighted, ONE_HOT)])
    close(many[:, 1], wanted, 1e-9)
    assert float((many[:, 0] - many[:, 1]).abs().max()) > 0


def test_measures_take_functions(model):
    maps = HiResCAM(model).attribute(IMAGES, CLASSES)
    wanted = deletion(model, IMAGES, maps, CLASSES, score=lambda outputs: outputs)
    close(deletion(model, IMAGES, maps, Value(weighted, ONE_HOT)), wanted, 1e-9)


# ---------------------------------------------------------------------- several frames


def test_frames_of_one_example_are_explained_beside_each_other(model):
    """A clip's embeddings are averaged; frame by frame, with the sum of the others beside."""
    clips = zoo.normal(2, 4, 3, *IMAGES.shape[-2:])
    head = nn.Linear(5, 3).double()
    frames = clips.flatten(0, 1)
    vectors = model(frames).detach().unflatten(0, (2, 4))
    others = (vectors.sum(1, keepdim=True) - vectors).flatten(0, 1)
    target = torch.tensor([1, 2]).repeat_interleave(4)

    def of_the_clip(vector: Tensor, rest: Tensor, wanted: Tensor) -> Tensor:
        return head((vector + rest) / 4).relu().gather(1, wanted[:, None])[:, 0]

    found = GradCAM(model, upsample=False).attribute(frames, Value(of_the_clip, others, target))
    features = model.stages(frames).detach().requires_grad_()
    joint = head(model.head(features.mean((2, 3))).unflatten(0, (2, 4)).mean(1)).relu()
    close(found, grad_cam(features, joint[[0, 1], [1, 2]]), 1e-9)


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (lambda out: out, r"one floating-point value for each of the 3 rows of the outputs \(3, 5\), got .*\(3, 5\)"),
        (lambda out: out.sum(), r"got torch.float64 \(\)"),
        (lambda out: out.argmax(1), r"got torch.int64 \(3,\)"),
        (lambda out: 1.0, "got float"),
        (Value(weighted, ONE_HOT[:2]), "must have a row for each of the 3 images, got 2 rows"),
        ([energy, energy, energy], "one function stands for all images, got a list of them"),
    ],
)
def test_what_is_no_value_per_image_is_said(model, target, said):
    with pytest.raises(TargetError, match=said):
        GradCAM(model).attribute(IMAGES, target)


def test_what_knows_classes_only_refuses_functions(model):
    with pytest.raises(TargetError, match=r"must be classes, or functions of the outputs, but not both"):
        GradCAM(model).attribute_many(IMAGES, [1, energy])
    with pytest.raises(TargetError, match=r"must be a class, .* got Scalar\(energy\); use a method that reads"):
        ExtremalPerturbation(model, max_iter=2, contrastive=True).attribute(IMAGES, energy)
    with pytest.raises(TargetError, match="TransformerLRP starts from a relevance of one at a class"):
        TransformerLRP(written_out.vit()).attribute(cases.images(), energy)
    with pytest.raises(TargetError, match="must be given a function of the outputs, got 3"):
        Value(3)
    with pytest.raises(TargetError):
        GradCAM(model).attribute(IMAGES, Contrast(target=energy))


def test_a_trained_explainer_refuses_functions():
    from attrib_zoo import TTAME

    small = zoo.small_cnn()
    explainer = zoo.fit(TTAME(small, recipe="paper"), [IMAGES.float()], max_steps=1)
    with pytest.raises(TargetError, match=r"must be a class, for what was asked knows classes only"):
        explainer.attribute(IMAGES.float(), energy)
