"""A newcomer's walk: a method in a folder of one's own, written as the documentation says, used on the command line."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_cases import MODEL, NAMES, failure, make_files
from PIL import Image
from test_docs import ROOT, blocks

from attrib_zoo import models
from attrib_zoo.backbone.capture import run_with_graph
from attrib_zoo.cli import main
from attrib_zoo.visualize import picture

PAGE = (ROOT / "docs" / "how-to" / "add-a-method.md").read_text(encoding="utf-8")
OTHERS = '''
from attrib_zoo import GradCAM as Theirs
from attrib_zoo import TTAME
from attrib_zoo.methods import Attribution

class Trained(TTAME):
    """One's own trained method."""

class Empty(Attribution):
    """Fills nothing."""

class GradCAM(Theirs):
    """Another of that name."""
'''


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def usual(files: Path) -> list[str]:
    return ["--model", MODEL, "--weights", str(files / "w.pth"), "--classes", str(files / "names.txt")]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A current folder that holds the page's file, not on the search path."""
    (tmp_path / "liftcam.py").write_text(next(b.text for b in blocks(PAGE) if b.language == "python"))
    (tmp_path / "others.py").write_text(OTHERS)
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    yield tmp_path
    for name in ("liftcam", "others", "broken"):
        sys.modules.pop(name, None)


def test_the_file_of_the_page_has_one_import_of_ours() -> None:
    file = next(b.text for b in blocks(PAGE) if b.language == "python")
    assert re.findall(r"^(?:from|import) attrib_zoo.*$", file, re.MULTILINE) == [
        "from attrib_zoo.methods import GradientCAM"
    ]


def test_the_method_explains_photographs_by_its_formula(files, usual, folder, capsys) -> None:
    photo = files / "photos/p1.png"
    words = ["explain", str(photo), *usual, "--method", "gradcam, liftcam:LIFTCAM", "--target", "2"]
    assert main([*words, "--output", "out"]) == 0
    assert "p1-{gradcam,liftcam,compared}-2-cat.png" in capsys.readouterr().out

    loaded = models.load(MODEL, weights=files / "w.pth", class_names=NAMES)
    with Image.open(photo) as image:
        inputs, whole, seen = loaded.transform(image)[None], image.convert("RGB"), loaded.seen(image)
    method = sys.modules["liftcam"].LIFTCAM(loaded.model)
    with run_with_graph(loaded.model, inputs, (), method.taps(inputs)) as (outputs, (maps,)):
        slopes = torch.autograd.grad(outputs[0, 2], maps)[0]
    maps = maps.detach()
    heat = ((maps * slopes).sum((-2, -1), keepdim=True) * maps).sum(1, keepdim=True).relu()
    heat = torch.nn.functional.interpolate(heat, inputs.shape[-2:], mode="bilinear")
    with Image.open("out/p1-liftcam-2-cat.png") as file:
        drawn = np.asarray(file).astype(int)[-280 - 32 :]  # without its title
    assert np.abs(drawn - np.asarray(picture(whole, heat[0], box=seen))).max() <= 2


def test_a_trained_method_is_fitted_and_used(files, usual, folder, capsys) -> None:
    data = ["--data", str(files / "photos"), "--max-steps", "2", "--batch-size", "4", "--workers", "0"]
    assert main(["fit", *usual[:4], *data, "--method", "others:Trained", "--output", "t.safetensors"]) == 0
    assert "--method others:Trained --explainer t.safetensors" in capsys.readouterr().out
    words = ["explain", str(files / "photos/p1.png"), *usual, "--output", "out", "--explainer", "t.safetensors"]
    message = failure(capsys, words)
    assert "explainer: 't.safetensors' is of the method 'Trained'" in message
    assert "--method package.module:Trained" in message
    assert main([*words, "--method", "others:Trained"]) == 0
    assert Path("out/p1-trained.png").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:X", "cannot import 'nowhere' .*package.module:Class of an installed package or of a file in the cur"),
        ("broken:X", "cannot import 'broken' .*nothing_of_that_name"),
        (":X", "cannot import ''"),
        ("liftcam:LiftCAM", "'LiftCAM' of 'liftcam' must be a subclass of .*; the module has LIFTCAM"),
        ("others:Empty", "'Empty' of 'others' must be a subclass of .* that fills its hooks"),
        ("json:JSONDecoder", "'JSONDecoder' of 'json' must be a subclass of .*; the module has none"),
        ("gradcam,others:GradCAM", "each must have a name of its own, got gradcam and others:GradCAM"),
        ("others:Trained", "others:Trained must be trained .*attrib-zoo fit --method others:Trained --model"),
        ("liftcam", "no method 'liftcam'.*a class of your own is package.module:Class"),
    ],
)
def test_what_is_no_method_is_named(files, usual, folder, capsys, name: str, message: str) -> None:
    line = failure(capsys, ["explain", str(files / "photos/p1.png"), *usual, "--output", "out", "--method", name])
    assert re.search(f"^error: method: {message}", line)
    assert not Path("out").exists()
