"""docs/numbers.md: what every forward method and estimator does with numbers, shapes and layouts at the edge."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pege_fx
from pege_fx import ModelError, PEGEScheduler, QuantPolicy, QuantSpec, Rule, fake_quants
from pege_fx.kernels.inductor import eager_kernels
from pege_fx.modules.fake_quant import FakeQuant, ScheduleState, Site
from pege_fx.numerics.functional import dequantize, quantize
from pege_fx.numerics.spec import Channels
from pege_fx.testing import tensors

METHODS = ("lsq", "pact", "dorefa", "interval", "minmax")
ESTIMATORS = ("pege", "ste", "ewgs", "pege-relative", "pege-share")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def plain() -> Iterator[None]:
    with eager_kernels():
        yield


def site(spec: QuantSpec, kind: Any = "activation", weight: Tensor | None = None, rate: float = 1.0) -> FakeQuant:
    schedule = ScheduleState("default")
    schedule.rate.fill_(rate)
    schedule.weight_lambda.fill_(0.1)
    schedule.activation_lambda.fill_(0.1)
    resolved = spec.resolve(kind, non_negative=False)
    channels = None if weight is None else Channels(weight.shape[0])
    return FakeQuant(Site(name="a_fq", kind=kind, spec=resolved, rule=""), schedule, seed=0, weight=weight, channels=channels)


def ran(fq: FakeQuant, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The result in training, the gradients of its sum for ``x``, and for the parameters."""
    x = x.detach().requires_grad_()
    y = fq.train()(x)
    y.sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad, {name: p.grad for name, p in fq.named_parameters() if p.grad is not None}


SPECS = st.builds(
    QuantSpec,
    bits=st.sampled_from([2, 4, 8]),
    method=st.sampled_from(METHODS),
    estimator=st.sampled_from(ESTIMATORS),
    granularity=st.sampled_from(["tensor", "channel"]),
)


@given(st.data(), SPECS, st.sampled_from(DTYPES), st.sampled_from([1.0, 0.5, 0.0]))
@settings(max_examples=max(150, settings.default.max_examples))
def test_finite_values_have_finite_results_and_gradients_whatever_is_beside_them(
    data: st.DataObject, spec: QuantSpec, dtype: torch.dtype, rate: float
) -> None:
    x = data.draw(tensors((3, 5), dtype, hostile=True))
    fq = site(QuantSpec(**vars(spec) | {"granularity": "tensor"}), rate=rate)
    y, gradient, by_parameter = ran(fq, x)
    finite = x.isfinite() & (x.abs() <= torch.finfo(dtype).max / 2)  # the nearest multiple of a step is at most twice as large
    assert y.dtype == dtype
    assert bool(y[finite].isfinite().all())
    assert all(bool(p.isfinite().all()) for p in fq.parameters())
    if spec.estimator != "pege-relative" or bool(finite.all()):
        assert bool(gradient[finite].isfinite().all())
    if bool(finite.all()) and x.abs().max() <= 1e4:
        assert all(bool(value.isfinite().all()) for value in by_parameter.values())
    with torch.no_grad():
        deployed = fq.eval()(x)
    assert bool(deployed[finite].isfinite().all())


@given(st.data(), SPECS, st.sampled_from(DTYPES))
@settings(max_examples=max(100, settings.default.max_examples))
def test_finite_weights_have_finite_results_and_gradients(data: st.DataObject, spec: QuantSpec, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max / 2
    weight = data.draw(tensors((3, 5), dtype, hostile=True).filter(lambda x: bool((x.abs() <= largest).all())))
    y, gradient, _ = ran(site(spec, "weight", weight), weight)
    assert bool(y.isfinite().all())
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_weights_that_are_not_finite_are_refused_before_they_set_a_grid(method: str, value: float) -> None:
    weight = torch.tensor([[1.0, value], [0.5, 2.0]])
    with pytest.raises(ModelError, match="a has values that are not finite"):
        site(QuantSpec(bits=4, method=method), "weight", weight)(weight)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [True, False])
