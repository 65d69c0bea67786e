"""The reference engine: exact thresholds, the converted model's answers, integers wherever the graph is integer."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pege_fx
from pege_fx import ConvertError, QuantPolicy, testing
from pege_fx.engines.accumulators import Accumulate, Requantize, first_reaching, thresholds
from pege_fx.engines.integer import integer_coverage, integer_engine

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def deployed(policy: str = "W4A4", method: str = "lsq", **options: Any) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3, groups=2), nn.ReLU6(),
        nn.Conv2d(4, 4, 1), nn.Hardtanh(), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    gm = pege_fx.prepare(testing.as_trained(model, 0).eval(), QuantPolicy.parse(policy, method=method), (X,))
    return pege_fx.convert(gm, **options)


scales = st.floats(2.0**-12, 4.0, width=32)


@given(
    scales,
    st.floats(-8, 8, width=32),
    scales,
    st.integers(-4, 4),
    st.sampled_from([(0.0, float("inf")), (0.0, 6.0), (-1.0, 1.0)]),
)
@settings(max_examples=max(100, settings.default.max_examples))
def test_a_threshold_is_where_exact_rounding_changes(a: float, b: float, s: float, m: int, clip: tuple[float, float]) -> None:
    """round(clip(a n + b) / s) >= m from the threshold on, and not before: in rational arithmetic."""
    unit, bias, step = Fraction(a), Fraction(b), Fraction(s)

    def code(n: int) -> int:
        value = unit * n + bias
        if clip[1] != float("inf"):
            value = min(value, Fraction(clip[1]))
        return round(max(value, Fraction(clip[0])) / step)  # a Fraction rounds half to even

    scale, start = torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64)
    n = int(first_reaching((m - Fraction(1, 2)) * step, m % 2 == 0, [clip], scale, start))
    if n == 2**31:
        assert code(2**31 - 1) < m
    elif n == -(2**31):
        assert code(-(2**31)) >= m
    else:
        assert code(n) >= m > code(n - 1)


def test_thresholds_halfway_between_codes_round_to_even() -> None:
    half, zero = torch.tensor([0.5], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    rows = thresholds(half, zero, [], [torch.tensor(1.0)], bits=2, signed=False)
    assert rows is not None
    step = Requantize(rows, -1, 0, torch.uint8)
    values = torch.arange(-2, 9)
    assert step(values[None]).flatten().tolist() == (values * 0.5).round().clamp(0, 3).tolist()


@pytest.mark.parametrize("options", [{}, {"packed": True}, {"integer_bias": True}])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("method", ["lsq", "minmax", "pact", "interval"])
def test_the_engine_gives_the_model_s_answers(method: str, bits: int, options: dict[str, bool]) -> None:
    model = deployed(f"W{bits}A{bits}", method, **options)
    engine = integer_engine(model)
    torch.testing.assert_close(engine(X).float(), model(X), rtol=1e-5, atol=1e-5)
    coverage = integer_coverage(engine)
    if method != "interval":  # its zero points lie between codes
        assert (coverage.layers, coverage.integer_layers, coverage.steps, coverage.integer_steps) == (4, 4, 3, 3)


@pytest.mark.filterwarnings("ignore:nothing is quantized")
@given(testing.networks(), testing.policies(method="lsq"))
def test_any_network_has_an_engine(case: testing.Case, policy: QuantPolicy) -> None:
    model = pege_fx.convert(pege_fx.prepare(case.network, policy, tuple(case.inputs)).eval())
    engine = integer_engine(model)
    expected, result = model(*case.inputs), engine(*case.inputs)
    steps = [float(value) for name, value in model.named_buffers() if "fq_scale" in name] or [1.0]
    # a tie that float32 breaks the other way moves one code, and what follows of it
    assert float(((result - expected).abs() > 1e-3 * max(steps)).double().mean()) < 0.05


def test_nothing_between_the_layers_is_float() -> None:
    engine = integer_engine(deployed())
    kinds = [type(engine.get_submodule(str(node.target))).__name__ for node in engine.graph.find_nodes(op="call_module")]
    assert kinds == ["Accumulate", "Requantize", "OnIntegers", "Accumulate", "Requantize", "Accumulate", "Requantize",
                     "OnIntegers", "Accumulate", "Rescale"]  # fmt: skip
    seen: list[torch.dtype] = []
    for module in engine.modules():
        if isinstance(module, (Accumulate, Requantize)):
            module.register_forward_hook(lambda m, args, result: seen.append(result.dtype))
    engine(X)
    assert set(seen) == {torch.int32, torch.int8, torch.uint8}


def test_products_of_activations_and_what_stays_float() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.matmul(self.q(x), self.k(x).transpose(-2, -1)) + x.mean()

    x = torch.randn(2, 5, 8)
    model = pege_fx.convert(pege_fx.prepare(Attention().eval(), "W4A4", (x,)))
    engine = integer_engine(model)
    torch.testing.assert_close(engine(x).float(), model(x), rtol=1e-5, atol=1e-5)
    assert str(integer_coverage(engine)).startswith("3 of 3 layers sum in int32")


def test_an_accumulator_that_overflows_is_said() -> None:
    layer = Accumulate(nn.functional.linear, [0, 0])
    codes = torch.full((1, 140_000), 127, dtype=torch.int8)
    with pytest.raises(ConvertError, match="does not fit in 32 bits"):
        layer(codes, codes)


def test_the_model_is_left_alone() -> None:
    model = deployed()
    before = str(model.graph)
    integer_engine(model)
    assert str(model.graph) == before
    assert model(X).dtype is torch.float32
