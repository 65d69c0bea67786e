"""BatchNorm folding: every fold is proved safe first, or refused with a reason on the node."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pege_fx.batch_norm import FOLDED, BatchNorm, BiasFold, BiasFoldBehind, Fold, FunctionalBatchNorm, WeightFold
from pege_fx.errors import FoldError
from pege_fx.mode import TrainingMode
from pege_fx.passes.graph import (
    arguments,
    attribute,
    become_call,
    call_module,
    channels_of,
    copy_origin,
    first_argument,
    free_path,
    function_name,
    get_attr,
    has_hooks,
    input_channels_of,
    join,
    module_of,
    only_drops,
    operand,
    operator_of,
    owner,
    pads,
    parent_and_name,
    rank_of,
    replace,
    set_arguments,
    set_operand,
    set_parameter,
    tensor_of,
    uses,
    works_in_place_between,
)
from pege_fx.plan import Plan
from pege_fx.spec import Channels

MODES = ("train", "freeze", "keep")
_RANKS = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}
_TENSORS = ("running_mean", "running_var", "weight", "bias")
_FUNCTIONS: dict[Any, tuple[str, ...]] = {
    F.batch_norm: ("input", *_TENSORS, "training", "momentum", "eps"),
    torch.batch_norm: (
        "input",
        "weight",
        "bias",
        "running_mean",
        "running_var",
        "training",
        "momentum",
        "eps",
        "cudnn_enabled",
    ),
}


@dataclass(frozen=True)
class FoldBatchNorm:
    """Fold every BatchNorm into the layer that feeds it and nothing else: w' = k w, b' = k (b - mean) + beta.

    k = gamma / sqrt(var + eps). ``mode``: "train" keeps batch statistics live in training and folds in evaluation;
    "freeze" merges the running statistics into weight and bias at once; "keep" leaves every BatchNorm alone. Identities and
    dropouts between the two do not count where they do nothing. What no layer feeds, "freeze" merges into the layer behind.

    The verdict is in ``meta["batch_norm"]`` of the layer and of the BatchNorm: "folded bn1", or why not.
    """

    mode: Literal["train", "freeze", "keep"] = "train"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise FoldError(f'batch_norm={self.mode!r}: give "train", "freeze" or "keep".')

    def __call__(self, gm: GraphModule) -> None:
        used = uses(gm.meta.get("family", [gm]))
        for norm in norms_of(gm):
            found = _before(gm, norm)
            reason = 'batch_norm="keep"' if self.mode == "keep" else why_not(gm, found, used, merges=self.mode == "freeze")
            _note(found, reason)
            if reason and self.mode == "freeze":
                found, first = _behind(gm, norm), reason
                reason = why_not(gm, found, used, merges=True)
                _note(found, _both(first, found, reason))
            if reason:
                continue
            if self.mode == "freeze":
                _merge(gm, found)
            else:
                _fold_live(gm, found)


@dataclass(frozen=True)
class FoldLeadingNorms:
    """Fold a BatchNorm that no layer feeds into the float layer that reads it and nothing else, in evaluation.

    w' = w k by input channels, b' = b + w (beta - k mean). A fake-quant on the layer's input stands between the two, and
    scales per output channel can not hold k: so both edges have to be float, and the plan says whether they are.
    """

    mode: Literal["train", "freeze", "keep"] = "train"

    def __call__(self, gm: GraphModule) -> None:
        if self.mode != "train":
            return
        plan: Plan = gm.meta["plan"]
        used = uses(gm.meta.get("family", [gm]))
        formats = {operation.node: operation.format for operation, _, _ in plan.quantized}
        for norm in norms_of(gm):
            found = _behind(gm, norm)
            reason = why_not(gm, found, used, merges=False)
            if not reason and found.layer.name in formats:
                reason = f"{found.layer} is quantized, {formats[found.layer.name]}"
            refused = str(norm.node.meta.get("batch_norm", "")).removeprefix(f"{norm.name} stays: ")
            _note(found, _both(refused, found, reason))
            if not reason:
                _fold_live(gm, found)
        verdicts = {node.name: node.meta.get("batch_norm", "") for node in gm.graph.nodes}
        decided = (dataclasses.replace(op, batch_norm=verdicts[op.node]) for op in plan.operations)
        gm.meta["plan"] = dataclasses.replace(plan, operations=tuple(decided))


# --- what there is -------------------------------------------------------------------------------------------


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


def norms_of(gm: GraphModule) -> Iterator[Norm]:
    """Yield what is a BatchNorm and not folded; nodes may be changed meanwhile."""
    for node in list(gm.graph.nodes):
        bn, (args, kwargs) = module_of(gm, node, BatchNorm), arguments(node)
        if bn is not None and type(bn) not in FOLDED.values():
            reason = "" if type(bn) in FOLDED else f"{type(bn).__name__} may compute something else than BatchNorm"
            reason = reason or ("it has hooks" if has_hooks(bn) else "")
            yield Norm(node, str(node.target), bn, dict(zip(("input",), args, strict=False)) | kwargs, reason)
        elif node.op == "call_function" and node.target in _FUNCTIONS:
            named = dict(zip(_FUNCTIONS[node.target], args, strict=False)) | kwargs
            yield _functional(gm, node, named)


def _functional(gm: GraphModule, node: Node, named: dict[str, Any]) -> Norm:
    """A call of ``F.batch_norm``: a BatchNorm if the graph says all that a module would."""
    name, training = join(owner(node), "batch_norm"), named.get("training", False)
    momentum, eps = named.get("momentum", 0.1), named.get("eps", 1e-5)
    sources = [named.get(tensor) for tensor in _TENSORS]
    tensors = tuple(tensor_of(gm, source) for source in sources)
    computed = [
        tensor
        for tensor, source, value in zip(_TENSORS, sources, tensors, strict=True)
        if source is not None and (value is None or len(source.users) > 1)
    ]
    live = module_of(gm, training, TrainingMode)
    if training is True or sources[0] is None or sources[1] is None:
        reason = "it keeps no running statistics" if training is not True else "it uses batch statistics in evaluation too"
    elif computed:
        reason = f"its {computed[0]} is computed, or read elsewhere"
    elif (training is not False and live is None) or isinstance(momentum, Node) or isinstance(eps, Node):
        reason = "its training, momentum or eps is computed"
    else:
        made = FunctionalBatchNorm(tensors, momentum, eps, frozen=live is None).train(live is not None and live.training)
        return Norm(node, name, made, named)
    return Norm(node, name, None, named, reason)


def _before(gm: GraphModule, norm: Norm) -> Pair:
    """The BatchNorm and what feeds it."""
    return _pair(gm, norm, norm.arguments.get("input"), first_argument, leads=False)


def _behind(gm: GraphModule, norm: Norm) -> Pair:
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


def _note(found: Pair, reason: str) -> None:
    """Write the verdict on the BatchNorm, and on the layer: why one in front of it stays matters least there."""
    norm, layer = found.norm, found.layer
    verdict = f"{norm.name} stays: {reason}" if reason else f"folded {norm.name}"
    norm.node.meta["batch_norm"] = verdict
    said = layer.meta.get("batch_norm", "") if isinstance(layer, Node) else ""
    if isinstance(layer, Node) and not (said and reason and found.leads):
        layer.meta["batch_norm"] = f"{said}; {verdict}" if said.startswith("folded") else verdict


def _is_foldable(node: Any) -> bool:
    """Whether a node is a convolution or linear layer."""
    described = operator_of(node) if isinstance(node, Node) else None
    return described is not None and "weight" in described.weights and "bias" in described.parameters


def _both(reason: str, behind: Pair, reason_behind: str) -> str:
    """The reasons on both sides, where there is a layer behind; "" if it takes the BatchNorm."""
    if not reason_behind:
        return ""
    return f"{reason}; {reason_behind}" if _is_foldable(behind.layer) else reason


# --- why not -------------------------------------------------------------------------------------------------


def why_not(gm: GraphModule, found: Pair, used: Counter[int], *, merges: bool) -> str:
    """Return why a BatchNorm can not be folded into the layer beside it; "" if it is proved that it can.

    ``used`` counts the nodes that use a module or tensor; ``merges``: the layer's own parameters are to change.
    """
    norm, layer = found.norm, found.layer
    if norm.reason and norm.bn is not None:
        return norm.reason
    if not _is_foldable(layer):
        beside = "what reads it is" if found.leads else f"its input {layer} is"
        return f"{beside} not a convolution or linear layer"
    if norm.reason:
        return norm.reason
    if norm.bn.running_mean is None or norm.bn.running_var is None:
        return "it keeps no running statistics"
    if used[id(norm.bn)] > 1:
        return f"it is called {used[id(norm.bn)]} times"
    for node in (*found.between, norm.node if found.leads else layer):
        if len(node.users) > 1:
            return f"the output of {node} has {len(node.users)} users"
    for name in _TENSORS:
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
    return f"{layer} pads its input with zeros" if pads(layer, _tensor(gm, operand(layer, "weight"))) else ""


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
    count, here = _channels(gm, found).count, norm.bn.running_mean.numel()
    if count != here:
        return f"it has {here} channels where {layer} has {count}"
    weight = _tensor(gm, operand(layer, "weight"))
    if weight.dtype is not norm.bn.running_mean.dtype:
        return f"it computes in {norm.bn.running_mean.dtype} where {layer} does in {weight.dtype}"
    return _why_not_by_rank(function_name(layer), norm.node, norm.bn)


def _why_not_by_rank(layer_name: str, node: Node, bn: nn.Module) -> str:
    """BatchNorm works on dimension 1: beside a linear layer that is the features' only where the input has two."""
    if type(bn) in _RANKS and layer_name != "linear":
        return ""  # it accepts batched input alone
    needed = 2 if layer_name == "linear" else 2 + int(layer_name[-2])
    rank = rank_of(node)
    if rank is None:
        return "the number of dimensions of its input is not known: give example_inputs"
    return "" if rank == needed else f"its input has {rank} dimensions, the channels are not in dimension 1"


