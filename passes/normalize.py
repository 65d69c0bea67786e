"""One form for every operation: modules with weights become their functions, with the weight as an edge."""

import itertools
from collections.abc import Callable
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
    remove_dead_nodes,
    set_arguments,
    tensor_of,
)

_PAD_MODES = {"reflect", "replicate", "circular"}


def normalize(gm: GraphModule) -> None:
    """Write every convolution, linear and embedding as a function of (input, weight, bias), its weight a get_attr node.

    The node keeps its name. What stays a module says why in ``meta["not_normalized"]``. Tied weights are read once.
    """
    readers = _Readers(gm)
    for node, module in calls(gm, nn.Module):
        builder = _BUILDERS.get(type(module))
        if builder is None:
            continue
        args, kwargs = arguments(node)
        if not isinstance(module, nn.Bilinear | nn.EmbeddingBag) and (kwargs or len(args) != 1):
            node.meta["not_normalized"] = f"{node.target} is called with more than its input"
        elif any(name in vars(module) for name in ("forward", "_conv_forward")) or has_hooks(module):
            node.meta["not_normalized"] = f"{node.target} has hooks or a forward of its own"
        elif set(module.state_dict(keep_vars=True)) - {"weight", "bias"}:
            node.meta["not_normalized"] = f"{node.target} computes its weight from other parameters"
        else:
            builder(readers, node, module)
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


def _convolution(function: Callable[..., Any]) -> Callable[[_Readers, Node, Any], None]:
    def build(readers: _Readers, node: Node, module: Any) -> None:
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
        become(node, function, (source, weight, readers.read(module, path, "bias", node)), kwargs)

    return build


def _pads(module: Any) -> tuple[int, ...]:
    """What ``F.pad`` needs for a convolution's padding: last dimension first, (left, right) each."""
    if module.padding == "valid":
        return (0, 0) * len(module.kernel_size)
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return tuple(side for total in reversed(totals) for side in (total // 2, total - total // 2))
    return tuple(side for pad in reversed(module.padding) for side in (pad, pad))


def _linear(readers: _Readers, node: Node, module: Any) -> None:
    path, source = str(node.target), arguments(node)[0][0]
    weight, bias = (readers.read(module, path, name, node) for name in ("weight", "bias"))
    become(node, F.linear, (source, weight, bias), {})


def _embedding(readers: _Readers, node: Node, module: Any) -> None:
    if module.max_norm is not None:
        node.meta["not_normalized"] = f"{node.target} changes its weight in place (max_norm)"
        return
    if module.sparse:
        node.meta["not_normalized"] = f"{node.target} has sparse gradients (sparse=True), which a quantized weight has not"
        return
    path, source = str(node.target), arguments(node)[0][0]
    kwargs: dict[str, Any] = {"scale_grad_by_freq": module.scale_grad_by_freq}
    kwargs = {k: v for k, v in kwargs.items() if v}
    weight = readers.read(module, path, "weight", node)
    become(node, F.embedding, (source, weight, module.padding_idx), kwargs)


def _embedding_bag(readers: _Readers, node: Node, module: Any) -> None:
    if module.max_norm is not None:
        node.meta["not_normalized"] = f"{node.target} changes its weight in place (max_norm)"
        return
    if module.sparse:
        node.meta["not_normalized"] = f"{node.target} has sparse gradients (sparse=True), which a quantized weight has not"
        return
    args, kwargs = arguments(node)
    given = dict(zip(("input", "offsets", "per_sample_weights"), args, strict=False)) | kwargs
    names = ("mode", "scale_grad_by_freq", "include_last_offset", "padding_idx")
    settings = {name: getattr(module, name) for name in names} | given
    weight = readers.read(module, str(node.target), "weight", node)
    become(node, F.embedding_bag, (settings.pop("input"), weight), settings)


def _bilinear(readers: _Readers, node: Node, module: Any) -> None:
    args, kwargs = arguments(node)
    given = dict(zip(("input1", "input2"), args, strict=False)) | kwargs
    weight, bias = (readers.read(module, str(node.target), name, node) for name in ("weight", "bias"))
    become(node, F.bilinear, (given["input1"], given["input2"], weight, bias), {})


_BUILDERS: dict[type[nn.Module], Callable[[_Readers, Node, Any], None]] = {
    nn.Conv1d: _convolution(F.conv1d),
    nn.Conv2d: _convolution(F.conv2d),
    nn.Conv3d: _convolution(F.conv3d),
    nn.ConvTranspose1d: _convolution(F.conv_transpose1d),
    nn.ConvTranspose2d: _convolution(F.conv_transpose2d),
    nn.ConvTranspose3d: _convolution(F.conv_transpose3d),
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.EmbeddingBag: _embedding_bag,
    nn.Bilinear: _bilinear,
}
