"""From a program to an ONNX model: every ATen operation by its entry of the table, names kept, dead nodes gone."""

import operator
import warnings
from collections.abc import Iterable
from typing import Any

import onnx
import torch
import torch.export
from onnx import helper
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

import pege_fx.export.indexing
import pege_fx.export.layers
import pege_fx.export.pooling
import pege_fx.export.quantization
import pege_fx.export.recurrent
import pege_fx.export.shapes  # noqa: F401 (these fill the table)
from pege_fx.errors import ExportError
from pege_fx.export.free_sizes import sizes_of
from pege_fx.export.numbers import SIZES
from pege_fx.export.program import Exported, constants, origin
from pege_fx.export.writer import TABLE, TYPES, OnnxStyle, UnmappedError, Value, Writer
from pege_fx.passes.graph import arguments, first_argument


def build(exported: Exported, inputs: list[str] | None, outputs: list[str], opset: int, style: OnnxStyle) -> onnx.ModelProto:
    """Return a program as an ONNX model, checked.

    Args:
        exported: the program, whose results are flat.
        inputs: names of the inputs, in order; None: those of ``forward``'s parameters.
        outputs: names of the results, in order.
        opset: version of the operators.
        style: how codes are written.

    Raises:
        ExportError: for an operator that has no entry, with node, operator and line; a model that writes into a buffer or
            an input; names that do not fit.
    """
    _refuse_writes(exported)
    return _Build(exported, inputs, outputs, Writer(opset, style)).model()


def _refuse_writes(exported: Exported) -> None:
    """A file keeps nothing between its calls and changes no array of its caller: what a model writes would be lost."""
    signature = exported.program.graph_signature
    lines = {node.name: exported.places.get(origin(node), "") for node in exported.program.graph.nodes}
    for result, name in signature.buffers_to_mutate.items():
        raise ExportError(
            f"the model writes into its buffer {name}{lines[result]}, and a file keeps nothing from one call to the next.\n"
            "  make the state an argument of forward, and return the new one."
        )
    for result, name in signature.user_inputs_to_mutate.items():
        raise ExportError(
            f"the model writes into its input {name}{lines[result]}, and a file changes no array of its caller.\n"
            f"  let forward write into a copy: {name} = {name}.clone()."
        )


def _in_known_operators(program: ExportedProgram) -> ExportedProgram:
    """Take operators without an entry apart, as far as torch knows how: their parts may have one."""
    if all(_is_known(node.target) for node in program.graph.nodes if node.op == "call_function" and node.users):
        return program
    parts: dict[Any, Any] = torch.export.default_decompositions()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own, about its internals
        taken: ExportedProgram = program.run_decompositions({name: parts[name] for name in parts if not _is_known(name)})
    return taken


def _is_known(target: Any) -> bool:
    return target is operator.getitem or target in SIZES or str(target) in TABLE


