"""Eigen-CAM (Muhammad and Yeasin, IJCNN 2020)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from attrib_zoo.attribution import Attribution
from attrib_zoo.backbone.capture import run
from attrib_zoo.backbone.targets import TargetQuery
from attrib_zoo.masking import at_least_float32


class EigenCAM(Attribution):
    r"""Where the layer's features point along their first principal direction; the same map for every class.

    .. math:: M = A v_1, \qquad A = U \Sigma V^\top

    with A the features of one image as an (h·w) x D matrix, and v_1 the right singular vector of its largest singular
    value. It uses neither gradient nor score, so one forward pass up to the layer is enough.

    **This does not explain a decision.** The map shows what dominates the features, which is often the most prominent
    object; it is the same for the right class, for a wrong one, and for a classifier whose last layer is random. Use it
    to inspect a backbone, never as evidence of why a class was predicted.

    Args:
        model: see :class:`~attrib_zoo.attribution.Attribution`.
        layers: see :class:`~attrib_zoo.attribution.Attribution`; ``None`` for the layer of
            :class:`~attrib_zoo.GradCAM`; several layers give the mean of their maps.
        relu: ``True`` sets negative coordinates to zero.
        upsample: ``False`` returns ``(N, 1, h, w)``.
        smooth: odd side of a mean filter over the cells of the map; ``None`` for none.
        scale: ``"min-max"``, ``"rank"``, ``"positive"``, or ``None`` for the formula's own.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from attrib_zoo import EigenCAM
        >>> model = resnet18(weights=None)
        >>> EigenCAM(model).attribute(torch.rand(1, 3, 64, 64)).shape
        torch.Size([1, 3, 64, 64])

    References:
        M. B. Muhammad, M. Yeasin: Eigen-CAM: Class Activation Map using Principal Components. IJCNN 2020.

    Deviations:
        A singular vector has no sign of its own: it is chosen so that the map's sum is positive. Features are not
        centred, as in the paper and unlike in pytorch-grad-cam.
    """

    family: ClassVar[str] = "features"
    paper: ClassVar[str] = "Muhammad and Yeasin, IJCNN 2020"
    cost: ClassVar[str] = "1F"
    class_agnostic: ClassVar[bool] = True
    default_layers: ClassVar[tuple[str, int] | None] = ("gradient", 1)

    def __init__(
        self,
        model: torch.nn.Module,
        layers: Any = None,
        *,
        relu: bool = False,
        upsample: bool = True,
        smooth: int | None = None,
        scale: str | None = None,
    ) -> None:
        super().__init__(model, layers, upsample=upsample, smooth=smooth, scale=scale)
        self.relu = bool(relu)

    def compute_maps(
        self, inputs: Tensor, query: TargetQuery, args: tuple[Any, ...], show_progress: bool
    ) -> list[Tensor]:
        outputs, features = run(self.model, inputs, args, self.taps(inputs, args))
        count = query.resolve(outputs).count
        maps = [first_component(at_least_float32(part)) for part in features]
        return [(m.relu() if self.relu else m).unsqueeze(1).expand(-1, count, -1, -1) for m in maps]


def first_component(features: Tensor) -> Tensor:
    """The coordinate ``(N, h, w)`` of each cell of ``(N, D, h, w)`` features along their first singular vector.

    By the smaller of the two Gram matrices. The sum over cells is positive.
    """
    cells = features.flatten(2).transpose(1, 2)  # (N, h w, D)
    size = cells.abs().amax((1, 2), keepdim=True)
    unit = cells / size.where(size > 0, torch.ones_like(size))  # squares stay finite at any scale
    if cells.shape[1] <= cells.shape[2]:
        values, vectors = torch.linalg.eigh(unit @ unit.transpose(1, 2))
        along = vectors[:, :, -1] * values[:, -1:].clamp(min=0).sqrt()
    else:
        vectors = torch.linalg.eigh(unit.transpose(1, 2) @ unit).eigenvectors
        along = (unit @ vectors[:, :, -1:]).squeeze(2)
    total = along.sum(1, keepdim=True)
    along = along * torch.where(total < 0, -1.0, 1.0).to(along) * size.squeeze(2)
    maps: Tensor = along.unflatten(1, features.shape[-2:])
    return maps
