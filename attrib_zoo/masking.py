"""What is shown to the model: upsampling, scaling, blending with a baseline, and scoring many masked copies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrib_zoo.errors import OptionError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Extent: TypeAlias = tuple[float, float, float, float]
"""Top, bottom, left and right of what a grid covers, in heights and widths of the image: ``(0, 1, 0, 1)`` is all."""

Enlarge: TypeAlias = Callable[[Tensor, Sequence[int]], Tensor]
_ExtentOf: TypeAlias = Callable[[tuple[int, int]], Extent]
_WHOLE: Extent = (0.0, 1.0, 0.0, 1.0)
_extent_of: ContextVar[_ExtentOf | None] = ContextVar("attrib_zoo_extents", default=None)


def wide_dtype(like: Tensor | torch.dtype) -> torch.dtype:
    """Float32, or the tensor's own type where that is wider: the type in which sums are computed.

    16-bit floats hold about three digits, too few for sums over space or over masks.
    """
    dtype = like.dtype if isinstance(like, Tensor) else like
    # not promote_types, which becomes part of an exported program, and torch 2.6 cannot read that program from a file
    return torch.float32 if dtype.itemsize < 4 or not dtype.is_floating_point else dtype


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in :func:`wide_dtype`; the same tensor where it is wide enough."""
    return tensor.to(wide_dtype(tensor))


@contextmanager
def placed(extent_of: _ExtentOf) -> Iterator[None]:
    """Inside, :func:`upsample` places the grids of a model that pads or crops where they lie in the image.

    Args:
        extent_of: the part of the image that a grid of h rows and w columns covers.
    """
    token = _extent_of.set(extent_of)
    try:
        yield
    finally:
        _extent_of.reset(token)


