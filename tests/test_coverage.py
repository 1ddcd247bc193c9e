"""The coverage benchmark: a row says what went wrong, a sweep goes on where it stopped, the page counts its rows."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from attrib_zoo.backbone.layers.gridcheck import Verdict

ROOT = Path(__file__).resolve().parent.parent


def load():
    folder = ROOT / "benchmarks"
    spec = importlib.util.spec_from_file_location("coverage_benchmark", folder / "coverage.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


@pytest.fixture(scope="module")
def sweep():
    return load()


def pytest_generate_tests(metafunc):
    """One test for each family of the installed libraries, where slow tests are wanted: the list costs some seconds."""
    if "member" in metafunc.fixturenames:
        wanted = "not slow" not in metafunc.config.option.markexpr
        module = load() if wanted else None
        members = module.sample(module.listed(), module.read(module.ROWS)) if module else []
        metafunc.parametrize("member", members, ids="-".join)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_small_member_of_each_family(sweep, member):
    row = sweep.run(*member, largest=100, seconds=300)
    assert sweep.passed(row), row["reason"] or row["layers"]
    if row["run"] != "full":
        pytest.skip(f"{row['millions']} million weights take more memory and time than CI has: only its layers, ok")
    assert "wrong" not in row["grid"]


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_works(sweep):
    row = sweep.run("timm", "resnet", "test_resnet", largest=150, seconds=120)
    assert [row[step] for step in sweep.STEPS] == ["ok", "right right right", "ok", "ok", "ok"]
    assert (row["run"], row["size"], row["reason"]) == ("full", "128x128", "")
    assert sweep.passed(row)


@pytest.mark.filterwarnings("ignore")
def test_a_grid_that_is_undecided_is_tested_with_the_statistics_of_the_images(sweep, monkeypatch):
    asked = []

    def probe(model, taps, images):
        asked.append([norm.running_mean.any().item() for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)])
        first = [Verdict(tap, "undecided", 0.0, 0.0, (), 0.0) for tap in taps]
        return first if len(asked) == 1 else plain(model, taps, images)

    plain = sweep.probe
    monkeypatch.setattr(sweep, "probe", probe)
    row = sweep.run("timm", "resnet", "test_resnet", largest=150, seconds=120)
    assert (row["grid"], sweep.passed(row)) == ("right right right", True)
    assert [all(each) for each in asked] == [False, True]


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_is_too_large_is_only_resolved(sweep):
    row = sweep.run("timm", "resnet", "test_resnet", largest=0.001, seconds=120)
    assert (row["run"], row["layers"], row["gradcam"], row["reason"]) == ("resolution only", "ok", "", "")
    assert row["chosen"]


@pytest.mark.filterwarnings("ignore")
def test_what_fails_says_why(sweep, monkeypatch):
    monkeypatch.setattr(sweep, "build", lambda *_: nn.Sequential(nn.Flatten(), nn.Linear(3 * 128 * 128, 5)).eval())
    row = sweep.run("timm", "flat", "flat", largest=150, seconds=120)
    assert row["reason"].startswith("UnsupportedModelError: layers: no layer of Sequential puts out a map")
    assert not sweep.passed(row)
    monkeypatch.setattr(sweep, "resolved", lambda *_: 1 / 0)
    assert sweep.run("timm", "flat", "flat", largest=150, seconds=9)["reason"] == "ZeroDivisionError: division by zero"


def test_rows_are_kept_and_read_again(sweep, tmp_path):
    path, row = tmp_path / "rows.csv", dict.fromkeys(sweep.FIELDS, "x, y")
    sweep.append(path, row)
    sweep.append(path, row)
    assert sweep.read(path) == [row, row]


def test_the_sample_has_one_small_member_of_each_family(sweep):
    models = [("timm", "a", "big_a"), ("timm", "a", "a_tiny"), ("timm", "b", "b_large"), ("torchvision", "a", "a1")]
    assert sweep.sample(models) == [("timm", "a", "a_tiny"), ("timm", "b", "b_large"), ("torchvision", "a", "a1")]
    seconds = {"a_tiny": ("full", 9), "big_a": ("full", 8), "b_large": ("resolution only", 1)}
    rows = [{"library": "timm", "model": m, "run": run, "seconds": str(s)} for m, (run, s) in seconds.items()]
    assert sweep.sample(models, rows)[:2] == [("timm", "a", "big_a"), ("timm", "b", "b_large")]


@pytest.mark.filterwarnings("ignore")
def test_the_statistics_are_those_of_the_images(sweep):
    """With those that it is made with, a change of the image ends below the rounding of the activations."""
    layers = [part for _ in range(3) for part in (nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU())]
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    nn.init.zeros_(model[-1].weight)
    assert sweep.awake(model)[-1].weight.any()
    images = torch.randn(2, 3, 64, 64)
    found = sweep.measured(model.eval(), images)
    assert not any(module.training for module in found.modules())
    for norm, seen in ((found[2], found[:2](images)), (found[-5], found[:-5](images))):
        torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)), rtol=0.01, atol=0.01)
        torch.testing.assert_close(norm.running_var, seen.transpose(0, 1).flatten(1).var(1), rtol=0.01, atol=0.01)


def test_the_page_counts_the_committed_rows(sweep):
    rows = sweep.read(sweep.ROWS)
    text = sweep.PAGE.read_text(encoding="utf-8")
    total = {library: int(count) for count, library in re.findall(r"of\s+(\d+)\s+of\s+(torchvision|timm)", text)}
    assert text == sweep.page(rows, total)
    assert f"**{len(rows)} models were examined**" in text
    bad = {row["model"] for row in rows if row["run"] != "no classifier" and not sweep.passed(row)}
    assert bad == set(re.findall(r"^\* `(\w+)` \(", text, re.M))
