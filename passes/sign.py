"""Sign analysis: which values are proved to be never negative, so that no code is spent on a sign."""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pege_fx.passes.graph import arguments, attribute_name, attribute_of, call_sites, first_argument, module_of


def _functions(names: str) -> set[Any]:
    """The functions of these names in torch and in ``torch.nn.functional``."""
    found = (getattr(space, name, None) for name in names.split() for space in (torch, F))
    return {function for function in found if callable(function)}


def _methods(names: str) -> set[str]:
    return {name for name in names.split() if hasattr(Tensor, name)}


def _modules(names: str) -> tuple[type[nn.Module], ...]:
    return tuple(getattr(nn, name) for name in names.split())


# Results that are never negative, whatever comes in. NaN counts as not negative: no code of a grid stands for it.
_ALWAYS = """
    relu relu_ relu6 sigmoid sigmoid_ softmax hardsigmoid abs abs_ absolute absolute_ exp exp_ exp2 exp2_ square square_ norm
    softplus softmin cosh hypot erfc var std rand_like eq ne lt le gt ge isnan isinf logical_not count_nonzero
"""
_NON_NEGATIVE_FUNCTIONS = _functions(_ALWAYS) | {
    operator.abs,
    abs,
    operator.eq,
    operator.ne,
    operator.lt,
    operator.le,
    operator.gt,
    operator.ge,
}
_NON_NEGATIVE_METHODS = _methods(_ALWAYS)
_NON_NEGATIVE_MODULES = _modules("ReLU ReLU6 Sigmoid Softmax Softmax2d Softmin Hardsigmoid Softplus")

# Results that are not negative if no tensor that comes in is.
_PRESERVING = """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    add add_ amax amin avg_pool1d avg_pool2d avg_pool3d bfloat16 bmm broadcast_to cat ceil channel_shuffle chunk clone
    concat contiguous cpu cumsum detach diagonal double dropout dropout1d dropout2d dropout3d elu erf expand
    expand_as expm1 flatten flip float floor gelu half hardshrink hardswish index_select leaky_relu log1p lp_pool1d
    lp_pool2d masked_select matmul max max_pool1d max_pool2d max_pool3d maximum mean median min minimum mish mm movedim mul
    mul_ multiply multiply_ narrow normalize permute pixel_shuffle pixel_unshuffle prod relu_ repeat repeat_interleave
    reshape reshape_as roll round rot90 select selu sign silu softshrink softsign sort split split_with_sizes sqrt sqrt_
    squeeze stack std sum swapaxes t take_along_dim tanh tanh_ tensor_split tile to topk transpose tril triu trunc type_as
    unbind unflatten unsqueeze view view_as
"""
_PRESERVING_FUNCTIONS = (_functions(_PRESERVING) - _NON_NEGATIVE_FUNCTIONS) | {
    operator.add, operator.mul, operator.iadd, operator.imul, operator.getitem, operator.matmul, operator.pos, F.unfold,
}  # fmt: skip
_OF_NUMBERS: set[Any] = {math.sqrt, math.ceil, math.floor, round}
_PRESERVING_METHODS = _methods(_PRESERVING) - _NON_NEGATIVE_METHODS
_PRESERVING_MODULES = _modules("""
    MaxPool1d MaxPool2d MaxPool3d AvgPool1d AvgPool2d AvgPool3d AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d
    AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d LPPool1d LPPool2d Dropout Dropout1d Dropout2d Dropout3d Identity
    Flatten Unflatten PixelShuffle PixelUnshuffle ChannelShuffle Unfold UpsamplingNearest2d UpsamplingBilinear2d
    Hardswish SiLU GELU Mish LeakyReLU PReLU RReLU ELU SELU CELU Tanh Softsign Softshrink Hardshrink
    ZeroPad1d ZeroPad2d ZeroPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d
    ReflectionPad1d ReflectionPad2d ReflectionPad3d CircularPad1d CircularPad2d CircularPad3d
""")
_PRODUCTS: set[Any] = {operator.mul, operator.imul, *_functions("mul multiply"), *_methods("mul mul_ multiply multiply_")}
_ARITHMETIC: set[Any] = _PRODUCTS | {operator.add, operator.iadd, torch.add, "add", "add_"}
# Every tensor that comes into these shapes the values; of the others only the first does, the rest are sizes.
_COMBINING = "cat concat stack maximum minimum max min matmul bmm mm"
_JOINING: set[Any] = _ARITHMETIC | {operator.matmul, *_functions(_COMBINING), *_methods(_COMBINING)}
# By a number that is greater than zero: a quotient keeps the sign, a remainder has that of the number.
_QUOTIENTS: set[Any] = {
    operator.truediv, operator.itruediv, operator.floordiv, operator.ifloordiv,
    *_functions("div divide true_divide floor_divide"), *_methods("div div_ divide divide_ true_divide floor_divide"),
}  # fmt: skip
_REMAINDERS: set[Any] = {operator.mod, operator.imod, torch.remainder, "remainder", "remainder_"}
_CLAMPS: set[Any] = {F.hardtanh, *_functions("clamp clamp_min clip"), *_methods("clamp clamp_ clamp_min clamp_min_ clip clip_")}
_KEEPING_INTERPOLATIONS = ("nearest", "nearest-exact", "linear", "bilinear", "trilinear", "area")  # bicubic overshoots
_COUNTS = ("shape", "size", "numel", "nelement", "dim", "ndim", "ndimension", "element_size", torch.numel, len)


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
        always = type(module) in _NON_NEGATIVE_MODULES or _is_above_zero(module)
        return always or (_preserves(module) and _inputs_are(node, proved))
    if node.op == "call_function" or node.op == "call_method":
        return _is_non_negative_function(node, proved)
    return False