def upsample(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear interpolation with half-pixel centres (``align_corners=False``), the papers' θ.

    Args:
        maps: ``(N, C, h, w)``.
        size: ``(H, W)``.

    Returns:
        ``(N, C, H, W)``; the same tensor where the size is already right.
    """
    return upsampler()(maps, size)


def upsampler() -> Enlarge:
    """:func:`upsample` with the placement of this thread, for code that runs in another (a backward pass)."""
    extent_of = _extent_of.get()

    def enlarge(maps: Tensor, size: Sequence[int]) -> Tensor:
        before, after = (maps.shape[-2], maps.shape[-1]), (size[0], size[1])
        if before == after:
            return maps
        moved = None if extent_of is None else moving(before, after, extent_of)
        if moved is not None:
            rows, columns = (weights.to(maps) for weights in moved)
            with torch.autocast(maps.device.type, enabled=False):  # as interpolation is
                return rows @ maps @ columns.mT
        return F.interpolate(maps, size=after, mode="bilinear", align_corners=False)

    return enlarge


_SAME_PLACE = 1e-9


def moving(before: tuple[int, int], after: tuple[int, int], extent_of: _ExtentOf) -> tuple[Tensor, Tensor] | None:
    """The row and column matrices between grids that cover different parts of the image; ``None`` if the same."""
    covers, onto = extent_of(before), extent_of(after)
    if max(abs(a - b) for a, b in zip(covers, onto, strict=True)) <= _SAME_PLACE:
        return None
    rows = _weights(before[0], covers[:2], after[0], onto[:2])
    return rows, _weights(before[1], covers[2:], after[1], onto[2:])


def _weights(cells: int, covers: Sequence[float], pixels: int, onto: Sequence[float]) -> Tensor:
    """``(pixels, cells)``: linear interpolation between cells that cover one span, at pixels that cover another.

    Beyond the centres of the outermost cells their value is repeated, as at the borders of an image.
    """
    centres = onto[0] + (torch.arange(pixels, dtype=torch.float64) + 0.5) * ((onto[1] - onto[0]) / pixels)
    places = ((centres - covers[0]) / (covers[1] - covers[0]) * cells - 0.5).clamp(0, cells - 1)
    return (1 - (places.unsqueeze(1) - torch.arange(cells)).abs()).clamp_min(0)


def min_max(maps: Tensor) -> Tensor:
    """Scale each map to [0, 1] over its last two axes; a constant map becomes zero.

    No epsilon: the result reaches 0 and 1 exactly, at any scale of the input.
    """
    low = maps.amin(dim=(-2, -1), keepdim=True)
    span = maps.amax(dim=(-2, -1), keepdim=True) - low
    return torch.where(span > 0, (maps - low) / span.where(span > 0, torch.ones_like(span)), 0.0)


def mean_filter(maps: Tensor, size: int) -> Tensor:
    """Each cell of the maps ``(..., h, w)`` becomes the mean of the ``size`` x ``size`` cells around it.

    At the borders it is the mean of those that exist.

    Args:
        maps: ``(N, C, h, w)``.
        size: odd; 1 changes nothing.
    """
    if size == 1:
        return maps
    return F.avg_pool2d(maps, size, stride=1, padding=size // 2, count_include_pad=False)


LIKENESS = 0.3  # difference in cosine at which a neighbour counts a factor of e less


def likeness(features: Sequence[Tensor], size: int) -> Tensor:
    r"""How much each of the ``size`` x ``size`` cells around a cell is like it: shares that add up to 1.

    .. math:: s_{pq} = \mathrm{softmax}_q \frac{1}{0.3\,L} \sum_{l=1}^L \cos(F^{(l)}_p, F^{(l)}_q)

    over the neighbours q of the cell p that exist, p itself included, with :math:`F^{(l)}_p` the features of layer l
    in a cell, minus their mean over the image: the weights of a joint bilateral filter in a square window.

    Args:
        features: ``(N, C_l, h, w)`` of each layer.
        size: odd.

    Returns:
        ``(N, hw, hw)``, zero for cells further apart. All pairs are compared, as in the attention that was read: one
        product of matrices is faster than ``size**2`` steps up to some thousand cells.
    """
    units = [F.normalize(x - x.mean((-2, -1), keepdim=True), dim=1) for x in features]
    unit = (torch.cat(units, 1) / len(units) ** 0.5).flatten(2)
    cosines = unit.transpose(1, 2) @ unit
    down, right = (_close(length, size, unit.device) for length in features[0].shape[-2:])
    near = down[:, None, :, None] & right[None, :, None, :]
    shares: Tensor = (cosines / LIKENESS).masked_fill(~near.flatten(2).flatten(0, 1), -torch.inf).softmax(-1)
    return shares


def alike_filter(maps: Tensor, shares: Tensor) -> Tensor:
    """Each cell of the maps ``(N, C, h, w)`` becomes the mean of those around it, weighted by :func:`likeness`."""
    found: Tensor = (maps.flatten(2) @ shares.transpose(1, 2)).unflatten(2, maps.shape[2:])
    return found


def _close(length: int, size: int, device: torch.device) -> Tensor:
    """``(length, length)``: whether two places lie in a window of this size around each other."""
    places = torch.arange(length, device=device)
    return (places[:, None] - places).abs() <= size // 2


def mean_ranks(values: Tensor) -> Tensor:
    """How many values of its row ``(B, n)`` lie below each value; ties share their mean rank."""
    ascending, values = values.sort(1).values, values.contiguous()
    below = torch.searchsorted(ascending, values, right=False)
    reached = torch.searchsorted(ascending, values, right=True)
    return (below + reached - 1).to(values.dtype) / 2


def rank_scale(maps: Tensor) -> Tensor:
    """Each value of a map becomes its rank over ``h*w - 1``, from 0 for the lowest to 1 for the highest.

    Ties share the mean of their ranks, so that a constant map becomes 1/2. Only the order of the cells is kept: no
    extreme cell sets the scale of the others. NaN stays NaN.

    Args:
        maps: ``(..., h, w)``.
    """
    cells = maps.shape[-2] * maps.shape[-1]
    if cells == 1:
        return torch.where(maps.isnan(), maps, 0.5)
    ranks = mean_ranks(maps.reshape(-1, cells)).view(maps.shape) / (cells - 1)
    return torch.where(maps.isnan(), maps, ranks)


def positive_scale(maps: Tensor) -> Tensor:
    """Evidence against the target becomes 0, the rest is divided by its maximum; zero where none is for it.

    Unlike min-max scaling it keeps the formula's zero, so that places without evidence stay dark. NaN stays NaN.

    Args:
        maps: ``(..., h, w)``.
    """
    found = maps.clamp(min=0)
    most = found.amax(dim=(-2, -1), keepdim=True)
    return found / torch.where(most == 0, torch.ones_like(most), most)


def blend(inputs: Tensor, mask: Tensor, baseline: Tensor | float = 0.0) -> Tensor:
    """Show ``inputs`` where the mask is 1 and ``baseline`` where it is 0: ``m*x + (1 - m)*b``.

    With ``b = 0`` in standardised space this is T-TAME Eq. 14 (the mean colour); with ``b = black(mean, std)``
    it is Eq. 13, the raw image times the mask, then standardised.

    Args:
        inputs: ``(N, C, H, W)``, standardised as the model wants it.
        mask: ``(N, 1, H, W)`` in [0, 1].
        baseline: a number, or a tensor that broadcasts to the inputs.
    """
    if isinstance(baseline, (int, float)):
        if baseline == 0:
            return inputs * mask
        baseline = inputs.new_tensor(baseline)
    return torch.lerp(baseline, inputs, mask)  # exact at both ends: a mask of ones changes no bit of the image


def black(mean: Sequence[float], std: Sequence[float], like: Tensor | None = None) -> Tensor:
    """The standardised value of a black pixel, ``-mean/std``, as ``(1, C, 1, 1)``."""
    ratio = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float64).view(1, -1, 1, 1)
    return ratio.to(torch.get_default_dtype()) if like is None else ratio.to(like)


def blur(images: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur of ``(N, C, H, W)`` images, cut off at 3 sigma; the border is mirrored as often as needed.

    Args:
        images: ``(N, C, H, W)``.
        sigma: the standard deviation in pixels; 0 changes nothing.
    """
    if sigma <= 0:
        return images
    with torch.autocast(images.device.type, enabled=False):  # else a mixed-precision fit blurs in half precision
        for axis in (2, 3):
            kernel = _gaussian(images.shape[axis], sigma, images)
            images = torch.tensordot(kernel, images, dims=([1], [axis])).movedim(0, axis)
    return images


def _gaussian(length: int, sigma: float, like: Tensor) -> Tensor:
    """``(length, length)``: the blur of a row of pixels whose borders are mirrors (... 1 0 | 0 1 ...)."""
    reach = max(1, math.ceil(3 * sigma))
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = (-0.5 * (offsets / sigma).square()).exp()
    at = (torch.arange(length).unsqueeze(1) + offsets.long()).remainder(2 * length)
    source = torch.minimum(at, 2 * length - 1 - at)
    matrix = torch.zeros(length, length, dtype=torch.float64)
    matrix.scatter_add_(1, source, (kernel / kernel.sum()).expand(length, -1).contiguous())
    return matrix.to(like)


def channel_stats(model: nn.Module, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and standard deviation with which the model's inputs were standardised.

    Read from timm's ``pretrained_cfg`` or ``default_cfg`` where the model has one; otherwise ImageNet's for
    three channels, and 0.5 and 0.5 for any other number.
    """
    for name in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, name, None)
        mean, std = _config_stats(config)
        if mean is not None and std is not None and len(mean) == len(std) == channels:
            return mean, std
    if channels == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    return (0.5,) * channels, (0.5,) * channels


def _config_stats(config: object) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    found = config if isinstance(config, dict) else vars(config) if hasattr(config, "__dict__") else {}
    mean, std = found.get("mean"), found.get("std")
    if mean is None or std is None:
        return None, None
    return tuple(float(m) for m in mean), tuple(float(s) for s in std)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the allocator of the CPU or of an accelerator ran out of memory."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    return any(words in str(error) for words in ("not enough memory", "can't allocate memory", "out of memory"))


def free_bytes(device: torch.device) -> int | None:
    """The free memory of a device; ``None`` where unknown.

    On the CPU: what the system calls available, and no more than the limit of the container leaves.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) - int(
            torch.cuda.memory_allocated(device)
        )
    if device.type != "cpu":
        return None
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        return None
    try:
        most, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text() for name in ("max", "current"))
        found += [] if most.strip() == "max" else [int(most) - int(used)]
    except (OSError, ValueError):
        pass  # not in a container, or in one of another kind
    return max(0, min(found)) if found else None


