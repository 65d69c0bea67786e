"""Integers of a layer: exact sums, what they stand for, and thresholds that turn them into the next codes.

round(clip(scale * n + bias) / s) is a non-decreasing function of the integer n, so a code is reached from some n on. That
n is found in float64, and in rational arithmetic wherever float64 is too near to a whole number to decide.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from pege_fx.errors import ConvertError
from pege_fx.numerics.spec import bounds_of

LOWEST, HIGHEST = -(2**31), 2**31
_NEAR = 1e-4  # of an accumulator's unit: far more than float64 is wrong by within 32 bits


def widen(x: Any) -> Any:
    """Return a float tensor in float64, anything else as it is."""
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


class _OfAnEngine(nn.Module):
    """A module that only engines have."""

    of_an_engine = True  # what pege_fx.modules.stages, floors below, knows an engine by


class Accumulate(_OfAnEngine):
    """A layer on codes: the exact sums of integer products, int32.

    Runs in float64, whose integers are exact to 2**53: torch has no integer convolution on every device.
    """

    zero_points: Tensor

    def __init__(self, function: Any, zero_points: list[int]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("zero_points", torch.tensor(zero_points))

    def forward(self, a: Tensor, b: Tensor, *settings: Any, **named: Any) -> Tensor:
        first, second = (codes.double() - zero for codes, zero in zip((a, b), self.zero_points, strict=True))
        sums: Tensor = self.function(first, second, *settings, **named)
        if sums.numel() and float(sums.abs().max()) >= HIGHEST:
            raise ConvertError("an accumulator does not fit in 32 bits: fewer bits, or a smaller layer.")
        return sums.to(torch.int32)


class Rescale(_OfAnEngine):
    """What accumulators stand for, in float64: scale * acc + bias, along one dimension."""

    scale: Tensor
    bias: Tensor

    def __init__(self, scale: Tensor, bias: Tensor, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("scale", scale.double())
        self.register_buffer("bias", bias.double())

    def forward(self, sums: Tensor) -> Tensor:
        shape = [1] * sums.ndim
        shape[self.axis] = -1
        return sums.double() * self.scale.view(shape) + self.bias.view(shape)


class Requantize(_OfAnEngine):
    """Codes from accumulators: how many of the channel's thresholds are reached, plus the lowest code."""

    thresholds: Tensor

    def __init__(self, thresholds: Tensor, axis: int, lowest: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.axis, self.lowest, self.dtype = axis, lowest, dtype
        self.register_buffer("thresholds", thresholds)

    def forward(self, sums: Tensor) -> Tensor:
        rows = sums.movedim(self.axis, 0)
        if self.thresholds.shape[0] == 1:
            rows = rows.reshape(1, *rows.shape)
        flat = rows.reshape(rows.shape[0], -1).to(torch.int64)
        reached = torch.searchsorted(self.thresholds, flat.contiguous(), right=True)
        codes = (reached + self.lowest).to(self.dtype).view(rows.shape)
        return (codes[0] if self.thresholds.shape[0] == 1 else codes).movedim(0, self.axis)


class OnIntegers(_OfAnEngine):
    """A function that keeps the order of values (a max pool, a reshape), on codes."""

    def __init__(self, target: Any) -> None:
        super().__init__()
        self.target = target

    def forward(self, codes: Tensor, *args: Any, **settings: Any) -> Tensor:
        call = getattr(torch.Tensor, self.target) if isinstance(self.target, str) else self.target
        result: Tensor = call(codes.double(), *args, **settings)
        return result.to(codes.dtype)


# --- thresholds ------------------------------------------------------------------------------------------------


def thresholds(
    scale: Tensor,
    bias: Tensor,
    clips: Sequence[tuple[float, float]],
    encoding: Sequence[Tensor | None],
    *,
    bits: int,
    signed: bool,
    narrow: bool = False,
) -> Tensor | None:
    """Return the smallest integer n that gives each code above the lowest, int64 of shape (channels, codes - 1).

    Args:
        scale, bias: n stands for scale * n + bias, float64 of shape (channels,) or (1,); scales are positive.
        clips: (low, high) of the clips between, the last one first.
        encoding: scale, zero point, lower, width of the quantization step (see ``functional.quantize``); None if absent.

    None if the step has more than one scale.
    """
    step, zero, lower, width = (*encoding, None, None, None)[:4]
    if step is None or any(part is not None and part.numel() != 1 for part in encoding):
        return None
    low, high = bounds_of(bits, signed=signed, narrow=narrow)
    start = 0 if zero is None else int(zero)
    unit = Fraction(float(step)) * Fraction(1 if width is None else float(width))
    shift = Fraction(0 if lower is None else float(lower))
    # round half to even: x / s >= m - 1/2 gives at least m, and the border itself does only if m is even
    borders = [((m - Fraction(1, 2)) * unit + shift, m % 2 == 0) for m in range(low + 1 - start, high + 1 - start)]
    return torch.stack([first_reaching(border, included, clips, scale, bias) for border, included in borders], 1)


def first_reaching(
    border: Fraction, included: bool, clips: Sequence[tuple[float, float]], scale: Tensor, bias: Tensor
) -> Tensor:
    """Return for every channel the smallest n with clip(scale * n + bias) >= border (or > border), within 32 bits."""
    count = max(scale.numel(), bias.numel())
    for low, high in clips:
        if (included and border <= low) or border < low:
            return torch.full((count,), LOWEST)
        if border > high or (border == high and not included):
            return torch.full((count,), HIGHEST)
    scale, bias = scale.detach().expand(count), bias.detach().expand(count)
    place = (float(border) - bias) / scale
    found = torch.where(place.isfinite(), place, 0.0).clamp(LOWEST, HIGHEST).ceil().to(torch.int64)
    near = (place - place.round()).abs() <= _NEAR
    for i in near.nonzero().flatten().tolist():
        exact = (border - Fraction(float(bias[i]))) / Fraction(float(scale[i]))
        whole = math.ceil(exact) if included else math.floor(exact) + 1
        found[i] = min(max(whole, LOWEST), HIGHEST)
    return found
