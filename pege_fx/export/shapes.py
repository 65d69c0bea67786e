"""Reshaping, slicing, joining and padding in ONNX."""

import itertools
import operator
import sys
from typing import Any

import torch

from pege_fx.export.free_sizes import sizes_of
from pege_fx.export.numbers import SIZES, in_one_type
from pege_fx.export.writer import UnmappedError, Value, Writer, writes

_END = sys.maxsize


@writes("sym_size.int")
def sym_size(w: Writer, x: Value, dim: int) -> Value:
    dim %= x.rank
    return w.op("Shape", x, dtype=torch.int64, start=dim, end=dim + 1)


@writes("view", "reshape", "_unsafe_view")
def reshape(w: Writer, x: Value, sizes: list[Any]) -> Value:
    """With one size that is computed, it is what remains: a constant shape with -1 there."""
    computed = [i for i, size in enumerate(sizes) if not isinstance(size, int)]
    if len(computed) == 1 and -1 not in sizes and 0 not in sizes:
        sizes = [-1 if i in computed else size for i, size in enumerate(sizes)]
    return w.op("Reshape", x, w.vector(sizes))


@writes("flatten.using_ints")
def flatten(w: Writer, x: Value, start: int = 0, end: int = -1) -> Value:
    if not x.rank:
        return w.op("Reshape", x, w.constant([1]))
    return _with_sizes(w, x, start % x.rank, end % x.rank + 1, [-1])


@writes("unflatten.int")
def unflatten(w: Writer, x: Value, dim: int, sizes: list[Any]) -> Value:
    return _with_sizes(w, x, dim % x.rank, dim % x.rank + 1, sizes)


def _with_sizes(w: Writer, x: Value, start: int, end: int, sizes: list[Any]) -> Value:
    """Reshape dimensions from ``start`` up to ``end`` to other sizes; the others keep theirs (those before by a 0)."""
    behind = [x.size(axis) for axis in range(end, x.rank)]
    if None not in behind and 0 not in behind:
        return reshape(w, x, [0] * start + list(sizes) + behind)
    kept = [w.op("Shape", x, dtype=torch.int64, start=end, end=x.rank)] if end < x.rank else []
    return w.op("Reshape", x, w.op("Concat", w.vector([0] * start + list(sizes)), *kept, axis=0))


@writes("permute")
def permute(w: Writer, x: Value, dims: list[int]) -> Value:
    return w.op("Transpose", x, perm=[dim % x.rank for dim in dims])


@writes("transpose.int")
def transpose(w: Writer, x: Value, a: int, b: int) -> Value:
    order = list(range(x.rank))
    order[a], order[b] = order[b], order[a]
    return permute(w, x, order)


@writes("t", "numpy_T", "mT")
def turn(w: Writer, x: Value) -> Value:
    return permute(w, x, list(range(x.rank))[::-1]) if x.rank > 1 else x


@writes("unsqueeze")
def unsqueeze(w: Writer, x: Value, dim: int) -> Value:
    return w.op("Unsqueeze", x, w.constant([dim % (x.rank + 1)]))


@writes("squeeze", "squeeze.dim", "squeeze.dims")
def squeeze(w: Writer, x: Value, dims: Any = None) -> Value:
    given = range(x.rank) if dims is None else [dims] if isinstance(dims, int) else dims
    axes = [dim % x.rank for dim in given if x.size(dim % x.rank) == 1]
    return w.op("Squeeze", x, w.constant(axes)) if axes else x


@writes("expand")
def expand(w: Writer, x: Value, sizes: list[Any], implicit: bool = False) -> Value:
    kept = [1 if isinstance(size, int) and size == -1 else size for size in sizes]
    return w.op("Expand", x, w.vector(kept))


@writes("expand_as")
def expand_as(w: Writer, x: Value, other: Value) -> Value:
    return w.op("Expand", x, w.op("Shape", other, dtype=torch.int64))


@writes("repeat")
def repeat(w: Writer, x: Value, repeats: list[Any]) -> Value:
    if len(repeats) > x.rank:
        x = w.op("Unsqueeze", x, w.constant(list(range(len(repeats) - x.rank))))
    return w.op("Tile", x, w.vector(repeats))


# --- what leaves values as they are ---------------------------------------------------------------------------


@writes("clone", "contiguous", "detach", "alias", "lift_fresh_copy", "detach_copy", "alias_copy", "resolve_conj")
def same(w: Writer, x: Value, **settings: Any) -> Value:
    return x


@writes("dropout", "feature_dropout", "alpha_dropout")
def dropout(w: Writer, x: Value, p: float, train: bool) -> Value:
    if train:
        raise UnmappedError("dropout that stays on in evaluation")
    return x


@writes("_to_copy", "to.dtype", "to.dtype_layout", "to.device", "type_as", "to.other")
def convert(w: Writer, x: Value, *args: Any, **settings: Any) -> Value:
    return w.cast(x, w.result.dtype)


