"""The kernels written by hand, held against plain operations: those in C; with TRITON_INTERPRET=1 those in Triton.

Triton's interpreter runs its kernels without a GPU. ``test_triton_kernels.py`` starts this in a process with it.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pege_fx import PegeWarning, QuantSpec, functional, kernels
from pege_fx.kernels import c_kernels, inductor
from pege_fx.numerics import discretizer
from pege_fx.numerics.discretizer import discretizers_of
from pege_fx.numerics.functional import Estimator

IS_TRITON = "TRITON_INTERPRET" in os.environ
if IS_TRITON:
    from triton.runtime import interpreter

    from pege_fx.kernels import triton_kernels
elif c_kernels.library() is None:
    pytest.skip("no C compiler here", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities

DTYPES = triton_kernels.DTYPES if IS_TRITON else c_kernels.DTYPES
RATE = torch.tensor(0.5)
PART = torch.tensor([-99, 2**31 - 1000], dtype=torch.int32)
KEYS = {"0-d": PART[0], "a part": PART}  # what lies behind the first is none of its business
launches: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def by_hand() -> Iterator[None]:
    """Launches are noted. Under Triton, a CPU tensor gets here what a CUDA tensor gets in eager mode."""
    with pytest.MonkeyPatch.context() as patch:
        if IS_TRITON:
            interpret(patch)
        else:
            compiled = c_kernels.library()
            assert compiled is not None
            noted = SimpleNamespace(
                pege_fx_forward=lambda *args: launches.append("forward") or compiled.pege_fx_forward(*args),
                pege_fx_backward=lambda *args: launches.append("backward") or compiled.pege_fx_backward(*args),
            )
            patch.setattr(c_kernels, "library", lambda: noted)
        yield


def interpret(patch: pytest.MonkeyPatch) -> None:
    """The interpreter rounds as a device does: a fused multiply-add once, and to nearest in bfloat16."""

    def truncated(self: Any, x: Any, target: Any) -> Any:
        if target.scalar.name != "bf16":
            return self.cast_impl(x, target)
        bits = torch.from_numpy(np.array(x.data)).to(torch.bfloat16).view(torch.int16)
        return interpreter.TensorHandle(bits.numpy().view(np.uint16), target.scalar)

    def fused(_: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return interpreter.TensorHandle(exact.astype(np.float32), z.dtype.scalar)

    def noted(kernel: Any, *args: Any) -> bool:
        launches.append(kernel.fn.__name__.removeprefix("_"))
        return ran(kernel, *args)

    ran = triton_kernels._ran
    patch.setattr(interpreter.InterpreterBuilder, "create_fma", fused)
    patch.setattr(interpreter.InterpreterBuilder, "create_fp_trunc", truncated)
    patch.setattr(discretizer, "backend_for", lambda x: triton_kernels if inductor.fits_a_kernel(x) else None)
    patch.setattr(triton_kernels, "_ran", noted)


@pytest.fixture(autouse=True)
def _nothing_launched() -> None:
    launches.clear()


def ran(x: Tensor, scale: Tensor, spec: QuantSpec, grad: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    a, s = x.detach().requires_grad_(), scale.detach().requires_grad_()
    y = functional.fake_quantize(a, s, spec, strength=torch.tensor(1e-2), **options)
    if grad is None:
        grad = torch.empty_like(y).copy_(torch.linspace(-1, 1, y.numel()).view(y.shape))
    return y.detach(), *torch.autograd.grad(y, (a, s), grad)


def check(x: Tensor, scale: Tensor, spec: QuantSpec, **options: Any) -> None:
    found = ran(x, scale, spec, **options)
    assert launches == ["forward", "backward"]
    with kernels.eager_kernels():
        wanted = ran(x, scale, spec, **options)
    assert launches == ["forward", "backward"]
    assert torch.equal(found[0], wanted[0])
    assert [t.dtype for t in found] == [t.dtype for t in wanted]
    assert found[0].stride() == found[1].stride() == x.stride()
    assert found[2].shape == scale.shape
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if x.dtype is torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(found[1], wanted[1], **(tolerance if IS_TRITON else {"rtol": 0, "atol": 0}))
    torch.testing.assert_close(found[2], wanted[2], rtol=1e-4, atol=1e-4)


LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Any]] = {
    "one number": ((), (), None),
    "one element": ((1,), (1,), None),
    "flat": ((7, 5), (), None),
    "as large as a tile": ((2048,), (), None),
    "larger than a tile": ((3, 1367), (1, 1), None),
    "rows": ((4, 3, 2), (4, 1, 1), None),
    "rows longer than a tile": ((2, 2049), (2, 1), None),
    "rows longer than a piece": ((2, 4097), (2, 1), None),
    "several pieces": ((3, 4096), (), None),
    "rows of one": ((4,), (4,), None),
    "channels_last": ((2, 3, 5, 7), (), torch.channels_last),
    "channels_last, one image": ((1, 3, 4, 5), (1,), torch.channels_last),
    "channels_last, one channel": ((2, 1, 4, 5), (), torch.channels_last),
    "channels_last, several tiles of positions": ((2, 16, 13, 13), (), torch.channels_last),
    "channels_last, several tiles of channels": ((2, 2051, 1, 2), (), torch.channels_last),
    "channels_last, more channels than a piece holds": ((2, 4099, 1, 3), (), torch.channels_last),
    "channels_last, several pieces of positions": ((2, 3, 41, 67), (), torch.channels_last),
    "channels_last with rows": ((4, 3, 3, 3), (4, 1, 1, 1), torch.channels_last),
    "channels_last_3d": ((2, 3, 2, 3, 2), (), torch.channels_last_3d),
    "channels_last_3d with rows": ((2, 3, 2, 3, 2), (2, 1, 1, 1, 1), torch.channels_last_3d),
}


def numbers(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masked", [None, *KEYS])
@pytest.mark.parametrize("zero", [False, True])
def test_every_layout_gives_what_plain_operations_give(layout: str, masked: str | None, zero: bool) -> None:
    shape, scale_shape, memory = LAYOUTS[layout]
    x, scale = numbers(shape), numbers(scale_shape, 1).abs() + 0.1
    if memory is not None:
        x = x.contiguous(memory_format=memory)
    options: dict[str, Any] = {"zero_point": (numbers(scale_shape, 2) * 2).round()} if zero else {}
    if masked is not None:
        options |= {"rate": RATE, "key": KEYS[masked]}
    check(x, scale, QuantSpec(bits=3), **options)


@pytest.mark.parametrize("estimator", ["ste", "ewgs", "pege", "pege-relative", "pege-share"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "signed"), [(2, True), (8, False)])
def test_every_estimator_and_dtype(estimator: str, dtype: torch.dtype, bits: int, signed: bool) -> None:
    spec = QuantSpec(bits=bits, signed=signed, estimator=estimator)
    x, scale = numbers((3, 700)).to(dtype), numbers((3, 1), 1).abs() / bits + 0.02
    for s, options in itertools.product((scale, scale[0, 0], scale.to(dtype)), ({}, {"rate": RATE, "key": KEYS["0-d"]})):
        launches.clear()
        check(x, s, spec, **options)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, with the sign of zeros; all NaN are one."""
    both = torch.isnan(a) & torch.isnan(b)
    return torch.equal(torch.isnan(a), torch.isnan(b)) and torch.equal(
        a.float().view(torch.int32).masked_fill(both, 0), b.float().view(torch.int32).masked_fill(both, 0)
    )


