"""What a node's value is: a tensor or a number, and whose memory it lies in."""

import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from pege_fx.modules.mode import TRAINING_MODE
from pege_fx.passes.graph import (
    attribute,
    attribute_of,
    changes_its_input,
    first_argument,
    is_unknown_code,
    reads_size,
    tensor_of,
    traits_of,
)
from pege_fx.passes.op_traits import TRAITS, traits_of_target


def _makes_anew(root: nn.Module, node: Node) -> bool:
    return traits_of(root, node).view is False and not changes_its_input(root, node) and "shares" not in node.meta


def makers(root: nn.Module, value: Any) -> Iterator[tuple[Node, bool]]:
    """Walk from a tensor to where its memory comes from; the flag says whether a node makes it anew."""
    while isinstance(value, Node):
        anew = _makes_anew(root, value)
        yield value, anew
        if anew or not (value.op == "call_module" or changes_its_input(root, value) or _may_view(root, value)):
            return
        value = first_argument(value)


def _may_view(root: nn.Module, node: Node) -> bool:
    """Whether a node is known to return its first input or a part of it, and to change nothing."""
    traits = traits_of(root, node)
    return traits.view is not False and not traits.writes


def is_seen_elsewhere(root: nn.Module, node: Node) -> bool:
    """Tell whether anything but a node that works in place may see, by another name, what it does to its first input.

    What is not known to make its result anew may return what it was given, as dropout does in evaluation.
    """
    walked: list[Node] = []
    value = first_argument(node)
    while isinstance(value, Node):
        walked.append(value)
        if _is_fresh(root, value):
            readers = {reader for source in walked for reader in source.users} - {node, *walked}
            return not all(_is_fresh(root, reader) for reader in readers)
        given = [source for source in value.all_input_nodes if source.target != TRAINING_MODE]
        value = given[0] if len(given) == 1 else None
    return True


def _is_fresh(root: nn.Module, node: Node) -> bool:
    """Whether a node's result is memory of its own; code that the graph does not look into may return what it was given."""
    return reads_size(node) or (_makes_anew(root, node) and not is_unknown_code(root, node))


# --- numbers -----------------------------------------------------------------------------------------------------

_TO_NUMBERS: set[Any] = {"item", "tolist", int, float, bool, round, torch.is_tensor}
_KEEPING: set[Any] = {abs, max, min, sum, tuple, list, *filter(callable, vars(operator).values())}


def tensors_of(gm: GraphModule) -> set[Node]:
    """Return the nodes whose value is a tensor: by the example inputs, else by what no size or number is made of.

    Without example inputs whatever may be a tensor counts as one.
    """
    recorded = any("dtype" in node.meta for node in gm.graph.nodes)
    numbers: set[Node] = set()
    for node in gm.graph.nodes:
        if "dtype" not in node.meta and _is_number(gm, node, numbers):
            numbers.add(node)
    joined = (node for node in gm.graph.nodes if node not in numbers)
    return {node for node in joined if "dtype" in node.meta or not (recorded and "op" in node.meta)}


def _is_number(gm: GraphModule, node: Node, numbers: set[Node]) -> bool:
    if node.op == "get_attr":
        return tensor_of(gm, node) is None and not isinstance(attribute(gm, node), Tensor)
    if reads_size(node) or node.target in _TO_NUMBERS or getattr(node.target, "__module__", None) == math.__name__:
        return True
    return node.target in _KEEPING and all(source in numbers for source in node.all_input_nodes)


def constants_of(gm: GraphModule) -> set[Node]:
    """Return the nodes whose value no input decides and nobody changes: parameters, and what torch computes of them alone."""
    found: set[Node] = set()
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            known = tensor_of(gm, node) is not None
        elif node.op == "call_module":
            known = type(attribute_of(gm, node)).__module__.startswith("torch.nn.") and not draws(attribute_of(gm, node))
        else:
            known = node.op in ("call_function", "call_method") and not (
                is_unknown_code(gm, node) or traits_of(gm, node).random
            )
        changed = any(changes_its_input(gm, part) for part in (node, *node.users))
        if known and not changed and all(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def draws(module: nn.Module) -> bool:
    """Tell whether any part of a module is known to draw random numbers in training."""
    return any(traits_of_target(type(part)).random and type(part) in TRAITS for part in module.modules())


def computed(gm: GraphModule, node: Node) -> Tensor:
    """Run what a constant is computed by."""
    needed: set[Node] = set()
    waiting = [node]
    while waiting:
        needed.add(part := waiting.pop())
        waiting += part.all_input_nodes
    interpreter = Interpreter(gm)
    for part in (part for part in gm.graph.nodes if part in needed):
        interpreter.env[part] = interpreter.run_node(part)
    value: Tensor = interpreter.env[node]
    return value
