"""The command ``fit``: trains an explainer on a folder of images and saves it; returns the text to print."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from attrib_zoo.cli.shared import accepted, layers_of, load_model, method_of, settings_of
from attrib_zoo.errors import DataError, OptionError, listed
from attrib_zoo.models import LoadedModel
from attrib_zoo.models.photos import Photos, find_photos, is_photo, writable_folder
from attrib_zoo.training.callbacks import Progress
from attrib_zoo.training.locks import hold
from attrib_zoo.training.signals import Stopped


def fit(options: Any) -> str:
    """Train an explainer on a folder of images and save it."""
    output = Path(options.output)
    if output.suffix != ".safetensors":
        raise OptionError(f"output: must end in .safetensors, got '{output}'")
    cls: Any = method_of(options.method)
    if not cls.needs_fit:
        raise OptionError(
            f"method: {options.method} needs no training; use it at once: "
            f"attrib-zoo explain PHOTO --method {options.method} --model {options.model}"
        )
    training = _usable(find_photos([options.data]), options.skip_bad)
    validation = None if options.val is None else _usable(find_photos([options.val]), options.skip_bad)
    loaded = load_model(options)
    asked = {name: value for name in ("recipe", "psi") if (value := getattr(options, name)) is not None}
    unknown = [name for name in asked if name not in accepted(cls, asked)]
    if unknown:
        raise OptionError(f"{unknown[0]}: {options.method} has no such option; leave --{unknown[0]} out")
    settings = settings_of(loaded, options) | asked
    explainer = cls(loaded.model, layers_of(options.layers), **accepted(cls, settings))
    writable_folder(output.parent)
    folder = None if options.checkpoint_dir is None else writable_folder(options.checkpoint_dir)
    loaders = [_loader(training, loaded, options, shuffle=True)]
    loaders += [] if validation is None else [_loader(validation, loaded, options, shuffle=False)]
    with hold(output, "fit"):
        _train(explainer, loaders, options, folder)
        explainer.save(output)
    return f"{explainer.report()}\n\n{_next_steps(output, options, cls.__name__)}"


def _train(explainer: Any, loaders: list[DataLoader[Tensor]], options: Any, folder: Path | None) -> None:
    """The fit; when it is stopped, it says how to continue."""
    watched = sys.stderr.isatty()
    try:
        explainer.fit(
            loaders[0],
            epochs=options.epochs,
            max_steps=options.max_steps,
            schedule=options.schedule,
            lr=options.lr,
            precision=options.precision,
            val_loader=loaders[1] if len(loaders) > 1 else None,
            seed=options.seed,
            resume_from=options.resume,
            checkpoint_dir=folder,
            checkpoint_every=options.checkpoint_every,
            callbacks=[] if watched else [Lines()],
            show_progress=watched,
        )
    except KeyboardInterrupt as stop:
        raise Stopped(
            "with --checkpoint-dir FOLDER a fit can be continued later"
            if folder is None
            else f"continue with the same command and --resume {shlex.quote(str(folder))}",
            signal=getattr(stop, "signal", None),
        ) from None


class Lines:
    """A callback for a log: a line each minute, and the last one, instead of a bar that writes over itself."""

    def __init__(self, every: float = 60.0) -> None:
        self.every = every
        self._began: tuple[int, float] | None = None
        self._said = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        """Write the line to the standard error stream, if it is time."""
        if progress.event != "step":
            return
        now = time.monotonic()
        self._began = self._began or (progress.step, now)
        left = progress.steps - progress.step
        if left and now - self._said < self.every:
            return
        self._said = now
        done, spent = progress.step - self._began[0], now - self._began[1]
        until = f", about {max(1, round(left * spent / done / 60))} min left" if left and done else ""
        loss = progress.numbers["loss"]
        sys.stderr.write(f"fit: step {progress.step} of {progress.steps}, loss {loss:.3g}{until}\n")
        sys.stderr.flush()


def _next_steps(output: Path, options: Any, kind: str) -> str:
    words = ["attrib-zoo", "explain", "PHOTO", "--model", options.model]
    words += [] if options.weights is None else ["--weights", options.weights]
    words += ["--method", options.method] if ":" in options.method else []
    words += ["--explainer", str(output)]
    words += [] if options.score == "softmax" else ["--score", options.score]
    return "\n".join(
        [
            f"saved {output} ({output.stat().st_size / 1e6:.1f} MB); use it with",
            f"  {shlex.join(words)}",
            f"  {kind}.load({str(output)!r}, model).attribute(images)",
        ]
    )


def _usable(paths: list[Path], skip_bad: bool) -> list[Path]:
    """The files that start like images; others are an error, or skipped."""
    good = [path for path in paths if is_photo(path)]
    bad = sorted(set(paths) - set(good))
    if bad and (not skip_bad or not good):
        raise DataError(f"{len(bad)} of {len(paths)} files are no images: {listed(bad)}; remove them, or --skip-bad")
    return good


def _loader(paths: list[Path], loaded: LoadedModel, options: Any, *, shuffle: bool) -> DataLoader[Tensor]:
    return DataLoader(
        Photos(paths, loaded.transform, skip_bad=options.skip_bad),
        batch_size=min(options.batch_size, len(paths)),
        shuffle=shuffle,
        drop_last=shuffle,
        num_workers=options.workers,
    )
