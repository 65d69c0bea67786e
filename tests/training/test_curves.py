"""Curves: the paper's formulas, their ends, their shape, and what they refuse."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot

import pege_fx
from pege_fx import (
    Constant,
    Cosine,
    Curve,
    Exponential,
    Linear,
    Logarithmic,
    LogReplacement,
    RampReplacement,
    ScheduleError,
    Step,
)

TRANSITIONS = [Linear, Cosine, Logarithmic, Exponential, Step]
CURVES: list[Curve] = [
    LogReplacement(k=50, start=0.2),
    LogReplacement.reaching_one_at(40, start=0.5),
    RampReplacement(steps=40, start=0.3, base=7),
    Constant(0.4),
    *(cls(0.01, 0.9, steps=40) for cls in TRANSITIONS),
]

starts = st.floats(0, 0.9)
lengths = st.floats(1.5, 1e6)


# --- the paper's formulas ----------------------------------------------------------------------------------------


@given(st.floats(1.01, 1e9), st.floats(0, 1), st.floats(1, 1e9))
def test_the_logarithm_is_the_papers(k: float, start: float, t: float) -> None:
    assert LogReplacement(k=k, start=start)(t) == pytest.approx(min(math.log(t, k) + start, 1.0), abs=1e-9)


@given(lengths, starts)
def test_the_logarithm_starts_where_told_and_reaches_one_where_told(steps: float, start: float) -> None:
    curve = LogReplacement.reaching_one_at(steps, start=start)
    assert curve(0) == curve(1) == start  # T >= 1: position 0 is T = 1
    assert curve(steps) == pytest.approx(1.0, abs=1e-9)
    assert curve(1 + (steps - 1) * 0.99) < 1.0
    assert curve.length == pytest.approx(steps, rel=1e-6)
    assert math.log(steps, curve.k) == pytest.approx(1 - start, abs=1e-6)  # T = k ** (1 - b/B)


def test_a_start_so_close_to_one_that_k_is_no_float_is_refused() -> None:
    assert LogReplacement.reaching_one_at(200, start=0.99)(200) == pytest.approx(1.0)
    with pytest.raises(ScheduleError, match=r"start=0\.999"):
        LogReplacement.reaching_one_at(200, start=0.999)


@given(lengths, st.floats(0, 1), st.floats(1.01, 100), st.floats(0, 1))
def test_the_ramp_is_the_ancestors(steps: float, start: float, base: float, part: float) -> None:
    curve, t = RampReplacement(steps=steps, start=start, base=base), part * steps
    b = base**start
    k = (base - b) / steps
    assert curve(t) == pytest.approx(min(math.log(k * t + b) / math.log(base), 1.0), abs=1e-9)
    assert curve(0) == pytest.approx(start, abs=1e-9)
    assert curve(steps) == 1.0
    assert curve(2 * steps) == 1.0


@given(st.floats(1e-10, 1e3), st.floats(1e-10, 1e3), lengths, st.floats(0, 1))
def test_lambda_grows_by_a_constant_factor(first: float, last: float, steps: float, part: float) -> None:
    curve, t = Exponential(first, last, steps=steps), part * steps
    assert curve(t) == pytest.approx(first * (last / first) ** (t / steps), rel=1e-9)
    assert curve(t) * curve(steps - t) == pytest.approx(first * last, rel=1e-6)


@pytest.mark.parametrize(
    ("curve", "share"),
    [
        (Linear(2.0, 6.0, steps=8), lambda t: t / 8),
        (Cosine(2.0, 6.0, steps=8), lambda t: (1 - math.cos(math.pi * t / 8)) / 2),
        (Logarithmic(2.0, 6.0, steps=8), lambda t: math.log(1 + t) / math.log(9)),
        (Step(2.0, 6.0, steps=8), lambda t: (t // 2) / 4),
        (Step(2.0, 6.0, steps=8, count=2), lambda t: (t // 4) / 2),
    ],
)
def test_the_ablations_mix_start_and_end_by_their_share(curve: Curve, share: Callable[[float], float]) -> None:
    for t in (0, 0.5, 1, 2, 3.9, 4, 7.9, 8):
        assert curve(t) == pytest.approx(2 + 4 * share(t))


# --- laws of all -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", TRANSITIONS)
@given(st.floats(1e-6, 10), st.floats(1e-6, 10), st.floats(0.5, 1e5))
def test_a_transition_goes_from_start_to_end_and_stays(cls: type, start: float, end: float, steps: float) -> None:
    curve = cls(start, end, steps=steps)
    assert curve(0) == pytest.approx(start)
    assert curve(steps) == curve(steps * 3) == end
    assert curve.length == steps
    inside = [curve(steps * i / 20) for i in range(21)]
    low, high = sorted((start, end))
    assert all(low * (1 - 1e-9) <= value <= high * (1 + 1e-9) for value in inside)


@pytest.mark.parametrize("curve", CURVES, ids=repr)
def test_a_rising_curve_never_falls(curve: Curve) -> None:
    values = [curve(t / 4) for t in range(400)]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values))
    if not isinstance(curve, Constant):
        assert values[-1] > values[0]


@pytest.mark.parametrize("cls", TRANSITIONS)
def test_a_falling_transition_never_rises(cls: type) -> None:
    curve = cls(0.9, 0.1, steps=10)
    values = [curve(t / 4) for t in range(60)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("curve", CURVES, ids=repr)
def test_curves_are_frozen_values(curve: Curve) -> None:
    assert curve == dataclasses.replace(curve)  # type: ignore[type-var]
    assert hash(curve) == hash(dataclasses.replace(curve))  # type: ignore[type-var]
    name = dataclasses.fields(curve)[0].name  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(curve, name, 0.5)
    assert isinstance(curve(3), float)
    assert eval(repr(curve), vars(pege_fx)) == curve  # what a log shows can be pasted back


# --- what is refused ---------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("k", [1, 0.5, 0, -3, NAN, INF])
def test_a_base_that_is_not_above_one_is_refused(k: float) -> None:
    with pytest.raises(ScheduleError, match=r"k=.*: the base of the logarithm must be above 1, or p never grows") as error:
        LogReplacement(k=k)
    assert repr(k) in str(error.value)
    with pytest.raises(ScheduleError, match=r"base=.*must be above 1"):
        RampReplacement(steps=10, base=k)


@pytest.mark.parametrize("start", [-0.1, 1.1, NAN, INF, -INF])
@pytest.mark.parametrize(
    "make",
    [
        lambda start: LogReplacement(k=10, start=start),
        lambda start: LogReplacement.reaching_one_at(10, start=start),
        lambda start: RampReplacement(steps=10, start=start),
    ],
    ids=["log", "reaching", "ramp"],
)
def test_a_rate_outside_the_unit_interval_is_refused(make: Callable[[float], Curve], start: float) -> None:
    with pytest.raises(ScheduleError, match=r"start=.* must lie in \[0, 1[\])]: it is a replacement rate") as error:
        make(start)
    assert repr(start) in str(error.value)


def test_a_start_of_one_leaves_no_base_to_find() -> None:
    assert LogReplacement(k=10, start=1.0)(1) == 1.0
    with pytest.raises(ScheduleError, match=r"start=1.0 must lie in \[0, 1\)"):
        LogReplacement.reaching_one_at(10, start=1.0)


@pytest.mark.parametrize("steps", [0, -5, NAN, INF])
@pytest.mark.parametrize("cls", [*TRANSITIONS, RampReplacement])
def test_a_length_that_is_not_positive_is_refused(cls: type, steps: float) -> None:
    arguments = (steps,) if cls is RampReplacement else (0.1, 0.2, steps)
    with pytest.raises(ScheduleError, match=r"steps=.* must be a"):
        cls(*arguments)


@pytest.mark.parametrize("steps", [1, 0.5, 0, -2, NAN, INF])
def test_one_can_only_be_reached_after_t_is_one(steps: float) -> None:
    with pytest.raises(ScheduleError, match=r"steps=.* must be a finite number above 1"):
        LogReplacement.reaching_one_at(steps)


@pytest.mark.parametrize("value", [NAN, INF])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ScheduleError, match=r"Constant: value=.* must be a finite number"):
        Constant(value)
    with pytest.raises(ScheduleError, match=r"Linear: end=.* must be a finite number"):
        Linear(0.0, value, steps=3)
    with pytest.raises(ScheduleError, match=r"Cosine: start=.* must be a finite number"):
        Cosine(value, 1.0, steps=3)


@pytest.mark.parametrize(("first", "last"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0)])
def test_an_exponential_needs_positive_ends(first: float, last: float) -> None:
    with pytest.raises(ScheduleError, match=r"(start|end)=.* must be a positive"):
        Exponential(first, last, steps=10)


def test_a_staircase_needs_a_step() -> None:
    with pytest.raises(ScheduleError, match="count=0 must be a positive"):
        Step(0.0, 1.0, steps=10, count=0)


# --- plots -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def without_a_display() -> Iterator[None]:
    matplotlib.use("Agg")
    yield
    pyplot.close("all")


@pytest.mark.parametrize("curve", CURVES, ids=repr)
def test_a_plot_draws_the_curve_over_its_length(curve: Curve) -> None:
    (line,) = curve.plot().get_lines()
    t, values = line.get_data()
    assert t[0] == 0
    assert t[-1] == pytest.approx(curve.length)
    assert list(values) == [curve(at) for at in t]
    assert line.get_label() == repr(curve)


def test_a_plot_goes_where_and_as_far_as_told() -> None:
    axes = pyplot.subplots()[1]
    assert Linear(0, 1, steps=10).plot(steps=30, ax=axes, label="mine", color="red") is axes
    assert Constant(0.5).plot(steps=30, ax=axes) is axes
    first, second = axes.get_lines()
    assert first.get_label() == "mine"
    assert first.get_xdata()[-1] == second.get_xdata()[-1] == 30
    with pytest.raises(ScheduleError, match="steps=0 must be a positive"):
        Constant(0.5).plot(steps=0)


def test_lengths_and_starts_that_nobody_gave() -> None:
    assert Constant(3.0).length == 1.0
    assert LogReplacement(k=100)(1) == LogReplacement.reaching_one_at(100)(1) == 0.0


@pytest.mark.parametrize("curve", TRANSITIONS)
def test_before_the_beginning_is_the_beginning(curve: type[Curve]) -> None:
    made = curve(0.25, 0.75, 10)  # type: ignore[call-arg]
    assert made(-0.5) == made(0) == pytest.approx(0.25)


@pytest.mark.parametrize("start", [-0.5, -1e-9, 1.0])
def test_a_start_that_is_no_rate_below_one_is_refused(start: float) -> None:
    with pytest.raises(ScheduleError, match=r"must lie in \[0, 1\)"):
        LogReplacement.reaching_one_at(10, start=start)
