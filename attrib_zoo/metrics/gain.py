"""Symmetric relevance gain: the gap between the two orders of removal, in one number."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attrib_zoo.errors import OptionError, check_choice
from attrib_zoo.metrics.insertion_deletion import deletion, insertion
from attrib_zoo.metrics.road import road

FORMS = ("removal", "insertion")


def symmetric_relevance_gain(
    model: nn.Module,
    inputs: Tensor,
    attributions: Tensor,
    target: Any = None,
    *,
    form: str = "removal",
    **options: Any,
) -> Tensor:
    """The score left when the least relevant pixels go, minus that when the most relevant go; higher is better.

    ``"removal"`` is ``LeRF - MoRF``, both by :func:`~attrib_zoo.metrics.road`; ``"insertion"`` is ``insertion -
    deletion``. A map that orders pixels at random has 0 on average, and a reversed order has the negative value. As
    both curves suffer from hiding pixels at all, most of that effect cancels, so that the gain depends less on how
    pixels are hidden than either curve does.

    Args:
        model: A classifier. It runs in eval mode and is left as it was.
        inputs: ``(N, C, H, W)``, standardised as the model expects.
        attributions: The maps: ``(N, C, H, W)`` (channels are averaged), ``(N, 1, h, w)`` or ``(N, h, w)``.
        target: In any of Captum's forms; ``None`` is the model's own decision on the whole image.
        form: ``"removal"`` or ``"insertion"``.
        **options: For both curves, those of :func:`~attrib_zoo.metrics.road_curve` except ``order`` (``hiding="raw"``
            replaces ROAD's imputation by black), or of :func:`~attrib_zoo.metrics.insertion_curve`; a given
            ``baseline`` applies to both, otherwise each has its own.

    Returns:
        ``(N,)``, in -1...1 for scores in 0...1; NaN where the map is not finite.

    Raises:
        InputError: The maps do not belong to the images.
        OptionError: An option is outside its range.

    Example:
        >>> import torch
        >>> from attrib_zoo import synthetic
        >>> model, data = synthetic.tiny_cnn(), synthetic.scenes(2)
        >>> symmetric_relevance_gain(model, data.inputs, torch.rand(2, 8, 8), target=0, hiding="raw").shape
        torch.Size([2])

    References:
        Blücher et al., Decoupling pixel flipping and occlusion strategy for consistent XAI benchmarks, TMLR 2024.
    """
    check_choice("form", form, FORMS)
    if "order" in options:
        raise OptionError("order: must be left out, for the gain takes both orders; use road for one of them")
    if form == "insertion":
        kept, lost = (measure(model, inputs, attributions, target, **options) for measure in (insertion, deletion))
    else:
        kept, lost = (road(model, inputs, attributions, target, order=o, **options) for o in ("lerf", "morf"))
    return kept - lost
