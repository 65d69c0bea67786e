"""A converted graph as a functional ATen program, by ``torch.export``, in which codes and names survive."""

import os
import traceback
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from pege_fx.errors import ExportError, PegeWarning
from pege_fx.export.calls import by_name, copied, try_call
from pege_fx.export.free_sizes import Exporter, reason_of, sizes_of
from pege_fx.export.steps import DEQUANTIZE, Operators, Step, as_module, replacements, step_name, stepped, steps_of_all
from pege_fx.modules.stages import graph_of
from pege_fx.passes.graph import arguments
from pege_fx.training.batches import Call

_NOT_THE_MODEL = (f"{os.path.dirname(torch.__file__)}/", f"{os.path.dirname(os.path.dirname(__file__))}/", "<")


def to_program(
    deployed: GraphModule,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    operators: Operators = "aten",
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
) -> ExportedProgram:
    """Return a converted graph as a functional ATen program by ``torch.export``, its first dimensions free.

    Args:
        deployed: the result of ``pege_fx.convert``.
        args: example inputs.
        kwargs: example keyword arguments; the program is called with the same ones.
        operators: what quantizes: "aten", plain operations, same answers to the last bit, runs anywhere, AOTInductor
            included; "pege_fx", one operator each, for which this package has to be imported, and no embedding bags
            (what ONNX is written from); "quantized_decomposed", those of PyTorch's own flow (PT2E), as long as torch
            has them (it multiplies by 1 / s, so ties may differ).
        dynamic_batch: leave the first dimension of every input free.
        dynamic_shapes: other sizes that stay free, as ``torch.export.export`` takes them; a name may stand for a ``Dim``,
            and parameters may be left out: ``{"ids": {1: "length"}, "mask": {1: "length"}}``.

    Warns where the batch size can not be free, because the model chooses by it or fixes it.

    Raises:
        ExportError: if ``torch.export`` can not follow the model, or a size that is asked for can not be free.
        InputError: example inputs that do not fit the model.

    >>> import pege_fx
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> gm = pege_fx.prepare(model, "W4A4", torch.randn(2, 4))
    >>> program = to_program(pege_fx.convert(gm), (torch.randn(2, 4),))
    >>> program.module()(torch.zeros(5, 4)).shape
    torch.Size([5, 2])
    """
    deployed = graph_of(deployed, "converted", error=ExportError)
    call = (tuple(args), dict(kwargs or {}))
    try_call(deployed, call)
    exported = Exported(deployed, call, operators, dynamic_batch=dynamic_batch, dynamic_shapes=dynamic_shapes)
    for note in exported.notes:
        warnings.warn(note, PegeWarning, stacklevel=2)
    return exported.program


class Exported:
    """A converted graph's program, with what is known of it beside.

    Args:
        deployed, operators, dynamic_batch, dynamic_shapes: see ``to_program``.
        call: example arguments.
        free_lengths: leave the number of tokens free too, or fail.
        flat: the program gives the tensors of the result alone, in the order of ``flat_tensors``.

    Attributes:
        program: functional.
        symbols: the name of a free size by torch's.
        places: " (file:line)" of a converted graph's node by its name.
        notes: what a user should know: where a batch size could not stay free, and why.
    """

    def __init__(
        self,
        deployed: GraphModule,
        call: Call,
        operators: Operators,
        *,
        dynamic_batch: bool,
        dynamic_shapes: Any,
        free_lengths: bool = False,
        flat: bool = False,
    ) -> None:
        module, call = stepped(deployed, replacements(operators), flat=flat), copied(call)
        exporter = Exporter(as_module(module), call, by_name(deployed, call), dynamic_shapes)
        self.places = {name: step.place for name, step in steps_of_all(module)}
        self.notes: list[str] = []
        self.program = self._exported(exporter, dynamic_batch, free_lengths)
        self.notes += exporter.fixed_batches(self.program) if dynamic_batch else []
        self.symbols = exporter.names(self.program)

    def _exported(self, exporter: Exporter, dynamic_batch: bool, free_lengths: bool) -> ExportedProgram:
        if dynamic_batch:
            try:
                return exporter.export(dynamic_batch, free_lengths)
            except Exception as error:
                if free_lengths:
                    raise ExportError(f"the number of tokens can not be free: {reason_of(error)}") from error
                self.notes.append(f"the batch size is fixed to that of the example inputs: {reason_of(error)}")
        try:
            return exporter.export(dynamic_batch=False)
        except Exception as error:
            raise ExportError(
                f"torch.export can not follow the model{_where_failed(error)}: {type(error).__name__}: {reason_of(error)}"
            ) from error


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


def origin(node: Node) -> str:
    """Return the name of the converted graph's node that an ATen operation comes from, or ""."""
    for path, _ in reversed(list((node.meta.get("nn_module_stack") or {}).values())):
        if (name := step_name(str(path))) != str(path):
            return name
    return ""


def constants(program: ExportedProgram) -> dict[Node, Any]:
    """Return every value that no input decides: parameters, buffers, and what is computed from them alone, numbers included.

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
    tensors = {node: value.detach() for node, value in known.items() if isinstance(value, Tensor)}
    return tensors | {node: value for node, value in known.items() if isinstance(value, (bool, int, float))}


def _is_known(node: Node, known: Mapping[Node, Any]) -> bool:
    value = node.meta.get("val")
    sizes = sizes_of(value) if isinstance(value, Tensor) else ()
    return all(source in known for source in node.all_input_nodes) and all(isinstance(size, int) for size in sizes)
