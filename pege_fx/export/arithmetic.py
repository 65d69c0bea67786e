"""Element-wise operators, reductions and comparisons in ONNX."""

import math
from typing import Any

import torch

from pege_fx.export.writer import TABLE, Handler, UnmappedError, Value, Writer, writes

_UNARY = {
    "relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "abs": "Abs",
    "neg": "Neg", "floor": "Floor", "ceil": "Ceil", "round": "Round", "sin": "Sin", "cos": "Cos", "tan": "Tan",
    "atan": "Atan", "sinh": "Sinh", "cosh": "Cosh", "erf": "Erf", "reciprocal": "Reciprocal", "sign": "Sign", "sgn": "Sign",
    "asin": "Asin", "acos": "Acos", "asinh": "Asinh", "acosh": "Acosh", "atanh": "Atanh",
    "hardswish": "HardSwish", "selu": "Selu", "logical_not": "Not", "bitwise_not": "Not",
}  # fmt: skip
_BINARY = {
    "mul.Tensor": "Mul", "mul.Scalar": "Mul", "maximum": "Max", "minimum": "Min", "pow.Tensor_Tensor": "Pow",
    "pow.Tensor_Scalar": "Pow", "pow.Scalar": "Pow", "logical_and": "And", "logical_or": "Or", "logical_xor": "Xor",
    "bitwise_and.Tensor": "And", "bitwise_or.Tensor": "Or", "__and__.Tensor": "And", "__or__.Tensor": "Or",
    "bitwise_xor.Tensor": "Xor", "__xor__.Tensor": "Xor",
}  # fmt: skip
_COMPARED = {"eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"}


def _unary(kind: str) -> Handler:
    def write(w: Writer, x: Value) -> Value:
        if kind == "Not" and x.dtype is not torch.bool:
            raise UnmappedError("bits of integers")
        return w.op(kind, w.cast(x, w.result.dtype))

    return write


def binary(w: Writer, kind: str, a: Any, b: Any, dtype: torch.dtype | None = None) -> Value:
    """Write an operator on two tensors or numbers, computed in ``dtype`` (default: the result's)."""
    wanted = dtype or w.result.dtype
    return w.op(kind, w.operand(a, wanted), w.operand(b, wanted), dtype=wanted)


def _binary(kind: str) -> Handler:
    def write(w: Writer, a: Any, b: Any) -> Value:
        if kind in ("And", "Or", "Xor") and w.result.dtype is not torch.bool:
            raise UnmappedError("bits of integers")
        return binary(w, "And" if kind == "Mul" and w.result.dtype is torch.bool else kind, a, b)

    return write


def _compared(kind: str) -> Handler:
    def write(w: Writer, a: Value, b: Any) -> Value:
        both = torch.promote_types(a.dtype, b.dtype) if isinstance(b, Value) else a.dtype
        if isinstance(b, float) and not both.is_floating_point:
            both = torch.float32
        return w.op(kind, w.operand(a, both), w.operand(b, both), dtype=torch.bool)

    return write


for _name, _kind in _UNARY.items():
    writes(_name)(_unary(_kind))
for _name, _kind in _BINARY.items():
    writes(_name)(_binary(_kind))
for _name, _kind in _COMPARED.items():
    writes(f"{_name}.Tensor", f"{_name}.Scalar")(_compared(_kind))


@writes("ne.Tensor", "ne.Scalar")
def not_equal(w: Writer, a: Value, b: Any) -> Value:
    return w.op("Not", TABLE["aten.eq.Tensor"](w, a, b))


@writes("isnan", "isinf")
def is_special(w: Writer, x: Value) -> Value:
    return w.op("IsNaN" if "nan" in w.target else "IsInf", x, dtype=torch.bool)


@writes("add.Tensor", "add.Scalar")
def add(w: Writer, a: Any, b: Any, alpha: Any = 1) -> Value:
    return binary(w, "Add", a, b if alpha == 1 else binary(w, "Mul", b, alpha))


@writes("sub.Tensor", "sub.Scalar")
def subtract(w: Writer, a: Any, b: Any, alpha: Any = 1) -> Value:
    return binary(w, "Sub", a, b if alpha == 1 else binary(w, "Mul", b, alpha))


@writes("rsub.Tensor", "rsub.Scalar")
def subtract_from(w: Writer, a: Any, b: Any, alpha: Any = 1) -> Value:
    return subtract(w, b, a, alpha)


