"""Numbers that are computed from sizes, or read from a tensor, in ONNX.

A whole number is an int64 tensor of one element, another one a float64 tensor of one element, as Python computes.
"""

import math
import operator
from typing import Any

import torch

from pege_fx.export.writer import Handler, Value, Writer, writes


def in_one_type(w: Writer, *values: Any) -> list[Value]:
    """Return numbers of the graph and of Python as they are computed together: in float64 if one of them is not whole."""
    whole = all(value.dtype is torch.int64 if isinstance(value, Value) else isinstance(value, int) for value in values)
    dtype = torch.int64 if whole else torch.float64
    return [w.cast(value, dtype) if isinstance(value, Value) else w.constant([value], dtype) for value in values]


def _arithmetic(kind: str) -> Handler:
    def write(w: Writer, *values: Any) -> Value:
        return w.op(kind, *in_one_type(w, *values))

    return write


def _compared(kind: str) -> Handler:
    def write(w: Writer, a: Any, b: Any) -> Value:
        return w.op(kind, *in_one_type(w, a, b), dtype=torch.bool)

    return write


def divide(w: Writer, a: Any, b: Any) -> Value:
    return w.op("Div", *(w.cast(value, torch.float64) for value in in_one_type(w, a, b)))


def remainder(w: Writer, a: Any, b: Any) -> Value:
    """a - floor(a / b) b, with the sign of b; Mod of ONNX has it for whole numbers alone."""
    x, y = in_one_type(w, a, b)
    if x.dtype is torch.int64:
        return w.op("Mod", x, y)
    return w.op("Sub", x, w.op("Mul", w.op("Floor", w.op("Div", x, y)), y))


def floor_divide(w: Writer, a: Any, b: Any) -> Value:
    """Rounded down; Div of ONNX rounds whole numbers to zero, so the remainder goes first."""
    x, y = in_one_type(w, a, b)
    if x.dtype is torch.int64:
        return w.op("Div", w.op("Sub", x, w.op("Mod", x, y)), y)
    return w.op("Floor", w.op("Div", x, y))


def _rounded(kind: str | None) -> Handler:
    """To a whole number; without an operator what a cast does: to zero."""

    def write(w: Writer, x: Any) -> Value:
        (value,) = in_one_type(w, x)
        return w.cast(value if kind is None or value.dtype is torch.int64 else w.op(kind, value), torch.int64)

    return write


def as_float(w: Writer, x: Any) -> Value:
    (value,) = in_one_type(w, x)
    return w.cast(value, torch.float64)


def choose(w: Writer, condition: Any, a: Any, b: Any) -> Value:
    if not isinstance(condition, Value):
        return w.scalar(a if condition else b)
    x, y = in_one_type(w, a, b)
    return w.op("Where", condition, x, y, dtype=x.dtype)


SIZES: dict[Any, Handler] = {
    operator.add: _arithmetic("Add"), operator.sub: _arithmetic("Sub"), operator.mul: _arithmetic("Mul"),
    operator.neg: _arithmetic("Neg"), operator.pow: _arithmetic("Pow"), torch.sym_max: _arithmetic("Max"),
    torch.sym_min: _arithmetic("Min"), operator.floordiv: floor_divide, operator.mod: remainder, operator.truediv: divide,
    math.ceil: _rounded("Ceil"), math.floor: _rounded("Floor"), math.trunc: _rounded(None), round: _rounded("Round"),
    torch.sym_int: _rounded(None), torch.sym_float: as_float, torch.sym_ite: choose,
    operator.eq: _compared("Equal"), operator.lt: _compared("Less"), operator.le: _compared("LessOrEqual"),
    operator.gt: _compared("Greater"), operator.ge: _compared("GreaterOrEqual"),
}  # fmt: skip


@writes("_local_scalar_dense")
def number_in(w: Writer, x: Value) -> Value:
    """The number that a tensor of one element holds."""
    if x.dtype is torch.bool:
        return w.op("Reshape", x, w.constant([1]))
    return w.cast(w.op("Reshape", x, w.constant([1])), torch.float64 if x.dtype.is_floating_point else torch.int64)
