"""Forward methods: how the grid of one edge is found and learned.

A method turns x into the discretizer's input x_c (``transform``, ordinary autograd), gives the grid's scale and zero
point (``step``), and maps the discretizer's result back (``restore``, affine). Replacement, masks and gradients are
``functional.fake_quantize``'s and the same for every method.
"""

import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pege_fx._utils.collectives import range_of_all, total
from pege_fx.errors import ConvertError
from pege_fx.numerics import functional
from pege_fx.numerics.spec import METHODS, Channels, Kind, QuantSpec

SMALLEST_SCALE = 2.0**-100
LARGEST_SCALE = 2.0**100


def safe_scale(scale: Tensor) -> Tensor:
    """A positive scale that neither divides by zero nor overflows: |s| in [2**-100, 2**100], in float32 at least."""
    return scale.abs().to(functional.compute_dtype(scale)).clamp(SMALLEST_SCALE, LARGEST_SCALE)


class Statistics:
    """What initialisation needs to know of the data: one value per row (output channel), or for the whole tensor.

    Elements that are not finite are left out; ``low`` and ``high`` include 0. Each figure is computed when it is first
    asked for, summed in float32 at least and kept in float64. Statistics of several batches add up.
    """

    _SUMS = ("count", "total", "total_abs", "total_square")

    def __init__(self, rows: Tensor) -> None:
        rows = rows.to(functional.compute_dtype(rows))
        self._finite: Tensor | None = None
        if not bool(torch.isfinite(rows.sum())):  # a finite sum has finite terms, and is one pass without a copy
            self._finite = torch.isfinite(rows)
            rows = torch.where(self._finite, rows, 0.0)
        self._rows = rows

    @classmethod
    def of(cls, x: Tensor, channels: Channels | None = None) -> "Statistics":
        """Look at a tensor: row by output channel, or (channels None) as a whole; figures have shape (rows,) or ()."""
        x = x.detach()
        return cls(x.reshape(-1) if channels is None else channels.rows(x))

    @property
    def all_finite(self) -> bool:
        """Whether no element had to be left out."""
        return self._finite is None or bool(self._finite.all())

    @cached_property
    def count(self) -> Tensor:
        """How many elements are finite."""
        if self._finite is None:
            return torch.full(self._rows.shape[:-1], float(self._rows.shape[-1]), dtype=torch.float64, device=self._rows.device)
        return self._finite.sum(-1, dtype=torch.float64)

    @cached_property
    def total(self) -> Tensor:
        """Their sum."""
        return self._rows.sum(-1).double()

    @cached_property
    def total_abs(self) -> Tensor:
        """Sum of their absolute values."""
        return self._norm(1)

    @cached_property
    def total_square(self) -> Tensor:
        """Sum of their squares."""
        return self._norm(2).square()

    def _norm(self, order: int) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(self._rows, order, dim=-1)  # one pass, no copy
        return norm.double()

    @cached_property
    def low(self) -> Tensor:
        """The smallest, or 0 if that is smaller."""
        return self._rows.amin(-1).clamp(max=0).double() if self._rows.numel() else self.total

    @cached_property
    def high(self) -> Tensor:
        """The largest, or 0 if that is larger."""
        return self._rows.amax(-1).clamp(min=0).double() if self._rows.numel() else self.total

    def _with(self, values: dict[str, Tensor]) -> "Statistics":
        made = object.__new__(Statistics)
        made.__dict__.update(values)
        return made

    def __add__(self, other: "Statistics") -> "Statistics":
        values = {name: getattr(self, name) + getattr(other, name) for name in self._SUMS}
        extremes = {"low": torch.minimum(self.low, other.low), "high": torch.maximum(self.high, other.high)}
        return self._with(values | extremes)

    def reduced(self) -> "Statistics":
        """The same figures, without the tensor they came from."""
        return self._with({name: getattr(self, name) for name in (*self._SUMS, "low", "high")})

    def of_all(self) -> "Statistics":
        """The statistics of what all processes see; each of them takes part."""
        sums = total(torch.stack([getattr(self, name) for name in self._SUMS]))
        low, high = range_of_all(self.low, self.high)
        return self._with(dict(zip(self._SUMS, sums, strict=True)) | {"low": low, "high": high})

    @cached_property
    def whole(self) -> "Statistics":
        """The statistics of all rows together."""
        if "_rows" in self.__dict__:
            return Statistics(self._rows.reshape(-1))
        sums = {name: getattr(self, name).sum() for name in self._SUMS}
        return self._with(sums | {"low": self.low.amin(), "high": self.high.amax()})

    @property
    def mean_abs(self) -> Tensor:
        """Mean absolute value."""
        return self.total_abs / self.count.clamp(min=1)

    @property
    def std(self) -> Tensor:
        """Standard deviation, of the population."""
        count = self.count.clamp(min=1)
        return (self.total_square / count - (self.total / count).square()).clamp(min=0).sqrt()

    @property
    def max_abs(self) -> Tensor:
        """Largest absolute value."""
        return torch.maximum(self.high, -self.low)


