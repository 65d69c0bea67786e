"""Frozen BatchNorms are found by what they compute, whatever their class, and folded."""

import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import pege_fx
from pege_fx.decompositions.frozen_norm import FrozenNorm, freeze_norm

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
NAMES = ("weight", "bias", "running_mean", "running_var")


class OwnFrozen(nn.Module):
    """Without an attribute eps, as transformers has it."""

    def __init__(self, features: int) -> None:
        super().__init__()
        for name in NAMES:
            self.register_buffer(name, torch.rand(features) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (getattr(self, name).reshape(1, -1, 1, 1) for name in NAMES)
        scale: Tensor = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


class WithoutMean(OwnFrozen):
    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.reshape(1, -1, 1, 1)


class InTrainingOther(OwnFrozen):
    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else super().forward(x)


def torchvisions(features: int) -> nn.Module:
    norm = torchvision.ops.FrozenBatchNorm2d(features, eps=1e-3)
    norm.running_var.uniform_(0.5, 2)
    norm.running_mean.normal_()
    return norm


@pytest.mark.parametrize("make", [torchvisions, OwnFrozen])
@pytest.mark.parametrize("mode", ["train", "freeze"])
def test_it_is_folded_into_the_convolution(make: Any, mode: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), make(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    gm = pege_fx.prepare(model, "W8A8", (X,), batch_norm=mode)
    assert pege_fx.plan_of(gm).operations[0].batch_norm.startswith("folded")
    deployed = pege_fx.convert(gm)
    assert torch.equal(deployed(X), gm.eval()(X))
    assert not {"mul", "add", "sub", "rsqrt"} & {getattr(node.target, "__name__", "") for node in deployed.graph.nodes}
    expected = model.eval()(X)
    assert (deployed(X) - expected).norm() < 0.1 * expected.norm()  # LSQ starts with a step of its own


@pytest.mark.parametrize("make", [torchvisions, OwnFrozen])
def test_it_computes_what_it_did(make: Any) -> None:
    module = make(3)
    frozen = copy.deepcopy(module)
    assert freeze_norm(frozen)
    assert isinstance(frozen, FrozenNorm)
    torch.testing.assert_close(frozen(X), module(X))
    assert list(frozen.state_dict()) == list(module.state_dict())


@pytest.mark.parametrize("make", [WithoutMean, InTrainingOther, nn.BatchNorm2d])
def test_what_computes_something_else_stays(make: Any) -> None:
    module = make(3)
    assert not freeze_norm(module)
    assert not isinstance(module, FrozenNorm)
