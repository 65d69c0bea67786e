"""A converted graph as a functional ATen program, by ``torch.export``, in which codes and names survive.

Every node of the converted graph becomes a module for the time of the export, so that each ATen operation knows the node
it comes from; quantize and dequantize become operators of their own, which no decomposition takes apart.
"""

import copy
import importlib
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_flatten, tree_unflatten

from pege_fx.errors import ExportError, InputError, PegeWarning
from pege_fx.export.embedding import embedding_bag
from pege_fx.modules.stages import graph_of
from pege_fx.numerics import functional
from pege_fx.numerics.spec import bounds_of
from pege_fx.passes.graph import arguments, is_assignment, where
from pege_fx.passes.lower import unpack_weights
from pege_fx.passes.pipeline import run

_NOT_THE_MODEL = (f"{os.path.dirname(torch.__file__)}/", f"{os.path.dirname(os.path.dirname(__file__))}/", "<")
_STEPS = "steps"
_STEP = f"{_STEPS}.node_"  # a bare name could be a module's own: "to"


@torch.library.custom_op("pege_fx::quantize", mutates_args=())
def _quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    lower: Tensor | None = None,
    width: Tensor | None = None,
    *,
    bits: int,
    signed: bool,
    narrow: bool = False,
) -> Tensor:
    return functional.quantize(x, scale, zero_point, lower, width, bits=bits, signed=signed, narrow=narrow)


@_quantize.register_fake
def _(x: Tensor, *grid: Tensor | None, bits: int, signed: bool, narrow: bool = False) -> Tensor:
    return torch.empty_like(x, dtype=torch.int8 if signed else torch.uint8)


@torch.library.custom_op("pege_fx::dequantize", mutates_args=())
def _dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, bits: int, dtype: torch.dtype | None = None
) -> Tensor:
    return functional.dequantize(codes, scale, zero_point, bits=bits, dtype=dtype)


@_dequantize.register_fake
def _(codes: Tensor, scale: Tensor, *rest: Tensor | None, bits: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype if dtype is None else dtype)


QUANTIZE, DEQUANTIZE = "pege_fx.quantize.default", "pege_fx.dequantize.default"
Operators: TypeAlias = Literal["aten", "pege_fx", "quantized_decomposed"]


def _replacements(operators: Operators) -> dict[Any, Callable[..., Any]]:
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
    return found | {F.embedding_bag: embedding_bag} if operators == "pege_fx" else found


def _pt2e_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, lower: Tensor | None = None, width: Tensor | None = None,
    *, bits: int, signed: bool, narrow: bool = False,
) -> Tensor:  # fmt: skip
    if lower is not None and width is not None:
        x = (x - lower) / width
    zero = torch.zeros_like(scale) if zero_point is None else zero_point
    low, high = bounds_of(bits, signed=signed, narrow=narrow)
    dtype = torch.int8 if signed else torch.uint8
    codes: Tensor = torch.ops.quantized_decomposed.quantize_per_tensor.tensor(x, scale, zero.long(), low, high, dtype)
    return codes


def _pt2e_dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, bits: int, dtype: torch.dtype | None = None
) -> Tensor:
    """A zero point may lie between two codes here and not there: with one, plain operations stay."""
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


def stepped(deployed: GraphModule, functions: Mapping[Any, Callable[..., Any]] | None = None) -> GraphModule:
    """Return a copy whose every node is a module at ``steps.node_<name of the node>``.

    ``functions`` says what to call in place of some functions.
    """
    replaced = functions or {}
    made = copy.deepcopy(deployed).eval()
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
        gm.recompile()
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


def check_deployed(deployed: Any, args: tuple[Any, ...]) -> Any:
    """Return what a converted model gives for the example inputs; raise if it is none or if they do not fit."""
    graph = graph_of(deployed, "converted", error=ExportError)
    try:
        with torch.no_grad():
            return graph.forward(*args)  # a call of a GraphModule would print the traceback
    except Exception as error:
        shapes = [tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in args]
        raise InputError(f"the model fails on inputs of shapes {shapes}: {type(error).__name__}: {error}") from error


def to_program(
    deployed: GraphModule, args: tuple[Any, ...], *, operators: Operators = "aten", dynamic_batch: bool = True
) -> ExportedProgram:
    """Return a converted graph as a functional ATen program by ``torch.export``, its first dimensions free.

    Args:
        deployed: the result of ``pege_fx.convert``.
        args: example inputs.
        operators: what quantizes: "aten", plain operations, same answers to the last bit, runs anywhere, AOTInductor
            included; "pege_fx", one operator each, for which this package has to be imported, and no embedding bags
            (what ONNX is written from); "quantized_decomposed", those of PyTorch's own flow (PT2E), as long as torch
            has them (it multiplies by 1 / s, so ties may differ).
        dynamic_batch: leave the first dimension of every input free.

    Raises:
        ExportError: if ``torch.export`` can not follow the model.

    >>> import pege_fx
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> gm = pege_fx.prepare(model, "W4A4", torch.randn(2, 4))
    >>> program = to_program(pege_fx.convert(gm), (torch.randn(2, 4),))
    >>> program.module()(torch.zeros(5, 4)).shape
    torch.Size([5, 2])
    """
    deployed = graph_of(deployed, "converted", error=ExportError)
    check_deployed(deployed, args)
    return _export(stepped(deployed, _replacements(operators)), args, dynamic_batch)


