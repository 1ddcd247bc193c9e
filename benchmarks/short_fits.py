"""Which recipe trains in few steps: T-TAME for an ImageNet SqueezeNet, several options, three seeds.

    ATTRIB_ZOO_DATA=FOLDER python benchmarks/short_fits.py [--steps 200] [--seeds 0 1 2]

Fits on Tiny-ImageNet images enlarged to 128 pixels; measures average drop and increase in confidence on the
photographs whose predicted class is one of the 200 training classes, at 224 pixels. One line per fit.
"""

from __future__ import annotations

import argparse
import json
import warnings
from typing import Any

from measure import data, setting, unpacked
from real_data import NAMES, confidence

import torch
from torch.utils.data import DataLoader
from torchvision import transforms

from attrib_zoo import TTAME, GradCAM, models
from attrib_zoo.photos import Photos

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "paper's schedule": ({}, {"schedule": "paper"}),
    "short, other classes at random": ({"psi": "random"}, {}),
    "short, other classes of the batch": ({"psi": "batch"}, {}),
    "short, own class only (the default here)": ({"psi": "own"}, {}),
    "the same, lr 0.03": ({"psi": "own"}, {"lr": 0.03}),
    "the same, lr 0.3": ({"psi": "own"}, {"lr": 0.3}),
    "the same, area weight 6": ({"psi": "own", "lambda_tv": 6.0}, {}),
    "the same, area weight 4, variation weight 1": ({"psi": "own", "lambda_tv": 4.0, "lambda_variation": 1.0}, {}),
}


def main() -> None:
    """Fit, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    tiny = [unpacked(name) for name in ("tiny_imagenet_50", "tiny_imagenet_150")]
    photographs = unpacked("imagenet_photos")
    loaded = models.load("squeezenet1_1", weights=data() / "squeezenet1_1_imagenet.safetensors")
    model = loaded.model
    small = transforms.Compose(
        [transforms.Resize((128, 128)), transforms.ToTensor(), transforms.Normalize(loaded.mean, loaded.std)]
    )
    folders = [folder for root in tiny for folder in root.glob("train/*")]
    wnids = {folder.name for folder in folders}
    training = Photos(sorted(path for folder in folders for path in folder.glob("*.JPEG")), small)
    listed = json.loads((photographs / "classes.json").read_text())
    known = torch.tensor([listed[str(index)][0] in wnids for index in range(1000)])
    photos = Photos(sorted(photographs.glob("*/*.jpg")), loaded.transform)
    with torch.inference_mode():
        everything = torch.cat(list(DataLoader(photos, batch_size=50)))
        decisions = torch.cat([model(part).argmax(1) for part in everything.split(50)])
    images, target = everything[known[decisions]].clone(), decisions[known[decisions]].clone()

    def line(name: str, seed: object, explainer: Any) -> None:
        parts = zip(images.split(25), target.split(25), strict=True)
        means = torch.cat([confidence(model, explainer, x, y) for x, y in parts]).mean(0).tolist()
        print(
            json.dumps({"variant": name, "seed": seed, **dict(zip(NAMES, [round(v, 2) for v in means], strict=True))}),
            flush=True,
        )

    print(setting(), f"{len(images)} photographs")
    line("Grad-CAM", None, GradCAM(model))
    for seed in options.seeds:
        for name in options.variants:
            settings, fit = VARIANTS[name]
            loader = DataLoader(training, batch_size=16, shuffle=True)
            explainer = TTAME(model, **settings)
            line(name, seed, explainer.fit(loader, max_steps=options.steps, seed=seed, show_progress=False, **fit))


if __name__ == "__main__":
    main()
