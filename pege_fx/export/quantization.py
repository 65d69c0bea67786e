"""Quantize and dequantize in ONNX, in whatever style; weights in another order stay codes."""

from typing import Any

import torch
from torch import Tensor

from pege_fx.export.steps import DEQUANTIZE, QUANTIZE
from pege_fx.export.styles import HALF_OPSET, blocked, fixed
from pege_fx.export.writer import Codes, Grid, UnmappedError, Value, Writer, writes
from pege_fx.numerics.layouts import layout_named


@writes(QUANTIZE)
def quantize(
    w: Writer, x: Value, scale: Value, zero_point: Value | None = None, lower: Value | None = None, width: Value | None = None,
    inverse: Value | None = None, *, bits: int, signed: bool, narrow: bool = False, format: str | None = None,
    layout: str | None = None, axis: int | None = None,
) -> Value:  # fmt: skip
    """Write the codes of an activation, as the style has it; an interval is mapped to [0, 1] before."""
    if format is not None or layout is not None or inverse is not None:
        what = layout if format is None else f"{format}, {layout}"
        raise UnmappedError(
            f"an activation in {what or 'a scale of its own'}: files are written of whole numbers with fixed scales"
        )
    if x.dtype is torch.float64:
        raise UnmappedError("ONNX quantizes no float64, give the model and its inputs in float32")
    x = w.cast(x, torch.promote_types(x.dtype, torch.float32))
    if lower is not None and width is not None:
        x = w.op("Div", w.op("Sub", x, lower), width)
    step, zero = fixed(scale), fixed(zero_point)
    assert step is not None
    step = step.to(x.dtype)  # half precision is quantized in float32, its scale as it is
    if step.numel() != 1 or (zero is not None and (zero.numel() != 1 or float(zero) != round(float(zero)))):
        raise UnmappedError("an activation with more than one scale, or whose zero point is no integer")
    return w.style.quantize(w, x, Grid(step, zero, bits, signed, narrow))


@writes(DEQUANTIZE)
def dequantize(
    w: Writer, codes: Value, scale: Value, zero_point: Value | None = None, *, bits: int, dtype: torch.dtype | None = None,
    format: str | None = None, layout: str | None = None, axis: int | None = None,
) -> Value:  # fmt: skip
    """DequantizeLinear: (code - z) * s. A zero point between two codes is subtracted in float."""
    if format is not None:
        raise UnmappedError(f"{codes.name or 'codes'} in the number format {format}: files are written of whole numbers")
    step, zero = fixed(scale), fixed(zero_point)
    if step is None:
        raise UnmappedError("a scale that is computed in each call: files are written with scales that are fixed")
    wanted = dtype or step.dtype
    if layout is not None:
        return w.cast(blocked(w, codes, step, zero, bits, layout_named(layout), axis), wanted)
    if w.opset < HALF_OPSET or not w.style.has_codes:
        step, zero = (_wide(step), None if zero is None else _wide(zero))
    if codes.constant is None:
        return w.style.dequantize(w, codes, step, zero, wanted)
    return dequantize_weight(w, Codes(codes.constant, step, zero, bits, wanted), codes.name)


def _wide(value: Tensor) -> Tensor:
    """A value in float32 at least."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def dequantize_weight(w: Writer, made: Codes, name: str) -> Value:
    """Write a weight's codes and their value, which knows them."""
    value = w.style.weight(w, made, name)
    value.codes = made
    return value


def transposed(w: Writer, weight: Value, name: str) -> Value:
    """Return a weight with its two dimensions exchanged; one that is stored as codes is stored so."""
    made = weight.codes
    if made is None or made.codes.ndim != 2:
        if weight.constant is not None:
            return w.constant(weight.constant.t())
        return w.op("Transpose", weight, perm=[1, 0])
    turned = Codes(made.codes.t().contiguous(), _turned(made.scale), _turned(made.zero_point), made.bits, made.dtype)
    return dequantize_weight(w, turned, name)


def rows(w: Writer, value: Value, order: list[int]) -> Value:
    """Return a tensor with its rows in another order; one that is stored as codes is stored so."""
    if order == sorted(order):
        return value
    made = value.codes
    if made is None:
        return w.op("Gather", value, w.constant(order), axis=0) if value.constant is None else w.constant(value.constant[order])

    def moved(grid: Tensor | None) -> Tensor | None:
        return grid[order] if grid is not None and grid.ndim and len(grid) > 1 else grid

    scale = moved(made.scale)
    assert scale is not None
    ordered = Codes(made.codes[order], scale, moved(made.zero_point), made.bits, made.dtype)
    return dequantize_weight(w, ordered, f"{value.name}_gates")


def _turned(grid: Any) -> Any:
    return grid.t().contiguous() if isinstance(grid, Tensor) and grid.ndim == 2 else grid
