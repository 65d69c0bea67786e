"""What a model really multiplies, seen from outside: the operands of every product that torch executes.

Nothing here knows how pege_fx works. A dispatch mode sits below autograd and below any graph, Python or wrapper; whatever
multiplies comes by. An operand counts as quantized if all its values lie on one uniform grid through zero (one for each
output channel of a weight), with few enough steps for its bits.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

MOST_STEPS = 255  # eight bits
TOLERANCE = 2e-3  # of a step: rounding of float32 stays far below, and few random numbers come so near to a grid


def bits_of(rows: Tensor) -> int | None:
    """Return the bits that hold every row of a matrix on a grid of its own, or None if eight do not.

    A row's step is its largest magnitude over k, for the smallest whole k that puts all its values on whole steps.
    """
    rows = rows.detach().float()
    low, high = rows.amin(1), rows.amax(1)
    top = torch.maximum(low.abs(), high.abs())
    if not bool(top.isfinite().all()):
        return None
    spread = (high - low.clamp(max=0)) / top  # of what the codes have to reach, in units of top
    left, steps = torch.nonzero(top > 0).flatten(), 0
    every = max(1, rows.shape[1] // 64)
    for k in range(1, MOST_STEPS + 1):
        if not len(left):
            return max(1, steps.bit_length())
        near = left[_on_grid(rows[left, ::every], top[left], k)]  # a few of their values say no at once
        near = near[_on_grid(rows[near], top[near], k)]
        if len(near):
            steps = max(steps, round(float(spread[near].max()) * k))
            left = left[~torch.isin(left, near)]
    return None if len(left) else max(1, steps.bit_length())


def _on_grid(rows: Tensor, top: Tensor, k: int) -> Tensor:
    scaled = rows * (k / top)[:, None]
    return scaled.sub_(scaled.round()).abs_().amax(1) < TOLERANCE


def grid_bits(x: Tensor, is_weight: bool, groups: int = 1) -> int | None:
    """Return the bits of a tensor on one grid; a weight may have a grid for each index of one axis (or two, if batched)."""
    if not x.is_floating_point():
        return None
    found = bits_of(x.reshape(1, -1))
    if found is not None or not is_weight:
        return found
    if groups > 1:
        x = x.unflatten(0, (groups, -1))
    axes = [(axis,) for axis in range(x.ndim)] + (list(itertools.combinations(range(x.ndim), 2)) if x.ndim > 2 else [])
    for kept in axes:
        rows = x.permute(*kept, *(axis for axis in range(x.ndim) if axis not in kept)).flatten(0, len(kept) - 1)
        if rows[0].numel() > 1 and (found := bits_of(rows.flatten(1))) is not None:
            return found
    return None


@dataclass(frozen=True)
class Product:
    """One executed product: what kind, its multiply-accumulates, the bits of its operands (None: no grid).

    ``kind``: "convolution"; "linear" (one operand comes from parameters alone); "product" (both depend on the input);
    "constant" (an operand depends on neither: a mask, a table). ``where`` is the function of aten with its shapes.
    """

    kind: str
    where: str
    macs: int
    bits: tuple[int | None, ...]

    @property
    def quantized(self) -> bool:
        """Whether every operand lies on a grid."""
        return None not in self.bits


INPUT, PARAMETER = 1, 2
Operands = tuple[int, tuple[Tensor, Tensor], int]  # multiply-accumulates, the two operands, groups of a transposed weight


def _convolution(args: tuple[Any, ...], out: Any) -> Iterator[Operands]:
    x, weight, transposed, groups = args[0], args[1], args[6], args[8]
    yield (x if transposed else out).numel() * prod(weight.shape[1:]), (x, weight), groups if transposed else 1


def _product(first: int) -> Callable[[tuple[Any, ...], Any], Iterator[Operands]]:
    def read(args: tuple[Any, ...], out: Any) -> Iterator[Operands]:
        a, b = args[first], args[first + 1]
        yield a.numel() * (b.shape[-1] if b.ndim > 1 else 1), (a, b), 1

    return read


def _grouped(args: tuple[Any, ...], out: Any) -> Iterator[Operands]:
    """Rows of x sorted by expert, times that expert's matrix."""
    x, weight = args[:2]
    if weight.ndim != 3 or x.ndim != 2:
        raise NotImplementedError(f"a grouped product of {x.ndim} and {weight.ndim} dimensions is not counted: add it.")
    yield x.numel() * weight.shape[-1], (x, weight), 1


