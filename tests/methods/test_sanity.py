"""Is each method's map about the class that was asked for, and about the model? On scenes whose evidence is known."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass

import pytest
from known_weaknesses import BLIND, OFF_TARGET

from attrib_zoo import synthetic
from attrib_zoo.cli.shared import methods
from attrib_zoo.errors import UnsupportedModelError, aligned
from attrib_zoo.metrics.localization import class_discrimination, energy_pointing_game
from attrib_zoo.metrics.sanity import model_randomization, randomization_order
from attrib_zoo.metrics.similarity import spearman

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]  # of zero maps, unseen classes

KINDS = ("cnn", "vit")
SCENES, FIT_STEPS, ROOM = 8, 60, 0.05
MACHINES = 0.15  # of the model itself, trained on another kind of processor: SIDU had 0.56 and 0.67
SHORTER = {  # what takes minutes, and lengths that were made for 224 pixels
    "RISE": {"n_masks": 400},
    "ExtremalPerturbation": {"max_iter": 150},
}


@functools.cache
def case(kind):
    """A model and scenes in which it names both objects; each is asked for once: images, classes, own, other mask."""
    model = synthetic.trained(kind)
    data = synthetic.scenes(2 * SCENES, seed=2)
    data = data.rows(synthetic.recognised(model, data)).rows(slice(SCENES))
    images = data.inputs.repeat_interleave(2, 0)
    return model, images, data.labels.flatten(), data.masks.flatten(0, 1), data.masks.flip(1).flatten(0, 1)


@functools.cache
def explain(name, model, seed):
    """A method that is ready for a model; fitted ones are fitted afresh."""
    cls = methods()[name.lower()]
    explainer = cls(model, **SHORTER.get(name, {}))
    if cls.needs_fit:
        loader = synthetic.scenes(512, seed=1).loader(16)
        explainer.fit(loader, max_steps=FIT_STEPS, seed=seed, show_progress=False)
    return explainer.attribute


@dataclass
class Found:
    """Means over all maps."""

    energy: float
    chance: float
    discrimination: float
    randomised: float


@functools.cache
def found(kind):
    """Name -> numbers, of every method that the model allows."""
    model, images, target, own, other = case(kind)
    top = randomization_order(model, images)[:1]
    results = {}
    for cls in methods().values():
        if kind not in cls.models:
            continue
        make = functools.partial(explain, cls.__name__)
        try:
            maps = make(model, 0)(images, target)
        except UnsupportedModelError:
            continue
        alike = model_randomization(model, images, make, target, layers=top, similarities={"spearman": spearman})
        results[cls.__name__] = Found(
            energy_pointing_game(model, images, maps, masks=own).mean().item(),
            own.float().mean().item(),
            class_discrimination(model, images, maps, masks=own, other_masks=other).mean().item(),
            alike.similarity["spearman"].nanmean().item(),
        )
    return results


def report(kind):
    head = ("method", "energy on the object", "by chance", "of both objects", "Spearman, head randomised")
    cells = {
        name: [f"{value:.3f}" for value in (f.energy, f.chance, f.discrimination, f.randomised)]
        for name, f in found(kind).items()
    }
    lines = aligned([head, *((name, *values) for name, values in cells.items())])
    return "\n".join(["", "", f"{kind}, {len(case(kind)[1])} maps", "", *lines, ""])


@pytest.mark.parametrize("kind", KINDS)
def test_maps_are_about_the_class_and_about_the_model(kind, capsys):
    """Both in one test, since the maps that they share take minutes, and two workers would make them twice."""
    with capsys.disabled():
        sys.stdout.write(report(kind))
    check_maps_point_at_the_object_of_the_class(kind)
    check_maps_change_with_the_head_of_the_model(kind)


def check_maps_point_at_the_object_of_the_class(kind):
    agnostic = {cls.__name__ for cls in methods().values() if cls.class_agnostic}
    off = {n for n, f in found(kind).items() if not f.energy > f.chance}
    undecided = {n for n, f in found(kind).items() if not f.discrimination > 0.5} - agnostic
    assert off | undecided == OFF_TARGET[kind]


def check_maps_change_with_the_head_of_the_model(kind):
    """Adebayo's check: the last layer gets random weights, and fitted methods are fitted for that model.

    The limit is 0.5. Another machine may round, and so fit, a little differently.
    """
    alike = {name: f.randomised for name, f in found(kind).items()}
    assert {name for name, value in alike.items() if not value < 0.5 + ROOM} <= set(BLIND[kind])
    assert {name: alike[name] for name in BLIND[kind]} == pytest.approx(BLIND[kind], abs=MACHINES)
