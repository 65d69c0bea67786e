"""Fake quantization of CUDA tensors in eager mode, by kernels written by hand: one launch forward, one backward.

``functional`` defines what they compute and chooses them; y is the same bit for bit, gradients are to rounding. Importing this
needs Triton.

A tensor is seen as ``layouts.Layout`` has it. A program computes a tile of one row.
"""

import warnings
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pege_fx.errors import PegeWarning
from pege_fx.kernels.tensor_layout import Layout, layout_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ESTIMATORS = frozenset({"ste", "ewgs", "pege", "pege-relative"})
LARGEST_TILE = 2048

_usable = True

# --- on the device -------------------------------------------------------------------------------------------

_ALL = tl.constexpr(tl.PropagateNan.ALL)
_SIGN = tl.constexpr(-(2**31))


@triton.jit
def _tile(positions: tl.tensor, channels: tl.tensor, tile_positions: tl.constexpr, tile_channels: tl.constexpr) -> tl.tensor:
    """The row of this program; for each element of its tile the offset, the row-major number, and whether it is there."""
    columns = tl.cdiv(channels, tile_channels)
    tiles = columns * tl.cdiv(positions, tile_positions)
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    position = tile // columns * tile_positions + tl.arange(0, tile_positions)[:, None]
    channel = tile % columns * tile_channels + tl.arange(0, tile_channels)[None, :]
    offset = (row * positions + position) * channels + channel
    number = (row * channels + channel) * positions + position
    return row, offset, number, (position < positions) & (channel < channels)


@triton.jit
def _with_sign(size: tl.tensor, like: tl.tensor) -> tl.tensor:
    sign = like.to(tl.int32, bitcast=True) & _SIGN
    return (size.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _codes(x: tl.tensor, scale: tl.tensor, zero: tl.tensor, lowest: tl.tensor, highest: tl.tensor) -> tl.tensor:
    """clamp(round(x / scale) + zero, lowest, highest); NaN stays, and so does the sign of a zero.

    A division and a rounding instruction for each element would take longer than reading it. Usually x is clamped first, which
    is the same between whole numbers; x times the inverse, corrected once, is the correctly rounded quotient (Markstein),
    or underflows and is rounded to zero; adding and subtracting 1.5 * 2**23 rounds to nearest, ties to even.
    """
    low, high, is_usual = lowest, highest, (scale > 2.0**-60) & (scale < 2.0**60)
    if zero is not None:
        low, high, is_usual = low - zero - 1, high - zero + 1, is_usual & (tl.abs(zero) < 2.0**20)
    if is_usual:
        x = tl.clamp(x, low * scale, high * scale, propagate_nan=_ALL)
        inverse = tl.math.div_rn(1.0, scale)
        product = x * inverse
        quotient = tl.fma(tl.fma(product, -scale, x), inverse, product)
        codes = _with_sign((quotient + 12582912.0) - 12582912.0, x)
    else:
        quotient = tl.math.div_rn(x, scale)
        size = tl.abs(quotient)
        codes = _with_sign(tl.where(size < 2.0**23, (size + 2.0**23) - 2.0**23, size), quotient)
        if zero is None:
            codes = tl.clamp(codes, lowest, highest, propagate_nan=_ALL)
    if zero is not None:
        codes = tl.clamp(codes + zero, lowest, highest, propagate_nan=_ALL)
    return codes


@triton.jit
def _is_replaced(number: tl.tensor, key_ptr: tl.tensor, rate_ptr: tl.tensor, is_part: tl.constexpr) -> tl.tensor:
    """``functional._is_replaced``."""
    if is_part:
        number += tl.load(key_ptr + 1)
    key = tl.load(key_ptr).to(tl.uint32, bitcast=True)
    bits = (number.to(tl.uint32, bitcast=True) + key) * 0x9E3779B9
    bits = (bits ^ (bits >> 16)) * 0x21F0AAAD
    bits = (bits ^ (bits >> 15) ^ (key * 0x9E3779B9)) * 0xD35A2D97
    bits = bits ^ (bits >> 15)
    return (bits >> 8).to(tl.int32) < tl.ceil(tl.load(rate_ptr).to(tl.float32) * 2.0**24).to(tl.int32)


@triton.jit
def _forward(
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    rate_ptr: tl.tensor,
    key_ptr: tl.tensor,
    positions: tl.tensor,
    channels: tl.tensor,
    q_min: tl.tensor,
    q_max: tl.tensor,
    is_part: tl.constexpr,
    per_row: tl.constexpr,
    tile_positions: tl.constexpr,
    tile_channels: tl.constexpr,
) -> None:
    row, offset, number, inside = _tile(positions, channels, tile_positions, tile_channels)
    scale = tl.load(scale_ptr + row * per_row).to(tl.float32)
    x = tl.load(x_ptr + offset, inside, other=0.0).to(tl.float32)
    if zero_ptr is None:
        y = _codes(x, scale, None, q_min, q_max) * scale
    else:
        zero = tl.load(zero_ptr + row * per_row).to(tl.float32)
        y = (_codes(x, scale, zero, q_min, q_max) - zero) * scale
    if rate_ptr is not None:
        y = tl.where(_is_replaced(number, key_ptr, rate_ptr, is_part), y, x)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _nothing_if_nan(term: tl.tensor) -> tl.tensor:
    """``functional.nothing_if_nan``."""
    return tl.where(term == term, term, 0.0)


@triton.jit
def _backward(
    grad_ptr: tl.tensor,
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    grad_x_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    strength_ptr: tl.tensor,
    positions: tl.tensor,
    channels: tl.tensor,
    q_min: tl.tensor,
    q_max: tl.tensor,
    estimator: tl.constexpr,
    per_row: tl.constexpr,
    tile_positions: tl.constexpr,
    tile_channels: tl.constexpr,
) -> None:
    row, offset, _, inside = _tile(positions, channels, tile_positions, tile_channels)
    scale = tl.load(scale_ptr + row * per_row).to(tl.float32)
    zero = None
    if zero_ptr is not None:
        zero = tl.load(zero_ptr + row * per_row).to(tl.float32)
    grad = tl.load(grad_ptr + offset, inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offset, inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + offset, inside, other=0.0).to(tl.float32)
    codes = _codes(x, scale, zero, q_min - 1, q_max + 1)
    keep = ((codes >= q_min) & (codes <= q_max)) | (x == y)
    grad_x = grad
    if estimator == "ewgs":
        span = tl.abs(scale) * (q_max - q_min)
        grad_x += _nothing_if_nan(tl.load(strength_ptr).to(tl.float32) * tl.abs(grad) * ((x - y) / span))
    grad_x = tl.where(keep, grad_x, 0.0)
    if estimator == "pege":
        grad_x += _nothing_if_nan(tl.load(strength_ptr).to(tl.float32) * (x - y))
    tl.store(grad_x_ptr + offset, grad_x.to(grad_x_ptr.dtype.element_ty), inside)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(grad * _nothing_if_nan(y - tl.where(keep, x, 0.0))))