def _attention(args: tuple[Any, ...], out: Any) -> Iterator[Operands]:
    """Both products of a fused kernel. The probabilities inside it are seen by nobody: they are no grid."""
    q, k, v = args[:3]
    yield q.numel() * k.shape[-2], (q, k), 1
    yield prod(q.shape[:-1]) * v.shape[-2] * v.shape[-1], (torch.full_like(v, torch.nan), v), 1


def _trilinear(args: tuple[Any, ...], out: Any) -> Iterator[Operands]:
    a, weight, b = args[:3]
    yield a[..., :1].numel() * weight.numel(), (a, weight), 1
    yield a[..., :1].numel() * weight.shape[0] * weight.shape[-1], (b, weight), 1


def _mkldnn_rnn(args: tuple[Any, ...], out: Any) -> Iterator[Operands]:
    x, w_input, w_hidden = args[:3]
    steps = x[..., 0].numel()
    yield steps * w_input.numel(), (x, w_input), 1
    yield steps * w_hidden.numel(), (out[0], w_hidden), 1


READERS: dict[str, Callable[[tuple[Any, ...], Any], Iterator[Operands]]] = {
    "convolution": _convolution,
    "mm": _product(0),
    "bmm": _product(0),
    "mv": _product(0),
    "dot": _product(0),
    "addmm": _product(1),
    "addmv": _product(1),
    "addbmm": _product(1),
    "baddbmm": _product(1),
    "_grouped_mm": _grouped,
    "_trilinear": _trilinear,
    "mkldnn_rnn_layer": _mkldnn_rnn,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
}

MULTIPLIES = re.compile(r"(^|_)(mm|bmm|matmul|conv\w*|linear|attention|lstm|gru|rnn|einsum)($|_)")
POINTWISE = ("_thnn_fused_lstm_cell", "_thnn_fused_gru_cell")  # what is left of a cell after its products


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists, tuples, mappings and plain objects (dataclasses, outputs of transformers)."""
    if isinstance(value, Tensor):
        yield value
    elif hasattr(value, "items"):
        for inner in value.values():
            yield from tensors_in(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from tensors_in(inner)
    elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
        yield from tensors_in(vars(value))


class Products(TorchDispatchMode):
    """Collects the products that are executed, and follows what each tensor depends on, storage by storage."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.found: list[Product] = []
        self._sources: dict[int, int] = {}
        self._alive: list[Any] = []  # an address stays what it is while its storage lives
        self._mark(model.parameters(), PARAMETER)
        self._mark(tensors_in(inputs), INPUT)

    def _mark(self, tensors: Iterable[Tensor], source: int) -> None:
        for x in tensors:
            storage = x.untyped_storage()
            self._alive.append(storage)
            self._sources[storage.data_ptr()] = self._sources.get(storage.data_ptr(), 0) | source

    def _source(self, x: Tensor) -> int:
        return self._sources.get(x.untyped_storage().data_ptr(), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        source = 0
        for x in tensors_in([args, kwargs]):
            source |= self._source(x)
        if source:
            self._mark(tensors_in([out]), source)
            if func._schema.is_mutable:
                self._mark(tensors_in([args[0]]), source)
        else:
            self._alive += [x.untyped_storage() for x in tensors_in([out])]
        name = func._schema.name.removeprefix("aten::")
        if name in READERS:
            for macs, operands, groups in READERS[name](args, out):
                self.found.append(self._product(name, macs, operands, groups))
        elif MULTIPLIES.search(name) and name not in POINTWISE:
            raise NotImplementedError(f"aten::{name} multiplies, and nothing here knows how to count that: add a reader.")
        return out

    def _product(self, name: str, macs: int, operands: tuple[Tensor, Tensor], groups: int) -> Product:
        sources = [self._source(x) for x in operands]
        weights = [not source & INPUT for source in sources]
        if name == "convolution":
            kind = "convolution"
        elif "attention" in name or not any(weights):
            kind = "product"
        else:
            kind = "linear" if PARAMETER in sources else "constant"
        shapes = " x ".join(str(tuple(x.shape)) for x in operands)
        bits = tuple(grid_bits(x, weight, groups if weight else 1) for x, weight in zip(operands, weights, strict=True))
        return Product(kind, f"{name} {shapes}", macs, bits)


@torch.no_grad()
def products_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Product], Any]:
    """Run a model once; return every product that it executed, and its output."""
    torch.manual_seed(0)
    with Products(model, [args, kwargs]) as mode:
        result = model(*args, **kwargs)
    return mode.found, result
