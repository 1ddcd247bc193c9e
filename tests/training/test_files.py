"""Files that are written whole or not at all."""

import os
import stat
from pathlib import Path

import pytest

from attrib_zoo.training.files import write_whole


@pytest.mark.parametrize("content", ["näher\n", "näher\n".encode(), lambda file: file.write("näher\n".encode())])
def test_text_bytes_and_writers(content, tmp_path):
    write_whole(tmp_path / "x", content)
    assert (tmp_path / "x").read_bytes() == "näher\n".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_name_as_long_as_the_file_system_allows(tmp_path):
    path = tmp_path / ("x" * os.pathconf(tmp_path, "PC_NAME_MAX"))
    write_whole(path, "whole")
    assert path.read_text() == "whole"


def test_the_content_is_on_disk_before_the_name(tmp_path, monkeypatch):
    events = []
    for holder, name in ((os, "fsync"), (Path, "replace")):
        real = getattr(holder, name)
        monkeypatch.setattr(holder, name, lambda *args, n=name, f=real: (events.append(n), f(*args))[1])
    write_whole(tmp_path / "x", "whole")
    assert events == ["fsync", "replace"]


def test_a_writer_that_fails_leaves_the_old_file_alone(tmp_path):
    def half(file):
        file.write(b"half")
        raise ValueError("no more")

    (tmp_path / "x").write_text("old")
    with pytest.raises(ValueError, match="no more"):
        write_whole(tmp_path / "x", half)
    assert (tmp_path / "x").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_cleaning_up_never_hides_the_first_error(tmp_path, monkeypatch):
    def fail(self, **_):
        raise PermissionError("second")

    def full(_):
        raise OSError(28, "No space left")

    monkeypatch.setattr(Path, "unlink", fail)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "x", "whole")
    assert not (tmp_path / "x").exists()


def test_a_replaced_file_keeps_its_permissions_and_a_new_one_gets_the_usual_ones(tmp_path):
    secret, plain, other = tmp_path / "secret", tmp_path / "plain", tmp_path / "other"
    secret.write_text("old")
    secret.chmod(0o600)
    other.write_text("made by open()")
    for path in (secret, plain):
        write_whole(path, "new")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert plain.stat().st_mode == other.stat().st_mode


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "real")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "real").read_text() == "new"
