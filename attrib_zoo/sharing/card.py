"""The card of a shared explainer: what it explains, what it was made from, how good it is, and its limits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from attrib_zoo.errors import OptionError
from attrib_zoo.training.checkpoint import Checkpoint
from attrib_zoo.training.recipe import as_recipe

UNSAID = "Its author did not say."
_FEW = 10  # classes listed


@dataclass(frozen=True)
class About:
    """What only the author knows.

    Attributes:
        model: where the explained model comes from, ``"timm/resnet18.a1_in1k"`` or ``"torchvision resnet50, V2"``.
        data: the images of the fit, in words.
        datasets: the same as names of the Hub, for its search.
        measures: a number for each measure, or such a mapping for each of several explainers.
        licence: of the explainer, as the Hub spells it: ``"apache-2.0"``, ``"cc-by-nc-4.0"``.
        notes: a last paragraph, in Markdown.
    """

    model: str | None = None
    data: str | None = None
    datasets: Sequence[str] = ()
    measures: Mapping[str, Any] = field(default_factory=dict)
    licence: str | None = None
    notes: str | None = None


def about(**told: Any) -> About:
    """The keywords of ``push_to_hub`` and ``save_pretrained``, checked.

    Raises:
        OptionError: an unknown keyword, or measures that are not numbers.
    """
    known = list(About.__dataclass_fields__)
    unknown = sorted(set(told) - set(known))
    if unknown:
        raise OptionError(f"{unknown[0]}: must be one of {', '.join(known)} to be told on the card")
    found = About(**told)
    _measure_rows(found.measures)
    return found


def card(saved: Checkpoint, told: About, where: str) -> str:
    """The Markdown text of ``README.md``.

    Args:
        saved: the explainer as saved.
        told: what its author adds.
        where: the repository or folder, for the example.
    """
    facts = saved.facts
    method, model = facts["method"], facts["model"]
    parts = [
        _header(facts, told),
        f"# {method} for {model}\n\nIt shows which regions of an image this classifier's decision rests on: a map for "
        f"each image and class, from one forward pass. A fitted `{method}` of "
        "[attrib_zoo](https://pypi.org/project/attrib_zoo/); the classifier itself is not in here.",
        _use(method, where),
        "## The model\n\n" + _table(_model_rows(facts, told)),
        "## The data\n\n" + _data(saved, told),
        "## The fit\n\n" + _table(_fit_rows(facts)) + _messages(facts),
        "## Measures\n\n" + _measures(facts, told),
        "## Limits\n\n" + "\n".join(f"* {limit}" for limit in _limits(saved, told)),
        "## Licence\n\n" + (told.licence or UNSAID + " Ask before you use it."),
    ]
    return "\n\n".join([*parts, *([told.notes] if told.notes else [])]) + "\n"


def _header(facts: Mapping[str, Any], told: About) -> str:
    entries: dict[str, Any] = {"library_name": "attrib_zoo"}
    if told.licence:
        entries["license"] = told.licence
    if told.model and told.model.count("/") == 1 and " " not in told.model:
        entries["base_model"] = told.model
    if told.datasets:
        entries["datasets"] = list(told.datasets)
    entries["tags"] = ["attrib_zoo", "explainability", "saliency-map", facts["method"].lower()]
    lines = [f"{name}: {json.dumps(value)}" for name, value in entries.items()]  # JSON is YAML
    return "\n".join(["---", *lines, "---"])


def _use(method: str, where: str) -> str:
    return (
        "## Use\n\n```python\n"
        f"from attrib_zoo import {method}\n\n"
        f"explainer = {method}.from_pretrained({where!r}, model)  # the model that is described below\n"
        "maps = explainer.attribute(images)  # standardised images (N, C, H, W)\n```\n\n"
        "Give `revision=` a commit's hash, and it is this explainer for ever."
    )


def _model_rows(facts: Mapping[str, Any], told: About) -> list[tuple[str, str]]:
    layers = ", ".join(f"`{name}` ({size})" for (name, _), size in zip(facts["layers"], facts["channels"], strict=True))
    return [
        ("class", f"`{facts['model']}`"),
        ("weights from", told.model or UNSAID),
        ("SHA-256 of its weights", f"`{facts['backbone']}`"),
        ("classes", str(facts["num_classes"])),
        ("layers that are read (channels)", layers),
    ]


def _data(saved: Checkpoint, told: About) -> str:
    counts = saved.tensors["class_counts"]
    seen, total = int((counts > 0).sum()), int(counts.sum())
    lines = [told.data or UNSAID]
    if total:
        ordered = counts.sort().values
        lines.append(
            f"The fit saw {total} images, repeats included, and the model assigned them to {seen} of {len(counts)} "
            f"classes: per class {int(ordered[0])} at least, {int(ordered[len(ordered) // 2])} in the middle, "
            f"{int(ordered[-1])} at most."
        )
    else:
        lines.append("No step was trained on it: the weights are the classifier's own rows.")
    return "\n\n".join(lines)


def _fit_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    recipe = facts["options"].get("recipe")
    if isinstance(recipe, dict):
        recipe = as_recipe(recipe).facts()
    schedule = facts["schedule"]
    rows = [
        ("recipe", f"`{recipe if isinstance(recipe, str) else json.dumps(recipe)}`"),
        ("steps", str(facts["steps"])),
        ("schedule", f"{schedule['name']}, {schedule['optimizer']}, learning rate {schedule['lr']:.3g}"),
    ]
    rows += [(name, str(value)) for name, value in facts["decisions"].items() if isinstance(value, str)]
    for name in ("mean", "std"):
        value = facts["decisions"].get(name) or facts["options"].get(name)
        if value:
            rows.append((f"{name} of the standardisation", ", ".join(f"{v:g}" for v in value)))
    return [*rows, ("attrib_zoo", facts["library"])]


def _messages(facts: Mapping[str, Any]) -> str:
    return "".join(f"\n\n> {message}" for message in facts["messages"])


def _measures(facts: Mapping[str, Any], told: About) -> str:
    if told.measures:
        return _table(_measure_rows(told.measures), head=("measure", "value"))
    if facts["validation"]:
        last = facts["validation"][-1]
        rows = [(name, f"{value:.4g}") for name, value in last.items() if name != "step"]
        return "Of the last validation of the fit, on its validation images:\n\n" + _table(
            rows, head=("measure", "value")
        )
    return "None were given."


def _measure_rows(measures: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, value in measures.items():
        entries = value.items() if isinstance(value, Mapping) else [("", value)]
        for inner, number in entries:
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise OptionError(f"measures: must have a number for each name, got {number!r} for {name!r}")
            rows.append((f"{name} {inner}".strip(), f"{number:.4g}"))
    return rows


def _limits(saved: Checkpoint, told: About) -> list[str]:
    facts, counts = saved.facts, saved.tensors["class_counts"]
    limits = [
        "It belongs to the weights with the hash above; for a model with others it refuses to load, since its maps "
        "would be plausible and wrong.",
    ]
    unseen = (counts == 0).nonzero().flatten().tolist()
    if unseen and "rows" not in facts["decisions"]:
        named = ", ".join(map(str, unseen[:_FEW])) + (" and others" if len(unseen) > _FEW else "")
        limits.append(
            f"{len(unseen)} of {len(counts)} classes never came up in the fit, so their maps are untrained: {named}."
        )
    elif unseen:
        limits.append(
            f"{len(unseen)} of {len(counts)} classes never came up in the fit; their maps come from the classifier's "
            "own rows."
        )
    limits.append(
        "A map says what the model's decision rests on, not whether it is right, and is as coarse as the layers are."
    )
    if not told.measures and not facts["validation"]:
        limits.append("Nobody has said how good its maps are; measure it with `attrib_zoo.benchmark.evaluate`.")
    return limits


def _table(rows: Sequence[tuple[str, str]], head: tuple[str, str] = ("", "")) -> str:
    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ")

    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {cell(name)} | {cell(value)} |" for name, value in rows)])
