"""Sign analysis: what is marked non-negative never is negative, and the usual cases are marked."""

import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node, Tracer, symbolic_trace

from pege_fx.passes import analyse_signs, name_writes
from pege_fx.passes.op_traits import TRAITS, OpTraits
from pege_fx.testing import Network, networks


def is_proved(function: Callable[[Tensor], Tensor]) -> bool:
    """The verdict on a function's result, held against what it computes on values of both signs."""
    gm = symbolic_trace(function)
    analyse_signs(gm)
    (result,) = next(iter(gm.graph.find_nodes(op="output"))).all_input_nodes
    proved = bool(result.meta.get("non_negative"))
    if proved:
        assert float(gm(torch.randn(4, 4, 6, 6)).min()) >= 0
    return proved


PROVED: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: torch.relu(x),
    "relu method": lambda x: x.relu(),
    "sigmoid": lambda x: torch.sigmoid(x),
    "softmax": lambda x: F.softmax(x, dim=1),
    "relu6": F.relu6,
    "hardsigmoid": F.hardsigmoid,
    "abs": lambda x: x.abs(),
    "square": lambda x: x * x,
    "even power": lambda x: x**2,
    "clamp": lambda x: x.clamp(min=0),
    "pools": lambda x: F.avg_pool2d(F.max_pool2d(F.relu(x), 3, 1, 1), 2),
    "concatenation": lambda x: torch.cat([x.relu(), x.abs()], 1),
    "sum": lambda x: x.relu() + x.abs() + 1,
    "product": lambda x: x.relu() * torch.sigmoid(x),
    "dropout": lambda x: F.dropout(x.relu(), 0.5, True),
    "reshape by its own size": lambda x: x.relu().view(x.size(0), -1),
    "slice": lambda x: x.relu()[:, 1:],
    "chunk": lambda x: x.relu().chunk(2, 1)[1],
    "mean": lambda x: x.relu().mean((2, 3)),
    "zero padding": lambda x: F.pad(x.relu(), (1, 1)),
    "bilinear": lambda x: F.interpolate(x.relu(), scale_factor=2.0, mode="bilinear"),
    "leaky of positive": lambda x: F.leaky_relu(x.relu(), -2.0),
    "clamp by position": lambda x: torch.clamp(x, 0.5),
    "clamp by its method": lambda x: x.clamp_min(0),
    "hardtanh from zero": lambda x: F.hardtanh(x, min_val=0.0, max_val=6.0),
    "square by its function": lambda x: torch.mul(x, x),
    "power of zero": lambda x: torch.pow(x, 0),
    "nothing added": lambda x: x.relu() + 0,
    "a number before": lambda x: 2.0 * x.relu(),
    "alpha of zero": lambda x: torch.add(x.relu(), x.relu(), alpha=0),
    "padding with zeros": lambda x: F.pad(x.relu(), (1, 1), "constant", 0.0),
    "padding by reflection": lambda x: F.pad(x.relu(), (1, 1, 1, 1), mode="reflect"),
    "nearest": lambda x: F.interpolate(x.relu(), scale_factor=2.0),
    "concatenation along the last dimension": lambda x: torch.cat([x.relu(), x.abs()], -1),
    "stack along the last dimension": lambda x: torch.stack([x.relu(), x.abs()], dim=-1),
    "average by another number": lambda x: F.avg_pool2d(x.relu(), 2, divisor_override=3),
    "quotient by a number": lambda x: x.relu() / 2,
    "quotient by a size": lambda x: x.relu() / x.shape[-1],
    "quotient by a method": lambda x: x.abs().div(0.5),
    "remainder of a positive number": lambda x: x % 3,
    "power of a positive fraction": lambda x: x.relu() ** 0.5,
    "power of a whole float": lambda x: x**2.0,
    "clamp from above": lambda x: x.relu().clamp(max=6),
    "clamp from above by its own method": lambda x: x.abs().clamp_max(1.0),
    "filled where masked": lambda x: x.relu().masked_fill(x > 1, 0.0),
    "chosen": lambda x: torch.where(x > 0, x.relu(), 0.0),
    "chosen by a method": lambda x: x.relu().where(x > 0, x.abs()),
    "comparison as a number": lambda x: (x > 0).float(),
    "tanh": lambda x: torch.tanh(x.relu()),
    "gelu": lambda x: F.gelu(x.relu()),
    "largest and its place": lambda x: x.relu().max(1)[0],
    "norm over channels": lambda x: F.normalize(x.relu(), dim=1),
    "sampled on a grid": lambda x: F.grid_sample(x.relu(), x[:, :2].permute(0, 2, 3, 1), align_corners=False),
    "product with a size": lambda x: x.relu() * x.size(1),
    "an operand by name": lambda x: torch.add(x.relu(), other=x.abs()),
}
NOT_PROVED: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: x + 0,
    "difference": lambda x: x.relu() - x.relu(),
    "negative number added": lambda x: x.relu() + (-1),
    "negative factor": lambda x: x.relu() * -2.0,
    "alpha": lambda x: torch.add(x.relu(), x.relu(), alpha=-1),
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "one signed part": lambda x: torch.cat([x.relu(), x], 1),
    "odd power": lambda x: x**3,
    "clamp below zero": lambda x: x.clamp(min=-1),
    "negative padding": lambda x: F.pad(x.relu(), (1, 1), value=-1.0),
    "bicubic": lambda x: F.interpolate(x.relu(), scale_factor=2.0, mode="bicubic"),
    "bicubic sampling": lambda x: F.grid_sample(x.relu(), x[:, :2].permute(0, 2, 3, 1), mode="bicubic", align_corners=False),
    "silu": F.silu,
    "quotient by a negative number": lambda x: x.relu() / -2,
    "quotient by a tensor": lambda x: x.relu() / (x.relu() * 0.5),
    "quotient of a number": lambda x: 2 / x,
    "remainder of a negative number": lambda x: x % -3,
    "power of a negative fraction": lambda x: x.relu() ** -1,
    "clamp from above below zero": lambda x: x.relu().clamp(0, -1),
    "clamp from above by its own method, below zero": lambda x: x.relu().clamp_max(-1.0),
    "filled with a negative number": lambda x: x.relu().masked_fill(x > 1, -1.0),
    "chosen, one signed": lambda x: torch.where(x > 0, x.relu(), x),
    "largest of two, one signed": lambda x: torch.max(x.relu(), x),
    "negative number added by name": lambda x: torch.add(x.relu(), other=-1.0),
    "negative number added by a method": lambda x: x.relu().add(-1),
    "negative factor by name": lambda x: x.relu().mul(other=-2),
    "negative factor in front": lambda x: -2 * x.relu(),
    "signed operand by name": lambda x: torch.add(x.relu(), other=x),
    "product of two": lambda x: x * (x + 1),
    "product with a number": lambda x: torch.mul(x, 2),
    "product with itself by another name": lambda x: x * x.relu(),
    "power of a fraction": lambda x: x**2.5,
    "power by name": lambda x: torch.pow(x, exponent=2),
    "a base to the power": lambda x: torch.pow(2.0, x),
    "clamp from above": lambda x: x.clamp(max=1),
    "clamp by position below zero": lambda x: torch.clamp(x, -0.5),
    "clamp by nothing": lambda x: x.clamp(None, 1.0),
    "hardtanh": lambda x: F.hardtanh(x),
    "negative padding by position": lambda x: F.pad(x.relu(), (1, 1), "constant", -1.0),
    "padding of signed values": lambda x: F.pad(x, (1, 1)),
    "bicubic by position": lambda x: F.interpolate(x.relu(), None, 2.0, "bicubic"),
    "nearest of signed values": lambda x: F.interpolate(x, scale_factor=2.0),
    "average by a negative number": lambda x: F.avg_pool2d(x.relu(), 2, divisor_override=-3),
    "everything by name": lambda x: torch.flatten(input=x.relu()),
    "unknown function": lambda x: torch.sin(x.relu()),
}


