"""Ranks: what examples show is noted, what an operation promises is true, the rest stays unknown."""

import copy
import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node, symbolic_trace
from torch.fx.immutable_collections import immutable_dict, immutable_list

import pege_fx
from pege_fx import InputError
from pege_fx.passes import infer_ranks, normalize, run
from pege_fx.passes.capture.shapes import record_shapes
from pege_fx.passes.capture.tiers import capture
from pege_fx.passes.graph import plain, rank_of
from pege_fx.testing import Case, networks


class Checked(Interpreter):
    """Holds every inferred rank against the value."""

    known = 0

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and rank_of(n) is not None:
            assert value.ndim == rank_of(n), f"{n} has {value.ndim} dimensions, not {rank_of(n)}"
            self.known += 1
        return value


@given(networks())
def test_what_is_inferred_without_examples_is_true(case: Case) -> None:
    gm = capture(case.network).root
    run(gm, [normalize, infer_ranks])
    Checked(gm).run(*case.inputs)


class Flat(nn.Module):
    """Every way to say how many dimensions there are."""

    def __init__(self) -> None:
        super().__init__()
        self.bn2, self.bn3, self.flatten = nn.BatchNorm2d(3), nn.BatchNorm3d(3), nn.Flatten()
        self.fc, self.act, self.bn1, self.odd = nn.Linear(48, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Flatten(2)

    def forward(self, x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        a = self.bn1(self.act(self.fc(self.flatten(self.bn2(x)))))
        b = F.linear(torch.flatten(x, 1), self.fc.weight)
        c = x.flatten(start_dim=1)
        return a, b, c, self.bn3(v), self.odd(x), torch.flatten(x), x.flatten(1, 2)


def test_flattening_and_norms_tell_how_many_dimensions_there_are() -> None:
    gm = symbolic_trace(Flat())
    run(gm, [normalize, infer_ranks])
    checked = Checked(gm)
    checked.run(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 2, 2, 2))
    assert checked.known == 9
    (output,) = gm.graph.find_nodes(op="output")
    assert [rank_of(node) for node in output.all_input_nodes] == [2, 2, 2, 5, None, None, None]


def test_examples_say_shape_and_dtype_of_every_tensor_and_move_nothing() -> None:
    gm = symbolic_trace(nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), nn.Flatten()))
    gm.get_submodule("0").eval()
    modes, state = [m.training for m in gm.modules()], copy.deepcopy(gm.state_dict())
    record_shapes(gm, (torch.randn(2, 3, 4, 4),), {})
    assert {(node.meta["rank"], node.meta["shape"], node.meta["dtype"]) for node in gm.graph.nodes if node.op != "output"} == {
        (4, (2, 3, 4, 4), torch.float32),
        (2, (2, 48), torch.float32),
    }
    assert [m.training for m in gm.modules()] == modes
    assert all(torch.equal(value, gm.state_dict()[name]) for name, value in state.items())


def test_an_example_wins_over_a_promise() -> None:
    gm = symbolic_trace(nn.Sequential(nn.BatchNorm2d(3)))
    for node in gm.graph.nodes:
        node.meta["rank"] = 7
    infer_ranks(gm)
    assert {rank_of(node) for node in gm.graph.nodes} == {7}


