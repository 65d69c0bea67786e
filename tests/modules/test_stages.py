"""The stage of a model: every public function works, or says which call is missing; wrappers are seen through."""

import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import pege_fx
from pege_fx.modules.stages import STAGES, Stage, graph_of, stage_of, unwrapped

X = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def made(stage: Stage, policy: str = "W4A4") -> nn.Module:
    model = net()
    if stage == "float":
        return model
    gm = pege_fx.prepare(model, policy, (X,))
    if stage == "prepared":
        return gm
    deployed = pege_fx.convert(gm)
    return deployed if stage == "converted" else pege_fx.integer_engine(deployed)


def saved(folder: Path) -> Path:
    pege_fx.save(made("prepared"), folder / "state")  # type: ignore[arg-type]
    return folder / "state"


def exported(folder: Path) -> Path:
    pege_fx.export_onnx(made("converted"), folder / "model.onnx", (X,))  # type: ignore[arg-type]
    return folder / "model.onnx"


# What each public function takes, and how it is called.
TAKES: dict[str, tuple[set[Stage], Callable[[Any, Path], Any]]] = {
    "prepare": ({"float"}, lambda model, _: pege_fx.prepare(model, "W4A4", (X,))),
    "explain": ({"float"}, lambda model, _: pege_fx.explain(model, "W4A4")),
    "trace_passes": ({"float"}, lambda model, _: pege_fx.trace_passes(model, "W4A4")),
    "convert": ({"prepared"}, lambda model, _: pege_fx.convert(model)),
    "calibrate": ({"prepared"}, lambda model, _: pege_fx.calibrate(model, [X])),
    "plan_of": ({"prepared"}, lambda model, _: pege_fx.plan_of(model)),
    "summary": ({"prepared"}, lambda model, _: pege_fx.summary(model)),
    "report": ({"prepared"}, lambda model, folder: pege_fx.report(model, folder / "r.html", batches=[X])),
    "draw": ({"prepared"}, lambda model, folder: pege_fx.draw(model, folder / "g.dot")),
    "to_networkx": ({"prepared"}, lambda model, _: pege_fx.to_networkx(model)),
    "sensitivity": ({"prepared"}, lambda model, _: pege_fx.sensitivity(model, [X], progress=False)),
    "save": ({"prepared"}, lambda model, folder: pege_fx.save(model, folder / "x")),
    "load": ({"prepared", "float"}, lambda model, folder: pege_fx.load(saved(folder), model, example_inputs=(X,))),
    "PEGEScheduler": ({"prepared"}, lambda model, _: pege_fx.PEGEScheduler(model, 4)),
    "Telemetry": ({"prepared"}, lambda model, _: pege_fx.Telemetry(model)),
    "Guard": ({"prepared"}, lambda model, _: pege_fx.Guard(model)),
    "WeightFreezing": ({"prepared"}, lambda model, _: pege_fx.WeightFreezing(model, pege_fx.Constant(0.1), max_bits=8)),
    "DecoupledLambda": ({"prepared"}, lambda model, _: pege_fx.DecoupledLambda(model, pege_fx.Constant(0.1))),
    "dampening_loss": ({"prepared"}, lambda model, _: pege_fx.dampening_loss(model)),
    "parameter_groups": ({"prepared"}, lambda model, _: pege_fx.parameter_groups(model, 0.1)),
    "size_report": ({"prepared", "converted", "float"}, lambda model, _: pege_fx.size_report(model)),
    "integer_engine": ({"converted"}, lambda model, _: pege_fx.integer_engine(model)),
    "integer_coverage": ({"engine"}, lambda model, _: pege_fx.integer_coverage(model)),
    "save_deployed": ({"converted"}, lambda model, folder: pege_fx.save_deployed(model, folder / "d")),
    "to_program": ({"converted"}, lambda model, _: pege_fx.to_program(model, (X,))),
    "export_onnx": ({"converted"}, lambda model, folder: pege_fx.export_onnx(model, folder / "m.onnx", (X,))),
    "verify": ({"converted"}, lambda model, folder: pege_fx.verify(model, exported(folder), [X], engine="onnxruntime")),
    "verify_export": ({"converted"}, lambda model, folder: pege_fx.verify_export(model, exported(folder), [X])),
}
MISSING: dict[tuple[Stage, Stage], str] = {
    ("float", "prepared"): r"was not prepared: call pege_fx.prepare\(model, policy\) first",
    (
        "float",
        "converted",
    ): r"was not converted: call pege_fx.prepare\(model, policy\), then give the result of pege_fx.convert\(gm\)\.",
    (
        "float",
        "engine",
    ): r"was not an engine: call pege_fx.prepare.* then call pege_fx.convert.* then give the result of pege_fx.integer_engine",
    ("prepared", "converted"): r"was not converted, it is prepared: give the result of pege_fx.convert\(gm\)\.",
    ("prepared", "engine"): r"it is prepared: call pege_fx.convert\(gm\), then give the result of pege_fx.integer_engine",
    ("converted", "engine"): r"it is converted: give the result of pege_fx.integer_engine\(deployed\)\.",
    ("converted", "prepared"): r"it is converted: give what pege_fx.prepare.* returned, before pege_fx.convert",
    ("engine", "prepared"): r"it is an engine: give what pege_fx.prepare.* returned, before pege_fx.convert",
    ("engine", "converted"): r"it is an engine: give what pege_fx.convert.* returned, before pege_fx.integer_engine",
    ("prepared", "float"): "prepared",
    ("converted", "float"): "it is converted: give the model as it was before pege_fx.prepare",
    ("engine", "float"): "it is an engine: give the model as it was before pege_fx.prepare",
}


