"""Skeleton of the methods that show masked copies of an image to the model; a method defines the masks.

No mask is kept: the masked copies of a whole batch go through the model a chunk at a time, and only the scores of all
targets are kept. As the maps of these methods are sums of masks, and upsampling is linear, the sums are computed at the
resolution of the layer.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from attrib_zoo.attribution import Attribution, PerturbationAttribution
from attrib_zoo.backbone.capture import forward, run, select_args
from attrib_zoo.backbone.kind import is_transformer
from attrib_zoo.backbone.targets import SCORES, Target, TargetQuery
from attrib_zoo.errors import OptionError, UnsupportedModelError, check_choice, warn
from attrib_zoo.masking import ChunkSize, at_least_float32, black, blend, blur, channel_stats, min_max, upsample
from attrib_zoo.methods.bases.progress import progress

Baseline: TypeAlias = str | float | Tensor

_BASELINES = ("mean", "black", "blur")
_WIDEST = 11  # the blurred baseline has a standard deviation of the shorter side over this


class Perturbation(Attribution, PerturbationAttribution):
    """Base of the methods that compare scores of masked copies.

    Args:
        model: see :class:`Attribution`.
        layers: see :class:`Attribution`.
        score: what is read from the outputs: ``"softmax"``, ``"logit"``, ``"logsoftmax"`` or ``"sigmoid"`` (for
            classes that do not exclude each other).
        baseline: what is shown where a mask is 0: ``"mean"`` (the colour that standardises to 0), ``"black"``,
            ``"blur"`` (the image itself, blurred), a number, or a tensor that broadcasts to the inputs.
        chunk_size: masked images per forward pass, over the whole batch; ``None``: 32, fewer where memory runs out.
        upsample: see :class:`Attribution`.
        smooth: see :class:`Attribution`.
        scale: see :class:`Attribution`.
    """

    family: ClassVar[str] = "perturbation"

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        score: str = "softmax",
        baseline: Baseline = "mean",
        chunk_size: int | None = None,
        upsample: bool = True,
        smooth: int | None = None,
        scale: str | None = None,
    ) -> None:
        super().__init__(model, layers, upsample=upsample, smooth=smooth, scale=scale)
        self.score: str | None = check_choice("score", score, SCORES)
        self.baseline = check_baseline(baseline)
        self.chunk_size = chunk_size
        ChunkSize(chunk_size)  # fails early for an invalid size

    def read(self, outputs: Tensor, target: Target) -> Tensor:
        """What is kept from M passes: ``(M, T)``, the scores of all targets."""
        return read_scores(outputs, target, self.score or "softmax")

    def passes(
        self, inputs: Tensor, args: tuple[Any, ...], outputs: Tensor, target: Target, show_progress: bool
    ) -> Passes:
        """Masked passes of these images, with the options of this object, for ``compute_maps`` to run."""
        return Passes(
            model=self.model,
            inputs=inputs,
            args=args,
            target=target,
            clean=self.read(outputs, target),
            hidden=resolve_baseline(self.baseline, self.model, inputs),
            read=self.read,
            chunks=ChunkSize(self.chunk_size, inputs),
            label=self.get_name() if show_progress else "",
        )


class PerturbationCAM(Perturbation):
    """Base of the class activation maps whose weights come from images masked by the feature maps themselves.

    Subclasses implement :meth:`weights`, and override :meth:`masks` where a mask is not the enlarged map scaled to [0,
    1].
    """

    cost: ClassVar[str] = "1F + 1F for each feature map, for all targets"
    default_layers: ClassVar[tuple[str, int] | None] = ("gradient", 1)

    def masks(self, maps: Tensor, size: Sequence[int]) -> Tensor:
        """The masks ``(M, 1, H, W)`` in [0, 1] of some feature maps.

        Args:
            maps: ``(M, 1, h, w)`` in float32 or better.
            size: ``(H, W)``.
        """
        return min_max(upsample(maps, size))

    def alive(self, maps: Tensor) -> Tensor:
        """Which of the feature maps ``(N, D, h, w)`` are worth a pass, ``(N, D)``: those that are not constant."""
        return maps.amax((-2, -1)) > maps.amin((-2, -1))

    def shown(self, maps: Tensor) -> Tensor:
        """What the weights are applied to, ``(N, D, h, w)``: the feature maps."""
        return maps

    @abstractmethod
    def weights(self, scores: Tensor, clean: Tensor, alive: Tensor) -> Tensor:
        """The weight of each feature map.

        Args:
            scores: ``(N, D, F)``: what :meth:`read` returned for the image under each mask; 0 where there was no pass.
            clean: ``(N, F)``, the same for the image itself.
            alive: ``(N, D)``, whether there was a pass.

        Returns:
            ``(N, D, T)``; a third axis of 1 where the map is the same for all targets.
        """
        raise NotImplementedError

    def compute_maps(
        self, inputs: Tensor, query: TargetQuery, args: tuple[Any, ...], show_progress: bool
    ) -> list[Tensor]:
        taps = self.taps(inputs, args)
        outputs, layers = run(self.model, inputs, args, taps)
        target = query.resolve(outputs)
        passes = self.passes(inputs, args, outputs, target, show_progress)
        heats = [self._one_layer(at_least_float32(maps), passes) for maps in layers]
        return [heat.expand(-1, target.count, -1, -1) for heat in heats]

    def _one_layer(self, maps: Tensor, passes: Passes) -> Tensor:
        """``(N, T, h, w)``."""
        alive = self.alive(maps)
        size = passes.inputs.shape[-2:]
        scores = passes.table(alive, lambda n, k: self.masks(maps[n, k].unsqueeze(1), size))
        weights = self.weights(scores, passes.clean, alive)
        return torch.einsum("ndt,ndhw->nthw", weights, self.shown(maps).to(weights.dtype)).relu()


@dataclass
class Passes:
    """Masked copies of a batch through a model, a chunk at a time.

    Attributes:
        model: the bare model.
        inputs: ``(N, C, H, W)``.
        args: further arguments of the model.
        target: the T targets of each image.
        clean: ``(N, F)``, what ``read`` returns for the images themselves.
        hidden: what is shown where a mask is 0.
        read: from the outputs of M passes and their targets to ``(M, F)``.
        chunks: how many go through the model at once.
        label: of the progress bar; empty for none.
    """

    model: nn.Module
    inputs: Tensor
    args: tuple[Any, ...]
    target: Target
    clean: Tensor
    hidden: Tensor | float
    read: Callable[[Tensor, Target], Tensor]
    chunks: ChunkSize = field(default_factory=ChunkSize)
    label: str = ""

    def scores(self, rows: Tensor, masks: Tensor) -> Tensor:
        """One pass: what ``read`` returns, ``(M, F)``, for images ``rows`` (M,) under the masks ``(M, 1, H, W)``."""
        rows = rows.to(self.inputs.device)
        hidden = self.hidden
        if isinstance(hidden, Tensor) and hidden.ndim == 4 and len(hidden) == len(self.inputs) > 1:
            hidden = hidden[rows]
        masked = blend(self.inputs[rows], masks.to(self.inputs.dtype), hidden)
        del masks
        outputs = forward(self.model, masked, select_args(self.args, rows, len(self.inputs)))
        return self.read(outputs, self.target.rows(rows))

    def table(self, chosen: Tensor, masks: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What ``read`` returns for each image under each of its chosen masks.

        Args:
            chosen: ``(N, D)``, which masks of which images.
            masks: from M images and M numbers of masks, each ``(M,)``, to masks ``(M, 1, H, W)``.

        Returns:
            ``(N, D, F)``; 0 where there was no pass.
        """
        images, numbers = chosen.nonzero(as_tuple=True)
        found = self.clean.new_zeros(*chosen.shape, self.clean.shape[1])

        def work(part: slice) -> None:
            n, k = images[part], numbers[part]
            found[n, k] = self.scores(n, masks(n, k))

        self.loop(len(images), work)
        return found

    def loop(self, total: int, work: Callable[[slice], None]) -> None:
        """Call ``work`` on slices of ``range(total)``, again on a smaller one where memory runs out."""
        with progress(total, self.label) as done:
            for count in self.chunks.ranges(total, work):
                done(count)


