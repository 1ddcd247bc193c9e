"""IIA against plain loops over both paths, against its closed forms, and what a call costs."""

from __future__ import annotations

import attention_cases as written_out
import engine_cases as cases
import pytest
import torch
from attention_cases import TARGETS, assert_close, distilled, read_out, sized_images, torchvision_vit, vit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attrib_zoo import IIA, GenericAttention
from attrib_zoo.errors import OptionError, UnsupportedModelError

# ---------------------------------------------------------------------- the reference: plain loops over both paths


def gradient_at(model: nn.Module, layer: str, image: Tensor, given: Tensor | None, target: int) -> tuple[Tensor, ...]:
    """What the layer puts out (or is made to), and the gradient of the logit there."""
    held: list[Tensor] = []

    def hook(_: nn.Module, __: object, output: Tensor) -> Tensor:
        held.append((output if given is None else given).detach().clone().requires_grad_())
        return held[0].clone()

    twin = cases.out_of_place(model)
    handle = twin.get_submodule(layer).register_forward_hook(hook)
    with torch.enable_grad():
        logits = twin(image[None])
        (gradient,) = torch.autograd.grad(logits[0, target], held[0])
    handle.remove()
    return held[0].detach()[0], gradient[0]


def released_by_loops(model: nn.Module, layer: str, image: Tensor, target: int, n: int) -> Tensor:
    total = 0
    for i in range(n + 1):
        maps, gradient = gradient_at(model, layer, image * i / n, None, target)
        total = total + (gradient * maps.clamp(min=0)).sum(0)
    return total


def double_by_loops(model: nn.Module, layer: str, image: Tensor, target: int, n: int) -> Tensor:
    total = 0
    for i in range(n + 1):
        point = image * i / n
        maps, _ = gradient_at(model, layer, point, None, target)
        low = torch.stack([channel.min() for channel in maps])[:, None, None].expand_as(maps)
        for j in range(n + 1):
            inner = low + (maps - low) * j / n
            _, gradient = gradient_at(model, layer, point, inner[None], target)
            total = total + (gradient * (inner - low).clamp(min=0)).sum(0)
    return total


def triple_by_loops(model: nn.Module, earlier: str, later: str, image: Tensor, target: int, n: int) -> Tensor:
    outer = [gradient_at(model, earlier, image * i / n, None, target)[0] for i in range(n + 1)]
    lowest = torch.stack(outer).min(0).values
    total = 0
    for i in range(n + 1):
        for j in range(n + 1):
            middle = lowest + (outer[i] - lowest) * j / n
            held: list[Tensor] = []
            twin = cases.out_of_place(model)
            twin.get_submodule(earlier).register_forward_hook(lambda _, __, ___, middle=middle: middle[None].clone())
            twin.get_submodule(later).register_forward_hook(lambda _, __, out, held=held: held.append(out.clone()))
            with torch.no_grad():
                twin(image[None])
            maps = held[0][0]
            low = torch.stack([channel.min() for channel in maps])[:, None, None].expand_as(maps)
            for k in range(n + 1):
                inner = low + (maps - low) * k / n
                _, gradient = gradient_at(model, later, image, inner[None], target)
                total = total + (gradient * inner.clamp(min=0)).clamp(min=0).sum(0)
    return total


def transformer_by_loops(model: nn.Module, image: Tensor, target: int, n: int) -> Tensor:
    """The product of all blocks' factors, ``(T, T)``."""
    means: list[Tensor] = []
    for i in range(n + 1):
        for j in range(n + 1):
            last = len(written_out.run(model, image)[1]) - 1

            def hold(number: int, head: int, matrix: Tensor, last: int = last, share: float = j / n) -> Tensor:
                return share * matrix.detach() if number == last else matrix

            matrices, gradients = written_out.with_gradients(model, image * i / n, target, hold)
            found = [written_out.positive_mean(a, g) for a, g in zip(matrices, gradients, strict=True)]
            means = [m + f for m, f in zip(means, found, strict=True)] if means else found
    return written_out.rollout([mean / (n + 1) ** 2 for mean in means])


