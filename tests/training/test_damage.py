"""Files that lie: any cut, any flipped bit and any edit is refused with what to do, or gives the same maps."""

from __future__ import annotations

import json
import struct
import tracemalloc
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import strategies as zoo
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from attrib_zoo import TTAME
from attrib_zoo.errors import CheckpointError
from attrib_zoo.training import checkpoint as files
from attrib_zoo.training.checkpoint import Checkpoint, read, read_facts, write

IMAGES = zoo.batch(4)
MODEL = zoo.small_cnn()
PLAN = {"max_steps": 4, "schedule": "short"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An explainer's file, a fit's checkpoint from its middle, and the maps of the first."""
    place = tmp_path_factory.mktemp("files")
    explainer = zoo.fit(TTAME(MODEL, recipe="paper"), [IMAGES], max_steps=2, val_loader=[IMAGES])
    explainer.save(place / "explainer.safetensors")
    torch.save(explainer.maps(IMAGES), place / "maps.pt")
    with pytest.raises(KeyboardInterrupt):
        zoo.fit(TTAME(MODEL, recipe="paper"), Stopping(), checkpoint_dir=place, **PLAN)
    return place


class Stopping:
    """Ctrl-C after the second of four batches."""

    def __len__(self):
        return 4

    def __iter__(self):
        yield from IMAGES.split(2)
        raise KeyboardInterrupt


def refused_or_the_same(path, maps):
    """Whether a file is refused as it should be; what loads must give the maps of the whole one."""
    said = ""
    try:
        loaded = TTAME.load(path, MODEL)
    except CheckpointError as error:
        said = str(error)
    if said:
        assert str(path) in said
        assert any(word in said for word in ("fit again", "upgrade", "use ", "load the weights", "something else"))
    else:
        assert torch.equal(loaded.maps(IMAGES), maps)
    return bool(said)


# ---------------------------------------------------------------------- bytes


def header_of(data):
    return struct.unpack("<Q", data[:8])[0]


@settings(max_examples=40)
@given(
    share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), part=st.sampled_from(["length", "header", "data"])
)
def test_any_flipped_bit(folder, share, bit, part):
    data = bytearray((folder / "explainer.safetensors").read_bytes())
    size = header_of(data)
    first, last = {"length": (0, 8), "header": (8, 8 + size), "data": (8 + size, len(data))}[part]
    data[first + int(share * (last - first))] ^= 1 << bit
    path = folder / "flipped.safetensors"
    path.write_bytes(data)
    assert refused_or_the_same(path, torch.load(folder / "maps.pt", weights_only=True))


@settings(max_examples=15)
@given(share=st.floats(0, 1, exclude_max=True))
def test_any_cut_and_any_addition(folder, share):
    data = (folder / "explainer.safetensors").read_bytes()
    path = folder / "cut.safetensors"
    path.write_bytes(data[: int(share * len(data))])
    assert refused_or_the_same(path, torch.load(folder / "maps.pt", weights_only=True))
    path.write_bytes(data + data[: 1 + int(share * 99)])
    assert refused_or_the_same(path, torch.load(folder / "maps.pt", weights_only=True))


def test_a_file_is_written_without_a_copy_of_it(tmp_path, monkeypatch):
    """Tensor by tensor: of one on the CPU nothing is copied at all."""
    size = 2**22
    tensors = {f"network/{i}": torch.ones(size // 4) for i in range(8)}
    written = []
    plain = files.write_sealed
    monkeypatch.setattr(files, "write_sealed", lambda file, *rest: (written.append(file), plain(file, *rest)))
    tracemalloc.start()
    write(tmp_path / "x", Checkpoint(tensors, {"a": 1}))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "x").stat().st_size > 8 * size
    assert peak < size
    assert written


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's measure of memory")
def test_a_file_is_read_without_a_copy_of_it(tmp_path):
    """At its peak, a process that reads 64 MB has little more than those 64 MB."""
    size = 2**26
    write(tmp_path / "x", Checkpoint({f"network/{i}": torch.ones(size // 32) for i in range(8)}, {"a": 1}))
    write(tmp_path / "small", Checkpoint({"a": torch.ones(1)}, {"a": 1}))
    read(tmp_path / "small")  # what is imported and made once
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _memory("VmRSS")
    found = read(tmp_path / "x")
    assert _memory("VmHWM") - before < 1.2 * size
    assert all(bool((tensor == 1).all()) for tensor in found.tensors.values())


def _memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


# ---------------------------------------------------------------------- what the header says

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.just([]),
    st.just({}),
    st.lists(st.integers(-3, 3), max_size=3),
)


def places(value, path=()):
    """Every place in nested JSON."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def edited(facts, place, value, delete):
    facts = json.loads(json.dumps(facts))
    if not place:
        return value
    holder = facts
    for key in place[:-1]:
        holder = holder[key]
    if delete:
        del holder[place[-1]]
    else:
        holder[place[-1]] = value
    return facts


@settings(max_examples=50)
@given(data=st.data(), value=JUNK, delete=st.booleans())
def test_any_edit_of_the_metadata(folder, data, value, delete):
    source = folder / "explainer.safetensors"
    facts, seal = files.read_metadata(source)
    facts = json.loads(facts)
    place = data.draw(st.sampled_from(list(places(facts))))
    changed = edited(facts, place, value, delete)
    path = folder / "edited.safetensors"
    save_file(load_file(source), path, {"attrib_zoo": json.dumps(changed), "sha256": seal})
    same = json.dumps(changed) == json.dumps(facts)
    assert refused_or_the_same(path, torch.load(folder / "maps.pt", weights_only=True)) is not same


@settings(max_examples=80)
@given(data=st.data(), value=JUNK, delete=st.booleans(), old=st.booleans())
def test_an_edit_with_a_checksum_of_its_own_or_none_never_ends_in_another_error(folder, data, value, delete, old):
    """Whoever makes the checksum anew can say what they like; it must still be one sentence, and no huge tensor."""
    facts, tensors = _parts(folder / "explainer.safetensors")
    place = data.draw(st.sampled_from([place for place in places(facts) if place]))
    changed = edited(facts, place, value, delete)
    path = folder / "resealed.safetensors"
    _write(path, tensors, changed, old)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loaded = TTAME.load(path, MODEL)
        except CheckpointError:
            return
        loaded.report()


@settings(max_examples=40)
@given(data=st.data(), value=JUNK, delete=st.booleans(), old=st.booleans())
@example(data=None, value=2**40, delete=False, old=True)
def test_an_edited_checkpoint_is_resumed_or_refused_with_one_sentence(folder, data, value, delete, old):
    facts, tensors = _parts(folder / "checkpoint.safetensors")
    known = [place for place in places(facts) if place]
    place = ("state", "order", "position") if data is None else data.draw(st.sampled_from(known))
    path = folder / "resume.safetensors"
    _write(path, tensors, edited(facts, place, value, delete), old)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            zoo.fit(TTAME(MODEL, recipe="paper"), IMAGES.split(2) * 2, resume_from=path, **PLAN)
        except CheckpointError as error:
            said = str(error)
        else:
            said = str(path)
    assert str(path) in said or "must be continued with the same" in said


def _parts(path):
    found = read(path)
    return {name: value for name, value in found.facts.items() if name != "format"}, found.tensors


def _write(path, tensors, facts, old):
    """With a checksum that is right, or as version 0.1 did, without one."""
    if old:
        save_file(tensors, path, {"attrib_zoo": json.dumps({"format": 1, **facts})})
    else:
        write(path, Checkpoint(tensors, facts))


@pytest.mark.parametrize("classes", [3_000_000, 1_000_000_000, 2**62])
def test_a_header_that_asks_for_much_gets_nothing(folder, classes, monkeypatch):
    facts, tensors = _parts(folder / "explainer.safetensors")
    path = folder / "huge.safetensors"
    made = []
    plain = TTAME.build_network
    monkeypatch.setattr(TTAME, "build_network", lambda *args: (made.append(args[2]), plain(*args))[1])
    _write(path, tensors, {**facts, "num_classes": classes}, old=True)
    with pytest.raises(CheckpointError, match="it must count the images of its"):
        TTAME.load(path, MODEL)
    assert not made  # nothing that depends on it
    channels = [10**6, *facts["channels"][1:]]
    _write(path, tensors, {**facts, "channels": channels}, old=True)
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda self, device: _only_hollow(self, device))
    with pytest.raises(CheckpointError, match=r"its tensors are of another network: size mismatch"):
        TTAME.load(path, MODEL)


