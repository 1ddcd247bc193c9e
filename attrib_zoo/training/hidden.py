"""What is shown where a trained mask is 0: black or the mean colour, by the kind of model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from attrib_zoo.backbone.kind import is_transformer
from attrib_zoo.errors import OptionError
from attrib_zoo.masking import black, channel_stats

MASKINGS = ("auto", "raw", "standardized")

Statistics = Sequence[float] | None


def check_statistics(mean: Statistics, std: Statistics) -> tuple[list[float] | None, list[float] | None]:
    """The options ``mean`` and ``std``, both given or neither, one value per channel."""
    found = _per_channel("mean", mean), _per_channel("std", std)
    if (found[0] is None) != (found[1] is None):
        raise OptionError("mean, std: must be given both or neither; the other would be guessed")
    if found[1] is not None and min(found[1]) <= 0:
        raise OptionError(f"std: must be positive, got {found[1]}")
    return found


def decide_masking(model: nn.Module, images: Tensor, masking: str, mean: Statistics, std: Statistics) -> dict[str, Any]:
    """The rule, ``"raw"`` or ``"standardized"``, and the statistics it needs; JSON-ready."""
    rule = masking
    if rule == "auto":
        rule = "standardized" if is_transformer(model) else "raw"
    if mean is None or std is None:
        mean, std = channel_stats(model, images.shape[1])
    if len(mean) != images.shape[1] or len(std) != images.shape[1]:
        raise OptionError(
            f"mean, std: must have one value for each of the {images.shape[1]} channels, got {tuple(mean)} and "
            f"{tuple(std)}"
        )
    return {"masking": rule, "mean": list(mean), "std": list(std)}


def hidden(decided: dict[str, Any], images: Tensor) -> Tensor | float:
    """Black (T-TAME Eq. 13) or the mean colour (Eq. 14), in standardised space."""
    return black(decided["mean"], decided["std"], images) if decided["masking"] == "raw" else 0.0


def _per_channel(name: str, values: Statistics) -> list[float] | None:
    if values is None:
        return None
    try:
        return [float(v) for v in values]
    except (TypeError, ValueError):
        raise OptionError(f"{name}: must be a number for each channel, got {values!r}") from None