class DeepHead(nn.Module):
    """Convolutions, and two linear layers with a ReLU behind them: the gradient changes along the inner path."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(inplace=True)),
            nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8)),
        )
        self.head = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(128, 12), nn.ReLU(), nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(x))


def images(size: int) -> Tensor:
    return cases.images(size=size, dtype=torch.float64)


@pytest.mark.parametrize("mode", ["double", "released"])
@pytest.mark.parametrize(
    ("build", "layer", "size"),
    [(lambda: cases.lively(DeepHead()), "stages.1", 16), (cases.resnet, "layer3", 32)],
    ids=["deep head", "resnet"],
)
def test_maps_of_cnns_are_those_of_plain_loops(build, layer, size, mode):
    model, inputs = build().double(), images(size)
    explainer = IIA(model, layer, n_steps=3, mode=mode, upsample=False, chunk_size=5)
    with cases.untouched(model, inputs):
        found = explainer.attribute(inputs, target=TARGETS)
    oracle = {"double": double_by_loops, "released": released_by_loops}[mode]
    for n, target in enumerate(TARGETS):
        assert_close(found[n, 0], oracle(model, layer, inputs[n], target, 3))
    assert_close(explainer.attribute_many(inputs, [[3, 0], [1, 2]])[:, 0], found)


@pytest.mark.parametrize(
    ("build", "layers", "size"),
    [(lambda: cases.lively(DeepHead()), ["stages.0", "stages.1"], 16), (cases.resnet, ["layer2", "layer3"], 32)],
    ids=["deep head", "resnet"],
)
def test_maps_of_three_paths_are_those_of_plain_loops(build, layers, size):
    model, inputs = build().double(), images(size)
    explainer = IIA(model, layers, n_steps=2, mode="triple", upsample=False, chunk_size=2)
    with cases.untouched(model, inputs):
        found = explainer.attribute(inputs, target=TARGETS)
    for n, target in enumerate(TARGETS):
        assert_close(found[n, 0], triple_by_loops(model, *layers, inputs[n], target, 2))
    assert_close(explainer.attribute_many(inputs, [[3, 0], [1, 2]])[:, 0], found)


def test_three_paths_take_the_last_two_stages():
    model, inputs = cases.resnet(), cases.images(1, size=64)
    options = {"mode": "triple", "n_steps": 1}
    named = IIA(model, ["layer3", "layer4"], **options).attribute(inputs)
    assert torch.equal(IIA(model, **options).attribute(inputs), named)
    with pytest.raises(OptionError, match="layers: must be 2 for IIA with mode='triple', got 1"):
        IIA(model, "layer4", **options).attribute(inputs)


def test_the_closed_forms_behind_a_mean_and_one_linear_layer():
    """There the gradient is a constant: a sum of CAMs, and (n + 1) / 2 times the same over what rises."""
    model, inputs, n = cases.resnet().double(), images(64), 4
    seen: list[Tensor] = []
    handle = model.layer4.register_forward_hook(lambda _, __, out: seen.append(out.clone()))
    with torch.no_grad():
        for i in range(n + 1):
            model(inputs * i / n)
    handle.remove()
    weights = model.fc.weight[3][:, None, None].detach() / seen[0][0, 0].numel()
    cam = sum((weights * maps).sum(1, keepdim=True) for maps in seen)
    risen = sum((weights * (maps - maps.amin((2, 3), keepdim=True))).sum(1, keepdim=True) for maps in seen)
    options = {"n_steps": n, "upsample": False}
    assert_close(IIA(model, mode="released", **options).attribute(inputs, target=3), cam)
    assert_close(IIA(model, **options).attribute(inputs, target=3), risen * (n + 1) / 2)


def test_sums_over_more_points_approach_the_integrals():
    model, inputs = cases.lively(DeepHead()).double(), images(16)
    for mode, power in (("double", 2), ("released", 1)):
        coarse, fine, finest = (
            IIA(model, "stages.1", n_steps=n, mode=mode).attribute(inputs, target=3) / (n + 1) ** power
            for n in (4, 16, 64)
        )
        assert float((fine - finest).norm()) < 0.5 * float((coarse - finest).norm())


TRANSFORMERS = {
    "class token": (vit, 1, [0]),
    "one block": (lambda: vit(depth=1), 1, [0]),
    "distilled": (distilled, 2, [0, 1]),
    "mean of the patches": (lambda: vit(global_pool="avg"), 1, list(range(1, 17))),
    "torchvision": (torchvision_vit, 1, [0]),
}


@pytest.mark.parametrize("architecture", TRANSFORMERS)
def test_maps_of_transformers_are_those_of_plain_loops(architecture):
    build, prefix, read = TRANSFORMERS[architecture]
    model, inputs = build().double(), sized_images(architecture)
    explainer = IIA(model, n_steps=2, mean_pooling=len(read) > 2, upsample=False, chunk_size=7)
    with cases.untouched(model, inputs):
        found = explainer.attribute(inputs, target=TARGETS)
    for n, target in enumerate(TARGETS):
        assert_close(found[n, 0], read_out(transformer_by_loops(model, inputs[n], target, 2), prefix, read, inputs))
    assert_close(explainer.attribute_many(inputs, [[3, 0], [1, 2]])[:, 0], found)


def test_the_paths_have_ten_steps_on_a_cnn_and_five_on_a_transformer():
    cnn, inputs = cases.lively(DeepHead()), cases.images(size=16)
    assert torch.equal(IIA(cnn).attribute(inputs), IIA(cnn, n_steps=10).attribute(inputs))
    model, inputs = vit(depth=1), cases.images()
    assert torch.equal(IIA(model).attribute(inputs), IIA(model, n_steps=5).attribute(inputs))


@pytest.mark.parametrize(("mode", "tails"), [("double", 2 * 12 + 2 * 11 * 10 + 2 * 11), ("released", 2 * 12)])
def test_what_a_call_on_a_cnn_costs(mode, tails):
    """One clean pass and 11 points for each image; 10 inner passes of the tail for each point, and its own check."""
    model, inputs = cases.resnet(), cases.images()
    explainer = IIA(model, mode=mode)
    explainer.attribute(inputs, target=3)  # layers are found once
    counts = {"layer1.0.conv1": 0, "fc": 0}
    for name in counts:

        def hook(_: nn.Module, __: object, output: Tensor, name: str = name) -> None:
            counts[name] += len(output)

        model.get_submodule(name).register_forward_hook(hook)
    explainer.attribute_many(inputs, [3, 1])
    assert counts == {"layer1.0.conv1": 2 * 12, "fc": tails}


def test_what_a_call_on_a_transformer_costs():
    model, inputs = vit(), cases.images()
    explainer = IIA(model)
    explainer.attribute(inputs, target=3)
    seen = []
    model.head.register_forward_hook(lambda _, __, out: seen.append(len(out)))
    explainer.attribute_many(inputs, [3, 1])
    assert sum(seen) == 2 * 37


@settings(max_examples=10, deadline=None)
@given(chunk=st.integers(1, 40), factor=st.floats(0.01, 100), mode=st.sampled_from(["double", "released"]))
def test_a_scaled_head_scales_the_map_whatever_the_chunks(chunk, factor, mode):
    model, inputs = cases.lively(DeepHead()).double(), images(16)
    model.head[4].bias = None
    options = {"n_steps": 3, "mode": mode}
    wanted = IIA(model, **options).attribute(inputs, target=TARGETS) * factor
    with torch.no_grad():
        model.head[4].weight.mul_(factor)
    assert_close(IIA(model, chunk_size=chunk, **options).attribute(inputs, target=TARGETS), wanted)


@settings(max_examples=10, deadline=None)
@given(chunk=st.integers(1, 40), order=st.permutations([0, 1, 2]))
def test_images_of_a_batch_do_not_see_each_other(chunk, order):
    model, inputs = vit(depth=1).double(), cases.images(3, dtype=torch.float64)
    wanted = IIA(model, n_steps=1).attribute(inputs, target=2)
    found = IIA(model, n_steps=1, chunk_size=chunk).attribute(inputs[order], target=2)
    assert_close(found, wanted[order])
    assert_close(GenericAttention(model).attribute(inputs[order]), GenericAttention(model).attribute(inputs)[order])


# ---------------------------------------------------------------------- what is refused


def test_transformers_take_no_layers():
    with pytest.raises(OptionError, match=r"layers: must be None for IIA, .* got 'blocks\.1'"):
        IIA(vit(), "blocks.1").attribute(cases.images())


def test_windows_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"'layers\.0\.blocks\.0\.attn' \(WindowAttention\)"):
        IIA(cases.swin()).attribute(cases.images(size=16))


def test_cnns_take_one_layer():
    with pytest.raises(OptionError, match="layers: must be 1 for IIA with mode='double', got 2"):
        IIA(cases.resnet(), ["layer3", "layer4"]).attribute(cases.images())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_steps": 0}, "n_steps: must be a positive integer"),
        ({"n_steps": 2.0}, "n_steps: must be a positive integer"),
        ({"mode": "single"}, "mode: must be one of 'double', 'released', 'triple', got 'single'"),
        ({"score": "odds"}, "score: must be one of"),
        ({"chunk_size": 0}, "chunk_size: must be a positive integer"),
    ],
)
def test_options_are_checked(options, said):
    with pytest.raises(OptionError, match=said):
        IIA(cases.resnet(), **options)
