"""What was decided for a graph: frozen data that ``explain`` prints, ``prepare`` carries out and a checkpoint names."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from pege_fx.policy import QuantPolicy
from pege_fx.spec import QuantSpec

FLOAT_BY_POLICY = "float by the policy"


@dataclass(frozen=True)
class Edge:
    """One edge of an operation.

    Attributes:
        operand: the operator's parameter ("input", "weight", "other", ...), or "output".
        source: the weight's path, or the name of the node that produces the activation.
        spec: resolved, or None for float.
        rule: the rule that decided.
        reason: why it stays float; "" if quantized.
        group: schedule group.
    """

    operand: str
    source: str
    spec: QuantSpec | None
    rule: str
    reason: str = ""
    group: str = "default"


@dataclass(frozen=True)
class Operation:
    """One operation that could be quantized, or a module that could not.

    Attributes:
        node: name of its node in the graph.
        path: module path, or that of the enclosing module and the function's name.
        function: its name.
        edges: empty if the operation can not be quantized.
        batch_norm: what became of the BatchNorm behind it, "" where there is none.
        parameters: number of elements of its weight and bias, or of the module.
        reason: why it has no edges; "" if it has.
    """

    node: str
    path: str
    function: str
    edges: tuple[Edge, ...] = ()
    batch_norm: str = ""
    parameters: int = 0
    reason: str = ""

    def edge(self, operand: str) -> Edge | None:
        """Return the edge of an operand, or None."""
        return next((edge for edge in self.edges if edge.operand == operand), None)


@dataclass(frozen=True)
class Capture:
    """How a module became a graph.

    Attributes:
        path: of the module; "" is the model itself.
        rung: "symbolic", "specialised" (on the example inputs), "python" (left as it is), "leaf" (left as it is, and has
            nothing to quantize) or "block" (a graph of its own, as asked for).
        place: file and line that made it so, "" where nothing did.
        reason: what was fixed there, or why it can not be traced.
    """

    path: str
    rung: str
    place: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """Every operation in the graph's order, under a policy, and how each part was captured."""

    model: str
    policy: QuantPolicy
    operations: tuple[Operation, ...]
    captures: tuple[Capture, ...] = ()

    @property
    def quantized(self) -> Iterator[tuple[Operation, Edge, QuantSpec]]:
        """The edges that are quantized."""
        for operation in self.operations:
            for edge in operation.edges:
                if edge.spec is not None:
                    yield operation, edge, edge.spec

    @property
    def fingerprint(self) -> str:
        """A short hash of what is quantized and how: equal for equal graphs under equal policies."""
        lines = [f"{op.path} {edge.operand} {edge.source} {spec!r}" for op, edge, spec in self.quantized]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
