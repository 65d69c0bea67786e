"""Each element of a tensor lies in one tile, tiles keep their order, and nothing is lost on the way back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pege_fx.errors import SpecError
from pege_fx.numerics.layouts import (
    Channels,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    ScaleLayout,
    Tiling,
    layout_named,
)


def numbered(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


@st.composite
def tilings(draw: st.DrawFn) -> tuple[Tiling, Tensor]:
    """A weight or an activation with a layout that fits it."""
    size, count, rows = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    layout: ScaleLayout
    if draw(st.booleans()):
        shape = (*draw(st.lists(st.integers(1, 3), max_size=2)), rows, size * count)
        layout = draw(st.sampled_from([PerTensor(), PerToken(), PerGroup(size), PerGroup(size + 1, pad=True)]))
        return Tiling(layout, "activation"), numbered(*shape)
    kernel = draw(st.sampled_from([(), (2,), (1, 3)]))
    shape = (rows, size * count, *kernel)
    if draw(st.booleans()):
        shape = (shape[1], shape[0], *kernel)
        channels = Channels(rows, axis=1)
    else:
        channels = Channels(rows)
    layout = draw(
        st.sampled_from([PerTensor(), PerChannel(), PerGroup(size), PerGroup(size + 1, pad=True), PerBlock(rows, size)])
    )
    return Tiling(layout, "weight", shape, channels), numbered(*shape)


@given(tilings())
def test_scales_broadcast_to_tiles_and_every_element_comes_back(case: tuple[Tiling, Tensor]) -> None:
    tiling, x = case
    tiles = tiling.tiles(x)
    assert torch.equal(tiling.untiled(tiles, x), x)
    rows = tiling.rows(x)
    scales = numbered(rows.shape[0]) + 1
    if tiling.kind == "weight" or isinstance(tiling.layout, PerTensor):
        scales = scales.reshape(tiling.scale_shape)
    laid_out = tiling.broadcast(scales)
    scaled = tiling.untiled(tiles * laid_out, x)
    assert scaled.shape == x.shape
    again = tiling.rows(scaled)
    assert torch.equal(again, rows * scales.reshape(-1, 1))  # a row is a tile: one scale


def test_groups_of_a_weight_lie_along_its_inputs() -> None:
    tiling = Tiling(PerGroup(2), "weight", (2, 4), Channels(2))
    assert tiling.scale_shape == (2, 2)
    assert tiling.rows(numbered(2, 4)).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    turned = Tiling(PerGroup(2), "weight", (4, 2), Channels(2, axis=1))
    assert turned.scale_shape == (2, 2)
    assert turned.rows(numbered(4, 2)).tolist() == [[0, 2], [4, 6], [1, 3], [5, 7]]


@pytest.mark.parametrize(
    ("layout", "kind", "shape", "channels", "message"),
    [
        (PerGroup(5), "weight", (4, 12), Channels(4), r"groups of 5 do not divide its 12 inputs.\n  sizes that fit: 3, 4, 6"),
        (PerToken(), "weight", (4, 12), Channels(4), r'granularity="token" is for activations, not for a weight'),
        (PerChannel(), "activation", None, None, r'granularity="channel" is for weights, not for an activation'),
        (PerBlock(3, 4), "weight", (4, 12), Channels(4), r"blocks of 3 x 4 do not divide its 4 x 12"),
        (PerGroup(4), "weight", (4, 12), None, r"needs a weight with output channels on one axis"),
        (PerGroup(4), "weight", (4, 12), Channels(24, 1, 2), r"needs a weight with output channels on one axis"),
    ],
)
def test_a_layout_that_an_edge_can_not_have_is_refused(
    layout: ScaleLayout, kind: str, shape: tuple[int, ...] | None, channels: Channels | None, message: str
) -> None:
    with pytest.raises(SpecError, match=f"fc.weight: .*{message}"):
        Tiling(layout, kind, shape, channels).check("fc.weight")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "layout", [PerTensor(), PerChannel(), PerToken(), PerGroup(32), PerGroup(7, pad=True), PerBlock(2, 4)], ids=str
)
def test_a_name_gives_the_layout_back(layout: ScaleLayout) -> None:
    assert layout_named(layout.name) == layout_named(layout) == layout


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_a_size_is_a_positive_whole_number(size: object) -> None:
    with pytest.raises(SpecError, match="positive whole number"):
        PerGroup(size)  # type: ignore[arg-type]
