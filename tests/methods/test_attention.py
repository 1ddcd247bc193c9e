"""Attention of unmodified transformers, and the methods that follow it, against attention that is written out."""

from __future__ import annotations

import inspect

import attention_cases as written_out
import engine_cases as cases
import pytest
import torch
from attention_cases import ARCHITECTURES, TARGETS, assert_close, read_out, sized_images, vit
from torch import Tensor, nn

from attrib_zoo import IIA, AttentionRollout, GenericAttention, TransformerLRP
from attrib_zoo.backbone.capture import frozen
from attrib_zoo.backbone.vit.attention import find_attention, read_attention
from attrib_zoo.errors import OptionError, UnsupportedModelError


def attention_rollout(model: nn.Module, image: Tensor) -> Tensor:
    _, matrices = written_out.run(model, image)
    return written_out.rollout([sum(heads) / len(heads) for heads in matrices]).detach()


def gradient_rollout(model: nn.Module, image: Tensor, target: int) -> Tensor:
    matrices, gradients = written_out.with_gradients(model, image, target)
    return written_out.rollout([written_out.positive_mean(a, g) for a, g in zip(matrices, gradients, strict=True)])


def gae(model: nn.Module, image: Tensor, target: int) -> Tensor:
    matrices, gradients = written_out.with_gradients(model, image, target)
    relevance = torch.eye(len(matrices[0][0]), dtype=image.dtype)
    for a, g in zip(matrices, gradients, strict=True):
        relevance = relevance + written_out.positive_mean(a, g) @ relevance
    return relevance


ORACLES = {
    "rollout": (AttentionRollout, {}, lambda model, image, _: attention_rollout(model, image)),
    "gradient rollout": (AttentionRollout, {"gradient": True}, gradient_rollout),
    "gae": (GenericAttention, {}, gae),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ORACLES)
def test_maps_are_those_of_attention_written_out(architecture, method):
    build, prefix, read = ARCHITECTURES[architecture]
    cls, options, oracle = ORACLES[method]
    model, images = build().double(), sized_images(architecture)
    explainer = cls(model, mean_pooling=len(read) > 2, upsample=False, **options)
    with cases.untouched(model, images):
        found = explainer.attribute(images, target=TARGETS)
    for n, target in enumerate(TARGETS):
        wanted = read_out(oracle(model, images[n], target), prefix, read, images)
        assert_close(found[n, 0], wanted)
    many = explainer.attribute_many(images, [[3, 0], [1, 2]])
    assert_close(many[:, 0], found)


@pytest.mark.parametrize("architecture", ["class token", "torchvision", "q and k norms, layer scale"])
def test_matrices_and_gradients_are_those_of_autograd(architecture):
    model, images = ARCHITECTURES[architecture][0]().double(), sized_images(architecture)
    with frozen(model):
        found = find_attention(model, images)
        seen = list(read_attention(model, found, images, (), lambda outputs: outputs[:, [3, 1]]).matrices())[::-1]
    for n in range(2):
        for score, target in enumerate((3, 1)):
            matrices, gradients = written_out.with_gradients(model, images[n], target)
            for block, a, g in zip(seen, matrices, gradients, strict=True):
                assert_close(block.values[n], torch.stack(a))
                assert_close(block.gradients()[score, n], torch.stack(g))


def test_a_held_matrix_is_a_constant():
    """The last attention times a factor, without a gradient through its queries and keys."""
    model, images = vit().double(), sized_images("")
    factors = torch.tensor([0.3, 1.0], dtype=torch.float64)
    with frozen(model):
        found = find_attention(model, images)
        attended = read_attention(model, found, images, (), lambda outputs: outputs[:, [3]], last=factors)
        seen = list(attended.matrices())[::-1]
    for n in range(2):

        def hold(number: int, head: int, matrix: Tensor, n: int = n) -> Tensor:
            return matrix if number < 2 else factors[n] * matrix.detach()

        matrices, gradients = written_out.with_gradients(model, images[n], 3, hold)
        for block, a, g in zip(seen, matrices, gradients, strict=True):
            assert_close(block.values[n], torch.stack(a))
            assert_close(block.gradients()[0, n], torch.stack(g))


def test_every_row_of_a_rollout_sums_to_one():
    model = vit(global_pool="avg", class_token=False).double()
    maps = AttentionRollout(model, mean_pooling=True, upsample=False).attribute(sized_images(""))
    assert torch.allclose(maps.sum((2, 3)), torch.ones(2, 1, dtype=torch.float64), atol=1e-12)
    assert float(maps.min()) > 0


def test_uniform_attention_gives_a_uniform_map():
    model = vit().double()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:24] = 0
            block.attn.qkv.bias[:24] = 0
    maps = AttentionRollout(model, upsample=False).attribute(sized_images(""))
    assert torch.allclose(maps, torch.full_like(maps, (1 - 0.5**3) / 17), rtol=1e-12, atol=0)


def test_rollout_does_not_depend_on_the_target_but_checks_it():
    model, images = vit(), cases.images()
    plain = AttentionRollout(model)
    assert torch.equal(plain.attribute(images, target=0), plain.attribute(images, target=4))
    with pytest.raises(IndexError, match="5 classes"):
        plain.attribute(images, target=5)
    weighted = AttentionRollout(model, gradient=True)
    assert (plain.class_agnostic, weighted.class_agnostic, AttentionRollout.class_agnostic) == (True, False, True)
    assert not torch.allclose(weighted.attribute(images, target=0), weighted.attribute(images, target=4))


