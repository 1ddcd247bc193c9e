"""What the pages of results are made by: the store of numbers, ranks, and differences on shared images."""

import json
import math
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def imagenet(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return pytest.importorskip("imagenet")


@pytest.fixture
def zoo(monkeypatch, imagenet):
    threads = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # the module sets them; this puts them back
    yield pytest.importorskip("zoo")
    torch.set_num_threads(threads)


def write(path: Path, method: str, values: list[float | None], seconds: float = 2.0) -> None:
    lines = [{"setting": {}}]
    for image, value in enumerate(values):
        row = {"method": method, "image": image, "target": 7, "values": {"SRG": value}}
        cost = {"images": 1, "forward": 3, "backward": 1, "seconds": seconds, "plain": 0.5, "peak": None}
        lines.append({"rows": [row], "method": method, "cost": cost})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")


def test_numbers_are_added_kept_and_read_again(imagenet, tmp_path):
    write(tmp_path / "vit_tiny" / "LeGrad.jsonl", "LeGrad", [0.123456, None, -0.5])
    write(tmp_path / "beside" / "vit_tiny" / "LeGrad.jsonl", "LeGrad", [1.0], seconds=99)
    numbers = imagenet.load(tmp_path / "none.json")
    numbers["vit_tiny"].merge(tmp_path, "vit_tiny")
    imagenet.save(numbers, tmp_path / "store.json")
    known = imagenet.load(tmp_path / "store.json")["vit_tiny"]
    rows = known.rows["LeGrad"]
    assert rows[0] == {"SRG": 12.35, "target": 7}
    assert math.isnan(rows[1]["SRG"])
    assert rows[2]["SRG"] == -50
    assert known.beside["LeGrad"][0]["SRG"] == 100
    assert known.costs["LeGrad"] == {"forward": 3, "backward": 1, "seconds": 2, "times_forward": 4}
    write(tmp_path / "vit_tiny" / "LeGrad.jsonl", "LeGrad", [0.9])
    known.merge(tmp_path, "vit_tiny")
    assert len(known.rows["LeGrad"]) == 3, "a run of fewer images replaces nothing"


def test_means_leave_out_what_has_no_value(imagenet):
    middle, half = imagenet.mean([1.0, math.nan, 3.0])
    assert middle == 2
    assert half == pytest.approx(1.96 * 2**0.5 / 2**0.5)
    assert imagenet.cell([1.0]) == "–"
    assert imagenet.cell([1.0, 1.0, 1.0], sign=True) == "+1.0 ± 0.0*"
    assert imagenet.cell([-1.0, 1.0], sign=True) == "+0.0 ± 2.0"


def test_ranks_have_the_best_first_and_intervals_where_images_cannot_tell(zoo):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 50, generator=generator, dtype=torch.double)
    values = torch.tensor([[0.0], [10.0], [10.0]]) + noise - noise.mean(1, keepdim=True)
    values[1] += 1e-3
    images = list(range(50))
    for measure, wanted in (("SRG", ["3 [3, 3]", "1 [1, 2]", "2 [1, 2]"]), ("AD(50)", ["1 [1, 1]", "3 [2, 3]"])):
        rows = [{i: {measure: float(v)} for i, v in enumerate(row)} for row in values]
        assert zoo.ranks(rows, measure, images)[: len(wanted)] == wanted
    rows = [{i: {"SRG": float(v)} for i, v in enumerate(row)} for row in values[:2]]
    assert zoo.ranks([{i: {} for i in images}, *rows], "SRG", images) == ["–", "2 [2, 2]", "1 [1, 1]"]


def test_differences_are_paired_on_the_images_that_both_have(zoo):
    rows = {
        "GradCAM, smooth 3": {0: {"SRG": 1.0}, 1: {"SRG": 2.0}, 2: {"SRG": 600.0}},
        "LeGrad": {0: {"SRG": 4.0}, 1: {"SRG": 5.0}},
    }
    assert zoo.gain(rows, "LeGrad", "GradCAM, smooth 3") == "+3.0 ± 0.0*"
    assert zoo.gain(rows, "GradCAM, smooth 3", "GradCAM, smooth 3") == ""


@pytest.mark.slow
def test_the_pages_say_what_the_committed_numbers_give(zoo, imagenet):
    numbers = imagenet.load()
    assert zoo.page(numbers) == (imagenet.ROOT / "docs" / "results" / "zoo.md").read_text(encoding="utf-8")
    guide = zoo.GUIDE.read_text(encoding="utf-8")
    assert zoo.between(guide, zoo.summary(numbers)) == guide
    assert "`GradCAM(smooth=3)`" in guide


def test_only_what_stands_between_the_marks_is_replaced(zoo):
    page = "before\n\n<!-- table of benchmarks/zoo.py -->\n\nold\n\n<!-- end -->\n\nafter\n"
    assert zoo.between(page, "new") == page.replace("old", "new")
