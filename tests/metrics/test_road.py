"""ROAD's imputation against a dense and a sparse direct solution, and its curves on models where they are known."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attrib_zoo import synthetic
from attrib_zoo.errors import InputError, OptionError
from attrib_zoo.metrics import linear_imputation, road, road_curve

NEIGHBOURS = [(a, b, 1 / 6 if a * b == 0 else 1 / 12) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def equations(image: Tensor, hole: Tensor) -> tuple[list[tuple[int, int, float]], np.ndarray, dict[Any, int]]:
    """ROAD's system, pixel by pixel: entries of the matrix, right-hand sides ``(n, C)``, the number of each pixel."""
    number = {tuple(pixel): i for i, pixel in enumerate(hole.nonzero().tolist())}
    entries, right = [], np.zeros((len(number), len(image)))
    for (row, column), i in number.items():
        for down, across, weight in NEIGHBOURS:
            place = row + down, column + across
            if not (0 <= place[0] < hole.shape[0] and 0 <= place[1] < hole.shape[1]):
                continue
            entries.append((i, i, weight))
            if place in number:
                entries.append((i, number[place], -weight))
            else:
                right[i] += weight * image[:, place[0], place[1]].numpy()
    return entries, right, number


def by_hand(image: Tensor, hole: Tensor) -> Tensor:
    """Dense solution of one image ``(C, H, W)``."""
    entries, right, number = equations(image, hole)
    matrix = np.zeros((len(number), len(number)))
    for i, j, value in entries:
        matrix[i, j] += value
    out = image.clone()
    for (row, column), value in zip(number, np.linalg.solve(matrix, right), strict=True):
        out[:, row, column] = torch.tensor(value)
    return out


# ---------------------------------------------------------------------------- imputation