# --- how -----------------------------------------------------------------------------------------------------


def _channels(gm: GraphModule, found: Pair) -> Channels:
    """Where the layer's weight keeps the channels that the BatchNorm normalises."""
    weight = _tensor(gm, operand(found.layer, "weight"))
    if found.leads:
        return input_channels_of(found.layer, weight)
    channels = channels_of(found.layer, "weight", weight)
    assert channels is not None
    return channels


def _tensor(gm: GraphModule, node: Any) -> Tensor:
    value = tensor_of(gm, node)
    assert value is not None
    return value


def _fold_live(gm: GraphModule, found: Pair) -> None:
    layer, fold = found.layer, Fold(found.norm.bn, _channels(gm, found), found.drops)
    weight, bias = operand(layer, "weight"), operand(layer, "bias")
    norm = _read(gm, found)
    made: tuple[tuple[str, Any, nn.Module, tuple[Node | None, ...]], ...] = (
        ("bias", bias, BiasFoldBehind(fold), (weight, *norm)) if found.leads else ("bias", bias, BiasFold(fold), norm),
        ("weight", weight, WeightFold(fold), ()),
    )
    for name, source, module, more in made:
        path = free_path(gm, f"{layer.meta['path']}.{name}_fold" if "path" in layer.meta else f"{layer.name}_{name}_fold")
        gm.add_submodule(path, module)
        folded = call_module(gm.graph, path, source, layer, more=more)
        copy_origin(layer, folded)
        set_operand(layer, name, folded)


