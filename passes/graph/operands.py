"""Operands of operations: which argument is an input or a weight, where its channels lie, what stands between."""

import dataclasses
import functools
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pege_fx.decompositions.recurrent import recurrent
from pege_fx.modules.batch_norm import BiasFold, BiasFoldBehind, Fold, WeightFold
from pege_fx.numerics.spec import Channels
from pege_fx.passes.graph.arguments import attribute_name, first_argument
from pege_fx.passes.graph.attributes import calls, module_of, tensor_of
from pege_fx.passes.graph.traits import is_transpose
from pege_fx.passes.operators import FUNCTIONS, METHODS, Operator, recurrent_layer


def joining_of(node: Node) -> Operator | None:
    """Return the entry of a node that joins tensors, element by element or side by side; None for any other.

    The operands of a list are its items, as ``"tensors[0]"``; a list that another node makes has none.
    """
    found = _entry(node)
    if found is None or not found.on_request or "out" in node.kwargs:
        return None
    if found.inputs != ("tensors",):
        return found
    tensors = node.args[0] if node.args else node.kwargs.get("tensors")
    count = len(tensors) if isinstance(tensors, (list, tuple)) else 0
    return dataclasses.replace(found, inputs=tuple(f"tensors[{i}]" for i in range(count)))


def operator_of(node: Node) -> Operator | None:
    """Return the table's entry for a node, or None if none of its edges can be quantized."""
    if node.target is recurrent:
        return recurrent_layer(str(node.kwargs["kind"]), node.kwargs)
    found = _entry(node)
    if found is None or found.on_request:
        return None
    equation = first_argument(node) if found.parameters[0] == "equation" else None
    of_one_tensor = isinstance(equation, str) and "," not in equation  # a transpose, a diagonal, a sum; it may be a view
    return None if of_one_tensor else found


def _entry(node: Node) -> Operator | None:
    table: Mapping[Any, Operator] = METHODS if node.op == "call_method" else FUNCTIONS
    return table.get(node.target) if node.op in ("call_function", "call_method") else None


def entry_of(node: Node) -> Operator:
    """Return the table's entry of an operator's node, also of one that joins."""
    found = operator_of(node) or joining_of(node)
    assert found is not None, f"{node} is no operator"
    return found


def operand(node: Node, name: str) -> Any:
    """Return the argument that an operator's node passes for a parameter, or None if it passes none."""
    name, index = _item(name)
    position = _position(entry_of(node), name)
    value: Any = node.args[position] if position < len(node.args) else node.kwargs.get(name)
    return value if index is None else value[index]


@functools.cache
def _item(name: str) -> tuple[str, int | None]:
    """Split ``"tensors[1]"`` into the parameter and the place in its list."""
    name, bracket, index = name.rstrip("]").partition("[")
    return name, int(index) if bracket else None


def _position(described: Operator, name: str) -> int:
    """Where a parameter stands among the positional ones; keywords stand behind all."""
    return described.parameters.index(name) if name in described.parameters else sys.maxsize


def set_operand(node: Node, name: str, value: Node | None) -> None:
    """Pass ``value`` for a parameter of an operator's node."""
    name, index = _item(name)
    given: Any = value
    if index is not None:
        items = operand(node, name)
        given = [*items[:index], value, *items[index + 1 :]]
    position = _position(entry_of(node), name)
    if position < len(node.args):
        node.update_arg(position, given)
    else:
        node.update_kwarg(name, given)


def channels_of(node: Node, name: str, weight: Tensor) -> Channels | None:
    """Return where an operand of an operator keeps its output channels; None: no axis of it is one.

    Of a weight that is transposed on the way, the axis is that of the weight. Experts' matrices have one channel each.
    """
    described = operator_of(node)
    assert described is not None, f"{node} is no operator"
    if described.weights and name not in described.weights:
        return None  # a parameter in the place of an activation
    groups = (operand(node, "groups") or 1) if "groups" in described.parameters else 1
    if weight.ndim == 2 and _is_turned(operand(node, name)):
        found = described.channels(name, weight.mT, groups)
        return None if found is None else dataclasses.replace(found, axis=1 - found.axis)
    return described.channels(name, weight, groups)


