"""δ of EWGS: against the Hessian written out, and what it leaves alone."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import pege_fx
from pege_fx import InputError, ModelError, QuantPolicy, QuantSpec, Rule, fake_quants

X, LABELS = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).double(), torch.arange(8) % 3


def prepared(estimator: str = "ewgs", norm: bool = False, only: str | None = None) -> GraphModule:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 5), nn.BatchNorm1d(5) if norm else nn.Identity(), nn.Tanh(), nn.Linear(5, 3)]
    policy = QuantPolicy.parse("W3A3", first="3", last="3", estimator="ste" if only else estimator)
    if only:
        policy = QuantPolicy((*policy.rules, Rule(match=only, weight=QuantSpec(bits=3, estimator=estimator))))
    return pege_fx.prepare(nn.Sequential(*layers).double(), policy, (X,))


def loss_of(gm: nn.Module) -> Any:
    return lambda batch: F.cross_entropy(gm(batch[0]), batch[1])


def test_delta_is_the_mean_curvature_over_three_standard_deviations() -> None:
    gm = prepared(only="3")
    # The last layer's weight: the loss is smooth in its quantized values, and its Hessian can be written out.
    features = gm.get_submodule("_2_fq")(torch.tanh(F.linear(gm.get_submodule("input_1_fq")(X), *_first(gm)))).detach()
    weight = gm.get_submodule("3.weight_fq")(gm.get_parameter("3.weight")).detach()
    span = 7 * gm.get_parameter("3.weight_fq.method.scale").detach().view(3, 1)  # codes -4 to 3: the clipping range

    def loss(w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(features, span * w.view(3, 5), gm.get_parameter("3.bias").detach()), LABELS)

    flat = (weight / span).reshape(-1)
    trace = torch.autograd.functional.hessian(loss, flat).diagonal().sum()
    gradient = torch.autograd.functional.jacobian(loss, flat)
    wanted = (trace / flat.numel() / (3 * gradient.std(correction=0))).item()
    found = pege_fx.update_ewgs(gm, loss_of(gm), [(X, LABELS)], draws=1000)
    assert found == {"3.weight_fq": pytest.approx(wanted, rel=0.05)}
    assert gm.get_buffer("3.weight_fq.strength").item() == pytest.approx(found["3.weight_fq"])


def test_every_site_gets_its_own_and_none_is_negative() -> None:
    gm = prepared()
    found = pege_fx.update_ewgs(gm, loss_of(gm), [(X, LABELS), (-X, LABELS)], draws=3)
    assert set(found) == set(fake_quants(gm))
    assert all(value >= 0 for value in found.values())
    assert len(set(found.values())) > 1


def _first(gm: GraphModule) -> tuple[Tensor, Tensor]:
    return gm.get_submodule("0.weight_fq")(gm.get_parameter("0.weight")), gm.get_parameter("0.bias")


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)  # type: ignore[no-any-return]


def test_inputs_on_one_scale_count_together() -> None:
    """Of mean((a + b)^2) / 2 over N sums the Hessian has 1 / N for each of the 2 N values, and the gradient is (a + b) / N."""
    torch.manual_seed(0)
    rule = Rule(function="add", input=QuantSpec(bits=4, estimator="ewgs"), shared_scale=True)
    gm = pege_fx.prepare(Sum().double(), QuantPolicy((rule,)), (X,))
    found = pege_fx.update_ewgs(gm, lambda x: gm(x).square().mean() / 2, [X], draws=300)
    ((name, site),) = fake_quants(gm).items()
    span = 15 * site.decoding().scale.item()
    assert found == {name: pytest.approx(span / (3 * gm(X).std(correction=0).item()), rel=0.05)}


def test_nothing_else_changes() -> None:
    gm = prepared(norm=True)
    before, generator = copy.deepcopy(gm.state_dict()), torch.get_rng_state()
    found = pege_fx.update_ewgs(gm, loss_of(gm), [(X, LABELS)] * 3)
    changed = {name for name, value in gm.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{name}.strength" for name in found}
    assert all(parameter.grad is None for parameter in gm.parameters())
    assert torch.equal(generator, torch.get_rng_state())
    assert pege_fx.update_ewgs(gm, loss_of(gm), [(X, LABELS)], seed=1) == pege_fx.update_ewgs(
        gm, loss_of(gm), [(X, LABELS)], seed=1
    )


def test_other_estimators_and_no_batch_are_refused() -> None:
    gm = prepared("pege")
    with pytest.raises(ModelError, match='no EWGS site: prepare it with estimator="ewgs"'):
        pege_fx.update_ewgs(gm, loss_of(gm), [(X, LABELS)])
    gm = prepared()
    with pytest.raises(InputError, match="update_ewgs got no batch"):
        pege_fx.update_ewgs(gm, loss_of(gm), [])
