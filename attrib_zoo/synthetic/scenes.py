"""Scenes with planted evidence, and classifiers trained on them."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from attrib_zoo.errors import OptionError
from attrib_zoo.synthetic.networks import MEAN, STD, one_thread, seeded, tiny_cnn, tiny_vit
from attrib_zoo.synthetic.paint import (
    COLOURS,
    MARK,
    MAX_DISTRACTORS,
    MAX_OBJECTS,
    Uniform,
    enlarge,
    lay_out,
    place_marks,
    render,
)
from attrib_zoo.synthetic.shapes import SHAPES

CUES = {"colour": tuple(COLOURS), "shape": tuple(SHAPES)}
"""What the class of an object may be, and the class names."""


@dataclass(frozen=True, eq=False)
class Scenes:
    """N images of S×S px with up to M objects each.

    Attributes:
        images: ``(N, 3, S, S)``, in [0, 1].
        labels: ``(N, M)`` int64, the class of each object; -1 where there is none.
        masks: ``(N, M, S, S)`` bool, the visible pixels of each object; disjoint.
        distractors: ``(N, S, S)`` bool, the visible pixels of all distractors together.
        marks: ``(N, S, S)`` bool, the pixels of the spurious cue; none unless requested from :func:`scenes`.
        class_names: The K names.
    """

    images: Tensor
    labels: Tensor
    masks: Tensor
    distractors: Tensor
    marks: Tensor
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def inputs(self) -> Tensor:
        """The images as the tiny models expect them, ``(images - 0.5) / 0.25``: ``(N, 3, S, S)``."""
        return (self.images - MEAN) / STD

    @property
    def soft_targets(self) -> Tensor:
        """``(N, K)``: 1 over the number of objects for each class present, else 0."""
        there = torch.zeros(len(self), len(self.class_names) + 1, device=self.labels.device)
        there = there.scatter(1, self.labels + 1, 1.0)[:, 1:]  # column 0 takes the -1s
        return there / there.sum(1, keepdim=True).clamp(min=1)

    def rows(self, index: Tensor | slice) -> Scenes:
        """Some of the images, selected by a slice, a boolean or an index tensor."""
        images, labels, masks = self.images[index], self.labels[index], self.masks[index]
        return Scenes(images, labels, masks, self.distractors[index], self.marks[index], self.class_names)

    def loader(self, batch_size: int = 32, *, seed: int = 0) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled batches of ``(inputs, labels)``; the order depends on ``seed`` alone."""
        order = torch.Generator().manual_seed(seed)
        return DataLoader(TensorDataset(self.inputs, self.labels), batch_size, shuffle=True, generator=order)


