"""The module behind a fake-quant node: masks by schedule, p = 1 in evaluation, calibration as state, copies, dtypes."""

import contextlib
import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

import pege_fx
from pege_fx import Constant, PEGEScheduler, QuantPolicy, QuantSpec, Rule, Statistics, fake_quants
from pege_fx.kernels.inductor import eager_kernels
from pege_fx.modules.fake_quant import FakeQuant, ScheduleState, Site
from pege_fx.numerics import discretizer
from pege_fx.numerics.functional import refresh_key, replacement_mask, site_key
from pege_fx.numerics.spec import Channels

METHOD_NAMES = ["lsq", "pact", "dorefa", "interval", "minmax"]


def activation(name: str = "site", *, schedule: ScheduleState | None = None, seed: int = 0, **fields: Any) -> FakeQuant:
    spec = QuantSpec(**{"bits": 3} | fields).resolve("activation", non_negative=False)
    return FakeQuant(
        Site(name=name, kind="activation", spec=spec, rule="rule 0"), schedule or ScheduleState("default"), seed=seed
    )


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape or (6, 5), generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Two convolutions, a BatchNorm folded into one of them, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.fc(torch.relu(self.conv2(x)).mean((2, 3)))
        return out


def prepared(**spec: Any) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    policy = QuantPolicy.parse("W3A3", first="4", last="4", **spec)
    return pege_fx.prepare(Net(), policy, (inputs(4, 3, 6, 6),))


# --- replacement -------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.text(max_size=8), st.integers(0, 1000), st.floats(0, 1), st.sampled_from(["lsq", "minmax"]))
def test_training_replaces_what_the_hash_of_seed_site_and_refresh_says(
    seed: int, name: str, refresh: int, rate: float, method: str
) -> None:
    fq, x = activation(name, seed=seed, method=method), inputs()
    fq.schedule.rate.fill_(rate)
    fq.schedule.refresh_key.fill_(refresh_key(refresh))
    y = fq(x)
    scale, zero, _ = fq.method.grid_of()
    zero = torch.tensor(0.0) if zero is None else zero
    x_q = (torch.clamp(torch.round(x / scale) + zero, -4, 3) - zero) * scale
    key = site_key(seed, name) ^ refresh_key(refresh)
    mask = replacement_mask(torch.tensor(key, dtype=torch.int32), torch.tensor(rate), x.shape)
    assert torch.equal(y, torch.where(mask, x_q, x))


