"""Writing an ONNX graph: values, operators, initializers, and the table of ATen operators that the families fill."""

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from pege_fx.numerics.packing import pack

TYPES: dict[torch.dtype, int] = {
    torch.float32: TensorProto.FLOAT, torch.float64: TensorProto.DOUBLE, torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16, torch.int64: TensorProto.INT64, torch.int32: TensorProto.INT32,
    torch.int16: TensorProto.INT16, torch.int8: TensorProto.INT8, torch.uint8: TensorProto.UINT8, torch.bool: TensorProto.BOOL,
}  # fmt: skip
CODE_TYPES: dict[tuple[int, bool], int] = {  # (bits, signed)
    (2, True): TensorProto.INT2, (2, False): TensorProto.UINT2, (4, True): TensorProto.INT4, (4, False): TensorProto.UINT4,
    (8, True): TensorProto.INT8, (8, False): TensorProto.UINT8,
}  # fmt: skip
LAID_OUT = {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"}
_BITS = {kind: bits for (bits, _), kind in CODE_TYPES.items()}


@dataclass
class Value:
    """A tensor of the ONNX graph, or a constant that becomes an initializer when it is first read.

    ``shape`` has an int or a ``torch.SymInt`` for each dimension. A size that is computed is an int64 tensor of one element.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[Any, ...] = ()
    constant: Tensor | None = None
    onnx_type: int | None = None
    codes: "Codes | None" = None
    pending: "Pending | None" = None
    offset: int = 0  # added to codes, to write signed ones as uint8

    @property
    def rank(self) -> int:
        return len(self.shape)

    def size(self, axis: int) -> int | None:
        """The size of a dimension if it is fixed."""
        value = self.shape[axis]
        return value if isinstance(value, int) else None


@dataclass(frozen=True)
class Codes:
    """What a dequantized weight was made of, so that a layer may ask for it in another order."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Pending:
    """An activation's codes where they are no tensor of the graph (QONNX): what their value is written from."""

    x: Value
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    signed: bool
    narrow: bool


@dataclass(frozen=True)
class Grid:
    """What an activation is rounded to: code = clamp(round(x / scale) + zero_point), of so many bits."""

    scale: Tensor
    zero_point: Tensor | None
    bits: int
    signed: bool
    narrow: bool


class OnnxStyle(Protocol):
    """A way to write codes. ``export_onnx(style=...)`` takes the name of one of ours, or any object with these members."""

    @property
    def name(self) -> str:
        """What the style is called."""

    @property
    def has_codes(self) -> bool:
        """Whether codes are tensors of the file, between QuantizeLinear and DequantizeLinear."""

    def default_opset(self, widths: Collection[int]) -> int:
        """Return the version of the operators for codes of these bits."""

    def functions(self, opset: int) -> list[onnx.FunctionProto]:
        """Return what the file defines beside its graph."""

    def quantize(self, w: "Writer", x: Value, grid: Grid) -> Value:
        """Write the codes of an activation, float32."""

    def dequantize(self, w: "Writer", codes: Value, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Value:
        """Write the value of an activation's codes."""

    def weight(self, w: "Writer", made: Codes, name: str) -> Value:
        """Write a weight's codes under this name, and their value."""


class UnmappedError(Exception):
    """An operator, or a setting of one, that is not written in ONNX."""


Handler: TypeAlias = Callable[..., Any]
H = TypeVar("H", bound=Handler)
TABLE: dict[str, Handler] = {}


def writes(*operators: str) -> Callable[[H], H]:
    """Enter a handler for ATen operators by name; without an overload: "default".

    A handler takes the writer and the operator's own arguments: ``Value`` for tensors, else what ATen gives.
    """

    def enter(handler: H) -> H:
        for name in operators:
            full = name if name.count(".") == 2 else f"aten.{name}" if "." in name else f"aten.{name}.default"
            assert full not in TABLE, full
            TABLE[full] = handler
        return handler

    return enter


@dataclass
class Writer:
    """An ONNX graph under construction.

    Args:
        opset: version of the ONNX operators.
        style: how codes are written, an ``OnnxStyle``.
    """

    opset: int
    style: OnnxStyle
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, TensorProto] = field(default_factory=dict)
    scope: str = ""  # of names
    target: str = ""  # the operator that is being written
    result: Any = None  # what the operator that is being written gives in torch: shape and dtype
    taken: set[str] = field(default_factory=set)
    _small: dict[Any, Value] = field(default_factory=dict)

    def unique(self, name: str) -> str:
        """Return ``name``, with a number behind it if it is taken."""
        candidates = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))
        chosen = next(candidate for candidate in candidates if candidate not in self.taken)
        self.taken.add(chosen)
        return chosen

    def op(
        self, kind: str, *inputs: Value | None, dtype: torch.dtype | None = None, shape: Any = (), **attributes: Any
    ) -> Value:
        """Add a node and return its result, by default in the dtype of its first input. Attributes of None are left out."""
        return self.ops(kind, *inputs, count=1, dtype=dtype, shape=shape, **attributes)[0]

    def ops(
        self, kind: str, *inputs: Value | None, count: int, dtype: torch.dtype | None = None, shape: Any = (), **attributes: Any
    ) -> list[Value]:
        """Add a node with several results."""
        given = {name: value for name, value in attributes.items() if value is not None}
        names = [self.unique(f"{self.scope}.{kind}") for _ in range(count)]
        read = [self.read(value) for value in inputs]
        while read and not read[-1]:
            read.pop()
        self.nodes.append(helper.make_node(kind, read, names, name=names[0], **given))
        kept = dtype or next(value.dtype for value in inputs if value is not None)
        return [Value(name, kept, tuple(shape)) for name in names]

    def read(self, value: Value | None) -> str:
        """Return the name by which a node reads a value; a constant becomes an initializer."""
        if value is None:
            return ""
        if value.pending is not None:
            raise UnmappedError("it reads codes, which are no tensor in QONNX")
        if value.constant is not None and value.name not in self.initializers:
            self.initializers[value.name] = to_proto(value.name, value.constant, value.onnx_type)
        return value.name

    def constant(self, value: Any, dtype: torch.dtype = torch.int64, onnx_type: int | None = None, name: str = "") -> Value:
        """Return a constant; small unnamed ones are shared."""
        tensor = value.detach().cpu().contiguous() if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype)
        key = (tensor.dtype, onnx_type, tuple(tensor.shape), str(tensor.tolist())) if tensor.numel() < 16 and not name else None
        if key is not None and key in self._small:
            return self._small[key]
        made = Value(self.unique(name or "constant"), tensor.dtype, tuple(tensor.shape), tensor, onnx_type)
        if key is not None:
            self._small[key] = made
        return made

    def cast(self, value: Value, dtype: torch.dtype) -> Value:
        """Return the value in another dtype."""
        if value.dtype == dtype:
            return value
        if value.constant is not None:
            return self.constant(value.constant.to(dtype))
        return self.op("Cast", value, dtype=dtype, shape=value.shape, to=TYPES[dtype])

    def operand(self, value: Any, dtype: torch.dtype) -> Value:
        """Return a tensor, a size or a Python number as a value of a dtype."""
        if isinstance(value, Value):
            return self.cast(value, dtype)
        return self.constant(value, dtype)

    def is_quantized(self, value: Value, through: Collection[str] = LAID_OUT) -> bool:
        """Whether a value is of codes, however it was laid out since."""
        makers = {name: node for node in self.nodes for name in node.output}
        node = makers.get(value.name)
        while node is not None and node.op_type in through:
            node = makers.get(node.input[0])
        return node is not None and node.op_type == "DequantizeLinear"

    def clipped(self, value: Value) -> tuple[Value, float, float] | None:
        """Return what a value is without the Clip that it comes from, and the Clip's constant bounds; None for any other.

        Operators that lay it out anew in between are written again.
        """
        makers = {name: node for node in self.nodes for name in node.output}
        node, laid_out = makers.get(value.name), []
        while node is not None and node.op_type in LAID_OUT:
            laid_out.append(node)
            node = makers.get(node.input[0])
        if node is None or node.op_type != "Clip" or any(end and end not in self.initializers for end in node.input[1:]):
            return None
        name, *ends = node.input
        known = [float(numpy_helper.to_array(self.initializers[end])) if end else None for end in (*ends, "", "")[:2]]
        low, high = (default if end is None else end for end, default in zip(known, (-math.inf, math.inf), strict=True))
        for layout in reversed(laid_out):
            again = onnx.NodeProto()
            again.CopyFrom(layout)
            again.input[0], name = name, self.unique(f"{self.scope}.{layout.op_type}")
            again.output[0] = again.name = name
            self.nodes.append(again)
        return Value(name, value.dtype, value.shape), low, high

    def vector(self, sizes: Sequence[Any]) -> Value:
        """Return sizes (numbers, or values computed in the graph) as one int64 tensor."""
        if all(isinstance(size, int) for size in sizes):
            return self.constant(list(sizes))
        return self.op("Concat", *map(self.scalar, sizes), axis=0)

    def scalar(self, size: Any) -> Value:
        """Return one size as a value."""
        return size if isinstance(size, Value) else self.constant([size])


def to_proto(name: str, tensor: Tensor, onnx_type: int | None = None) -> TensorProto:
    """Return a tensor as ONNX holds it; codes of 4 and 2 bits packed."""
    if onnx_type is not None and (bits := _BITS.get(onnx_type, 8)) < 8:
        raw = pack(tensor, bits).numpy().tobytes()
        return helper.make_tensor(name, onnx_type, list(tensor.shape), raw, raw=True)
    row = tensor.reshape(-1).clone(memory_format=torch.contiguous_format)  # one element is contiguous with any stride
    raw = row.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return helper.make_tensor(name, TYPES[tensor.dtype] if onnx_type is None else onnx_type, list(tensor.shape), raw, raw=True)
