"""Iterated Integrated Attributions (Barkan et al., ICCV 2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attrib_zoo.attribution import GradientAttribution
from attrib_zoo.backbone.capture import forward, listening, run_with_graph, select_args
from attrib_zoo.backbone.grid import Tap
from attrib_zoo.backbone.kind import is_transformer
from attrib_zoo.backbone.replay import Replay, replay
from attrib_zoo.backbone.targets import SCORES, Target, TargetQuery
from attrib_zoo.backbone.vit.attention import read_attention
from attrib_zoo.errors import OptionError, check_choice
from attrib_zoo.masking import ChunkSize, at_least_float32
from attrib_zoo.methods.bases.attention import AttentionMethod, not_zero, positive, with_identity
from attrib_zoo.methods.bases.progress import progress

_STEPS = {"cnn": 10, "vit": 5}


class IIA(AttentionMethod, GradientAttribution):
    r"""Where gradient and features agree along two nested paths, over the image and over one layer.

    The outer path fades the image in, :math:`t_i x` with :math:`t_i = i/n` and i = 0..n. On a CNN, with A the maps of
    the layer, ``(D, h, w)``, and b the minimum of each map over space, the inner path leads from b to A:

    .. math:: M = \sum_k \sum_{i=0}^{n} \sum_{j=0}^{n} \frac{\partial S_c}{\partial a_{ij}} \odot
              \mathrm{ReLU}(a_{ij} - b_i), \qquad a_{ij} = b_i + \tfrac{j}{n} (A(t_i x) - b_i)

    On a vision transformer the inner path fades in the last block's attention, :math:`A_L := \tfrac{j}{n} A_L(t_i x)`,
    a constant through which nothing flows back to its queries and keys; M is the class token's row of the rollout of

    .. math:: C_l = \frac{1}{(n+1)^2} \sum_{i,j} \frac{1}{H} \sum_h \mathrm{ReLU}\Big(A_l^{(h)} \odot
              \frac{\partial S_c}{\partial A_l^{(h)}}\Big), \qquad
              M = \prod_l \mathrm{rownorm}(I + C_l)

    ``mode="triple"`` puts a path over the layer before between the two: its maps rise from their minimum over the n + 1
    outer points, the resulting maps of the layer itself are interpolated as above, and the positive parts of gradient
    times ReLU(a) are summed over all three paths.

    Whether a model is a CNN or a transformer is decided from its weights. Transformers are explained unmodified, with
    fused attention; the matrices are recomputed and checked, and a model that they do not reproduce is refused.

    Args:
        model: see :class:`~attrib_zoo.attribution.Attribution`.
        layers: the one layer of a CNN that is interpolated, by default its last stage (``"triple"``: two layers, the
            last two stages); ``None`` for a transformer, where every attention block is read.
        n_steps: n, the number of intervals of each path; ``None`` for 10 on a CNN and 5 on a transformer.
        mode: for CNNs. ``"double"``: both paths. ``"released"``: the outer path only, the sum over i of gradient times
            ReLU(A), which is what the authors' code computes. ``"triple"``: a third path between them, see above.
        score: what is differentiated: ``"logit"``, ``"softmax"``, ``"logsoftmax"`` or ``"sigmoid"``.
        mean_pooling: also explain transformers whose head averages tokens: the mean over their rows.
        chunk_size: images in one pass; ``None`` starts at 32 and halves where memory runs out.
        upsample: ``False`` returns ``(N, 1, h, w)``.
        smooth: odd side of a mean filter over the cells of the map; ``None`` for none.
        scale: ``"min-max"``, ``"rank"``, ``"positive"``, or ``None`` for the formula's own.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from attrib_zoo import IIA
        >>> model = resnet18(weights=None)
        >>> IIA(model, n_steps=2).attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 3, 64, 64])

    References:
        O. Barkan, Y. Elisha, Y. Asher, A. Eshel, N. Koenigstein: Visual Explanations via Iterated Integrated
        Attributions. ICCV 2023.

    Deviations:
        The inner baseline b is this library's reading of the method; in the authors' code it equals A, so that both
        paths reduce to ``"released"``. Maps are upsampled bilinearly and stay raw; the authors use bicubic
        interpolation. The default target is the model's own decision, theirs is the label. ``"triple"`` needs a later
        layer through which all influence of the earlier one passes. Averaged tokens are not in the paper; where the
        head reads several class tokens the map is the mean of their rows.
    """

    family: ClassVar[str] = "path"
    paper: ClassVar[str] = "Barkan et al., ICCV 2023"
    models: ClassVar[tuple[str, ...]] = ("cnn", "vit")
    cost: ClassVar[str] = "CNN: 12F + 110F and 110B after the layer; ViT: 37F + 36B"
    default_layers: ClassVar[tuple[str, int] | None] = ("gradient", 1)
    cheap_options: ClassVar[Mapping[str, Any]] = {"n_steps": 2}

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        n_steps: int | None = None,
        mode: str = "double",
        score: str = "logit",
        mean_pooling: bool = False,
        chunk_size: int | None = None,
        upsample: bool = True,
        smooth: int | None = None,
        scale: str | None = None,
    ) -> None:
        super().__init__(model, layers, mean_pooling=mean_pooling, upsample=upsample, smooth=smooth, scale=scale)
        if n_steps is not None and (isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < 1):
            raise OptionError(f"n_steps: must be a positive integer, or None for the paper's, got {n_steps!r}")
        ChunkSize(chunk_size)
        self.n_steps = n_steps
        self.mode = check_choice("mode", mode, ("double", "released", "triple"))
        self.score = check_choice("score", score, SCORES)
        self.chunk_size = chunk_size

    def layer_rule(self) -> tuple[str, int] | None:
        if is_transformer(self.model):
            return None
        return ("outputs", 2) if self.mode == "triple" else self.default_layers

    def compute_maps(self, inputs: Tensor, query: TargetQuery, args: tuple[Any, ...], show_progress: bool) -> Tensor:
        kind = "vit" if is_transformer(self.model) else "cnn"
        path = _Path(self, inputs, query, args, self.n_steps or _STEPS[kind], show_progress)
        return not_zero(self._rollout(path) if kind == "vit" else self._sum(path), self.get_name())

    # ------------------------------------------------------------------ convolutional networks

    def _sum(self, path: _Path) -> Tensor:
        taps = self.taps(path.inputs, path.args)
        count = 2 if self.mode == "triple" else 1
        if len(taps) != count:
            raise OptionError(
                f"layers: must be {count} for {type(self).__name__} with mode={self.mode!r}, got {len(taps)}; "
                "name the last stage" + ("s" if count > 1 else "")
            )
        if self.mode == "triple":
            with path.progress(len(path.inputs) * (path.n + 1)) as advance:
                return torch.stack([self._triple(path, taps, image, advance) for image in range(len(path.inputs))])
        one_chunk = self._double if self.mode == "double" else self._released
        total: list[Tensor] = []

        def work(index: Tensor) -> None:
            images, steps = path.pair(index)
            found = one_chunk(path, taps[0], images, steps)
            if not total:
                total.append(found.new_zeros(len(path.inputs), *found.shape[1:]))
            total[0].index_add_(0, images.to(found.device), found)

        path.walk(len(path.inputs) * (path.n + 1), work)
        return total[0]

    def _released(self, path: _Path, tap: Tap, images: Tensor, steps: Tensor) -> Tensor:
        """Gradient times ReLU(A) at M points of the outer path, ``(M, T, h, w)``."""
        points, args = path.points(images, steps), path.args_of(images)
        with run_with_graph(self.model, points, args, [tap]) as (outputs, maps):
            gradients = path.gradients(path.target.rows(images).select(outputs, self.score), maps[0])
        positive_maps = at_least_float32(maps[0].detach()).relu()
        return torch.stack([(g * positive_maps).sum(1) for g in gradients], 1)

    def _double(self, path: _Path, tap: Tap, images: Tensor, steps: Tensor) -> Tensor:
        """The sum over the inner path at M points of the outer one, ``(M, T, h, w)``.

        All rows of an inner pass belong to one point, so that the layers before it are shared, not copied. At
        j = 0 the ReLU is zero.
        """
        with replay(self.model, path.points(images, steps), path.args_of(images), tap) as again:
            low = again.maps.amin((2, 3), keepdim=True)
            span = again.maps - low
            found = []
            for point in range(len(images)):
                parts: list[Tensor] = []

                def work(part: slice, point: int = point, parts: list[Tensor] = parts) -> None:
                    shares = path.shares(part, span, first=1)
                    inner = low[point] + shares * span[point]
                    gradients = self._gradients(path, again, inner, point, int(images[point]))
                    risen = at_least_float32(shares * span[point])
                    parts.append(torch.stack([(g * risen).sum((0, 1)) for g in gradients]))

                for _ in path.chunk.ranges(path.n, work):
                    pass
                found.append(torch.stack(parts).sum(0))
        return torch.stack(found)

    def _triple(self, path: _Path, taps: Sequence[Tap], image: int, advance: Callable[[int], None]) -> Tensor:
        """The sum over all three paths for one image, ``(T, h, w)``."""
        steps = torch.arange(path.n + 1)
        images = torch.full_like(steps, image)
        points, args = path.points(images, steps), path.args_of(images)
        with (
            replay(self.model, points, args, taps[0]) as from_earlier,
            replay(self.model, points, args, taps[1]) as from_later,
        ):
            low = from_earlier.maps.amin(0)
            parts: list[Tensor] = []
            for point in range(len(points)):
                span = from_earlier.maps[point] - low
                for later in self._later_maps(path, taps[1], from_earlier, low, span, point):
                    bottom = later.amin((1, 2), keepdim=True)
                    rise = later - bottom

                    def work(part: slice, point: int = point, bottom: Tensor = bottom, rise: Tensor = rise) -> None:
                        inner = bottom + path.shares(part, rise, first=0) * rise
                        gradients = self._gradients(path, from_later, inner, point, image)
                        active = at_least_float32(inner).relu()
                        parts.append(torch.stack([(g * active).relu().sum((0, 1)) for g in gradients]))

                    for _ in path.chunk.ranges(path.n + 1, work):
                        pass
                advance(1)
        return torch.stack(parts).sum(0)

    def _later_maps(
        self, path: _Path, later: Tap, again: Replay, low: Tensor, span: Tensor, point: int
    ) -> Iterator[Tensor]:
        """The later layer's outputs along the path over the earlier one, one ``(D, h, w)`` after the other."""
        found: list[Tensor] = []

        def work(part: slice) -> None:
            seen: list[Tensor] = []
            inner = low + path.shares(part, span, first=0) * span
            with listening(self.model, [later], lambda _, output: seen.append(later.grid.to_map(output).clone())):
                again(inner, torch.full((len(inner),), point))
            found.extend(seen[-1])

        for _ in path.chunk.ranges(path.n + 1, work):
            pass
        yield from found

    def _gradients(self, path: _Path, again: Replay, maps: Tensor, point: int, image: int) -> list[Tensor]:
        """Gradients of the image's T scores at maps ``(M, D, h, w)`` that replace the layer's at one point."""
        maps.requires_grad_()
        rows = torch.full((len(maps),), point)
        with torch.enable_grad():
            scores = path.target.rows(torch.full_like(rows, image)).select(again(maps, rows), self.score)
            return path.gradients(scores, maps)

    # ------------------------------------------------------------------ transformers

    def _rollout(self, path: _Path) -> Tensor:
        if self.layers is not None:
            raise self._reads_all_layers()
        found = self.attention(path.inputs, path.args)
        side = path.n + 1
        sums: list[Tensor] = []

        def work(index: Tensor) -> None:
            images, outer = path.pair(index // side)
            factor = (index % side).to(path.inputs) / path.n
            wanted = path.target.rows(images)
            attended = read_attention(
                self.model,
                found,
                path.points(images, outer),
                path.args_of(images),
                lambda outputs: wanted.select(outputs, self.score),
                last=factor,
            )
            shares = [positive(block.gradients(), block.values) for block in attended.matrices()]
            if not sums:
                sums.extend(s.new_zeros(s.shape[0], len(path.inputs), *s.shape[2:]) for s in shares)
            for total, share in zip(sums, shares, strict=True):
                total.index_add_(1, images.to(share.device), share)

        path.walk(len(path.inputs) * side**2, work)
        steps = (with_identity(total / side**2, normalise=True) for total in sums)
        return found.follow(steps).transpose(0, 1)


class _Path:
    """The outer path of a call: N images at n + 1 steps each, processed in chunks."""

    def __init__(
        self, explainer: IIA, inputs: Tensor, query: TargetQuery, args: tuple[Any, ...], n: int, show_progress: bool
    ) -> None:
        self.inputs, self.args, self.n = inputs, args, n
        self.target: Target = query.resolve(forward(explainer.model, inputs, args))
        self.chunk = ChunkSize(explainer.chunk_size, inputs)
        self._label = explainer.get_name() if show_progress else ""

    def pair(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The image and the step of each point."""
        return index // (self.n + 1), index % (self.n + 1)

    def points(self, images: Tensor, steps: Tensor) -> Tensor:
        """``t_i x`` for M points."""
        share = steps.to(self.inputs) / self.n
        return self.inputs[images.to(self.inputs.device)] * share.view(-1, 1, 1, 1)

    def args_of(self, images: Tensor) -> tuple[Any, ...]:
        """The forward arguments of M points."""
        return select_args(self.args, images, len(self.inputs))

    def shares(self, part: slice, like: Tensor, *, first: int) -> Tensor:
        """``j / n`` for a part of an inner path that begins at j = ``first``, ``(M, 1, 1, 1)``."""
        steps = torch.arange(part.start + first, part.stop + first)
        return steps.to(like).view(-1, 1, 1, 1) / self.n

    def gradients(self, scores: Tensor, maps: Tensor) -> list[Tensor]:
        """The gradients of T scores ``(M, T)`` with respect to maps, one ``(M, D, h, w)`` for each."""
        count = scores.shape[1]
        return [
            at_least_float32(torch.autograd.grad(scores[:, t].sum(), maps, retain_graph=t + 1 < count)[0])
            for t in range(count)
        ]

    def walk(self, total: int, work: Callable[[Tensor], None]) -> None:
        """Call ``work`` on chunks of ``range(total)``."""
        with self.progress(total) as advance:
            for count in self.chunk.ranges(total, lambda part: work(torch.arange(part.start, part.stop))):
                advance(count)

    def progress(self, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """A progress bar that counts finished points; none unless requested."""
        return progress(total, self._label, "point")
