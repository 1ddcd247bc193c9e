"""Recipes: how T-TAME is initialised, what it is trained for, and how its maps are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from attrib_zoo.attribution import SCALES
from attrib_zoo.backbone.grid import ATTENDED
from attrib_zoo.errors import OptionError, check_choice, check_number
from attrib_zoo.training.head import ACTIVATIONS

_WEIGHTS = {
    "contrast_weight": 0.0,
    "lambda_ce": 0.0,
    "lambda_tv": 0.0,
    "lambda_variation": 0.0,
    "area_power": 1e-6,
    "border_penalty": 0.0,
    "area_offset": 0.0,
}
"""Fields that are numbers, and the least that each may be."""


@dataclass(frozen=True)
class Recipe:
    """All design choices of T-TAME; immutable, printable, and written to the explainer's file.

    ``RECIPES`` holds the named ones; :meth:`but` changes fields: ``RECIPES["rows"].but(contrast=0)``.

    Attributes:
        name: its name.
        start: ``"random"``: PyTorch's initial weights; ``"rows"``: what the classifier itself reads from the layers,
            see :func:`~attrib_zoo.training.rows.class_rows`.
        forget_places: subtract from the features, or from the values of attention, their mean over images at each
            position, such as position embeddings, which otherwise give every class's map a shape of its own; with
            ``start="rows"``.
        loss: ``"mask"``: Eq. 11 of the T-TAME paper; ``"order"``: the highest pixels of the map must suffice for the
            decision, and without them the decision must change, at a share drawn for each image.
        branches: the feature branches of Eq. 8; ``False`` reads the features as they are.
        skip: the skip connection of the branches (Table 6).
        batch_norm: the batch normalisation of the branches (Table 6).
        branch_activation: ``"relu"`` or ``"sigmoid"`` (Table 6).
        layer_rule: which layers are read where none are named: ``"outputs"``, ``"norms"`` or ``"live"``, see
            ``docs/how-to/choose-layers.md``; or ``"attended"``: what the class token takes from each patch in the last
            attention modules, see :func:`~attrib_zoo.backbone.vit.attended.attended`.
        num_layers: how many of them, the last ones; 1, 2 or 3 in the paper (Table 6).
        contrast: from each map, subtract the mean map of this many other classes, those with the largest logits; 0 in
            the paper.
        contrast_weight: the weight of that mean.
        smooth: width of the mean filter on the map at the layers' resolution; 1 in the paper.
        alike: width of a mean filter that weighs the cells by how alike their features are, see
            :func:`~attrib_zoo.masking.likeness`; 1 in the paper.
        scale: ``"min-max"`` (the paper's), ``"rank"`` or ``"positive"``.
        lambda_ce: λ1, weight of the cross-entropy in Eq. 11.
        lambda_tv: λ2, weight of area and variation.
        lambda_variation: λ3, weight of the variation V within that term.
        area_power: λ4.
        variation: ``"mean"`` (Eq. 17) or ``"sum"`` (the sum over twice the batch size).
        border_penalty: weight of squared values on the map's border.
        area_offset: added to the mask before the power.
        psi: the other classes of Eq. 12: ``"random"``, ``"batch"`` (decisions of the batch), ``"own"`` (none), or
            ``"auto"``: random, but none in a short fit with fewer than 100 images per class.
    """

    name: str
    start: str = "random"
    forget_places: bool = False
    loss: str = "mask"
    branches: bool = True
    skip: bool = True
    batch_norm: bool = True
    branch_activation: str = "relu"
    layer_rule: str = "outputs"
    num_layers: int = 3
    contrast: int = 0
    contrast_weight: float = 0.6
    smooth: int = 1
    alike: int = 1
    scale: str = "min-max"
    lambda_ce: float = 1.5
    lambda_tv: float = 2.0
    lambda_variation: float = 0.005
    area_power: float = 0.3
    variation: str = "mean"
    border_penalty: float = 0.0
    area_offset: float = 0.0
    psi: str = "auto"

    def __post_init__(self) -> None:
        check_choice("start", self.start, ("random", "rows"))
        check_choice("loss", self.loss, ("mask", "order"))
        for name in ("branches", "skip", "batch_norm", "forget_places"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name}: must be True or False, got {getattr(self, name)!r}")
        check_choice("branch_activation", self.branch_activation, ACTIVATIONS)
        check_choice("layer_rule", self.layer_rule, ("outputs", "norms", "live", ATTENDED))
        check_number("num_layers", self.num_layers, least=1)
        check_number("contrast", self.contrast, least=0)
        check_choice("scale", self.scale, tuple(SCALES))
        check_choice("variation", self.variation, ("mean", "sum"))
        check_choice("psi", self.psi, ("auto", "random", "batch", "own"))
        for name, least in _WEIGHTS.items():
            object.__setattr__(self, name, check_number(name, getattr(self, name), least=least))
        for name in ("smooth", "alike"):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1 or size % 2 == 0:
                raise OptionError(f"{name}: must be an odd number of cells, got {size!r}; 1 leaves the map as it is")

    def but(self, **changes: Any) -> Recipe:
        """The same recipe with some fields changed; ``None`` keeps a field."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def facts(self) -> str | dict[str, Any]:
        """To show: the name of a named recipe, all fields of any other."""
        return self.name if RECIPES.get(self.name) == self else asdict(self)

    def __str__(self) -> str:
        """One field per line, with those that differ from the paper's marked."""
        lines = [f"recipe {self.name!r}"]
        for entry in fields(self)[1:]:
            value, usual = getattr(self, entry.name), entry.default
            lines.append(f"  {entry.name:17} {value!r}" + ("" if value == usual else f"   (paper: {usual!r})"))
        return "\n".join(lines)


PAPER = Recipe("paper")
RELEASED = Recipe("released", layer_rule="norms", variation="sum", border_penalty=0.3, area_offset=5e-4, psi="batch")
ROWS = Recipe("rows", start="rows", loss="order", branches=False, layer_rule="live", contrast=3, smooth=3, psi="own")
VALUES = replace(ROWS, name="attended", layer_rule=ATTENDED, num_layers=4, forget_places=True, smooth=1, alike=5)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (ROWS, VALUES, PAPER, RELEASED)}


def read_written(recipe: Any) -> Any:
    """What a file says; before :attr:`Recipe.alike` there were names in files, and "attended" had a mean filter."""
    return asdict(VALUES.but(alike=1, smooth=3)) if recipe == VALUES.name else recipe


def as_recipe(given: str | Recipe | Mapping[str, Any]) -> Recipe:
    """A recipe by its name, itself, or by its fields."""
    if isinstance(given, Recipe):
        return given
    if isinstance(given, Mapping):
        known = {entry.name for entry in fields(Recipe)}
        unknown = sorted(set(given) - known)
        if unknown or "name" not in given:
            raise OptionError(f"recipe: has a field that this version does not know, got {', '.join(unknown) or given}")
        return Recipe(**given)
    return RECIPES[check_choice("recipe", given, tuple(RECIPES))]
