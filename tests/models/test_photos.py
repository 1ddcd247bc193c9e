"""Photographs in files and folders."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from attrib_zoo.errors import DataError, OptionError
from attrib_zoo.models.photos import Photos, find_photos, is_photo, open_photo, own_stems, read_boxes, writable_folder
from attrib_zoo.visualize import in_colour, overlay


def picture(path: Path, colour: tuple[int, int, int] = (200, 100, 50), **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 12), colour).save(path, **options)
    return path


def test_folders_are_searched_to_the_bottom_in_order(tmp_path) -> None:
    wanted = [picture(tmp_path / "in" / name) for name in ("a.PNG", "z.jpg", "b/c.webp", "b/d/e.bmp")]
    picture(tmp_path / "in" / ".hidden" / "x.png")
    picture(tmp_path / "in" / "out" / "y.png")
    (tmp_path / "in" / "._z.jpg").write_text("what another system leaves")
    (tmp_path / "in" / "notes.txt").write_text("no image")
    (tmp_path / "link").symlink_to(tmp_path / "in" / "b")
    assert find_photos([tmp_path / "in"], leave_out=tmp_path / "in" / "out") == wanted
    elsewhere = picture(tmp_path / "elsewhere" / "f.gif")
    (tmp_path / "in" / "c").symlink_to(elsewhere.parent)
    assert [p.resolve() for p in find_photos([tmp_path / "in"])][-2:] == [elsewhere, tmp_path / "in/out/y.png"]
    assert find_photos([wanted[2], tmp_path / "link", tmp_path / "in" / "b"]) == [wanted[2], tmp_path / "link/d/e.bmp"]


def test_addresses_are_not_downloaded() -> None:
    with pytest.raises(
        DataError, match=r"'https://.*cat.jpg' is an address; nothing is downloaded: save the photograph"
    ):
        find_photos(["https://example.org/cat.jpg"])


def test_places_without_photos_are_named(tmp_path) -> None:
    with pytest.raises(DataError, match=r"no file or folder '.*nowhere'"):
        find_photos([tmp_path / "nowhere"])
    with pytest.raises(DataError, match=r"no image in the folder '.*' or below \(.*\.jpg"):
        find_photos([tmp_path])


@pytest.mark.parametrize("turn", range(1, 9))
def test_photos_stand_upright_as_the_camera_noted(tmp_path, turn: int) -> None:
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = 255  # white in the top left corner only
    inverse = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, 3),
    }[turn]
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(np.ascontiguousarray(inverse)).save(tmp_path / "a.png", exif=exif)
    assert (np.asarray(open_photo(tmp_path / "a.png")) == upright).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_photos_of_any_mode_come_in_colour(tmp_path, mode: str) -> None:
    white = Image.new("RGB", (4, 4), "white").convert(mode)
    white.save(tmp_path / "a.tiff")
    found = open_photo(tmp_path / "a.tiff")
    assert found.mode == "RGB"
    assert np.asarray(found).min() == 255


def test_files_that_are_no_photos_are_named(tmp_path) -> None:
    Image.effect_noise((200, 200), 50).save(tmp_path / "a.jpg")
    half = (tmp_path / "a.jpg").read_bytes()[:9000]
    for content, why in ((b"", "unknown format"), (b"hello", "unknown format"), (half, "truncated")):
        (tmp_path / "b.jpg").write_bytes(content)
        with pytest.raises(
            DataError, match=rf"'.*b\.jpg' is no image that can be read \(.*{why}.*\); remove or replace"
        ):
            open_photo(tmp_path / "b.jpg")
    assert is_photo(tmp_path / "a.jpg")
    assert is_photo(tmp_path / "b.jpg")  # begins as one
    (tmp_path / "b.jpg").write_text("hello")
    assert not is_photo(tmp_path / "b.jpg")


def test_a_dataset_can_leave_out_what_cannot_be_read(tmp_path, caplog) -> None:
    paths = [picture(tmp_path / f"{i}.png", (i, i, i)) for i in range(3)]
    paths[1].write_text("no image")
    first = lambda image: torch.tensor(image.getpixel((0, 0))[0])  # noqa: E731
    with pytest.raises(DataError, match=r"'.*1\.png' is no image"):
        Photos(paths, first)[1]
    data = Photos(paths, first, skip_bad=True)
    assert [int(data[i]) for i in range(len(data))] == [0, 2, 2]
    assert "skipped" in caplog.text
    assert "1.png" in caplog.text
    with pytest.raises(DataError, match="none of the images can be read"):
        Photos([paths[1]], first, skip_bad=True)[0]


# ---------------------------------------------------------------------- hostile folders and sizes


def test_what_is_no_file_is_left_out_and_refused_by_name(tmp_path, caplog) -> None:
    good = picture(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to("pipe.jpg")
    assert find_photos([tmp_path]) == [good]
    assert caplog.text.count("is no file") == 2
    (tmp_path / "folder.png").mkdir()
    for name in ("pipe.jpg", "link.jpg", "folder.png"):
        with pytest.raises(DataError, match=rf"'.*{name}' must be a file, got a folder, a pipe or a device"):
            open_photo(tmp_path / name)
        assert not is_photo(tmp_path / name)


def test_folders_that_link_to_themselves_are_searched_once(tmp_path) -> None:
    wanted = [picture(tmp_path / name) for name in ("a.png", "d/b.png", "d/e/c.png")]
    (tmp_path / "d" / "up").symlink_to(tmp_path)
    (tmp_path / "d" / "x").symlink_to(".")
    (tmp_path / "d" / "y").symlink_to(".")
    (tmp_path / "d" / "e2").symlink_to("e")
    (tmp_path / "loop").symlink_to("loop")  # a folder's name, and an image's
    (tmp_path / "z.png").symlink_to("z.png")
    found = find_photos([tmp_path])
    assert [p for p in found if p.name != "z.png"] == wanted
    with pytest.raises(DataError, match=r"'.*z\.png' is no image that can be read \(Too many levels"):
        open_photo(tmp_path / "z.png")
    assert find_photos([tmp_path, tmp_path / "d" / "e2"]) == found
    assert find_photos([tmp_path / "z.png"]) == [tmp_path / "z.png"]


def test_a_link_that_leads_nowhere_is_a_damaged_file(tmp_path) -> None:
    (tmp_path / "a.png").symlink_to("nowhere.png")
    assert find_photos([tmp_path]) == [tmp_path / "a.png"]
    with pytest.raises(DataError, match=r"a\.png' is no image that can be read \(No such file"):
        open_photo(tmp_path / "a.png")


def test_pictures_of_the_folder_itself_are_found_where_it_is_the_output_too(tmp_path) -> None:
    wanted = picture(tmp_path / "a.png")
    assert find_photos([tmp_path], leave_out=tmp_path) == [wanted]


def test_many_names_are_quick(tmp_path) -> None:
    """What took 7.6 s for 5000 photographs of one name; quadratic work would take minutes here."""
    start = time.perf_counter()
    stems = own_stems([Path(str(i), "a.png") for i in range(20_000)])
    assert stems[:2] == ["a", "a-2"]
    assert stems[-1] == "a-20000"
    assert len(set(stems)) == 20_000
    for i in range(20_000):
        (tmp_path / f"{i}.png").touch()
    assert len(find_photos([tmp_path])) == 20_000
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((1, 5000), r"'.*a\.png' has 1 x 5000 = 0.005 million pixels, and 1311 million when its shorter side is 512"),
        (
            (5000, 1),
            r"has 5000 x 1 = .* more than the 89 million allowed; crop or shrink it, or set ATTRIB_ZOO_MAX_PIX",
        ),
        ((10_000, 9_000), r"has 10000 x 9000 = 90 million pixels, more than the 89 million allowed"),
        ((14_000, 13_300), r"has more than the 89 million pixels allowed \(Image size"),
    ],
)
def test_small_files_of_huge_cost_are_refused_before_they_are_decoded(tmp_path, monkeypatch, size, words) -> None:
    path = tmp_path / "a.png"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    Image.new("1", size).save(path)
    monkeypatch.undo()
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(DataError, match=words):
            open_photo(path)
        assert not is_photo(path)


def test_the_limit_can_be_changed(tmp_path, monkeypatch) -> None:
    path = picture(tmp_path / "a.png")  # 20 x 12, 436 906 pixels when the shorter side is 512
    monkeypatch.setenv("ATTRIB_ZOO_MAX_PIXELS", "436905")
    with pytest.raises(DataError, match=r"or set ATTRIB_ZOO_MAX_PIXELS=436906 to allow it"):
        open_photo(path)
    monkeypatch.setenv("ATTRIB_ZOO_MAX_PIXELS", "436906")
    assert open_photo(path).size == (20, 12)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # PIL itself would refuse
    assert open_photo(path).size == (20, 12)
    assert Image.MAX_IMAGE_PIXELS == 50
    for wrong in ("many", "0", "-1", ""):
        monkeypatch.setenv("ATTRIB_ZOO_MAX_PIXELS", wrong)
        for call in (open_photo, is_photo):
            with pytest.raises(OptionError, match="ATTRIB_ZOO_MAX_PIXELS: must be a positive whole number"):
                call(path)


NAMES = st.sampled_from(["a.png", "A.jpg", "a.jpg", "a-2.jpg", "a-2-2.jpg", "a-3.png", "b.png"])


@given(st.lists(st.tuples(st.integers(0, 3), NAMES), unique=True, max_size=12))
def test_every_photo_has_a_file_name_of_its_own(places: list[tuple[int, str]]) -> None:
    paths = [Path(str(folder), name) for folder, name in places]
    stems = own_stems(paths)
    assert len({stem.casefold() for stem in stems}) == len(paths)
    for stem, path in zip(stems, paths, strict=True):
        assert stem.startswith(path.stem)
    first = {path.stem.casefold(): i for i, path in reversed(list(enumerate(paths)))}
    assert all(stems[i] == paths[i].stem for i in first.values())


def test_folders_are_made_and_tried(tmp_path) -> None:
    assert list(writable_folder(tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot write into the folder '.*file' \(File exists\); choose another"):
        writable_folder(tmp_path / "file")
    with pytest.raises(DataError, match=r"cannot write into the folder '.*file/x' \(Not a directory\)"):
        writable_folder(tmp_path / "file" / "x")


def test_a_dataset_of_photos_ends(tmp_path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        Image.new("RGB", (2, 2), (i, i, i)).save(path)
    data = Photos(paths, lambda photo: torch.tensor(photo.getpixel((0, 0))[0]))
    assert [int(value) for value in data] == [0, 1, 2]
    assert int(data[-1]) == 2


# ---------------------------------------------------------------------- more than 8 bits, more than one frame

RAMP = np.arange(0, 65536, 257, dtype=np.uint16)[None].repeat(8, 0)  # 256 greys, as a microscope has them


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("x.png", RAMP),
        ("x.tif", RAMP),
        ("x.tiff", (RAMP / 65535).astype(np.float32)),
    ],
)
def test_every_grey_of_16_bit_and_float_images_is_kept(tmp_path, name, pixels):
    """PIL's own conversion cuts all values above 255 off: 2 of these 256 greys are left."""
    Image.fromarray(pixels).save(tmp_path / name)
    found = np.asarray(open_photo(tmp_path / name))
    assert found.shape == (8, 256, 3)
    assert (found == np.arange(256)[None, :, None]).all()
    with Image.open(tmp_path / name) as image:
        assert (np.asarray(in_colour(image)) == found).all()
        drawn = overlay(image, torch.zeros(2, 2), alpha=0.0)
    assert np.abs(drawn.astype(int) - found).max() <= 1


