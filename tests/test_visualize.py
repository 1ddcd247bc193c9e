"""Pictures, by the values of their pixels."""

from __future__ import annotations

import io

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from attrib_zoo.errors import DataError, InputError, OptionError, shown
from attrib_zoo.visualize import _shortened, colour_bar, figure, overlay, picture, save_overlay

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
    want = blended(PHOTO.permute(1, 2, 0).numpy(), signed.numpy(), "PuOr_r", 0.8, signed=True)
    assert np.abs(got.astype(int) - want).max() <= 1
    against, speaks = got[:, 0].mean(0), got[:, -1].mean(0)
    assert against[2] > against[1] + 20  # purple
    assert speaks[0] > speaks[2] + 20  # orange, half as strong


def lightness(pixels: np.ndarray) -> np.ndarray:
    """CIE 1976 L*, of sRGB."""
    linear = np.where(pixels <= 10.31, pixels / 255 / 12.92, ((pixels / 255 + 0.055) / 1.055) ** 2.4)
    y = linear @ np.array([0.2126, 0.7152, 0.0722])
    return np.where(y > 0.008856, 116 * np.cbrt(y) - 16, 903.3 * y)


def test_the_strongest_evidence_is_the_brightest() -> None:
    """On black, where colours show as they are: lightness alone, which everyone sees, tells strong from weak."""
    light = lightness(overlay(torch.zeros(3, 24, 36), RAMP).astype(float)[0])
    assert (np.diff(light) > 0).all()
    assert light[-1] > 75
    assert lightness(overlay(torch.zeros(3, 24, 36), RAMP, colormap="turbo").astype(float)[0])[-1] < 35  # the old one


def test_the_bar_shows_the_colours_of_overlays() -> None:
    bar = colour_bar(64, 5, alpha=0.7, colormap="viridis")
    assert (
        bar
        == overlay(torch.full((3, 5, 64), 0.5), torch.linspace(0, 1, 64).expand(5, -1), alpha=0.7, colormap="viridis")
    ).all()
    assert (bar[:, 0] == 128).all()


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


def test_a_map_of_a_part_lies_in_its_box_and_the_box_is_outlined() -> None:
    """Pixels outside are those of the photograph; inside of two lines they are those of an overlay of the part."""
    whole = overlay(PHOTO, RAMP[:, :18], box=(5.2, 3.0, 22.9, 21.4))
    outside = np.ones((24, 36), bool)
    outside[3:21, 5:23] = False
    assert (whole[outside] == PIXELS[outside]).all()
    part = overlay(PHOTO[:, 3:21, 5:23], RAMP[:, :18])
    assert (whole[5:19, 7:21] == part[2:-2, 2:-2]).all()
    for inset, colour in ((0, 255), (1, 0)):
        rim = whole[3 + inset : 21 - inset, 5 + inset : 23 - inset]
        for side in (rim[0], rim[-1], rim[:, 0], rim[:, -1]):
            assert (side == colour).all()


def test_a_box_of_all_or_more_than_the_photograph_has_no_outline() -> None:
    assert (overlay(PHOTO, RAMP, box=(0.3, -0.2, 35.8, 24.1)) == overlay(PHOTO, RAMP)).all()
    ramp = torch.linspace(0, 1, 3 * 36).expand(24, -1)
    got = overlay(PHOTO, ramp, box=(-36, 0, 72, 24))  # of which the photograph is the middle third
    want = blended(PHOTO.permute(1, 2, 0).numpy(), ramp[:, 36:72].numpy(), "plasma", 0.8)
    assert np.abs(got.astype(int) - want).max() <= 1
    with pytest.raises(
        InputError, match=r"box: must be .* with pixels of the 36 x 24 image in it, got \(40, 0, 50, 24\)"
    ):
        overlay(PHOTO, RAMP, box=(40, 0, 50, 24))


def test_a_picture_is_the_overlay_at_its_own_size_between_title_and_legend() -> None:
    photo = torch.rand(3, 300, 400, generator=torch.Generator().manual_seed(1))
    box = (50.0, 0.0, 350.0, 300.0)
    plain, titled = (np.asarray(picture(photo, RAMP, title, box=box)) for title in ("", "tabby, 87 %\nGrad-CAM"))
    assert plain.shape == (300 + 32, 400, 3)
    assert (plain[:300] == overlay(photo, RAMP, box=box)).all()
    head = len(titled) - len(plain)
    assert (titled[head:] == plain).all()
    rows = np.flatnonzero((titled[:head] < 128).any((1, 2)))
    assert len(np.flatnonzero(np.diff(rows) > 1)) >= 1  # two lines of words
    bar = colour_bar(208, 12)
    legend = plain[300:]
    assert any((legend[y : y + 12, x : x + 208] == bar).all() for y in range(20) for x in range(190))


def test_pictures_of_tiny_and_of_huge_photographs_can_be_looked_at() -> None:
    assert picture(PHOTO, RAMP).size == (324, 216 + 32)
    huge = torch.rand(3, 30, 3000, generator=torch.Generator().manual_seed(1))
    assert picture(huge, RAMP).width == 2048
    assert picture(huge, RAMP, longest=None).width == 3000
    small = np.asarray(picture(huge, RAMP, box=(1500, 0, 3000, 30)))[:20].astype(int)
    shrunk = np.asarray(picture(huge, RAMP, alpha=0.0))[:20]
    assert (small[:, :1024] == shrunk[:, :1024]).all()
    assert np.abs(small[3:-3, 1100:] - shrunk[3:-3, 1100:]).mean() > 20


