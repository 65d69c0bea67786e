"""What is quantized, how, by which rule, and why the rest is not: a plan to read, as a table or operation by operation."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from rich.console import Console, ConsoleOptions, RenderResult
from torch import nn
from torch.fx import GraphModule, Node

from pege_fx.batch_norm import BatchNorm
from pege_fx.errors import ModelError, closest
from pege_fx.fake_quant import FakeQuant
from pege_fx.listing import Listing
from pege_fx.passes.graph import function_name, join, joining_of, module_of, operator_of, scope
from pege_fx.plan import Operation, Plan, in_words
from pege_fx.policy import path_pattern
from pege_fx.scheduler import plan_of
from pege_fx.size import SizeReport, graphs_of, size_report
from pege_fx.tables import (
    COLUMNS,
    bits_named,
    captures_of,
    collapsed,
    headings,
    macs_by_format,
    operation_to_dict,
    parameters_by_bits,
    row_of,
    rules_of,
    totals,
)

Filter: TypeAlias = str | Callable[[Operation], bool]


@dataclass(frozen=True)
class Bystander:
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
    bystanders: tuple[Bystander, ...] = ()
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
            pattern = path_pattern(selects)
            return tuple(operation for operation in self.plan.operations if pattern.fullmatch(operation.path))
        return tuple(filter(selects, self.plan.operations))

    def __getitem__(self, path: str) -> Operation:
        """Return what was decided for a module or node, and why; print it to read it.

        For what is no operation (a ReLU, a BatchNorm), ``reason`` says what became of it.

        Raises:
            ModelError: if there is none of that name; it names the closest.
        """
        for operation in self.plan.operations:
            if path in (operation.path, operation.node):
                return operation
        for other in self.bystanders:
            if path in (other.path, other.node):
                return self._as_operation(other)
        known: list[Operation | Bystander] = [*self.plan.operations, *self.bystanders]
        names = {name for seen in known for name in (seen.path, seen.node) if name}
        raise ModelError(f"no operation, module or node is called {path!r}; closest: {closest(path, names)}.")

    def _as_operation(self, other: Bystander) -> Operation:
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
        return Listing(self.title, COLUMNS, rows, notes, headings(self.operations))

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
                "parameters_by_bits": bits_named(parameters_by_bits(self.plan)),
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
    plan = plan_of(gm)
    seen = tuple(bystanders(graphs_of(gm), plan))
    return Summary(plan, f"{plan.model}: prepared", seen, size_report(gm), match, depth)


def bystanders(graphs: Iterable[tuple[str, GraphModule]], plan: Plan) -> Iterator[Bystander]:
    """Yield every node that calls something and is no operation of the plan; graphs come with their path."""
    for prefix, gm in graphs:
        planned = {operation.node for operation in plan.operations if operation.path.startswith(prefix)}
        for node in gm.graph.nodes:
            joins = joining_of(node) is not None and node.name in planned
            if node.op.startswith("call_") and operator_of(node) is None and not joins:
                yield _bystander(prefix, gm, node)


def _bystander(prefix: str, gm: GraphModule, node: Node) -> Bystander:
    module = module_of(gm, node, nn.Module)
    if module is None:
        verdict = node.meta.get("batch_norm", "")
        reason = verdict or "not quantized itself: only operations with a weight and matrix products are"
        if not verdict and (joining := joining_of(node)) is not None:
            reason += f', unless a rule says function="{joining.name}"'
        return Bystander(node.name, join(prefix, scope(node), function_name(node)), function_name(node), reason)
    path, what = join(prefix, str(node.target)), type(module).__name__
    if isinstance(module, FakeQuant):
        return Bystander(node.name, path, "fake-quant", f"{in_words(module.site.spec)} by {module.site.rule}")
    reason = "not quantized itself: only operations with a weight and matrix products are"
    if isinstance(module, BatchNorm):
        reason = node.meta.get("batch_norm") or (f"folded {node.target}" if what.startswith("Folded") else reason)
        what = what.removeprefix("Folded")
    return Bystander(node.name, path, what, reason, sum(p.numel() for p in module.parameters()))
