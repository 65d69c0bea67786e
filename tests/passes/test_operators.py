"""The table of operators: one entry serves every pass, and a user's operation needs nothing else."""

import ast
import dataclasses
import operator
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pege_fx
from pege_fx import ModelError
from pege_fx.numerics.spec import Channels
from pege_fx.passes import operators
from pege_fx.passes.op_traits import TRAITS, OpTraits, traits_of_target
from pege_fx.passes.operators import FUNCTIONS, METHODS, MODULES, OUT_OF_PLACE, RECOMPUTING, Operator, register

ROOT = Path(__file__).parents[2]


@torch.fx.wrap
def gated_linear(input: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    return F.linear(input, weight) * torch.sigmoid(gate)


GATED = Operator(
    name="gated_linear",
    functions=(gated_linear,),
    parameters=("input", "weight", "gate"),
    inputs=("input",),
    weights=("weight",),
    channels=lambda name, weight, groups: Channels(weight.shape[0]),
    products=lambda result, given: result[0] * result[-1] * given["weight"][1],
)


@pytest.fixture
def gated() -> Iterator[Operator]:
    """The operator, known for the length of a test."""
    tables: list[dict[Any, Any]] = [FUNCTIONS, METHODS, RECOMPUTING, OUT_OF_PLACE, MODULES, TRAITS]
    before = [dict(table) for table in tables]
    register(GATED)
    yield GATED
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 4)
        self.weight = nn.Parameter(torch.randn(8, 4))
        self.gate = nn.Parameter(torch.zeros(8))
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(gated_linear(torch.relu(self.first(x)), self.weight, self.gate)))


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def test_an_operator_of_a_user_is_planned_priced_trained_converted_and_stored(gated: Operator, tmp_path: Path) -> None:
    gm = pege_fx.prepare(Gated(), "W4A4", (X,))
    (operation,) = [op for op in pege_fx.plan_of(gm).operations if op.function == "gated_linear"]
    assert {edge.operand: str(edge.spec) for edge in operation.edges} == {"weight": "4", "input": "4"}
    assert operation.macs == 5 * 8 * 4
    assert pege_fx.fake_quants(gm)["weight_fq"].method.channels == Channels(8)
    gm(X).sum().backward()
    deployed = pege_fx.convert(gm)
    assert torch.equal(deployed(X), gm.eval()(X))
    pege_fx.save_deployed(deployed, tmp_path / "deployed")
    assert torch.equal(pege_fx.load_deployed(tmp_path / "deployed")(X), deployed(X))


@torch.fx.wrap
def squared_linear(input: Tensor, weight: Tensor) -> Tensor:
    return F.linear(input, weight).square()


class SquaredLinear(nn.Linear):
    """A layer of a user, which ``Operator.module`` names."""

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = squared_linear(input, self.weight)
        return result


def test_an_entry_says_the_layer_and_the_traits_of_an_operation_too(gated: Operator) -> None:
    linear = FUNCTIONS[F.linear]
    traits = OpTraits(view=False, writes=False, random=False, non_negative=True)
    named = {"name": "squared_linear", "functions": (squared_linear,), "module": SquaredLinear}
    register(dataclasses.replace(linear, **named, parameters=("input", "weight"), traits=traits, recomputes=False))
    gm = pege_fx.prepare(nn.Sequential(SquaredLinear(6, 4, bias=False), nn.Linear(4, 2)), "W4A4", (X,))
    plan = pege_fx.plan_of(gm)
    assert [op.function for op in plan.operations] == ["squared_linear", "linear"]
    (edge,) = [edge for edge in plan.operations[1].edges if edge.operand == "input"]
    assert edge.spec is not None
    assert not edge.spec.signed, "the table says that it is never negative"
    assert traits_of_target(squared_linear) == traits


def test_a_file_does_not_reach_a_function_that_nobody_registered(gated: Operator, tmp_path: Path) -> None:
    deployed = pege_fx.convert(pege_fx.prepare(Gated(), "W4A4", (X,)))
    pege_fx.save_deployed(deployed, tmp_path / "deployed")
    del FUNCTIONS[gated_linear]
    with pytest.raises(pege_fx.CheckpointError, match="gated_linear"):
        pege_fx.load_deployed(tmp_path / "deployed")


@pytest.mark.parametrize("taken", [{"name": "linear"}, {"functions": (F.linear,)}, {"methods": ("matmul",)}], ids=str)
def test_what_is_there_already_is_refused(taken: dict[str, Any]) -> None:
    given = {"name": "mine", "functions": (), "parameters": ("input",), "inputs": ("input",), "products": lambda *_: 0}
    tables = [dict(table) for table in (FUNCTIONS, METHODS)]
    with pytest.raises(ModelError, match="is there already"):
        register(Operator(**(given | taken)))
    assert tables == [FUNCTIONS, METHODS]


def test_every_way_to_write_an_operation_is_the_same_entry() -> None:
    assert FUNCTIONS[operator.matmul] is FUNCTIONS[torch.matmul] is METHODS["matmul"] is METHODS["__matmul__"]
    assert FUNCTIONS[operator.iadd] is FUNCTIONS[torch.add] is METHODS["add_"]
    assert OUT_OF_PLACE[operator.iadd] is operator.add
    assert OUT_OF_PLACE["mul_"] == "mul"
    assert FUNCTIONS[RECOMPUTING["matmul"]] is FUNCTIONS[torch.matmul]
    assert operator.imul not in RECOMPUTING


@pytest.mark.parametrize("name", sorted({entry.name for entry in operators.operators()}))
def test_no_pass_knows_an_operator_by_name(name: str) -> None:
    """One fact, one place: only the table, and traits of what is called so, may say an operator's name in quotes."""
    files = [path for path in (ROOT / "passes").rglob("*.py") if path.name not in ("operators.py", "op_traits.py")]
    files += (ROOT / "pege_fx" / "engines").rglob("*.py")
    unique = name.startswith("conv") or name in ("baddbmm", "embedding_bag")  # others are words of other things too
    assert not unique or [path.name for path in files if f'"{name}"' in path.read_text()] == []


@cache
def _names_not_called() -> dict[str, set[str]]:
    """For every file, the functions and classes of torch that it names without calling them there."""
    found = {}
    for path in [*(ROOT / "passes").rglob("*.py"), *(ROOT / "pege_fx").rglob("*.py")]:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
        named = [node for node in nodes if isinstance(node, ast.Attribute) and id(node) not in called]
        owners = ("F", "torch", "nn", "nn.functional")
        name = path.relative_to(ROOT).as_posix().removeprefix("pege_fx/passes/")
        found[name] = {node.attr for node in named if ast.unparse(node.value) in owners}
    return found


def _files_that_know(entry: Operator) -> set[str]:
    """The files with a table entry or a comparison for an operation: its functions, named and not called there."""
    functions = {function.__name__ for function in entry.functions} | {entry.module.__name__ if entry.module else ""}
    return {name for name, named in _names_not_called().items() if named & functions}


@pytest.mark.parametrize("entry", [e for e in operators.operators() if not e.on_request], ids=lambda entry: entry.name)
def test_one_more_operator_is_two_places(entry: Operator) -> None:
    """One fact, one place: the table, and what writes a file. Networks for tests and layers written out use operations."""
    folders = ("pege_fx/export/", "pege_fx/testing/", "pege_fx/decompositions/")
    known = {name for name in _files_that_know(entry) if not name.startswith(folders)}
    assert known <= {"passes/operators.py"}
