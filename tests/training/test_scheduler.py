"""The scheduler: what it sets and when, its state, its masks, its groups, and what it refuses."""

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.fx import GraphModule

import pege_fx
from pege_fx import (
    CheckpointError,
    Constant,
    Exponential,
    GroupCurves,
    Linear,
    LogReplacement,
    ModelError,
    PEGEScheduler,
    QuantPolicy,
    Rule,
    ScheduleError,
    fake_quants,
    plan_of,
)
from pege_fx.modules.fake_quant import FakeQuant, ScheduleState
from pege_fx.numerics.functional import refresh_key, replacement_mask
from pege_fx.training import scheduler
from pege_fx.training.scheduler import default_replacement


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def prepared(policy: QuantPolicy | str = "W3A3") -> GraphModule:
    return pege_fx.prepare(model(), policy, (torch.randn(5, 6, generator=torch.Generator().manual_seed(1)),))


GROUPED = QuantPolicy((Rule(weight="4", input="4"), Rule(match="4", schedule="head")))


def states(gm: GraphModule) -> dict[str, ScheduleState]:
    return {fq.schedule.group: fq.schedule for fq in fake_quants(gm).values()}


def numbers(state: ScheduleState) -> tuple[float, ...]:
    return (state.rate.item(), state.weight_lambda.item(), state.activation_lambda.item(), state.refresh_key.item())


def approx(*values: float) -> Any:
    return pytest.approx(values, rel=1e-6)


# --- positions ---------------------------------------------------------------------------------------------------


def test_without_a_scheduler_everything_is_replaced_and_nothing_pulled() -> None:
    assert numbers(states(prepared())["default"]) == (1.0, 0.0, 0.0, refresh_key(0))


def test_a_scheduler_sets_p_and_lambda_when_it_is_made_and_at_every_step() -> None:
    gm = prepared()
    rate, weight, x = Linear(0.2, 1.0, steps=4), Exponential(1e-4, 1e-2, steps=4), Linear(0.0, 1e-3, steps=4)
    scheduler = PEGEScheduler(gm, 4, rate, weight, x)
    for t in range(5):
        assert numbers(states(gm)["default"]) == approx(rate(t), weight(t), x(t), refresh_key(t))
        assert scheduler.rate == rate(t)
        assert scheduler.lambdas == (weight(t), x(t))
        scheduler.step()


GM = prepared()


@given(st.integers(1, 40))
def test_the_default_is_complete_at_the_end_however_short(total: int) -> None:
    assert default_replacement(total)(total) == 1.0


@given(st.integers(1, 12), st.integers(0, 30))
def test_stepping_past_the_end_stays_at_the_end(total: int, steps: int) -> None:
    scheduler = PEGEScheduler(GM, total, lambda t: t / total, lambda t: 2.0 * t, Constant(0.0))
    for _ in range(steps):
        scheduler.step()
    assert scheduler.t == min(steps, total)
    assert numbers(states(GM)["default"])[:2] == approx(min(steps, total) / total, 2.0 * min(steps, total))


def test_any_callable_is_a_curve() -> None:
    gm = prepared()
    scheduler = PEGEScheduler(gm, 10, replacement=lambda t: 1 - 1 / (1 + t))
    for _ in range(3):
        scheduler.step()
    assert states(gm)["default"].rate.item() == pytest.approx(0.75)


@pytest.mark.parametrize("total", [3, 4, 100])
def test_the_default_is_the_papers_logarithm_complete_halfway(total: int) -> None:
    gm = prepared()
    scheduler = PEGEScheduler(gm, total)
    assert isinstance(scheduler.replacement, LogReplacement)
    start = states(gm)["default"].rate.item()
    assert 0 < start < 1
    assert 0 < scheduler.lambdas[1] < scheduler.lambdas[0]
    for t in range(1, total + 1):
        scheduler.step()
        if t >= max(total / 2, 2):
            assert states(gm)["default"].rate.item() == 1.0  # exactly, or an element would be left over
    assert isinstance(scheduler.weight_lambda, Exponential)
    assert scheduler.lambdas[0] > scheduler.weight_lambda(0)


def test_steps_write_into_the_same_tensors() -> None:
    # A compiled step guards on them and a CUDA graph reads their memory.
    gm = prepared()
    state = states(gm)["default"]
    before = {name: (value, value.data_ptr()) for name, value in state.named_buffers()}
    scheduler = PEGEScheduler(gm, 10)
    for _ in range(3):
        scheduler.step()
    for name, value in state.named_buffers():
        assert value is before[name][0]
        assert value.data_ptr() == before[name][1]
        assert value.ndim == 0


