"""How the head is optimised: the papers' long schedule, and one for budgets that people have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from attrib_zoo.errors import OptionError

OptimizerFactory = Callable[[Iterable[Any]], torch.optim.Optimizer]
_NAMED = ("sgd", "adam", "adamw")


@dataclass(frozen=True)
class Schedule:
    """An optimiser and a one-cycle learning rate (cosine, stepped after every batch).

    Attributes:
        name: ``"paper"``, ``"short"`` or ``"released"``.
        optimizer: ``"sgd"`` (Nesterov), ``"adam"``, ``"adamw"`` or ``"custom"``.
        lr: the maximal learning rate of the cycle.
        weight_decay: on weights, batch normalisation's included; never on biases.
        branch_lr: the maximal learning rate of the feature branches, where it is another one.
    """

    name: str
    optimizer: str
    lr: float
    weight_decay: float = 0.0
    branch_lr: float | None = None

    def facts(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def build(
    network: nn.Module, schedule: Schedule, steps: int, custom: OptimizerFactory | None
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.OneCycleLR]:
    """The optimiser over the network's parameters and its one-cycle schedule of exactly ``steps`` steps."""
    branch_lr = schedule.lr if schedule.branch_lr is None else schedule.branch_lr
    groups: list[dict[str, Any]] = []
    for lr, in_branch in ((schedule.lr, False), (branch_lr, True)):
        for decay, is_bias in ((schedule.weight_decay, False), (0.0, True)):
            members = [
                parameter
                for name, parameter in network.named_parameters()
                if name.startswith("branches") is in_branch and name.endswith("bias") is is_bias
            ]
            if members:
                groups.append({"params": members, "weight_decay": decay, "lr": lr})
    optimizer: torch.optim.Optimizer
    if custom is not None:
        optimizer = custom(groups)
    elif schedule.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=schedule.lr, momentum=0.9, nesterov=True)
    else:
        kind = torch.optim.Adam if schedule.optimizer == "adam" else torch.optim.AdamW
        optimizer = kind(groups, lr=schedule.lr)
    cycles_momentum = "momentum" in optimizer.defaults or "betas" in optimizer.defaults
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=max(steps, 4),  # shorter cycles have an empty phase
        pct_start=0.3,
        anneal_strategy="cos",
        cycle_momentum=cycles_momentum,
        base_momentum=0.85,
        max_momentum=0.95,
        div_factor=25.0,
        final_div_factor=1e4,
    )
    return optimizer, cycle


def check_optimizer(optimizer: str | OptimizerFactory | None) -> tuple[str | None, OptimizerFactory | None]:
    """Split the user's choice into a name and a factory; a factory's name is ``"custom"``."""
    if callable(optimizer):
        return "custom", optimizer
    if optimizer is None or optimizer in _NAMED:
        return optimizer, None
    raise OptionError(
        f"optimizer: must be one of {', '.join(map(repr, _NAMED))} or a function from parameter groups to an "
        f"optimiser, got {optimizer!r}"
    )
