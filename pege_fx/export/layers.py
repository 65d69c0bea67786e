"""Convolutions, products, attention and normalisations in ONNX."""

import math
from typing import Any

import torch

from pege_fx.export.arithmetic import binary, reduce
from pege_fx.export.quantization import transposed
from pege_fx.export.writer import LAID_OUT, UnmappedError, Value, Writer, writes

_MOVED = {"MaxPool", "Slice", "Gather", "Expand", "Clip", "Relu", "Resize", "DepthToSpace"}  # Q and DQ may be moved behind them


def _each(value: Any, dims: int) -> list[int]:
    """A setting for every spatial dimension, given once or for each."""
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def fixed_size(value: Value, axis: int) -> int:
    """Return the size of a dimension; one that is free can not be written."""
    size = value.size(axis)
    if size is None:
        raise UnmappedError(f"the size of dimension {axis} is not fixed")
    return size


def _batched(w: Writer, x: Value, dims: int) -> tuple[Value, bool]:
    """Give an unbatched input a batch of one; tell whether it was."""
    if x.rank == dims + 2:
        return x, False
    made = w.op("Unsqueeze", x, w.constant([0]), shape=(1, *x.shape))
    return made, True


def _unbatched(w: Writer, x: Value, was: bool) -> Value:
    return w.op("Squeeze", x, w.constant([0])) if was else x


