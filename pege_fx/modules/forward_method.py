"""What a forward method is: how the grid of one edge is found and learned, and the figures of the data that it starts from.

A method turns x into the discretizer's input x_c (``transform``, ordinary autograd), gives the grid's scale and zero
point (``qparams``), and maps the discretizer's result back (``restore``, affine). Replacement, masks and gradients are
``functional.fake_quantize``'s and the same for every method.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pege_fx._utils.collectives import range_of_all, total
from pege_fx.errors import ConvertError, SpecError
from pege_fx.numerics import functional
from pege_fx.numerics.functional import QParams
from pege_fx.numerics.layouts import Channels, Kind, PerChannel, PerTensor, Tiling
from pege_fx.numerics.spec import METHODS, QuantSpec, ScaleDtype

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
    def of(cls, x: Tensor, by: Tiling | Channels | None = None) -> "Statistics":
        """Look at a tensor: row by row, one for each scale or channel, or as a whole; figures have shape (rows,) or ()."""
        x = x.detach()
        whole = by is None or (isinstance(by, Tiling) and isinstance(by.layout, PerTensor))
        return cls(x.reshape(-1) if by is None or whole else by.rows(x))

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

    def map(self, function: Callable[[Tensor], Tensor]) -> "Decoding":
        """Return what a function makes of each part that is there."""
        return Decoding(function(self.scale), None if self.zero_point is None else function(self.zero_point))


class ForwardMethod(nn.Module, ABC):
    """The grid of one edge. A subclass names itself and is then known to every policy:

    >>> class FixedStep(ForwardMethod, name="fixed-step-example"):
    ...     def initialize(self, statistics):
    ...         pass
    ...     def qparams(self, x):
    ...         return torch.tensor(0.25), None

    Args:
        spec: resolved: sign and granularity are set.
        kind: "weight" or "activation".
        shape: of the weight; None for activations.
        channels: where a weight keeps its output channels; None where it has none, or one scale.

    Attributes:
        tiling: which elements share a scale.
        q_min, q_max: the lowest and the highest level, in units of the scale; of whole numbers these are ints.
    """

    def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "step" in vars(cls) and "qparams" not in vars(cls):
            _take_step(cls)
        if name is not None:
            METHODS.add(name, cls)

    def __init__(self, spec: QuantSpec, kind: Kind, shape: tuple[int, ...] | None, channels: Channels | None) -> None:
        super().__init__()
        layout = PerChannel() if spec.granularity is None and channels is not None else spec.layout
        self.tiling = Tiling(layout, kind, shape, None if isinstance(layout, PerTensor) else channels)
        self.spec, self.kind, self.shape, self.channels = spec, kind, shape, self.tiling.channels
        number_format = spec.number_format
        self.q_min: Any
        self.q_max: Any
        self.q_min, self.q_max = spec.bounds if number_format.is_integer else number_format.limits

    is_dynamic: ClassVar[bool] = False  # the scale is that of the tensor at hand: nothing is learned or kept
    takes_every_format: ClassVar[bool] = True  # otherwise whole numbers alone
    takes_every_layout: ClassVar[bool] = True  # otherwise one scale per tensor or channel alone
    scale_dtypes: ClassVar[tuple[ScaleDtype, ...]] = ("float32", "bfloat16")  # that scales may be stored in; the first is usual
    symmetric_clip: ClassVar[bool] = False  # signed edges are clipped alike on both sides: their grid is narrow

    @classmethod
    def signed_by_default(cls, kind: Kind, non_negative: bool) -> bool:
        """The sign of the codes where neither a rule nor the graph's proof of x >= 0 decides."""
        return not non_negative

    @classmethod
    def default_granularity(cls, kind: Kind) -> str:
        """The scale layout where a spec leaves it open."""
        return "channel" if kind == "weight" else "tensor"

    @classmethod
    def check_spec(cls, spec: QuantSpec) -> None:
        """Raise ``SpecError`` for a spec that this method can not do."""
        if spec.granularity is not None and not spec.layout.is_static and not cls.is_dynamic:
            raise SpecError(
                f'granularity="{spec.granularity}" has a scale for each row that comes, and method="{spec.method}" learns or '
                'keeps scales.\n  give method="dynamic", or granularity="tensor".'
            )
        if not cls.takes_every_layout and spec.layout.of_matrix:
            raise SpecError(
                f'method="{spec.method}" has one scale per "tensor" or "channel", not per {spec.granularity}: '
                'learn those of groups by "lsq".'
            )
        if not cls.takes_every_format and not spec.number_format.is_integer:
            raise SpecError(f'method="{spec.method}" is defined on whole numbers, and format={spec.format} is none: give bits.')

    def new_parameter(self, value: float) -> nn.Parameter:
        """One value for each scale, shape ``(channels.count,)`` per channel, ``(1,)`` per tensor: FSDP refuses 0-d ones."""
        return nn.Parameter(torch.full(self.tiling.scale_shape, value))

    def broadcast(self, values: Tensor) -> Tensor:
        """Lay out what ``new_parameter`` holds so that it broadcasts to the tensor's tiles, 0-d ones too."""
        return self.tiling.broadcast(values)

    @abstractmethod
    def initialize(self, statistics: Statistics) -> None:
        """Set parameters from data (no gradient). Statistics are per channel if the spec is."""

    def observe(self, x: Tensor) -> None:
        """See a training batch before it is quantized; for running statistics."""

    def transform(self, x: Tensor) -> Tensor:
        """Return x_c, the discretizer's input."""
        return x

    @abstractmethod
    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor | None] | QParams:
        """Return scale and zero point (None for 0), broadcastable to the tensor's tiles; the scale is positive and finite.

        ``x`` is x_c, what ``transform`` made; only a dynamic method looks at it.
        """

    def grid_of(self, x: Tensor | None = None) -> QParams:
        """``qparams``, whatever form a method gives it; ``x`` may be left out where the method is not dynamic."""
        found = QParams(*self.qparams(_NOTHING if x is None else x))
        if self.is_dynamic or self.spec.scale == "float32":
            return found
        stored = found.scale.to(torch.bfloat16).to(found.scale.dtype)
        return found._replace(scale=found.scale + (stored - found.scale).detach())  # trained as if it were not rounded

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
        return Encoding(*self.grid_of()[:2])

    def decoding(self) -> Decoding:
        """What codes stand for once ``restore`` is folded in; of a method that is not dynamic."""
        scale, zero_point, _ = self.grid_of()
        if type(self).restore is ForwardMethod.restore:
            return Decoding(scale, zero_point)
        zero = -scale * zero_point if zero_point is not None else torch.zeros_like(scale)
        first = self.restore(zero)
        width = self.restore(zero + scale) - first
        return Decoding(width, -first / width)

    def extra_repr(self) -> str:
        return ""


_NOTHING = torch.empty(0)


def _take_step(cls: type[ForwardMethod]) -> None:
    """Let a class that was written when ``qparams`` was called ``step`` go on working."""
    warnings.warn(
        f"{cls.__name__}.step() is called qparams(x) now: rename it, and give it the argument.",
        DeprecationWarning,
        stacklevel=4,
    )
    step: Any = vars(cls)["step"]
    cls.qparams = lambda self, x: step(self)  # type: ignore[method-assign]
