"""The logic of ``attrib-zoo app`` without its page: photographs, maps, and pictures of them."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attrib_zoo.attribution import Attribution
from attrib_zoo.backbone.kind import is_transformer
from attrib_zoo.backbone.targets import class_scores, scores_in
from attrib_zoo.cli.shared import accepted, explainers, load_model, methods, settings_of
from attrib_zoo.errors import AttribZooError, OptionError
from attrib_zoo.masking import mean_filter
from attrib_zoo.models import LoadedModel
from attrib_zoo.models.onepass import answer
from attrib_zoo.models.photos import open_photo
from attrib_zoo.visualize import ALPHA, Box, overlay

MOST_CLASSES, MOST_METHODS = 2, 4
_TOP = 5  # classes that are listed
_SHOWN = 1024  # pixels of the longer side of the photograph that is drawn on
OPACITY = ALPHA


@dataclass
class Sight:
    """One visitor's state: a photograph and its maps.

    Attributes:
        name: of the file.
        pixels: uint8 ``(H, W, 3)``, the photograph as it is drawn.
        image: ``(1, C, H, W)``, as the model takes it.
        box: the part that the model sees, in pixels.
        confidence: ``(K,)``.
        maps: (class, method) -> raw map ``(h, w)``, in the order in which they are shown.
    """

    name: str
    pixels: np.ndarray[Any, np.dtype[np.uint8]]
    image: Tensor
    box: Box
    confidence: Tensor
    maps: dict[tuple[int, str], Tensor] = field(default_factory=dict)


class Studio:
    """A model and its methods, for any number of visitors at once; it keeps nothing about them.

    Args:
        loaded: the model.
        ready: existing explainers by name: those given on the command line, and fitted ones.
        make: the other methods by name, each a function that makes the explainer; called at first use.
        score: what confidence means.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        ready: dict[str, Attribution],
        make: dict[str, Callable[[], Attribution]],
        score: str = "softmax",
    ) -> None:
        self.loaded, self.score = loaded, score
        self._ready, self._make = dict(ready), make
        self.first = list(ready)[:MOST_METHODS]
        for explainer in ready.values():
            explainer.upsample = False

    @property
    def methods(self) -> list[str]:
        """The names of all methods on offer, those given on the command line first."""
        return list(dict.fromkeys([*self.first, *self._ready, *self._make]))

    def explainer(self, name: str) -> Attribution:
        """The explainer of that name."""
        if name not in self._ready:
            made = self._make[name]()
            made.upsample = False
            self._ready.setdefault(name, made)
        return self._ready[name]

    def look(self, path: str | Path, name: str | None = None) -> Sight:
        """A photograph, and what the model predicts for it.

        Raises:
            DataError: it cannot be read.
        """
        photo = open_photo(Path(path))
        image = self.loaded.transform(photo)[None].to(next(self.loaded.model.parameters()).device)
        with torch.no_grad():
            outputs = scores_in(self.loaded.model(image))
        small = photo.copy()
        small.thumbnail((_SHOWN, _SHOWN))
        across, down = small.width / photo.width, small.height / photo.height
        left, top, right, bottom = self.loaded.seen(photo)
        box = left * across, top * down, right * across, bottom * down
        confidence = _confidence(outputs, self.score)
        return Sight(name or Path(path).name, np.asarray(small.convert("RGB")), image, box, confidence)

    def explain(self, sight: Sight, classes: Sequence[int], names: Sequence[str]) -> tuple[Sight, list[str]]:
        """Maps of one or two classes by up to four methods.

        Returns:
            The sight with its maps, and a sentence for each method that cannot explain this model.

        Raises:
            OptionError: there are too few or too many.
        """
        for what, chosen, most in (("classes", classes, MOST_CLASSES), ("methods", names, MOST_METHODS)):
            if not 1 <= len(chosen) <= most:
                raise OptionError(f"{what}: choose one to {('two', 'four')[most > 2]}, got {len(chosen)}")
        maps: dict[tuple[int, str], Tensor] = {}
        wrong: list[str] = []
        found: dict[str, Tensor] = {}
        for name in names:
            answered, why = self._maps(sight, classes, name)
            if answered is None:
                wrong.append(f"{name}: {why}")
            else:
                found[name] = answered
        for i, target in enumerate(classes):
            maps |= {(target, name): heat[i] for name, heat in found.items()}
        return Sight(sight.name, sight.pixels, sight.image, sight.box, sight.confidence, maps), wrong

    def _maps(self, sight: Sight, classes: Sequence[int], name: str) -> tuple[Tensor | None, str]:
        try:
            explainer = self.explainer(name)
            found = answer({name: explainer}, sight.image, targets=list(classes), score=self.score)
        except AttribZooError as error:
            return None, str(error)
        return found.maps[name][0].float().cpu(), ""

    def top(self, sight: Sight) -> list[tuple[str, int, float]]:
        """The classes that the model ranks first: name, number and confidence."""
        best = sight.confidence.argsort(descending=True, stable=True)[:_TOP].tolist()
        return [(self.loaded.class_name(i), i, float(sight.confidence[i])) for i in best]


