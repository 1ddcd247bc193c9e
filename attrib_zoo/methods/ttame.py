"""T-TAME: a trainable attention mechanism for CNNs and vision transformers (Ntrougkas et al., IEEE Access 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.capture import forward
from attrib_zoo.backbone.layers.resolve import Tap
from attrib_zoo.errors import check_choice, check_number
from attrib_zoo.masking import blend, upsample
from attrib_zoo.methods.bases.trainable import TrainableAttribution
from attrib_zoo.training.fit import Terms
from attrib_zoo.training.head import ACTIVATIONS, AttentionHead
from attrib_zoo.training.hidden import MASKINGS, check_statistics, decide_masking, hidden
from attrib_zoo.training.losses import area, cross_entropy, two_logits, variation
from attrib_zoo.training.schedule import LOGIT_STEP, Schedule, is_long
from attrib_zoo.training.session import attend

_RECIPES: dict[str, dict[str, Any]] = {
    "paper": {"variation": "mean", "border_penalty": 0.0, "area_offset": 0.0, "psi": "auto"},
    "released": {"variation": "sum", "border_penalty": 0.3, "area_offset": 5e-4, "psi": "batch"},
}
_BRANCH_LR = 1e-3
_IMAGES_PER_CLASS = 100  # with fewer in a short fit, classes that are not the image's own cost more than they teach


class TTAME(TrainableAttribution):
    r"""Which regions let the model keep its decision; a trained attention mechanism gives the map in one pass.

    The features L_i of a few layers go through feature branches and a fusing 1x1 convolution to one map per class
    (Eq. 7-10), with h and w those of the largest feature map:

    .. math:: A_i = \mathrm{ReLU}(\mathrm{BN}(\mathrm{conv}_{1\times1}(L_i)) + L_i), \qquad
              \mathcal{E} = \sigma(\mathrm{conv}_{1\times1}([\mathrm{up}(A_1); \dots; \mathrm{up}(A_s)]))

    :meth:`fit` shows the frozen model the image through the map of its own decision y, and asks it to decide alike
    while the map stays small (Eq. 11, 15-17):

    .. math:: \lambda_1 \, \mathrm{CE}(f(\mathcal{E}_y \odot x), y) + \lambda_2 (E + \lambda_3 V), \quad
              E = \frac1S \sum \mathcal{E}_{n,j,k}^{\lambda_4}, \quad V = \frac{1}{2S} \sum (\Delta_j \mathcal{E})^2
              + (\Delta_k \mathcal{E})^2

    over Ψ, y's map and B - 1 maps of other classes drawn at random for each image (Eq. 12), with S the number of
    values in Ψ. CNNs see the raw image masked and then standardised (Eq. 13), vision transformers the standardised
    image masked (Eq. 14). For explaining, the sigmoid gives way to min-max scaling over space, before upsampling:
    the map lies in [0, 1].

    Only the wanted classes are computed, each layer at its own resolution: the 1x1 fusion and the bilinear upsampling
    commute. A class that never was the model's decision during ``fit`` has an untrained row: ``class_counts_`` has
    the counts, and :meth:`attribute` warns once.

    Args:
        model: see :class:`~attrib_zoo.attribution.Attribution`; must return ``(N, K)`` logits or one value per image.
        layers: see :class:`~attrib_zoo.attribution.Attribution`; ``None`` for the paper's: the last three max-pools
            (VGG-16), the last three stages (ResNet-50), the last three blocks (ViT-B-16), and the same rule elsewhere.
        recipe: ``"paper"``: the equations above; ``"released"``: what the authors' code does where it differs, i.e.
            the defaults of the next options marked †, ``norm1`` of the last blocks of vision transformers, and the
            long schedule unless ``fit`` is given ``schedule="short"``. The released variation grows with the number
            of maps, so there the batch size changes the trade-off; scale ``lambda_variation`` by 32/B to keep it.
        lambda_ce: λ1, weight of the cross-entropy.
        lambda_tv: λ2, weight of area and variation.
        lambda_variation: λ3, weight of the variation V inside.
        area_power: λ4.
        variation: † ``"mean"`` (Eq. 17) or ``"sum"`` (the sum over twice the batch size).
        border_penalty: † weight of squared values on the map's border, 0 or 0.3.
        area_offset: † added to the mask before the power, 0 or 5e-4.
        psi: † the other classes: ``"random"`` (Eq. 12), ``"batch"`` (decisions of the batch), ``"own"`` (none), or
            ``"auto"``: random, but none in a short fit that shows fewer than 100 images per class.
        num_layers: 1, 2 or 3 layers when ``layers=None``, the last ones (Table 6).
        skip: the skip connection of the branches (Table 6).
        batch_norm: the batch normalisation of the branches (Table 6).
        branch_activation: ``"relu"`` or ``"sigmoid"`` (Table 6).
        masking: ``"raw"`` (Eq. 13), ``"standardized"`` (Eq. 14), or ``"auto"``: standardised for vision transformers
            (Table 7; ``backbone.kind.is_transformer``). ``evaluate`` hides pixels as the fit did.
        mean: of the standardisation, per channel; ``None`` for the model's own configuration, else ImageNet's.
        std: as ``mean``.
        upsample: ``False`` returns ``(N, 1, h, w)``.

    Example:
        >>> import torch
        >>> from torchvision.models import squeezenet1_1
        >>> from attrib_zoo import TTAME
        >>> model = squeezenet1_1(weights=None)
        >>> loader = [torch.randn(4, 3, 64, 64) for _ in range(30)]
        >>> explainer = TTAME(model).fit(loader, max_steps=30, show_progress=False)
        >>> explainer.maps(loader[0]).shape
        torch.Size([4, 1000, 15, 15])

    References:
        M. V. Ntrougkas, N. Gkalelis, V. Mezaris: T-TAME: Trainable Attention Mechanism for Explaining Convolutional
        Networks and Vision Transformers. IEEE Access, 2024.

    Deviations:
        The schedule: the paper's needs hundreds of thousands of steps; below 20 000 ``fit`` uses one that trains in
        few (Adam; the fusing convolution starts at zero, as a common row plus a row per class), and with few images
        per class it leaves the other classes out of Ψ. The random classes of Ψ are distinct. Dropout and batch
        normalisation of the frozen model always run in eval mode. Where the paper is silent (momentum, weight decay,
        initial weights) the released values are used. The published numbers are not promised: see the method's page
        for every known difference.
    """

    family: ClassVar[str] = "trained"
    paper: ClassVar[str] = "Ntrougkas et al., IEEE Access 2024"
    default_epochs: ClassVar[int] = 8

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        recipe: str = "paper",
        lambda_ce: float = 1.5,
        lambda_tv: float = 2.0,
        lambda_variation: float = 0.005,
        area_power: float = 0.3,
        variation: str | None = None,
        border_penalty: float | None = None,
        area_offset: float | None = None,
        psi: str | None = None,
        num_layers: int = 3,
        skip: bool = True,
        batch_norm: bool = True,
        branch_activation: str = "relu",
        masking: str = "auto",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        upsample: bool = True,
    ) -> None:
        super().__init__(model, layers, upsample=upsample)
        self.recipe = check_choice("recipe", recipe, tuple(_RECIPES))
        defaults = _RECIPES[recipe]
        self.lambda_ce = check_number("lambda_ce", lambda_ce, least=0.0)
        self.lambda_tv = check_number("lambda_tv", lambda_tv, least=0.0)
        self.lambda_variation = check_number("lambda_variation", lambda_variation, least=0.0)
        self.area_power = check_number("area_power", area_power, least=1e-6)
        given: dict[str, Any] = {
            "variation": variation,
            "border_penalty": border_penalty,
            "area_offset": area_offset,
            "psi": psi,
        }
        chosen = {name: defaults[name] if value is None else value for name, value in given.items()}
        self.variation = check_choice("variation", chosen["variation"], ("mean", "sum"))
        self.border_penalty = check_number("border_penalty", chosen["border_penalty"], least=0.0)
        self.area_offset = check_number("area_offset", chosen["area_offset"], least=0.0)
        self.psi = check_choice("psi", chosen["psi"], ("auto", "random", "batch", "own"))
        self.num_layers = check_choice("num_layers", num_layers, (1, 2, 3))
        self.skip = bool(skip)
        self.batch_norm = bool(batch_norm)
        self.branch_activation = check_choice("branch_activation", branch_activation, ACTIVATIONS)
        self.masking = check_choice("masking", masking, MASKINGS)
        self.mean, self.std = check_statistics(mean, std)

    def _layer_rule(self) -> tuple[str, int]:
        return ("norms" if self.recipe == "released" else "outputs"), self.num_layers

    # ------------------------------------------------------------------ training

    def _network(self, channels: Sequence[int], num_classes: int, generator: torch.Generator | None) -> nn.Module:
        return AttentionHead(
            channels,
            num_classes,
            skip=self.skip,
            batch_norm=self.batch_norm,
            activation=self.branch_activation,
            generator=generator,
        )

    def _complete(self, network: nn.Module) -> None:
        network.fold()  # type: ignore[operator]  # an AttentionHead

    def _schedule(self, asked: str, steps: int, network: nn.Module, features: Sequence[Tensor]) -> Schedule:
        if is_long(asked, steps, self.recipe):
            return Schedule(self.recipe, "sgd", 1e-3, weight_decay=5e-4)
        network.share_rows(network.reach(features))  # type: ignore[operator]  # an AttentionHead
        return Schedule("short", "adam", LOGIT_STEP, branch_lr=_BRANCH_LR)

    def _decide(
        self, taps: Sequence[Tap], images: Tensor, num_classes: int, schedule: Schedule, steps: int
    ) -> dict[str, Any]:
        masking = decide_masking(self.model, images, self.masking, self.mean, self.std)
        psi = self.psi
        if psi == "auto":
            few = schedule.name == "short" and steps * len(images) < _IMAGES_PER_CLASS * num_classes
            psi = "own" if few else "random"
        return {**masking, "psi": psi}

    def _terms(self, network: nn.Module, images: Tensor, args: tuple[Any, ...], generator: torch.Generator) -> Terms:
        clean, features = self._features(images, args)
        logits = two_logits(clean)
        classes = logits.argmax(1)
        rows, own = extra_classes(classes, logits.shape[1], self._ready().decisions["psi"], generator)
        attention = attend(network, features, rows)
        own_map = attention[torch.arange(len(images), device=own.device), own].unsqueeze(1).sigmoid()
        mask = upsample(own_map, images.shape[-2:]).to(images.dtype)
        masked = forward(self.model, blend(images, mask, self._baseline(images)), args)
        parts = {
            "ce": cross_entropy(masked, classes).mean(),
            "area": area(attention, self.area_power, self.area_offset).mean(),
            "variation": self._variation(attention.sigmoid()).mean(),
        }
        everything = self._loss(
            cross_entropy(clean, classes).mean(),
            (1 + self.area_offset) ** self.area_power,
            self._variation(torch.ones_like(attention[:1])).mean(),
        )
        return Terms(
            self._loss(parts["ce"], parts["area"], parts["variation"]),
            {**parts, "mask": own_map.mean(), "everything": everything},
            classes,
        )

    def _loss(self, ce: Tensor, area_term: Tensor | float, variation_term: Tensor) -> Tensor:
        """Eq. 11 and 15."""
        return self.lambda_ce * ce + self.lambda_tv * (area_term + self.lambda_variation * variation_term)

    def _variation(self, masks: Tensor) -> Tensor:
        return variation(masks, total=self.variation == "sum", border=self.border_penalty)

    def _baseline(self, images: Tensor) -> Tensor | float:
        """What is seen where the mask is 0: black (Eq. 13) or the mean colour (Eq. 14)."""
        return hidden(self._ready().decisions, images)


def extra_classes(classes: Tensor, count: int, psi: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The classes of Ψ for each image (Eq. 12).

    Args:
        classes: ``(N,)``, each image's own class.
        count: K.
        psi: ``"random"``: the own class and min(N, K) - 1 distinct others, uniform over the K - 1; ``"batch"``: the
            classes of all images, duplicates included; ``"own"``: the own class.
        generator: a CPU generator, so that all devices draw alike.

    Returns:
        Classes ``(N, M)`` and, for each image, the column of its own class, ``(N,)``.
    """
    batch = len(classes)
    first = torch.zeros(batch, dtype=torch.long, device=classes.device)
    if psi == "batch":
        return classes.expand(batch, batch), torch.arange(batch, device=classes.device)
    if psi == "own":
        return classes.unsqueeze(1), first
    others = min(batch, count) - 1
    drawn = torch.rand(batch, count - 1, generator=generator).topk(others, dim=1).indices.to(classes.device)
    drawn = drawn + (drawn >= classes.unsqueeze(1)).long()  # step over the own class
    return torch.cat([classes.unsqueeze(1), drawn], dim=1), first