class Encoding(NamedTuple):
    """How a deployed quantizer makes codes: clamp(round(((x - lower) / width) / scale) + zero_point)."""

    scale: Tensor
    zero_point: Tensor | None = None
    lower: Tensor | None = None
    width: Tensor | None = None


class Decoding(NamedTuple):
    """What codes stand for: scale * (code - zero_point); the zero point may lie between two codes."""

    scale: Tensor
    zero_point: Tensor | None = None


class ForwardMethod(nn.Module, ABC):
    """The grid of one edge. A subclass names itself and is then known to every policy:

    >>> class FixedStep(ForwardMethod, name="fixed-step-example"):
    ...     def initialize(self, statistics):
    ...         pass
    ...     def step(self):
    ...         return torch.tensor(0.25), None

    Args:
        spec: resolved: sign and granularity are set.
        kind: "weight" or "activation".
        shape: of the weight; None for activations.
        channels: where a weight keeps its output channels; None for one scale per tensor.
    """

    def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name is not None:
            METHODS.add(name, cls)

    def __init__(self, spec: QuantSpec, kind: Kind, shape: tuple[int, ...] | None, channels: Channels | None) -> None:
        super().__init__()
        self.spec, self.kind, self.shape, self.channels = spec, kind, shape, channels
        self.q_min, self.q_max = spec.bounds

    symmetric_clip: ClassVar[bool] = False  # signed edges are clipped alike on both sides: their grid is narrow

    @classmethod
    def signed_by_default(cls, kind: Kind, non_negative: bool) -> bool:
        """The sign of the codes where neither a rule nor the graph's proof of x >= 0 decides."""
        return not non_negative

    def new_parameter(self, value: float) -> nn.Parameter:
        """One value per channel, shape ``(channels.count,)``, or one per tensor, shape ``(1,)``: FSDP refuses 0-d ones."""
        return nn.Parameter(torch.full((1 if self.channels is None else self.channels.count,), value))

    def broadcast(self, values: Tensor) -> Tensor:
        """Lay out what ``new_parameter`` holds so that it broadcasts to the tensor, 0-d ones too."""
        if self.channels is None or self.shape is None:
            return values.reshape(()) if values.numel() == 1 else values
        return self.channels.broadcast(values, self.shape)

    @abstractmethod
    def initialize(self, statistics: Statistics) -> None:
        """Set parameters from data (no gradient). Statistics are per channel if the spec is."""

    def observe(self, x: Tensor) -> None:
        """See a training batch before it is quantized; for running statistics."""

    def transform(self, x: Tensor) -> Tensor:
        """Return x_c, the discretizer's input."""
        return x

    @abstractmethod
    def step(self) -> tuple[Tensor, Tensor | None]:
        """Return (scale, zero point or None for 0), broadcastable to the tensor; the scale is positive and finite."""

    def scale_gradient(self, x: Tensor) -> float:
        """Factor of the scale's gradient."""
        return 1.0

    def restore(self, y: Tensor) -> Tensor:
        """Map the discretizer's result back; affine in ``y``."""
        return y

    @property
    def is_plain(self) -> bool:
        """Neither ``transform`` nor ``restore`` does anything: the grid is over x itself."""
        cls = type(self)
        return cls.transform is ForwardMethod.transform and cls.restore is ForwardMethod.restore

    def encoding(self) -> Encoding:
        """How deployed code finds an activation's codes without ``transform``."""
        if type(self).transform is not ForwardMethod.transform:
            raise ConvertError(
                f"{type(self).__name__} transforms its input and does not say how deployed code does it: override encoding()."
            )
        return Encoding(*self.step())

    def decoding(self) -> Decoding:
        """What codes stand for once ``restore`` is folded in."""
        scale, zero_point = self.step()
        if type(self).restore is ForwardMethod.restore:
            return Decoding(scale, zero_point)
        zero = -scale * zero_point if zero_point is not None else torch.zeros_like(scale)
        first = self.restore(zero)
        width = self.restore(zero + scale) - first
        return Decoding(width, -first / width)

    def extra_repr(self) -> str:
        return ""


