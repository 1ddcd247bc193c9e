"""Classifiers by name, from torchvision or timm, or in a folder of Hugging Face; each with its own preprocessing."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attrib_zoo.errors import (
    DataError,
    OptionError,
    TargetError,
    UnsupportedModelError,
    closest,
    listed,
    reason,
    shown,
)
from attrib_zoo.models.sources import InGrey, Transform, bands_of, source_of
from attrib_zoo.models.weights import fit_into
from attrib_zoo.visualize import Box

_LONGEST = 100  # characters of a printed class name


@dataclass(frozen=True)
class LoadedModel:
    """A classifier in eval mode, and what it takes to use it on photographs.

    Attributes:
        model: takes standardised ``(N, C, H, W)`` images and returns ``(N, K)`` logits, or an object with ``.logits``,
            or one logit per image, whose sign decides between two classes.
        transform: the model's own preprocessing: PIL image to standardised ``(C, H, W)``.
        view: the same crop for display: PIL image to ``(3, kH, kW)`` in [0, 1], enlarged by a whole number k.
        mean: per channel, for standardisation.
        std: per channel, for standardisation.
        input_size: ``(C, H, W)``.
        num_classes: K; 2 where the model has one logit.
        class_names: K names, or ``None`` if unknown.
    """

    model: nn.Module
    transform: Callable[[Any], Tensor]
    view: Callable[[Any], Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...] | None

    def class_name(self, index: int) -> str:
        """The name of a class as it may be printed, or its number where it has none.

        Terminal control characters are escaped, and a very long name is cut; ``class_names`` has the original.
        """
        return shown(self.class_names[index], _LONGEST) if self.class_names else f"class {index}"

    def seen(self, image: Any) -> Box:
        """The part of a photograph that the model sees, found by transforming an image of coordinates in the same way.

        Args:
            image: the PIL image; only its size matters.

        Returns:
            Left, top, right and bottom edge in pixels of the photograph, accurate to about a pixel; outside it where
            the transform pads.
        """
        return _seen(self.view, image.size)

    def class_index(self, target: str) -> int:
        """The class that a user means: its index as digits, or its name, in any case if one class has it.

        Where the names are numbers themselves, digits that are one class as an index and another as a name are refused;
        ``"#3"`` is always the index 3.

        Raises:
            TargetError: there is no such class, there are several of that name, or the digits are ambiguous.
        """
        advice = f"give an index from 0 to {self.num_classes - 1}" + (", or a name" if self.class_names else "")
        names = [name.casefold() for name in self.class_names or ()]
        exact = [i for i, name in enumerate(self.class_names or ()) if name == target]
        found = exact if len(exact) == 1 else [i for i, name in enumerate(names) if name == target.casefold()]
        digits = target.removeprefix("#")
        if digits.lstrip("+-").isdecimal() and (not found or digits != target or self._is_index(int(digits))):
            index = int(digits)
            if not self._is_index(index):
                raise TargetError(f"target: the model has {self.num_classes} classes, got {target}; {advice}")
            numbered = bool(names) and names[index] != digits and names[index].lstrip("+-").isdecimal()
            if digits == target and (numbered or found not in ([], [index])):
                meant = f"index {index} is the class {self.class_name(index)!r}"
                meant += f", and the class {target!r} has the index {listed(found)}" if found else ""
                raise TargetError(
                    f"target: {target!r} may be an index or a name, as classes have numbers for names: {meant}; give "
                    + " or ".join(f"'#{number}'" for number in dict.fromkeys([index, *found]))
                    + ", which is always an index"
                )
            return index
        if len(found) == 1:
            return found[0]
        if found:
            raise TargetError(f"target: {target!r} is the name of the classes {listed(found)}; give the index instead")
        raise TargetError(f"target: no class is called {target!r}{closest(target, self.class_names or ())}; {advice}")

    def _is_index(self, number: int) -> bool:
        return 0 <= number < self.num_classes


def load(
    name: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    device: str | torch.device | None = None,
) -> LoadedModel:
    """Load a classifier by its name in torchvision or, failing that, in timm; or from a Hugging Face folder.

    Args:
        name: as in ``torchvision.models.list_models()`` or ``timm.list_models()``; timm's tags
            (``resnet50.a1_in1k``) work, and ``timm/resnet50`` selects timm's where both have one. Or the path of a
            folder written by ``save_pretrained`` of a Hugging Face image classifier and its image processor, with its
            weights and class names (``pip install 'attrib_zoo[hf]'``); nothing is downloaded then.
        weights: a safetensors file or a PyTorch state dict; ``None`` downloads the model's own pretrained weights
            through its library (or takes them from its cache).
        num_classes: number of outputs (1 for a model of one logit, which decides between two classes); read from the
            file's last layer, or the pretrained model, if ``None``.
        class_names: the names of the classes; for a model with one logit two, the second for a positive logit, or that
            one alone; ``None``: the ImageNet names for models with ImageNet's classes.
        device: where the model goes; the CPU if ``None``.

    Returns:
        The model in eval mode, with its transform and names.

    Raises:
        OptionError: there is no model of that name, or no such device.
        DataError: the weights are unavailable, unreadable or do not fit the model.

    Example:
        >>> loaded = load("squeezenet1_1", weights="squeezenet.safetensors")  # doctest: +SKIP
        >>> loaded.model(loaded.transform(photo)[None]).argmax(1)  # doctest: +SKIP
    """
    place = _device(device)
    source = source_of(name)
    if weights is None:
        model, classes = source.pretrained(num_classes), None
    else:
        model, classes = fit_into(source.build, Path(weights), num_classes)
    classes = classes or source.default_classes
    if not classes:
        raise UnsupportedModelError(
            f"model: {name} returns features and has no classes of its own; choose a classifier, "
            "or pass num_classes and weights that have a last layer"
        )
    decided = max(2, classes)
    if class_names is None:
        class_names = source.names(model, classes)
    elif classes == 1 and len(class_names) == 1:
        class_names = (f"not {class_names[0]}", class_names[0])
    elif len(class_names) != decided:
        what = f"{decided} classes" if classes > 1 else "the 2 classes of a model with one logit"
        raise OptionError(f"class_names: must be one per class, got {len(class_names)} names for {what}")
    transform, view, mean, std, size = source.preprocessing(model)
    bands = bands_of(model)
    usual = bands == 3 or bands == bands_of(source.build(None))  # some start by rearranging the image
    if bands == 1 and not usual:
        raw, mean, std, size = source.raw(model), (0.5,), (0.5,), (1, *size[1:])
        transform = InGrey(raw, mean[0], std[0])
    elif not usual:
        raise UnsupportedModelError(
            f"model: must take photographs, with 3 bands or 1, got weights for images of {bands} bands; build it in "
            f"Python and pass tensors: attribute(images) with images (N, {bands}, H, W)"
        )
    return LoadedModel(
        model=model.eval().to(place),
        transform=transform,
        view=view,
        mean=mean,
        std=std,
        input_size=size,
        num_classes=decided,
        class_names=None if class_names is None else tuple(class_names),
    )


def unloaded(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """A model by name with random weights, in eval mode, and the size ``(C, H, W)`` of its images; no download.

    Raises:
        OptionError: no model of that name.
    """
    source = source_of(name)
    model = source.build(None).eval()
    return model, source.preprocessing(model)[-1]


def read_class_names(path: str | os.PathLike[str]) -> list[str]:
    """Read class names: a JSON list, a JSON object of index to name or ``[wnid, name]``, or a text file of lines.

    Raises:
        DataError: the file is missing or has another format.
    """
    file = Path(path)
    try:
        data = file.read_bytes()
        utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # as Windows editors mark their files
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
        if file.suffix.lower() != ".json":
            return [line.strip() for line in text.splitlines() if line.strip()]
        entries = json.loads(text)
    except UnicodeDecodeError as error:
        raise DataError(f"classes: '{file}' must be text in UTF-8, but it is not ({error})") from error
    except (OSError, ValueError) as error:
        raise DataError(f"classes: cannot read '{file}' ({reason(error)}); {_CLASSES_FORM}") from error
    if isinstance(entries, dict):
        wanted = [str(i) for i in range(len(entries))]
        missing = [key for key in wanted if key not in entries]
        if missing:
            raise DataError(f"classes: '{file}' has no entry {missing[0]!r}; {_CLASSES_FORM}")
        entries = [entries[key] for key in wanted]
    if isinstance(entries, list):
        names = [entry[-1] if isinstance(entry, list) and entry else entry for entry in entries]
        if names and all(isinstance(entry, str) for entry in names):
            return names
    raise DataError(f"classes: '{file}' holds no class names; {_CLASSES_FORM}")


_CLASSES_FORM = "it must be a JSON list of names, a JSON object of index to name or [id, name], or one name per line"


def _seen(view: Transform, size: tuple[int, int]) -> Box:
    """Where a view's columns and rows lie on a photograph of that size: lines fitted to how it shows ramps."""
    from PIL import Image

    across, down = (max(2, round(side * min(1.0, 1024 / max(size)))) for side in size)
    ramps = np.full((down, across, 3), 255.0)  # the third band marks where the photograph is
    ramps[..., 0] = (np.arange(across) + 0.5) / across * 255
    ramps[..., 1] = (np.arange(down)[:, None] + 0.5) / down * 255
    shown = view(Image.fromarray(np.rint(ramps).astype(np.uint8))).numpy()
    rows, columns = (np.flatnonzero(shown[2].max(axis) > 0.9) for axis in (1, 0))
    inner = shown[:, rows][:, :, columns]
    left, right = _ends(columns, np.median(inner[0], 0), shown.shape[2], size[0])
    top, bottom = _ends(rows, np.median(inner[1], 1), shown.shape[1], size[1])
    return left, top, right, bottom


def _ends(places: Any, shares: Any, length: int, side: int) -> tuple[float, float]:
    """Where the first and the last edge of a view lie along one side of the photograph."""
    kept = slice(2, -2) if len(places) > 8 else slice(None)  # the borders are blurred
    slope, offset = np.polyfit(places[kept], shares[kept], 1)
    return float(offset - 0.5 * slope) * side, float(offset + (length - 0.5) * slope) * side


def _device(device: str | torch.device | None) -> torch.device:
    try:
        place = torch.device(device or "cpu")
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise OptionError(f"device: {device!r} cannot be used here ({reason(error)}); try 'cpu'") from error
    return place
