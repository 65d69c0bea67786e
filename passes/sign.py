"""Sign analysis: which values are proved to be never negative, so that no code is spent on a sign."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from pege_fx.passes.graph import arguments, attribute_of, call_sites, first_argument, module_of

# Results that are never negative, whatever comes in.
_NON_NEGATIVE_FUNCTIONS: set[Any] = {
    torch.relu, torch.relu_, F.relu, F.relu_, F.relu6, F.sigmoid, torch.sigmoid, F.softmax, torch.softmax, F.hardsigmoid,
    torch.abs, torch.exp, torch.square, torch.norm, F.softplus,
}  # fmt: skip
_NON_NEGATIVE_METHODS = {"relu", "relu_", "sigmoid", "sigmoid_", "softmax", "abs", "abs_", "exp", "square", "norm"}
_NON_NEGATIVE_MODULES = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Softmax, nn.Softmax2d, nn.Hardsigmoid, nn.Softplus)

# Results that are not negative if no tensor that comes in is.
_PRESERVING_FUNCTIONS: set[Any] = {
    F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
    F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d,
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.hardswish, F.silu, F.leaky_relu, F.pixel_shuffle, F.channel_shuffle,
    torch.cat, torch.concat, torch.stack, torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze,
    torch.unsqueeze, torch.chunk, torch.split, torch.mean, torch.sum, torch.amax, torch.amin, torch.add, torch.mul,
    torch.multiply, torch.clone, torch.roll, torch.flip, torch.maximum, torch.minimum, torch.matmul, torch.bmm, torch.dropout,
    operator.add, operator.mul, operator.iadd, operator.imul, operator.getitem, operator.matmul, torch.sqrt,
}  # fmt: skip
_PRESERVING_METHODS = {
    "flatten", "view", "reshape", "permute", "transpose", "contiguous", "squeeze", "unsqueeze", "chunk", "split", "mean",
    "sum", "amax", "amin", "clone", "expand", "expand_as", "repeat", "to", "float", "half", "bfloat16", "detach", "add",
    "add_", "mul", "mul_", "flip", "roll", "type_as", "unflatten", "narrow", "select", "sqrt", "matmul", "t", "movedim",
}  # fmt: skip
_PRESERVING_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle,
    nn.ChannelShuffle, nn.Hardswish, nn.SiLU, nn.LeakyReLU, nn.ZeroPad2d, nn.ReplicationPad2d, nn.ReflectionPad2d,
)  # fmt: skip
_PRODUCTS: set[Any] = {operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_"}
_ARITHMETIC: set[Any] = _PRODUCTS | {operator.add, operator.iadd, torch.add, "add", "add_"}
# Every tensor that comes into these shapes the values; of the others only the first does, the rest are sizes.
_JOINING: set[Any] = _ARITHMETIC | {
    torch.cat, torch.concat, torch.stack, torch.maximum, torch.minimum, torch.matmul, torch.bmm, operator.matmul, "matmul",
}  # fmt: skip


def analyse_signs(gm: GraphModule) -> None:
    """Set ``meta["non_negative"]`` on every node whose value is proved to be >= 0, also through graphs inside this one."""
    proved: set[Node] = set()
    sites = call_sites(gm)
    for node in gm.graph.nodes:
        inner = module_of(gm, node, GraphModule)
        if inner is not None:
            known = _through(node, inner, proved) if sites[inner] == 1 else False
        else:
            known = node.meta.get("non_negative", False) or _is_non_negative(gm, node, proved)
        if known:
            proved.add(node)
            node.meta["non_negative"] = True


def _through(node: Node, inner: GraphModule, proved: set[Node]) -> bool:
    """Analyse a graph that is called once, with what is proved of its arguments."""
    args, kwargs = arguments(node)
    placeholders = inner.graph.find_nodes(op="placeholder")
    given = dict(zip([str(placeholder.target) for placeholder in placeholders], args, strict=False)) | kwargs
    for placeholder in placeholders:
        if given.get(str(placeholder.target)) in proved:
            placeholder.meta["non_negative"] = True
    analyse_signs(inner)
    (result,) = inner.graph.find_nodes(op="output")
    returned = first_argument(result)
    return isinstance(returned, Node) and returned.meta.get("non_negative", False)


def _is_non_negative(gm: GraphModule, node: Node, proved: set[Node]) -> bool:
    if node.op == "call_module":
        module = attribute_of(gm, node)
        if type(module) is nn.Hardtanh:
            return module.min_val >= 0
        preserving = type(module) in _PRESERVING_MODULES and (getattr(module, "divisor_override", None) or 1) > 0
        return type(module) in _NON_NEGATIVE_MODULES or (preserving and _inputs_are(node, proved))
    if node.op == "call_function" or node.op == "call_method":
        return _is_non_negative_function(node, proved)
    return False


def _is_non_negative_function(node: Node, proved: set[Node]) -> bool:
    args, kwargs = arguments(node)
    functions, methods = (_NON_NEGATIVE_FUNCTIONS, _PRESERVING_FUNCTIONS), (_NON_NEGATIVE_METHODS, _PRESERVING_METHODS)
    always, preserving = functions if node.op == "call_function" else methods
    if node.target in always:
        return True
    if node.target in (torch.clamp, F.hardtanh, "clamp", "clamp_", "clamp_min", torch.clamp_min):
        low = kwargs.get("min", kwargs.get("min_val", args[1] if len(args) > 1 else None))
        return isinstance(low, (int, float)) and low >= 0
    if node.target in (operator.pow, torch.pow, "pow"):
        exponent = args[1] if len(args) > 1 else None
        return isinstance(exponent, int) and exponent % 2 == 0
    if node.target in _PRODUCTS and len(args) == 2 and isinstance(args[0], Node) and args[0] is args[1]:
        return True  # a square
    if node.target is F.pad:
        fill = kwargs.get("value", args[3] if len(args) > 3 else None)
        return (fill is None or fill >= 0) and _inputs_are(node, proved)
    if node.target is F.interpolate:
        return "bicubic" not in (*args, kwargs.get("mode")) and _inputs_are(node, proved)
    factors = (kwargs.get("alpha", 1), kwargs.get("divisor_override") or 1)
    if node.target not in preserving or not all(isinstance(f, (int, float)) and f >= 0 for f in factors):
        return False
    return _inputs_are(node, proved)


def _inputs_are(node: Node, proved: set[Node]) -> bool:
    args, kwargs = arguments(node)
    if node.target not in _JOINING:
        return bool(args) and isinstance(args[0], Node) and args[0] in proved
    operands = (*args, kwargs.get("other")) if node.target in _ARITHMETIC else ()  # a number elsewhere is a dimension
    numbers = [value for value in operands if isinstance(value, (int, float))]
    return all(source in proved for source in node.all_input_nodes) and all(number >= 0 for number in numbers)
