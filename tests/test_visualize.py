"""Pictures, by the values of their pixels."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from attrib_zoo.errors import DataError, InputError, OptionError
from attrib_zoo.visualize import figure, overlay, save_overlay

PHOTO = torch.rand(3, 24, 36, generator=torch.Generator().manual_seed(0))
PIXELS = (PHOTO * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
RAMP = torch.linspace(0, 1, 36).expand(24, 36)


def blended(photo: np.ndarray, strength: np.ndarray, name: str, alpha: float, signed: bool = False) -> np.ndarray:
    """The rule of overlays, written with NumPy: opacity grows with the strength."""
    position = (strength + 1) / 2 if signed else strength
    colours = matplotlib.colormaps[name](position)[..., :3]
    weight = alpha * np.abs(strength)[..., None]
    return np.round(255 * ((1 - weight) * photo + weight * colours))


@pytest.mark.parametrize("alpha", [0.0, 0.35, 1.0])
@pytest.mark.parametrize("name", ["turbo", "inferno"])
def test_overlay_blends_by_strength(alpha: float, name: str) -> None:
    got = overlay(PHOTO, RAMP, alpha=alpha, colormap=name)
    want = blended(PHOTO.permute(1, 2, 0).numpy(), RAMP.numpy(), name, alpha)
    assert got.dtype == np.uint8
    assert np.abs(got.astype(int) - want).max() <= 1
    if alpha == 0:
        assert (got == PIXELS).all()


def test_signed_maps_show_both_signs_around_the_photograph() -> None:
    signed = torch.linspace(-1, 0.5, 36).expand(24, 36)
    got = overlay(PHOTO, 7 * signed, signed=True)
    want = blended(PHOTO.permute(1, 2, 0).numpy(), signed.numpy(), "bwr", 0.6, signed=True)
    assert np.abs(got.astype(int) - want).max() <= 1
    blue_end, red_end = got[:, 0].mean(0), got[:, -1].mean(0)
    assert blue_end[2] > blue_end[0] + 50  # against: blue
    assert red_end[0] > red_end[2] + 20  # for: red, half as strong


@pytest.mark.parametrize("level", [0.0, 0.3, -7.0])
def test_a_constant_map_draws_the_plain_photograph(level: float) -> None:
    assert (overlay(PHOTO, torch.full((1, 7, 5), level)) == PIXELS).all()


def test_a_zero_signed_map_draws_the_plain_photograph() -> None:
    assert (overlay(PHOTO, torch.zeros(6, 9), signed=True) == PIXELS).all()


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(-10, 10), st.integers(0, 99))
def test_scale_and_offset_of_a_map_do_not_matter(scale: float, offset: float, seed: int) -> None:
    map = torch.rand(4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    difference = overlay(PHOTO, map).astype(int) - overlay(PHOTO, scale * map + offset)
    assert np.abs(difference).max() <= 2


def test_forms_of_map_agree() -> None:
    full = RAMP.expand(3, -1, -1)
    for form in (RAMP[None], full, full.double(), full.clone().requires_grad_()):
        assert (overlay(PHOTO, form) == overlay(PHOTO, RAMP)).all()


def test_a_small_map_is_put_where_it_belongs() -> None:
    spot = torch.zeros(4, 6)
    spot[0, 5] = 1  # top right
    changed = np.abs(overlay(torch.zeros(3, 24, 36), spot).astype(int)).sum(2) > 0
    rows, columns = np.nonzero(changed)
    assert rows.max() == 8  # the centres of the second row and the last column but one lie at 9 and 27
    assert columns.min() == 27


def test_forms_of_image_agree() -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    want = overlay(PHOTO, RAMP)
    standardised = (PHOTO - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    whole = torch.from_numpy(PIXELS).permute(2, 0, 1)
    assert np.abs(overlay(standardised, RAMP, mean=mean, std=std).astype(int) - want).max() <= 1
    assert np.abs(overlay(Image.fromarray(PIXELS), RAMP).astype(int) - want).max() <= 1
    assert np.abs(overlay(whole, RAMP).astype(int) - want).max() <= 1
    grey = overlay(PHOTO[:1], torch.zeros(2, 2))
    assert (grey == PIXELS[..., :1]).all()


@pytest.mark.parametrize(
    ("image", "map", "message"),
    [
        (PHOTO[None], RAMP, r"image: .*\(C, H, W\).*got shape \(1, 3, 24, 36\).*images\[0\]"),
        (PHOTO * 4 - 2, RAMP, r"image: must lie within \[0, 1\].*mean and std"),
        (PHOTO * float("nan"), RAMP, r"image: must lie within \[0, 1\]"),
        ("cat.jpg", RAMP, "image: must be a .* tensor or a PIL image, got str"),
        (PHOTO, RAMP[None, None], r"map: .*got shape \(1, 1, 24, 36\).*maps\[0\]"),
        (PHOTO, [1, 2], "map: must be a tensor .*got list"),
        (PHOTO, torch.tensor([[1.0, float("nan")], [float("inf"), 0]]), "map: .*NaN or infinity at 2 of 4 places"),
    ],
)
def test_bad_input_is_named(image: object, map: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        overlay(image, map)  # type: ignore[arg-type]


def test_bad_options_are_named() -> None:
    with pytest.raises(OptionError, match=r"alpha: must be within \[0, 1\], got 2"):
        overlay(PHOTO, RAMP, alpha=2)
    with pytest.raises(OptionError, match="no colormap 'warm'; try 'turbo'"):
        overlay(PHOTO, RAMP, colormap="warm")
    with pytest.raises(OptionError, match="mean, std: give both"):
        overlay(PHOTO, RAMP, mean=(0.5, 0.5, 0.5))


def test_save_overlay_writes_the_overlay(tmp_path) -> None:
    path = save_overlay(tmp_path / "cat.png", PHOTO, RAMP, alpha=0.4)
    with Image.open(path) as file:
        assert (np.asarray(file) == overlay(PHOTO, RAMP, alpha=0.4)).all()
    assert [p.name for p in tmp_path.iterdir()] == ["cat.png"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path) -> None:
    old = tmp_path / "cat.nosuch"
    old.write_text("old")
    with pytest.raises(DataError, match=r"cannot write .*cat.nosuch.*another folder or file type"):
        save_overlay(old, PHOTO, RAMP)
    assert old.read_text() == "old"
    with pytest.raises(DataError, match=r"cannot write .*No such file or directory"):
        save_overlay(tmp_path / "nowhere" / "cat.png", PHOTO, RAMP)
    assert [p.name for p in tmp_path.iterdir()] == ["cat.nosuch"]


def sheet_pixels(path) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file.convert("RGB")).astype(int)


def test_sheet_shows_each_photograph_and_its_maps(tmp_path) -> None:
    photos = [torch.full((3, 224, 224), level) for level in (0.2, 0.6)]
    left, right = torch.zeros(1, 1, 2), torch.zeros(1, 1, 2)
    left[..., 0] = right[..., 1] = 1
    path = tmp_path / "sheet.png"
    figure(photos, {"A": [left, right], "B": [right, left]}, titles=["one", "two"], path=path)
    pixels = sheet_pixels(path)
    assert pixels.shape == (28 + 26 + 2 * (24 + 224) + 8, 28 + 3 * 224 + 2 * 8, 3)
    first, second = 14 + 26 + 24 + 112, 14 + 26 + 24 + 112 + 256  # rows through the middle of the pictures
    columns = [14 + j * 232 for j in range(3)]
    for row, level, lit in ((first, 51, (None, 0, 1)), (second, 153, (None, 1, 0))):
        for x, side in zip(columns, lit, strict=True):
            ends = [np.abs(pixels[row, x + at] - level).max() > 40 for at in (15, 208)]
            assert ends == [side == 0, side == 1]


def test_sheet_across_has_the_same_pictures_in_fewer_rows(tmp_path) -> None:
    photos = [torch.full((1, 50, 50), level / 5) for level in range(1, 5)]
    maps = {"map": torch.zeros(4, 1, 3, 3)}
    figure(photos, maps, path=tmp_path / "a.png", across=2)
    pixels = sheet_pixels(tmp_path / "a.png")
    seen = [int(pixels[40 + 112 + 232 * row, 14 + 112 + 480 * column, 0]) for row in (0, 1) for column in (0, 1)]
    assert seen == [51, 102, 153, 204]


def test_sheet_of_wide_images_wastes_no_room(tmp_path) -> None:
    figure([torch.rand(3, 50, 100)], {"m": torch.rand(1, 1, 5, 10)}, path=tmp_path / "a.png")
    assert sheet_pixels(tmp_path / "a.png").shape[0] == 28 + 26 + 112


def test_titles_are_shortened_to_fit_and_never_read_as_mathematics() -> None:
    long = "the $^$ price of a very long name " * 10
    sheet = figure(PHOTO[None], {"m": RAMP[None, None]}, titles=[long])
    title = next(text for text in sheet.texts if text.get_text().startswith("the $^$ price"))
    assert title.get_text().endswith("…")
    assert title.get_window_extent().x1 <= sheet.bbox.width - 10


def test_sheet_leaves_pyplot_alone() -> None:
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    figure(PHOTO[None], {})
    assert pyplot.get_fignums() == before


@pytest.mark.parametrize(
    ("count", "columns", "titles", "message"),
    [
        (0, {}, None, "at least one image"),
        (2, {"Grad-CAM": torch.rand(3, 1, 2, 2)}, None, "column 'Grad-CAM' .*got 3 for 2 images"),
        (2, {}, ["one"], "titles .*got 1 for 2 images"),
    ],
)
def test_sheet_counts_its_entries(count: int, columns: dict, titles: list | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        figure(torch.rand(count, 3, 8, 8), columns, titles=titles)
    with pytest.raises(OptionError, match="across: must be at least 1, got 0"):
        figure(torch.rand(1, 3, 8, 8), {}, across=0)


@pytest.mark.parametrize("bands", [5, 13])
def test_of_many_bands_three_are_picked(bands):
    with pytest.raises(InputError, match=rf"got shape \({bands}, 8, 8\); of more bands pick three: image"):
        overlay(torch.rand(bands, 8, 8), torch.rand(4, 4))
