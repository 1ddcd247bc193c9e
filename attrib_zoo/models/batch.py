"""Explanations on batch engines: one picklable object from dicts of arrays to dicts of arrays."""

from __future__ import annotations

import os
import tempfile
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attrib_zoo.attribution import Attribution
from attrib_zoo.errors import DataError, OptionError, check_choice, reason
from attrib_zoo.methods import list_methods
from attrib_zoo.models.load import LoadedModel
from attrib_zoo.models.onepass import answer
from attrib_zoo.models.photos import open_photo
from attrib_zoo.training import checkpoint

COLUMNS = {"image": "image", "target": None, "class": "class", "confidence": "confidence", "map": "map"}
"""What is read and written, and the names of the columns; ``None`` reads or writes none."""

_SCORES = ("softmax", "sigmoid")
_KEPT = 4  # loaded models that a process keeps
_loaded: OrderedDict[str, _Ready] = OrderedDict()
_gate = threading.Lock()

Arrays = dict[str, Any]


@dataclass(frozen=True)
class _Ready:
    """What a worker loads once."""

    model: nn.Module
    transform: Callable[[Any], Tensor] | None
    explainer: Attribution
    size: tuple[int, ...] | None


class BatchExplainer:
    """Explains batches of a table: a dict of arrays in, a dict of arrays out.

    It is small: it holds how to make the model, not the model itself. So it can be pickled to the workers of Ray Data
    (``map_batches``), Spark (``predict_batch_udf``, ``mapInPandas``), Hugging Face datasets (``map``) or a pool of
    processes, and each worker loads the model once, with its first batch, however often the object is sent.

    Args:
        model_factory: makes the model, without arguments: a module-level function, or
            ``functools.partial(attrib_zoo.models.load, "resnet50")``. It returns a ``LoadedModel``, which has its own
            preprocessing, or a plain classifier, which takes standardised tensors only.
        explainer: a function from the model to an explainer, such as ``GradCAM`` or ``partial(GradCAM,
            layers="layer3")``; or the path of a fitted explainer's file.
        columns: changes to :data:`COLUMNS`, such as ``{"image": "pixels", "confidence": None}``. ``"target"`` names a
            column of classes to explain; without it the model's decisions are explained.
        upsample: ``True`` gives maps of the images' size, ``False`` at the layer's resolution.
        score: the kind of confidence, ``"softmax"`` or ``"sigmoid"``.
        device: where to move a model that is on the CPU; ``None`` leaves it, ``"auto"`` means a GPU if there is one.
        skip_bad: a photograph that cannot be read gets the class -1, a confidence of NaN and a map of NaN, and a column
            ``"error"`` with the reason, instead of an error that ends the job.

    Example:
        >>> import numpy as np
        >>> from attrib_zoo import GradCAM
        >>> from attrib_zoo.synthetic import tiny_cnn
        >>> explain = BatchExplainer(tiny_cnn, GradCAM)
        >>> found = explain({"id": np.arange(2), "image": np.random.rand(2, 3, 32, 32).astype("float32")})
        >>> sorted(found), found["map"].shape[0]
        (['class', 'confidence', 'id', 'map'], 2)
    """

    def __init__(
        self,
        model_factory: Callable[[], nn.Module | LoadedModel],
        explainer: Callable[[Any], Attribution] | str | os.PathLike[str],
        columns: Mapping[str, str | None] | None = None,
        *,
        upsample: bool = False,
        score: str = "softmax",
        device: str | None = None,
        skip_bad: bool = False,
    ) -> None:
        for name, value in (("model_factory", model_factory), ("explainer", explainer)):
            if isinstance(value, (nn.Module, Attribution)) or not (callable(value) or isinstance(value, (str, Path))):
                raise OptionError(
                    f"{name}: must be a function that makes it, so that each worker has its own, got "
                    f"{type(value).__name__}; pass functools.partial or a function at the top of a module"
                )
        unknown = [name for name in columns or () if name not in COLUMNS]
        if unknown:
            raise OptionError(f"columns: must name some of {', '.join(COLUMNS)}, got {unknown[0]!r}")
        self.model_factory = model_factory
        self.explainer = explainer if callable(explainer) else os.fspath(explainer)
        self.columns: dict[str, str | None] = {**COLUMNS, **(columns or {})}
        if self.columns["image"] is None:
            raise OptionError("columns: 'image' must name a column, got None")
        self.upsample, self.skip_bad, self.device = bool(upsample), bool(skip_bad), device
        self.score = check_choice("score", score, _SCORES)
        self._token = uuid.uuid4().hex  # pickled along: tells a worker what it has already loaded

    def __call__(self, batch: Mapping[str, Any]) -> Arrays:
        """Explain a batch.

        Args:
            batch: column -> N values. Images are one array of standardised ``(N, C, H, W)`` floats or N of
                ``(C, H, W)``; or, where the factory's model has preprocessing, N photographs: PIL images, paths, bytes
                of files, uint8 arrays ``(H, W, 3)``, or dicts that hold ``"bytes"`` or ``"path"``.

        Returns:
            The batch without its images, and the columns ``class`` (int64), ``confidence`` (float32) and ``map``
            (float32, ``(N, h, w)``).

        Raises:
            DataError: a column is missing or empty, or an image cannot be used.
        """
        name = str(self.columns["image"])
        if name not in batch:
            raise DataError(f"columns: the batch must have the column {name!r}, got {', '.join(map(repr, batch))}")
        ready = self._ready()
        images, good, wrong = self._images(batch[name], ready)
        targets = self._targets(batch, good)
        found = {key: values for key, values in batch.items() if key != name}
        return {**found, **self._explained(ready, images, targets, good, wrong)}

    def make_predict_fn(self) -> Callable[..., Arrays]:
        """Ready for Spark's ``predict_batch_udf``: loads the model and returns the function from images to columns.

        Each map is a flat row, ``(N, h * w)``, since Spark takes no more axes. With a ``"target"`` column the
        function takes the targets as a second argument.
        """
        self._ready()
        if self.columns["target"] is None:
            return lambda images: self._flat(images)
        return lambda images, targets: self._flat(images, targets)  # Spark counts the arguments

    def _flat(self, images: Any, targets: Any = None) -> Arrays:
        batch = {str(self.columns["image"]): images}
        if targets is not None:
            batch[str(self.columns["target"])] = targets
        found = self(batch)
        written = (self.columns[key] for key in ("class", "confidence", "map"))
        out = {name: found[name] for name in written if name is not None}
        return {name: value.reshape(len(value), -1) if value.ndim > 2 else value for name, value in out.items()}

    # ------------------------------------------------------------------ loading

    def _ready(self) -> _Ready:
        """The model and the explainer of this process, loaded at the first call, for which other threads wait."""
        with _gate:
            if self._token not in _loaded:
                _loaded[self._token] = self._load()
                while len(_loaded) > _KEPT:
                    _loaded.popitem(last=False)
            _loaded.move_to_end(self._token)
            return _loaded[self._token]

    def _load(self) -> _Ready:
        made = self.model_factory()
        if not isinstance(made, (nn.Module, LoadedModel)):
            raise OptionError(
                f"model_factory: must return a torch module or what attrib_zoo.models.load returns, got "
                f"{type(made).__name__}"
            )
        model = (made.model if isinstance(made, LoadedModel) else made).eval()
        if self.device is not None:
            own = "cuda" if torch.cuda.is_available() else "cpu"
            model = model.to(own if self.device == "auto" else self.device)
        explainer = self.explainer(model) if callable(self.explainer) else _from_file(self.explainer, model)
        if not isinstance(explainer, Attribution):
            raise OptionError(f"explainer: must make an explainer of attrib_zoo, got {type(explainer).__name__}")
        explainer.upsample = self.upsample
        if isinstance(made, LoadedModel):
            return _Ready(model, made.transform, explainer, made.input_size)
        return _Ready(model, None, explainer, None)

    # ------------------------------------------------------------------ a batch

    def _images(self, values: Any, ready: _Ready) -> tuple[Tensor, list[int], dict[int, str]]:
        """The images of the valid rows, the indices of these rows, and what is wrong with the others."""
        if len(values) == 0:
            raise DataError("columns: a batch must have at least one image, got none")
        if isinstance(values, Tensor) and values.ndim == 4 and values.is_floating_point():
            return values.detach().float(), list(range(len(values))), {}
        if isinstance(values, np.ndarray) and values.ndim == 4 and values.dtype != np.uint8:
            return torch.from_numpy(values.astype(np.float32)), list(range(len(values))), {}
        images, good, wrong = [], [], {}
        for row, value in enumerate(values):
            image, why = self._image(value, ready, row)
            if image is None:
                wrong[row] = why
            else:
                images.append(image)
                good.append(row)
        if not images:
            size = ready.size or (3, 224, 224)
            return torch.zeros(0, *size), [], wrong
        if len({image.shape for image in images}) > 1:
            shapes = sorted({tuple(image.shape) for image in images})
            raise DataError(f"columns: the images of a batch must have one shape, got {shapes}; resize them")
        return torch.stack(images), good, wrong

    def _image(self, value: Any, ready: _Ready, row: int) -> tuple[Tensor | None, str]:
        try:
            return _image(value, ready.transform, row), ""
        except DataError as error:
            if not self.skip_bad:
                raise
            return None, str(error)

    def _targets(self, batch: Mapping[str, Any], good: Sequence[int]) -> Tensor | None:
        name = self.columns["target"]
        if name is None:
            return None
        if name not in batch:
            raise DataError(f"columns: the batch must have the column {name!r}, got {', '.join(map(repr, batch))}")
        return torch.as_tensor(np.asarray(batch[name])).long()[list(good)].reshape(-1, 1)

    def _explained(
        self, ready: _Ready, images: Tensor, targets: Tensor | None, good: Sequence[int], wrong: Mapping[int, str]
    ) -> Arrays:
        """The output columns; rows without an image get values that cannot be results."""
        like = next(ready.model.parameters(), torch.zeros(0))
        asked = images.to(like) if good else torch.zeros(1, *images.shape[1:]).to(like)
        found = answer({"map": ready.explainer}, asked, targets=targets if good else None, score=self.score)
        count = len(good) + len(wrong)
        classes = np.full(count, -1, dtype=np.int64)
        confidence = np.full(count, np.nan, dtype=np.float32)
        maps = np.full((count, *found.maps["map"].shape[2:]), np.nan, dtype=np.float32)
        if good:
            rows = list(good)
            classes[rows] = found.classes[:, 0].cpu().numpy()
            confidence[rows] = found.confidence.gather(1, found.classes)[:, 0].float().cpu().numpy()
            maps[rows] = found.maps["map"][:, 0].float().cpu().numpy()
        written = {"class": classes, "confidence": confidence, "map": maps}
        out: Arrays = {name: value for key, value in written.items() if (name := self.columns[key]) is not None}
        if self.skip_bad:
            out["error"] = np.array([wrong.get(row, "") for row in range(count)], dtype=object)
        return out


