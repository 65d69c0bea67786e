"""What may be assumed of a node's operation: the table of traits, asked for a node."""

import operator
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from pege_fx.modules.calls import beside_forward
from pege_fx.numerics.recompute import original_of
from pege_fx.passes.graph.arguments import attribute_name
from pege_fx.passes.op_rules import Call
from pege_fx.passes.op_traits import ATTRIBUTES, TRAITS, UNKNOWN, OpTraits, traits_of_target

_NO_CALL = TRAITS[getattr]


def traits_of(root: nn.Module, node: Node) -> OpTraits:
    """Return what may be assumed of a node's operation; ``UNKNOWN`` where the table has no entry.

    A module is what its class says, exactly: a subclass, hooks or a ``forward`` of its own may do anything.
    """
    if node.op != "call_module":
        return traits_of_call(node)
    module = operator.attrgetter(str(node.target))(root)
    return UNKNOWN if beside_forward(module) else traits_of_target(type(module))


def traits_of_call(node: Node) -> OpTraits:
    """Return the same where modules are no question: ``UNKNOWN`` for each of them."""
    if node.op in ("placeholder", "get_attr", "output"):
        return _NO_CALL
    if (name := attribute_name(node)) is not None:
        return ATTRIBUTES.get(name, _NO_CALL)
    target: Any = node.target
    return UNKNOWN if node.op == "call_module" else traits_of_target(original_of(target))


def may_write(root: nn.Module, node: Node) -> bool:
    """Tell whether a function or method may change what it is given: by the table, or as it did on the example inputs."""
    if node.op not in ("call_function", "call_method") or not traits_of(root, node).writes:
        return False
    return bool(node.meta.get("writes", True))


def is_transpose(node: Any) -> bool:
    """Tell whether a node exchanges two dimensions of a tensor."""
    return isinstance(node, Node) and traits_of_call(node).transposes


def reads_size(node: Node) -> bool:
    """Tell whether a node asks a tensor for its shape, type or place, and not for what it holds."""
    return node.op in ("call_function", "call_method") and not traits_of_call(node).reads_data


def call_of(root: nn.Module, node: Node, proved: Collection[Node] = ()) -> Call:
    """Return the arguments of a node's call for a rule of the table; ``proved``: nodes whose values are non-negative."""

    def is_non_negative(value: Any) -> bool:
        return value in proved if isinstance(value, Node) else isinstance(value, (int, float)) and value >= 0

    def rank(value: Any) -> int | None:
        if not isinstance(value, Node):
            return None
        held = operator.attrgetter(str(value.target))(root) if value.op == "get_attr" else None
        return held.ndim if isinstance(held, Tensor) else value.meta.get("rank")

    settings = vars(operator.attrgetter(str(node.target))(root)) if node.op == "call_module" else {}
    return Call(
        positional=node.args,
        named={**settings, **node.kwargs},
        all_inputs=all(source in proved for source in node.all_input_nodes),
        is_non_negative=is_non_negative,
        is_size=_is_size,
        rank=rank,
    )


def _is_size(value: Any) -> bool:
    """Whether an argument is the size of a tensor, or a part of a shape."""
    if not isinstance(value, Node):
        return False
    source = value.args[0] if value.target is operator.getitem else value
    return isinstance(source, Node) and reads_size(source) and traits_of_call(source).non_negative is True
