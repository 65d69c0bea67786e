"""The plan: where each operation lies, which roles it has, what each edge gets, and why an edge or a module stays float."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, nn

import pege_fx
from pege_fx import PegeWarning, PolicyError, QuantPolicy, QuantSpec, Rule
from pege_fx.passes.plan import warn_if_nothing
from pege_fx.policy.plan import Edge, Operation, Plan
from pege_fx.testing import Case, networks

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
EVERYTHING = QuantPolicy((Rule(weight="4", input="4"),))
ROLES = QuantPolicy((Rule(weight="4", input="4"), Rule(role="first", weight="7"), Rule(role="last", input="8")))


torch.fx.wrap("whole")


def whole(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


class Model(nn.Module):
    """Whatever ``forward`` says, on a few layers."""

    def __init__(self, forward: Callable[..., Any], **children: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


def conv(inputs: int = 3, outputs: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def planned(model: nn.Module, policy: QuantPolicy = EVERYTHING, *inputs: Tensor) -> tuple[Operation, ...]:
    return pege_fx.explain(model, policy, inputs or (X,)).operations


def roles(model: nn.Module, *inputs: Tensor) -> tuple[set[str], set[str]]:
    """The paths of the first and of the last operations, as rules about roles find them."""
    found = planned(model, ROLES, *inputs)
    first = {op.path for op in found if any(edge.spec is not None and edge.spec.bits == 7 for edge in op.edges)}
    return first, {op.path for op in found if any(edge.spec is not None and edge.spec.bits == 8 for edge in op.edges)}


# --- paths ---------------------------------------------------------------------------------------------------------


def test_what_is_called_again_is_numbered_and_what_has_a_name_is_not() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.a(self.a(x))
        y: Tensor = F.conv2d(F.conv2d(F.conv2d(x, self.a.weight), self.a.weight), self.a.weight)
        return y

    found = planned(Model(forward, a=conv()))
    assert [op.path for op in found] == ["a", "a", "conv2d", "conv2d_1", "conv2d_2"]


def test_functions_lie_in_the_module_that_calls_them() -> None:
    inner = Model(lambda self, x: F.linear(x, self.lin.weight), lin=nn.Linear(8, 8))
    outer = Model(lambda self, x: F.linear(self.inner(self.inner(x)), self.inner.lin.weight), inner=inner)
    assert [op.path for op in planned(outer)] == ["inner.linear", "inner.linear_1", "linear"]


# --- roles ---------------------------------------------------------------------------------------------------------


def test_in_a_chain_the_ends_have_roles() -> None:
    assert roles(nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU(), conv())) == ({"0"}, {"4"})


def test_one_operation_is_first_and_last() -> None:
    assert roles(nn.Sequential(nn.ReLU(), conv(), nn.ReLU())) == ({"1"}, {"1"})


def test_branches_have_several_firsts_and_lasts() -> None:
    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x) + self.b(F.relu(x))
        return self.c(F.relu(y)), self.d(y)

    assert roles(Model(forward, a=conv(), b=conv(), c=conv(), d=conv())) == ({"a", "b"}, {"c", "d"})


def test_a_short_cut_around_it_makes_nothing_first() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.c(self.b(y) + y) + y  # type: ignore[no-any-return]

    assert roles(Model(forward, a=conv(), b=conv(), c=conv())) == ({"a"}, {"c"})


def test_products_without_weights_are_neither_first_nor_last_beside_weights() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.a(x @ x) @ x  # type: ignore[no-any-return]

    assert roles(Model(forward, a=conv())) == ({"a"}, {"a"})


def test_without_weights_products_have_roles() -> None:
    policy = QuantPolicy((Rule(input="4"), Rule(role="first", input="7"), Rule(role="last", input="8")))
    found = planned(Model(lambda self, x: (x @ x) @ (x @ x)), policy)
    assert [[edge.spec and edge.spec.bits for edge in op.edges] for op in found] == [[7, 7], [7, 7], [8, 8]]


def test_operations_on_one_weight_share_their_roles() -> None:
    """Tied embeddings: the first operation and the last one read one weight, which has one format."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return F.linear(self.mid(self.emb(x)), self.emb.weight)

    model = Model(forward, emb=nn.Embedding(5, 4), mid=nn.Linear(4, 4))
    policy = QuantPolicy((Rule(weight="4", input="4"), Rule(role="first", weight="6"), Rule(role="last", weight="8")))
    found = planned(model, policy, torch.randint(5, (2, 3)))
    assert [op.weights[0].spec and op.weights[0].spec.bits for op in found] == [8, 4, 8]


