"""BatchNorm folding: every fold is proved safe first, or refused with a reason on the node."""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.fx import GraphModule, Node

from pege_fx.errors import FoldError
from pege_fx.modules.batch_norm import BiasFold, BiasFoldBehind, Fold, WeightFold
from pege_fx.modules.merged_norm import MergedNorm
from pege_fx.passes.graph import (
    become_call,
    call_module,
    copy_origin,
    free_path,
    get_attr,
    join,
    operand,
    parent_and_name,
    replace,
    set_arguments,
    set_operand,
    set_parameter,
    uses,
)
from pege_fx.passes.norms import (
    TENSORS,
    Norm,
    Pair,
    before,
    behind,
    channels_beside,
    is_foldable,
    norm_of,
    norms_of,
    the_tensor,
    why_not,
)
from pege_fx.policy.plan import Plan

MODES = ("train", "freeze", "keep")


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
        nodes = norms_of(gm)
        used = uses(gm.meta.get("family", [gm])) if nodes else Counter()
        for node in nodes:
            norm = norm_of(gm, node)
            found = before(gm, norm)
            reason = 'batch_norm="keep"' if self.mode == "keep" else why_not(gm, found, used, merges=self.mode == "freeze")
            _note(found, reason)
            if reason and self.mode == "freeze":
                found, first = behind(gm, norm), reason
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
        if self.mode != "train" or not (nodes := norms_of(gm)):
            return
        plan: Plan = gm.meta["plan"]
        used = uses(gm.meta.get("family", [gm]))
        formats = {op.node: op.format for op in plan.operations if any(edge.spec for edge in (*op.weights, *op.inputs))}
        for node in nodes:
            norm = norm_of(gm, node)
            found = behind(gm, norm)
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


def _note(found: Pair, reason: str) -> None:
    """Write the verdict on the BatchNorm, and on the layer: why one in front of it stays matters least there."""
    norm, layer = found.norm, found.layer
    verdict = f"{norm.name} stays: {reason}" if reason else f"folded {norm.name}"
    norm.node.meta["batch_norm"] = verdict
    if not is_foldable(layer):
        return
    said = layer.meta.get("batch_norm", "")
    if not (said and reason and found.leads):
        layer.meta["batch_norm"] = f"{said}; {verdict}" if said.startswith("folded") else verdict


def _both(reason: str, other: Pair, reason_behind: str) -> str:
    """The reasons on both sides, where there is a layer behind; "" if it takes the BatchNorm."""
    if not reason_behind:
        return ""
    return f"{reason}; {reason_behind}" if is_foldable(other.layer) else reason


def _fold_live(gm: GraphModule, found: Pair) -> None:
    layer, fold = found.layer, Fold(found.norm.bn, channels_beside(gm, found), found.drops)
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
    sources = [norm.arguments.get(tensor) for tensor in TENSORS]
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
    value, before = the_tensor(gm, weight), None if bias is None else the_tensor(gm, bias)
    channels = channels_beside(gm, found)
    fold = Fold(norm.bn, channels)
    with torch.no_grad():
        merged_bias = fold.bias_behind(before, value) if found.leads else fold.bias(before)
        set_parameter(gm, str(weight.target), nn.Parameter(fold.weight(value), value.requires_grad))
    path = _new_bias(gm, layer, str(weight.target)) if bias is None else str(bias.target)
    set_parameter(gm, path, nn.Parameter(merged_bias.to(value.dtype), value.requires_grad))
    if bias is None:
        set_operand(layer, "bias", get_attr(gm.graph, path, layer))
    merged = MergedNorm(
        name=norm.name,
        tensors=_keys_of(norm),
        weight=str(weight.target),
        bias=path,
        had_bias=bias is not None,
        channels=channels,
        leads=found.leads,
        eps=norm.bn.eps,
    )
    gm.register_load_state_dict_pre_hook(merged)  # type: ignore[no-untyped-call]
    gm.meta.setdefault("merged_norms", []).append(merged)
    replace(gm, norm.node, norm.arguments["input"])
    if not norm.is_function:
        gm.delete_submodule(norm.name)
        return
    sources = [source for tensor in TENSORS if (source := norm.arguments.get(tensor)) is not None]
    _erase(gm, [*sources, norm.arguments.get("training")])
    for source in sources:
        parent, name = parent_and_name(str(source.target))
        delattr(gm.get_submodule(parent), name)


def _keys_of(norm: Norm) -> tuple[str | None, ...]:
    """Where a state of the model has the tensors of a BatchNorm."""
    if norm.is_function:
        sources = [norm.arguments.get(tensor) for tensor in TENSORS]
        return tuple(None if source is None else str(source.target) for source in sources)
    return tuple(None if getattr(norm.bn, tensor) is None else f"{norm.name}.{tensor}" for tensor in TENSORS)


def _new_bias(gm: GraphModule, layer: Node, weight: str) -> str:
    """The path of a bias where there was none: beside the weight, unless something else lies there."""
    parent, _ = parent_and_name(weight)
    is_free = parent and getattr(gm.get_submodule(parent), "bias", None) is None
    return f"{parent}.bias" if is_free else free_path(gm, join(parent, f"{layer.name}_bias"))
