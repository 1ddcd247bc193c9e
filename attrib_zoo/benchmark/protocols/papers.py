"""What the papers print, table by table, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = ("AD(100)", "IC(100)", "AD(50)", "IC(50)", "AD(15)", "IC(15)")
ROAD = ("ROAD MoRF", "ROAD LeRF")
LOCALIZATION = ("EBPG", "mIoU", "Bbox")
DROP = ("Drop%", "Increase%")


@dataclass(frozen=True)
class Printed:
    """One backbone's part of a printed table, in percent as printed.

    Attributes:
        paper: ``"ttame"``, ``"lcam"`` or ``"sise"``.
        table: as the paper calls it.
        backbone: as ``--backbone`` calls it.
        measures: as our tables call them.
        rows: method -> a number for each measure, in the table's order.
        passes: method -> forward passes per image, where printed.
        remarks: misprints and contradictions that the reader should know of.
    """

    paper: str
    table: str
    backbone: str
    measures: tuple[str, ...]
    rows: Mapping[str, tuple[float, ...]]
    passes: Mapping[str, int]
    remarks: tuple[str, ...] = ()


def _columns(methods: Sequence[str], *lines: Sequence[float]) -> dict[str, tuple[float, ...]]:
    """Rows from a table that is printed with a line for each measure and a column for each method."""
    return {method: tuple(line[i] for line in lines) for i, method in enumerate(methods)}


def _passes(methods: Sequence[str], counts: Sequence[int]) -> dict[str, int]:
    return dict(zip(methods, counts, strict=True))


_CNN = ("Grad-CAM", "Grad-CAM++", "Score-CAM", "Ablation-CAM", "RISE", "IIA", "L-CAM-Img", "T-TAME")
_VIT = ("Grad-CAM", "Grad-CAM++", "Score-CAM", "Ablation-CAM", "RISE", "Transformer LRP", "IIA", "T-TAME")
_VGG_PASSES = _passes(_CNN, (1, 1, 512, 2048, 4000, 12, 1, 1))
_RESNET_PASSES = _passes(_CNN, (1, 1, 2048, 8192, 8000, 12, 1, 1))
_VIT_PASSES = _passes(_VIT, (1, 1, 768, 768, 8000, 1, 44, 1))

_TTAME = (
    Printed(
        "ttame",
        "Table 2",
        "vgg16",
        CONFIDENCE,
        _columns(
            _CNN,
            (32.12, 30.75, 27.75, 34.87, 8.74, 25.42, 12.15, 9.33),
            (22.10, 22.05, 22.80, 19.25, 51.30, 22.90, 40.75, 50.00),
            (58.65, 54.11, 45.60, 49.23, 42.42, 64.43, 37.37, 36.50),
            (9.50, 11.15, 14.10, 11.45, 17.55, 5.60, 20.25, 22.45),
            (84.15, 82.72, 75.70, 76.96, 78.70, 87.68, 74.23, 73.29),
            (2.20, 3.15, 4.30, 36.50, 4.45, 1.45, 4.45, 5.60),
        ),
        _VGG_PASSES,
        (
            "IC(15) of Ablation-CAM is printed as 36.50, beside 1.45 to 5.60 for the others: perhaps 3.65",
            "IC(100) of L-CAM-Img is 40.75 here and 40.95 in the L-CAM paper's Table 1 (row L-CAM-Img†)",
            "Ablation-CAM's 2048 forward passes are four for each of 512 feature maps",
        ),
    ),
    Printed(
        "ttame",
        "Table 2",
        "resnet50",
        CONFIDENCE,
        _columns(
            _CNN,
            (13.61, 13.63, 11.01, 13.58, 11.12, 21.58, 11.09, 7.81),
            (38.10, 37.95, 39.55, 37.05, 46.15, 26.90, 43.75, 54.00),
            (29.28, 30.37, 26.80, 30.33, 36.31, 41.31, 29.12, 27.88),
            (23.05, 23.45, 24.75, 22.30, 21.55, 14.95, 24.10, 27.50),
            (78.61, 79.58, 78.72, 79.62, 82.05, 87.84, 79.41, 78.58),
            (3.40, 3.40, 3.60, 3.50, 3.20, 1.45, 3.90, 4.90),
        ),
        _RESNET_PASSES,
    ),
    Printed(
        "ttame",
        "Table 3",
        "vit_b_16",
        CONFIDENCE,
        _columns(
            _VIT,
            (37.19, 57.21, 38.09, 35.50, 13.52, 67.07, 56.54, 8.19),
            (12.75, 5.55, 15.35, 8.90, 37.00, 2.25, 8.05, 38.35),
            (40.74, 72.77, 44.20, 42.16, 31.94, 63.19, 64.01, 23.64),
            (12.30, 4.85, 14.50, 10.55, 33.10, 3.90, 7.65, 40.40),
            (73.11, 92.51, 77.50, 80.86, 79.56, 88.68, 86.44, 72.89),
            (5.40, 0.80, 4.85, 2.95, 6.85, 0.90, 4.00, 9.40),
        ),
        _VIT_PASSES,
        (
            "the authors' code explains timm's deit_base_patch16_224 in the columns Grad-CAM, Grad-CAM++, Score-CAM, "
            "Ablation-CAM and Transformer LRP; here all methods explain vit_b_16",
        ),
    ),
    Printed(
        "ttame",
        "Table 4",
        "vgg16",
        ROAD,
        _columns(
            _CNN,
            (21.40, 23.14, 22.54, 20.51, 22.78, 32.07, 19.32, 17.74),
            (71.22, 72.26, 73.46, 73.47, 76.08, 64.21, 70.75, 73.50),
        ),
        _VGG_PASSES,
    ),
    Printed(
        "ttame",
        "Table 4",
        "resnet50",
        ROAD,
        _columns(
            _CNN,
            (25.95, 27.15, 28.70, 27.20, 23.80, 32.46, 24.62, 25.83),
            (80.35, 79.22, 78.50, 79.16, 80.58, 73.95, 76.69, 75.35),
        ),
        _RESNET_PASSES,
    ),
    Printed(
        "ttame",
        "Table 5",
        "vit_b_16",
        ROAD,
        _columns(
            _VIT,
            (29.29, 51.74, 35.00, 36.68, 38.77, 29.28, 42.37, 26.48),
            (78.49, 69.64, 67.95, 78.51, 82.81, 81.52, 73.97, 81.60),
        ),
        _VIT_PASSES,
    ),
)

VARIANTS = (
    "T-TAME",
    "No skip connection",
    "No skip + No batch norm",
    "Sigmoid in feature branch",
    "FMs from two layers",
    "FMs from one layer",
)
"""Rows of T-TAME's Table 6."""


