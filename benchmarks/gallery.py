"""The pictures of docs/gallery.md and docs/methods.md: every method on the same photographs, and on planted scenes.

    ATTRIB_ZOO_DATA=FOLDER python benchmarks/gallery.py photographs [--maps FILE] [--output docs/images]
    python benchmarks/gallery.py scenes

Photographs: two under CC BY 2.0 (their authors stand in docs/gallery.md), a small JPEG for each method, of the model's
own decision. The model is SqueezeNet 1.1; what it does not allow is asked of EfficientNet-Lite0, then of ViT-Ti/16.
Trained explainers are fitted on 500 other photographs: T-TAME as it starts, L-CAM for ``--steps`` steps. Scenes: the
tiny vision transformer of ``attrib_zoo.synthetic``, asked for one of the two objects. Paper defaults, except RISE with
``--masks`` masks, and extremal perturbations of the scenes, whose grid and kernel are made for 32 pixels. Negative
evidence is left out. Prints what refuses the models and the time of each method; ``--maps FILE`` keeps the maps, and
draws those that are in it already.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from measure import data, setting, unpacked

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from attrib_zoo import models, synthetic, visualize
from attrib_zoo.attribution import Attribution
from attrib_zoo.cli.shared import methods
from attrib_zoo.errors import AttribZooError, UnsupportedModelError
from attrib_zoo.models.photos import Photos
from attrib_zoo.methods.bases.trainable import TrainableAttribution

PHOTOGRAPHS = ("821aae58dc96b4b2.jpg", "fe1314dd6f75551d.jpg")
MODELS = {
    "squeezenet1_1": "squeezenet1_1_imagenet.safetensors",
    "tf_efficientnet_lite0": "tf_efficientnet_lite0_imagenet.safetensors",
    "vit_tiny_patch16_224": "vit_tiny_patch16_224_imagenet.safetensors",
}
SCENES = (3, 11)
ACROSS = 8  # pictures in a row, the image included
SMALL: dict[str, dict[str, object]] = {}


def explained(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    options: dict[str, dict[str, Any]],
    fit: Callable[[type[TrainableAttribution]], Attribution],
    known: dict[str, Tensor],
    without: list[str],
) -> dict[str, Tensor]:
    """Name -> maps of every method that the model allows, in the order of the families."""
    maps = {}
    for cls in methods().values():
        name, start = cls.__name__, time.perf_counter()
        if name not in known and name in without:
            continue
        if name not in known:
            try:
                explainer = fit(cls) if cls.needs_fit else cls(model, **options.get(name, {}))
                found = explainer.attribute(images, target)
            except UnsupportedModelError as error:
                print(f"{name:22} {error}", flush=True)
                continue
            known[name] = found.mean(1, keepdim=True).contiguous()
            print(f"{name:22} {time.perf_counter() - start:6.1f} s", flush=True)
        maps[name] = known[name]
    return maps


def draw(
    path: Path, images: Iterable[Tensor], maps: dict[str, Tensor], titles: list[str], mean: Any = None, std: Any = None
) -> None:
    """Bands of a few methods each, one below the other."""
    names = list(maps)
    count = -(-len(names) // (ACROSS - 1))
    each = -(-len(names) // count)  # bands of about the same length
    bands = []
    for i in range(0, len(names), each):
        columns = {name: maps[name].clamp(min=0) for name in names[i : i + each]}
        sheet = visualize.figure(images, columns, titles=titles, mean=mean, std=std)
        sheet.set_dpi(72)
        sheet.canvas.draw()
        bands.append(np.asarray(sheet.canvas.buffer_rgba())[..., :3])
    page = np.full((sum(len(band) for band in bands), max(band.shape[1] for band in bands), 3), 255, np.uint8)
    top = 0
    for band in bands:
        page[top : top + len(band), : band.shape[1]] = band
        top += len(band)
    Image.fromarray(page).save(path, quality=72, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB, {page.shape[1]} x {page.shape[0]}")


def photographs(options: argparse.Namespace, known: dict[str, Tensor]) -> None:
    """The decisions of the first model that a method allows."""
    folder = unpacked("cc_photos")
    told = json.loads((folder / "photos.json").read_text())
    loaded = {name: models.load(name, weights=data() / weights) for name, weights in MODELS.items()}
    first = next(iter(loaded.values()))
    wanted = [next(row for row in told if row["file"] == file) for file in options.photographs]
    photos = [Image.open(folder / row["file"]).convert("RGB") for row in wanted]
    for row in wanted:
        print(f"{first.class_name(row['label'])}: {row['author']}, {row['page']}, {row['licence']}")
    places = options.output / "gallery"
    places.mkdir(parents=True, exist_ok=True)
    for name, model in loaded.items():
        images = torch.stack([model.transform(photo) for photo in photos])
        with torch.no_grad():
            sure, target = model.model(images).softmax(1).max(1)
        print(name, [f"{model.class_name(int(t))} {float(p):.0%}" for t, p in zip(target, sure, strict=True)])
        settings = {"RISE": {"n_masks": options.masks}}
        explained(model.model, images, target, settings, _fitting(model, options), known, options.without)
        if options.maps:
            save_file(known, options.maps)
    _card(places / "photographs.jpg", photos, [torch.zeros(2, 2)] * 2, first)
    for name in list(known):
        _card(places / f"{name.lower()}.jpg", photos, known[name], first)


def _card(path: Path, photos: list[Image.Image], maps: Any, model: models.LoadedModel) -> None:
    """The photographs side by side, each with its map; the models all see the same crop, up to a few pixels."""
    side = 240
    page = Image.new("RGB", (len(photos) * (side + 6) - 6, side), "white")
    for i, photo in enumerate(photos):
        drawn = visualize.overlay(photo, maps[i].clamp(min=0), box=model.seen(photo))
        page.paste(Image.fromarray(drawn).resize((side, side), Image.Resampling.LANCZOS), (i * (side + 6), 0))
    page.save(path, quality=80, optimize=True)


def _fitting(loaded: models.LoadedModel, options: argparse.Namespace) -> Callable[[type[Any]], Attribution]:
    folder = unpacked("imagenet_photos")
    every = Photos(sorted(folder.glob("*/*.jpg")), loaded.transform)

    def fit(cls: type[TrainableAttribution]) -> Attribution:
        order = torch.Generator().manual_seed(0)
        loader = DataLoader(every, batch_size=8, shuffle=True, generator=order)
        steps = 0 if cls.__name__ == "TTAME" else options.steps
        return cls(loaded.model).fit(loader, max_steps=steps, show_progress=False)

    return fit


def scenes(options: argparse.Namespace, known: dict[str, Tensor]) -> None:
    """The tiny vision transformer, asked for the first object of each scene."""
    model = synthetic.trained("vit")
    shown = synthetic.scenes(max(SCENES) + 1, seed=2).rows(torch.tensor(SCENES))
    target = shown.labels[:, 0]
    said = [[shown.class_names[int(label)] for label in labels] for labels in shown.labels]
    titles = [f"asked: {asked}   (the other object: {other})" for asked, other in said]

    def fit(cls: type[TrainableAttribution]) -> Attribution:
        loader = synthetic.scenes(1024, seed=1).loader(16)
        return cls(model).fit(loader, max_steps=options.steps, show_progress=False)

    settings = {"RISE": {"n_masks": options.masks}, **SMALL}
    maps = explained(model, shown.inputs, target, settings, fit, known, options.without)
    draw(options.output / "methods-scenes.jpg", shown.images, maps, titles)


def main() -> None:
    """Explain and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["photographs", "scenes"])
    parser.add_argument("--photographs", nargs=2, default=PHOTOGRAPHS, metavar="FILE")
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    parser.add_argument("--maps", type=Path)
    parser.add_argument("--without", nargs="*", default=[], metavar="METHOD", help="unless it is in --maps")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--masks", type=int, default=1000)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(setting())
    known = load_file(options.maps) if options.maps and options.maps.exists() else {}
    try:
        {"photographs": photographs, "scenes": scenes}[options.what](options, known)
    except AttribZooError as error:
        raise SystemExit(f"error: {error}") from error
    finally:
        if options.maps:
            save_file(known, options.maps)


if __name__ == "__main__":
    main()