class _Build:
    def __init__(self, exported: Exported, inputs: list[str] | None, outputs: list[str], writer: Writer) -> None:
        self.program, self.w = _in_known_operators(exported.program), writer
        self.places, self.symbols = exported.places, exported.symbols
        self.fixed = constants(self.program)
        self.values: dict[Node, Any] = {}
        self.names = self._step_names()
        placeholders, given = self.program.graph.find_nodes(op="placeholder"), self.program.graph_signature.user_inputs
        self.inputs = [node for node in placeholders if node.name in given and isinstance(node.meta.get("val"), Tensor)]
        self.input_names = [writer.unique(name) for name in inputs or [node.name for node in self.inputs]]
        self.outputs = [writer.unique(name) for name in outputs]

    def _step_names(self) -> dict[Node, str]:
        """The last operation of a step takes the step's name, so that its result has it."""
        last: dict[str, Node] = {}
        for node in self.program.graph.nodes:
            if node.op == "call_function" and node not in self.fixed:
                last[origin(node)] = node
        return {node: name for name, node in last.items() if name}

    def model(self) -> onnx.ModelProto:
        graph = self.program.graph
        inputs = [self._input(node, name) for node, name in zip(self.inputs, self.input_names, strict=True)]
        for node in graph.nodes:
            if node.op == "call_function" and node not in self.fixed:
                self._write(node)
        results = first_argument(next(iter(graph.find_nodes(op="output"))))
        outputs = [self._output(name, value) for name, value in zip(self.outputs, results, strict=True)]
        kept = _needed(self.w.nodes, self.outputs)
        read = {name for node in kept for name in node.input}
        stored = [tensor for name, tensor in self.w.initializers.items() if name in read]
        made = helper.make_graph(kept, "pege_fx", inputs, outputs, stored)
        opsets = [helper.make_opsetid("", self.w.opset)]
        functions = self.w.style.functions(self.w.opset)
        opsets += [helper.make_opsetid(domain, 1) for domain in {function.domain for function in functions}]
        model = helper.make_model(made, opset_imports=opsets, functions=functions, producer_name="pege_fx")
        model.ir_version = helper.find_min_ir_version_for(opsets, ignore_unknown=True)
        try:
            onnx.checker.check_model(model, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(f"onnx's own checker refuses what was written: {error}") from error
        return model

    def _input(self, node: Node, name: str) -> onnx.ValueInfoProto:
        example = node.meta["val"]
        self.values[node] = Value(name, example.dtype, sizes_of(example))
        return self._info(name, example)

    def _info(self, name: str, example: Tensor) -> onnx.ValueInfoProto:
        """A free size that is one symbol has a name; one that is computed has none."""
        sizes = [size if isinstance(size, int) else self._symbol(str(size)) for size in sizes_of(example)]
        return helper.make_tensor_value_info(name, TYPES[example.dtype], sizes)

    def _symbol(self, text: str) -> str | None:
        return self.symbols.get(text, text if text.isidentifier() else None)

    def _output(self, name: str, value: Any) -> onnx.ValueInfoProto:
        example = value.meta["val"] if isinstance(value, Node) else None
        if not isinstance(example, Tensor):
            raise ExportError(f"output {name} is no tensor: {value}.")
        self.w.scope = name
        self.w.nodes.append(helper.make_node("Identity", [self.w.read(self._value(value))], [name], name=name))
        return self._info(name, example)

    def _value(self, node: Node) -> Any:
        if node not in self.values and node in self.fixed:
            value = self.fixed[node]
            self.values[node] = self.w.constant(value, name=self._constant_name(node)) if isinstance(value, Tensor) else value
        return self.values[node]

    def _constant_name(self, node: Node) -> str:
        signature = self.program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        return str(names.get(node.name, node.name))

    def _write(self, node: Node) -> None:
        w, args, kwargs = self.w, *arguments(node)
        if node.target is operator.getitem:
            self.values[node] = self.values[args[0]][args[1]]
            return
        handler = SIZES.get(node.target) or TABLE.get(str(node.target))
        if handler is None:
            if not node.users:
                return  # a check of sizes
            raise self._unmapped(node, "is not among those that are written in ONNX")
        before, w.scope = len(w.nodes), self.names.get(node) or node.name
        w.target, w.result = str(node.target), node.meta["val"]
        resolved_args, resolved_kwargs = map_arg((args, kwargs), self._value)
        try:
            made = handler(w, *resolved_args, **resolved_kwargs)
        except (UnmappedError, TypeError) as error:
            raise self._unmapped(node, f"can not be written: {error}") from error
        self.values[node] = self._named(node, made, before)

    def _named(self, node: Node, made: Any, before: int) -> Any:
        """Give results the node's name, and what is known of them in torch."""
        if isinstance(made, list):
            return [self._described(value, example) for value, example in zip(made, node.meta["val"], strict=False)]
        produced = {name for part in self.w.nodes[before:] for name in part.output}
        if made.name in produced:
            _rename(self.w.nodes[before:], made.name, name := self.w.unique(self.w.scope))
            made.name = name
        return self._described(made, node.meta["val"])

    def _described(self, value: Value, example: Any) -> Value:
        if isinstance(example, Tensor) and value.constant is None:
            value.shape, value.dtype = sizes_of(example), example.dtype
        return value

    def _unmapped(self, node: Node, what: str) -> ExportError:
        name = origin(node) or node.name
        return ExportError(
            f"{name}: the operator {node.target} {what}{self.places.get(name, '')}.\n"
            "  write that part of the model in other operations, or enter a handler: see docs/deploy.md."
        )


def _rename(nodes: Iterable[onnx.NodeProto], old: str, new: str) -> None:
    for node in nodes:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == old:
                    names[i] = new
        if node.name == old:
            node.name = new


def _needed(nodes: list[onnx.NodeProto], outputs: list[str]) -> list[onnx.NodeProto]:
    """Leave out nodes that no output depends on."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= set(node.input)
    return kept[::-1]
