"""What nodes do besides their result: writes, statistics, code that the graph does not look into; and which of them may go."""

import operator
import types
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pege_fx.modules.mode import PythonForward, TrainingMode
from pege_fx.passes.graph.arguments import attribute_name, given_to, parameters_of
from pege_fx.passes.graph.attributes import attribute_of, module_of
from pege_fx.passes.graph.operands import is_matrix, operator_of
from pege_fx.passes.graph.traits import may_write, traits_of, traits_of_call


def is_foreign(function: Any) -> bool:
    """Tell whether a function is neither torch's, this package's nor einops'."""
    return (getattr(function, "__module__", None) or "").partition(".")[0] not in ("torch", "pege_fx", "einops")


def is_leaf_function(node: Node) -> bool:
    """Tell whether a node is somebody's own function, kept whole by ``torch.fx.wrap``."""
    return node.op == "call_function" and type(node.target) is types.FunctionType and is_foreign(node.target)


def is_unknown_code(root: nn.Module, node: Node) -> bool:
    """Tell whether a node calls code that the graph does not look into: it may write to its inputs, or have other effects."""
    if node.op == "call_method":
        return not hasattr(Tensor, str(node.target))  # of an object such as a cache
    if node.op != "call_module":
        return is_leaf_function(node)
    own = type(attribute_of(root, node))
    return not own.__module__.startswith(("torch.nn.", "pege_fx.")) or own is PythonForward


def hides_weights(root: nn.Module, node: Node) -> bool:
    """Tell whether a node is such a function, no operator that is known, and gets a weight."""
    if not is_leaf_function(node) or operator_of(node) is not None:
        return False
    read = [source for source in node.all_input_nodes if source.op == "get_attr"]
    return any(is_matrix(operator.attrgetter(str(source.target))(root)) for source in read)


def dropout_of(node: Node) -> tuple[Any, Any] | None:
    """Return a functional dropout's probability and what its ``training`` reads (True, False or a node), else None."""
    if node.op != "call_function" or not traits_of_call(node).identity_in_eval:
        return None
    parameters = parameters_of(node.target) or {"input": None, "p": None, "train": None}  # a builtin shows no signature
    named = parameters | dict(zip(parameters, node.args, strict=False)) | node.kwargs
    return named["p"], named["training" if "training" in named else "train"]


def only_drops(gm: GraphModule, node: Node) -> tuple[nn.Module, ...] | None:
    """Return the modules in whose training mode a node drops something; in evaluation it is the identity. None: it is not.

    An identity drops nothing in any mode, nor does a dropout of nothing.
    """
    module = module_of(gm, node, nn.Module)
    if module is not None:
        if not traits_of(gm, node).identity_in_eval:
            return None
        return (module,) if getattr(module, "p", 0) != 0 else ()
    if (dropout := dropout_of(node)) is None:
        return None
    probability, training = dropout
    if probability == 0 or training is False:
        return ()
    mode = module_of(gm, training, TrainingMode)
    return None if mode is None else (mode,)


_IN_PLACE_OPERATORS = {getattr(operator, name) for name in dir(operator) if name.startswith("i") and name != "inv"} - {
    operator.index,
    operator.indexOf,
    operator.invert,
    operator.is_,
    operator.is_not,
    operator.itemgetter,
}


def size_class(node: Node) -> type | None:
    """The class of a shape or of a number in it, None for what may be anything else."""
    if attribute_name(node) == "shape" or node.target == "size":
        return torch.Size if len(node.args) == 1 or node.target is getattr else int
    if node.target is operator.getitem and isinstance(node.args[0], Node) and size_class(node.args[0]) is torch.Size:
        return torch.Size if isinstance(node.args[1], slice) else int
    return None


def is_assignment(node: Node) -> bool:
    """Tell whether a node is ``x[...] = value``."""
    return node.target in (operator.setitem, "__setitem__")


def changes_its_input(root: nn.Module, node: Node) -> bool:
    """Tell whether a node works in place, so that it matters even if nobody uses its result."""
    if node.op == "call_module":
        return bool(getattr(attribute_of(root, node), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    ends_in_place = name.endswith("_") and not name.endswith("__")
    by_operator = node.target in _IN_PLACE_OPERATORS or is_assignment(node)
    return ends_in_place or by_operator or bool(given_to(node, "inplace")) or node.kwargs.get("out") is not None


_PLACE_OF_MEAN: dict[Any, int] = {F.batch_norm: 1, F.instance_norm: 1, torch.batch_norm: 3, torch.instance_norm: 3}


def keeps_statistics(root: nn.Module, node: Node) -> bool:
    """Tell whether a node is a norm that moves running statistics in training, so that it matters without users."""
    if node.op == "call_module":
        return isinstance(getattr(attribute_of(root, node), "running_mean", None), Tensor)
    place = _PLACE_OF_MEAN.get(node.target, len(node.args))
    return node.kwargs.get("running_mean", dict(enumerate(node.args)).get(place)) is not None


def works_in_place_between(gm: GraphModule, first: Node, last: Node) -> bool:
    """Tell whether any node behind ``first`` and before ``last`` changes its input."""
    node = first.next
    while node is not last:
        if changes_its_input(gm, node):
            return True
        node = node.next
    return False


def remove_dead_nodes(gm: GraphModule, pure: Collection[Node] = ()) -> None:
    """Erase nodes whose result nobody uses, except those that work in place, move statistics, or call code out of sight.

    ``pure``: nodes that move or call such things to no effect but their result; they go as others do.
    """

    for node in reversed(gm.graph.nodes):  # as Graph.eliminate_dead_code, which lints, too
        if node.users or node.op in ("placeholder", "output") or node.is_impure() or changes_its_input(gm, node):
            continue
        if node in pure or not (is_unknown_code(gm, node) or keeps_statistics(gm, node) or may_write(gm, node)):
            gm.graph.erase_node(node)
