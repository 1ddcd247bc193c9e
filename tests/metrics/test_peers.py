"""Our measures beside those of other libraries, where both mean the same: seen with Quantus 0.6.0, torchcam 0.5.0 and
grad-cam 1.5.7.

Quantus is in no extra of ours (it needs pandas, scikit-learn and scikit-image): its tests are skipped without it; make
a folder with ``pip install --target FOLDER quantus`` and put that on ``PYTHONPATH``. Left out is what means another
thing, or goes wrong: Quantus' ROAD (an error on RGB), its pointing game on empty masks (a hit) and the mean of its
MPRT (which counts the model as it was); grad-cam's ROAD on ties (all of them fall at once); grad-cam's confidence
drop is not divided by the confidence.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attrib_zoo import metrics
from attrib_zoo.metrics import sanity

pytestmark = [pytest.mark.filterwarnings("ignore")]  # theirs
SIDE, IMAGES = 20, 5


class Net(nn.Module):
    """A model whose layers have ``reset_parameters``, in the order in which they run; for one channel or three."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.first = nn.Conv2d(channels, 6, 3, padding=1)
            self.second = nn.Conv2d(6, 8, 3, padding=1)
            self.head = nn.Linear(8 * 16, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        maps = self.second(self.first(inputs).relu()).relu()
        pooled = nn.functional.adaptive_avg_pool2d(maps, 4).flatten(1)
        return 9 * self.head(pooled)


def case(channels: int = 3) -> tuple[Net, Tensor, Tensor, Tensor]:
    """A model, images, maps in [0, 1] without ties, and targets."""
    generator = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(SIDE**2, generator=generator) for _ in range(IMAGES)])
    inputs = 3 * torch.randn(IMAGES, channels, SIDE, SIDE, generator=generator)
    maps = (order.float() / (SIDE**2 - 1)).square().view(IMAGES, SIDE, SIDE)
    return Net(channels).eval(), inputs, maps, torch.tensor([0, 1, 2, 3, 1])


def regions() -> Tensor:
    """One rectangle per image, and none in the last."""
    masks = torch.zeros(IMAGES, SIDE, SIDE, dtype=torch.bool)
    for i, mask in enumerate(masks[:-1]):
        mask[i : i + 9, 2 * i : 2 * i + 5 + i] = True
    return masks


# ---------------------------------------------------------------------- Quantus


@pytest.fixture
def quantus() -> Any:
    return pytest.importorskip("quantus", reason="Quantus is not installed")


def ask(metric: Any, channels: int = 1, **data: Any) -> np.ndarray:
    model, inputs, maps, target = case(channels)
    found = metric(
        model=model,
        x_batch=inputs.numpy(),
        y_batch=target.numpy(),
        a_batch=data.pop("a_batch", maps[:, None].numpy()),
        softmax=True,
        **data,
    )
    return np.asarray(found, dtype=float)


PLAIN: dict[str, Any] = {"abs": False, "normalise": False, "disable_warnings": True}


def test_energy_rank_and_overlap_agree_with_quantus(quantus: Any) -> None:
    _, _, maps, _ = case()
    masks, there = regions(), slice(0, IMAGES - 1)
    theirs = {"s_batch": masks[:, None].numpy()}
    mass = ask(quantus.RelevanceMassAccuracy(**PLAIN), **theirs)
    ours = metrics.energy_pointing_game(None, None, maps, masks=masks)
    np.testing.assert_allclose(ours, mass, rtol=1e-5)
    rank = ask(quantus.RelevanceRankAccuracy(**PLAIN), **theirs)
    np.testing.assert_allclose(metrics.bbox_score(None, None, maps, masks=masks), rank, rtol=1e-6)
    taken = SIDE**2 // 5
    inside = taken * ask(quantus.TopKIntersection(k=taken, **PLAIN), **theirs)
    overlap = inside / (taken + masks.sum((1, 2)).numpy() - inside)
    np.testing.assert_allclose(metrics.miou(None, None, maps, masks=masks), overlap, rtol=1e-6)
    assert np.isnan(mass[-1])
    assert len(np.unique(rank[there])) == IMAGES - 1


