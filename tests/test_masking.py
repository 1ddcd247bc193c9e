"""Upsampling, scaling and blending against loops and the papers' formulas; chunks that shrink when memory runs out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import strategies as zoo
import torch
from head_cases import mean_of_alike
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from attrib_zoo import (
    IIA,
    RISE,
    IntegratedGradCAM,
    ScoreCAM,
    SmoothGradCAMPlusPlus,
    metrics,
    synthetic,
)
from attrib_zoo.errors import OptionError
from attrib_zoo.masking import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ChunkSize,
    alike_filter,
    black,
    blend,
    blur,
    channel_stats,
    is_out_of_memory,
    likeness,
    mean_filter,
    min_max,
    positive_scale,
    rank_scale,
    upsample,
    wide_dtype,
)


def close(found, wanted, tolerance=1e-12):
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * max(1.0, float(wanted.abs().max())))


# ---------------------------------------------------------------------- upsampling


def bilinear(grid, size):
    """One map, half-pixel centres, clamped at the border: the definition, pixel by pixel."""
    h, w = grid.shape
    out = torch.zeros(size, dtype=grid.dtype)
    for i in range(size[0]):
        for j in range(size[1]):
            y = min(max((i + 0.5) * h / size[0] - 0.5, 0.0), h - 1.0)
            x = min(max((j + 0.5) * w / size[1] - 0.5, 0.0), w - 1.0)
            top, left = int(y), int(x)
            bottom, right, dy, dx = min(top + 1, h - 1), min(left + 1, w - 1), y - top, x - left
            above = grid[top, left] * (1 - dx) + grid[top, right] * dx
            below = grid[bottom, left] * (1 - dx) + grid[bottom, right] * dx
            out[i, j] = above * (1 - dy) + below * dy
    return out


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8],
)
def test_sums_are_computed_in_single_precision_or_better(dtype):
    assert wide_dtype(dtype) == wide_dtype(torch.zeros(1, dtype=dtype))
    assert wide_dtype(dtype) == (torch.float32 if "8_e" in str(dtype) else torch.promote_types(dtype, torch.float32))


@given(zoo.maps(most=4), st.integers(0, 5), st.integers(0, 5))
def test_upsample_is_bilinear_with_half_pixel_centres(grid, more_rows, more_columns):
    size = (grid.shape[2] + more_rows, grid.shape[3] + more_columns)
    found = upsample(grid[:1, :1], size)
    close(found[0, 0], bilinear(grid[0, 0], size))


def test_upsample_leaves_a_map_of_the_right_size_alone():
    grid = zoo.normal(2, 3, 4, 5)
    assert upsample(grid, (4, 5)) is grid
    assert upsample(grid, torch.Size([4, 5])) is grid


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_upsample_keeps_the_type(dtype):
    assert upsample(zoo.normal(1, 1, 2, 2, dtype=dtype), (4, 4)).dtype == dtype


# ---------------------------------------------------------------------- min-max


@given(zoo.maps(), st.sampled_from([1e-300, 1e-8, 1.0, 1e8, 1e300]))
def test_min_max_is_the_formula_at_any_scale(grid, factor):
    found = min_max(grid * factor)
    for n in range(len(grid)):
        for m in range(grid.shape[1]):
            values = [float(v) for v in grid[n, m].flatten()]
            low, high = min(values), max(values)
            wanted = [(v - low) / (high - low) if high > low else 0.0 for v in values]
            torch.testing.assert_close(found[n, m].flatten().tolist(), wanted, rtol=1e-9, atol=1e-12)
            if high > low:
                assert (found[n, m].min(), found[n, m].max()) == (0, 1)


@pytest.mark.parametrize("value", [0.0, -3.25, 1e30])
def test_min_max_of_a_constant_map_is_zero(value):
    grid = torch.full((2, 2, 3, 4), value)
    grid[1, 1, 0, 0] += max(1.0, abs(value))  # one map that is not constant beside three that are
    found = min_max(grid)
    assert found.sum() == 1
    assert found[1, 1, 0, 0] == 1


def test_min_max_has_a_finite_gradient_beside_a_constant_map():
    grid = torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    grid[0, 1] = zoo.normal(2, 2)
    (gradient,) = torch.autograd.grad(min_max(grid.requires_grad_()).square().sum(), grid)
    assert gradient.isfinite().all()
    assert gradient[0, 0].abs().sum() == 0
    assert gradient[0, 1].abs().sum() > 0


# ---------------------------------------------------------------------- blending (Eq. 13, 14)

STATS = st.lists(st.tuples(st.floats(0, 1), st.floats(0.05, 2)), min_size=1, max_size=4)


@given(STATS, zoo.SEEDS)
def test_black_is_the_raw_image_masked_and_then_standardised(stats, seed):
    mean, std = zip(*stats, strict=True)
    mu, sigma = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (mean, std))
    raw = zoo.normal(2, len(stats), 3, 4, seed=seed).sigmoid()
    mask = zoo.normal(2, 1, 3, 4, seed=seed + 1).sigmoid()
    standard = (raw - mu) / sigma
    found = blend(standard, mask, black(mean, std, standard))
    close(found, (mask * raw - mu) / sigma)  # Eq. 13
    close(found, mask * standard - (1 - mask) * mu / sigma)
    close(blend(standard, mask, 0.0), mask * standard)  # Eq. 14
    close(blend(standard, mask), mask * standard)


@given(zoo.SEEDS)
def test_without_a_mean_both_rules_agree(seed):
    images, mask = zoo.normal(2, 3, 4, 4, seed=seed), zoo.normal(2, 1, 4, 4, seed=seed + 1).sigmoid()
    close(blend(images, mask, black((0, 0, 0), (0.5, 1, 2), images)), blend(images, mask, 0.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_open_masks_show_the_image_and_closed_ones_the_baseline_to_the_bit(dtype):
    images = zoo.normal(2, 3, 5, 5, dtype=dtype) * 7
    colour = black(IMAGENET_MEAN, IMAGENET_STD, images)
    one = torch.ones(2, 1, 5, 5, dtype=dtype)
    for baseline in (colour, 0.0, 0.37):
        assert torch.equal(blend(images, one, baseline), images)
    assert torch.equal(blend(images, 0 * one, colour), colour.expand_as(images))
    assert torch.equal(blend(images, 0 * one, 0.37), torch.full_like(images, 0.37))
    assert blend(images, one, colour).dtype == dtype


def test_the_gradient_to_the_mask():
    images = zoo.normal(2, 3, 3, 4)
    colour = black(IMAGENET_MEAN, IMAGENET_STD, images)
    mask = zoo.normal(2, 1, 3, 4).sigmoid().requires_grad_()
    for baseline in (colour, 0.0):
        assert torch.autograd.gradcheck(lambda m, b=baseline: blend(images, m, b), (mask,))
    (found,) = torch.autograd.grad(blend(images, mask, colour).sum(), mask)
    close(found, (images - colour).sum(1, keepdim=True))


# ---------------------------------------------------------------------- constants


def test_black_is_minus_mean_over_std():
    close(black((0.5, 0.2), (0.25, 0.4)).double().flatten(), torch.tensor([-2.0, -0.5], dtype=torch.float64), 1e-7)
    assert black((0.5,), (0.25,)).shape == (1, 1, 1, 1)
    exact = black(IMAGENET_MEAN, IMAGENET_STD, torch.zeros(1, dtype=torch.float64)).flatten()
    assert exact.tolist() == [-m / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)]
    with pytest.raises(ValueError, match="zip"):
        black((0.5, 0.5), (0.25,))


def with_config(**configs):
    model = nn.Identity()
    for name, config in configs.items():
        setattr(model, name, config)
    return model


def test_channel_stats_are_the_models_own():
    own = {"mean": (0.1, 0.2, 0.3), "std": (1, 2, 3)}
    found = ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    assert channel_stats(with_config(default_cfg=own), 3) == found
    assert channel_stats(with_config(pretrained_cfg=SimpleNamespace(**own)), 3) == found  # timm has both forms
    assert channel_stats(with_config(pretrained_cfg=own, default_cfg={"mean": (0,) * 3, "std": (1,) * 3}), 3) == found
    assert channel_stats(with_config(pretrained_cfg={"mean": None}, default_cfg=own), 3) == found


def test_channel_stats_without_a_configuration_that_fits():
    own = {"mean": (0.1, 0.2, 0.3), "std": (1, 2, 3)}
    assert channel_stats(with_config(default_cfg=own), 1) == ((0.5,), (0.5,))
    assert channel_stats(nn.Identity(), 3) == (IMAGENET_MEAN, IMAGENET_STD)
    assert channel_stats(with_config(default_cfg=None), 3) == (IMAGENET_MEAN, IMAGENET_STD)
    assert channel_stats(nn.Identity(), 5) == ((0.5,) * 5, (0.5,) * 5)


def test_channel_stats_of_a_timm_model():
    import timm

    model = timm.create_model("test_vit", pretrained=False)
    assert channel_stats(model, 3) == (tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"]))


# ---------------------------------------------------------------------- chunks


@given(st.integers(0, 100), st.one_of(st.none(), st.integers(1, 40)))
def test_chunks_cover_everything_once_in_order(total, size):
    seen = []
    done = list(ChunkSize(size).ranges(total, lambda part: seen.extend(range(total)[part])))
    assert seen == list(range(total))
    assert sum(done) == total
    assert all(count <= (size or 32) for count in done)


@given(st.integers(1, 60), st.integers(1, 12))
def test_chunks_halve_until_they_fit_and_repeat_what_failed(total, fits):
    seen, tried = [], []

    def work(part):
        tried.append(part.stop - part.start)
        if part.stop - part.start > fits:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        seen.extend(range(part.start, part.stop))

    chunks = ChunkSize(40)
    list(chunks.ranges(total, work))
    assert seen == list(range(total))
    assert sorted(tried, reverse=True)[0] == min(40, total)
    if total > fits:
        assert fits / 2 < chunks.value <= fits


def test_out_of_memory_with_one_item_is_said():
    def work(part):
        raise torch.cuda.OutOfMemoryError("out of memory")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        list(ChunkSize(4).ranges(4, work))


def test_other_errors_pass_at_once():
    tried = []

    def work(part):
        tried.append(part)
        raise RuntimeError("sizes do not match")

    with pytest.raises(RuntimeError, match="sizes"):
        list(ChunkSize(8).ranges(8, work))
    assert len(tried) == 1


def test_this_machines_allocator_is_understood():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "8"])
def test_a_chunk_size_that_is_no_positive_integer_is_refused(size):
    with pytest.raises(OptionError, match=r"chunk_size: must be a positive integer or None, got"):
        ChunkSize(size)


@pytest.mark.parametrize(("side", "most"), [(16, 32), (112, 32), (130, 23), (224, 8), (256, 6), (384, 4), (1024, 4)])
def test_the_automatic_size_on_a_cpu_goes_by_the_pixels(side, most):
    assert ChunkSize(images=torch.empty(2, 3, side, side)).value == most
    assert ChunkSize(images=torch.empty(2, 3, side, side, device="meta")).value == 32
    assert ChunkSize(7, torch.empty(2, 3, side, side)).value == 7


def test_the_automatic_size_of_unknown_images():
    assert ChunkSize().value == 32
    assert ChunkSize(7).value == 7


# ---------------------------------------------------------------------- chunks of whoever runs copies of images


def metric(function, **options):
    return lambda model, images: function(model, images, torch.rand(len(images), 1, 4, 4), 0, **options)


def method(cls, **options):
    return lambda model, images: cls(model, **options).attribute(images, 0)


COPIES = {
    "insertion": metric(metrics.insertion_curve, steps=40),
    "ROAD": metric(metrics.road_curve, fractions=[0.01 * k for k in range(40)]),
    "RISE": method(RISE, n_masks=40),
    "ScoreCAM": method(ScoreCAM),
    "IntegratedGradCAM": method(IntegratedGradCAM, n_steps=40),
    "SmoothGradCAMPlusPlus": method(SmoothGradCAMPlusPlus, n_samples=40),
    "IIA": method(IIA, n_steps=40, mode="released"),
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize(("side", "most"), [(32, 32), (160, 15)])
def test_copies_on_a_cpu_go_by_the_size_of_the_images(name, side, most):
    model, sizes = synthetic.tiny_cnn(), []
    hook = model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    COPIES[name](model, torch.randn(1, 3, side, side))
    hook.remove()
    assert max(sizes) == most


# ---------------------------------------------------------------------- blurring


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.4, 1.0, 3.7]), zoo.SEEDS)
def test_blur_is_a_gaussian_over_an_endlessly_mirrored_image(height, width, sigma, seed):
    images = zoo.normal(2, 3, height, width, seed=seed)
    reach = max(1, -int(-3 * sigma // 1))
    powers = torch.tensor([[i * i + j * j for j in range(-reach, reach + 1)] for i in range(-reach, reach + 1)])
    kernel = (-0.5 * powers.double() / sigma**2).exp()

    def mirrored(size):
        tile = [*range(size), *reversed(range(size))]
        return [tile[i % len(tile)] for i in range(-reach, size + reach)]

    padded = images[:, :, mirrored(height)][:, :, :, mirrored(width)]
    wanted = nn.functional.conv2d(padded.flatten(0, 1)[:, None], (kernel / kernel.sum())[None, None]).view_as(images)
    close(blur(images, sigma), wanted)
    assert blur(images, 0) is images


def test_blur_keeps_a_colour_and_the_type():
    colour = torch.full((1, 3, 6, 7), 0.3, dtype=torch.float16)
    assert blur(colour, 2.0).dtype == torch.float16
    torch.testing.assert_close(blur(colour, 2.0), colour, rtol=1e-3, atol=0)


# ---------------------------------------------------------------------- smoothing and ranks


@given(zoo.maps(), st.sampled_from([1, 3, 5, 7]))
def test_the_mean_filter_takes_the_mean_of_the_cells_that_there_are(maps, size):
    reach = size // 2
    found = mean_filter(maps, size)
    assert found.shape == maps.shape
    for i in range(maps.shape[2]):
        for j in range(maps.shape[3]):
            window = maps[:, :, max(0, i - reach) : i + reach + 1, max(0, j - reach) : j + reach + 1]
            torch.testing.assert_close(found[:, :, i, j], window.mean((2, 3)))


@pytest.mark.parametrize("size", [3, 5])
def test_the_filter_of_alike_cells_weighs_those_that_there_are_by_their_cosines(size):
    maps = zoo.normal(2, 3, 4, 6, seed=0)
    layers = [zoo.normal(2, 5, 4, 6, seed=1), zoo.normal(2, 2, 4, 6, seed=2)]
    close(alike_filter(maps, likeness(layers, size)), mean_of_alike(maps, layers, size), 1e-12)


@given(zoo.maps(), st.sampled_from([3, 5]))
def test_cells_that_are_alike_everywhere_have_the_plain_mean(maps, size):
    shares = likeness([torch.ones_like(maps)], size)  # no structure: all cosines are zero
    torch.testing.assert_close(alike_filter(maps, shares), mean_filter(maps, size))


@given(zoo.maps(), st.integers(1, 6))
def test_ranks_are_counted_pair_by_pair(maps, levels):
    maps = (maps * levels).round()  # ties
    found = rank_scale(maps)
    for heat, ranked in zip(maps.flatten(0, 1).flatten(1), found.flatten(0, 1).flatten(1), strict=True):
        below = (heat[:, None] > heat).sum(1) + ((heat[:, None] == heat).sum(1) - 1) / 2
        wanted = below / (len(heat) - 1) if len(heat) > 1 else torch.full_like(heat, 0.5)
        torch.testing.assert_close(ranked, wanted.double())


@given(zoo.maps(), st.floats(0.1, 1000))
def test_the_positive_part_keeps_the_zero(maps, unit):
    found = positive_scale(unit * maps)
    for heat, scaled in zip(maps.flatten(0, 1).flatten(1), found.flatten(0, 1).flatten(1), strict=True):
        most = max(0.0, float(heat.max()))
        wanted = [max(0.0, value) / most if most else 0.0 for value in heat.tolist()]
        torch.testing.assert_close(scaled, torch.tensor(wanted, dtype=torch.float64))
    torch.testing.assert_close(positive_scale(found), found)


def test_a_map_without_positive_values_is_dark_and_nan_stays():
    assert torch.equal(positive_scale(torch.tensor([[[[-3.0, -1.0]]]])), torch.zeros(1, 1, 1, 2))
    assert positive_scale(torch.tensor([[[[float("nan"), -1.0]]]])).isnan().any()


def test_constant_maps_are_ranked_in_the_middle_and_nan_stays():
    assert rank_scale(torch.full((1, 1, 2, 3), 7.0)).unique().tolist() == [0.5]
    assert rank_scale(torch.tensor([[[[float("nan"), 1.0, 2.0]]]])).isnan().flatten().tolist() == [True, False, False]
