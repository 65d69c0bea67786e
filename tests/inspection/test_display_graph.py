"""What pictures show of a graph: chains in one box, modules opened as far as fits, nothing twice and nothing lost."""

import networkx as nx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pege_fx
from pege_fx.inspection import display_graph
from pege_fx.inspection.display_graph import collapse, collapse_to_fit, compact, rest, title, to_display
from pege_fx.testing import Case, networks


class Block(nn.Module):
    """A residual block that asks for a size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[0], x.size(1) * 2 // 2
        return torch.relu(self.bn(self.conv(x)) + x).reshape(n, c, -1, 3)


class Untraceable(nn.Module):
    """Its convolution is a graph inside Python."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > -1e9 else x


def graph_of(model: nn.Module) -> nx.DiGraph:
    return pege_fx.to_networkx(pege_fx.prepare(model, pege_fx.QuantPolicy.parse("W4A4", last=None), (torch.randn(2, 4, 3, 3),)))


@pytest.fixture
def graph() -> nx.DiGraph:
    return graph_of(nn.Sequential(Block(), Block(), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())))


def test_chains_are_one_box_and_sizes_are_left_out(graph: nx.DiGraph) -> None:
    small = to_display(graph)
    assert [f"{title(facts)}: {rest(facts)}" for facts in small.nodes.values()] == [
        "input_1: ",
        "conv conv2d W8: bn (folded)",
        "add: relu · reshape",
        "conv conv2d W4: bn (folded)",
        "add: relu · reshape",
        "2.0 conv2d: ReLU",
        "output: ",
    ]
    assert small.edges["input_1", "_0_conv"] == {"bits": 8, "signed": True, "kind": "data"}
    assert display_graph.edge_label(small.edges["add", "_1_conv"]) == "u4"


def test_what_python_hands_on_is_an_edge_of_its_own_kind() -> None:
    with pytest.warns(pege_fx.PegeWarning):
        small = to_display(graph_of(nn.Sequential(nn.Conv2d(4, 4, 1), Untraceable(), nn.Conv2d(4, 4, 1))))
    assert small.edges["_0", "1.conv.conv2d"] == {"bits": 4, "signed": True, "kind": "graph"}
    assert small.edges["1.conv.conv2d", "_1"]["kind"] == "graph"
    assert rest(small.nodes["_1"]).startswith("stays Python: test_display_graph.py:")


def test_modules_collapse(graph: nx.DiGraph) -> None:
    shut = collapse(to_display(graph), 0)
    assert [title(facts) for facts in shut.nodes.values()] == ["input_1", "0 W8", "1 W4", "2.0 conv2d", "output"]
    assert rest(shut.nodes["module 1"]) == "5 nodes, 1 operation"
    assert list(collapse_to_fit(to_display(graph), 4)) == list(shut)
    assert list(collapse_to_fit(to_display(graph), 7)) == list(to_display(graph))


def test_a_long_module_comes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display_graph, "CHUNK", 3)
    small = to_display(graph_of(nn.Sequential(*[Block() for _ in range(4)])))
    assert {facts["box"] for facts in small.nodes.values()} == {"0-5", *(f"0-5.{number}" for number in range(4))}
    assert len(collapse(small, 0)) == 1


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(networks(), st.integers(0, 3), st.integers(1, 40))
def test_nothing_is_lost_and_nothing_is_there_twice(case: Case, depth: int, most: int) -> None:
    graph = pege_fx.to_networkx(pege_fx.prepare(case.network, "W4A4", case.inputs))
    small = compact(graph)
    for view in (to_display(graph), collapse(to_display(graph), depth), collapse_to_fit(to_display(graph), most)):
        assert sorted(member["key"] for facts in view.nodes.values() for member in facts["members"]) == sorted(small)
        assert nx.number_weakly_connected_components(view) == nx.number_weakly_connected_components(small)
    assert {key for key, facts in graph.nodes.items() if facts["quantized"] is not None} <= set(small)
