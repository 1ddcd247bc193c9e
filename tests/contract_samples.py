"""Three small methods that keep the contract, written without the library, each step of them replaceable by a fault.

``SmallCAM`` is Grad-CAM, ``SmallMasks`` scores random masks in chunks, ``SmallTrained`` trains one map per class.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from captum.attr import Attribution
from torch import Tensor, nn


def transparent(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        return function(*args, **kwargs)

    return call


class SmallCAM(Attribution):
    """Grad-CAM. A fault replaces a step: ``images``, ``quiet``, ``index``, ``explain``, ``grid``, ..., ``finish``."""

    smooth = scale = None

    def __init__(self, model, layers=None, *, upsample=True, smooth=None, scale=None):
        if not (smooth is None or (isinstance(smooth, int) and smooth % 2)):
            raise ValueError(f"smooth: must be odd, got {smooth!r}")
        if scale not in (None, "min-max", "rank", "positive"):
            raise ValueError(f"scale: must be 'min-max' or 'rank', got {scale!r}")
        if not isinstance(model, nn.Module):
            raise TypeError("model: wrap the function in an nn.Module")
        if isinstance(model, torch.jit.ScriptModule):
            raise TypeError("model: scripted and traced models run no hooks; pass the eager module")
        super().__init__(model)
        self.layers = layers
        self.upsample = upsample
        self.smooth, self.scale = smooth, scale

    def __repr__(self):
        shaped = f"smooth={self.smooth!r}, scale={self.scale!r}"
        return f"{type(self).__name__}(layers={self.layers!r}, upsample={self.upsample!r}, {shaped})"

    def get_name(self):
        return type(self).__name__

    def compute_convergence_delta(self, *args, **kwargs):
        raise NotImplementedError

    def attribute_future(self):
        raise NotImplementedError

    @transparent
    def attribute(self, inputs, target=None, additional_forward_args=None, *, show_progress=False):
        images = self.images(inputs)
        extra = additional_forward_args
        args = () if extra is None else extra if isinstance(extra, tuple) else (extra,)
        with self.quiet(), torch.inference_mode(False), torch.enable_grad():
            heat = self.explain(images.detach().clone(), target, args).detach()
        out = self.finish(self.scaled(self.smoothed(heat)), images)
        return (out,) if isinstance(inputs, tuple) else out

    def attribute_many(self, inputs, targets, additional_forward_args=None):
        rows = targets if isinstance(targets[0], list) else [targets] * len(inputs)
        columns = [list(column) for column in zip(*rows, strict=True)]
        return torch.stack([self.attribute(inputs, column, additional_forward_args) for column in columns], 1)

    # ------------------------------------------------------------------ the steps

    def images(self, inputs):
        images = inputs[0] if isinstance(inputs, tuple) and len(inputs) == 1 else inputs
        good = isinstance(images, Tensor) and images.ndim == 4 and images.is_floating_point() and images.numel() > 0
        if not good or not images.isfinite().all():
            raise ValueError(f"{type(self).__name__}: inputs must be finite floating-point images (N, C, H, W)")
        return images

    @property
    def model(self):
        model = self.forward_func
        while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(model, "_orig_mod"):
            model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
        return model

    @contextlib.contextmanager
    def quiet(self):
        flags = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            yield
        finally:
            for module, flag in flags:
                module.training = flag

    def layer(self):
        names = dict(self.model.named_modules())
        if isinstance(self.layers, nn.Module):
            return self.layers
        name = self.layers or next(
            f"{k}.{m.explained}".lstrip(".") for k, m in names.items() if hasattr(m, "explained")
        )
        if name not in names:
            raise LookupError(f"layers: no layer {name!r}; closest: {difflib.get_close_matches(name, names)}")
        return names[name]

    def run(self, images, args):
        """Outputs and the layer's activation, with a graph from the one to the other."""
        kept = []

        def keep(module, inputs, output):
            kept.append(output)
            return output.clone()

        handle = self.layer().register_forward_hook(keep)
        try:
            outputs = self.model(images, *args)
        finally:
            handle.remove()
        if not kept:
            raise ValueError(f"layers: {self.layers!r} never ran")
        return outputs, kept[-1]

    def index(self, target, outputs):
        """One column for each image."""
        count, outputs = len(outputs), both(outputs)
        if target is None:
            return outputs.argmax(1)
        if isinstance(target, (Tensor, np.ndarray, np.generic)):
            if str(target.dtype).removeprefix("torch.") not in ("int64", "int32"):
                raise TypeError("target: must be integers")
            target = target.reshape(-1).tolist() if target.ndim else target.item()
            target = target[0] if isinstance(target, list) and len(target) == 1 else target
        rows = target if isinstance(target, list) else [target] * count
        if len(rows) != count:
            raise ValueError(f"target: one for each of {count} images, got {len(rows)}")
        rows = [row[0] if isinstance(row, tuple) and len(row) == 1 else row for row in rows]
        rows = [row.item() if isinstance(row, Tensor) else row for row in rows]
        if any(type(row) is not int for row in rows):
            raise TypeError(f"target: must be integers, got {target!r}")
        if not all(0 <= row < outputs.shape[1] for row in rows):
            raise IndexError(f"target: must be one of {outputs.shape[1]} classes, got {target!r}")
        return torch.tensor(rows)

    def scores(self, target, outputs):
        index = self.index(target, outputs)
        return both(outputs).gather(1, index[:, None])[:, 0]

    def explain(self, images, target, args):
        """The map (N, 1, h, w)."""
        outputs, activation = self.run(images.requires_grad_(), args)
        (gradient,) = torch.autograd.grad(self.scores(target, outputs).sum(), activation)
        return self.cam(self.grid(activation.detach(), images), self.grid(gradient, images))

    def cam(self, activation, gradient):
        return (activation * gradient.mean((2, 3), keepdim=True)).sum(1, keepdim=True).relu()

    def grid(self, activation, images):
        """(N, D, h, w), whatever the layout."""
        bench = next(module for module in self.model.modules() if hasattr(module, "explained"))
        if bench.layout == "tokens":
            h, w = images.shape[2] // 8, images.shape[3] // 8
            return activation[:, bench.prefix :].unflatten(1, (h, w)).permute(0, 3, 1, 2)
        return activation.permute(0, 3, 1, 2) if bench.layout == "nhwc" else activation

    def smoothed(self, heat):
        if self.smooth is None:
            return heat
        ones = torch.ones(1, 1, self.smooth, self.smooth, dtype=heat.dtype)
        sums, counts = (F.conv2d(part, ones, padding=self.smooth // 2) for part in (heat, torch.ones_like(heat)))
        return sums / counts

    def scaled(self, heat):
        if self.scale is None:
            return heat
        if self.scale == "min-max":
            low, high = heat.amin((2, 3), keepdim=True), heat.amax((2, 3), keepdim=True)
            return (heat - low) / (high - low).clamp(min=1e-30)
        return self.ranks(heat.flatten(1)).view_as(heat)

    def ranks(self, values):
        pairs = values[:, :, None] - values[:, None]
        return ((pairs > 0).sum(2) + ((pairs == 0).sum(2) - 1) / 2).to(values.dtype) / (values.shape[1] - 1)

    def finish(self, heat, images):
        if self.upsample:
            heat = F.interpolate(heat, images.shape[2:], mode="bilinear", align_corners=False).expand_as(images)
        return heat.to(images.dtype).contiguous()


def both(outputs):
    """One logit z for each image as the two that say the same."""
    return outputs if outputs[0].numel() > 1 else torch.stack([-outputs.flatten(), outputs.flatten()], 1)


class SmallMasks(SmallCAM):
    """Softmax of the scores under random masks, as weights of the masks; pairs (image, mask) go in chunks."""

    def __init__(self, model, *, chunk_size=None, seed=0, upsample=True):
        for name, value in (("chunk_size", chunk_size or 1), ("seed", seed)):
            if not isinstance(value, int):
                raise TypeError(f"{name}: must be an integer, got {value!r}")
        super().__init__(model, upsample=upsample)
        self.chunk_size = chunk_size
        self.seed = seed

    def __repr__(self):
        shown = f"chunk_size={self.chunk_size!r}, seed={self.seed!r}, upsample={self.upsample!r}"
        return f"{type(self).__name__}({shown})"

    def masks(self, images):
        generator = torch.Generator().manual_seed(self.seed)
        grid = (images.shape[2] // 8, images.shape[3] // 8)
        return torch.rand(10, 1, *grid, generator=generator, dtype=torch.float64).to(images)

    def explain(self, images, target, args):
        with torch.no_grad():
            index = self.index(target, self.model(images, *args))
            masks = self.masks(images)
            scores = self.all_scores(images, masks, index, args)
            return self.combine(scores.to(torch.promote_types(scores.dtype, torch.float32)), masks)

    def all_scores(self, images, masks, index, args):
        """(N, M)."""
        shown = F.interpolate(masks, images.shape[2:], mode="bilinear")
        pairs = [(n, m) for n in range(len(images)) for m in range(len(masks))]
        size, found = self.chunk_size or len(pairs), []
        while pairs:
            rows, cols = map(list, zip(*pairs[:size], strict=True))
            try:
                found.append(self.one_chunk(images, shown, rows, cols, index, args))
            except torch.cuda.OutOfMemoryError:
                size = max(1, size // 2)
                continue
            pairs = pairs[size:]
        return torch.cat(found).view(len(images), len(masks))

    def one_chunk(self, images, shown, rows, cols, index, args):
        outputs = self.model(images[rows] * shown[cols], *self.expand(args, rows))
        return both(outputs).gather(1, index[rows][:, None])[:, 0]

    def expand(self, args, rows):
        return [a[rows] if isinstance(a, Tensor) and a.ndim else a for a in args]

    def combine(self, scores, masks):
        return torch.einsum("nm,mchw->nchw", scores.softmax(1).to(masks), masks)


class Head(nn.Module):
    """One row of weights for each class."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)


class SmallTrained(SmallCAM):
    """A 1x1 convolution on the layer's maps, one row for each class, trained so that its mask keeps the decision."""

    network_ = None

    def explain(self, images, target, args):
        self.ready()
        with torch.no_grad():
            outputs, activation = self.run(images, args)
            index = self.index(target, outputs)
            rows = self.network_.weight.to(images)[self.row(index)]
            return torch.einsum("nd,ndhw->nhw", rows, self.features(activation, images))[:, None].sigmoid()

    def row(self, index):
        return index

    @staticmethod
    def logits(outputs):
        """(N, K), also for one value for each image."""
        column = outputs.view(len(outputs), -1)
        return column if column.shape[1] > 1 else torch.cat([torch.zeros_like(column), column], 1)

    def features(self, activation, images):
        return F.normalize(self.grid(activation, images), dim=1)

    def ready(self):
        if self.network_ is None:
            name = type(self).__name__
            raise RuntimeError(f"{name} is not trained: call fit(loader) or {name}.load(path, model)")

    # ------------------------------------------------------------------ fit

    def fit(
        self, loader, *, epochs=1, seed=0, resume_from=None, checkpoint_dir=None, checkpoint_every=1, show_progress=True
    ):
        twin = type(self)(self.forward_func, self.layers, upsample=self.upsample)
        with self.quiet(), torch.random.fork_rng(devices=[]), torch.enable_grad():
            twin.train_all(loader, epochs, seed, resume_from, checkpoint_dir)
        self.network_ = twin.network_
        return self

    def train_all(self, loader, epochs, seed, resume_from, checkpoint_dir):
        step = self.start(loader, seed, resume_from)
        number = 0
        for epoch in range(epochs):
            torch.default_generator.manual_seed(seed * 1000 + epoch)
            for batch in loader:
                if number >= step:
                    self.step(self.batch(batch))
                    if checkpoint_dir is not None:
                        self.write(Path(checkpoint_dir) / "checkpoint.safetensors", step=number + 1)
                number += 1
        if number == 0:
            raise ValueError("loader: must yield at least one batch")

    def start(self, loader, seed, resume_from):
        """The network and its optimiser, new or as they were; the number of steps that were taken."""
        probe = self.batch(next(iter(loader), None))
        with torch.no_grad():
            outputs, activation = self.run(probe, ())
        width, count = self.features(activation, probe).shape[1], self.logits(outputs).shape[1]
        draw = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
        self.network_ = Head(0.1 * draw.to(probe))
        self.momentum = torch.zeros_like(self.network_.weight)
        self.size = probe.shape[1:]
        if resume_from is None:
            return 0
        facts, tensors = self.read(Path(resume_from) / "checkpoint.safetensors")
        self.network_.weight.data = tensors["weight"]
        self.momentum = tensors["momentum"]
        return facts["step"]

    def batch(self, batch):
        if batch is None:
            raise ValueError("loader: must yield at least one batch")
        images = batch["image"] if isinstance(batch, dict) else batch[0] if isinstance(batch, (tuple, list)) else batch
        if not isinstance(images, Tensor):
            raise TypeError("loader: must yield images")
        if images.ndim != 4 or not images.is_floating_point() or not images.isfinite().all():
            raise ValueError("loader: must yield finite float images (N, C, H, W)")
        if images.shape[1:] != getattr(self, "size", images.shape[1:]):
            raise ValueError("loader: all images must have one size")
        return images

    def step(self, images):
        with torch.no_grad():
            outputs, activation = self.run(images, ())
            decided, features = self.logits(outputs).argmax(1), self.features(activation, images)
        weight = self.network_.weight
        mask = torch.einsum("nd,ndhw->nhw", weight[decided], features)[:, None].sigmoid()
        masked = images * F.interpolate(mask, images.shape[2:], mode="bilinear")
        loss = F.cross_entropy(self.logits(self.model(masked)), decided) + mask.mean()
        (gradient,) = torch.autograd.grad(loss, weight)
        self.momentum = 0.9 * self.momentum + gradient
        with torch.no_grad():
            weight -= 0.5 * self.momentum

    # ------------------------------------------------------------------ save and load

    def save(self, path):
        self.ready()
        self.write(Path(path))

    def write(self, path, step=0):
        from safetensors.torch import save

        tensors = {"weight": self.network_.weight.detach()}
        if step:
            tensors["momentum"] = self.momentum
        facts = {"backbone": self.fingerprint(), "step": step, "upsample": self.upsample}
        try:
            path.write_bytes(save(tensors, {"facts": json.dumps(facts)}))
        except OSError as error:
            raise ValueError(f"path: cannot write {path}") from error

    @staticmethod
    def read(path):
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                return json.loads(file.metadata()["facts"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"path: cannot read {path}") from error

    def fingerprint(self):
        digest = hashlib.sha256()
        for tensor in self.model.state_dict().values():
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    @classmethod
    def load(cls, path, model, *, strict_backbone=True):
        facts, tensors = cls.read(path)
        found = cls(model, upsample=facts["upsample"])
        if found.fingerprint() != facts["backbone"]:
            if strict_backbone:
                raise ValueError("path: fitted for other weights")
            warnings.warn("path: fitted for other weights", stacklevel=2)
        found.network_ = Head(tensors["weight"])
        return found
