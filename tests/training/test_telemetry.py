"""Telemetry: the figures of a step, added up on the device, brought over once per interval."""

import contextlib
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import pege_fx
from pege_fx import Constant, CSVWriter, OutputError, PEGEScheduler, QuantPolicy, ScheduleError, Telemetry, read_history
from pege_fx.training.telemetry import COLUMNS

X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def prepared(method: str = "lsq", batch_norm: Any = "train") -> GraphModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    return pege_fx.prepare(model, QuantPolicy.parse("W3A3", method=method), (X,), batch_norm=batch_norm)


def test_rows_say_where_every_site_stands() -> None:
    gm = prepared()
    scheduler = PEGEScheduler(gm, 10, Constant(0.25), Constant(1e-4), Constant(1e-6))
    with Telemetry(gm) as telemetry:
        gm(X)
        telemetry.step()
    assert {row["site"] for row in telemetry.history} == set(pege_fx.fake_quants(gm))
    for row in telemetry.history:
        assert tuple(row) == COLUMNS
        assert row["step"] == 0
        assert row["p"] == scheduler.rate == 0.25
        assert (row["weight_lambda"], row["activation_lambda"]) == pytest.approx((1e-4, 1e-6))


@pytest.mark.parametrize("method", ["lsq", "pact", "minmax", "dorefa", "interval"])
def test_error_and_clipping_are_those_of_the_fully_quantized_tensor(method: str) -> None:
    gm = prepared(method, "keep")
    seen: dict[str, Tensor] = {}
    for name, fq in pege_fx.fake_quants(gm).items():
        fq.register_forward_hook(lambda _, inputs, __, name=name: seen.__setitem__(name, inputs[0].detach()))
    with Telemetry(gm) as telemetry, torch.no_grad():
        gm(X)
        telemetry.step()
    gm.eval()
    for row in telemetry.history:
        fq, x = pege_fx.fake_quants(gm)[row["site"]], seen[row["site"]]
        with torch.no_grad():
            quantized = fq(x)
        assert row["error"] == pytest.approx(float((x - quantized).square().sum() / x.square().sum()), rel=1e-4)
        codes = fq.codes(x)
        at_the_end = float(((codes == codes.min()) | (codes == codes.max())).float().mean())
        assert 0 <= row["clipped"] <= at_the_end
        if method == "minmax" and fq.site.kind == "weight":
            assert row["clipped"] == 0.0


def test_the_clipped_share_is_counted() -> None:
    gm = pege_fx.prepare(
        nn.Sequential(nn.Linear(4, 4)), QuantPolicy((pege_fx.Rule(input=pege_fx.QuantSpec(bits=2)),)), torch.ones(1, 4)
    )
    (fq,) = pege_fx.fake_quants(gm).values()
    with torch.no_grad():
        fq.method.scale.fill_(1.0)  # type: ignore[operator, union-attr]
    with Telemetry(gm) as telemetry:
        gm(torch.tensor([[-9.0, -2.4, 1.4, 9.0]]))
        telemetry.step()
    (row,) = telemetry.history
    assert row["clipped"] == 0.5
    assert row["scale"] == 1.0
    assert row["error"] == pytest.approx((7**2 + 0.4**2 + 0.4**2 + 8**2) / (81 + 2.4**2 + 1.4**2 + 81))


def test_forwards_of_a_step_add_up_and_other_steps_are_not_looked_at() -> None:
    gm = prepared()
    with Telemetry(gm, every=3) as telemetry:
        for _ in range(7):
            gm(X[:4])
            gm(X[4:])
            telemetry.step()
    assert sorted({row["step"] for row in telemetry.history}) == [0, 3, 6]
    assert len(telemetry.history) == 3 * len(pege_fx.fake_quants(gm))


def test_evaluation_is_no_training_step() -> None:
    gm = prepared()
    with Telemetry(gm) as telemetry:
        gm.eval()
        gm(X)
        telemetry.step()
    assert telemetry.history == []


def test_close_takes_the_hooks_away() -> None:
    gm = prepared()
    Telemetry(gm).close()
    assert not any(fq._forward_hooks for fq in pege_fx.fake_quants(gm).values())