def _fast(images: Tensor | None) -> int:
    """How many images per pass give the best throughput."""
    if images is None or images.device.type != "cpu":
        return 32
    pixels = max(1, images.shape[-2] * images.shape[-1])
    return min(32, max(4, 8 * 224 * 224 // pixels))


class ChunkSize:
    """How many masked images go through the model at once; the number adapts and never changes a result.

    A fixed size stays. An automatic one starts at 32; on a CPU it starts at the number of images whose pixels add up to
    8 images of 224 x 224 (from 4 to 32), since beyond the caches a pass costs more per image. It halves when memory
    runs out.

    Args:
        fixed: the requested size, or ``None``.
        images: ``(..., H, W)``, of the device and size that go through the model.
    """

    def __init__(self, fixed: int | None = None, images: Tensor | None = None) -> None:
        if fixed is not None and (isinstance(fixed, bool) or not isinstance(fixed, int) or fixed < 1):
            raise OptionError(f"chunk_size: must be a positive integer or None, got {fixed!r}")
        self.value = fixed or _fast(images)

    def ranges(self, total: int, work: Callable[[slice], None]) -> Iterator[int]:
        """Call ``work`` on consecutive slices of ``range(total)``; yield how many items each call handled.

        On out-of-memory the cache is released, the size halved and the *same* slice tried again.
        """
        start = 0
        while start < total:
            stop = min(start + self.value, total)
            try:
                work(slice(start, stop))
            except RuntimeError as error:
                if self.value == 1 or not is_out_of_memory(error):
                    raise
                self.value = max(1, math.ceil(self.value / 2))
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            yield stop - start
            start = stop
