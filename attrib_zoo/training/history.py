"""The record of a fit: every step, every validation, every message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class History:
    """The record of a fit.

    Attributes:
        steps: for each quantity (``loss``, its parts, ``lr``) one number per step.
        validation: one dict per validation: ``step`` and the measures.
        messages: the warnings of the fit.
    """

    steps: dict[str, list[float]] = field(default_factory=dict)
    validation: list[dict[str, float]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.steps.get("loss", []))

    def __getitem__(self, name: str) -> list[float]:
        return self.steps[name]

    def tensors(self) -> dict[str, Tensor]:
        """The numbers to write, one tensor per quantity."""
        return {f"history/{k}": torch.tensor(v, dtype=torch.float64) for k, v in self.steps.items()}

    def facts(self) -> dict[str, Any]:
        """The JSON-ready rest, with the tensors' names in order, since the file does not keep it."""
        return {"quantities": list(self.steps), "validation": self.validation, "messages": self.messages}

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> History:
        """Inverse of :meth:`tensors` and :meth:`facts`."""
        steps = {k: tensors[f"history/{k}"].tolist() for k in facts["quantities"]}
        return cls(steps, facts["validation"], facts["messages"])

    def add(self, values: dict[str, float]) -> None:
        """Append one step."""
        for name, value in values.items():
            self.steps.setdefault(name, []).append(value)

    def last(self, name: str, share: float = 0.1) -> float:
        """Mean of a quantity over the last share of the steps."""
        values = self.steps[name]
        tail = values[-max(1, round(len(values) * share)) :]
        return sum(tail) / len(tail)
