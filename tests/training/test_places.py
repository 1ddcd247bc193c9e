"""What a place has in every image, which T-TAME may leave out, and fits that take no steps."""

from __future__ import annotations

import strategies as zoo
import torch

from attrib_zoo import TTAME
from attrib_zoo.backbone.capture import frozen, run
from attrib_zoo.backbone.layers.resolve import resolve
from attrib_zoo.training.recipe import RECIPES

IMAGES = zoo.batch(32, dtype=torch.float64)  # the fewest that are enough, in several chunks


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
    rows = without.network_.fuser.weight[:, :, 0, 0].detach()
    whole = torch.cat(features, dim=1)
    bias = whole.mean(0) - whole.mean((0, 2, 3))[:, None, None]
    assert float(bias.abs().max()) > 0.1
    raw = torch.einsum("kc,nchw->nkhw", rows, whole - bias)
    low, high = raw.amin((2, 3), keepdim=True), raw.amax((2, 3), keepdim=True)
    torch.testing.assert_close(without.maps(images), (raw - low) / (high - low), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(without.maps(images), plain.maps(images), atol=0.01)
    assert zoo.fit(TTAME(model, recipe=recipe.but(forget_places=True)), [images[:31]]).network_.places == []


def test_forgotten_places_are_in_the_file_and_fit_other_sizes(tmp_path):
    from timm.models import VisionTransformer

    model = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=5, dynamic_img_size=True
    ).eval()
    recipe = RECIPES["rows"].but(forget_places=True)
    explainer = zoo.fit(TTAME(model, recipe=recipe, upsample=False), [IMAGES.float()])
    again = TTAME.load(explainer.save(tmp_path / "places.safetensors"), model)
    assert again.network_.places == ["place0", "place1"]
    assert torch.equal(again.attribute(IMAGES.float()), explainer.attribute(IMAGES.float()))
    assert again.attribute(zoo.batch(2, size=24)).shape[-2:] == (6, 6)


def test_a_resumed_fit_is_not_asked_for_its_steps(tmp_path):
    model, images = zoo.small_vit(), IMAGES.float()
    first = zoo.fit(TTAME(model), [images], checkpoint_dir=tmp_path)
    again = zoo.fit(TTAME(model), [images], resume_from=tmp_path)
    assert torch.equal(first.network_.fuser.weight, again.network_.fuser.weight)