def check_values(x: Tensor, scale: Tensor, spec: QuantSpec, zero_point: Tensor | None = None) -> None:
    with torch.no_grad():
        found = functional.fake_quantize(x, scale, spec, zero_point=zero_point)
        assert launches
        with kernels.eager_kernels():
            wanted = functional.fake_quantize(x, scale, spec, zero_point=zero_point)
    if spec.bounds[0] == 0:  # a processor's clamp may give either zero at an end of the grid that is zero
        found, wanted = found + 0.0, wanted + 0.0
    assert same_bits(found, wanted), (x, scale, found, wanted)


SPECIAL = (0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, -3e-39, 2.0**-61, 0.25, 0.5, -0.5, 1.5, -2.5, 3e4)
SPECIAL += (2.0**22 + 0.5, -(2.0**23) - 1, 2.0**31, 1e20, -3.4028235e38, float("inf"), float("-inf"), float("nan"))
SCALES = (1.0, -1.0, 0.1, 1 / 3, 2.0**-59, 2.0**-60, 2.0**-100, 1e-45, 0.0, -0.0, 2.0**59, 2.0**60, 3e38)
SCALES += (float("inf"), float("nan"))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero", [None, 0.0, -1.5, 2.0**21, -(2.0**23)])
def test_special_values_are_the_same_bit_for_bit(scale: float, dtype: torch.dtype, zero: float | None) -> None:
    ties = tuple(scale * (k + 0.5 - around) for k in range(-9, 9) for around in (0.0, zero or 0.0))
    x = torch.tensor(SPECIAL + ties).to(dtype)
    for spec in (QuantSpec(bits=2), QuantSpec(bits=8, signed=False)):
        check_values(x, torch.tensor(scale), spec, None if zero is None else torch.tensor(zero))


floats = st.floats(width=32)
near_ties = st.builds(lambda k, ulps: (k + 0.5) * (1 + ulps * 2.0**-23), st.integers(-300, 300), st.integers(-2, 2))


