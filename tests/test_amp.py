"""Mixed precision: a scaled loss has a scaled λ, and nothing of a step waits for the device."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pege_fx
from pege_fx import Constant, PEGEScheduler, QuantPolicy

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ESTIMATORS = ["pege", "pege-relative", "pege-share", "ewgs", "ste"]


@pytest.fixture(autouse=True)
def _plain_operations() -> Iterator[None]:
    with pege_fx.kernels.eager_kernels():
        yield


def prepared(estimator: str = "pege", rate: float = 0.5, strength: float = 1e-2) -> tuple[Any, PEGEScheduler]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2)
    )
    gm = pege_fx.prepare(net, QuantPolicy.parse("W3A3", first="4", last="4", estimator=estimator), (X,)).train()
    return gm, PEGEScheduler(gm, 10, Constant(rate), Constant(strength), Constant(strength))


def gradients(gm: Any, scaler: torch.amp.GradScaler | None = None) -> dict[str, Tensor]:
    gm.zero_grad()
    loss = gm(X).square().sum()
    if scaler is None:
        loss.backward()
    else:
        scaler.scale(loss).backward()
        scaler.unscale_(torch.optim.SGD(gm.parameters(), lr=0.1))
    return {name: value.grad.clone() for name, value in gm.named_parameters()}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_unscaled_gradients_are_those_without_a_scaler(estimator: str) -> None:
    gm, scheduler = prepared(estimator)
    wanted = gradients(gm)
    for factor in (2.0**10, 2.0**4):  # powers of two, so that nothing is rounded
        scaler = torch.amp.GradScaler("cpu", init_scale=factor)
        scheduler.follow(scaler)
        found = gradients(gm, scaler)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_without_following_lambda_counts_less() -> None:
    gm, _ = prepared("pege")
    wanted = gradients(gm)
    found = gradients(gm, torch.amp.GradScaler("cpu", init_scale=1024.0))
    assert any(not torch.allclose(found[name], wanted[name], rtol=1e-3) for name in wanted)


def test_the_factor_may_change_from_step_to_step_and_a_scaler_may_be_off() -> None:
    gm, scheduler = prepared()
    wanted = gradients(gm)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for factor in (2.0**10, 2.0**9):
        if factor != 2.0**10:
            scaler.update(factor)
        scheduler.follow(scaler)
        loss = gm(X).square().sum()
        gm.zero_grad()
        scaler.scale(loss).backward()
        assert all(torch.equal(value.grad / factor, wanted[name]) for name, value in gm.named_parameters())
    scheduler.follow(torch.amp.GradScaler("cpu", enabled=False))
    states = [fq.schedule for fq in pege_fx.fake_quants(gm).values()]
    assert {(state.is_scaled, float(state.loss_scale)) for state in states} == {(False, 1.0)}
    found = gradients(gm)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_factor_leaves_the_scheduled_lambda_alone() -> None:
    gm, scheduler = prepared(strength=0.25)
    scheduler.follow(torch.amp.GradScaler("cpu", init_scale=1024.0))
    assert scheduler.lambdas == (0.25, 0.25)
    site = pege_fx.fake_quants(gm.half())["0.weight_fq"]
    assert float(site.lambda_) == 0.25
    assert float(site.schedule.loss_scale) == 1024.0  # half precision of the model rounds no schedule
    assert not [key for key in gm.state_dict() if "loss_scale" in key]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_training_loop_under_autocast(dtype: torch.dtype, layout: torch.memory_format) -> None:
    gm, scheduler = prepared()
    gm = gm.to(memory_format=layout)
    x, optimizer = X.to(memory_format=layout), torch.optim.SGD(gm.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16, init_scale=2.0**8)
    losses, seen = [], []
    for site in pege_fx.fake_quants(gm).values():
        site.register_forward_hook(lambda site, args, y: seen.append((args[0].dtype, y.dtype, args[0].stride() == y.stride())))
    for _ in range(8):
        scheduler.follow(scaler)
        with torch.autocast("cpu", dtype):
            out = gm(x)
        loss = out.float().square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(before == after and same for before, after, same in seen)  # neither widened nor laid out anew
    assert dtype in {before for before, _, _ in seen}
    assert {value.dtype for value in gm.parameters()} == {torch.float32}


class NoWaiting(TorchDispatchMode):
    """Refuses whatever would make the host wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        assert name not in ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::equal", "aten::is_nonzero"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("rate", "strength"), [(0.5, 1e-2), (1.0, 1e-2), (0.5, 0.0), (1.0, 0.0), (None, None)])
def test_no_step_waits_for_the_device(rate: float | None, strength: float | None, recompute: bool) -> None:
    policy = QuantPolicy((pege_fx.Rule(weight="3", input="3"), pege_fx.Rule(recompute=recompute)))
    gm = pege_fx.prepare(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), policy, (X,)).train()
    optimizer, scaler = torch.optim.SGD(gm.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    scheduler = None
    if rate is not None and strength is not None:
        scheduler = PEGEScheduler(gm, 10, Constant(rate), Constant(strength), Constant(strength))
    with NoWaiting():
        for _ in range(2):
            if scheduler is not None:
                scheduler.follow(scaler)
            scaler.scale(gm(X).square().sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
        gm.eval()
        with torch.no_grad():
            gm(X)
