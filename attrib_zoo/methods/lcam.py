"""L-CAM-Fm and L-CAM-Img: a trained attention mechanism on the last feature maps (Gkartzonika et al., 2022)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.capture import forward
from attrib_zoo.backbone.kind import is_transformer
from attrib_zoo.backbone.layers.resolve import Tap
from attrib_zoo.backbone.module import find
from attrib_zoo.backbone.replay import replay
from attrib_zoo.errors import OptionError, UnsupportedModelError, check_choice, check_number
from attrib_zoo.masking import at_least_float32, blend
from attrib_zoo.masking import upsample as enlarge
from attrib_zoo.methods.bases.trainable import TrainableAttribution
from attrib_zoo.training.checkpoint import Checkpoint
from attrib_zoo.training.fit import Terms
from attrib_zoo.training.head import AttentionHead
from attrib_zoo.training.hidden import MASKINGS, check_statistics, decide_masking, hidden
from attrib_zoo.training.losses import FIT_SCORES, area, cross_entropy, two_logits, variation
from attrib_zoo.training.maps import head_maps
from attrib_zoo.training.rows import ROW_IMAGES, rows_schedule, start_from_rows
from attrib_zoo.training.schedule import LOGIT_STEP, Schedule, is_long

_RECIPES = ("paper", "released")
_BORDER, _OFFSET = 0.3, 5e-4  # of the released loss


class _LCAM(TrainableAttribution):
    """The common part of both: the attention mechanism (Eq. 2, 3), the loss (Eq. 6-8) and the schedules."""

    family: ClassVar[str] = "trained"
    paper: ClassVar[str] = "Gkartzonika et al., ECCV Workshops 2022"
    default_epochs: ClassVar[int] = 25
    default_layers: ClassVar[tuple[str, int] | None] = ("gradient", 1)

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        recipe: str,
        start: str,
        ce_only: bool,
        after_pool: bool,
        lambda_tv: float,
        lambda_av: float,
        lambda_ce: float,
        area_power: float,
        score: str,
        upsample: bool,
        smooth: int | None,
        scale: str | None,
    ) -> None:
        super().__init__(model, layers, upsample=upsample, smooth=smooth, scale=scale)
        if layers is not None and after_pool:
            raise OptionError("after_pool: must be left out where layers are given; name the pooling itself in layers")
        self.recipe = check_choice("recipe", recipe, _RECIPES)
        self.start = check_choice("start", start, ("auto", "random", "rows"))
        self._automatic = start == "auto"  # every fit decides anew
        self.ce_only = bool(ce_only)
        self.after_pool = bool(after_pool)
        self.lambda_tv = check_number("lambda_tv", lambda_tv, least=0.0)
        self.lambda_av = check_number("lambda_av", lambda_av, least=0.0)
        self.lambda_ce = check_number("lambda_ce", lambda_ce, least=0.0)
        self.area_power = check_number("area_power", area_power, least=1e-6)
        self.score = check_choice("score", score, FIT_SCORES)

    @abstractmethod
    def _see(
        self, images: Tensor, args: tuple[Any, ...], network: nn.Module
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Clean outputs, decisions, attention maps ``(N, M, h, w)``, own masks ``(N, 1, h, w)``, masked outputs."""
        raise NotImplementedError

    def layer_rule(self) -> tuple[str, int]:
        return ("outputs" if self.after_pool else "gradient"), 1

    def resolve_layers(self, inputs: Tensor, args: Sequence[Any]) -> tuple[Tap, ...]:
        taps = super().resolve_layers(inputs, args)
        who = type(self).__name__
        if len(taps) != 1:
            raise OptionError(f"layers: {who} reads one layer, got {len(taps)}; name one, or use TTAME")
        if self.after_pool and not isinstance(find(self.model, taps[0].name), nn.MaxPool2d):
            raise UnsupportedModelError(
                f"after_pool: needs a model whose last convolution is followed by a max-pooling, such as VGG; "
                f"{type(self.model).__name__} ends in {taps[0].name!r}: leave it out, or name a layer"
            )
        return taps

    # ------------------------------------------------------------------ training

    def build_network(self, channels: Sequence[int], num_classes: int, generator: torch.Generator | None) -> nn.Module:
        return AttentionHead(channels, num_classes, branches=False, generator=generator)

    def finish_network(self, network: nn.Module) -> None:
        network.fold()  # type: ignore[operator]  # an AttentionHead

    def unsettle(self) -> None:
        if self._automatic:
            self.start = "auto"

    def settle(self, images: Tensor, args: tuple[Any, ...], steps: int, saved: Checkpoint | None) -> None:
        if not self._automatic:
            return
        if saved is not None:
            self.start = saved.facts["options"]["start"]
        else:
            few = self.recipe == "paper" and self.shows_few(images, args, steps)
            self.start = "rows" if few else "random"

    @property
    def start_images(self) -> int:
        return 0 if self.start == "random" else ROW_IMAGES

    def start_network(
        self, network: nn.Module, images: Tensor, args: tuple[Any, ...], taps: Sequence[Tap], show_progress: bool
    ) -> tuple[dict[str, Any], list[str]]:
        return start_from_rows(self.model, network, images, args, taps, show_progress=show_progress)

    def choose_schedule(self, asked: str, steps: int, network: nn.Module, features: Sequence[Tensor]) -> Schedule:
        head: Any = network
        if len(head.mixing):
            return rows_schedule(head.channels)
        falling: dict[str, Any] = {"weight_decay": 5e-4, "decay_biases": True, "factor": 0.95}
        if is_long(asked, steps, self.recipe):
            if self.recipe == "released":
                return Schedule("released", "sgd", 1e-4, epochs=26, drops=12, bias_scale=2.0, **falling)
            return Schedule("paper", "sgd", 1e-4, epochs=25, drops=25, **falling)
        network.share_rows(network.reach(features))  # type: ignore[operator]  # an AttentionHead
        return Schedule("short", "adam", LOGIT_STEP)

    def _attend(self, network: nn.Module, features: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """The maps of Ψ before the sigmoid, ``(N, M, h, w)``, and the masks of the own classes ``(N, 1, h, w)``."""
        batch = len(classes)
        released = self.recipe == "released"
        rows = classes.expand(batch, batch) if released else classes.unsqueeze(1)
        own = torch.arange(batch, device=classes.device) if released else torch.zeros_like(classes)
        maps = head_maps(network, [features], rows)
        return maps, maps[torch.arange(batch, device=own.device), own].unsqueeze(1).sigmoid()

    def loss_terms(
        self, network: nn.Module, images: Tensor, args: tuple[Any, ...], generator: torch.Generator
    ) -> Terms:
        clean, classes, maps, mask, masked = self._see(images, args, network)
        offset = _OFFSET if self.recipe == "released" else 0.0
        parts = {
            "ce": cross_entropy(masked, classes, self.score).mean(),
            "area": area(maps, self.area_power, offset).mean(),
            "variation": self._variation(maps.sigmoid()).mean(),
        }
        everything = self._loss(
            cross_entropy(clean, classes, self.score).mean(),
            (1 + offset) ** self.area_power,
            self._variation(torch.ones_like(maps[:1])).mean(),
        )
        loss = self._loss(parts["ce"], parts["area"], parts["variation"])
        return Terms(loss, {**parts, "mask": mask.mean(), "everything": everything}, classes)

    def _loss(self, ce: Tensor, area_term: Tensor | float, variation_term: Tensor) -> Tensor:
        """Eq. 6, or the cross-entropy alone."""
        if self.ce_only:
            return ce
        return self.lambda_tv * variation_term + self.lambda_av * area_term + self.lambda_ce * ce

    def _variation(self, masks: Tensor) -> Tensor:
        """Eq. 8 for each image: the plain sum; released: over all maps of the batch, with the border, halved."""
        if self.recipe == "released":
            return variation(masks, total=True, border=_BORDER)
        return 2 * variation(masks, total=True)

    def baseline_of(self, images: Tensor) -> Tensor | float:
        """What is shown where a mask is 0."""
        return hidden(self._ready().decisions, images)


class LCAMFm(_LCAM):
    r"""Which regions of the last feature maps let the model keep its decision; trained once, one pass for a map.

    One 1x1 convolution turns the last convolutional features A, ``(N, C, h, w)``, into a map per class (Eq. 2, 3), and
    while :meth:`fit` runs, the map of the model's own decision y masks the features (Eq. 4), from which the rest of the
    frozen network computes new logits u:

    .. math:: L^{(y)} = \sum_k w^{(y)}_k A_k + b^{(y)}, \qquad A_k \leftarrow A_k \odot \sigma(L^{(y)})

    .. math:: \lambda_1 \mathrm{TV}(S) + \lambda_2 \mathrm{AV}(S) + \lambda_3 \mathrm{CE}(y, u), \quad
              \mathrm{AV} = \frac{1}{hw} \sum s_{p,q}^{\lambda_4}, \quad
              \mathrm{TV} = \sum (s_{p,q} - s_{p,q+1})^2 + (s_{p,q} - s_{p+1,q})^2

    with :math:`S = \sigma(L^{(y)})` (Eq. 6-8). The images run through the frozen network once per step, the masked
    features only through the layers after it. To explain, the map is scaled to [0, 1] over space, then enlarged (Eq.
    9).

    Args:
        model: see :class:`~attrib_zoo.attribution.Attribution`; must return ``(N, K)`` logits or one value per image.
        layers: the layer to read; ``None`` for the last convolutional one (VGG-16: after its ReLU; ResNet: the last
            stage).
        recipe: ``"paper"``: the equations above; ``"released"``: what the authors' code does where it differs: maps
            of all decisions of the batch in AV and TV, an offset of 5e-4 in AV, the border in TV, TV over twice the
            batch size, and, unless ``fit`` is given ``schedule="short"``, a learning rate that decays in the first 12
            of 26 epochs only and is doubled for biases.
        start: ``"random"`` weights, or ``"rows"``: what the classifier itself reads from the layer, as in
            :class:`~attrib_zoo.TTAME`; then every class has a map, seen in the fit or not, and ``fit`` trains a
            correction that all classes share. ``"auto"``: rows in a fit that shows fewer than 100 images per class
            (steps times batch size, over K), where they were measured to be better; always random with
            ``recipe="released"``.
        ce_only: the paper's ablation (*): the cross-entropy alone.
        after_pool: the layer after the last max-pooling instead (†), in networks that have one there.
        lambda_tv: λ1.
        lambda_av: λ2.
        lambda_ce: λ3.
        area_power: λ4.
        score: in which sense the model decides: ``"softmax"``, one class of all, or ``"sigmoid"`` for multi-label
            heads: each class by itself. The cross-entropy of fit and the confidence of its validation follow.
        upsample: ``False`` returns ``(N, 1, h, w)``.
        smooth: odd side of a mean filter over the cells of the map; ``None`` for none.
        scale: ``"min-max"``, ``"rank"``, ``"positive"``, or ``None`` for ``"min-max"``.

    Example:
        >>> import torch
        >>> from attrib_zoo import LCAMFm
        >>> from attrib_zoo.synthetic import tiny_cnn
        >>> loader = [torch.randn(4, 3, 32, 32) for _ in range(40)]
        >>> explainer = LCAMFm(tiny_cnn()).fit(loader, max_steps=40, show_progress=False)
        >>> explainer.maps(loader[0]).shape
        torch.Size([4, 6, 8, 8])

    References:
        I. Gkartzonika, N. Gkalelis, V. Mezaris: Learning Visual Explanations for DCNN-Based Image Classifiers Using an
        Attention Mechanism. ECCV Workshops, 2022.

    Deviations:
        The paper starts from random weights; with few images per class ``start="auto"`` does not. The schedule: below
        20 000 steps ``fit`` uses one that trains in few (Adam; the convolution starts at zero, as a common row plus a
        row per class). The paper's own is SGD at 1e-4, with the factor 0.95 after each of 25 epochs; in a shorter fit
        the 25 changes lie closer. It has 0.75 and 7 epochs for VGG-16, which are those of
        ``attrib-zoo reproduce lcam``, and says nothing of momentum and weight decay: 0.9 (Nesterov) and 5e-4 here.
        Vision transformers are refused, as a class token does not read the last patch tokens. Validation shows masked
        images, since the maps are for images.
    """

    models: ClassVar[tuple[str, ...]] = ("cnn",)

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        recipe: str = "paper",
        start: str = "auto",
        ce_only: bool = False,
        after_pool: bool = False,
        lambda_tv: float = 0.01,
        lambda_av: float = 2.0,
        lambda_ce: float = 1.5,
        area_power: float = 0.3,
        score: str = "softmax",
        upsample: bool = True,
        smooth: int | None = None,
        scale: str | None = None,
    ) -> None:
        super().__init__(
            model,
            layers,
            recipe=recipe,
            start=start,
            ce_only=ce_only,
            after_pool=after_pool,
            lambda_tv=lambda_tv,
            lambda_av=lambda_av,
            lambda_ce=lambda_ce,
            area_power=area_power,
            score=score,
            upsample=upsample,
            smooth=smooth,
            scale=scale,
        )

    def resolve_layers(self, inputs: Tensor, args: Sequence[Any]) -> tuple[Tap, ...]:
        taps = super().resolve_layers(inputs, args)
        if is_transformer(self.model) or taps[0].grid.is_tokens:
            raise UnsupportedModelError(
                f"LCAMFm: masks the feature maps of a convolutional network, got {taps[0].name!r} of "
                f"{type(self.model).__name__}, a part of a transformer; use LCAMImg or TTAME"
            )
        return taps

    def decide(
        self, taps: Sequence[Tap], images: Tensor, num_classes: int, schedule: Schedule, steps: int
    ) -> dict[str, Any]:
        return decide_masking(self.model, images, "raw", None, None)

    def _see(
        self, images: Tensor, args: tuple[Any, ...], network: nn.Module
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        with replay(self.model, images, args, self.taps(images, args)[0]) as again:
            classes = two_logits(again.outputs).argmax(1)
            maps, mask = self._attend(network, at_least_float32(again.maps), classes)
            masked = again(again.maps * mask.to(again.maps.dtype), torch.arange(len(images)))
        return again.outputs, classes, maps, mask, masked


class LCAMImg(_LCAM):
    r"""Which regions of the image let the model keep its decision; trained once, one pass for a map.

    One 1x1 convolution turns the last convolutional features A, ``(N, C, h, w)``, into a map per class (Eq. 2, 3), and
    while :meth:`fit` runs, the enlarged map of the model's own decision y masks the image (Eq. 5), which the frozen
    network sees again, giving the logits u:

    .. math:: L^{(y)} = \sum_k w^{(y)}_k A_k + b^{(y)}, \qquad X_c \leftarrow X_c \odot \theta(\sigma(L^{(y)}))

    .. math:: \lambda_1 \mathrm{TV}(S) + \lambda_2 \mathrm{AV}(S) + \lambda_3 \mathrm{CE}(y, u), \quad
              \mathrm{AV} = \frac{1}{hw} \sum s_{p,q}^{\lambda_4}, \quad
              \mathrm{TV} = \sum (s_{p,q} - s_{p,q+1})^2 + (s_{p,q} - s_{p+1,q})^2

    with :math:`S = \sigma(L^{(y)})` (Eq. 6-8). For explaining, the map is scaled to [0, 1] over space, then enlarged
    (Eq. 9).

    Args:
        model: see :class:`~attrib_zoo.attribution.Attribution`; must return ``(N, K)`` logits or one value per image.
        layers: the layer to read; ``None`` for the last convolutional one (VGG-16: after its ReLU; ResNet: the last
            stage), or the last block of a transformer that has a gradient.
        recipe: ``"paper"`` or ``"released"``; see :class:`LCAMFm`.
        start: ``"random"`` weights, or ``"rows"``: what the classifier itself reads from the layer, as in
            :class:`~attrib_zoo.TTAME`; then every class has a map, seen in the fit or not, and ``fit`` trains a
            correction that all classes share. ``"auto"``: rows in a fit that shows fewer than 100 images per class
            (steps times batch size, over K), where they were measured to be better; always random with
            ``recipe="released"``.
        ce_only: the paper's ablation (*): the cross-entropy alone.
        after_pool: the layer after the last max-pooling instead (†), in networks that have one there.
        lambda_tv: λ1.
        lambda_av: λ2.
        lambda_ce: λ3.
        area_power: λ4.
        score: in which sense the model decides: ``"softmax"``, one class of all, or ``"sigmoid"`` for multi-label
            heads: each class by itself. The cross-entropy of fit and the confidence of its validation follow.
        masking: what a mask of 0 shows: ``"raw"``: black; ``"standardized"``: the mean colour; ``"auto"``:
            standardised for transformers.
        mean: of the standardisation, per channel; ``None`` for the model's own configuration, else ImageNet's.
        std: as ``mean``.
        upsample: ``False`` returns ``(N, 1, h, w)``.
        smooth: odd side of a mean filter over the cells of the map; ``None`` for none.
        scale: ``"min-max"``, ``"rank"``, ``"positive"``, or ``None`` for ``"min-max"``.

    Example:
        >>> import torch
        >>> from attrib_zoo import LCAMImg
        >>> from attrib_zoo.synthetic import tiny_cnn
        >>> loader = [torch.randn(4, 3, 32, 32) for _ in range(40)]
        >>> explainer = LCAMImg(tiny_cnn()).fit(loader, max_steps=40, show_progress=False)
        >>> explainer.maps(loader[0]).shape
        torch.Size([4, 6, 8, 8])

    References:
        I. Gkartzonika, N. Gkalelis, V. Mezaris: Learning Visual Explanations for DCNN-Based Image Classifiers Using an
        Attention Mechanism. ECCV Workshops, 2022.

    Deviations:
        The schedule, as in :class:`LCAMFm`. The paper has CNNs only; on transformers the layer's patch tokens are read.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        recipe: str = "paper",
        start: str = "auto",
        ce_only: bool = False,
        after_pool: bool = False,
        lambda_tv: float = 0.01,
        lambda_av: float = 2.0,
        lambda_ce: float = 1.5,
        area_power: float = 0.3,
        score: str = "softmax",
        masking: str = "auto",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        upsample: bool = True,
        smooth: int | None = None,
        scale: str | None = None,
    ) -> None:
        super().__init__(
            model,
            layers,
            recipe=recipe,
            start=start,
            ce_only=ce_only,
            after_pool=after_pool,
            lambda_tv=lambda_tv,
            lambda_av=lambda_av,
            lambda_ce=lambda_ce,
            area_power=area_power,
            score=score,
            upsample=upsample,
            smooth=smooth,
            scale=scale,
        )
        self.masking = check_choice("masking", masking, MASKINGS)
        self.mean, self.std = check_statistics(mean, std)

    def decide(
        self, taps: Sequence[Tap], images: Tensor, num_classes: int, schedule: Schedule, steps: int
    ) -> dict[str, Any]:
        return decide_masking(self.model, images, self.masking, self.mean, self.std)

    def _see(
        self, images: Tensor, args: tuple[Any, ...], network: nn.Module
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        clean, (features,) = self._features(images, args)
        classes = two_logits(clean).argmax(1)
        maps, mask = self._attend(network, features, classes)
        shown = blend(images, enlarge(mask, images.shape[-2:]).to(images.dtype), self.baseline_of(images))
        return clean, classes, maps, mask, forward(self.model, shown, args)