@given(
    st.lists(floats | near_ties, min_size=1, max_size=40),
    floats | st.floats(2.0**-7, 16, width=32),
    st.booleans(),
    st.booleans(),
)
def test_values_are_the_same_bit_for_bit(values: list[float], scale: float, in_units: bool, signed: bool) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    check_values(x * scale if in_units else x, torch.tensor(scale), QuantSpec(bits=8, signed=signed))


@given(st.lists(near_ties, min_size=300, max_size=300), st.floats(2.0**-50, 2.0**50, width=32))
def test_ties_are_where_a_correctly_rounded_division_has_them(values: list[float], scale: float) -> None:
    check_values(torch.tensor(values) * scale, torch.tensor(scale), QuantSpec(bits=8))


@pytest.mark.parametrize("rate", [0.0, 1e-44, 0.3, 1.0 - 2.0**-24, 1.0])
def test_rates_are_those_of_the_definition(rate: float) -> None:
    x, key = torch.full((5000,), 0.3), KEYS["0-d"]
    with torch.no_grad():
        y = functional.fake_quantize(x, torch.tensor(1.0), QuantSpec(bits=2), rate=torch.tensor(rate), key=key)
    assert launches
    assert torch.equal(y == 0, functional.replacement_mask(key, torch.tensor(rate), x.shape))


@pytest.mark.parametrize("part", [False, True])
def test_a_rate_between_two_steps_of_u_replaces_the_lower_one(part: bool) -> None:
    key = torch.tensor([5, 10**6], dtype=torch.int32) if part else torch.tensor(5, dtype=torch.int32)
    u = functional.uniform(key, (1 << 16,))
    low = int(u.argmin())
    for more, replaced in ((2.0**-30, 0.0), (2.0**-25, 0.0), (0.0, 0.25)):
        with torch.no_grad():
            x, rate = torch.full((1 << 16,), 0.25), u[low].clone() + more
            y = functional.fake_quantize(x, torch.tensor(1.0), QuantSpec(bits=2), rate=rate, key=key)
        assert launches
        assert float(y[low]) == replaced


@pytest.mark.parametrize("estimator", ["ste", "ewgs", "pege", "pege-relative", "pege-share"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strength", [0.0, 0.1])
def test_gradients_of_special_values_are_those_of_plain_operations(estimator: str, dtype: torch.dtype, strength: float) -> None:
    x = torch.tensor(SPECIAL * 40).to(dtype)  # replaced and not
    grad = numbers((x.numel(),)).to(dtype)

    def gradients() -> tuple[Tensor, ...]:
        a, scale = x.clone().requires_grad_(), torch.tensor(0.5, requires_grad=True)
        spec, options = QuantSpec(bits=4, estimator=estimator), {"rate": RATE, "key": KEYS["0-d"]}
        y = functional.fake_quantize(a, scale, spec, strength=torch.tensor(strength), **options)
        return torch.autograd.grad(y, (a, scale), grad)

    found = gradients()
    assert launches
    with kernels.eager_kernels():
        wanted = gradients()
    exact = {} if IS_TRITON else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(found[0], wanted[0], equal_nan=True, **exact)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-3, atol=1e-3)
    assert bool(found[1].isfinite())


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7F800001, -1])
def test_every_nan_of_float32_stays_one_in_a_half_type(bits: int) -> None:
    scale = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    for dtype in DTYPES[1:]:
        with torch.no_grad():
            y = functional.fake_quantize(torch.ones(9, dtype=dtype), scale, QuantSpec(bits=4))
        assert launches
        assert bool(y.isnan().all())


def test_where_a_replaced_value_is_out_of_range_the_scales_gradient_does_not_read_it() -> None:
    for value, end in ((100.0, 7), (-100.0, -8)):
        scale = torch.tensor(2.0, requires_grad=True)
        y = functional.fake_quantize(torch.full((64,), value, requires_grad=True), scale, QuantSpec(bits=4))
        assert torch.autograd.grad(y, scale, torch.ones(64)) == (torch.tensor(64.0 * end),)
        assert launches


def test_a_gradient_in_another_layout() -> None:
    x = numbers((2, 3, 4, 5)).contiguous(memory_format=torch.channels_last)
    for grad in (numbers((2, 3, 4, 5), 1), torch.ones(()).expand(2, 3, 4, 5), numbers((5, 4, 3, 2), 1).permute(3, 2, 1, 0)):
        launches.clear()
        check(x, torch.tensor(0.3), QuantSpec(bits=3), grad=grad, rate=RATE, key=KEYS["0-d"])


def test_made_again_in_backward() -> None:
    x, options = numbers((3, 50)), {"rate": RATE, "key": KEYS["0-d"]}
    for wanted, found in zip(
        ran(x, torch.tensor(0.3), QuantSpec(bits=3), **options),
        ran(x, torch.tensor(0.3), QuantSpec(bits=3), recompute=True, **options),
        strict=True,
    ):
        assert torch.equal(wanted, found)
    assert launches == ["forward", "backward", "forward", "forward", "backward"]


