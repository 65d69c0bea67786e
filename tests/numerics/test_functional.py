"""The arithmetic against what it must equal: grids, masks, and every row of the gradient table.

References are written out in plain torch operations, or Python integers, and share no code with ``pege_fx.functional``.
"""

import contextlib
import dataclasses
import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from pege_fx import QuantSpec, SpecError
from pege_fx.kernels.inductor import eager_kernels
from pege_fx.numerics.formats import Integer
from pege_fx.numerics.functional import (
    Estimator,
    codes_of,
    dequantize,
    discretization_error,
    fake_quantize,
    mix32,
    quantize,
    refresh_key,
    replacement_mask,
    site_key,
    uniform,
)
from pege_fx.numerics.spec import ESTIMATORS as KNOWN

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def key_of(value: int) -> Tensor:
    return torch.tensor((value + 2**31) % 2**32 - 2**31, dtype=torch.int32)


# --- masks -------------------------------------------------------------------------------------------------------


def hashed(value: int) -> int:
    """lowbias32's finalizer with its improved constants, on a non-negative Python integer."""
    value %= 2**32
    value ^= value >> 16
    value = value * 0x21F0AAAD % 2**32
    value ^= value >> 15
    value = value * 0xD35A2D97 % 2**32
    return value ^ value >> 15


def expected_hash(number: int, key: int) -> int:
    """What the kernels compute, in Python integers: the mixer on a golden-ratio sequence, with the key between its rounds."""
    golden = 0x9E3779B9
    value = (number + key) * golden % 2**32
    value ^= value >> 16
    value = value * 0x21F0AAAD % 2**32
    value ^= value >> 15 ^ key * golden % 2**32
    value = value * 0xD35A2D97 % 2**32
    return value ^ value >> 15


def mask_of(key: int, rate: float, shape: tuple[int, ...]) -> Tensor:
    """The mask, element by element in Python integers."""
    bound = float(torch.tensor(rate))  # a rate is a float32
    bits = [(expected_hash(i, key) >> 8) / 2**24 < bound for i in range(math.prod(shape))]
    return torch.tensor(bits, dtype=torch.bool).view(shape)


@given(st.integers(-(2**33), 2**33))
def test_the_mixer_is_the_published_one(value: int) -> None:
    assert mix32(value) == hashed(value)


@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.lists(st.integers(0, 5), max_size=4).map(tuple))
def test_masks_are_what_python_integers_give(key: int, rate: float, shape: tuple[int, ...]) -> None:
    got = replacement_mask(key_of(key), torch.tensor(rate), shape)
    assert got.dtype == torch.bool
    assert torch.equal(got, mask_of(key, rate, shape))


@given(st.integers(0, 2**32 - 1), st.integers(1, 300))
def test_u_is_the_upper_bits_of_the_mixed_number_of_the_element(key: int, count: int) -> None:
    upper = [expected_hash(i, key) >> 8 for i in range(count)]
    assert torch.equal(uniform(key_of(key), (count,)) * 2**24, torch.tensor(upper, dtype=torch.float32))


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**31 - 1))
def test_a_part_of_something_larger_has_its_elements_numbered_on(key: int, first: int) -> None:
    part = uniform(torch.stack([key_of(key), key_of(first)]), (7,))
    upper = [expected_hash(first + i, key) >> 8 for i in range(7)]
    assert torch.equal(part * 2**24, torch.tensor(upper, dtype=torch.float32))


REFRESH = [0, -1000140750, 968997276]
SITES = [1089608612, 2145660694, 2140880540]


def test_keys_are_what_they_were_in_every_saved_run() -> None:
    assert [refresh_key(count) for count in range(3)] == REFRESH
    assert [site_key(0, "conv1.weight_fq"), site_key(1, "conv1.weight_fq"), site_key(-1, "")] == SITES


def test_u_lies_in_the_unit_interval_in_steps_that_float32_holds() -> None:
    u = uniform(key_of(5), (1 << 18,))
    assert u.dtype == torch.float32
    assert u.min() >= 0
    assert u.max() < 1
    steps = u.double() * 2**24
    assert torch.equal(steps, steps.round())


def test_rates_of_zero_and_one_are_exact() -> None:
    assert not replacement_mask(key_of(1), torch.tensor(0.0), (100_000,)).any()
    assert replacement_mask(key_of(1), torch.tensor(1.0), (100_000,)).all()


N = 100_000


def within(count: float, n: float, p: float) -> bool:
    """Within five standard deviations of a binomial."""
    return abs(count - n * p) <= 5 * math.sqrt(n * p * (1 - p))


@given(st.integers(0, 2**31), st.text(max_size=20), st.integers(0, 10_000), st.floats(0.01, 0.99))
def test_the_replaced_share_is_binomial(seed: int, site: str, refresh: int, rate: float) -> None:
    key = key_of(site_key(seed, site) ^ refresh_key(refresh))
    assert within(int(replacement_mask(key, torch.tensor(rate), (N,)).sum()), N, rate)


def together(a: Tensor, b: Tensor, p: float) -> bool:
    """Whether two masks coincide as often as independent ones of rate p do."""
    return within(int((a & b).sum()), a.numel(), p * p)


