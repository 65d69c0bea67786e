"""Forward methods: each paper's formulas against plain torch operations, first values, gradients, scales that never fail."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pege_fx
from pege_fx import Constant, ForwardMethod, PEGEScheduler, QuantPolicy, QuantSpec, Rule, Statistics
from pege_fx.errors import ConvertError
from pege_fx.modules.fake_quant import FakeQuant, ScheduleState, Site
from pege_fx.modules.forward_method import LARGEST_SCALE, SMALLEST_SCALE, safe_scale
from pege_fx.numerics.spec import METHODS, Channels

METHOD_NAMES = ["lsq", "pact", "dorefa", "interval", "minmax"]


def make(method: str, x: Tensor, kind: str = "activation", **fields: Any) -> FakeQuant:
    """A fake-quant in training mode, initialised from x as ``prepare`` would."""
    spec = QuantSpec(method=method, **{"bits": 3, "estimator": "ste"} | fields)
    spec = spec.resolve(kind, non_negative=bool(x.numel() and x.min() >= 0))  # type: ignore[arg-type]
    site = Site(name="site", kind=kind, spec=spec, rule="rule 0")  # type: ignore[arg-type]
    weight = {"weight": x, "channels": Channels(x.shape[0])} if kind == "weight" else {}
    made = FakeQuant(site, ScheduleState("default"), seed=0, **weight)
    made.initialize(Statistics.of(x, made.method.channels))
    return made


def rounded(x: Tensor) -> Tensor:
    """Rounding with the gradient of the identity."""
    return x + (x.round() - x).detach()


def agree(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-5, atol=2e-5)


def both(fq: FakeQuant, x: Tensor, reference: Any) -> None:
    """Values and gradients, in x and in every parameter, of a fake-quant and of its formula in float64."""
    parameters = dict(fq.method.named_parameters())
    a, b = x.clone().requires_grad_(), x.double().requires_grad_()
    copies = {name: value.detach().double().requires_grad_() for name, value in parameters.items()}
    grad = torch.linspace(-1, 1.3, x.numel()).view(x.shape)
    y, want = fq(a), reference(b, **copies)
    y.backward(grad)
    want.backward(grad.double())
    factor = fq.method.scale_gradient(x)
    agree((y, a.grad), (want, b.grad))  # type: ignore[arg-type]
    for name, value in parameters.items():
        scaled = factor if name == "scale" else 1.0
        assert value.grad is not None
        assert copies[name].grad is not None
        assert value.grad.abs().max() > 1e-4
        agree((value.grad,), (scaled * copies[name].grad,))  # type: ignore[operator]


torch.manual_seed(0)
WEIGHT = torch.randn(4, 3, 3, 3) * torch.tensor([0.1, 0.5, 1.0, 3.0]).view(4, 1, 1, 1)
SIGNED = 2 * torch.randn(16, 5, 4)
POSITIVE = 2 * torch.randn(16, 5, 4).relu()


# --- LSQ ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lsq_starts_at_twice_the_mean_over_the_root_of_q_max(bits: int) -> None:
    weight = make("lsq", WEIGHT, "weight", bits=bits)
    q_max = 2 ** (bits - 1) - 1
    torch.testing.assert_close(weight.method.scale, 2 * WEIGHT.abs().mean((1, 2, 3)) / math.sqrt(q_max))
    whole = make("lsq", WEIGHT, "weight", bits=bits, granularity="tensor")
    torch.testing.assert_close(whole.method.scale[0], 2 * WEIGHT.abs().mean() / math.sqrt(q_max))
    activation = make("lsq", POSITIVE, bits=bits)
    torch.testing.assert_close(activation.method.scale[0], 2 * POSITIVE.mean() / math.sqrt(2**bits - 1))


def test_lsq_scales_its_gradient_by_the_root_of_n_times_q_max() -> None:
    assert make("lsq", WEIGHT, "weight").method.scale_gradient(WEIGHT) == pytest.approx(1 / math.sqrt(27 * 3))
    whole = make("lsq", WEIGHT, "weight", granularity="tensor")
    assert whole.method.scale_gradient(WEIGHT) == pytest.approx(1 / math.sqrt(4 * 27 * 3))
    activation = make("lsq", POSITIVE)
    for batch in (1, 16):  # of a sample, whatever the batch
        assert activation.method.scale_gradient(POSITIVE[:batch]) == pytest.approx(1 / math.sqrt(20 * 7))


@pytest.mark.parametrize(("x", "kind"), [(WEIGHT, "weight"), (SIGNED, "activation"), (POSITIVE, "activation")])
def test_lsq_is_its_formula(x: Tensor, kind: str) -> None:
    fq = make("lsq", x, kind)
    low, high = fq.site.spec.bounds

    def reference(x: Tensor, scale: Tensor) -> Tensor:
        s = scale.view(-1, *[1] * (x.ndim - 1)) if scale.ndim else scale
        v = x / s
        return s * torch.where(v.round() < low, low, torch.where(v.round() > high, high, rounded(v)))

    both(fq, x, reference)


# --- PACT --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4])
def test_pact_is_its_formula(bits: int) -> None:
    fq = make("pact", POSITIVE, bits=bits)
    fq.method.clip.data.fill_(1.7)
    levels = 2**bits - 1

    def reference(x: Tensor, clip: Tensor) -> Tensor:
        # The paper: y = clip(x, 0, a), y_q = round(y (2^k - 1) / a) a / (2^k - 1), dy_q / da = 1[x >= a].
        y = torch.where(x < 0, 0.0, torch.where(x >= clip, clip, x))
        return y + (torch.round(y * levels / clip) * clip / levels - y).detach()

    both(fq, POSITIVE, reference)


def test_signed_pact_clips_on_both_sides() -> None:
    fq = make("pact", SIGNED)
    fq.method.clip.data.fill_(1.7)

    def reference(x: Tensor, clip: Tensor) -> Tensor:
        y = torch.where(x <= -clip, -clip, torch.where(x >= clip, clip, x))
        return y + (torch.clamp(torch.round(y * 3 / clip), -4, 3) * clip / 3 - y).detach()

    both(fq, SIGNED, reference)


def test_the_clip_of_pact_gets_the_gradient_of_x_at_or_above_it() -> None:
    fq = make("pact", POSITIVE)
    fq.method.clip.data.fill_(6.0)
    x = torch.tensor([0.5, 5.9, 6.0, 6.1, 100.0], requires_grad=True)  # ReLU6 gives 6 itself
    grad = torch.tensor([1.0, 2, 4, 8, 16])
    fq(x).backward(grad)
    assert x.grad is not None
    assert x.grad.tolist() == [1, 2, 0, 0, 0]
    assert fq.method.clip.grad.item() == 4 + 8 + 16


def test_pact_starts_at_six_or_the_largest_value_where_that_is_less() -> None:
    assert make("pact", torch.tensor([0.0, 1.0, 40.0])).method.clip.item() == 6.0
    assert make("pact", torch.tensor([0.0, 1.0, 4.0])).method.clip.item() == 4.0
    signed = make("pact", SIGNED).method.clip
    torch.testing.assert_close(signed[0], 3 * SIGNED.std(unbiased=False), rtol=1e-4, atol=0)
    few = torch.tensor([-1.0, 1.0])  # three deviations are beyond every value
    assert make("pact", few).method.clip.item() == 1.0


# --- DoReFa ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_dorefa_weights_are_the_papers(bits: int) -> None:
    fq = make("dorefa", WEIGHT, "weight", bits=bits)
    levels = 2**bits - 1

    def reference(x: Tensor) -> Tensor:
        bent = torch.tanh(x)
        return 2 * rounded((bent / (2 * bent.abs().max()) + 0.5) * levels) / levels - 1

    both(fq, WEIGHT, reference)
    with torch.no_grad():
        assert fq(WEIGHT).abs().max().item() == pytest.approx(1.0)
        assert len(fq(WEIGHT).unique()) <= 2**bits


def test_dorefa_activations_are_clipped_to_the_unit_interval() -> None:
    fq = make("dorefa", POSITIVE)

    def reference(x: Tensor) -> Tensor:
        return rounded(x.clamp(0, 1) * 7) / 7

    both(fq, POSITIVE + 1e-3, reference)  # not at the clip's corner in 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_grid_of_dorefa_ends_at_one_in_half_types_too(dtype: torch.dtype) -> None:
    fq = make("dorefa", POSITIVE, bits=2).to(dtype)
    scale = fq.method.grid_of().scale
    assert scale.dtype == torch.float32
    assert scale.item() == pytest.approx(1 / 3, rel=1e-6)


# --- learned interval --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("x", "kind"), [(WEIGHT, "weight"), (SIGNED, "activation"), (POSITIVE, "activation")])
def test_the_interval_is_ewgss(x: Tensor, kind: str) -> None:
    fq = make("interval", x, kind)
    symmetric = kind == "weight" or bool(fq.site.spec.signed)
    with torch.no_grad():  # off its symmetric start, so that every parameter's gradient shows
        fq.method.lower.mul_(0.8).sub_(0.05)
        fq.method.upper.mul_(0.6)
        fq.method.output_scale.mul_(1.1)

    def reference(x: Tensor, lower: Tensor, upper: Tensor, output_scale: Tensor) -> Tensor:
        lower, upper, output_scale = (v.view(-1, *[1] * (x.ndim - 1)) if v.ndim else v for v in (lower, upper, output_scale))
        unit = rounded(((x - lower) / (upper - lower)).clamp(0, 1) * 7) / 7
        return output_scale * (2 * unit - 1 if symmetric else unit)

    both(fq, x, reference)


def test_the_interval_starts_at_three_deviations() -> None:
    weight = make("interval", WEIGHT, "weight").method
    deviation = WEIGHT.flatten(1).std(1, unbiased=False)
    for value, want in ((weight.upper, 3), (weight.lower, -3), (weight.output_scale, 3)):
        torch.testing.assert_close(value, want * deviation, rtol=1e-4, atol=0)
    unsigned = make("interval", POSITIVE).method
    half_normal = math.sqrt(1 - 2 / math.pi)  # the deviation of |x|, x standard normal
    assert unsigned.lower.item() == 0.0
    torch.testing.assert_close(unsigned.upper[0], 3 * POSITIVE.std(unbiased=False) / half_normal, rtol=1e-4, atol=0)
    assert unsigned.output_scale.item() == unsigned.upper.item()


@pytest.mark.parametrize(("x", "kind"), [(WEIGHT, "weight"), (SIGNED, "activation"), (POSITIVE, "activation")])
def test_the_interval_starts_as_the_identity_up_to_half_a_step(x: Tensor, kind: str) -> None:
    fq = make("interval", x, kind, bits=8)
    inside = x * 0.3
    span = (fq.method.upper - fq.method.lower).max().item()
    assert (fq(inside) - inside).abs().max().item() <= span / 255 / 2 * 1.001


# --- moving min-max ----------------------------------------------------------------------------------------------


def test_minmax_weights_take_the_range_of_the_moment() -> None:
    fq = make("minmax", WEIGHT, "weight")
    for weight in (WEIGHT, 5 * WEIGHT, 0.01 * WEIGHT):
        y = fq(weight)
        scale = weight.abs().amax((1, 2, 3), keepdim=True) / 3
        # Symmetric: the negative half has one code more.
        torch.testing.assert_close(y, torch.clamp(torch.round(weight / scale), -4, 3) * scale)


def test_minmax_activations_average_their_range_over_training_batches() -> None:
    batches = [SIGNED, SIGNED * 3 + 1, SIGNED * 0.5 - 2]
    fq = make("minmax", SIGNED)
    low, high = SIGNED.min(), SIGNED.max()
    for x in batches:
        fq(x)
        low, high = 0.9 * low + 0.1 * x.min(), 0.9 * high + 0.1 * x.max()
    torch.testing.assert_close(fq.method.low, low)
    torch.testing.assert_close(fq.method.high, high)
    scale = (high - low) / 7
    zero = -4 - torch.round(low / scale)
    y = torch.clamp(torch.round(SIGNED / scale) + zero, -4, 3)
    torch.testing.assert_close(fq.eval()(SIGNED), (y - zero) * scale)


def test_minmax_does_not_move_in_evaluation() -> None:
    fq = make("minmax", SIGNED).eval()
    before = fq.method.high.clone()
    fq(SIGNED * 100)
    assert torch.equal(fq.method.high, before)


def test_unsigned_minmax_is_the_maximum_over_the_codes() -> None:
    fq = make("minmax", POSITIVE)
    scale = POSITIVE.max() / 7
    torch.testing.assert_close(fq(POSITIVE), torch.round(POSITIVE / scale) * scale)


@given(st.floats(-50, 0), st.floats(0, 50), st.integers(2, 8))
def test_the_zero_point_of_minmax_makes_zero_exact(low: float, high: float, bits: int) -> None:
    fq = make("minmax", torch.tensor([low, high]), bits=bits, signed=True)
    assert fq(torch.zeros(3)).tolist() == [0, 0, 0]


# --- laws of every method ----------------------------------------------------------------------------------------

DATA = {
    "zeros": torch.zeros(6, 5),
    "one element": torch.tensor([[1.5]]),
    "one zero": torch.zeros(1, 1),
    "constant": torch.full((6, 5), 0.37),
    "negative constant": torch.full((6, 5), -2.5),
    "huge": torch.linspace(-1e38, 1e38, 30).view(6, 5),
    "huge positive": torch.linspace(0, 3e38, 30).view(6, 5),
    "denormal": torch.linspace(-1e-44, 1e-44, 30).view(6, 5),
    "tiny": torch.linspace(-1e-37, 1e-37, 30).view(6, 5),
    "with nan": torch.where(torch.arange(30) % 7 == 0, math.nan, torch.linspace(-1, 1, 30)).view(6, 5),
    "with inf": torch.where(torch.arange(30) % 7 == 0, math.inf, torch.linspace(-1, 1, 30)).view(6, 5),
    "all nan": torch.full((6, 5), math.nan),
    "minus inf": torch.full((6, 5), -math.inf),
    "one zero channel": torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) * (torch.arange(6) != 2).view(6, 1),
    "empty": torch.zeros(6, 0),
}


def positive_and_finite(fq: FakeQuant) -> bool:
    scales = (
        fq.method.grid_of()[0],
        fq.method.decoding().scale,
        fq.method.encoding().scale if fq.method.channels is None else None,
    )
    return all(bool((s > 0).all()) and bool(torch.isfinite(s).all()) for s in scales if s is not None)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("granularity", ["channel", "tensor", "activation", "unsigned"])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_no_data_makes_a_scale_that_is_zero_negative_or_not_finite(method: str, granularity: str, data: str) -> None:
    x = DATA[data]
    if granularity in ("channel", "tensor"):
        fq = make(method, x, "weight", granularity=granularity)
    else:
        fq = make(method, x, signed=granularity == "activation")
    assert positive_and_finite(fq)
    fq(x)  # in training: methods that watch batches see it
    assert positive_and_finite(fq)
    # And it is of use after that: finite values and gradients for finite data, in training and in evaluation.
    for finite in (torch.where(x.isfinite(), x, 1.0), torch.full_like(x, 0.5)):
        a = finite.clone().requires_grad_()
        y = fq.train()(a)
        y.sum().backward()
        assert torch.isfinite(y).all()
        assert a.grad is not None
        assert torch.isfinite(a.grad).all()
        assert all(torch.isfinite(p.grad).all() for p in fq.parameters() if p.grad is not None)
        assert torch.isfinite(fq.eval()(finite)).all()
    assert positive_and_finite(fq.train())


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("value", [0.0, -1.0, -1e30, 1e38])
def test_no_training_step_makes_a_scale_that_is_zero_negative_or_not_finite(method: str, value: float) -> None:
    fq = make(method, SIGNED)
    for parameter in fq.parameters():
        parameter.data.fill_(value)
    assert positive_and_finite(fq)
    assert torch.isfinite(fq(SIGNED)).all()


def test_a_zero_channel_takes_the_scale_of_the_tensor() -> None:
    x = DATA["one zero channel"]
    scale = make("lsq", x, "weight").method.scale
    assert scale[2].item() == pytest.approx(2 * x.abs().mean().item() / math.sqrt(3), rel=1e-5)


@given(st.floats(allow_nan=False, width=32))
def test_safe_scales_are_positive_finite_and_leave_ordinary_ones_alone(value: float) -> None:
    safe = safe_scale(torch.tensor(value)).item()
    assert SMALLEST_SCALE <= safe <= LARGEST_SCALE
    if 1e-30 < abs(value) < 1e30:
        assert safe == abs(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["channel", "activation"])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_codes_and_their_decoding_are_what_evaluation_computes(method: str, granularity: str, dtype: torch.dtype) -> None:
    x = (WEIGHT if granularity == "channel" else SIGNED).to(dtype)
    fq = (make(method, x, "weight") if granularity == "channel" else make(method, x)).eval()
    codes = fq.codes(x)
    low, high = fq.site.spec.bounds
    assert torch.equal(codes, codes.round())
    assert low <= codes.min()
    assert codes.max() <= high
    scale, zero = fq.decoding()
    value = scale * (codes if zero is None else codes - zero)
    with torch.no_grad():
        deployed = fq(x)
    assert deployed.dtype == dtype
    torch.testing.assert_close(deployed, value.to(dtype))
    # With gradients, evaluation goes through the discretizer: the same values, bit for bit.
    assert torch.equal(fq(x.clone().requires_grad_()), deployed)


SEEN = {
    "weight": (WEIGHT, WEIGHT),
    "signed": (SIGNED, SIGNED),
    "positive": (POSITIVE, POSITIVE),
    "beyond": (SIGNED, 20 * SIGNED),
}


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_training_with_everything_replaced_is_evaluation(method: str, seen: str) -> None:
    first, x = SEEN[seen]
    fq = make(method, first, "weight" if seen == "weight" else "activation")
    trained = fq(x)
    torch.testing.assert_close(fq.eval()(x), trained, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 7])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_training_in_half_types_chooses_the_codes_of_evaluation(method: str, bits: int, dtype: torch.dtype) -> None:
    # Codes are computed in float32 at least, whatever the dtype of the tensor; one code apart is far more than rounding.
    x = (4 * torch.rand(64, 32, generator=torch.Generator().manual_seed(1))).to(dtype)
    fq = make(method, x, bits=bits)
    trained = fq(x)
    assert trained.dtype == dtype
    step = fq.decoding().scale.item()
    assert ((fq.eval()(x) - trained).abs().max() / step).item() < 0.6


@pytest.mark.parametrize("method", ["lsq", "minmax"])
def test_methods_without_a_transform_are_the_identity_at_rate_zero(method: str) -> None:
    fq = make(method, SIGNED)
    fq.schedule.rate.fill_(0.0)
    assert torch.equal(fq(SIGNED), SIGNED)


# --- statistics --------------------------------------------------------------------------------------------------

arrays = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=12)


@given(arrays, arrays)
def test_statistics_are_those_of_the_data_and_add_up(one: list[float], other: list[float]) -> None:
    both_at_once = torch.tensor(one + other, dtype=torch.float64)
    for found in (
        Statistics.of(torch.tensor(one)) + Statistics.of(torch.tensor(other)),
        Statistics.of(torch.tensor(one)).reduced() + Statistics.of(torch.tensor(other)),
        Statistics.of(both_at_once.float()),
    ):
        size = both_at_once.abs().max().item()
        assert found.count.item() == len(both_at_once)
        assert found.mean_abs.item() == pytest.approx(both_at_once.abs().mean().item(), rel=1e-5)
        assert found.low.item() == min(0.0, both_at_once.min().item())
        assert found.high.item() == max(0.0, both_at_once.max().item())
        assert found.max_abs.item() == pytest.approx(size)
        # A difference of squares: exact to the root of float32's epsilon times the values.
        assert found.std.item() == pytest.approx(both_at_once.std(unbiased=False).item(), abs=2e-3 * size)


def test_statistics_of_channels_are_those_of_each_channel() -> None:
    found, whole = Statistics.of(WEIGHT, Channels(4)), Statistics.of(WEIGHT)
    for channel in range(4):
        alone = Statistics.of(WEIGHT[channel])
        for name in ("count", "mean_abs", "std", "low", "high", "max_abs"):
            torch.testing.assert_close(getattr(found, name)[channel], getattr(alone, name))
            torch.testing.assert_close(getattr(found.whole, name), getattr(whole, name))
            torch.testing.assert_close(getattr(found.reduced().whole, name), getattr(whole, name))


def test_statistics_leave_out_what_is_not_finite() -> None:
    found = Statistics.of(torch.tensor([1.0, math.nan, -3.0, math.inf, -math.inf]))
    assert (found.count, found.mean_abs, found.low, found.high) == (2, 2, -3, 1)
    assert found.low.dtype == torch.float64


# --- a user's own ------------------------------------------------------------------------------------------------


def train_one_step(policy: QuantPolicy) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(8, 4)
    gm = pege_fx.prepare(model, policy, (x,))
    PEGEScheduler(gm, total_steps=4, replacement=Constant(0.5), weight_lambda=Constant(0.1), activation_lambda=Constant(0.1))
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in gm.named_parameters()}
    gm(x).square().sum().backward()
    optimizer.step()
    changed = {name for name, value in gm.named_parameters() if not torch.equal(value, before[name])}
    assert {"0.weight", "2.weight"} <= changed
    assert all(torch.isfinite(value).all() for value in gm.parameters())
    return gm


def test_methods_that_quantize_x_itself_say_so() -> None:
    x = torch.randn(4, 4)
    plain = {method for method in ("lsq", "pact", "dorefa", "interval", "minmax") if make(method, x).method.is_plain}
    assert plain == {"lsq", "minmax"}


@pytest.mark.parametrize(("signed", "low"), [(True, -1.0), (False, 0.0)])
def test_before_any_data_the_range_is_that_of_one(signed: bool, low: float) -> None:
    for method, names in (("interval", ("lower", "upper")), ("minmax", ("low", "high"))):
        spec = QuantSpec(bits=3, method=method, signed=signed).resolve("activation", non_negative=False)
        made = FakeQuant(Site(name="site", kind="activation", spec=spec, rule=""), ScheduleState("default"), seed=0)
        assert [getattr(made.method, name).item() for name in names] == [low, 1.0]


def test_minmax_starts_at_the_range_of_each_channel_and_of_the_whole_where_one_is_zero() -> None:
    method = make("minmax", torch.tensor([[-1.0, 2.0], [0.0, 0.0], [-3.0, 1.0]]), "weight").method
    assert (method.low.flatten().tolist(), method.high.flatten().tolist()) == ([-1.0, -3.0, -3.0], [2.0, 2.0, 1.0])


@pytest.mark.parametrize("kind", ["weight", "activation"])
def test_minmax_of_nothing_but_zeros_has_a_scale_of_one_over_the_codes(kind: str) -> None:
    method = make("minmax", torch.zeros(4, 4), kind, bits=4).method
    assert method.grid_of()[0].unique().tolist() == pytest.approx([1 / (15 if method.q_min == 0 else 7)])


def test_a_method_of_the_user_trains_and_converts_by_its_name_or_class() -> None:
    class PowerOfTwo(ForwardMethod, name="power-of-two-test"):
        """A learned step, rounded to a power of two."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.exponent = self.new_parameter(-4.0)

        def initialize(self, statistics: Statistics) -> None:
            self.exponent.copy_(torch.log2(statistics.max_abs.clamp(min=1e-12) / self.q_max))

        def qparams(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            return self.broadcast(torch.exp2(rounded(self.exponent))), None

    for choice in ("power-of-two-test", PowerOfTwo):
        spec = QuantSpec(bits=4, method=choice)
        gm = train_one_step(QuantPolicy((Rule(weight=spec, input=spec),)))
        sites = pege_fx.fake_quants(gm).values()
        assert {type(site.method) for site in sites} == {PowerOfTwo}
        for site in sites:
            assert site.method.exponent.grad is not None
            assert site.method.exponent.grad.abs().sum() > 0
            scale = site.method.grid_of()[0]
            assert torch.equal(torch.log2(scale), torch.log2(scale).round())
        for site in sites:
            site.schedule.rate.fill_(1.0)
        x = torch.randn(5, 4)
        with torch.no_grad():
            torch.testing.assert_close(pege_fx.convert(gm)(x), gm.eval()(x))


def test_a_method_that_bends_its_input_has_to_say_how_it_is_deployed() -> None:
    class Bent(ForwardMethod, name="bent-test"):
        def initialize(self, statistics: Statistics) -> None:
            pass

        def transform(self, x: Tensor) -> Tensor:
            return torch.tanh(x)

        def qparams(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            return torch.tensor(0.25), None

    gm = train_one_step(QuantPolicy((Rule(input=QuantSpec(bits=4, method="bent-test")), Rule(weight="4"))))
    for site in pege_fx.fake_quants(gm).values():
        site.schedule.rate.fill_(1.0)
    with pytest.raises(ConvertError, match=r"Bent transforms its input .*: override encoding\(\)"):
        pege_fx.convert(gm)


def test_the_library_has_the_methods_of_the_design() -> None:
    assert set(METHOD_NAMES) <= set(METHODS)
