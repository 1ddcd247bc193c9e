"""What the tests of the command line share: a model file, its class names, photographs, and how commands fail."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

from attrib_zoo import models
from attrib_zoo.cli import main

MODEL = "test_resnet"
NAMES = ("ant", "bee", "cat", "dog", "elk")


def noise(path: Path, seed: int, size: tuple[int, int] = (90, 70)) -> Path:
    """A photograph: soft blobs of colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def make_files(folder: Path) -> Path:
    """A model that decides differently for different photographs, its class names, and ten photographs."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=len(NAMES)).eval()
    for seed in range(10):
        noise(folder / "photos" / f"p{seed}.png", seed)
    torch.save(model.state_dict(), folder / "start.pth")
    loaded = models.load(MODEL, weights=folder / "start.pth")
    images = torch.stack([loaded.transform(Image.open(folder / "photos" / f"p{i}.png")) for i in range(10)])
    with torch.no_grad():
        outputs = model(images)
        model.fc.weight *= 3 / outputs.std(0, keepdim=True).T
        model.fc.bias -= model(images).mean(0)
    torch.save(model.state_dict(), folder / "w.pth")
    (folder / "names.txt").write_text("\n".join(NAMES))
    return folder


def failure(capsys, words: list[str], code: int = 2) -> str:
    """The one line on stderr of a command that fails."""
    assert main(words) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]