def test_a_title_that_is_too_long_ends_in_an_ellipsis() -> None:
    short, long = (np.asarray(picture(PHOTO, RAMP, "W" * count)) for count in (10, 100))
    assert short.shape == long.shape
    assert (long[:25, -8:] == 255).all()
    assert (long[:25] < 128).sum() > (short[:25] < 128).sum()


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
    with pytest.raises(OptionError, match=r"no colormap 'warm'.*; try 'plasma'"):
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
    assert pixels.shape == (28 + 26 + 2 * (24 + 224) + 8 + 30, 28 + 3 * 224 + 2 * 8, 3)
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
    assert seen == pytest.approx([51, 102, 153, 204], abs=1)  # matplotlib 3.8 rounds down


def test_sheet_of_wide_images_wastes_no_room(tmp_path) -> None:
    figure([torch.rand(3, 50, 100)], {"m": torch.rand(1, 1, 5, 10)}, path=tmp_path / "a.png")
    assert sheet_pixels(tmp_path / "a.png").shape[0] == 28 + 26 + 112 + 30


def test_a_sheet_shows_boxes_colours_and_what_they_mean(tmp_path) -> None:
    photos = [torch.full((3, 448, 448), 0.5), torch.full((3, 300, 300), 0.5)]
    maps = {"m": torch.ones(2, 1, 4, 4).tril()}
    boxes = [(0.0, 0.0, 224.0, 448.0), None]
    figure(photos, maps, boxes=boxes, colormap="viridis", alpha=0.5, path=tmp_path / "a.png", titles=["one", "two"])
    pixels = sheet_pixels(tmp_path / "a.png")
    second = pixels[14 + 26 + 24 :, 14 + 232 :][:224, :224]
    assert (np.abs(second[:, 116:] - 128) <= 1).all()  # nothing beside the box
    assert np.abs(second[150, 30] - overlay(photos[0], torch.eye(2), colormap="viridis", alpha=0.5)[0, 0]).max() <= 2
    middle = pixels.shape[1] // 2
    bar = colour_bar(180, 1, 0.5, "viridis")[0]
    assert np.abs(pixels[-14 - 10, middle - 85 : middle + 85] - bar[5:175]).max() <= 6
    with pytest.raises(InputError, match="boxes must have one entry per image, got 1 for 2 images"):
        figure(photos, maps, boxes=boxes[:1])


def test_titles_are_shortened_to_fit_and_never_read_as_mathematics() -> None:
    long = "the $^$ price of a very long name " * 10
    sheet = figure(PHOTO[None], {"m": RAMP[None, None]}, titles=[long])
    title = next(text for text in sheet.texts if text.get_text().startswith("the $^$ price"))
    assert title.get_text().endswith("…")
    assert title.get_window_extent().x1 <= sheet.bbox.width - 10


def test_notebooks_can_draw_a_sheet() -> None:
    sheet = figure(PHOTO[None], {"m": RAMP[None, None]})
    with Image.open(io.BytesIO(sheet._repr_png_())) as drawn:
        assert drawn.format == "PNG"
        assert drawn.size == tuple(sheet.bbox.size.astype(int))
        assert len(np.unique(np.asarray(drawn).reshape(-1, 4), axis=0)) > 50


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


@pytest.mark.parametrize(
    ("bands", "advice"),
    [
        (2, "of two bands pick one: image"),
        (5, "of more bands pick three: image"),
        (13, "of more bands pick three: image"),
    ],
)
def test_of_many_bands_some_are_picked(bands, advice):
    with pytest.raises(InputError, match=rf"got shape \({bands}, 8, 8\); {advice}"):
        overlay(torch.rand(bands, 8, 8), torch.rand(4, 4))


@pytest.mark.parametrize("words", ["", "a", "ab", "two words", "a  b   c", "x" * 997])
@pytest.mark.parametrize("room", [0, 1, 2, 5, 500, 1000])
def test_words_are_cut_to_the_room(words, room):
    asked = []

    def fits(text):
        asked.append(text)
        return len(text) <= room

    kept = [words[:count].rstrip() + "…" for count in range(len(words) - 1, 0, -1)]
    wanted = next((text for text in (words, *kept) if len(text) <= room), (words, *kept)[-1])
    assert _shortened(words, fits) == wanted
    assert len(asked) <= 12


@pytest.mark.parametrize(
    "name",
    ["$\\frac{", "$x$", "\ud800", "\x1b[2J", "x" * 5000],
    ids=["frac", "x", "half", "escape", "long"],
)
def test_any_name_is_drawn_as_it_stands(name, monkeypatch) -> None:
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    photo = torch.rand(3, 240, 320)
    sheet = figure([photo], {name: [torch.rand(7, 7)]}, titles=[name])
    sheet.canvas.draw()
    texts = [text.get_text() for text in sheet.texts]
    assert len(name) > 100 or texts.count(shown(name)) == 2
    assert picture(photo, torch.rand(7, 7), name).height > 240