def _only_hollow(module, device):
    assert torch.device(device).type == "meta", "memory for what the header says"
    return module


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "F8_E4M3", "shape": [4, 3]}, "y is of type F8_E4M3"),
        ({"shape": [2**40, 3]}, None),
        ({"data_offsets": [0, 2**40], "shape": [2**38]}, None),
    ],
)
def test_a_header_of_other_tensors(tmp_path, change, words):
    path = tmp_path / "x"
    save_file({"y": torch.ones(3, dtype=torch.float32)}, path, {"attrib_zoo": json.dumps({"format": 1})})
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + header_of(data)])
    header["y"] |= change
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + header_of(data) :])
    with pytest.raises(CheckpointError, match=words or "must be a whole safetensors file"):
        read(path)


def test_tensors_without_values_are_read(tmp_path):
    write(tmp_path / "x", Checkpoint({"y": torch.ones(0, 3), "z": torch.tensor(2.0)}, {"a": 1}))
    found = read(tmp_path / "x").tensors
    assert found["y"].shape == (0, 3)
    assert float(found["z"]) == 2.0


def test_facts_nested_without_end(folder):
    _, tensors = _parts(folder / "explainer.safetensors")
    path = folder / "deep.safetensors"
    save_file(tensors, path, {"attrib_zoo": '{"format": 1, "options": ' + "[" * 100_000 + "]" * 100_000 + "}"})
    with pytest.raises(CheckpointError, match="nested too deeply"):
        TTAME.load(path, MODEL)