def _set(parameter: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value.clamp(-LARGEST_SCALE, LARGEST_SCALE))


def _where_positive(value: Tensor, *fallbacks: Tensor | float) -> Tensor:
    """``value`` where it is positive, else the first positive fallback: an all-zero channel takes the tensor's value."""
    for fallback in fallbacks:
        value = torch.where(value > 0, value, torch.as_tensor(fallback, dtype=value.dtype, device=value.device))
    return value


class LSQ(ForwardMethod, name="lsq"):
    """Learned step size (Esser et al., ICLR 2020): s0 = 2 E|x| / sqrt(q_max), gradient scale 1 / sqrt(N q_max).

    N is the number of weights that share the scale, or the activation's elements per sample.
    """

    def __init__(self, spec: QuantSpec, kind: Kind, shape: tuple[int, ...] | None, channels: Channels | None) -> None:
        super().__init__(spec, kind, shape, channels)
        self.scale = self.new_parameter(1.0 / self.q_max)

    def initialize(self, statistics: Statistics) -> None:
        mean = statistics.mean_abs
        if not bool((mean > 0).all()):
            mean = _where_positive(mean, statistics.whole.mean_abs, 0.5 * self.q_max**-0.5)
        _set(self.scale, (2.0 * mean / math.sqrt(self.q_max)).clamp(min=SMALLEST_SCALE))

    def step(self) -> tuple[Tensor, Tensor | None]:
        return self.broadcast(safe_scale(self.scale)), None

    def scale_gradient(self, x: Tensor) -> float:
        # From the sizes behind the batch, and not as a number: while a compiler traces they have none, and asking for one
        # would make a graph for each size.
        sharing = (
            math.prod(x.shape[1:]) if self.kind == "activation" and x.ndim > 1 else x.numel() // max(self.scale.numel(), 1)
        )
        factor: float = (max(sharing, 1) * self.q_max) ** -0.5
        return factor


