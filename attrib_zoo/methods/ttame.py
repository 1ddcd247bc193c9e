"""T-TAME: a trainable attention mechanism for CNNs and vision transformers (Ntrougkas et al., IEEE Access 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.capture import forward, select_args
from attrib_zoo.backbone.grid import ATTENDED
from attrib_zoo.backbone.kind import is_transformer
from attrib_zoo.backbone.layers.resolve import Tap
from attrib_zoo.backbone.targets import Target, TargetQuery
from attrib_zoo.backbone.vit.attention import attended_taps, check_attended
from attrib_zoo.errors import AttribZooError, check_choice
from attrib_zoo.masking import blend, blur, mean_filter, upsample
from attrib_zoo.methods.bases.trainable import IMAGES_PER_CLASS, TrainableAttribution
from attrib_zoo.training.checkpoint import Checkpoint
from attrib_zoo.training.fit import Terms
from attrib_zoo.training.head import AttentionHead
from attrib_zoo.training.hidden import MASKINGS, check_statistics, decide_masking, hidden
from attrib_zoo.training.losses import FIT_SCORES, area, cross_entropy, gone, order_mask, two_logits, variation
from attrib_zoo.training.maps import head_maps
from attrib_zoo.training.recipe import RECIPES, Recipe, as_recipe
from attrib_zoo.training.rows import PLACE_IMAGES, ROW_IMAGES, place_means, rows_schedule, start_from_rows
from attrib_zoo.training.schedule import LOGIT_STEP, Schedule, is_long

_BRANCH_LR = 1e-3
_MOST_STEPS = 200  # of a fit without ``epochs`` and ``max_steps``, where it starts from rows
_LEAST_FOR_PLACES = 32  # images; what fewer have in a place gave classes away, nearly as much as with none forgotten
_SHARES = (0.05, 0.9)  # of the cells that the order loss shows or hides
_BLUR = 10 / 224  # standard deviation of the blur that hides, as a share of the image's width


class TTAME(TrainableAttribution):
    r"""Which regions let the model keep its decision; a trained attention mechanism gives the map in one pass.

    The features L_i of a few layers go through feature branches and a fusing 1x1 convolution to one map per class
    (Eq. 7-10), with h and w those of the largest feature map:

    .. math:: A_i = \mathrm{ReLU}(\mathrm{BN}(\mathrm{conv}_{1\times1}(L_i)) + L_i), \qquad
              \mathcal{E} = \sigma(\mathrm{conv}_{1\times1}([\mathrm{up}(A_1); \dots; \mathrm{up}(A_s)]))

    **recipe="rows"**, the default with fewer than 100 images per class, starts from what the classifier knows. The row
    of class c in the fusing convolution is the gradient of its score with respect to the layer, averaged over positions
    and images, minus the mean row of all classes,

    .. math:: w_c = \mathbb{E}_x \frac{1}{hw} \sum_{i,j} \frac{\partial S_c}{\partial L_{i,j}}, \qquad
              e_c = \sum_i (w_{c,i} - \bar w_i) L_i / s_i, \qquad
              \mathcal{E}_c = e_c - \frac{0.6}{3} \sum_{j \in R} e_j

    with s_i the layer's mean spread over space, R the three other classes with the largest logits, and a 3x3 mean
    filter on the result. Where the model ends in pooling and a linear layer that is CAM, exactly. So after :meth:`fit`
    *every* class has a map, without a single training step.

    **recipe="attended"**, the default for a vision transformer with so few images, reads what the class token takes
    from each patch j in the last four attention modules, its attention times the patch's value, all heads side by side,

    .. math:: L_{i,j} = A^{(i)}_{0j} (v^{(i)}_j - \bar v^{(i)}_j), \qquad
              w_c = \mathbb{E}_x \frac{\partial S_c}{\partial \sum_j A^{(i)}_{0j} v^{(i)}_j}

    with :math:`\bar v_j` the mean of the values at that position over the fit's images. The products :math:`A_{0j} v_j`
    add up to what the class token becomes, so a class's row reads what each patch contributes to its score: with the
    image's own gradient in place of the mean, :math:`w_c \cdot A_{0j} v_j` is attention times its gradient, summed over
    heads. The mean needs no backward pass at explanation time. Models whose head reads other tokens than one class
    token, or whose attention cannot be read, have ``"rows"``: the last three blocks that have a gradient.
    In place of the mean filter, each cell p becomes a mean of the 5x5 cells q around it that are like it,

    .. math:: \mathcal{E}_p \leftarrow \sum_q \mathrm{softmax}_q\Big( \frac{1}{0.3\,L} \sum_{i=1}^L
              \cos(\tilde v^{(i)}_p, \tilde v^{(i)}_q) \Big) \mathcal{E}_q

    with :math:`\tilde v_j` the values :math:`v_j - \bar v_j` minus their mean over the image, in the L = 4 modules.

    The steps of :meth:`fit` in these two, none unless ``epochs`` or ``max_steps`` ask for them, train one correction
    that all classes share, :math:`w_c \leftarrow w_c + w_c M + g`, so that what is learnt on one class serves those
    that never come up: the frozen model sees each image through the highest cells of its map or through all others, at
    a share q drawn from 0.05 to 0.9, and the decision y must persist or vanish,

    .. math:: m = \sigma\left(\frac{\mathcal{E}_y - Q_{1-q}(\mathcal{E}_y)}{\frac12 \mathrm{std}\,\mathcal{E}_y}
              \right), \qquad \mathrm{CE}(f(m \odot x), y) \ \text{ or } \ -\log(1 - p_y((1 - m) \odot x))

    where what is hidden is black, the mean colour or a blur. The correction is folded into the convolution at the end.

    **recipe="paper"**, the default with more, is the method of the paper: :meth:`fit` shows the frozen model the image
    masked by the map of its own decision y, and trains the map to preserve the decision while staying small (Eq. 11,
    15-17):

    .. math:: \lambda_1 \, \mathrm{CE}(f(\mathcal{E}_y \odot x), y) + \lambda_2 (E + \lambda_3 V), \quad
              E = \frac1S \sum \mathcal{E}_{n,j,k}^{\lambda_4}, \quad V = \frac{1}{2S} \sum (\Delta_j \mathcal{E})^2
              + (\Delta_k \mathcal{E})^2

    over Ψ, y's map and B - 1 maps of other classes drawn at random for each image (Eq. 12), with S the number of
    values in Ψ. A class that was never the model's decision during ``fit`` has an untrained row then, and
    :meth:`attribute` warns once. CNNs see the raw image masked and then standardised (Eq. 13), vision transformers the
    standardised image masked (Eq. 14).

    To explain, the sigmoid is replaced by min-max scaling over space, before upsampling: the map lies in [0, 1]. Only
    the requested classes are computed, each layer at its own resolution: the 1x1 fusion and the bilinear upsampling
    commute. ``class_counts_`` is the number of images of each class in ``fit``.

    Args:
        model: see :class:`~attrib_zoo.attribution.Attribution`; must return ``(N, K)`` logits or one value per image.
        layers: see :class:`~attrib_zoo.attribution.Attribution`; ``None`` for the recipe's: ``"rows"`` reads the last
            stage of a CNN and the last three blocks of a transformer that have a gradient, ``"attended"`` the last four
            attention modules, named ``"blocks.11.attn['attended']"``; the paper's are the last
            three max-pools (VGG-16), stages (ResNet-50) or blocks (ViT-B-16), and the same rule elsewhere.
        recipe: ``"auto"``: the paper's in a fit that shows 100 images per class or more (steps times batch size, over
            K), else ``"attended"`` for a vision transformer with a class token and ``"rows"`` for any other model, as
            was measured to be better on either side; or one of these by name; or
            ``"released"``: what the authors' code does where it differs from their equations, i.e. the defaults of the
            next options marked †, ``norm1`` of the last blocks of vision transformers, and the long schedule unless
            ``fit`` is given ``schedule="short"``; or a :class:`~attrib_zoo.training.recipe.Recipe` of your own, such as
            ``RECIPES["rows"].but(contrast=0)``. The released variation grows with the number of maps, so there the
            batch size changes the trade-off; scale ``lambda_variation`` by 32/B to keep it. The next options, down to
            ``branch_activation``, override fields of the recipe; ``None`` keeps them.
        lambda_ce: λ1, weight of the cross-entropy.
        lambda_tv: λ2, weight of area and variation.
        lambda_variation: λ3, weight of the variation V within that term.
        area_power: λ4.
        variation: † ``"mean"`` (Eq. 17) or ``"sum"`` (the sum over twice the batch size).
        border_penalty: † weight of squared values on the map's border, 0 or 0.3.
        area_offset: † added to the mask before the power, 0 or 5e-4.
        psi: † the other classes: ``"random"`` (Eq. 12), ``"batch"`` (decisions of the batch), ``"own"`` (none), or
            ``"auto"``: random, but none in a short fit with fewer than 100 images per class.
        num_layers: how many layers when ``layers=None``, the last ones; 1, 2 or 3 in the paper (Table 6).
        skip: the skip connection of the branches (Table 6).
        batch_norm: the batch normalisation of the branches (Table 6).
        branch_activation: ``"relu"`` or ``"sigmoid"`` (Table 6).
        masking: ``"raw"`` (Eq. 13), ``"standardized"`` (Eq. 14), or ``"auto"``: standardised for vision transformers
            (Table 7; ``backbone.kind.is_transformer``). ``evaluate`` hides pixels in the same way as the fit.
        score: in which sense the model decides: ``"softmax"``, one class of all, or ``"sigmoid"`` for multi-label
            heads: each class by itself. The cross-entropy of fit and the confidence of its validation follow.
        mean: of the standardisation, per channel; ``None`` for the model's own configuration, else ImageNet's.
        std: as ``mean``.
        upsample: ``False`` returns ``(N, 1, h, w)``.
        smooth: see :class:`~attrib_zoo.attribution.Attribution`; ``None`` for the recipe's.
        scale: see :class:`~attrib_zoo.attribution.Attribution`; ``None`` for the recipe's.

    Example:
        >>> import torch
        >>> from torchvision.models import squeezenet1_1
        >>> from attrib_zoo import TTAME
        >>> model = squeezenet1_1(weights=None)
        >>> loader = [torch.randn(4, 3, 64, 64) for _ in range(5)]
        >>> explainer = TTAME(model).fit(loader, max_steps=5, show_progress=False)
        >>> explainer.maps(loader[0]).shape
        torch.Size([4, 1000, 3, 3])

    References:
        M. V. Ntrougkas, N. Gkalelis, V. Mezaris: T-TAME: Trainable Attention Mechanism for Explaining Convolutional
        Networks and Vision Transformers. IEEE Access, 2024.

    Deviations:
        The recipes "rows" and "attended" are this library's: start, features, contrast, filters, layers and loss are
        not the paper's, and they read the features without branches (these would be identities at the start, and the
        steps can train the shared matrix M just as well). With ``recipe="paper"`` the schedule differs: the paper's
        needs hundreds of thousands of steps; below 20 000 ``fit`` uses one that converges in few (Adam; the fusing
        convolution starts at zero, as a common row plus a row per class), and with few images per class it leaves the
        other classes out of Ψ. The random classes of Ψ are distinct. Dropout and batch normalisation of the frozen
        model always run in eval mode. Where the paper is silent (momentum, weight decay, initial weights) the released
        values are used. The published numbers may not be reproduced exactly: the method's page lists every known
        difference.
    """

    family: ClassVar[str] = "trained"
    reads_attended: ClassVar[bool] = True
    paper: ClassVar[str] = "Ntrougkas et al., IEEE Access 2024"
    default_epochs: ClassVar[int] = 8

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        recipe: str | Recipe | Mapping[str, Any] = "auto",
        lambda_ce: float | None = None,
        lambda_tv: float | None = None,
        lambda_variation: float | None = None,
        area_power: float | None = None,
        variation: str | None = None,
        border_penalty: float | None = None,
        area_offset: float | None = None,
        psi: str | None = None,
        num_layers: int | None = None,
        skip: bool | None = None,
        batch_norm: bool | None = None,
        branch_activation: str | None = None,
        masking: str = "auto",
        score: str = "softmax",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        upsample: bool = True,
        smooth: int | None = None,
        scale: str | None = None,
    ) -> None:
        super().__init__(model, layers, upsample=upsample, smooth=smooth, scale=scale)
        self._changes: dict[str, Any] = {
            "lambda_ce": lambda_ce,
            "lambda_tv": lambda_tv,
            "lambda_variation": lambda_variation,
            "area_power": area_power,
            "variation": variation,
            "border_penalty": border_penalty,
            "area_offset": area_offset,
            "psi": psi,
            "num_layers": num_layers,
            "skip": skip,
            "batch_norm": batch_norm,
            "branch_activation": branch_activation,
            "smooth": self.smooth,
            "scale": self.scale,
        }
        if isinstance(recipe, str):
            check_choice("recipe", recipe, ("auto", *RECIPES))
        self._automatic = isinstance(recipe, str) and recipe == "auto"  # until a fit has decided
        self._follow("rows" if self._automatic else recipe)
        self.masking = check_choice("masking", masking, MASKINGS)
        self.score = check_choice("score", score, FIT_SCORES)
        self.mean, self.std = check_statistics(mean, std)

    def options(self) -> dict[str, Any]:
        """The recipe, as its name or its fields, and the options that are not part of it."""
        own = ("masking", "score", "mean", "std", "upsample")
        shown = {"smooth": self.smooth, "scale": self.scale}
        if self._automatic and not self.is_fitted:
            return {"recipe": "auto", **self._changes, **{name: getattr(self, name) for name in own}}
        return {"recipe": self.recipe.facts(), **{name: getattr(self, name) for name in own}, **shown}

    def written_options(self) -> dict[str, Any]:
        """All fields of the recipe: what its name stands for may be another one in a later version."""
        return self.options() | {"recipe": asdict(self.recipe)}

    def _follow(self, recipe: str | Recipe | Mapping[str, Any]) -> None:
        self.recipe = as_recipe(recipe).but(**self._changes)
        self.smooth, self.scale = self.recipe.smooth, self.recipe.scale

    def layer_rule(self) -> tuple[str, int]:
        return self.recipe.layer_rule, self.recipe.num_layers

    def resolve_layers(self, inputs: Tensor, args: Sequence[Any]) -> tuple[Tap, ...]:
        if self._fitted is not None or self.recipe.layer_rule != ATTENDED:
            taps = super().resolve_layers(inputs, args)
        elif self.layers is None:
            return attended_taps(self.model, inputs, args, self.recipe.num_layers)
        else:
            taps = self._tested(self.layers, inputs, args)
        if any(tap.attended for tap in taps):
            check_attended(self.model, taps, inputs, args)
        return taps

    # ------------------------------------------------------------------ explain

    @property
    def rivals(self) -> tuple[int, float]:
        return self.recipe.contrast, self.recipe.contrast_weight

    def choose_targets(self, outputs: Tensor, query: TargetQuery) -> Target:
        target = query.resolve(outputs)
        if target.contrasts or not self.recipe.contrast:
            return target
        return target.against(two_logits(outputs), *self.rivals)

    def all_maps(self, outputs: Tensor, maps: Tensor) -> Tensor:
        if not self.recipe.contrast:
            return maps
        return less_rivals(maps, two_logits(outputs), self.recipe.contrast, self.recipe.contrast_weight)

    def some_maps(self, outputs: Tensor, network: nn.Module, features: Sequence[Tensor], classes: Tensor) -> Tensor:
        maps = super().some_maps(outputs, network, features, classes)
        logits = two_logits(outputs)
        k = min(self.recipe.contrast, logits.shape[1] - 1)
        if not k:
            return maps
        best = logits.topk(k + 1, dim=1).indices
        leading = head_maps(network, features, best)
        return less_leading(maps, classes.expand(len(maps), -1), leading, best, self.recipe.contrast_weight)

    # ------------------------------------------------------------------ training

    def build_network(self, channels: Sequence[int], num_classes: int, generator: torch.Generator | None) -> nn.Module:
        return AttentionHead(
            channels,
            num_classes,
            branches=self.recipe.branches,
            skip=self.recipe.skip,
            batch_norm=self.recipe.batch_norm,
            activation=self.recipe.branch_activation,
            alike=self.recipe.alike,
            generator=generator,
        )

    def finish_network(self, network: nn.Module) -> None:
        network.fold()  # type: ignore[operator]  # an AttentionHead

    def unsettle(self) -> None:
        if self._automatic:
            self._follow("rows")

    def settle(self, images: Tensor, args: tuple[Any, ...], steps: int, saved: Checkpoint | None) -> None:
        """Decide which recipe ``"auto"`` stands for in this fit."""
        if not self._automatic:
            return
        if saved is not None:
            self._follow(saved.facts["options"]["recipe"])
            return
        one = select_args(args, torch.zeros(1).long(), len(images))
        few = self.shows_few(images, args, steps)
        self._follow(self._best_start(images[:1], one) if few else "paper")

    def _best_start(self, image: Tensor, args: tuple[Any, ...]) -> str:
        """The recipe that was measured to be best among those that start from rows and are defined for this model."""
        if self.layers is not None:
            return "attended" if all(tap.attended for tap in self.taps(image, args)) else "rows"
        if is_transformer(self.model):
            with suppress(AttribZooError):
                attended_taps(self.model, image, args)
                return "attended"
        return "rows"

    @property
    def start_images(self) -> int:
        if self.recipe.start != "rows":
            return 0
        return PLACE_IMAGES if self.recipe.forget_places else ROW_IMAGES

    @property
    def most_steps(self) -> int | None:
        return _MOST_STEPS if self.recipe.start == "rows" else None

    def unasked_steps(self, steps: int) -> int:
        return 0 if self.recipe.start == "rows" else steps  # training steps were measured to add nothing

    def start_network(
        self, network: nn.Module, images: Tensor, args: tuple[Any, ...], taps: Sequence[Tap], show_progress: bool
    ) -> tuple[dict[str, Any], list[str]]:
        head: Any = network
        if self.recipe.forget_places and len(images) >= _LEAST_FOR_PLACES:
            head.forget_places(place_means(self.model, images, args, taps, show_progress=show_progress))
        first, own = images[:ROW_IMAGES], select_args(args, torch.arange(min(len(images), ROW_IMAGES)), len(images))
        return start_from_rows(self.model, network, first, own, taps, show_progress=show_progress)

    def choose_schedule(self, asked: str, steps: int, network: nn.Module, features: Sequence[Tensor]) -> Schedule:
        head: Any = network
        if is_long(asked, steps, self.recipe.name) and self.recipe.start == "random":
            return Schedule(self.recipe.name, "sgd", 1e-3, weight_decay=5e-4)
        if len(head.mixing):
            return rows_schedule(head.channels)
        head.share_rows(head.reach(features))
        return Schedule("short", "adam", LOGIT_STEP, branch_lr=_BRANCH_LR)

    def decide(
        self, taps: Sequence[Tap], images: Tensor, num_classes: int, schedule: Schedule, steps: int
    ) -> dict[str, Any]:
        masking = decide_masking(self.model, images, self.masking, self.mean, self.std)
        psi = self.recipe.psi
        if psi == "auto":
            few = schedule.name == "short" and steps * len(images) < IMAGES_PER_CLASS * num_classes
            psi = "own" if few else "random"
        return {**masking, "psi": psi}

    def loss_terms(
        self, network: nn.Module, images: Tensor, args: tuple[Any, ...], generator: torch.Generator
    ) -> Terms:
        clean, features = self._features(images, args)
        logits = two_logits(clean)
        classes = logits.argmax(1)
        if self.recipe.loss == "order":
            return self._order_terms(network, images, args, generator, features, logits, classes)
        rows, own = extra_classes(classes, logits.shape[1], self._ready().decisions["psi"], generator)
        attention = head_maps(network, features, rows)
        own_map = attention[torch.arange(len(images), device=own.device), own].unsqueeze(1).sigmoid()
        mask = upsample(own_map, images.shape[-2:]).to(images.dtype)
        masked = forward(self.model, blend(images, mask, self.baseline_of(images)), args)
        parts = {
            "ce": cross_entropy(masked, classes, self.score).mean(),
            "area": area(attention, self.recipe.area_power, self.recipe.area_offset).mean(),
            "variation": self._variation(attention.sigmoid()).mean(),
        }
        everything = self._loss(
            cross_entropy(clean, classes, self.score).mean(),
            (1 + self.recipe.area_offset) ** self.recipe.area_power,
            self._variation(torch.ones_like(attention[:1])).mean(),
        )
        return Terms(
            self._loss(parts["ce"], parts["area"], parts["variation"]),
            {**parts, "mask": own_map.mean(), "everything": everything},
            classes,
        )

    def _loss(self, ce: Tensor, area_term: Tensor | float, variation_term: Tensor) -> Tensor:
        """Eq. 11 and 15."""
        recipe = self.recipe
        return recipe.lambda_ce * ce + recipe.lambda_tv * (area_term + recipe.lambda_variation * variation_term)

    def _variation(self, masks: Tensor) -> Tensor:
        return variation(masks, total=self.recipe.variation == "sum", border=self.recipe.border_penalty)

    def _order_terms(
        self,
        network: nn.Module,
        images: Tensor,
        args: tuple[Any, ...],
        generator: torch.Generator,
        features: Sequence[Tensor],
        logits: Tensor,
        classes: Tensor,
    ) -> Terms:
        """Half of the images show the highest cells of their maps, half the rest; the fill for hidden pixels varies."""
        count = len(images)
        drawn = torch.rand(3, count, generator=generator).to(images.device)
        target = Target(classes.view(-1, 1, 1))
        if self.recipe.contrast:
            target = target.against(logits, self.recipe.contrast, self.recipe.contrast_weight)
        maps = mean_filter(self._class_maps(network, features, target), self.smooth or 1)
        mask = order_mask(maps, _SHARES[0] + (_SHARES[1] - _SHARES[0]) * drawn[0])
        kept = (torch.arange(count, device=images.device) + (drawn[1, 0] < 0.5)) % 2 == 0
        mask = torch.where(kept.view(-1, 1, 1, 1), mask, 1 - mask)
        blurred = (drawn[2] < 0.5).view(-1, 1, 1, 1)
        hidden_there = torch.where(blurred, blur(images, _BLUR * images.shape[-1]), self.baseline_of(images))
        shown = blend(images, upsample(mask, images.shape[-2:]).to(images.dtype), hidden_there)
        outputs = forward(self.model, shown, args)
        losses = torch.where(kept, cross_entropy(outputs, classes, self.score), gone(outputs, classes, self.score))
        parts = {
            "keep": (losses * kept).sum() / kept.sum().clamp(min=1),
            "drop": (losses * ~kept).sum() / (~kept).sum().clamp(min=1),
        }
        return Terms(losses.mean(), parts, classes)

    def baseline_of(self, images: Tensor) -> Tensor | float:
        """What is shown where the mask is 0: black (Eq. 13) or the mean colour (Eq. 14)."""
        return hidden(self._ready().decisions, images)


def less_rivals(maps: Tensor, outputs: Tensor, k: int, weight: float) -> Tensor:
    """The maps of all classes ``(N, K, h, w)``, each minus a share of the mean map of its k rivals.

    Rivals are the classes with the largest outputs ``(N, K)``, except the class itself: the same k for most classes.
    """
    k = min(k, outputs.shape[1] - 1)
    best = outputs.topk(k + 1, dim=1).indices
    rows = torch.arange(len(maps), device=maps.device).unsqueeze(1)
    every = torch.arange(outputs.shape[1], device=maps.device).expand(len(maps), -1)
    return less_leading(maps, every, maps[rows, best], best, weight)


def less_leading(maps: Tensor, classes: Tensor, leading: Tensor, best: Tensor, weight: float) -> Tensor:
    """Maps ``(N, M, h, w)`` of the classes ``(N, M)``, each minus a share of the mean map of its k rivals.

    Args:
        maps: of any of the K classes.
        classes: which ones.
        leading: ``(N, k + 1, h, w)``, the maps of the classes with the largest outputs.
        best: ``(N, k + 1)``, these classes, the largest first.
        weight: the share.
    """
    k = best.shape[1] - 1
    whole = leading.sum(1, keepdim=True)
    found = maps - weight / k * (whole - leading[:, -1:])
    image, place, rank = (classes.unsqueeze(2) == best[:, :k].unsqueeze(1)).nonzero(as_tuple=True)
    own = leading[image, rank]
    found[image, place] = own - weight / k * (whole[image, 0] - own)
    return found


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
