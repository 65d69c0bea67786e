"""The two sides of a verdict: the converted graph with its quantization steps in sight, and its file in ONNX Runtime."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import helper
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_map

from pege_fx.errors import ExportError
from pege_fx.export.bfloat16 import in_float32
from pege_fx.export.calls import copied
from pege_fx.export.outputs import flat_tensors
from pege_fx.export.steps import Step, stepped, steps_of
from pege_fx.numerics.functional import dequantize, quantize
from pege_fx.numerics.spec import bounds_of
from pege_fx.passes.graph import arguments
from pege_fx.training.batches import Call

FORCED = "__computed"  # what ONNX Runtime makes of codes that it was given
Array = NDArray[Any]
_HALVES = (torch.float16, torch.bfloat16)


# --- the model, step by step -----------------------------------------------------------------------------------


@dataclass
class Reference:
    """What the converted graph computes: its outputs, and of every quantized node its value, codes and exact position.

    ``exact`` are the outputs in float64, from the same codes; ``rounding`` says how far, in codes, half precision put what a
    node quantizes from its exact position.
    """

    outputs: list[Tensor]
    exact: list[Tensor]
    values: dict[str, Tensor]
    codes: dict[str, Tensor]
    positions: dict[str, Tensor]
    rounding: dict[str, float]


class _Model:
    """The converted graph, in float32 and in float64, with its quantization steps in sight."""

    def __init__(self, deployed: GraphModule) -> None:
        self.plain = stepped(deployed)
        self.exact = stepped(deployed, {dequantize: _wide_dequantize}).double()
        self.scales: dict[str, float] = {}
        self._source = _sources(deployed)

    def __call__(self, call: Call) -> Reference:
        codes: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        positions: dict[str, Tensor] = {}
        halves: dict[str, Tensor] = {}

        def keep_codes(name: str, args: Any, kwargs: Any, result: Any) -> None:
            codes[name] = result
            if args[0].dtype in _HALVES:
                halves[name] = _position(*map(_as_double, args), **kwargs)

        def keep_values(name: str, args: Any, kwargs: Any, result: Any) -> None:
            if name in self._source:
                values[name] = result
                self.scales[name] = float(args[1])

        def keep_positions(name: str, args: Any, kwargs: Any, result: Any) -> Tensor:
            positions[name] = _position(*args, **kwargs)
            return codes[name]

        with torch.no_grad():
            with _Hooks(self.plain, {quantize: keep_codes, dequantize: keep_values}):
                outputs = flat_tensors(_run(self.plain, call))
            with _Hooks(self.exact, {quantize: keep_positions}):
                exact = flat_tensors(self._exactly(call))
        sources = {name: self._source[name] for name in values}
        rounding = {
            name: float((halves[source] - positions[source]).abs().nan_to_num(0.0).max())
            for name, source in sources.items()
            if source in halves and halves[source].numel()
        }
        codes, positions = ({name: found[source] for name, source in sources.items()} for found in (codes, positions))
        return Reference(outputs, exact, values, codes, positions, rounding)

    def _exactly(self, call: Call) -> Any:
        """In float64; code that stays Python may make float32 tensors of its own, which allow no other."""
        try:
            return _run(self.exact, tree_map(_as_double, call))
        except RuntimeError:
            self.exact.float()
            return _run(self.exact, call)


def _run(gm: GraphModule, call: Call) -> Any:
    args, kwargs = copied(call)  # a model may write into its arguments
    return gm.forward(*args, **kwargs)  # a call would print the traceback of what fails


def _as_double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _wide_dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None = None, **settings: Any) -> Tensor:
    return dequantize(codes, scale, zero_point, **settings | {"dtype": None})


def _position(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, lower: Tensor | None = None, width: Tensor | None = None,
    *, bits: int, signed: bool, narrow: bool = False,
) -> Tensor:  # fmt: skip
    """Where x lies among the codes, before rounding."""
    if lower is not None and width is not None:
        x = (x - lower) / width
    place = x / scale if zero_point is None else x / scale + zero_point
    return place.clamp(*bounds_of(bits, signed=signed, narrow=narrow))


def _sources(deployed: GraphModule) -> dict[str, str]:
    """Activations: each dequantize node and the quantize node it reads, with their graph's path before both."""
    found = {}
    for path, gm in deployed.named_modules():
        if isinstance(gm, GraphModule):
            prefix = f"{path}." if path else ""
            for node in gm.graph.find_nodes(op="call_function", target=dequantize):
                source = arguments(node)[0][0]
                if source.target is quantize:
                    found[f"{prefix}{node.name}"] = f"{prefix}{source.name}"
    return found