def test_the_value_of_a_padding_may_come_by_position() -> None:
    graph = Graph()  # fx writes what F.pad gets by name
    relu = graph.call_function(F.relu, (graph.placeholder("x"),))
    pads = [graph.call_function(F.pad, (relu, (1, 1), "constant", value)) for value in (-1.0, 0.0)]
    graph.output(tuple(pads))
    analyse_signs(GraphModule(nn.Module(), graph))
    assert [bool(pad.meta.get("non_negative")) for pad in pads] == [False, True]


@pytest.mark.parametrize("name", PROVED)
def test_it_proves(name: str) -> None:
    assert is_proved(PROVED[name])


@pytest.mark.parametrize("name", NOT_PROVED)
def test_it_does_not_prove(name: str) -> None:
    assert not is_proved(NOT_PROVED[name])


def test_a_tensor_is_proved_until_it_is_written_to() -> None:
    gm = symbolic_trace(lambda x: x.relu())
    (relu,) = gm.graph.find_nodes(op="call_method", target="relu")
    with gm.graph.inserting_after(relu):
        gm.graph.call_function(operator.setitem, (relu, 0, -1.0))
    name_writes(gm)
    analyse_signs(gm)
    assert [node.name for node in gm.graph.nodes if node.meta.get("non_negative")] == ["relu"]
    (output,) = gm.graph.find_nodes(op="output")
    assert output.args[0].name == "relu_written"