def test_a_scheduler_reaches_a_model_that_was_moved_after_it_was_made() -> None:
    gm = prepared()
    scheduler = PEGEScheduler(gm, 4, Linear(0, 1, steps=4), Constant(0.5), Constant(0.25))
    gm.to(torch.float64)
    gm._apply(torch.clone)  # as a move to a device: other tensors
    scheduler.step()
    assert numbers(states(gm)["default"]) == approx(0.25, 0.5, 0.25, refresh_key(1))
    assert states(gm)["default"].refresh_key.dtype == torch.int32


def test_a_scheduler_leaves_a_copy_of_its_model_alone() -> None:
    gm = prepared()
    scheduler = PEGEScheduler(gm, 4, Linear(0, 1, steps=4))
    twin = copy.deepcopy(gm)
    scheduler.step()
    assert states(gm)["default"].rate.item() == 0.25
    assert states(twin)["default"].rate.item() == 0.0
    PEGEScheduler(twin, 4, Constant(0.9))
    assert states(gm)["default"].rate.item() == 0.25


# --- masks -------------------------------------------------------------------------------------------------------


def masks(gm: GraphModule, size: int = 4000) -> list[torch.Tensor]:
    return [replacement_mask(fq.key, fq.schedule.rate, (size,)) for fq in fake_quants(gm).values()]


def test_masks_that_are_never_refreshed_only_grow() -> None:
    gm = prepared()
    scheduler = PEGEScheduler(gm, 12, Linear(0.1, 1.0, steps=12), refresh="never")
    before = masks(gm)
    for _ in range(12):
        scheduler.step()
        after = masks(gm)
        for old, new in zip(before, after, strict=True):
            assert not bool((old & ~new).any())
            assert int(new.sum()) > int(old.sum())
        before = after
    assert all(mask.all() for mask in before)


def replaced(fq: FakeQuant, x: torch.Tensor) -> torch.Tensor:
    """Which elements a forward pass replaces; x lies off every grid."""
    with torch.no_grad():
        return fq.train()(x) != x


def test_elements_once_replaced_stay_replaced_in_the_forward_pass_too() -> None:
    gm = prepared()
    scheduler = PEGEScheduler(gm, 6, Linear(0.0, 1.0, steps=6), refresh="never")
    (fq,) = [fq for name, fq in fake_quants(gm).items() if name == "2.weight_fq"]
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    before = replaced(fq, x)
    assert not before.any()
    for _ in range(6):
        scheduler.step()
        after = replaced(fq, x)
        assert not bool((before & ~after).any())
        before = after
    assert before.all()


def test_refreshed_masks_are_independent_draws_at_every_step() -> None:
    gm = prepared()
    scheduler = PEGEScheduler(gm, 8, Constant(0.4))
    seen = [masks(gm)]
    for _ in range(12):  # past the end the masks still change
        scheduler.step()
        seen.append(masks(gm))
    drawn = [mask for step in seen for mask in step]  # of every site and step
    deviation = math.sqrt(4000 * 0.16 * 0.84)
    for i, one in enumerate(drawn):
        assert abs(int(one.sum()) - 1600) < 5 * math.sqrt(4000 * 0.4 * 0.6)
        for other in drawn[:i]:
            assert abs(int((one & other).sum()) - 640) < 5 * deviation


def test_the_seed_of_prepare_decides_the_masks() -> None:
    found = []
    for seed in (0, 0, 1):
        gm = pege_fx.prepare(model(), "W3A3", (torch.randn(5, 6),), seed=seed)
        PEGEScheduler(gm, 8, Constant(0.5))
        found.append(torch.cat(masks(gm)))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# --- state -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refresh", ["step", "never"])
@pytest.mark.parametrize("done", [0, 3, 14])
def test_a_saved_schedule_continues_identically(refresh: Any, done: int) -> None:
    def made() -> tuple[GraphModule, PEGEScheduler]:
        gm = prepared()
        return gm, PEGEScheduler(gm, 10, Linear(0, 1, steps=10), Linear(0, 2, steps=10), refresh=refresh)

    gm, scheduler = made()
    for _ in range(done):
        scheduler.step()
    state = json.loads(json.dumps(scheduler.state_dict()))  # plain numbers and text
    other_gm, other = made()
    other.step()
    other.load_state_dict(state)
    for _ in range(4):
        assert numbers(states(gm)["default"]) == numbers(states(other_gm)["default"])
        assert all(torch.equal(a, b) for a, b in zip(masks(gm), masks(other_gm), strict=True))
        assert repr(scheduler) == repr(other)
        scheduler.step()
        other.step()
    assert scheduler.state_dict() == other.state_dict()


