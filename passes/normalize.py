"""One form for every operation: modules with weights become their functions, with the weight as an edge."""

import itertools
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from pege_fx.decompositions.recurrent import recurrent
from pege_fx.modules.calls import has_hooks
from pege_fx.passes.graph import (
    arguments,
    become,
    call_function,
    calls,
    get_attr,
    join,
    operator_of,
    owner,
    owner_class,
    parameters_of,
    remove_dead_nodes,
    set_arguments,
    tensor_of,
)
from pege_fx.passes.operators import MODULES, Operator

_PAD_MODES = {"reflect", "replicate", "circular"}


def normalize(gm: GraphModule) -> None:
    """Write every convolution, linear and embedding as a function of (input, weight, bias), its weight a get_attr node.

    The node keeps its name. What stays a module says why in ``meta["not_normalized"]``. Tied weights are read once.
    """
    readers = _Readers(gm)
    for node, module in calls(gm, nn.Module):
        entry = MODULES.get(type(module))
        if entry is None:
            continue
        args, kwargs = arguments(node)
        is_convolution = "padding" in entry.parameters
        takes_one = is_convolution or len(parameters_of(type(module).forward)) == 2  # itself and its input
        if takes_one and (kwargs or len(args) != 1):
            node.meta["not_normalized"] = f"{node.target} is called with more than its input"
        elif any(name in vars(module) for name in ("forward", "_conv_forward")) or has_hooks(module):
            node.meta["not_normalized"] = f"{node.target} has hooks or a forward of its own"
        elif set(module.state_dict(keep_vars=True)) - {"weight", "bias"}:
            node.meta["not_normalized"] = f"{node.target} computes its weight from other parameters"
        else:
            (_convolution if is_convolution else _layer)(readers, node, module, entry)
    readers.merge_get_attrs()
    for node in gm.graph.nodes:
        if owner(node) and (node.target is recurrent or (operator_of(node) and owner_class(node).startswith("Parametrized"))):
            node.meta["path"] = owner(node)  # the whole module is this one operation
        if (described := operator_of(node)) is not None:
            args, kwargs = arguments(node)
            named = dict(zip(described.parameters, args, strict=False)) | kwargs
            leading = list(itertools.takewhile(named.__contains__, described.parameters[:4]))
            set_arguments(node, tuple(map(named.pop, leading)), named)
    remove_dead_nodes(gm)


class _Readers:
    """One get_attr node for each tensor, under its first name, placed before its first reader."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.nodes: dict[int, Node] = {}

    def read(self, module: nn.Module, path: str, name: str, before: Node) -> Node | None:
        value = getattr(module, name)
        if value is None:
            return None
        if id(value) not in self.nodes:
            self.nodes[id(value)] = get_attr(self.gm.graph, join(path, name), before)
        return self.nodes[id(value)]

    def merge_get_attrs(self) -> None:
        """Let functional calls that read the same tensor share its node as well."""
        first: dict[int, Node] = {}
        for node in list(self.gm.graph.nodes):
            if (value := tensor_of(self.gm, node)) is None:
                continue
            if id(value) in first:
                node.replace_all_uses_with(first[id(value)])
                self.gm.graph.erase_node(node)
            else:
                first[id(value)] = node


def _convolution(readers: _Readers, node: Node, module: Any, entry: Operator) -> None:
    """A convolution; padding that its function does not know is an operation before it."""
    path = str(node.target)
    source, padding = arguments(node)[0][0], module.padding
    if module.padding_mode in _PAD_MODES:
        pads = _pads(module)
        source = call_function(readers.gm.graph, F.pad, (source, pads), {"mode": module.padding_mode}, node)
        source.meta.update(node.meta)
        padding = (0,) * len(module.kernel_size)
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}
    settings = {"stride": module.stride, "padding": padding, "dilation": module.dilation}
    if module.transposed:
        settings["output_padding"] = module.output_padding
    kwargs = {k: v for k, v in settings.items() if isinstance(v, str) or set(v) != {defaults[k]}}
    if module.groups != 1:
        kwargs["groups"] = module.groups
    weight = readers.read(module, path, "weight", node)
    become(node, entry.functions[0], (source, weight, readers.read(module, path, "bias", node)), kwargs)


def _pads(module: Any) -> tuple[int, ...]:
    """What ``F.pad`` needs for a convolution's padding: last dimension first, (left, right) each."""
    if module.padding == "valid":
        return (0, 0) * len(module.kernel_size)
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return tuple(side for total in reversed(totals) for side in (total // 2, total - total // 2))
    return tuple(side for pad in reversed(module.padding) for side in (pad, pad))


def _layer(readers: _Readers, node: Node, module: nn.Module, entry: Operator) -> None:
    """Any other layer: what it is called with, its tensors, and its settings that are not the function's defaults."""
    if getattr(module, "max_norm", None) is not None:
        node.meta["not_normalized"] = f"{node.target} changes its weight in place (max_norm)"
        return
    if getattr(module, "sparse", False):
        node.meta["not_normalized"] = f"{node.target} has sparse gradients (sparse=True), which a quantized weight has not"
        return
    function = entry.functions[0]
    args, kwargs = arguments(node)
    _, *taken = parameters_of(type(module).forward)
    named = dict(zip(taken, args, strict=False)) | kwargs
    for name in entry.parameters:
        if name in module._parameters:
            named[name] = readers.read(module, str(node.target), name, node)
    for name, default in parameters_of(function).items():
        if name not in named and getattr(module, name, default) != default:
            named[name] = getattr(module, name)
    become(node, function, (), named)