def _read(gm: GraphModule, found: Pair) -> tuple[Node | None, ...]:
    """Read before the layer what the fold follows: the BatchNorm's module, or the tensors of its function."""
    norm = found.norm
    if not norm.is_function:
        set_arguments(norm.node, (norm.arguments["input"],), {})
        return (get_attr(gm.graph, norm.name, found.layer),)
    sources = [norm.arguments.get(tensor) for tensor in _TENSORS]
    become_call(gm, norm.node, norm.name, norm.bn, (norm.arguments["input"],))
    read = tuple(None if source is None else get_attr(gm.graph, str(source.target), found.layer) for source in sources)
    _erase(gm, [*sources, norm.arguments.get("training")])
    return read


def _erase(gm: GraphModule, nodes: list[Any]) -> None:
    for node in nodes:
        if isinstance(node, Node) and not node.users:
            gm.graph.erase_node(node)


def _merge(gm: GraphModule, found: Pair) -> None:
    layer, norm = found.layer, found.norm
    weight, bias = operand(layer, "weight"), operand(layer, "bias")
    value, before = _tensor(gm, weight), None if bias is None else _tensor(gm, bias)
    fold = Fold(norm.bn, _channels(gm, found))
    with torch.no_grad():
        merged_bias = fold.bias_behind(before, value) if found.leads else fold.bias(before)
        set_parameter(gm, str(weight.target), nn.Parameter(fold.weight(value), value.requires_grad))
    parent, _ = parent_and_name(str(weight.target))
    path = str(bias.target) if bias is not None else (f"{parent}.bias" if parent else free_path(gm, f"{layer.name}_bias"))
    set_parameter(gm, path, nn.Parameter(merged_bias.to(value.dtype), value.requires_grad))
    if bias is None:
        set_operand(layer, "bias", get_attr(gm.graph, path, layer))
    replace(gm, norm.node, norm.arguments["input"])
    if not norm.is_function:
        gm.delete_submodule(norm.name)
        return
    sources = [source for tensor in _TENSORS if (source := norm.arguments.get(tensor)) is not None]
    _erase(gm, [*sources, norm.arguments.get("training")])
    for source in sources:
        parent, name = parent_and_name(str(source.target))
        delattr(gm.get_submodule(parent), name)