def test_what_is_known_of_one_node_is_no_reason_to_ask_no_more() -> None:
    gm = symbolic_trace(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    next(iter(gm.graph.nodes)).meta["rank"] = 4
    infer_ranks(gm)
    assert [rank_of(node) for node in gm.graph.nodes] == [4, 4, 4, None]


def test_flattening_by_keyword_alone_is_not_known() -> None:
    gm = GraphModule(nn.Module(), Graph())
    flat = gm.graph.call_function(torch.flatten, (), {"input": gm.graph.placeholder("x")})
    infer_ranks(gm)
    assert rank_of(flat) is None


def test_graphs_inside_are_noted_and_left_as_they_were() -> None:
    inner, gm = symbolic_trace(nn.Sequential(nn.Linear(4, 2))), GraphModule(nn.Module(), Graph())
    gm.add_module("inner", inner)
    gm.graph.output(gm.graph.call_module("inner", (gm.graph.placeholder("x"),)))
    record_shapes(gm, (torch.zeros(3, 4),), {}, [gm, inner])
    assert [node.meta.get("shape") for node in inner.graph.nodes] == [(3, 4), (3, 2), (3, 2)]
    assert "forward" not in vars(inner)


def test_inputs_that_fail_show_their_shapes_and_the_modes_come_back() -> None:
    gm = symbolic_trace(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(InputError, match=r"fails on the example inputs \[\(2, 3\)\], in 0: RuntimeError"):
        record_shapes(gm, (torch.randn(2, 3),), {})
    assert all(module.training for module in gm.modules())


def fill(x: Tensor, y: Tensor) -> Tensor:
    x.fill_(1.0)
    return y


def test_what_unknown_code_writes_to_is_noted() -> None:
    gm = GraphModule(nn.Module(), Graph())
    x, y = gm.graph.placeholder("x"), gm.graph.placeholder("y")
    call = gm.graph.call_function(fill, (x, y))
    gm.graph.output(call)
    record_shapes(gm, (torch.zeros(2), torch.zeros(3)), {})
    assert call.meta["writes"] == [x]
    assert call.meta["shape"] == (3,)


def test_an_error_says_in_which_module_a_function_failed_and_what_was_given() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor, factor: int) -> Tensor:
            return torch.matmul(x, x) * factor

    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fails = Fails()

        def forward(self, x: Tensor, factor: int) -> Tensor:
            out: Tensor = self.fails(x, factor)
            return out

    gm = symbolic_trace(Holds())
    with pytest.raises(InputError, match=r"inputs \[\(2, 3\), 'int'\], in fails: RuntimeError"):
        record_shapes(gm, (torch.zeros(2, 3), 4), {})


def test_any_number_of_arguments_is_an_example() -> None:
    class Many(nn.Module):
        def forward(self, x: Tensor, *more: Tensor, **named: Tensor) -> Tensor:
            return more[0] * named["last"] + x

    gm = symbolic_trace(Many())
    record_shapes(gm, (torch.zeros(2, 1), torch.zeros(3)), {"last": torch.zeros(4, 2, 3)})
    (output,) = gm.graph.find_nodes(op="output")
    assert output.all_input_nodes[0].meta["shape"] == (4, 2, 3)


def test_arguments_that_only_go_by_keyword_are_examples_too() -> None:
    class ByKeyword(nn.Module):
        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            return x * scale

    gm: GraphModule = symbolic_trace(ByKeyword())
    record_shapes(gm, (torch.randn(2),), {"scale": 2.0})
    (product,) = gm.graph.find_nodes(op="call_function", target=operator.mul)
    assert rank_of(product) == 1


@pytest.mark.parametrize(("shape", "rank"), [((3, 4), 4), ((4,), None)])
def test_a_linear_layer_keeps_the_rank_if_its_weight_is_a_matrix(shape: tuple[int, ...], rank: int | None) -> None:
    """``F.linear`` takes a vector for a weight too, and its result has one dimension less."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.weight = nn.BatchNorm2d(2), nn.Parameter(torch.ones(shape))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.norm(x), self.weight)

    gm = symbolic_trace(Linear())
    infer_ranks(gm)
    (node,) = gm.graph.find_nodes(op="call_function", target=F.linear)
    assert rank_of(node) == rank


def test_what_is_no_node_has_no_rank() -> None:
    assert rank_of(3) is None


class Named(dict[str, Any]):
    """A dictionary with attributes, as results by name are."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Named:
        return Named(hidden=self.fc(x)) if x.isfinite().all() else Named(hidden=x)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.fc = Inner(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc(self.inner(x).hidden)
        return found


def test_a_result_by_name_keeps_its_class_between_graphs() -> None:
    x = torch.randn(3, 4)
    with pytest.warns(pege_fx.PegeWarning, match="stays Python"):
        gm = pege_fx.prepare(Outer(), "W4A4", (x,))
    assert gm(x).shape == (3, 2)
    assert type(plain(Named(hidden=[x]))) is Named
    assert type(plain(immutable_dict({"a": immutable_list([x])}))["a"]) is list


class Flagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        x = self.norm(self.fc(x))
        return x + x if twice else x


class Steered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flagged = Flagged()

    def forward(self, x: Tensor) -> Tensor:
        return self.flagged(x, True) if x.isfinite().all() else x


@pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
def test_an_example_that_training_does_not_take_is_an_example_of_evaluation() -> None:
    x = torch.randn(1, 4)  # of which a BatchNorm in training makes an error
    assert pege_fx.prepare(Steered(), "W4A4", (x,)).eval()(x).shape == (1, 4)
