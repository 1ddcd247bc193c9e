"""``explain`` as a job: one pass over any number of photographs, resumable, with tables and raw maps."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_cases import MODEL, NAMES, failure, make_files, noise
from PIL import Image
from safetensors.torch import load_file

from attrib_zoo import TTAME, GradCAM, LayerCAM, models
from attrib_zoo.cli import main, parts, stream
from attrib_zoo.cli.parts import halves
from attrib_zoo.cli.stream import Names, _Steps, left, shared_out
from attrib_zoo.training import distributed


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def loaded(files: Path) -> models.LoadedModel:
    return models.load(MODEL, weights=files / "w.pth", class_names=NAMES)


@pytest.fixture
def words(files: Path, tmp_path: Path) -> list[str]:
    usual = ["--model", MODEL, "--weights", str(files / "w.pth"), "--classes", str(files / "names.txt")]
    output = ["--output", str(tmp_path / "out"), "--batch-size", "2"]
    return ["explain", str(files / "photos"), *usual, *output, "--no-pictures", "--maps", "safetensors"]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The whole table; JSON lines or Parquet."""
    found: list[dict[str, Any]] = []
    for path in sorted((folder / "table").iterdir()):
        if path.suffix == ".parquet":
            from pyarrow import parquet

            found += parquet.read_table(path).to_pylist()
        else:
            found += [json.loads(line) for line in path.read_text().splitlines()]
    return found


def map_of(folder: Path, row: dict[str, Any], method: str) -> torch.Tensor:
    file = folder / row["file"]
    held = {k: torch.from_numpy(v) for k, v in np.load(file).items()} if file.suffix == ".npz" else load_file(file)
    assert held[method].dtype == torch.float16
    return held[method][row["row"]].float() * held[f"{method}.scale"][row["row"]]


def photo(files: Path, loaded: models.LoadedModel, name: str) -> torch.Tensor:
    with Image.open(files / "photos" / name) as image:
        return loaded.transform(image)[None]


def same(a: Path, b: Path) -> bool:
    """Whether two folders hold the same rows and the same maps."""
    first, second = rows_of(a), rows_of(b)
    plain = [[{k: v for k, v in row.items() if k not in ("file", "row")} for row in rows] for rows in (first, second)]
    return plain[0] == plain[1] and all(
        torch.equal(map_of(a, one, "gradcam"), map_of(b, other, "gradcam"))
        for one, other in zip(first, second, strict=True)
    )


# ---------------------------------------------------------------------- what is written


@pytest.mark.parametrize(("maps", "table"), [("safetensors", "jsonl"), ("npz", "parquet")])
def test_maps_and_table_are_those_of_the_library(files, loaded, words, tmp_path, capsys, maps, table) -> None:
    if table == "parquet":
        pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    words[words.index("safetensors")] = maps
    more = ["--method", "gradcam,layercam", "--top-k", "2", "--table", table]
    assert main([*words, *more]) == 0
    found = rows_of(tmp_path / "out")
    assert [row["photo"] for row in found] == [f"p{i}.png" for i in range(10) for _ in range(2)]
    methods = {"gradcam": GradCAM(loaded.model, upsample=False), "layercam": LayerCAM(loaded.model, upsample=False)}
    for first, second in zip(found[::2], found[1::2], strict=True):
        image = photo(files, loaded, first["photo"])
        share = loaded.model(image).softmax(1)[0].detach()
        best = share.argsort(descending=True)[:2].tolist()
        assert [first["class"], second["class"]] == best
        assert first["decision"] == second["decision"] == best[0]
        for row in (first, second):
            assert row["name"] == NAMES[row["class"]]
            assert row["confidence"] == pytest.approx(float(share[row["class"]]), abs=1e-5)
            for name, method in methods.items():
                want = method.attribute(image, row["class"])[0, 0]
                got = map_of(tmp_path / "out", row, name)
                assert got.shape == want.shape
                assert torch.allclose(got, want, rtol=2e-3, atol=1e-5 * float(want.abs().max()))
    assert len({row["class"] for row in found[::2]}) > 1
    out = capsys.readouterr().out
    assert "10 photographs explained\n" in out
    assert "top-2 classes" in out
    assert not list((tmp_path / "out").glob("*.png"))


def test_pictures_beside_maps_are_those_without(files, words, tmp_path) -> None:
    words.remove("--no-pictures")
    words[1] = str(files / "photos/p3.png")
    assert main([*words, "--table", "jsonl"]) == 0
    (row,) = rows_of(tmp_path / "out")
    assert row["pictures"] == ["p3-gradcam.png"]
    plain = [word for word in words if word not in ("--maps", "safetensors")]
    plain[plain.index("--output") + 1] = str(tmp_path / "plain")
    assert main(plain) == 0
    a, b = (np.asarray(Image.open(tmp_path / place / "p3-gradcam.png")).astype(int) for place in ("out", "plain"))
    assert np.abs(a - b).max() <= 1
    assert a.std() > 10


