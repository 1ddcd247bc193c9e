"""A multi-label head for VOC 2007: the last layer alone is trained, on the frozen model's features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from attrib_zoo.benchmark.protocols.backbones import Backbone, last_linear, replace_last
from attrib_zoo.benchmark.protocols.datasets import VOC_CLASSES, VOCImage, presence
from attrib_zoo.errors import DataError
from attrib_zoo.models.photos import Photos
from attrib_zoo.models.weights import read_weights
from attrib_zoo.training.files import write_whole

_LR, _DECAY = 1e-2, 1e-3


def give_head(
    backbone: Backbone,
    images: Sequence[VOCImage],
    path: Path,
    *,
    steps: int = 500,
    batch_size: int = 32,
    workers: int = 0,
) -> None:
    """Replace the model's last layer by one for VOC's 20 classes, with a sigmoid loss; read from the file if it exists.

    One pass over the images, then gradient steps (Adam) of the logistic loss on all of their features at once: the
    features are standardised for that, which is folded into the layer afterwards.

    Args:
        backbone: its model changes.
        images: the training images.
        path: the file that keeps the layer.
        steps: of the optimiser.
        batch_size: images per pass.
        workers: processes that read images.
    """
    from safetensors.torch import save

    _, old = last_linear(backbone.model)
    layer = nn.Linear(old.in_features, len(VOC_CLASSES))
    if path.exists():
        state = read_weights(path)
        if {name: value.shape for name, value in state.items()} != {n: p.shape for n, p in layer.state_dict().items()}:
            raise DataError(f"head: '{path}' is not of this backbone; remove it, or choose another --output")
        layer.load_state_dict(state)
    else:
        loader = DataLoader(Photos([i.path for i in images], backbone.whole()), batch_size, num_workers=workers)
        weight, bias = fit_logistic(_features(backbone, old, loader), presence(images), steps)
        layer.load_state_dict({"weight": weight, "bias": bias})
        write_whole(path, save(dict(layer.state_dict())))
    replace_last(backbone.model, layer.to(backbone.device).eval())


def _features(backbone: Backbone, layer: nn.Linear, loader: DataLoader[Tensor]) -> Tensor:
    """The input of the last layer for each image, ``(N, D)`` on the CPU."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float().cpu()))
    try:
        with torch.no_grad():
            for batch in loader:
                backbone.model(batch.to(backbone.device))
    finally:
        hook.remove()
    return torch.cat(seen)


def fit_logistic(features: Tensor, labels: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Weight ``(K, D)`` and bias ``(K,)`` of K logistic regressions of labels ``(N, K)`` on features ``(N, D)``."""
    mean, std = features.mean(0), features.std(0, correction=0)
    std = torch.where(std > 0, std, torch.ones_like(std))
    scaled = (features - mean) / std
    share = labels.mean(0).clamp(1 / (2 * len(labels)), 1 - 1 / (2 * len(labels)))
    weight = torch.zeros(labels.shape[1], features.shape[1], requires_grad=True)
    bias = share.logit().requires_grad_()
    optimizer = torch.optim.AdamW([weight, bias], lr=_LR / features.shape[1] ** 0.5, weight_decay=_DECAY)
    with torch.enable_grad():
        for _ in range(steps):
            loss = F.binary_cross_entropy_with_logits(scaled @ weight.T + bias, labels)
            weight.grad, bias.grad = torch.autograd.grad(loss, [weight, bias])
            optimizer.step()
    weight, bias = weight.detach(), bias.detach()
    return (weight / std).contiguous(), bias - (weight / std) @ mean