@pytest.mark.parametrize("size", [(17, 12), (1, 33), (9, 1), (2, 2), (31, 8), (20, 20)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_imputation_is_the_dense_solution(size: tuple[int, int], share: float) -> None:
    generator = torch.Generator().manual_seed(round(100 * share) + size[0])
    images = torch.randn(2, 3, *size, generator=generator).double() * torch.tensor([1.0, 5.0])[:, None, None, None]
    order = torch.rand(2, size[0] * size[1], generator=generator).argsort(1)
    order[1] = torch.arange(size[0] * size[1])  # one with scattered holes, one with a large one
    removed = (order < min(round(share * order.shape[1]), order.shape[1] - 1)).view(2, *size)
    expected = torch.stack([by_hand(*pair) for pair in zip(images, removed, strict=True)])
    found = linear_imputation(images, removed, tolerance=1e-10)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
    std = images.flatten(1).std(1)
    rough = linear_imputation(images.float(), removed).double()
    assert ((rough - expected).abs().flatten(1).amax(1) < 1e-3 * std).all()
    assert torch.equal(found[~removed[:, None].expand_as(found)], images[~removed[:, None].expand_as(found)])


def test_a_faint_image_is_as_exact_beside_a_strong_one() -> None:
    image = draw(6, 1, 3, 24, 24)
    images = torch.cat([image, 1e4 * image.flip(-1)])
    removed = (draw(7, 24, 24) > -1).expand(2, 24, 24)
    error = (linear_imputation(images, removed, tolerance=1e-4)[0] - by_hand(image[0], removed[0])).abs().amax()
    assert error < 1e-3 * image.std()


@pytest.mark.parametrize("kind", ["blob", "zeros", "noise"])
def test_imputation_agrees_with_a_sparse_direct_solver(kind: str) -> None:
    sparse = pytest.importorskip("scipy.sparse")
    from scipy.sparse.linalg import spsolve

    image = (F.interpolate(draw(1, 1, 3, 8, 8), (64, 64), mode="bicubic") + 0.3 * draw(2, 1, 3, 64, 64))[0]
    grid = F.interpolate(draw(3, 1, 1, 5, 5), (64, 64), mode="bilinear")[0, 0]
    maps = {"blob": grid, "zeros": grid.relu() + 1e-9 * draw(4, 64, 64), "noise": draw(5, 64, 64)}[kind]
    for share in (0.1, 0.5, 0.9):
        hole = maps >= maps.flatten().quantile(1 - share)
        entries, right, number = equations(image, hole)
        i, j, value = (np.array(column) for column in zip(*entries, strict=True))
        exact = spsolve(sparse.coo_matrix((value, (i, j)), shape=(len(number),) * 2).tocsc(), right)
        found = linear_imputation(image[None].float(), hole[None])[0][:, hole].T.double()
        assert (found - torch.tensor(exact)).abs().max() < 1e-3 * image.std()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # theirs
def test_imputation_agrees_with_grad_cam() -> None:
    theirs = pytest.importorskip("pytorch_grad_cam.metrics.road").NoisyLinearImputer(noise=0.0)
    image, hole = draw(1, 3, 15, 22).float(), draw(2, 15, 22) > -0.5
    found = linear_imputation(image[None], hole[None], tolerance=1e-6)[0]
    torch.testing.assert_close(found, theirs(image, (~hole).float()), rtol=0, atol=1e-4)


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), h=st.integers(1, 24), w=st.integers(2, 24), share=st.floats(0, 1))
def test_imputation_properties(seed: int, h: int, w: int, share: float) -> None:
    images = draw(seed, 2, 2, h, w)
    removed = torch.rand(2, h, w, generator=torch.Generator().manual_seed(seed)) < share
    removed[0, 0, 0] = False
    found = linear_imputation(images, removed, tolerance=1e-8)
    scale, shift = torch.tensor([3.0, -0.5])[:, None, None], torch.tensor([10.0, -2.0])[:, None, None]
    torch.testing.assert_close(
        linear_imputation(images * scale + shift, removed, tolerance=1e-9), found * scale + shift
    )
    alone = [linear_imputation(images[i : i + 1], removed[i : i + 1], tolerance=1e-8) for i in (0, 1)]
    torch.testing.assert_close(found, torch.cat(alone))
    torch.testing.assert_close(linear_imputation(images.mT, removed.mT, tolerance=1e-8), found.mT)
    for image, hole, filled in zip(images, removed, found, strict=True):
        if not hole.any():
            assert torch.equal(image, filled)
        elif not hole.all():
            low, high = (f(image[:, ~hole], 1).values for f in (torch.min, torch.max))
            assert (filled >= low[:, None, None] - 1e-6)[:, hole].all()
            assert (filled <= high[:, None, None] + 1e-6)[:, hole].all()


def test_the_side_by_side_solver_is_the_same() -> None:
    from attrib_zoo.metrics.imputation import _fill

    images = draw(1, 3, 2, 30, 21)
    removed = torch.stack([draw(2, 30, 21) > -1, draw(3, 30, 21) > 9, torch.arange(630).view(30, 21) > 99])
    limit = torch.full((3, 1, 1, 1), 1e-9).double()
    together = _fill(images, removed[:, None].double(), limit)
    torch.testing.assert_close(together, linear_imputation(images, removed, tolerance=1e-9), rtol=0, atol=1e-7)


def test_imputation_of_everything_and_of_flat_images() -> None:
    images = draw(1, 2, 3, 9, 10)
    removed = torch.ones(2, 9, 10, dtype=torch.bool)
    removed[1, 4, 4] = False
    found = linear_imputation(images, removed)
    torch.testing.assert_close(found[0], images[0].mean((1, 2), keepdim=True).expand(3, 9, 10))
    torch.testing.assert_close(found[1], images[1, :, 4:5, 4:5].expand(3, 9, 10), rtol=0, atol=1e-3)
    flat = torch.full((1, 3, 40, 40), 0.1)
    torch.testing.assert_close(linear_imputation(flat, draw(1, 1, 40, 40) > -1), flat)
    half = linear_imputation(images.bfloat16(), removed)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, linear_imputation(images.bfloat16().float(), removed).bfloat16())


