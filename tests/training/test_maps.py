"""Maps of very many classes: in parts the same as at once, in little more memory than they take, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import strategies as zoo
import torch
from torch import nn

from attrib_zoo import TTAME, LCAMFm
from attrib_zoo.errors import InputError, TargetError
from attrib_zoo.masking import free_bytes
from attrib_zoo.methods.bases import trainable
from attrib_zoo.training import maps as maps_
from attrib_zoo.training.recipe import RECIPES

IMAGES = zoo.batch(3)


@pytest.fixture(scope="module")
def explainers():
    model = zoo.small_cnn()
    made = {"paper": TTAME(model, recipe="paper"), "rows": TTAME(model, recipe="rows"), "lcam": LCAMFm(model)}
    return {name: zoo.fit(each, [IMAGES], max_steps=2) for name, each in made.items()}


@pytest.mark.parametrize("name", ["paper", "rows", "lcam"])
@pytest.mark.parametrize("images", [IMAGES, IMAGES[:1]], ids=["three", "one"])
def test_parts_are_the_whole(explainers, name, images, monkeypatch):
    explainer = explainers[name]
    whole = explainer.maps(images)
    monkeypatch.setattr(maps_, "_SMALL", 0)
    torch.testing.assert_close(explainer.maps(images), whole, rtol=0, atol=2e-6)
    monkeypatch.undo()
    for classes in ([3, 0], torch.tensor([4]), [1, 1, 2]):
        found = explainer.maps(images, classes=classes)
        wanted = whole[:, classes if isinstance(classes, list) else classes.tolist()]
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)
    assert whole.std() > 0


def test_classes_that_are_none(explainers):
    for classes in ([], [5], [-1], ["a"], [1.0], [True]):
        with pytest.raises(TargetError, match=r"class"):
            explainers["paper"].maps(IMAGES, classes=classes)


def test_a_method_that_knows_all_maps_only_at_once_is_left_to_it(monkeypatch):
    class Doubled(TTAME):
        def all_maps(self, outputs, maps):
            return 2 * super().all_maps(outputs, maps)

        some_maps = TTAME.__mro__[1].some_maps

    model = zoo.small_cnn()
    made = zoo.fit(Doubled(model, recipe="paper"), [IMAGES], max_steps=1)
    monkeypatch.setattr(trainable, "in_parts", lambda *_: pytest.fail("in parts"))
    assert made.maps(IMAGES).shape[1] == 5
    torch.testing.assert_close(made.maps(IMAGES, classes=[3]), made.maps(IMAGES)[:, [3]])


def test_what_all_classes_share_is_computed_once(explainers, monkeypatch):
    calls = []
    branch = type(explainers["paper"]._ready().network.branches[0])
    plain = branch.forward
    monkeypatch.setattr(branch, "forward", lambda self, x: (calls.append(self), plain(self, x))[1])
    monkeypatch.setattr(maps_, "_SMALL", 0)
    explainers["paper"].maps(IMAGES)
    assert calls
    assert len(calls) == len(set(calls))


def test_what_does_not_fit_is_refused_in_a_sentence(explainers, monkeypatch):
    monkeypatch.setattr(maps_, "_SMALL", 0)
    monkeypatch.setattr(maps_, "free_bytes", lambda device: 1000)
    words = r"inputs: 3 images with maps of 5 classes, \d+ x \d+ each, take .* GB, and 1e-06 GB of memory are free"
    with pytest.raises(InputError, match=words):
        explainers["paper"].maps(IMAGES)
    monkeypatch.setattr(maps_, "free_bytes", lambda device: None)  # nobody knows
    explainers["paper"].maps(IMAGES)


def test_what_is_free_is_known_here():
    if not Path("/proc/meminfo").exists():
        pytest.skip("only Linux says it")
    found = free_bytes(torch.device("cpu"))
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < found <= total


ALIKE = RECIPES["rows"].but(alike=5, smooth=1)


class Wide(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 8, 8)
        self.head = nn.Linear(32, classes)

    def forward(self, x):
        return self.head(self.stem(x).mean((2, 3)))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize(
    "recipe", ["rows", "paper", RECIPES["rows"].but(alike=5, smooth=1)], ids=["rows", "paper", "alike"]
)
@pytest.mark.parametrize(("classes", "count"), [(21_841, 1), (1000, 20)])
def test_little_more_memory_than_the_maps_take(recipe, classes, count):
    """It was 3.4 times their size. Likeness takes a number for each pair of cells of an image."""
    images = torch.randn(count, 3, 224, 224)
    explainer = zoo.fit(TTAME(Wide(classes), ["stem"], recipe=recipe), [images[:2]], max_steps=1)
    explainer.maps(images[..., :64, :64])

    def held(name):
        text = Path("/proc/self/status").read_text()
        return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith(name)))

    Path("/proc/self/clear_refs").write_text("5")
    before = held("VmRSS")
    maps = explainer.maps(images)
    pairs = count * (28 * 28) ** 2 if recipe == ALIKE else 0
    assert held("VmHWM") - before < 1.3 * 4 * (maps.numel() + pairs)
