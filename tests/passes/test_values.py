"""Values: whose memory a tensor lies in, what is a number, what no input decides."""

import math
import operator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

from pege_fx.passes.graph import first_argument
from pege_fx.passes.values import computed, constants_of, is_seen_elsewhere, makers, tensors_of


class Chain(nn.Module):
    """Makes a tensor, looks at it in three ways, and works in place on the last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.flat = nn.Conv1d(2, 3, 1), nn.Flatten()

    def forward(self, x: Tensor) -> Any:
        return self.flat(self.conv(x)).view(-1)[1:].add_(1)


def names(nodes: Any) -> set[str]:
    return {node.name for node in nodes}


def test_memory_is_followed_through_modules_methods_and_functions_to_where_it_is_made() -> None:
    gm = symbolic_trace(Chain())
    last = next(node for node in gm.graph.nodes if node.op == "output").args[0]
    walked = [(node.name, anew) for node, anew in makers(gm, last)]
    assert walked == [("add_", False), ("getitem", False), ("view", False), ("flat", False), ("conv", True)]
    assert [(node.name, anew) for node, anew in makers(gm, next(iter(gm.graph.nodes)))] == [("x", False)]
    assert list(makers(gm, 3)) == []


class Shared(nn.Module):
    """Works in place on what ``how`` reads, too."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.drop = how, nn.Dropout()

    def forward(self, x: Tensor) -> Any:
        if self.how == "input":
            return x.add_(1)
        y = torch.relu(x)
        if self.how == "view":
            return y.view(-1).add_(1).sum() + y.view(-1)[0]
        if self.how == "dropout":
            return self.drop(y).add_(1)
        if self.how == "dropout and its input":
            return self.drop(y).add_(1), self.drop(y)
        return y.add_(y.size(0)), torch.sigmoid(y)


@pytest.mark.parametrize(
    ("how", "seen"),
    [("input", True), ("view", True), ("dropout", False), ("dropout and its input", True), ("size and copy", False)],
)
def test_what_is_done_in_place_is_seen_by_whoever_looks_into_the_same_memory(how: str, seen: bool) -> None:
    gm = symbolic_trace(Shared(how))
    (node,) = gm.graph.find_nodes(op="call_method", target="add_")
    assert is_seen_elsewhere(gm, node) is seen


class Numbers(nn.Module):
    """Sizes, what arithmetic makes of them, and tensors that arithmetic makes with them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Any:
        size = operator.mul(x.size(0), 2)
        root = math.sqrt(size)
        value = x.sum().item()
        return x * size + self.weight * root + value


def test_what_is_made_of_sizes_alone_is_a_number() -> None:
    gm = symbolic_trace(Numbers())
    tensors = names(tensors_of(gm))
    everything = names(gm.graph.nodes)
    assert everything - tensors == {"size", "mul", "sqrt", "item"}


def test_example_inputs_decide_what_is_a_tensor() -> None:
    gm = symbolic_trace(Numbers())
    for node in gm.graph.nodes:
        if node.op not in ("output", "get_attr"):
            node.meta["op"] = node.name
    add = next(node for node in gm.graph.nodes if node.name == "add")
    add.meta["dtype"] = torch.float32
    assert names(tensors_of(gm)) == {"add", "weight", "output"}
    size = next(node for node in gm.graph.nodes if node.name == "size")
    size.meta["dtype"] = torch.int64  # as recorded, whatever its name says
    assert names(tensors_of(gm)) == {"add", "size", "weight", "output"}


class Weights(nn.Module):
    """A weight as it is computed; what is drawn, changed or asked of an input is none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.changed = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Any:
        scaled = self.norm(self.weight.abs() * 2)
        noise = torch.rand_like(self.weight)
        dropped = torch.bernoulli(self.weight)
        return x @ scaled + noise + dropped + self.changed.add_(1)


def test_constants_are_what_no_input_decides_and_nobody_changes() -> None:
    model = Weights()
    gm = symbolic_trace(model)
    assert names(constants_of(gm)) == {"weight", "abs_1", "mul", "norm"}


def test_a_constant_is_computed_without_the_rest_of_the_graph() -> None:
    model = Weights()
    gm = GraphModule(model, symbolic_trace(model).graph)
    (product,) = gm.graph.find_nodes(op="call_function", target=operator.matmul)
    before = model.changed.clone()
    value = computed(gm, product.args[1])
    assert torch.equal(value, model.norm(model.weight.abs() * 2))
    assert torch.equal(model.changed, before)
    assert first_argument(product).op == "placeholder"
