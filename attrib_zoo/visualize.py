"""Pictures of maps: a map over its photograph, with a caption, and a contact sheet of photographs and methods."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from attrib_zoo.errors import DataError, InputError, OptionError, closest, shown
from attrib_zoo.masking import min_max, upsample
from attrib_zoo.training.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge in pixels of a photograph; all of it is ``(0, 0, W, H)``."""

ALPHA, COLORMAP, SIGNED_COLORMAP = 0.8, "plasma", "PuOr_r"
"""The defaults: both colormaps can be read by the colour-blind, and plasma ends in a bright yellow."""

_CELL, _GAP, _HEADER, _TITLE, _MARGIN, _FOOTER = 224, 8, 26, 24, 14, 30  # pixels of a contact sheet
PLAIN: dict[str, Any] = {"parse_math": False, "usetex": False}
"""Of a text in a matplotlib figure that is drawn as it stands, whatever ``$`` and backslashes are in it."""

_DPI = 100
_LEAST, _LONGEST = 320, 2048  # pixels of a picture's longer side: room for its caption, and no more than screens show
_STRIP = 256  # rows that are coloured at once, so that large photographs need little memory
_ENDS = {False: ("weak", "strong evidence"), True: ("against", "evidence for")}


def overlay(
    image: Any,
    map: Tensor,
    *,
    alpha: float = ALPHA,
    colormap: str | None = None,
    signed: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    box: Box | None = None,
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Lay a map over its photograph: the stronger the evidence, the more colour; none leaves the photograph as it is.

    Args:
        image: a ``(C, H, W)`` tensor in [0, 1], a standardised one together with ``mean`` and ``std``, or a PIL image;
            grey or RGB.
        map: ``(h, w)``, ``(1, h, w)`` or ``(C, H, W)``, at any resolution; channels are averaged. It is scaled to
            [0, 1] over its own range, and a constant map draws the plain photograph.
        alpha: opacity of the strongest evidence, in [0, 1].
        colormap: any name that matplotlib knows; default ``"plasma"``, and ``"PuOr_r"`` for signed maps.
        signed: for maps with evidence for (positive) and against (negative): scaled by the largest magnitude, zero
            shows the photograph.
        mean: per-channel mean that the image was standardised with.
        std: per-channel standard deviation that the image was standardised with.
        box: where on the photograph the map lies, as :meth:`attrib_zoo.models.LoadedModel.seen` tells it; it is
            outlined. ``None``: all of the photograph.

    Returns:
        ``(H, W, 3)`` uint8, at the resolution of the image.

    Raises:
        InputError: an image or map of the wrong shape or range, a map with NaN or infinity, or a box beside the image.
        OptionError: ``alpha`` out of range, or an unknown colormap.

    Example:
        >>> import torch
        >>> overlay(torch.rand(3, 32, 48), torch.rand(4, 6)).shape
        (32, 48, 3)
    """
    name = check_colours(alpha, colormap, signed)
    photo = _rgb(image, mean, std)
    strength = _placed(map, photo.shape[-2:], signed, box)
    drawn = np.empty((*photo.shape[-2:], 3), np.uint8)
    for top in range(0, len(drawn), _STRIP):
        rows = slice(top, top + _STRIP)
        weight = alpha * strength[rows].abs().clamp(max=1)
        mixed = photo[:, rows] * (1 - weight) + _colours(strength[rows], name, signed) * weight
        drawn[rows] = (mixed * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    if box is not None:
        _outline(drawn, box)
    return drawn


def picture(
    image: Any,
    map: Tensor,
    title: str = "",
    *,
    alpha: float = ALPHA,
    colormap: str | None = None,
    signed: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    box: Box | None = None,
    longest: int | None = _LONGEST,
) -> Image:
    """Draw :func:`overlay` as a picture that explains itself: a title above, and below what the colours mean.

    Args:
        image: see :func:`overlay`, as all that is not told here.
        map: the map.
        title: a line or several: class, confidence, method. Lines that are too long end in an ellipsis.
        alpha: opacity of the strongest evidence.
        colormap: matplotlib's name.
        signed: for maps with evidence for and against.
        mean: of the standardised image.
        std: of the standardised image.
        box: the part of the photograph that the map covers.
        longest: photographs whose longer side has more pixels are drawn with so many; ``None``: all at their own size.
            Tiny ones are enlarged by a whole number, so that there is room for words.

    Returns:
        A PIL image, which notebooks show; ``save(file)`` writes it.

    Example:
        >>> import torch
        >>> picture(torch.rand(3, 240, 320), torch.rand(7, 7), "tabby, 87 %").width
        320
    """
    from PIL import Image, ImageDraw

    name = check_colours(alpha, colormap, signed)
    photo = _rgb(image, mean, std)
    fitted = _fitted(photo, longest)
    drawn = overlay(fitted, map, alpha=alpha, colormap=name, signed=signed, box=_within(box, photo, fitted))
    height, width = drawn.shape[:2]
    font = _font(max(13, round(max(height, width) / 55)))
    line, lines = round(font.size * 1.5), [shown(words, 1000) for words in title.splitlines()]
    head, foot = line * len(lines) + round(line / 3) * bool(lines), round(line * 1.6)
    page = Image.new("RGB", (width, head + height + foot), "white")
    page.paste(Image.fromarray(drawn), (0, head))
    pen, room = ImageDraw.Draw(page), width - line
    for i, words in enumerate(lines):
        words = _shortened(words, lambda text: font.getlength(text) <= room)
        pen.text((line // 2, line * (i + 0.65)), words, "#111111", font, anchor="lm")
    _legend(page, head + height, foot, font, (alpha, name, signed))
    return page


def _legend(page: Image, top: int, tall: int, font: Any, colours: tuple[float, str, bool]) -> None:
    """What the colours mean, in the last rows of a picture."""
    from PIL import Image, ImageDraw

    pen, gap = ImageDraw.Draw(page), round(font.size * 0.6)
    first, last = _ENDS[colours[2]]
    spare = page.width - 4 * gap - round(font.getlength(first) + font.getlength(last))
    bar = Image.fromarray(colour_bar(max(8, min(spare, 16 * font.size)), round(font.size * 0.9), *colours))
    x, y = gap, top + tall // 2
    pen.text((x, y), first, "#444444", font, anchor="lm")
    x += round(font.getlength(first)) + gap
    page.paste(bar, (x, y - bar.height // 2))
    pen.text((x + bar.width + gap, y), last, "#444444", font, anchor="lm")


def colour_bar(
    width: int, height: int, alpha: float = ALPHA, colormap: str | None = None, signed: bool = False
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The colours of :func:`overlay` from no evidence to the strongest, over grey; ``(height, width, 3)`` uint8."""
    ramp = torch.linspace(-1.0 if signed else 0.0, 1, width).expand(height, -1)
    return overlay(torch.full((3, height, width), 0.5), ramp, alpha=alpha, colormap=colormap, signed=signed)


def save_overlay(
    path: str | os.PathLike[str],
    image: Any,
    map: Tensor,
    *,
    alpha: float = ALPHA,
    colormap: str | None = None,
    signed: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    box: Box | None = None,
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
        box: the part of the photograph that the map covers.

    Returns:
        The path.

    Raises:
        DataError: the file cannot be written.
    """
    from PIL import Image

    options = {"alpha": alpha, "colormap": colormap, "signed": signed, "mean": mean, "std": std, "box": box}
    drawn = Image.fromarray(overlay(image, map, **options))  # type: ignore[arg-type]  # the same names as above
    return write_picture(Path(path), drawn.save)


def figure(
    images: Any,
    columns: Mapping[str, Any],
    *,
    titles: Sequence[str] | None = None,
    path: str | os.PathLike[str] | None = None,
    across: int = 1,
    alpha: float = ALPHA,
    colormap: str | None = None,
    signed: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    boxes: Sequence[Box | None] | None = None,
) -> Figure:
    """Draw a contact sheet: a row for each photograph, and beside it one picture for each method.

    Args:
        images: N images, each as in :func:`overlay`: a tensor ``(N, C, H, W)`` or a list; sizes may differ.
        columns: name of each column (a method, or a class) to its N maps: a tensor ``(N, C, h, w)`` or a list.
        titles: N lines, one above each row; what the model said, for example.
        path: where to write the sheet too (PNG, JPEG, PDF, SVG ...).
        across: how many photographs stand side by side, each with its methods.
        alpha: see :func:`overlay`.
        colormap: see :func:`overlay`.
        signed: see :func:`overlay`.
        mean: of the standardised images.
        std: of the standardised images.
        boxes: N parts of the photographs that their maps cover.

    Returns:
        A matplotlib figure of its own, unknown to ``pyplot``; ``savefig(file, dpi=70)`` writes a smaller one.

    Raises:
        InputError: the numbers of images, maps and titles differ.
        OptionError: ``alpha`` out of range, or an unknown colormap.
    """
    _check_sheet(images, columns, titles, across, boxes)
    colours = alpha, check_colours(alpha, colormap, signed), signed
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    whole = [_rgb(image, mean, std) for image in images]
    photos = [_sized(photo, _CELL if max(photo.shape) < _CELL else 2 * _CELL) for photo in whole]
    across = min(across, len(photos))
    rows = -(-len(photos) // across)
    line = _TITLE if titles is not None else 0
    tall = _CELL * max(min(1.0, photo.shape[1] / photo.shape[2]) for photo in photos)
    block = (1 + len(columns)) * (_CELL + _GAP) - _GAP
    width = 2 * _MARGIN + across * block + (across - 1) * 3 * _GAP
    height = 2 * _MARGIN + _HEADER + rows * (line + tall) + (rows - 1) * _GAP + _FOOTER
    sheet = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(sheet)
    shows_itself(sheet)

    for i, photo in enumerate(photos):
        x = _MARGIN + (i % across) * (block + 3 * _GAP)
        y = _MARGIN + _HEADER + (i // across) * (line + tall + _GAP)
        if titles is not None:
            _text(sheet, x, y + line - 7, titles[i], block, va="baseline", size=10.5, color="#111111")
        _picture(sheet, x, y + line, tall, photo.permute(1, 2, 0).numpy())
        box = None if boxes is None else _within(boxes[i], whole[i], photo)
        for j, maps in enumerate(columns.values(), start=1):
            pixels = overlay(photo, maps[i], alpha=alpha, colormap=colours[1], signed=signed, box=box)
            _picture(sheet, x + j * (_CELL + _GAP), y + line, tall, pixels)
        if i < across:
            for j, name in enumerate(("image", *columns)):
                centre = x + j * (_CELL + _GAP) + _CELL / 2
                _text(sheet, centre, _MARGIN + 12, name, _CELL, ha="center", va="center", size=10, color="#666666")
    if columns:
        _bar(sheet, height - _MARGIN - 10, colours)
    if path is not None:
        write_picture(Path(path), lambda file, format: sheet.savefig(file, format=format, dpi=_DPI))
    return sheet


def shows_itself(sheet: Figure) -> None:
    """Let notebooks draw a figure that pyplot does not know."""

    def png() -> bytes:
        file = io.BytesIO()
        sheet.savefig(file, format="png")
        return file.getvalue()

    sheet._repr_png_ = png  # type: ignore[attr-defined]  # IPython looks for it by name


def _check_sheet(
    images: Any, columns: Mapping[str, Any], titles: Sequence[str] | None, across: int, boxes: Sequence[Any] | None
) -> None:
    if len(images) == 0:
        raise InputError("figure: needs at least one image, got none")
    if across < 1:
        raise OptionError(f"across: must be at least 1, got {across}")
    counts = {f"column {name!r}": len(maps) for name, maps in columns.items()}
    if titles is not None:
        counts["titles"] = len(titles)
    if boxes is not None:
        counts["boxes"] = len(boxes)
    for what, count in counts.items():
        if count != len(images):
            raise InputError(f"figure: {what} must have one entry per image, got {count} for {len(images)} images")


# ---------------------------------------------------------------------- images and maps as arrays


def check_colours(alpha: float, colormap: str | None, signed: bool = False) -> str:
    """The colormap's name, or the default; an error for one that is not there, or an opacity that is none."""
    import matplotlib

    if not 0 <= alpha <= 1:
        raise OptionError(f"alpha: must be within [0, 1], got {alpha}")
    name = colormap or (SIGNED_COLORMAP if signed else COLORMAP)
    if name not in matplotlib.colormaps:
        known = closest(name, list(matplotlib.colormaps))
        raise OptionError(
            f"colormap: matplotlib has no colormap {name!r}{known}; try 'plasma', 'inferno', 'viridis' or 'turbo'"
        )
    return name


def _rgb(image: Any, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """The image as float32 ``(3, H, W)`` in [0, 1], on the CPU."""
    if not isinstance(image, Tensor):
        return _from_pil(image)
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        advice = "of more bands pick three: image[[3, 2, 1]]"
        if image.ndim != 3:
            advice = "of a batch pass one image, images[0]"
        elif len(image) < 3:
            advice = "of two bands pick one: image[:1]"
        raise InputError(f"image: must be (C, H, W) with 1 or 3 channels, got shape {tuple(image.shape)}; {advice}")
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


def _placed(map: Tensor, size: Sequence[int], signed: bool, box: Box | None) -> Tensor:
    """The scaled map ``(H, W)`` where it lies on the photograph; nothing beside it."""
    if box is None:
        return _scaled(map, size, signed)
    left, top, right, bottom = (round(edge) for edge in box)
    rows, columns = _clipped(top, bottom, size[0]), _clipped(left, right, size[1])
    if rows.start >= rows.stop or columns.start >= columns.stop:
        raise InputError(
            f"box: must be (left, top, right, bottom) with pixels of the {size[1]} x {size[0]} image in it, got "
            f"{tuple(box)}"
        )
    inside = _scaled(map, (bottom - top, right - left), signed)
    strength = torch.zeros(*size)
    strength[rows, columns] = inside[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    return strength


def _clipped(begin: int, end: int, length: int) -> slice:
    return slice(max(begin, 0), min(end, length))


def _outline(pixels: np.ndarray[Any, np.dtype[np.uint8]], box: Box) -> None:
    """Two lines, white around black, just inside of a box; none around all of a photograph."""
    height, width = pixels.shape[:2]
    left, top, right, bottom = (round(edge) for edge in box)
    rows, columns = _clipped(top, bottom, height), _clipped(left, right, width)
    if rows.stop - rows.start >= height and columns.stop - columns.start >= width:
        return
    line = max(1, round(max(height, width) / 600))
    for colour, at in ((255, 0), (0, line)):
        y0, y1, x0, x1 = rows.start + at, rows.stop - at, columns.start + at, columns.stop - at
        for part in ((slice(y0, y0 + line), slice(x0, x1)), (slice(y1 - line, y1), slice(x0, x1))):
            pixels[part] = colour
        for part in ((slice(y0, y1), slice(x0, x0 + line)), (slice(y0, y1), slice(x1 - line, x1))):
            pixels[part] = colour


def _within(box: Box | None, whole: Tensor, photo: Tensor) -> Box | None:
    """A box of a photograph in pixels of the same photograph at another size."""
    if box is None:
        return None
    across, down = photo.shape[-1] / whole.shape[-1], photo.shape[-2] / whole.shape[-2]
    return box[0] * across, box[1] * down, box[2] * across, box[3] * down


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

    position = (strength + 1) / 2 if signed else strength
    return torch.from_numpy(matplotlib.colormaps[name](position.numpy())[..., :3]).permute(2, 0, 1).float()


def _fitted(photo: Tensor, longest: int | None) -> Tensor:
    """A photograph at its own size, unless that is too small for words or larger than asked for."""
    side = max(photo.shape[-2:])
    if side < _LEAST:
        return _sized(photo, side * -(-_LEAST // side))
    return photo if longest is None or side <= longest else _sized(photo, longest)


def _sized(photo: Tensor, side: int) -> Tensor:
    """The photograph with a longer side of so many pixels."""
    height, width = photo.shape[-2:]
    factor = side / max(height, width)
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    if size == (height, width):
        return photo
    return torch.nn.functional.interpolate(photo[None], size=size, mode="bicubic", antialias=factor < 1)[0].clamp(0, 1)


# ---------------------------------------------------------------------- drawing and writing


def _picture(sheet: Figure, x: float, y: float, tall: float, pixels: Any) -> None:
    width, height = (side * _DPI for side in sheet.get_size_inches())
    axes = sheet.add_axes((x / width, 1 - (y + tall) / height, _CELL / width, tall / height), anchor="N")
    axes.imshow(pixels)
    axes.set_axis_off()


def _bar(sheet: Figure, y: float, colours: tuple[float, str, bool]) -> None:
    """What the colours mean, in the last line of a sheet."""
    width, height = (side * _DPI for side in sheet.get_size_inches())
    first, last = _ENDS[colours[2]]
    style: dict[str, Any] = {"va": "center", "size": 10, "color": "#666666"}
    middle = width / 2
    axes = sheet.add_axes(((middle - 90) / width, 1 - (y + 6) / height, 180 / width, 12 / height))
    axes.imshow(colour_bar(180, 12, *colours), aspect="auto")
    axes.set_axis_off()
    _text(sheet, middle - 98, y, first, middle - 98, ha="right", **style)
    _text(sheet, middle + 98, y, last, width - middle - 98, **style)


def _text(sheet: Figure, x: float, y: float, words: str, room: float, **style: Any) -> None:
    """One line that ends in an ellipsis where the room (pixels) ends; nothing is read as mathematics."""
    width, height = (side * _DPI for side in sheet.get_size_inches())
    words = shown(words, 1000)
    text = sheet.text(x / width, 1 - y / height, words, **PLAIN, **style)

    def fits(words: str) -> bool:
        text.set_text(words)
        return bool(text.get_window_extent().width <= room)

    text.set_text(_shortened(words, fits))


def _shortened(words: str, fits: Callable[[str], bool]) -> str:
    """The words, or as many of their letters as fit together with an ellipsis, but at least one."""
    if len(words) < 2 or fits(words):
        return words

    def cut(count: int) -> str:
        return words[:count].rstrip() + "…"

    least, most = 1, len(words) - 1
    while least < most:  # by halves, for each try lays the text out
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(cut(middle)) else (least, middle - 1)
    return cut(least)


def _font(size: int) -> Any:
    """The font that comes with matplotlib, so that pictures are the same everywhere."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def write_picture(path: Path, write: Callable[..., object]) -> Path:
    """The picture that ``write(file, format=...)`` draws, in the format of the path's ending, whole or not at all."""
    form = path.suffix.lstrip(".").lower().replace("jpg", "jpeg") or "png"
    try:
        write_whole(path, lambda file: write(file, format=form))
    except (OSError, KeyError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"path: cannot write '{path}' ({reason}); choose another folder or file type") from error
    return path
