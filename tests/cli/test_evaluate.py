"""The commands ``evaluate`` and ``layers``: what they write, what they print, what they say when something is wrong."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_cases import MODEL, NAMES, failure, make_files, noise
from PIL import Image

from attrib_zoo import RISE, TTAME, GradCAM, LayerCAM, models
from attrib_zoo.benchmark import Table, evaluate
from attrib_zoo.cli import main
from attrib_zoo.cli.shared import SCORES
from attrib_zoo.models.photos import BoxedPhotos, Photos, read_boxes

TABLES = ["table.csv", "table.json", "table.md", "table.tex"]
FILES = ["differences.md", "plots.png", "report.html", "results.jsonl", *TABLES]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A model, its class names, and six photographs, small ones below."""
    folder = make_files(tmp_path_factory.mktemp("files"))
    for i in range(6, 10):
        (folder / "photos" / f"p{i}.png").unlink()
    return folder


@pytest.fixture(scope="module")
def loaded(files: Path) -> models.LoadedModel:
    return models.load(MODEL, weights=files / "w.pth", class_names=NAMES)


def words(files: Path, output: Path, *more: str) -> list[str]:
    found = ["evaluate", "--model", MODEL, "--weights", str(files / "w.pth"), "--classes", str(files / "names.txt")]
    found += ["--data", str(files / "photos"), "--output", str(output), "--metrics", "ad,ic"]
    return [*found, "--batch-size", "4", *more]


@pytest.fixture(scope="module")
def done(files, tmp_path_factory) -> tuple[Path, str]:
    """A finished run of two methods, and what it printed."""
    import contextlib
    import io

    output = tmp_path_factory.mktemp("done") / "new" / "results"
    with contextlib.redirect_stdout(io.StringIO()) as heard:
        assert main(words(files, output, "--method", "gradcam,layercam")) == 0
    return output, heard.getvalue()


@pytest.fixture(scope="module")
def by_hand(files, loaded) -> Table:
    photos = Photos([files / f"photos/p{i}.png" for i in range(6)], loaded.transform)
    loader = torch.utils.data.DataLoader(photos, 4)
    methods = {"GradCAM": GradCAM(loaded.model), "LayerCAM": LayerCAM(loaded.model)}
    return evaluate(loaded.model, methods, loader, "ad,ic", show_progress=False)


# ---------------------------------------------------------------------- evaluate


def test_evaluate_is_the_librarys_evaluate(done, by_hand) -> None:
    folder, _ = done
    assert by_hand.methods == ["GradCAM", "LayerCAM", "random map", "image edges", "centre blob"]
    rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    cells = [(method, measure.name) for method in by_hand.methods for measure in by_hand.measures]
    assert [(row["method"], row["measure"]) for row in rows] == cells
    for row in rows:
        wanted = by_hand.estimate(row["method"], row["measure"])
        assert [float(row[k]) for k in ("mean", "low", "high")] == pytest.approx([wanted.mean, wanted.low, wanted.high])
        assert row["images"] == "6"
    assert by_hand.estimate("GradCAM", "AD(15)").high > by_hand.estimate("GradCAM", "AD(15)").low


def test_a_multi_label_model_is_measured_as_such(files, loaded, tmp_path, capsys) -> None:
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RISE, "compute_maps", lambda self, x, *_: (seen.append(self.score), x[:, :1])[1])
        more = ["--method", "gradcam,rise", "--max-images", "2", "--score", "sigmoid"]
        assert main(words(files, tmp_path / "out", *more)) == 0
    assert set(seen) == {"sigmoid"}
    assert "score sigmoid" in capsys.readouterr().out
    photos = [Photos([files / f"photos/p{i}.png" for i in range(2)], loaded.transform)[i] for i in range(2)]
    methods = {"GradCAM": GradCAM(loaded.model)}
    told = [evaluate(loaded.model, methods, [torch.stack(photos)], "ad", score=s, show_progress=False) for s in SCORES]
    drops = [float(table.values("GradCAM", "AD(50)").mean()) for table in told]
    rows = list(csv.DictReader((tmp_path / "out/table.csv").read_text().splitlines()))
    (row,) = (row for row in rows if (row["method"], row["measure"]) == ("GradCAM", "AD(50)"))
    assert float(row["mean"]) == pytest.approx(drops[1], abs=1e-3)
    assert abs(drops[0] - drops[1]) > 0.1


