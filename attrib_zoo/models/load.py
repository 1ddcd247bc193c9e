"""Classifiers by name, from torchvision or timm, or in a folder of Hugging Face; each with its own preprocessing."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from attrib_zoo.models.weights import ask_hub, download, fit_into
from attrib_zoo.visualize import Box, in_colour

_LONGEST = 100  # characters of a printed class name
_VIEW = 448  # approximate side of a displayed picture in pixels

Transform = Callable[[Any], Tensor]
_Preprocessing = tuple[Transform, Transform, tuple[float, ...], tuple[float, ...], tuple[int, int, int]]


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
        """The class that a user means: its index as digits, or its name (case-insensitive).

        Where the names are numbers themselves, digits that are one class as an index and another as a name are refused;
        ``"#3"`` is always the index 3.

        Raises:
            TargetError: there is no such class, there are several of that name, or the digits are ambiguous.
        """
        advice = f"give an index from 0 to {self.num_classes - 1}" + (", or a name" if self.class_names else "")
        names = [name.casefold() for name in self.class_names or ()]
        found = [i for i, name in enumerate(names) if name == target.casefold()]
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
    source = _source(name)
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
    bands = _bands(model)
    usual = bands == 3 or bands == _bands(source.build(None))  # some start by rearranging the image
    if bands == 1 and not usual:
        raw, mean, std, size = source.raw(model), (0.5,), (0.5,), (1, *size[1:])
        transform = _InGrey(raw, mean[0], std[0])
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
    source = _source(name)
    model = source.build(None).eval()
    return model, source.preprocessing(model)[-1]


def read_class_names(path: str | os.PathLike[str]) -> list[str]:
    """Read class names: a JSON list, a JSON object of index to name or ``[wnid, name]``, or a text file of lines.

    Raises:
        DataError: the file is missing or has another format.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")  # Windows editors start a file with a byte-order mark
        if file.suffix.lower() != ".json":
            return [line.strip() for line in text.splitlines() if line.strip()]
        entries = json.loads(text)
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


# ---------------------------------------------------------------------- where models come from


class _Torchvision:
    def __init__(self, name: str) -> None:
        from torchvision import models

        self.name = name
        self.recipe = models.get_model_weights(name).DEFAULT
        self.default_classes = len(self.recipe.meta["categories"])

    def build(self, num_classes: int | None, channels: int = 3) -> nn.Module:
        from torchvision.models import get_model

        options: dict[str, Any] = {"num_classes": num_classes or self.default_classes}
        if self.name in ("googlenet", "inception_v3"):  # as torchvision builds them for its own weights
            options |= {"init_weights": False, "transform_input": channels == 3}
        model: nn.Module = get_model(self.name, weights=None, **options)
        return model if channels == 3 else _rebanded(model, channels)

    def pretrained(self, num_classes: int | None) -> nn.Module:
        from torchvision.models import get_model

        _same_classes(self.name, self.default_classes, num_classes)
        with download(self.name):
            model: nn.Module = get_model(self.name, weights=self.recipe)
        return model

    def names(self, model: nn.Module, classes: int) -> Sequence[str] | None:
        names: list[str] = self.recipe.meta["categories"]
        return names if len(names) == classes else None

    def preprocessing(self, model: nn.Module) -> _Preprocessing:
        preset = self.recipe.transforms()
        crop = preset.crop_size[0]
        view = self.raw(model, _enlargement(crop, crop))
        return _InColour(preset), _InColour(view), tuple(preset.mean), tuple(preset.std), (3, crop, crop)

    def raw(self, model: nn.Module, k: int = 1) -> Transform:
        """The preprocessing without the standardisation, k times as large."""
        preset = self.recipe.transforms()
        found: Transform = type(preset)(
            crop_size=preset.crop_size[0] * k,
            resize_size=preset.resize_size[0] * k,
            mean=(0.0,) * 3,
            std=(1.0,) * 3,
            interpolation=preset.interpolation,
        )
        return found