@writes("div.Tensor", "div.Scalar", "div.Tensor_mode", "div.Scalar_mode")
def divide(w: Writer, a: Any, b: Any, rounding_mode: str | None = None) -> Value:
    quotient = binary(w, "Div", a, b)
    if rounding_mode is None or (not quotient.dtype.is_floating_point and rounding_mode == "trunc"):
        return quotient
    if not quotient.dtype.is_floating_point:
        return w.cast(w.op("Floor", binary(w, "Div", a, b, torch.float64)), w.result.dtype)
    return w.op("Floor", quotient) if rounding_mode == "floor" else truncate(w, quotient)


@writes("trunc")
def truncate(w: Writer, x: Value) -> Value:
    return w.op("Mul", w.op("Sign", x), w.op("Floor", w.op("Abs", x)))


@writes("floor_divide")
def floor_divide(w: Writer, a: Any, b: Any) -> Value:
    return divide(w, a, b, "floor")


@writes("remainder.Scalar", "remainder.Tensor")
def remainder(w: Writer, a: Any, b: Any) -> Value:
    return binary(w, "Sub", a, binary(w, "Mul", divide(w, a, b, "floor"), b))


@writes("fmod.Scalar", "fmod.Tensor")
def remainder_like_c(w: Writer, a: Any, b: Any) -> Value:
    dtype = w.result.dtype
    return w.op("Mod", w.operand(a, dtype), w.operand(b, dtype), fmod=1)


@writes("log1p")
def log1p(w: Writer, x: Value) -> Value:
    return w.op("Log", binary(w, "Add", x, 1.0))


@writes("expm1")
def expm1(w: Writer, x: Value) -> Value:
    return binary(w, "Sub", w.op("Exp", w.cast(x, w.result.dtype)), 1.0)


@writes("log2", "log10")
def logarithm(w: Writer, x: Value) -> Value:
    return binary(w, "Div", w.op("Log", w.cast(x, w.result.dtype)), math.log(2 if "log2" in w.target else 10))


@writes("exp2")
def exp2(w: Writer, x: Value) -> Value:
    return binary(w, "Pow", 2.0, x)


@writes("erfc")
def erfc(w: Writer, x: Value) -> Value:
    return binary(w, "Sub", 1.0, w.op("Erf", x))


@writes("square")
def square(w: Writer, x: Value) -> Value:
    return binary(w, "Mul", x, x)


@writes("rsqrt")
def rsqrt(w: Writer, x: Value) -> Value:
    return w.op("Reciprocal", w.op("Sqrt", x))


@writes("clamp", "clamp.Tensor", "clip")
def clamp(w: Writer, x: Value, minimum: Any = None, maximum: Any = None) -> Value:
    if any(isinstance(end, Value) and end.rank for end in (minimum, maximum)):
        x = x if minimum is None else binary(w, "Max", x, minimum)
        return x if maximum is None else binary(w, "Min", x, maximum)
    dtype = w.result.dtype
    ends = [None if end is None else w.operand(end, dtype) for end in (minimum, maximum)]
    return w.op("Clip", w.cast(x, dtype), *ends)


@writes("clamp_min", "clamp_min.Tensor")
def clamp_min(w: Writer, x: Value, minimum: Any) -> Value:
    return clamp(w, x, minimum)


@writes("clamp_max", "clamp_max.Tensor")
def clamp_max(w: Writer, x: Value, maximum: Any) -> Value:
    return clamp(w, x, None, maximum)


@writes("hardtanh")
def hardtanh(w: Writer, x: Value, minimum: float = -1.0, maximum: float = 1.0) -> Value:
    return clamp(w, x, minimum, maximum)


@writes("relu6")
def relu6(w: Writer, x: Value) -> Value:
    return clamp(w, x, 0.0, 6.0)


@writes("hardsigmoid")
def hardsigmoid(w: Writer, x: Value) -> Value:
    return w.op("HardSigmoid", x, alpha=1 / 6, beta=0.5)


@writes("silu")
def silu(w: Writer, x: Value) -> Value:
    return binary(w, "Mul", x, w.op("Sigmoid", x))