# ---------------------------------------------------------------------- tensors


def _with(name, change):
    def spoil(tensors):
        tensors[name] = change(tensors[name].clone())

    return spoil


def _at(value):
    def put(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return put


SPOILT = {
    "NaN": (_with("network/fuser.weight", _at(torch.nan)), "network/fuser.weight is not finite"),
    "infinity": (_with("network/fuser.bias", _at(torch.inf)), "network/fuser.bias is not finite"),
    "int64": (_with("network/fuser.weight", lambda t: t.long()), r"fuser.weight is of type torch.int64"),
    "bool": (_with("network/fuser.weight", lambda t: t > 0), r"fuser.weight is of type torch.bool"),
    "half": (_with("network/fuser.weight", lambda t: t.half()), r"float16; weights are float32 or float64"),
    "variance": (_with("network/branches.0.norm.running_var", _at(-1.0)), "is a variance below zero"),
    "counts": (_with("class_counts", _at(-1)), "must count the images of its 5 classes"),
    "float counts": (_with("class_counts", lambda t: t.double()), "must count the images of its 5 classes"),
    "transposed": (_with("network/fuser.weight", lambda t: t.transpose(0, 1).contiguous()), "size mismatch"),
    "missing": (lambda tensors: tensors.pop("network/fuser.bias"), "of another network: Missing key"),
    "history": (lambda tensors: tensors.pop("history/loss"), "its history is incomplete"),
}


@pytest.mark.parametrize("fault", SPOILT)
@pytest.mark.parametrize("old", [False, True], ids=["sealed anew", "without a checksum"])
def test_weights_that_cannot_be(folder, fault, old):
    facts, tensors = _parts(folder / "explainer.safetensors")
    spoil, words = SPOILT[fault]
    spoil(tensors)
    path = folder / "spoilt.safetensors"
    _write(path, tensors, facts, old)
    with pytest.raises(
        CheckpointError, match=rf"must be a checkpoint as it was written, .*{words}.*copy it again, or fit"
    ):
        TTAME.load(path, MODEL)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("optimizer/0/exp_avg", _at(torch.nan), "the optimiser's 0/exp_avg is not finite"),
        ("optimizer/0/exp_avg", lambda t: t[:1], "exp_avg must have the shape of its parameter"),
        ("generator", lambda t: t[:10], "cannot be used"),
        ("generator", lambda t: t.float(), "its random generator"),
        ("network/fuser.weight", _at(torch.nan), "not finite"),
    ],
)
def test_a_state_that_cannot_be(folder, name, change, words):
    facts, tensors = _parts(folder / "checkpoint.safetensors")
    tensors[name] = change(tensors[name].clone()).contiguous()
    path = folder / "state.safetensors"
    _write(path, tensors, facts, old=False)
    with pytest.raises(CheckpointError, match=f"resume_from: .*{words}"):
        zoo.fit(TTAME(MODEL, recipe="paper"), IMAGES.split(2) * 2, resume_from=path, **PLAN)


