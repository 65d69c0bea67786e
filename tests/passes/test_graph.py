"""Reading and writing graphs: the operator table is torch's signature, effects are seen, names are free."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, symbolic_trace

from pege_fx.modules.mode import TrainingMode
from pege_fx.numerics.spec import Channels
from pege_fx.passes import graph as g
from pege_fx.passes.capture.tracer import PegeTracer
from pege_fx.passes.operators import FUNCTIONS
from pege_fx.testing import Case, networks


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# One call of every function of the table, by the table's names.
CALLS: dict[str, dict[str, Any]] = {
    f"conv{d}d": {
        "input": image(2, 4, *[7] * d),
        "weight": image(6, 2, *[3] * d),
        "bias": image(6),
        "stride": 2,
        "padding": 1,
        "dilation": 1,
        "groups": 2,
    }
    for d in (1, 2, 3)
} | {
    f"conv_transpose{d}d": {
        "input": image(2, 4, *[5] * d),
        "weight": image(4, 3, *[3] * d),
        "bias": image(6),
        "stride": 2,
        "padding": 1,
        "output_padding": 1,
        "groups": 2,
        "dilation": 2,
    }
    for d in (1, 2, 3)
}
CALLS |= {
    "linear": {"input": image(2, 4), "weight": image(3, 4), "bias": image(3)},
    "embedding": {
        "input": torch.tensor([1, 0]),
        "weight": image(3, 4),
        "padding_idx": 1,
        "max_norm": None,
        "norm_type": 2.0,
        "scale_grad_by_freq": True,
        "sparse": False,
    },
    "embedding_bag": {"input": torch.tensor([1, 0]), "weight": image(3, 4), "offsets": torch.tensor([0, 1])},
    "bilinear": {"input1": image(2, 3), "input2": image(2, 4), "weight": image(5, 3, 4), "bias": image(5)},
    "matmul": {"input": image(2, 3), "other": image(3, 4)},
    "mm": {"input": image(2, 3), "mat2": image(3, 4)},
    "bmm": {"input": image(2, 2, 3), "mat2": image(2, 3, 4)},
    "addmm": {"input": image(2, 4), "mat1": image(2, 3), "mat2": image(3, 4)},
    "baddbmm": {"input": image(2, 2, 4), "batch1": image(2, 2, 3), "batch2": image(2, 3, 4)},
    "grouped_mm": {"mat_a": image(2, 3, 8), "mat_b": image(2, 8, 4)},
    "scaled_dot_product_attention": {
        "query": image(1, 2, 3),
        "key": image(1, 2, 3),
        "value": image(1, 2, 3),
        "attn_mask": image(2, 2),
    },
}
BY_KEYWORD = [
    f for f, found in FUNCTIONS.items() if found.name != "einsum" and not found.on_request and f is not operator.matmul
]


@pytest.mark.parametrize("function", BY_KEYWORD, ids=lambda f: f.__name__)
def test_the_table_has_the_names_and_the_order_of_torchs_own_signature(function: Callable[..., Tensor]) -> None:
    described = FUNCTIONS[function]
    arguments = CALLS[described.name]
    assert tuple(arguments) == described.parameters
    assert torch.equal(function(*arguments.values()), function(**arguments))


@pytest.mark.parametrize("function", BY_KEYWORD, ids=lambda f: f.__name__)
@given(data=st.data())
def test_an_operand_is_found_and_set_however_it_is_passed(function: Any, data: st.DataObject) -> None:
    described = FUNCTIONS[function]
    by_position = data.draw(st.integers(0, len(described.parameters)))
    graph = Graph()
    nodes = {name: graph.placeholder(name) for name in described.parameters}
    names = list(nodes)
    node = graph.call_function(
        function, tuple(nodes[n] for n in names[:by_position]), {n: nodes[n] for n in names[by_position:]}
    )
    other = graph.placeholder("another")
    for name in names:
        assert g.operand(node, name) is nodes[name]
        g.set_operand(node, name, other)
        assert g.operand(node, name) is other
    assert set(node.all_input_nodes) == {other}


def test_an_operand_that_is_not_passed_is_none() -> None:
    graph = Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    node = graph.call_function(F.conv2d, (x, w))
    assert g.operand(node, "bias") is None
    g.set_operand(node, "bias", x)
    assert g.operand(node, "bias") is x
    assert g.operand(node, "weight") is w


def only(gm: GraphModule, op: str) -> Node:
    (node,) = (node for node in gm.graph.nodes if node.op == op)
    return node


@pytest.mark.parametrize(("name", "axis"), [("input", 0), ("other", 1)])
def test_channels_of_a_factor_are_its_rows_on_the_left_and_its_columns_on_the_right(name: str, axis: int) -> None:
    graph = Graph()
    node = graph.call_function(torch.matmul, (graph.placeholder("x"), graph.placeholder("w")))
    weight = image(3, 5)
    channels = g.channels_of(node, name, weight)
    assert channels is not None
    assert channels.rows(weight).shape == (weight.shape[axis], weight.shape[1 - axis])
    doubled = weight * channels.broadcast(torch.arange(1.0, weight.shape[axis] + 1), tuple(weight.shape))
    if name == "other":
        assert torch.allclose(image(2, 3) @ doubled, image(2, 3) @ weight * torch.arange(1.0, 6.0))
    else:
        assert torch.allclose(doubled @ image(5, 2), (weight @ image(5, 2)) * torch.arange(1.0, 4.0)[:, None])
    assert g.channels_of(node, name, image(2, 3, 5)) is None
    assert g.channels_of(node, name, image(5)) is None


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_channels_are_those_that_one_weight_channel_reaches(transposed: bool, groups: int) -> None:
    """Doubling the rows that ``channels_of`` gives to an output channel doubles that channel, and no other."""
    function = F.conv_transpose2d if transposed else F.conv2d
    weight = image(4, 8 // groups, 3, 3) if transposed else image(8, 4 // groups, 3, 3)
    graph = Graph()
    node = graph.call_function(function, (graph.placeholder("x"), graph.placeholder("w")), {"groups": groups})
    channels = g.channels_of(node, "weight", weight)
    assert channels is not None
    assert channels.count == 8
    x = image(2, 4, 6, 6)
    factors = torch.arange(1.0, 9.0)
    scaled = function(x, weight * channels.broadcast(factors, tuple(weight.shape)), groups=groups)
    torch.testing.assert_close(scaled, function(x, weight, groups=groups) * factors[:, None, None])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_input_channels_are_those_that_one_weight_channel_reads(groups: int) -> None:
    weight, graph = image(8, 4 // groups, 3, 3), Graph()
    node = graph.call_function(F.conv2d, (graph.placeholder("x"), graph.placeholder("w")), {"groups": groups})
    channels = g.input_channels_of(node, weight)
    assert channels.count == 4
    x, factors = image(2, 4, 6, 6), torch.arange(1.0, 5.0)
    scaled = F.conv2d(x, weight * channels.broadcast(factors, tuple(weight.shape)), groups=groups)
    torch.testing.assert_close(scaled, F.conv2d(x * factors[:, None, None], weight, groups=groups))
    linear = graph.call_function(F.linear, tuple(graph.find_nodes(op="placeholder")))
    assert g.input_channels_of(linear, image(3, 5)) == Channels(5, axis=1)


@pytest.mark.parametrize("padding", [None, 0, 1, (0, 0), (0, 1), (1, 0), "valid", "same"])
@pytest.mark.parametrize("kernel", [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_a_layer_pads_if_one_of_its_outputs_reads_less_than_another(padding: Any, kernel: tuple[int, int]) -> None:
    weight, graph = torch.ones(1, 1, *kernel), Graph()
    kwargs = {} if padding is None else {"padding": padding}
    node = graph.call_function(F.conv2d, (graph.placeholder("x"), graph.placeholder("w")), kwargs)
    read = F.conv2d(torch.ones(1, 1, 6, 6), weight, **kwargs)
    assert g.pads(node, weight) == bool(read.min() < read.max())
    assert not g.pads(graph.call_function(F.linear, tuple(graph.find_nodes(op="placeholder"))), image(3, 5))


# --- modules, attributes, names --------------------------------------------------------------------------------------


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.linear = self.inner[0]
        self.register_buffer("offset", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.inner(x)) + self.offset
        return torch.relu(y)


def test_call_sites_count_a_module_under_all_its_names() -> None:
    gm = symbolic_trace(Nested())
    assert g.call_sites(gm)[gm.get_submodule("inner.0")] == 2
    assert g.call_sites(gm)[gm.get_submodule("inner.1")] == 1
    assert [str(node.target) for node, _ in g.calls(gm, nn.Linear)] == ["inner.0", "inner.0"]


def test_a_graph_inside_a_module_counts_for_itself_alone() -> None:
    holder, inner = nn.Module(), symbolic_trace(nn.Linear(2, 2))
    holder.add_module("inner", inner)
    holder.own = nn.Parameter(torch.ones(2))
    root = GraphModule(nn.Module(), Graph())
    root.add_module("holder", holder)
    root.graph.call_module("holder")
    counts = g.uses([root, inner])
    assert (counts[id(holder.own)], counts[id(inner.weight)]) == (1, 1)


class OwnDropout(nn.Dropout):
    pass


@pytest.mark.parametrize(
    ("module", "drops"),
    [
        (nn.Identity(), 0),
        (nn.Dropout(0.5), 1),
        (nn.FeatureAlphaDropout(0.5), 1),
        (nn.Dropout(0.0), 0),
        (nn.ReLU(), None),
        (OwnDropout(), None),
    ],
)
def test_modules_that_only_drop(module: nn.Module, drops: int | None) -> None:
    gm = GraphModule(nn.Module(), Graph())
    gm.add_module("m", module)
    found = g.only_drops(gm, gm.graph.call_module("m", (gm.graph.placeholder("x"),)))
    assert found == (None if drops is None else (module,) * drops)


def test_functions_that_only_drop() -> None:
    gm = GraphModule(nn.Module(), Graph())
    gm.add_module("mode", TrainingMode())
    x, mode = gm.graph.placeholder("x"), gm.graph.call_module("mode")

    def drops(function: Any, *args: Any, **kwargs: Any) -> Any:
        return g.only_drops(gm, gm.graph.call_function(function, (x, *args), kwargs))

    assert drops(F.dropout, 0.5, False) == drops(torch.dropout, 0.5, train=False) == drops(F.dropout, p=0.0) == ()
    assert drops(F.dropout) is drops(F.dropout2d, 0.1, True) is drops(F.relu) is None
    assert drops(F.dropout, training=mode) == (gm.get_submodule("mode"),)


def unknown(x: Tensor) -> Tensor:
    return x + 1


def test_code_that_the_graph_does_not_look_into_stays_unless_it_is_known_to_do_nothing_else() -> None:
    gm = GraphModule(nn.Module(), Graph())
    call = gm.graph.call_function(unknown, (gm.graph.placeholder("x"),))
    g.remove_dead_nodes(gm)
    assert [node.op for node in gm.graph.nodes] == ["placeholder", "call_function"]
    g.remove_dead_nodes(gm, pure=[call])
    assert [node.op for node in gm.graph.nodes] == ["placeholder"]


def test_norms_that_move_statistics_stay_without_users() -> None:
    mean, var = torch.zeros(4), torch.ones(4)
    moving: list[Callable[[Tensor], Tensor]] = [
        lambda x: F.batch_norm(x, mean, var, training=True),
        lambda x: F.batch_norm(x, running_var=var, running_mean=mean, training=True),
        lambda x: torch.batch_norm(x, None, None, mean, var, True, 0.1, 1e-5, False),
        lambda x: F.instance_norm(x, mean, var),
        nn.BatchNorm1d(4),
        nn.InstanceNorm1d(4, track_running_stats=True),
    ]
    still: list[Callable[[Tensor], Tensor]] = [
        lambda x: F.batch_norm(x, None, None, training=True),
        lambda x: torch.batch_norm(x, mean, var, None, None, True, 0.1, 1e-5, False),
        F.instance_norm,
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.InstanceNorm1d(4),
    ]
    assert [_stays(call) for call in moving] == [True] * len(moving)
    assert [_stays(call) for call in still] == [False] * len(still)


def _stays(call: Callable[[Tensor], Tensor]) -> bool:
    """Whether a call that nobody reads is still there without dead nodes."""

    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.call = call

        def forward(self, x: Tensor) -> Tensor:
            self.call(x)
            return x

    gm = symbolic_trace(Unread())
    before = [node for node in gm.graph.nodes if node.op.startswith("call")]
    g.remove_dead_nodes(gm)
    return len(before) == len([node for node in gm.graph.nodes if node.op.startswith("call")]) == 1


@pytest.mark.parametrize(("given", "expected"), [((), 2.5), ((7.0,), 7.0)])
def test_a_call_that_is_written_out_takes_the_defaults_of_what_it_called(given: tuple[float, ...], expected: float) -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, factor: float = 2.5) -> Tensor:
            return x * factor

    inner, gm = symbolic_trace(Scaled()), GraphModule(nn.Module(), Graph())
    gm.add_module("inner", inner)
    call = gm.graph.call_module("inner", (gm.graph.placeholder("x"), *given))
    gm.graph.output(call)
    g.write_out(gm, call, inner.graph, lambda name: f"inner.{name}")
    gm.recompile()
    assert float(gm(torch.ones(()))) == expected


def test_attributes_and_paths() -> None:
    gm = symbolic_trace(Nested())
    read = only(gm, "get_attr")
    assert g.tensor_of(gm, read) is gm.get_buffer("offset")
    assert g.tensor_of(gm, only(gm, "placeholder")) is None
    assert g.module_of(gm, read, nn.Module) is None
    assert g.has_attribute(gm, "inner.0.weight")
    assert not g.has_attribute(gm, "inner.7.weight")
    assert g.free_path(gm, "inner.2") == "inner.2"
    assert g.free_path(gm, "offset") == "offset_1"
    g.register_buffer(gm, "offset_1", torch.zeros(1))
    assert g.free_path(gm, "offset") == "offset_2"
    g.register_buffer(gm, "made.on_the_way", torch.zeros(1))
    assert g.has_attribute(gm, "made.on_the_way")
    assert g.join("", "a", "", "b") == "a.b"
    assert g.parent_and_name("a.b.c") == ("a.b", "c")
    assert g.parent_and_name("c") == ("", "c")


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Nested()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return y


def test_a_short_name_leaves_the_scope_out_also_where_it_begins_with_a_digit() -> None:
    gm = symbolic_trace(nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU())))
    assert [g.short_name(node) for node, _ in g.calls(gm, nn.Module)] == ["0", "1"]


def test_a_node_knows_where_it_comes_from() -> None:
    gm = symbolic_trace(Around())
    relu = next(iter(gm.graph.find_nodes(op="call_function", target=torch.relu)))
    inner = next(node for node, _ in g.calls(gm, nn.ReLU))
    assert g.owner(relu) == g.scope(relu) == "block"
    assert (g.scope(inner), g.short_name(inner)) == ("block.inner", "1")
    assert g.function_name(relu) == "relu"
    assert g.owner(only(gm, "placeholder")) == ""


def test_becoming_a_function_keeps_name_place_and_users() -> None:
    gm = symbolic_trace(nn.Sequential(nn.ReLU(), nn.ReLU()))
    node, _ = next(iter(g.calls(gm, nn.ReLU)))
    name, users = node.name, list(node.users)
    g.become(node, torch.neg, g.arguments(node)[0], {})
    gm.recompile()
    assert (node.name, list(node.users), node.meta["path"]) == (name, users, "0")
    assert torch.equal(gm(torch.tensor([-1.0, 2.0])), torch.tensor([1.0, 0.0]))


def test_after_a_placeholder_comes_behind_all_of_them() -> None:
    gm = symbolic_trace(lambda x, y: x + y)
    x, y = gm.graph.find_nodes(op="placeholder")
    assert g.after(x) is g.after(y) is only(gm, "call_function")


# --- effects ---------------------------------------------------------------------------------------------------------

IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "method": lambda x: x.add_(1),
    "function": lambda x: F.relu_(x),
    "torch function": lambda x: torch.relu_(x),
    "inplace argument": lambda x: F.relu(x, inplace=True),
    "out argument": lambda x: torch.neg(x, out=x),
    "augmented": lambda x: operator.iadd(x, 1),
    "shift": lambda x: operator.imul(x, 2),
    "item": lambda x: operator.setitem(x, 0, 1.0),
}
OUT_OF_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "method": lambda x: x.add(1),
    "private method": lambda x: x.__add__(1),
    "function": F.relu,
    "not inplace": lambda x: F.relu(x, inplace=False),
    "operator": lambda x: operator.add(x, 1),
    "index": lambda x: operator.invert(x),
    "getitem": lambda x: x[0],
}


def with_unused(function: Callable[[Tensor], Any]) -> GraphModule:
    def forward(x: Tensor) -> Tensor:
        function(x)
        return torch.abs(x)

    tracer = PegeTracer()
    return GraphModule(nn.Module(), tracer.trace(forward))


@pytest.mark.parametrize("name", IN_PLACE)
def test_what_works_in_place_stays_without_users(name: str) -> None:
    gm = with_unused(IN_PLACE[name])
    count = len(gm.graph.nodes)
    g.remove_dead_nodes(gm)
    assert len(gm.graph.nodes) == count


@pytest.mark.parametrize("name", OUT_OF_PLACE)
def test_what_has_no_effect_goes_without_users(name: str) -> None:
    gm = with_unused(OUT_OF_PLACE[name])
    g.remove_dead_nodes(gm)
    assert [node.op for node in gm.graph.nodes] == ["placeholder", "call_function", "output"]


def test_a_module_in_place_stays_and_can_be_made_out_of_place() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            self.act(x)
            return F.relu(x, inplace=True)

    gm = symbolic_trace(Unused())
    g.remove_dead_nodes(gm)
    module, function = only(gm, "call_module"), only(gm, "call_function")
    for node in (module, function):
        assert g.changes_its_input(gm, node)
        g.make_out_of_place(gm, node)
        assert not g.changes_its_input(gm, node)
    gm.recompile()
    x = torch.tensor([-1.0])
    gm(x)
    assert x.item() == -1


@given(networks())
def test_removing_dead_nodes_twice_is_removing_them_once(case: Case) -> None:
    gm = symbolic_trace(case.network)
    g.remove_dead_nodes(gm)
    before = str(gm.graph)
    g.remove_dead_nodes(gm)
    assert str(gm.graph) == before