@writes("gelu")
def gelu(w: Writer, x: Value, approximate: str = "none") -> Value:
    if w.opset >= 20:
        return w.op("Gelu", x, approximate=approximate)
    if approximate == "tanh":
        cubic = binary(w, "Mul", binary(w, "Pow", x, 3.0), 0.044715)
        bent = w.op("Tanh", binary(w, "Mul", binary(w, "Add", x, cubic), math.sqrt(2 / math.pi)))
    else:
        bent = w.op("Erf", binary(w, "Mul", x, math.sqrt(0.5)))
    return binary(w, "Mul", binary(w, "Mul", x, 0.5), binary(w, "Add", bent, 1.0))


@writes("mish")
def mish(w: Writer, x: Value) -> Value:
    return binary(w, "Mul", x, w.op("Tanh", w.op("Softplus", x)))


@writes("leaky_relu")
def leaky_relu(w: Writer, x: Value, slope: float = 0.01) -> Value:
    return w.op("LeakyRelu", x, alpha=float(slope))


@writes("rrelu")
def rrelu(w: Writer, x: Value, lower: float = 0.125, upper: float = 1 / 3, train: bool = False) -> Value:
    return leaky_relu(w, x, (lower + upper) / 2)


@writes("elu")
def elu(w: Writer, x: Value, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Value:
    if (scale, input_scale) != (1, 1):
        raise UnmappedError("elu with scales of its own")
    return w.op("Elu", x, alpha=float(alpha))


@writes("celu")
def celu(w: Writer, x: Value, alpha: float = 1.0) -> Value:
    return w.op("Celu", x, alpha=float(alpha))


@writes("prelu")
def prelu(w: Writer, x: Value, weight: Value) -> Value:
    if x.rank > 2 and weight.constant is not None:
        weight = w.constant(weight.constant.reshape(-1, *[1] * (x.rank - 2)))
    return w.op("PRelu", x, weight)


@writes("softplus")
def softplus(w: Writer, x: Value, beta: float = 1.0, threshold: float = 20.0) -> Value:
    if beta == 1:
        return w.op("Softplus", x)
    return binary(w, "Div", w.op("Softplus", binary(w, "Mul", x, beta)), beta)


@writes("log_sigmoid")
def log_sigmoid(w: Writer, x: Value) -> Value:
    return w.op("Neg", w.op("Softplus", w.op("Neg", x)))


@writes("softmax.int")
def softmax(w: Writer, x: Value, dim: int, dtype: torch.dtype | None = None) -> Value:
    return w.op("Softmax", w.cast(x, w.result.dtype), axis=dim)


@writes("_softmax")
def softmax_kernel(w: Writer, x: Value, dim: int, half_to_float: bool) -> Value:
    return softmax(w, x, dim)


@writes("log_softmax.int")
def log_softmax(w: Writer, x: Value, dim: int, dtype: torch.dtype | None = None) -> Value:
    return w.op("LogSoftmax", w.cast(x, w.result.dtype), axis=dim)


@writes("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def where(w: Writer, condition: Value, a: Any, b: Any) -> Value:
    dtype = w.result.dtype
    return w.op("Where", condition, w.operand(a, dtype), w.operand(b, dtype), dtype=dtype)


@writes("masked_fill.Scalar", "masked_fill.Tensor")
def masked_fill(w: Writer, x: Value, mask: Value, value: Any) -> Value:
    return where(w, mask, value, x)


# --- reductions ----------------------------------------------------------------------------------------------


def reduce(w: Writer, kind: str, x: Value, dims: Any, keepdim: bool) -> Value:
    """Write a reduction, of everything if no dimension is given; axes are an input from opset 18 on (sums: 13)."""
    axes = None if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    if axes is not None and (w.opset >= 18 or kind == "ReduceSum"):
        return w.op(kind, x, w.constant(axes), keepdims=int(keepdim))
    return w.op(kind, x, axes=axes, keepdims=int(keepdim))


def _reduction(kind: str) -> Handler:
    def write(w: Writer, x: Value, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
        return reduce(w, kind, w.cast(x, w.result.dtype), dims, keepdim)

    return write


writes("mean.dim")(_reduction("ReduceMean"))
writes("sum.dim_IntList")(_reduction("ReduceSum"))
writes("amax")(_reduction("ReduceMax"))
writes("amin")(_reduction("ReduceMin"))
writes("logsumexp")(_reduction("ReduceLogSumExp"))
writes("prod.dim_int")(_reduction("ReduceProd"))


def _whole(kind: str) -> Handler:
    def write(w: Writer, x: Value, dtype: Any = None) -> Value:
        return reduce(w, kind, w.cast(x, w.result.dtype), None, False)

    return write


for _name in ("mean", "sum", "max", "min", "prod"):
    writes(_name)(_whole(f"Reduce{_name.title()}"))


@writes("any", "any.dim", "any.dims")
def any_of(w: Writer, x: Value, dims: Any = None, keepdim: bool = False) -> Value:
    """Whether something is not zero; ONNX compares numbers, no truth values."""
    return w.cast(reduce(w, "ReduceMax", w.cast(w.cast(x, torch.bool), torch.int32), dims, keepdim), torch.bool)


@writes("linalg_vector_norm", "norm.ScalarOpt_dim")
def vector_norm(w: Writer, x: Value, order: Any = 2, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    if order in (1, 2, None):
        return reduce(w, "ReduceL1" if order == 1 else "ReduceL2", x, dims, keepdim)
    if order in (math.inf, -math.inf):
        return reduce(w, "ReduceMax" if order > 0 else "ReduceMin", w.op("Abs", x), dims, keepdim)
    powers = reduce(w, "ReduceSum", binary(w, "Pow", w.op("Abs", x), float(order)), dims, keepdim)
    return binary(w, "Pow", powers, 1 / order)


@writes("var.correction")
def variance(w: Writer, x: Value, dims: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Value:
    centred = w.op("Sub", x, reduce(w, "ReduceMean", x, dims, True))
    mean = reduce(w, "ReduceMean", w.op("Mul", centred, centred), dims, keepdim)
    axes = list(range(x.rank)) if not dims else [dims] if isinstance(dims, int) else list(dims)
    sizes = [x.size(axis) for axis in axes]
    less = 1 if correction is None else correction
    if None in sizes:
        shape = w.op("Gather", w.op("Shape", x, dtype=torch.int64), w.constant([axis % x.rank for axis in axes]), axis=0)
        counted = w.cast(w.op("ReduceProd", shape, keepdims=0), x.dtype)
        return w.op("Mul", mean, w.op("Div", counted, w.op("Relu", w.op("Sub", counted, w.constant(less, x.dtype)))))
    count = math.prod(size for size in sizes if size is not None)
    return w.op("Mul", mean, w.constant(count / max(count - less, 0), x.dtype))


@writes("std.correction")
def deviation(w: Writer, x: Value, dims: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Value:
    return w.op("Sqrt", variance(w, x, dims, correction=correction, keepdim=keepdim))


@writes("var_mean.correction")
def variance_and_mean(
    w: Writer, x: Value, dims: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> list[Value]:
    return [variance(w, x, dims, correction=correction, keepdim=keepdim), reduce(w, "ReduceMean", x, dims, keepdim)]


@writes("var.dim", "var")
def variance_or_unbiased(w: Writer, x: Value, dims: Any = None, unbiased: bool = True, keepdim: bool = False) -> Value:
    dims, unbiased = (None, dims) if isinstance(dims, bool) else (dims, unbiased)
    return variance(w, x, dims, correction=float(unbiased), keepdim=keepdim)


@writes("std.dim", "std")
def deviation_or_unbiased(w: Writer, x: Value, dims: Any = None, unbiased: bool = True, keepdim: bool = False) -> Value:
    return w.op("Sqrt", variance_or_unbiased(w, x, dims, unbiased, keepdim))


@writes("argmax", "argmin")
def argmax(w: Writer, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    if dim is None:
        x, dim = w.op("Reshape", x, w.constant([-1])), 0
    kind = "ArgMax" if "argmax" in w.target else "ArgMin"
    return w.op(kind, x, dtype=torch.int64, axis=dim, keepdims=int(keepdim))


@writes("max.dim", "min.dim")
def max_dim(w: Writer, x: Value, dim: int, keepdim: bool = False) -> list[Value]:
    kind = "Max" if "max" in w.target else "Min"
    places = w.op(f"Arg{kind}", x, dtype=torch.int64, axis=dim, keepdims=int(keepdim))
    return [reduce(w, f"Reduce{kind}", x, [dim], keepdim), places]


@writes("cumsum")
def cumsum(w: Writer, x: Value, dim: int, dtype: Any = None) -> Value:
    return w.op("CumSum", w.cast(x, w.result.dtype), w.constant(dim))