def _is_above_zero(module: nn.Module) -> bool:
    """Whether a module's settings say that it gives nothing below zero."""
    if type(module) is nn.Threshold:
        return _is_at_least_zero(module.threshold) and _is_at_least_zero(module.value)
    return type(module) is nn.Hardtanh and _is_at_least_zero(module.min_val)


def _preserves(module: nn.Module) -> bool:
    """Whether a module gives nothing below zero for inputs that are not."""
    if type(module) is nn.Upsample:
        return module.mode in _KEEPING_INTERPOLATIONS
    if type(module) in (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d):
        return _is_at_least_zero(module.value)
    if type(module) is nn.Threshold:
        return _is_at_least_zero(module.value)
    return type(module) in _PRESERVING_MODULES and (getattr(module, "divisor_override", None) or 1) > 0


def _is_at_least_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and value >= 0


def _is_non_negative_function(node: Node, proved: set[Node]) -> bool:
    args, kwargs = arguments(node)
    functions, methods = (_NON_NEGATIVE_FUNCTIONS, _PRESERVING_FUNCTIONS), (_NON_NEGATIVE_METHODS, _PRESERVING_METHODS)
    always, preserving = functions if node.op == "call_function" else methods
    if node.target in always or (attribute_name(node) or node.target) in _COUNTS:
        return True
    for targets, rule in _RULES:
        if node.target in targets:
            return rule(_Call(node, proved))
    if node.target in _PRODUCTS and len(args) == 2 and isinstance(args[0], Node) and args[0] is args[1]:
        return True  # a square
    factors = (kwargs.get("alpha", 1), kwargs.get("divisor_override") or 1)
    return (
        (node.target in preserving or node.target in _OF_NUMBERS)
        and all(map(_is_at_least_zero, factors))
        and _inputs_are(node, proved)
    )


# --- operations whose arguments decide------------------------------------------------------------------------------


class _Call:
    """The arguments of a call, with what is proved of them."""

    def __init__(self, node: Node, proved: set[Node]) -> None:
        self.positional, self.named = arguments(node)
        self.proved = proved

    def given(self, position: int, *names: str, default: Any = None) -> Any:
        """Return the argument at a position, or by one of its names."""
        found = next((self.named[name] for name in names if name in self.named), default)
        return self.positional[position] if len(self.positional) > position else found

    def is_non_negative(self, value: Any) -> bool:
        """Tell whether a number is >= 0, or a node's value is proved to be."""
        return value in self.proved if isinstance(value, Node) else _is_at_least_zero(value)

    @property
    def has_non_negative_input(self) -> bool:
        """Whether the first argument is proved."""
        return bool(self.positional) and self.is_non_negative(self.positional[0])


