"""Weights that operations compute from parameters alone: weight norm, standardization, low-rank sums, slices, joined ones.

Such a weight is quantized as a parameter is: where its operation reads it, on the axis of its output channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pege_fx.modules.mode import preserve_state
from pege_fx.passes.graph import (
    attribute_of,
    behind_transposes,
    entry_of,
    is_weight,
    operand,
    operator_of,
    tensor_of,
    traits_of,
    unfolded,
)
from pege_fx.passes.values import computed, constants_of
from pege_fx.policy.plan import Part


@dataclass(frozen=True)
class ComputedWeight:
    """A weight that is no parameter.

    Attributes:
        origin: the node whose value is quantized; transposes of a matrix stand behind it.
        value: on the meta device: its shape and dtype.
        parts: the parameters that it is made of, once each.
    """

    origin: Node
    value: Tensor
    parts: tuple[Part, ...]


class ComputedWeights:
    """The computed weights of a graph, by the operation's node and operand; ``makers`` are the nodes that compute them."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm, self.makers = gm, set[Node]()
        self.found: dict[tuple[Node, str], ComputedWeight] = {}
        self._constant: set[Node] | None = None
        for node in gm.graph.nodes:
            described = operator_of(node)
            for name in (*described.weights, *described.inputs) if described is not None else ():
                if (weight := self._computed(node, name)) is not None:
                    self.found[node, name] = weight

    @property
    def constant(self) -> set[Node]:
        """The nodes that no input decides."""
        if self._constant is None:
            self._constant = constants_of(self.gm)
        return self._constant

    def _computed(self, node: Node, name: str) -> ComputedWeight | None:
        source = operand(node, name)
        if not isinstance(source, Node) or source.op not in ("call_function", "call_method", "call_module"):
            return None
        if is_weight(self.gm, node, name, source) or unfolded(self.gm, source) is not source:
            return None
        of_matrix = behind_transposes(source)
        if not isinstance(of_matrix, Node) or of_matrix not in self.constant or source not in self.constant:
            return None
        inside = nodes_behind(of_matrix) | {of_matrix}
        described = entry_of(node)
        if name not in described.weights and (described.name == "grouped_mm" or not self._is_arranged(inside)):
            return None
        value = self._value(of_matrix)
        if value is None or not value.is_floating_point() or value.ndim < 2:
            return None
        origin, value = (of_matrix, value) if value.ndim == 2 else (source, self._value(source))
        if value is None:
            return None
        parts = self.parts(origin)
        if name not in described.weights and not parts:
            return None  # a table of the code, and nothing that learns
        self.makers |= nodes_behind(origin) | {origin}
        return ComputedWeight(origin, value, parts)

    def _is_arranged(self, inside: set[Node]) -> bool:
        """Whether parameters are only viewed and joined: a factor of a product is a weight then, and no activation."""
        return all(self._is_view(node) or traits_of(self.gm, node).joins for node in inside)

    def _is_view(self, node: Node) -> bool:
        """Whether a node's elements are some of its input's: a view, or what may be one, as ``reshape``."""
        traits = traits_of(self.gm, node)
        return node.op == "get_attr" or (traits.view is not False and not traits.writes)

    def _value(self, node: Node) -> Tensor | None:
        if "shape" in node.meta and "dtype" in node.meta:
            return torch.empty(node.meta["shape"], dtype=node.meta["dtype"], device="meta")
        called = [attribute_of(self.gm, part) for part in nodes_behind(node) | {node} if part.op == "call_module"]
        modules = [inner for module in called for inner in module.modules()]
        with torch.no_grad(), preserve_state(modules):  # a spectral norm moves its estimates
            value = computed(self.gm, node)
        return value.to("meta") if isinstance(value, Tensor) else None

    def parts(self, origin: Node) -> tuple[Part, ...]:
        """The parameters behind a node: a view of one takes as many of its elements as it has, others take all."""
        inside = nodes_behind(origin) | {origin}
        read = self._parameters(inside)
        if len(read) == 1 and all(map(self._is_view, inside)) and (value := self._value(origin)) is not None:
            ((path, parameter),) = read.items()
            return (Part(path, min(value.numel(), parameter.numel()), parameter.numel()),)
        return tuple(Part(path, parameter.numel(), parameter.numel()) for path, parameter in read.items())

    def _parameters(self, nodes: set[Node]) -> dict[str, nn.Parameter]:
        read: dict[str, nn.Parameter] = {}
        for node in sorted(nodes, key=lambda node: node.name):
            if isinstance(value := tensor_of(self.gm, node), nn.Parameter):
                read[str(node.target)] = value
            elif node.op == "call_module":
                module = attribute_of(self.gm, node)
                read |= {f"{node.target}.{name}": parameter for name, parameter in module.named_parameters()}
        return read


def nodes_behind(node: Node) -> set[Node]:
    """Return what a node is computed from, near and far."""
    found: set[Node] = set()
    waiting = list(node.all_input_nodes)
    while waiting:
        if (part := waiting.pop()) not in found:
            found.add(part)
            waiting += part.all_input_nodes
    return found
