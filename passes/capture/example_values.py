"""Values of the example beside the graph: what a node is there, and what only data decide."""

import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from pege_fx.modules.batch_norm import NORM_THEN
from pege_fx.passes.graph import (
    arguments,
    attribute_name,
)

NORM_THEN_TYPES = tuple(NORM_THEN.values())
_SELECTING: set[Any] = {
    "nonzero", "masked_select", "unique", "unique_consecutive", "argwhere", "tolist", torch.nonzero, torch.masked_select,
    torch.unique, torch.unique_consecutive, torch.argwhere, torch.bincount, "bincount",
}  # fmt: skip


_SIZELESS: set[Any] = {
    "dtype", "device", "layout", "ndim", "requires_grad", "is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_nested",
    "dim", "ndimension", "is_floating_point", "is_complex", "element_size", "itemsize", "get_device",
    torch.is_floating_point, torch.is_complex,
}  # fmt: skip


def depends_on_data(node: Node, sources: list[Any]) -> bool:
    """Whether the size of a node's result depends on what its inputs hold: a selection."""
    if node.target in (torch.where, "where"):
        return len(sources) == 1
    if node.target is operator.getitem:
        return any(isinstance(source, Tensor) and source.dtype in (torch.bool, torch.uint8) for source in sources[1:])
    if node.target in (torch.repeat_interleave, "repeat_interleave"):
        args, kwargs = arguments(node)
        repeats = kwargs.get("repeats", args[1] if len(args) > 1 else args[0])
        return not isinstance(repeats, int) and kwargs.get("output_size") is None
    return node.target in _SELECTING


def is_sized_anyway(node: Node) -> bool:
    """Whether a node's result is the same whatever the sizes of its inputs are: a type, a place, a shape written out."""
    if (attribute_name(node) or node.target) in _SIZELESS:
        return True
    sizes, _ = arguments(node)
    flat = sizes[1] if len(sizes) == 2 and isinstance(sizes[1], (tuple, list)) else sizes[1:]
    return node.target in ("reshape", "view") and bool(flat) and all(isinstance(size, int) and size >= 0 for size in flat)


def run_node(root: nn.Module, node: Node, args: Any, kwargs: Any) -> Any:
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    value: Any = operator.attrgetter(str(node.target))(root)
    if node.op == "get_attr":
        return value.clone() if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) else value  # may be changed
    modes = [(module, module.training) for module in value.modules()]
    try:
        for module, _ in modes:
            module.__dict__["training"] = False  # example values must not move running statistics
        call: Any = value.normalize if isinstance(value, NORM_THEN_TYPES) else value
        return call(*args, **kwargs)
    finally:
        for module, training in modes:
            module.__dict__["training"] = training