def test_evaluate_writes_every_format_and_says_where(done) -> None:
    folder, out = done
    assert sorted(path.name for path in folder.iterdir()) == FILES
    last = out.strip().splitlines()[-1]
    assert last.startswith(f"{folder}/: report.html, table.md")
    assert all(name in last for name in FILES)
    assert "GradCAM" in out.splitlines()[0]
    assert re.search(r"^AD\(100\) ↓ +[\d.]+ ±", out, re.MULTILINE)
    told = json.loads((folder / "table.json").read_text())
    assert (told["setting"]["model"], told["setting"]["seed"]) == ("ResNet", 0)
    assert (folder / "table.tex").read_text().startswith(r"\begin{tabular}")
    assert (folder / "differences.md").read_text().startswith("| minus GradCAM")
    with Image.open(folder / "plots.png") as picture:
        assert picture.width >= 480
    assert len((folder / "results.jsonl").read_text().splitlines()) == 1 + 5 * 2
    page = (folder / "report.html").read_text()
    assert "test_resnet on 6 images of photos" in page
    assert any(f"{name}, " in page for name in NAMES)
    assert page.count('<section class="card">') == 2


def test_a_second_run_continues(done, files, monkeypatch, capsys) -> None:
    folder, out = done
    before = (folder / "results.jsonl").read_bytes()
    monkeypatch.setattr("attrib_zoo.benchmark.runner.measured", lambda *_: pytest.fail("measured again"))
    assert main(words(files, folder, "--method", "gradcam,layercam")) == 0
    assert capsys.readouterr().out == out
    assert (folder / "results.jsonl").read_bytes() == before


def test_an_interrupted_run_says_how_to_go_on_and_ends_alike(done, files, tmp_path, monkeypatch, capsys) -> None:
    read = Photos.__getitem__

    def stop(self: Photos, index: int) -> torch.Tensor:
        if index == 5:
            raise KeyboardInterrupt
        return read(self, index)

    monkeypatch.setattr(Photos, "__getitem__", stop)
    command = words(files, tmp_path, "--method", "gradcam,layercam")
    line = failure(capsys, command, code=1)
    assert line == f"interrupted; the same command continues from {tmp_path}/results.jsonl"
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]
    monkeypatch.undo()
    assert main(command) == 0
    assert (tmp_path / "table.csv").read_text() == (done[0] / "table.csv").read_text()


