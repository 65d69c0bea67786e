"""QONNX: one ``Quant`` node for quantize and dequantize together, which says the bits, whatever they are.

``Quant`` (A. Pappalardo et al., "QONNX: Representing Arbitrary-Precision Quantized Neural Networks", arXiv 2206.07527) is
no operator of ONNX. The file brings its definition along as a function in ONNX's own operators, so that the checker knows
its shapes and any runtime runs it; tools that know ``Quant``, such as FINN, see the node and pass over the function.
"""

from collections.abc import Collection
from typing import Any

import onnx
import torch
from onnx import parser
from torch import Tensor

from pege_fx.export.styles import MIN_OPSET
from pege_fx.export.writer import Codes, Grid, Pending, UnmappedError, Value, Writer
from pege_fx.numerics.functional import dequantize

DOMAIN, VERSION = "qonnx.custom_op.general", 1


_DEFINITION = """
<domain: "{domain}", opset_import: ["": {opset}]>
Quant <signed, narrow, rounding_mode> (x, scale, zero_point, bits) => (y) {{
    signed_number = Constant <value_int: int = @signed> ()
    narrow_number = Constant <value_int: int = @narrow> ()
    signed_value = CastLike (signed_number, x)
    narrow_value = CastLike (narrow_number, x)
    two = Constant <value_float: float = 2.0> ()
    one = Constant <value_float: float = 1.0> ()
    free_bits = Sub (bits, signed_value)
    half = Pow (two, free_bits)
    below = Sub (half, narrow_value)
    lowest = Mul (signed_value, below)
    low = Neg (lowest)
    unsigned_value = Sub (one, signed_value)
    dropped = Mul (unsigned_value, narrow_value)
    top = Sub (half, one)
    high = Sub (top, dropped)
    steps = Div (x, scale)
    moved = Add (steps, zero_point)
    rounded = Round (moved)
    codes = Clip (rounded, low, high)
    back = Sub (codes, zero_point)
    y = Mul (back, scale)
}}
"""


def definition(opset: int) -> onnx.FunctionProto:
    """Return ``Quant`` in ONNX's own operators, for rounding_mode "ROUND" (half to even) and a grid of at least two bits."""
    return parser.parse_function(_DEFINITION.format(domain=DOMAIN, opset=opset))


class QuantStyle:
    """``Quant`` nodes: a quantize and its dequantize together. Codes are no tensors of the file."""

    name = "qonnx"
    has_codes = False

    def default_opset(self, widths: Collection[int]) -> int:
        """The oldest: the types of codes do not matter."""
        return MIN_OPSET

    def functions(self, opset: int) -> list[onnx.FunctionProto]:
        """The definition of ``Quant``."""
        return [definition(opset)]

    def quantize(self, w: Writer, x: Value, grid: Grid) -> Value:
        """Write nothing: what is dequantized says from where."""
        dtype = torch.int8 if grid.signed else torch.uint8
        pending = Pending(x, grid.scale, grid.zero_point, grid.bits, grid.signed, grid.narrow)
        return Value("", dtype, x.shape, pending=pending)

    def dequantize(self, w: Writer, codes: Value, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Value:
        """Write the value of an activation's codes; where that lies on a grid of its own, the codes come in between."""
        pending = codes.pending
        if pending is None:
            raise UnmappedError("it reads codes that are an input, and QONNX has none")
        if torch.equal(pending.scale, scale) and _same(pending.zero_point, zero_point):
            value = _quant(w, pending.x, scale, zero_point, pending.bits, pending.signed, pending.narrow)
            return w.cast(value, dtype)
        steps = w.op("Div", pending.x, w.constant(pending.scale))
        value = _quant(w, steps, torch.ones(()), pending.zero_point, pending.bits, pending.signed, pending.narrow)
        shift = _or_zero(pending.zero_point) - _or_zero(zero_point)
        if bool(shift.any()):
            value = w.op("Add", value, w.constant(shift.to(scale.dtype)))
        return w.cast(w.op("Mul", value, w.constant(scale)), dtype)

    def weight(self, w: Writer, made: Codes, name: str) -> Value:
        """Write a weight's values, which ``Quant`` maps to themselves."""
        values = dequantize(made.codes, made.scale, made.zero_point, bits=made.bits)
        stored = w.constant(values, name=name.removesuffix("_codes"))
        signed = made.codes.dtype is not torch.uint8
        return w.cast(_quant(w, stored, made.scale, made.zero_point, made.bits, signed, False), made.dtype)


QONNX = QuantStyle()


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return bool((_or_zero(a) == _or_zero(b)).all())


def _or_zero(zero_point: Tensor | None) -> Tensor:
    return torch.zeros(()) if zero_point is None else zero_point


def _quant(w: Writer, x: Value, scale: Tensor, zero_point: Tensor | None, bits: int, signed: bool, narrow: bool) -> Value:
    grid = (w.constant(part.to(x.dtype)) for part in (scale, _or_zero(zero_point), torch.tensor(float(bits))))
    settings: dict[str, Any] = {"signed": int(signed), "narrow": int(narrow and signed), "rounding_mode": "ROUND"}
    return w.op("Quant", x, *grid, domain=DOMAIN, **settings)