def test_nothing_hides_from_make_fx() -> None:
    x, scale = numbers((4, 6)), torch.tensor(0.3)
    traced = make_fx(lambda x: functional.fake_quantize(x, scale, QuantSpec(bits=3)))(x)
    assert not launches
    assert torch.equal(traced(-x), functional.fake_quantize(-x, scale, QuantSpec(bits=3)))


class Same(functional.PEGE):
    """A subclass without a name of its own; what it does is its own too."""


class Mine(Tensor):
    pass


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "float64": lambda: {"x": numbers((4, 6)).double()},
    "nothing": lambda: {"x": torch.zeros(0, 3)},
    "not dense": lambda: {"x": numbers((4, 12))[:, ::2]},
    "transposed": lambda: {"x": numbers((6, 4)).T},
    "a subclass of Tensor": lambda: {"x": numbers((4, 6)).as_subclass(Mine)},
    "columns": lambda: {"x": numbers((4, 6)), "scale": torch.rand(1, 6) + 0.1},
    "a scale that is not dense": lambda: {"x": numbers((4, 6)), "scale": (torch.rand(4, 2) + 0.1)[:, :1]},
    "a scale in float64": lambda: {"x": numbers((4, 6)), "scale": torch.tensor(0.3).double()},
    "a scale with more dimensions": lambda: {"x": numbers((6,)), "scale": torch.rand(1, 1) + 0.1},
    "a zero point for each row": lambda: {"x": numbers((4, 6)), "zero_point": torch.ones(4, 1)},
    "zero points as integers": lambda: {"x": numbers((4, 6)), "zero_point": torch.tensor(1)},
    "a rate for each row": lambda: {"x": numbers((4, 6)), "rate": torch.rand(4, 1)},
}


@pytest.mark.parametrize("case", CASES)
def test_what_they_do_not_serve_is_as_before(case: str) -> None:
    given_ = {"scale": torch.tensor(0.3), "rate": RATE, "key": KEYS["0-d"], **CASES[case]()}
    found = ran(spec=QuantSpec(bits=3), **given_)
    assert not [name for name in launches if case != "a rate for each row" or name == "forward"]
    with kernels.eager_kernels():
        wanted = ran(spec=QuantSpec(bits=3), **given_)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b) or case == "a rate for each row"  # whose backward is served: equal to rounding


def test_another_estimator_has_its_own_backward() -> None:
    gradient = discretizers_of(Same, None).ordinary.apply(
        x := numbers((4, 6)).requires_grad_(), torch.tensor(0.3), None, None, None, None, torch.tensor(0.1), -4, 3, 1.0, False
    )
    gradient.sum().backward()
    assert x.grad is not None
    assert launches == ["forward"]
    assert issubclass(Same, Estimator)


def test_a_second_derivative_and_several_gradients_at_once() -> None:
    x, scale = numbers((3, 5)).requires_grad_(), torch.tensor(0.3, requires_grad=True)
    y = functional.fake_quantize(x, scale, QuantSpec(bits=3, estimator="ewgs"), strength=torch.tensor(0.1))
    first = torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]
    assert first.requires_grad
    gradients = torch.stack([torch.ones(3, 5), numbers((3, 5))])
    several = torch.autograd.grad(y, x, gradients, is_grads_batched=True, retain_graph=True)
    assert launches == ["forward"]
    one = torch.autograd.grad(y, x, gradients[1])[0]
    assert launches == ["forward", "backward"]
    torch.testing.assert_close(several[0][1], one)


@pytest.mark.skipif("not IS_TRITON", reason="the kernels in C are compiled once: test_c_kernels.py")
@pytest.mark.parametrize("error", [RuntimeError("no C compiler found"), torch.OutOfMemoryError("no memory left")])
def test_without_a_compiler_there_is_one_warning_and_the_right_result(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        fn = staticmethod(lambda: None)

        def __getitem__(self, grid: Any) -> Any:
            raise error

    monkeypatch.setattr(triton_kernels, "_forward", Broken())
    monkeypatch.setattr(triton_kernels, "_usable", True)
    x, scale, spec = numbers((4, 6)), torch.tensor(0.3), QuantSpec(bits=3)
    if isinstance(error, torch.OutOfMemoryError):
        with pytest.raises(torch.OutOfMemoryError):
            functional.fake_quantize(x, scale, spec)
        assert triton_kernels._usable
        return
    with pytest.warns(PegeWarning, match="no C compiler found") as caught:
        found = [ran(x, scale, spec) for _ in range(2)]
    assert len(caught) == 1
    assert len(launches) == 1
    with kernels.eager_kernels():
        wanted = ran(x, scale, spec)
    assert all(torch.equal(a, b) for a, b in zip(found[1], wanted, strict=True))
