"""Where a node comes from: the module, the line, the name."""

from torch.fx import Node

from pege_fx.passes.graph.attributes import parent_and_name
from pege_fx.passes.graph.operands import operator_of


def owner(node: Node) -> str:
    """Return the path of the innermost module whose ``forward`` made the node; "" is the root."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, _ = next(reversed(stack.values()))
    return str(path)


def owner_class(node: Node) -> str:
    """Return the class name of that module, "" for the root."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    _, cls = next(reversed(stack.values()))
    return str(getattr(cls, "__name__", cls)).rpartition(".")[2]


def scope(node: Node) -> str:
    """Return the path of the module that a node's value belongs to: for a module's result, the module around it."""
    path = str(node.target) if node.op == "call_module" else node.meta.get("path")
    return owner(node) if path is None else parent_and_name(path)[0]


def short_name(node: Node) -> str:
    """Return a node's name without the scope it belongs to."""
    prefix = scope(node).replace(".", "_")
    if not prefix:
        return node.name
    lead = f"_{prefix}_" if prefix[0].isdigit() else f"{prefix}_"  # a name begins with no digit
    return node.name.removeprefix(lead)


def copy_origin(source: Node, target: Node) -> None:
    """Make ``target`` come from where ``source`` comes from."""
    for key in ("nn_module_stack", "stack_trace", "path"):
        if key in source.meta:
            target.meta[key] = source.meta[key]


def function_name(node: Node) -> str:
    """Return a short name of what a node does: the table's name, or its function's, method's or module path's."""
    described = operator_of(node)
    if described is not None:
        return described.name
    if node.op == "call_function":
        return str(getattr(node.target, "__name__", node.target))
    return str(node.target)


def where(node: Node) -> str:
    """Return " (file:line)" of the model's code that made a node, or "" if it is not known."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File ")]
    if not lines:
        return ""
    file, line = lines[-1].removeprefix("File ").split(",")[:2]
    return f" ({file.strip(chr(34))}:{line.strip().removeprefix('line ')})"
