"""How the head is optimised: the papers' long schedule, and one for realistic budgets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from attrib_zoo.errors import OptionError

OptimizerFactory = Callable[[Iterable[Any]], torch.optim.Optimizer]
LONG = 20_000  # steps from which "auto" takes a paper's own schedule
LOGIT_STEP = 0.1  # how far one layer's part of a logit may move per optimiser step of the short schedule

_NAMED = ("sgd", "adam", "adamw")


@dataclass(frozen=True)
class Schedule:
    """An optimiser and a learning rate: one cycle (cosine, stepped after every batch), or decaying by epochs.

    Attributes:
        name: ``"paper"``, ``"short"`` or ``"released"``.
        optimizer: ``"sgd"`` (Nesterov), ``"adam"``, ``"adamw"`` or ``"custom"``.
        lr: the maximal learning rate of the cycle, or that of the first epoch.
        weight_decay: on weights, batch normalisation's included; never on biases unless ``decay_biases``.
        branch_lr: the maximal learning rate of the feature branches, where it differs.
        epochs: the number of equal parts (the paper's epochs) that a fit is divided into; 0 for one cycle.
        factor: the factor of the learning rate from one part to the next.
        drops: how many times it is applied.
        bias_scale: the learning rate of biases, as a multiple.
        decay_biases: whether weight decay applies to biases too.
    """

    name: str
    optimizer: str
    lr: float
    weight_decay: float = 0.0
    branch_lr: float | None = None
    epochs: int = 0
    factor: float = 1.0
    drops: int = 0
    bias_scale: float = 1.0
    decay_biases: bool = False

    def facts(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> Schedule:
        """Inverse of :meth:`facts`.

        Raises:
            ValueError: a field is missing, unknown, or of another type.
        """
        own = {entry.name: entry.type for entry in fields(cls)}
        if not set(facts) <= set(own) or not {"name", "optimizer", "lr"} <= set(facts):
            raise ValueError(f"a schedule has {', '.join(own)}, got {', '.join(facts)}")
        for name, value in facts.items():
            if not _is_a(value, str(own[name])):
                raise ValueError(f"{name} of the schedule must be a {own[name]}, got {value!r}")
        return cls(**facts)


def _is_a(value: Any, kind: str) -> bool:
    """Whether a value has the type of a field's annotation."""
    if value is None or isinstance(value, bool) or kind == "bool":
        return (value is None and "None" in kind) or (isinstance(value, bool) and kind == "bool")
    if kind == "str":
        return isinstance(value, str)
    return isinstance(value, int if kind == "int" else (int, float)) and math.isfinite(value)


def is_long(asked: str, steps: int, recipe: str) -> bool:
    """Whether ``"auto"``, ``"paper"`` or ``"short"`` means the schedule of the paper, or of its authors' code, here."""
    return asked == "paper" or (asked == "auto" and (recipe == "released" or steps >= LONG))


def build(
    network: nn.Module, schedule: Schedule, steps: int, custom: OptimizerFactory | None
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.OneCycleLR | Falling]:
    """The optimiser over the network's parameters and its learning rate over exactly ``steps`` steps."""
    branch_lr = schedule.lr if schedule.branch_lr is None else schedule.branch_lr
    groups: list[dict[str, Any]] = []
    for lr, in_branch in ((schedule.lr, False), (branch_lr, True)):
        bias_decay = schedule.weight_decay if schedule.decay_biases else 0.0
        for decay, is_bias in ((schedule.weight_decay, False), (bias_decay, True)):
            members = [
                parameter
                for name, parameter in network.named_parameters()
                if parameter.requires_grad
                and name.startswith("branches") is in_branch
                and name.endswith("bias") is is_bias
            ]
            if members:
                groups.append(
                    {"params": members, "weight_decay": decay, "lr": lr * schedule.bias_scale if is_bias else lr}
                )
    optimizer: torch.optim.Optimizer
    if custom is not None:
        optimizer = custom(groups)
    elif schedule.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=schedule.lr, momentum=0.9, nesterov=True, fused=_fused(network))
        for group in optimizer.param_groups:  # torch leaves them uninitialised where the scaler skips the first step
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    else:
        kind = torch.optim.Adam if schedule.optimizer == "adam" else torch.optim.AdamW
        optimizer = kind(groups, lr=schedule.lr, fused=_fused(network))
    if schedule.epochs:
        period = max(1, math.ceil(steps / schedule.epochs))
        return optimizer, Falling(optimizer, schedule.factor, period, schedule.drops, steps)
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


def _fused(network: nn.Module) -> bool | None:
    """Whether the optimiser goes over each parameter once, without temporary tensors of its size.

    With as many classes as ImageNet-21k has, a step is a tenth of that of PyTorch's default. PyTorch has it for these
    devices; where it has not, its default is used.
    """
    return True if all(parameter.device.type in ("cpu", "cuda") for parameter in network.parameters()) else None


class Falling(torch.optim.lr_scheduler.LRScheduler):
    """A learning rate that changes by a factor every ``period`` steps, at most ``drops`` times."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, factor: float, period: int, drops: int, total_steps: int
    ) -> None:
        self.factor, self.period, self.drops, self.total_steps = factor, period, drops, total_steps
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """The learning rates of the groups at this step."""
        return [lr * self.factor ** min(self.last_epoch // self.period, self.drops) for lr in self.base_lrs]


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