def input_channels_of(node: Node, weight: Tensor) -> Channels:
    """Return where the weight of a convolution (not a transposed one) or of a linear layer keeps its input channels."""
    groups = operand(node, "groups") or 1
    return Channels(weight.shape[1] * groups, axis=1, groups=groups)


def pads(node: Node, weight: Tensor) -> bool:
    """Tell whether a convolution or linear layer adds anything to its input."""
    padding = operand(node, "padding")
    if padding == "same":
        return any(size > 1 for size in weight.shape[2:])
    return padding not in (None, "valid") and any(
        side != 0 for side in (padding if isinstance(padding, (tuple, list)) else (padding,))
    )


def is_matrix(value: Any) -> bool:
    """Tell whether a value is a parameter with two dimensions or more: a weight, and no bias or scale."""
    return isinstance(value, nn.Parameter) and value.ndim > 1


def behind_transposes(node: Any) -> Any:
    """Return what a node is a transpose of, or the node itself."""
    while is_transpose(node):
        node = node.args[0] if node.args else None
    return node


def _is_turned(node: Any) -> bool:
    """Whether transposes of a matrix exchange its dimensions in the end."""
    count = 0
    while is_transpose(node):
        node, count = node.args[0] if node.args else None, count + 1
    return count % 2 == 1


def remove_unread_transposes(node: Node) -> None:
    """Erase a node and the transposes before it, as far as nobody reads them."""
    while is_transpose(node) and not node.users:
        unread, node = node, node.args[0]  # type: ignore[assignment]
        node.graph.erase_node(unread)


def _exchanges_rows_and_columns(node: Node, value: Tensor) -> bool:
    """Whether transposes of a parameter exchange its last two dimensions and no others: then it is a weight all the same."""
    if not is_matrix(value) or value.ndim > 3:
        return False
    while is_transpose(node):
        if attribute_name(node) != "mT" and value.ndim == 3:
            dims = [dim % 3 if isinstance(dim, int) else -1 for dim in node.args[1:]]
            if sorted(dims) != [1, 2]:
                return False
        node = node.args[0]  # type: ignore[assignment]
    return True


def transposed_again(node: Node, source: Node, placed: Node, before: Node) -> Node:
    """Return ``placed`` with the transposes that lead from ``source`` to ``node``; of their own, if there are any."""
    if node is source:
        return placed
    inner = transposed_again(node.args[0], source, placed, before)  # type: ignore[arg-type]
    graph = node.graph
    with graph.inserting_before(before):
        return graph.node_copy(node, lambda argument: inner if argument is node.args[0] else argument)


def is_weight(gm: GraphModule, node: Node, name: str, source: Any) -> bool:
    """Tell whether an operand reads a weight: what the operator calls so, or a parameter that is a factor of a product."""
    described = entry_of(node)
    value = tensor_of(gm, behind_transposes(source))
    if value is None or described.on_request:
        return False
    if is_transpose(source) and not _exchanges_rows_and_columns(source, value):
        return False
    return name in described.weights or is_matrix(value)


def rank_of(node: Any) -> int | None:
    """Return the number of dimensions that is known of a node's value, or None."""
    return node.meta.get("rank") if isinstance(node, Node) else None


def unfolded(gm: GraphModule, node: Any) -> Any:
    """Return what a weight or bias reads before its BatchNorm is folded in."""
    fold = module_of(gm, node, nn.Module)
    return first_argument(node) if isinstance(fold, (WeightFold, BiasFold)) else node


def result_of(gm: GraphModule, node: Node) -> Node:
    """Return the node that has an operation's result: the BatchNorm behind it that is folded into it, or itself."""
    folded = module_of(gm, operand(node, "bias"), BiasFold)
    if folded is None or isinstance(folded, BiasFoldBehind):
        return node
    while module_of(gm, node, nn.Module) is not folded.fold.bn:
        (node,) = node.users
    return node


def folded_weights(gm: GraphModule) -> dict[Node, Fold]:
    """Return the nodes of weights (not fake-quantized) that are folded in evaluation."""
    return {node: module.fold for node, module in calls(gm, WeightFold)}