def _clamps(call: _Call) -> bool:
    """A lower bound that is not negative, or an input that is not; an upper bound below zero wins over both."""
    low, high = call.given(1, "min", "min_val"), call.given(2, "max", "max_val")
    return (call.is_non_negative(low) or call.has_non_negative_input) and (high is None or call.is_non_negative(high))


def _clamps_above(call: _Call) -> bool:
    return call.has_non_negative_input and call.is_non_negative(call.given(1, "max"))


def _raises(call: _Call) -> bool:
    exponent = call.positional[1] if len(call.positional) > 1 else None
    if not isinstance(exponent, (int, float)):
        return False
    return exponent % 2 == 0 or (exponent > 0 and call.has_non_negative_input)


def _divides(call: _Call) -> bool:
    """By a number above zero or a size; a tensor may hold -0, and what is divided by it is -inf."""
    divisor = call.given(1, "other")
    above = _is_count(divisor) if isinstance(divisor, Node) else isinstance(divisor, (int, float)) and divisor > 0
    return call.has_non_negative_input and above


def _is_count(node: Node) -> bool:
    """Whether a number is a size, or a part of a shape."""
    source = first_argument(node) if node.target is operator.getitem else node
    return isinstance(source, Node) and (attribute_name(source) or source.target) in _COUNTS


def _leaves_a_remainder(call: _Call) -> bool:
    divisor = call.given(1, "other")
    return isinstance(divisor, (int, float)) and divisor > 0


def _chooses(call: _Call) -> bool:
    """``torch.where(condition, input, other)``."""
    return call.is_non_negative(call.given(1, "input")) and call.is_non_negative(call.given(2, "other"))


def _chooses_by_method(call: _Call) -> bool:
    """``input.where(condition, other)``."""
    return call.has_non_negative_input and call.is_non_negative(call.given(2, "other"))


def _fills(call: _Call) -> bool:
    return call.has_non_negative_input and call.is_non_negative(call.given(2, "value"))


def _pads(call: _Call) -> bool:
    fill = call.given(3, "value")
    return call.has_non_negative_input and (fill is None or call.is_non_negative(fill))


def _resizes(call: _Call) -> bool:
    return call.has_non_negative_input and call.given(3, "mode", default="nearest") in _KEEPING_INTERPOLATIONS


def _samples(call: _Call) -> bool:
    return call.has_non_negative_input and call.given(2, "mode", default="bilinear") in ("bilinear", "nearest")


_RULES: list[tuple[set[Any], Callable[[_Call], bool]]] = [
    (_CLAMPS, _clamps),
    ({torch.clamp_max, "clamp_max", "clamp_max_"}, _clamps_above),
    ({operator.pow, torch.pow, "pow", "pow_"}, _raises),
    (_QUOTIENTS, _divides),
    (_REMAINDERS, _leaves_a_remainder),
    ({torch.where}, _chooses),
    ({"where"}, _chooses_by_method),
    ({torch.masked_fill, "masked_fill", "masked_fill_"}, _fills),
    ({F.pad}, _pads),
    ({F.interpolate, F.upsample}, _resizes),
    ({F.grid_sample}, _samples),
]


def _inputs_are(node: Node, proved: set[Node]) -> bool:
    args, kwargs = arguments(node)
    if node.target not in _JOINING:
        return bool(args) and isinstance(args[0], Node) and args[0] in proved
    operands = (*args, kwargs.get("other")) if node.target in _ARITHMETIC else ()  # a number elsewhere is a dimension
    numbers = [value for value in operands if isinstance(value, (int, float))]
    return all(source in proved for source in node.all_input_nodes) and all(number >= 0 for number in numbers)
