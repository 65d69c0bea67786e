"""Structure: what counts, what does not, what is looked past, and what the message shows."""

import copy

import pytest
import torch
from hypothesis import given
from torch import nn
from torch.fx import GraphModule, symbolic_trace

import pege_fx
from pege_fx import FakeQuant, InputError
from pege_fx.kernels.inductor import eager_kernels
from pege_fx.testing import Case, GraphCase, assert_graph, graph_modules, isomorphic_up_to, networks, structure
from pege_fx.testing.structure import sketch


def graph(*lines: str, inputs: str = "x") -> GraphModule:
    return GraphCase.of("\n  ".join([f"def forward({inputs}):", *lines])).graph


@given(graph_modules())
def test_names_and_the_order_of_independent_nodes_do_not_count(case: GraphCase) -> None:
    other = copy.deepcopy(case.graph)
    for number, node in enumerate(other.graph.nodes):
        node.name = f"other_{number}"
    for node in list(other.graph.nodes):
        if node.op == "call_module" and not node.users:
            last = next(iter(reversed(other.graph.nodes)))
            last.prepend(node)
    other.recompile()
    assert isomorphic_up_to(other, case.graph)
    assert isomorphic_up_to(case.graph, other)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (["a = conv_1(x)", "return a"], ["a = linear_1(x)", "return a"]),
        (["a = sub(x, y)", "return a"], ["a = sub(y, x)", "return a"]),
        (["a = add(x, x)", "return a"], ["a = add(x, y)", "return a"]),
        (["a = conv_1(x)", "return a, x"], ["a = conv_1(x)", "return x, a"]),
        (["a = conv_1(x)", "return a"], ["a = conv_1(x)", "b = conv_1(x)", "return b"]),
        (["a = double(x)", "return a"], ["a = mul(x, x)", "return a"]),
    ],
)
def test_operations_operands_positions_and_constants_count(a: list[str], b: list[str]) -> None:
    assert not isomorphic_up_to(graph(*a, inputs="x, y"), graph(*b, inputs="x, y"))


def test_constant_arguments_count() -> None:
    a = graph("a = clamp(x)", "return a")
    b = copy.deepcopy(a)
    (clamp,) = b.graph.find_nodes(op="call_function", target=torch.clamp)
    clamp.update_kwarg("max", 2.0)
    assert not isomorphic_up_to(a, b)


def test_a_removed_node_is_looked_past_in_either_graph() -> None:
    plain = graph("a = conv_1(x)", "b = relu_1(a)", "c = add(b, a)", "return c")
    normed = graph("a = conv_1(x)", "n = norm_1(a)", "b = relu_1(n)", "c = add(b, n)", "return c")
    for removed in ("BatchNorm2d", nn.BatchNorm2d, lambda node: node.target == "norm_1", ["Tanh", nn.BatchNorm2d]):
        assert isomorphic_up_to(normed, plain, removed)
        assert isomorphic_up_to(plain, normed, removed)
    assert not isomorphic_up_to(normed, plain)
    assert not isomorphic_up_to(normed, plain, "ReLU")


@pytest.mark.filterwarnings("ignore:nothing is quantized")
@given(networks())
def test_prepare_puts_in_fake_quants_and_nothing_else(case: Case) -> None:
    """The law that the library was built around."""
    network, inputs = case
    with eager_kernels():
        floats, quantized = (
            pege_fx.prepare(network, policy, inputs, batch_norm="keep") for policy in (pege_fx.QuantPolicy(()), "W4A4")
        )
    assert isomorphic_up_to(quantized, floats, FakeQuant)


def test_graphs_inside_a_module_that_stays_python_count() -> None:
    class Looping(nn.Module):
        def __init__(self, last: nn.Module) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), last)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            while x.sum() > 1e9:
                x = self.body(x)
            return torch.as_tensor(self.body(x))

    x = torch.randn(2, 4)
    with pytest.warns(pege_fx.PegeWarning):
        a, b, c = (pege_fx.prepare(Looping(last), "W4A4", (x,)) for last in (nn.ReLU(), nn.ReLU(), nn.Tanh()))
    assert isomorphic_up_to(a, b)
    assert not isomorphic_up_to(a, c)


CHAIN = graph("a = conv_1(x)", "b = relu_1(a)", "c = add(b, a)", "d = conv_1(c)", "return d, b")


def test_a_sketch_is_compared_by_kinds_and_edges() -> None:
    chains = ("input -> c: Conv2d -> r: ReLU -> a: add -> Conv2d -> out: output", "c -> a", "r -> out")
    assert_graph(CHAIN, *chains)
    assert_graph(CHAIN, "input -> c: Conv2d -> a: add -> Conv2d -> out: output", "c -> out", removed="ReLU")


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_every_edge_of_a_sketch_counts(missing: int) -> None:
    chains = ["input -> c: Conv2d -> r: ReLU", "r -> a: add -> Conv2d -> out: output", "c -> a", "r -> out"]
    assert_graph(CHAIN, *chains)
    with pytest.raises(AssertionError, match=r"It is:\n  'input -> a: Conv2d"):
        assert_graph(CHAIN, *(chain for number, chain in enumerate(chains) if number != missing + 1), "r -> x: Tanh")


@given(graph_modules())
def test_what_the_message_shows_is_the_graph(case: GraphCase) -> None:
    assert_graph(case.graph, *sketch(structure(case.graph)))


def test_the_traced_names_do_not_confuse_the_message() -> None:
    class Repeats(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            relu = torch.relu(x)
            return torch.relu(relu) + relu + torch.relu(x)

    gm = symbolic_trace(Repeats())
    assert_graph(gm, *sketch(structure(gm)))


@pytest.mark.parametrize(
    ("chains", "said"),
    [(["input -> -> output"], "''"), (["a: relu -> a: relu"], "'a' names two nodes"), (["input -> a b"], "'a b'")],
)
def test_chains_that_can_not_be_read_are_refused(chains: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        assert_graph(CHAIN, *chains)


def test_what_can_not_be_removed_is_refused() -> None:
    with pytest.raises(InputError, match="removed=3"):
        structure(CHAIN, 3)  # type: ignore[arg-type]