def scenes(
    n: int,
    *,
    size: int = 32,
    cue: str = "colour",
    num_classes: int | None = None,
    objects: int | tuple[int, int] = 2,
    seed: int = 0,
    mark: int | str | None = None,
    drop: int | None = None,
    drop_distractors: bool = False,
    device: torch.device | str | None = None,
) -> Scenes:
    """Make n scenes.

    An image depends only on ``seed`` and its index: ``scenes(8)`` begins with ``scenes(4)``, and the same scene can be
    rendered at any ``size``. With ``cue="colour"`` three quarters of an object's colour are its class and one quarter
    is a random texture, while background and distractors are almost grey; with ``cue="shape"`` colours and textures of
    objects, distractors and background come from the same distribution.

    Args:
        n: Number of images N.
        size: Side S in pixels.
        cue: ``"colour"`` or ``"shape"``: what defines the class.
        num_classes: K, the first K classes of the cue; all of them (6 colours, 10 shapes) when ``None``.
        objects: Objects per image, 1 to 3, or a range such as ``(1, 2)``. Classes in one image differ.
        seed: Same seed, same bits (on one kind of device).
        mark: Plant a spurious cue, a small black-and-white board that no object or distractor has, at a random position
            clear of the objects: in every image with an object of this class, and only there, or in ``"all"`` images,
            or in none. All other pixels stay as they are without it. A model that is trained on ``mark=c`` learns the
            mark as evidence for class c (see ``trained(mark=c)``), and a faithful map of class c must then point at it.
        drop: Render the same images without object number ``drop``: the counterfactual. All other pixels, the
            noise included, stay as they were. Its label becomes -1.
        drop_distractors: Render without distractors.
        device: Where to render and keep the result.

    Returns:
        The images, labels and masks.

    Raises:
        OptionError: An option is outside its range.
    """
    names = CUES.get(cue)
    if names is None:
        raise OptionError(f"cue: must be 'colour' or 'shape', got {cue!r}")
    fewest, most = (objects, objects) if isinstance(objects, int) else objects
    if not 1 <= fewest <= most <= MAX_OBJECTS:
        raise OptionError(f"objects: must be 1 to {MAX_OBJECTS}, or a range of these, got {objects!r}")
    count = len(names) if num_classes is None else num_classes
    if not max(2, most) <= count <= len(names):
        raise OptionError(
            f"num_classes: must be {max(2, most)} to {len(names)} for cue={cue!r} and {most} objects, got {count}"
        )
    if n < 1 or size < 8:
        raise OptionError(f"n, size: must be at least 1 image of 8 px, got n={n}, size={size}")
    if drop is not None and not 0 <= drop < most:
        raise OptionError(f"drop: must be None or the number of an object, 0 to {most - 1}, got {drop!r}")

    uniform = Uniform(n, seed)
    things = lay_out(uniform, cue, count, fewest, most)
    corners = place_marks(uniform, things)
    marked = _marked(things.label.masked_fill(~things.there, -1), mark, count)
    there = things.there.clone()
    if drop is not None:
        there[:, MAX_DISTRACTORS + drop] = False
    if drop_distractors:
        there[:, :MAX_DISTRACTORS] = False
    things = things._replace(there=there)

    noise = _noise(n, size, seed)
    step = max(1, 2**20 // size**2)
    rows = [slice(i, i + step) for i in range(0, n, step)]
    parts = [
        render(things.part(part, device), *(column[part].to(device) for column in (noise, corners, marked)))
        for part in rows
    ]
    images, owner = (torch.cat(column) for column in zip(*parts, strict=True))
    labels = things.label.masked_fill(~there, -1)[:, MAX_DISTRACTORS : MAX_DISTRACTORS + most].to(images.device)
    slots = torch.arange(MAX_DISTRACTORS, MAX_DISTRACTORS + most, device=images.device)
    return Scenes(
        images=images,
        labels=labels,
        masks=owner[:, None] == slots[:, None, None],
        distractors=(owner >= 0) & (owner < MAX_DISTRACTORS),
        marks=owner == MARK,
        class_names=names[:count],
    )


def _marked(labels: Tensor, mark: int | str | None, classes: int) -> Tensor:
    """Which images get the mark, ``(N,)`` bool; ``labels`` ``(N, M)``."""
    if mark not in (None, "all") and not (type(mark) is int and 0 <= mark < classes):
        raise OptionError(f"mark: must be None, 'all' or a class, 0 to {classes - 1}, got {mark!r}")
    if isinstance(mark, int):
        return (labels == mark).any(1)
    return torch.full((len(labels),), mark == "all")


def _noise(n: int, size: int, seed: int) -> Tensor:
    """Pixel noise ``(n, 3, size, size)``; whole blocks of 16, so that a row does not depend on those after it."""
    values = 3 * size * size
    generator = torch.Generator().manual_seed(seed + 2**32)
    return torch.randn(n, -(-values // 16) * 16, generator=generator)[:, :values].reshape(n, 3, size, size)


def darken(data: Scenes, *, probability: float = 0.35, seed: int = 0) -> Scenes:
    """Turn parts of the background black, never the objects, so that a model is used to black.

    Measures and methods that hide pixels show black to the model. A model that never saw any reacts to the black as
    such, and its outputs mean little.

    Args:
        data: The scenes.
        probability: Share of the images that are changed.
        seed: For the choice and the dark regions.

    Returns:
        The same scenes with other images: multiplied by a smooth random field, except within one pixel of an object
        or a mark.
    """
    n, size = len(data), data.images.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(n, generator=generator) < probability
    field = torch.randn(n, 5, 5, generator=generator)
    device = data.images.device
    evidence = data.masks.any(1, keepdim=True) | data.marks[:, None]
    evidence = F.max_pool2d(evidence.to(data.images), 3, 1, 1) > 0
    light = (4 * enlarge(field.to(device), size) + 1).sigmoid()[:, None]
    keep = evidence | ~chosen.to(device)[:, None, None, None]
    return replace(data, images=torch.where(keep, data.images, data.images * light))


def train_classifier(
    model: nn.Module,
    data: Scenes,
    *,
    epochs: int = 3,
    lr: float = 5e-3,
    batch_size: int = 32,
    darkening: float = 0.35,
    seed: int = 0,
) -> nn.Module:
    """Train a model to classify the objects of scenes; with the defaults a tiny model learns the colours in seconds.

    AdamW with weight decay 0.05 and a one-cycle rate; each batch is darkened (see :func:`darken`), randomly mirrored,
    and shifted by up to a tenth of its side; the target is uniform over the classes in the image.

    Args:
        model: Any classifier of ``(N, 3, S, S)`` with K outputs. It is changed in place.
        data: The training scenes, on any device.
        epochs: Passes over the scenes.
        lr: Maximal learning rate.
        batch_size: Scenes per step.
        darkening: Share of the scenes that get black background regions.
        seed: For order and augmentation; the global generator is not used.

    Returns:
        The model, in eval mode.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(data), generator=generator) for _ in range(epochs)]
    batches = [rows for order in orders for rows in order.split(batch_size)]
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    model.train()
    with seeded(seed), torch.enable_grad():
        for step, rows in enumerate(batches):
            pace = _one_cycle((step + 0.5) / len(batches))
            optimizer.param_groups[0].update(lr=lr * pace, betas=(0.95 - 0.1 * pace, 0.999))
            batch = darken(data.rows(rows), probability=darkening, seed=seed + step)
            inputs = _jitter(batch.inputs, generator).to(device)
            loss = F.cross_entropy(model(inputs), batch.soft_targets.to(inputs))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def _one_cycle(progress: float) -> float:
    """Share of the maximal rate: up along a cosine in the first quarter, then down to zero."""
    phase = 1 - progress / 0.25 if progress < 0.25 else (progress - 0.25) / 0.75
    return 0.5 * (1 + math.cos(math.pi * phase))


def _jitter(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Randomly mirror the batch, and shift it by up to a tenth of its side."""
    size = inputs.shape[-1]
    reach = size // 10
    mirror, dx, dy = torch.rand(3, generator=generator).tolist()
    left, top = int(dx * (2 * reach + 1)), int(dy * (2 * reach + 1))
    padded = F.pad(inputs, (reach,) * 4, mode="reflect")[..., top : top + size, left : left + size]
    return padded.flip(-1) if mirror < 0.5 else padded


@torch.no_grad()
def recognised(model: nn.Module, data: Scenes) -> Tensor:
    """Which images the model classifies correctly: the classes of the m objects are its top m, ``(N,)`` bool."""
    device = next(model.parameters()).device
    outputs = torch.cat([model(part.to(device)) for part in data.inputs.split(256)]).to(data.labels.device)
    there = data.soft_targets > 0
    worst_there = outputs.masked_fill(~there, math.inf).amin(1)
    best_other = outputs.masked_fill(there, -math.inf).amax(1)
    return worst_there > best_other


def trained(kind: str = "cnn", *, size: int = 32, seed: int = 0, mark: int | None = None) -> nn.Module:
    """A tiny model that has learned the six colours: about 6 s on one CPU core, then cached.

    Args:
        kind: ``"cnn"`` (:func:`tiny_cnn`) or ``"vit"`` (:func:`tiny_vit`).
        size: Side of the images in pixels.
        seed: For the initial weights, the training scenes and the training.
        mark: A class that the spurious cue accompanies in the training scenes, see :func:`scenes`. In every second
            image of the class its object is missing, so that only the mark identifies it: the model learns both (a ViT
            needs three times as long).

    Returns:
        A fresh copy in eval mode, which the caller may change. It classifies both objects correctly in about 99 % of
        new scenes.

    Raises:
        OptionError: No such kind.
    """
    if kind not in ("cnn", "vit"):
        raise OptionError(f"kind: must be 'cnn' or 'vit', got {kind!r}")
    return copy.deepcopy(_trained(kind, size, seed, mark))


@functools.cache
def _trained(kind: str, size: int, seed: int, mark: int | None) -> nn.Module:
    model = tiny_cnn(size=size, seed=seed) if kind == "cnn" else tiny_vit(size=size, seed=seed)
    data = _lessons(mark, n=1024, size=size, objects=(1, 2), seed=seed + 10_000)
    with one_thread():
        return train_classifier(model, data, epochs=4 if mark is None or kind == "cnn" else 14, seed=seed)


def _lessons(mark: int | None, **options: Any) -> Scenes:
    """Training scenes; with a mark, the object of its class is missing in every second image."""
    data = scenes(**options, mark=mark)
    if mark is None:
        return data
    images, masks = data.images, data.masks
    for slot in range(data.labels.shape[1]):
        missing = (data.labels[:, slot] == mark) & (torch.arange(len(data)) % 2 == 0)
        without, missing = scenes(**options, mark=mark, drop=slot), missing[:, None, None, None]
        images = torch.where(missing, without.images, images)
        masks = torch.where(missing, without.masks, masks)
    return replace(data, images=images, masks=masks)
