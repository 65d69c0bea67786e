"""What is a BatchNorm in a graph, what stands beside it, and whether that can take it over."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pege_fx.modules.batch_norm import FOLDED, BatchNorm, FunctionalBatchNorm
from pege_fx.modules.calls import has_hooks
from pege_fx.modules.mode import TrainingMode
from pege_fx.numerics.spec import Channels
from pege_fx.passes.graph import (
    arguments,
    attribute,
    channels_of,
    first_argument,
    function_name,
    input_channels_of,
    join,
    module_of,
    only_drops,
    operand,
    operator_of,
    owner,
    pads,
    rank_of,
    tensor_of,
    works_in_place_between,
)

TENSORS = ("running_mean", "running_var", "weight", "bias")
_RANKS = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}
_FUNCTIONS: dict[Any, tuple[str, ...]] = {
    F.batch_norm: ("input", *TENSORS, "training", "momentum", "eps"),
    torch.batch_norm: ("input", *TENSORS[2:], *TENSORS[:2], "training", "momentum", "eps"),
}


@dataclass(frozen=True)
class Norm:
    """A BatchNorm: its node, its name in a verdict, its module (one made for it if it is a function), and its arguments."""

    node: Node
    name: str
    bn: Any
    arguments: dict[str, Any]
    reason: str = ""

    @property
    def is_function(self) -> bool:
        return self.node.op == "call_function"


@dataclass(frozen=True)
class Pair:
    """A BatchNorm and the node beside it, in front of it or, with ``leads``, behind it, and what lies between."""

    norm: Norm
    layer: Any
    between: tuple[Node, ...]
    drops: tuple[nn.Module, ...]
    leads: bool


def norms_of(gm: GraphModule) -> list[Node]:
    """Return the nodes that call a BatchNorm, by its module or by its function, and are not folded."""
    return [node for node in gm.graph.nodes if _is_norm(gm, node)]


def _is_norm(gm: GraphModule, node: Node) -> bool:
    if node.op == "call_function":
        return node.target in _FUNCTIONS
    bn = module_of(gm, node, BatchNorm)
    return bn is not None and type(bn) not in FOLDED.values()


def norm_of(gm: GraphModule, node: Node) -> Norm:
    """Describe what such a node calls."""
    args, kwargs = arguments(node)
    bn = module_of(gm, node, BatchNorm)
    named = dict(zip(("input",) if bn is not None else _FUNCTIONS[node.target], args, strict=False)) | kwargs
    if bn is None:
        return _functional(gm, node, named)
    reason = "" if type(bn) in FOLDED else f"{type(bn).__name__} may compute something else than BatchNorm"
    return Norm(node, str(node.target), bn, named, reason or ("it has hooks" if has_hooks(bn) else ""))


def _functional(gm: GraphModule, node: Node, named: dict[str, Any]) -> Norm:
    """A call of ``F.batch_norm``: a BatchNorm if the graph says all that a module would."""
    name, training = join(owner(node), "batch_norm"), named.get("training", False)
    momentum, eps = named.get("momentum", 0.1), named.get("eps", 1e-5)
    sources = [named.get(tensor) for tensor in TENSORS]
    tensors = tuple(tensor_of(gm, source) for source in sources)
    computed = [
        tensor
        for tensor, source, value in zip(TENSORS, sources, tensors, strict=True)
        if source is not None and (value is None or len(source.users) > 1)
    ]
    live = module_of(gm, training, TrainingMode)
    if training is True or sources[0] is None:  # torch takes both statistics or neither
        reason = "it keeps no running statistics" if training is not True else "it uses batch statistics in evaluation too"
    elif computed:
        reason = f"its {computed[0]} is computed, or read elsewhere"
    elif (training is not False and live is None) or isinstance(momentum, Node) or isinstance(eps, Node):
        reason = "its training, momentum or eps is computed"
    else:
        made = FunctionalBatchNorm(tensors, momentum, eps, frozen=live is None).train(live is not None and live.training)
        return Norm(node, name, made, named)
    return Norm(node, name, None, named, reason)


def before(gm: GraphModule, norm: Norm) -> Pair:
    """The BatchNorm and what feeds it."""
    return _pair(gm, norm, norm.arguments.get("input"), first_argument, leads=False)


def behind(gm: GraphModule, norm: Norm) -> Pair:
    """The BatchNorm and what reads it; None if that is not one node."""

    def reader(node: Node) -> Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    return _pair(gm, norm, reader(norm.node), reader, leads=True)


def _pair(gm: GraphModule, norm: Norm, node: Any, onward: Callable[[Node], Any], *, leads: bool) -> Pair:
    between: list[Node] = []
    drops: list[nn.Module] = []
    while isinstance(node, Node) and (passed := only_drops(gm, node)) is not None:
        between.append(node)
        drops += passed
        node = onward(node)
    return Pair(norm, node, tuple(between), tuple(drops), leads)


def is_foldable(node: Any) -> bool:
    """Whether a node is a convolution or linear layer."""
    described = operator_of(node) if isinstance(node, Node) else None
    return described is not None and "weight" in described.weights and "bias" in described.parameters


# --- why not -------------------------------------------------------------------------------------------------


def why_not(gm: GraphModule, found: Pair, used: Counter[int], *, merges: bool) -> str:
    """Return why a BatchNorm can not be folded into the layer beside it; "" if it is proved that it can.

    ``used`` counts the nodes that use a module or tensor; ``merges``: the layer's own parameters are to change.
    """
    norm, layer = found.norm, found.layer
    if not is_foldable(layer):
        beside = "what reads it is" if found.leads else f"its input {layer} is"
        return f"{beside} not a convolution or linear layer"
    if norm.reason:
        return norm.reason
    if norm.bn.running_mean is None or norm.bn.running_var is None:
        return "it keeps no running statistics"
    if not norm.node.users:
        return "nobody reads its result"
    if used[id(norm.bn)] > 1:
        return f"it is called {used[id(norm.bn)]} times"
    for node in (*found.between, norm.node if found.leads else layer):
        if len(node.users) > 1:
            return f"the output of {node} has {len(node.users)} users"
    for name in TENSORS:
        if (value := getattr(norm.bn, name)) is not None and used[id(value)] > 1:
            return f"its {name} is read elsewhere"
    if merges and found.drops:
        return f"{found.between[0]} lies between, and drops in training"
    return (
        _why_not_by_parameters(gm, layer, used if merges else Counter())
        or (_why_not_leading(gm, found) if found.leads else "")
        or _why_not_by_shape(gm, found)
    )


def _why_not_leading(gm: GraphModule, found: Pair) -> str:
    """Every output of the layer has to read as many inputs: padding is zero before and behind the BatchNorm."""
    norm, layer, described = found.norm, found.layer, operator_of(found.layer)
    assert described is not None
    if operand(layer, "input") is not (found.between[-1] if found.between else norm.node):
        return f"{layer} does not read it as its input"
    if works_in_place_between(gm, norm.node, layer):
        return f"something between {norm.name} and {layer} works in place"
    if described.transposed:
        return f"{layer} is transposed, and reads fewer inputs at its borders"
    return f"{layer} pads its input with zeros" if pads(layer, the_tensor(gm, operand(layer, "weight"))) else ""


def _why_not_by_parameters(gm: GraphModule, layer: Node, used: Counter[int]) -> str:
    for name in ("weight", "bias"):
        source = operand(layer, name)
        if source is None:
            continue
        value = tensor_of(gm, source)
        if value is None or not isinstance(attribute(gm, source), nn.Parameter):
            return f"the {name} of {layer} is computed, not a parameter"
        if (readers := max(len(source.users), used[id(value)])) > 1:
            return f"{source.target} is read at {readers} places"
    return ""


def _why_not_by_shape(gm: GraphModule, found: Pair) -> str:
    norm, layer = found.norm, found.layer
    count, here = channels_beside(gm, found).count, norm.bn.running_mean.numel()
    if count != here:
        return f"it has {here} channels where {layer} has {count}"
    weight = the_tensor(gm, operand(layer, "weight"))
    if weight.dtype is not norm.bn.running_mean.dtype:
        return f"it computes in {norm.bn.running_mean.dtype} where {layer} does in {weight.dtype}"
    return _why_not_by_rank(function_name(layer), norm.node, norm.bn)


def _why_not_by_rank(layer_name: str, node: Node, bn: nn.Module) -> str:
    """BatchNorm works on dimension 1: beside a linear layer that is the features' only where the input has two."""
    dims = int(layer_name[-2]) if layer_name.startswith("conv") else 0
    if dims and type(bn) in _RANKS:
        return ""  # it accepts batched input alone
    needed = 2 + dims
    rank = rank_of(node)
    if rank is None:
        return "the number of dimensions of its input is not known: give example_inputs"
    return "" if rank == needed else f"its input has {rank} dimensions, the channels are not in dimension 1"


def channels_beside(gm: GraphModule, found: Pair) -> Channels:
    """Where the layer's weight keeps the channels that the BatchNorm normalises."""
    weight = the_tensor(gm, operand(found.layer, "weight"))
    if found.leads:
        return input_channels_of(found.layer, weight)
    channels = channels_of(found.layer, "weight", weight)
    assert channels is not None
    return channels


def the_tensor(gm: GraphModule, node: Any) -> Tensor:
    """The tensor that a node is known to read."""
    value = tensor_of(gm, node)
    assert value is not None
    return value
