"""Packing: every code comes back, in as many bytes as the layout says; biases in the units of the accumulators."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pege_fx.numerics.packing import integer_bias, pack, packed_size, unpack
from pege_fx.numerics.spec import bounds_of


@st.composite
def codes(draw: st.DrawFn) -> tuple[Tensor, int, bool]:
    bits, signed = draw(st.integers(2, 8)), draw(st.booleans())
    low, high = bounds_of(bits, signed=signed)
    values = draw(st.lists(st.integers(low, high), max_size=40))
    return torch.tensor(values, dtype=torch.int8 if signed else torch.uint8), bits, signed


@given(codes())
def test_what_is_packed_comes_back(case: tuple[Tensor, int, bool]) -> None:
    values, bits, signed = case
    packed = pack(values, bits)
    assert packed.dtype is torch.uint8
    assert packed.numel() == packed_size(values.numel(), bits) == -(-values.numel() * bits // 8)
    assert torch.equal(unpack(packed, values.shape, bits=bits, signed=signed), values)


@given(codes())
def test_the_layout_is_one_little_endian_stream(case: tuple[Tensor, int, bool]) -> None:
    values, bits, _ = case
    stream = sum((value & (1 << bits) - 1) << bits * i for i, value in enumerate(values.tolist()))
    assert bytes(pack(values, bits).tolist()) == stream.to_bytes(packed_size(values.numel(), bits), "little")


@pytest.mark.parametrize(("bits", "per_byte"), [(2, 4), (4, 2)])
def test_the_first_code_lies_in_the_lowest_bits(bits: int, per_byte: int) -> None:
    first = torch.zeros(per_byte, dtype=torch.uint8)
    first[0] = 1
    assert pack(first, bits).tolist() == [1]


def test_shapes_come_back() -> None:
    values = torch.arange(24, dtype=torch.uint8).view(2, 3, 4) % 8
    assert torch.equal(unpack(pack(values, 3), (2, 3, 4), bits=3, signed=False), values)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8), st.floats(1e-3, 10))
def test_a_bias_is_within_half_a_unit(values: list[float], unit: float) -> None:
    bias, scale = torch.tensor(values), torch.tensor(unit)
    stored = integer_bias(bias, scale)
    assert stored.dtype is torch.int32
    assert bool(((stored.double() * scale.double() - bias.double()).abs() <= scale.double() / 2 * (1 + 1e-9)).all())


def test_a_bias_saturates() -> None:
    assert integer_bias(torch.tensor([1e30, -1e30]), torch.tensor(1.0)).tolist() == [2**31 - 1, -(2**31)]
