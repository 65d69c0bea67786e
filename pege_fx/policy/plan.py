"""What was decided for a graph: frozen data that ``explain`` prints, ``prepare`` carries out and a checkpoint names."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pege_fx.numerics.spec import QuantSpec
from pege_fx.policy.rules import QuantPolicy

FLOAT_BY_POLICY = "float by the policy"
FLOAT_BITS = 32


def in_words(spec: QuantSpec) -> str:
    """Say a resolved format in words.

    >>> in_words(QuantSpec(bits=4).resolve("weight", non_negative=False))
    '4 bits signed per channel, lsq, pege'
    """
    sign = "signed" if spec.signed else "unsigned"
    what = f"{spec.bits} bits {sign}" if spec.format is None else f"{spec.format} ({spec.bits} bits)"
    stored = "" if spec.scale == "float32" else f", scales in {spec.scale}"
    return f"{what} per {spec.granularity}, {spec.method}, {spec.estimator}{stored}"


class Part(NamedTuple):
    """What a weight that is computed takes of a parameter: the parameter's path, and how many of its elements."""

    path: str
    elements: int
    whole: int


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
        elements: number of elements of the weight it reads; 0 for an activation.
        shared_with: the operands of the same operation that have one scale with it.
        recompute: whether its quantized value is made again in backward, and not kept.
        parts: the parameters that a weight is made of which operations compute; None for any other edge.
        note: why it has one scale per tensor where more were asked for; "" if it has what was asked for.
    """

    operand: str
    source: str
    spec: QuantSpec | None
    rule: str
    reason: str = ""
    group: str = "default"
    elements: int = 0
    shared_with: tuple[str, ...] = ()
    recompute: bool = False
    parts: tuple[Part, ...] | None = None
    note: str = ""

    @property
    def taken(self) -> tuple[Part, ...]:
        """The parameters that a weight takes."""
        return (Part(self.source, self.elements, self.elements),) if self.parts is None else self.parts

    @property
    def is_weight(self) -> bool:
        """Whether a rule's ``weight`` decides it."""
        return self.elements > 0 or self.operand == "weight"

    def __str__(self) -> str:
        """What was decided, and by what, in one line."""
        read = "" if self.is_weight or self.operand == "output" else f" ({self.source})"
        if self.spec is None:
            by = f" by {self.rule}" if self.reason == FLOAT_BY_POLICY else f": {self.reason}"
            return f"{self.operand}{read}: float{by}"
        shared = f", one scale with {', '.join(self.shared_with)}" if self.shared_with else ""
        again = ", made again in backward" if self.recompute else ""
        note = f" ({self.note})" if self.note else ""
        return f"{self.operand}{read}: {in_words(self.spec)}{note}{shared}{again} by {self.rule}"


def _widest(edges: tuple[Edge, ...]) -> int:
    return max((FLOAT_BITS if edge.spec is None else edge.spec.bits for edge in edges), default=FLOAT_BITS)


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
        macs: multiply-accumulates on the example inputs; None if their shapes are not known.
        engine: how an engine will run it, "" if none was asked.
    """

    node: str
    path: str
    function: str
    edges: tuple[Edge, ...] = ()
    batch_norm: str = ""
    parameters: int = 0
    reason: str = ""
    macs: int | None = None
    engine: str = ""

    def __str__(self) -> str:
        """Everything that was decided for it, and why, in a few lines."""
        facts = [self.function, f"{self.parameters:,} parameters"]
        facts += [] if self.macs is None else [f"{self.macs:,} multiply-accumulates"]
        facts += [f"BatchNorm: {self.batch_norm}"] if self.batch_norm else []
        lines = [f"{self.path or self.node}: {', '.join(facts)}"]
        lines += [f"  {self.reason}"] if self.reason else [f"  {edge}" for edge in self.edges]
        lines += [f"  {self.engine}"] if self.engine else []
        return "\n".join(lines)

    def edge(self, operand: str) -> Edge | None:
        """Return the edge of an operand, or None."""
        return next((edge for edge in self.edges if edge.operand == operand), None)

    @property
    def weights(self) -> tuple[Edge, ...]:
        """Its weight edges; most operations have one or none."""
        return tuple(edge for edge in self.edges if edge.is_weight)

    @property
    def inputs(self) -> tuple[Edge, ...]:
        """Its activation edges, the output's left out."""
        return tuple(edge for edge in self.edges if not edge.is_weight and edge.operand != "output")

    @property
    def widths(self) -> tuple[int, int]:
        """Bits of the two factors of each product: weight and input, or two inputs; float counts as ``FLOAT_BITS``."""
        weights, inputs = map(_widest, (self.weights, self.inputs))
        return (inputs if not self.weights else weights), inputs

    @property
    def format(self) -> str:
        """The widths in short: "W4A8"; "A8A8" without a weight, "W4" without an input, "float" if all are."""
        if all(edge.spec is None for edge in self.edges):
            return "float"
        first, second = self.widths
        if not self.weights:
            return f"A{first}A{second}"
        return f"W{first}A{second}" if self.inputs else f"W{first}"

    @property
    def bit_operations(self) -> int | None:
        """Multiply-accumulates times the bits of both factors; None if the former are not known."""
        first, second = self.widths
        return None if self.macs is None else self.macs * first * second


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
    """Every operation in the graph's order, under a policy, how each part was captured, and the model's parameters."""

    model: str
    policy: QuantPolicy
    operations: tuple[Operation, ...]
    captures: tuple[Capture, ...] = ()
    parameters: int = 0

    @property
    def quantized(self) -> Iterator[tuple[Operation, Edge, QuantSpec]]:
        """The edges that are quantized."""
        for operation in self.operations:
            for edge in operation.edges:
                if edge.spec is not None:
                    yield operation, edge, edge.spec

    @property
    def weights(self) -> list[list[tuple[Operation, Edge]]]:
        """Every weight once, as the operations that read it with their edges: a tied one has several.

        In a model of one graph a source is one tensor; graphs inside modules that stay Python have names of their own.
        """
        alone = sum(capture.rung != "python" for capture in self.captures) <= 1
        found: dict[tuple[str, str], list[tuple[Operation, Edge]]] = {}
        for operation in self.operations:
            for edge in operation.weights:
                found.setdefault((edge.source, "" if alone else operation.path), []).append((operation, edge))
        return list(found.values())

    @property
    def parameters_by_bits(self) -> Counter[int]:
        """Count the model's parameters by the bits that hold them; what is not a quantized weight has ``FLOAT_BITS``.

        A parameter counts once, whatever is computed from it; where several widths take parts of it, each has its part.
        """
        left: dict[str, int] = {}
        found: Counter[int] = Counter()
        alone = sum(capture.rung != "python" for capture in self.captures) <= 1
        for readers in self.weights:
            quantized = [(operation, edge) for operation, edge in readers if edge.spec is not None]
            for operation, edge in quantized[-1:]:
                assert edge.spec is not None
                for path, elements, whole in edge.taken:
                    key = path if alone else f"{operation.path} {path}"
                    taken = min(elements, left.setdefault(key, whole))
                    left[key] -= taken
                    found[edge.spec.bits] += taken
        found[FLOAT_BITS] = max(self.parameters - found.total(), 0)
        return +found

    @property
    def fingerprint(self) -> str:
        """A short hash of what is quantized and how: equal for equal graphs under equal policies."""
        lines = [
            f"{op.path} {edge.operand} {edge.source} {spec!r}{''.join(f' = {name}' for name in edge.shared_with)}"
            for op, edge, spec in self.quantized
        ]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
