"""Quantize and dequantize in ONNX: weights in real 4-bit and 2-bit types where the opset has them, else int8 and Clip."""

from dataclasses import replace
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from pege_fx.export import qonnx
from pege_fx.export.steps import DEQUANTIZE, QUANTIZE
from pege_fx.export.writer import CODE_TYPES, Codes, Pending, UnmappedError, Value, Writer, writes
from pege_fx.numerics.layouts import PerGroup, ScaleLayout, layout_named
from pege_fx.numerics.spec import bounds_of

INT4_OPSET, INT2_OPSET = 21, 25
_TYPED_OPSET = 21  # QuantizeLinear has an output type of its own
_HALF_OPSET = 19  # DequantizeLinear takes scales in half precision
_OFFSET = 128  # of signed codes that are written as uint8


def code_bits(w: Writer, bits: int) -> int:
    """Return the bits of the narrowest ONNX type that holds a weight's codes of so many bits."""
    if w.style == "qdq" and bits <= 2 and w.opset >= INT2_OPSET:
        return 2
    return 4 if w.style == "qdq" and bits <= 4 and w.opset >= INT4_OPSET else 8


def _fixed(value: Value | None) -> Tensor | None:
    if value is None:
        return None
    if value.constant is None:
        raise UnmappedError("its scale is computed from the inputs")
    return value.constant


@writes(QUANTIZE)
def quantize(
    w: Writer, x: Value, scale: Value, zero_point: Value | None = None, lower: Value | None = None, width: Value | None = None,
    inverse: Value | None = None, *, bits: int, signed: bool, narrow: bool = False, format: str | None = None,
    layout: str | None = None, axis: int | None = None,
) -> Value:  # fmt: skip
    """QuantizeLinear rounds x / s half to even and saturates, Clip does the rest: the codes of ``functional.quantize``.

    Activations below 8 bits stay int8: ONNX Runtime moves a QuantizeLinear in front of a Reshape, for which it has no 2-bit
    kernel, and a narrower type would make nothing faster or smaller.
    """
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
    step, zero = _fixed(scale), _fixed(zero_point)
    assert step is not None
    step = step.to(x.dtype)  # half precision is quantized in float32, its scale as it is
    low, high = bounds_of(bits, signed=signed, narrow=narrow)
    dtype = torch.int8 if signed else torch.uint8
    if step.numel() != 1 or (zero is not None and (zero.numel() != 1 or float(zero) != round(float(zero)))):
        raise UnmappedError("an activation with more than one scale, or whose zero point is no integer")
    if w.style == "qonnx":
        return Value("", dtype, x.shape, pending=Pending(x, step, zero, bits, signed, narrow))
    offset = _OFFSET if signed and zero is not None and w.opset >= _TYPED_OPSET else 0
    dtype = torch.uint8 if offset else dtype
    start = w.constant(torch.tensor(offset + (0 if zero is None else int(zero)), dtype=dtype))
    codes = w.op("QuantizeLinear", x, w.constant(step.reshape(())), start, dtype=dtype)
    if (low, high) != bounds_of(8, signed=signed):
        codes = _clipped(w, codes, low + offset, high + offset)
    codes.offset = offset
    return codes


def _clipped(w: Writer, codes: Value, low: int, high: int) -> Value:
    return w.op("Clip", codes, *(w.constant(torch.tensor(end, dtype=codes.dtype)) for end in (low, high)))


@writes(DEQUANTIZE)
def dequantize(
    w: Writer, codes: Value, scale: Value, zero_point: Value | None = None, *, bits: int, dtype: torch.dtype | None = None,
    format: str | None = None, layout: str | None = None, axis: int | None = None,
) -> Value:  # fmt: skip
    """DequantizeLinear: (code - z) * s. A zero point between two codes is subtracted in float."""
    if format is not None:
        raise UnmappedError(f"{codes.name or 'codes'} in the number format {format}: files are written of whole numbers")
    step, zero = _fixed(scale), _fixed(zero_point)
    if step is None:
        raise UnmappedError("a scale that is computed in each call: files are written with scales that are fixed")
    if layout is not None:
        return _blocked(w, codes, step, zero, bits, layout_named(layout), axis, dtype or step.dtype)
    wanted = dtype or step.dtype
    if w.opset < _HALF_OPSET or w.style == "qonnx":
        step, zero = (
            None if part is None else part.to(torch.promote_types(part.dtype, torch.float32)) for part in (step, zero)
        )
        assert step is not None
    if codes.constant is not None:
        made = Codes(codes.constant, step, zero, bits, wanted)
        value = dequantize_weight(w, made, codes.name)
        value.codes = made
        return value
    if codes.pending is not None:
        return w.cast(qonnx.activation(w, codes.pending, step, zero), wanted)
    return _dequantized_activation(w, codes, step, zero, wanted)


