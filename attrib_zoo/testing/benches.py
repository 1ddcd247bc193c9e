"""What the checks run on: four tiny random classifiers with five classes, and images with different decisions.

A bench must be able to fail a wrong method, so each model is calibrated until its decisions spread over all classes,
until a forward argument changes a decision, and no layout hides a mistake (prefix tokens, channels last, images
that are not square, an in-place ReLU, BatchNorm and dropout that reveal a training mode).
"""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrib_zoo.synthetic.networks import seeded

CLASSES = 5
_POOL = 96
_GATES = (1.0, -1.0, 3.0)
_PLAIN = (bool, int, float, str, tuple, type(None))  # what modules hold in tuples is plain too
_REGISTERS = (dict, OrderedDict, set)


class PlannedError(RuntimeError):
    """The failure that a check ordered from a bench model."""


class Fuse:
    """Lets a bench model fail on demand: from its n-th forward on, in its backward, or above a number of rows."""

    def __init__(self) -> None:
        self.forward_in = 0
        self.in_backward = False
        self.rows = 0

    def check(self, features: Tensor) -> Tensor:
        """Pass ``features`` on, or fail as ordered."""
        if self.rows and len(features) > self.rows:
            raise torch.cuda.OutOfMemoryError(f"CUDA out of memory (simulated above {self.rows} rows)")
        if self.forward_in:
            self.forward_in -= 1
            if not self.forward_in:
                self.forward_in = 1  # until it is set to 0, so that a second try fails too
                raise PlannedError("planned failure in forward")
        if self.in_backward:
            out: Tensor = _FailingBackward.apply(features)
            return out
        return features


class _FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        return features.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise PlannedError("planned failure in backward")


class BenchModel(nn.Module):
    """Base of the bench models: ``(N, 3, H, W)`` images, and optional forward arguments, to ``(N, 5)`` logits.

    Attributes:
        explained: the dotted name of a suitable layer: spatial, with a gradient to every logit.
        layout: the layout of its output: ``"nchw"``, ``"nhwc"`` or ``"tokens"`` (N, prefix + h*w, D).
        prefix: how many tokens precede the patches (of 8x8 pixels).
    """

    explained = ""
    layout = ""
    prefix = 0

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fuse = Fuse()
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(width, CLASSES)

    def features(self, inputs: Tensor) -> Tensor:
        """``(N, D)``: what the linear head reads."""
        raise NotImplementedError

    def forward(
        self, inputs: Tensor, gate: Tensor | None = None, scale: Tensor | None = None, mode: str = "plain"
    ) -> Tensor:
        """Logits ``(N, 5)``.

        Args:
            inputs: ``(N, 3, H, W)``.
            gate: ``(N,)``, a factor for each image, so it acts before every layer.
            scale: a factor for all images, without an axis.
            mode: ``"plain"``, or ``"negative"`` for the negative images.
        """
        if gate is not None:
            inputs = inputs * gate.view(-1, 1, 1, 1)
        if scale is not None:
            inputs = inputs * scale
        if mode == "negative":
            inputs = -inputs
        logits: Tensor = self.head(self.dropout(self.fuse.check(self.features(inputs))))
        return logits


class BenchCNN(BenchModel):
    """Three stages of convolution, BatchNorm, in-place ReLU and pooling; mean pooling; linear."""

    explained = "stages.2"
    layout = "nchw"

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__(16)
        widths = (3, 8, 12, 16)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True), nn.MaxPool2d(2))
                for a, b in itertools.pairwise(widths)
            )
        )

    def features(self, inputs: Tensor) -> Tensor:
        """Mean of the last stage over space."""
        maps: Tensor = self.stages(inputs)
        return maps.mean((2, 3))


class _ChannelsLastStage(nn.Module):
    """``(N, h, w, D)`` in and out: a depthwise convolution and an MLP; ``merge`` halves the grid first."""

    def __init__(self, width_in: int, width: int, *, merge: bool) -> None:
        super().__init__()
        self.merge = nn.Conv2d(width_in, width, 2, 2) if merge else None
        self.spatial = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, inputs: Tensor) -> Tensor:
        maps = inputs.permute(0, 3, 1, 2)
        if self.merge is not None:
            maps = self.merge(maps)
        mixed = (maps + self.spatial(maps)).permute(0, 2, 3, 1)
        out: Tensor = mixed + self.mlp(self.norm(mixed))
        return out


class BenchNHWC(BenchModel):
    """Layers with channels last, ``(N, h, w, D)``, as in Swin."""

    explained = "stages.2"
    layout = "nhwc"

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__(20)
        self.stem = nn.Conv2d(3, 12, 4, 4)
        self.stages = nn.Sequential(
            _ChannelsLastStage(12, 12, merge=False),
            _ChannelsLastStage(12, 20, merge=True),
            _ChannelsLastStage(20, 20, merge=False),
        )
        self.norm = nn.LayerNorm(20)

    def features(self, inputs: Tensor) -> Tensor:
        """Normalised mean of the last stage over space."""
        out: Tensor = self.norm(self.stages(self.stem(inputs).permute(0, 2, 3, 1)).mean((1, 2)))
        return out


