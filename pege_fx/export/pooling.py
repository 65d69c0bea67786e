"""Pooling and resizing in ONNX."""

import math
from typing import Any

import torch

from pege_fx.export.arithmetic import reduce
from pege_fx.export.free_sizes import sizes_of
from pege_fx.export.layers import _batched, _each, _unbatched, fixed_size
from pege_fx.export.writer import UnmappedError, Value, Writer, writes


def _pads(
    x: Value, result: Any, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> list[int] | None:
    """Begin and end of every dimension so that windows come out as in torch, ceil_mode or not; None if sizes are free."""
    dims = len(kernel)
    ends = []
    for axis in range(dims):
        size, count = x.size(axis - dims), sizes_of(result)[axis - dims]
        if size is None or not isinstance(count, int):
            return None
        reach = (count - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1
        ends.append(max(reach - size - padding[axis], 0))
    return [*padding, *ends]


def _settings(dims: int, kernel: Any, stride: Any, padding: Any, dilation: Any) -> tuple[list[int], ...]:
    sizes = _each(kernel, dims)
    return sizes, _each(stride, dims) if stride not in (None, []) else sizes, _each(padding, dims), _each(dilation, dims)


@writes("max_pool1d", "max_pool2d", "max_pool3d")
def max_pool(
    w: Writer, x: Value, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Value:
    dims = int(w.target.split("pool")[1][0])
    sizes, strides, padded, dilations = _settings(dims, kernel, stride, padding, dilation)
    pads = _pads(x, w.result, sizes, strides, padded, dilations)
    x, was = _batched(w, x, dims)
    settings = {"pads": pads} if pads is not None else {"pads": padded * 2, "ceil_mode": int(ceil_mode)}
    return _unbatched(w, w.op("MaxPool", x, kernel_shape=sizes, strides=strides, dilations=dilations, **settings), was)


@writes("max_pool2d_with_indices", "max_pool3d_with_indices")
def max_pool_with_places(
    w: Writer, x: Value, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> list[Value]:
    """torch counts places within a channel, ONNX within the whole tensor."""
    dims = int(w.target.split("pool")[1][0])
    sizes, strides, padded, dilations = _settings(dims, kernel, stride, padding, dilation)
    pads = _pads(x, w.result[0], sizes, strides, padded, dilations)
    plane = math.prod(fixed_size(x, axis) for axis in range(-dims, 0))
    assert pads is not None  # sizes are fixed
    x, was = _batched(w, x, dims)
    made, places = w.ops("MaxPool", x, count=2, kernel_shape=sizes, strides=strides, dilations=dilations, pads=pads)
    return [_unbatched(w, made, was), _unbatched(w, w.op("Mod", places, w.constant(plane), dtype=torch.int64), was)]


@writes("max_unpool2d", "max_unpool3d")
def max_unpool(w: Writer, x: Value, places: Value, output: Any, *settings: Any) -> Value:
    dims = int(w.target.split("pool")[1][0])
    if not all(isinstance(size, int) for size in output):
        raise UnmappedError("unpooling to sizes that are not fixed")
    rows, at = (w.op("Reshape", value, w.constant([0] * (x.rank - dims) + [-1])) for value in (x, places))
    shape = w.op("Concat", w.op("Shape", x, dtype=torch.int64, end=x.rank - dims), w.constant([math.prod(output)]), axis=0)
    written = w.op("ScatterElements", w.op("Expand", w.constant(0, x.dtype), shape), at, rows, axis=-1)
    return w.op("Reshape", written, w.constant([0] * (x.rank - dims) + list(output)))


@writes("avg_pool1d", "avg_pool2d", "avg_pool3d")
def mean_pool(
    w: Writer, x: Value, kernel: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Value:  # fmt: skip
    dims = int(w.target.split("pool")[1][0])
    sizes, strides, padded, dilations = _settings(dims, kernel, stride, padding, 1)
    pads = _pads(x, w.result, sizes, strides, padded, dilations)
    counts = count_include_pad and any(padded)
    if ceil_mode and (pads is None or counts) and pads != padded * 2:
        raise UnmappedError("an average pool with ceil_mode that counts its padding, or on sizes that are not fixed")
    if divisor_override is not None and (ceil_mode or not count_include_pad):
        raise UnmappedError("an average pool with a divisor of its own and ceil_mode")
    x, was = _batched(w, x, dims)
    counts = counts or divisor_override is not None
    # without ceil_mode what lies behind the last window is cut off, and the pads are those given
    pads = pads if ceil_mode and pads is not None else padded * 2
    made = w.op("AveragePool", x, kernel_shape=sizes, strides=strides, pads=pads, count_include_pad=int(counts))
    if divisor_override is not None:
        made = w.op("Mul", made, w.constant(math.prod(sizes) / divisor_override, x.dtype))
    return _unbatched(w, made, was)


def _bins(size: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """The matrix (size, count) that averages torch's adaptive bins: from floor(i n / m) to ceil((i + 1) n / m)."""
    matrix = torch.zeros(size, count, dtype=dtype)
    for i in range(count):
        first, last = i * size // count, -(-(i + 1) * size // count)
        matrix[first:last, i] = 1 / (last - first)
    return matrix


@writes("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d")
def adaptive_mean_pool(w: Writer, x: Value, output: Any) -> Value:
    dims = int(w.target.split("pool")[1][0])
    counts = _each(output, dims)
    axes = list(range(-dims, 0))
    if all(count == 1 for count in counts):
        return reduce(w, "ReduceMean", x, axes, True)
    sizes = [x.size(axis) for axis in axes]
    if None in sizes:
        raise UnmappedError("an adaptive pool to more than one place, on sizes that are not fixed")
    fixed = [size for size in sizes if size is not None]
    if all(size == count for size, count in zip(fixed, counts, strict=True)):
        return x
    if all(size % count == 0 for size, count in zip(fixed, counts, strict=True)):
        kernel = [size // count for size, count in zip(fixed, counts, strict=True)]
        batched, was = _batched(w, x, dims)
        return _unbatched(w, w.op("AveragePool", batched, kernel_shape=kernel, strides=kernel), was)
    for axis, size, count in zip(axes, fixed, counts, strict=True):
        order = list(range(x.rank))
        order[axis], order[-1] = order[-1], order[axis]
        turned = x if axis == -1 else w.op("Transpose", x, perm=order)
        made = w.op("MatMul", turned, w.constant(_bins(size, count, x.dtype)))
        made = made if axis == -1 else w.op("Transpose", made, perm=order)
        made.shape = x.shape
        x = made
    return x


@writes("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")
def adaptive_max_pool(w: Writer, x: Value, output: Any) -> list[Value]:
    dims = int(w.target.split("pool")[1][0])
    counts = _each(output, dims)
    sizes = [x.size(axis) for axis in range(-dims, 0)]
    if all(count == 1 for count in counts):
        return [reduce(w, "ReduceMax", x, list(range(-dims, 0)), True)]
    if any(size is None or size % count for size, count in zip(sizes, counts, strict=True)):
        raise UnmappedError("an adaptive max pool whose input is no multiple of its output")
    kernel = [size // count for size, count in zip(sizes, counts, strict=True) if size is not None]
    batched, was = _batched(w, x, dims)
    return [_unbatched(w, w.op("MaxPool", batched, kernel_shape=kernel, strides=kernel), was)]


# --- resizing ------------------------------------------------------------------------------------------------


def _resize(w: Writer, x: Value, output: Any, factors: Any, **attributes: Any) -> Value:
    if factors is not None:
        scales = w.constant([1.0, 1.0, *factors], torch.float32)
        return w.op("Resize", x, None, scales, **attributes)
    kept = w.op("Shape", x, dtype=torch.int64, start=0, end=2)
    sizes = w.op("Concat", kept, w.vector(list(output)), dtype=torch.int64, axis=0)
    return w.op("Resize", x, None, None, sizes, **attributes)


@writes("upsample_linear1d.vec", "upsample_bilinear2d.vec", "upsample_trilinear3d.vec", "upsample_bicubic2d.vec")
def resize_smooth(w: Writer, x: Value, output: Any, align_corners: bool, factors: Any = None) -> Value:
    places = "align_corners" if align_corners else "pytorch_half_pixel"
    if "bicubic" in w.target:
        return _resize(w, x, output, factors, mode="cubic", coordinate_transformation_mode=places, cubic_coeff_a=-0.75)
    return _resize(w, x, output, factors, mode="linear", coordinate_transformation_mode=places)


@writes("upsample_nearest1d.vec", "upsample_nearest2d.vec", "upsample_nearest3d.vec")
def resize_nearest(w: Writer, x: Value, output: Any, factors: Any = None) -> Value:
    settings = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return _resize(w, x, output, factors, mode="nearest", **settings)


@writes("_upsample_nearest_exact1d.vec", "_upsample_nearest_exact2d.vec", "_upsample_nearest_exact3d.vec")
def resize_nearest_exact(w: Writer, x: Value, output: Any, factors: Any = None) -> Value:
    settings = {"coordinate_transformation_mode": "half_pixel", "nearest_mode": "round_prefer_ceil"}
    return _resize(w, x, output, factors, mode="nearest", **settings)


_SAMPLED, _OUTSIDE = ("linear", "nearest", "cubic"), ("zeros", "border", "reflection")


@writes("grid_sampler_2d", "grid_sampler_3d")
def grid_sample(w: Writer, x: Value, grid: Value, mode: int, padding: int, align_corners: bool) -> Value:
    kind = _SAMPLED[mode]
    if w.opset < 20:
        if x.rank != 4:
            raise UnmappedError("sampling a volume before opset 20")
        kind = {"linear": "bilinear", "cubic": "bicubic"}.get(kind, kind)
    return w.op("GridSample", x, grid, mode=kind, padding_mode=_OUTSIDE[padding], align_corners=int(align_corners))


@writes("pixel_shuffle")
def pixel_shuffle(w: Writer, x: Value, factor: int) -> Value:
    return w.op("DepthToSpace", x, blocksize=factor, mode="CRD")


@writes("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(w: Writer, x: Value, groups: int) -> Value:
    channels = x.size(1)
    if channels is None:
        raise UnmappedError("a shuffle of channels whose number is not fixed")
    split = w.op("Reshape", x, w.constant([0, groups, channels // groups, -1]))
    turned = w.op("Transpose", split, perm=[0, 2, 1, 3])
    return w.op("Reshape", turned, w.op("Shape", x, dtype=torch.int64))


@writes("pixel_unshuffle")
def pixel_unshuffle(w: Writer, x: Value, factor: int) -> Value:
    """SpaceToDepth with torch's order of channels: (c, i, j)."""
    if any(x.size(axis) is None for axis in (1, 2, 3)):
        raise UnmappedError("pixel_unshuffle on sizes that are not fixed")
    _, c, h, width = x.shape
    split = w.op("Reshape", x, w.constant([-1, c, h // factor, factor, width // factor, factor]))
    turned = w.op("Transpose", split, perm=[0, 1, 3, 5, 2, 4])
    return w.op("Reshape", turned, w.constant([-1, c * factor**2, h // factor, width // factor]))
