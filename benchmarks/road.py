"""What ROAD's imputation costs, beside grad-cam's, on the same images and holes in one run.

    python benchmarks/road.py [batch] [pixels]

10, 20 ... 90 % of the pixels of 16 smooth, noisy images of 224 px are removed by maps like those of a CAM (7 x 7,
enlarged), the same after ReLU with random order among the zeros, and noise. Ours solves the batch at once, grad-cam
(``pytorch_grad_cam.metrics.road.NoisyLinearImputer``) one image after the other by SciPy's direct solver, as its
metrics call it. Seconds are process CPU time of one thread, per image; on a GPU, ours runs there, and wall time
counts. The error is ours against grad-cam's, the largest of any pixel, in standard deviations of its image.
"""

from __future__ import annotations

import sys

from measure import clock, setting, table

import torch
import torch.nn.functional as F
from pytorch_grad_cam.metrics.road import NoisyLinearImputer
from torch import Tensor

from attrib_zoo.metrics import linear_imputation
from attrib_zoo.metrics._maps import ranks

SHARES = tuple(tenth / 10 for tenth in range(1, 10))


def cases(batch: int, size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Images ``(N, 3, S, S)`` and maps ``(N, 1, S, S)`` by kind."""
    torch.manual_seed(0)
    rough = F.interpolate(torch.randn(batch, 3, 28, 28), (size, size), mode="bicubic")
    cam = F.interpolate(torch.randn(batch, 1, 7, 7), (size, size), mode="bilinear")
    maps = {"CAM": cam, "CAM after ReLU": cam.relu(), "noise": torch.rand(batch, 1, size, size)}
    return rough + 0.3 * torch.randn(batch, 3, size, size), maps


def main(batch: int = 16, size: int = 224) -> None:
    images, kinds = cases(batch, size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    placed, std, theirs = images.to(device), images.flatten(1).std(1), NoisyLinearImputer(noise=0.0)
    linear_imputation(placed, torch.rand(batch, size, size, device=device) < 0.5)  # warm
    rows: list[list[object]] = []
    for kind, maps in kinds.items():
        order = ranks(maps, "random", 0)
        spent = [0.0, 0.0]
        for share in SHARES:
            removed = order < round(share * size * size)
            hole = removed.to(device)
            start = clock()
            ours = linear_imputation(placed, hole)
            middle = clock()
            direct = torch.stack([theirs(x, (~m[0]).float()) for x, m in zip(images, removed, strict=True)])
            end = clock()
            error = ((ours.cpu() - direct).abs().flatten(1).amax(1) / std).max().item()
            mine, other = middle - start, end - middle
            spent = [spent[0] + mine, spent[1] + other]
            cells = (f"{1e3 * t / batch:.1f}" for t in (mine, other))
            rows.append([kind, f"{share:.0%}", *cells, f"{other / mine:.1f}", f"{error:.0e}"])
        cells = (f"{1e3 * t / batch / len(SHARES):.1f}" for t in spent)
        rows.append([kind, "**mean**", *cells, f"**{spent[1] / spent[0]:.1f}**", ""])
    print(f"{setting()}; batch {batch}, {size} px\n")
    print(table(rows, ["map", "removed", "ours, ms", "grad-cam, ms", "ratio", "error"]))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