def test_fused_attention_stays_on_and_changes_nothing():
    model, images = vit(), cases.images()
    assert all(block.attn.fused_attn for block in model.blocks)
    fused = GenericAttention(model).attribute(images, target=TARGETS)
    for block in model.blocks:
        block.attn.fused_attn = False
    assert torch.allclose(GenericAttention(model).attribute(images, target=TARGETS), fused, rtol=1e-3, atol=1e-7)


def test_a_head_of_zeros_has_a_rollout():
    from torchvision.models.vision_transformer import VisionTransformer

    model = VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=5).eval()
    assert float(AttentionRollout(model).attribute(cases.images()).std()) > 0


@pytest.mark.parametrize("cls", [GenericAttention, TransformerLRP, IIA])
def test_a_head_of_zeros_gives_zeros_and_one_warning(cls):
    from torchvision.models.vision_transformer import VisionTransformer

    model = VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=5).eval()
    with pytest.warns(UserWarning, match="the map is exactly zero") as told:
        assert not cls(model).attribute(cases.images()).any()
    assert len(told) == 1
    assert told[0].filename == __file__


# ---------------------------------------------------------------------- what is refused


def beit():
    from timm.models.beit import Beit

    return Beit(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5, use_rel_pos_bias=True)


def eva():
    from timm.models.eva import Eva

    return Eva(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5, use_rot_pos_emb=True)


def cait():
    from timm.models.cait import Cait

    return Cait(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5)


def xcit():
    from timm.models.xcit import Xcit

    return Xcit(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5)


def parallel():
    from timm.models.vision_transformer import ParallelThingsBlock

    return vit(block_fn=ParallelThingsBlock)


REFUSED = {
    "a CNN": (cases.resnet, 32, "ResNet, which has none .* use GradCAM"),
    "Swin": (cases.swin, 16, r"'layers\.0\.blocks\.0\.attn' \(WindowAttention\).* use GradCAM"),
    "relative positions": (beit, 32, r"'blocks\.1\.attn' \(Attention\): its output is not softmax"),
    "rotary embeddings": (eva, 32, r"'blocks\.\d\.attn' \(EvaAttention\)"),
    "class attention": (cait, 32, r"'blocks\.0\.attn' \(TalkingHeadAttn\)|'blocks_token_only"),
    "attention of channels": (xcit, 32, r"'blocks\.\d\.attn' \(XCA\)|\(ClassAttn\)"),
    "attention that pools": (lambda: cases.vit(global_pool="map"), 32, r"'attn_pool' \(AttentionPoolLatent\)"),
    "two attentions subtracted": (lambda: vit(attn_layer="diff", num_heads=2), 32, r"'blocks\.2\.attn' \(DiffAtt"),
    "a norm of the context": (lambda: vit(scale_attn_norm=True), 32, r"'blocks\.2\.attn' \(Attention\)"),
    "two attentions side by side": (
        parallel,
        32,
        r"'blocks\.0\.attns\.1\.attn' .* it stands beside 'blocks\.0\.attns\.0",
    ),
    "a mean head": (lambda: vit(global_pool="avg"), 32, "reads 16 of 17 tokens; pass mean_pooling=True"),
}


@pytest.mark.parametrize("cls", [AttentionRollout, GenericAttention])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(case, cls):
    build, size, said = REFUSED[case]
    option = {"two attentions subtracted": "attn_layer", "a norm of the context": "scale_attn_norm"}.get(case)
    if option and option not in inspect.signature(type(vit())).parameters:
        pytest.skip(f"this version of timm has no {option}")
    model = cases.lively(build())
    images = cases.images(size=size)
    with cases.untouched(model, images), pytest.raises(UnsupportedModelError, match=said):
        cls(model).attribute(images, target=0)


def test_a_mask_in_the_call_is_noticed():
    """The same model is explained without the mask and refused with it."""
    model, images = vit(), cases.images()
    if len(inspect.signature(model.forward).parameters) == 1:
        pytest.skip("this version of timm takes no mask")
    explainer = GenericAttention(model)
    explainer.attribute(images, target=0)
    mask = torch.zeros(17, 17).masked_fill_(torch.rand(17, 17) < 0.3, -4.0)
    with pytest.raises(UnsupportedModelError, match=r"'blocks\.2\.attn' .* its output is not softmax"):
        explainer.attribute(images, target=0, additional_forward_args=mask)


class Shared(nn.Module):
    """One block that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = vit(depth=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner._pos_embed(self.inner.patch_embed(x))
        return self.inner.forward_head(self.inner.blocks(self.inner.blocks(x)))


def test_a_shared_block_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"'inner\.blocks\.0\.attn' .* runs several times"):
        AttentionRollout(Shared().eval()).attribute(cases.images())


def test_layers_are_refused():
    with pytest.raises(OptionError, match=r"layers: must be None for GenericAttention, .* got 'blocks\.1'"):
        GenericAttention(vit(), "blocks.1")
