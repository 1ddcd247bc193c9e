"""The command line: what it writes, what it prints, and what it says when something is wrong."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from cli_cases import MODEL, NAMES, failure, make_files, noise
from PIL import Image
from safetensors.torch import load_file

import attrib_zoo
from attrib_zoo import TTAME, Contrast, GradCAM, HiResCAM, models
from attrib_zoo.attribution import Attribution
from attrib_zoo.cli import demo, explain, main
from attrib_zoo.cli.fit import Lines
from attrib_zoo.models.photos import Photos
from attrib_zoo.training.callbacks import Progress
from attrib_zoo.training.locks import hold
from attrib_zoo.visualize import picture

COMMANDS = ("demo", "list", "layers", "explain", "fit", "evaluate", "reproduce", "doctor", "completion")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def usual(files: Path) -> list[str]:
    return ["--model", MODEL, "--weights", str(files / "w.pth"), "--classes", str(files / "names.txt")]


@pytest.fixture
def loaded(files: Path) -> models.LoadedModel:
    return models.load(MODEL, weights=files / "w.pth", class_names=NAMES)


@pytest.fixture(scope="module")
def explainer(files: Path) -> Path:
    """A T-TAME that was trained for three steps."""
    path = files / "ttame.safetensors"
    assert main([*fit_words(files, path)]) == 0
    return path


def fit_words(files: Path, output: Path) -> list[str]:
    words = ["fit", "--model", MODEL, "--weights", str(files / "w.pth"), "--data", str(files / "photos")]
    return [*words, "--output", str(output), "--max-steps", "3", "--batch-size", "4", "--workers", "0"]


def written(path: Path) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file)


def drawn_in(path: Path) -> np.ndarray:
    """The photograph in a picture, between its title and the 32 rows of its legend; 70 rows are drawn as 280."""
    return written(path)[-280 - 32 : -32]


def expected(loaded: models.LoadedModel, path: Path, method: Attribution, target: Any = None) -> np.ndarray:
    """The photograph with its map, made with the library's own calls."""
    with Image.open(path) as image:
        return drawn(loaded, image, method.attribute(loaded.transform(image)[None], target)[0])


