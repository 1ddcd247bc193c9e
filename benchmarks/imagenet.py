"""The numbers of ``results.py`` on three ImageNet models, image by image, in one file that later runs add to.

    python benchmarks/imagenet.py --work WORK

``benchmarks/results/imagenet.json`` holds, of each model: ``measures``, the names of the columns; ``rows``, method ->
image -> numbers, in percent; ``beside``, the same of ``results.py --beside``; ``costs`` of each method; ``seen``, the
classes that the model decides for on the photographs that fits draw from. A method that is measured again is replaced.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
STORE = ROOT / "benchmarks" / "results" / "imagenet.json"
CASES = {"squeezenet": "SqueezeNet 1.1", "efficientnet": "EfficientNet-Lite0", "vit_tiny": "ViT-Ti/16"}
Rows = dict[str, dict[int, dict[str, float]]]


@dataclass
class Numbers:
    """All that is known of one model.

    Attributes:
        rows: method -> image -> measures in percent, and the explained class as ``target``.
        beside: the same of the measures of ``results.py --beside``.
        costs: method -> ``forward`` and ``backward`` samples and ``seconds`` for one image, ``times_forward``.
        seen: the model's decisions on the photographs that fits draw from.
        checks: lines of the table of grid pointing, encoding and randomisation.
        more: what other scripts keep.
    """

    rows: Rows = field(default_factory=dict)
    beside: Rows = field(default_factory=dict)
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    seen: list[int] = field(default_factory=list)
    checks: list[list[object]] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)

    def merge(self, work: Path, name: str) -> None:
        """Add what is in ``work``; of a method that is there on more images, nothing."""
        for into, folder in ((self.rows, work / name), (self.beside, work / "beside" / name)):
            for path in sorted(folder.glob("*.jsonl")):
                found, costs = _read(path)
                for method, rows in found.items():
                    if len(rows) >= len(into.get(method, {})):
                        into[method] = rows
                if into is self.rows:
                    self.costs.update(costs)


def _read(path: Path) -> tuple[Rows, dict[str, dict[str, float]]]:
    """Rows and costs of one file of results."""
    found: Rows = {}
    costs: dict[str, dict[str, float]] = {}
    with path.open(encoding="utf-8") as file:
        for line in map(json.loads, file):
            for row in line.get("rows", []):
                values = {k: math.nan if v is None else 100 * v for k, v in row["values"].items()}
                found.setdefault(row["method"], {})[row["image"]] = {**values, "target": row["target"]}
            if "cost" in line:
                total = costs.setdefault(line["method"], dict.fromkeys(line["cost"], 0.0))
                for key, value in line["cost"].items():
                    total[key] += value or 0
    shares = {
        method: {
            **{key: round(cost[key] / cost["images"], 4) for key in ("forward", "backward", "seconds")},
            "times_forward": round(cost["seconds"] / cost["plain"], 3) if cost["plain"] else math.nan,
        }
        for method, cost in costs.items()
        if cost["images"]
    }
    return found, shares


def load(path: Path = STORE) -> dict[str, Numbers]:
    """Every model's numbers."""
    held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: _unpacked(held.get(name, {})) for name in CASES}


def save(numbers: dict[str, Numbers], path: Path = STORE) -> None:
    """Write them, one method to a line."""
    lines = []
    for name, known in numbers.items():
        parts = [
            f'"rows": {_packed(known.rows)}',
            f'"beside": {_packed(known.beside)}',
            *(f'"{key}": {json.dumps(getattr(known, key))}' for key in ("costs", "seen", "checks", "more")),
        ]
        lines.append(f'"{name}": {{' + ",\n".join(parts) + "}")
    path.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")


def _packed(rows: Rows) -> str:
    """``{"columns": [...], METHOD: {IMAGE: [...]}}``."""
    columns = list(dict.fromkeys(key for found in rows.values() for row in found.values() for key in row))
    lines = [f'"columns": {json.dumps(columns)}']
    for method, found in rows.items():
        cells = {image: [_short(row.get(key, math.nan)) for key in columns] for image, row in found.items()}
        lines.append(f"{json.dumps(method)}: {json.dumps(cells, separators=(',', ':'))}")
    return "{" + ",\n".join(lines) + "}"


def _short(value: float) -> float | int | None:
    if math.isnan(value):
        return None
    rounded = round(value, 2)
    return int(rounded) if rounded == int(rounded) else rounded


def _unpacked(entry: dict[str, Any]) -> Numbers:
    def rows(packed: dict[str, Any]) -> Rows:
        columns = packed.get("columns", [])
        return {
            method: {
                int(image): {k: math.nan if v is None else v for k, v in zip(columns, row, strict=True)}
                for image, row in found.items()
            }
            for method, found in packed.items()
            if method != "columns"
        }

    kept = {key: entry[key] for key in ("costs", "seen", "checks", "more") if key in entry}
    return Numbers(rows(entry.get("rows", {})), rows(entry.get("beside", {})), **kept)


def mean(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval, 1.96 standard errors; what is NaN does not count."""
    data = torch.tensor([v for v in values if not math.isnan(v)], dtype=torch.float64)
    if len(data) < 2:
        return math.nan, math.nan
    return float(data.mean()), 1.96 * float(data.std()) / len(data) ** 0.5


def cell(values: list[float], *, sign: bool = False) -> str:
    """``"44.5 ± 4.4"``; a difference with its sign, and with a star where the interval excludes 0."""
    middle, half = mean(values)
    if math.isnan(middle):
        return "–"
    if sign:
        return f"{middle:+.1f} ± {half:.1f}" + "*" * (abs(middle) > half)
    return f"{middle:.1f} ± {half:.1f}"


def redrawn(model: torch.nn.Module) -> torch.nn.Module:
    """A copy whose weights of convolutions and linear layers are random numbers of the same deviation."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in other.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                module.weight.normal_(0, float(module.weight.std()), generator=generator)
    return other


def main() -> None:
    """Add what a folder of results holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    numbers = load()
    for name, known in numbers.items():
        known.merge(options.work, name)
        counts = {method: len(rows) for method, rows in known.rows.items()}
        print(f"{name}: {counts}; beside: { {m: len(r) for m, r in known.beside.items()} }")
    save(numbers)


if __name__ == "__main__":
    main()
