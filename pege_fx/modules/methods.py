"""The forward methods with a grid that is learned or observed, each with its paper's initialisation."""

import math

import torch
from torch import Tensor

from pege_fx._utils.collectives import range_of_all
from pege_fx.modules.forward_method import (
    LARGEST_SCALE,
    SMALLEST_SCALE,
    Decoding,
    Encoding,
    ForwardMethod,
    Statistics,
    safe_scale,
)
from pege_fx.numerics import functional
from pege_fx.numerics.layouts import Channels, Kind, PerTensor
from pege_fx.numerics.spec import QuantSpec

__all__ = ["LSQ", "PACT", "DoReFa", "LSQPlus", "LearnedInterval", "MovingMinMax"]


def _set(parameter: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value.clamp(-LARGEST_SCALE, LARGEST_SCALE).view(parameter.shape))


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

    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
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

    takes_every_layout = False
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

    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return (self._bound().detach() / self.q_max), None

    def encoding(self) -> Encoding:
        return Encoding(*self.grid_of()[:2])  # the codes' own clamp does what the clip does


class DoReFa(ForwardMethod, name="dorefa"):
    """DoReFa-Net (Zhou et al., 2016): w_q = 2 Q(tanh w / (2 max|tanh w|) + 1/2) - 1; activations clipped to [0, 1].

    Weights use unsigned codes around a zero point of q_max / 2, one grid per tensor. Signed activations clip to [-1, 1].
    """

    symmetric_clip = True
    takes_every_format = takes_every_layout = False

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

    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.one.float() / self.q_max, None

    def restore(self, y: Tensor) -> Tensor:
        return 2.0 * y - 1.0 if self.kind == "weight" and self.q_min == 0 else y

    def encoding(self) -> Encoding:
        return Encoding(*self.grid_of()[:2])  # the codes' own clamp does what the clip does


class LearnedInterval(ForwardMethod, name="interval"):
    """Learned interval, as in EWGS (Lee et al., CVPR 2021): x_c = clamp((x - l) / (u - l), 0, 1), learned output scale.

    Unsigned activations map back to [0, a], weights and signed activations to [-a, a], with the output scale a learned.
    l, u start at -3 and +3 standard deviations (weights, signed), or at the minimum and at 3 standard deviations of
    the half-normal that a ReLU leaves (unsigned); a starts at u, where the map is the identity inside the interval.
    """

    takes_every_format = takes_every_layout = False

    def __init__(self, spec: QuantSpec, kind: Kind, shape: tuple[int, ...] | None, channels: Channels | None) -> None:
        super().__init__(spec, kind, shape, channels)
        self.symmetric = kind == "weight" or bool(spec.signed)
        self.levels: int = self.q_max - self.q_min
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

    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        width = self._width().detach()
        zero_point = torch.full_like(width, self.q_min) if self.q_min else None
        return torch.full_like(width, 1.0 / self.levels), zero_point

    def restore(self, y: Tensor) -> Tensor:
        return (2.0 * y - 1.0 if self.symmetric else y) * self.broadcast(safe_scale(self.output_scale))

    def encoding(self) -> Encoding:
        return Encoding(*self.grid_of()[:2], self.broadcast(self.lower), self._width())


class MovingMinMax(ForwardMethod, name="minmax"):
    """Moving minimum and maximum: symmetric for weights, with an integer zero point for signed activations.

    Weights take the range of the moment; activations average theirs over training batches with ``momentum``.
    """

    momentum = 0.1

    def __init__(self, spec: QuantSpec, kind: Kind, shape: tuple[int, ...] | None, channels: Channels | None) -> None:
        super().__init__(spec, kind, shape, channels)
        values = self.new_parameter(1.0).detach()
        values = values.reshape(()) if isinstance(self.tiling.layout, PerTensor) else values  # buffers may be 0-d
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
            rows = self.tiling.rows(x.detach())
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

    @property
    def _is_asymmetric(self) -> bool:
        return bool(self.q_min) and self.kind == "activation" and self.spec.number_format.is_integer

    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        low, high = self.low.to(functional.compute_dtype(self.low)), self.high.to(functional.compute_dtype(self.high))
        if self._is_asymmetric:
            scale = (high - low) / (self.q_max - self.q_min)
        else:
            scale = torch.maximum(high, -low if self.q_min else torch.zeros_like(low)) / self.q_max
        scale = torch.where(scale > 0, scale, 1.0 / self.q_max).clamp(SMALLEST_SCALE, LARGEST_SCALE)
        if not self._is_asymmetric:
            return self.broadcast(scale), None
        zero_point = (self.q_min - torch.round(low / scale)).clamp(self.q_min, self.q_max)
        return self.broadcast(scale), self.broadcast(zero_point)


class LSQPlus(LSQ, name="lsq+"):
    """LSQ+ (Bhalgat et al., CVPRW 2020): a learned step size with a learned zero point, for what lies to one side of zero.

    The zero point is rounded, with a straight-through gradient: an element beyond the grid moves it by its own gradient times
    -s. Both start from the range of what is seen.
    """

    takes_every_format = False

    @classmethod
    def signed_by_default(cls, kind: Kind, non_negative: bool) -> bool:
        return kind == "weight"

    def __init__(self, spec: QuantSpec, kind: Kind, shape: tuple[int, ...] | None, channels: Channels | None) -> None:
        super().__init__(spec, kind, shape, channels)
        self.zero_point = self.new_parameter(0.0)

    def initialize(self, statistics: Statistics) -> None:
        low, high = statistics.low, statistics.high
        scale = _where_positive((high - low) / (self.q_max - self.q_min), statistics.whole.max_abs / self.q_max, 1.0)
        _set(self.scale, scale.clamp(min=SMALLEST_SCALE))
        _set(self.zero_point, (self.q_min - torch.round(low / scale)).clamp(self.q_min, self.q_max))

    def _zero_point(self) -> Tensor:
        zero = self.zero_point.to(functional.compute_dtype(self.zero_point))
        return zero + (zero.round().clamp(self.q_min, self.q_max) - zero).detach()

    def _shift(self) -> Tensor:
        """What moves x so that its grid has no zero point; the step learns from the discretizer alone."""
        return self.broadcast(self._zero_point() * safe_scale(self.scale).detach())

    def transform(self, x: Tensor) -> Tensor:
        return self.tiling.untiled(self.tiling.tiles(x.to(functional.compute_dtype(x))) + self._shift(), x)

    def restore(self, y: Tensor) -> Tensor:
        return self.tiling.untiled(self.tiling.tiles(y) - self._shift(), y)

    def encoding(self) -> Encoding:
        return Encoding(self.grid_of().scale, self.broadcast(self._zero_point().detach()))

    def decoding(self) -> Decoding:
        return Decoding(*self.encoding()[:2])
