"""How far the plain module and the files of an explainer agree with ``attribute``.

Usage: python benchmarks/agreement.py [--models resnet18 swin_t]

T-TAME from rows on random weights; images other than those that the files were traced with, and where the size is free,
images of another size as well. Each number is the largest difference of one cell of a map in [0, 1].
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

from attrib_zoo import TTAME


def _timm(name: str, **options: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, **options)

    return make


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name)

    return make


MODELS = {
    "resnet18": (_torchvision("resnet18"), 128),
    "efficientnet_lite0": (_timm("tf_efficientnet_lite0"), 128),
    "convnext_t": (_torchvision("convnext_tiny"), 128),
    "vit_ti": (_timm("vit_tiny_patch16_224", img_size=112), 112),
    "dinov2_s_reg": (_timm("vit_small_patch14_reg4_dinov2", num_classes=1000, img_size=112), 112),
    "swin_t": (_torchvision("swin_t"), 128),
    "squeezenet": (_torchvision("squeezenet1_1"), 128),
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}")
    print("| model | free axes | module | `.pt2` | ONNX |\n|---|---|---|---|---|", flush=True)
    for name in options.models:
        make, size = MODELS[name]
        torch.manual_seed(0)
        explainer = TTAME(make().eval())
        explainer.fit([torch.randn(4, 3, size, size)], max_steps=0, show_progress=False)
        axes, found = agreement(explainer, size)
        print(f"| {name} | {axes} | {' | '.join(f'{value:.1e}' for value in found)} |", flush=True)


def agreement(explainer: TTAME, size: int) -> tuple[str, list[float]]:
    """The axes that are free in the files, and the largest difference of the module, the ``.pt2``, the ``.onnx``."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        program = torch.export.load(explainer.export(Path(folder) / "model.pt2")).module()
        path = explainer.export(Path(folder) / "model.onnx")
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        dims = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    axes = [dim.dim_param for dim in dims if dim.dim_param]
    module = explainer.as_module()

    def onnx_map(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["map"], {"images": images.numpy()})[0])

    sizes = [(size, size)] + [(size + 32, size)] * ("height" in axes)
    found = [0.0, 0.0, 0.0]
    with torch.no_grad():
        for images in (torch.randn(5, 3, *shape) for shape in sizes):
            wanted = explainer.attribute(images)[:, :1]
            maps = (module(images)[1], program(images)[1], onnx_map(images))
            found = [max(old, float((new - wanted).abs().max())) for old, new in zip(found, maps, strict=True)]
    return ", ".join(axes), found


if __name__ == "__main__":
    main(sys.argv[1:])