class _Timm:
    def __init__(self, name: str) -> None:
        from timm.models import get_pretrained_cfg

        self.name = name
        try:
            self.config = get_pretrained_cfg(name, allow_unregistered=False)
        except RuntimeError as error:  # what timm raises for an unknown tag
            raise OptionError(
                f"model: {name!r} names weights that timm does not know ({reason(error)}); "
                "timm.list_models(pretrained=True) lists them"
            ) from error
        self.default_classes = int(self.config.num_classes)

    def build(self, num_classes: int | None, channels: int = 3) -> nn.Module:
        from timm import create_model

        options = {} if channels == 3 else {"in_chans": channels}
        model: nn.Module = create_model(self.name, num_classes=num_classes or self.default_classes, **options)
        return model

    def pretrained(self, num_classes: int | None) -> nn.Module:
        from timm import create_model

        _same_classes(self.name, self.default_classes, num_classes)
        with download(self.name):
            if self.config.hf_hub_id:
                ask_hub(self.config.hf_hub_id, self.config.hf_hub_filename)
            model: nn.Module = create_model(self.name, pretrained=True)
        return model

    def names(self, model: nn.Module, classes: int) -> Sequence[str] | None:
        from timm.data import ImageNetInfo, infer_imagenet_subset

        subset = infer_imagenet_subset(model)
        if not subset:
            return None
        info = ImageNetInfo(subset)
        return [info.index_to_description(i).split(",")[0] for i in range(classes)]

    def preprocessing(self, model: nn.Module) -> _Preprocessing:
        from timm.data import create_transform, resolve_data_config

        config = resolve_data_config({}, model=model)
        _, height, width = size = config["input_size"]
        view = self.raw(model, _enlargement(height, width))
        return _InColour(create_transform(**config)), _InColour(view), tuple(config["mean"]), tuple(config["std"]), size

    def raw(self, model: nn.Module, k: int = 1) -> Transform:
        """The preprocessing without the standardisation, k times as large."""
        from timm.data import create_transform, resolve_data_config

        config = resolve_data_config({}, model=model)
        channels, height, width = config["input_size"]
        plain = {"input_size": (channels, height * k, width * k), "mean": (0.0,) * channels, "std": (1.0,) * channels}
        found: Transform = create_transform(**{**config, **plain})
        return found


class _HuggingFace:
    """A folder that ``save_pretrained`` of a Hugging Face image classifier and its image processor wrote."""

    def __init__(self, folder: Path) -> None:
        try:
            import transformers
        except ImportError as error:
            raise OptionError(
                f"model: {str(folder)!r} holds a Hugging Face model, which needs transformers; "
                "pip install 'attrib_zoo[hf]'"
            ) from error
        self.folder, self._library = folder, transformers
        with _folder_of(folder):
            self.config: Any = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        self.default_classes = int(self.config.num_labels)

    def build(self, num_classes: int | None) -> nn.Module:
        config = copy.deepcopy(self.config)
        if num_classes not in (None, self.default_classes):
            config.num_labels = num_classes
        with _folder_of(self.folder):
            model: nn.Module = self._library.AutoModelForImageClassification.from_config(config)
        return model

    def pretrained(self, num_classes: int | None) -> nn.Module:
        _same_classes(str(self.folder), self.default_classes, num_classes)
        with _folder_of(self.folder):
            model, said = self._library.AutoModelForImageClassification.from_pretrained(
                self.folder, local_files_only=True, output_loading_info=True
            )
        missing = [*said["missing_keys"], *(entry[0] for entry in said["mismatched_keys"])]
        if missing:
            raise DataError(
                f"model: the weights in {str(self.folder)!r} are not those of a {type(model).__name__}: missing "
                f"{listed(sorted(missing))}; save the fine-tuned classifier with save_pretrained"
            )
        return model  # type: ignore[no-any-return]

    def names(self, model: nn.Module, classes: int) -> Sequence[str] | None:
        names = [str(self.config.id2label.get(i, "")) for i in range(classes)]
        made_up = all(name == f"LABEL_{i}" for i, name in enumerate(names))
        return None if made_up or not all(names) else names

    def preprocessing(self, model: nn.Module) -> _Preprocessing:
        processor = self._processor()
        transform, view = _InColour(_Processed(processor)), _InColour(self.raw(model))
        mean, std = (
            tuple(float(v) for v in getattr(processor, f"image_{name}", None) or ()) for name in ("mean", "std")
        )
        if not getattr(processor, "do_normalize", True) or not mean:
            mean, std = (0.0,) * 3, (1.0,) * 3
        from PIL import Image

        channels, height, width = transform(Image.new("RGB", (64, 64))).shape
        return transform, view, mean, std, (channels, height, width)

    def raw(self, model: nn.Module) -> Transform:
        """The preprocessing without the standardisation."""
        return _Processed(self._processor(), plain=True)

    def _processor(self) -> Any:
        with _folder_of(self.folder):
            return self._library.AutoImageProcessor.from_pretrained(self.folder, local_files_only=True)


