"""A converted graph whose every node is a module, so that each operation of a program knows the node that it comes from.

``quantize`` and ``dequantize`` become operators of their own, which no decomposition takes apart.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pege_fx.decompositions.recurrent import recurrent
from pege_fx.errors import ExportError
from pege_fx.export.embedding import embedding_bag
from pege_fx.export.outputs import flat_tensors
from pege_fx.export.recurrent_operator import recurrent_as_operator
from pege_fx.modules.stages import copied
from pege_fx.numerics import functional
from pege_fx.numerics.spec import bounds_of
from pege_fx.passes.graph import first_argument, is_assignment, where
from pege_fx.passes.lower import unpack_weights
from pege_fx.passes.pipeline import run

_STEPS = "steps"
_STEP = f"{_STEPS}.node_"  # a bare name could be a module's own: "to"


@torch.library.custom_op("pege_fx::quantize", mutates_args=())
def _quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    lower: Tensor | None = None,
    width: Tensor | None = None,
    inverse: Tensor | None = None,
    *,
    bits: int,
    signed: bool,
    narrow: bool = False,
    format: str | None = None,
    layout: str | None = None,
    axis: int | None = None,
) -> Tensor:
    number_format: dict[str, Any] = {"bits": bits, "signed": signed, "narrow": narrow, "format": format}
    return functional.quantize(x, scale, zero_point, lower, width, inverse, layout=layout, axis=axis, **number_format)


@_quantize.register_fake
def _(x: Tensor, *grid: Tensor | None, signed: bool, format: str | None = None, **settings: Any) -> Tensor:
    return torch.empty_like(x, dtype=torch.int8 if signed and format is None else torch.uint8)


@torch.library.custom_op("pege_fx::dequantize", mutates_args=())
def _dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, bits: int, dtype: torch.dtype | None = None,
    format: str | None = None, layout: str | None = None, axis: int | None = None,
) -> Tensor:  # fmt: skip
    return functional.dequantize(codes, scale, zero_point, bits=bits, dtype=dtype, format=format, layout=layout, axis=axis)


@_dequantize.register_fake
def _(codes: Tensor, scale: Tensor, *rest: Tensor | None, dtype: torch.dtype | None = None, **settings: Any) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype if dtype is None else dtype)


QUANTIZE, DEQUANTIZE = "pege_fx.quantize.default", "pege_fx.dequantize.default"
Operators: TypeAlias = Literal["aten", "pege_fx", "quantized_decomposed"]


def replacements(operators: Operators) -> dict[Any, Callable[..., Any]]:
    """What stands for quantize and dequantize in a program, and for what ONNX does not have."""
    if operators == "aten":
        return {}
    if operators == "pege_fx":
        made: tuple[Any, Any] = (torch.ops.pege_fx.quantize, torch.ops.pege_fx.dequantize)
    elif operators == "quantized_decomposed":
        try:  # the module registers the operators, and moves or goes with torch.ao
            importlib.import_module("torch.ao.quantization.fx._decomposed")
        except ImportError as error:
            raise ExportError(f"this torch has no quantized_decomposed operators: {error}.") from error
        made = (_pt2e_quantize, _pt2e_dequantize)
    else:
        raise ExportError(f'operators={operators!r}: give "aten", "pege_fx" or "quantized_decomposed".')
    found = dict(zip((functional.quantize, functional.dequantize), made, strict=True))
    return found | {F.embedding_bag: embedding_bag, recurrent: recurrent_as_operator} if operators == "pege_fx" else found


def _pt2e_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, lower: Tensor | None = None, width: Tensor | None = None,
    inverse: Tensor | None = None, *, bits: int, signed: bool, narrow: bool = False, **settings: Any,
) -> Tensor:  # fmt: skip
    """Other formats, layouts and definitions than those operators have stay plain operations."""
    if settings or inverse is not None:
        return functional.quantize(
            x, scale, zero_point, lower, width, inverse, bits=bits, signed=signed, narrow=narrow, **settings
        )
    if lower is not None and width is not None:
        x = (x - lower) / width
    zero = torch.zeros_like(scale) if zero_point is None else zero_point
    low, high = bounds_of(bits, signed=signed, narrow=narrow)
    dtype = torch.int8 if signed else torch.uint8
    codes: Tensor = torch.ops.quantized_decomposed.quantize_per_tensor.tensor(x, scale, zero.long(), low, high, dtype)
    return codes


def _pt2e_dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, bits: int, dtype: torch.dtype | None = None,
    **settings: Any,
) -> Tensor:  # fmt: skip
    """A zero point may lie between two codes here and not there: with one, plain operations stay."""
    if settings:
        return functional.dequantize(codes, scale, zero_point, bits=bits, dtype=dtype, **settings)
    axes = [axis for axis, size in enumerate(scale.shape) if size > 1]
    if bits > 8 or dtype is not None or len(axes) > 1 or zero_point is not None:
        return functional.dequantize(codes, scale, zero_point, bits=bits, dtype=dtype)
    steps = scale.flatten()
    zeros, bounds = torch.zeros_like(steps).long(), bounds_of(bits, signed=codes.dtype is torch.int8)
    operators = torch.ops.quantized_decomposed
    value: Tensor
    if axes:
        value = operators.dequantize_per_channel(codes, steps, zeros, axes[0], *bounds, codes.dtype)
    else:
        value = operators.dequantize_per_tensor.tensor(codes, steps.reshape(()), zeros.reshape(()), *bounds, codes.dtype)
    return value


class Step(nn.Module):
    """One node of a converted graph as a module: what it computes is known by the module's path."""

    def __init__(self, node: Node, function: Callable[..., Any] | None) -> None:
        super().__init__()
        self.name = node.name
        self.function = function
        self.method = None if function is not None else str(node.target)
        self.place = where(node)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.function is not None:
            return self.function(*args, **kwargs)
        assert self.method is not None
        return getattr(args[0], self.method)(*args[1:], **kwargs)