def _ablation(backbone: str, *rows: tuple[float, ...]) -> Printed:
    return Printed("ttame", "Table 6", backbone, CONFIDENCE, dict(zip(VARIANTS, rows, strict=True)), {})


_ABLATIONS = (
    _ablation(
        "vgg16",  # max-pooling layers, those of Table 2
        (9.33, 50.0, 36.5, 22.45, 73.29, 5.6),
        (10.09, 45.25, 36.44, 20.65, 74.85, 5.15),
        (5.92, 57.9, 34.49, 24.2, 74.58, 5.15),
        (7.22, 55.65, 38.4, 21.6, 79.0, 4.85),
        (10.72, 45.45, 34.48, 23.05, 71.94, 5.75),
        (12.1, 42.1, 35.81, 20.8, 74.19, 4.85),
    ),
    _ablation(
        "resnet50",
        (7.81, 54.0, 27.88, 27.5, 78.58, 4.9),
        (5.7, 62.65, 46.58, 18.25, 89.32, 2.3),
        (9.29, 50.25, 29.43, 25.95, 79.81, 3.95),
        (9.11, 53.3, 45.68, 18.1, 86.95, 3.15),
        (9.48, 47.05, 27.83, 25.0, 77.95, 4.25),
        (11.32, 43.45, 29.85, 24.25, 79.59, 3.55),
    ),
    _ablation(
        "vit_b_16",
        (8.19, 38.35, 23.64, 40.40, 72.89, 9.40),
        (10.16, 38.65, 24.42, 41.65, 73.0, 9.35),
        (8.91, 36.75, 24.79, 39.75, 72.98, 8.70),
        (12.75, 35.50, 26.79, 38.85, 72.99, 8.85),
        (9.23, 37.70, 24.08, 40.0, 73.69, 9.15),
        (9.88, 37.60, 24.96, 40.20, 72.97, 9.40),
    ),
)