def hashes(module: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a training forward asks for random numbers."""
    asked: list[Any] = []
    is_replaced = discretizer.is_replaced
    with monkeypatch.context() as patch, eager_kernels():
        patch.setattr(discretizer, "is_replaced", lambda *args: (asked.append(args), is_replaced(*args))[1])
        module.train()(x)
    return bool(asked)


@pytest.mark.parametrize(
    "copied", [None, copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["itself", "deepcopy", "pickle"]
)
def test_complete_replacement_costs_no_hash_until_something_writes_the_rate(
    copied: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gm, x = prepared(), inputs(4, 3, 6, 6)
    assert not hashes(gm, x, monkeypatch)
    scheduler = PEGEScheduler(gm, 4, Constant(1.0))
    assert not hashes(gm, x, monkeypatch)
    if copied is not None:
        gm = copied(gm)
        scheduler = PEGEScheduler(gm, 4, lambda t: min(1.0, t / 2))
        assert hashes(gm, x, monkeypatch)
        scheduler.go_to(2)
        assert not hashes(gm, x, monkeypatch)
    for fq in fake_quants(gm).values():
        fq.schedule.rate.fill_(0.5)  # by whomever
    assert hashes(gm, x, monkeypatch)
    scheduler.step()
    assert not hashes(gm, x, monkeypatch)


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("grad", [True, False])
def test_evaluation_replaces_everything_whatever_the_rate(method: str, grad: bool) -> None:
    fq, x = activation(method=method), inputs()
    fq(x)
    full = fq.eval()(x)
    fq.schedule.rate.fill_(0.2)
    with torch.set_grad_enabled(grad):
        assert torch.equal(fq(x), full)
        assert not torch.equal(fq.train()(x), full)


def test_evaluation_has_the_gradient_of_full_replacement() -> None:
    fq, found = activation(estimator="ste"), []
    fq(inputs())
    for rate, training in ((1.0, True), (0.2, False)):
        fq.train(training).schedule.rate.fill_(rate)
        x = inputs().requires_grad_()
        fq(x).square().sum().backward()
        found.append(x.grad)
    assert torch.equal(found[0], found[1])


def test_until_a_scheduler_comes_all_is_quantized_and_lambda_is_zero() -> None:
    schedule = ScheduleState("default")
    state = (schedule.rate, schedule.weight_lambda, schedule.activation_lambda, schedule.loss_scale)
    assert [float(value) for value in state] == [1.0, 0.0, 0.0, 1.0]
    assert schedule.is_complete


def folded(granularity: Any, training: bool) -> tuple[FakeQuant, Tensor, Tensor]:
    """The fake-quant of a weight with its BatchNorm in front of the grid, the weight, and the BatchNorm's factor k."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()
    gamma, variance = torch.tensor([0.5, -2.0, 1.0, 3.0]).double(), torch.tensor([0.1, 1.0, 4.0, 2.0]).double()
    model.get_parameter("1.weight").data.copy_(gamma)
    model.get_buffer("1.running_var").copy_(variance)
    policy = QuantPolicy((Rule(weight=QuantSpec(bits=4, granularity=granularity)),))
    gm = pege_fx.prepare(model, policy, (torch.randn(2, 3, 5, 5).double(),)).train(training)
    weight = gm.get_parameter("0.weight").detach().clone()
    return fake_quants(gm)["0.weight_fq"], weight, (gamma / (variance + 1e-5).sqrt()).view(4, 1, 1, 1)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_a_folded_weight_is_on_the_grid_of_the_folded_values_in_evaluation(granularity: Any) -> None:
    """That evaluation equals deployment says nothing of it: both could leave k out."""
    fq, weight, k = folded(granularity, training=False)
    scale, out, wanted = fq.decoding().scale.double(), fq(weight), k * weight
    inside = (wanted / scale).abs() < 7
    assert inside.double().mean() > 0.8
    assert ((out - wanted).abs() / scale)[inside].max() <= 0.5 + 1e-5
    torch.testing.assert_close(out / scale, (out / scale).round(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_the_span_is_the_width_of_what_comes_out_in_training(granularity: Any) -> None:
    fq, weight, _ = folded(granularity, training=True)
    weight[:, 0, 0, 0], weight[:, 1, 1, 1] = 1e3, -1e3
    out = fq(weight).detach().flatten(1)
    widths = fq.span(weight).expand_as(weight).flatten(1)[:, 0]
    torch.testing.assert_close(out.amax(1) - out.amin(1), widths.double(), rtol=1e-6, atol=0)


def test_each_kind_of_edge_has_its_own_lambda() -> None:
    schedule, x = ScheduleState("default"), inputs()
    schedule.weight_lambda.fill_(0.5)
    schedule.activation_lambda.fill_(0.25)
    spec = QuantSpec(bits=3).resolve("weight", non_negative=False)
    weight = FakeQuant(Site(name="w", kind="weight", spec=spec, rule="r"), schedule, seed=0, weight=x, channels=Channels(6))
    for fq, strength in ((weight, 0.5), (activation("a", schedule=schedule), 0.25)):
        a = inputs().requires_grad_()
        y = fq(a)
        (0.0 * y).sum().backward()  # no gradient from outside: what is left is the pull
        assert a.grad is not None
        torch.testing.assert_close(a.grad, strength * (a - y).detach())


def test_ewgs_keeps_its_delta_in_its_state_and_uses_it() -> None:
    fq, grads = activation(estimator="ewgs"), []
    fq(inputs())
    assert fq.state_dict()["strength"].item() == pytest.approx(1e-3)
    for delta in (0.0, 0.5):
        fq.get_buffer("strength").fill_(delta)
        x = inputs().requires_grad_()
        fq(x).sum().backward()
        grads.append(x.grad)
    assert not torch.equal(*grads)
    other = activation(estimator="ewgs")
    other.load_state_dict(fq.state_dict())
    assert other.get_buffer("strength").item() == 0.5


def test_a_recomputed_forward_sees_the_same_mask() -> None:
    gm, x = prepared(), inputs(4, 3, 6, 6)
    PEGEScheduler(gm, 10, Constant(0.5), Constant(0.1), Constant(0.1))
    found = []
    for run in (gm, lambda x: checkpoint(gm, x, use_reentrant=False)):
        gm.zero_grad()
        run(x).square().sum().backward()
        found.append([p.grad.clone() for p in gm.parameters()])
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)


# --- calibration -------------------------------------------------------------------------------------------------


def test_the_first_forward_initialises_and_the_second_does_not() -> None:
    fq, x = activation(), inputs()
    assert not fq.calibrated
    fq(x)
    first = fq.method.scale.item()
    assert fq.calibrated
    assert first == pytest.approx(2 * x.abs().mean().item() / 3**0.5, rel=1e-5)
    fq(100 * x)
    assert fq.method.scale.item() == first


def test_observing_passes_float_on_and_initialises_from_all_batches_together() -> None:
    fq, batches = activation(), [inputs(), 3 * inputs(2, 5, seed=1)]
    fq.observing = True
    for x in batches:
        assert fq(x) is x
    fq.finish_observing()
    together = torch.cat(batches).abs().mean().item()
    assert fq.method.scale.item() == pytest.approx(2 * together / 3**0.5, rel=1e-5)
    assert not fq.observing
    assert not torch.equal(fq(batches[0]), batches[0])


def test_a_process_alone_shares_with_nobody() -> None:
    fq = activation()
    fq.observing = True
    fq(torch.ones(4))
    before = fq.statistics
    fq.share_observations()
    assert fq.statistics is before
    assert before is not None


def test_observing_nothing_changes_nothing() -> None:
    fq = activation()
    fq.observing = True
    fq.finish_observing()
    assert not fq.calibrated
    fq(inputs())
    scale = fq.method.scale.item()
    fq.observing = True
    fq.finish_observing()
    assert fq.method.scale.item() == scale


def test_calibration_travels_with_the_state() -> None:
    trained, fresh, x = activation(), activation(), inputs()
    trained(x)
    trained.method.scale.data.mul_(0.7)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(100 * x), trained(100 * x))  # no new initialisation
    uncalibrated = activation()
    trained.load_state_dict(uncalibrated.state_dict())
    trained(x)
    assert trained.method.scale.item() == pytest.approx(2 * x.abs().mean().item() / 3**0.5, rel=1e-5)


def test_a_state_has_neither_the_schedule_nor_the_key_of_the_masks() -> None:
    assert set(activation().state_dict()) == {"calibrated", "method.scale"}


def float_state(scale: float) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {name: value * scale for name, value in Net().state_dict().items()}


@pytest.mark.parametrize("training", [True, False])
def test_a_float_checkpoint_loads_by_its_own_keys_and_the_grids_follow_it(training: bool) -> None:
    gm, state, x = prepared(), float_state(5.0), inputs(4, 3, 6, 6)
    before = {name: fq.method.scale.clone() for name, fq in fake_quants(gm).items()}
    result = gm.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert all(".method." in key or key.endswith("_fq.calibrated") for key in result.missing_keys)
    gm.train(training)(x)
    for name, fq in fake_quants(gm).items():
        if fq.site.kind == "weight":
            weight, q_max = state[name.removesuffix("_fq")], fq.site.spec.bounds[1]
            torch.testing.assert_close(fq.method.scale, 2 * weight.flatten(1).abs().mean(1) / q_max**0.5)
        elif name != "x_fq":  # the inputs are what they were
            assert fq.method.scale > 2 * before[name]


def test_a_state_saved_right_after_a_float_checkpoint_is_not_calibrated() -> None:
    gm = prepared()
    gm.load_state_dict(float_state(5.0), strict=False)
    state = copy.deepcopy(gm.state_dict())
    assert not any(value for name, value in state.items() if name.endswith("_fq.calibrated"))
    other, x = prepared(), inputs(4, 3, 6, 6)
    other.load_state_dict(state)
    torch.testing.assert_close(other(x), gm(x))  # both find their grids anew


def test_a_whole_state_round_trips_bit_for_bit() -> None:
    trained, x = prepared(method="pact"), inputs(4, 3, 6, 6)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
    trained(x).square().sum().backward()
    optimizer.step()
    fresh = prepared(method="pact")
    assert not torch.equal(fresh.eval()(x), trained.eval()(x))
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(x), trained(x))