class _Hooks:
    """Calls back with every result of some functions' steps; what a callback returns takes the result's place."""

    def __init__(self, model: GraphModule, callbacks: Mapping[Any, Callable[[str, Any, Any, Any], Any]]) -> None:
        self.model, self.callbacks = model, callbacks

    def __enter__(self) -> None:
        self.handles = [
            step.register_forward_hook(_named(name, self.callbacks[step.function]), with_kwargs=True)
            for name, step in steps_of(self.model, tuple(self.callbacks))
        ]

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def _named(name: str, callback: Callable[[str, Any, Any, Any], Any]) -> Callable[[Step, Any, Any, Any], Any]:
    return lambda module, args, kwargs, result: callback(name, args, kwargs, result)


# --- ONNX Runtime ----------------------------------------------------------------------------------------------


class Sessions:
    """The exported file in ONNX Runtime: plain with its codes exposed, with its codes given, and optimized.

    ``widened`` says that it was in bfloat16, and runs in float32.
    """

    def __init__(self, path: Path, deployed: GraphModule) -> None:
        self.model = _Model(deployed)
        try:
            proto = onnx.load(path)
        except Exception as error:
            raise ExportError(f"{path} can not be read as ONNX: {type(error).__name__}: {error}") from error
        wide = in_float32(proto)
        self.widened, proto = wide is not None, wide or proto
        produced = {name for node in proto.graph.node for name in node.output}
        sources = _sources(deployed)
        self.names = [name for name in sources if name in produced]
        if sources and not self.names:
            raise ExportError(f"{path} is not an export of this model: none of its nodes is called as the model's are.")
        self.inputs = [value.name for value in proto.graph.input]
        self.outputs = [value.name for value in proto.graph.output]
        self.plain = _session(_exposed(proto, self.names), optimized=False)
        self.forced = _session(_forced(proto, self.names), optimized=False)
        self.optimized = _session(proto, optimized=True)
        self._proto = proto

    @cached_property
    def optimized_plain(self) -> onnxruntime.InferenceSession:
        """Optimized as far as codes that have to be seen allow."""
        return _session(_exposed(self._proto, self.names), optimized=True)

    def feed(self, tensors: list[Tensor]) -> dict[str, Array]:
        return {name: as_array(x) for name, x in zip(self.inputs, tensors, strict=True)}


def as_array(x: Tensor) -> Array:
    """Return a tensor as NumPy has it; of bfloat16, which it has not, the same values in float32."""
    wide = x.detach().float() if x.dtype is torch.bfloat16 else x.detach()
    return wide.numpy()


def _session(proto: onnx.ModelProto, *, optimized: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        no_kernel = "NOT_IMPLEMENTED" in str(error)  # the file is right, and this runtime has not all of ONNX
        fix = (
            "\n  it has no kernel for that type on a CPU: verify the model in float32 (deployed.float())." if no_kernel else ""
        )
        raise ExportError(
            f"ONNX Runtime can not load the file, optimizations {'on' if optimized else 'off'}: "
            f"{type(error).__name__}: {error}{fix}"
        ) from error


def _exposed(proto: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    """The model with the values of its codes as outputs too."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    made.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    return made


def _forced(proto: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    """The model with the values of its codes as inputs; what it computes for them are outputs."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    types = {value.name: value.type for value in onnx.shape_inference.infer_shapes(proto).graph.value_info}
    for node in made.graph.node:
        for i, name in enumerate(node.output):
            if name in names:
                node.output[i] = name + FORCED
    for name in names:
        kind = types[name].tensor_type.elem_type
        made.graph.input.append(helper.make_tensor_value_info(name, kind, None))
        made.graph.output.append(helper.make_empty_tensor_value_info(name + FORCED))
    return made
