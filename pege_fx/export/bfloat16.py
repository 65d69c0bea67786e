"""A file in bfloat16 as ONNX Runtime can run it: it has no kernels for that type on a CPU, so the same operators in float32."""

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

_NARROW, _WIDE = TensorProto.BFLOAT16, TensorProto.FLOAT
_NAMES_OF_TYPES = ("to", "dtype", "output_dtype")  # attributes that say a type: of Cast, RandomNormal, QuantizeLinear


def in_float32(proto: onnx.ModelProto) -> onnx.ModelProto | None:
    """Return a copy in which whatever is bfloat16 is float32, every stored value the same; None if nothing is."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    changed = [_widen(graph) for graph in (made.graph, *made.functions)]
    return made if any(changed) else None


def _widen(graph: onnx.GraphProto | onnx.FunctionProto) -> bool:
    changed = False
    for tensor in _tensors(graph):
        if tensor.data_type == _NARROW:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
            changed = True
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in _NAMES_OF_TYPES and attribute.i == _NARROW:
                attribute.i, changed = _WIDE, True
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                changed |= _widen(inner)
    values = (*graph.input, *graph.output, *graph.value_info) if isinstance(graph, onnx.GraphProto) else graph.value_info
    for value in values:
        if value.type.tensor_type.elem_type == _NARROW:
            value.type.tensor_type.elem_type, changed = _WIDE, True
    return changed


def _tensors(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[TensorProto]:
    if isinstance(graph, onnx.GraphProto):
        yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from attribute.tensors
            if attribute.HasField("t"):
                yield attribute.t