class Transfers(TorchDispatchMode):
    """Counts operations that read a tensor's value."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_look_reads_no_value_of_a_tensor_in_forward() -> None:
    gm = prepared()
    gm(X)
    with Telemetry(gm) as telemetry, Transfers() as transfers, pege_fx.kernels.eager_kernels():
        gm(X)
        assert transfers.reads == 0
        telemetry.step()
    assert len(telemetry.history) == len(pege_fx.fake_quants(gm))


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_is_looked_at_too() -> None:
    gm = prepared()
    with Telemetry(gm, every=2) as telemetry:
        compiled = torch.compile(gm, backend="eager", fullgraph=True)
        for _ in range(4):
            compiled(X).sum().backward()
            telemetry.step()
    assert sorted({row["step"] for row in telemetry.history}) == [0, 2]
    assert all(math.isfinite(row["error"]) for row in telemetry.history)


def test_a_csv_file_is_read_back_as_it_was(tmp_path: Path) -> None:
    gm = prepared()
    with Telemetry(gm, writers=[CSVWriter(tmp_path / "run.csv")]) as telemetry:
        for _ in range(2):
            gm(X)
            telemetry.step()
    assert read_history(tmp_path / "run.csv") == telemetry.history


def test_tensorboard_gets_a_curve_for_each_figure_and_site(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    gm = prepared()
    with Telemetry(gm, writers=[pege_fx.TensorBoardWriter(tmp_path)]) as telemetry:
        for _ in range(2):
            gm(X)
            telemetry.step()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for row in telemetry.history:
        assert {name for name in COLUMNS[2:] if row[name] is None} == {"oscillating", "lambda_of_gradient", "lambda_of_update"}
        for name in COLUMNS[2:8]:
            points = {event.step: event.value for event in events.Scalars(f"{name}/{row['site']}")}
            assert points[row["step"]] == pytest.approx(row[name])


def test_the_distance_is_that_to_the_nearest_code_in_steps() -> None:
    policy = QuantPolicy((pege_fx.Rule(input=pege_fx.QuantSpec(bits=2)),))
    gm = pege_fx.prepare(nn.Sequential(nn.Linear(4, 4)), policy, torch.ones(1, 4))
    (fq,) = pege_fx.fake_quants(gm).values()
    with torch.no_grad():
        fq.method.scale.fill_(2.0)  # type: ignore[operator, union-attr]
    with Telemetry(gm) as telemetry:
        gm(torch.tensor([[-9.0, -2.4, 1.4, 0.0]]))
        telemetry.step()
    (row,) = telemetry.history
    assert row["distance"] == pytest.approx((2.5 + 0.2 + 0.3 + 0.0) / 4)


def came_back(codes: list[int]) -> bool:
    """The definition, of one weight's codes: a change that leads to the code which the change before it had left."""
    kept = [code for number, code in enumerate(codes) if number == 0 or code != codes[number - 1]]
    return any(kept[i] == kept[i - 2] for i in range(2, len(kept)))


@given(st.lists(st.lists(st.integers(-2, 1), min_size=8, max_size=8), min_size=2, max_size=9), st.integers(1, 4))
def test_oscillating_weights_are_those_whose_codes_came_back_since_the_row_before(codes: list[list[int]], every: int) -> None:
    gm = pege_fx.prepare(nn.Sequential(nn.Linear(8, 1, bias=False)), "W2A2", torch.ones(1, 8))
    weight = gm.get_parameter("0.weight")
    fq = pege_fx.fake_quants(gm)["0.weight_fq"]
    with torch.no_grad():
        fq.method.scale.fill_(0.5)  # type: ignore[operator, union-attr]

    def move(step: list[int]) -> None:
        with torch.no_grad():
            weight.copy_(0.5 * torch.tensor([step]) + 0.2)

    move(codes[0])
    with Telemetry(gm, every=every, oscillations=True) as telemetry:
        for step in codes[1:]:
            gm(torch.ones(1, 8))
            move(step)  # where the optimizer steps
            telemetry.step()
    rows = [row for row in telemetry.history if row["site"] == "0.weight_fq"]
    first = 0
    for row in rows:
        last = row["step"] + 1
        seen = [[step[i] for step in codes[first : last + 1]] for i in range(8)]
        assert row["oscillating"] == sum(map(came_back, seen)) / 8
        first = last


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("estimator", ["pege", "pege-share", "ewgs", "ste"])
def test_lambdas_share_is_that_of_two_backwards(estimator: str, checkpointed: bool, recompute: bool) -> None:
    """One backward with λ and one without: their difference is λ's term."""
    policy = QuantPolicy(
        (pege_fx.Rule(weight=pege_fx.QuantSpec(bits=3, estimator=estimator)), pege_fx.Rule(recompute=recompute))
    )
    torch.manual_seed(0)
    gm = pege_fx.prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), policy, (X,)).double()
    forward = (lambda x: checkpoint(gm, x, use_reentrant=False)) if checkpointed else gm

    def gradient(size: float) -> Tensor:
        PEGEScheduler(gm, 10, Constant(0.7), Constant(size), Constant(0.0))
        if estimator == "ewgs":
            pege_fx.fake_quants(gm)["0.weight_fq"].get_buffer("strength").fill_(size)
        gm.zero_grad()
        forward(X.double()).sin().sum().backward()
        return gm.get_parameter("0.weight").grad.clone()  # type: ignore[union-attr]

    size = 5.0 if estimator == "pege" else 0.05
    plain = gradient(0.0)
    with Telemetry(gm) as telemetry:
        term = gradient(size) - plain
        telemetry.step()
    (row,) = telemetry.history
    share = float(term.abs().sum() / (term.abs().sum() + plain.abs().sum()))
    assert row["lambda_of_gradient"] == pytest.approx(share, rel=1e-5, abs=1e-12)
    assert (share > 1e-3) == (estimator != "ste")


OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, 1e-2, weight_decay=0.1),
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters, 1e-2, amsgrad=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, 1e-2, momentum=0.9),
    "plain sgd": lambda parameters: torch.optim.SGD(parameters, 1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_lambdas_share_of_the_update_is_what_the_average_of_its_terms_moves(name: str, granularity: Any) -> None:
    torch.manual_seed(0)
    policy = QuantPolicy((pege_fx.Rule(weight=pege_fx.QuantSpec(bits=3, granularity=granularity)),))
    gm = pege_fx.prepare(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), policy, (X,)).double()
    weight, site = gm.get_parameter("0.weight"), pege_fx.fake_quants(gm)["0.weight_fq"]
    optimizer = OPTIMIZERS[name]([weight])
    PEGEScheduler(gm, 10, Constant(1.0), Constant(5.0), Constant(0.0))
    average = torch.zeros_like(weight)
    with Telemetry(gm, every=1, optimizer=optimizer) as telemetry:
        for _ in range(4):
            optimizer.zero_grad()
            loss = gm(X.double()).sin().sum()
            (term,) = torch.autograd.grad(pege_fx.discretization_loss(gm), weight, retain_graph=True)
            loss.backward()
            optimizer.step()
            telemetry.step()
            average = average * {"sgd": 0.9, "plain sgd": 0.0}.get(name, 0.9) + term * (1.0 if "sgd" in name else 0.1)
    state = optimizer.state[weight]
    whole = state.get("exp_avg", state.get("momentum_buffer"))
    whole = weight.grad if whole is None else whole
    root = 1.0
    if "exp_avg_sq" in state:
        square = state.get("max_exp_avg_sq", state["exp_avg_sq"])
        root = (square / (1 - 0.999**4)).sqrt() + 1e-8
    mine, rest = (average / root).abs().sum(), ((whole - average) / root).abs().sum()
    assert site.site.kind == "weight"
    assert telemetry.history[-1]["lambda_of_update"] == pytest.approx(float(mine / (mine + rest)), rel=1e-5)
    assert 1e-3 < telemetry.history[-1]["lambda_of_update"] < 1


def test_a_watched_backward_leaves_gradients_and_memory_as_they_are() -> None:
    found = []
    for watched in (False, True):
        gm = prepared()
        PEGEScheduler(gm, 10, Constant(0.5), Constant(0.01), Constant(0.01))
        optimizer = torch.optim.Adam(gm.parameters())
        with Telemetry(gm, optimizer=optimizer, oscillations=True) if watched else contextlib.nullcontext():
            loss = gm(X).square().sum()
            loss.backward(retain_graph=True)
            loss.backward()
        found.append([p.grad for p in gm.parameters()])
        nodes = [weakref.ref(node) for fq in pege_fx.fake_quants(gm).values() for node in fq.last_nodes()]
        del loss
        assert not any(node() for node in nodes)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_what_can_not_be_done_is_said(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="every=0: give the interval as a positive whole number"):
        Telemetry(prepared(), every=0)
    with pytest.raises(ScheduleError, match="the updates of Rprop are not known here: give one of Adam, AdamW, SGD"):
        Telemetry(prepared(), optimizer=torch.optim.Rprop([torch.ones(1)]))
    with pytest.raises(pege_fx.ModelError, match="was not prepared"):
        Telemetry(nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(OutputError, match=r"can not write .*run.csv: No such file"):
        CSVWriter(tmp_path / "none" / "run.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(OutputError, match=r"is no telemetry: its columns are not step, site"):
        read_history(tmp_path / "other.csv")
    (tmp_path / "bad.csv").write_text(",".join(COLUMNS) + "\nx,y\n")
    with pytest.raises(OutputError, match="is no telemetry"):
        read_history(tmp_path / "bad.csv")
    with pytest.raises(OutputError, match="can not read"):
        read_history(tmp_path / "none.csv")
