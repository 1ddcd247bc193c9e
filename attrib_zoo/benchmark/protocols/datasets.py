"""ImageNet's validation set and VOC 2007, as they are stored on disk."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from attrib_zoo.benchmark.protocols.splits import read_list
from attrib_zoo.errors import DataError, listed, reason
from attrib_zoo.models.photos import SUFFIXES, find_photos, open_photo

_Transform = Callable[[Any], Tensor]

_IMAGENET = """data: '{}' {}. What is expected is ImageNet (ILSVRC 2012) as one of
  FOLDER/val/n01440764/*.JPEG   a folder for each class, as torchvision.datasets.ImageNet makes them
  FOLDER/val/*.JPEG             all in one folder, as in the archive; labels, if wanted, from the development kit in
                                FOLDER/ILSVRC2012_devkit_t12, or from --labels FILE with lines 'NAME LABEL'
  FOLDER/*                      either of them without val/
and, to train explainers, FOLDER/train/ with the training images in any subfolders"""

_VOC = """data: '{}' {}. What is expected is PASCAL VOC 2007 as torchvision.datasets.VOCDetection unpacks it:
  FOLDER/VOCdevkit/VOC2007/JPEGImages/*.jpg
  FOLDER/VOCdevkit/VOC2007/Annotations/*.xml
  FOLDER/VOCdevkit/VOC2007/ImageSets/Main/test.txt (and trainval.txt, to train a head)"""

_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
"""The classes of VOC in alphabetical order, which is that of the outputs of models for it."""


# ---------------------------------------------------------------------- ImageNet


@dataclass(frozen=True)
class Labelled:
    """Images, and their classes where known.

    Attributes:
        paths: the files, sorted by name.
        labels: a class index for each, or ``None``.
        num_classes: how many classes the labels come from; 0 where unknown.
    """

    paths: list[Path]
    labels: list[int] | None
    num_classes: int = 0

    @property
    def names(self) -> list[str]:
        """The files' names without folder and suffix; unique."""
        return [path.stem for path in self.paths]


def imagenet_validation(root: Path, labels: Path | None = None) -> Labelled:
    """Find ImageNet's validation images: in class folders, or in one folder with the labels next to it.

    Args:
        root: the folder that holds ``val``, or the validation images themselves.
        labels: a list of names and labels, instead of the folders or the development kit.

    Raises:
        DataError: there are none, or the labels do not belong to these images.
    """
    if not root.is_dir():
        raise DataError(_IMAGENET.format(root, "is no folder"))
    folder = root / "val" if (root / "val").is_dir() else root
    classes = [] if folder == root and (root / "train").is_dir() else _class_folders(folder)
    if classes:
        found = [(path, index) for index, place in enumerate(classes) for path in find_photos([place])]
    else:
        found = [(path, -1) for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES]
    if not found:
        raise DataError(_IMAGENET.format(root, "holds no validation images"))
    found.sort(key=lambda entry: entry[0].stem)
    images = Labelled([path for path, _ in found], [index for _, index in found] if classes else None, len(classes))
    _check_unique(images.names, folder)
    if labels is not None:
        return _labelled(images, labels)
    return images if classes else _from_devkit(images, root)


def imagenet_training(root: Path) -> list[Path]:
    """The training images.

    Raises:
        DataError: there is no ``train`` folder, or nothing in it.
    """
    if not (root / "train").is_dir():
        raise DataError(_IMAGENET.format(root, "holds no folder 'train', and explainers must be trained"))
    return find_photos([root / "train"])


def _class_folders(folder: Path) -> list[Path]:
    """Subfolders with images, in alphabetical order, which is the order of ImageNet's class indices."""
    places = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [p for p in places if any(file.suffix.lower() in SUFFIXES for file in p.iterdir())]


def _check_unique(names: Sequence[str], folder: Path) -> None:
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise DataError(f"data: file names in '{folder}' must be unique, got {listed(twice)} more than once")


def _labelled(images: Labelled, path: Path) -> Labelled:
    given = read_list(path)
    found = [given.get(name) for name in images.names]
    known = [label for label in found if label is not None]
    if len(known) < len(found):
        missing = [name for name, label in zip(images.names, found, strict=True) if label is None]
        raise DataError(f"labels: '{path}' has no label for {len(missing)} images ({listed(missing)}); add them")
    return Labelled(images.paths, known)


def _from_devkit(images: Labelled, root: Path) -> Labelled:
    """Labels of the development kit: a line per image with the number of a class in ``meta.mat``."""
    kits = [root / "ILSVRC2012_devkit_t12" / "data", root / "devkit" / "data", root / "data", root]
    kit = next((place for place in kits if (place / _GROUND_TRUTH).is_file()), None)
    if kit is None:
        return images
    numbers = (kit / _GROUND_TRUTH).read_text(encoding="utf-8").split()
    if len(numbers) != len(images.paths):
        raise DataError(
            f"data: '{kit / _GROUND_TRUTH}' has {len(numbers)} labels for {len(images.paths)} images; give the whole "
            "validation set, or --labels FILE with lines 'NAME LABEL'"
        )
    index = _devkit_classes(kit / "meta.mat")
    unknown = sorted({n for n in numbers if not n.isdecimal() or int(n) not in index})
    if unknown:
        raise DataError(f"data: '{kit / _GROUND_TRUTH}' holds numbers that meta.mat does not know: {listed(unknown)}")
    return Labelled(images.paths, [index[int(n)] for n in numbers], len(index))


def _devkit_classes(path: Path) -> dict[int, int]:
    """The development kit's numbers of the classes (those without children) -> indices in the order of their names."""
    advice = "give labels with --labels FILE, lines 'NAME LABEL'"
    try:
        from scipy.io import loadmat
    except ImportError:
        raise DataError(f"data: '{path}' is a MATLAB file and needs SciPy (pip install scipy); or {advice}") from None
    try:
        synsets = loadmat(path, squeeze_me=True)["synsets"]
        leaves = {str(s["WNID"]): int(s["ILSVRC2012_ID"]) for s in synsets if int(s["num_children"]) == 0}
    except Exception as error:  # SciPy has error classes of its own for broken files
        raise DataError(f"data: cannot read '{path}' ({reason(error)}); or {advice}") from error
    return {leaves[wnid]: index for index, wnid in enumerate(sorted(leaves))}


# ---------------------------------------------------------------------- VOC 2007


@dataclass(frozen=True)
class VOCImage:
    """An annotated image.

    Attributes:
        path: the file.
        size: ``(width, height)`` in pixels.
        boxes: class index -> its boxes ``(x1, y1, x2, y2)``, difficult objects included.
        asked: the classes with an object that is not marked difficult.
    """

    path: Path
    size: tuple[int, int]
    boxes: dict[int, list[tuple[float, float, float, float]]]
    asked: list[int]


def voc2007(root: Path, image_set: str = "test") -> list[VOCImage]:
    """The images of VOC 2007, read through ``torchvision.datasets.VOCDetection``.

    Args:
        root: the folder that holds ``VOCdevkit``; that folder itself, or ``VOC2007`` in it, also works.
        image_set: ``"test"``, ``"trainval"``, ...

    Raises:
        DataError: it is missing, or an annotation cannot be read.
    """
    from torchvision.datasets import VOCDetection

    place = next((p for p in (root, *root.parents[:2]) if (p / "VOCdevkit" / "VOC2007").is_dir()), None)
    if place is None:
        raise DataError(_VOC.format(root, "holds no VOCdevkit/VOC2007"))
    try:
        data = VOCDetection(os.fspath(place), year="2007", image_set=image_set, download=False)
    except (OSError, RuntimeError) as error:
        raise DataError(_VOC.format(root, f"holds no image set '{image_set}' ({reason(error)})")) from error
    images = [_voc_image(Path(p), Path(x), data) for p, x in zip(data.images, data.annotations, strict=True)]
    if not images:
        raise DataError(_VOC.format(root, f"has an empty image set '{image_set}'"))
    return images


def _voc_image(path: Path, annotation: Path, data: Any) -> VOCImage:
    from xml.etree import ElementTree

    for file in (path, annotation):
        if not file.is_file():
            raise DataError(f"data: there is no file '{file}', which the image set names; unpack VOC 2007 again")
    try:
        told = data.parse_voc_xml(ElementTree.parse(annotation).getroot())["annotation"]
        size = int(told["size"]["width"]), int(told["size"]["height"])
        boxes: dict[int, list[tuple[float, float, float, float]]] = {}
        asked = set()
        for item in told.get("object", []):
            index = VOC_CLASSES.index(item["name"])
            x1, y1, x2, y2 = (float(item["bndbox"][key]) for key in ("xmin", "ymin", "xmax", "ymax"))
            boxes.setdefault(index, []).append((x1 - 1, y1 - 1, x2, y2))  # pixels count from 1, both ends included
            if item.get("difficult", "0") != "1":
                asked.add(index)
    except (ElementTree.ParseError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"data: '{annotation}' is no annotation of VOC ({reason(error)}); unpack it again") from error
    return VOCImage(path, size, boxes, sorted(asked))


class VOCRegions(Dataset[dict[str, Tensor]]):
    """A (picture, class) pair per item, with the boxes of that class in pixels of the transformed picture.

    Args:
        images: as :func:`voc2007` finds them.
        transform: PIL image to ``(C, H, W)``; must resize the whole picture to the shape, without a crop.
        most: the largest number of images; ``None`` for all.
    """

    def __init__(self, images: Sequence[VOCImage], transform: _Transform, most: int | None = None) -> None:
        self.transform = transform
        self.items = [(image, index) for image in images[:most] for index in image.asked]
        self.room = max((len(image.boxes[index]) for image, index in self.items), default=0)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        image, index = self.items[place]
        pixels = self.transform(open_photo(image.path))
        scale = torch.tensor([pixels.shape[-1] / image.size[0], pixels.shape[-2] / image.size[1]]).repeat(2)
        boxes = torch.zeros(self.room, 4)
        boxes[: len(image.boxes[index])] = torch.tensor(image.boxes[index]) * scale
        return {"image": pixels, "target": torch.tensor(index), "boxes": boxes}


def presence(images: Sequence[VOCImage]) -> Tensor:
    """``(N, 20)``: 1 where an image holds an object of the class that is not marked difficult."""
    found = torch.zeros(len(images), len(VOC_CLASSES))
    for row, image in enumerate(images):
        found[row, image.asked] = 1
    return found
