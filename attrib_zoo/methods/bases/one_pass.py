"""Methods whose map comes out of the forward pass itself: they can leave Python as one program."""

from __future__ import annotations

import copy
import os
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo.attribution import Attribution, check_images
from attrib_zoo.backbone.capture import frozen, run
from attrib_zoo.backbone.grid import Tap
from attrib_zoo.errors import UnsupportedModelError, check_choice, reason
from attrib_zoo.masking import at_least_float32, channel_stats
from attrib_zoo.sharing.files import check_path, write_program
from attrib_zoo.sharing.program import (
    PREPROCESSING,
    Enlargement,
    ExplainingModel,
    Reading,
    Standardise,
    own_modules,
)
from attrib_zoo.training.checkpoint import fingerprint

_USUAL_SIZE = 224


class OnePass(Attribution):
    """Base of the methods that need one forward pass and no gradient: :meth:`as_module` and :meth:`export`."""

    @abstractmethod
    def program_head(
        self, images: Tensor, taps: Sequence[Tap], outputs: Tensor, features: Sequence[Tensor]
    ) -> nn.Module:
        """A module ``(outputs, classes (N,), features) -> (N, 1, h, w)``: the map before smoothing and scaling.

        It must not contain Python code that depends on the value or size of a tensor, and shares no module with the
        explainer.

        Args:
            images: two example images.
            taps: the layers that are read.
            outputs: the model's outputs for the images.
            features: the layers' maps for the images, ``(2, C_i, h_i, w_i)``, in float32 or better.
        """
        raise NotImplementedError

    def as_module(self, images: Tensor | None = None, *, preprocess: str | None = None) -> ExplainingModel:
        """The model and this explainer as one ordinary module, for ``torch.compile`` and the tools that follow it.

        ``module(images)`` returns the model's outputs, the map of its decision and the predicted class;
        ``module(images, target)`` explains the classes ``(N,)`` given. The maps are those of :meth:`attribute`, with
        all options of the explainer, in one channel: ``(N, 1, H, W)``, or ``(N, 1, h, w)`` with ``upsample=False``. The
        module checks neither images nor classes, and does not notice if the model is trained further.

        Args:
            images: an example, standardised ``(N, C, H, W)``, of the size that will be explained; ``None`` for the size
                last explained, or the model's own. Convolutional networks then take other sizes as before.
            preprocess: the module's input: ``None``: standardised images; ``"float"``: images in [0, 1];
                ``"uint8"``: bytes; both of the model's size, and standardised inside.

        Raises:
            NotFittedError: the explainer was neither fitted nor loaded.
            UnsupportedModelError: the model's pass does not run as a plain module.
        """
        check_choice("preprocess", preprocess, PREPROCESSING)
        self.check_ready()
        example = self._example(images)
        with frozen(self.model), torch.inference_mode(False), torch.no_grad():
            try:
                taps = self.taps(example)
            except TypeError as error:
                raise UnsupportedModelError(
                    f"model: must take images and nothing else to become a program, but {type(self.model).__name__} "
                    f"does not ({reason(error)}); wrap it in a module that supplies the rest"
                ) from error
            outputs, features = run(self.model, example, (), taps)
            features = [at_least_float32(f) for f in features]
            head = self.program_head(example, taps, outputs, features)
            cells = [max(feature.shape[axis] for feature in features) for axis in (-2, -1)]
            enlarge = Enlargement(cells, example.shape[-2:], self.extents(example).of) if self.upsample else None
        scale = self.scale or self.own_scale
        readings = [Reading(tap, example.shape[-2:]) for tap in taps]
        module = ExplainingModel(
            own_modules(self.model), readings, head, smooth=self.smooth or 1, scale=scale, enlarge=enlarge
        ).to(example.device)
        self._check_program(module, example)
        if preprocess is not None:
            mean, std = self._statistics(example.shape[1])
            module.prepare = Standardise(mean, std, example, 255 if preprocess == "uint8" else 1)
        return module

    def export(
        self,
        path: str | os.PathLike[str],
        images: Tensor | None = None,
        *,
        with_target: bool = False,
        preprocess: str | None = None,
        any_batch: bool = True,
        any_size: bool | None = None,
        opset: int | None = None,
    ) -> Path:
        """Write :meth:`as_module` to one file: images in, ``(logits, map, class)`` out.

        The file is compared with the module before it takes its place: run with ``torch.export``'s interpreter, or in
        onnxruntime, where that is installed.

        Args:
            path: ends in ``.onnx`` or in ``.pt2`` (for ``torch.export.load`` and AOTInductor); an existing file is
                replaced only on success.
            images: see :meth:`as_module`.
            with_target: the class ``(N,)`` is a second input, ``target``.
            preprocess: see :meth:`as_module`.
            any_batch: ``False`` fixes the batch size to that of the example, or to 1 without one.
            any_size: ``True``: images of any height and width; ``False``: of the example's only; ``None``: any, where
                the model allows it and does not pad inside. The file says which axes are free.
            opset: of ONNX, at least 18; ``None`` for the exporter's own.

        Returns:
            The path.

        Raises:
            OptionError: the ending is another one, the opset is too old, or a package is missing.
            NotFittedError: the explainer was neither fitted nor loaded.
            UnsupportedModelError: the model cannot become a program; the message says why.
            DataError: the file cannot be written.
        """
        target = check_path(path, opset)
        program = self.as_module(images, preprocess=preprocess)
        example = self._example(images)
        if any_size is None and self.extents(example).pads:
            any_size = False  # sizes depend on paddings that depend on sizes: torch.export would trace for minutes
        if not any_batch:
            example = example[:1] if images is None else images.detach().clone()
        if preprocess is not None:
            example = torch.rand(example.shape, generator=torch.Generator().manual_seed(0)).to(example)
            example = (255 * example).to(torch.uint8) if preprocess == "uint8" else example
        write_program(
            program,
            example,
            target,
            with_target=with_target,
            any_batch=any_batch,
            any_size=any_size,
            opset=opset,
            facts=self._program_facts(program, example, preprocess),
        )
        return target

    def _program_facts(self, program: ExplainingModel, example: Tensor, preprocess: str | None) -> dict[str, Any]:
        from attrib_zoo import __version__

        mean, std = self._statistics(example.shape[1])
        return {
            "library": __version__,
            "method": type(self).__name__,
            "model": type(self.model).__name__,
            "weights": fingerprint(self.model),
            "layers": [reading.name for reading in program.readings],
            "image": list(example.shape[1:]),
            "preprocess": preprocess,
            "mean": list(mean),
            "std": list(std),
        }

    def _statistics(self, channels: int) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and standard deviation of the images' standardisation: the given ones, else the model's own."""
        mean, std = getattr(self, "mean", None), getattr(self, "std", None)
        return channel_stats(self.model, channels) if mean is None or std is None else (mean, std)

    def _example(self, images: Tensor | None) -> Tensor:
        """Two images of the wanted size, on the model's device; noise where none are given."""
        if images is not None:
            given = check_images(images, type(self).__name__).detach().clone()
            return given[:2] if len(given) > 1 else torch.cat([given, given.flip(3)])
        like = next((p for p in self.model.parameters() if p.is_floating_point()), torch.zeros(0))
        drawn = torch.randn(2, *self._image_shape(), generator=torch.Generator().manual_seed(0))
        return drawn.to(device=like.device, dtype=like.dtype)

    def _image_shape(self) -> tuple[int, int, int]:
        """(C, H, W): of the images last explained; else as the model's configuration says; else 224 x 224."""
        seen = [key[1][0] for key in self._resolved if isinstance(key, tuple) and key[0] == "layers"]
        if seen:
            return tuple(seen[-1])
        first = next((m for m in self.model.modules() if isinstance(m, nn.Conv2d)), None)
        channels = 3 if first is None else first.in_channels
        side: Any = getattr(getattr(self.model, "patch_embed", None), "img_size", None)
        side = side or getattr(self.model, "image_size", None)
        side = side or getattr(getattr(self.model, "config", None), "image_size", None)  # Hugging Face's
        if side is None:
            for name in ("pretrained_cfg", "default_cfg"):
                config = getattr(self.model, name, None)
                found = config.get("input_size") if isinstance(config, dict) else getattr(config, "input_size", None)
                side = side or (found and found[1:])
        height, width = side if isinstance(side, (tuple, list)) else (side or _USUAL_SIZE,) * 2
        return channels, int(height), int(width)

    def _check_program(self, module: ExplainingModel, example: Tensor) -> None:
        """Check that the module gives the maps of ``attribute``."""
        twin = copy.copy(self)
        twin._warned = True  # type: ignore[attr-defined]  # no warning about unseen classes here
        wanted = twin.attribute(example)[:, :1]
        with torch.no_grad():
            found = module(example)[1]
        off = (found - wanted).abs().double()
        # a rounding error may swap two neighbouring ranks
        worst = float(off.mean() if module.scale == "rank" else off.max()) / max(1.0, float(wanted.abs().max()))
        if not worst <= max(1e-4, 64 * torch.finfo(wanted.dtype).eps):
            raise UnsupportedModelError(
                f"model: must explain as a plain module what it explains in attribute, but the maps of "
                f"{type(self.model).__name__} differ by {worst:.2g}; a pass of it leaves something behind that changes "
                "the next, or draws random numbers: take that out"
            )
