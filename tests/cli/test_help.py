"""What helps a person along: doctor, completion, and help that reads as one page."""

from __future__ import annotations

import os
import re
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import torch
from cli_cases import failure

import attrib_zoo
from attrib_zoo.cli import _NAMES, _parser, doctor, main
from attrib_zoo.cli.shared import methods


def test_doctor_says_versions_devices_caches(capsys, monkeypatch, tmp_path) -> None:
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / "w.pth").write_bytes(bytes(2_000_000))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^  attrib_zoo +{re.escape(attrib_zoo.__version__)}$", out, re.MULTILINE)
    assert re.search(rf"^  torch +{re.escape(metadata.version('torch'))}$", out, re.MULTILINE)
    assert f"{os.cpu_count()} cores" in out
    assert torch.cuda.is_available() or "none found; torch was built" in out
    assert f"{cache} (1 files, 2 MB)" in out
    assert f"{tmp_path / 'none'} (nothing yet)" in out
    assert out.rstrip().endswith("nothing is missing")


def test_doctor_names_what_is_missing_and_how_to_get_it(capsys, monkeypatch) -> None:
    def version(name: str) -> str:
        if name in ("timm", "griffe-of-docs"):
            raise metadata.PackageNotFoundError(name)
        return "1"

    required = ["torch", 'griffe-of-docs>=1; extra == "docs"', "pytest ; extra == 'test'"]
    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: required)

    def other(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor.importlib, "import_module", other)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    missing = out.partition("\nmissing\n")[2]
    assert "timm: pip install timm" in missing
    assert "torchvision does not fit this torch (operator torchvision::nms does not exist)" in missing
    assert re.search(r"^  docs +needs griffe-of-docs: pip install 'attrib_zoo\[docs\]'$", out, re.MULTILINE)
    assert re.search(r"^  test +complete$", out, re.MULTILINE)


def completed(script: str, folder: Path, *words: str) -> list[str]:
    """What bash offers for the last word."""
    line = " ".join(f"'{word}'" for word in ("attrib-zoo", *words))
    code = f'{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words)}; _attrib_zoo; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", code], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.split()


def test_bash_completes_commands_options_methods_and_files(capsys, tmp_path) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    (tmp_path / "cat.jpg").touch()
    (tmp_path / "car.jpg").touch()
    assert completed(script, tmp_path, "ex") == ["explain"]
    assert set(completed(script, tmp_path, "")) >= set(_NAMES)
    assert completed(script, tmp_path, "explain", "--col") == ["--colormap"]
    assert completed(script, tmp_path, "fit", "--col") == []
    assert completed(script, tmp_path, "explain", "--method", "scorec") == ["scorecam"]
    assert sorted(completed(script, tmp_path, "explain", "--method", "")) == sorted(methods())
    assert completed(script, tmp_path, "explain", "--score", "sig") == ["sigmoid"]
    assert completed(script, tmp_path, "explain", "cat") == ["cat.jpg"]


def test_another_shell_is_refused(capsys) -> None:
    assert "shell: must be one of 'bash', 'zsh', got 'fish'" in failure(capsys, ["completion", "fish"])
    assert main(["completion", "zsh"]) == 0
    assert "bashcompinit" in capsys.readouterr().out


def test_every_command_is_known_where_errors_name_its_help() -> None:
    (found,) = (
        action for action in _parser()._actions if hasattr(action, "choices") and isinstance(action.choices, dict)
    )
    assert tuple(found.choices) == _NAMES


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("command", ["", *_NAMES])
def test_help_is_no_wider_than_the_terminal(command, columns, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        main([*filter(None, [command]), "--help"])
    lines = capsys.readouterr().out.splitlines()
    examples = [line for line in lines if line.startswith("  attrib-zoo ")]  # to be copied: they stay whole
    assert not [line for line in lines if len(line) > columns and line not in examples]


def test_help_has_one_column_of_names_and_one_of_words(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    words = [re.search(rf"^    {name} +(?=\w)", text, re.MULTILINE) for name in _NAMES]
    assert len({len(found[0]) for found in words if found}) == 1
    assert all(words)
