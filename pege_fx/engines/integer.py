"""The reference engine: a converted graph with its integer parts computed in integers, exactly.

A layer whose operands are codes sums their products in int32:

    acc = sum (x_int - z_x) (w_int - z_w)        value = s_x s_w acc + b

Where the value then meets nothing but clips (ReLU, ReLU6, clamp), max pools and reshapes before the next quantization
step, the next code is a non-decreasing function of ``acc``, and so a row of thresholds for each output channel: no
multiplication, no rounding, nothing to lose. The thresholds are computed in rational arithmetic. What lies between in
float (residual sums, averages, normalisations) is computed in float64.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pege_fx.engines.accumulators import Accumulate, OnIntegers, Requantize, Rescale, thresholds, widen
from pege_fx.modules.stages import copied, graph_of
from pege_fx.numerics.functional import dequantize, quantize
from pege_fx.numerics.spec import bounds_of
from pege_fx.passes.graph import (
    arguments,
    call_function,
    call_module_like,
    channels_of,
    first_argument,
    operand,
    operator_of,
    remove_dead_nodes,
    replace,
    set_arguments,
    tensor_of,
)
from pege_fx.passes.lower import unpack_weights
from pege_fx.passes.pipeline import run

_KEEP_ORDER: set[Any] = {
    F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze,
    torch.unsqueeze, "flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "unflatten",
}  # fmt: skip
_RELU: set[Any] = {F.relu, torch.relu, torch.relu_, "relu", "relu_"}


def integer_engine(deployed: GraphModule) -> GraphModule:
    """Return the reference engine of a converted model: the same answers, computed in integers where the graph is integer.

    Takes the inputs of the model; outputs are float64. ``integer_coverage`` says what runs in integers. Plain torch, made
    to be right and not to be fast.

    Args:
        deployed: from ``convert``.

    Raises:
        ModelError: for any other model.

    >>> import pege_fx
    >>> gm = pege_fx.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), "W4A4", (torch.randn(2, 4),))
    >>> engine = integer_engine(pege_fx.convert(gm))
    >>> print(integer_coverage(engine))
    2 of 2 layers sum in int32; 1 of 1 quantization steps behind a layer are integer
    """
    engine = copied(graph_of(deployed, "converted")).eval()
    graphs = [module for module in engine.modules() if isinstance(module, GraphModule)]
    run(graphs, [unpack_weights, _rewrite])
    for gm in graphs:
        gm.delete_all_unused_submodules()
    engine.meta["engine"] = "integer"
    return engine.double()


@dataclass(frozen=True)
class IntegerCoverage:
    """What an engine computes in integers alone.

    Attributes:
        layers: operations with a product.
        integer_layers: those that sum in int32.
        steps: quantization steps behind a layer.
        integer_steps: those by thresholds on integers.
    """

    layers: int
    integer_layers: int
    steps: int
    integer_steps: int

    def __str__(self) -> str:
        return (
            f"{self.integer_layers} of {self.layers} layers sum in int32; "
            f"{self.integer_steps} of {self.steps} quantization steps behind a layer are integer"
        )


def integer_coverage(engine: GraphModule) -> IntegerCoverage:
    """Count the layers and quantization steps of an engine, and those that are integer.

    Args:
        engine: from ``integer_engine``.

    Raises:
        ModelError: for any other model.

    >>> import pege_fx
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> gm = pege_fx.prepare(model, "W4A4", torch.randn(2, 4))
    >>> integer_coverage(pege_fx.integer_engine(pege_fx.convert(gm))).integer_layers
    2
    """
    graphs = [module for module in graph_of(engine, "engine").modules() if isinstance(module, GraphModule)]
    nodes = [node for gm in graphs for node in gm.graph.nodes]
    sums, steps = (
        sum(isinstance(module, kind) for gm in graphs for module in _called(gm)) for kind in (Accumulate, Requantize)
    )
    floating = sum(1 for node in nodes if (found := operator_of(node)) is not None and found.integer)
    left = sum(1 for node in nodes if node.target is quantize and first_argument(node).target is not widen)
    return IntegerCoverage(sums + floating, sums, steps + left, steps)


def _called(gm: GraphModule) -> list[nn.Module]:
    return [gm.get_submodule(str(node.target)) for node in gm.graph.find_nodes(op="call_module")]


# --- the rewrite -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Grid:
    """value = scale * (code - zero) for the codes of one operand; ``zero`` is a whole number."""

    codes: Node
    scale: Tensor
    zero: int


@dataclass(frozen=True)
class _Sums:
    """A node of integers and what they stand for: scale * n + bias, one value per channel along ``axis``."""

    node: Node
    scale: Tensor
    bias: Tensor
    axis: int


def _rewrite(gm: GraphModule) -> None:
    known: dict[Node, _Sums] = {}
    for node in list(gm.graph.nodes):
        if node.op == "placeholder":
            _widen_input(gm, node)
        elif node.target is dequantize:
            _drop_dtype(node)
            _note_codes(gm, node, known)
        elif node.target is quantize:
            _requantize(gm, node, known)
        elif (sums := _accumulate(gm, node)) is not None:
            rescale = Rescale(sums.scale, sums.bias, sums.axis)
            value = call_module_like(gm, f"{node.name}_value", rescale, (sums.node,), {}, before=node)
            known[value] = sums
            replace(gm, node, value)
    remove_dead_nodes(gm)


def _widen_input(gm: GraphModule, node: Node) -> None:
    readers = list(node.users)
    wide = call_function(gm.graph, widen, (node,), {}, before=_after_placeholders(node))
    for reader in readers:
        reader.replace_input_with(node, wide)


def _after_placeholders(node: Node) -> Node:
    following = node.next
    while following.op == "placeholder":
        following = following.next
    return following


def _drop_dtype(node: Node) -> None:
    args, settings = arguments(node)
    settings.pop("dtype", None)
    set_arguments(node, args, settings)


def _grid(gm: GraphModule, node: Any) -> _Grid | None:
    """The codes that a dequantize node reads, if their zero point is a whole number and their scales are positive."""
    if not isinstance(node, Node) or node.target is not dequantize or not _is_plain(node):
        return None
    codes, *grid = arguments(node)[0]
    scale, zero = (tensor_of(gm, part) for part in (*grid, None)[:2])
    if scale is None or not bool((scale > 0).all()):
        return None
    if zero is not None and (bool((zero != zero.round()).any()) or int(zero.min()) != int(zero.max())):
        return None
    return _Grid(codes, scale, 0 if zero is None else int(zero.flatten()[0]))


def _is_plain(node: Node) -> bool:
    """Whether codes are whole numbers with one scale per tensor or channel: accumulators of others have no scale."""
    settings = arguments(node)[1]
    return settings.get("format") is None and settings.get("layout") is None


def _note_codes(gm: GraphModule, node: Node, known: dict[Node, _Sums]) -> None:
    """Codes of an activation are integers like accumulators are: another step may follow without a layer between."""
    grid = _grid(gm, node)
    if grid is not None and grid.codes.target is not None and grid.codes.op != "get_attr" and grid.scale.numel() == 1:
        scale = grid.scale.reshape(1)
        known[node] = _Sums(grid.codes, scale, -grid.zero * scale.double(), 0)


def _accumulate(gm: GraphModule, node: Node) -> _Sums | None:
    """Write a layer on codes, if the node is one, in front of it."""
    described = operator_of(node)
    if described is None or described.integer is None:
        return None
    names = ("input", "weight") if described.weights else described.inputs
    grids = [_grid(gm, operand(node, name)) for name in names]
    first, second = grids
    if first is None or second is None or first.scale.numel() != 1:
        return None
    count = 1
    if second.codes.op == "get_attr" and (channels := channels_of(node, names[1], _weight(gm, second))) is not None:
        count = channels.count
    scale = first.scale.double().flatten() * second.scale.double().flatten()
    bias = _bias(gm, operand(node, "bias")) if "bias" in described.parameters else torch.zeros(1)
    if scale.numel() not in (1, count) or bias is None:
        return None
    function = getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target
    args, settings = arguments(node)
    named = dict(zip(described.parameters, args, strict=False)) | settings
    rest = {name: value for name, value in named.items() if name not in (*names, "bias")}
    module = Accumulate(function, [first.zero, second.zero])
    made = call_module_like(gm, f"{node.name}_sums", module, (first.codes, second.codes), rest, before=node)
    return _Sums(made, scale, bias.double(), described.channel_axis)


def _weight(gm: GraphModule, grid: _Grid) -> Tensor:
    weight = tensor_of(gm, grid.codes)
    assert weight is not None
    return weight


def _bias(gm: GraphModule, node: Any) -> Tensor | None:
    """The values of a bias: zero without one, None if it is computed from inputs."""
    if node is None:
        return torch.zeros(1)
    if isinstance(node, Node) and node.target is dequantize:
        codes, scale = (tensor_of(gm, part) for part in arguments(node)[0][:2])
        return None if codes is None or scale is None else codes.double() * scale.double()
    return tensor_of(gm, node)


def _requantize(gm: GraphModule, node: Node, known: dict[Node, _Sums]) -> None:
    """Take the codes from integers, if only clips, max pools and reshapes lie between."""
    clips: list[tuple[float, float]] = []
    moves: list[Node] = []
    source = first_argument(node)
    while source not in known:
        if (clip := _clip(source)) is not None:
            clips.append(clip)
        elif source.target in _KEEP_ORDER and isinstance(first_argument(source), Node):
            moves.append(source)
        else:
            return
        source = first_argument(source)
    if not _is_plain(node):
        return
    sums = known[source]
    args, settings = arguments(node)
    grid = [tensor_of(gm, part) for part in args[1:]]
    rows = thresholds(sums.scale, sums.bias, clips, grid, **settings)
    if rows is None:
        return
    lowest, _ = bounds_of(settings["bits"], signed=settings["signed"], narrow=settings.get("narrow", False))
    dtype = torch.int8 if settings["signed"] else torch.uint8
    module = Requantize(rows, sums.axis, lowest, dtype)
    codes = call_module_like(gm, f"{node.name}_integer", module, (sums.node,), {}, before=node)
    for move in reversed(moves):
        move_args, move_settings = arguments(move)
        codes = call_module_like(
            gm, f"{node.name}_{move.name}", OnIntegers(move.target), (codes, *move_args[1:]), move_settings, before=node
        )
    replace(gm, node, codes)


def _clip(node: Node) -> tuple[float, float] | None:
    """The range that a node clips to, or None if it is no clip."""
    args, settings = arguments(node)
    if node.target in _RELU:
        return 0.0, math.inf
    if node.target is F.relu6:
        return 0.0, 6.0
    if node.target in (F.hardtanh, torch.clamp, "clamp"):
        names = ("input", "min_val", "max_val") if node.target is F.hardtanh else ("input", "min", "max")
        named = dict(zip(names, args, strict=False)) | settings
        defaults = (-1.0, 1.0) if node.target is F.hardtanh else (None, None)
        low, high = (named.get(name, default) for name, default in zip(names[1:], defaults, strict=True))
        low, high = -math.inf if low is None else low, math.inf if high is None else high
        return (low, high) if isinstance(low, (int, float)) and isinstance(high, (int, float)) else None
    return None
