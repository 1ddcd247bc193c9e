"""What a first explanation costs: of a model never seen before, and by a second explainer of the same model.

    python benchmarks/first_call.py
    python benchmarks/first_call.py --models resnet18 vit_b_16 --rounds 9

A first call finds the layers and tests how they lie; all explainers of a model share what it finds. Ratios to one
forward pass of one image at 224 px, CPU time on one thread, medians of alternating rounds with random weights.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence

import measure

import torch
import torchvision

from attrib_zoo import GradCAM
from attrib_zoo.backbone.layers.known import known

HEAD = ("model", "first call", "second explainer", "second call", "structure check", "forward pass")


def seconds(call: Callable[[], object]) -> float:
    start = measure.clock()
    call()
    return measure.clock() - start


def row(name: str, rounds: int) -> list[str]:
    original = torchvision.models.get_model(name, weights=None).eval()
    heads = [module for module in original.modules() if isinstance(module, torch.nn.Linear)]
    torch.nn.init.normal_(heads[-1].weight, std=0.02)  # torchvision's transformers begin with a head of zeros
    images = torch.randn(1, 3, 224, 224)

    def forward() -> None:
        with torch.inference_mode():
            original(images)

    forward()
    GradCAM(copy.deepcopy(original)).attribute(images)
    found: list[list[float]] = []
    for _ in range(rounds):
        model = copy.deepcopy(original)  # of which nothing is known
        first, second = GradCAM(model), GradCAM(model)
        times = [seconds(lambda e=e: e.attribute(images)) for e in (first, second, first)]
        found.append([*times, seconds(lambda m=model: known(m)), seconds(forward)])
    *parts, plain = (statistics.median(column) for column in zip(*found, strict=True))
    return [name, *(f"{part / plain:.2f}" for part in parts[:3]), f"{1e3 * parts[3]:.2f} ms", f"{1e3 * plain:.0f} ms"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50", "vit_b_16", "swin_t"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    print(measure.setting())
    print(measure.table([row(name, options.rounds) for name in options.models], HEAD))


if __name__ == "__main__":
    main()
