"""One run at a time: who comes second hears who holds the place; the dead hold nothing."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import attrib_zoo
from attrib_zoo.errors import DataError
from attrib_zoo.training.locks import NAME, hold

HOLDER = """
import os, sys, time, types
package = types.ModuleType("attrib_zoo")  # the module alone, without torch
package.__path__ = [sys.argv.pop(1)]
sys.modules["attrib_zoo"] = package
from attrib_zoo.training.locks import hold
child = None
with hold(sys.argv[1], sys.argv[2]):
    if len(sys.argv) > 3:
        child = os.fork()
    if child is None or child:
        print("held", child or "", flush=True)
    time.sleep(60)
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")


@pytest.fixture
def holder():
    started = []

    def start(place, *more):
        words = [sys.executable, "-c", HOLDER, str(Path(attrib_zoo.__file__).parent), str(place), "fit", *more]
        process = subprocess.Popen(words, stdout=subprocess.PIPE)
        started.append(process)
        said = process.stdout.readline().split()
        assert said[0] == b"held"
        return process, [int(word) for word in said[1:]]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_second_process_hears_who_holds_the_folder(tmp_path, holder):
    process, _ = holder(tmp_path)
    begun = time.monotonic()
    words = (
        rf"output: '{tmp_path}' is in use by process {process.pid} on {socket.gethostname()!r} "
        r"\(fit, since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\); wait until it has ended, stop it, or choose another place"
    )
    with pytest.raises(DataError, match=words), hold(tmp_path, "evaluate"):
        pass
    assert time.monotonic() - begun < 1  # at once
    assert json.loads((tmp_path / NAME).read_text())["pid"] == process.pid  # the loser has not touched it


def test_a_killed_holder_holds_nothing_even_where_its_children_live(tmp_path, holder):
    process, (child,) = holder(tmp_path, "forks")
    with pytest.raises(DataError, match="in use"), hold(tmp_path, "fit"):
        pass
    try:
        process.kill()
        process.wait()
        assert (tmp_path / NAME).exists()
        with hold(tmp_path, "fit"):
            assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    finally:
        os.kill(child, signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


def test_within_a_process_too_and_again_afterwards(tmp_path):
    with hold(tmp_path, "one"):
        with pytest.raises(DataError, match="in use by this very process"), hold(f"{tmp_path}/.", "two"):
            pass
        with pytest.raises(DataError, match="in use by this very process"), hold(tmp_path, "three"):
            pass
        assert (tmp_path / NAME).exists()
        with hold(tmp_path / "file", "another place"):
            assert (tmp_path / ".file.lock").exists()
    with pytest.raises(ZeroDivisionError), hold(tmp_path, "four"):
        1 / 0  # noqa: B018
    with hold(tmp_path, "five"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"pid": "1"}', '{"pid": 99999999999999999999}', "[" * 5000])
def test_a_lock_file_of_whatever_content_keeps_nobody_out(tmp_path, content):
    (tmp_path / NAME).write_text(content)
    with hold(tmp_path, "fit"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_held_beside_it(tmp_path, holder):
    place = tmp_path / ("x" * 250)
    holder(place)
    with pytest.raises(DataError, match=r"results: .* is in use by process"), hold(place, "fit", "results"):
        pass
    with hold(tmp_path / "other", "fit"):
        pass


def test_a_folder_that_is_not_there(tmp_path):
    words = r"output: must be a file in a folder that can be written, got .*\(No such file"
    with pytest.raises(DataError, match=words), hold(tmp_path / "nowhere" / "x", "fit"):
        pass
