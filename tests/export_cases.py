"""Explainers that the tests of programs and of their files share: small, fitted in no time."""

from __future__ import annotations

import engine_cases as cases
import strategies as zoo
from torch import nn

from attrib_zoo import CAM, TTAME, LCAMFm, LCAMImg
from attrib_zoo.synthetic import tiny_cnn, tiny_vit

QUIET = {"show_progress": False}


def images(count: int = 3, size: int = 32, seed: int = 5):
    return zoo.normal(count, 3, size, size, seed=seed).float()


def cnn() -> nn.Module:
    return cases.lively(tiny_cnn(num_classes=5, width=4))


def vit() -> nn.Module:
    return cases.lively(tiny_vit(num_classes=5, dim=16, depth=3))


def rows(model=None, layers=None, **options) -> TTAME:
    explainer = TTAME(cnn() if model is None else model, layers, recipe="rows", **options)
    return explainer.fit([images(4)], max_steps=0, **QUIET)


def attended(**options) -> TTAME:
    return TTAME(vit(), recipe="attended", **options).fit([images(4)], max_steps=0, **QUIET)


def paper(model=None, **options) -> TTAME:
    """Three layers of different sizes, with branches; that not all classes were seen is known."""
    explainer = TTAME(cnn() if model is None else model, recipe="paper", **options)
    explainer.fit([images(8)], max_steps=30, lr=1e-2, **QUIET)
    explainer._warned = True
    return explainer


def lcam(cls: type = LCAMImg, **options) -> LCAMImg | LCAMFm:
    return cls(cnn(), start="rows", **options).fit([images(4)], max_steps=0, **QUIET)


EXPLAINERS = {
    "rows": rows,
    "rows of a ViT": lambda **o: rows(vit(), **o),
    "attended": attended,
    "paper": paper,
    "L-CAM-Img": lcam,
    "L-CAM-Fm": lambda **o: lcam(LCAMFm, **o),
    "CAM": lambda **o: CAM(cnn(), **o),
}