def test_nan_stays_nan_and_infinity_is_the_outermost_value(method: str, training: bool) -> None:
    fq = site(QuantSpec(bits=4, method=method, granularity="tensor")).train(training)
    fq.initialize_from(torch.linspace(-2, 2, 100))
    with torch.no_grad():
        y = fq(torch.tensor([NAN, INF, -INF, 1e30, -1e30, 0.3]))
        alone = fq(torch.tensor([0.3]))
    assert y.isnan().tolist() == [True, False, False, False, False, False]
    assert y[1] == y[3]
    assert y[2] == y[4]
    if method != "minmax" or not training:  # a running range has seen the other values
        assert y[5] == alone


def test_a_code_of_nan_is_a_code() -> None:
    """int8 has no NaN: what a converted model makes of it is one of the codes, whichever."""
    codes = quantize(torch.tensor([NAN, INF, -INF]), torch.tensor(0.5), bits=3, signed=True)
    assert codes.dtype == torch.int8
    assert codes[1:].tolist() == [3, -4]
    assert dequantize(codes, torch.tensor(0.5), bits=3).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_zeros_are_zeros_and_their_gradients_are_of_ordinary_size(method: str, dtype: torch.dtype, granularity: Any) -> None:
    """DoReFa's weights have no zero among their values: the nearest one is 1 / (2^bits - 1)."""
    weight = torch.zeros(2, 3, dtype=dtype)
    y, gradient, _ = ran(site(QuantSpec(bits=4, method=method, granularity=granularity), "weight", weight), weight)
    nearest = {"dorefa": 1 / 15, "interval": 1 / 15}.get(method, 0.0)
    torch.testing.assert_close(y.abs(), torch.full_like(y, nearest), rtol=0.01, atol=0.0)
    assert float(gradient.abs().max()) <= 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_do_not_overflow_inside(method: str, dtype: torch.dtype) -> None:
    """Codes, scales and sums are float32: 4096 values near the largest one would overflow in float16."""
    x = torch.full((64, 64), torch.finfo(dtype).max / 2, dtype=dtype)
    y, gradient, by_parameter = ran(site(QuantSpec(bits=8, method=method, granularity="tensor")), x)
    assert bool(y.isfinite().all())
    assert bool(gradient.isfinite().all())
    if dtype == torch.float16:
        assert all(bool(value.isfinite().all()) for value in by_parameter.values())