# --- parts and joins -----------------------------------------------------------------------------------------


@writes("cat", "concat")
def cat(w: Writer, parts: list[Value], dim: int = 0) -> Value:
    dtype = w.result.dtype
    joined = [w.cast(part, dtype) for part in parts if part.shape != (0,)]
    return joined[0] if len(joined) == 1 else w.op("Concat", *joined, axis=dim)


@writes("stack")
def stack(w: Writer, parts: list[Value], dim: int = 0) -> Value:
    axis = w.constant([dim % (parts[0].rank + 1)])
    return w.op("Concat", *(w.op("Unsqueeze", part, axis) for part in parts), axis=dim)


def cut(w: Writer, x: Value, dim: int, start: Any, end: Any, step: int = 1) -> Value:
    """Write x[start:end:step] along a dimension."""
    return w.op("Slice", x, w.vector([start]), w.vector([end]), w.constant([dim % x.rank]), w.constant([step]))


@writes("slice.Tensor")
def part(w: Writer, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    start, end = 0 if start is None else start, _END if end is None else end
    whole = isinstance(end, int) and (end >= _END or end == x.size(dim))
    if isinstance(start, int) and start == 0 and step == 1 and whole:
        return x
    return cut(w, x, dim, start, end, step)


@writes("select.int")
def select(w: Writer, x: Value, dim: int, index: Any) -> Value:
    place = w.constant(index) if isinstance(index, int) else w.op("Squeeze", index, w.constant([0]), dtype=torch.int64)
    return w.op("Gather", x, place, dtype=x.dtype, axis=dim)


def _pieces(w: Writer, x: Value, dim: int) -> list[Value]:
    """Cut as the result's own sizes say."""
    sizes = [sizes_of(value)[dim] for value in w.result]
    if not all(isinstance(size, int) for size in sizes):
        raise UnmappedError("a split into pieces whose sizes are not fixed")
    if len(sizes) == 1:
        return [x]
    return w.ops("Split", x, w.constant(sizes), count=len(sizes), axis=dim)


@writes("split.Tensor", "split_with_sizes", "chunk", "split.sizes", "tensor_split.sections")
def split(w: Writer, x: Value, sizes: Any, dim: int = 0) -> list[Value]:
    count = len(w.result)
    if x.size(dim) is not None or count == 1:
        return _pieces(w, x, dim)
    if "sizes" in w.target:
        return w.ops("Split", x, w.vector(sizes), count=count, axis=dim)
    if w.target != "aten.split.Tensor":
        return _pieces(w, x, dim)
    ends = [SIZES[operator.mul](w, sizes, i) for i in range(count)] + [_END]
    return [cut(w, x, dim, start, end) for start, end in itertools.pairwise(ends)]


@writes("unbind.int")
def unbind(w: Writer, x: Value, dim: int = 0) -> list[Value]:
    return [select(w, x, dim, i) for i in range(len(w.result))]


@writes("slice_scatter")
def slice_scatter(w: Writer, x: Value, source: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    """Before, the source, behind: what x[start:end] = source leaves; with a step, or ends that are computed, row by row."""
    size = x.size(dim)
    first, last = 0 if start is None else start, _END if end is None else end
    if step != 1 or not all(isinstance(place, int) and (size is not None or place >= 0) for place in (first, last)):
        return _rows_written(w, x, source, dim % x.rank, _places(w, x, dim % x.rank, first, last, step))
    if size is not None:
        first, last, _ = slice(first, last).indices(size)
    pieces = [] if first == 0 else [cut(w, x, dim, 0, first)]
    pieces.append(source)
    pieces += [] if last >= (_END if size is None else size) else [cut(w, x, dim, last, _END)]
    return source if len(pieces) == 1 else w.op("Concat", *pieces, axis=dim)


def _places(w: Writer, x: Value, dim: int, first: Any, last: Any, step: int) -> Value:
    """The places that a slice has along a dimension, as one row."""
    size = x.size(dim)
    if size is not None and isinstance(first, int) and isinstance(last, int):
        return w.constant(torch.arange(size)[first:last:step])
    count = w.op("Squeeze", w.op("Shape", x, dtype=torch.int64, start=dim, end=dim + 1), w.constant([0]))
    return cut(w, w.op("Range", w.constant(0), count, w.constant(1), shape=(None,)), 0, first, last, step)


def _rows_written(w: Writer, x: Value, source: Value, dim: int, places: Value) -> Value:
    """Write the source's rows along a dimension at these places."""
    order = [dim, *(axis for axis in range(x.rank) if axis != dim)]
    rows, new = (w.op("Transpose", part, perm=order) if dim else part for part in (x, w.cast(source, x.dtype)))
    written = w.op("ScatterND", rows, w.op("Unsqueeze", places, w.constant([1])), new)
    return w.op("Transpose", written, perm=[order.index(axis) for axis in range(x.rank)]) if dim else written


@writes("select_scatter")
def select_scatter(w: Writer, x: Value, source: Value, dim: int, place: Any) -> Value:
    wide = w.op("Unsqueeze", source, w.constant([dim % x.rank]), dtype=source.dtype, shape=x.shape)
    if isinstance(place, Value):
        return _rows_written(w, x, wide, dim % x.rank, place)
    return slice_scatter(w, x, wide, dim, place, _END if place == -1 else place + 1)


@writes("copy")
def copy(w: Writer, x: Value, source: Value, non_blocking: bool = False) -> Value:
    return w.op("Expand", w.cast(source, x.dtype), w.op("Shape", x, dtype=torch.int64))


@writes("roll")
def roll(w: Writer, x: Value, shifts: Any, dims: Any = ()) -> Value:
    if dims in ((), []):
        raise UnmappedError("a roll of all elements as one row")
    for shift, dim in zip(*([v] if isinstance(v, int) else v for v in (shifts, dims)), strict=True):
        if shift:
            x = w.op("Concat", cut(w, x, dim, -shift, _END), cut(w, x, dim, 0, -shift), axis=dim, shape=x.shape)
    return x


@writes("flip")
def flip(w: Writer, x: Value, dims: list[int]) -> Value:
    for dim in dims:
        x = w.op("Slice", x, w.constant([-1]), w.constant([-_END]), w.constant([dim % x.rank]), w.constant([-1]), shape=x.shape)
    return x


@writes("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d")
def pad(w: Writer, x: Value, pads: list[Any], mode: Any = "constant", value: Any = None) -> Value:
    """torch names the last dimension first, (begin, end) each; ONNX all begins, then all ends."""
    if isinstance(mode, (int, float)):
        mode, value = "constant", mode
    kinds = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    kind = "reflect" if "reflection" in w.target else "edge" if "replication" in w.target else kinds[mode]
    if kind == "wrap" and w.opset < 19:
        raise UnmappedError("circular padding before opset 19")
    if all(isinstance(size, int) and size == 0 for size in pads):
        return x
    free = x.rank - len(pads) // 2
    begins, ends = [0] * free + list(pads[::2])[::-1], [0] * free + list(pads[1::2])[::-1]
    fill = w.constant(value or 0, x.dtype) if kind == "constant" else None
    return w.op("Pad", x, w.vector(begins + ends), fill, mode=kind)


# --- new tensors ---------------------------------------------------------------------------------------------


def _filled(w: Writer, sizes: Value, value: Any) -> Value:
    made = w.op("Expand", w.operand(value, w.result.dtype), sizes, dtype=w.result.dtype)
    return made if w.result.ndim else w.op("Reshape", made, w.constant([]))  # a number that is computed has one element


@writes("fill.Scalar", "full_like")
def fill(w: Writer, x: Value, value: Any, **settings: Any) -> Value:
    return _filled(w, w.op("Shape", x, dtype=torch.int64), value)


@writes("fill.Tensor")
def fill_by(w: Writer, x: Value, value: Value) -> Value:
    return w.op("Expand", w.cast(value, x.dtype), w.op("Shape", x, dtype=torch.int64))


@writes("zero", "zeros_like", "empty_like")
def zeros_like(w: Writer, x: Value, **settings: Any) -> Value:
    return fill(w, x, 0)


@writes("ones_like")
def ones_like(w: Writer, x: Value, **settings: Any) -> Value:
    return fill(w, x, 1)


@writes("new_zeros", "new_empty")
def new_zeros(w: Writer, x: Value, sizes: list[Any], **settings: Any) -> Value:
    return _filled(w, w.vector(sizes), 0)


@writes("new_ones")
def new_ones(w: Writer, x: Value, sizes: list[Any], **settings: Any) -> Value:
    return _filled(w, w.vector(sizes), 1)


@writes("new_full")
def new_full(w: Writer, x: Value, sizes: list[Any], value: Any, **settings: Any) -> Value:
    return _filled(w, w.vector(sizes), value)


@writes("zeros", "empty.memory_format")
def zeros(w: Writer, sizes: list[Any], **settings: Any) -> Value:
    return _filled(w, w.vector(sizes), 0)


@writes("ones")
def ones(w: Writer, sizes: list[Any], **settings: Any) -> Value:
    return _filled(w, w.vector(sizes), 1)


@writes("full")
def full(w: Writer, sizes: list[Any], value: Any, **settings: Any) -> Value:
    return _filled(w, w.vector(sizes), value)


@writes("arange", "arange.start", "arange.start_step")
def arange(w: Writer, *ends: Any, **settings: Any) -> Value:
    """Whole numbers as they are, others in float64, as torch counts them."""
    numbers = in_one_type(w, *((0, *ends, 1) if len(ends) == 1 else (*ends, 1) if len(ends) == 2 else ends))
    places = [w.op("Squeeze", number, w.constant([0])) for number in numbers]
    return w.cast(w.op("Range", *places), w.result.dtype)
