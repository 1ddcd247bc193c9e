"""The blocks of docs/how-to/export.md that test_docs leaves out do what the page says."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import export_cases as some
import pytest
import torch

from attrib_zoo import TTAME

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "export.md"


def block(first: str) -> str:
    """The block of the page that begins in this way."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    (found,) = [text for text in blocks if text.startswith(first)]
    return found


@pytest.fixture
def space(tmp_path, monkeypatch):
    """The names that the blocks before left, in a folder with the page's file in it."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        space = {"torch": torch, "TTAME": TTAME}
        exec(block("import torch\n"), space)
        exec(block("path = explainer.export("), space)
    return space


@pytest.mark.slow
def test_onnxruntime(space):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'attrib_zoo[export]'")
    exec(block("import onnxruntime"), space)
    wanted = space["explainer"].attribute(space["images"])[:, :1]
    torch.testing.assert_close(torch.from_numpy(space["maps"]), wanted, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_photographs_of_any_size(space):
    exec(block("class FromPhotos"), space)  # it compares by itself
    photos, crop = space["photos"], space["whole"](space["photos"])
    assert photos.shape[-2:] == (120, 160)
    assert crop[1].shape == (2, 1, 64, 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["the page's", "rows of a ViT"])
def test_aotinductor(name, space):
    """What is compiled says what ``attribute`` says, also of as many images as were not there when it was traced."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler: apt-get install g++")
    if name != "the page's":
        space |= {"explainer": some.EXPLAINERS[name](), "images": some.images(4)}
        space["explainer"].export("model.pt2", with_target=True)
    exec(block('exported = torch.export.load("model.pt2")'), space)
    explainer, size = space["explainer"], space["images"].shape[-1]
    for count in (1, 5):
        images, target = some.images(count, size, seed=9), torch.arange(count) % 5
        logits, maps, classes = space["compiled"](images, target)
        with torch.no_grad():
            torch.testing.assert_close(logits, explainer.model(images), rtol=1e-4, atol=1e-4)
        assert torch.equal(classes, target)
        torch.testing.assert_close(maps, explainer.attribute(images, target)[:, :1], rtol=0, atol=1e-4)
