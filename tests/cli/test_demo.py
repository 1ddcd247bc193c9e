"""The demonstration: what it counts, what it writes, and that T-TAME is good in it."""

from __future__ import annotations

import contextlib
import io
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attrib_zoo.cli import demo
from attrib_zoo.cli.demo import DemoResult, Measured, Settings
from attrib_zoo.errors import DataError
from attrib_zoo.methods.gradcam import GradCAM
from attrib_zoo.synthetic import Scenes, scenes, tiny_cnn, trained

SMALL = Settings(size=32, fit_scenes=320, epochs=4, held_out=24, shown=2)
printed = io.StringIO()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        return demo.run(tmp_path_factory.mktemp("demo") / "new" / "folder", settings=SMALL)


def test_it_measures_and_draws(small: DemoResult) -> None:
    from PIL import Image

    assert small.picture.name == "demo.png"
    assert [path.name for path in small.picture.parent.iterdir()] == ["demo.png"]  # nothing half-written beside it
    with Image.open(small.picture) as picture:
        picture.load()
        assert min(picture.size) > 500
        assert len(picture.convert("RGB").getcolors(10**7) or []) > 1000
    assert list(small.methods) == ["chance", "Grad-CAM", "T-TAME"]
    assert 0.8 < small.accuracy <= 1
    assert small.maps == 2 * round(24 * small.accuracy)
    assert list(small.seconds) == ["training a classifier", "fitting T-TAME", "explaining", "drawing"]
    for measured in small.methods.values():
        assert all(0 <= value <= 1 for value in asdict(measured).values())


def test_even_a_short_fit_beats_chance_and_tells_the_objects_apart(small: DemoResult) -> None:
    chance, ttame = small.methods["chance"], small.methods["T-TAME"]
    assert chance.asked == pytest.approx(small.area, rel=0.1)
    assert chance.other == pytest.approx(small.area, rel=0.1)
    assert ttame.asked > 1.5 * chance.asked
    assert ttame.asked > 1.5 * ttame.other
    assert ttame.hits > chance.hits + 0.3
    assert ttame.kept > chance.kept


def test_the_table() -> None:
    result = DemoResult(
        Path("x.png"),
        40,
        0.985,
        0.08,
        {"chance": Measured(0.081, 0.079, 0.1, 0.5), "A long name": Measured(0.25, 0.004, 1.0, 0.999)},
        {"fitting": 31.4, "drawing": 0.6},
    )
    assert str(result) == "\n".join(
        [
            "Two objects in each scene, asked about each in turn: 40 maps per method, of scenes",
            "that were in no training. The classifier names both objects in 98% of them.",
            "",
            "                                                    chance  A long name",
            "energy of the map on the asked object                 8.1%        25.0%",
            "energy of the map on the other object, ideally 0      7.9%         0.4%",
            "brightest pixel is on the asked object               10.0%       100.0%",
            "confidence kept by the brightest 15 % alone          50.0%        99.9%",
            "",
            "time: fitting 31 s, drawing 1 s",
        ]
    )


def measured(maps: Tensor, data: Scenes) -> Measured:
    return demo._measure(tiny_cnn(), data, maps)


def test_the_measures_of_maps_that_are_known() -> None:
    data = scenes(20, seed=6)
    perfect = measured(data.masks.float(), data)
    assert (perfect.asked, perfect.other, perfect.hits) == (1.0, 0.0, 1.0)
    swapped = measured(data.masks.flip(1).float(), data)
    assert (swapped.asked, swapped.other, swapped.hits) == (0.0, 1.0, 0.0)
    blind = measured(data.masks.any(1, keepdim=True).expand(-1, 2, -1, -1).float(), data)
    assert blind.asked == pytest.approx(0.5)
    assert blind.other == pytest.approx(0.5)


def test_confidence_kept_is_that_of_the_brightest_pixels() -> None:
    data = scenes(12, seed=6)
    model, maps = trained("cnn"), torch.rand(12, 2, 32, 32)
    maps += data.masks  # the object is brighter than all else, and fewer than 15 %
    big = data.masks.flatten(2).float().mean(2).amax() < 0.15
    kept = []
    for j in range(2):
        m = maps[:, j] - maps[:, j].amin((1, 2), keepdim=True)
        m = m / m.amax((1, 2), keepdim=True)
        limit = torch.quantile(m.flatten(1), 0.85, dim=1)[:, None, None]
        seen = data.images * (m * (m >= limit))[:, None]
        with torch.no_grad():
            p, q = (model((x - 0.5) / 0.25).softmax(1) for x in (data.images, seen))
        p, q = (s.gather(1, data.labels[:, j : j + 1])[:, 0] for s in (p, q))
        kept.append(torch.minimum(q / p, torch.ones(12)))
    assert bool(big) or maps.max() > 1
    assert demo._measure(model, data, maps).kept == pytest.approx(float(torch.cat(kept).mean()), abs=1e-5)


def test_both_objects_are_asked_about() -> None:
    data = scenes(3, seed=6)
    explainer = GradCAM(tiny_cnn(), upsample=False)
    found = demo._both(explainer, data)
    assert found.shape == (3, 2, 8, 8)
    for j in range(2):
        torch.testing.assert_close(found[:, j], explainer.attribute(data.inputs, target=data.labels[:, j])[:, 0])


def test_small_maps_are_scaled_then_enlarged() -> None:
    data = scenes(6, seed=9).rows(slice(0, 6))
    model, maps = trained("cnn"), torch.rand(6, 2, 8, 8)
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    large = F.interpolate((maps - low) / (high - low), size=(32, 32), mode="bilinear")
    energy = torch.stack([(large[:, j] * data.masks[:, j]).sum((1, 2)) / large[:, j].sum((1, 2)) for j in range(2)])
    peaks = [data.masks[:, j].flatten(1).gather(1, large[:, j].flatten(1).argmax(1)[:, None]) for j in range(2)]
    found = demo._measure(model, data, maps)
    assert found.asked == pytest.approx(float(energy.mean()), rel=1e-5)
    assert found.hits == pytest.approx(float(torch.cat(peaks).float().mean()))


def test_it_repeats_and_leaves_nothing_behind(small: DemoResult, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed.getvalue() == ""
    size = small.picture.stat().st_size
    torch.manual_seed(5)
    before = torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        again = demo.run(str(small.picture.parent), settings=SMALL, progress=True)  # over the old picture
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.methods == small.methods
    assert again.picture.stat().st_size == size
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "fitting T-TAME" in shown.err


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="output_dir: must be a folder that can be written to"):
        demo.run(tmp_path / "file" / "below", settings=SMALL)


@pytest.mark.slow
def test_the_full_demonstration(tmp_path: Path) -> None:
    start = time.process_time()
    result = demo.run(tmp_path)
    spent = time.process_time() - start
    chance, gradcam, ttame = result.methods.values()
    assert result.accuracy > 0.95
    assert ttame.asked > 3 * chance.asked
    assert ttame.asked > gradcam.asked
    assert ttame.asked > 4 * ttame.other
    assert ttame.hits > 0.95 > gradcam.hits
    assert ttame.kept > 0.98
    assert spent < 180, f"the demonstration took {spent:.0f} s of CPU time"
