"""A node as the Python that it was made of, and what a node is computed from."""

import operator
from typing import Any

from torch.fx import Node

from pege_fx.passes.graph.arguments import arguments

SIGNS: dict[Any, str] = {
    operator.eq: "==", operator.ne: "!=", operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=",
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.floordiv: "//", operator.truediv: "/", operator.mod: "%",
}  # fmt: skip


def shown(value: Any) -> str:
    """Return a value of the graph as Python would write it, as far as it is made of sizes: ``x.shape[0] > 4``."""
    if not isinstance(value, Node):
        return repr(value)
    if value.op not in ("call_function", "call_method"):
        return str(value.target).lstrip("*") if value.op == "placeholder" else value.name
    args, kwargs = arguments(value)
    if value.target is getattr:
        return f"{shown(args[0])}.{args[1]}"
    if value.target is operator.getitem:
        return f"{shown(args[0])}[{shown(args[1])}]"
    if value.target in SIGNS:
        return f"{shown(args[0])} {SIGNS[value.target]} {shown(args[1])}"
    if value.op == "call_method" and value.target in ("size", "dim", "numel", "is_floating_point", "is_complex") and not kwargs:
        return f"{shown(args[0])}.{value.target}({', '.join(map(shown, args[1:]))})"
    return value.name


def ancestors(node: Node) -> set[Node]:
    """Return a node and all that it is computed from."""
    found: set[Node] = set()
    waiting = [node]
    while waiting:
        if (current := waiting.pop()) not in found:
            found.add(current)
            waiting += current.all_input_nodes
    return found