KEYS = st.tuples(st.integers(0, 2**31), st.sampled_from(["conv1.weight_fq", "conv2.weight_fq", "fc_fq"]), st.integers(0, 500))


@given(KEYS, KEYS, st.floats(0.2, 0.8))
def test_masks_of_different_seeds_sites_and_refreshes_are_independent(
    one: tuple[int, str, int], other: tuple[int, str, int], rate: float
) -> None:
    assume(one != other)
    a, b = (
        replacement_mask(key_of(site_key(seed, site) ^ refresh_key(refresh)), torch.tensor(rate), (N,))
        for seed, site, refresh in (one, other)
    )
    assert together(a, b, rate)


@pytest.mark.parametrize(
    ("one", "other"),
    [((0, "a", 0), (0, "b", 0)), ((0, "a", 0), (1, "a", 0)), ((0, "a", 0), (0, "a", 1)), ((7, "x", 3), (7, "x", 4))],
)
def test_neighbouring_keys_give_uncorrelated_u(one: tuple[int, str, int], other: tuple[int, str, int]) -> None:
    a, b = (uniform(key_of(site_key(seed, site) ^ refresh_key(t)), (N,)).double() for seed, site, t in (one, other))
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 5 / math.sqrt(N)


@pytest.mark.parametrize("lag", [1, 2, 3, 8, 9, 64, 1024])
def test_elements_of_one_mask_are_independent_at_every_stride(lag: int) -> None:
    m = replacement_mask(key_of(site_key(0, "conv")), torch.tensor(0.3), (N,))
    assert together(m[lag:], m[:-lag], 0.3)


def spectrum(seed: int, site: str, refresh: int) -> Tensor:
    u = uniform(key_of(site_key(seed, site) ^ refresh_key(refresh)), (1 << 22,)) - 0.5
    return torch.fft.rfft(u)


def largest_correlation(pairs: list[tuple[Tensor, Tensor]], first_lag: int) -> float:
    """The largest |r| at lags up to 2**16, of the mean over pairs of sequences: 32 million elements at each lag."""
    products = torch.stack([a * b.conj() for a, b in pairs]).mean(0)
    return float((torch.fft.irfft(products)[first_lag : 1 << 16] * 12 / (1 << 22)).abs().max())


def test_elements_of_one_mask_are_uncorrelated_at_every_lag() -> None:
    found = [spectrum(*of) for of in itertools.product((0, 7), ("conv1.weight_fq", "conv2.weight_fq"), (0, 1))]
    assert largest_correlation([(one, one) for one in found], 1) < 1e-3


@pytest.mark.parametrize("other", [(0, "layer.0", 1), (0, "layer.1", 0), (1, "layer.0", 0)])
def test_neighbouring_refreshes_sites_and_seeds_are_uncorrelated_at_every_lag(other: tuple[int, str, int]) -> None:
    around = [(other[0] + 10 * n, f"{n}.{other[1]}", other[2] + 10 * n) for n in range(4)]
    at = [(10 * n, f"{n}.layer.0", 10 * n) for n in range(4)]
    pairs = [(spectrum(*one), spectrum(*two)) for one, two in zip(at, around, strict=True)]
    both_ways = [*pairs, *((two, one) for one, two in pairs)]
    assert max(largest_correlation([pair], 0) for pair in both_ways) < 3.5e-3  # seven standard deviations


def test_two_raw_keys_do_not_give_one_sequence_moved_along() -> None:
    one, other = (torch.fft.rfft(uniform(key_of(key), (1 << 22,)) - 0.5) for key in (0, 1))
    assert largest_correlation([(one, other)], 0) < 3.5e-3
    assert largest_correlation([(other, one)], 0) < 3.5e-3


@pytest.mark.parametrize("key", [0, 12345, 2**31 + 5])
def test_a_rate_between_two_steps_of_u_replaces_the_lower_one(key: int) -> None:
    u = uniform(key_of(key), (1 << 16,))
    low = int(u.argmin())  # small enough for half a step more to be a float32
    for rate in (float(u[low]) + 2.0**-25, float(u[low]) + 2.0**-30):
        assert float(torch.tensor(rate)) > float(u[low])
        assert bool(replacement_mask(key_of(key), torch.tensor(rate), u.shape)[low])
    assert not bool(replacement_mask(key_of(key), u[low], u.shape)[low])


@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0, 1))
def test_masks_of_one_key_only_grow_with_the_rate(key: int, one: float, other: float) -> None:
    small, large = (replacement_mask(key_of(key), torch.tensor(p), (999,)) for p in sorted((one, other)))
    assert bool((large | ~small).all())


def test_keys_differ_between_sites_seeds_and_refreshes() -> None:
    keys = [site_key(seed, f"layer{i}") for seed in range(20) for i in range(20)] + [refresh_key(i) for i in range(400)]
    assert len(set(keys)) == len(keys)
    assert all(-(2**31) <= key < 2**31 for key in keys)


# --- the grid ----------------------------------------------------------------------------------------------------


