"""Curves over training: a frozen value that maps a position t (epochs or steps, the user says which) to a number.

The paper's two schedules are ``LogReplacement`` and ``Exponential``; the others are there for its ablations.
A scheduler takes any callable ``t -> float``; these also check their arguments and plot themselves.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pege_fx.errors import ScheduleError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ScheduleError(f"{name}={value!r} must be a positive, finite number.")


def _rate(name: str, value: float, *, below_one: bool = False) -> None:
    if not (0.0 <= value < 1.0 if below_one else 0.0 <= value <= 1.0):
        raise ScheduleError(f"{name}={value!r} must lie in [0, 1{')' if below_one else ']'}: it is a replacement rate.")


@dataclass(frozen=True)
class Curve(ABC):
    """A value that changes over training. Call it with the position t >= 0.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Halving(Curve):
    ...     def __call__(self, t: float) -> float:
    ...         return 0.5**t
    >>> Halving()(2)
    0.25
    """

    @abstractmethod
    def __call__(self, t: float) -> float: ...

    def _check_finite(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and not math.isfinite(value):
                raise ScheduleError(f"{type(self).__name__}: {field.name}={value!r} must be a finite number.")

    @property
    def length(self) -> float:
        """Where the curve reaches its end; a constant is there at once."""
        return float(getattr(self, "steps", 1.0))

    def plot(self, steps: float | None = None, ax: "Axes | None" = None, **style: Any) -> "Axes":
        """Draw the curve from t = 0 to ``steps`` (default: its length) with matplotlib; returns the axes."""
        steps = self.length if steps is None else steps
        _positive("steps", steps)
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ScheduleError("plot needs matplotlib: pip install 'pege_fx[examples]'.") from error
        if ax is None:
            ax = pyplot.subplots()[1]
        points = [steps * i / 400 for i in range(401)]
        ax.plot(points, [self(t) for t in points], **{"label": repr(self)} | style)
        ax.set_xlabel("t")
        return ax


@dataclass(frozen=True)
class LogReplacement(Curve):
    """The paper's replacement rate: p_T = min(log_k T + b/B, 1), with T = max(t, 1) and b/B = ``start``.

    It reaches 1 at T = k ** (1 - start).

    >>> LogReplacement(k=100)(10)
    0.5
    """

    k: float
    start: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.k) and self.k > 1):
            raise ScheduleError(f"k={self.k!r}: the base of the logarithm must be above 1, or p never grows.")
        _rate("start", self.start)

    @classmethod
    def reaching_one_at(cls, steps: float, start: float = 0.0) -> "LogReplacement":
        """Find k so that p starts at ``start`` and reaches 1 at T = ``steps`` > 1.

        >>> curve = LogReplacement.reaching_one_at(200, start=0.5)
        >>> round(curve(200), 12), round(curve(20), 3)
        (1.0, 0.783)
        """
        if not (math.isfinite(steps) and steps > 1):
            raise ScheduleError(f"steps={steps!r} must be a finite number above 1: at T = 1 the rate is `start`.")
        _rate("start", start, below_one=True)
        try:
            return cls(k=steps ** (1.0 / (1.0 - start)), start=start)
        except OverflowError:
            raise ScheduleError(
                f"start={start!r} is so close to 1 that k = {steps} ** (1 / (1 - start)) is no float."
            ) from None

    @property
    def length(self) -> float:
        """T at which p reaches 1."""
        return float(self.k ** (1.0 - self.start))

    def __call__(self, t: float) -> float:
        return min(math.log(max(t, 1.0)) / math.log(self.k) + self.start, 1.0)


@dataclass(frozen=True)
class RampReplacement(Curve):
    """The ramp form: p = min(log_B(k t + b), 1), b = B ** start, k = (B - b) / steps; reaches 1 at t = ``steps``.

    >>> RampReplacement(steps=10, start=0.5, base=4)(0)
    0.5
    """

    steps: float
    start: float = 0.0
    base: float = 10.0

    def __post_init__(self) -> None:
        _positive("steps", self.steps)
        _rate("start", self.start)
        if not (math.isfinite(self.base) and self.base > 1):
            raise ScheduleError(f"base={self.base!r}: the base of the logarithm must be above 1.")

    def __call__(self, t: float) -> float:
        if t >= self.steps:
            return 1.0
        first = self.base**self.start
        return min(math.log((self.base - first) * t / self.steps + first, self.base), 1.0)


@dataclass(frozen=True)
class Constant(Curve):
    """The same ``value`` throughout.

    >>> Constant(0.5)(7)
    0.5
    """

    value: float

    def __post_init__(self) -> None:
        self._check_finite()

    def __call__(self, t: float) -> float:
        return float(self.value)


@dataclass(frozen=True)
class _Transition(Curve):
    """From ``start`` at t = 0 to ``end`` at t = ``steps``, and ``end`` from there on."""

    start: float
    end: float
    steps: float

    def __post_init__(self) -> None:
        self._check_finite()
        _positive("steps", self.steps)

    def __call__(self, t: float) -> float:
        if t >= self.steps:
            return float(self.end)
        return self._between(max(t, 0.0) / self.steps)

    @abstractmethod
    def _between(self, part: float) -> float: ...

    def _mixed(self, share: float) -> float:
        return self.start + (self.end - self.start) * share


@dataclass(frozen=True)
class Linear(_Transition):
    """A straight line from ``start`` to ``end`` in ``steps``.

    >>> Linear(0.0, 1.0, steps=10)(5)
    0.5
    """

    def _between(self, part: float) -> float:
        return self._mixed(part)


@dataclass(frozen=True)
class Cosine(_Transition):
    """Half a cosine wave from ``start`` to ``end`` in ``steps``: slow, fast, slow.

    >>> round(Cosine(0.0, 1.0, steps=4)(1), 3)
    0.146
    """

    def _between(self, part: float) -> float:
        return self._mixed(0.5 - 0.5 * math.cos(math.pi * part))


@dataclass(frozen=True)
class Logarithmic(_Transition):
    """start + (end - start) * log(1 + t) / log(1 + steps): fast, then slow.

    >>> round(Logarithmic(0.0, 1.0, steps=15)(3), 3)
    0.5
    """

    def _between(self, part: float) -> float:
        return self._mixed(math.log1p(part * self.steps) / math.log1p(self.steps))


@dataclass(frozen=True)
class Exponential(_Transition):
    """The paper's λ: λ_t = λ_0 * (λ_max / λ_0) ** (t / S), with λ_0 = ``start``, λ_max = ``end``, S = ``steps``.

    >>> round(Exponential(1e-8, 1e-4, steps=2)(1), 12)
    1e-06
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive("start", self.start)
        _positive("end", self.end)

    def _between(self, part: float) -> float:
        return float(self.start * (self.end / self.start) ** part)


@dataclass(frozen=True)
class Delayed(Curve):
    """0 until t = ``start``, then another curve from its beginning: for λ that rises late.

    >>> curve = Delayed(Linear(0.0, 1.0, steps=10), start=90)
    >>> curve(89), curve(95), curve(100)
    (0.0, 0.5, 1.0)
    """

    curve: Curve
    start: float

    def __post_init__(self) -> None:
        self._check_finite()
        if self.start < 0:
            raise ScheduleError(f"start={self.start!r} can not be negative: it is where the curve begins.")

    @property
    def length(self) -> float:
        """Where the delayed curve reaches its end."""
        return self.start + self.curve.length

    def __call__(self, t: float) -> float:
        return 0.0 if t < self.start else self.curve(t - self.start)


@dataclass(frozen=True)
class Step(_Transition):
    """A staircase of ``count`` equal steps from ``start`` to ``end`` in ``steps``.

    >>> Step(0.0, 1.0, steps=8, count=4)(3)
    0.25
    """

    count: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive("count", self.count)

    def _between(self, part: float) -> float:
        return self._mixed(math.floor(part * self.count) / self.count)