# --- on the host ---------------------------------------------------------------------------------------------


def _tile_of(layout: Layout) -> tuple[int, int]:
    """Powers of two that hold all positions and channels, or as many as go into the largest tile."""
    positions, channels = (1 << (size - 1).bit_length() for size in (layout.positions, layout.channels))
    channels = min(channels, LARGEST_TILE)
    return min(positions, LARGEST_TILE // channels), channels


def _programs(layout: Layout, tile: tuple[int, int]) -> int:
    return layout.rows * -(-layout.positions // tile[0]) * -(-layout.channels // tile[1])


def _ran(kernel: Any, programs: int, x: Tensor, *args: Any) -> bool:
    """Launch a kernel on the device of ``x``; the first failure warns, and is the last launch."""
    global _usable
    try:
        with torch.cuda.device(x.get_device()):
            kernel[(programs,)](*args, enable_fp_fusion=False)  # rounded as often as torch does
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _usable = False
        warnings.warn(
            f"Triton can not run here ({type(error).__name__}: {str(error).partition(chr(10))[0][:200]}).\n"
            "  fake quantization goes on without it, and is slower; Triton needs a C compiler (gcc).",
            PegeWarning,
            stacklevel=2,
        )
        return False
    return True


def forward(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    inverse: Tensor | None,
    rate: Tensor | None,
    key: Tensor | None,
    q_min: int,
    q_max: int,
) -> Tensor | None:
    """Return y in the memory layout of ``x``; None if the kernels do not serve this."""
    if rate is None or key is None:
        rate = key = None
    elif rate.ndim or key.dtype is not torch.int32 or not key.is_contiguous():
        return None
    layout = layout_of(x, (scale, zero_point), DTYPES, rate, key) if _usable and inverse is None else None
    if layout is None:
        return None
    y, tile = torch.empty_like(x), _tile_of(layout)
    args = (x, y, scale, zero_point, rate, key, layout.positions, layout.channels, float(q_min), float(q_max))
    is_part = key is not None and key.ndim > 0
    return y if _ran(_forward, _programs(layout, tile), x, *args, is_part, layout.per_row, *tile) else None


def backward(
    estimator: str,
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    inverse: Tensor | None,
    strength: Tensor,
    q_min: int,
    q_max: int,
) -> tuple[Tensor, Tensor] | None:
    """Return dL/dx_c and dL/ds; None if the kernels do not serve this. ``estimator``: one of ``ESTIMATORS``."""
    serves = _usable and inverse is None and strength.ndim == 0
    layout = layout_of(x, (scale, zero_point), DTYPES, grad, y, strength) if serves else None
    if layout is None:
        return None
    if estimator == "pege-relative":
        estimator, strength = "pege", strength * grad.abs().mean(dtype=torch.float32)
    grad, y = (t.contiguous(memory_format=layout.memory) for t in (grad, y))
    grad_x, tile = torch.empty_like(x), _tile_of(layout)
    programs = _programs(layout, tile)
    sums = torch.empty(programs, dtype=torch.float32, device=x.device)
    sizes = layout.positions, layout.channels
    args = (grad, x, y, grad_x, sums, scale, zero_point, strength, *sizes, float(q_min), float(q_max))
    if not _ran(_backward, programs, x, *args, estimator, layout.per_row, *tile):
        return None
    slope = sums if programs == scale.numel() else sums.view(scale.numel(), -1).sum(1)
    return grad_x, (slope.view(scale.shape) / scale).to(scale.dtype)
