"""The graph as a networkx graph, and its questions."""

import networkx as nx
import pytest
import torch
from torch import nn

import pege_fx
from pege_fx.errors import ModelError
from pege_fx.inspection import dataflow


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if x.sum() > 0 else x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 4), Untraceable(), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(torch.relu(self.first(x))))


@pytest.fixture
def graph() -> nx.DiGraph:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    gm = pege_fx.prepare(model, pege_fx.QuantPolicy.parse("W4A4", last=None), (torch.randn(2, 4),))
    return pege_fx.to_networkx(gm)


def test_every_node_is_there_with_its_attributes(graph: nx.DiGraph) -> None:
    facts = graph.nodes["_2_weight_fq"]
    assert (facts["bits"], facts["signed"], facts["kind"], facts["method"]) == (4, True, "weight", "lsq")
    assert facts["scale"] > 0
    assert "_2_weight_fq" in facts["code"]
    assert "W4A4" in facts["rule"] or "weight='4'" in facts["rule"]
    assert graph.nodes["_2"]["shape"] == (2, 4)
    assert graph.nodes["_2"]["dtype"] == "float32"
    assert graph.edges["_1_fq", "_2"] == {"bits": 4, "signed": False, "kind": "data"}


def test_questions(graph: nx.DiGraph) -> None:
    assert dataflow.producers(graph, "_1_fq", "2") == ["_1"]
    assert dataflow.fake_quants_between(graph, "0", "2") == ["_1_fq"]
    assert set(dataflow.region(graph, "0", "2")) == {"_0", "_1", "_1_fq", "_2"}
    assert len(dataflow.region(graph, "2", "0")) == 0
    assert dataflow.without_quantization(graph) == {"_4": "weight: float by the policy; input: float by the policy"}


def test_a_wrong_name_is_answered_with_the_closest(graph: nx.DiGraph) -> None:
    with pytest.raises(ModelError, match=r"no node '_2_wieght_fq'.*\n.*closest: _2_weight_fq"):
        dataflow.region(graph, "_2_wieght_fq", "_4")
    with pytest.raises(ModelError, match="no edge leads from '_0' to '_4'"):
        dataflow.producers(graph, "_0", "_4")


def test_a_model_that_was_not_prepared_is_refused() -> None:
    with pytest.raises(ModelError, match="was not prepared"):
        pege_fx.to_networkx(torch.fx.symbolic_trace(nn.Linear(2, 2)))


def test_graphs_inside_python_are_part_of_it() -> None:
    with pytest.warns(pege_fx.PegeWarning):
        gm = pege_fx.prepare(Net(), "W4A4", (torch.ones(2, 4),))
    graph = pege_fx.to_networkx(gm)
    sites = {key for key, facts in graph.nodes.items() if facts["bits"]}
    assert len(sites) == len(pege_fx.fake_quants(gm))
    assert nx.is_directed_acyclic_graph(graph)
    inside = dataflow.fake_quants_between(graph, "x", "output")
    assert any(key.startswith("middle.") for key in inside)
    assert all(dataflow.find(graph, operation.path) in graph for operation in dataflow.plan_of(gm).operations)