@st.composite
def grids(draw: st.DrawFn) -> QuantSpec:
    signed = draw(st.booleans())
    return QuantSpec(bits=draw(st.integers(2, 8)), signed=signed, narrow=signed and draw(st.booleans()))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, QuantSpec]:
    """x of any dtype, and a scale per tensor or per channel, with or without zero points."""
    spec = draw(grids())
    channels = draw(st.sampled_from([0, 1, 3]))  # 0: per tensor
    shape = (max(channels, 1), draw(st.integers(1, 6)))
    values = st.floats(-400, 400, width=32).filter(lambda v: v == 0 or abs(v) > 1e-6)
    x = torch.tensor(draw(st.lists(values, min_size=math.prod(shape), max_size=math.prod(shape)))).view(shape)
    one_scale = st.floats(2**-6, 8, width=32)
    size = max(channels, 1)
    scale = torch.tensor(draw(st.lists(one_scale, min_size=size, max_size=size)))
    zero = None
    if draw(st.booleans()):
        zero = torch.tensor(draw(st.lists(st.integers(*spec.bounds), min_size=size, max_size=size)), dtype=torch.float32)
    if channels:
        scale, zero = scale.view(-1, 1), None if zero is None else zero.view(-1, 1)
    else:
        scale, zero = scale.squeeze(), None if zero is None else zero.squeeze()
    return x.to(draw(st.sampled_from(DTYPES))), scale, zero, spec


