"""Running passes: in order, every graph before the next pass, linted and recompiled; an error names its pass."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, Node, symbolic_trace

import pege_fx
from pege_fx.passes import Pipeline, run


def graph() -> GraphModule:
    return symbolic_trace(lambda x: torch.neg(x) + 1)


def negated(gm: GraphModule) -> Node:
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.neg)
    return node


@dataclass(frozen=True)
class Replace:
    """Compute something else."""

    function: str = "abs"

    def __call__(self, gm: GraphModule) -> None:
        negated(gm).target = getattr(torch, self.function)


def test_every_graph_sees_a_pass_before_the_next_one_begins() -> None:
    seen: list[tuple[str, int]] = []
    graphs = [graph(), graph()]
    run(graphs, [lambda gm: seen.append(("a", graphs.index(gm))), lambda gm: seen.append(("b", graphs.index(gm)))])
    assert seen == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def test_what_a_pass_changes_is_compiled_before_the_next_one() -> None:
    gm = graph()
    seen: list[float] = []
    run(gm, [Replace(), lambda gm: seen.append(float(gm(torch.tensor(-2.0))))])
    assert seen == [3.0]


def test_a_pass_of_one_s_own_runs_what_was_traced_and_what_ours_made_of_it() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4)
    expected, seen = model(x), []
    first, *others = pege_fx.prepare_passes("W4A4")
    pege_fx.prepare(model, "W4A4", passes=[lambda gm: seen.append(gm(x)), first, lambda gm: seen.append(gm(x)), *others])
    assert all(torch.equal(y, expected) for y in seen)
    assert len(seen) == 2


def test_a_pass_that_breaks_the_graph_is_named_and_the_next_does_not_run() -> None:
    def tear(gm: GraphModule) -> None:
        node = negated(gm)
        next(iter(node.users)).append(node)  # used before it is made

    with pytest.raises(RuntimeError) as caught:
        run(graph(), [tear, lambda gm: pytest.fail("ran on a broken graph")])
    assert caught.value.__notes__ == ["in pass tear"]


def test_a_pass_that_raises_is_named_with_its_options() -> None:
    with pytest.raises(AttributeError) as caught:
        run(graph(), [Replace("no such function")])
    assert caught.value.__notes__ == ["in pass Replace(function='no such function')"]


def test_a_pipeline_is_a_list_that_prints() -> None:
    pipeline = Pipeline([Replace(), print])
    assert str(pipeline).splitlines()[0] == "1. Replace(function='abs'): Compute something else."
    assert str(pipeline).splitlines()[1].startswith("2. print: ")
    pipeline.insert(0, Replace("exp"))
    assert str(pipeline).startswith("1. Replace(function='exp'): ")


def test_the_pipelines_of_the_front_door_are_new_lists_each_time() -> None:
    pege_fx.prepare_passes("W4A4").clear()
    pege_fx.convert_passes().clear()
    assert len(pege_fx.prepare_passes("W4A4")) == 9
    assert len(pege_fx.convert_passes()) == 8
    assert all(": " in line for line in str(pege_fx.prepare_passes("W4A4")).splitlines())


def test_only_the_first_line_of_a_description_is_shown() -> None:
    def two_lines(gm: GraphModule) -> None:
        """Do something.

        And explain it.
        """

    assert str(Pipeline([two_lines, lambda gm: None])) == "1. two_lines: Do something.\n2. <lambda>: "


def test_the_result_is_compiled() -> None:
    graphs = [graph(), graph()]
    run(graphs, [Replace()])
    for gm in graphs:
        assert "torch.abs" in gm.code
        assert gm(torch.tensor(-2.0)) == 3


def test_a_pass_of_one_s_own_is_blamed_although_ours_follows() -> None:
    def tear(gm: GraphModule) -> None:
        node = negated(gm)
        next(iter(node.users)).append(node)  # used before it is made

    with pytest.raises(RuntimeError) as found:
        run(graph(), [tear, pege_fx.passes.infer_ranks])
    assert found.value.__notes__ == ["in pass tear"]


def test_our_own_passes_are_not_linted_between(monkeypatch: pytest.MonkeyPatch) -> None:
    linted: list[str] = []
    monkeypatch.setattr(torch.fx.Graph, "lint", lambda self: linted.append("lint"))
    run(graph(), [pege_fx.passes.infer_ranks, pege_fx.passes.infer_ranks])
    assert len(linted) == 1
    run(graph(), [lambda gm: None, pege_fx.passes.infer_ranks, lambda gm: None])
    assert len(linted) == 4