@pytest.mark.parametrize("name", TAKES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_function_works_at_its_stage_and_names_the_missing_call_at_others(name: str, stage: Stage, tmp_path: Path) -> None:
    if name in ("export_onnx", "verify_export"):
        pytest.importorskip("onnxruntime")
    stages, call = TAKES[name]
    if stage in stages:
        call(made(stage), tmp_path)
        return
    wanted: Stage = "float" if name == "load" else min(stages - {"float"} or stages, key=STAGES.index)
    with pytest.raises(pege_fx.PegeError, match=MISSING[stage, wanted]):
        call(made(stage), tmp_path)


def test_every_public_function_of_a_model_is_in_the_table() -> None:
    first = {
        name: next(iter(inspect.signature(value).parameters), "")
        for name in pege_fx.__all__
        if callable(value := getattr(pege_fx, name)) and not (inspect.isclass(value) and issubclass(value, Exception))
    }
    models = {name for name, parameter in first.items() if parameter in ("gm", "model", "deployed", "engine")}
    # any module has fake-quants or none; shard wants processes; these want more than a model, and are below
    others = {"shard", "update_ewgs", "discretization_loss", "reestimate_batch_norm"}
    assert models - set(TAKES) - {"CheckpointInfo"} == others


@pytest.mark.parametrize("stage", ["float", "converted", "engine"])
def test_what_wants_a_loss_or_processes_asks_for_the_stage_first(stage: Stage) -> None:
    with pytest.raises(pege_fx.ModelError, match="no training forward of a prepared model"):
        pege_fx.discretization_loss(made(stage))
    reestimate = lambda model: pege_fx.reestimate_batch_norm(model, [X])  # noqa: E731 (a call like the others)
    for call in (pege_fx.shard, lambda model: pege_fx.update_ewgs(model, torch.sum, [X]), reestimate):
        with pytest.raises(pege_fx.ModelError, match="was not prepared"):
            call(made(stage))  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore:nothing is quantized")
@pytest.mark.parametrize("stage", STAGES)
def test_a_policy_that_leaves_all_in_float_has_stages_too(stage: Stage) -> None:
    assert stage_of(made(stage, "W32A32")) == stage


@pytest.mark.parametrize("stage", STAGES)
def test_pickling_keeps_the_stage(stage: Stage) -> None:
    assert stage_of(pickle.loads(pickle.dumps(made(stage)))) == stage


@pytest.mark.parametrize("given", [None, "model", [net()], {}])
def test_what_is_no_model_is_told_what_makes_one(given: Any) -> None:
    with pytest.raises(pege_fx.ModelError, match=r"\w+ was not prepared: call pege_fx\.prepare"):
        pege_fx.convert(given)


# --- wrappers ------------------------------------------------------------------------------------------------------


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "compiled": torch.compile,
    "compiled and averaged": lambda gm: torch.optim.swa_utils.AveragedModel(torch.compile(gm)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_seen_through(name: str, tmp_path: Path) -> None:
    gm = made("prepared")
    assert isinstance(gm, GraphModule)
    wrapped = WRAPPERS[name](gm)
    assert isinstance(unwrapped(wrapped), GraphModule)
    assert torch.equal(pege_fx.convert(wrapped)(X), gm.eval()(X))
    assert str(pege_fx.summary(wrapped)) == str(pege_fx.summary(gm))
    assert pege_fx.size_report(wrapped) == pege_fx.size_report(gm)
    pege_fx.save(wrapped, tmp_path / "state")
    pege_fx.load(tmp_path / "state", wrapped)
    assert pege_fx.PEGEScheduler(wrapped, 4).t == 0
    with pytest.raises(pege_fx.ModelError, match=r"wrapped in \w+: prepare model.(module|_orig_mod) first"):
        pege_fx.prepare(WRAPPERS[name](net()), "W4A4")


def test_a_module_that_holds_a_graph_is_asked_for_it() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = made("prepared"), nn.Linear(2, 2)

    holder = Holder()
    for call in (pege_fx.convert, pege_fx.summary, pege_fx.to_networkx):
        with pytest.raises(pege_fx.ModelError, match=r"Holder is no graph itself, it holds one: give model.backbone\."):
            call(holder)  # type: ignore[arg-type]
    assert pege_fx.PEGEScheduler(holder, 4).t == 0  # type: ignore[arg-type]


def test_the_error_class_is_the_callers() -> None:
    with pytest.raises(pege_fx.ConvertError, match="was not converted"):
        graph_of(net(), "converted", error=pege_fx.ConvertError)
