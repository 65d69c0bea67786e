"""Sizes before conversion: what ``convert`` will make, to the byte."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

import pege_fx
from pege_fx import PegeError, QuantPolicy
from pege_fx.kernels.inductor import eager_kernels
from pege_fx.testing import Case, networks, policies


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(networks(), policies())
@pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
def test_a_prepared_model_knows_the_size_of_the_converted_one(case: Case, policy: QuantPolicy) -> None:
    try:
        gm = pege_fx.prepare(case.network, policy, case.inputs)
    except PegeError:
        return  # a rule that selects nothing here
    if not pege_fx.fake_quants(gm):
        return
    with eager_kernels():
        assert pege_fx.size_report(gm) == pege_fx.size_report(pege_fx.convert(gm))


@pytest.mark.parametrize("method", ["lsq", "pact", "minmax", "dorefa", "interval"])
@pytest.mark.parametrize("batch_norm", ["train", "freeze", "keep"])
def test_every_method_and_every_fold_keeps_its_promise(method: str, batch_norm: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)
    )
    policy = QuantPolicy.parse("W4A4", method=method)
    gm = pege_fx.prepare(model, policy, (torch.randn(2, 3, 6, 6),), batch_norm=batch_norm)  # type: ignore[arg-type]
    assert pege_fx.size_report(gm) == pege_fx.size_report(pege_fx.convert(gm))
