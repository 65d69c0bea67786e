"""Averages of a prepared model: its schedule, its grids and what it deploys follow the model, however the average is made."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, update_bn

import pege_fx
from pege_fx import fake_quants

Update = Callable[[GraphModule], None]


class ByParameters:
    """Moves every floating-point parameter and buffer of a copy, and copies the rest."""

    def __init__(self, gm: GraphModule) -> None:
        self.module = copy.deepcopy(gm)

    @torch.no_grad()
    def update_parameters(self, gm: GraphModule) -> None:
        mine = [*self.module.parameters(), *self.module.buffers()]
        for average, value in zip(mine, [*gm.parameters(), *gm.buffers()], strict=True):
            average.lerp_(value, 0.1) if average.is_floating_point() else average.copy_(value)


class ByState:
    """Moves what a ``state_dict`` holds, in place, and nothing else."""

    def __init__(self, gm: GraphModule) -> None:
        self.module = copy.deepcopy(gm)

    @torch.no_grad()
    def update_parameters(self, gm: GraphModule) -> None:
        values = gm.state_dict()
        for name, average in self.module.state_dict().items():
            if average.is_floating_point():
                average.mul_(0.9).add_(values[name], alpha=0.1)


AVERAGES: dict[str, Callable[[GraphModule], Any]] = {
    "swa": AveragedModel,
    "swa, buffers too": lambda gm: AveragedModel(gm, use_buffers=True),
    "ema": lambda gm: AveragedModel(gm, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "ema, buffers too": lambda gm: AveragedModel(gm, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    "ema of each, buffers too": lambda gm: AveragedModel(gm, avg_fn=get_ema_avg_fn(0.9), use_buffers=True),
    "by parameters and buffers": ByParameters,
    "by state": ByState,
}


def batch() -> Tensor:
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def prepared(*example: Tensor) -> GraphModule:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    return pege_fx.prepare(net, "W4A4", example or None)


def trained(gm: GraphModule, average: Any, after: Callable[[], object] = lambda: None, steps: int = 6) -> None:
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.01)
    for _ in range(steps):
        gm(batch()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(gm)
        after()


@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_stands_where_its_model_does(kind: str) -> None:
    gm = prepared(batch())
    scheduler = pege_fx.PEGEScheduler(gm, total_steps=6)
    average = AVERAGES[kind](gm)
    trained(gm, average, scheduler.step)
    average.module.eval()
    schedule, own = (fake_quants(module)["0.weight_fq"].schedule for module in (gm, average.module))
    assert own is not schedule
    assert own.rate == schedule.rate == 1
    assert own.is_complete
    for name in ("weight_lambda", "activation_lambda", "refresh_key", "loss_scale"):
        assert torch.equal(getattr(own, name), getattr(schedule, name)), name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deployed = pege_fx.convert(average.module)
    assert torch.equal(deployed(batch()), average.module(batch()))


@pytest.mark.parametrize("kind", AVERAGES)
def test_averaged_scales_are_kept_in_evaluation(kind: str) -> None:
    gm = prepared()
    average = AVERAGES[kind](gm)
    trained(gm, average, steps=3)
    model = average.module.eval()
    before = {name: value.clone() for name, value in model.state_dict().items() if "method" in name}
    with torch.no_grad():
        model(100 * batch())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(fq.is_calibrated for fq in fake_quants(model).values())


def test_a_tensor_in_the_place_of_a_flag_says_nothing_until_it_is_written() -> None:
    fq = fake_quants(prepared())["0.weight_fq"]
    fq.calibrated = torch.ones(())  # as ``to_empty`` leaves whatever was in the memory
    assert not fq.is_calibrated
    with torch.no_grad():
        fq.calibrated.fill_(1.0)
    assert fq.is_calibrated


def test_moved_before_its_first_update_it_is_calibrated_too() -> None:
    gm = prepared()
    average = AveragedModel(gm).double().float()
    trained(gm, average, steps=1)
    assert all(fq.is_calibrated for fq in fake_quants(average).values())


def test_new_statistics_of_an_average_move_neither_schedule_nor_grids() -> None:
    gm = prepared(batch())
    pege_fx.PEGEScheduler(gm, total_steps=6)
    average = AveragedModel(gm, use_buffers=True)
    trained(gm, average, steps=3)
    site = fake_quants(average)["module.0.weight_fq"]
    scale, rate = site.method.scale.clone(), site.schedule.rate.clone()
    assert not site.schedule.is_complete
    update_bn([batch(), 2 * batch()], average)
    assert torch.equal(site.method.scale, scale)
    assert torch.equal(site.schedule.rate, rate)
    with torch.no_grad(), pytest.warns(pege_fx.PegeWarning, match="replacement is not complete"):
        assert torch.equal(average.eval()(batch()), pege_fx.convert(average.module)(batch()))


def test_a_copy_with_a_scheduler_of_its_own_follows_nobody() -> None:
    gm = prepared(batch())
    scheduler = pege_fx.PEGEScheduler(gm, total_steps=6)
    other = copy.deepcopy(gm)
    own = pege_fx.PEGEScheduler(other, total_steps=6)
    with torch.no_grad():
        for buffer in other.buffers():  # as DistributedDataParallel does before each forward
            buffer.copy_(buffer.clone())
    for _ in range(6):
        scheduler.step()
    schedule = fake_quants(other)["0.weight_fq"].schedule
    assert float(schedule.rate) == pytest.approx(own.rate)
    assert own.rate < 1


def test_a_copy_that_nobody_writes_stays_where_it_was() -> None:
    gm = prepared(batch())
    scheduler = pege_fx.PEGEScheduler(gm, total_steps=6)
    other = copy.deepcopy(gm)
    rate = scheduler.rate
    for _ in range(6):
        scheduler.step()
    other.load_state_dict(gm.state_dict())
    with pytest.warns(pege_fx.PegeWarning, match="replacement is not complete"):
        pege_fx.convert(other)
    assert float(fake_quants(other)["0.weight_fq"].schedule.rate) == pytest.approx(rate)


def test_a_state_with_flags_as_they_were_stored_before_is_read() -> None:
    gm, other = prepared(batch()), prepared()
    state = {name: value.bool() if name.endswith("calibrated") else value for name, value in gm.state_dict().items()}
    other.load_state_dict(state)
    assert all(fq.is_calibrated for fq in fake_quants(other).values())
    assert torch.equal(other.eval()(batch()), gm.eval()(batch()))
