"""Pictures of maps: a map laid over its photograph, and a contact sheet of photographs and methods."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from attrib_zoo.errors import DataError, InputError, OptionError
from attrib_zoo.masking import min_max, upsample
from attrib_zoo.training.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CELL, _GAP, _HEADER, _TITLE, _MARGIN = 224, 8, 26, 24, 14  # pixels of a contact sheet
_DPI = 100


def overlay(
    image: Any,
    map: Tensor,
    *,
    alpha: float = 0.6,
    colormap: str | None = None,
    signed: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Lay a map over its photograph: the stronger the evidence, the more colour; none leaves the photograph as it is.

    Args:
        image: a ``(C, H, W)`` tensor in [0, 1], a standardised one together with ``mean`` and ``std``, or a PIL image;
            grey or RGB.
        map: ``(h, w)``, ``(1, h, w)`` or ``(C, H, W)``, at any resolution; channels are averaged. It is scaled to
            [0, 1] over its own range, and a constant map draws the plain photograph.
        alpha: opacity of the strongest evidence, in [0, 1].
        colormap: any name that matplotlib knows; default ``"turbo"``, and ``"bwr"`` for signed maps.
        signed: for maps with evidence for (positive) and against (negative): scaled by the largest magnitude, zero
            shows the photograph.
        mean: per-channel mean that the image was standardised with.
        std: per-channel standard deviation that the image was standardised with.

    Returns:
        ``(H, W, 3)`` uint8, at the resolution of the image.

    Raises:
        InputError: an image or map of the wrong shape or range, or a map with NaN or infinity.
        OptionError: ``alpha`` out of range, or an unknown colormap.

    Example:
        >>> import torch
        >>> overlay(torch.rand(3, 32, 48), torch.rand(4, 6)).shape
        (32, 48, 3)
    """
    if not 0 <= alpha <= 1:
        raise OptionError(f"alpha: must be within [0, 1], got {alpha}")
    photo = _rgb(image, mean, std)
    strength = _scaled(map, photo.shape[-2:], signed)
    colours = _colours(strength, colormap or ("bwr" if signed else "turbo"), signed)
    weight = alpha * strength.abs().clamp(max=1)
    mixed = photo * (1 - weight) + colours * weight
    return np.asarray((mixed * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy())


def save_overlay(
    path: str | os.PathLike[str],
    image: Any,
    map: Tensor,
    *,
    alpha: float = 0.6,
    colormap: str | None = None,
    signed: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Path:
    """Write :func:`overlay` to a PNG, JPEG or any other file that PIL can write; whole or not at all.

    Args:
        path: the file; its folder must exist.
        image: see :func:`overlay`, as all that follows.
        map: the map.
        alpha: opacity of the strongest evidence.
        colormap: matplotlib's name.
        signed: for maps with evidence for and against.
        mean: of the standardised image.
        std: of the standardised image.

    Returns:
        The path.

    Raises:
        DataError: the file cannot be written.
    """
    from PIL import Image

    options = {"alpha": alpha, "colormap": colormap, "signed": signed, "mean": mean, "std": std}
    picture = Image.fromarray(overlay(image, map, **options))  # type: ignore[arg-type]  # the same names as above
    return write_picture(Path(path), picture.save)


def figure(
    images: Any,
    columns: Mapping[str, Any],
    *,
    titles: Sequence[str] | None = None,
    path: str | os.PathLike[str] | None = None,
    across: int = 1,
    signed: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Figure:
    """Draw a contact sheet: a row for each photograph, and beside it one picture for each method.

    Args:
        images: N images, each as in :func:`overlay`: a tensor ``(N, C, H, W)`` or a list; sizes may differ.
        columns: name of each column (a method, or a class) to its N maps: a tensor ``(N, C, h, w)`` or a list.
        titles: N lines, one above each row; what the model said, for example.
        path: where to write the sheet too (PNG, JPEG, PDF, SVG ...).
        across: how many photographs stand side by side, each with its methods.
        signed: see :func:`overlay`.
        mean: of the standardised images.
        std: of the standardised images.

    Returns:
        A matplotlib figure of its own, unknown to ``pyplot``; ``savefig(file, dpi=70)`` writes a smaller one.

    Raises:
        InputError: the numbers of images, maps and titles differ.
    """
    _check_sheet(images, columns, titles, across)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    photos = [_enlarged(_rgb(image, mean, std)) for image in images]
    across = min(across, len(photos))
    rows = -(-len(photos) // across)
    line = _TITLE if titles is not None else 0
    tall = _CELL * max(min(1.0, photo.shape[1] / photo.shape[2]) for photo in photos)
    block = (1 + len(columns)) * (_CELL + _GAP) - _GAP
    width = 2 * _MARGIN + across * block + (across - 1) * 3 * _GAP
    height = 2 * _MARGIN + _HEADER + rows * (line + tall) + (rows - 1) * _GAP
    sheet = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(sheet)

    for i, photo in enumerate(photos):
        x = _MARGIN + (i % across) * (block + 3 * _GAP)
        y = _MARGIN + _HEADER + (i // across) * (line + tall + _GAP)
        if titles is not None:
            _text(sheet, x, y + line - 7, titles[i], block, va="baseline", size=10.5, color="#111111")
        _picture(sheet, x, y + line, tall, photo.permute(1, 2, 0).numpy())
        for j, maps in enumerate(columns.values(), start=1):
            _picture(sheet, x + j * (_CELL + _GAP), y + line, tall, overlay(photo, maps[i], signed=signed))
        if i < across:
            for j, name in enumerate(("image", *columns)):
                centre = x + j * (_CELL + _GAP) + _CELL / 2
                _text(sheet, centre, _MARGIN + 12, name, _CELL, ha="center", va="center", size=10, color="#666666")
    if path is not None:
        write_picture(Path(path), lambda file, format: sheet.savefig(file, format=format, dpi=_DPI))
    return sheet


def _check_sheet(images: Any, columns: Mapping[str, Any], titles: Sequence[str] | None, across: int) -> None:
    if len(images) == 0:
        raise InputError("figure: needs at least one image, got none")
    if across < 1:
        raise OptionError(f"across: must be at least 1, got {across}")
    counts = {f"column {name!r}": len(maps) for name, maps in columns.items()}
    if titles is not None:
        counts["titles"] = len(titles)
    for what, count in counts.items():
        if count != len(images):
            raise InputError(f"figure: {what} must have one entry per image, got {count} for {len(images)} images")


# ---------------------------------------------------------------------- images and maps as arrays


def _rgb(image: Any, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """The image as float32 ``(3, H, W)`` in [0, 1], on the CPU."""
    if not isinstance(image, Tensor):
        return _from_pil(image)
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise InputError(
            f"image: must be (C, H, W) with 1 or 3 channels, got shape {tuple(image.shape)}; "
            + (
                "of a batch pass one image, images[0]"
                if image.ndim != 3
                else "of more bands pick three: image[[3, 2, 1]]"
            )
        )
    photo = image.detach().cpu()
    photo = photo.float() if photo.is_floating_point() else photo.float() / 255
    if (mean is None) != (std is None):
        raise OptionError("mean, std: give both or neither")
    if mean is not None and std is not None:
        photo = photo * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    elif not (photo.min() >= 0 and photo.max() <= 1):
        raise InputError(
            f"image: must lie within [0, 1], got [{photo.min():.3g}, {photo.max():.3g}]; "
            "for a standardised image pass the mean and std of its standardisation"
        )
    return photo.clamp(0, 1).expand(3, -1, -1)


def _from_pil(image: Any) -> Tensor:
    from PIL import Image

    if not isinstance(image, Image.Image):
        raise InputError(f"image: must be a (C, H, W) tensor or a PIL image, got {type(image).__name__}")
    return torch.from_numpy(np.array(in_colour(image))).permute(2, 0, 1).float() / 255


_SCALES: dict[str, float] = {"I;16": 65535.0, "I;16L": 65535.0, "I;16B": 65535.0, "I;16N": 65535.0, "F": 1.0}
"""What is white in PIL's modes of more than 8 bits; PIL itself cuts their values off at 255."""


def in_colour(image: Any) -> Any:
    """A PIL image of any mode in RGB: of 16 bits by its full range, floating-point numbers from 0 to 1.

    Raises:
        InputError: 32-bit integers, of which nothing says what is white, or floating-point numbers outside 0...1.
    """
    from PIL import Image

    if image.mode == "I" and image.format in ("PNG", "PPM"):  # those files have 16 bits at most
        scale = 65535.0
    elif image.mode in (*_SCALES, "I"):
        scale = _SCALES.get(image.mode, 0.0)
    else:
        return image.convert("RGBA").convert("RGB") if "transparency" in image.info else image.convert("RGB")
    values = np.asarray(image, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    if not (scale and low >= 0 and high <= scale):  # also NaN
        kind = {"I": "32-bit integers", "F": "floating-point numbers"}.get(image.mode, "numbers")
        raise InputError(
            f"image: its values must say what is black and what is white, got {kind} from {low:g} to {high:g}; save it "
            "with 8 or 16 bits, or as floating-point numbers from 0 to 1"
        )
    return Image.fromarray(np.rint(values * (255 / scale)).astype(np.uint8)).convert("RGB")


def _scaled(map: Tensor, size: Sequence[int], signed: bool) -> Tensor:
    """The map at the image's size: in [0, 1], or in [-1, 1] around zero if signed."""
    if not isinstance(map, Tensor) or map.ndim not in (2, 3):
        got = f"shape {tuple(map.shape)}" if isinstance(map, Tensor) else type(map).__name__
        raise InputError(f"map: must be a tensor (h, w), (1, h, w) or (C, H, W), got {got}; of a batch pass maps[0]")
    values = map.detach().cpu().double()
    broken = int((~torch.isfinite(values)).sum())
    if broken:
        raise InputError(f"map: must be finite, got NaN or infinity at {broken} of {values.numel()} places")
    values = values if values.ndim == 2 else values.mean(0)
    largest = values.abs().max()
    scaled = values / largest if largest > 0 else values
    if not signed:
        scaled = min_max(scaled)  # before enlarging: rounding in a constant map must not become a pattern
    return upsample(scaled[None, None], size)[0, 0].float()


def _colours(strength: Tensor, name: str, signed: bool) -> Tensor:
    """``(3, H, W)`` colours of a map."""
    import matplotlib

    if name not in matplotlib.colormaps:
        raise OptionError(f"colormap: matplotlib has no colormap {name!r}; try 'turbo', 'inferno' or 'viridis'")
    position = (strength + 1) / 2 if signed else strength
    return torch.from_numpy(matplotlib.colormaps[name](position.numpy())[..., :3]).permute(2, 0, 1).float()


def _enlarged(photo: Tensor) -> Tensor:
    """At least a cell in size, so that a map over a small image is drawn smoothly."""
    height, width = photo.shape[-2:]
    factor = _CELL / max(height, width)
    if factor <= 1:
        return photo
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    return torch.nn.functional.interpolate(photo[None], size=size, mode="bicubic")[0].clamp(0, 1)


# ---------------------------------------------------------------------- drawing and writing


def _picture(sheet: Figure, x: float, y: float, tall: float, pixels: Any) -> None:
    width, height = (side * _DPI for side in sheet.get_size_inches())
    axes = sheet.add_axes((x / width, 1 - (y + tall) / height, _CELL / width, tall / height), anchor="N")
    axes.imshow(pixels)
    axes.set_axis_off()


def _text(sheet: Figure, x: float, y: float, words: str, room: float, **style: Any) -> None:
    """One line that ends in an ellipsis where the room (pixels) ends; nothing is read as mathematics."""
    width, height = (side * _DPI for side in sheet.get_size_inches())
    text = sheet.text(x / width, 1 - y / height, words, parse_math=False, **style)
    while len(words) > 1 and text.get_window_extent().width > room:
        words = words[:-1]
        text.set_text(words.rstrip() + "…")


def write_picture(path: Path, write: Callable[..., object]) -> Path:
    """The picture that ``write(file, format=...)`` draws, in the format of the path's ending, whole or not at all."""
    form = path.suffix.lstrip(".").lower().replace("jpg", "jpeg") or "png"
    try:
        write_whole(path, lambda file: write(file, format=form))
    except (OSError, KeyError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"path: cannot write '{path}' ({reason}); choose another folder or file type") from error
    return path
