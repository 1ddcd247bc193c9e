"""The coverage benchmark: a row says what went wrong, a sweep goes on where it stopped, the page counts its rows."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from torch import nn

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def sweep():
    folder = ROOT / "benchmarks"
    spec = importlib.util.spec_from_file_location("coverage_benchmark", folder / "coverage.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_works(sweep):
    row = sweep.run("timm", "resnet", "test_resnet", largest=150, seconds=120)
    assert [row[step] for step in sweep.STEPS] == ["ok", "right right right", "ok", "ok", "ok"]
    assert (row["run"], row["size"], row["reason"]) == ("full", "128x128", "")
    assert sweep.passed(row)


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


def test_the_page_counts_the_committed_rows(sweep):
    rows = sweep.read(sweep.ROWS)
    text = sweep.PAGE.read_text(encoding="utf-8")
    total = {library: int(count) for count, library in re.findall(r"of\s+(\d+)\s+of\s+(torchvision|timm)", text)}
    assert text == sweep.page(rows, total)
    assert f"**{len(rows)} models were run**" in text
    assert {row["model"] for row in rows if not sweep.passed(row)} == set(re.findall(r"^\* `(\w+)` \(", text, re.M))
