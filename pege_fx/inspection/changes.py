"""Nodes as a comparison of two graphs sees them, and what may have happened to one."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from pege_fx.passes.graph import arguments, attribute, function_name, module_of

Kind: TypeAlias = Literal["added", "removed", "replaced", "changed"]

KINDS: tuple[Kind, ...] = ("added", "removed", "replaced", "changed")
SIGNS: Mapping[Kind, str] = {"added": "+", "removed": "-", "replaced": "~", "changed": "*"}
_PLAIN = (str, int, float, torch.dtype)
_NOT_COMPARED = {"stack_trace", "seq_nr"}


@dataclass(frozen=True)
class NodeView:
    """What a comparison sees of a node.

    Attributes:
        name: its name, behind the path of its graph and "/" where that is inside a module that stays Python.
        op: fx's kind of node.
        target: what it calls or reads, as text.
        inputs: names of the nodes it reads, each once.
        arguments: its arguments as text, with ``$0`` for the first of ``inputs``.
        facts: the module behind it, or the tensor; and what passes noted in ``meta`` as plain values.
    """

    name: str
    op: str
    target: str
    inputs: tuple[str, ...]
    arguments: str
    facts: Mapping[str, str]

    def __str__(self) -> str:
        called = re.sub(r"\$(\d+)", lambda found: self.inputs[int(found[1])], self.arguments)
        module = f": {self.facts['module']}" if "module" in self.facts else ""
        tensor = f": {self.facts['tensor']}" if "tensor" in self.facts else ""
        return f"{self.name} = {self.target}{called if self.op.startswith('call') else ''}{module}{tensor}"


Snapshot: TypeAlias = Mapping[str, NodeView]


class _Slot:
    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"${self.number}"


def snapshot(gm: GraphModule, prefix: str = "") -> dict[str, NodeView]:
    """Record one graph, without those inside it, as it is now; later changes do not reach the record."""
    return {view.name: view for view in (_view(gm, node, prefix) for node in gm.graph.nodes)}


def _view(gm: GraphModule, node: Node, prefix: str) -> NodeView:
    place = f"{prefix}/" if prefix else ""
    slots = {source: _Slot(number) for number, source in enumerate(node.all_input_nodes)}
    args, kwargs = map_arg(arguments(node), lambda source: cast(Any, slots[source]))
    words = [*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())]
    inputs = tuple(f"{place}{source.name}" for source in slots)
    target = function_name(node) if node.op == "call_function" else str(node.target)
    return NodeView(f"{place}{node.name}", node.op, target, inputs, f"({', '.join(words)})", _facts(gm, node))


def _facts(gm: GraphModule, node: Node) -> dict[str, str]:
    facts = {
        key: str(value)
        for key, value in node.meta.items()
        if key not in _NOT_COMPARED and (isinstance(value, _PLAIN) or (isinstance(value, tuple) and _is_shape(value)))
    }
    module, value = module_of(gm, node, nn.Module), attribute(gm, node)
    if module is not None:
        facts["module"] = f"{type(module).__name__}({module.extra_repr()})"
    if isinstance(value, Tensor):
        facts["tensor"] = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return facts


def _is_shape(value: tuple[Any, ...]) -> bool:
    return all(isinstance(size, int) for size in value)


@dataclass(frozen=True)
class Change:
    """One difference: a node that is on one side alone, or what is different about it.

    Attributes:
        kind: "added", "removed", "replaced" (another operation in the same place) or "changed".
        before, after: the node on each side; None where it is not there.
        details: what changed, or between which nodes an added one stands.
    """

    kind: Kind
    before: NodeView | None
    after: NodeView | None
    details: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.kind == "replaced":
            return f"~ {self.before}\n  -> {self.after}"
        if self.kind == "changed":
            assert self.after is not None
            return f"* {self.after.name}: {'; '.join(self.details)}"
        about = f"  ({'; '.join(self.details)})" if self.details else ""
        return f"{SIGNS[self.kind]} {self.after or self.before}{about}"
