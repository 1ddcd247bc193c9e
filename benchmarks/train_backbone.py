"""A small timm classifier for Tiny-ImageNet-50, trained here, so that explanations of it can be measured with boxes.

    ATTRIB_ZOO_DATA=FOLDER python benchmarks/train_backbone.py resnet10t --output DIR [--epochs 10] [--device cuda]

Images are 64 x 64. Part of the training images is seen through random grids of black patches, some hard, some soft, so
that the masked images of average drop, Score-CAM or T-TAME's training are nothing new to the classifier. Writes
``DIR/NAME.safetensors`` and ``DIR/NAME.json``: accuracy on the validation images, whole and masked, and the setting.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from measure import setting, unpacked

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem, HybridEmbed
from torch import Tensor, nn
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from tqdm.auto import tqdm

CLASSES = 50


def conv_stem_vit(width: int, depth: int, heads: int) -> nn.Module:
    """A class-token ViT of 8 x 8 tokens behind a stem of three convolutions: it learns from 25 000 images."""
    stem = ConvStem(channels=(width // 4, width // 2, width), stride=(2, 2, 2))
    return VisionTransformer(
        img_size=64,
        patch_size=1,  # of the stem's features
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        num_classes=CLASSES,
        embed_layer=partial(HybridEmbed, backbone=stem, proj=False),
    )


BACKBONES: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "resnet10t": (
        partial(timm.create_model, "resnet10t", num_classes=CLASSES, output_stride=8, channels=(32, 64, 128, 256)),
        4e-3,
    ),
    "vit": (partial(conv_stem_vit, 128, 4, 4), 2e-3),
    "resnet18": (partial(timm.create_model, "resnet18", num_classes=CLASSES, output_stride=8), 2e-3),
    "vit_small": (partial(conv_stem_vit, 384, 8, 6), 1e-3),
}
"""Name -> builder and learning rate; all end on 8 x 8 cells. The last two want a GPU."""


def read(folder: Path) -> tuple[Tensor, Tensor, list[Path]]:
    """Images ``(N, 3, 64, 64)`` uint8, classes by rank of the WordNet id, and their paths."""
    paths = sorted(folder.glob("*/*.JPEG"))
    names = sorted({path.parent.name for path in paths})
    images = torch.stack([decode_jpeg(read_file(str(path)), mode=ImageReadMode.RGB) for path in paths])
    return images, torch.tensor([names.index(path.parent.name) for path in paths]), paths


def standardised(images: Tensor) -> Tensor:
    """Of uint8 or [0, 1] images, with ImageNet's mean and std."""
    raw = images.float() / 255 if images.dtype == torch.uint8 else images
    mean, std = (raw.new_tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (raw - mean) / std


def darkened(raw: Tensor) -> Tensor:
    """Raw images behind random 8 x 8 grids of black patches, of which 20 to 100 % are open; half of them soft."""
    count = len(raw)
    share = torch.empty(count, 1, 1, 1, device=raw.device).uniform_(0.2, 1)
    grid = (torch.rand(count, 1, 8, 8, device=raw.device) < share).float()
    hard = F.interpolate(grid, size=raw.shape[-2:])
    soft = F.interpolate(grid, size=raw.shape[-2:], mode="bilinear")
    return raw * torch.where(torch.rand(count, 1, 1, 1, device=raw.device) < 0.5, hard, soft)


def augmented(raw: Tensor) -> Tensor:
    """Shifted by up to 8 pixels, mirrored, half of them behind black patches."""
    padded = F.pad(raw, (8, 8, 8, 8), mode="reflect")
    height, width = raw.shape[-2:]
    shift = torch.randint(17, (len(raw), 2), device=raw.device)
    down = (shift[:, :1] + torch.arange(height, device=raw.device))[:, None, :, None]
    right = shift[:, 1:] + torch.arange(width, device=raw.device)
    mirrored = torch.rand(len(raw), 1, device=raw.device) < 0.5
    right = torch.where(mirrored, right.flip(1), right)[:, None, None, :]
    rows = torch.arange(len(raw), device=raw.device)[:, None, None, None]
    moved = padded[rows, torch.arange(raw.shape[1], device=raw.device)[:, None, None], down, right]
    return torch.where(torch.rand(len(raw), 1, 1, 1, device=raw.device) < 0.5, darkened(moved), moved)


def batches(count: int, size: int) -> Iterator[Tensor]:
    """Indices of whole batches in random order."""
    yield from torch.randperm(count)[: count - count % size].view(-1, size)


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, classes: Tensor, change: Callable[[Tensor], Tensor]) -> float:
    """Share of right decisions, in percent, on raw images that were changed."""
    model.eval()
    device = next(model.parameters()).device
    hits = 0
    for part, truth in zip(images.split(256), classes.split(256), strict=True):
        hits += int((model(standardised(change(part.to(device) / 255))).argmax(1).cpu() == truth).sum())
    return 100 * hits / len(images)


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", choices=BACKBONES)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    folder = unpacked("tiny_imagenet_50")
    images, classes, _ = read(folder / "train")
    build, rate = BACKBONES[options.backbone]
    model = build().to(options.device, memory_format=torch.channels_last)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.05}, {"params": vectors}], weight_decay=0)
    steps = options.epochs * (len(images) // options.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.25)
    start = time.process_time()
    bar = tqdm(total=steps, unit="step", mininterval=10)
    for _ in range(options.epochs):
        model.train()
        for chosen in batches(len(images), options.batch):
            raw = images[chosen].to(options.device).float() / 255
            with torch.autocast(torch.device(options.device).type, torch.bfloat16):
                scores = model(standardised(augmented(raw)).contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(scores.float(), classes[chosen].to(options.device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    bar.close()
    spent = time.process_time() - start
    validation, truth, _ = read(folder / "val")
    whole = accuracy(model, validation, truth, lambda raw: raw)
    masked = accuracy(model, validation, truth, darkened)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(state, options.output / f"{options.backbone}.safetensors")
    facts = {
        "backbone": options.backbone,
        "weights": sum(p.numel() for p in model.parameters()),
        "epochs": options.epochs,
        "batch": options.batch,
        "seed": options.seed,
        "images": len(images),
        "processor seconds": round(spent),
        "accuracy": round(whole, 1),
        "accuracy behind black patches": round(masked, 1),
        "setting": setting(),
    }
    (options.output / f"{options.backbone}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