_LCAM = (
    Printed(
        "lcam",
        "Table 1",
        "vgg16",
        CONFIDENCE,
        {
            "Grad-CAM": (32.12, 22.1, 58.65, 9.5, 84.15, 2.2),
            "Grad-CAM++": (30.75, 22.05, 54.11, 11.15, 82.72, 3.15),
            "Score-CAM": (27.75, 22.8, 45.6, 14.1, 75.7, 4.3),
            "RISE": (8.74, 51.3, 42.42, 17.55, 78.7, 4.45),
            "L-CAM-Fm*": (20.63, 31.05, 51.34, 13.45, 82.4, 3.05),
            "L-CAM-Fm": (16.47, 35.4, 47.0, 14.45, 79.39, 3.65),
            "L-CAM-Img*": (18.01, 37.2, 50.88, 12.05, 82.1, 3.0),
            "L-CAM-Img": (12.96, 41.25, 45.56, 14.9, 78.14, 4.2),
            "L-CAM-Img†": (12.15, 40.95, 37.37, 20.25, 74.23, 4.45),
        },
        {"Grad-CAM": 1, "Grad-CAM++": 1, "Score-CAM": 512, "RISE": 4000}
        | dict.fromkeys(("L-CAM-Fm*", "L-CAM-Fm", "L-CAM-Img*", "L-CAM-Img", "L-CAM-Img†"), 1),
    ),
    Printed(
        "lcam",
        "Table 1",
        "resnet50",
        CONFIDENCE,
        {
            "Grad-CAM": (13.61, 38.1, 29.28, 23.05, 78.61, 3.4),
            "Grad-CAM++": (13.63, 37.95, 30.37, 23.45, 79.58, 3.4),
            "Score-CAM": (11.01, 39.55, 26.8, 24.75, 78.72, 3.6),
            "RISE": (11.12, 46.15, 36.31, 21.55, 82.05, 3.2),
            "L-CAM-Fm*": (14.44, 35.45, 32.18, 20.5, 80.66, 2.9),
            "L-CAM-Fm": (12.16, 40.2, 29.44, 23.4, 78.64, 4.1),
            "L-CAM-Img*": (15.93, 32.8, 39.9, 14.85, 84.67, 2.25),
            "L-CAM-Img": (11.09, 43.75, 29.12, 24.1, 79.41, 3.9),
        },
        {"Grad-CAM": 1, "Grad-CAM++": 1, "Score-CAM": 2048, "RISE": 8000}
        | dict.fromkeys(("L-CAM-Fm*", "L-CAM-Fm", "L-CAM-Img*", "L-CAM-Img"), 1),
    ),
)

_SISE_METHODS = (
    "Grad-CAM",
    "Grad-CAM++",
    "Extremal Perturbation",
    "RISE",
    "Score-CAM",
    "Integrated Gradient",
    "FullGrad",
    "SISE",
)
_SISE_REMARKS = (
    "RISE and Extremal Perturbation are printed as means of three runs; ours are one run",
    "Increase% is printed with a formula that would give -1, 0 or 1; ours is the share of images whose score rises",
)
_SISE = (
    Printed(
        "sise",
        "Table 1",
        "vgg16",
        LOCALIZATION + DROP,
        _columns(
            _SISE_METHODS,
            (55.44, 46.29, 61.19, 33.44, 46.42, 36.87, 38.72, 60.54),
            (26.52, 28.1, 25.44, 27.11, 27.71, 14.11, 26.61, 27.79),
            (51.7, 55.59, 51.2, 54.59, 54.98, 33.97, 54.17, 55.68),
            (49.47, 60.63, 43.90, 39.62, 39.79, 64.74, 60.78, 38.40),
            (31.08, 23.89, 32.65, 37.76, 36.42, 26.17, 22.73, 37.96),
        ),
        {},
        _SISE_REMARKS,
    ),
    Printed(
        "sise",
        "Table 1",
        "resnet50",
        LOCALIZATION + DROP,
        _columns(
            _SISE_METHODS,
            (60.08, 47.78, 63.24, 32.86, 35.56, 40.62, 39.55, 66.08),
            (32.16, 30.16, 26.29, 27.4, 31.0, 15.41, 20.2, 31.37),
            (60.25, 58.66, 52.34, 55.55, 60.02, 34.79, 44.94, 61.59),
            (35.80, 41.77, 39.38, 39.77, 35.36, 66.12, 65.99, 30.92),
            (36.58, 32.15, 34.27, 37.08, 37.08, 24.24, 25.36, 40.22),
        ),
        {},
        _SISE_REMARKS,
    ),
)

TABLES: tuple[Printed, ...] = (*_TTAME, *_ABLATIONS, *_LCAM, *_SISE)
"""Every printed table that a protocol reproduces."""


def printed(paper: str, backbone: str) -> list[Printed]:
    """The tables of a paper that hold a backbone; an empty list if the paper lacks it."""
    return [table for table in TABLES if (table.paper, table.backbone) == (paper, backbone)]