def grid_of(x: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor:
    """Every value that an element of x may become, in a new last dimension, in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    codes = torch.arange(spec.bounds[0], spec.bounds[1] + 1, dtype=wide)
    offsets = codes if zero is None else codes - zero.unsqueeze(-1)
    return (scale.unsqueeze(-1).to(wide) * offsets).expand(*x.shape, -1)


@given(cases())
def test_fake_quantize_lands_on_the_grid(case: tuple[Tensor, Tensor, Tensor | None, QuantSpec]) -> None:
    x, scale, zero, spec = case
    y = fake_quantize(x, scale, spec, zero_point=zero)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    grid = grid_of(x, scale, zero, spec).to(x.dtype)
    assert bool((y.unsqueeze(-1) == grid).any(-1).all())


@given(cases())
def test_fake_quantize_takes_the_nearest_value_of_the_grid(case: tuple[Tensor, Tensor, Tensor | None, QuantSpec]) -> None:
    x, scale, zero, spec = case
    grid = grid_of(x, scale, zero, spec)
    nearest = (x.unsqueeze(-1).to(grid.dtype) - grid).abs().amin(-1)
    x_q = fake_quantize(x.to(grid.dtype), scale, spec, zero_point=zero)
    # Two values can be equally near, and rounding in x / s can decide: 4 ulp of x.
    slack = 4 * torch.finfo(grid.dtype).eps * (x.to(grid.dtype).abs() + grid.abs().amax(-1))
    assert bool(((x_q - x).abs() <= nearest + slack).all())
    assert torch.equal(fake_quantize(x, scale, spec, zero_point=zero), x_q.to(x.dtype))


@given(cases())
def test_fake_quantize_twice_equals_once(case: tuple[Tensor, Tensor, Tensor | None, QuantSpec]) -> None:
    x, scale, zero, spec = case
    if zero is not None or spec.bounds[1] > 127:
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # bfloat16 can not tell so many steps apart
    once = fake_quantize(x, scale, spec, zero_point=zero)
    assert torch.equal(fake_quantize(once, scale, spec, zero_point=zero), once)


# 8 significant bits (bfloat16) can not tell the 256 values of an unsigned 8-bit grid apart.
GRIDS = [
    (d, b, sign) for d in DTYPES for b in (2, 3, 8) for sign in (True, False) if (d, b, sign) != (torch.bfloat16, 8, False)
]


@pytest.mark.parametrize(("dtype", "bits", "signed"), GRIDS)
def test_every_value_of_the_grid_is_a_fixed_point_and_there_are_no_others(dtype: torch.dtype, bits: int, signed: bool) -> None:
    spec, scale = QuantSpec(bits=bits, signed=signed), torch.tensor([[0.37], [1.0], [0.013]])
    codes = torch.arange(spec.bounds[0], spec.bounds[1] + 1).to(torch.promote_types(dtype, torch.float32))
    grid = (scale.to(codes.dtype) * codes).to(dtype)
    assert torch.equal(fake_quantize(grid, scale, spec), grid)
    dense = torch.linspace(-400, 400, 3001).to(dtype) * scale.to(dtype)
    y = fake_quantize(dense, scale, spec)
    for row in range(3):
        assert torch.equal(y[row].unique(), grid[row].unique())


@given(cases())
def test_a_channel_is_quantized_as_if_it_were_alone(case: tuple[Tensor, Tensor, Tensor | None, QuantSpec]) -> None:
    x, scale, zero, spec = case
    y = fake_quantize(x, scale, spec, zero_point=zero)
    for row in range(len(x)):
        s, z = (None if v is None else v if v.ndim == 0 else v[row, 0] for v in (scale, zero))
        assert s is not None
        assert torch.equal(y[row], fake_quantize(x[row], s, spec, zero_point=z))


@given(cases())
def test_a_negative_scale_mirrors_the_grid(case: tuple[Tensor, Tensor, Tensor | None, QuantSpec]) -> None:
    x, scale, zero, spec = case
    assert torch.equal(fake_quantize(x, -scale, spec, zero_point=zero), -fake_quantize(-x, scale, spec, zero_point=zero))


@given(cases())
def test_codes_and_their_values_are_fake_quantize(case: tuple[Tensor, Tensor, Tensor | None, QuantSpec]) -> None:
    x, scale, zero, spec = case
    signed = bool(spec.signed)
    codes = quantize(x, scale, zero, bits=spec.bits, signed=signed, narrow=spec.narrow)
    assert codes.dtype == (torch.int8 if signed else torch.uint8)
    assert spec.bounds[0] <= int(codes.min())
    assert int(codes.max()) <= spec.bounds[1]
    assert torch.equal(codes, codes_of(x, scale, spec.number_format, zero).to(codes.dtype))
    wide = scale.to(torch.promote_types(x.dtype, torch.float32))
    value = dequantize(codes, wide, zero, bits=spec.bits, dtype=x.dtype)
    assert torch.equal(value, fake_quantize(x, scale, spec, zero_point=zero))


@pytest.mark.parametrize(
    ("options", "ends"),
    [({"signed": True}, [-4, 3]), ({"signed": True, "narrow": True}, [-3, 3]), ({"signed": False}, [0, 7])],
)
def test_codes_reach_both_ends_of_their_grid(options: dict[str, bool], ends: list[int]) -> None:
    assert quantize(torch.tensor([-99.0, 99.0]), torch.tensor(1.0), bits=3, **options).tolist() == ends


def test_a_packed_sequence_stays_one() -> None:
    packed = pack_padded_sequence(torch.randn(3, 2, 4), torch.tensor([2, 3]), enforce_sorted=False)
    scale = torch.tensor(0.25)
    codes = quantize(packed, scale, bits=4, signed=True)  # type: ignore[arg-type]
    values = dequantize(codes, scale, bits=4, dtype=torch.float64)
    assert isinstance(codes, PackedSequence)
    assert isinstance(values, PackedSequence)
    assert torch.equal(codes.data, quantize(packed.data, scale, bits=4, signed=True))
    assert torch.equal(values.data, dequantize(codes.data, scale, bits=4, dtype=torch.float64))
    assert values.data.dtype == torch.float64
    for found in (codes, values):
        assert torch.equal(found.batch_sizes, packed.batch_sizes)
        assert torch.equal(found.unsorted_indices, packed.unsorted_indices)


def test_an_estimator_without_a_name_is_known_to_no_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KNOWN, "_classes", dict(before := KNOWN._classes))

    class Base(Estimator):
        """What others derive from."""

    assert list(KNOWN) == list(before)

    class Derived(Base, name="derived-example"):
        @staticmethod
        def gradient(grad: Tensor, x: Tensor, y: Tensor, keep: Tensor, span: Tensor, strength: Tensor) -> Tensor:
            return 3 * grad

    x = torch.randn(5, requires_grad=True)
    fake_quantize(x, torch.tensor(0.5), QuantSpec(bits=3, estimator="derived-example")).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [3.0] * 5


def test_an_interval_shifts_and_scales_before_rounding() -> None:
    x = torch.linspace(-3, 3, 41, dtype=torch.float64)
    lower, width = torch.tensor(-1.0), torch.tensor(2.0)
    got = codes_of(x, torch.tensor(1 / 3), Integer(2, signed=False), interval=(lower, width))
    want = torch.clamp(torch.round((x + 1) / 2 / float(torch.tensor(1 / 3))), 0, 3)
    assert torch.equal(got, want)
    assert torch.equal(quantize(x, torch.tensor(1 / 3), None, lower, width, bits=2, signed=False), want.to(torch.uint8))


def test_channels_on_the_second_axis_of_a_square_weight_are_not_taken_for_rows() -> None:
    # A transposed convolution's weight, large enough for a compiled kernel.
    torch.manual_seed(0)
    x, scale = torch.randn(64, 64, 2, 2), torch.rand(1, 64, 1, 1) + 0.1
    y = fake_quantize(x, scale, QuantSpec(bits=3))
    for channel in (0, 1, 63):
        assert torch.equal(y[:, channel], fake_quantize(x[:, channel], scale[0, channel, 0, 0], QuantSpec(bits=3)))


# --- replacement -------------------------------------------------------------------------------------------------


@given(cases(), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_an_element_is_quantized_where_the_mask_says_and_untouched_elsewhere(
    case: tuple[Tensor, Tensor, Tensor | None, QuantSpec], rate: float, key: int
) -> None:
    x, scale, zero, spec = case
    y = fake_quantize(x, scale, spec, zero_point=zero, rate=torch.tensor(rate), key=key_of(key))
    x_q = fake_quantize(x, scale, spec, zero_point=zero)
    assert torch.equal(y, torch.where(mask_of(key, rate, tuple(x.shape)), x_q, x))


def test_the_mask_does_not_depend_on_the_memory_format() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 7)
    rate, key, scale = torch.tensor(0.5), key_of(3), torch.tensor(0.3)
    plain = fake_quantize(x, scale, QuantSpec(bits=3), rate=rate, key=key)
    assert not torch.equal(plain, x)
    for other in (x.to(memory_format=torch.channels_last), x.transpose(0, 3).contiguous().transpose(0, 3)):
        assert not other.is_contiguous()
        assert torch.equal(fake_quantize(other, scale, QuantSpec(bits=3), rate=rate, key=key), plain)


# The compiler of torch 2.11 uses what torch 2.11 deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mask_values_and_gradients_are_the_same_when_compiled() -> None:
    torch.manual_seed(0)
    key, rate = key_of(site_key(0, "conv")), torch.tensor(0.4)
    x, scale = torch.randn(4, 3, 5, 7), torch.rand(4, 1, 1, 1) + 0.1

    def run(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = fake_quantize(x, scale, QuantSpec(bits=3), rate=rate, key=key, strength=torch.tensor(0.1))
        return y, uniform(key, x.shape), replacement_mask(key, rate, x.shape)

    results = []
    for function in (run, torch.compile(run, fullgraph=True)):
        a, s = x.clone().requires_grad_(), scale.clone().requires_grad_()
        y, u, mask = function(a, s)
        y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
        results.append((y.detach(), u, mask, a.grad, s.grad))
    (y, u, mask, grad_x, grad_s), compiled = results
    assert torch.equal(compiled[1], u)
    assert torch.equal(compiled[2], mask)
    assert torch.equal(compiled[2], mask_of(int(key), 0.4, tuple(x.shape)))
    assert torch.equal(compiled[0] != x, y != x)
    torch.testing.assert_close(compiled[0], y)
    torch.testing.assert_close(compiled[3], grad_x)
    torch.testing.assert_close(compiled[4], grad_s)


# torch 2.11 gave zero gradients behind whatever came back under a second name, as ``y.to(y.dtype)`` does.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("estimator", ["ste", "ewgs", "pege", "pege-relative", "pege-share"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_at_complete_replacement_are_the_same_when_compiled(
    dtype: torch.dtype, estimator: str, recompute: bool
) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    x, scale, grad = torch.randn(6, 8).to(dtype), torch.rand(6, 1) + 0.1, torch.randn(6, 8).to(dtype)
    spec, strength = QuantSpec(bits=3, estimator=estimator), torch.tensor(0.1)

    def run(x: Tensor, scale: Tensor) -> Tensor:
        return fake_quantize(x, scale, spec, strength=strength, recompute=recompute)

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        a, s = x.clone().requires_grad_(), scale.clone().requires_grad_()
        function(a, s).backward(grad)
        assert a.grad is not None
        assert s.grad is not None
        results.append((a.grad, s.grad))
    torch.compiler.reset()
    assert (results[0][1] != 0).any()
    torch.testing.assert_close(results[1], results[0])


# --- gradients: the table of DESIGN.md, section 2 ----------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One discretizer in float64, on elements that meet every cell of the table."""

    x: Tensor
    scale: Tensor
    zero: Tensor | None
    spec: QuantSpec
    mask: Tensor
    key: Tensor
    rate: Tensor
    strength: float

    @property
    def in_range(self) -> Tensor:
        codes = torch.round(self.x / self.scale) + (0 if self.zero is None else self.zero)
        return (codes >= self.spec.bounds[0]) & (codes <= self.spec.bounds[1])

    def of(self, x: Tensor, scale: Tensor) -> Tensor:
        strength = torch.tensor(self.strength, dtype=torch.float64)
        return fake_quantize(
            x, scale, self.spec, zero_point=self.zero, rate=self.rate, key=self.key, strength=strength
        )  # fmt: skip

    def straight_through(self, x: Tensor, scale: Tensor) -> Tensor:
        """x_q with the gradient of rounding taken as 1 in range; autograd does the rest, for x and for the scale."""
        zero = 0.0 if self.zero is None else self.zero
        v = x / scale
        codes = torch.round(v).detach() + zero
        inside = v + (codes - v).detach()
        return (torch.where(self.in_range, inside, codes.clamp(*self.spec.bounds)) - zero) * scale


ESTIMATORS = ["ste", "ewgs", "pege", "pege-relative", "pege-share"]
LAYOUTS = ["tensor", "channel", "mirrored"]


def setting(estimator: str, layout: str, *, signed: bool = True, zeros: bool = False, seed: int = 0) -> Setting:
    torch.manual_seed(seed)
    spec = QuantSpec(bits=3, signed=signed, estimator=estimator)
    x = 2.5 * torch.randn(6, 40, dtype=torch.float64)
    scale = torch.tensor(0.61, dtype=torch.float64)
    if layout != "tensor":
        scale = 0.3 + 0.5 * torch.rand(6, 1, dtype=torch.float64)
    if layout == "mirrored":
        scale = scale * torch.tensor([1.0, -1, 1, -1, -1, 1], dtype=torch.float64).view(-1, 1)
    zero = torch.randint(*spec.bounds, scale.shape).double() if zeros else None
    key = site_key(seed, estimator)
    mask = mask_of(key, 0.6, tuple(x.shape))
    return Setting(x, scale, zero, spec, mask, key_of(key), torch.tensor(0.6), 0.07)


def loss_of(y: Tensor) -> Tensor:
    """Smooth, with gradients of both signs."""
    return torch.sin(y).sum() + (0.1 * y * torch.arange(y.numel(), dtype=y.dtype).view_as(y).cos()).sum()


def gradients(case: Setting) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, g, dL/dx and dL/ds of the library."""
    x, scale = case.x.clone().requires_grad_(), case.scale.clone().requires_grad_()
    y = case.of(x, scale)
    y.retain_grad()
    loss_of(y).backward()
    assert y.grad is not None
    assert x.grad is not None
    assert scale.grad is not None
    return y.detach(), y.grad, x.grad, scale.grad


def share_of(g: Tensor, error: Tensor, keep: Tensor) -> Tensor:
    """λ for a share of one."""
    return (keep * g).abs().sum() / error.abs().sum()


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_cell_of_the_gradient_table(estimator: str, layout: str, signed: bool, zeros: bool) -> None:
    case = setting(estimator, layout, signed=signed, zeros=zeros)
    y, g, grad, _ = gradients(case)
    x, m, r, strength = case.x, case.mask, case.in_range, case.strength
    x_q = case.straight_through(x, case.scale)
    torch.testing.assert_close(y, torch.where(m, x_q, x))
    width = case.scale.abs() * (case.spec.bounds[1] - case.spec.bounds[0])
    replaced = {
        "ste": r * g,
        "ewgs": r * g * (1 + strength * torch.sign(g) * (x / width - x_q / width)),
        "pege": r * g + strength * (x - x_q),
        "pege-relative": r * g + strength * g.abs().mean() * (x - x_q),
        "pege-share": r * g + strength * share_of(g, x - y, r | ~m) * (x - x_q),
    }[estimator]
    for cell in (m & r, m & ~r, ~m & r, ~m & ~r):
        assert int(cell.sum()) >= 5
        torch.testing.assert_close(grad[cell], torch.where(m, replaced, g)[cell], rtol=1e-12, atol=1e-12)
    if estimator != "ste":  # what tells the estimators apart is not nothing
        assert (grad - torch.where(m, r * g, g)).abs().max() > 1e-3


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_are_those_of_the_loss_written_out(estimator: str, layout: str, signed: bool, zeros: bool) -> None:
    case = setting(estimator, layout, signed=signed, zeros=zeros, seed=1)
    _, g, grad_x, grad_s = gradients(case)
    x, scale = case.x.clone().requires_grad_(), case.scale.clone().requires_grad_()
    m = case.mask.double()
    y = m * case.straight_through(x, scale) + (1 - m) * x
    error = x - y.detach()  # x_c - y with y held constant; zero where nothing was replaced
    loss = loss_of(y)
    if estimator == "pege":
        loss = loss + case.strength / 2 * error.square().sum()
    if estimator == "pege-relative":
        loss = loss + case.strength * g.abs().mean() / 2 * error.square().sum()
    if estimator == "pege-share":
        keep = case.in_range | ~case.mask
        loss = loss + case.strength * share_of(g, error.detach(), keep) / 2 * error.square().sum()
    if estimator == "ewgs":
        width = (case.scale * (case.spec.bounds[1] - case.spec.bounds[0])).abs()
        pull = case.in_range * case.strength * g.abs() * (error / width).detach()
        loss = loss + (pull * x).sum()
    loss.backward()
    torch.testing.assert_close(grad_x, x.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad_s, scale.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_scale_gradient_is_lsqs_on_the_replaced_elements(estimator: str, layout: str) -> None:
    # Esser et al., equation 3: round(v) - v in range, q_min below it, q_max above it.
    case = setting(estimator, layout, seed=2)
    _, g, _, grad_s = gradients(case)
    v = case.x / case.scale
    q_min, q_max = case.spec.bounds
    slope = torch.where(v.round() < q_min, q_min, torch.where(v.round() > q_max, q_max, v.round() - v))
    want = (g * slope * case.mask).sum_to_size(case.scale.shape)
    torch.testing.assert_close(grad_s, want, rtol=1e-12, atol=1e-12)


def slope_of(loss: torch.nn.Module | object, value: Tensor, step: float = 1e-6) -> Tensor:
    """Central differences of a function, element by element."""
    assert callable(loss)
    slopes = torch.zeros_like(value)
    for i in range(value.numel()):
        shift = torch.zeros_like(value)
        shift.view(-1)[i] = step
        slopes.view(-1)[i] = (loss(value + shift) - loss(value - shift)) / (2 * step)
    return slopes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_untouched_elements_have_the_gradient_of_finite_differences(estimator: str, layout: str) -> None:
    case = setting(estimator, layout, seed=3)
    _, _, grad, _ = gradients(case)
    with torch.no_grad():
        slopes = slope_of(lambda x: loss_of(case.of(x, case.scale)), case.x)
    torch.testing.assert_close(grad[~case.mask], slopes[~case.mask], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scale_and_input_gradients_together_are_finite_differences_on_fixed_codes(layout: str, zeros: bool) -> None:
    # x = s * v keeps every code while s moves: there the function is smooth, and STE's chain rule has to be exact.
    case = setting("ste", layout, zeros=zeros, seed=4)
    v = case.x / case.scale
    scale = case.scale.clone().requires_grad_()
    loss_of(case.of(v * scale, scale)).backward()
    with torch.no_grad():
        slopes = slope_of(lambda s: loss_of(case.of(v * s, s)), case.scale)
    torch.testing.assert_close(scale.grad, slopes, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_out_of_range_elements_move_with_the_scale_as_finite_differences_say(estimator: str) -> None:
    case = setting(estimator, "tensor", seed=5)
    beyond = case.x.abs() > 4.5 * case.scale  # 3 bits: codes -4 ... 3
    x, scale = case.x[beyond].clone(), case.scale.clone().requires_grad_()
    assert x.numel() > 10
    loss_of(fake_quantize(x, scale, case.spec)).backward()
    with torch.no_grad():
        slope = slope_of(lambda s: loss_of(fake_quantize(x, s, case.spec)), case.scale)
    torch.testing.assert_close(scale.grad, slope, rtol=1e-6, atol=1e-6)


def test_peges_pull_is_the_finite_difference_of_the_discretization_error() -> None:
    case = setting("pege", "channel", seed=6)
    y, g, grad, _ = gradients(case)
    r_or_not_m = case.in_range | ~case.mask
    with torch.no_grad():
        pull = slope_of(lambda x: case.strength / 2 * (x - y).square().sum(), case.x)
    torch.testing.assert_close(grad - r_or_not_m * g, pull, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_without_strength_every_estimator_is_ste(estimator: str) -> None:
    case = setting(estimator, "channel", seed=7)
    found = []
    for spec in (case.spec, QuantSpec(bits=3, signed=True, estimator="ste")):
        x = case.x.clone().requires_grad_()
        loss_of(fake_quantize(x, case.scale, spec, rate=case.rate, key=case.key)).backward()
        found.append(x.grad)
    assert torch.equal(found[0], found[1])


@given(cases(), st.floats(0, 10), st.floats(-20, 20))
def test_a_share_is_a_share_of_the_gradient_whatever_its_size(
    case: tuple[Tensor, Tensor, Tensor | None, QuantSpec], share: float, size: float
) -> None:
    x, scale, zero, spec = case
    spec = dataclasses.replace(spec, estimator="pege-share")
    x, scale = x.double().requires_grad_(), scale.double()
    g = 2.0**size * torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = [
        torch.autograd.grad(fake_quantize(x, scale, spec, zero_point=zero, strength=torch.tensor(s)), x, g)[0]
        for s in (0.0, share)
    ]
    term = found[1] - found[0]
    with torch.no_grad():
        error = (x - fake_quantize(x, scale, spec, zero_point=zero)).abs().sum()
    wanted = share * found[0].abs().sum() if error > 1e-300 else torch.zeros(())
    torch.testing.assert_close(term.abs().sum(), wanted.double(), rtol=1e-5, atol=1e-9 * float(g.abs().sum()))


INFINITY = float("inf")
STRENGTHS = (0.0, 0.1, INFINITY)


@pytest.mark.parametrize(
    ("estimator", "value", "how"),
    [
        *itertools.product(
            ("pege", "ewgs", "pege-relative", "pege-share"), (INFINITY, -INFINITY, math.nan, 3e38), ("plain", "kernel")
        ),
        ("pege", INFINITY, "compiled"),
        ("pege", math.nan, "compiled"),
    ],
)
def test_strength_adds_nothing_to_what_is_not_replaced_or_is_not_asked_for(estimator: str, value: float, how: str) -> None:
    x = torch.tensor([value, 1.25, -0.5, 7.0])

    def gradients(name: str, rate: float, strength: float) -> tuple[Tensor, ...]:
        a, scale = x.clone().requires_grad_(), torch.tensor(1.0, requires_grad=True)
        spec = QuantSpec(bits=4, estimator=name)
        options = {"rate": torch.tensor(rate), "key": key_of(3), "strength": torch.tensor(strength)}
        call = torch.compile(fake_quantize) if how == "compiled" else fake_quantize
        with eager_kernels() if how == "plain" else contextlib.nullcontext():
            return torch.autograd.grad(call(a, scale, spec, **options), (a, scale), torch.tensor([0.5, -1.0, 2.0, 0.25]))

    cases = [(0.0, strength) for strength in STRENGTHS] + [(1.0, 0.0)]
    for rate, strength in cases:
        for found, wanted in zip(gradients(estimator, rate, strength), gradients("ste", rate, 0.0), strict=True):
            assert torch.equal(found, wanted)
            assert bool(found.isfinite().all())
    if abs(value) == INFINITY:
        grad, scale = gradients(estimator, 0.0, 0.1)
        assert grad.tolist() == [0.5, -1.0, 2.0, 0.25]
        assert scale == 0


@pytest.mark.parametrize("plain", [False, True])
def test_ties_are_rounded_to_even(plain: bool) -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5])
    with eager_kernels() if plain else contextlib.nullcontext(), torch.no_grad():
        assert fake_quantize(2 * x, torch.tensor(2.0), QuantSpec(bits=4)).tolist() == [0, 4, 4, 0, -4, -4, 8]


def test_where_a_replaced_value_is_out_of_range_the_scales_gradient_does_not_read_it() -> None:
    for value in (100.0, 3e38, INFINITY):
        scale = torch.tensor(2.0, requires_grad=True)
        for sign, end in ((1, 7), (-1, -8)):
            y = fake_quantize(torch.tensor([sign * value], requires_grad=True), scale, QuantSpec(bits=4))
            assert torch.autograd.grad(y, scale, torch.tensor([0.5])) == (torch.tensor(0.5 * end),)


def test_the_bounds_themselves_are_in_range() -> None:
    # r = 1[q_min <= round(x/s) + z <= q_max], closed on both sides and up to half a step beyond.
    x = torch.tensor([-2.51, -2.49, -2.0, 1.0, 1.49, 1.51], dtype=torch.float64, requires_grad=True)
    fake_quantize(x, torch.tensor(1.0, dtype=torch.float64), QuantSpec(bits=2, estimator="ste")).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_dtype_of_their_tensor_and_are_computed_in_float32(estimator: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # Integers: what half types lose is then the result's rounding alone.
    x = torch.randint(-12, 12, (3, 50)).to(dtype).requires_grad_()
    scale = torch.tensor([[2.0], [3.0], [1.0]]).requires_grad_()
    spec, strength = QuantSpec(bits=3, estimator=estimator), torch.tensor(0.125)
    y = fake_quantize(x, scale, spec, rate=torch.tensor(0.5), key=key_of(9), strength=strength)
    y.backward(torch.ones_like(y))
    wide = x.detach().double().requires_grad_()
    wide_scale = scale.detach().double().requires_grad_()
    wide_y = fake_quantize(wide, wide_scale, spec, rate=torch.tensor(0.5), key=key_of(9), strength=strength)
    wide_y.backward(torch.ones_like(wide_y))
    assert x.grad is not None
    assert scale.grad is not None
    assert x.grad.dtype == dtype
    assert scale.grad.dtype == torch.float32
    torch.testing.assert_close(y.double(), wide_y)
    assert wide.grad is not None
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(scale.grad.double(), wide_scale.grad, rtol=1e-5, atol=1e-5)


def test_the_scale_gradients_factor_touches_nothing_else() -> None:
    case = setting("pege", "channel", seed=8)
    found = []
    for factor in (1.0, 0.25):
        x, scale = case.x.clone().requires_grad_(), case.scale.clone().requires_grad_()
        loss_of(fake_quantize(x, scale, case.spec, scale_gradient=factor)).backward()
        found.append((x.grad, scale.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1] * 0.25, found[1][1])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_discretizer_can_be_differentiated_twice(estimator: str) -> None:
    # EWGS estimates the trace of the Hessian. With L = ||y||^2 / 2, g = y: STE's second derivative is r times y's own.
    case = setting(estimator, "tensor", seed=9)
    x = case.x.clone().requires_grad_()
    y = case.of(x, case.scale)
    (first,) = torch.autograd.grad(y.square().sum() / 2, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.isfinite(second).all()
    if estimator == "ste":
        torch.testing.assert_close(second, (case.in_range | ~case.mask).double())


@given(st.integers(0, 3).map(lambda i: DTYPES[i]), st.integers(0, 2**16))
def test_discretization_error_is_the_squared_distance_with_y_constant(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    x, y = torch.randn(7).to(dtype).requires_grad_(), torch.randn(7).to(dtype).requires_grad_()
    error = discretization_error(x, y)
    assert error.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(
        error.double(), sum((a - b) ** 2 for a, b in zip(x.double(), y.double(), strict=True)), rtol=1e-6, atol=0
    )
    error.backward()
    assert y.grad is None
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * (x - y).detach(), rtol=0.02, atol=0.02)


def test_discretization_error_of_what_was_not_replaced_is_nothing() -> None:
    x = torch.tensor([INFINITY, -INFINITY, math.nan, 1.5], requires_grad=True)
    y = torch.tensor([INFINITY, -INFINITY, math.nan, 1.0])
    error = discretization_error(x, y)
    assert error == 0.25
    assert torch.autograd.grad(error, x)[0].tolist() == [0, 0, 0, 1]


def test_what_belongs_to_one_call_has_a_name() -> None:
    x, scale, spec = torch.randn(4), torch.tensor(0.5), QuantSpec(bits=3)
    named = fake_quantize(spec=spec, scale=scale, x=x, zero_point=torch.tensor(1.0))
    assert torch.equal(named, fake_quantize(x, scale, spec, zero_point=torch.tensor(1.0)))
    with pytest.raises(TypeError, match="positional"):
        fake_quantize(x, scale, spec, torch.tensor(1.0))  # type: ignore[misc]


# --- what is refused ---------------------------------------------------------------------------------------------


def test_integers_can_not_be_quantized() -> None:
    with pytest.raises(SpecError, match=r"can not quantize a torch\.int64 tensor: give a floating-point one"):
        fake_quantize(torch.arange(3), torch.tensor(1.0), QuantSpec(bits=2))


def test_a_rate_without_a_key_is_refused() -> None:
    with pytest.raises(SpecError, match="rate needs key: give both"):
        fake_quantize(torch.zeros(3), torch.tensor(1.0), QuantSpec(bits=2), rate=torch.tensor(0.5))


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (2, 0, 4)])
def test_empty_and_scalar_tensors_pass(shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 0.7, requires_grad=True)
    y = fake_quantize(x, torch.tensor(0.5), QuantSpec(bits=4), rate=torch.tensor(1.0), key=key_of(0))
    assert torch.equal(y, torch.full(shape, 0.5))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
