"""The context of passes: what they leave for each other has a place and a type."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, symbolic_trace

import pege_fx
from pege_fx.passes import CaptureModel, FoldBatchNorm, Program, apply, complete_plan, infer_ranks, normalize, of_program, run
from pege_fx.passes.program import GraphNotes, NodeNotes, Verdict, warn

ROOT = Path(__file__).parents[2]
OF_TORCH = {"stack_trace", "nn_module_stack", "val"}


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))


X = torch.zeros(1, 3, 8, 8)


def test_every_key_of_meta_is_declared() -> None:
    used = set()
    for path in [*(ROOT / "passes").rglob("*.py"), *(ROOT / "pege_fx").rglob("*.py")]:
        used |= set(re.findall(r"""\.meta(?:\.\w+\(|\[)["'](\w+)["']""", path.read_text()))
    assert used - OF_TORCH == NodeNotes.__annotations__.keys() | GraphNotes.__annotations__.keys()


def test_what_passes_leave_for_each_other_is_in_the_program_and_not_on_the_graphs() -> None:
    program = Program(model=net(), example=((X,), {}))
    run(program, [CaptureModel(), *pege_fx.prepare_passes("W4A4"), complete_plan])
    assert program.plan is not None
    assert program.plan.operations == tuple(op for gm in program.graphs for op in program.plans[gm].operations)
    assert program.schedules.keys() == {"default"}
    assert program.root.meta.keys() <= GraphNotes.__annotations__.keys()
    assert all(site.plan is program.plan for site in pege_fx.fake_quants(program.root).values())


def test_verdicts_are_values_and_their_words_are_on_the_nodes() -> None:
    program = Program(model=net())
    run(program, [CaptureModel(), *pege_fx.prepare_passes("W4A4", batch_norm="keep")])
    norms = {node: said for node, said in program.verdicts.items() if node.op == "call_module"}
    assert [said for _, (said,) in norms.items()] == [Verdict("1", 'batch_norm="keep"'), Verdict("4", 'batch_norm="keep"')]
    assert all(node.meta["batch_norm"] == "; ".join(map(str, said)) for node, said in program.verdicts.items())
    assert str(Verdict("bn")) == "folded bn"
    assert Verdict("bn").is_folded


def test_graphs_alone_are_a_program() -> None:
    gm = symbolic_trace(net())
    assert Program.of(gm).graphs == Program.of([gm]).graphs == [gm]
    assert Program.of(program := Program([gm])) is program
    run(gm, [normalize, infer_ranks, FoldBatchNorm("freeze")])
    assert not [module for module in gm.modules() if isinstance(module, nn.BatchNorm2d)]


def test_a_pass_that_is_marked_is_called_once_and_one_that_is_not_for_each_graph() -> None:
    seen: list[object] = []
    program = Program([symbolic_trace(nn.ReLU()), symbolic_trace(nn.Tanh())])

    @of_program
    def whole(program: Program) -> None:
        seen.append(program)

    def each(gm: GraphModule) -> None:
        seen.append(gm)

    apply(whole, program)
    apply(each, program)
    assert seen == [program, *program.graphs]


def test_a_model_that_stays_python_is_the_result_around_its_graphs() -> None:
    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) if float(x.sum()) > 0 else x

    program = Program(model=Decides())
    with pytest.warns(pege_fx.PegeWarning, match="stays Python"):
        run(program, [CaptureModel(), *pege_fx.prepare_passes("W4A4"), complete_plan])
    assert program.root not in program.graphs
    assert [gm.meta["prefix"] for gm in program.graphs] == ["fc"]
    assert program.plan is program.root.meta["plan"]


def test_a_model_without_any_graph_has_an_empty_plan() -> None:
    class Hidden(nn.Linear):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(super().__call__(x))

    program = Program(model=Hidden(4, 4))
    with pytest.warns(pege_fx.PegeWarning):
        run(program, [CaptureModel(), *pege_fx.prepare_passes("W4A4"), complete_plan])
    assert program.graphs == []
    assert program.plan is not None
    assert program.plan.operations == ()


def test_a_warning_is_of_the_line_that_called_the_package() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn("from here")
        pege_fx.prepare(nn.Sequential(nn.ReLU()), "W4A4")
    assert [Path(found.filename).name for found in caught] == ["test_program.py"] * 2
