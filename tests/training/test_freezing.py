"""Freezing of oscillating weights: Algorithm 1 written out for one weight at a time, and what it does to a training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

import pege_fx
from pege_fx import CheckpointError, Constant, Cosine, ModelError, QuantPolicy, QuantSpec, Rule, ScheduleError, WeightFreezing


def linear(bits: int = 3, method: str = "lsq", size: int = 6) -> GraphModule:
    torch.manual_seed(0)
    policy = QuantPolicy((Rule(weight=QuantSpec(bits=bits, method=method)),))
    gm = pege_fx.prepare(nn.Sequential(nn.Linear(size, 1, bias=False)), policy)
    with torch.no_grad():
        gm(torch.ones(1, size))  # which sets the grid
        if method == "lsq":
            pege_fx.fake_quants(gm)["0.weight_fq"].method.scale.fill_(0.5)  # type: ignore[operator, union-attr]
    return gm


def written_out(codes: list[int], thresholds: list[float], m: float) -> tuple[list[int], list[bool]]:
    """The codes after each step, and whether the weight is frozen then."""
    frozen, kept, direction, frequency, average = False, codes[0], 0, 0.0, float(codes[0])
    seen: list[int] = []
    states: list[bool] = []
    for code, threshold in zip(codes, thresholds, strict=True):
        code = kept if frozen else code
        change = (code > kept) - (code < kept)
        frequency = m * (change * direction == -1) + (1 - m) * frequency
        direction = change or direction
        kept = code
        if frequency > threshold and not frozen:
            frozen, kept = True, round(average)
        average = m * code + (1 - m) * average
        seen.append(kept)
        states.append(frozen)
    return seen, states


CODES = st.lists(st.lists(st.integers(-4, 3), min_size=6, max_size=6), min_size=1, max_size=20)


@given(CODES, st.floats(0.05, 0.9), st.floats(0.01, 0.6))
def test_it_is_algorithm_1(codes: list[list[int]], momentum: float, last: float) -> None:
    gm = linear()
    weight = gm.get_parameter("0.weight")
    curve = Cosine(0.7, last, steps=len(codes))
    freezing = WeightFreezing(gm, curve, momentum)
    found: list[list[float]] = []
    for step in codes:
        with torch.no_grad():
            weight.copy_(0.5 * torch.tensor([step]) + 0.1)  # where the optimizer would leave them
        freezing.step()
        found.append((weight.detach() / 0.5).round()[0].tolist())
    wanted = [written_out([step[i] for step in codes], [curve(t) for t in range(len(codes))], momentum) for i in range(6)]
    assert found == [[wanted[i][0][t] for i in range(6)] for t in range(len(codes))]
    frozen = [states[-1] for _, states in wanted]
    assert freezing.frozen == pytest.approx(sum(frozen) / 6)
    middle = weight.detach()[0] / 0.5
    for i, is_frozen in enumerate(frozen):  # a frozen weight lies in the middle of its code, the others are left alone
        assert float(middle[i]) == pytest.approx(round(float(middle[i])) + (0.0 if is_frozen else 0.2), abs=1e-6)


def test_a_frozen_weight_keeps_its_code_while_the_scale_and_the_sign_of_its_batch_norm_move() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    for granularity in ("channel", "tensor"):
        spec = QuantSpec(bits=3, granularity=granularity)  # type: ignore[arg-type]
        gm = pege_fx.prepare(model, QuantPolicy((Rule(weight=spec),)), (torch.randn(2, 3, 5, 5),))
        fq, weight = pege_fx.fake_quants(gm)["0.weight_fq"], gm.get_parameter("0.weight")
        freezing = WeightFreezing(gm, 1e-9, momentum=1.0)
        freezing.step()
        for sign in (1, -1, 1):
            with torch.no_grad():
                weight.add_(sign * 3 * fq.method.grid_of().scale.amax() / (1 if granularity == "channel" else 0.5))
            freezing.step()
        assert freezing.frozen > 0.5
        (state,) = freezing.state_dict()["sites"].values()
        codes, frozen = state["codes"].clone(), state["frozen"].clone()
        with torch.no_grad():
            fq.method.scale.mul_(1.7)  # type: ignore[operator, union-attr]
            gm.get_parameter("1.weight").neg_()
            weight.add_(0.3)
        freezing.step()
        assert torch.equal(fq.codes(weight).short()[frozen], codes[frozen])


def train(gm: GraphModule, freezing: WeightFreezing, steps: int, optimizer: Any) -> None:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    target = x @ torch.linspace(-1, 1, 6).unsqueeze(1)
    for _ in range(steps):
        optimizer.zero_grad()
        (gm(x) - target).square().mean().backward()
        optimizer.step()
        freezing.step()


def test_oscillating_weights_of_a_regression_are_frozen_and_oscillate_no_more() -> None:
    gm = linear()
    optimizer = torch.optim.SGD(gm.parameters(), 0.05)
    freezing = WeightFreezing(gm, 0.05, momentum=0.05)
    train(gm, freezing, 400, optimizer)
    assert 0 < freezing.frozen <= 1
    codes = {tuple(pege_fx.fake_quants(gm)["0.weight_fq"].codes(gm.get_parameter("0.weight"))[0].tolist())}
    for _ in range(50):
        train(gm, freezing, 1, optimizer)
        codes.add(tuple(pege_fx.fake_quants(gm)["0.weight_fq"].codes(gm.get_parameter("0.weight"))[0].tolist()))
    assert len(codes) <= 2  # without freezing several of the six weights go on


def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def made() -> tuple[GraphModule, torch.optim.Optimizer, WeightFreezing]:
        gm = linear()
        return gm, torch.optim.Adam(gm.parameters(), 0.02), WeightFreezing(gm, Cosine(0.1, 0.01, steps=200), momentum=0.05)

    gm, optimizer, freezing = made()
    train(gm, freezing, 120, optimizer)
    other, other_optimizer, resumed = made()
    first, first_optimizer, first_freezing = made()
    train(first, first_freezing, 70, first_optimizer)
    extra = {"freezing": first_freezing.state_dict()}
    pege_fx.save(first, tmp_path / "state.safetensors", optimizer=first_optimizer, extra=extra)
    pege_fx.load(tmp_path / "state.safetensors", other, optimizer=other_optimizer)
    resumed.load_state_dict(pege_fx.checkpoint_info(tmp_path / "state.safetensors").extra["freezing"])
    train(other, resumed, 50, other_optimizer)
    assert resumed.frozen == freezing.frozen > 0
    for one, two in zip(gm.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: WeightFreezing(linear(), 0.0), ScheduleError, "threshold gives 0.0 at t = 0"),
        (lambda: WeightFreezing(linear(), 0.1, momentum=0.0), ScheduleError, "momentum=0.0 must lie in"),
        (lambda: WeightFreezing(linear(bits=8), 0.1), ModelError, "no weight can be frozen: none has 4 bits or fewer"),
        (lambda: WeightFreezing(linear(method="dorefa"), 0.1), ModelError, "no weight can be frozen"),
        (lambda: WeightFreezing(nn.Linear(2, 2), 0.1), ModelError, "was not prepared"),  # type: ignore[arg-type]
    ],
)
def test_what_can_not_be_frozen_is_said(make: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_the_state_of_another_model_is_refused() -> None:
    freezing, other = WeightFreezing(linear(), Constant(0.1)), WeightFreezing(linear(size=5), Constant(0.1))
    freezing.step()
    with pytest.raises(CheckpointError, match=r"the state of the frozen weights has 0.weight_fq, which is not there"):
        other.load_state_dict(freezing.state_dict())


def test_eight_bit_weights_beside_others_are_left_alone() -> None:
    policy = QuantPolicy((Rule(weight="3"), Rule(match="1", weight="8")))
    gm = pege_fx.prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), policy)
    gm(torch.ones(1, 4))
    freezing = WeightFreezing(gm, 0.1)
    freezing.step()
    assert list(freezing.state_dict()["sites"]) == ["0.weight_fq"]
    before: Tensor = gm.get_parameter("1.weight").clone()
    freezing.step()
    assert torch.equal(before, gm.get_parameter("1.weight"))
