"""The table of operators: one entry serves every pass, and a user's operation needs nothing else."""

import operator
from collections.abc import Iterator
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
from pege_fx.passes.operators import FUNCTIONS, METHODS, OUT_OF_PLACE, RECOMPUTING, Operator, register

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
    tables: list[dict[Any, Any]] = [FUNCTIONS, METHODS, RECOMPUTING, OUT_OF_PLACE]
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
