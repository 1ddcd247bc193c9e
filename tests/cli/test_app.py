"""The page: what it computes, and how it behaves in a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_cases import MODEL, NAMES, failure, make_files, noise
from PIL import Image

from attrib_zoo import GradCAM, HiResCAM, models
from attrib_zoo.cli import app
from attrib_zoo.cli.studio import OPACITY, Studio, drawn, gallery, studio_of, write_maps, write_picture
from attrib_zoo.errors import DataError, OptionError


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = make_files(tmp_path_factory.mktemp("files"))
    noise(folder / "wide.png", 3, (360, 200))
    (folder / "no.jpg").write_text("no image")
    Image.new("1", (20000, 20000)).save(folder / "huge.png")
    return folder


def words_of(files: Path) -> list[str]:
    return ["--model", MODEL, "--weights", str(files / "w.pth"), "--classes", str(files / "names.txt")]


@pytest.fixture(scope="module")
def loaded(files: Path) -> models.LoadedModel:
    return models.load(MODEL, weights=files / "w.pth", class_names=NAMES)


@pytest.fixture(scope="module")
def studio(files: Path) -> Studio:
    given = {"model": MODEL, "weights": str(files / "w.pth"), "classes": str(files / "names.txt"), "device": "cpu"}
    given |= {"method": None, "explainer": None, "layers": None, "smooth": None, "scale": None, "score": "softmax"}
    return studio_of(Namespace(**given))


# ---------------------------------------------------------------------- what it computes


def test_maps_are_those_of_the_library(studio, files, loaded, tmp_path) -> None:
    sight = studio.look(files / "wide.png")
    image = loaded.transform(Image.open(files / "wide.png"))[None]
    shares = loaded.model(image).softmax(1)[0].detach()
    assert torch.allclose(sight.confidence, shares, atol=1e-6)
    assert [index for _, index, _ in studio.top(sight)] == shares.argsort(descending=True).tolist()
    found, wrong = studio.explain(sight, [2, 4], ["gradcam", "hirescam"])
    assert wrong == []
    assert list(found.maps) == [(2, "gradcam"), (2, "hirescam"), (4, "gradcam"), (4, "hirescam")]
    for (target, name), heat in found.maps.items():
        method = {"gradcam": GradCAM, "hirescam": HiResCAM}[name](loaded.model, upsample=False)
        assert torch.allclose(heat, method.attribute(image, target)[0, 0], atol=1e-5)
    with np.load(write_maps(studio, found, tmp_path / "m.npz")) as held:
        assert np.array_equal(held["4-hirescam"], found.maps[4, "hirescam"].numpy())
        assert json.loads(str(held["about"]))["classes"] == {"2": "cat", "4": "elk"}
    with Image.open(write_picture(studio, found, OPACITY, 0, tmp_path / "m.png")) as sheet:
        assert sheet.width > 2 * 360
    assert gallery(studio, found, OPACITY, 0).count("<figure>") == 4


def test_the_original_photograph_is_drawn_on(studio, files) -> None:
    """Clear photograph where the model looks and nothing speaks for the class; pale where it does not look."""
    sight = studio.look(files / "wide.png")
    photo = np.asarray(Image.open(files / "wide.png").convert("RGB")).astype(int)
    assert (sight.pixels == photo).all()
    found, _ = studio.explain(sight, [0], ["gradcam"])
    plain = drawn(found, 0, "gradcam", 0.0, 0).astype(int)
    middle, side = (slice(20, 180), slice(150, 210)), (slice(None), slice(0, 40))
    assert np.abs(plain[middle] - photo[middle]).max() <= 1
    assert np.ptp(plain[side], axis=2).max() <= 1  # grey
    strong = drawn(found, 0, "gradcam", 0.9, 0).astype(int)
    assert np.abs(strong - plain)[middle].max() > 60
    found.maps[0, "gradcam"] = torch.zeros(12, 12)
    found.maps[0, "gradcam"][3, 9] = 1.0
    sharp, smooth = (np.abs(drawn(found, 0, "gradcam", 0.9, s).astype(int) - plain).sum(2) for s in (0, 0.25))
    assert (smooth > 30).sum() > 2 * (sharp > 30).sum()
    assert np.unravel_index(sharp.argmax(), sharp.shape)[1] > 180  # right of the middle, as in the map


def test_limits_and_bad_files_are_sentences(studio, files) -> None:
    with pytest.raises(DataError, match=r"no\.jpg' is no image that can be read"):
        studio.look(files / "no.jpg")
    with pytest.raises(DataError, match=r"huge\.png'.*pixels"):
        studio.look(files / "huge.png")
    sight = studio.look(files / "wide.png")
    with pytest.raises(OptionError, match="classes: choose one to two, got 3"):
        studio.explain(sight, [0, 1, 2], ["gradcam"])
    with pytest.raises(OptionError, match="methods: choose one to four, got 0"):
        studio.explain(sight, [0], [])
    assert {"gradcam", "scorecam", "rise"} <= set(studio.methods)
    assert not {"ttame", "attentionrollout"} & set(studio.methods)  # not fitted; not of this kind of model


def test_a_method_that_cannot_explain_the_model_leaves_the_others(studio, files, monkeypatch) -> None:
    monkeypatch.setitem(studio._make, "broken", lambda: (_ for _ in ()).throw(OptionError("broken: it is")))
    found, wrong = studio.explain(studio.look(files / "wide.png"), [1], ["broken", "gradcam"])
    assert wrong == ["broken: broken: it is"]
    assert list(found.maps) == [(1, "gradcam")]


def test_without_gradio_it_says_what_to_install(files, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install 'attrib_zoo[app]'" in failure(capsys, ["app", *words_of(files)])


# ---------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def address(files: Path, tmp_path_factory) -> Iterator[str]:
    """The page, served by the real command in a process of its own."""
    pytest.importorskip("gradio", reason="the extra app is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("log") / "app.log").open("w")
    root = str(Path(app.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "attrib_zoo", "app", *words_of(files), "--port", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).read()
                break
            except OSError:
                assert server.poll() is None, Path(log.name).read_text()
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(30)
        log.close()


@pytest.fixture
def browser(tmp_path) -> Iterator[Callable[..., Any]]:
    """Makes browsers of a given width."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium and chromedriver are not installed")
    opened: list[Any] = []

    def make(width: int = 1280, height: int = 900) -> Any:
        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        flags = (
            "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        )
        for flag in [*flags.split(), "--disable-component-update", "--disable-sync", "--hide-scrollbars"]:
            options.add_argument(flag)
        options.add_argument(f"--user-data-dir={tmp_path}/profile{len(opened)}")
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        driver = webdriver.Chrome(options, service)
        opened.append(driver)
        driver.set_page_load_timeout(120)
        where = {"behavior": "allow", "downloadPath": str(tmp_path / "downloads")}
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", where)
        driver.execute_cdp_cmd(  # a window has a least width; this has not
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        return driver

    yield make
    for driver in opened:
        driver.quit()


def until(found: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            value = found()
        except Exception:  # the page replaces its elements
            value = None
        if value:
            return value
        time.sleep(0.2)
    raise AssertionError(f"never: {what}")


def one(driver: Any, selector: str) -> Any:
    return until(lambda: driver.find_element("css selector", selector), selector)


def said(driver: Any, text: str) -> str:
    def line() -> str:
        told = driver.find_element("css selector", "#said .said").text
        return told if text in told else ""

    return until(line, text)


def upload(driver: Any, path: Path) -> None:
    one(driver, "#photo input[type=file]").send_keys(str(path))


def choose(driver: Any, box: str, *names: str) -> None:
    from selenium.webdriver.common.keys import Keys

    for name in names:
        field = one(driver, f"#{box} input")
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", field)
        field.click()
        field.send_keys(name)
        until(lambda name=name: name in one(driver, f"#{box} ul[role=listbox]").text, name)
        field.send_keys(Keys.ENTER)
        field.send_keys(Keys.ESCAPE)


def pictures(driver: Any) -> list[tuple[str, str]]:
    found = driver.find_elements("css selector", "#maps figure img")
    return [(image.get_attribute("alt"), image.get_attribute("src")) for image in found]


def shot(driver: Any, name: str) -> None:
    """For people, where they ask for it: the page from top to bottom."""
    folder = os.environ.get("ATTRIB_ZOO_SHOTS")
    if folder:
        import base64

        taken = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        Path(folder, f"{name}.png").write_bytes(base64.b64decode(taken["data"]))


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_a_photograph_is_explained_in_a_browser(address, browser, files, studio, tmp_path, width) -> None:
    driver = browser(width)
    driver.get(address)
    said(driver, "Drop a photograph to begin.")
    shot(driver, f"{width}-begin")
    upload(driver, files / "wide.png")
    said(driver, "press Explain")
    sight = studio.look(files / "wide.png")
    (first, _, share), *_ = studio.top(sight)
    table = one(driver, "#top table").text
    assert first in table
    assert f"{share:.1%}" in table
    shot(driver, f"{width}-uploaded")
    other = next(name for name in NAMES if name != first)
    choose(driver, "classes", other)
    choose(driver, "methods", "hirescam", "layercam")
    one(driver, "#go").click()
    said(driver, "wide.png: done.")
    there = until(lambda: pictures(driver), "pictures")
    found, _ = studio.explain(sight, [NAMES.index(first), NAMES.index(other)], ["gradcam", "hirescam", "layercam"])
    want = re.findall(r'src="([^"]+)" alt="([^"]+)"', gallery(studio, found, OPACITY, 0))
    assert there == [(alt, src) for src, alt in want]
    assert there[0][0] == f"GradCAM for {first}"
    assert len(there) == 6
    shot(driver, f"{width}-compared")
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width  # nothing sticks out
    slider = one(driver, "#opacity input[type=range]")
    driver.execute_script(
        "arguments[0].value = 0; for (const kind of ['input', 'change', 'pointerup', 'mouseup'])"
        " arguments[0].dispatchEvent(new Event(kind, {bubbles: true}))",
        slider,
    )
    plain = until(lambda: pictures(driver) if pictures(driver) != there else None, "opacity")
    assert plain[0][1] == re.search(r'src="([^"]+)"', gallery(studio, found, 0, 0))[1]
    for box in ("png", "npz"):
        link = one(driver, f"#{box}")
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'}); arguments[0].click()", link)
        until(lambda box=box: (tmp_path / f"downloads/wide-maps.{box}").is_file(), f"download of {box}")
    with np.load(tmp_path / "downloads/wide-maps.npz") as held:
        target = NAMES.index(other)
        assert np.allclose(held[f"{target}-layercam"], found.maps[target, "layercam"].numpy(), atol=1e-6)


@pytest.mark.slow
def test_wrong_files_get_a_sentence_in_the_page(address, browser, files) -> None:
    driver = browser(400)
    driver.get(address)
    for name, text in (("no.jpg", "'no.jpg' is no image that can be read"), ("huge.png", "pixels")):
        upload(driver, files / name)
        line = said(driver, text)
        assert name in line
        assert str(files) not in line
        assert pictures(driver) == []
        shot(driver, f"400-{name}")
        driver.get(address)
    one(driver, "#go").click()
    said(driver, "Drop a photograph first.")


@pytest.mark.slow
def test_two_users_at_once_see_their_own(address, browser, files, studio) -> None:
    users = [(browser(), f"p{i}.png") for i in (1, 5)]
    for driver, name in users:
        driver.get(address)
        upload(driver, files / "photos" / name)
    for driver, _ in users:
        said(driver, "press Explain")
    for _ in range(3):
        for driver, _ in users:
            one(driver, "#go").click()
        for driver, name in users:
            said(driver, f"{name}: done.")
    for driver, name in users:
        sight = studio.look(files / "photos" / name)
        (_, index, _), *_ = studio.top(sight)
        found, _ = studio.explain(sight, [index], ["gradcam"])
        assert pictures(driver)[0][1] == re.search(r'src="([^"]+)"', gallery(studio, found, OPACITY, 0))[1]
