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
