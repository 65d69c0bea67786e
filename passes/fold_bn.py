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
from pege_fx.passes.program import Program, Verdict, of_program

MODES = ("train", "freeze", "keep")


@of_program
@dataclass(frozen=True)
class FoldBatchNorm:
    """Fold every BatchNorm into the layer that feeds it and nothing else: w' = k w, b' = k (b - mean) + beta.

    k = gamma / sqrt(var + eps). ``mode``: "train" keeps batch statistics live in training and folds in evaluation;
    "freeze" merges the running statistics into weight and bias at once; "keep" leaves every BatchNorm alone. Identities and
    dropouts between the two do not count where they do nothing. What no layer feeds, "freeze" merges into the layer behind.

    The verdict is in ``Program.verdicts``, and in words in ``meta["batch_norm"]`` of the layer and of the BatchNorm: "folded
    bn1", or why not.
    """

    mode: Literal["train", "freeze", "keep"] = "train"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise FoldError(f'batch_norm={self.mode!r}: give "train", "freeze" or "keep".')

    def __call__(self, program: Program) -> None:
        nodes = [(gm, node) for gm in program.graphs for node in norms_of(gm)]
        used = uses(program.graphs) if nodes else Counter()
        for gm, node in nodes:
            norm = norm_of(gm, node)
            found = before(gm, norm)
            reason = 'batch_norm="keep"' if self.mode == "keep" else why_not(gm, found, used, merges=self.mode == "freeze")
            _note(program, found, reason)
            if reason and self.mode == "freeze":
                found, first = behind(gm, norm), reason
                reason = why_not(gm, found, used, merges=True)
                _note(program, found, _both(first, found, reason))
            if reason:
                continue
            if self.mode == "freeze":
                program.merged_norms.setdefault(gm, []).append(_merge(gm, found))
            else:
                _fold_live(gm, found)


@of_program
@dataclass(frozen=True)
class FoldLeadingNorms:
    """Fold a BatchNorm that no layer feeds into the float layer that reads it and nothing else, in evaluation.

    w' = w k by input channels, b' = b + w (beta - k mean). A fake-quant on the layer's input stands between the two, and
    scales per output channel can not hold k: so both edges have to be float, and the plan says whether they are.
    """

    mode: Literal["train", "freeze", "keep"] = "train"

    def __call__(self, program: Program) -> None:
        nodes = [(gm, node) for gm in program.graphs for node in norms_of(gm)] if self.mode == "train" else []
        if not nodes:
            return
        used = uses(program.graphs)
        for gm, node in nodes:
            formats = {
                op.node: op.format
                for op in program.plans[gm].operations
                if any(edge.spec for edge in (*op.weights, *op.inputs))
            }
            norm = norm_of(gm, node)
            found = behind(gm, norm)
            reason = why_not(gm, found, used, merges=False)
            if not reason and found.layer.name in formats:
                reason = f"{found.layer} is quantized, {formats[found.layer.name]}"
            refused = next((said.reason for said in program.verdicts.get(node, []) if said.norm == norm.name), "")
            _note(program, found, _both(refused, found, reason))
            if not reason:
                _fold_live(gm, found)
        for gm, plan in program.plans.items():
            said = {node.name: node.meta.get("batch_norm", "") for node in gm.graph.nodes}
            decided = (dataclasses.replace(op, batch_norm=said[op.node]) for op in plan.operations)
            program.plans[gm] = dataclasses.replace(plan, operations=tuple(decided))


def _note(program: Program, found: Pair, reason: str) -> None:
    """Note the verdict on the BatchNorm, and on the layer: why one in front of it stays matters least there."""
    verdict, layer = Verdict(found.norm.name, reason), found.layer
    _write(program, found.norm.node, [verdict])
    if not is_foldable(layer):
        return
    said = program.verdicts.get(layer, [])
    if not (said and reason and found.leads):
        _write(program, layer, [*said, verdict] if said and said[0].is_folded else [verdict])


def _write(program: Program, node: Node, verdicts: list[Verdict]) -> None:
    program.verdicts[node] = verdicts
    node.meta["batch_norm"] = "; ".join(map(str, verdicts))


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


def _merge(gm: GraphModule, found: Pair) -> MergedNorm:
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
    replace(gm, norm.node, norm.arguments["input"])
    if not norm.is_function:
        gm.delete_submodule(norm.name)
        return merged
    sources = [source for tensor in TENSORS if (source := norm.arguments.get(tensor)) is not None]
    _erase(gm, [*sources, norm.arguments.get("training")])
    for source in sources:
        parent, name = parent_and_name(str(source.target))
        delattr(gm.get_submodule(parent), name)
    return merged


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
