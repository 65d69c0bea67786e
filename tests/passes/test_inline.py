"""Inlining: functions for modules, bit for bit, and nothing that evaluation skips."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Tracer, symbolic_trace

from pege_fx.modules.mode import TrainingMode
from pege_fx.passes import inline_modules, run


def called(gm: GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.find_nodes(op="call_module")]


def with_rank(model: nn.Module, rank: int | None) -> GraphModule:
    gm = symbolic_trace(model.eval())
    for node in gm.graph.nodes:
        node.meta["rank"] = rank
    return gm


def norms(kind: str, d: int) -> nn.Module:
    options = {"affine": True, "track_running_stats": True} if kind == "InstanceNorm" else {}
    norm: nn.Module = getattr(nn, f"{kind}{d}d")(3, eps=1e-2, **options)
    for value in (*norm.parameters(), norm.get_buffer("running_mean"), norm.get_buffer("running_var")):
        nn.init.uniform_(value)
    return norm


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("kind", ["BatchNorm", "InstanceNorm"])
def test_a_norm_is_its_function_on_its_own_tensors(kind: str, d: int) -> None:
    model, x = nn.Sequential(norms(kind, d)), torch.randn(2, 3, *[4] * d)
    gm = with_rank(model, d + 2)
    expected = model(x)
    run(gm, [inline_modules])
    assert not called(gm)
    assert torch.equal(gm(x), expected)
    reads = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    assert reads == {"0.weight", "0.bias", "0.running_mean", "0.running_var"}


@pytest.mark.parametrize("make", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_a_norm_without_statistics_takes_those_of_its_input(make: Callable[..., nn.Module]) -> None:
    model, x = nn.Sequential(make(3, track_running_stats=False)), torch.randn(2, 3, 5)
    gm = with_rank(model, 3)
    run(gm, [inline_modules])
    assert not called(gm)
    assert torch.equal(gm(x), model(x))


@pytest.mark.parametrize("rank", [2, None])
def test_an_instance_norm_that_may_get_no_batch_stays(rank: int | None) -> None:
    gm = with_rank(nn.Sequential(nn.InstanceNorm1d(3)), rank)
    run(gm, [inline_modules])
    assert called(gm) == ["0"]


class Other(nn.ReLU):
    """Of no module of torch."""


class Kept(nn.Module):
    """Calls what is torch's own, what has a hook, and what is not torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.hooked, self.other = nn.ReLU(), nn.ReLU(), Other()
        self.hooked.register_forward_hook(lambda module, args, result: result + 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.other(self.hooked(self.own(x)))
        return out


class Leaves(Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def test_hooks_and_other_code_stay() -> None:
    model = Kept()
    gm = GraphModule(model, Leaves().trace(model))
    run(gm, [inline_modules])
    assert called(gm) == ["hooked", "other"]


def test_what_drops_nothing_in_evaluation_is_gone() -> None:
    """Dropout and stochastic depth, as they are called by position and by name; the rest stays."""
    graph, depth = Graph(), torchvision.ops.stochastic_depth
    x = graph.placeholder("x")
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (F.dropout, (0.5, False), {}),
        (depth, (0.5, "row", False), {}),
        (depth, (0.5, "row"), {"training": False}),
        (depth, (0.5, "row"), {}),
        (depth, (0.5,), {"mode": "row", "training": True}),
        (F.dropout, (0.5, True), {}),
        (torch.topk, (1, -1, False), {}),
    ]
    for function, args, kwargs in calls:
        x = graph.call_function(function, (x, *args), kwargs)
    graph.output(x)
    gm = GraphModule(nn.Module(), graph)
    run(gm, [inline_modules])
    kept = [(node.target, node.args[1:], node.kwargs) for node in gm.graph.nodes if node.op == "call_function"]
    assert kept == calls[3:]


def test_the_mode_is_that_of_evaluation() -> None:
    graph = Graph()
    x, mode = graph.placeholder("x"), graph.call_module("mode")
    graph.output((graph.call_function(F.dropout, (x, 0.5, mode)), mode))
    gm = GraphModule({"mode": TrainingMode()}, graph)
    run(gm, [inline_modules])
    assert [str(node.args) for node in gm.graph.nodes if node.op == "output"] == ["((x, False),)"]
