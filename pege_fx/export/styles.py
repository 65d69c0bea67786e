"""How quantized values are written in ONNX as codes: a style is a value that answers what ``OnnxStyle`` asks."""

from collections.abc import Collection
from dataclasses import dataclass, replace

import onnx
import torch
from onnx import TensorProto
from torch import Tensor

from pege_fx.export.writer import CODE_TYPES, Codes, Grid, UnmappedError, Value, Writer
from pege_fx.numerics.layouts import PerGroup, ScaleLayout
from pege_fx.numerics.spec import bounds_of

MIN_OPSET, INT4_OPSET, INT2_OPSET = 17, 21, 25
_TYPED_OPSET = 21  # QuantizeLinear has an output type of its own
HALF_OPSET = 19  # DequantizeLinear takes scales in half precision
_OFFSET = 128  # of signed codes that are written as uint8


@dataclass(frozen=True)
class CodeStyle:
    """Codes as tensors of the file.

    Args:
        name: what the style is called.
        packed: weights have the narrowest type that holds them; otherwise int8, followed by a Clip.
        unsigned: activations are uint8, signed ones moved by 128, and bounds that the model has in front of them are those of
            codes: what integer kernels of ONNX Runtime ask for.
    """

    name: str
    packed: bool
    unsigned: bool = False

    has_codes = True

    def default_opset(self, widths: Collection[int]) -> int:
        """INT2 where something has two bits, INT4 elsewhere; without packing what any runtime has."""
        if not self.packed:
            return MIN_OPSET
        return INT2_OPSET if 2 in widths else INT4_OPSET

    def functions(self, opset: int) -> list[onnx.FunctionProto]:
        """No function: all operators are ONNX's own."""
        return []

    def quantize(self, w: Writer, x: Value, grid: Grid) -> Value:
        """QuantizeLinear rounds x / s half to even and saturates, Clip does the rest: the codes of ``functional.quantize``.

        Activations below 8 bits stay in 8: ONNX Runtime moves a QuantizeLinear in front of a Reshape, for which it has no
        2-bit kernel, and a narrower type would make nothing faster or smaller.
        """
        zero, signed = grid.zero_point, grid.signed
        low, high = bounds_of(grid.bits, signed=signed, narrow=grid.narrow)
        offset = _OFFSET if signed and (self.unsigned or (zero is not None and w.opset >= _TYPED_OPSET)) else 0
        dtype = torch.int8 if signed and not offset else torch.uint8
        if self.unsigned and (clipped := w.clipped(x)) is not None:
            x, *ends = clipped  # rounding keeps the order, so the codes of the bounds are the bounds of the codes
            start, end = (grid.scale.new_tensor(value) / grid.scale.reshape(()) for value in ends)
            shift = 0.0 if zero is None else float(zero)
            low, high = (int(min(max(float(place.round()) + shift, low), high)) for place in (start, end))
        start_code = w.constant(torch.tensor(offset + (0 if zero is None else int(zero)), dtype=dtype))
        codes = w.op("QuantizeLinear", x, w.constant(grid.scale.reshape(())), start_code, dtype=dtype)
        if (low, high) != bounds_of(8, signed=signed):
            codes = clip(w, codes, low + offset, high + offset)
        codes.offset = offset
        return codes

    def dequantize(self, w: Writer, codes: Value, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Value:
        """Write the value of an activation's codes in the one way that ONNX Runtime's optimizer leaves right.

        It repeats a pair of Q and DQ behind a Transpose or Reshape. Before opset 21 the new Q gives uint8, unless a zero point
        says otherwise; from 21 on it has a type, and a signed zero point is taken for one of uint8: the file does not load.
        """
        if codes.offset:
            zero_point = codes.offset + (torch.zeros_like(scale) if zero_point is None else zero_point)
            codes = replace(codes, dtype=torch.uint8)
        elif w.opset < _TYPED_OPSET:
            zero_point = torch.zeros_like(scale) if zero_point is None else zero_point
        elif zero_point is not None and codes.dtype is torch.int8:
            return w.cast(_shifted(w, codes, scale, zero_point), dtype)
        return _dequantized(w, codes, None, scale, zero_point, dtype)

    def weight(self, w: Writer, made: Codes, name: str) -> Value:
        """Write codes, packed as the opset allows, and their value."""
        signed = made.codes.dtype is not torch.uint8
        kind = TensorProto.INT32 if made.bits == 32 else CODE_TYPES[self.stored_bits(w.opset, made.bits), signed]
        codes = w.constant(made.codes, onnx_type=kind, name=name)
        if not self.packed and made.bits < 8:
            codes = clip(w, codes, *bounds_of(made.bits, signed=signed))
        return _dequantized(w, codes, kind, made.scale, made.zero_point, made.dtype)

    def stored_bits(self, opset: int, bits: int) -> int:
        """The bits of the narrowest ONNX type that holds a weight's codes of so many bits."""
        if self.packed and bits <= 2 and opset >= INT2_OPSET:
            return 2
        return 4 if self.packed and bits <= 4 and opset >= INT4_OPSET else 8


QDQ = CodeStyle("qdq", packed=True)
QCDQ = CodeStyle("qcdq", packed=False)


def clip(w: Writer, codes: Value, low: int, high: int) -> Value:
    """Write codes kept between two others."""
    return w.op("Clip", codes, *(w.constant(torch.tensor(end, dtype=codes.dtype)) for end in (low, high)))


def blocked(
    w: Writer, codes: Value, scale: Tensor, zero: Tensor | None, bits: int, layout: ScaleLayout, axis: int | None
) -> Value:
    """DequantizeLinear with a block size: a weight with one scale for each group of its inputs."""
    made = codes.constant
    if not isinstance(layout, PerGroup) or layout.pad or axis != 0 or made is None or made.ndim != 2:
        raise UnmappedError(
            f"{codes.name or 'codes'} with one scale per {layout}: a file has groups of a matrix's inputs alone"
        )
    if w.opset < _TYPED_OPSET or not isinstance(w.style, CodeStyle) or not w.style.packed:
        raise UnmappedError(f'{codes.name} with one scale per {layout}: needs style="qdq" and opset {_TYPED_OPSET} or later')
    kind = CODE_TYPES[w.style.stored_bits(w.opset, bits), made.dtype is not torch.uint8]
    stored = w.constant(made, onnx_type=kind, name=codes.name)
    start = None if zero is None else w.constant(zero.to(made.dtype), onnx_type=kind)
    return w.op("DequantizeLinear", stored, w.constant(scale), start, dtype=scale.dtype, axis=1, block_size=layout.size)


def fixed(value: Value | None) -> Tensor | None:
    """Return a scale or zero point, which has to be a constant."""
    if value is None:
        return None
    if value.constant is None:
        raise UnmappedError("its scale is computed from the inputs")
    return value.constant


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