# What a call or a module needs besides its input, by its name without "2d" or "_"; Y is another tensor like the input.
Y = object()
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "dropout": (0.5, True), "expand": (4, 4, 4, 4), "narrow": (0, 0, 1), "permute": ((1, 0, 2, 3),), "repeat": (2, 1, 1, 1),
    "reshape": ((-1,),), "select": (0, 0), "to": (torch.float64,), "unflatten": (1, (2, 2)), "Unflatten": (1, (2, 2)),
    "feature_dropout": (0.5, True), "topk": (2,), "view": (-1,), "flip": ((1,),), "Softmax2d": (),
    **dict.fromkeys(["softmax", "roll", "ZeroPad", "ReplicationPad", "ReflectionPad", "Softmax", "Softmin"], (1,)),
    **dict.fromkeys(["transpose", "swapdims", "movedim"], (0, 1)),
    **dict.fromkeys(["unsqueeze", "getitem"], (0,)),
    **dict.fromkeys(["max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool"], (2,)),
    **dict.fromkeys(["pixel_shuffle", "channel_shuffle", "chunk", "split"], (2,)),
    **dict.fromkeys(["MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool", "PixelShuffle", "ChannelShuffle"], (2,)),
    **dict.fromkeys(["add", "mul", "iadd", "imul", "multiply", "maximum", "minimum", "matmul", "bmm"], (Y,)),
    **dict.fromkeys(["expand_as", "type_as", "reshape_as", "view_as", "mm", "hypot"], (Y,)),
    **dict.fromkeys(["eq", "ne", "lt", "le", "gt", "ge"], (Y,)),
    **dict.fromkeys(["UpsamplingNearest", "UpsamplingBilinear", "lp_pool", "LPPool", "CircularPad"], (2,)),
    **dict.fromkeys(["pixel_unshuffle", "PixelUnshuffle", "unfold", "Unfold", "repeat_interleave", "tensor_split"], (2,)),
    "lp_pool1d": (2.0, 2), "lp_pool2d": (2.0, 2), "LPPool": (2, 2), "CircularPad": (1,),
    "broadcast_to": ((4, 4, 4, 4),), "cumsum": (1,), "softmin": (1,), "split_with_sizes": ((2, 2),), "swapaxes": (0, 1),
    "index_select": (0, torch.arange(2)), "take_along_dim": (torch.zeros(4, 4, 4, 4, dtype=torch.long), 0),
    "masked_select": (torch.ones(4, dtype=torch.bool),), "tile": ((1, 2),),
}  # fmt: skip
SHAPES = {"1d": (2, 4, 4), "3d": (2, 4, 4, 4, 4), "bmm": (4, 4, 4), "mm": (4, 4), "t": (4, 4)}


def _entries(which: Callable[[OpTraits], bool]) -> list[Any]:
    """The functions, methods and modules of torch and Python's operators in the table with a trait, except on sizes."""
    found = [target for target, traits in TRAITS.items() if traits.reads_data and which(traits)]
    of_torch = [t for t in found if callable(t) and (t.__module__ or "torch").split(".")[0] in ("torch", "_operator")]
    return [*of_torch, *(t for t in found if isinstance(t, str) and hasattr(Tensor, t))]


ALWAYS = _entries(lambda traits: traits.non_negative is True)
PRESERVING = _entries(lambda traits: traits.keeps_sign)