# ---------------------------------------------------------------------- pieces


def read_scores(outputs: Tensor, target: Target, score: str) -> Tensor:
    """The scores ``(M, T)`` of the targets, in float32 or better."""
    return at_least_float32(target.select(outputs, score))


def refuse_transformers(explainer: Attribution, why: str) -> None:
    """Raise for a transformer unless its layers are named; then only warn."""
    if not is_transformer(explainer.model):
        return
    who, instead = explainer.get_name(), "use ScoreCAM, LayerCAM or TTAME"
    if explainer.layers is None:
        raise UnsupportedModelError(
            f"model: must be a convolutional network, for {who} {why}, got {type(explainer.model).__name__}; "
            f"{instead}, or name layers to try it all the same"
        )
    warn(f"{who}: it {why}, so its maps may be no better than chance; {instead}")


def check_baseline(value: Any) -> Baseline:
    """One of the words, a finite number or a tensor."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if isinstance(value, Tensor) or number or (isinstance(value, str) and value in _BASELINES):
        return value  # type: ignore[no-any-return]
    raise OptionError(
        f"baseline: must be {', '.join(map(repr, _BASELINES))}, a finite number or a tensor that broadcasts to the "
        f"inputs, got {value!r}"
    )


def resolve_baseline(baseline: Baseline, model: nn.Module, inputs: Tensor) -> Tensor | float:
    """What is shown where a mask is 0, in the space of the inputs."""
    if isinstance(baseline, Tensor):
        try:
            fits = torch.broadcast_shapes(baseline.shape, inputs.shape) == inputs.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise OptionError(
                f"baseline: must broadcast to the inputs {tuple(inputs.shape)}, got {tuple(baseline.shape)}; "
                "pass (1, C, 1, 1), (1, C, H, W) or (N, C, H, W)"
            )
        return baseline.detach().to(inputs)
    if baseline == "black":
        return black(*channel_stats(model, inputs.shape[1]), like=inputs)
    if baseline == "blur":
        return blur(inputs, min(inputs.shape[-2:]) / _WIDEST)
    return 0.0 if isinstance(baseline, str) else float(baseline)