def test_pointing_agrees_with_quantus(quantus: Any) -> None:
    _, _, maps, _ = case()
    masks = maps > 0.9
    masks[1] = maps[1] < 0.9
    masks[3] = maps[3] < 0.5
    hits = ask(quantus.PointingGame(**PLAIN), s_batch=masks[:, None].numpy())
    ours = metrics.pointing_game(None, None, maps, masks=masks, tolerance=0)
    assert ours.tolist() == hits.tolist() == [1, 0, 1, 0, 1]


def test_sparseness_agrees_with_quantus(quantus: Any) -> None:
    _, _, maps, _ = case()
    maps = maps - 0.4
    found = ask(quantus.Sparseness(abs=True, normalise=False, disable_warnings=True), a_batch=maps[:, None].numpy())
    np.testing.assert_allclose(metrics.sparseness(None, None, maps), found, atol=1e-5)  # it adds 1e-7 to each value


@pytest.mark.parametrize("step", [1, 16])
def test_deletion_agrees_with_quantus_pixel_flipping(quantus: Any, step: int) -> None:
    model, inputs, maps, target = case(1)
    metric = quantus.PixelFlipping(features_in_step=step, perturb_baseline=0.0, **PLAIN)
    ours = metrics.deletion_curve(model, inputs, maps, target, steps=SIDE**2 // step)
    np.testing.assert_allclose(ours[:, 1:], ask(metric), atol=1e-5)  # theirs begins after the first step


def test_randomisation_agrees_with_quantus_layer_by_layer(quantus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, _, target = case()
    kept = sanity._randomize
    monkeypatch.setattr(sanity, "_randomize", lambda layers, seed: kept(layers, 43))  # theirs has one seed for all

    def saliency(found: nn.Module, images: Tensor, asked: Tensor) -> Tensor:
        leaf = images.detach().requires_grad_()
        scores = found(leaf).gather(1, asked[:, None]).sum()
        return torch.autograd.grad(scores, leaf)[0].sum(1)

    def explain(model: nn.Module, inputs: np.ndarray, targets: np.ndarray, **_: Any) -> np.ndarray:
        return saliency(model, torch.as_tensor(inputs), torch.as_tensor(targets))[:, None].numpy()

    metric = quantus.MPRT(layer_order="top_down", seed=42, disable_warnings=True)  # Spearman, of magnitudes
    first = saliency(model, inputs, target)[:, None].numpy()
    theirs = metric(
        model=model, x_batch=inputs.numpy(), y_batch=target.numpy(), a_batch=first, explain_func=explain, batch_size=9
    )
    ours = metrics.model_randomization(model, inputs, lambda m, seed: lambda x, t: saliency(m, x, t), target)
    assert list(ours.layers) == ["head", "second", "first"]
    for layer, found in zip(ours.layers, ours.similarity["spearman_absolute"], strict=True):
        np.testing.assert_allclose(found, theirs[layer], atol=1e-5)


# ---------------------------------------------------------------------- torchcam


class Given:
    """What torchcam takes for an extractor: it gives our maps."""

    def __init__(self, model: nn.Module, maps: Tensor) -> None:
        self.model, self.maps = model, maps

    def __call__(self, class_idx: Any = None, scores: Any = None, normalized: bool = True) -> list[Tensor]:
        return [self.maps]

    def fuse_cams(self, cams: list[Tensor]) -> Tensor:
        return cams[0]

    def _hooks_off(self) -> Any:
        return contextlib.nullcontext()


def newer_torchcam() -> Any:
    """Its measures, for which it needs 0.5 and thereby Python 3.11."""
    theirs = pytest.importorskip("torchcam.metrics")
    if not hasattr(theirs, "DeletionInsertionMetric"):
        pytest.skip("torchcam before 0.5 has no deletion and insertion, and no class for each image")
    return theirs


def softmax(outputs: Tensor) -> Tensor:
    return outputs.softmax(1)


def test_drop_and_increase_agree_with_torchcam() -> None:
    theirs = newer_torchcam()
    model, inputs, maps, target = case()
    coarse = nn.functional.adaptive_avg_pool2d(maps, 5)
    coarse = (coarse - coarse.amin((1, 2), keepdim=True)) / (coarse.amax((1, 2)) - coarse.amin((1, 2)))[:, None, None]
    options: dict[str, Any] = {"masking": "standardized"}
    for i in range(IMAGES):
        one = slice(i, i + 1)
        metric = theirs.ClassificationMetric(Given(model, coarse[one]), softmax)
        metric.update(inputs[one], target[one].tolist())
        found = metric.summary()
        drop = metrics.average_drop(model, inputs[one], coarse[one], target[one], **options).item()
        assert drop == pytest.approx(found["avg_drop"], abs=1e-5)
        rose = metrics.increase_in_confidence(model, inputs[one], coarse[one], target[one], **options).item()
        assert rose == found["conf_increase"]


@pytest.mark.parametrize("steps", [10, 40, 400])
def test_insertion_and_deletion_agree_with_torchcam(steps: int) -> None:
    theirs = newer_torchcam()
    model, inputs, maps, target = case()
    maps = (4 * maps).round()  # it takes ties in the order of the rows
    metric = theirs.DeletionInsertionMetric(Given(model, maps), softmax, steps=steps)
    metric.update(inputs, target.tolist())
    found = metric.summary()
    options: dict[str, Any] = {"steps": steps, "ties": "stable", "baseline": "standardized"}
    for name, measure in (("deletion_auc", metrics.deletion), ("insertion_auc", metrics.insertion)):
        assert measure(model, inputs, maps, target, **options).mean().item() == pytest.approx(found[name], abs=1e-5)


# ---------------------------------------------------------------------- grad-cam


def test_drop_and_increase_agree_with_grad_cam() -> None:
    theirs = pytest.importorskip("pytorch_grad_cam.metrics.cam_mult_image")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    model, inputs, maps, target = case()
    asked = [targets.ClassifierOutputSoftmaxTarget(int(t)) for t in target]
    drop = theirs.DropInConfidence()(inputs, maps.numpy(), asked, model)
    options: dict[str, Any] = {"masking": "standardized"}
    clean = softmax(model(inputs)).gather(1, target[:, None])[:, 0].detach()
    ours = metrics.average_drop(model, inputs, maps, target, **options)
    np.testing.assert_allclose(ours * clean, drop, atol=1e-6)  # theirs is not divided by the confidence
    rise = theirs.IncreaseInConfidence()(inputs, maps.numpy(), asked, model)
    assert metrics.increase_in_confidence(model, inputs, maps, target, **options).tolist() == rise.tolist()
    assert 0 < rise.sum() < IMAGES


@pytest.mark.parametrize("order", ["morf", "lerf"])
def test_road_agrees_with_grad_cam(order: str) -> None:
    theirs = pytest.importorskip("pytorch_grad_cam.metrics.perturbation_confidence")
    road = pytest.importorskip("pytorch_grad_cam.metrics.road")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    model, inputs, maps, target = case()
    asked = [targets.ClassifierOutputSoftmaxTarget(int(t)) for t in target]
    rule = theirs.RemoveMostRelevantFirst if order == "morf" else theirs.RemoveLeastRelevantFirst
    found = [
        theirs.PerturbationConfidenceMetric(rule(100 - removed, road.NoisyLinearImputer(noise=0.0)))(
            inputs, maps.numpy(), asked, model, return_diff=False
        )
        for removed in (10, 50, 90)
    ]
    ours = metrics.road_curve(
        model, inputs, maps, target, order=order, fractions=(0.1, 0.5, 0.9), noise=0.0, tolerance=1e-6
    )
    np.testing.assert_allclose(ours, np.stack(found, 1), atol=1e-4)
    assert np.abs(np.diff(found, axis=0)).max() > 0.05