class PACT(ForwardMethod, name="pact"):
    """Learned clip (Choi et al., 2018): x_c = clip(x, 0, alpha), s = alpha / q_max, dy/dalpha = 1[x >= alpha].

    Signed edges clip to [-alpha, alpha]. alpha starts at 6 for activations, or at the largest value seen where that is
    less (beyond it a clip does nothing), and at 3 standard deviations for signed edges.
    """

    FIRST_CLIP = 6.0
    symmetric_clip = True

    def __init__(self, spec: QuantSpec, kind: Kind, shape: tuple[int, ...] | None, channels: Channels | None) -> None:
        super().__init__(spec, kind, shape, channels)
        self.clip = self.new_parameter(self.FIRST_CLIP)

    def initialize(self, statistics: Statistics) -> None:
        reach = statistics.max_abs if self.q_min == 0 else torch.minimum(3 * statistics.std, statistics.max_abs)
        clip = _where_positive(reach, statistics.whole.max_abs, self.FIRST_CLIP)
        _set(self.clip, clip.clamp(min=SMALLEST_SCALE * self.q_max, max=self.FIRST_CLIP if self.q_min == 0 else None))

    def _bound(self) -> Tensor:
        return self.broadcast(safe_scale(self.clip))

    def transform(self, x: Tensor) -> Tensor:
        bound = self._bound().to(x.dtype)
        clipped = torch.where(x >= bound, bound, x)
        return torch.where(x < 0, 0.0, clipped) if self.q_min == 0 else torch.where(x <= -bound, -bound, clipped)

    def step(self) -> tuple[Tensor, Tensor | None]:
        return (self._bound().detach() / self.q_max), None

    def encoding(self) -> Encoding:
        return Encoding(*self.step())  # the codes' own clamp does what the clip does


class DoReFa(ForwardMethod, name="dorefa"):
    """DoReFa-Net (Zhou et al., 2016): w_q = 2 Q(tanh w / (2 max|tanh w|) + 1/2) - 1; activations clipped to [0, 1].

    Weights use unsigned codes around a zero point of q_max / 2, one grid per tensor. Signed activations clip to [-1, 1].
    """

    symmetric_clip = True

    @classmethod
    def signed_by_default(cls, kind: Kind, non_negative: bool) -> bool:
        return kind == "activation" and not non_negative

    def __init__(self, spec: QuantSpec, kind: Kind, shape: tuple[int, ...] | None, channels: Channels | None) -> None:
        super().__init__(spec, kind, shape, channels)
        self.register_buffer("one", torch.ones(()), persistent=False)  # says on which device

    one: Tensor

    def initialize(self, statistics: Statistics) -> None:
        """Nothing to learn: the grid is fixed."""

    def transform(self, x: Tensor) -> Tensor:
        if self.kind == "activation":
            return x.clamp(0.0 if self.q_min == 0 else -1.0, 1.0)
        bent = torch.tanh(x.to(functional.compute_dtype(x)))
        largest = bent.abs().amax() if x.numel() else bent.new_ones(())
        largest = torch.where(largest > 0, largest, 1.0).clamp(min=SMALLEST_SCALE)  # all zero: there is no size to divide by
        if self.q_min == 0:
            return bent / (2.0 * largest) + 0.5
        return bent / largest

    def step(self) -> tuple[Tensor, Tensor | None]:
        return self.one.float() / self.q_max, None

    def restore(self, y: Tensor) -> Tensor:
        return 2.0 * y - 1.0 if self.kind == "weight" and self.q_min == 0 else y

    def encoding(self) -> Encoding:
        return Encoding(*self.step())  # the codes' own clamp does what the clip does


