"""T-TAME for an ImageNet SqueezeNet, fitted on Tiny-ImageNet, against Grad-CAM and an untrained T-TAME.

    ATTRIB_ZOO_DATA=FOLDER python benchmarks/real_data.py --output DIR [--steps 2000] [--explainer FILE]

Fits on the training images of the 200 Tiny-ImageNet classes, enlarged to 224 (labels are not used), or takes a fitted
explainer; prints average drop and increase in confidence at 100, 50 and 15 % on (a) the photographs whose predicted
class came up in the fit and (b) 500 validation images of Tiny-ImageNet-50; writes the explainer, the numbers as JSON
and a contact sheet of 12 photographs.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from pathlib import Path

from measure import data, setting, table, unpacked

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

from attrib_zoo import TTAME, GradCAM, models, visualize
from attrib_zoo.attribution import Attribution
from attrib_zoo.metrics import masked_confidence
from attrib_zoo.models.photos import Photos

KEEPS = (1.0, 0.5, 0.15)
NAMES = ["AD(100)", "IC(100)", "AD(50)", "IC(50)", "AD(15)", "IC(15)"]


def enlarged(loaded: models.LoadedModel) -> transforms.Compose:
    """The whole 64-pixel image at the model's input size."""
    return transforms.Compose(
        [
            transforms.Resize((224, 224)),
            transforms.ToTensor(),
            transforms.Normalize(loaded.mean, loaded.std),
        ]
    )


def confidence(model: torch.nn.Module, explainer: Attribution, images: Tensor, target: Tensor) -> Tensor:
    """``(N, 6)``: AD and IC, in percent, at 100, 50 and 15 %; maps are scaled, then enlarged, as in the papers."""
    small = copy.copy(explainer)
    small.upsample = False  # scaled at layer resolution
    maps = small.attribute(images, target)
    with torch.no_grad():
        clean = model(images).softmax(1).gather(1, target[:, None])[:, 0]
    columns = []
    for keep in KEEPS:
        _, masked = masked_confidence(model, images, maps, target, keep=keep, masking="raw", clean=clean)
        columns += [(clean - masked).clamp(min=0) / clean, (masked > clean).to(clean)]
    return 100 * torch.stack(columns, dim=1)


def measured(
    model: torch.nn.Module, explainers: dict[str, Attribution], photos: Photos, seen: Tensor | None
) -> dict[str, Tensor]:
    """Per-image measures of every explainer, on images whose predicted class is in ``seen``."""
    found: dict[str, list[Tensor]] = {name: [] for name in explainers}
    with torch.inference_mode():
        for images in DataLoader(photos, batch_size=25):
            target = model(images).argmax(1)
            keep = torch.ones(len(images), dtype=torch.bool) if seen is None else seen[target]
            for name, explainer in explainers.items():
                if keep.any():
                    found[name].append(confidence(model, explainer, images[keep], target[keep]))
    return {name: torch.cat(parts) for name, parts in found.items()}


def sheet(loaded: models.LoadedModel, explainers: dict[str, Attribution], photos: Photos, path: Path) -> None:
    """Twelve photographs with Grad-CAM and T-TAME."""
    images = torch.stack([photos[i] for i in range(len(photos))])
    with torch.no_grad():
        confidences = loaded.model(images).softmax(1)
    target = confidences.argmax(1)
    titles = [
        f"{loaded.class_name(int(t))} {100 * float(p[t]):.0f} %" for t, p in zip(target, confidences, strict=True)
    ]
    columns = {name: explainers[name].attribute(images, target) for name in ("Grad-CAM", "T-TAME")}
    picture = visualize.figure(images, columns, titles=titles, across=2, mean=loaded.mean, std=loaded.std)
    picture.savefig(path, dpi=80, pil_kwargs={"quality": 80})


def twelve(loaded: models.LoadedModel, photos: list[Path], seen: Tensor) -> list[Path]:
    """Twelve photographs of often-seen classes that the model is sure of, evenly spread over the classes."""
    rated = []
    for path, image in zip(photos, Photos(photos, loaded.transform), strict=True):
        with torch.no_grad():
            confidence, target = loaded.model(image[None]).softmax(1)[0].max(0)
        if seen[target] >= seen.double().quantile(0.8) and confidence > 0.6:
            rated.append(path)
    return rated[:: max(1, len(rated) // 12)][:12]


def main() -> None:
    """Fit or load, measure, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--explainer", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    options.output.mkdir(parents=True, exist_ok=True)
    loaded = models.load("squeezenet1_1", weights=data() / "squeezenet1_1_imagenet.safetensors")
    model = loaded.model

    tiny = [unpacked(name) for name in ("tiny_imagenet_50", "tiny_imagenet_150")]
    paths = sorted(path for folder in tiny for path in folder.glob("train/*/*.JPEG"))
    training = DataLoader(Photos(paths, enlarged(loaded)), batch_size=options.batch, shuffle=True)
    if options.explainer:
        ttame = TTAME.load(options.explainer, model)
    else:
        ttame = TTAME(model).fit(training, max_steps=options.steps, seed=options.seed, checkpoint_dir=options.output)
        ttame.save(options.output / "squeezenet1_1-ttame.safetensors")
    print(ttame.report())
    untrained = TTAME(model).fit(training, max_steps=1, lr=1e-12, schedule="paper", show_progress=False)
    explainers: dict[str, Attribution] = {"Grad-CAM": GradCAM(model), "untrained": untrained, "T-TAME": ttame}
    for explainer in explainers.values():
        explainer.upsample = False

    photos = sorted(unpacked("imagenet_photos").glob("*/*.jpg"))
    validation = sorted(tiny[0].glob("val/*/*.JPEG"))
    chosen = torch.randperm(len(validation), generator=torch.Generator().manual_seed(0))[:500].tolist()
    sets = {
        "photographs of classes seen in fit": (Photos(photos, loaded.transform), ttame.class_counts_ > 0),
        "Tiny-ImageNet-50 validation": (Photos([validation[i] for i in chosen], enlarged(loaded)), None),
    }
    rows, record = [], {"setting": setting(), "report": ttame.report()}
    for title, (images, seen) in sets.items():
        results = measured(model, explainers, images, seen)
        record[title] = {name: values.tolist() for name, values in results.items()}
        rows += [
            [title, len(values), name, *(f"{v:.2f}" for v in values.mean(0).tolist())]
            for name, values in results.items()
        ]
    print(setting())
    print(table(rows, ["images", "n", "method", *NAMES]))
    chosen_photos = twelve(loaded, photos, ttame.class_counts_)
    sheet(loaded, explainers, Photos(chosen_photos, loaded.transform), options.output / "contact-sheet.jpg")
    (options.output / "real_data.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main()