def test_a_state_of_another_graph_is_refused() -> None:
    scheduler = PEGEScheduler(prepared("W3A3"), 10)
    for other in (prepared("W4A3"), pege_fx.prepare(nn.Sequential(nn.Linear(6, 4)), "W3A3")):
        with pytest.raises(
            CheckpointError, match=r"the state belongs to another graph or policy: graph is .* there and"
        ) as error:
            PEGEScheduler(other, 10).load_state_dict(scheduler.state_dict())
        assert "prepare the same model with the same policy" in str(error.value)


def test_a_state_of_another_schedule_is_refused() -> None:
    gm = prepared()
    scheduler = PEGEScheduler(gm, 10, Constant(0.5))
    with pytest.raises(CheckpointError, match="another length: total_steps is 20 there and 10 here"):
        scheduler.load_state_dict(PEGEScheduler(prepared(), 20).state_dict())
    with pytest.raises(CheckpointError, match="another kind of masks: refresh is 'never' there and 'step' here"):
        scheduler.load_state_dict(PEGEScheduler(prepared(), 10, refresh="never").state_dict())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"t": 11}, r"t=11 is no position of a schedule of 10 steps"),
        ({"t": -1}, r"t=-1 is no position"),
        ({"t": 2.5}, r"t=2.5 is no position"),
        ({"refreshes": "3"}, r"refreshes='3' is no position"),
        ({"refreshes": -2}, r"refreshes=-2 is no position"),
    ],
)
def test_a_position_that_does_not_exist_is_refused_and_changes_nothing(wrong: dict[str, Any], words: str) -> None:
    gm = prepared()
    scheduler = PEGEScheduler(gm, 10, Linear(0, 1, steps=10))
    scheduler.step()
    before = numbers(states(gm)["default"])
    with pytest.raises(CheckpointError, match=words):
        scheduler.load_state_dict(scheduler.state_dict() | {"t": 5, "refreshes": 5} | wrong)
    assert scheduler.t == 1
    assert numbers(states(gm)["default"]) == before


def test_a_state_with_missing_entries_is_refused() -> None:
    scheduler = PEGEScheduler(prepared(), 10)
    with pytest.raises(CheckpointError, match=r"not a PEGEScheduler's state: graph, refresh, refreshes, total_steps missing"):
        scheduler.load_state_dict({"t": 3, "base_lrs": [0.1]})


# --- groups ------------------------------------------------------------------------------------------------------


def test_a_group_follows_its_own_curves_and_the_schedulers_where_it_has_none() -> None:
    gm = prepared(GROUPED)
    own = GroupCurves(replacement=Constant(0.75), activation_lambda=Linear(0, 3, steps=10))
    scheduler = PEGEScheduler(gm, 10, Linear(0, 1, steps=10), Constant(0.5), Constant(0.25), groups={"head": own})
    scheduler.step()
    found = states(gm)
    assert numbers(found["default"]) == approx(0.1, 0.5, 0.25, refresh_key(1))
    assert numbers(found["head"]) == approx(0.75, 0.5, 0.3, refresh_key(1))
    in_head = {name for name, fq in fake_quants(gm).items() if fq.schedule is found["head"]}
    assert in_head == {"4.weight_fq", "_3_fq"}


def test_a_group_that_no_rule_names_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"no rule puts anything into the schedule group 'haed'") as error:
        PEGEScheduler(prepared(GROUPED), 10, groups={"haed": GroupCurves()})
    assert "groups: default, head; closest: head" in str(error.value)


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [0, -1, 2.5, "10", True, None])
def test_a_length_that_is_no_positive_whole_number_is_refused(total: Any) -> None:
    with pytest.raises(ScheduleError, match=r"total_steps=.*: give a positive whole number of steps or epochs") as error:
        PEGEScheduler(prepared(), total)
    assert repr(total) in str(error.value)


@pytest.mark.parametrize("curve", ["replacement", "weight_lambda", "activation_lambda"])
@pytest.mark.parametrize("wrong", [lambda t: -0.1, lambda t: math.nan, lambda t: math.inf, lambda t: 1.0 - t])
def test_a_curve_out_of_range_is_refused_before_anything_changes(curve: str, wrong: Callable[[float], float]) -> None:
    gm = prepared()
    with pytest.raises(ScheduleError, match=rf"{curve} gives .* at t = \d+: it must lie in \[0, "):
        PEGEScheduler(gm, 10, **{curve: wrong})  # type: ignore[arg-type]
    assert numbers(states(gm)["default"]) == (1.0, 0.0, 0.0, refresh_key(0))
    with pytest.raises(ScheduleError, match=curve):
        PEGEScheduler(prepared(GROUPED), 10, groups={"head": GroupCurves(**{curve: wrong})})  # type: ignore[arg-type]