def test_fewer_images_and_a_trained_explainer(files, tmp_path, capsys) -> None:
    explainer = tmp_path / "ttame.safetensors"
    fit = ["fit", *words(files, explainer)[1:9], "--output", str(explainer), "--max-steps", "2", "--workers", "0"]
    assert main([*fit, "--batch-size", "4"]) == 0
    capsys.readouterr()
    more = ("--explainer", str(explainer), "--max-images", "2", "--metrics", "sparseness")
    assert main(words(files, tmp_path / "out", *more)) == 0
    out = capsys.readouterr().out
    assert "2 images; mean" in out
    assert re.split(r"\s{2,}", out.splitlines()[0].strip())[0] == TTAME.__name__
    assert "test_resnet on 2 images of photos" in (tmp_path / "out/report.html").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--metrics", "ad,raod"], "metrics: no measure 'raod'; closest: 'road'"),
        (
            ["--metrics", "ad,ebpg"],
            "metrics: EBPG needs the true regions of each image, .*choose from ad, ic, drop, .*road",
        ),
        (["--masking", "grey"], "masking: must be one of .*'blur' or a tensor that .*, got 'grey'"),
        (["--method", "gradcma"], "no method 'gradcma'; closest: 'gradcam'"),
        (["--method", "ttame"], "ttame must be trained .*attrib-zoo fit --method ttame"),
        (["--layers", "layer9"], "no layer 'layer9'"),
        (["--data", "nowhere"], "no file or folder 'nowhere'"),
        (["--data", "{bad}"], r"'.*b\.jpg' is no image that can be read"),
        (["--model", "test_resnat"], "no model 'test_resnat'.*closest: 'test_resnet'"),
        (["--explainer", "nowhere.safetensors"], "nowhere.safetensors.* not there"),
        (["--max-images", "0"], "--max-images: .*0"),
        (["--batch-size", "many"], "--batch-size: .*many.*; see attrib-zoo evaluate --help"),
        (["--output", "{bad}/b.jpg"], r"cannot write into the folder '.*b\.jpg'"),
    ],
)
def test_evaluate_says_what_is_wrong_before_anything_is_written(files, tmp_path, capsys, change, message) -> None:
    noise(tmp_path / "bad/a.png", 1)
    (tmp_path / "bad/b.jpg").write_text("no image")
    output = tmp_path / "out"
    line = failure(capsys, words(files, output, *(word.format(bad=tmp_path / "bad") for word in change)))
    assert re.search(f"^error: .*{message}", line)
    assert not output.exists() or not any(path.stat().st_size for path in output.iterdir())


def test_boxes_go_where_the_photographs_pixels_go(files, loaded, tmp_path, capsys) -> None:
    boxes = tmp_path / "boxes.csv"
    place = Path(os.path.relpath(files / "photos", tmp_path))
    lines = [
        (place / "p0.png", 0, 0, 90, 70),
        (place / "p1.png", 45, 0, 90, 70),
        (files / "photos/p1.png", 0, 0, 9, 70),
    ]
    boxes.write_text("path,xmin,ymin,xmax,ymax\n" + "\n".join(",".join(map(str, line)) for line in lines))
    more = ["--boxes", str(boxes), "--metrics", "ebpg,sparseness", "--max-images", "3"]
    assert main(words(files, tmp_path / "out", *more)) == 0
    capsys.readouterr()
    photos = Photos([files / f"photos/p{i}.png" for i in range(3)], loaded.transform)
    data = BoxedPhotos(photos, read_boxes(boxes), loaded.mean, loaded.std)
    masks = torch.stack([data[i]["masks"] for i in range(3)])
    assert masks[0].all()
    assert not masks[2].any()
    side = masks.shape[-1]
    picture = np.zeros((70, 90, 3), np.uint8)  # what the eye would box: white where the two boxes of p1 are
    picture[:, 45:], picture[:, :9] = 255, 255
    Image.fromarray(picture).save(tmp_path / "stencil.png")
    seen = loaded.transform(Image.open(tmp_path / "stencil.png")) * torch.tensor(loaded.std)[:, None, None]
    assert torch.equal(masks[1], seen[0] + loaded.mean[0] > 0.5)
    assert 0.4 < masks[1].float().mean() < 0.7
    assert masks[1][:, side * 3 // 4 :].all()
    assert torch.equal(data[1]["image"], photos[1])
    table = csv.DictReader((tmp_path / "out/table.csv").read_text().splitlines())
    rows = {row["method"]: row for row in table if row["measure"] == "EBPG"}
    assert {row["images"] for row in rows.values()} == {"2"}, "the third has no box"
    assert float(rows["chance"]["mean"]) == pytest.approx(100 * float(masks[:2].float().mean()), abs=1e-4)
    assert float(rows["perfect map"]["mean"]) == 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"boxes: '.*boxes.csv' cannot be read \(.*\); look at the path"),
        ("path,x,y\na.png,1,2\n", r"boxes: '.*boxes.csv' must be a CSV file whose first line is path,xmin"),
        ("path,xmin,ymin,xmax,ymax\na.png,1,2,3\n", "boxes: .* must be a CSV file"),
        ("path,xmin,ymin,xmax,ymax\na.png,1,2,3,four\n", "boxes: .* must be a CSV file"),
        ("path,xmin,ymin,xmax,ymax\na.png,1,2,3,4\n", "boxes: .* must name images of the folder, .*got none of '.*p0"),
    ],
)
def test_boxes_that_cannot_be_used_are_refused(files, tmp_path, capsys, content, message) -> None:
    if content is not None:
        (tmp_path / "boxes.csv").write_text(content)
    line = failure(capsys, words(files, tmp_path / "out", "--boxes", str(tmp_path / "boxes.csv")))
    assert re.search(f"^error: {message}", line)
    boxed = ["--boxes", str(tmp_path / "boxes.csv"), "--metrics", "discrimination"]
    (tmp_path / "boxes.csv").write_text(f"path,xmin,ymin,xmax,ymax\n{files / 'photos/p0.png'},1,2,3,4\n")
    line = failure(capsys, words(files, tmp_path / "out", *boxed))
    assert re.search("^error: metrics: discrimination needs the true regions.*choose from .*ebpg", line)
    assert "--boxes" not in line


