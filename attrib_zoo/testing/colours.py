"""A net that counts colours, and scenes for it: the evidence for a class is known at every pixel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attrib_zoo.synthetic.networks import seeded


class ColourNet(nn.Module):
    """Three classes, three colours: the logit of a class is how much of its colour the image holds."""

    explained = "stages.2"
    layout = "nchw"
    prefix = 0

    def __init__(self) -> None:
        super().__init__()
        detect = nn.Conv2d(3, 3, 1, bias=False)
        keep = [nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(3)]
        self.stem = nn.Sequential(detect, nn.ReLU())
        self.stages = nn.Sequential(*(nn.Sequential(conv, nn.ReLU(), nn.AvgPool2d(2)) for conv in keep))
        self.head = nn.Linear(3, 3)
        own, others = torch.eye(3), 1 - torch.eye(3)
        with torch.no_grad():
            detect.weight.copy_((own - 0.5 * others)[:, :, None, None])
            for conv in keep:
                conv.weight.zero_()
                conv.weight[:, :, 1, 1] = own
            self.head.weight.copy_(8 * own - 4 * others)
            self.head.bias.zero_()
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``(N, 3)`` of images ``(N, 3, H, W)``."""
        logits: Tensor = self.head(self.stages(self.stem(inputs)).mean((2, 3)))
        return logits


def colour_scenes(
    count: int, size: tuple[int, int] = (32, 32), quadrants: Sequence[int] = (0, 1, 2, 3)
) -> tuple[Tensor, Tensor, Tensor]:
    """Images for :class:`ColourNet`, each with two patches of different colours in two quadrants.

    Args:
        count: how many.
        size: H and W, 32 or more.
        quadrants: which of them hold patches, numbered in rows.

    Returns:
        Images ``(count, 3, H, W)``; the classes of the stronger and the weaker patch, ``(count, 2)``, the model
        predicts the first; and the regions of the two, ``(count, 2, H, W)``, 0 or 1.
    """
    half = (size[0] // 2, size[1] // 2)
    with seeded(0):
        images = 0.2 * torch.randn(count, 3, *size)
        places = torch.zeros(count, 2, *size)
        classes = torch.stack([torch.randperm(3)[:2] for _ in range(count)])
        for n in range(count):
            for j, drawn in enumerate(torch.randperm(len(quadrants))[:2].tolist()):
                top, left = quadrants[drawn] // 2 * half[0] + 3, quadrants[drawn] % 2 * half[1] + 3
                places[n, j, top : top + 10, left : left + 10] = 1
                images[n] -= places[n, j]
                images[n, classes[n, j]] += places[n, j] * (4.5 - 1.5 * j)
    return images, classes, places