def test_a_rate_above_one_is_refused_and_a_lambda_above_one_is_not() -> None:
    with pytest.raises(ScheduleError, match=r"replacement gives 1\.5 at t = 0: it must lie in \[0, 1\.0\]"):
        PEGEScheduler(prepared(), 10, Constant(1.5))
    assert PEGEScheduler(prepared(), 10, weight_lambda=Constant(1.5)).lambdas[0] == 1.5


def test_an_unknown_way_of_refreshing_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"refresh='epoch': give \"step\" or \"never\""):
        PEGEScheduler(prepared(), 10, refresh="epoch")  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [model(), torch.fx.symbolic_trace(model()), None, "W4A4"])
def test_a_model_that_was_not_prepared_is_refused(wrong: Any) -> None:
    with pytest.raises(ModelError, match=r"was not prepared: call pege_fx.prepare\(model, policy\) first"):
        PEGEScheduler(wrong, 10)


# --- for people --------------------------------------------------------------------------------------------------


def test_it_tells_where_it_stands() -> None:
    scheduler = PEGEScheduler(prepared(), 40, Linear(0, 1, steps=40), Constant(1e-3), Constant(2e-5))
    for _ in range(10):
        scheduler.step()
    assert repr(scheduler) == (
        "PEGEScheduler(step 10 of 40: p=0.250, λ weights 1.00e-03, activations 2.00e-05, masks redrawn every step, 6 sites)"
    )
    growing = PEGEScheduler(prepared(GROUPED), 5, refresh="never")
    assert "step 0 of 5" in repr(growing)
    assert "masks growing" in repr(growing)
    assert "groups default, head" in repr(growing)


@pytest.mark.parametrize("refresh", ["step", "never"])
@pytest.mark.parametrize("steps", [0, 3, 25])
def test_going_somewhere_is_stepping_there(refresh: Any, steps: int) -> None:
    walked, jumped = prepared(), prepared()
    a, b = (PEGEScheduler(gm, 10, refresh=refresh) for gm in (walked, jumped))
    for _ in range(steps):
        a.step()
    b.go_to(steps)
    assert a.state_dict() == b.state_dict()
    for name, state in states(walked).items():
        assert numbers(state) == numbers(states(jumped)[name])


def test_every_process_sees_its_part_and_lambda_of_activations_makes_up_for_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "rank_and_size", lambda: (2, 4))
    gm = prepared()
    PEGEScheduler(gm, 10, weight_lambda=Constant(0.5), activation_lambda=Constant(0.25))
    for state in states(gm).values():
        assert state.rank == 2
        assert (state.weight_lambda.item(), state.activation_lambda.item()) == (0.5, 1.0)


def test_the_plan_is_found_wherever_it_has_survived() -> None:
    gm = prepared()
    plan = plan_of(gm)
    gm.meta.clear()  # as pickle does
    assert plan_of(gm) == plan
    with pytest.warns(pege_fx.PegeWarning, match="nothing is quantized"):
        floats = pege_fx.prepare(model(), QuantPolicy(()))
    assert plan_of(floats) is floats.meta["plan"]
    assert "0 sites)" in repr(PEGEScheduler(floats, 3))


def test_the_curves_of_a_group_are_a_value_with_names() -> None:
    curves = GroupCurves(replacement=Constant(1.0))
    with pytest.raises(AttributeError):
        curves.replacement = None  # type: ignore[misc]
    with pytest.raises(TypeError):
        GroupCurves(Constant(1.0))  # type: ignore[misc]


def test_the_first_of_several_unknown_groups_is_named() -> None:
    with pytest.raises(ScheduleError, match="schedule group 'aa'"):
        PEGEScheduler(prepared(), 10, groups={"zz": GroupCurves(), "aa": GroupCurves()})


@pytest.mark.parametrize("at", [0, 1, 5, 10])
def test_a_curve_is_tried_at_its_ends_and_in_the_middle(at: int) -> None:
    with pytest.raises(ScheduleError, match=rf"replacement gives 2.0 at t = {at}: it must lie in \[0, 1.0\]\."):
        PEGEScheduler(prepared(), 10, lambda t: 2.0 if t == at else 0.5)
    with pytest.raises(ScheduleError, match=rf"weight_lambda gives inf at t = {at}: it must lie in \[0, inf\)\."):
        PEGEScheduler(prepared(), 10, weight_lambda=lambda t: math.inf if t == at else 0.5)
