"""What a T-TAME of few steps reaches, and why: recipes, training images and masked images, over several seeds.

    ATTRIB_ZOO_DATA=FOLDER python benchmarks/short_fits.py [--steps 200] [--seeds 0 1 2] [--variants ...]
    ... --size 224 --photographs drawn    # the images of docs/results/squeezenet.md instead of the 200 known classes'
    ... --photographs drawn --fit-on photographs    # the other photographs instead of Tiny-ImageNet
    ... --patches 400                     # a classifier that has seen black patches, taught in so many steps

An ImageNet SqueezeNet; fits on Tiny-ImageNet images enlarged to ``--size`` pixels; measures average drop and increase
in confidence on photographs, at 224 pixels. One line per fit.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from typing import Any

from measure import data, setting, unpacked
from real_data import NAMES, confidence
from results import RELEASED, drawn
from train_backbone import darkened

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms

from attrib_zoo import TTAME, GradCAM, models
from attrib_zoo.models.photos import Photos

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "paper's schedule": ({}, {"schedule": "paper"}),
    "short, other classes at random": ({"psi": "random"}, {}),
    "short, other classes of the batch": ({"psi": "batch"}, {}),
    "short, own class only (the default here)": ({"psi": "own"}, {}),
    "the same, lr 0.03": ({"psi": "own"}, {"lr": 0.03}),
    "the same, lr 0.3": ({"psi": "own"}, {"lr": 0.3}),
    "the same, area weight 6": ({"psi": "own", "lambda_tv": 6.0}, {}),
    "the same, area weight 4, variation weight 1": ({"psi": "own", "lambda_tv": 4.0, "lambda_variation": 1.0}, {}),
    "the same, released variation and border": ({"psi": "own", **RELEASED}, {}),
    "the same, eight times that": ({"psi": "own", **RELEASED, "lambda_variation": 0.04}, {}),
    "the same, 32 times that": ({"psi": "own", **RELEASED, "lambda_variation": 0.16}, {}),
}


def taught(model: nn.Module, lessons: DataLoader[Any], steps: int, mean: Tensor, std: Tensor) -> nn.Module:
    """A copy that says behind black patches what the model says of the whole image; a quarter stays whole."""
    torch.manual_seed(0)
    student = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(student.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-4, steps)
    for _, images in zip(range(steps), lessons, strict=False):
        with torch.no_grad():
            truth = model(images).log_softmax(1)
        behind = (darkened(images * std + mean) - mean) / std
        behind[: len(images) // 4] = images[: len(images) // 4]
        loss = F.kl_div(student(behind).log_softmax(1), truth, log_target=True, reduction="batchmean")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return student.eval()


def main() -> None:
    """Fit, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--size", type=int, default=128, help="of the training images, in pixels")
    parser.add_argument("--photographs", choices=["known", "drawn"], default="known")
    parser.add_argument("--fit-on", choices=["tiny", "photographs"], default="tiny")
    parser.add_argument("--patches", type=int, default=0, help="steps")
    options = parser.parse_args()
    if options.fit_on == "photographs" and options.photographs == "known":
        parser.error("--fit-on photographs: needs photographs that are not explained; add --photographs drawn")
    warnings.simplefilter("ignore")
    loaded = models.load("squeezenet1_1", weights=data() / "squeezenet1_1_imagenet.safetensors")
    model = loaded.model.to(memory_format=torch.channels_last)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (loaded.mean, loaded.std))
    folders = [
        folder for name in ("tiny_imagenet_50", "tiny_imagenet_150") for folder in unpacked(name).glob("train/*")
    ]
    photographs = unpacked("imagenet_photos")
    paths = sorted(photographs.glob("*/*.jpg"))
    asked = drawn(len(paths), 250) if options.photographs == "drawn" else range(len(paths))
    ending = [transforms.ToTensor(), transforms.Normalize(loaded.mean, loaded.std)]
    enlarged = transforms.Compose([transforms.Resize((options.size, options.size)), *ending])
    cropped = [transforms.RandomResizedCrop(options.size, scale=(0.5, 1.0)), transforms.RandomHorizontalFlip()]
    tiny = Photos(sorted(path for folder in folders for path in folder.glob("*.JPEG")), enlarged)
    others = Photos([paths[i] for i in set(range(len(paths))) - set(asked)], transforms.Compose([*cropped, *ending]))
    training = others if options.fit_on == "photographs" else tiny
    if options.patches:
        model = taught(model, DataLoader(tiny, batch_size=16, shuffle=True), options.patches, mean, std)

    photos = Photos([paths[i] for i in asked], loaded.transform)
    everything = torch.stack([photos[i] for i in range(len(photos))])
    with torch.inference_mode():
        decisions = torch.cat([model(part).argmax(1) for part in everything.split(50)])
    listed, wnids = json.loads((photographs / "classes.json").read_text()), {folder.name for folder in folders}
    known = torch.tensor([listed[str(index)][0] in wnids for index in range(1000)])
    rows = known[decisions] if options.photographs == "known" else torch.ones(len(decisions), dtype=torch.bool)
    images, target = everything[rows].clone(), decisions[rows].clone()

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