SHAPES = [(0, 3), (1, 3), (2, 1), (2, 0, 3), (0,), (1,), (), (1, 1, 1, 1), (0, 4, 5, 5), (2, 4, 0, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_any_shape_goes_through(shape: tuple[int, ...], method: str, estimator: str) -> None:
    spec = QuantSpec(bits=4, method=method, estimator=estimator, granularity="tensor")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    fq = site(spec, rate=0.5)
    y, gradient, by_parameter = ran(fq, x)
    assert y.shape == gradient.shape == x.shape
    assert all(bool(value.isfinite().all()) for value in (y, gradient, *by_parameter.values()))
    with torch.no_grad():
        assert fq.eval()(x).shape == x.shape


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_outputs_is_prepared_trained_and_converted(method: str, granularity: Any) -> None:
    spec = QuantSpec(bits=4, method=method)
    policy = QuantPolicy((Rule(weight=QuantSpec(bits=4, method=method, granularity=granularity), input=spec),))
    gm = pege_fx.prepare(nn.Sequential(nn.Linear(5, 0)), policy, (torch.randn(2, 5),))
    gm(torch.randn(3, 5)).sum().backward()
    gm.eval()
    assert pege_fx.convert(gm)(torch.randn(3, 5)).shape == gm(torch.randn(3, 5)).shape == (3, 0)


@pytest.mark.parametrize(("transposed", "groups"), [(False, 1), (True, 1), (True, 2)])
def test_rows_of_weights_without_elements(transposed: bool, groups: int) -> None:
    weight = torch.zeros(4, 0, 3) if not transposed else torch.zeros(0, 2, 3)
    channels = Channels(2 * groups, axis=1, groups=groups) if transposed else Channels(4)
    assert channels.rows(weight).shape == (channels.count, 0)


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "strided": lambda x: torch.stack([x, -x], -1).flatten(3)[..., ::2],
    "sliced": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["activation", "weight"])
@given(data=st.data())
@settings(max_examples=settings.default.max_examples // 2)
def test_the_layout_of_memory_changes_nothing(layout: str, method: str, kind: Any, data: st.DataObject) -> None:
    x = data.draw(tensors((3, 4, 2, 5)))
    other = LAYOUTS[layout](x)
    assert torch.equal(x, other)
    spec = QuantSpec(bits=3, method=method, granularity="tensor")
    found = []
    for value in (x, other):
        fq = site(spec, kind, x if kind == "weight" else None, rate=0.5)
        fq.initialize_from(x)  # a sum over another layout may differ in the last place
        found.append(ran(fq, value))
    (y, gradient, parameters), (z, other_gradient, other_parameters) = found
    assert torch.equal(y, z)
    torch.testing.assert_close(gradient, other_gradient, rtol=1e-4, atol=1e-6)
    for name, value in parameters.items():
        torch.testing.assert_close(value, other_parameters[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_an_expanded_tensor_is_what_it_looks_like(method: str) -> None:
    x = torch.randn(3, 1, 4, generator=torch.Generator().manual_seed(0)).expand(3, 5, 4)
    spec = QuantSpec(bits=3, method=method, granularity="tensor")
    for result, dense in zip(ran(site(spec, rate=0.5), x)[:2], ran(site(spec, rate=0.5), x.contiguous())[:2], strict=True):
        assert torch.equal(result, dense)


@pytest.mark.parametrize("method", METHODS)
def test_a_meta_tensor_has_a_shape_and_calibrates_nothing(method: str) -> None:
    fq = site(QuantSpec(bits=4, method=method, granularity="tensor")).to("meta")
    for training in (True, False):
        y = fq.train(training)(torch.empty(2, 3, device="meta"))
        assert y.is_meta
        assert y.shape == (2, 3)
    assert not fq.is_calibrated


def test_a_model_on_the_meta_device_is_prepared_and_filled_later() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))

    x = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    empty = pege_fx.prepare(model().to("meta"), "W4A4", (x.to("meta"),))
    assert empty(x.to("meta")).shape == (5, 2)
    assert not any(fq.is_calibrated for fq in fake_quants(empty).values())


def test_a_model_in_half_keeps_rate_and_lambda_in_float32() -> None:
    gm = pege_fx.prepare(nn.Sequential(nn.Linear(4, 4)), "W4A4", (torch.randn(2, 4),))
    scheduler = PEGEScheduler(gm, 10)
    gm.half()
    schedule = next(iter(fake_quants(gm).values())).schedule
    for _ in range(3):
        assert schedule.rate.item() == torch.tensor(scheduler.rate).item()
        found = schedule.weight_lambda.item(), schedule.activation_lambda.item()
        assert found == tuple(torch.tensor(scheduler.lambdas).tolist())
        assert found[0] > 0
        scheduler.step()
    y = gm(torch.randn(2, 4).half())
    assert y.dtype == torch.float16
    assert bool(y.isfinite().all())


def test_a_policy_in_any_language_survives_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = QuantPolicy((Rule(match="слой.λ", weight="4"),))
    path = tmp_path / "policy.toml"
    policy.to_toml(path)
    assert "слой.λ" in path.read_bytes().decode("utf-8")
    assert QuantPolicy.from_toml(path) == policy


def test_the_page_speaks_of_every_method() -> None:
    page = (Path(__file__).parents[1] / "docs" / "numbers.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(\w+)`", page)) >= {"lsq", "pact", "dorefa", "interval", "minmax"}
