"""A format is tested by the exact set of values that it may produce, in each dtype that it accepts."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pege_fx.errors import SpecError
from pege_fx.numerics.formats import (
    BINARY,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    NF4,
    SEQ2,
    TERNARY,
    Float,
    Format,
    Integer,
    Levels,
    add_format,
    check_format,
    format_of,
    nearest_level,
)

INTEGERS = [Integer(bits, signed) for bits in range(1, 9) for signed in (True, False)] + [Integer(4, narrow=True), TERNARY]
FORMATS: list[Format] = [*INTEGERS, E4M3, E5M2, E3M2, E2M3, E2M1, BINARY, SEQ2, NF4, Levels((-3.0, 0.5, 7.0))]
WIDE = [torch.float32, torch.float64]


def around(levels: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """Every level, every middle of two, and their neighbours on both sides; and far beyond."""
    middles = [(a + b) / 2 for a, b in itertools.pairwise(levels)]
    ends = [levels[0] * 3 - 1, levels[-1] * 3 + 1, -1e30, 1e30, -math.inf, math.inf]
    exact = torch.tensor([*levels, *middles, *ends], dtype=dtype)
    return torch.cat(
        [exact, exact.nextafter(torch.tensor(math.inf, dtype=dtype)), exact.nextafter(-torch.tensor(math.inf, dtype=dtype))]
    )


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_it_rounds_to_the_nearest_of_its_levels_and_to_nothing_else(number_format: Format, dtype: torch.dtype) -> None:
    check_format(number_format)
    x, levels = around(number_format.levels, dtype), torch.tensor(number_format.levels, dtype=dtype)
    found = number_format.round(x)
    assert found.dtype is dtype
    finite = x.isfinite()
    nearest = (x[finite, None] - levels).abs().amin(1)
    rounding = 2 * torch.finfo(dtype).eps if isinstance(number_format, Levels) else 0.0  # a middle that is no number itself
    torch.testing.assert_close((x - found).abs()[finite], nearest, rtol=0, atol=rounding)
    assert set(found.tolist()) == set(number_format.levels)
    assert math.isnan(number_format.round(torch.tensor([math.nan], dtype=dtype)).item())


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_levels_have_codes_of_their_own_in_as_many_bits_as_it_says(number_format: Format) -> None:
    levels = torch.tensor(number_format.levels)
    codes = number_format.encode(levels)
    assert codes.unique().numel() == len(number_format.levels) <= 2**number_format.bits
    assert int(codes.to(torch.int16).max()) < 2**number_format.bits
    assert torch.equal(number_format.decode(codes), levels)


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_what_is_in_range_is_what_rounding_leaves_within_half_a_step(number_format: Format) -> None:
    x = around(number_format.levels, torch.float32)
    levels = number_format.levels
    low, high = levels[0] - (levels[1] - levels[0]) / 2, levels[-1] + (levels[-1] - levels[-2]) / 2
    assert torch.equal(number_format.covers(x), (x >= low) & (x <= high))


@pytest.mark.parametrize(("number_format", "dtype"), [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)], ids=str)
def test_floats_of_eight_bits_are_torchs_own_bit_for_bit(number_format: Float, dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(dtype).float()
    every = every[every.isfinite()]
    assert set(every.tolist()) == set(number_format.levels)
    exponent = torch.randint(-22, 18, (20_000,), generator=torch.Generator().manual_seed(0))
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(1)) * torch.exp2(exponent.float())
    x = torch.cat([x, around(number_format.levels, torch.float32)]).clamp(-number_format.highest, number_format.highest)
    assert torch.equal(number_format.round(x), x.to(dtype).float())
    assert torch.equal(number_format.encode(number_format.round(x)), x.to(dtype).view(torch.uint8))


def test_the_small_floats_have_the_levels_of_the_mx_specification() -> None:
    assert E2M1.magnitudes == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert E2M3.magnitudes[:9] == tuple(i / 8 for i in range(9))
    assert (E2M3.limits, E3M2.limits, E4M3.limits, E5M2.limits) == ((-7.5, 7.5), (-28, 28), (-448, 448), (-57344, 57344))
    assert E2M1.encode(torch.tensor([-0.0, 0.0, 0.5, -6.0])).tolist() == [8, 0, 1, 15]


def test_ties_go_to_the_even_code() -> None:
    assert E2M1.round(torch.tensor([0.25, 0.75, 1.25, 2.5, 5.0])).tolist() == [0, 1, 1, 2, 4]
    assert Integer(3).round(torch.tensor([0.5, 1.5, 2.5, -0.5])).tolist() == [0, 2, 2, 0]
    assert SEQ2.round(torch.tensor([-1.0, 0.0, 1.0])).tolist() == [-1.5, 0.5, 0.5]  # codes 0, 2, 2
    assert nearest_level(torch.tensor([0.0]), BINARY.levels).tolist() == [-1]  # code 0


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=20, unique=True))
def test_any_list_of_levels_is_a_format(values: list[float]) -> None:
    levels = Levels(tuple(sorted(values)))
    check_format(levels)
    assert levels.bits == (len(values) - 1).bit_length()
    assert format_of(levels.name) == levels


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ((1.0,), "2 to 256 levels, not 1"),
        (tuple(range(300)), "not 300"),
        ((0.0, 2.0, 1.0), "not in ascending order: 2, 1"),
        ((0.0, 1.0, 1.0), "repeat: 1, 1"),
        ((0.0, math.inf), "not all finite"),
    ],
)
def test_levels_that_contradict_themselves_are_refused(levels: tuple[float, ...], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Levels(levels)


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_a_name_gives_the_format_back(number_format: Format) -> None:
    assert format_of(number_format.name) == number_format


@pytest.mark.parametrize("name", ["e4m4", "int9", "uint4-narrow", "levels(1,a)", "levels()", ""])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(SpecError):
        format_of(name)


def test_a_format_that_rounds_to_what_is_no_level_is_refused_when_it_is_added() -> None:
    class Wrong(Format):
        name, bits, levels = "wrong-test", 2, (0.0, 1.0, 8.0)

        def round(self, v: Tensor) -> Tensor:
            return v.round()

        def encode(self, levels: Tensor) -> Tensor:
            return torch.zeros_like(levels, dtype=torch.uint8)

    with pytest.raises(SpecError, match=r"wrong-test: the level 1 is decoded as 0"):
        add_format(Wrong())
    with pytest.raises(SpecError):
        format_of("wrong-test")