def test_a_solution_that_is_not_reached_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attrib_zoo.metrics.imputation._MOST", 1)
    with pytest.warns(RuntimeWarning, match="imputation: not converged after 1 iterations; raise the tolerance"):
        linear_imputation(draw(1, 1, 1, 20, 20), draw(2, 1, 20, 20) > -1, tolerance=1e-12)


@pytest.mark.parametrize(
    ("images", "removed", "options", "message"),
    [
        (torch.ones(3, 4, 4), torch.ones(3, 4, 4).bool(), {}, "images: must be floating-point images (N, C, H, W)"),
        (torch.ones(1, 3, 4, 4), torch.ones(1, 4, 5).bool(), {}, "removed: must be bool, (N, H, W) or (N, 1, H, W)"),
        (torch.ones(1, 3, 4, 4), torch.ones(1, 4, 4), {}, "got torch.float32 (1, 4, 4)"),
    ],
)
def test_what_cannot_be_imputed(images: Tensor, removed: Tensor, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        linear_imputation(images, removed, **options)
    with pytest.raises(OptionError, match="tolerance: must be above 0"):
        linear_imputation(torch.ones(1, 3, 4, 4), torch.ones(1, 4, 4).bool(), tolerance=0)


# ---------------------------------------------------------------------------- curves


class Linear(nn.Module):
    """Logits that are weighted sums of the pixels; remembers what it has seen."""

    def __init__(self, classes: int = 3, size: int = 6) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw(0, classes, 2, size, size))
        self.default_cfg = {"mean": (0.5, 0.4), "std": (0.25, 0.5)}
        self.seen: list[Tensor] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen.append(inputs)
        return torch.einsum("nchw,kchw->nk", inputs, self.weight)


@pytest.fixture
def case() -> tuple[Linear, Tensor, Tensor]:
    return Linear(), draw(1, 4, 2, 6, 6), draw(2, 4, 6, 6)


@pytest.mark.parametrize("order", ["morf", "lerf"])
def test_curve_by_hand(case: Any, order: str) -> None:
    model, inputs, maps = case
    fractions = (0.0, 0.25, 0.5, 0.9)
    target = torch.tensor([0, 2, 1, 1])
    options: dict[str, Any] = {"order": order, "fractions": fractions, "noise": 0.0, "tolerance": 1e-10}
    rows = []
    for image, heat, wanted in zip(inputs, maps, target, strict=True):
        by_relevance = heat.flatten().argsort(descending=order == "morf")
        row = []
        for count in (0, 9, 18, 32):
            hole = torch.zeros(36, dtype=torch.bool)
            hole[by_relevance[:count]] = True
            row.append(model(by_hand(image, hole.view(6, 6))[None]).softmax(1)[0, wanted].item())
        rows.append(row)
    expected = torch.tensor(rows).double()
    torch.testing.assert_close(road_curve(model, inputs, maps, target, **options), expected)
    torch.testing.assert_close(road(model, inputs, maps, target, **options), expected.mean(1))


def test_defaults_are_the_papers(case: Any) -> None:
    model, inputs, maps = case
    nine = [tenth / 10 for tenth in range(1, 10)]
    explicit = road_curve(
        model, inputs, maps, 1, order="morf", fractions=nine, noise=0.01, noise_space="raw", reduce="confidence"
    )
    assert torch.equal(road_curve(model, inputs, maps, 1), explicit)
    assert torch.equal(road(model, inputs, maps, 1), explicit.mean(1))


