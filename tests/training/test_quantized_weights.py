"""What acts on weights between two steps, on random networks under random policies: laws of the deployed model."""

import copy

import pytest
import torch
from hypothesis import given, settings

import pege_fx
from pege_fx import DecoupledLambda, ModelError, WeightFreezing, dampening_loss, fake_quants
from pege_fx.kernels.inductor import eager_kernels
from pege_fx.testing import Case, networks, policies
from pege_fx.training.quantized_weights import quantized_weights


@pytest.mark.filterwarnings("ignore:nothing is quantized")
@given(networks(max_layers=4), policies())
@settings(max_examples=25)
def test_weights_in_the_middle_of_their_codes_deploy_what_they_did(case: Case, policy: pege_fx.QuantPolicy) -> None:
    with eager_kernels():
        gm = pege_fx.prepare(case.network, policy, case.inputs)
        weights = quantized_weights(gm)
        named = {name for name, fq in fake_quants(gm).items() if fq.site.kind == "weight" and not fq.is_computed}
        assert weights.keys() <= named
        before = {name: weight.codes() for name, weight in weights.items()}
        if not weights:
            with pytest.raises(ModelError, match="no parameter of this model is a quantized weight"):
                dampening_loss(gm)
            return
        loss = dampening_loss(gm)
        assert bool(loss.isfinite())
        assert bool(loss >= 0)
        if not any(weight.is_direct for weight in weights.values()):
            with pytest.raises(ModelError, match="no weight can be pulled"):
                DecoupledLambda(gm, 1.0)
            return
        wanted = copy.deepcopy(gm).eval()(*case.inputs)
        pull = DecoupledLambda(gm, 1e9)
        for weight in weights.values():
            with torch.no_grad():
                weight.parameter.mul_(1 + 1e-6)
        moved = {name: weight.codes() for name, weight in weights.items()}
        pull.step()
        for name, weight in weights.items():
            assert torch.equal(weight.codes(), moved[name])
            if weight.is_direct:
                torch.testing.assert_close(
                    weight.continuous().detach().to(weight.discretized().dtype), weight.discretized(), rtol=1e-4, atol=1e-6
                )
        if all(torch.equal(moved[name], before[name]) for name in moved):
            torch.testing.assert_close(gm.eval()(*case.inputs), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:nothing is quantized")
@given(networks(max_layers=4), policies())
@settings(max_examples=15)
def test_what_is_frozen_keeps_its_code_whatever_the_optimizer_does(case: Case, policy: pege_fx.QuantPolicy) -> None:
    with eager_kernels():
        gm = pege_fx.prepare(case.network, policy, case.inputs)
        if not any(weight.is_direct for weight in quantized_weights(gm).values()):
            with pytest.raises(ModelError, match="no weight can be frozen"):
                WeightFreezing(gm, 1e-9, max_bits=8)
            return
        freezing = WeightFreezing(gm, 1e-9, momentum=1.0, max_bits=8)
        generator = torch.Generator().manual_seed(0)
        codes: dict[str, torch.Tensor] = {}
        for _ in range(6):
            with torch.no_grad():
                for parameter in gm.parameters():
                    noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                    parameter.add_(0.5 * parameter.abs().mean() * noise)
            freezing.step()
            for name, state in freezing.state_dict()["sites"].items():
                now = quantized_weights(gm)[name].codes().short()
                assert torch.equal(now[state["frozen"]], state["codes"][state["frozen"]])
                if name in codes:
                    kept = codes[name] > torch.iinfo(torch.int16).min
                    assert torch.equal(now[kept], codes[name][kept])
                codes[name] = torch.where(state["frozen"], now, torch.iinfo(torch.int16).min)
