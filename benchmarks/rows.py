"""What the rows of T-TAME's start cost: CPU seconds of one thread, as forward passes of one image, and peak memory.

    python benchmarks/rows.py [MODEL ...]

Random weights, 32 images at 224 pixels, the layers that ``TTAME(model)`` reads; also a ViT-S with 21 841 classes.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable

from measure import setting, table, times

import timm
import torch
import torchvision
from torch import nn

from attrib_zoo import TTAME
from attrib_zoo.backbone.capture import frozen
from attrib_zoo.backbone.kind import is_transformer
from attrib_zoo.training.rows import ROW_IMAGES, class_rows

MODELS: dict[str, Callable[[], nn.Module]] = {
    "SqueezeNet 1.1": torchvision.models.squeezenet1_1,
    "EfficientNet-Lite0": lambda: timm.create_model("tf_efficientnet_lite0"),
    "ResNet-50": torchvision.models.resnet50,
    "VGG-16": torchvision.models.vgg16,
    "ViT-Ti/16": lambda: timm.create_model("vit_tiny_patch16_224"),
    "ViT-S/16": lambda: timm.create_model("vit_small_patch16_224"),
    "ViT-S/16, K = 21 841": lambda: timm.create_model("vit_small_patch16_224", num_classes=21841),
}


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    images = torch.randn(ROW_IMAGES, 3, 224, 224)
    found = []
    for name in sys.argv[1:] or MODELS:
        model = MODELS[name]().eval()
        taps = TTAME(model, recipe="attended" if is_transformer(model) else "rows").taps(images[:1])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with frozen(model), torch.no_grad():
            forward, _ = times([lambda model=model: model(images[:1]), lambda: None], rounds=3)
        begun = time.process_time()
        with frozen(model):
            rows = class_rows(model, images, (), taps)
        seconds = time.process_time() - begun
        memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
        read = ", ".join(tap.name for tap in taps)
        found.append([name, read, rows.described(), f"{seconds:.1f}", f"{seconds / forward:.0f}", f"{memory:.0f} MB"])
    print(setting())
    print(table(found, ["model", "layers", "what was taken", "CPU s", "forward passes", "more memory"]))


if __name__ == "__main__":
    main()
