"""The attention head computed densely: upsample every branch, concatenate, fuse all classes (Eq. 8-10 of T-TAME)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def close(found, wanted, tolerance):
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * max(1.0, float(wanted.detach().abs().max())))


def dense_branch(state, i, features, training, skip=True, activation="relu"):
    """Eq. 8 from the tensors of a state dict; the norm's moments written out."""
    weight, bias = state[f"branches.{i}.conv.weight"], state[f"branches.{i}.conv.bias"]
    branch = torch.einsum("oc,nchw->nohw", weight[:, :, 0, 0], features) + bias.view(1, -1, 1, 1)
    if f"branches.{i}.norm.weight" in state:
        names = ("weight", "bias", "running_mean", "running_var")
        gamma, beta, mean, variance = (state[f"branches.{i}.norm.{name}"] for name in names)
        if training:
            mean = branch.mean((0, 2, 3))
            variance = (branch - mean.view(1, -1, 1, 1)).square().mean((0, 2, 3))
        mean, variance, gamma, beta = (v.view(1, -1, 1, 1) for v in (mean, variance, gamma, beta))
        branch = (branch - mean) / (variance + 1e-5).sqrt() * gamma + beta
    if skip:
        branch = branch + features
    return branch.clamp(min=0) if activation == "relu" else 1 / (1 + (-branch).exp())


def dense_head(state, features, training, **options):
    """All class maps ``(N, K, h, w)`` before the sigmoid."""
    size = (max(x.shape[2] for x in features), max(x.shape[3] for x in features))
    grown = [
        F.interpolate(dense_branch(state, i, x, training, **options), size=size, mode="bilinear", align_corners=False)
        for i, x in enumerate(features)
    ]
    weight, bias = state["fuser.weight"], state["fuser.bias"]
    return torch.einsum("kc,nchw->nkhw", weight[:, :, 0, 0], torch.cat(grown, 1)) + bias.view(1, -1, 1, 1)


def mean_of_alike(maps, layers, size):
    """Each cell's mean over the cells around it, with exp(mean cosine of the layers' centred features / 0.3)."""
    height, width = maps.shape[-2:]
    found = torch.zeros_like(maps)
    for n in range(len(maps)):
        centred = [x[n] - x[n].mean((1, 2), keepdim=True) for x in layers]
        for y in range(height):
            for x in range(width):
                total = 0.0
                for j in range(max(0, y - size // 2), min(height, y + size // 2 + 1)):
                    for i in range(max(0, x - size // 2), min(width, x + size // 2 + 1)):
                        cosines = [F.cosine_similarity(f[:, y, x], f[:, j, i], dim=0, eps=1e-12) for f in centred]
                        share = (sum(cosines) / len(layers) / 0.3).exp()
                        found[n, :, y, x] += share * maps[n, :, j, i]
                        total += share
                found[n, :, y, x] /= total
    return found