def test_several_classes_have_pictures_of_their_own(files, words, loaded, tmp_path, capsys) -> None:
    plain = [word for word in words if word not in ("--no-pictures", "--maps", "safetensors")]
    plain[1] = str(files / "photos/p3.png")
    assert main([*plain, "--target", "cat,#4"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "p3-gradcam-2-cat.png",
        "p3-gradcam-4-elk.png",
    ]
    share = loaded.model(photo(files, loaded, "p3.png")).softmax(1)[0].detach()
    out = capsys.readouterr().out
    assert "p3-gradcam{-2-cat,-4-elk}.png" in out
    assert f"{share[2]:.1%}" in out
    assert f"{share[4]:.1%}" in out
    assert "no class is called 'cow'" in failure(capsys, [*plain, "--target", "cat,cow"])
    assert "leave it or --target out" in failure(capsys, [*plain, "--target", "cat", "--top-k", "2"])
    assert "the model has 5 classes, got 6" in failure(capsys, [*plain, "--top-k", "6"])


def test_a_map_keeps_its_digits_in_float16() -> None:
    for factor in (1e-9, 1.0, 1e9):
        wanted = torch.rand(7, 7, dtype=torch.float64) * factor
        half, scale = halves(wanted.float())
        assert torch.allclose(half.double() * scale, wanted, rtol=2e-3, atol=1e-6 * factor)
    assert halves(torch.zeros(2, 2)) == (pytest.approx(torch.zeros(2, 2).half()), 1.0)


# ---------------------------------------------------------------------- one pass


def test_each_photograph_is_decoded_once(words, monkeypatch, tmp_path) -> None:
    opened: list[str] = []
    read = stream.open_photo
    monkeypatch.setattr(stream, "open_photo", lambda path: (opened.append(path.name), read(path))[1])
    plain = [word for word in words if word not in ("--no-pictures", "--maps", "safetensors")]
    for more in (plain, words):
        assert main(more) == 0
        assert sorted(opened) == [f"p{i}.png" for i in range(10)]
        opened.clear()


def test_the_model_runs_once_for_a_batch(files, words, loaded, tmp_path, monkeypatch) -> None:
    counts = []
    for size in ("2", "1"):
        words[words.index("--batch-size") + 1] = size
        words[words.index("--output") + 1] = str(tmp_path / size)
        passes: list[int] = []
        forward = type(loaded.model).forward
        counted = lambda self, x, forward=forward, passes=passes: (passes.append(1), forward(self, x))[1]  # noqa: E731
        with monkeypatch.context() as patch:
            patch.setattr(type(loaded.model), "forward", counted)
            assert main(words) == 0
        counts.append(len(passes))
    assert counts[1] - counts[0] == 5  # ten batches instead of five; the rest is looking for layers


# ---------------------------------------------------------------------- when something stops it


@pytest.fixture
def stopped(monkeypatch) -> list[int]:
    """The third batch is interrupted, and parts hold two photographs."""
    from attrib_zoo.cli import explain

    monkeypatch.setattr(parts, "CHUNK", 2)
    real, batches = explain._lines, []

    def lines(task: Any, batch: Any) -> Any:
        batches.append(batch.interval[0])
        if len(batches) == 3:
            raise KeyboardInterrupt
        return real(task, batch)

    monkeypatch.setattr(explain, "_lines", lines)
    return batches


def test_a_job_goes_on_where_it_was_stopped(words, tmp_path, capsys, stopped) -> None:
    words += ["--table", "jsonl"]
    assert main(words) == 1
    assert "the same command continues with --resume" in capsys.readouterr().err
    assert [row["photo"] for row in rows_of(tmp_path / "out")] == ["p0.png", "p1.png", "p2.png", "p3.png"]
    assert "continue it with --resume, or choose another folder" in failure(capsys, words)
    stopped[:] = [0] * 3
    assert main([*words, "--resume"]) == 0
    assert stopped[3:] == [4, 6, 8]
    whole = [str(tmp_path / "whole") if word.endswith("/out") else word for word in words]
    assert main(whole) == 0
    assert same(tmp_path / "out", tmp_path / "whole")
    assert main([*words, "--resume"]) == 0  # nothing is left
    assert stopped[6:] == [0, 2, 4, 6, 8]


def test_what_a_kill_left_behind_is_made_again(words, tmp_path, stopped) -> None:
    """A part without its note is not done: its files are made anew."""
    words += ["--table", "jsonl"]
    assert main(words) == 1
    (tmp_path / "out/job/000000002.json").unlink()
    (tmp_path / "out/table/000000002.jsonl").write_text('{"photo": "half')
    stopped[:] = [0] * 3
    assert main([*words, "--resume"]) == 0
    assert stopped[3:] == [2, 4, 6, 8]
    assert [row["photo"] for row in rows_of(tmp_path / "out")] == [f"p{i}.png" for i in range(10)]


def test_only_whole_batches_are_written(tmp_path) -> None:
    """Who interrupts in the middle of a batch finds no half of it in the files."""
    job = parts.Job(tmp_path, {}, "npz", "jsonl")
    assert job.begin(resume=False) == []
    part = job.part(4)
    for i in range(3):
        part.add({"photo": f"p{i}"}, {"gradcam": torch.full((2, 2), float(i))})
        if i == 1:
            part.skip("bad", "why")
            part.reach(7)
    part.skip("later", "why")
    part.write()
    assert [row["photo"] for row in rows_of(tmp_path)] == ["p0", "p1"]
    assert np.load(tmp_path / "maps/000000004.npz")["gradcam"].shape == (2, 2, 2)
    assert parts.Job(tmp_path, {}, "npz", "jsonl").begin(resume=True) == [(4, 7)]
    assert job.finish() == (2, 1)


def test_another_job_is_not_continued(words, files, tmp_path, capsys) -> None:
    words[1] = str(files / "photos/p1.png")
    assert main([*words, "--resume"]) == 0  # nothing was begun: it begins
    capsys.readouterr()
    for more, what in (
        (["--target", "cat"], r"targets was null, is now [2]"),
        (["--method", "layercam"], "methods was"),
        (["--weights", str(files / "start.pth")], "weights was"),
        (["--scale", "rank"], "methods was"),
    ):
        line = failure(capsys, [*words, *more, "--resume"])
        assert "holds another job" in line
        assert what in line
    words[1] = str(files / "photos/p2.png")
    assert "names was" in failure(capsys, [*words, "--resume"])
    words[1] = str(files / "photos")
    assert "photos was 1, is now 10; give the options that it was begun with" in failure(capsys, [*words, "--resume"])


def test_bad_files_are_listed_with_the_reason(words, files, tmp_path, capsys) -> None:
    photos = tmp_path / "in"
    for i in range(6):
        noise(photos / f"p{i}.png", i)
    (photos / "p1.png").write_text("no image")
    (photos / "p4.jpg").write_bytes(b"")
    words[1] = str(photos)
    assert "p1.png' is no image that can be read (unknown format)" in failure(capsys, words)
    assert main([*words, "--resume", "--skip-bad", "--table", "jsonl"]) == 2  # another table: another job
    capsys.readouterr()
    assert main([*words, "--resume", "--skip-bad"]) == 0
    out = capsys.readouterr().out
    assert f"5 photographs explained, 2 left out: {tmp_path}/out/skipped.jsonl" in out
    listed = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert [entry["photo"] for entry in listed] == ["p1.png", "p4.jpg"]
    assert all("is no image that can be read (unknown format)" in entry["reason"] for entry in listed)


def test_of_a_few_photographs_the_bad_ones_are_printed(words, files, tmp_path, capsys) -> None:
    plain = [word for word in words if word not in ("--no-pictures", "--maps", "safetensors")]
    (tmp_path / "no.jpg").write_text("no image")
    plain[1:2] = [str(tmp_path / "no.jpg"), str(files / "photos/p1.png")]
    assert main([*plain, "--skip-bad"]) == 0
    assert f"left out: '{tmp_path}/no.jpg' is no image that can be read" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["p1-gradcam.png"]
    plain[1:3] = [str(tmp_path / "no.jpg")]
    assert "none of the photographs can be read, 1 in all; the first: " in failure(capsys, [*plain, "--skip-bad"])


def test_a_full_disk_is_said_and_the_job_goes_on(words, tmp_path, capsys, monkeypatch) -> None:
    real = parts.write_whole

    def full(path: Path, content: Any) -> None:
        if path.parent.name == "maps":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, content)

    monkeypatch.setattr(parts, "write_whole", full)
    line = failure(capsys, words)
    assert "No space left on device); make room, then continue with the same command and --resume" in line
    monkeypatch.undo()
    assert main([*words, "--resume", "--table", "jsonl"]) == 2
    capsys.readouterr()
    assert main([*words, "--resume"]) == 0
    assert "10 photographs explained" in capsys.readouterr().out


