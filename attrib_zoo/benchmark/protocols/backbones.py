"""The papers' classifiers, with their preprocessing and the layers that the papers read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.targets import one_logit
from attrib_zoo.errors import DataError, OptionError, UnsupportedModelError, closest, reason
from attrib_zoo.masking import IMAGENET_MEAN, IMAGENET_STD
from attrib_zoo.models.weights import download, fit_into

_Transform = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Backbone:
    """A classifier as a protocol uses it.

    Attributes:
        name: as ``--backbone`` calls it; also the key of the printed rows.
        model: in eval mode.
        mean: for standardisation, per channel.
        std: as ``mean``.
        cam: the layer of the CAM methods; ``None`` for their defaults.
        attention: the layers that T-TAME reads; ``None`` for its defaults.
        lcam: the layer that L-CAM reads; ``None`` for its default.
        pooled: the max-pooling after it, where there is one (L-CAM's †).
        transformer: whether it is one: L-CAM and SISE are for CNNs, Transformer LRP is not.
        resize: the length to which the shorter side of an image is resized.
        size: the side of the crop.
        budget: what slow methods spend on a map: ``n_masks`` of RISE, ``max_iter`` and ``areas`` of extremal
            perturbation, ``ig_steps`` of integrated gradients.
    """

    name: str
    model: nn.Module
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    cam: str | None = None
    attention: tuple[str, ...] | None = None
    lcam: str | None = None
    pooled: str | None = None
    transformer: bool = False
    resize: int = 256
    size: int = 224
    budget: Mapping[str, Any] = field(default_factory=dict)

    def for_test(self) -> _Transform:
        """Shorter side to ``resize``, centre crop, standardised."""
        from torchvision import transforms as t

        return self._transform([t.Resize(self.resize), t.CenterCrop(self.size)])

    def for_training(self) -> _Transform:
        """Shorter side to ``resize``, random crop, standardised."""
        from torchvision import transforms as t

        return self._transform([t.Resize(self.resize), t.RandomCrop(self.size)])

    def whole(self) -> _Transform:
        """The whole picture squeezed into the square, so that no object is cropped away, standardised."""
        from torchvision import transforms as t

        return self._transform([t.Resize((self.size, self.size))])

    def _transform(self, steps: list[Any]) -> _Transform:
        from torchvision import transforms as t

        found: _Transform = t.Compose([*steps, t.ToTensor(), t.Normalize(self.mean, self.std)])
        return found

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device


_FACTS: dict[str, dict[str, Any]] = {
    "vgg16": {
        "cam": "features.29",
        "attention": ("features.16", "features.23", "features.30"),
        "lcam": "features.29",
        "pooled": "features.30",
        "budget": {"n_masks": 4000},
    },
    "resnet50": {
        "cam": "layer4",
        "attention": ("layer2", "layer3", "layer4"),
        "lcam": "layer4",
        "budget": {"n_masks": 8000},
    },
    "vit_b_16": {
        "cam": "encoder.layers.encoder_layer_11.ln_1",
        "attention": tuple(f"encoder.layers.encoder_layer_{i}" for i in (9, 10, 11)),
        "transformer": True,
        "budget": {"n_masks": 8000},
    },
}
NAMES = tuple(_FACTS)
"""What ``--backbone`` may be."""


def check_name(name: str) -> str:
    """The backbone's name, or an :class:`OptionError` that lists them."""
    if name not in NAMES:
        raise OptionError(f"backbone: must be one of {', '.join(NAMES)}, got {name!r}{closest(name, NAMES)}")
    return name


def load_backbone(
    name: str, weights: str | os.PathLike[str] | None = None, *, classes: int = 1000, device: Any = "cpu"
) -> Backbone:
    """A torchvision model with the papers' weights (``IMAGENET1K_V1``, the original ones) or those of a file.

    Args:
        name: one of ``NAMES``.
        weights: a file; ``None`` downloads the weights or takes them from the cache. With another number of classes
            than ImageNet's, the last layer is then new.
        classes: K.
        device: where the model goes.

    Raises:
        OptionError: no such backbone or device.
        DataError: the weights are unavailable, or belong to another architecture or number of classes.
    """
    from torchvision.models import get_model

    check_name(name)
    if weights is not None:
        model, found = fit_into(
            lambda count: get_model(name, weights=None, num_classes=count or classes), Path(weights), None
        )
        if found not in (None, classes):
            raise DataError(
                f"weights: must be of a model with {classes} classes, got {found} in '{weights}'{_one(found)}"
            )
    else:
        with download(name):
            model = get_model(name, weights="IMAGENET1K_V1")
        if classes != 1000:
            replace_last(model, _new_layer(last_linear(model)[1], classes))
    try:
        model = model.eval().to(device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise OptionError(f"device: {device!r} cannot be used here ({reason(error)}); try 'cpu'") from error
    return Backbone(name, model, **_FACTS[name])


def last_linear(model: nn.Module) -> tuple[str, nn.Linear]:
    """The name of the model's last linear layer, and the layer."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not found:
        raise UnsupportedModelError(f"model: {type(model).__name__} has no linear layer to train for other classes")
    return found[-1]


def replace_last(model: nn.Module, layer: nn.Linear) -> None:
    """Replace the model's last linear layer."""
    name, _ = last_linear(model)
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)


def _new_layer(old: nn.Linear, classes: int) -> nn.Linear:
    layer = nn.Linear(old.in_features, classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def check_output(backbone: Backbone, classes: int | None = None) -> None:
    """Raise where the model has another number of classes than the data; ``None``: where it has one logit for two."""
    with torch.no_grad():
        outputs = backbone.model(torch.zeros(1, 3, backbone.size, backbone.size, device=backbone.device))
    shape = tuple(outputs.shape)
    if shape[1:] != (classes,) if classes is not None else one_logit(outputs):
        wanted = "an output for each class" if classes is None else f"{classes} classes"
        hint = _one(1) if one_logit(outputs) else ""
        raise DataError(f"weights: must be of a model with {wanted}, got outputs {shape}{hint}")


def _one(classes: int | None) -> str:
    return (
        "; the papers have none with one logit for two classes, use attrib-zoo evaluate for it" if classes == 1 else ""
    )
