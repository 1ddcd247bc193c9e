"""Where in a photograph the model looks, and maps laid over the whole of it."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torchvision import transforms

from attrib_zoo.models.crop import placed, seen


def preprocessing(resize: int | tuple[int, int], crop: int) -> transforms.Compose:
    return transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(crop), transforms.ToTensor()])


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (300, 300), (4000, 1000), (90, 70)])
def test_a_central_crop_is_found(size) -> None:
    width, height = size
    share = 224 / 256 * min(size)
    want = ((1 - share / width) / 2, (1 - share / height) / 2, (1 + share / width) / 2, (1 + share / height) / 2)
    assert seen(preprocessing(256, 224), *size) == pytest.approx(want, abs=0.006)


def test_a_squeezed_photograph_is_seen_whole() -> None:
    assert seen(preprocessing((224, 224), 224), 900, 300) == pytest.approx((0, 0, 1, 1), abs=0.006)


def test_a_crop_at_a_side_is_found() -> None:
    view = transforms.Compose(
        [transforms.Lambda(lambda p: p.crop((0, 0, p.width // 2, p.height))), transforms.ToTensor()]
    )
    assert seen(view, 400, 200) == pytest.approx((0, 0, 0.5, 1), abs=0.006)


def test_a_border_lies_beyond_the_photograph() -> None:
    left, _, right, _ = seen(preprocessing(100, 200), 300, 300)
    assert (left, right) == pytest.approx((-0.5, 1.5), abs=0.02)


def test_a_map_lies_where_the_model_looked() -> None:
    photo = torch.zeros(40, 80)
    photo[10:20, 50:60] = 1
    image = Image.fromarray((photo * 255).byte().numpy()).convert("RGB")
    view = preprocessing(40, 40)
    heat = view(image)[0]  # a map that says exactly where the white is
    whole, inside = placed(heat, seen(view, 80, 40), (40, 80))
    assert inside.sum() == 40 * 40
    assert inside[:, 20:60].all()
    assert (whole - photo).abs()[:, 20:58].max() < 0.05
    assert not whole[~inside].any()


def test_a_map_that_reaches_beyond_is_cut() -> None:
    whole, inside = placed(torch.ones(4, 4), (-0.5, 0.0, 0.5, 1.0), (8, 8))
    assert inside[:, :4].all()
    assert not inside[:, 4:].any()
    assert whole.sum() == 32
