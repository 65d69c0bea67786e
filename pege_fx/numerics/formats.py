"""Number formats as values: the levels that codes stand for, how a number is rounded to them, how many bits they take.

A format knows nothing of scales: its levels are in units of the scale, ``x_q = level * scale``. Every other file asks a format
for what it needs and knows none by name. ``format_of`` reads the names that specs and files use.

Definitions: IEEE-like floats as in the OCP 8-bit Floating Point and Microscaling (MX) 1.0 specifications; NF4 as in QLoRA
(Dettmers et al., 2023); SEQ as in ParetoQ (arXiv 2502.02631).
"""

import functools
import itertools
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pege_fx.errors import SpecError, closest

MIN_BITS, MAX_BITS = 2, 8  # of whole numbers that a rule asks for; formats have 1 bit, too


def bounds_of(bits: int, *, signed: bool, narrow: bool = False) -> tuple[int, int]:
    """Return (q_min, q_max) of a grid of integers.

    >>> bounds_of(3, signed=True, narrow=True)
    (-3, 3)
    """
    if not signed:
        return 0, 2**bits - 1
    half = 2 ** (bits - 1)
    return -half + int(narrow), half - 1


def compute_dtype(x: Tensor) -> torch.dtype:
    """Codes and scales are computed in float32 at least, whatever the dtype of the tensor."""
    return torch.promote_types(x.dtype, torch.float32)


class Format(ABC):
    """The levels of codes. A subclass of your own needs these four and a name, and is then known wherever formats are named:

    >>> class Octal(Format):
    ...     name, bits = "octal-example", 2
    ...     levels = (0.0, 1.0, 8.0, 64.0)
    ...     def round(self, v):
    ...         return nearest_level(v, self.levels)
    >>> add_format(Octal())
    >>> format_of("octal-example").levels
    (0.0, 1.0, 8.0, 64.0)

    Attributes:
        name: what specs and files call it.
        bits: that a code takes, 1 to 8.
        levels: what codes 0, 1, ... stand for, in units of the scale, in ascending order, each once.
    """

    name: str
    bits: int
    levels: tuple[float, ...]

    @abstractmethod
    def round(self, v: Tensor) -> Tensor:
        """Return the level nearest to each element, in the dtype of ``v`` (float32 or float64); NaN stays NaN.

        Beyond the outermost levels it gives these.
        """

    @property
    def limits(self) -> tuple[float, float]:
        """The lowest and the highest level."""
        return self.levels[0], self.levels[-1]

    @property
    def is_integer(self) -> bool:
        """Whether levels are whole numbers one apart, so that a zero point may move them."""
        return False

    @property
    def reach(self) -> tuple[float, float]:
        """Between these a value is in range: half a gap beyond the outermost levels, where rounding would leave them."""
        levels = self.levels
        return levels[0] - (levels[1] - levels[0]) / 2, levels[-1] + (levels[-1] - levels[-2]) / 2

    def covers(self, v: Tensor) -> Tensor:
        """Tell which elements are in range (r in the estimators), bool."""
        lowest, highest = self.reach
        return (v >= lowest) & (v <= highest)

    def encode(self, levels: Tensor) -> Tensor:
        """Return the code of each level, uint8. What is no level, NaN too, gets a code next to it."""
        known = torch.tensor(self.levels, dtype=levels.dtype, device=levels.device)
        return torch.searchsorted(known, levels.contiguous()).clamp(max=len(self.levels) - 1).to(torch.uint8)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the levels that codes stand for, in ``dtype``."""
        return torch.tensor(self.levels, dtype=dtype, device=codes.device)[codes.long()]

    def __str__(self) -> str:
        return self.name


def nearest_level(v: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Return the nearest of a few levels (ascending), between two equally near ones that with the even code; NaN stays NaN.

    No tensor of levels is made, so that this runs, and compiles, on every device.
    """
    nearest = torch.full_like(v, levels[0])
    for code, (below, level) in enumerate(itertools.pairwise(levels), 1):
        middle = (below + level) / 2
        nearest = torch.where(v >= middle if code % 2 == 0 else v > middle, level, nearest)
    return torch.where(v == v, nearest, v)