def stepped(
    deployed: GraphModule, functions: Mapping[Any, Callable[..., Any]] | None = None, flat: bool = False
) -> GraphModule:
    """Return a copy whose every node is a module at ``steps.node_<name of the node>``.

    ``functions`` says what to call in place of some functions. ``flat``: the result is a list of its tensors, because
    torch.export knows few classes that may hold them.
    """
    replaced = functions or {}
    made = copied(deployed).eval()
    graphs = [module for module in made.modules() if isinstance(module, GraphModule)]
    run(graphs, [unpack_weights])
    for gm in graphs:
        for node in gm.graph.nodes:
            if node.op in ("call_function", "call_method") and not is_assignment(node):
                function = replaced.get(node.target, node.target) if node.op == "call_function" else None
                path = f"{_STEP}{node.name}"
                gm.add_submodule(path, Step(node, function))
                node.op, node.target = "call_module", path
            node.meta.clear()  # it says where the node came from, and torch.export would believe it
        if flat and gm is made:
            _give_tensors_alone(gm)
        gm.recompile()
    return made


def _give_tensors_alone(gm: GraphModule) -> None:
    (output,) = gm.graph.find_nodes(op="output")
    with gm.graph.inserting_before(output):
        output.update_arg(0, gm.graph.call_function(flat_tensors, (first_argument(output),)))


def as_module(gm: GraphModule) -> nn.Module:
    """Return a module that is no graph, with the same children, tensors and ``forward``.

    torch.export runs a GraphModule node by node and hands it every argument by its place, keywords too (torch 2.14).
    """
    made: nn.Module = type(type(gm).__name__, (nn.Module,), {"forward": type(gm).forward})()
    for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", "training"):
        vars(made)[name] = vars(gm)[name]
    return made


def step_name(path: str) -> str:
    """Return the node that a step's path stands for, in a nested graph with the graph's path before it.

    >>> step_name("steps.node_conv1"), step_name("head.steps.node_linear")
    ('conv1', 'head.linear')
    """
    return path.replace(_STEP, "")


def steps_of(gm: GraphModule, functions: tuple[Any, ...]) -> Iterator[tuple[str, Step]]:
    """Yield the steps of a stepped graph that call one of these functions, by the name of their node, in order."""
    yield from ((name, step) for name, step in steps_of_all(gm) if step.function in functions)


def steps_of_all(gm: GraphModule) -> Iterator[tuple[str, Step]]:
    """Yield every step of a stepped graph by the name of its node."""
    for path, module in gm.named_modules():
        if isinstance(module, Step):
            yield step_name(path), module
