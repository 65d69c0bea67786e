"""Loops people use: accumulated gradients, clipping, averages, activation checkpointing, and what a float model teaches."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

import pege_fx
from pege_fx import Constant, PEGEScheduler, QuantPolicy

METHODS = ("lsq", "pact", "dorefa", "interval")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4)]
    return nn.Sequential(*layers).double()


made = torch.Generator().manual_seed(1)
X, LABELS = torch.randn(12, 3, 6, 6, generator=made).double(), torch.randint(4, (12,), generator=made)


def prepared(
    method: str = "lsq", batch_norm: Any = "train", rate: float = 0.5, weight_lambda: float = 1e-3
) -> tuple[GraphModule, PEGEScheduler]:
    gm = pege_fx.prepare(net(), QuantPolicy.parse("W3A3", method=method), (X,), batch_norm=batch_norm)
    return gm, PEGEScheduler(gm, 10, Constant(rate), Constant(weight_lambda), Constant(1e-4))


def gradients(gm: GraphModule) -> dict[str, Tensor]:
    found = {}
    for name, parameter in gm.named_parameters():
        assert parameter.grad is not None, f"{name} got no gradient"
        found[name] = parameter.grad
    return found


@pytest.mark.parametrize("method", METHODS)
def test_accumulated_gradients_are_those_of_the_whole_batch(method: str) -> None:
    (whole, _), (parts, _) = (prepared(method, "freeze", 1.0, 0.0) for _ in range(2))
    F.cross_entropy(whole(X), LABELS).backward()
    for x, labels in zip(X.split(4), LABELS.split(4), strict=True):
        (F.cross_entropy(parts(x), labels) / 3).backward()
    wanted = gradients(whole)
    for name, gradient in gradients(parts).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-6, atol=1e-9)


def test_lambda_for_weights_counts_once_in_every_backward_pass() -> None:
    """Whoever accumulates k gradients divides it by k."""
    (whole, _), (parts, _) = (prepared("lsq", "freeze", 1.0, 3e-2) for _ in range(2))
    PEGEScheduler(parts, 10, Constant(1.0), Constant(1e-2), Constant(1e-4))
    F.cross_entropy(whole(X), LABELS).backward()
    for x, labels in zip(X.split(4), LABELS.split(4), strict=True):
        (F.cross_entropy(parts(x), labels) / 3).backward()
    wanted = gradients(whole)
    for name, gradient in gradients(parts).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch_norm", ["train", "freeze", "keep"])
def test_every_parameter_gets_a_gradient(method: str, batch_norm: str) -> None:
    gm, _ = prepared(method, batch_norm)
    F.cross_entropy(gm(X), LABELS).backward()
    gradients(gm)


def test_gradients_are_clipped() -> None:
    gm, _ = prepared()
    F.cross_entropy(gm(X), LABELS).backward()
    torch.nn.utils.clip_grad_norm_(gm.parameters(), 1e-3)
    total = torch.stack([gradient.norm() for gradient in gradients(gm).values()]).norm()
    assert total.item() == pytest.approx(1e-3, rel=1e-2)


def test_an_average_of_the_weights_is_deployed_as_it_evaluates() -> None:
    gm, scheduler = prepared()
    optimizer = torch.optim.Adam(pege_fx.parameter_groups(gm, 1e-2))
    average = AveragedModel(gm, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(gm(X), LABELS).backward()
        optimizer.step()
        scheduler.step()
        average.update_parameters(gm)
    PEGEScheduler(average.module, 1, Constant(1.0))
    update_bn([X], average)
    deployed = pege_fx.convert(average.module)
    assert torch.equal(deployed(X), average.eval()(X))
    assert not torch.equal(average(X), gm.eval()(X))


@pytest.mark.parametrize("method", METHODS)
def test_activation_checkpointing_sees_the_same_masks(method: str) -> None:
    (whole, _), (again, _) = (prepared(method, "freeze") for _ in range(2))
    F.cross_entropy(whole(X), LABELS).backward()
    F.cross_entropy(checkpoint(again, X, use_reentrant=False), LABELS).backward()
    wanted = gradients(whole)
    for name, gradient in gradients(again).items():
        assert torch.equal(gradient, wanted[name])


def test_a_float_model_teaches() -> None:
    gm, scheduler = prepared()
    teacher = net().eval()
    optimizer = torch.optim.Adam(pege_fx.parameter_groups(gm, 1e-2))
    before = copy.deepcopy(teacher.state_dict())
    losses = []
    for _ in range(20):
        with torch.no_grad():
            wanted = F.log_softmax(teacher(X), 1)
        loss = F.kl_div(F.log_softmax(gm(X), 1), wanted, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