@dataclass(frozen=True)
class Integer(Format):
    """Whole numbers: q_min ... q_max of ``bits`` bits.

    >>> Integer(3).levels
    (-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
    """

    bits: int
    signed: bool = True
    narrow: bool = False

    @property
    def name(self) -> str:  # type: ignore[override]
        """As a spec has it."""
        return f"{'' if self.signed else 'u'}int{self.bits}{'-narrow' if self.narrow else ''}"

    def __post_init__(self) -> None:
        low, high = self.bounds
        object.__setattr__(self, "levels", tuple(map(float, range(low, high + 1))))

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest code (q_min, q_max)."""
        return bounds_of(self.bits, signed=self.signed, narrow=self.narrow)

    @property
    def is_integer(self) -> bool:
        """They are."""
        return True

    def round(self, v: Tensor) -> Tensor:
        return torch.round(v).clamp(*self.bounds)

    def encode(self, levels: Tensor) -> Tensor:
        return levels.to(torch.int8 if self.signed else torch.uint8)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return codes.to(dtype)


@dataclass(frozen=True)
class Float(Format):
    """A floating-point format: sign, ``exponent`` bits, ``mantissa`` bits, subnormal numbers, no infinity.

    Codes are the format's own bits: sign, exponent, mantissa. Larger numbers saturate.

    Attributes:
        name: "e4m3" and the like.
        exponent, mantissa: bits of each.
        highest: the largest finite number.
        magnitudes: the numbers that are not negative, by their bits.
    """

    name: str
    exponent: int
    mantissa: int
    highest: float
    magnitudes: tuple[float, ...] = field(init=False, repr=False, compare=False)

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Of sign, exponent and mantissa."""
        return 1 + self.exponent + self.mantissa

    @property
    def smallest_exponent(self) -> int:
        """Of the smallest normal number, 2 ** smallest_exponent; subnormal ones have its distance."""
        return 2 - (1 << self.exponent - 1)

    def __post_init__(self) -> None:
        magnitudes = self._magnitudes()
        object.__setattr__(self, "magnitudes", magnitudes)
        object.__setattr__(self, "levels", (*(-value for value in reversed(magnitudes[1:])), *magnitudes))

    def _magnitudes(self) -> tuple[float, ...]:
        found = []
        for code in range(2 ** (self.bits - 1)):
            exponent, fraction = code >> self.mantissa, (code & 2**self.mantissa - 1) * 2.0**-self.mantissa
            power = 2.0 ** (max(exponent, 1) - 1 + self.smallest_exponent)
            found.append((fraction + (exponent > 0)) * power)
        return tuple(value for value in found if value <= self.highest)

    def round(self, v: Tensor) -> Tensor:
        # Beyond twice the largest all saturate alike; it keeps the power of two below finite.
        near = v.clamp(-2.0 * self.highest, 2.0 * self.highest)
        step = power_of_two_below(near).clamp(min=2.0**self.smallest_exponent) * 2.0**-self.mantissa
        return (torch.round(near / step) * step).clamp(-self.highest, self.highest)

    def encode(self, levels: Tensor) -> Tensor:
        known = torch.tensor(self.magnitudes, dtype=levels.dtype, device=levels.device)
        codes = torch.searchsorted(known, levels.abs().contiguous()).clamp(max=len(self.magnitudes) - 1)
        return (codes | torch.signbit(levels).long() << self.bits - 1).to(torch.uint8)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        known = torch.tensor(self.magnitudes, dtype=dtype, device=codes.device)
        sign = 1 << self.bits - 1
        size = known[(codes.long() & sign - 1).clamp(max=len(known) - 1)]
        return torch.where(codes.long() & sign != 0, -size, size)


def power_of_two_below(v: Tensor) -> Tensor:
    """Return 2 ** floor(log2 |v|) of normal numbers, exactly, by their bits; 0 of subnormal ones, infinity of NaN."""
    if v.dtype is torch.float64:
        return (v.view(torch.int64) & 0x7FF0000000000000).view(torch.float64)
    return (v.view(torch.int32) & 0x7F800000).view(torch.float32)


@dataclass(frozen=True)
class Levels(Format):
    """A list of levels: a number is rounded to the nearest, between two to the one with the even code.

    Args:
        levels: 2 to 256 numbers, ascending, each once.
        name: what specs and files call it; by default the list itself.

    Raises:
        SpecError: for a list that is none of that.

    >>> Levels((-1.0, -0.25, 0.25, 1.0)).bits
    2
    """

    levels: tuple[float, ...]
    name: str = ""

    def __post_init__(self) -> None:
        levels = tuple(map(float, self.levels))
        object.__setattr__(self, "levels", levels)
        if not 2 <= len(levels) <= 2**MAX_BITS:
            raise SpecError(f"a format has 2 to {2**MAX_BITS} levels, not {len(levels)}.")
        if not all(abs(level) < float("inf") for level in levels):
            raise SpecError(f"the levels {levels} are not all finite.")
        for below, above in itertools.pairwise(levels):
            if below >= above:
                what = "repeat" if below == above else "are not in ascending order"
                raise SpecError(f"levels {what}: {below:g}, {above:g}.\n  give each once: {sorted(set(levels))}.")
        if not self.name:
            object.__setattr__(self, "name", f"levels({','.join(map(_shortest, levels))})")

    @property
    def bits(self) -> int:  # type: ignore[override]
        """That the number of a level takes."""
        return (len(self.levels) - 1).bit_length()

    def round(self, v: Tensor) -> Tensor:
        return nearest_level(v, self.levels)


