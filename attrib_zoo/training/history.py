"""What a fit did: every step, every validation, every message."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class History:
    """The record of a fit.

    Attributes:
        steps: for each quantity (``loss``, its parts, ``lr``) one number per step.
        validation: one dict per validation: ``step`` and the measures.
        messages: the warnings that the fit gave.
    """

    steps: dict[str, list[float]] = field(default_factory=dict)
    validation: list[dict[str, float]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.steps.get("loss", []))

    def __getitem__(self, name: str) -> list[float]:
        return self.steps[name]

    def add(self, values: dict[str, float]) -> None:
        """Append one step."""
        for name, value in values.items():
            self.steps.setdefault(name, []).append(value)

    def last(self, name: str, share: float = 0.1) -> float:
        """Mean of a quantity over the last share of the steps."""
        values = self.steps[name]
        tail = values[-max(1, round(len(values) * share)) :]
        return sum(tail) / len(tail)