def _export(module: nn.Module, args: tuple[Any, ...], dynamic_batch: bool) -> ExportedProgram:
    fixed = ""
    if dynamic_batch:
        try:
            return _with_free_batch(module, args)
        except Exception as error:
            fixed = f"the batch size is fixed to that of the example inputs: {_first_line(error)}"
    try:
        program = _exported(module, args, None)
    except Exception as error:
        raise ExportError(
            f"torch.export can not follow the model{_where_failed(error)}: {type(error).__name__}: {_first_line(error)}"
        ) from error
    if fixed:
        warnings.warn(fixed, PegeWarning, stacklevel=5)
    return program


def _with_free_batch(module: nn.Module, args: tuple[Any, ...]) -> ExportedProgram:
    """Leave first dimensions free; torch.export fixes sizes of one, so a batch of one is doubled.

    One beside larger ones is no batch (a mask, a state), and stays one; so does what the model fixes when it is doubled.
    """
    leaves, tree = tree_flatten(args)
    batched = {i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.ndim > 0}
    doubled = {i for i in batched if leaves[i].shape[0] == 1}
    if doubled != batched:
        doubled = set()
    while True:
        given = [torch.cat([x, x]) if i in doubled else x for i, x in enumerate(leaves)]
        shapes = [{0: Dim.AUTO} if i in batched and x.shape[0] > 1 else None for i, x in enumerate(given)]
        program = _exported(module, tree_unflatten(given, tree), tree_unflatten(shapes, tree))
        stuck = {i for i in doubled if isinstance(sizes_of(_input(program, i))[0], int)}
        if not stuck:
            return program
        doubled -= stuck


def _input(program: ExportedProgram, place: int) -> Tensor:
    name = program.graph_signature.user_inputs[place]
    found: Tensor = next(node.meta["val"] for node in program.graph.find_nodes(op="placeholder") if node.name == name)
    return found


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _where_failed(error: BaseException) -> str:
    """The node that ``torch.export`` could not follow, with its line, or the line of a module that stays Python."""
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        if code is Step.forward.__code__:
            step: Step = frame.f_locals["self"]
            found = f" at {step.name}{step.place}"
        elif not code.co_filename.startswith(_NOT_THE_MODEL):
            found = f" at {code.co_qualname} ({code.co_filename}:{line})"
    return found


def _exported(module: nn.Module, args: tuple[Any, ...], shapes: Any) -> ExportedProgram:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own, about its internals
        program = torch.export.export(module, args, dynamic_shapes=shapes, strict=False)
        functional_program: ExportedProgram = program.run_decompositions({})  # takes nothing apart
        return functional_program


def origin(node: Node) -> str:
    """Return the name of the converted graph's node that an ATen operation comes from, or ""."""
    for path, _ in reversed(list((node.meta.get("nn_module_stack") or {}).values())):
        if _STEP in str(path):
            return step_name(str(path))
    return ""


def sizes_of(value: Tensor) -> tuple[Any, ...]:
    """Return a traced tensor's shape: an int for every size that is fixed, also where torch.export found that out late."""
    return tuple(int(size) if str(size).isdigit() else size for size in value.shape)


def constants(program: ExportedProgram) -> dict[Node, Tensor]:
    """Return every value that no input decides: parameters, buffers, and what is computed from them alone.

    Dequantized weights stay operations of the program.
    """
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants
    known: dict[Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name in names:
                name = names[node.name]
                known[node] = program.state_dict.get(name, program.constants.get(name))
            elif node.name in lifted:
                known[node] = program.constants[lifted[node.name]]
        elif node.op == "call_function" and str(node.target) != DEQUANTIZE and _is_known(node, known):
            args, kwargs = arguments(node)
            resolved_args, resolved_kwargs = map_arg((args, kwargs), known.__getitem__)
            known[node] = node.target(*resolved_args, **resolved_kwargs)
    return {node: value.detach() for node, value in known.items() if isinstance(value, Tensor)}


def _is_known(node: Node, known: Mapping[Node, Any]) -> bool:
    value = node.meta.get("val")
    sizes = sizes_of(value) if isinstance(value, Tensor) else ()
    return all(source in known for source in node.all_input_nodes) and all(isinstance(size, int) for size in sizes)