def _blocked(
    w: Writer, codes: Value, scale: Tensor, zero: Tensor | None, bits: int, layout: ScaleLayout, axis: int | None,
    dtype: torch.dtype,
) -> Value:  # fmt: skip
    """DequantizeLinear with a block size: a weight with one scale for each group of its inputs."""
    made = codes.constant
    if not isinstance(layout, PerGroup) or layout.pad or axis != 0 or made is None or made.ndim != 2:
        raise UnmappedError(
            f"{codes.name or 'codes'} with one scale per {layout}: a file has groups of a matrix's inputs alone"
        )
    if w.opset < _TYPED_OPSET or w.style != "qdq":
        raise UnmappedError(f'{codes.name} with one scale per {layout}: needs style="qdq" and opset {_TYPED_OPSET} or later')
    kind = CODE_TYPES[code_bits(w, bits), made.dtype is not torch.uint8]
    stored = w.constant(made, onnx_type=kind, name=codes.name)
    start = None if zero is None else w.constant(zero.to(made.dtype), onnx_type=kind)
    value = w.op("DequantizeLinear", stored, w.constant(scale), start, dtype=scale.dtype, axis=1, block_size=layout.size)
    return w.cast(value, dtype)


def _dequantized_activation(w: Writer, codes: Value, step: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Value:
    """Write the value of an activation's codes in the one way that ONNX Runtime's optimizer leaves right.

    It repeats a pair of Q and DQ behind a Transpose or Reshape. Before opset 21 the new Q gives uint8, unless a zero point
    says otherwise; from 21 on it has a type, and a signed zero point is taken for one of uint8: the file does not load.
    """
    if w.opset < _TYPED_OPSET:
        zero = torch.zeros_like(step) if zero is None else zero
    elif codes.offset:
        zero = codes.offset + (torch.zeros_like(step) if zero is None else zero)
        codes = replace(codes, dtype=torch.uint8)
    elif zero is not None and codes.dtype is torch.int8:
        return w.cast(_shifted(w, codes, step, zero), dtype)
    return _dequantized(w, codes, None, step, zero, dtype)


def dequantize_weight(w: Writer, made: Codes, name: str) -> Value:
    """Write a weight's codes, packed as the opset allows, and their value."""
    if w.style == "qonnx":
        return w.cast(qonnx.weight(w, made, name), made.dtype)
    signed = made.codes.dtype is not torch.uint8
    kind = TensorProto.INT32 if made.bits == 32 else CODE_TYPES[code_bits(w, made.bits), signed]
    codes = w.constant(made.codes, onnx_type=kind, name=name)
    if w.style == "qcdq" and made.bits < 8:
        codes = _clipped(w, codes, *bounds_of(made.bits, signed=signed))
    return _dequantized(w, codes, kind, made.scale, made.zero_point, made.dtype)


def _dequantized(w: Writer, codes: Value, kind: int | None, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Value:
    axis = _axis(scale)
    fits = zero is None or (bool((zero == zero.round()).all()) and _in_range(zero, kind, codes.dtype))
    if axis is None or not fits:
        return w.cast(_shifted(w, codes, scale, zero), dtype)
    steps = scale.reshape(()) if scale.numel() == 1 else scale.flatten()
    start = None
    if zero is not None:
        start = w.constant(zero.to(codes.dtype).expand(scale.shape).reshape(steps.shape), onnx_type=kind)
    value = w.op("DequantizeLinear", codes, w.constant(steps), start, dtype=scale.dtype, axis=None if steps.ndim == 0 else axis)
    return w.cast(value, dtype)


def _shifted(w: Writer, codes: Value, scale: Tensor, zero: Tensor | None) -> Value:
    """Write (code - z) * s in float."""
    value = w.op("DequantizeLinear", codes, w.constant(torch.ones((), dtype=scale.dtype)), dtype=scale.dtype)
    if zero is not None:
        value = w.op("Sub", value, w.constant(zero))
    return w.op("Mul", value, w.constant(scale))


def _axis(scale: Tensor) -> int | None:
    """Return the one dimension along which scales differ (0 if none does), or None if there are several."""
    axes = [axis for axis, size in enumerate(scale.shape) if size > 1]
    return None if len(axes) > 1 else (axes or [0])[0]


def _in_range(zero: Tensor, kind: int | None, dtype: torch.dtype) -> bool:
    """Whether a zero point is a value of the codes' own type."""
    bits = {CODE_TYPES[bits, signed]: (bits, signed) for bits, signed in CODE_TYPES}.get(kind or 0)
    limits = torch.iinfo(dtype)
    low, high = (limits.min, limits.max) if bits is None else bounds_of(bits[0], signed=bits[1])
    return bool((zero >= low).all() and (zero <= high).all())


def transposed(w: Writer, weight: Value, name: str) -> Value:
    """Return a weight with its two dimensions exchanged; one that is stored as codes is stored so."""
    made = weight.codes
    if made is None or made.codes.ndim != 2:
        if weight.constant is not None:
            return w.constant(weight.constant.t())
        return w.op("Transpose", weight, perm=[1, 0])
    turned = Codes(made.codes.t().contiguous(), _turned(made.scale), _turned(made.zero_point), made.bits, made.dtype)
    value = dequantize_weight(w, turned, name)
    value.codes = turned
    return value


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
