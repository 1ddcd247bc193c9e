"""The library at work, offline, in a minute or two: does a map of *this* class point at *this* object?

A tiny classifier learns to name coloured objects in scenes whose evidence is known to the pixel; T-TAME is fitted for
it; then both T-TAME and Grad-CAM explain each of the two objects in scenes that were in neither training set.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo.attribution import Attribution
from attrib_zoo.errors import DataError, aligned
from attrib_zoo.masking import upsample
from attrib_zoo.methods.gradcam import GradCAM
from attrib_zoo.methods.ttame import TTAME
from attrib_zoo.metrics._maps import scale_maps
from attrib_zoo.metrics.confidence import average_drop
from attrib_zoo.metrics.localization import energy_pointing_game
from attrib_zoo.models.photos import writable_folder
from attrib_zoo.synthetic import COLOURS, Scenes, recognised, scenes, trained
from attrib_zoo.synthetic.networks import one_thread
from attrib_zoo.visualize import write_picture

PICTURE = "demo.png"
_MEASURES = {
    "asked": ("energy of the map", "on the asked object"),
    "other": ("energy of the map", "on the other object, ideally 0"),
    "hits": ("brightest pixel", "is on the asked object"),
    "kept": ("confidence kept by", "the brightest 15 % alone"),
}


@dataclass(frozen=True)
class Settings:
    """How much to do; the defaults are what the command line runs.

    Attributes:
        kind: The classifier, ``"cnn"`` or ``"vit"``.
        size: Side of the scenes in pixels.
        fit_scenes: Scenes that T-TAME is fitted on.
        epochs: Number of passes over them.
        held_out: Scenes that are explained and measured.
        shown: How many of them are drawn.
    """

    kind: str = "cnn"
    size: int = 64
    fit_scenes: int = 2048
    epochs: int = 4
    held_out: int = 200
    shown: int = 4


@dataclass(frozen=True)
class Measured:
    """Means over all maps of one method, each in 0...1.

    Attributes:
        asked: Share of a map's energy, after min-max scaling, on the target object.
        other: The same for the other object in the scene.
        hits: How often the brightest pixel lies on the target object.
        kept: Confidence in the target class that remains when only the brightest 15 % are shown (1 - average drop).
    """

    asked: float
    other: float
    hits: float
    kept: float


@dataclass(frozen=True)
class DemoResult:
    """The outcome; ``str()`` of it is a table.

    Attributes:
        picture: The file that was written.
        maps: Number of maps per method, two for each scene.
        accuracy: Share of the held-out scenes in which the classifier names both objects; the others are not used.
        area: Mean share of a scene's pixels that an object covers: what an uninformed map puts on it.
        methods: The measures by method; ``"chance"`` are maps of random numbers.
        seconds: Wall time of each step.
    """

    picture: Path
    maps: int
    accuracy: float
    area: float
    methods: dict[str, Measured]
    seconds: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        cells = [["", *(f"{name:>8}" for name in self.methods)]]
        for name, label in _MEASURES.items():
            cells.append([" ".join(label), *(f"{getattr(measured, name):.1%}" for measured in self.methods.values())])
        spent = ", ".join(f"{step} {seconds:.0f} s" for step, seconds in self.seconds.items())
        lines = [
            f"Two objects in each scene, asked about each in turn: {self.maps} maps per method, of scenes",
            f"that were in no training. The classifier names both objects in {self.accuracy:.0%} of them.",
            "",
            *aligned(cells, right=True),
            "",
            f"time: {spent}",
        ]
        return "\n".join(lines)


def demo(options: Any) -> str:
    """Run the self-contained demonstration."""
    result = run(writable_folder(options.output), seed=options.seed, progress=True)
    return f"{result}\n\npicture: {result.picture}"


def run(
    output_dir: str | os.PathLike[str], *, seed: int = 0, progress: bool = False, settings: Settings | None = None
) -> DemoResult:
    """Train, fit, explain, measure, and draw ``demo.png``.

    Args:
        output_dir: Folder for the picture; created if missing.
        seed: For everything: classifier, T-TAME and scenes.
        progress: Report progress on the standard error stream.
        settings: How much to do.

    Returns:
        The measures and the path of the picture.

    Raises:
        DataError: The folder cannot be written to, or the classifier names both objects in none of the scenes.
    """
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"output_dir: must be a folder that can be written to, got {folder} ({error})") from error

    with one_thread():
        return _run(folder, seed, progress, settings or Settings())


def _run(folder: Path, seed: int, progress: bool, chosen: Settings) -> DemoResult:
    steps = _Steps(progress)
    with steps("training a classifier"):
        model = trained(chosen.kind, size=chosen.size, seed=seed)
    with steps("fitting T-TAME"):
        material = scenes(chosen.fit_scenes, size=chosen.size, seed=seed + 20_000)
        ttame = TTAME(model).fit(material.loader(seed=seed), epochs=chosen.epochs, seed=seed, show_progress=progress)
    with steps("explaining"):
        unseen = scenes(chosen.held_out, size=chosen.size, seed=seed + 30_000)
        known = recognised(model, unseen)
        if not known.any():
            raise DataError(f"settings: the classifier names both objects in none of {chosen.held_out} scenes")
        data = unseen.rows(known)
        ttame.upsample = False  # the measures scale maps, then enlarge them
        methods: dict[str, Attribution] = {"Grad-CAM": GradCAM(model, upsample=False), "T-TAME": ttame}
        maps = {"chance": _random(data, seed), **{name: _both(explainer, data) for name, explainer in methods.items()}}
        measured = {name: _measure(model, data, found) for name, found in maps.items()}
    with steps("drawing"):
        picture = _draw(folder / PICTURE, data.rows(slice(chosen.shown)), {n: maps[n] for n in methods}, measured)
    area = float(data.masks.float().mean())
    return DemoResult(picture, 2 * len(data), float(known.float().mean()), area, measured, steps.seconds)


class _Steps:
    """Times the steps by name and, if wanted, says which one is running."""

    def __init__(self, progress: bool) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        from tqdm.auto import tqdm

        start = time.perf_counter()
        with tqdm(desc=f"{name} ...", bar_format="{desc}", disable=not self.progress) as bar:
            yield
            self.seconds[name] = time.perf_counter() - start
            bar.set_description_str(f"{name}: {self.seconds[name]:.0f} s")


def _both(explainer: Attribution, data: Scenes) -> Tensor:
    """The maps of both objects of each scene, ``(N, 2, h, w)``."""
    batches = zip(data.inputs.split(50), data.labels.split(50), strict=True)
    maps = [explainer.attribute_many(inputs, labels)[:, :, 0] for inputs, labels in batches]
    return torch.cat(maps)


def _random(data: Scenes, seed: int) -> Tensor:
    return torch.rand(data.masks.shape, generator=torch.Generator().manual_seed(seed))


def _measure(model: nn.Module, data: Scenes, maps: Tensor) -> Measured:
    asked, other, hits, kept = [], [], [], []
    for j in range(2):
        own, mask = maps[:, j], data.masks[:, j]
        asked.append(energy_pointing_game(model, data.inputs, own, masks=mask))
        other.append(energy_pointing_game(model, data.inputs, own, masks=data.masks[:, 1 - j]))
        peak = upsample(own[:, None], mask.shape[-2:]).flatten(1).argmax(1, keepdim=True)
        hits.append(mask.flatten(1).gather(1, peak)[:, 0].float())
        kept.append(1 - average_drop(model, data.inputs, own, data.labels[:, j], keep=0.15))
    means = [float(torch.cat(values).nanmean()) for values in (asked, other, hits, kept)]
    return Measured(*means)


# ---------------------------------------------------------------------- the picture

_PAGE, _INK, _FAINT = "#14161b", "#f2f2f2", "#9aa0aa"
_BARS = {"chance": "#6b7280", "Grad-CAM": "#5b9bd5", "T-TAME": "#ffb347"}
_CELL, _GAP, _PAIR_GAP, _MARGIN, _HEAD, _ROW, _FOOT, _LABELS = 1.75, 0.09, 0.3, 0.35, 1.72, 2.42, 1.55, 0.65  # inches
_CAPTION = (
    "Each scene holds two objects. The explainers are asked about one, then about the other: a good map moves along.",
    "White line: the object asked about. Number: share of the map's energy inside it. No training saw these scenes.",
)


def _draw(path: Path, data: Scenes, maps: dict[str, Tensor], measured: dict[str, Measured]) -> Path:
    """A row per scene: the scene, then each method's map for each of its two objects; below, the means."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = 2 * _MARGIN + 5 * _CELL + 2 * _PAIR_GAP + 2 * _GAP
    height = _HEAD + len(data) * _ROW + _FOOT
    figure = Figure(figsize=(width, height), dpi=110, facecolor=_PAGE)
    FigureCanvasAgg(figure)

    def cell(x: float, y: float, w: float = _CELL, h: float = _CELL) -> Any:
        return figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))

    def say(x: float, y: float, words: str, **style: Any) -> None:
        figure.text(x / width, 1 - y / height, words, **{"color": _FAINT, "size": 9.5, **style})

    say(_MARGIN, 0.5, "Which pixels made the classifier say this colour?", size=17, weight="bold", color=_INK)
    say(_MARGIN, 0.81, _CAPTION[0])
    say(_MARGIN, 1.02, _CAPTION[1])
    for i in range(len(data)):
        top = _HEAD + i * _ROW
        _show(cell(_MARGIN, top), data.images[i].permute(1, 2, 0))
        say(_MARGIN, top - 0.08, "scene")
        for j in range(2):
            name, mask = data.class_names[int(data.labels[i, j])], data.masks[i, j]
            left = _MARGIN + _CELL + _PAIR_GAP + j * (2 * _CELL + _GAP + _PAIR_GAP)
            say(
                left + _CELL + _GAP / 2,
                top - 0.3,
                f"why {name}?",
                size=13,
                weight="bold",
                color=_bright(name),
                ha="center",
            )
            for k, (method, found) in enumerate(maps.items()):
                x = left + k * (_CELL + _GAP)
                axes = cell(x, top)
                _show(axes, scale_maps(found[i, j][None, None], mask.shape)[0, 0])
                axes.contour(mask.float().numpy(), [0.5], colors="white", linewidths=1.0)
                share = energy_pointing_game(None, None, found[i, j][None], masks=mask[None]).item()
                say(x, top - 0.08, method)
                say(x + _CELL, top - 0.08, f"{share:.0%}", color=_INK, ha="right")
    say(_MARGIN, height - _FOOT - 0.22, "Means over all scenes", size=12, weight="bold", color=_INK)
    each = (width - 2 * _MARGIN - _LABELS) / len(_MEASURES)
    for i, key in enumerate(_MEASURES):
        axes = cell(_MARGIN + _LABELS + i * each, height - _FOOT + 0.42, each - 0.45, 0.85)
        _bars(axes, key, measured, names=i == 0)
    return write_picture(path, lambda file, format: figure.savefig(file, format=format, facecolor=_PAGE))


def _show(axes: Any, picture: Tensor) -> None:
    axes.imshow(picture.numpy(), interpolation="bicubic", cmap="inferno", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#3a3f4a")


def _bright(name: str) -> tuple[float, ...]:
    """The colour of a class, light enough to be legible on the dark page."""
    return tuple(0.3 + 0.7 * value for value in COLOURS[name])


def _bars(axes: Any, key: str, measured: dict[str, Measured], *, names: bool) -> None:
    """One measure of all methods, as bars."""
    values = [getattr(each, key) for each in measured.values()]
    axes.set_facecolor(_PAGE)
    axes.barh(range(len(values)), values, color=[_BARS[name] for name in measured], height=0.66)
    for place, value in enumerate(values):
        axes.text(value + 0.02 * max(values), place, f"{value:.0%}", color=_INK, size=9, va="center")
    axes.set_xlim(0, 1.18 * max(values))
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.set_yticks(range(len(values)), list(measured) if names else [], color=_INK, size=9)
    axes.tick_params(length=0)
    axes.set_title("\n".join(_MEASURES[key]), size=9, color=_FAINT, loc="left")
    for spine in axes.spines.values():
        spine.set_visible(False)
