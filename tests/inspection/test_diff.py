"""Diffs: nothing where nothing changed, each node accounted for, each kind of change named as what it is."""

import copy
from pathlib import Path

import networkx as nx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn
from torch.fx import GraphModule

import pege_fx
from pege_fx import ModelError, OutputError, diff
from pege_fx.inspection.diff import changed_region
from pege_fx.inspection.diff_picture import _places
from pege_fx.testing import Case, networks


class Net(nn.Module):
    """A convolution with BatchNorm, and something around it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x))) + 1


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def traced() -> GraphModule:
    return torch.fx.symbolic_trace(Net())


def named(gm: GraphModule, name: str) -> torch.fx.Node:
    return next(node for node in gm.graph.nodes if node.name == name)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(networks())
@pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
def test_laws(case: Case) -> None:
    before = (
        torch.fx.symbolic_trace(case.network)
        if not case.network.contains("gate")
        else pege_fx.prepare(case.network, "W8", case.inputs)
    )
    after = pege_fx.prepare(case.network, "W4A4", case.inputs)
    assert not diff(after, copy.deepcopy(after))
    there, back = diff(before, after), diff(after, before)
    for found in (there, back):  # one to one, and what is not matched is a change
        assert len(set(found.matched.values())) == len(found.matched)
        assert {c.after.name for c in found.of_kind("added") if c.after} == set(found.after) - set(found.matched)
        assert {c.before.name for c in found.of_kind("removed") if c.before} == set(found.before) - set(found.matched.values())
    assert len(there.of_kind("added")) - len(there.of_kind("removed")) == len(there.after) - len(there.before)


def test_a_node_put_in_between_is_the_only_change() -> None:
    before = traced()
    after = copy.deepcopy(before)
    relu = named(after, "relu")
    with after.graph.inserting_after(relu):
        new = after.graph.call_function(torch.tanh, (relu,))
    relu.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    (change,) = diff(before, after).changes
    assert str(change) == "+ tanh = tanh(relu)  (between relu and add)"
    (change,) = diff(after, before).changes
    assert str(change) == "- tanh = tanh(relu)"


def test_a_renamed_node_is_the_same_node() -> None:
    before, after = traced(), traced()
    named(after, "relu").name = "rectified"
    found = diff(before, after)
    assert [str(change) for change in found.changes] == ["* rectified: was called relu"]


def test_another_operation_in_the_same_place_is_a_replacement() -> None:
    before, after = traced(), traced()
    relu = named(after, "relu")
    with after.graph.inserting_after(relu):
        new = after.graph.call_function(torch.sigmoid, relu.args)
    relu.replace_all_uses_with(new)
    after.graph.erase_node(relu)
    (change,) = diff(before, after).changes
    assert str(change) == "~ relu = relu(bn)\n  -> sigmoid = sigmoid(bn)"


def test_changed_attributes_arguments_and_inputs_are_told_apart() -> None:
    before, after = traced(), traced()
    after.conv.stride = (2, 2)  # type: ignore[union-attr, assignment]
    named(after, "relu").args = (named(after, "conv"),)
    named(after, "add").args = (named(after, "relu"), 2)
    named(after, "bn").meta["verdict"] = "kept"
    details = {change.after.name: change.details for change in diff(before, after).changes if change.after}
    assert "stride=(1, 1)) -> Conv2d(3, 4, kernel_size=(3, 3), stride=(2, 2))" in details["conv"][0]
    assert details["bn"] == ("verdict: kept",)
    assert details["relu"] == ("reads conv instead of bn",)
    assert details["add"] == ("called with ($0, 2) instead of ($0, 1)",)


def test_nodes_that_changed_alike_share_a_line() -> None:
    before, after = traced(), traced()
    for node in after.graph.nodes:
        node.meta["rank"] = 4
    assert str(diff(before, after)).splitlines()[1:] == ["* x, conv, bn and 3 more: rank: 4"]


def test_long_diffs_are_cut_and_say_so() -> None:
    before = torch.fx.symbolic_trace(nn.Sequential())
    after = torch.fx.symbolic_trace(nn.Sequential(*[nn.ReLU() for _ in range(60)]))
    found = diff(before, after)
    assert len(found.of_kind("added")) == 60
    assert "  ... and 20 more" in str(found)


def test_what_is_no_graph_is_refused() -> None:
    with pytest.raises(ModelError, match="Net is no GraphModule"):
        diff(Net(), traced())  # type: ignore[arg-type]


def test_graphs_inside_python_modules_are_compared() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = traced()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x) if x.sum() > 0 else x
            return out

    def whole() -> GraphModule:
        graph = torch.fx.Graph()
        graph.output(graph.call_module("outer", (graph.placeholder("x"),)))
        return GraphModule({"outer": Outer()}, graph)

    before, after = whole(), whole()
    named(after.get_submodule("outer.inner"), "relu").target = torch.tanh  # type: ignore[arg-type]
    (change,) = diff(before, after).changes
    assert str(change).startswith("~ outer.inner/relu = relu(outer.inner/bn)")


# --- passes --------------------------------------------------------------------------------------------------------


def test_each_pass_of_prepare_tells_what_it_did() -> None:
    trace = pege_fx.trace_passes(Net(), "W4A4", (X,))
    assert [name.partition("(")[0] for name, _ in trace.steps] == [
        getattr(step, "__name__", type(step).__name__) for step in pege_fx.prepare_passes("W4A4")
    ]
    assert trace["normalize"].of_kind("replaced")[0].after.target == "conv2d"  # type: ignore[union-attr]
    added = {change.after.name for change in trace["FoldBatchNorm"].of_kind("added") if change.after}
    assert added == {"bn_1", "conv_weight_fold", "conv_bias_fold"}  # the fold of the bias reads which BatchNorm it follows
    inserted = {change.after.name for change in trace["InsertFakeQuants"].changes if change.after}
    assert {"conv_weight_fq", "x_fq"} <= inserted
    assert not trace["verify"]
    assert "analyse_signs" in str(trace)


def test_a_pass_of_one_s_own_is_traced_too() -> None:
    def rename(gm: GraphModule) -> None:
        named(gm, "relu").meta["note"] = "seen"

    passes = pege_fx.prepare_passes("W4A4")
    passes.insert(1, rename)
    trace = pege_fx.trace_passes(Net(), "W4A4", (X,), passes=passes)
    assert str(trace["rename"].changes[0]) == "* relu: note: seen"
    with pytest.raises(ModelError, match="no pass is called 'renam'; there are name_writes, rename"):
        trace["renam"]


# --- pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["svg", "png", "pdf"])
def test_a_picture_is_written(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    gm = pege_fx.prepare(Net(), "W4A4", (X,))
    path = tmp_path / f"diff.{ending}"
    diff(traced(), gm).draw(str(path))
    assert path.stat().st_size > 1000


def test_the_picture_holds_changed_nodes_and_their_neighbours() -> None:
    gm = pege_fx.prepare(Net(), "W4A4", (X,))
    found = diff(gm, pege_fx.convert(gm))
    kinds = dict(changed_region(found).nodes(data="kind"))
    assert kinds["-bn"] == "removed"
    assert kinds["conv_weight_codes"] == "added"
    assert kinds["conv"] == "same"
    assert ("-bn", "relu") in changed_region(found).edges
    assert set(changed_region(found, "bn", context=0)) == {"-bn"}


def test_what_can_not_be_drawn_is_said(tmp_path: Path) -> None:
    found = diff(traced(), pege_fx.prepare(Net(), "W4A4", (X,)))
    with pytest.raises(OutputError, match=r"the ending '.foo' says no format; known: .svg, .png, .pdf"):
        found.draw(str(tmp_path / "d.foo"))
    with pytest.raises(ModelError, match=r"selects none of .* changed nodes; closest: conv"):
        found.draw(str(tmp_path / "d.svg"), "convv")
    pytest.importorskip("matplotlib")
    with pytest.raises(OutputError, match="can not write"):
        found.draw(str(tmp_path / "none" / "d.svg"))


def test_parts_of_a_picture_lie_apart_and_not_in_one_endless_row() -> None:
    region: nx.DiGraph[str] = nx.DiGraph((f"{part}a", f"{part}b") for part in range(20))
    places = _places(region)
    assert set(places) == set(region)
    assert len(set(places.values())) == len(region)
    assert max(x for x, _ in places.values()) < 6
    assert all(places[target][1] == places[source][1] + 1 for source, target in region.edges)
