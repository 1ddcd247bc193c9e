"""What Grad-CAM and T-TAME cost, as multiples of a plain forward pass of the same batch in the same run.

    python benchmarks/speed.py [resnet50 vgg16 vit_b_16]

Random weights, 224 x 224 pixels, float32. ``attribute``: batch 4. Training step: against the sum of the parts that
the mathematics needs (a clean forward pass without graph, a masked one with its backward pass to the mask, and the
head's forward and backward pass), each measured by itself. Batch 4.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

from measure import saved_bytes, setting, table, times

import torch
import torchvision

from attrib_zoo import TTAME, GradCAM
from attrib_zoo.backbone.capture import frozen, run
from attrib_zoo.methods.ttame import extra_classes
from attrib_zoo.training.session import ground

LAST = {"resnet50": "layer4", "vgg16": "features.29", "vit_b_16": "encoder.layers.encoder_layer_11.ln_1"}


def load(name: str) -> torch.nn.Module:
    """A torchvision model with random weights whose head is not all zero."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    heads = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    torch.nn.init.normal_(heads[-1].weight, std=0.02)
    return model


def explain(name: str, rounds: int) -> list[list[object]]:
    """Rows for ``attribute``."""
    model = load(name)
    images = torch.randn(4, 3, 224, 224)
    one = images[:1]
    gradcam = GradCAM(model, LAST[name])
    ttame = TTAME(model).fit([images], max_steps=1, show_progress=False)
    classes = list(range(10))

    def plain() -> None:
        with torch.inference_mode():
            model(images)

    def plain_one() -> None:
        with torch.inference_mode():
            model(one)

    base, cam, tame = times([plain, lambda: gradcam.attribute(images, 1), lambda: ttame.attribute(images, 1)], rounds)
    base1, single, many = times(
        [plain_one, lambda: gradcam.attribute(one, 1), lambda: gradcam.attribute_many(one, classes)], rounds
    )
    kept = saved_bytes(lambda: gradcam.attribute(images, 1), model) / len(images)

    def whole() -> torch.Tensor:
        with frozen(model):
            return model(images.clone().requires_grad_())

    full = saved_bytes(whole, model) / len(images)
    return [
        [name, "TTAME.attribute, batch 4", f"{tame / base:.2f}"],
        [name, "GradCAM.attribute, batch 4", f"{cam / base:.2f}"],
        [name, "GradCAM.attribute, batch 1", f"{single / base1:.2f}"],
        [name, "GradCAM.attribute_many, 10 classes, batch 1", f"{many / base1:.2f}"],
        [name, "kept for backward, MB per image: Grad-CAM (whole graph)", f"{kept / 1e6:.3f} ({full / 1e6:.1f})"],
    ]


def step(name: str, rounds: int) -> list[object]:
    """A training step against its unavoidable parts."""
    model = load(name)
    images = torch.randn(4, 3, 224, 224)
    ttame = TTAME(model).fit([images], max_steps=1, show_progress=False)
    network = ttame.network_.train()
    generator = torch.Generator().manual_seed(0)
    with ground(model):
        outputs, features = run(model, images, (), ttame.taps(images))
        rows, _ = extra_classes(outputs.argmax(1), outputs.shape[1], "random", generator)

        def masked() -> None:
            mask = torch.rand(4, 1, 224, 224, requires_grad=True)
            torch.autograd.grad(model(images * mask).sum(), mask)

        def clean() -> None:
            with torch.no_grad():
                model(images)

        def head() -> None:
            network(features, rows).sum().backward()

        def whole() -> None:
            ttame.loss_terms(network, images, (), generator).loss.backward()

        parts: list[Callable[[], None]] = [clean, masked, head]
        *seconds, total = times([*parts, whole], rounds)
    shares = " + ".join(f"{s / seconds[0]:.2f}" for s in seconds)
    return [name, f"TTAME step (clean + masked + head = {shares} forwards)", f"{total / sum(seconds):.2f}"]


def main() -> None:
    """Print one table."""
    warnings.simplefilter("ignore")
    names = sys.argv[1:] or list(LAST)
    rows: list[list[object]] = []
    for name in names:
        rows += explain(name, rounds=9)
        rows.append(step(name, rounds=9))
    print(setting())
    print(table(rows, ["model", "what", "x forward (step: x parts)"]))


if __name__ == "__main__":
    main()