class LearnedInterval(ForwardMethod, name="interval"):
    """Learned interval, as in EWGS (Lee et al., CVPR 2021): x_c = clamp((x - l) / (u - l), 0, 1), learned output scale.

    Unsigned activations map back to [0, a], weights and signed activations to [-a, a], with the output scale a learned.
    l, u start at -3 and +3 standard deviations (weights, signed), or at the minimum and at 3 standard deviations of
    the half-normal that a ReLU leaves (unsigned); a starts at u, where the map is the identity inside the interval.
    """

    def __init__(self, spec: QuantSpec, kind: Kind, shape: tuple[int, ...] | None, channels: Channels | None) -> None:
        super().__init__(spec, kind, shape, channels)
        self.symmetric = kind == "weight" or bool(spec.signed)
        self.levels = self.q_max - self.q_min
        self.lower = self.new_parameter(-1.0 if self.symmetric else 0.0)
        self.upper = self.new_parameter(1.0)
        self.output_scale = self.new_parameter(1.0)

    def initialize(self, statistics: Statistics) -> None:
        whole = statistics.whole
        if self.symmetric:
            upper = _where_positive(3 * statistics.std, 3 * whole.std, whole.max_abs, 1.0)
            lower = -upper
        else:
            lower = statistics.low
            spread = 3 * statistics.std / math.sqrt(1 - 2 / math.pi)
            upper = lower + _where_positive(spread, whole.max_abs, 1.0)
        _set(self.lower, lower)
        _set(self.upper, upper)
        _set(self.output_scale, upper)

    def _width(self) -> Tensor:
        return self.broadcast(safe_scale(self.upper - self.lower))

    def transform(self, x: Tensor) -> Tensor:
        wide = x.to(functional.compute_dtype(x))
        return ((wide - self.broadcast(self.lower)) / self._width()).clamp(0.0, 1.0)

    def step(self) -> tuple[Tensor, Tensor | None]:
        width = self._width().detach()
        zero_point = torch.full_like(width, self.q_min) if self.q_min else None
        return torch.full_like(width, 1.0 / self.levels), zero_point

    def restore(self, y: Tensor) -> Tensor:
        return (2.0 * y - 1.0 if self.symmetric else y) * self.broadcast(safe_scale(self.output_scale))

    def encoding(self) -> Encoding:
        return Encoding(*self.step(), self.broadcast(self.lower), self._width())


class MovingMinMax(ForwardMethod, name="minmax"):
    """Moving minimum and maximum: symmetric for weights, with an integer zero point for signed activations.

    Weights take the range of the moment; activations average theirs over training batches with ``momentum``.
    """

    momentum = 0.1

    def __init__(self, spec: QuantSpec, kind: Kind, shape: tuple[int, ...] | None, channels: Channels | None) -> None:
        super().__init__(spec, kind, shape, channels)
        values = self.new_parameter(1.0).detach()
        values = values if channels is not None else values.reshape(())  # buffers may be 0-d
        self.register_buffer("low", -values if self.q_min else torch.zeros_like(values))
        self.register_buffer("high", values.clone())

    low: Tensor
    high: Tensor

    def initialize(self, statistics: Statistics) -> None:
        whole = statistics.whole
        _set(self.high, torch.where(statistics.max_abs > 0, statistics.high, whole.high))
        _set(self.low, torch.where(statistics.max_abs > 0, statistics.low, whole.low))

    def observe(self, x: Tensor) -> None:
        with torch.no_grad():
            rows = x.detach().reshape(1, -1) if self.channels is None else self.channels.rows(x.detach())
            rows = torch.nan_to_num(rows.to(self.low.dtype), 0.0, 0.0, 0.0)
            if rows.numel() == 0:
                return
            low, high = rows.amin(1).clamp(max=0).view_as(self.low), rows.amax(1).clamp(min=0).view_as(self.high)
            if self.kind == "activation":
                low, high = range_of_all(low, high)
            share = self.momentum if self.kind == "activation" else 1.0
            largest = min(LARGEST_SCALE, torch.finfo(low.dtype).max)
            self.low.lerp_(low.clamp(min=-largest), share)
            self.high.lerp_(high.clamp(max=largest), share)

    def step(self) -> tuple[Tensor, Tensor | None]:
        low, high = self.low.to(functional.compute_dtype(self.low)), self.high.to(functional.compute_dtype(self.high))
        if self.q_min and self.kind == "activation":
            scale = (high - low) / (self.q_max - self.q_min)
        else:
            scale = torch.maximum(high, -low if self.q_min else torch.zeros_like(low)) / self.q_max
        scale = torch.where(scale > 0, scale, 1.0 / self.q_max).clamp(SMALLEST_SCALE, LARGEST_SCALE)
        if not (self.q_min and self.kind == "activation"):
            return self.broadcast(scale), None
        zero_point = (self.q_min - torch.round(low / scale)).clamp(self.q_min, self.q_max)
        return self.broadcast(scale), self.broadcast(zero_point)