@writes(*(f"conv{d}d.{kind}" for d in (1, 2, 3) for kind in ("default", "padding")))
def convolve(
    w: Writer, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Value:  # fmt: skip
    dims = weight.rank - 2
    kernel = [fixed_size(weight, axis) for axis in range(2, weight.rank)]
    dilations = _each(dilation, dims)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        pads = [total // 2 for total in totals] + [total - total // 2 for total in totals]
    else:
        pads = _each(0 if padding == "valid" else padding, dims) * 2
    x, was = _batched(w, x, dims)
    settings = {"strides": _each(stride, dims), "pads": pads, "dilations": dilations, "group": groups}
    return _unbatched(w, _with_bias(w, "Conv", x, weight, bias, kernel_shape=kernel, **settings), was)


def _with_bias(w: Writer, kind: str, x: Value, weight: Value, bias: Value | None, **settings: Any) -> Value:
    """Write a layer; the float bias of a quantized one is added behind it.

    ONNX Runtime's optimizer would round it to the unit of the accumulators (input scale times weight scale), which is
    coarse in few bits: ``convert(..., integer_bias=True)`` does that before anyone relies on the outputs.
    """
    if weight.constant is not None and w.style.has_codes and w.is_quantized(x, LAID_OUT | _MOVED):
        weight = _kept_in_float(w, weight)
    if bias is None or weight.codes is None or bias.codes is not None:
        return w.op(kind, x, weight, bias, **settings)
    shape = [-1, *[1] * (weight.rank - 2)]
    laid = w.constant(bias.constant.reshape(shape)) if bias.constant is not None else w.op("Reshape", bias, w.constant(shape))
    return binary(w, "Add", w.op(kind, x, weight, **settings), laid)


def _kept_in_float(w: Writer, weight: Value) -> Value:
    """Add zero to a float weight that reads an activation's codes, a zero that is dequantized.

    Between codes, ONNX Runtime's optimizer would round a weight to 8 bits; a constant alone, not what is computed from codes.
    """
    zero = w.constant(torch.zeros((), dtype=torch.int8))
    return w.op(
        "Add", weight, w.op("DequantizeLinear", zero, w.constant(1.0, weight.dtype), dtype=weight.dtype), shape=weight.shape
    )


@writes("conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input")
def convolve_transposed(
    w: Writer, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Value:  # fmt: skip
    dims = weight.rank - 2
    x, was = _batched(w, x, dims)
    made = _with_bias(
        w, "ConvTranspose", x, weight, bias, kernel_shape=[fixed_size(weight, axis) for axis in range(2, weight.rank)],
        strides=_each(stride, dims), pads=_each(padding, dims) * 2, output_padding=_each(output_padding, dims), group=groups,
        dilations=_each(dilation, dims),
    )  # fmt: skip
    return _unbatched(w, made, was)


@writes("convolution")
def convolution(
    w: Writer, x: Value, weight: Value, bias: Value | None, stride: Any, padding: Any, dilation: Any,
    is_transposed: bool, output_padding: Any, groups: int,
) -> Value:  # fmt: skip
    if is_transposed:
        return convolve_transposed(w, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return convolve(w, x, weight, bias, stride, padding, dilation, groups)


@writes("linear")
def linear(w: Writer, x: Value, weight: Value, bias: Value | None = None) -> Value:
    if x.rank == 2:
        return _with_bias(w, "Gemm", x, weight, bias, transB=1)
    product = matmul(w, x, transposed(w, weight, f"{weight.name}_transposed"))
    return product if bias is None else binary(w, "Add", product, bias)


@writes("matmul", "mm", "bmm")
def matmul(w: Writer, a: Value, b: Value) -> Value:
    """Write a product; a quantized weight that float values are multiplied by is read through a Reshape to its own shape.

    ONNX Runtime's optimizer makes a MatMulNBits of a MatMul that reads codes directly, and that rounds the other operand to
    8 bits (unless a session sets ``session.qdq_matmulnbits_accuracy_level``).
    """
    if b.codes is not None and w.style.has_codes and not w.is_quantized(a):
        b = w.op("Reshape", b, w.constant(list(b.codes.codes.shape)))
    return w.op("MatMul", a, b)


@writes("addmm", "baddbmm")
def add_product(w: Writer, start: Value, a: Value, b: Value, *, beta: Any = 1, alpha: Any = 1) -> Value:
    product = matmul(w, a, b)
    product = product if alpha == 1 else binary(w, "Mul", product, alpha)
    return binary(w, "Add", product, start if beta == 1 else binary(w, "Mul", start, beta))


@writes("einsum")
def einsum(w: Writer, equation: str, operands: list[Value], path: Any = None) -> Value:
    return w.op("Einsum", *operands, equation=equation.replace(" ", ""))


@writes("bilinear")
def bilinear(w: Writer, a: Value, b: Value, weight: Value, bias: Value | None = None) -> Value:
    if a.rank != 2:
        raise UnmappedError("a bilinear layer on more than two dimensions")
    made = w.op("Einsum", a, weight, b, equation="bi,oij,bj->bo")
    return made if bias is None else binary(w, "Add", made, bias)


@writes("embedding")
def embedding(
    w: Writer, weight: Value, indices: Value, padding_idx: int = -1, scale_grad: bool = False, sparse: bool = False
) -> Value:
    return w.op("Gather", weight, indices, dtype=weight.dtype, axis=0)


@writes("scaled_dot_product_attention")
def attention(
    w: Writer, query: Value, key: Value, value: Value, mask: Value | None = None, dropout: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Value:  # fmt: skip
    """softmax(q kT / sqrt(d) + mask) v, written out."""
    if enable_gqa:
        key, value = (_for_each_head(w, part, fixed_size(query, -3)) for part in (key, value))
    factor = scale if scale is not None else fixed_size(query, -1) ** -0.5
    order = list(range(key.rank))
    order[-2:] = order[-1], order[-2]
    # The factor last: ONNX Runtime's optimizer folds it in, and where the query is a product too (a value of codes), as one of
    # its factors it takes that product away, even from others who read it.
    scores = binary(w, "Mul", w.op("MatMul", query, w.op("Transpose", key, perm=order)), factor)
    if is_causal:
        mask = _causal_mask(w, query, key)
    if mask is not None and mask.dtype is torch.bool:
        mask = w.op("Where", mask, w.constant(0.0, w.result.dtype), w.constant(-math.inf, w.result.dtype), dtype=w.result.dtype)
    weights = w.op("Softmax", scores if mask is None else binary(w, "Add", scores, mask), axis=-1)
    return w.op("MatMul", weights, value)


def _causal_mask(w: Writer, query: Value, key: Value) -> Value:
    """What may be seen from where, (queries, keys): keys up to the query's own place."""
    count, seen = query.size(-2), key.size(-2)
    if count is not None and seen is not None:
        return w.constant(torch.full((count, seen), -math.inf, dtype=w.result.dtype).triu(1))
    places = []
    for x in (query, key):
        end = w.op("Squeeze", w.op("Shape", x, dtype=torch.int64, start=-2, end=-1), w.constant([0]))
        places.append(w.op("Range", w.constant(0), end, w.constant(1)))
    own = w.op("Unsqueeze", places[0], w.constant([1]))
    return w.op("LessOrEqual", places[1], own, dtype=torch.bool)


def _for_each_head(w: Writer, x: Value, heads: int) -> Value:
    """Repeat heads that several queries share: (batch, groups, length, size) to (batch, heads, length, size)."""
    if x.rank != 4:
        raise UnmappedError("attention with grouped heads, on other than four dimensions")
    wide = w.op("Tile", w.op("Unsqueeze", x, w.constant([2])), w.constant([1, 1, heads // fixed_size(x, 1), 1, 1]))
    return w.op("Reshape", wide, w.constant([0, heads, -1, fixed_size(x, 3)]), shape=(x.shape[0], heads, *x.shape[2:]))


# --- normalisations ------------------------------------------------------------------------------------------


def _normalized(
    w: Writer, x: Value, weight: Value | None, bias: Value | None, mean: Value | None, var: Value | None, eps: float
) -> Value:
    if mean is None or var is None:
        return _normalized_by_batch(w, x, weight, bias, eps)
    one, zero = torch.ones(mean.shape, dtype=mean.dtype), torch.zeros(mean.shape, dtype=mean.dtype)
    return w.op("BatchNormalization", x, weight or w.constant(one), bias or w.constant(zero), mean, var, epsilon=eps)


def _normalized_by_batch(w: Writer, x: Value, weight: Value | None, bias: Value | None, eps: float) -> Value:
    """By the statistics of what comes in: a norm that keeps none."""
    axes = [0, *range(2, x.rank)]
    centred = w.op("Sub", x, reduce(w, "ReduceMean", x, axes, True))
    variance = reduce(w, "ReduceMean", w.op("Mul", centred, centred), axes, True)
    made = w.op("Div", centred, w.op("Sqrt", w.op("Add", variance, w.constant(eps, x.dtype))))
    return _scaled(w, made, weight, bias, x.rank)


def _scaled(w: Writer, x: Value, weight: Value | None, bias: Value | None, rank: int) -> Value:
    """Multiply each channel by a weight and add a bias, where there are any."""
    trailing = w.constant([-1, *[1] * (rank - 2)])
    for kind, part in (("Mul", weight), ("Add", bias)):
        if part is not None:
            x = w.op(kind, x, w.op("Reshape", part, trailing))
    return x


@writes("_native_batch_norm_legit.no_stats")
def batch_norm_without_statistics(
    w: Writer, x: Value, weight: Value | None, bias: Value | None, training: bool, momentum: float, eps: float
) -> list[Value]:
    return [_normalized_by_batch(w, x, weight, bias, eps)]


@writes("_native_batch_norm_legit_no_training")
def batch_norm_kernel(
    w: Writer, x: Value, weight: Value | None, bias: Value | None, mean: Value, var: Value, momentum: float, eps: float
) -> list[Value]:
    return [_normalized(w, x, weight, bias, mean, var, eps)]


@writes("batch_norm")
def batch_norm(
    w: Writer, x: Value, weight: Value | None, bias: Value | None, mean: Value | None, var: Value | None,
    training: bool, momentum: float, eps: float, cudnn: bool,
) -> Value:  # fmt: skip
    return _normalized(w, x, weight, bias, None if training else mean, None if training else var, eps)


@writes("layer_norm")
def layer_norm(
    w: Writer, x: Value, shape: list[int], weight: Value | None = None, bias: Value | None = None,
    eps: float = 1e-5, cudnn: bool = False,
) -> Value:  # fmt: skip
    weight = weight or w.constant(torch.ones(tuple(shape), dtype=x.dtype))
    return w.op("LayerNormalization", x, weight, bias, axis=-len(shape), epsilon=eps)


@writes("rms_norm")
def rms_norm(w: Writer, x: Value, shape: list[int], weight: Value | None = None, eps: float | None = None) -> Value:
    axes = [-axis for axis in range(len(shape), 0, -1)]
    mean = reduce(w, "ReduceMean", binary(w, "Mul", x, x), axes, True)
    small = torch.finfo(x.dtype).eps if eps is None else eps
    made = binary(w, "Div", x, w.op("Sqrt", binary(w, "Add", mean, small)))
    return made if weight is None else binary(w, "Mul", made, weight)


@writes("group_norm")
def group_norm(
    w: Writer, x: Value, groups: int, weight: Value | None = None, bias: Value | None = None,
    eps: float = 1e-5, cudnn: bool = True,
) -> Value:  # fmt: skip
    """Normalised group by group as one long channel each, then scaled: no version of GroupNormalization is everywhere."""
    shape = w.op("Shape", x, dtype=torch.int64)
    flat = w.op("Reshape", x, w.constant([0, groups, -1]), shape=(x.shape[0], groups, None))
    ones, zeros = torch.ones(groups, dtype=x.dtype), torch.zeros(groups, dtype=x.dtype)
    made = w.op("InstanceNormalization", flat, w.constant(ones), w.constant(zeros), epsilon=eps)
    return _scaled(w, w.op("Reshape", made, shape), weight, bias, x.rank)


@writes("instance_norm")
def instance_norm(
    w: Writer, x: Value, weight: Value | None, bias: Value | None, mean: Value | None, var: Value | None,
    use_input_stats: bool, momentum: float, eps: float, cudnn: bool,
) -> Value:  # fmt: skip
    if not use_input_stats:
        return _normalized(w, x, weight, bias, mean, var, eps)
    return group_norm(w, x, fixed_size(x, 1), weight, bias, eps)
