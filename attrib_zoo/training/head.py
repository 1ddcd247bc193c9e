"""The attention mechanism of T-TAME: feature branches and a fusing convolution, for the requested classes only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrib_zoo.backbone.vit import attended as attention
from attrib_zoo.errors import LayerError
from attrib_zoo.masking import Enlarge, alike_filter, likeness, upsampler
from attrib_zoo.training import distributed

ACTIVATIONS = ("relu", "sigmoid")
_GATHER_BYTES = 64 * 2**20


class FeatureBranch(nn.Module):
    """One layer's branch, Eq. 8: ``act(BN(conv1x1(L)) + L)`` at the layer's own resolution.

    Args:
        channels: C_i.
        skip: add the features themselves.
        batch_norm: normalise the convolution's output.
        activation: ``"relu"`` or ``"sigmoid"``.
    """

    def __init__(self, channels: int, *, skip: bool, batch_norm: bool, activation: str) -> None:
        super().__init__()
        self.conv = _empty_conv(channels, channels)
        self.norm = nn.BatchNorm2d(channels) if batch_norm else None
        self.skip = skip
        self.activation = activation

    def forward(self, features: Tensor) -> Tensor:
        """``(N, C_i, h_i, w_i)`` to the same shape."""
        branch: Tensor = self.conv(features)
        return self._activate(features, branch if self.norm is None else self.norm(branch))

    def batch_view(self, features: Tensor) -> Tensor:
        """The result of :meth:`forward` in training mode, without updating the running statistics."""
        branch: Tensor = self.conv(features)
        if self.norm is not None:
            weight, bias = self.norm.weight, self.norm.bias
            branch = F.batch_norm(branch, None, None, weight, bias, training=True, eps=self.norm.eps)
        return self._activate(features, branch)

    def _activate(self, features: Tensor, branch: Tensor) -> Tensor:
        if self.skip:
            branch = branch + features
        return branch.relu() if self.activation == "relu" else branch.sigmoid()


class AttentionHead(nn.Module):
    """Feature branches, bilinear upsampling, concatenation and a 1x1 convolution to K class maps (Eq. 8-10).

    The fusing convolution acts on channels and the upsampling on space, so they commute: each layer's part is
    computed at its own resolution, for the requested classes only, and the upsampled parts are added. The result is the
    same as with upsampling and concatenation first.

    Args:
        channels: C_i of each layer.
        num_classes: K.
        skip: see :class:`FeatureBranch`.
        batch_norm: see :class:`FeatureBranch`.
        activation: see :class:`FeatureBranch`.
        branches: ``False`` leaves the feature branches out: with one layer, the attention mechanism of L-CAM.
        alike: side of the window in which each cell of a map becomes a mean, weighted by how alike the cells' features
            are, see :func:`~attrib_zoo.masking.likeness`: the features of all layers with the finest grid; 1 for none.
        generator: draws the initial weights (PyTorch's default distributions).
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        *,
        skip: bool = True,
        batch_norm: bool = True,
        activation: str = "relu",
        branches: bool = True,
        alike: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"skip": skip, "batch_norm": batch_norm, "activation": activation}
        self.channels, self.alike = tuple(channels), alike
        self.branches = nn.ModuleList(FeatureBranch(c, **options) for c in channels if branches)
        self.fuser = _empty_conv(sum(channels), num_classes)
        self.common: nn.Parameter | None = None  # (ΣC + 1,): see share_rows and start_from
        self.mixing = nn.ParameterList()  # (C_i, C_i) for each layer: see start_from
        self.scale: Tensor | None
        self.register_buffer("scale", None)  # (ΣC,): see share_rows
        self.places: list[str] = []  # of buffers (C_i, h_i, w_i): see forget_places
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                draw_conv(module, generator)

    def forward(self, features: Sequence[Tensor], rows: Tensor | None = None) -> Tensor:
        """Attention maps before the sigmoid.

        Args:
            features: ``(N, C_i, h_i, w_i)`` for each layer; more channels of attention, see :meth:`read`.
            rows: ``(N, M)`` classes requested for each image; ``None`` for all K.

        Returns:
            ``(N, M, h, w)``, with h and w the largest h_i and w_i.
        """
        return self.fuse(self.attend(features), rows)

    def attend(self, features: Sequence[Tensor]) -> list[Tensor]:
        """What does not depend on the classes: the features through their branches, and how alike their cells are."""
        read = self.read(features)
        found = [branch(x) for branch, x in zip(self.branches, read, strict=True)] if self.branches else read
        if self.alike == 1:
            return found
        sizes = [(x.shape[-2], x.shape[-1]) for x in features]
        compared = finest(sizes)
        if not compared:
            raise LayerError(
                "layers: one of the layers must have the finest grid in both directions to average over cells that "
                f"are alike, got {sizes}; choose other layers, or a recipe with alike=1"
            )
        return [*found, self.likeness(features, compared)]

    def fuse(self, attended: Sequence[Tensor], rows: Tensor | None = None) -> Tensor:
        """The result of :meth:`forward` from that of :meth:`attend`."""
        if self.alike == 1:
            return self._fused(attended, rows)
        return alike_filter(self._fused(attended[:-1], rows), attended[-1])

    def likeness(self, features: Sequence[Tensor], layers: Sequence[int]) -> Tensor:
        """How alike the cells around each cell are to it, ``(N, hw, hw)``, by the features of some layers.

        Each layer counts alike; of attention the values are compared.
        """
        return likeness([self._less_places(i, features[i][:, : self.channels[i]]) for i in layers], self.alike)

    def _fused(self, attended: Sequence[Tensor], rows: Tensor | None) -> Tensor:
        size = tuple(max(x.shape[axis] for x in attended) for axis in (-2, -1))
        enlarge = upsampler()
        if rows is None:
            return self._all(attended, size, torch.arange(len(self._bias), device=self._bias.device), enlarge)
        if len(rows) > 1 and rows.stride(0) == 0 and not torch.is_grad_enabled():  # the same classes for all images
            return self._all(attended, size, rows[0], enlarge)
        limit = max(1, _GATHER_BYTES // (rows.shape[1] * self.fuser.weight.shape[1] * self.fuser.weight.element_size()))
        if len(rows) <= limit:
            return self._selected(rows, size, enlarge, *attended)
        from torch.utils.checkpoint import checkpoint  # here: in torch 2.6 it loads sympy, half a second

        parts = []
        for start in range(0, len(rows), limit):
            some = slice(start, start + limit)
            inputs: tuple[Any, ...] = (rows[some], size, enlarge, *(x[some] for x in attended))
            parts.append(
                checkpoint(self._selected, *inputs, use_reentrant=False, preserve_rng_state=False)
                if torch.is_grad_enabled()
                else self._selected(*inputs)
            )
        return torch.cat(parts)

    def _all(self, attended: Sequence[Tensor], size: tuple[int, ...], rows: Tensor, enlarge: Enlarge) -> Tensor:
        """The maps of the classes ``(M,)`` for each image."""
        weight, bias = self._rows(rows)
        weights = weight[:, :, None, None].split([x.shape[1] for x in attended], dim=1)
        logits = sum(enlarge(F.conv2d(x, w), size) for x, w in zip(attended, weights, strict=True))
        return logits + bias.view(1, -1, 1, 1)

    def _selected(self, rows: Tensor, size: tuple[int, ...], enlarge: Enlarge, *attended: Tensor) -> Tensor:
        weight, bias = self._rows(rows)
        weights = weight.split([x.shape[1] for x in attended], dim=2)  # (N, M, C_i)
        logits = sum(
            enlarge(torch.bmm(w, x.flatten(2)).unflatten(2, x.shape[2:]), size)
            for x, w in zip(attended, weights, strict=True)
        )
        return logits + bias[:, :, None, None]

    def _rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Weights ``(*rows.shape, ΣC)`` and biases ``rows.shape`` of the fusing convolution."""
        weight, bias = self.fuser.weight.flatten(1)[rows], self._bias[rows]  # a view: its gradient is not copied
        if self.common is None or self.scale is None:
            return weight, bias
        if len(self.mixing):
            mixed = [part @ mix for part, mix in zip(weight.split(self.channels, dim=-1), self.mixing, strict=True)]
            return weight + torch.cat(mixed, dim=-1) + self.common[:-1] * self.scale, bias + self.common[-1]
        return (weight + self.common[:-1]) * self.scale, bias + self.common[-1]

    @property
    def _bias(self) -> Tensor:
        return self.fuser.bias  # type: ignore[return-value]  # made with a bias

    def share_rows(self, reach: Sequence[float]) -> None:
        """Rewrite each class's row of the fusing convolution as a common row plus its own, in units of equal effect.

        Both start at zero. The same maps can be expressed; but every image trains the common row, so that few images
        per class suffice, and a class that never occurs still has the common map. A change of all of a layer's weights
        by δ moves a logit by about δ, whatever the scale of its features, so that no layer dominates another.
        :meth:`fold` undoes it.

        Args:
            reach: for each layer, the sum over channels of its branch's absolute activations at a location.
        """
        nn.init.zeros_(self.fuser.weight)
        nn.init.zeros_(self._bias)
        self._share(reach)

    @torch.no_grad()
    def start_from(self, rows: Sequence[Tensor], reach: Sequence[float]) -> None:
        r"""Start from these rows of the fusing convolution, and train what all classes share.

        .. math:: w_c \leftarrow w_c + w_c M + g

        for each layer, with one matrix M and one vector g for all classes, both zero at the start: the maps are then
        exactly those of the rows, and what is learnt from an image of one class changes the maps of all others too,
        including those that never occur. :meth:`fold` turns it into one ordinary convolution.

        Args:
            rows: ``(K, C_i)`` for each layer.
            reach: as in :meth:`share_rows`; the unit of g.
        """
        weight = torch.cat([row.to(self.fuser.weight) for row in rows], dim=1)
        self.fuser.weight.copy_(weight[:, :, None, None])
        nn.init.zeros_(self._bias)
        self._share(reach)
        self.mixing = nn.ParameterList(nn.Parameter(weight.new_zeros(size, size)) for size in self.channels)
        self.fuser.requires_grad_(False)

    @torch.no_grad()
    def forget_places(self, means: Sequence[Tensor]) -> None:
        """Subtract from the features what a position has in every image, such as a transformer's position embedding.

        Otherwise the map of a class has a shape of its own regardless of the image.

        Args:
            means: ``(C_i, h_i, w_i)`` for each layer, the mean features of some images; of attention, with the shares.
        """
        self.places = [f"place{i}" for i in range(len(means))]
        for name, mean, channels in zip(self.places, means, self.channels, strict=True):
            own = mean.to(self.fuser.weight)
            # what all places share shifts a map; but not that of attention, which multiplies it by the shares
            own = own[:channels] if len(own) > channels else own - own.mean((-2, -1), keepdim=True)
            self.register_buffer(name, own)

    def read(self, features: Sequence[Tensor]) -> list[Tensor]:
        """What the branches and rows see of the features, ``(N, C_i, h_i, w_i)`` for each layer.

        The features themselves; of attention, whose features are values and shares, their products. The means of
        :meth:`forget_places` are subtracted before, at another size their bilinear interpolation.
        """
        found = []
        for i, (x, channels) in enumerate(zip(features, self.channels, strict=True)):
            if x.shape[1] > channels:
                found.append(attention.attended(x, channels, self._usual(i, x.shape[-2:])))
            else:
                found.append(self._less_places(i, x))
        return found

    def _usual(self, layer: int, size: Sequence[int]) -> Tensor | None:
        if not self.places:
            return None
        means = getattr(self, self.places[layer]).unsqueeze(0)
        # Of grids, not of images: position embeddings are resized over all cells, also those of a padded border. At its
        # own size this changes nothing; an exported program is then one for all sizes.
        return F.interpolate(means, size=tuple(size), mode="bilinear")

    def _less_places(self, layer: int, features: Tensor) -> Tensor:
        usual = self._usual(layer, features.shape[-2:])
        return features if usual is None else features - usual

    def _share(self, reach: Sequence[float]) -> None:
        scale = [1 / max(a, 1e-12) for a, size in zip(reach, self.channels, strict=True) for _ in range(size)]
        self.scale = self.fuser.weight.new_tensor(scale)
        self.common = nn.Parameter(self.scale.new_zeros(len(scale) + 1))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        if prefix + "mixing.0" in state and not len(self.mixing):
            self.start_from([self.fuser.weight.new_zeros(len(self._bias), c) for c in self.channels], self._ones)
        elif prefix + "common" in state and self.common is None:
            self.share_rows(self._ones)
        held = [name for name in (f"{prefix}place{i}" for i in range(len(self.channels))) if name in state]
        if held and not self.places:
            self.forget_places([torch.zeros_like(state[name], device=self.fuser.weight.device) for name in held])
        super()._load_from_state_dict(state, prefix, *rest)

    @torch.no_grad()
    def fold(self) -> None:
        """Merge what all classes share into every class's own row."""
        if self.common is not None:
            weight, bias = self._rows(torch.arange(len(self._bias), device=self._bias.device))
            self.fuser.weight.copy_(weight[:, :, None, None])
            self._bias.copy_(bias)
            self.common, self.scale, self.mixing = None, None, nn.ParameterList().train(self.training)
            self.fuser.requires_grad_(True)

    @torch.no_grad()
    def reach(self, features: Sequence[Tensor]) -> list[float]:
        """For each layer, the branch's absolute activations summed over channels, averaged over images and locations.

        With batch statistics, as in training; averaged over the processes, too.
        """
        views = self.read(features)
        if self.branches:
            views = [branch.batch_view(x) for branch, x in zip(self._each(), views, strict=True)]
        found = torch.tensor([float(view.abs().sum(1).mean()) for view in views], dtype=torch.float64)
        return [float(value) for value in distributed.mean(found)]

    @property
    def _ones(self) -> list[float]:
        return [1.0] * len(self.channels)

    def _each(self) -> list[FeatureBranch]:
        return [branch for branch in self.branches if isinstance(branch, FeatureBranch)]


def finest(sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Which of these grids are the finest in both directions."""
    most = tuple(map(max, zip(*sizes, strict=True)))
    return [i for i, size in enumerate(sizes) if size == most]


def _empty_conv(inputs: int, outputs: int) -> nn.Conv2d:
    """A 1x1 convolution whose weights are not drawn from the global generator; without storage on device "meta"."""
    place = "meta" if torch.empty(0).is_meta else "cpu"  # in torch 2.6 get_default_device() does not know of a context
    conv: nn.Conv2d = nn.Conv2d(inputs, outputs, 1, device="meta").to_empty(device=place)
    return conv


def draw_conv(conv: nn.Conv2d, generator: torch.Generator | None) -> None:
    """PyTorch's default initial weights, uniform in ±1/√C_in, from this generator."""
    bound = 1 / math.sqrt(conv.in_channels)
    with torch.no_grad():
        conv.weight.uniform_(-bound, bound, generator=generator)
        if conv.bias is not None:
            conv.bias.uniform_(-bound, bound, generator=generator)
