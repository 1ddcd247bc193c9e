"""The grid pointing game: mosaics piece by piece, energies by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attrib_zoo.errors import InputError, OptionError
from attrib_zoo.metrics import grid_mosaics, grid_pointing_game

LADDER = torch.arange(16.0, dtype=torch.float64).view(1, 4, 4)


@pytest.mark.parametrize(("cell", "share"), [(0, 10 / 120), (1, 18 / 120), (2, 42 / 120), (3, 50 / 120)])
def test_energy_by_hand(cell: int, share: float) -> None:
    found = grid_pointing_game(None, None, LADDER, cell=torch.tensor([cell]))
    assert found.tolist() == pytest.approx([share])


def test_negative_values_and_constants_do_not_count() -> None:
    game: Any = lambda maps, **options: grid_pointing_game(None, None, maps, cell=torch.tensor([3]), **options).item()  # noqa: E731
    assert game(LADDER + 7) == pytest.approx(50 / 120)
    assert game(LADDER + 7, normalize=False) == pytest.approx((50 + 28) / (120 + 112))
    assert game(LADDER - 10) == pytest.approx((0 + 1 + 4 + 5) / 15)
    assert game(LADDER * 0) == 0
    assert game(LADDER - 99) == 0


def test_a_cell_of_an_odd_map_is_shared_out_by_area() -> None:
    odd = torch.arange(9.0, dtype=torch.float64).view(1, 1, 3, 3)
    found = [grid_pointing_game(None, None, odd, cell=torch.tensor([cell])).item() for cell in range(4)]
    assert found[0] == pytest.approx((0 + 1 / 2 + 3 / 2 + 4 / 4) / 36)
    assert found[3] == pytest.approx((8 + 7 / 2 + 5 / 2 + 4 / 4) / 36)
    assert sum(found) == pytest.approx(1)


def test_nine_cells() -> None:
    maps = torch.arange(9.0).view(1, 3, 3)
    assert grid_pointing_game(None, None, maps, cell=torch.tensor([5]), side=3).item() == pytest.approx(5 / 36)


def test_what_is_not_finite_has_no_number() -> None:
    maps = torch.cat([LADDER, LADDER.clone().fill_(torch.nan)])
    assert grid_pointing_game(None, None, maps, cell=torch.tensor([0, 0])).isnan().tolist() == [False, True]


@given(seed=st.integers(0, 999), side=st.integers(2, 3))
def test_mosaics_are_their_members(seed: int, side: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(14, 2, 5, 6, generator=generator)
    classes = torch.randint(11, (14,), generator=generator)
    sure = torch.rand(14, generator=generator)
    sure[:2] = 1
    mosaics = grid_mosaics(images, classes, sure, least=0.2, side=side, shrink=False, seed=seed)
    assert set(mosaics.image.tolist()) <= set((sure >= 0.2).nonzero()[:, 0].tolist())
    for number in range(len(mosaics)):
        members, cell = mosaics.members[number].tolist(), int(mosaics.cell[number])
        assert members[cell] == int(mosaics.image[number])
        assert all(float(sure[image]) >= 0.2 for image in members)
        assert mosaics.classes[number].tolist() == classes[members].tolist()
        assert len(set(mosaics.classes[number].tolist())) == side**2
        assert int(mosaics.target[number]) == int(classes[members[cell]])
        for place, image in enumerate(members):
            down, across = divmod(place, side)
            piece = mosaics.inputs[number, :, down * 5 : down * 5 + 5, across * 6 : across * 6 + 6]
            assert torch.equal(piece, images[image])


def test_shrunk_mosaics_have_the_size_of_the_images() -> None:
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 12).contiguous()
    mosaics = grid_mosaics(images, torch.arange(4), seed=[5, 6, 7, 8])
    assert mosaics.inputs.shape == (4, 3, 8, 12)
    for number in range(4):
        flat = mosaics.inputs[number, 0, ::4, ::6].flatten()
        torch.testing.assert_close(flat, mosaics.members[number].float())


def test_cells_and_partners_depend_on_the_seed_and_every_cell_comes_up() -> None:
    images, classes = torch.zeros(40, 1, 2, 2), torch.arange(40)
    first, again, other = (grid_mosaics(images, classes, seed=seed) for seed in (0, 0, 99))
    assert torch.equal(first.members, again.members)
    assert not torch.equal(first.members, other.members)
    assert set(first.cell.tolist()) == {0, 1, 2, 3}


def test_too_few_classes_make_no_mosaic() -> None:
    images = torch.zeros(5, 3, 4, 4)
    assert len(grid_mosaics(images, torch.tensor([0, 1, 2, 2, 1]))) == 0
    assert len(grid_mosaics(images, torch.arange(5), torch.tensor([0.9, 0.9, 0.9, 0.1, 0.2]))) == 0
    assert grid_mosaics(images, torch.zeros(5).long()).inputs.shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda x: grid_mosaics(x, torch.arange(3)),
            InputError,
            "classes: must be a tensor with one value for each of",
        ),
        (lambda x: grid_mosaics(x, torch.rand(4)), InputError, "classes: must be integers"),
        (lambda x: grid_mosaics(x, torch.arange(4), torch.rand(5)), InputError, "confidence: must be a tensor"),
        (lambda x: grid_mosaics(x, torch.arange(4), side=3), OptionError, "side: must divide the images, 4 x 4, got 3"),
        (lambda x: grid_mosaics(x, torch.arange(4), least=2.0), OptionError, "least: must be a number"),
        (lambda x: grid_pointing_game(None, x, LADDER, cell=torch.zeros(4)), InputError, "attributions: must be maps"),
        (lambda x: grid_pointing_game(None, None, LADDER, cell=torch.tensor([4])), InputError, r"must be in 0\.\.3"),
    ],
)
def test_wrong_arguments(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(torch.zeros(4, 3, 4, 4))