def drawn(loaded: models.LoadedModel, image: Image.Image, map: torch.Tensor) -> np.ndarray:
    return np.asarray(picture(image, map, box=loaded.seen(image)))[:280]


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal up to the rounding of a batch against a single image."""
    return a.shape == b.shape and int(np.abs(a.astype(int) - b).max()) <= 2


# ---------------------------------------------------------------------- words


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_there(command: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "usage: attrib-zoo" in text
    assert max(map(len, text.splitlines())) <= 120
    if not command:
        assert all(re.search(rf"^    {name} +\w", text, re.MULTILINE) for name in COMMANDS)


def test_every_option_is_explained() -> None:
    from attrib_zoo.cli import _demo, _evaluate, _explain, _fit, _layers_of, _list

    for parser in (_demo(), _list(), _layers_of(), _explain(), _fit(), _evaluate()):
        assert all(action.help for action in parser._actions)


def test_version(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert attrib_zoo.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", r'expected "command" .*; see attrib-zoo --help'),
        ("explan x", "invalid choice: 'explan'.*; see attrib-zoo --help"),
        ("explain", "arguments are required: .*(model|photos).*; see attrib-zoo explain --help"),
        ("explain a.jpg --model m --weihgts x", "[Uu]nrecognized arguments: --weihgts x"),
        ("fit --model m --data d --output o --epochs many", "^error: --epochs: .*many.*; see attrib-zoo fit --help"),
        ("fit --model m --data d --output o --batch-size 0", "^error: --batch-size: .*0"),
    ],
)
def test_wrong_words_get_one_line(words: str, message: str, capsys) -> None:
    assert re.search(message, failure(capsys, words.split()))


def test_list_shows_each_exported_method_as_it_describes_itself(capsys) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    exported = [c for c in vars(attrib_zoo).values() if isinstance(c, type) and issubclass(c, Attribution)]
    rows, (_, agnostic) = lines[2:-3], lines[-2:]
    assert {row.split()[0] for row in rows} == {cls.__name__.lower() for cls in exported}
    for cls in exported:
        row = next(row for row in rows if row.split()[0] == cls.__name__.lower())
        cells = re.split(r"\s{2,}", row)
        assert cells[1:] == [cls.family, " ".join(cls.models), "yes" if cls.needs_fit else "no", cls.cost, cls.paper]
    named = agnostic.partition(": ")[2].split(", ")
    assert sorted(named) == sorted(cls.__name__.lower() for cls in exported if cls.class_agnostic)


def test_the_module_can_be_run() -> None:
    done = subprocess.run([sys.executable, "-m", "attrib_zoo", "list"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "gradcam" in done.stdout
    assert done.stderr == ""


def test_demo_prints_the_measures_and_where_the_picture_is(tmp_path, capsys, monkeypatch) -> None:
    asked: dict[str, object] = {}

    def run(output_dir: Path, *, seed: int, progress: bool) -> demo.DemoResult:
        asked.update(output_dir=output_dir, seed=seed, progress=progress)
        measured = demo.Measured(0.5, 0.1, 0.9, 0.8)
        return demo.DemoResult(output_dir / "demo.png", 6, 0.75, measured, {"T-TAME": measured}, {"fit": 3.0})

    monkeypatch.setattr(demo, "run", run)
    assert main(["demo", "--output", str(tmp_path / "new"), "--seed", "4"]) == 0
    assert asked == {"output_dir": tmp_path / "new", "seed": 4, "progress": True}
    out = capsys.readouterr().out
    assert "6 maps per method" in out
    assert out.endswith(f"\npicture: {tmp_path}/new/demo.png\n")
    (tmp_path / "file").write_text("in the way")
    assert "cannot write into the folder" in failure(capsys, ["demo", "--output", str(tmp_path / "file")])


# ---------------------------------------------------------------------- explain


def test_explain_draws_the_decision_and_prints_what_the_model_saw(files, usual, loaded, tmp_path, capsys) -> None:
    photos = sorted((files / "photos").iterdir())
    words = ["explain", str(files / "photos"), *usual, "--output", str(tmp_path / "new" / "out"), "--batch-size", "3"]
    assert main(words) == 0
    out = capsys.readouterr().out
    method = GradCAM(loaded.model)
    decisions = set()
    for photo in photos:
        with Image.open(photo) as image:
            shares = loaded.model(loaded.transform(image)[None]).softmax(1)[0]
        top = int(shares.argmax())
        decisions.add(top)
        row = next(line for line in out.splitlines() if line.startswith(photo.name))
        assert re.split(r"\s{2,}", row) == [photo.name, NAMES[top], f"{shares[top]:.1%}", f"{photo.stem}-gradcam.png"]
        assert close(drawn_in(tmp_path / f"new/out/{photo.stem}-gradcam.png"), expected(loaded, photo, method))
    assert len(decisions) > 1
    assert f"gradcam reads {method.taps(torch.zeros(1, *loaded.input_size))[0].name}" in out
    assert len(list((tmp_path / "new/out").iterdir())) == 10
    assert "in place of" not in out
    assert main([words[0], str(photos[0]), *words[2:], "--method", "gradcam,rise"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^3 pictures in .*, 1 of them in place of an earlier run's$", out, re.M)
    assert "rise reads" not in out, "it reads no layer"


def test_evidence_against_the_class_is_left_plain(files, usual, loaded, tmp_path) -> None:
    photo = files / "photos/p3.png"
    assert main(["explain", str(photo), *usual, "--method", "hirescam", "--output", str(tmp_path)]) == 0
    with Image.open(photo) as image:
        heat = HiResCAM(loaded.model).attribute(loaded.transform(image)[None])[0]
        assert heat.min() < 0
        left, whole = (drawn(loaded, image, found) for found in (heat.clamp(min=0), heat))
    got = drawn_in(tmp_path / "p3-hirescam.png")
    assert close(got, left)
    assert not close(got, whole)


@pytest.mark.parametrize("asked", ["2", "Cat"])
def test_explain_a_class_by_index_or_name(files, usual, loaded, tmp_path, capsys, asked: str) -> None:
    photo = files / "photos/p3.png"
    assert main(["explain", str(photo), *usual, "--target", asked, "--output", str(tmp_path)]) == 0
    method = GradCAM(loaded.model)
    got = drawn_in(tmp_path / "p3-gradcam-2-cat.png")
    assert close(got, expected(loaded, photo, method, 2))
    assert not close(got, expected(loaded, photo, method, 1))
    with Image.open(photo) as image:
        share = loaded.model(loaded.transform(image)[None]).softmax(1)[0, 2]
    out = capsys.readouterr().out
    assert "explained: cat" in out
    assert f"  {share:.1%}" in out


def test_each_picture_names_class_confidence_and_method(files, usual, loaded, tmp_path) -> None:
    photo = files / "photos/p3.png"
    with Image.open(photo) as image:
        shares = loaded.model(loaded.transform(image)[None]).softmax(1)[0]
    top = int(shares.argmax())
    decided = f"{NAMES[top]}  {shares[top]:.0%}"
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explain, "picture", lambda *given, **more: (told.append(given[2]), picture(*given, **more))[1])
        words = ["explain", str(photo), *usual, "--method", "gradcam,hirescam", "--output", str(tmp_path)]
        assert main(words) == 0
        assert main([*words, "--target", "cat"]) == 0
    asked = f"explained: cat  {shares[2]:.0%}      decided: {decided}"
    assert told == [f"{title}\n{name}" for title in (decided, asked) for name in ("GradCAM", "HiResCAM")]


def test_colours_are_chosen_before_anything_is_read(files, usual, loaded, tmp_path, capsys) -> None:
    photo = files / "photos/p3.png"
    words = ["explain", str(photo), *usual, "--output", str(tmp_path)]
    assert main([*words, "--colormap", "viridis", "--alpha", "0.5"]) == 0
    with Image.open(photo) as image:
        heat = GradCAM(loaded.model).attribute(loaded.transform(image)[None])[0]
        want = np.asarray(picture(image, heat, box=loaded.seen(image), colormap="viridis", alpha=0.5))[:280]
        assert not close(want, drawn(loaded, image, heat))
    assert close(drawn_in(tmp_path / "p3-gradcam.png"), want)
    capsys.readouterr()
    nothing = ["explain", "nowhere.jpg", *usual, "--output", str(tmp_path)]
    assert "colormap: matplotlib has no colormap 'viridos'; closest: 'viridis'" in failure(
        capsys, [*nothing, "--colormap", "viridos"]
    )
    assert "alpha: must be within [0, 1], got 1.5" in failure(capsys, [*nothing, "--alpha", "1.5"])


def test_pictures_of_two_classes_stand_side_by_side(files, usual, tmp_path) -> None:
    words = ["explain", str(files / "photos/p3.png"), *usual, "--output", str(tmp_path)]
    for more in ([], ["--target", "cat"], ["--target", "dog"]):
        assert main([*words, *more]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "p3-gradcam-2-cat.png",
        "p3-gradcam-3-dog.png",
        "p3-gradcam.png",
    ]


def test_very_long_names_stop_nothing(usual, tmp_path, capsys) -> None:
    for i, name in enumerate(("a" * 240, "ж" * 120, "b")):
        noise(tmp_path / "in" / f"{name}.png", i)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(["ant", "bee", "ж" * 100, "dog", "elk"]), encoding="utf-8-sig")
    usual[-1] = str(names)
    words = ["explain", str(tmp_path / "in"), *usual, "--method", "gradcam,layercam", "--output", str(tmp_path / "out")]
    assert main([*words, "--target", "ж" * 100]) == 0
    assert main([*words, "--target", "ant"]) == 0  # the first line, though the file begins with a mark
    assert len(list((tmp_path / "out").iterdir())) == 2 * 3 * 3


class TestOneLogit:
    """The same network with one output z and with the two outputs -z/2 and z/2, whose softmax decides alike."""

    @pytest.fixture
    def pair(self, tmp_path) -> list[list[str]]:
        torch.manual_seed(3)
        two = timm.create_model(MODEL, num_classes=2)
        torch.nn.init.normal_(two.fc.weight)
        for i in range(6):
            noise(tmp_path / f"in/p{i}.png", i)
        state = two.eval().state_dict()
        transform = models.load(MODEL, weights=save(two, tmp_path / "two.pth")).transform
        images = torch.stack([transform(Image.open(tmp_path / f"in/p{i}.png")) for i in range(6)])
        with torch.no_grad():
            z = two(images)
            middle = (z[:, 1] - z[:, 0]).median() + 1e-3
        row, bias = state["fc.weight"][1] - state["fc.weight"][0], state["fc.bias"][1] - state["fc.bias"][0] - middle
        halves = {"fc.weight": torch.stack([-row, row]) / 2, "fc.bias": torch.stack([-bias, bias]) / 2}
        torch.save({**state, **halves}, tmp_path / "two.pth")
        torch.save({**state, "fc.weight": row[None], "fc.bias": bias[None]}, tmp_path / "one.pth")
        (tmp_path / "names.txt").write_text("negative\npositive\n")
        common = ["explain", str(tmp_path / "in"), "--model", MODEL, "--classes", str(tmp_path / "names.txt")]
        return [
            [*common, "--weights", str(tmp_path / f"{n}.pth"), "--output", str(tmp_path / n)] for n in ("one", "two")
        ]

    @pytest.mark.parametrize("more", [[], ["--target", "negative"], ["--target", "1"], ["--score", "sigmoid"]])
    def test_it_is_explained_as_two_classes(self, pair, tmp_path, capsys, more) -> None:
        tables = []
        for words in pair:
            softly = more if words is pair[0] or "--score" not in more else []  # of one logit both scores are one
            assert main([*words, *softly]) == 0
            tables.append(capsys.readouterr().out.splitlines()[:-3])
        assert tables[0] == tables[1]
        assert {"negative", "positive"} == {line.split()[1] for line in tables[0][2:8]}
        for file in sorted((tmp_path / "one").iterdir()):
            assert close(written(file), written(tmp_path / "two" / file.name))

    def test_one_name_is_that_of_the_positive_class(self, pair, tmp_path, capsys) -> None:
        (tmp_path / "names.txt").write_text("tumour\n")
        assert main([*pair[0], "--target", "not tumour"]) == 0
        assert "explained: not tumour" in capsys.readouterr().out
        (tmp_path / "names.txt").write_text("a\nb\nc\n")
        assert "got 3 names for the 2 classes of a model with one logit" in failure(capsys, pair[0])


def save(model: torch.nn.Module, path: Path) -> Path:
    torch.save(model.state_dict(), path)
    return path


def test_a_multi_label_model_has_the_probability_of_each_class(files, usual, loaded, tmp_path, capsys) -> None:
    photo = files / "photos/p3.png"
    words = ["explain", str(photo), *usual, "--method", "rise", "--output", str(tmp_path), "--target", "cat"]
    with Image.open(photo) as image:
        share = loaded.model(loaded.transform(image)[None]).sigmoid()[0, 2]
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attrib_zoo.RISE, "compute_maps", lambda self, x, *_: (seen.append(self.score), x[:, :1])[1])
        assert main([*words, "--score", "sigmoid"]) == 0
    assert f"  {share:.1%}" in capsys.readouterr().out
    assert seen == ["sigmoid"]
    assert "score: must be one of 'softmax', 'sigmoid'" in failure(capsys, [*words, "--score", "logit"])


def test_explain_reads_the_layers_that_are_named(files, usual, loaded, tmp_path, capsys) -> None:
    photo = files / "photos/p1.png"
    assert main(["explain", str(photo), *usual, "--layers", "layer2", "--output", str(tmp_path)]) == 0
    assert "gradcam reads layer2\n" in capsys.readouterr().out
    assert close(drawn_in(tmp_path / "p1-gradcam.png"), expected(loaded, photo, GradCAM(loaded.model, "layer2")))
    assert main(["explain", str(photo), *usual, "--layers=-2,-1", "--output", str(tmp_path)]) == 0
    assert close(drawn_in(tmp_path / "p1-gradcam.png"), expected(loaded, photo, GradCAM(loaded.model, [-2, -1])))
    capsys.readouterr()
    assert "no layer 'layer9'" in failure(
        capsys, ["explain", str(photo), *usual, "--layers", "layer9", "--output", str(tmp_path)]
    )


def test_explain_smooths_scales_and_contrasts(files, usual, loaded, explainer, tmp_path, capsys) -> None:
    photo, asked = files / "photos/p1.png", ["--smooth", "3", "--scale", "rank", "--contrast", "2"]
    words = ["explain", str(photo), *usual, "--output", str(tmp_path)]
    assert main([*words, "--method", "gradcam,ttame", "--explainer", str(explainer), *asked]) == 0
    for name, method in (
        ("gradcam", GradCAM(loaded.model, smooth=3, scale="rank")),
        ("ttame", TTAME.load(explainer, loaded.model)),
    ):
        method.smooth, method.scale = 3, "rank"
        assert close(drawn_in(tmp_path / f"p1-{name}-contrast-2.png"), expected(loaded, photo, method, Contrast(2)))
    capsys.readouterr()
    assert "smooth: rise makes its map at the resolution of the image" in failure(
        capsys, [*words, "--method", "rise", "--smooth", "3"]
    )
    assert "smooth: must be an odd number" in failure(capsys, [*words, "--smooth", "4"])
    assert "scale: must be one of" in failure(capsys, [*words, "--scale", "ranks"])


def test_photos_of_one_name_keep_their_own_pictures(usual, loaded, tmp_path) -> None:
    photos = [
        noise(tmp_path / "in" / name, i) for i, name in enumerate(("a/cat.png", "b/cat.png", "cat.bmp", "cat-2.png"))
    ]
    assert main(["explain", *map(str, photos), *usual, "--output", str(tmp_path / "out")]) == 0
    made = [drawn_in(path) for path in (tmp_path / "out").iterdir()]
    assert len(made) == 4
    method = GradCAM(loaded.model)
    for photo in photos:
        want = expected(loaded, photo, method)
        assert sum(close(found, want) for found in made) == 1


def test_pictures_of_an_earlier_run_are_no_photos(usual, tmp_path, capsys) -> None:
    noise(tmp_path / "cat.png", 1)
    words = ["explain", str(tmp_path), *usual, "--output", str(tmp_path / "out")]
    assert main(words) == 0
    first = capsys.readouterr().out
    assert main(words) == 0
    assert capsys.readouterr().out == first.rstrip() + ", 1 of them in place of an earlier run's\n"


def test_a_photograph_is_never_replaced(usual, tmp_path, capsys) -> None:
    photos = [noise(tmp_path / name, 1) for name in ("cat.png", "cat-gradcam.png")]
    before = [photo.read_bytes() for photo in photos]
    words = ["explain", *map(str, photos), *usual, "--output", str(tmp_path)]
    assert re.search(r"cat-gradcam\.png' would replace a photograph; .*--output", failure(capsys, words))
    assert [photo.read_bytes() for photo in photos] == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["{bad}/no.jpg"], r"'.*no\.jpg' is no image that can be read"),
        (["{bad}"], r"'.*no\.jpg' is no image that can be read"),
        (["nowhere.jpg"], "no file or folder 'nowhere.jpg'"),
        (["--method", "gradcma"], "no method 'gradcma'; closest: 'gradcam', .*; attrib-zoo list"),
        (
            ["--method", "gradcam,ttame"],
            "ttame must be trained .*attrib-zoo fit --method ttame --model test_resnet --weights",
        ),
        (["--target", "5"], "the model has 5 classes, got 5; give an index from 0 to 4"),
        (["--target", "cow"], "no class is called 'cow'"),
        (["--model", "test_resnat"], "no model 'test_resnat' .*closest: 'test_resnet'"),
        (["--weights", "nowhere.pth"], "weights: no file 'nowhere.pth'"),
        (["--classes", "nowhere.txt"], "classes: cannot read 'nowhere.txt'"),
        (["--explainer", "nowhere.safetensors"], "nowhere.safetensors.* not there"),
        (["--device", "gpu7"], "device: 'gpu7' cannot be used here"),
    ],
)
def test_explain_says_what_is_wrong_before_anything_is_written(
    files, usual, tmp_path, capsys, change: list[str], message: str
) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "no.jpg").write_text("no image")
    words = [word.format(bad=bad) for word in change]
    photos = [str(files / "photos/p0.png"), *(words if len(words) == 1 else [])]
    options = words if len(words) == 2 else []
    output = tmp_path / "out"
    line = failure(capsys, ["explain", *photos, *usual, "--output", str(output), *options])
    assert re.search(f"^error: .*{message}", line)
    assert not output.exists()


def test_a_folder_that_cannot_be_written_is_named(files, usual, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("in the way")
    words = ["explain", str(files / "photos/p0.png"), *usual, "--output", str(tmp_path / "file")]
    assert re.search(r"cannot write into the folder '.*file' \(File exists\)", failure(capsys, words))


@pytest.mark.parametrize("command", ["explain", "evaluate"])
def test_a_folder_in_which_another_run_writes_is_refused(command: str, files, usual, tmp_path, capsys) -> None:
    with hold(tmp_path, "explain"):
        place = [str(files / "photos" / "p0.png")] if command == "explain" else ["--data", str(files / "photos")]
        assert re.search(
            rf"error: output: '{tmp_path}' is in use by this very process; wait until it has ended, stop it, or choose",
            failure(capsys, [command, *place, *usual, "--output", str(tmp_path)]),
        )
        assert [p.name for p in tmp_path.iterdir()] == [".attrib-zoo.lock"]


def test_an_explainer_is_used_and_compared(files, usual, loaded, explainer, tmp_path, capsys) -> None:
    photo = files / "photos/p2.png"
    words = ["explain", str(photo), *usual, "--explainer", str(explainer), "--output", str(tmp_path)]
    assert main(words) == 0
    ttame = TTAME.load(explainer, loaded.model)
    seen = int(ttame.class_counts_.argmax())
    assert main([*words, "--method", "gradcam,ttame", "--target", str(seen)]) == 0
    asked = f"-{seen}-{NAMES[seen]}.png"
    assert f"p2-{{gradcam,ttame,compared}}{asked}" in capsys.readouterr().out
    assert close(drawn_in(tmp_path / f"p2-ttame{asked}"), expected(loaded, photo, ttame, seen))
    assert close(drawn_in(tmp_path / f"p2-gradcam{asked}"), expected(loaded, photo, GradCAM(loaded.model), seen))
    assert written(tmp_path / f"p2-compared{asked}").shape[1] == 2 * 14 + 3 * 224 + 2 * 8


def test_an_explainer_of_other_weights_is_refused(files, usual, explainer, tmp_path, capsys) -> None:
    other = [str(files / "start.pth") if word.endswith("w.pth") else word for word in usual]
    words = ["explain", str(files / "photos/p2.png"), "--explainer", str(explainer), "--output", str(tmp_path / "out")]
    assert "fitted for ResNet with other weights" in failure(capsys, [*words, *other])
    words[3] = str(files / "names.txt")
    assert "names.txt must be a whole safetensors file" in failure(capsys, [*words, *usual])


def test_classes_that_the_explainer_never_saw_are_marked(
    files, usual, loaded, explainer, tmp_path, monkeypatch, capsys
) -> None:
    from attrib_zoo.cli import explain

    paper = tmp_path / "paper.safetensors"
    assert main([*fit_words(files, paper), "--recipe", "paper"]) == 0
    capsys.readouterr()

    headings: list[list[str]] = []
    monkeypatch.setattr(explain, "figure", lambda images, columns, **_: headings.append(list(columns)))
    for fitted, mark in ((paper, " (not trained on this class)"), (explainer, "")):  # rows have a map of every class
        ttame = TTAME.load(fitted, loaded.model)
        ttame.class_counts_[:] = torch.tensor([0, 9, 0, 0, 0])
        ttame.save(tmp_path / "e.safetensors")
        words = ["explain", str(files / "photos/p2.png"), *usual, "--explainer", str(tmp_path / "e.safetensors")]
        for target, heading in (("0", f"TTAME{mark}"), ("1", "TTAME")):
            assert main([*words, "--method", "gradcam,ttame", "--target", target, "--output", str(tmp_path)]) == 0
            assert headings.pop() == ["GradCAM", heading]
        assert capsys.readouterr().err.count("warning: TTAME: class 0 never came up in fit") == (1 if mark else 0)


def test_options_can_come_from_a_file(files, usual, tmp_path) -> None:
    (tmp_path / "c.yaml").write_text(f"target: '1'\nlayers: layer3\noutput: {tmp_path}/out\n")
    words = ["explain", str(files / "photos/p0.png"), *usual]
    assert main([*words, "--config", str(tmp_path / "c.yaml")]) == 0
    assert main([*words, "--target", "1", "--layers", "layer3", "--output", str(tmp_path / "by-hand")]) == 0
    a, b = (tmp_path / folder / "p0-gradcam-1-bee.png" for folder in ("out", "by-hand"))
    assert (written(a) == written(b)).all()


def test_a_real_photograph_is_recognised(data_dir, tmp_path, capsys) -> None:
    with tarfile.open(data_dir / "imagenet_photos.tar.gz") as archive:
        member = next(m for m in archive if m.name.endswith("n01532829/house_finch.jpg"))
        archive.extract(member, tmp_path, filter="data")
    words = ["explain", str(tmp_path / member.name), "--model", "squeezenet1_1", "--output", str(tmp_path / "out")]
    assert main([*words, "--weights", str(data_dir / "squeezenet1_1_imagenet.safetensors")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"house_finch\.jpg +house finch +100\.0% +house_finch-gradcam\.png", out)
    assert "gradcam reads features.12" in out
    shown = written(tmp_path / "out/house_finch-gradcam.png").astype(int)
    loaded = models.load("squeezenet1_1", weights=data_dir / "squeezenet1_1_imagenet.safetensors")
    with Image.open(tmp_path / member.name) as photo:
        plain = np.asarray(picture(photo, torch.zeros(2, 2))).astype(int)
        left, top, right, bottom = (edge * plain.shape[1] / photo.width for edge in loaded.seen(photo))
    colour = np.abs(shown[len(shown) - len(plain) :] - plain).mean(2)

    def part(rows: tuple[float, float], columns: tuple[float, float]) -> np.ndarray:
        y, x = ([round(a + s * (b - a)) for s in part] for a, b, part in ((top, bottom, rows), (left, right, columns)))
        return colour[y[0] : y[1], x[0] : x[1]]

    bird, elsewhere = part((0.25, 0.55), (0.55, 0.82)), part((0.67, 0.95), (0.05, 0.45))  # it sits right of the middle
    assert bird.mean() > 5 * elsewhere.mean()
    beside = colour[: len(plain) - 40, : round(left) - 1], colour[: len(plain) - 40, round(right) + 1 :]
    assert all(pixels.size and (pixels == 0).all() for pixels in beside)  # the model saw nothing there


# ---------------------------------------------------------------------- fit


def test_fit_is_the_librarys_fit_and_says_how_to_go_on(files, loaded, explainer, tmp_path, capsys) -> None:
    output = tmp_path / "new folder" / "t.safetensors"
    assert main([*fit_words(files, output), "--val", str(files / "photos")]) == 0
    captured = capsys.readouterr()
    by_hand = TTAME(loaded.model, mean=loaded.mean, std=loaded.std)
    data = Photos(sorted((files / "photos").iterdir()), loaded.transform)
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True, drop_last=True)
    held_out = torch.utils.data.DataLoader(data, batch_size=4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fit: validation was best")  # and that state is kept, by both
        by_hand.fit(loader, max_steps=3, val_loader=held_out, show_progress=False)
    by_command = TTAME.load(output, loaded.model)
    state = by_hand.network_.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in by_command.network_.state_dict().items())
    assert torch.equal(by_command.class_counts_, by_hand.class_counts_)

    seen = int((by_hand.class_counts_ > 0).sum())
    assert f"classes seen {seen} of 5" in captured.out
    assert f"loss {by_hand.history_.last('loss'):.3g}" in captured.out
    assert "AD(50)" in captured.out
    assert (
        f"attrib-zoo explain PHOTO --model test_resnet --weights {files}/w.pth --explainer '{output}'" in captured.out
    )
    assert f"TTAME.load('{output}', model)" in captured.out


def test_a_log_gets_lines_and_a_terminal_a_bar(files, tmp_path, capsys, monkeypatch) -> None:
    words = fit_words(files, tmp_path / "t.safetensors")
    assert main(words) == 0
    err = capsys.readouterr().err
    assert re.findall("^fit: .*", err, re.MULTILINE) == [re.search("fit: step 3 of 3, loss [0-9.]+$", err, re.M)[0]]
    assert "\r" not in err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert main(words) == 0
    err = capsys.readouterr().err
    assert "fit: step" not in err
    assert "\rfit: 100%" in err


def test_the_lines_of_a_log_say_how_long_it_takes(capsys, monkeypatch) -> None:
    times = iter([100.0, *range(110, 1000, 30)])
    monkeypatch.setattr("attrib_zoo.cli.fit.time.monotonic", lambda: next(times))
    lines = Lines()
    for step in range(11, 21):  # continued: what came before took other time
        lines(Progress("step", step, 20, {"loss": 2.0 / step}, lambda *_: None))
        lines(Progress("validation", step, 20, {"loss": 9.0}, lambda *_: None))
    assert capsys.readouterr().err.splitlines() == [
        "fit: step 13 of 20, loss 0.154, about 4 min left",
        "fit: step 15 of 20, loss 0.133, about 2 min left",
        "fit: step 17 of 20, loss 0.118, about 2 min left",
        "fit: step 19 of 20, loss 0.105, about 1 min left",
        "fit: step 20 of 20, loss 0.1",
    ]


def test_fit_without_steps_is_the_start_and_says_so(files, loaded, tmp_path, capsys) -> None:
    assert main([*fit_words(files, tmp_path / "t.safetensors"), "--max-steps", "0"]) == 0
    assert re.search(r"^  steps +0\b", capsys.readouterr().out, re.MULTILINE)
    assert all(TTAME.load(tmp_path / "t.safetensors", loaded.model).has_map_of(target) for target in range(5))


def test_an_interrupted_fit_can_be_continued_to_the_same_bits(files, explainer, tmp_path, capsys, monkeypatch) -> None:
    words = [*fit_words(files, tmp_path / "t.safetensors"), "--checkpoint-dir", str(tmp_path / "state")]
    read, taken = Photos.__getitem__, []

    def stop_at_the_third_batch(self: Photos, index: int) -> torch.Tensor:
        taken.append(index)
        if len(taken) > 8:
            raise KeyboardInterrupt
        return read(self, index)

    monkeypatch.setattr(Photos, "__getitem__", stop_at_the_third_batch)
    assert main(words) == 1
    assert f"interrupted; continue with the same command and --resume {tmp_path}/state" in capsys.readouterr().err
    assert not (tmp_path / "t.safetensors").exists()
    monkeypatch.undo()
    assert main([*words, "--resume", str(tmp_path / "state")]) == 0
    whole, again = load_file(explainer), load_file(tmp_path / "t.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in whole.items())


def test_an_interrupted_fit_without_a_checkpoint_says_so(files, tmp_path, capsys, monkeypatch) -> None:
    def stop(self: Photos, index: int) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(Photos, "__getitem__", stop)
    assert main(fit_words(files, tmp_path / "t.safetensors")) == 1
    assert "interrupted; with --checkpoint-dir FOLDER a fit can be continued" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--output", "t.pth"], r"output: must end in \.safetensors, got 't\.pth'"),
        (["--method", "gradcam"], "gradcam needs no training; .*attrib-zoo explain PHOTO --method gradcam"),
        (
            ["--recipe", "secret"],
            "recipe: must be one of 'auto', 'rows', 'attended', .* got 'secret'",
        ),
        (["--data", "{bad}"], r"1 of 3 files are no images: .*b\.jpg; remove them, or --skip-bad"),
        (["--val", "{bad}"], r"1 of 3 files are no images: .*b\.jpg"),
        (["--data", "nowhere"], "no file or folder 'nowhere'"),
        (["--resume", "nowhere"], "nowhere.* not there"),
        (["--output", "{bad}/a.png/t.safetensors"], r"cannot write into the folder '.*a\.png'"),
    ],
)
def test_fit_says_what_is_wrong(files, tmp_path, capsys, change: list[str], message: str) -> None:
    noise(tmp_path / "bad/a.png", 1)
    noise(tmp_path / "bad/c.png", 2)
    (tmp_path / "bad/b.jpg").write_text("no image")
    words = [word.format(bad=tmp_path / "bad") for word in change]
    line = failure(capsys, [*fit_words(files, tmp_path / "t.safetensors"), *words])
    assert re.search(f"^error: .*{message}", line)
    assert not (tmp_path / "t.safetensors").exists()


def test_bad_files_can_be_left_out(files, explainer, tmp_path, capsys) -> None:
    for photo in (files / "photos").iterdir():
        (tmp_path / "in" / photo.name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / photo.name).write_bytes(photo.read_bytes())
    (tmp_path / "in/a.jpg").write_text("no image")
    words = [*fit_words(files, tmp_path / "t.safetensors"), "--data", str(tmp_path / "in"), "--skip-bad"]
    assert main(words) == 0
    whole, again = load_file(explainer), load_file(tmp_path / "t.safetensors")
    assert all(torch.equal(value, again[key]) for key, value in whole.items())


def test_a_file_that_breaks_off_is_named_from_another_process_too(files, tmp_path, capsys) -> None:
    cut = noise(tmp_path / "in/cut.jpg", 1, (400, 400))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    words = [*fit_words(files, tmp_path / "t.safetensors"), "--data", str(tmp_path / "in"), "--workers", "1"]
    assert main(words) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"error: '.*cut\.jpg' is no image that can be read \(.*truncated.*\); remove or replace it$", last)


# ---------------------------------------------------------------------- tracebacks


def test_tracebacks_are_for_debugging(files, usual, tmp_path, capsys, monkeypatch) -> None:
    words = ["explain", "nowhere.jpg", *usual]
    assert main([*words, "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.strip().splitlines()[-1].startswith("error: no file or folder")

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("unforeseen")

    monkeypatch.setattr("attrib_zoo.cli.explain.each_photo", broken)
    assert (
        failure(capsys, words) == "error: ZeroDivisionError: unforeseen (this should not happen; --debug shows where)"
    )
    monkeypatch.setattr("attrib_zoo.cli.explain.each_photo", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert failure(capsys, words, code=1) == "interrupted"