# ---------------------------------------------------------------------- files of version 0.1


def test_files_without_a_checksum_load_with_a_warning(folder, tmp_path):
    facts, tensors = _parts(folder / "explainer.safetensors")
    path = tmp_path / "old.safetensors"
    _write(path, tensors, facts, old=True)
    with pytest.warns(UserWarning, match=r"old.safetensors was written by version 0.1, which kept no checksum") as told:
        loaded = TTAME.load(path, MODEL)
    assert told[0].filename == __file__
    assert torch.equal(loaded.maps(IMAGES), torch.load(folder / "maps.pt", weights_only=True))
    assert torch.equal(TTAME.load(loaded.save(path), MODEL).maps(IMAGES), loaded.maps(IMAGES))  # and now it has one


def test_a_fit_of_version_0_1_is_continued_with_a_warning(folder, tmp_path):
    facts, tensors = _parts(folder / "checkpoint.safetensors")
    for name in ("batches", "batch_size", "images", "processes"):
        del facts["plan"][name]
    del facts["state"]["order"]["last"]
    _write(tmp_path / "old.safetensors", tensors, facts, old=True)
    loader = IMAGES.split(2) * 2
    straight = zoo.fit(TTAME(MODEL, recipe="paper"), loader, **PLAN)
    with pytest.warns(UserWarning, match="kept no checksum"):
        resumed = TTAME(MODEL, recipe="paper").fit(
            loader, resume_from=tmp_path / "old.safetensors", show_progress=False, **PLAN
        )
    assert torch.equal(resumed.maps(IMAGES), straight.maps(IMAGES))


def test_facts_are_read_without_the_tensors(folder, monkeypatch):
    monkeypatch.setattr(files, "read_tensors", lambda *_: pytest.fail("read"))
    assert read_facts(folder / "explainer.safetensors")["method"] == "TTAME"
    with pytest.raises(CheckpointError, match="not there"):
        read_facts(Path("/nowhere"))


def test_double_precision_stays(tmp_path):
    model = zoo.small_cnn().double()
    images = IMAGES.double()
    made = zoo.fit(TTAME(model, recipe="paper"), [images], max_steps=2)
    loaded = TTAME.load(made.save(tmp_path / "x.safetensors"), model)
    assert torch.equal(loaded.maps(images), made.maps(images))


@pytest.mark.parametrize(
    ("name", "value", "fine"),
    [("fused", None, True), ("fused", "x", False), ("amsgrad", True, False), ("differentiable", True, False)],
)
def test_how_the_optimiser_goes_is_no_reason_to_refuse_and_what_it_does_is(folder, name, value, fine):
    facts, tensors = _parts(folder / "checkpoint.safetensors")
    for group in facts["state"]["optimizer"]["groups"]:
        group[name] = value
    path = folder / "begun.safetensors"
    _write(path, tensors, facts, False)
    fitted = zoo.fit(
        TTAME(MODEL, recipe="paper"), IMAGES.split(2) * 2, resume_from=folder / "checkpoint.safetensors", **PLAN
    )
    with (
        warnings.catch_warnings(),
        nullcontext() if fine else pytest.raises(CheckpointError, match=f"optimiser's {name} must"),
    ):
        warnings.simplefilter("ignore")
        other = zoo.fit(TTAME(MODEL, recipe="paper"), IMAGES.split(2) * 2, resume_from=path, **PLAN)
        assert torch.allclose(other.maps(IMAGES), fitted.maps(IMAGES), atol=1e-4)
