"""What is quantized, how, by which rule, and why the rest is not: a plan to read, as a table or operation by operation."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from rich.console import Console, ConsoleOptions, RenderResult
from torch import nn
from torch.fx import GraphModule, Node

from pege_fx._utils.listing import Listing
from pege_fx.errors import ModelError, closest
from pege_fx.inspection.size import SizeReport, graphs_of, size_report
from pege_fx.inspection.tables import (
    COLUMNS,
    SIGNS,
    bits_named,
    captures_of,
    collapsed,
    headings,
    macs_by_format,
    operation_to_dict,
    row_of,
    rules_of,
    totals,
)
from pege_fx.modules.batch_norm import BatchNorm
from pege_fx.modules.fake_quant import FakeQuant
from pege_fx.modules.stages import graph_of
from pege_fx.passes.graph import first_argument, function_name, join, joining_of, module_of, operator_of, scope
from pege_fx.policy.patterns import PathPattern
from pege_fx.policy.plan import Operation, Plan, in_words
from pege_fx.training.scheduler import plan_of

_NO_OPERATION = "not quantized itself: only operations with a weight and matrix products are"

Filter: TypeAlias = str | Callable[[Operation], bool]


@dataclass(frozen=True)
class OtherNode:
    """A node that is no operation: a ReLU, an addition, a BatchNorm, a fake-quant.

    Attributes:
        node: its name.
        path: of the module it calls or belongs to.
        function: what it does.
        reason: what became of it.
        parameters: number of elements of its module.
    """

    node: str
    path: str
    function: str
    reason: str
    parameters: int = 0


@dataclass(frozen=True)
class Summary:
    """A plan to read. It prints as a table with totals; ``summary["layer1.0.conv1"]`` is all about one module or node.

    ``to_dict()``, ``to_json()``, ``to_markdown()`` and, in a notebook, HTML hold the same.
    """

    plan: Plan
    title: str
    other_nodes: tuple[OtherNode, ...] = ()
    size: SizeReport | None = None
    match: Filter | None = None
    depth: int | None = None

    def __post_init__(self) -> None:
        if self.depth is not None and (isinstance(self.depth, bool) or not isinstance(self.depth, int) or self.depth < 1):
            raise ModelError(f"depth={self.depth!r}: give a whole number of path components, 1 or more, or None for all.")
        if self.plan.operations and not self.operations:
            names = [operation.path for operation in self.plan.operations]
            near = f"; closest: {closest(self.match, names)}" if isinstance(self.match, str) else ""
            raise ModelError(f"match={self.match!r} selects none of {len(names)} operations{near}.")

    @property
    def operations(self) -> tuple[Operation, ...]:
        """Those that the filter selects, in the order of the graph."""
        if self.match is None:
            return self.plan.operations
        selects = self.match
        if isinstance(selects, str):
            pattern = PathPattern(selects)
            return tuple(operation for operation in self.plan.operations if pattern.fullmatch(operation.path))
        return tuple(filter(selects, self.plan.operations))

    def __getitem__(self, path: str) -> Operation:
        """Return what was decided for a module or node, and why; print it to read it.

        For what is no operation, ``reason`` says what became of it: of a ReLU or a BatchNorm, of a module that stays
        Python, of all that is inside a module.

        Raises:
            ModelError: if there is none of that name; it names the closest.
        """
        for operation in self.plan.operations:
            if path in (operation.path, operation.node):
                return operation
        if (container := self._container(path)) is not None:
            return container
        for other in self.other_nodes:
            if path in (other.path, other.node):
                return self._as_operation(other)
        known: list[Operation | OtherNode] = [*self.plan.operations, *self.other_nodes]
        names = {name for seen in known for name in (seen.path, seen.node) if name}
        raise ModelError(f"no operation, module or node is called {path!r}; closest: {closest(path, names)}.")

    def _container(self, path: str) -> Operation | None:
        """All operations inside a module, and why it stays Python if it does; None for what is no such module."""
        inside = [operation for operation in self.plan.operations if path and operation.path.startswith(f"{path}.")]
        stays = [capture for capture in self.plan.captures if (capture.path, capture.rung) == (path, "python")]
        if not path or not (inside or stays):
            return None
        lines = [f"stays Python: {capture.reason} ({capture.place})" for capture in stays] + list(map(str, inside))
        known = [operation.macs for operation in inside if operation.macs is not None]
        count, reason = sum(operation.parameters for operation in inside), "\n".join(lines).replace("\n", "\n  ")
        words = f"module with {len(inside)} operation{'s' * (len(inside) != 1)}"
        return Operation("", path, words, parameters=count, reason=reason, macs=sum(known) if known else None)

    def _as_operation(self, other: OtherNode) -> Operation:
        readers = [
            f"{operation.path} reads it, {edge}"
            for operation in self.plan.operations
            for edge in operation.edges
            if edge.source == other.node and edge.operand != "output"
        ]
        reason = "\n  ".join([other.reason, *readers])
        return Operation(other.node, other.path, other.function, parameters=other.parameters, reason=reason)

    @property
    def listing(self) -> Listing:
        """The table, its totals and its rules."""
        notes = (*totals(self.plan, self.size), *rules_of(self.plan), *captures_of(self.plan))
        if self.depth is not None:
            return collapsed(self.operations, self.depth, self.title, notes)
        rows = tuple(map(row_of, self.operations))
        return Listing(self.title, COLUMNS, rows, (SIGNS, *notes), headings(self.operations))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.listing

    def __str__(self) -> str:
        return str(self.listing)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: the model, its totals, rules, operations with their edges, and how it was captured."""
        return {
            "model": self.plan.model,
            "policy": self.plan.policy.to_dict(),
            "totals": {
                "parameters": self.plan.parameters,
                "parameters_by_bits": bits_named(self.plan.parameters_by_bits),
                "macs_by_format": dict(macs_by_format(self.plan.operations) or {}) or None,
                "float_bytes": self.size.float_bytes if self.size else None,
                "quantized_bytes": self.size.quantized_bytes if self.size else None,
            },
            "operations": [operation_to_dict(operation) for operation in self.operations],
            "captures": [vars(capture) for capture in self.plan.captures],
        }

    def to_json(self) -> str:
        """Return ``to_dict()`` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_markdown(self) -> str:
        """Return the table as Markdown."""
        return self.listing.to_markdown()

    def to_html(self) -> str:
        """Return the table as HTML."""
        return self.listing.to_html()

    _repr_html_ = to_html


@dataclass(frozen=True)
class Explanation(Summary):
    """The summary of a dry run: what ``prepare`` would do."""


def summary(gm: GraphModule, match: Filter | None = None, *, depth: int | None = None) -> Summary:
    """Return what a prepared model has become, to print, to search and to save.

    Args:
        gm: a prepared model.
        match: only these operations: a glob over paths (or ``re:`` and a regular expression), or a predicate.
        depth: one row for each module of that many path components, instead of one for each operation.

    Raises:
        ModelError: if ``gm`` was not prepared, or nothing matches.

    >>> import pege_fx
    >>> gm = pege_fx.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), "W4A4")
    >>> print(summary(gm)["1"])
    1: ReLU, 0 parameters
      not quantized itself: only operations with a weight and matrix products are
      2 reads it, input (_1): 8 bits unsigned per tensor, lsq, pege by rule 2: Rule(role='last', weight='8', input='8')
    """
    gm = graph_of(gm, "prepared")
    plan = plan_of(gm)
    seen = tuple(other_nodes(gm, graphs_of(gm), plan))
    return Summary(plan, f"{plan.model}: prepared", seen, size_report(gm), match, depth)


def other_nodes(model: nn.Module, graphs: Iterable[tuple[str, GraphModule]], plan: Plan) -> Iterator[OtherNode]:
    """Yield every node that calls something and is no operation of the plan, then every module that no node calls.

    Args:
        model: the model, or what ``prepare`` made of it.
        graphs: its graphs with their paths.
        plan: what was decided for them.
    """
    known = {operation.path for operation in plan.operations}
    for prefix, gm in graphs:
        planned = {operation.node for operation in plan.operations if operation.path.startswith(prefix)}
        for node in gm.graph.nodes:
            joins = joining_of(node) is not None and node.name in planned
            if node.op.startswith("call_") and operator_of(node) is None and not joins:
                yield (found := _other_node(prefix, gm, node))
                known.add(found.path)
    holders = {""}
    for path in known:
        while path not in holders:
            holders.add(path)
            path = path.rpartition(".")[0]
    for path, module in model.named_modules():
        if path not in holders:
            count = sum(parameter.numel() for parameter in module.parameters())
            yield OtherNode("", path, type(module).__name__, _why_not_called(path, plan), count)


def _why_not_called(path: str, plan: Plan) -> str:
    around = [note for note in plan.captures if note.rung == "python" and f"{path}.".startswith(note.path and f"{note.path}.")]
    if not around:
        return "not in the graph: nothing calls it by itself"
    inner = max(around, key=lambda note: len(note.path))
    return f"runs inside {inner.path or 'the model'}, which stays Python: {inner.reason} ({inner.place})"


def _other_node(prefix: str, gm: GraphModule, node: Node) -> OtherNode:
    module = module_of(gm, node, nn.Module)
    if module is None:
        verdict = node.meta.get("batch_norm", "")
        reason = verdict or _NO_OPERATION
        if not verdict and (joining := joining_of(node)) is not None:
            reason += f', unless a rule says function="{joining.name}"'
        return OtherNode(node.name, join(prefix, scope(node), function_name(node)), function_name(node), reason)
    path, what, reason = join(prefix, str(node.target)), type(module).__name__, _NO_OPERATION
    if isinstance(module, FakeQuant):
        return OtherNode(node.name, path, "fake-quant", f"{in_words(module.site.spec)} by {module.site.rule}")
    if isinstance(module, BatchNorm):
        reason = str(node.meta.get("batch_norm") or (f"folded {node.target}" if what.startswith("Folded") else reason))
        what = what.removeprefix("Folded")
        layer = first_argument(node)
        if reason.startswith("folded ") and isinstance(layer, Node):
            reason = f"folded into {join(prefix, layer.meta.get('path') or layer.name)}"
    return OtherNode(node.name, path, what, reason, sum(p.numel() for p in module.parameters()))
