"""How much of a model a policy reaches: the share of its multiply-accumulates, how each module was traced, what stays float."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult

from pege_fx._utils.listing import Listing, Row
from pege_fx.policy.plan import Operation, Plan


def is_quantized(operation: Operation) -> bool:
    """Tell whether every factor of an operation's products is quantized: weight and inputs, or both inputs."""
    factors = [edge for edge in operation.edges if edge.operand != "output"]
    return bool(factors) and all(edge.spec is not None for edge in factors)


@dataclass(frozen=True)
class Coverage:
    """What of a plan is quantized, how each module became a graph, and what stays float for which reason."""

    plan: Plan

    @property
    def shares(self) -> dict[str, tuple[int, int]]:
        """Quantized and all: of "MACs" (where shapes are known), of "weights" (elements, once each) and of "operations"."""
        found = {"MACs": [0, 0], "weights": [0, 0], "operations": [0, 0]}

        def count(what: str, amount: int, quantized: bool) -> None:
            found[what][0] += amount * quantized
            found[what][1] += amount

        for operation in self.plan.operations:
            count("MACs", operation.macs or 0, is_quantized(operation))
            count("weights", 0 if operation.edges else operation.parameters, is_quantized(operation))
            count("operations", 1, is_quantized(operation))
        for readers in self.plan.weights:  # one that is tied counts as quantized if all of its readers are
            count("weights", readers[0][1].elements, all(is_quantized(operation) for operation, _ in readers))
        return {what: (part, whole) for what, (part, whole) in found.items() if whole}

    @property
    def listing(self) -> Listing:
        """One row for each graph (how it was traced) and each operation that stays float (why)."""
        traced: list[Row] = [
            (capture.path or "the model", "graph" if capture.rung != "python" else "Python", capture.rung, "-", where)
            for capture in self.plan.captures
            for where in [f"{capture.reason} ({capture.place})" if capture.reason else "-"]
        ]
        left = [
            (
                operation.path,
                operation.function,
                "float",
                "-" if operation.macs is None else f"{operation.macs:,}",
                _why(operation),
            )
            for operation in self.plan.operations
            if not is_quantized(operation)
        ]
        notes = [
            f"{what}: {100 * part / whole:.1f} % quantized, {part:,} of {whole:,}"
            for what, (part, whole) in self.shares.items()
        ]
        if "MACs" not in self.shares:
            notes.append("MACs: not known without example inputs")
        columns = ("path", "what", "rung or format", "MACs", "reason")
        return Listing(f"{self.plan.model}: coverage", columns, (*traced, *left), tuple(notes))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.listing

    def __str__(self) -> str:
        return str(self.listing)

    def to_dict(self) -> dict[str, Any]:
        """Return shares, captures and what stays float as plain data."""
        return {
            "model": self.plan.model,
            "shares": {what: {"quantized": part, "all": whole} for what, (part, whole) in self.shares.items()},
            "captures": [vars(capture) for capture in self.plan.captures],
            "float": [
                {"path": operation.path, "function": operation.function, "macs": operation.macs, "reason": _why(operation)}
                for operation in self.plan.operations
                if not is_quantized(operation)
            ],
        }

    def to_markdown(self) -> str:
        """Return the table as Markdown."""
        return self.listing.to_markdown()

    def to_html(self) -> str:
        """Return the table as HTML."""
        return self.listing.to_html()

    _repr_html_ = to_html


def _why(operation: Operation) -> str:
    if operation.reason:
        return operation.reason
    factors = [edge for edge in operation.edges if edge.operand != "output"]
    reasons = dict.fromkeys(f"{edge.operand}: {edge.reason}" for edge in factors if edge.spec is None)
    return "; ".join(reasons) or "it has no input that could be quantized"
