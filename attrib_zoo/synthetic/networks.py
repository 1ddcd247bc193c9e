"""Two classifiers small enough to be trained in seconds on a CPU: a slim VGG and a plain ViT.

Their modules have the names that timm uses (``stem``, ``stages``, ``blocks``, ``norm1``, ``attn.qkv``, ...), and
``default_cfg`` says how their inputs are normalised, so whatever works on timm models works on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN = 0.5
STD = 0.25


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from ``seed`` inside; the global CPU generator is restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one CPU core inside: with tiny tensors more threads mostly wait, on a busy machine far too long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _config(size: int, num_classes: int) -> dict[str, Any]:
    return {"mean": (MEAN,) * 3, "std": (STD,) * 3, "input_size": (3, size, size), "num_classes": num_classes}


def _conv(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


class TinyCNN(nn.Module):
    """A slim VGG: a stem, three stages of two convolutions at full, half and quarter size, mean pooling, linear."""

    def __init__(self, num_classes: int, width: int, size: int) -> None:
        super().__init__()
        w = width
        self.default_cfg = _config(size, num_classes)
        self.stem = _conv(3, w, stride=2 if size > 48 else 1)
        self.stages = nn.Sequential(
            nn.Sequential(_conv(w, w), _conv(w, w)),
            nn.Sequential(nn.MaxPool2d(2), _conv(w, 2 * w), _conv(2 * w, 2 * w)),
            nn.Sequential(nn.MaxPool2d(2), _conv(2 * w, 4 * w), _conv(4 * w, 4 * w)),
        )
        self.head = nn.Linear(4 * w, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``(N, K)`` of images ``(N, 3, H, W)``."""
        logits: Tensor = self.head(self.stages(self.stem(inputs)).mean((2, 3)))
        return logits


class Attention(nn.Module):
    """Multi-head self-attention over tokens ``(N, T, D)``."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``(N, T, D)`` in, tokens out."""
        n, t, d = tokens.shape
        q, k, v = self.qkv(tokens).reshape(n, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d))
        return mixed


class Block(nn.Module):
    """A pre-norm encoder block with an MLP of ratio 2."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``(N, T, D)`` in, tokens out."""
        tokens = tokens + self.attn(self.norm1(tokens))
        out: Tensor = tokens + self.mlp(self.norm2(tokens))
        return out


class TinyViT(nn.Module):
    """A plain ViT: patch embedding, class token, learned positions, encoder blocks, linear on the class token."""

    def __init__(self, num_classes: int, dim: int, depth: int, size: int) -> None:
        super().__init__()
        patch = size // 8
        self.default_cfg = _config(size, num_classes)
        self.num_prefix_tokens = 1
        self.patch_embed = nn.Conv2d(3, dim, patch, patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, dim) * 0.02)
        self.blocks = nn.Sequential(*(Block(dim, num_heads=4) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``(N, K)`` of images ``(N, 3, size, size)``."""
        patches = self.patch_embed(inputs).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], 1) + self.pos_embed
        logits: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return logits


def tiny_cnn(num_classes: int = 6, *, width: int = 16, size: int = 32, seed: int = 0) -> nn.Module:
    """A slim VGG with random weights (70 000 of them), in eval mode.

    Feature maps of ``width``, 2 ``width`` and 4 ``width`` channels at 32, 16 and 8 px of a 32 px image; the stem
    halves images above 48 px first.

    Args:
        num_classes: K, the number of logits.
        width: Channels of the first stage.
        size: Side of the images in pixels; other sizes work too.
        seed: For the initial weights; the global generator is not used.

    Returns:
        A model from ``(N, 3, H, W)`` to ``(N, K)``.
    """
    with seeded(seed):
        return TinyCNN(num_classes, width, size).eval()


def tiny_vit(num_classes: int = 6, *, dim: int = 64, depth: int = 4, size: int = 32, seed: int = 0) -> nn.Module:
    """A plain ViT with a class token and 8×8 patches, random weights (140 000 of them), in eval mode.

    Args:
        num_classes: K, the number of logits.
        dim: Width D of a token; a multiple of 4, the number of heads.
        depth: Number of encoder blocks.
        size: Side of the images in pixels, a multiple of 8; no other size works afterwards.
        seed: For the initial weights; the global generator is not used.

    Returns:
        A model from ``(N, 3, size, size)`` to ``(N, K)``.
    """
    with seeded(seed):
        return TinyViT(num_classes, dim, depth, size).eval()