def test_a_16_bit_pgm_is_scaled_too(tmp_path):
    (tmp_path / "x.pgm").write_bytes(b"P5 256 8 65535\n" + RAMP.astype(">u2").tobytes())
    assert (np.asarray(open_photo(tmp_path / "x.pgm"))[0, :, 0] == np.arange(256)).all()


@pytest.mark.parametrize(
    ("pixels", "got"),
    [
        (np.array([[0, 70000]], dtype=np.int32), "32-bit integers from 0 to 70000"),
        (np.array([[0.0, 300.0]], dtype=np.float32), "floating-point numbers from 0 to 300"),
        (np.array([[-0.5, 0.5]], dtype=np.float32), "floating-point numbers from -0.5 to 0.5"),
        (np.array([[np.nan, 0.5]], dtype=np.float32), "floating-point numbers from nan to nan"),
    ],
)
def test_images_that_do_not_say_what_is_white_are_refused(tmp_path, pixels, got):
    Image.fromarray(pixels).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match=rf"x.tif' cannot be used: image: .*got {got}; save it with 8 or 16 bits"):
        open_photo(tmp_path / "x.tif")


@pytest.mark.parametrize("name", ["x.gif", "x.tif", "x.webp"])
def test_of_several_frames_the_first_is_used_and_that_is_said(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match=rf"{name}' has 3 frames or pages; the first is used"):
        found = open_photo(tmp_path / name)
    assert np.asarray(found)[0, 0, 0] > 200
    assert np.asarray(found)[0, 0, 2] < 60


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["a" * 240, "ж" * 120, "👩" * 60])
def test_very_long_names_are_cut_between_letters_and_stay_apart(name) -> None:
    stems = own_stems([Path("x", f"{name}.jpg"), Path("y", f"{name}.jpg"), Path(f"{name}b.jpg")])
    assert len(set(stems)) == 3
    for stem in stems:
        assert name.startswith(stem.split("-")[0])
        assert 100 < len(stem.encode()) <= 150


def test_boxes_of_a_spreadsheet_begin_with_a_mark(tmp_path) -> None:
    (tmp_path / "b.csv").write_text("\ufeffpath,xmin,ymin,xmax,ymax\na.png,1,2,3,4\n", encoding="utf-8")
    assert read_boxes(tmp_path / "b.csv")[(tmp_path / "a.png").resolve()].tolist() == [[1, 2, 3, 4]]
