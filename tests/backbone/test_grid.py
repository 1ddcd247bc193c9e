"""Layouts: every cell of a map is where the layout says, and a map written back is the layer's own output."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attrib_zoo.backbone.grid import Grid, Tap
from attrib_zoo.errors import LayerError, OptionError


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Grid, Tensor]:
    """A grid, and an activation of that layout in which every entry is different."""
    n, c, h, w = (draw(st.integers(1, size)) for size in (3, 4, 5, 5))
    kind = draw(st.sampled_from(["nchw", "nhwc", "tokens", "channel_tokens"]))
    if kind in ("nchw", "nhwc"):
        shape = (n, c, h, w) if kind == "nchw" else (n, h, w, c)
        return Grid(kind), numbered(shape)
    prefix = draw(st.integers(0, 5))
    order = draw(st.none() | st.permutations(range(h * w)).map(tuple))
    length = prefix + h * w
    shape = (n, length, c) if kind == "tokens" else (n, c, length)
    return Grid(kind, prefix, (h, w), order), numbered(shape)


def numbered(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)


def entry(grid: Grid, activation: Tensor, n: int, c: int, i: int, j: int) -> float:
    """Row i, column j of channel c, by the definition of each layout."""
    if grid.kind == "nchw":
        return activation[n, c, i, j].item()
    if grid.kind == "nhwc":
        return activation[n, i, j, c].item()
    cell = i * grid.hw[1] + j
    token = grid.prefix + (cell if grid.permutation is None else grid.permutation[cell])
    return (activation[n, token, c] if grid.kind == "tokens" else activation[n, c, token]).item()


@given(layouts())
def test_every_cell_is_where_the_definition_says(layout):
    grid, activation = layout
    maps = grid.to_map(activation)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in maps.shape)).view(-1, 4).tolist():
        assert maps[tuple(place)].item() == entry(grid, activation, *place)


@given(layouts())
def test_round_trips_are_exact(layout):
    grid, activation = layout
    maps = grid.to_map(activation)
    back = grid.from_map(maps, activation)
    assert torch.equal(back, activation)
    assert back.stride() == activation.stride()
    other = torch.rand_like(maps)
    assert torch.equal(grid.to_map(grid.from_map(other, activation)), other)


@given(layouts())
def test_writing_back_leaves_the_prefix_tokens(layout):
    grid, activation = layout
    written = grid.from_map(torch.zeros_like(grid.to_map(activation)), activation)
    axis = {"tokens": 1, "channel_tokens": 2}.get(grid.kind)
    if axis is None:
        assert not written.any()
    else:
        before = activation.narrow(axis, 0, grid.prefix)
        assert torch.equal(written.narrow(axis, 0, grid.prefix), before)
        assert written.sum() == before.sum()


@given(layouts())
def test_gradients_go_to_the_cells_that_were_read(layout):
    grid, activation = layout
    leaf = activation.clone().requires_grad_()
    weight = torch.rand_like(grid.to_map(activation))
    (grid.to_map(leaf) * weight).sum().backward()
    assert torch.equal(leaf.grad, grid.from_map(weight, torch.zeros_like(activation)))

    maps = torch.rand_like(weight).requires_grad_()
    (grid.from_map(maps, activation) * leaf.grad).sum().backward()
    assert torch.equal(maps.grad, weight)


@given(layouts())
def test_a_grid_survives_json(layout):
    grid, _ = layout
    assert Grid.from_dict(json.loads(json.dumps(grid.to_dict()))) == grid


def test_tokens_are_read_in_rows_without_the_prefix():
    index = torch.arange(2 + 3 * 4).view(1, -1, 1).repeat(2, 1, 5)  # each token carries its own number
    maps = Grid("tokens", prefix=2, hw=(3, 4)).to_map(index)
    assert torch.equal(maps[1, 4], torch.tensor([[2, 3, 4, 5], [6, 7, 8, 9], [10, 11, 12, 13]]))


def test_reading_tokens_copies_nothing():
    tokens = torch.rand(2, 13, 5)
    maps = Grid("tokens", prefix=1, hw=(3, 4)).to_map(tokens)
    tokens[0, 1 + 4 + 2, 3] = 7
    assert maps[0, 3, 1, 2] == 7


def test_written_maps_have_the_memory_order_of_the_layer():
    like = torch.rand(2, 3, 4, 5).permute(0, 3, 1, 2)  # an NCHW view of NHWC memory, as ConvNeXt puts out
    back = Grid("nchw").from_map(torch.rand(2, 5, 3, 4), like)
    assert back.stride() == like.stride()
    back.permute(0, 2, 3, 1).view(2, -1)
    swin = Grid("nhwc").from_map(torch.rand(2, 5, 3, 4), torch.rand(2, 3, 4, 5))
    swin.view(2, 12, 5)


def test_written_maps_take_the_dtype_of_the_layer():
    like = torch.rand(1, 5, 3, dtype=torch.bfloat16)
    back = Grid("tokens", prefix=1, hw=(2, 2)).from_map(torch.full((1, 3, 2, 2), 0.5, dtype=torch.float64), like)
    assert back.dtype == torch.bfloat16
    assert torch.equal(back[:, 1:], torch.full((1, 4, 3), 0.5, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("grid", "shape", "says"),
    [
        (Grid("nchw"), (2, 3, 4), r"nchw \(N, C, h, w\) must have 4 dimensions, got shape \(2, 3, 4\)"),
        (Grid("nhwc", hw=(3, 3)), (2, 3, 4, 5), r"must have 3x3 cells, got shape \(2, 3, 4, 5\)"),
        (Grid("tokens", 1, (7, 7)), (2, 197, 8), r"must have 1 \+ 7x7 = 50 tokens, got shape \(2, 197, 8\)"),
        (Grid("channel_tokens", 0, (2, 2)), (2, 4, 5), r"must have 0 \+ 2x2 = 4 tokens, got shape \(2, 4, 5\)"),
        (Grid("tokens", 1), (2, 5, 8), r"tokens need hw=\(h, w\) to be read as a map"),
    ],
)
def test_another_shape_is_refused(grid, shape, says):
    with pytest.raises(LayerError, match=says):
        grid.to_map(torch.zeros(shape))


def test_a_map_of_another_shape_is_refused():
    with pytest.raises(LayerError, match=r"the map must have shape \(2, 8, 2, 3\) to replace it, got \(2, 8, 3, 2\)"):
        Grid("tokens", 1, (2, 3)).from_map(torch.zeros(2, 8, 3, 2), torch.zeros(2, 7, 8))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"kind": "nwhc"}, "kind must be one of 'nchw', 'nhwc', 'tokens', 'channel_tokens', got 'nwhc'"),
        ({"kind": "tokens", "prefix": -1}, "prefix must be 0 or more tokens, got -1"),
        ({"kind": "tokens", "hw": (3,)}, r"hw must be two positive sizes \(h, w\), got \(3,\)"),
        ({"kind": "tokens", "hw": (0, 3)}, "hw must be two positive sizes"),
        ({"kind": "nchw", "prefix": 1}, "prefix and permutation belong to tokens, got kind='nchw'"),
        ({"kind": "tokens", "hw": (1, 2), "permutation": (0, 0)}, "permutation must name each of the h.w patch tokens"),
        ({"kind": "tokens", "permutation": (0, 1)}, "permutation must name each"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(fields, says):
    with pytest.raises(OptionError, match=says):
        Grid(**fields)


def test_the_label_of_a_tap_names_its_entry():
    grid = Grid()
    assert Tap("stage4", grid, 8).label == "stage4"
    assert Tap("stage4", grid, 8, element=1).label == "stage4[1]"
    assert Tap("vit", grid, 8, element="last").label == "vit['last']"
