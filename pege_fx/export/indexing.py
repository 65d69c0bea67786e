"""Reading and writing at places that tensors name, sorting, and windows in ONNX."""

import functools
from typing import Any

import torch

from pege_fx.export.layers import fixed_size
from pege_fx.export.writer import UnmappedError, Value, Writer, writes


@writes("index.Tensor")
def index(w: Writer, x: Value, indices: list[Value | None]) -> Value:
    """One tensor of places is a Gather; several are one place each, in the dimensions that they index."""
    places, order = _indexed(x, indices)
    if len(places) == 1:
        return w.op("Gather", x, w.cast(places[0], torch.int64), dtype=x.dtype, axis=order[0])
    found = w.op("GatherND", w.op("Transpose", x, perm=order), _joined(w, places), dtype=x.dtype)
    kept = _laid_out(places, order)
    return found if kept == sorted(kept) else w.op("Transpose", found, perm=kept)


@writes("index_put")
def index_put(w: Writer, x: Value, indices: list[Value | None], values: Value, accumulate: bool = False) -> Value:
    """What ``x[indices] = values`` leaves; a number for all that a mask says is a Where."""
    mask = indices[0]
    if mask is not None and mask.dtype is torch.bool and len(indices) == 1 and values.rank == 0 and not accumulate:
        wide = [*range(mask.rank, x.rank)]
        return w.op(
            "Where", w.op("Unsqueeze", mask, w.constant(wide)) if wide else mask, w.cast(values, x.dtype), x, dtype=x.dtype
        )
    places, order = _indexed(x, indices)
    rows, joined = w.op("Transpose", x, perm=order), _joined(w, places)
    kept = _laid_out(places, order)
    if values.rank and kept != sorted(kept):
        values = w.op("Unsqueeze", values, w.constant([*range(len(kept) - values.rank)])) if values.rank < len(kept) else values
        values = w.op("Transpose", values, perm=_undone(kept))
    found = w.op("Shape", w.op("GatherND", rows, joined, dtype=x.dtype), dtype=torch.int64)
    written = w.op(
        "ScatterND", rows, joined, w.op("Expand", w.cast(values, x.dtype), found), reduction="add" if accumulate else None
    )
    return w.op("Transpose", written, perm=_undone(order))


def _indexed(x: Value, indices: list[Value | None]) -> tuple[list[Value], list[int]]:
    """Return the tensors of places, and the dimensions of ``x`` with those that they index first."""
    axes = [axis for axis, value in enumerate(indices) if value is not None]
    places = [value for value in indices if value is not None]
    if any(value.dtype is torch.bool for value in places):
        raise UnmappedError("indexing by a mask")
    return places, axes + [axis for axis in range(x.rank) if axis not in axes]


def _joined(w: Writer, places: list[Value]) -> Value:
    """Return tensors of places as one, with a last dimension for each."""
    if all(value.constant is not None for value in places):
        known = [value.constant.long() for value in places if value.constant is not None]
        whole = sum(known[1:], known[0])
        return w.constant(torch.stack([value.expand_as(whole) for value in known], -1))
    each = [w.cast(value, torch.int64) for value in places]
    sizes = w.op("Shape", functools.reduce(lambda a, b: w.op("Add", a, b), each))
    return w.op("Concat", *(w.op("Unsqueeze", w.op("Expand", value, sizes), w.constant([-1])) for value in each), axis=-1)


def _laid_out(places: list[Value], order: list[int]) -> list[int]:
    """Return where torch puts what was found: at the indexed dimensions where those are neighbours, first elsewhere."""
    wide, count = max(value.rank for value in places), len(places)
    axes, rest = order[:count], len(order) - count
    before = axes[0] if axes == list(range(axes[0], axes[-1] + 1)) else 0
    return [*range(wide, wide + before), *range(wide), *range(wide + before, wide + rest)]


def _undone(order: list[int]) -> list[int]:
    return [order.index(axis) for axis in range(len(order))]


@writes("diagonal")
def diagonal(w: Writer, x: Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Value:
    dim1, dim2 = dim1 % x.rank, dim2 % x.rank
    height, width = fixed_size(x, dim1), fixed_size(x, dim2)
    places = torch.tensor([[i, i + offset] for i in range(height) if 0 <= i + offset < width])
    rest = [axis for axis in range(x.rank) if axis not in (dim1, dim2)]
    found = w.op("GatherND", w.op("Transpose", x, perm=[dim1, dim2, *rest]), w.constant(places), dtype=x.dtype)
    return w.op("Transpose", found, perm=[*range(1, len(rest) + 1), 0])


@writes("index_select")
def index_select(w: Writer, x: Value, dim: int, places: Value) -> Value:
    return w.op("Gather", x, places, dtype=x.dtype, axis=dim)


@writes("gather")
def gather(w: Writer, x: Value, dim: int, places: Value, sparse_grad: bool = False) -> Value:
    return w.op("GatherElements", x, places, dtype=x.dtype, axis=dim)


@writes("scatter.src", "scatter.value")
def scatter(w: Writer, x: Value, dim: int, places: Value, source: Any) -> Value:
    """A number is written to every place; of a tensor, what has a place."""
    if isinstance(source, Value) and source.shape != places.shape:
        raise UnmappedError("a scatter of a part of its source")
    wide = (
        source
        if isinstance(source, Value)
        else w.op("Expand", w.constant(source, x.dtype), w.op("Shape", places, dtype=torch.int64))
    )
    return w.op("ScatterElements", x, places, wide, axis=dim)


@writes("scatter_add")
def scatter_add(w: Writer, x: Value, dim: int, places: Value, source: Value) -> Value:
    if source.shape != places.shape:
        raise UnmappedError("a scatter of a part of its source")
    return w.op("ScatterElements", x, places, source, axis=dim, reduction="add")


@writes("unfold")
def unfold(w: Writer, x: Value, dim: int, size: int, step: int) -> Value:
    """Windows along a dimension, each as a new last dimension."""
    dim %= x.rank
    starts = torch.arange(0, fixed_size(x, dim) - size + 1, step)
    windows = w.op("Gather", x, w.constant(starts[:, None] + torch.arange(size)), axis=dim)
    return w.op("Transpose", windows, perm=[axis for axis in range(x.rank + 1) if axis != dim + 1] + [dim + 1])


@writes("topk")
def topk(w: Writer, x: Value, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> list[Value]:
    return _ranked(w, x, w.constant([k]), dim, largest)


@writes("sort", "sort.stable")
def sort(w: Writer, x: Value, dim: int = -1, descending: bool = False, *, stable: bool | None = None) -> list[Value]:
    dim %= x.rank
    return _ranked(w, x, w.op("Shape", x, dtype=torch.int64, start=dim, end=dim + 1), dim, descending)


def _ranked(w: Writer, x: Value, count: Value, dim: int, largest: bool) -> list[Value]:
    return w.ops("TopK", x, count, count=2, axis=dim, largest=int(largest), sorted=1)
