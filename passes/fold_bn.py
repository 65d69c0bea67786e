"""BatchNorm folding: every fold is proved safe first, or refused with a reason on the node."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.fx import GraphModule, Node

from pege_fx.batch_norm import FOLDED, BatchNorm, BiasFold, Fold, WeightFold
from pege_fx.errors import FoldError
from pege_fx.passes.graph import (
    attribute,
    call_module,
    call_sites,
    calls,
    channels_of,
    copy_origin,
    first_argument,
    free_path,
    operand,
    operator_of,
    parent_and_name,
    rank_of,
    replace,
    set_operand,
    set_parameter,
    tensor_of,
)
from pege_fx.spec import Channels

MODES = ("train", "freeze", "keep")
_RANKS = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}


@dataclass(frozen=True)
class FoldBatchNorm:
    """Fold every BatchNorm into the layer that feeds it and nothing else: w' = k w, b' = k (b - mean) + beta.

    k = gamma / sqrt(var + eps). ``mode``: "train" keeps batch statistics live in training and folds in evaluation;
    "freeze" merges the running statistics into weight and bias at once; "keep" leaves every BatchNorm alone.

    The verdict is in ``meta["batch_norm"]`` of the layer and of the BatchNorm: "folded bn1", or why not.
    """

    mode: Literal["train", "freeze", "keep"] = "train"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise FoldError(f'batch_norm={self.mode!r}: give "train", "freeze" or "keep".')

    def __call__(self, gm: GraphModule) -> None:
        sites = call_sites(gm)
        for node, bn in calls(gm, BatchNorm):
            layer = first_argument(node)
            reason = 'batch_norm="keep"' if self.mode == "keep" else why_not(gm, node, bn, sites[bn])
            verdict = f"{node.target} stays: {reason}" if reason else f"folded {node.target}"
            node.meta["batch_norm"] = verdict
            if isinstance(layer, Node):
                layer.meta["batch_norm"] = verdict
            if reason:
                continue
            if self.mode == "freeze":
                _merge(gm, layer, node, bn)
            else:
                _fold_live(gm, layer, node, bn)


def why_not(gm: GraphModule, node: Node, bn: BatchNorm, sites: int) -> str:
    """Return why a BatchNorm, called at ``sites`` places, can not be folded; "" if it is proved that it can."""
    layer = first_argument(node)
    described = operator_of(layer) if isinstance(layer, Node) else None
    if type(bn) not in FOLDED:
        return f"{type(bn).__name__} may compute something else than BatchNorm"
    if described is None or "weight" not in described.weights or "bias" not in described.parameters:
        return f"its input {layer} is not a convolution or linear layer"
    if bn.running_mean is None or bn.running_var is None:
        return "it keeps no running statistics"
    if sites > 1:
        return f"it is called {sites} times"
    if len(layer.users) > 1:
        return f"the output of {layer} has {len(layer.users)} users"
    for name in ("weight", "bias"):
        source = operand(layer, name)
        if source is None:
            continue
        if tensor_of(gm, source) is None or not isinstance(attribute(gm, source), nn.Parameter):
            return f"the {name} of {layer} is computed, not a parameter"
        if len(source.users) > 1:
            return f"{source.target} is read at {len(source.users)} places"
    count = _channels(gm, layer).count
    if count != bn.num_features:
        return f"it has {bn.num_features} channels where {layer} has {count}"
    return _why_not_by_rank(described.name, node, bn)


def _why_not_by_rank(layer_name: str, node: Node, bn: BatchNorm) -> str:
    """BatchNorm works on dimension 1: behind a linear layer that is the features' only where the input has two."""
    if type(bn) in _RANKS and layer_name != "linear":
        return ""  # it accepts batched input alone
    needed = 2 if layer_name == "linear" else 2 + int(layer_name[-2])
    rank = rank_of(node)
    if rank is None:
        return "the number of dimensions of its input is not known: give example_inputs"
    return "" if rank == needed else f"its input has {rank} dimensions, the channels are not in dimension 1"


def _channels(gm: GraphModule, layer: Node) -> Channels:
    channels = channels_of(layer, "weight", _tensor(gm, operand(layer, "weight")))
    assert channels is not None
    return channels


def _tensor(gm: GraphModule, node: Node) -> torch.Tensor:
    value = tensor_of(gm, node)
    assert value is not None
    return value


def _fold_live(gm: GraphModule, layer: Node, node: Node, bn: BatchNorm) -> None:
    weight = operand(layer, "weight")
    bn.__class__ = FOLDED[type(bn)]  # type: ignore[assignment]
    fold = Fold(bn, _channels(gm, layer))
    for name, source, module in (("weight", weight, WeightFold(fold)), ("bias", operand(layer, "bias"), BiasFold(fold))):
        path = free_path(gm, f"{layer.meta['path']}.{name}_fold" if "path" in layer.meta else f"{layer.name}_{name}_fold")
        gm.add_submodule(path, module)
        folded = call_module(gm.graph, path, source, before=layer)
        copy_origin(layer, folded)
        set_operand(layer, name, folded)


def _merge(gm: GraphModule, layer: Node, node: Node, bn: BatchNorm) -> None:
    weight, bias = operand(layer, "weight"), operand(layer, "bias")
    value = _tensor(gm, weight)
    fold = Fold(bn, _channels(gm, layer))
    with torch.no_grad():
        merged_bias = fold.bias(None if bias is None else _tensor(gm, bias)).to(value.dtype)
        set_parameter(gm, str(weight.target), nn.Parameter(fold.weight(value), value.requires_grad))
    parent, _ = parent_and_name(str(weight.target))
    path = str(bias.target) if bias is not None else (f"{parent}.bias" if parent else free_path(gm, f"{layer.name}_bias"))
    set_parameter(gm, path, nn.Parameter(merged_bias, value.requires_grad))
    if bias is None:
        with gm.graph.inserting_before(layer):
            set_operand(layer, "bias", gm.graph.create_node("get_attr", path))
    replace(gm, node, layer)
    gm.delete_submodule(str(node.target))