# --- copies ------------------------------------------------------------------------------------------------------


def sites_sharing() -> nn.ModuleList:
    one, other = ScheduleState("one"), ScheduleState("other")
    return nn.ModuleList([activation("a", schedule=one), activation("b", schedule=one), activation("c", schedule=other)])


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("make", [sites_sharing, prepared])
def test_copies_keep_schedules_shared_and_apart_from_the_original(copied: Any, make: Any) -> None:
    module = make()
    twin = copied(module)

    def grouping(of: nn.Module) -> list[list[str]]:
        found: dict[int, list[str]] = {}
        for name, fq in fake_quants(of).items():
            found.setdefault(id(fq.schedule), []).append(name)
        return sorted(found.values())

    assert grouping(twin) == grouping(module)
    for fq in fake_quants(module).values():
        fq.schedule.rate.fill_(0.25)
    assert all(fq.schedule.rate.item() == 1.0 for fq in fake_quants(twin).values())


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_copies_train_like_the_original(copied: Any, method: str) -> None:
    gm, x = prepared(method=method), inputs(4, 3, 6, 6)
    PEGEScheduler(gm, 10, Constant(0.5), Constant(0.1), Constant(0.1))
    twin = copied(gm)
    results = []
    for model in (gm, twin):
        scheduler = PEGEScheduler(model, 10, Constant(0.5), Constant(0.1), Constant(0.1))
        scheduler.step()
        model(x).square().sum().backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(results[0]) == len(results[1]) > 5
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- dtypes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_prepared_model_trains_and_evaluates_in_other_dtypes(method: str, dtype: torch.dtype) -> None:
    gm, x = prepared(method=method).to(dtype), inputs(4, 3, 6, 6).to(dtype)
    PEGEScheduler(gm, 10, Constant(0.5), Constant(0.1), Constant(0.1))
    y = gm(x)
    y.square().mean().backward()
    assert y.dtype == dtype
    assert torch.isfinite(y).all()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in gm.parameters())
    with torch.no_grad():
        assert gm.eval()(x).dtype == dtype


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_autocast_leaves_grids_in_float32(method: str) -> None:
    gm, x = prepared(method=method), inputs(4, 3, 6, 6)
    seen: dict[str, tuple[torch.dtype, torch.dtype]] = {}
    for name, fq in fake_quants(gm).items():
        fq.register_forward_hook(
            lambda fq, args, y, name=name: seen.update({name: (args[0].dtype, fq.method.grid_of().scale.dtype)})
        )
    with torch.autocast("cpu", torch.bfloat16):
        loss = gm(x).float().square().sum()
    loss.backward()
    assert torch.bfloat16 in {into for into, _ in seen.values()}
    assert {scale for _, scale in seen.values()} == {torch.float32}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in gm.parameters())
    exact = prepared(method=method)(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert (gm(x) - exact).abs().max() < 0.3 * exact.abs().max()


# --- compiled ----------------------------------------------------------------------------------------------------


# The compiler of torch 2.11 uses what torch 2.11 deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("estimator", ["ste", "ewgs", "pege", "pege-relative", "pege-share"])
def test_compiled_gradients_are_the_eager_ones_in_every_layout(estimator: str, memory_format: torch.memory_format) -> None:
    torch.compiler.reset()
    eager = prepared(estimator=estimator).double().to(memory_format=memory_format)  # type: ignore[call-overload]
    x = inputs(4, 3, 6, 6).double().to(memory_format=memory_format)
    PEGEScheduler(eager, 10, Constant(0.5), Constant(0.1), Constant(0.1))
    traced = copy.deepcopy(eager)
    for run in (eager, torch.compile(traced, fullgraph=True, backend="aot_eager")):
        run(x).square().sum().backward()
    torch.compiler.reset()
    for (name, one), other in zip(eager.named_parameters(), traced.parameters(), strict=True):
        assert one.grad is not None
        torch.testing.assert_close(other.grad, one.grad, msg=name)


# --- what autograd keeps -----------------------------------------------------------------------------------------


def test_the_last_forward_is_there_until_backward_and_never_in_evaluation() -> None:
    fq, x = activation(), inputs().requires_grad_()
    assert fq.last_forward() is None
    y = fq(x)
    seen = fq.last_forward()
    assert seen is not None
    assert torch.equal(seen[0], x)
    assert torch.equal(seen[1], y)
    y.sum().backward()
    assert fq.last_forward() is None
    fq.eval()(x)
    assert fq.last_forward() is None


def test_the_last_forward_keeps_nothing_alive() -> None:
    fq = activation()
    y = fq(inputs().requires_grad_())
    assert fq.last_forward() is not None
    del y
    assert fq.last_forward() is None


# --- compilers ---------------------------------------------------------------------------------------------------


# The compiler of torch 2.11 uses what torch 2.11 deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_schedule_steps_recompile_nothing_and_compiled_gradients_are_eager_ones() -> None:
    gm, x = prepared(), inputs(4, 3, 6, 6)
    scheduler = PEGEScheduler(gm, 10, lambda t: 0.1 * t, lambda t: 0.01 * t, lambda t: 0.01 * t)
    compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
    for step in range(4):
        grads = []
        for run in (gm, compiled):
            gm.zero_grad()
            torch.manual_seed(0)
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                run(x).square().sum().backward()
            grads.append([p.grad.clone() for p in gm.parameters()])
        for eager, other in zip(*grads, strict=True):
            torch.testing.assert_close(eager, other)
        scheduler.step()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_schedule_of_a_thousand_steps_recompiles_nothing() -> None:
    gm = pege_fx.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), "W4A4", (inputs(4, 4),))
    scheduler = PEGEScheduler(gm, 1000)  # p reaches 1 halfway
    torch.compiler.reset()
    compiled = torch.compile(gm, fullgraph=True, backend="eager")
    compiled(inputs(4, 4))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(1000):
            scheduler.step()
            if step % 10 == 9:
                compiled(inputs(4, 4))
    assert scheduler.rate == 1.0