def test_noise_is_on_removed_pixels_alone() -> None:
    model, inputs, maps = Linear(size=64), draw(1, 2, 2, 64, 64), draw(2, 2, 64, 64)
    for space, stds in (("raw", (0.1 / 0.25, 0.1 / 0.5)), ("standardized", (0.1, 0.1))):
        seen = {}
        for noise in (0.0, 0.1):
            model.seen = []
            road(model, inputs, maps, 0, fractions=(0.5, 0.7), noise=noise, noise_space=space, tolerance=1e-9)
            seen[noise] = torch.cat(model.seen).view(2, 2, 2, 64, 64)
        grain = seen[0.1] - seen[0.0]
        removed = torch.stack([maps.flatten(1).argsort(1, descending=True).argsort(1) < n for n in (2048, 2867)], 1)
        removed = removed.view(2, 2, 64, 64)
        for channel, std in enumerate(stds):
            values = grain[:, :, channel]
            assert values[~removed].abs().max() == 0
            assert values[removed].std().item() == pytest.approx(std, rel=0.05)
            assert values[removed].mean().item() == pytest.approx(0, abs=0.05 * std)
        both = (removed[:, 0] & removed[:, 1])[:, None].expand(2, 2, 64, 64)
        torch.testing.assert_close(grain[:, 0][both], grain[:, 1][both])  # one field per image,
        one, two = (grain[i, 1, 0][removed[0, 1] & removed[1, 1]] for i in (0, 1))
        assert abs(np.corrcoef(one, two)[0, 1]) < 0.2  # each image its own


def test_accuracy_is_the_decision(case: Any) -> None:
    model, inputs, maps = case
    options: dict[str, Any] = {"fractions": (0.2, 0.6, 0.9), "seed": 3}
    model.seen = []
    confidence = road_curve(model, inputs, maps, 1, score=lambda outputs: outputs, **options)
    decisions = torch.cat([Linear()(images).argmax(1) for images in model.seen]).view(4, 3)
    found = road_curve(model, inputs, maps, 1, reduce="accuracy", **options)
    assert torch.equal(found, (decisions == 1).to(found))
    assert 0 < found.sum() < 12
    multi = road_curve(model, inputs, maps, 1, reduce="accuracy", score="sigmoid", **options)
    assert torch.equal(multi, (confidence >= 0).to(multi))  # sigmoid of 0.5 or more
    single = Linear(1)
    curves = [road_curve(single, inputs, maps, target, reduce="accuracy", **options) for target in (0, 1)]
    decided = torch.cat([Linear(1)(images)[:, 0] > 0 for images in single.seen[-len(single.seen) // 2 :]]).view(4, 3)
    assert torch.equal(curves[1], decided.to(curves[1]))
    assert torch.equal(curves[0], 1 - curves[1])
    assert 0 < curves[1].sum() < 12


def test_no_target_is_the_decision_on_the_whole_image(case: Any) -> None:
    model, inputs, maps = case
    decision = model(inputs).argmax(1)
    assert len(set(decision.tolist())) > 1
    torch.testing.assert_close(road(model, inputs, maps), road(model, inputs, maps, decision))


def test_a_map_of_zeros_is_not_removed_at_once() -> None:
    model, inputs, maps = Linear(), draw(1, 1, 2, 6, 6), torch.zeros(1, 6, 6)
    maps[0, :2, :] = draw(3, 2, 6).exp().float()  # 12 of 36 are relevant
    options: dict[str, Any] = {"fractions": (0.1, 0.25, 0.5), "noise": 1.0}
    shares = {}
    for ties in ("random", "stable", "threshold"):
        model.seen = []
        road(model, inputs, maps, 0, order="lerf", ties=ties, **options)
        shares[ties] = (torch.cat(model.seen) != inputs).any(1).flatten(1).sum(1).tolist()
    assert shares == {"random": [4, 9, 18], "stable": [4, 9, 18], "threshold": [24, 24, 24]}


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), order=st.sampled_from(["morf", "lerf"]), chunk=st.integers(1, 9))
def test_batching_and_order_preserving_changes_are_irrelevant(seed: int, order: str, chunk: int) -> None:
    model, inputs = Linear(), draw(seed, 3, 2, 6, 6)
    maps = torch.randint(0, 6, (3, 6, 6), generator=torch.Generator().manual_seed(seed)).double()
    options: dict[str, Any] = {"order": order, "fractions": (0.3, 0.8), "tolerance": 1e-10}
    seeds = [5, seed, 2]
    found = road_curve(model, inputs, maps, 2, seed=seeds, chunk_size=chunk, **options)
    alone = [
        road_curve(model, inputs[i : i + 1], maps[i : i + 1], 2, seed=own, **options) for i, own in enumerate(seeds)
    ]
    torch.testing.assert_close(found, torch.cat(alone))
    torch.testing.assert_close(road_curve(model, inputs, maps.exp(), 2, seed=seeds, **options), found)
    without = maps + torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(seed)).double() / 2
    other = "lerf" if order == "morf" else "morf"
    mirrored = road_curve(model, inputs, -without, 2, seed=seeds, **{**options, "order": other})
    torch.testing.assert_close(road_curve(model, inputs, without, 2, seed=seeds, **options), mirrored)


