"""The cells of a plan's tables: one operation a row, or one module; and the totals below."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pege_fx._utils.listing import Listing, Row
from pege_fx.inspection.size import SizeReport
from pege_fx.policy.plan import FLOAT_BITS, FLOAT_BY_POLICY, Edge, Operation, Plan


def _bits(edges: Iterable[Edge]) -> str:
    return "/".join(dict.fromkeys("float" if edge.spec is None else str(edge.spec.bits) for edge in edges)) or "-"


def _signs(edges: Iterable[Edge]) -> str:
    return "/".join("s" if edge.spec.signed else "u" for edge in edges if edge.spec is not None) or "-"


def _words(edges: Iterable[Edge], field: str) -> str:
    return "/".join(dict.fromkeys(str(getattr(edge.spec, field)) for edge in edges if edge.spec is not None)) or "-"


def _rule_number(edge: Edge) -> str:
    return edge.rule.partition(":")[0] if edge.rule.startswith("rule") else ""


def _why(operation: Operation) -> str:
    """The rules that decided, by number; and for edges that are float for another cause, the reason."""
    if operation.reason:
        return operation.reason
    words: dict[str, None] = {}
    for edge in operation.edges:
        by_rule = edge.spec is not None or edge.reason == FLOAT_BY_POLICY
        words[_rule_number(edge) if by_rule else f"{edge.operand}: {edge.reason}"] = None
    if any(edge.shared_with for edge in operation.edges):
        words["one scale"] = None
    return "; ".join(word for word in words if word)


def _verdict(operation: Operation) -> str:
    """The BatchNorm's verdict; a BatchNorm beside the operation by its name alone."""
    beside = operation.path.rpartition(".")[0]
    return operation.batch_norm.replace(f" {beside}.", " ") or "-"


SIGNS = "sign: s signed, u unsigned, in the order weight / inputs"
COLUMNS = (
    "path", "op", "weight", "input", "sign", "method", "estimator", "BatchNorm", "parameters", "MACs", "rule or reason",
)  # fmt: skip


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def row_of(operation: Operation) -> Row:
    return (
        operation.path,
        operation.function,
        _bits(operation.weights),
        _bits(operation.inputs),
        _signs(operation.edges),
        _words(operation.edges, "method"),
        _words(operation.edges, "estimator"),
        _verdict(operation),
        f"{operation.parameters:,}",
        _count(operation.macs),
        _why(operation),
    )


def headings(operations: tuple[Operation, ...]) -> Mapping[int, Row]:
    """A line above every run of operations of one module, with what they add up to."""
    found, start = {}, 0
    for parent, run in itertools.groupby(operations, lambda operation: operation.path.rpartition(".")[0]):
        inside = list(run)
        if parent and len(inside) > 1:
            _, count, weight, inputs, parameters, macs = _aggregate(parent, inside)
            found[start] = (parent, f"{count} operations", weight, inputs, "", "", "", "", parameters, macs, "")
        start += len(inside)
    return found


def _aggregate(path: str, operations: list[Operation]) -> Row:
    macs = [operation.macs for operation in operations if operation.macs is not None]
    return (
        path,
        str(len(operations)),
        "/".join(sorted({_bits([edge]) for operation in operations for edge in operation.weights})) or "-",
        "/".join(sorted({_bits([edge]) for operation in operations for edge in operation.inputs})) or "-",
        f"{sum(operation.parameters for operation in operations):,}",
        _count(sum(macs) if macs else None),
    )


def collapsed(operations: tuple[Operation, ...], depth: int, title: str, notes: tuple[str, ...]) -> Listing:
    groups: dict[str, list[Operation]] = {}
    for operation in operations:
        groups.setdefault(".".join(operation.path.split(".")[:depth]), []).append(operation)
    rows = tuple(_aggregate(path, inside) for path, inside in groups.items())
    return Listing(title, ("module", "operations", "weight", "input", "parameters", "MACs"), rows, notes)


def operation_to_dict(operation: Operation) -> dict[str, Any]:
    edges = [
        {
            "operand": edge.operand,
            "elements": edge.elements,
            "source": edge.source,
            "bits": edge.spec.bits if edge.spec else None,
            "signed": edge.spec.signed if edge.spec else None,
            "granularity": edge.spec.granularity if edge.spec else None,
            "method": edge.spec.method if edge.spec else None,
            "estimator": edge.spec.estimator if edge.spec else None,
            "rule": edge.rule,
            "reason": edge.reason,
            "group": edge.group,
            "shared_with": list(edge.shared_with),
        }
        for edge in operation.edges
    ]
    names = ("path", "node", "function", "parameters", "macs", "batch_norm", "reason", "format", "engine")
    return {name: getattr(operation, name) for name in names} | {"edges": edges}


# --- totals --------------------------------------------------------------------------------------------------------


def macs_by_format(operations: Iterable[Operation]) -> Counter[str] | None:
    """Count multiply-accumulates by the formats of their factors; None if none is known."""
    found: Counter[str] = Counter()
    for operation in operations:
        found[operation.format] += operation.macs or 0
    return +found or None


def bits_named(counts: Mapping[int, int]) -> dict[str, int]:
    return {"float" if bits == FLOAT_BITS else str(bits): count for bits, count in sorted(counts.items())}


def _shares(counts: Mapping[str, int], unit: str = "") -> str:
    whole = sum(counts.values())
    return ", ".join(f"{100 * count / whole:.1f} % {name}{unit if name.isdecimal() else ''}" for name, count in counts.items())


def totals(plan: Plan, size: SizeReport | None) -> Iterator[str]:
    edges = [edge for operation in plan.operations for edge in operation.edges]
    quantized = sum(edge.spec is not None for edge in edges)
    yield f"{quantized} of {len(edges)} edges quantized"
    if plan.parameters:
        yield f"parameters: {plan.parameters:,}, {_shares(bits_named(plan.parameters_by_bits), ' bits')}"
    if (macs := macs_by_format(plan.operations)) is not None:
        unknown = sum(operation.macs is None for operation in plan.operations if operation.edges)
        missing = f"; not known for {unknown} operations" if unknown else ""
        yield f"multiply-accumulates (MACs): {macs.total():,}, {_shares(dict(macs.most_common()))}{missing}"
    elif plan.operations:
        yield "multiply-accumulates (MACs): not known without example_inputs"
    if size is not None:
        yield f"size: {size}"


def rules_of(plan: Plan) -> Iterator[str]:
    edges = [edge for operation in plan.operations for edge in operation.edges]
    rules = {edge.rule for edge in edges if edge.rule.startswith("rule")}
    yield from sorted(rules, key=lambda rule: int(rule.split()[1].rstrip(":")))


def captures_of(plan: Plan) -> Iterator[str]:
    for note in plan.captures:
        if note.reason:
            yield f"{note.path or 'the model'}: {note.rung}, {note.reason} ({note.place})"