# --- for people --------------------------------------------------------------------------------------------------


def test_a_site_prints_its_format() -> None:
    fq = activation(method="pact", estimator="ewgs", schedule=ScheduleState("head"))
    assert fq.extra_repr() == "3 bits, signed, per tensor, pact, ewgs"
    grouped = Site(name="s", kind="activation", spec=fq.site.spec, rule="r", group="head")
    assert FakeQuant(grouped, ScheduleState("head"), seed=0).extra_repr().endswith("schedule 'head'")
    assert "group='head'" in repr(fq)


def test_fake_quants_lists_each_once_by_its_path() -> None:
    shared = activation()
    found = fake_quants(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, activation("other"))}))
    assert list(found) == ["a", "b.1"]
    assert found["a"] is shared


def test_statistics_are_dropped_after_initialisation() -> None:
    fq = activation()
    fq.observing = True
    fq(inputs())
    assert isinstance(fq.statistics, Statistics)
    fq.finish_observing()
    assert fq.statistics is None


class Flexible(nn.Module):
    """Takes batches of any size, and sequences of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(512, 256), nn.Linear(256, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.narrow(torch.relu(self.wide(x)))
        return out


def graphs_of(model: nn.Module, batches: list[Tensor]) -> int:
    """How many graphs dynamo makes for these batches; ``backend="eager"`` checks guards alone."""
    torch.compiler.reset()
    compiled_by_dynamo = []

    def backend(gm: GraphModule, _: Any) -> Any:
        compiled_by_dynamo.append(gm)
        return gm.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for batch in batches:
        compiled(batch)
    return len(compiled_by_dynamo)


@pytest.mark.parametrize("method", ["lsq", "pact", "minmax"])
@pytest.mark.parametrize("training", [True, False])
def test_under_a_compiler_no_size_makes_a_graph_of_its_own(method: str, training: bool) -> None:
    """From below the size that is worth a kernel of its own to above it, at each fake-quant; batches and lengths."""
    policy = QuantPolicy((Rule(weight="4", input=QuantSpec(bits=4, method=method)),))
    gm = pege_fx.prepare(Flexible(), policy, (torch.randn(8, 5, 512),))
    PEGEScheduler(gm, 10)
    gm(torch.randn(8, 5, 512))
    batches = [torch.randn(n, n + 1, 512) for n in (3, 5, 7, 9, 17, 30)]
    float_graphs = graphs_of(Flexible().train(training), batches)
    assert graphs_of(gm.train(training), batches) == float_graphs == 1


def test_a_free_batch_and_length_are_exported() -> None:
    gm = pege_fx.prepare(Flexible(), "W4A4", (torch.randn(8, 5, 512),)).eval()
    free = ({0: torch.export.Dim("batch", min=2, max=512), 1: torch.export.Dim("length", min=2, max=512)},)
    program = torch.export.export(gm, (torch.randn(8, 5, 512),), dynamic_shapes=free)
    x = torch.randn(40, 3, 512)
    torch.testing.assert_close(program.module()(x), gm(x))


@pytest.mark.parametrize("signs", [(-1.0,) * 4, (1.0, -1.0, 1.0, -1.0)])
@pytest.mark.parametrize("kernels", [False, True])
def test_unsigned_moving_ranges_see_a_weight_with_the_sign_of_its_norm(signs: tuple[float, ...], kernels: bool) -> None:
    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor(signs))
        net[0].weight.copy_(net[0].weight.abs() * net[1].weight.view(-1, 1, 1, 1))  # the folded weight is positive
    x = torch.randn(8, 3, 6, 6)
    policy = QuantPolicy((Rule(weight=QuantSpec(bits=8, signed=False, method="minmax"), input=None),))
    with contextlib.nullcontext() if kernels else eager_kernels():
        gm = pege_fx.prepare(net.train(), policy, (x,))
        torch.testing.assert_close(gm(x), copy.deepcopy(net)(x), rtol=0.05, atol=0.05)
        method: Any = fake_quants(gm)["0.weight_fq"].method
        assert torch.equal(method.low, torch.zeros(4))
        assert torch.equal(method.high, net[0].weight.detach().abs().amax((1, 2, 3)))
