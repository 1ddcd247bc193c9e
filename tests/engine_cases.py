"""Tiny models, references and a guard that the tests of the engine share."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attrib_zoo.backbone.grid import Grid, Tap

CLASSES = 5


def checkpointed(model: nn.Module) -> nn.Module:
    """A model of timm's that runs its blocks again in the backward pass."""
    model.set_grad_checkpointing()
    return model


def hollow(name: str) -> nn.Module:
    """A model of timm's without storage, where this version can make it so."""
    timm = pytest.importorskip("timm")
    try:
        with torch.device("meta"):
            return timm.create_model(name)
    except (NotImplementedError, RuntimeError):  # older versions read numbers from tensors while a model is made
        return timm.create_model(name)


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """No parameter or statistic at a value that hides mistakes (zero heads, zero biases, unit variances)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.uniform_(-0.5, 0.5, generator=generator)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.3, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0.0, fan_in**-0.5, generator=generator)
                if module.bias is not None:
                    module.bias.uniform_(-0.2, 0.2, generator=generator)
            elif not isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
                for parameter in module.parameters(recurse=False):  # position embeddings and the like
                    parameter.normal_(0.0, 0.2, generator=generator)
    return model.eval()


class ResNet(nn.Module):
    """torchvision's residual blocks, with the names of its ResNet, at a tenth of the width.

    Their ReLU works in place and is one module that runs two (BasicBlock) or three times (Bottleneck) in a block.
    """

    def __init__(self, kind: str = "BasicBlock", layers: Sequence[int] = (1, 1, 1, 2)) -> None:
        from torchvision.models import resnet

        super().__init__()
        block = getattr(resnet, kind)
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        planes = 8
        for stage, count in enumerate(layers):
            width, stride = 8 + 4 * stage, 1 + (stage in (1, 3))
            shape = (planes, width * block.expansion)
            shortcut = nn.Sequential(nn.Conv2d(*shape, 1, stride, bias=False), nn.BatchNorm2d(shape[1]))
            first = block(planes, width, stride, shortcut if stride > 1 or planes != shape[1] else None)
            planes = shape[1]
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, *(block(planes, width) for _ in range(1, count))))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(planes, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


class SmallVGG(nn.Module):
    """VGG-16's sequence of layers at a hundredth of its width."""

    def __init__(self) -> None:
        from torchvision.models.vgg import cfgs, make_layers

        super().__init__()
        widths = [w if w == "M" else 2 + w // 128 for w in cfgs["D"]]
        self.features = make_layers(widths)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def resnet() -> nn.Module:
    return lively(ResNet())


def bottleneck() -> nn.Module:
    return lively(ResNet("Bottleneck", (1, 1, 1, 1)))


def vit(**options: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "global_pool": "avg"}
    return lively(VisionTransformer(num_classes=CLASSES, **{**shape, **options}))


def fused_vit() -> nn.Module:
    """torchvision's, whose attention takes another kernel without grad; all tokens count, not the first alone."""
    from torchvision.models.vision_transformer import VisionTransformer

    class MeanPooled(VisionTransformer):
        def forward(self, x: Tensor) -> Tensor:
            tokens = self._process_input(x)
            tokens = torch.cat([self.class_token.expand(len(x), -1, -1), tokens], 1)
            return self.heads(self.encoder(tokens).mean(1))

    return lively(MeanPooled(32, 8, 2, 2, 24, 48, num_classes=CLASSES))


def swin() -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    return lively(
        SwinTransformer(
            img_size=16, patch_size=2, window_size=4, embed_dim=12, depths=(2, 1), num_heads=(2, 3), num_classes=CLASSES
        )
    )


def swin_of(size: tuple[int, int]) -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    shape = {"patch_size": 4, "embed_dim": 8, "depths": (1, 1, 1), "num_heads": (1, 2, 4), "window_size": 2}
    return lively(SwinTransformer(img_size=size, num_classes=5, **shape))


def densenet() -> nn.Module:
    from timm.models.densenet import DenseNet

    return lively(DenseNet(growth_rate=8, block_config=(2, 2), num_classes=CLASSES))


def images(count: int = 2, size: int = 32, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def grid_of(shape: Sequence[int], *, nhwc: bool = False) -> Grid:
    """The layout of an activation of this shape; tokens are a square and what is left over before it."""
    if len(shape) == 4:
        return Grid("nhwc" if nhwc else "nchw")
    side = int(shape[1] ** 0.5)
    return Grid("tokens", prefix=shape[1] - side**2, hw=(side, side))


def tap(name: str, grid: Grid | None = None, channels: int = 0, **fields: Any) -> Tap:
    return Tap(name=name, grid=grid or Grid("nchw"), channels=channels, **fields)


def watch(model: nn.Module, name: str, seen: Callable[[int, Any], Any]) -> Any:
    """A plain hook that hands ``seen`` the number of the call and the output; what it returns replaces it."""
    calls = iter(range(10**6))
    return model.get_submodule(name).register_forward_hook(lambda _, __, output: seen(next(calls), output))


def survey(model: nn.Module, inputs: Tensor) -> dict[str, list[tuple[int, ...] | None]]:
    """For every named module, the shape of what each call puts out (``None`` where that is no tensor)."""
    shapes: dict[str, list[tuple[int, ...] | None]] = {}
    handles = [
        watch(model, name, lambda _, out, name=name: shapes.setdefault(name, []).append(getattr(out, "shape", None)))
        for name, _ in model.named_modules()
        if name
    ]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return shapes


def out_of_place(model: nn.Module) -> nn.Module:
    """A copy in which no module works in place."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    return twin


def reference(
    model: nn.Module, inputs: Tensor, taps: Sequence[tuple[str, int]], args: Sequence[Any] = ()
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Outputs, activations and gradients of the sum of each image's class 1, by one plain backward pass.

    ``taps`` are pairs (name, call).
    """
    twin = out_of_place(model)
    kept: dict[int, Tensor] = {}

    def keep(position: int, wanted: int) -> Callable[[int, Tensor], Tensor | None]:
        def seen(call: int, output: Tensor) -> Tensor | None:
            if call != wanted:
                return None
            output.retain_grad()
            kept[position] = output
            return output.clone()  # `out += identity` behind the layer must not touch what is kept

        return seen

    for position, (name, call) in enumerate(taps):
        watch(twin, name, keep(position, call))
    with torch.inference_mode(False), torch.enable_grad():
        clean = inputs.detach().clone().requires_grad_()
        outputs = twin(clean, *args)
        outputs[:, 1].sum().backward()
    found = [kept[position] for position in range(len(taps))]
    return outputs.detach(), [a.detach() for a in found], [a.grad for a in found]  # type: ignore[misc]


def full_forward(twin: nn.Module, inputs: Tensor, at: Tap, maps: Tensor, args: Sequence[Any] = ()) -> Tensor:
    """All of an out-of-place copy, with a plain hook that puts ``maps`` in place of what the tap says."""

    def put_in(number: int, output: Tensor) -> Tensor | None:
        return at.grid.from_map(maps, output).clone() if number == at.call % at.calls else None

    handle = watch(twin, at.name, put_in)
    try:
        return twin(inputs.clone(), *args)
    finally:
        handle.remove()


HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called", "_state_dict_hooks",
)  # fmt: skip


def _state(model: nn.Module) -> list[tuple[str, Any]]:
    state: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        own = vars(module)
        state += [(f"{name}: __dict__", list(own)), (f"{name}: forward", own.get("forward"))]
        state += [(f"{name}: {kind}", list(own.get(kind, {}).items())) for kind in HOOKS]
        state += [(f"{name}: training", module.training), (f"{name}: class", type(module))]
        state.append((f"{name}: compiled", module._compiled_call_impl))
    for name, parameter in model.named_parameters():
        state += [(f"{name}: requires_grad", parameter.requires_grad), (f"{name}: grad", id(parameter.grad))]
    state.append(("grad mode", torch.is_grad_enabled()))
    state.append(("inference mode", torch.is_inference_mode_enabled()))
    state.append(("global hooks", len(nn.modules.module._global_forward_hooks)))
    state.append(("random state", (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()))))
    return state


class Guard:
    """Remembers a model, some tensors and the modes of torch; ``check`` says what has changed since."""

    def __init__(self, model: nn.Module, *tensors: Tensor) -> None:
        self._model = model
        self._values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._values |= {f"tensor {i}": t for i, t in enumerate(tensors)}
        self._values |= {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
        self._before = {name: value.detach().clone() for name, value in self._values.items()}
        self._flags = {name: value.requires_grad for name, value in self._values.items()}
        self._state = _state(model)

    def check(self) -> None:
        for (what, old), (_, new) in zip(self._state, _state(self._model), strict=True):
            assert old == new, f"left behind: {what}"
        for name, value in self._values.items():
            assert torch.equal(self._before[name], value), f"changed: {name}"
            assert self._flags[name] == value.requires_grad, f"changed: {name}.requires_grad"


@contextmanager
def untouched(model: nn.Module, *tensors: Tensor) -> Iterator[None]:
    """The block leaves the model, these tensors and the modes of torch as they were, also when it raises."""
    guard = Guard(model, *tensors)
    try:
        yield
    finally:
        guard.check()