def _shortest(value: float) -> str:
    return repr(value).removesuffix(".0")


E4M3 = Float("e4m3", 4, 3, 448.0)
E5M2 = Float("e5m2", 5, 2, 57344.0)
E3M2 = Float("e3m2", 3, 2, 28.0)
E2M3 = Float("e2m3", 2, 3, 7.5)
E2M1 = Float("e2m1", 2, 1, 6.0)
TERNARY = Integer(2, narrow=True)
BINARY = Levels((-1.0, 1.0), "binary")
SEQ2 = Levels((-1.5, -0.5, 0.5, 1.5), "seq2")
# Quantiles of a normal distribution, scaled to [-1, 1], with a zero: the table of QLoRA's code.
NF4 = Levels(
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    "nf4",
)

_FORMATS: dict[str, Format] = {value.name: value for value in (E4M3, E5M2, E3M2, E2M3, E2M1, BINARY, SEQ2, NF4)}
_INTEGER = re.compile(r"(u?)int([1-8])(-narrow)?")
_LEVELS = re.compile(r"levels\(([^()]{1,8192})\)")


def add_format(value: Format) -> None:
    """Make a format known by its name.

    Args:
        value: the format; an equal one may be added again.

    >>> add_format(Levels((0.0, 1.0, 4.0, 16.0), "fours-example"))
    >>> format_of("fours-example").bits
    2

    Raises:
        SpecError: if the name is taken by another, or the format contradicts itself.
    """
    known = _FORMATS.get(value.name)
    if known is not None and type(known).__qualname__ != type(value).__qualname__:
        raise SpecError(f"the format {value.name!r} is already {known!r}: choose another name.")
    check_format(value)
    _FORMATS[value.name] = value


def check_format(value: Format) -> None:
    """Compare what a format says of itself: every level is rounded to itself, coded and decoded, in float32 and float64.

    Raises:
        SpecError: with the level that is not.
    """
    if len(value.levels) > 2**value.bits or not 1 <= value.bits <= MAX_BITS:
        raise SpecError(f"{value.name}: {len(value.levels)} levels do not go into {value.bits} bits (1 to {MAX_BITS}).")
    if any(below >= above for below, above in itertools.pairwise(value.levels)):
        raise SpecError(f"{value.name}: its levels are not in ascending order, each once.")
    for dtype in (torch.float32, torch.float64):
        levels = torch.tensor(value.levels, dtype=dtype)
        for what, found in (("rounded to", value.round(levels)), ("decoded as", value.decode(value.encode(levels), dtype))):
            if bool((wrong := found != levels).any()):
                raise SpecError(
                    f"{value.name}: the level {float(levels[wrong][0]):g} is {what} {float(found[wrong][0]):g} ({dtype})."
                )


def format_of(name: Any) -> Format:
    """Return a format by its name: "int4", "uint8", "int2-narrow", "e4m3", "nf4", "levels(-1,0,1)", or one that was added.

    Raises:
        SpecError: for a name that is not known.
    """
    if isinstance(name, Format):
        return name
    return _named(str(name)) if name not in _FORMATS else _FORMATS[name]


@functools.lru_cache(maxsize=256)  # one object for one name: kernels are made for a format once
def _named(text: str) -> Format:
    if (found := _INTEGER.fullmatch(text)) is not None:
        if found[1] and found[3]:
            raise SpecError(f"{text!r}: narrow leaves out the lowest signed code; unsigned ones have none.")
        return Integer(int(found[2]), signed=not found[1], narrow=bool(found[3]))
    if text == "ternary":
        return TERNARY
    if (listed := _LEVELS.fullmatch(text)) is not None:
        try:
            levels = tuple(map(float, listed[1].split(",")))
        except ValueError as error:
            raise SpecError(f"{text!r} is no list of levels: {error}.") from error
        return Levels(levels)
    names = [*_FORMATS, "ternary", *(f"int{bits}" for bits in range(2, 9)), "uint8"]
    raise SpecError(
        f"unknown number format {text!r}.\n  known: {', '.join(names)}, levels(...)\n  closest: {closest(text, names, 1)}."
    )


def is_known(name: str) -> bool:
    """Tell whether a name is that of a format."""
    try:
        format_of(name)
    except SpecError:
        return False
    return True