class _Attention(nn.Module):
    """Self-attention with timm's names, ``fused_attn`` among them."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (width // num_heads) ** -0.5
        self.fused_attn = True
        self.qkv = nn.Linear(width, 3 * width)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        n, length, width = tokens.shape
        q, k, v = self.qkv(tokens).reshape(n, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused_attn:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(-1)) @ v
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(n, length, width))
        return out


class _Block(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = _Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        out: Tensor = tokens + self.mlp(self.norm2(tokens))
        return out


class BenchViT(BenchModel):
    """A plain ViT that reads its class token; 8x8 patches."""

    explained = "blocks.2.norm1"
    layout = "tokens"
    prefix = 1

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__(24)
        self.num_prefix_tokens = self.prefix
        self.patch_embed = nn.Conv2d(3, 24, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, self.prefix, 24) * 0.5)
        self.pos_embed = nn.Parameter(torch.randn(1, self.prefix + (size[0] // 8) * (size[1] // 8), 24) * 0.3)
        self.blocks = nn.Sequential(*(_Block(24, 2) for _ in range(3)))
        self.norm = nn.LayerNorm(24)

    def features(self, inputs: Tensor) -> Tensor:
        """The normalised class token."""
        patches = self.patch_embed(inputs).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], 1) + self.pos_embed
        out: Tensor = self.norm(self.blocks(tokens)[:, 0])
        return out


class BenchRegisters(BenchViT):
    """The same with a second token, a register, before the patches."""

    prefix = 2


MODELS: Mapping[str, tuple[str, Callable[[tuple[int, int]], BenchModel]]] = {
    "cnn": ("cnn", BenchCNN),
    "nhwc": ("cnn", BenchNHWC),
    "vit": ("vit", BenchViT),
    "registers": ("vit", BenchRegisters),
}
"""Name of a bench -> kind of model (as in ``Attribution.models``) and its class."""


@dataclass
class Bench:
    """A model and its inputs.

    Attributes:
        name: one of :data:`MODELS`.
        model: in eval mode, with random weights; its decisions spread over five classes.
        inputs: three images ``(3, 3, H, W)`` with three different decisions.
        gates: ``(3,)``, a forward argument that changes at least one decision.
        batches: two batches of five images; each holds an image of each decision.
        pool: more images ``(M, 3, H, W)``.
    """

    name: str
    model: BenchModel
    inputs: Tensor
    gates: Tensor
    batches: list[Tensor]
    pool: Tensor

    def decisions(self, images: Tensor) -> Tensor:
        """The model's decisions, ``(N,)``."""
        with torch.no_grad():
            logits: Tensor = self.model(images)
        return logits.argmax(1)


def bench(name: str, size: tuple[int, int] = (32, 32), dtype: torch.dtype = torch.float32) -> Bench:
    """A new bench, the same at each call; the global random state is untouched.

    Args:
        name: ``"cnn"``, ``"nhwc"``, ``"vit"`` or ``"registers"``.
        size: H, W in pixels, 16 or more.
        dtype: of the model and the images; the weights are those of float32.
    """
    made = _prototype(name, size)
    inputs, gates, pool, *batches = (
        tensor.to(dtype, copy=True) for tensor in (made.inputs, made.gates, made.pool, *made.batches)
    )
    model = cast("BenchModel", _copied(made.model)).to(dtype)
    return Bench(name, model, inputs, gates, batches, pool)


def _copied(module: nn.Module) -> nn.Module:
    """A copy that shares nothing of a tree of modules; ``copy.deepcopy`` spends its time on their empty registers."""
    new = object.__new__(type(module))
    for name, value in vars(module).items():
        if name == "_modules":
            new.__dict__[name] = {key: None if child is None else _copied(child) for key, child in value.items()}
        elif type(value) in _REGISTERS and not value:
            new.__dict__[name] = type(value)()
        else:
            new.__dict__[name] = value if type(value) in _PLAIN else copy.deepcopy(value)
    return new


@cache
def _prototype(name: str, size: tuple[int, int]) -> Bench:
    for seed in range(50):
        with seeded(seed), torch.inference_mode(False), torch.no_grad():
            model = MODELS[name][1](size)
            pool = _images(size)
            _calibrate(model, pool)
            found = _choose(name, model, pool)
        if found is not None:
            return found
    raise RuntimeError(f"bench {name!r}: no seed gave decisions that differ; this is a fault of the suite")


def _images(size: tuple[int, int]) -> Tensor:
    """Coloured clouds with fine noise, of different brightness."""
    coarse = F.interpolate(torch.randn(_POOL, 3, 4, 4), size=size, mode="bilinear")
    return 1.5 * coarse + 0.3 * torch.randn(_POOL, 3, *size) + 0.4 * torch.randn(_POOL, 3, 1, 1)


def _calibrate(model: BenchModel, pool: Tensor) -> None:
    """Real statistics for BatchNorm, and logits of mean 0 and variance 1 over the pool, so that each class wins."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            module.weight.uniform_(0.7, 1.3)
            module.bias.normal_(0, 0.2)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.train()(pool)
    model.eval()
    model.head.weight.normal_()
    logits = model(pool)
    deviation, mean = torch.std_mean(logits, 0)
    model.head.weight.div_(deviation.unsqueeze(1))
    model.head.bias.sub_(mean).div_(deviation)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1


def _choose(name: str, model: BenchModel, pool: Tensor) -> Bench | None:
    """Three images with three decisions, at least one of which a gate changes by a clear margin; all classes occur."""
    logits = model(pool)
    best = logits.topk(2).values
    clear = (best[:, 0] - best[:, 1]) > 0.3
    decided = logits.argmax(1)
    gated = [model(pool, torch.full((len(pool),), gate)).argmax(1) for gate in _GATES]
    chosen: list[int] = []
    for gate in gated:
        taken = torch.stack([decided[i] for i in chosen]) if chosen else decided[:0]
        usable = clear & ~torch.isin(decided, taken)
        if chosen:
            usable &= gate != decided
        if not bool(usable.any()):
            return None
        chosen.append(int(usable.nonzero()[0]))
    members = [(decided == k).nonzero().flatten() for k in range(CLASSES)]
    if any(len(m) < 2 for m in members):
        return None
    batches = [pool[torch.stack([m[i] for m in members])] for i in range(2)]
    return Bench(name, model, pool[chosen], torch.tensor(_GATES), batches, pool)
