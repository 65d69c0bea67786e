"""Arguments of nodes: reading and writing them, with exact types."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch.fx import Node
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.node import map_arg


def first_argument(node: Node) -> Any:
    """Return the first positional argument of any node, or None."""
    return node.args[0] if node.args else None


def arguments(node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a node's positional and keyword arguments."""
    return node.args, dict(node.kwargs)


def set_arguments(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Give a node new arguments."""
    node.args, node.kwargs = args, kwargs


def map_nodes(value: Any, function: Callable[[Node], Any]) -> Any:
    """Return a node's arguments, or a part of them, with every node replaced by what the function returns for it."""
    return map_arg(value, function)


def plain(value: Any) -> Any:
    """Return arguments with ordinary lists and dicts in the place of a node's immutable ones: a function may change them."""
    if isinstance(value, immutable_list):
        return [plain(item) for item in value]
    if isinstance(value, immutable_dict):
        return {key: plain(item) for key, item in value.items()}
    return tuple(map(plain, value)) if type(value) is tuple else value


def attribute_name(node: Node) -> str | None:
    """Return the name of the attribute that a node reads of a value (``x.shape``), or None."""
    return str(node.args[1]) if node.target is getattr else None


@functools.cache
def parameters_of(function: Any) -> dict[str, Any]:
    """Return the parameters of a function in their order, with their defaults; none of one without a signature."""
    try:
        return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    except (TypeError, ValueError):
        return {}


def given_to(node: Node, name: str) -> Any:
    """Return what a function's call passes for a parameter, by position or by keyword; None if nothing."""
    names = list(parameters_of(node.target)) if node.op == "call_function" else []
    position = names.index(name) if name in names else len(node.args)
    return node.args[position] if position < len(node.args) else node.kwargs.get(name)
