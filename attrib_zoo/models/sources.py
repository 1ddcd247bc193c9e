"""Where classifiers come from: torchvision, timm, a folder of Hugging Face; how each builds them and sees images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo.errors import (
    DataError,
    OptionError,
    closest,
    listed,
    reason,
)
from attrib_zoo.models.weights import ask_hub, download
from attrib_zoo.visualize import in_colour

_VIEW = 448  # approximate side of a displayed picture in pixels

Transform = Callable[[Any], Tensor]
Preprocessing = tuple[Transform, Transform, tuple[float, ...], tuple[float, ...], tuple[int, int, int]]


def source_of(name: str) -> _Torchvision | _Timm | _HuggingFace:
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

    def preprocessing(self, model: nn.Module) -> Preprocessing:
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

    def preprocessing(self, model: nn.Module) -> Preprocessing:
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

    def preprocessing(self, model: nn.Module) -> Preprocessing:
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


def _enlargement(height: int, width: int) -> int:
    return max(1, round(_VIEW / max(height, width)))


@dataclass(frozen=True)
class _InColour:
    """A transform for PIL images of any mode; a class, so that it can be pickled to loader processes."""

    transform: Transform

    def __call__(self, image: Any) -> Tensor:
        return self.transform(in_colour(image))


@dataclass(frozen=True)
class InGrey:
    """A transform without standardisation, for models that take one band: PIL image of any mode to ``(1, H, W)``."""

    transform: Transform
    mean: float
    std: float

    def __call__(self, image: Any) -> Tensor:
        """``(1, H, W)``, standardised."""
        return (self.transform(in_colour(image).convert("L").convert("RGB"))[:1] - self.mean) / self.std


def bands_of(model: nn.Module) -> int:
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


def _same_classes(name: str, own: int, asked: int | None) -> None:
    if asked is not None and asked != own:
        raise OptionError(
            f"num_classes: the pretrained weights of {name} have {own} classes, got {asked}; "
            "pass a file of weights that were trained for them"
        )