def test_the_right_map_is_removed_at_a_loss() -> None:
    model, data = synthetic.trained("cnn"), synthetic.scenes(24, seed=5)
    right, target = data.masks[:, 0].float(), data.labels[:, 0]
    morf, lerf = (road(model, data.inputs, right, target, order=order) for order in ("morf", "lerf"))
    assert (morf <= lerf).float().mean() > 0.95
    assert lerf.mean() - morf.mean() > 0.25
    noise = torch.rand(24, 32, 32, generator=torch.Generator().manual_seed(0))
    chance = [road(model, data.inputs, noise, target, order=order).mean() for order in ("morf", "lerf")]
    assert abs(chance[0] - chance[1]) < 0.08
    assert morf.mean() < min(chance)
    assert lerf.mean() > max(chance)


def test_what_is_not_finite_stays_so(case: Any) -> None:
    model, inputs, maps = case
    maps[2, 1, 1] = math.inf
    assert road(model, inputs, maps, 0).isnan().tolist() == [False, False, True, False]
    assert road(model, inputs, torch.zeros(4, 6, 6), 0).isfinite().all()
    everything = road_curve(model, inputs, maps[:2].repeat(2, 1, 1), 0, fractions=(0.0, 1.0), noise=0.0)
    mean = inputs.mean((2, 3), keepdim=True).expand_as(inputs)
    ends = torch.stack([model(images).softmax(1)[:, 0] for images in (inputs, mean)], 1)
    torch.testing.assert_close(everything, ends.detach())


def test_nothing_is_left_behind() -> None:
    model, data, maps = synthetic.tiny_cnn(), synthetic.scenes(2), torch.rand(2, 8, 8)
    model.train()
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = road(model, data.inputs.requires_grad_(), maps, 0)
        again = road(model, data.inputs, maps, 0)
        half = road(model.bfloat16(), data.inputs.bfloat16(), maps.bfloat16(), 0)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(found, again)
    assert model.training
    assert (found.requires_grad, found.dtype, half.dtype) == (False, torch.float32, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": "random"}, "order: must be one of morf, lerf, got 'random'"),
        ({"fractions": ()}, "fractions: must be shares of the pixels from 0 to 1"),
        ({"fractions": (10, 20)}, "fractions: must be shares of the pixels from 0 to 1 (0.1 for 10 %), got (10, 20)"),
        ({"noise": -1.0}, "noise: must be a standard deviation of 0 or more"),
        ({"noise_space": "pixels"}, "noise_space: must be one of raw, standardized"),
        ({"reduce": "mean"}, "reduce: must be one of confidence, accuracy"),
        ({"ties": "none"}, "ties: must be one of"),
        ({"tolerance": 0.0}, "tolerance: must be above 0"),
        ({"seed": [1]}, "seed: must be an int, or one int for each of the 4 images"),
    ],
)
def test_bad_options(case: Any, change: dict[str, Any], message: str) -> None:
    model, inputs, maps = case
    with pytest.raises(OptionError, match=re.escape(message)):
        road(model, inputs, maps, 0, **change)