def _from_file(path: str, model: nn.Module) -> Attribution:
    """The fitted explainer in a file, whichever method of the library it belongs to."""
    name = str(checkpoint.read_facts(path).get("method", ""))
    methods: dict[str, Any] = {cls.__name__: cls for cls in list_methods().values()}
    if name not in methods:
        raise OptionError(
            f"explainer: '{path}' is of the method {name!r}, which is not part of attrib_zoo; pass a function instead: "
            f"lambda model: {name}.load({path!r}, model)"
        )
    found: Attribution = methods[name].load(path, model)
    return found


def _image(value: Any, transform: Callable[[Any], Tensor] | None, row: int) -> Tensor:
    """One image as the model expects it.

    Raises:
        DataError: it is not an image.
    """
    if isinstance(value, list):
        value = np.asarray(value)
    if isinstance(value, Tensor):
        value = value.numpy()
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = np.array(value.tolist())
    if isinstance(value, np.ndarray) and value.ndim == 3 and value.dtype != np.uint8:
        return torch.from_numpy(np.array(value, dtype=np.float32))
    if transform is None:
        raise DataError(
            f"columns: image {row} must be a standardised float array (C, H, W), as the model factory brings no "
            f"preprocessing, got {_kind(value)}; let it return attrib_zoo.models.load(...)"
        )
    return transform(_photo(value, row))


def _photo(value: Any, row: int) -> Any:
    from PIL import Image

    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, (str, Path)):
        return open_photo(Path(value))
    if isinstance(value, (bytes, bytearray, memoryview)):
        with tempfile.NamedTemporaryFile(suffix=f"-image-{row}") as file:  # files are checked against the size limits
            file.write(value)
            file.flush()
            return open_photo(Path(file.name))
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim in (2, 3):
        try:
            return Image.fromarray(value)
        except (TypeError, ValueError) as error:
            raise DataError(f"columns: image {row} must be (H, W, 3), got {_kind(value)} ({reason(error)})") from error
    raise DataError(
        f"columns: image {row} must be a photograph (a PIL image, a path, bytes of a file, a uint8 array (H, W, 3)) or "
        f"a float array (C, H, W), got {_kind(value)}"
    )


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} with the shape {value.shape}"
    return type(value).__name__