def _read(gm: GraphModule, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    gm.register_buffer("held", value)
    return gm.graph.get_attr("held")


def call_of(what: Any, *, signed: bool) -> tuple[GraphModule, Node, tuple[Tensor, ...]]:
    """A graph that calls one entry of a table, on tensors of both signs or on tensors that are proved not to be negative."""
    name = what if isinstance(what, str) else what.__name__
    shape = SHAPES.get(name, SHAPES.get(name[-2:], (4, 4, 4, 4)))
    more = ARGUMENTS.get(name, ARGUMENTS.get(re.sub("[123]d$|_$", "", name), ()))
    gm = GraphModule(nn.Module(), Graph())
    tensors = [gm.graph.placeholder("x"), gm.graph.placeholder("y")]
    if not signed:
        tensors = [gm.graph.call_function(torch.relu, (tensor,)) for tensor in tensors]
    if isinstance(what, type):
        gm.add_submodule("called", what(*more))
        node = gm.graph.call_module("called", (tensors[0],))
    else:
        first = tensors if name in ("cat", "concat", "stack") else tensors[0]
        arguments = (first, *(tensors[1] if value is Y else _read(gm, value) for value in more))
        node = gm.graph.call_method(what, arguments) if isinstance(what, str) else gm.graph.call_function(what, arguments)
    gm.graph.output(node)
    gm.recompile()
    return gm, node, (torch.randn(shape), torch.randn(shape))


@pytest.mark.parametrize("signed", [True, False])
def test_every_entry_of_the_tables_is_true(signed: bool) -> None:
    for what in [*ALWAYS, *PRESERVING]:
        gm, node, inputs = call_of(what, signed=signed)
        analyse_signs(gm)
        proved = bool(node.meta.get("non_negative"))
        assert proved is (what in ALWAYS or not signed), what
        result = gm(*inputs)
        for value in result if isinstance(result, tuple) else (result,):
            assert not proved or float(value.detach().min()) >= 0, what


class Checked(Interpreter):
    def run_node(self, n: Node) -> object:
        value = super().run_node(n)
        if n.meta.get("non_negative") and isinstance(value, Tensor):
            assert float(value.min()) >= 0, f"{n} is marked non-negative"
        return value


@given(networks(max_layers=8))
def test_a_marked_value_is_never_negative(case: tuple[Network, tuple[Tensor, ...]]) -> None:
    network, inputs = case
    gm = symbolic_trace(network)
    analyse_signs(gm)
    with torch.no_grad():
        Checked(gm).run(*inputs)


@pytest.mark.parametrize(
    ("module", "proved"),
    [
        (nn.ReLU(), True),
        (nn.Hardtanh(0, 6), True),
        (nn.Hardtanh(1, 6), True),
        (nn.Hardtanh(-1, 1), False),
        (nn.Tanh(), False),
        (nn.Softmax(1), True),
        (nn.MaxPool2d(2), False),
        (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), True),
        (nn.Sequential(nn.ReLU(), nn.AvgPool2d(2, divisor_override=1)), True),
        (nn.Sequential(nn.ReLU(), nn.AvgPool2d(2, divisor_override=-1)), False),
        (nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1)), False),
    ],
)
def test_modules(module: nn.Module, proved: bool) -> None:
    assert is_proved(nn.Sequential(module, nn.Flatten(), nn.Dropout())) is proved


def test_what_is_written_in_place_has_the_sign_of_the_same_operation_out_of_place() -> None:
    assert is_proved(lambda x: x.clamp_(min=0).sqrt_().floor_())
    assert not is_proved(lambda x: x.relu().sub_(1))


def test_a_layer_with_a_hook_is_not_proved() -> None:
    model = nn.Sequential(nn.Flatten(), nn.ReLU())
    model[1].register_forward_hook(lambda module, args, y: y - 1)
    graph = Graph()
    node = graph.call_module("1", (graph.placeholder("x"),))
    graph.output(node)
    gm = GraphModule(model, graph)
    (node,) = gm.graph.find_nodes(op="call_module", target="1")
    analyse_signs(gm)
    assert not node.meta.get("non_negative")


class Inner(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Calls(nn.Module):
    """Graphs inside a graph, one of them called with arguments by name, one twice, one of several results."""

    def __init__(self) -> None:
        super().__init__()
        self.once, self.named, self.twice, self.other = (symbolic_trace(Inner()) for _ in range(4))
        self.pair = symbolic_trace(Pair())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a, b = x.relu(), x.abs()
        named, other = self.named(a, y=b), self.other(a, x)
        return self.once(a, b), named, self.twice(a, b), self.twice(x, x), other, self.pair(a)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def test_a_graph_inside_is_followed_if_it_is_called_once() -> None:
    tracer = Tracer()
    tracer.is_leaf_module = lambda module, path: isinstance(module, GraphModule)  # type: ignore[method-assign]
    model = Calls()
    gm = GraphModule(model, tracer.trace(model))
    analyse_signs(gm)
    marked = {node.name for node in gm.graph.nodes if node.op == "call_module" and node.meta.get("non_negative")}
    assert marked == {"once", "named"}
