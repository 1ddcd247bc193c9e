"""What the tests of the attention methods share: small transformers, and their attention written out head by head.

Every matrix is an ordinary tensor in the graph, so that autograd says its gradient; images go through one by one.
Written from the formulas of the papers, without a line of the library.
"""

from __future__ import annotations

from collections.abc import Callable

import engine_cases as cases
import torch
from torch import Tensor, nn

TARGETS = [3, 1]


def vit(**options):
    return cases.vit(**{"global_pool": "token", "depth": 3, **options})


def distilled():
    from timm.models.deit import VisionTransformerDistilled

    return cases.lively(
        VisionTransformerDistilled(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=5)
    )


def torchvision_vit():
    from torchvision.models.vision_transformer import VisionTransformer

    return cases.lively(VisionTransformer(32, 8, 3, 2, 24, 48, num_classes=5))


ARCHITECTURES = {
    "class token": (vit, 1, [0]),
    "registers": (lambda: vit(reg_tokens=4), 5, [0]),
    "distilled": (distilled, 2, [0, 1]),
    "q and k norms, layer scale": (lambda: vit(qk_norm=True, init_values=0.7), 1, [0]),
    "no bias": (lambda: vit(qkv_bias=False), 1, [0]),
    "not square": (lambda: vit(img_size=(32, 56)), 1, [0]),
    "mean of the patches": (lambda: vit(global_pool="avg"), 1, list(range(1, 17))),
    "no class token": (lambda: vit(global_pool="avg", class_token=False), 0, list(range(16))),
    "torchvision": (torchvision_vit, 1, [0]),
}


def sized_images(name: str) -> Tensor:
    width = 56 if name == "not square" else 32
    return torch.randn(2, 3, 32, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def read_out(relations: Tensor, prefix: int, read: list[int], images: Tensor) -> Tensor:
    """The mean of the rows, patch by patch."""
    h, w = images.shape[2] // 8, images.shape[3] // 8
    found = torch.zeros(h, w, dtype=relations.dtype)
    for i in range(h):
        for j in range(w):
            found[i, j] = sum(relations[row, prefix + i * w + j] for row in read) / len(read)
    return found


def assert_close(found: Tensor, wanted: Tensor, relative: float = 1e-9) -> None:
    assert found.shape == wanted.shape
    assert float(wanted.std()) > 0
    assert float((found - wanted).abs().max()) <= relative * float(wanted.abs().max())


# ---------------------------------------------------------------------- attention written out

Change = Callable[[int, int, Tensor], Tensor]


def run(model: nn.Module, image: Tensor, change: Change | None = None) -> tuple[Tensor, list[list[Tensor]]]:
    """Logits ``(K,)`` of one image ``(C, H, W)`` and each block's matrices, one ``(T, T)`` per head.

    ``change(block, head, matrix)`` may put another matrix in a head's place.
    """
    timm = hasattr(model, "blocks")
    if timm:
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(image[None]))))
    else:
        x = model._process_input(image[None])
        x = torch.cat([model.class_token, x], 1) + model.encoder.pos_embedding
    matrices = []
    for number, block in enumerate(model.blocks if timm else model.encoder.layers):
        normed = (block.norm1 if timm else block.ln_1)(x)[0]
        found, out = attention(block.attn if timm else block.self_attention, number, normed, change)
        matrices.append(found)
        if timm:
            x = x + block.ls1(out)
            x = x + block.ls2(block.mlp(block.norm2(x)))
        else:
            x = x + out
            x = x + block.mlp(block.ln_2(x))
    if timm:
        return model.forward_head(model.norm(x))[0], matrices
    return model.heads(model.encoder.ln(x)[:, 0])[0], matrices


def attention(module: nn.Module, number: int, tokens: Tensor, change: Change | None) -> tuple[list[Tensor], Tensor]:
    torchvision = isinstance(module, nn.MultiheadAttention)
    weight, bias = (module.in_proj_weight, module.in_proj_bias) if torchvision else (module.qkv.weight, module.qkv.bias)
    mixed = tokens @ weight.T + (0 if bias is None else bias)
    width = mixed.shape[1] // 3
    d = width // module.num_heads
    found, contexts = [], []
    for head in range(module.num_heads):
        q, k, v = (mixed[:, part * width + head * d : part * width + (head + 1) * d] for part in range(3))
        if not torchvision:
            q, k = module.q_norm(q), module.k_norm(k)
        dots = q @ k.T / d**0.5
        matrix = dots.exp() / dots.exp().sum(1, keepdim=True)
        if change is not None:
            matrix = change(number, head, matrix)
        found.append(matrix)
        contexts.append(matrix @ v)
    out = module.out_proj if torchvision else module.proj
    return found, out(torch.cat(contexts, 1))[None]


def with_gradients(
    model: nn.Module, image: Tensor, target: int, change: Change | None = None
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Each block's matrices and the gradients of the target's logit with respect to them."""
    held: dict[tuple[int, int], Tensor] = {}

    def leaf(number: int, head: int, matrix: Tensor) -> Tensor:
        matrix = matrix if change is None else change(number, head, matrix)
        if not matrix.requires_grad:
            matrix.requires_grad_()
        held[number, head] = matrix
        return matrix

    with torch.enable_grad():
        logits, matrices = run(model, image, leaf)
        keys = list(held)
        found = dict(zip(keys, torch.autograd.grad(logits[target], [held[key] for key in keys]), strict=True))
    gradients = [[found[b, h] for h in range(len(row))] for b, row in enumerate(matrices)]
    return [[m.detach() for m in row] for row in matrices], gradients


def positive_mean(matrices: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """Mean over heads of max(0, A * dA), entry by entry."""
    total = torch.zeros_like(matrices[0])
    for matrix, gradient in zip(matrices, gradients, strict=True):
        product = matrix * gradient
        total += torch.where(product > 0, product, torch.zeros_like(product))
    return total / len(matrices)


def rollout(steps: list[Tensor]) -> Tensor:
    """Row-normalised steps, with the identity, multiplied from the first block on."""
    eye = torch.eye(len(steps[0]), dtype=steps[0].dtype)
    total = eye
    for step in steps:
        kept = step + eye
        total = (kept / kept.sum(1)[:, None]) @ total
    return total