def _confidence(outputs: Tensor, score: str) -> Tensor:
    return class_scores(outputs, score)[0].float().cpu()


def drawn(sight: Sight, target: int, method: str, opacity: float, smooth: float) -> np.ndarray[Any, Any]:
    """A map over the original photograph, uint8 ``(H, W, 3)``; the part the model sees is outlined, the rest faded.

    Args:
        sight: the visitor's state.
        target: the class.
        method: the method.
        opacity: of the strongest evidence, in [0, 1].
        smooth: width of the square that is averaged over, as a share of the map's side.
    """
    heat = sight.maps[target, method].clamp(min=0)  # the evidence for the class
    size = 2 * round(smooth * min(heat.shape) / 2) + 1
    heat = mean_filter(heat[None, None], size)[0, 0]
    photo = torch.from_numpy(sight.pixels.copy()).permute(2, 0, 1).float() / 255
    left, top, right, bottom = (max(0, round(edge)) for edge in sight.box)
    shown = (photo.mean(0, keepdim=True) * 0.35 + 0.6).expand(3, -1, -1).clone()
    shown[:, top:bottom, left:right] = photo[:, top:bottom, left:right]
    return overlay(shown, heat, alpha=opacity, box=sight.box)


def gallery(studio: Studio, sight: Sight, opacity: float, smooth: float) -> str:
    """All maps side by side, as HTML: a row for each class."""
    rows: dict[int, str] = {}
    for target, method in sight.maps:
        source = _jpeg(drawn(sight, target, method, opacity, smooth))
        name = html.escape(studio.loaded.class_name(target))
        title = html.escape(studio.explainer(method).get_name())
        share = f"{float(sight.confidence[target]):.1%}"
        rows[target] = rows.get(target, "") + (
            f'<figure><img src="{source}" alt="{title} for {name}">'
            f"<figcaption><b>{name}</b> <span>{share}</span><br>{title}</figcaption></figure>"
        )
    return "".join(f'<div class="maps">{row}</div>' for row in rows.values())


def _jpeg(pixels: np.ndarray[Any, Any]) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def write_picture(studio: Studio, sight: Sight, opacity: float, smooth: float, path: Path) -> Path:
    """One PNG: a row for each class, a column for each method."""
    from PIL import Image, ImageDraw, ImageFont

    classes, names = list(dict.fromkeys(c for c, _ in sight.maps)), list(dict.fromkeys(m for _, m in sight.maps))
    height, width = sight.pixels.shape[:2]
    line, gap = 30, 8
    sheet = Image.new("RGB", (len(names) * (width + gap) - gap, len(classes) * (height + line + gap) - gap), "white")
    draw = ImageDraw.Draw(sheet)
    font: Any = ImageFont.load_default(18)
    for row, target in enumerate(classes):
        for column, method in enumerate(names):
            x, y = column * (width + gap), row * (height + line + gap)
            title = f"{studio.loaded.class_name(target)} {float(sight.confidence[target]):.1%}, {method}"
            while len(title) > 1 and draw.textlength(title, font=font) > width:
                title = title[:-2] + "…"
            draw.text((x + 2, y + 4), title, fill="black", font=font)
            if (target, method) in sight.maps:
                sheet.paste(Image.fromarray(drawn(sight, target, method, opacity, smooth)), (x, y + line))
    sheet.save(path)
    return path


def write_maps(studio: Studio, sight: Sight, path: Path) -> Path:
    """One npz: each raw map under ``class-method``, and ``about``, JSON that describes them."""
    height, width = sight.pixels.shape[:2]
    arrays: dict[str, Any] = {f"{target}-{method}": heat.numpy() for (target, method), heat in sight.maps.items()}
    about = {
        "photo": sight.name,
        "seen": [sight.box[0] / width, sight.box[1] / height, sight.box[2] / width, sight.box[3] / height],
        "classes": {str(c): studio.loaded.class_name(c) for c, _ in sight.maps},
        "confidence": {str(c): float(sight.confidence[c]) for c, _ in sight.maps},
    }
    np.savez(path, about=np.array(json.dumps(about)), **arrays)
    return path


def studio_of(options: Any) -> Studio:
    """The model and the methods that the options name, and all others that fit the model."""
    loaded = load_model(options)
    ready = explainers(options, loaded)
    kind = "vit" if is_transformer(loaded.model) else "cnn"
    settings = settings_of(loaded, options)
    make: dict[str, Callable[[], Attribution]] = {}
    for name, cls in methods().items():
        if kind in cls.models and not cls.needs_fit and name not in ready:
            make[name] = _maker(cls, loaded, settings)
    return Studio(loaded, ready, make, options.score)


def _maker(cls: Any, loaded: LoadedModel, settings: dict[str, Any]) -> Callable[[], Attribution]:
    return lambda: cls(loaded.model, **accepted(cls, settings))