def test_results_of_another_run_are_refused_and_stay(done, files, capsys) -> None:
    folder, _ = done
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for change, message in (
        (["--method", "gradcam"], "is of another run: methods differ"),
        (["--method", "gradcam,layercam", "--seed", "4"], r"seed differ \(seed: 0, now 4\); choose another file"),
        (["--method", "gradcam,layercam", "--weights", str(files / "start.pth")], "weights differ"),
    ):
        line = failure(capsys, words(files, folder, *change))
        assert re.search(f"^error: path: '.*results.jsonl' .*{message}", line)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# ---------------------------------------------------------------------- layers


def test_layers_shows_what_can_be_explained_and_by_whom(capsys) -> None:
    assert main(["layers", MODEL]) == 0
    out = capsys.readouterr().out
    model, size = models.unloaded(MODEL)
    assert size == (3, 160, 160)
    assert out.startswith("ResNet at 160x160\n")
    found = {line.split()[0]: line.split() for line in out.splitlines() if re.match(r"layer\d|act1", line)}
    assert found["layer4"][1:6] == ["Sequential", "nchw", "5x5", "96", "0"]
    default = GradCAM(model).taps(torch.zeros(1, *size))[0].name
    assert "gradient" in found[default][-2]
    takers = dict(re.split(r"\s{2,}", line.strip()) for line in out.partition("taken by default:\n")[2].splitlines())
    assert "GradCAM" in takers["gradient"].split(", ")
    assert takers["live"] == "TTAME"
    assert "AttentionRollout" not in out, "it is for transformers"


def test_layers_of_a_transformer_at_another_size(capsys) -> None:
    assert main(["layers", "test_vit", "--size", "160"]) == 0
    out = capsys.readouterr().out
    assert "AttentionRollout" in out
    assert "FullGrad" in out, "its own layers are those of any model"
    assert "RefineCAM" not in out, "it is for CNNs"
    assert main(["layers", MODEL, "--size", "64x96"]) == 0
    assert re.search(r"^layer4 .* 2x3 ", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["test_resnat"], "no model 'test_resnat' .*closest: 'test_resnet'"),
        ([MODEL, "--size", "large"], "size: must be a height and a width such as 160x256, or one number, got 'large'"),
        ([MODEL, "--size", "0x4"], "size: must be .*got '0x4'"),
        (["test_vit", "--size", "100x64"], r"size: test_vit takes no images of 100x64 \(.*\); choose another --size"),
        ([], "arguments are required: .*model; see attrib-zoo layers --help"),
    ],
)
def test_layers_says_what_is_wrong(capsys, change, message) -> None:
    assert re.search(f"^error: .*{message}", failure(capsys, ["layers", *change]))