def test_a_reading_process_that_dies_is_a_sentence(words, monkeypatch, capsys) -> None:
    parent = os.getpid()
    real = stream.open_photo
    monkeypatch.setattr(stream, "open_photo", lambda path: os._exit(1) if os.getpid() != parent else real(path))
    line = failure(capsys, [*words, "--workers", "1"])
    assert "workers: a process that reads photographs ended" in line
    assert "use fewer --workers" in line


def test_formats_are_checked_first(words, capsys, monkeypatch) -> None:
    assert "maps: must be one of 'safetensors', 'npz', got 'zip'" in failure(capsys, [*words, "--maps", "zip"])
    assert "table: must be one of 'jsonl', 'parquet'" in failure(capsys, [*words, "--table", "csv"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'attrib_zoo[parquet]'" in failure(capsys, [*words, "--table", "parquet"])


# ---------------------------------------------------------------------- many photographs, several processes


def test_above_a_hundred_the_table_is_a_file(words, tmp_path, capsys, monkeypatch) -> None:
    from attrib_zoo.cli import explain

    monkeypatch.setattr(explain, "_FEW", 9)
    plain = [word for word in words if word not in ("--maps", "safetensors")]
    assert main([*plain, "--workers", "2"]) == 0
    assert [row["photo"] for row in rows_of(tmp_path / "out")] == [f"p{i}.png" for i in range(10)]
    out = capsys.readouterr().out
    assert "top-1 class" not in out
    assert f"table: {tmp_path}/out/table/*.jsonl" in out


def test_names_take_little_room_and_come_back() -> None:
    names = [f"photos/{i:06d}.jpg" for i in range(100)] + ["ж", os.fsdecode(b"\xff.png"), ""]
    packed = Names(names)
    assert list(packed) == names
    assert packed[-2:] == names[-2:]
    assert packed.digest() != Names([*names[1:], names[0]]).digest()
    with pytest.raises(IndexError):
        packed[len(names)]


def test_what_is_left_is_shared_out_whole(monkeypatch) -> None:
    done = [(600, 900), (0, 10), (5, 20)]
    rest = left(2000, done)
    assert rest == [(20, 600), (900, 2000)]
    assert left(3, [(0, 3)]) == []
    for size in (1, 2, 3):
        monkeypatch.setattr(distributed, "world_size", lambda size=size: size)
        got = []
        for rank in range(size):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            got.append({i for start, stop in shared_out(rest, 8) for i in range(start, stop)})
        assert sum(map(len, got)) == len(set().union(*got)) == 580 + 1100
        assert max(map(len, got)) - min(map(len, got)) <= 8
        assert set().union(*got) == {*range(20, 600), *range(900, 2000)}


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("done", [[], [(0, 6)], [(4, 8), (12, 14), (22, 30)], [(0, 1200)], [(0, 3), (9, 10)]])
def test_a_photograph_has_the_same_batch_whoever_takes_it_and_whenever(size, done, monkeypatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: size)
    rest, got = left(2001, done), []
    for rank in range(size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        mine = shared_out(rest, 2)
        steps = _Steps(mine, 2)
        assert len(list(steps)) == len(steps)
        got.append(list(steps))
    whole = [[first, first + 1] for first in range(0, 2000, 2)] + [[2000]]
    finished = {i for start, stop in done for i in range(start, stop)}
    wanted = [[i for i in batch if i not in finished] for batch in whole]
    assert sorted(batch for batches in got for batch in batches) == [batch for batch in wanted if batch]
    assert max(map(len, got)) - min(map(len, got)) <= 1


@pytest.mark.slow
def test_torchrun_shares_the_photographs_out(words, tmp_path, files) -> None:
    words += ["--table", "jsonl", "--batch-size", "1"]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "attrib_zoo"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*run, *words], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("10 photographs explained") == 1
    assert len(list((tmp_path / "out/table").iterdir())) == 2
    alone = [str(tmp_path / "alone") if word.endswith("/out") else word for word in words]
    assert main(alone) == 0
    assert same(tmp_path / "out", tmp_path / "alone")


def test_a_trained_explainer_is_part_of_the_job(words, files, loaded, tmp_path, capsys) -> None:
    images = torch.cat([photo(files, loaded, f"p{i}.png") for i in range(4)])
    for seed, name in ((0, "a"), (1, "b")):
        explainer = TTAME(loaded.model, recipe="paper")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            explainer.fit([images], max_steps=1, seed=seed, show_progress=False).save(tmp_path / f"{name}.safetensors")
    words[1] = str(files / "photos/p1.png")
    assert main([*words, "--explainer", str(tmp_path / "a.safetensors"), "--table", "jsonl"]) == 0
    (row,) = rows_of(tmp_path / "out")
    ttame = TTAME.load(tmp_path / "a.safetensors", loaded.model)
    ttame.upsample = False
    want = ttame.attribute(photo(files, loaded, "p1.png"))[0, 0]
    assert torch.allclose(map_of(tmp_path / "out", row, "ttame"), want, atol=1e-3)
    capsys.readouterr()
    line = failure(capsys, [*words, "--explainer", str(tmp_path / "b.safetensors"), "--table", "jsonl", "--resume"])
    assert "explainers was" in line
