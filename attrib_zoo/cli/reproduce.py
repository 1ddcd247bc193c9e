"""What the command ``reproduce`` does; returns the text to print."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from attrib_zoo.benchmark.protocols import backbones, lcam, sise, ttame
from attrib_zoo.benchmark.protocols.backbones import check_name, check_output
from attrib_zoo.benchmark.protocols.compare import Comparison
from attrib_zoo.benchmark.protocols.datasets import VOC_CLASSES, imagenet_validation, voc2007
from attrib_zoo.benchmark.protocols.papers import printed
from attrib_zoo.benchmark.protocols.plan import Plan
from attrib_zoo.errors import UnsupportedModelError, check_choice

PAPERS = ("ttame", "lcam", "sise")
"""What the command's first word may be."""


def reproduce(options: Any) -> str:
    """Run a paper's experiments, and show our rows next to the printed ones."""
    paper = check_choice("paper", options.paper, PAPERS)
    if not printed(paper, check_name(options.backbone)):
        known = [name for name in backbones.NAMES if printed(paper, name)]
        raise UnsupportedModelError(
            f"backbone: the paper of {paper} has {' and '.join(known)} only, got {options.backbone}; choose one of them"
        )
    plan = plan_of(options)
    _look(paper, plan)  # before anything is downloaded or loaded
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    trains_head = paper == "sise" and options.weights is None
    classes = len(VOC_CLASSES) if paper == "sise" and not trains_head else 1000
    backbone = backbones.load_backbone(options.backbone, options.weights, classes=classes, device=device)
    comparison: Comparison
    if paper == "sise":
        comparison = sise.run(plan, backbone, train_head=trains_head)
    else:
        check_output(backbone, classes)
        comparison = (ttame.run if paper == "ttame" else lcam.run)(plan, backbone)
    files = sorted(f.name for f in plan.output.iterdir() if f.suffix in (".md", ".csv", ".json", ".txt"))
    return f"{comparison.to_text()}\n\n{plan.output}{os.sep}: {', '.join(files)}"


def _look(paper: str, plan: Plan) -> None:
    """Raise if the data is missing."""
    if paper == "sise":
        voc2007(plan.data)
    else:
        imagenet_validation(plan.data, plan.labels)


def plan_of(options: Any) -> Plan:
    """The plan that the command's options describe."""
    given = {field.name: getattr(options, field.name) for field in fields(Plan) if hasattr(options, field.name)}
    for name in ("data", "output", "test_list", "val_list", "labels"):
        given[name] = None if given[name] is None else Path(given[name])
    names = [name.strip() for name in (given["methods"] or "").split(",") if name.strip()]
    recipe = check_choice("recipe", given["recipe"], ("paper", "released"))
    return Plan(**{**given, "methods": tuple(names) or None, "recipe": recipe})
