"""Per-image results in a file: an interrupted run continues to the same table; other files are left alone."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
import strategies as zoo
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from benchmark_cases import CHEAP, IMAGES, Batches, Counted, assert_same, brightness

from attrib_zoo import TTAME, GradCAM
from attrib_zoo.benchmark import Table, evaluate
from attrib_zoo.benchmark.cost import Cost
from attrib_zoo.benchmark.records import Records, Row
from attrib_zoo.errors import DataError

WANTED = "ad,ic,deletion,sparseness"


@pytest.fixture(scope="module")
def model():
    return zoo.small_cnn()


@pytest.fixture(scope="module")
def whole(model) -> Table:
    return run(model)


def run(model, methods=CHEAP, loader=None, wanted=WANTED, **options) -> Table:
    loader = Batches(2) if loader is None else loader
    return evaluate(model, methods, loader, wanted, **{"controls": False, "show_progress": False, **options})


def lines(path: Path) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------- what is kept


def test_the_file_holds_each_image_as_it_comes(model, whole, tmp_path):
    path = tmp_path / "results.jsonl"
    assert_same(whole, run(model, path=path))
    head, *batches = lines(path)
    assert head["setting"]["measures"] == [m.name for m in whole.measures]
    assert [(b["method"], [r["image"] for r in b["rows"]]) for b in batches[:4]] == [
        ("brightness", [0, 1]),
        ("darkness", [0, 1]),
        ("brightness", [2, 3]),
        ("darkness", [2, 3]),
    ]
    row = batches[0]["rows"][1]
    assert 100 * row["values"]["AD(50)"] == float(whole.values("brightness", "AD(50)")[1])
    assert len(row["curves"]["deletion"]) == 33


def test_values_that_mean_nothing_are_kept_as_such(model, tmp_path):
    def spoilt(inputs, target):
        return brightness(inputs, target).masked_fill(torch.tensor(True), torch.nan)

    path = tmp_path / "results.jsonl"
    first = run(model, {"spoilt": spoilt}, path=path)
    assert lines(path)[1]["rows"][0]["values"]["AD(50)"] is None
    assert set(lines(path)[1]["rows"][0]["curves"]["deletion"]) == {None}
    again = run(model, {"spoilt": spoilt}, path=path)
    assert_same(first, again)
    assert again.values("spoilt", "AD(50)").isnan().all()
    assert again.curve("spoilt", "deletion").isnan().all()


def test_a_score_that_is_no_number_is_kept_as_such(tmp_path):
    records = Records({}, tmp_path / "results.jsonl")
    records.add([Row("x", 1, 7, 0, math.nan), Row("x", 0, 7, 0, 0.5)], "x", Cost(images=2))
    again = Records({}, tmp_path / "results.jsonl")
    assert lines(tmp_path / "results.jsonl")[1]["rows"][0]["clean"] is None
    assert math.isnan(again.rows["x", 1].clean)
    assert again.rows["x", 0] == records.rows["x", 0]
    assert [image for _, image in again.first(2).rows] == [0, 1]


# ---------------------------------------------------------------------- a second run continues


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_an_interrupted_run_continues_to_the_same_table(model, whole, tmp_path, stop):
    path = tmp_path / "results.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(model, loader=Batches(2, stop=stop), path=path)
    methods = {name: Counted(method) for name, method in CHEAP.items()}
    table = run(model, methods, path=path)
    assert_same(whole, table)
    assert {method.images for method in methods.values()} == {1 + 7 - 2 * stop}, "what is known is not done again"
    assert all(cost.images == 7 for cost in table.records.costs.values())
    methods = {name: Counted(method) for name, method in CHEAP.items()}
    assert_same(whole, run(model, methods, path=path))
    assert {method.images for method in methods.values()} == {0}


def test_a_run_that_stopped_between_methods_continues(model, whole, tmp_path):
    def fails(inputs, target):
        if len(calls) == 4:
            raise MemoryError
        calls.append(1)
        return CHEAP["darkness"](inputs, target)

    calls: list[int] = []
    path = tmp_path / "results.jsonl"
    with pytest.raises(MemoryError):
        run(model, {**CHEAP, "darkness": fails}, path=path)
    assert lines(path)[-1]["method"] == "brightness"
    first = Counted()
    assert_same(whole, run(model, {**CHEAP, "brightness": first}, path=path))
    assert first.images == 0, "all of it was in the file"


def test_a_file_cut_anywhere_continues_to_the_same_table(model, tmp_path):
    path = tmp_path / "results.jsonl"
    wanted = run(model, wanted="sparseness", path=path)
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    cuts = [0, 1, 20, ends[0] - 1, ends[0], ends[0] + 1, ends[1] - 1, ends[2] + 40, ends[5], len(data) - 1]
    for cut in cuts:
        path.write_bytes(data[:cut])
        assert_same(wanted, run(model, wanted="sparseness", path=path))
        kept = [end for end in ends if end <= cut]
        assert path.read_bytes()[: max(kept, default=0)] == data[: max(kept, default=0)]
        assert len(lines(path)) == 9


def test_a_run_with_other_batches_continues(model, whole, tmp_path):
    path = tmp_path / "results.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(model, loader=Batches(2, stop=2), path=path)
    assert_same(whole, run(model, loader=Batches(3), path=path), exact=False)


def test_fewer_images_than_the_file_has(model, whole, tmp_path):
    path = tmp_path / "results.jsonl"
    run(model, path=path)
    table = run(model, path=path, max_images=3)
    assert table.images == [0, 1, 2]
    assert torch.equal(table.values("darkness", "AD(50)"), whole.values("darkness", "AD(50)")[:3])
    assert_same(whole, run(model, path=path))


# ---------------------------------------------------------------------- what is refused


class Shuffled(Batches):
    def __iter__(self):
        return iter([part.flip(0) for part in self.parts])


def dicts(target: int) -> list[dict]:
    return [{"image": part, "target": torch.full((len(part),), target)} for part in IMAGES.split(2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"is of another run: seed differ \(seed: 0, now 1\); choose another file, or remove it"),
        ({"wanted": "ad"}, r"is of another run: measures differ"),
        ({"methods": {"brightness": brightness}}, "is of another run: methods differ"),
        (
            {"controls": True},
            r"controls differ \(controls: False, now \['random map', 'image edges', ",
        ),
        ({"masking": "raw", "score": "sigmoid"}, r"masking, score differ \(masking: 'auto', now 'raw'\)"),
        ({"masking": torch.full((3, 1, 1), 0.5)}, "masking differ"),
        ({"model": zoo.small_cnn((4, 6, 9))}, "is of another run: weights differ"),
        ({"model": zoo.small_vit()}, "is of another run: model, weights differ"),
        ({"loader": Shuffled(2)}, r"image 0 must be the one of the results file, .*shuffle=False"),
        ({"loader": Batches(2, IMAGES + 1e-6)}, "image 0 must be the one of the results file"),
        ({"loader": [*IMAGES.split(2)[:2], *(-IMAGES).split(2)[2:]]}, "image 4 must be the one of the results file"),
        ({"loader": dicts(1)}, "image 0 must be the one of the results file, got another .or another target or region"),
    ],
)
def test_a_file_of_another_run_is_refused_and_stays(model, tmp_path, change, message):
    path = tmp_path / "results.jsonl"
    run(model, path=path)
    before = path.read_bytes()
    with pytest.raises(DataError, match=message):
        run(**{"model": model, "path": path, **change})
    assert path.read_bytes() == before


def test_options_and_weights_of_methods_are_part_of_the_run(model, tmp_path):
    path = tmp_path / "results.jsonl"
    run(model, {"cam": GradCAM(model)}, wanted="sparseness", path=path)
    run(model, {"cam": GradCAM(model)}, wanted="sparseness", path=path)
    with pytest.raises(DataError, match="methods differ"):
        run(model, {"cam": GradCAM(model, relu=False)}, wanted="sparseness", path=path)

    class Fitted(Counted):
        network_ = torch.nn.Linear(2, 2)

        def options(self):
            return {}

        def __repr__(self):
            return "Fitted()"

    path = tmp_path / "fitted.jsonl"
    run(model, {"fitted": Fitted()}, wanted="sparseness", path=path)
    run(model, {"fitted": Fitted()}, wanted="sparseness", path=path)
    Fitted.network_.weight.data += 1
    with pytest.raises(DataError, match="methods differ"):
        run(model, {"fitted": Fitted()}, wanted="sparseness", path=path)


@pytest.mark.parametrize("choose", [lambda model: None, lambda model: [model.stages[0], "stages.2"]])
def test_what_is_loaded_from_a_file_continues_the_run_of_what_was_fitted(model, tmp_path, choose):
    path = tmp_path / "results.jsonl"
    fitted = zoo.fit(TTAME(model, choose(model), recipe="paper"), [IMAGES], max_steps=1, seed=0)
    first = run(model, {"fitted": fitted}, wanted="sparseness", path=path)
    fitted.save(tmp_path / "fitted.safetensors")
    loaded = TTAME.load(tmp_path / "fitted.safetensors", model)
    assert repr(loaded) == repr(fitted)
    assert_same(first, run(model, {"fitted": loaded}, wanted="sparseness", path=path))


@pytest.mark.parametrize(
    "content",
    [
        b"my notes",
        b"my notes\nwithout an end",
        b"\x89PNG\r\n\x1a\n\xff\xfe",
        b"[1, 2]\n",
        b'{"format": 99, "setting": {}}\n',
        b"3\n",
    ],
)
def test_what_is_no_results_file_is_refused_and_stays(model, tmp_path, content):
    path = tmp_path / "mine"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"mine' must be a results file of this version, got something else; choose"):
        run(model, path=path)
    assert path.read_bytes() == content


def test_a_damaged_line_is_refused_and_stays(model, tmp_path):
    path = tmp_path / "results.jsonl"
    run(model, wanted="sparseness", path=path)
    for damaged in ('{"rows": 3}', '{"rows": [{"values": {}}], "method": "x", "cost": {}}', "{}", "nonsense"):
        kept = path.read_text().splitlines()
        path.write_text("\n".join([kept[0], damaged, *kept[2:]]) + "\n")
        before = path.read_bytes()
        with pytest.raises(DataError, match=r"must be a results file of this version|line 2 of .* is not as it was"):
            run(model, wanted="sparseness", path=path)
        assert path.read_bytes() == before


TAMPERED = {
    "a digit": lambda kept: [*kept[:2], kept[2].replace("1", "2", 1), *kept[3:]],
    "the setting": lambda kept: [kept[0].replace('"seed": 0', '"seed": 00'), *kept[1:]],
    "a line less": lambda kept: [*kept[:2], *kept[3:]],
    "two lines swapped": lambda kept: [kept[0], kept[2], kept[1], *kept[3:]],
    "a line twice": lambda kept: [*kept[:2], kept[1], *kept[2:]],
    "no seal": lambda kept: [kept[0], kept[1].rpartition(', "seal"')[0] + "}", *kept[2:]],
}


@pytest.mark.parametrize("how", TAMPERED)
def test_lines_that_were_edited_or_deleted_are_noticed(model, tmp_path, how):
    path = tmp_path / "results.jsonl"
    run(model, wanted="sparseness", path=path)
    path.write_text("\n".join(TAMPERED[how](path.read_text().splitlines())) + "\n")
    before = path.read_bytes()
    with pytest.raises(
        DataError, match=r"(line \d of .* is not as it was written, or lines .* measure anew|this version)"
    ):
        run(model, wanted="sparseness", path=path)
    assert path.read_bytes() == before


def test_a_file_of_version_0_1_is_continued_with_a_warning(model, whole, tmp_path):
    path = tmp_path / "results.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(model, loader=Batches(2, stop=1), path=path)
    old = [{name: value for name, value in line.items() if name != "seal"} for line in lines(path)]
    old[0]["format"] = 1
    path.write_text("".join(json.dumps(line) + "\n" for line in old))
    with pytest.warns(UserWarning, match=r"was begun by version 0.1, whose lines have no checksums"):
        assert_same(whole, run(model, path=path))
    assert not any("seal" in line for line in lines(path))
    with pytest.warns(UserWarning, match="version 0.1"):
        assert_same(whole, run(model, path=path))


def test_a_second_run_into_one_file_is_told_who_is_at_it(model, tmp_path):
    path = tmp_path / "results.jsonl"

    def again(inputs, target):
        with pytest.raises(DataError, match=r"path: '.*results.jsonl' is in use by this very process; wait"):
            run(model, path=path)
        return brightness(inputs, target)

    run(model, {"x": again}, wanted="sparseness", path=path)
    assert [p.name for p in tmp_path.iterdir()] == ["results.jsonl"]


def test_a_path_that_cannot_be_written_is_named_before_any_work(model, tmp_path):
    method = Counted()
    with pytest.raises(DataError, match=r"path: must be a file in a folder that can be written, got '.*results.jsonl'"):
        run(model, {"x": method}, path=tmp_path / "nowhere" / "results.jsonl")
    with pytest.raises(DataError, match=rf"path: '{tmp_path}' cannot be read \(.*directory\); choose another file"):
        run(model, {"x": method}, path=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"Not a directory"):
        run(model, {"x": method}, path=tmp_path / "file" / "results.jsonl")
    assert method.images == 0


def test_a_disk_that_is_full_loses_nothing(model, whole, tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    write, left = Records._write, [4]

    def full(self, found):
        left[0] -= 1
        if left[0] < 0:
            raise self._unwritable(OSError(28, "No space left on device"))
        write(self, found)

    monkeypatch.setattr(Records, "_write", full)
    with pytest.raises(DataError, match=r"No space left on device\); make the folder, make room"):
        run(model, path=path)
    monkeypatch.undo()
    assert len(lines(path)) == 4
    assert_same(whole, run(model, path=path))


def test_a_run_that_found_nothing_does_not_stand_in_the_way(model, tmp_path):
    def fails(inputs, target):
        raise ZeroDivisionError

    path = tmp_path / "results.jsonl"
    with pytest.raises(ZeroDivisionError):
        run(model, {"wrong": fails}, path=path)
    assert path.read_bytes() == b""
    run(model, path=path)


# ---------------------------------------------------------------------- two processes


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = zoo.small_cnn()
    found = {"table": run(model, path=folder / "results.jsonl"), "again": run(model, path=folder / "results.jsonl")}
    found["one batch"] = run(model, loader=Batches(7))
    found["few"] = run(model, max_images=3)
    torch.save({name: (table.records, table.to_csv()) for name, table in found.items()}, folder / f"found {rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_find_what_one_finds(model, whole, tmp_path):
    processes.spawn(work, (tmp_path,), nprocs=2)
    found = [torch.load(tmp_path / f"found {rank}", weights_only=False) for rank in range(2)]
    for name in found[0]:
        assert found[0][name][1] == found[1][name][1], "both return the same table"
    for name, wanted in {"table": whole, "again": whole, "few": run(model, max_images=3)}.items():
        records, text = found[0][name]
        assert_same(wanted, Table(records, whole.measures))
        assert text == wanted.to_csv()
        assert {c.images for c in records.costs.values()} == {len(wanted.images)}
    assert_same(run(model, loader=Batches(7)), Table(found[0]["one batch"][0], whole.measures))
    files = [lines(tmp_path / f"results{number}.jsonl")[1:] for number in ("", ".1")]
    shares = [{row["image"] for batch in file for row in batch["rows"]} for file in files]
    assert shares == [{0, 1, 4, 5}, {2, 3, 6}]
    cut = tmp_path / "results.1.jsonl"
    cut.write_bytes(cut.read_bytes()[:-9])  # stopped while it wrote; one process goes on with both files
    before = cut.read_bytes()
    method = Counted(CHEAP["darkness"])
    (tmp_path / "results.old.jsonl").write_text("of somebody else")
    assert_same(whole, run(model, {**CHEAP, "darkness": method}, path=tmp_path / "results.jsonl"))
    assert method.images == 1 + 1
    assert cut.read_bytes() == before
