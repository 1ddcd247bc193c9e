"""What strangers give to the command line: names that a terminal or a spreadsheet would obey, options that explode."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from cli_cases import MODEL, failure, make_files

from attrib_zoo.cli import main
from attrib_zoo.errors import cell, shown
from attrib_zoo.training.checkpoint import read_facts


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


def usual(files: Path) -> list[str]:
    return ["--model", MODEL, "--weights", str(files / "w.pth")]


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("tabby, cat", "tabby, cat"),
        ("\x1b[2Jx\x07", r"\x1b[2Jx\x07"),
        ("\ud800", r"\ud800"),
        ("a\u202eb", r"a\u202eb"),
        ("néw ± – ↑ 日本 \u200c", "néw ± – ↑ 日本 \u200c"),
        ("one\r\ntwo\t3", "one\\r\ntwo\t3"),
    ],
)
def test_text_is_shown_as_no_terminal_would_obey_it(text: str, wanted: str) -> None:
    assert shown(text) == wanted
    shown(text).encode()


def test_a_long_name_is_cut_and_of_one_line() -> None:
    assert shown("x" * 100, 100) == "x" * 100
    assert shown("x" * 101, 100) == "x" * 99 + "…"
    assert shown("one\ntwo\t3", 100) == r"one\ntwo\t3"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@a", "\tx", "\rx"])
def test_cells_that_a_spreadsheet_would_run_are_text(text: str) -> None:
    assert cell(text) == f"'{text}"
    assert cell(f"a{text}") == f"a{text}"
    assert cell("") == ""


@pytest.mark.parametrize("name", ["x" * 5000, "\ud800", "\x1b[2J\x1b]0;t\x07", "$\\frac{", "a\nb", "\u202ecba"])
def test_explain_prints_any_class_name(name: str, files, tmp_path, capsys) -> None:
    (tmp_path / "names.json").write_text(json.dumps([name, "b", "c", "d", "e"]))
    words = ["explain", str(files / "photos/p0.png"), *usual(files), "--classes", str(tmp_path / "names.json")]
    words += ["--target", "0", "--method", "gradcam,layercam", "--output", str(tmp_path / "out")]
    assert main(words) == 0
    text = capsys.readouterr().out
    text.encode()
    assert all(c.isprintable() or c == "\n" for c in text)
    assert max(map(len, text.splitlines())) < 600
    assert len(list((tmp_path / "out").glob("*.png"))) == 3


def test_a_photograph_whose_name_is_no_text_is_explained(files, tmp_path, capsys) -> None:
    strange = tmp_path / os.fsdecode(b"\xff\x1b[2J.png")
    strange.write_bytes((files / "photos/p0.png").read_bytes())
    assert main(["explain", str(strange), *usual(files), "--output", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    text.encode()
    assert r"\xff\x1b[2J.png" in text


# ---------------------------------------------------------------------- options from files

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, r"must not use anchors and aliases \(& and \*\); write the values out"),
        ("model: *nowhere", "must not use anchors and aliases"),
        (f"model: {'[' * 30}{']' * 30}", "is nested more than 20 deep; it must be a YAML file of option: value lines"),
        (f"model: {'[' * 3000}", "nested more than 20 deep"),
        ("model: " + "x" * 2**20, "must be a file of at most 1 MB"),
        ("model: [", r"cannot read '.*' \(.*\); it must be a YAML file"),
        ("model: \x00", r"cannot read '.*'; it must be|cannot read"),
    ],
    ids=["bomb", "alias", "deep", "very deep", "large", "broken", "null"],
)
def test_files_of_options_that_explode_are_refused_at_once(text: str, words: str, tmp_path, capsys) -> None:
    (tmp_path / "c.yaml").write_text(text)
    begun = time.perf_counter()
    for form in (["--config", str(tmp_path / "c.yaml")], [f"--config={tmp_path / 'c.yaml'}"]):
        line = failure(capsys, ["explain", "x.png", *form])
        assert line.startswith("error: config: ")
        assert re.search(words, line)
    assert time.perf_counter() - begun < 10


def test_a_pipe_is_no_file_of_options(tmp_path, capsys) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "must be a file of at most 1 MB" in failure(capsys, ["list", "--config", str(tmp_path / "pipe")])


# ---------------------------------------------------------------------- fits that are stopped


def fit_words(files: Path, folder: Path) -> list[str]:
    words = ["fit", *usual(files), "--data", str(files / "photos"), "--output", str(folder / "x.safetensors")]
    words += ["--max-steps", "6", "--batch-size", "4", "--workers", "0", "--recipe", "paper", "--device", "cpu"]
    return [*words, "--checkpoint-dir", str(folder / "c"), "--resume", str(folder / "c"), "--checkpoint-every", "2"]


@pytest.mark.parametrize(
    ("name", "said"), [("SIGTERM", "stopped by SIGTERM"), ("SIGHUP", "stopped by SIGHUP"), ("SIGINT", "interrupted")]
)
def test_one_command_starts_and_continues_a_fit(name: str, said: str, files, tmp_path, capsys, monkeypatch) -> None:
    from attrib_zoo.training import checkpoint

    (tmp_path / "c").mkdir()
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    plain, calls = checkpoint.write_sealed, []

    def write(*args) -> None:
        calls.append(args)
        if len(calls) == 2:
            for _ in range(5):
                os.kill(os.getpid(), getattr(signal, name))
        plain(*args)

    monkeypatch.setattr(checkpoint, "write_sealed", write)
    assert main(fit_words(files, tmp_path)) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert "no checkpoint in the folder" in lines[0]
    said = "interrupted" if name == "SIGINT" else f"stopped by {name}"
    assert lines[-1] == f"{said}; continue with the same command and --resume {tmp_path / 'c'}"
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)] == handlers
    assert read_facts(tmp_path / "c" / "checkpoint.safetensors")["steps"] == 4
    monkeypatch.undo()
    assert main(fit_words(files, tmp_path)) == 0
    assert "no checkpoint" not in capsys.readouterr().err
    assert read_facts(tmp_path / "x.safetensors")["steps"] == 6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "x.safetensors"]