@contextmanager
def _folder_of(folder: Path) -> Iterator[None]:
    """Turns the library's errors about an incomplete folder into one sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DataError(
            f"model: cannot read the Hugging Face model in {str(folder)!r} ({reason(error)}); write the folder with "
            "model.save_pretrained(folder) and image_processor.save_pretrained(folder), of an image classifier"
        ) from error


@dataclass(frozen=True)
class _Processed:
    """A Hugging Face image processor as a transform: PIL image to ``(C, H, W)``."""

    processor: Any
    plain: bool = False

    def __call__(self, image: Any) -> Tensor:
        options = {"do_normalize": False, "do_rescale": True} if self.plain else {}
        found = self.processor(images=image, return_tensors="pt", **options)["pixel_values"][0]
        return torch.as_tensor(found)


def _source(name: str) -> _Torchvision | _Timm | _HuggingFace:
    """Which library has the model, or an error with the closest names of both."""
    if (Path(name) / "config.json").is_file():
        return _HuggingFace(Path(name))
    import timm
    from torchvision import models

    library, _, bare = name.rpartition("/")
    ours = models.list_models(module=models)
    if bare in ours and library in ("", "torchvision"):
        return _Torchvision(bare)
    if library in ("", "timm") and timm.is_model(bare):
        return _Timm(bare)
    known = dict.fromkeys([*ours, *timm.list_models()])
    if Path(name).is_dir():
        raise OptionError(
            f"model: the folder {name!r} holds no config.json of a Hugging Face model; write it with "
            "model.save_pretrained(folder), or name a model of torchvision or timm and give --weights FILE"
        )
    raise OptionError(f"model: no model {name!r} in torchvision or timm{closest(bare, known)}")


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


def _enlargement(height: int, width: int) -> int:
    return max(1, round(_VIEW / max(height, width)))


@dataclass(frozen=True)
class _InColour:
    """A transform for PIL images of any mode; a class, so that it can be pickled to loader processes."""

    transform: Transform

    def __call__(self, image: Any) -> Tensor:
        return self.transform(in_colour(image))


@dataclass(frozen=True)
class _InGrey:
    """A transform without standardisation, for models that take one band: PIL image of any mode to ``(1, H, W)``."""

    transform: Transform
    mean: float
    std: float

    def __call__(self, image: Any) -> Tensor:
        return (self.transform(in_colour(image).convert("L").convert("RGB"))[:1] - self.mean) / self.std


def _bands(model: nn.Module) -> int:
    """The number of bands of the model's images."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return 3 if first is None else first.in_channels


def _rebanded(model: nn.Module, channels: int) -> nn.Module:
    """The model with its first convolution replaced by one for this many bands."""
    name, first = next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    other = nn.Conv2d(
        channels,
        first.out_channels,
        first.kernel_size,  # type: ignore[arg-type]  # pairs, as a convolution keeps them
        first.stride,  # type: ignore[arg-type]
        first.padding,  # type: ignore[arg-type]
        first.dilation,  # type: ignore[arg-type]
        bias=first.bias is not None,
    )
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, other)
    return model


def _device(device: str | torch.device | None) -> torch.device:
    try:
        place = torch.device(device or "cpu")
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise OptionError(f"device: {device!r} cannot be used here ({reason(error)}); try 'cpu'") from error
    return place


def _same_classes(name: str, own: int, asked: int | None) -> None:
    if asked is not None and asked != own:
        raise OptionError(
            f"num_classes: the pretrained weights of {name} have {own} classes, got {asked}; "
            "pass a file of weights that were trained for them"
        )
