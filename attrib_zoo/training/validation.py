"""How good a fit is: measured while it runs, judged at its end, and told in a few lines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from attrib_zoo.attribution import Attribution
from attrib_zoo.backbone.targets import TargetQuery, class_scores
from attrib_zoo.metrics.confidence import average_drop, increase_in_confidence
from attrib_zoo.training.checkpoint import Fitted
from attrib_zoo.training.data import images_of
from attrib_zoo.training.explainer import Explainer
from attrib_zoo.training.fit import tell
from attrib_zoo.training.history import History


def validate(
    explainer: Explainer, loader: Iterable[Any], seed: int, like: Tensor, args: tuple[Any, ...]
) -> dict[str, float]:
    """Loss and AD/IC of the current network, averaged over the images of one pass over the loader."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng([]):
        return averages(
            _measures(explainer, images_of(batch).to(device=like.device, dtype=like.dtype), args, generator)
            for batch in loader
        )


def _measures(
    explainer: Explainer, images: Tensor, args: tuple[Any, ...], generator: torch.Generator
) -> dict[str, Tensor]:
    """Per-image measures ``(N,)`` of one batch."""
    with explainer.placed(images, args):
        return _measured(explainer, images, args, generator)


def _measured(
    explainer: Explainer, images: Tensor, args: tuple[Any, ...], generator: torch.Generator
) -> dict[str, Tensor]:
    terms = explainer.loss_terms(explainer._ready().network, images, args, generator)
    outputs, features = explainer._features(images, args)
    rows = terms.classes.to(images.device).unsqueeze(1)
    target = explainer.choose_targets(outputs, TargetQuery(rows[:, 0]))
    found_maps = explainer._class_maps(explainer._network_for(features), features, target)
    maps = explainer._as_asked(found_maps).to(images.dtype)
    found = {"loss": terms.loss.expand(len(images))}
    hidden, score = explainer.baseline_of(images), getattr(explainer, "score", "softmax")
    call: dict[str, Any] = {
        "target": rows[:, 0],
        "masking": hidden if isinstance(hidden, Tensor) else "standardized",
        "score": score,
        "clean": class_scores(outputs, score).gather(1, rows)[:, 0],
        "additional_forward_args": args,
    }
    for percent in (100, 50, 15):
        call["keep"] = percent / 100
        found[f"AD({percent})"] = 100 * average_drop(explainer.model, images, maps, **call)
        found[f"IC({percent})"] = 100 * increase_in_confidence(explainer.model, images, maps, **call)
    return found


def averages(found: Iterable[dict[str, Tensor]]) -> dict[str, float]:
    """Means over images of per-image measures ``(N,)`` that come batch by batch."""
    sums: dict[str, float] = {}
    count = 0
    for measures in found:
        count += len(next(iter(measures.values())))
        for name, values in measures.items():
            sums[name] = sums.get(name, 0.0) + float(values.double().sum())
    return {name: value / count for name, value in sums.items()} if count else {}


def judge(history: History) -> None:
    """Warn if the maps are no better than showing the whole image."""
    compared = "everything" in history.steps  # losses that depend on the order alone have no such bound
    if compared and len(history) >= 30 and history.last("loss") >= history.last("everything"):
        tell(
            history,
            f"fit: the loss at the end ({history.last('loss'):.3g}) is not below that of showing the whole image "
            f"({history.last('everything'):.3g}), so the maps say little: train for more steps, with "
            "schedule='short', or try another lr",
        )


def report(explainer: Attribution, fitted: Fitted) -> str:
    """The fit in a few lines."""
    seen = int((fitted.counts > 0).sum())
    lines = [
        f"{type(explainer).__name__} for {type(explainer.model).__name__}, "
        f"layers {', '.join(n for n, _ in fitted.layers)}",
        f"  steps        {fitted.steps} ({fitted.schedule.name} schedule, {fitted.schedule.optimizer}, "
        f"max lr {fitted.schedule.lr:.3g})",
        f"  images       {int(fitted.counts.sum())}, classes seen {seen} of {fitted.num_classes}",
    ]
    if "rows" in fitted.decisions:
        lines.append(f"  start        {fitted.decisions['rows']}")
    if len(fitted.history):
        parts = ", ".join(f"{k} {fitted.history.last(k):.3g}" for k in fitted.history.steps if k != "lr")
        lines.append(f"  last tenth   {parts}")
    if fitted.history.validation:
        last = fitted.history.validation[-1]
        lines.append("  validation   " + ", ".join(f"{k} {v:.4g}" for k, v in last.items() if k != "step"))
    lines += [f"  warning      {message}" for message in fitted.history.messages]
    return "\n".join(lines)