class Asks(nn.Module):
    """Stays Python, with two layers inside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x))
        return y if y.sum() > 0 else -y


def test_a_module_that_stays_python_stands_for_what_is_inside() -> None:
    with warnings.catch_warnings(action="ignore"):
        assert roles(nn.Sequential(Asks(), conv())) == ({"0.a"}, {"1"})
        assert roles(nn.Sequential(conv(), nn.Sequential(Asks(), nn.ReLU()))) == ({"0"}, {"1.0.b"})
        assert roles(nn.Sequential(conv(), Asks(), conv())) == ({"0"}, {"2"})


def test_a_model_that_stays_python_has_roles_in_its_own_order() -> None:
    with warnings.catch_warnings(action="ignore"):
        assert roles(Asks()) == ({"a"}, {"b"})


# --- edges ---------------------------------------------------------------------------------------------------------


def reasons(op: Operation) -> dict[str, str]:
    return {edge.operand: edge.reason for edge in op.edges}


def test_a_weight_that_is_computed_is_quantized_by_the_weights_rule_per_channel() -> None:
    model = Model(lambda self, x: F.linear(x, torch.tanh(self.a.weight)), a=nn.Linear(8, 5))
    (op,) = planned(model, QuantPolicy((Rule(weight="3", input="5"),)))
    weight, x = op.edge("weight"), op.edge("input")
    assert weight is not None
    assert x is not None
    assert (weight.source, weight.spec and weight.spec.bits, weight.elements) == ("tanh", 3, 40)
    assert weight.spec is not None
    assert weight.spec.granularity == "channel"
    assert x.spec is not None
    assert x.spec.bits == 5
    assert op.weights == (weight,)


def test_a_weight_of_whole_numbers_and_an_input_of_them_stay_as_they_are() -> None:
    model = Model(lambda self, x: F.linear(self.a(x).long(), self.whole), a=conv())
    model.register_buffer("whole", torch.ones(5, 8, dtype=torch.int64))
    assert reasons(planned(model)[1]) == {"weight": "its weight is torch.int64", "input": "long is torch.int64"}


def test_a_weight_without_channels_of_its_own_has_one_scale() -> None:
    model = Model(lambda self, x: x @ self.many + self.a(x).sum(), a=nn.Linear(8, 5))
    model.many = nn.Parameter(torch.ones(3, 8, 8))
    found = {op.path: op.weights[0].spec and op.weights[0].spec.granularity for op in planned(model)}
    assert found == {"matmul": "tensor", "a": "channel"}


def test_a_constant_of_the_code_is_no_edge() -> None:
    (op,) = planned(Model(lambda self, x: torch.matmul(x, torch.eye(8))))
    assert reasons(op)["input"] == ""
    policy = QuantPolicy((Rule(weight="4", input="4"), Rule(function="add", input="8")))
    found = planned(Model(lambda self, x: self.a(x) + 2.0, a=conv()), policy)
    assert [op.path for op in found] == ["a", "add"]
    assert [edge.operand for edge in found[1].edges] == ["input"]


def test_an_output_is_an_edge_where_a_rule_asks() -> None:
    (op,) = planned(nn.Sequential(conv(), nn.ReLU()), QuantPolicy((Rule(weight="4", input=None, output="6"),)))
    output = op.edge("output")
    assert output is not None
    assert (output.source, output.spec and output.spec.bits, output.spec and output.spec.signed) == ("_0", 6, True)
    assert [edge.operand for edge in op.edges] == ["weight", "input", "output"]
    assert all(edge.operand != "output" for (op,) in [planned(nn.Sequential(conv()))] for edge in op.edges)


def test_what_can_not_be_negative_is_unsigned_unless_the_rule_says_otherwise() -> None:
    model = nn.Sequential(conv(), nn.ReLU(), conv())
    signs = [edge.spec and edge.spec.signed for op in planned(model) for edge in op.inputs]
    assert signs == [True, False]
    signed = QuantPolicy((Rule(weight="4", input=QuantSpec(bits=4, signed=True)),))
    assert [edge.spec and edge.spec.signed for op in planned(model, signed) for edge in op.inputs] == [True, True]


def test_float_is_by_the_policy_or_for_want_of_a_rule() -> None:
    policy = QuantPolicy((Rule(match="0", weight="4"), Rule(match="1", weight=None, input=None)))
    first, second = planned(nn.Sequential(conv(), conv()), policy)
    assert reasons(first) == {"weight": "", "input": "no rule sets it"}
    assert reasons(second) == {"weight": "float by the policy", "input": "float by the policy"}
    assert [edge.rule for edge in first.edges] == ["rule 0: Rule(match='0', weight='4')", "no rule sets it"]


def test_schedule_groups_reach_every_edge() -> None:
    policy = QuantPolicy((Rule(weight="4", input="4"), Rule(match="1", schedule="late")))
    found = planned(nn.Sequential(conv(), conv()), policy)
    assert [{edge.group for edge in op.edges} for op in found] == [{"default"}, {"late"}]


# --- counts --------------------------------------------------------------------------------------------------------


def test_parameters_and_products_are_counted_by_operation() -> None:
    found = planned(nn.Sequential(conv(3, 5), nn.Flatten(), nn.Linear(320, 2, bias=False)))
    assert [(op.parameters, op.macs) for op in found] == [(5 * 27 + 5, 2 * 64 * 5 * 27), (640, 2 * 640)]
    assert [edge.elements for op in found for edge in op.edges] == [135, 0, 640, 0]
    assert [op.macs for op in pege_fx.explain(nn.Sequential(conv()), EVERYTHING).operations] == [None]


def test_the_parameters_of_a_sum_are_its_own() -> None:
    model = Model(lambda self, x: self.a(x) + self.shift)
    model.a, model.shift = conv(), nn.Parameter(torch.zeros(3, 8, 8))
    policy = QuantPolicy((Rule(weight="4", input="4"), Rule(function="add", input="8")))
    found = planned(model, policy)
    assert [(op.path, op.parameters, op.macs) for op in found[1:]] == [("add", 3 * 64, 0)]


# --- what stays float, whole -----------------------------------------------------------------------------------------


def test_a_module_with_a_matrix_that_is_no_operation_is_listed_with_the_reason() -> None:
    found = planned(nn.Sequential(conv(), nn.LayerNorm((8, 8)), nn.PReLU(3)))  # a vector is no weight to quantize
    assert [(op.path, op.parameters, op.edges) for op in found[1:]] == [("1", 128, ())]
    assert found[1].reason == "LayerNorm is not among the operations that are quantized"


def test_a_python_module_with_a_weight_of_its_own_is_counted_without_its_children() -> None:
    class Own(Asks):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.table.sum()

    with warnings.catch_warnings(action="ignore"):
        found = {op.path: op for op in planned(nn.Sequential(conv(), Own()))}
    assert sorted(found) == ["0", "1", "1.a", "1.b"]
    assert found["1"].parameters == 16
    assert found["1"].edges == ()
    assert "if asks for the value of `y.sum() > 0`" in found["1"].reason


def test_wrapped_functions_with_weights_are_listed_without_examples() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return whole(x, self.a.weight)

    with warnings.catch_warnings(action="ignore"):
        (op,) = pege_fx.explain(Wrapped(), EVERYTHING).operations
    assert (op.path, op.function, op.parameters, op.edges) == ("whole", "whole", 40, ())
    assert op.reason == "torch.fx.wrap keeps the function whole: give example_inputs to look inside"


# --- warnings and errors ---------------------------------------------------------------------------------------------


def test_nothing_quantized_is_worth_a_warning_with_every_reason() -> None:
    with pytest.warns(PegeWarning) as caught:
        pege_fx.prepare(nn.Sequential(conv(), conv()), QuantPolicy((Rule(weight=None, input=None),)), (X,))
    (text,) = [str(warning.message) for warning in caught]
    assert text.splitlines() == [
        "nothing is quantized:",
        "  0: float by the policy; float by the policy",
        "  1: float by the policy; float by the policy",
    ]


def test_the_warning_names_nodes_where_there_is_no_path_and_says_if_there_is_nothing() -> None:
    edge = Edge("weight", "w", None, "rule", "whole numbers")
    plan = Plan("Net", EVERYTHING, (Operation("matmul", "", "matmul", (edge,)), Operation("n", "p", "f", reason="unknown")))
    with pytest.warns(PegeWarning, match="nothing is quantized:\n  matmul: whole numbers\n  p: unknown"):
        warn_if_nothing(plan)
    with pytest.warns(PegeWarning, match="the graph has no convolution, linear, embedding or matrix product"):
        warn_if_nothing(Plan("Net", EVERYTHING, ()))
    quantized = Edge("weight", "w", QuantSpec(bits=4), "rule")
    warn_if_nothing(Plan("Net", EVERYTHING, (Operation("n", "p", "f", (edge, quantized)),)))


def test_a_rule_for_nothing_is_an_error_unless_there_is_nothing_at_all() -> None:
    with pytest.raises(PolicyError, match="decides for none"):
        planned(nn.Sequential(conv()), QuantPolicy((Rule(weight="4"), Rule(match="7", weight="2"))))
    with warnings.catch_warnings(action="ignore"):
        assert planned(nn.Sequential(nn.ReLU()), QuantPolicy((Rule(match="7", weight="2"),))) == ()


# --- what is made again in backward --------------------------------------------------------------------------------


def remade(forward: Callable[..., Any], **fields: Any) -> dict[str, bool]:
    policy = QuantPolicy((Rule(weight="4", input="4"), Rule(**{"recompute": True} | fields)))
    (op,) = planned(Model(forward, head=nn.Linear(8, 8)), policy)
    return {edge.operand: edge.recompute for edge in op.edges}


def test_quantized_operands_are_made_again_where_the_operation_can_do_it() -> None:
    assert remade(lambda self, x: self.head(x)) == {"weight": True, "input": True}
    assert remade(lambda self, x: self.head(x), recompute=False) == {"weight": False, "input": False}
    assert remade(lambda self, x: self.head(x), weight=None) == {"weight": False, "input": True}
    assert remade(lambda self, x: x @ self.head.weight.t()) == {"input": True, "other": False}
    (add,) = planned(
        Model(lambda _, x: torch.add(x, x.relu())), QuantPolicy((Rule(function="add", input="4", recompute=True),))
    )
    assert [edge.recompute for edge in add.edges] == [False, False]


# --- classes -------------------------------------------------------------------------------------------------------


class Block(nn.Sequential):
    """A class that a rule may name."""


@pytest.mark.parametrize(
    ("cls", "found"), [(Block, [None, 2, 2, 2]), (nn.Linear, [None, 2, None, 2]), ("Block", [None, 2, 2, 2])]
)
def test_rules_by_class_reach_what_lies_in_modules_of_the_class(cls: Any, found: list[int | None]) -> None:
    inner = Model(lambda self, x: F.linear(self.lin(x), self.w), lin=nn.Linear(8, 8))
    inner.w = nn.Parameter(torch.ones(8, 8))
    model = nn.Sequential(conv(), Block(nn.Linear(8, 8), nn.Sequential(inner)))
    operations = planned(model, QuantPolicy((Rule(module=cls, weight="2"),)))
    names = {op.path: op.weights[0].spec and op.weights[0].spec.bits for op in operations}
    assert names == dict(zip(["0", "1.0", "1.1.0.linear", "1.1.0.lin"], found, strict=True))


def test_a_module_known_by_two_names_answers_to_both() -> None:
    shared = nn.Linear(8, 8)
    model = Model(lambda self, x: self.a(self.b(x)), a=shared, b=Block(shared))
    assert all(op.weights[0].spec for op in planned(model, QuantPolicy((Rule(module=nn.Linear, weight="2"),))))


@given(networks())
def test_whatever_has_weights_has_a_first_and_a_last(case: Case) -> None:
    explained = pege_fx.explain(case.network, EVERYTHING, case.inputs)
    first, last = roles(case.network, *case.inputs) if any(op.weights for op in explained.operations) else ({""}, {""})
    assert first
    assert last
