"""What a model predicts for images and why, from the same pass: for batch jobs, services and web pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attrib_zoo.attribution import Attribution, check_images
from attrib_zoo.backbone.capture import forward, frozen
from attrib_zoo.backbone.targets import Contrast, Target, TargetQuery, class_scores
from attrib_zoo.errors import OptionError


@dataclass(frozen=True)
class Answer:
    """A model's predictions for N images, and T maps of each.

    Attributes:
        confidence: ``(N, K)``, the probability of each class.
        decision: ``(N,)``, the predicted class.
        classes: ``(N, T)``, the classes that are explained.
        maps: name of the explainer -> ``(N, T, h, w)``, or ``(N, T, H, W)`` where the explainer enlarges its maps.
    """

    confidence: Tensor
    decision: Tensor
    classes: Tensor
    maps: dict[str, Tensor]


def answer(
    explainers: Mapping[str, Attribution],
    images: Tensor,
    *,
    targets: Sequence[int] | Tensor | None = None,
    top_k: int = 1,
    contrast: int | None = None,
    score: str = "softmax",
    show_progress: bool = False,
) -> Answer:
    """Explain images and return the model's predictions for them, without an extra pass.

    The first explainer runs the model on the images anyway; its outputs are reused. So a one-pass method explains at
    the price of a prediction.

    Args:
        explainers: by name, all for one model; at least one.
        images: standardised ``(N, C, H, W)`` images, on the model's device.
        targets: classes to explain: T for all images, or ``(N, T)``; ``None`` for the model's decision.
        top_k: without ``targets``, how many of the classes with the largest outputs are explained, the decision first.
        contrast: explain why each class and not the next ``contrast`` ones, as :class:`~attrib_zoo.Contrast` does.
        score: the kind of confidence, ``"softmax"`` or ``"sigmoid"``.
        show_progress: as in :meth:`Attribution.attribute`.

    Returns:
        The answer, on the images' device.

    Raises:
        OptionError: there is no explainer, or more classes are requested than the model has.

    Example:
        >>> import torch
        >>> from attrib_zoo import GradCAM
        >>> from attrib_zoo.synthetic import tiny_cnn
        >>> found = answer({"gradcam": GradCAM(tiny_cnn(), upsample=False)}, torch.rand(2, 3, 32, 32), top_k=3)
        >>> found.classes.shape, found.maps["gradcam"].shape[:2]
        (torch.Size([2, 3]), torch.Size([2, 3]))
    """
    if not explainers:
        raise OptionError("explainers: must hold at least one explainer, got none; pass {'name': explainer}")
    check_images(images, "answer")
    query = _Watched(targets=targets, top_k=top_k, contrast=contrast)
    maps: dict[str, Tensor] = {}
    for name, explainer in explainers.items():
        maps[name] = explainer._explain(images, query, None, show_progress).detach()
        if not query.outputs:  # a class-agnostic method never resolves targets
            with frozen(explainer.model), torch.inference_mode(False), torch.no_grad():
                query.resolve(forward(explainer.model, images, ()))
    outputs = query.outputs[0]
    decision = TargetQuery(None).resolve(outputs).classes[:, 0]
    return Answer(class_scores(outputs, score), decision, query.classes_of(outputs), maps)


@dataclass(frozen=True)
class _Watched(TargetQuery):
    """A query that keeps the outputs on which it was first resolved, and the classes from then on."""

    targets: Any = None
    top_k: int = 1
    contrast: int | None = None
    outputs: list[Tensor] = field(default_factory=list)

    def resolve(self, outputs: Tensor) -> Target:
        if not self.outputs:
            self.outputs.append(outputs.detach().clone())
        classes = self.classes_of(self.outputs[0])
        if self.contrast is None:
            return TargetQuery(classes, many=True).resolve(outputs)
        asked = [Contrast(self.contrast, target=column) for column in classes.T.tolist()]
        return TargetQuery(asked, many=True).resolve(outputs)

    def classes_of(self, outputs: Tensor) -> Tensor:
        """``(N, T)``, on the device of the outputs."""
        if self.targets is not None:
            return TargetQuery(self.targets, many=True).resolve(outputs).classes
        if self.top_k == 1:
            return TargetQuery(None).resolve(outputs).classes
        logits = class_scores(outputs)
        if self.top_k > logits.shape[1]:
            raise OptionError(f"top_k: the model has {logits.shape[1]} classes, got {self.top_k}")
        return logits.argsort(dim=1, descending=True, stable=True)[:, : self.top_k]  # ties as in the argmax
