"""Guard rails: whoever produced the first NaN is named, and grids that went wrong are reported."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pege_fx
from pege_fx import Constant, Finding, Guard, ModelError, NonFiniteError, PEGEScheduler, PegeWarning, QuantPolicy
from pege_fx.training.guard import clipped_share


class Divided(nn.Module):
    """Divides by a sum that may be zero."""

    def forward(self, x: Tensor) -> Tensor:
        return x / F.relu(x.sum())


class Branching(nn.Module):
    """Stays Python; its convolution is a graph of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 1), Divided())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) if x.abs().sum() >= 0 else x
        return out


class Net(nn.Module):
    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.middle, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), middle, nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.middle(torch.tanh(self.norm(self.conv(x)))).flatten(1))
        return out


X = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def prepared(middle: nn.Module, policy: str | QuantPolicy = "W4A4") -> torch.fx.GraphModule:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PegeWarning)
        return pege_fx.prepare(Net(middle), policy, (X,))


# --- not finite ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("middle", "place"), [(Divided(), r"middle \(node truediv\)"), (Branching(), r"middle\.inner\.1 \(node truediv\)")]
)
def test_the_first_operation_that_made_it_is_named_and_nothing_is_disturbed(middle: nn.Module, place: str) -> None:
    gm = prepared(middle)
    guard = Guard(gm)
    PEGEScheduler(gm, 10, Constant(0.5))
    with torch.no_grad():  # the convolutions' sum turns negative
        for name, parameter in gm.named_parameters():
            if name in ("norm.bias", "middle.inner.0.bias"):
                parameter.fill_(-50.0)
    before = copy.deepcopy(gm.state_dict())
    loss = gm(X).sum()
    after = copy.deepcopy(gm.state_dict())
    assert not loss.isfinite()
    with pytest.raises(NonFiniteError, match=rf"the loss is (NaN|infinite): {place} is the first to produce"):
        guard.check(loss, X)
    assert all(torch.equal(value, after[name]) for name, value in gm.state_dict().items())
    assert not torch.equal(before["norm.running_mean"], after["norm.running_mean"])
    assert "forward" not in vars(gm)
    assert torch.equal(gm(X).isfinite(), torch.zeros(4, 2, dtype=torch.bool))


def test_weights_data_and_loss_functions_are_blamed_too() -> None:
    gm = prepared(nn.Identity())
    guard = Guard(gm)
    with pytest.raises(NonFiniteError, match=r"every value in the model is finite: look at the loss function"):
        guard.check(torch.tensor(float("inf")), X)
    bad = X.clone()
    bad[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"the loss is NaN: input 0 of the model is not finite"):
        guard.check(gm(bad).sum(), bad)
    gm = prepared(nn.Identity())
    guard = Guard(gm)
    gm.get_parameter("fc.weight").data[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"fc\.weight is not finite since the last update"):
        guard.check(torch.tensor(float("nan")), X)


def test_gradients_that_are_not_finite_are_named_from_the_end() -> None:
    gm = prepared(nn.Identity())
    guard = Guard(gm)
    gm(X).sum().backward()
    guard.check_gradients()
    for name in ("conv.weight", "norm.weight"):
        gm.get_parameter(name).grad = torch.full_like(gm.get_parameter(name), float("nan"))
    with pytest.raises(NonFiniteError, match=r"the gradient of norm\.weight is not finite, and 1 more"):
        guard.check_gradients()


# --- grids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lsq", "pact", "interval", "dorefa", "minmax"])
def test_a_healthy_model_gives_no_findings(method: str) -> None:
    gm = prepared(nn.Conv2d(4, 4, 1), QuantPolicy.parse("W4A4", method=method))
    assert Guard(gm, clipped=0.6).findings(X) == []


def test_a_collapsed_step_is_found() -> None:
    gm = prepared(nn.Conv2d(4, 4, 1))
    guard = Guard(gm)
    gm.get_parameter("middle.weight_fq.method.scale").data[1] *= 1e-4
    found = guard.findings(X)
    assert found[0] == Finding("middle.weight_fq", "collapsed", pytest.approx(1e-4))
    assert "middle.weight_fq: the step collapsed to 1.0e-04 of what it was; lower quantizer_lr" in str(found[0])


@pytest.mark.parametrize(("method", "parameter"), [("lsq", "scale"), ("pact", "clip"), ("interval", "upper")])
def test_a_site_that_clips_nearly_everything_is_found_and_told_once(method: str, parameter: str) -> None:
    gm = prepared(nn.Conv2d(4, 4, 1), QuantPolicy.parse("W4A4", method=method))
    guard = Guard(gm, every=2, collapsed=0.0)
    (name,) = [name for name in pege_fx.fake_quants(gm) if name.startswith("tanh")]
    site = gm.get_submodule(name)
    site.method.get_parameter(parameter).data.mul_(1e-3)
    if method == "interval":
        site.method.get_parameter("lower").data.mul_(1e-3)
    assert any(finding.site == name and finding.kind == "clipped" for finding in guard.findings(X))
    loss = gm(X).sum()
    guard.check(loss, X)
    with pytest.warns(PegeWarning, match=rf"{name}: \d+% of its elements is clipped; calibrate") as told:
        guard.check(loss, X)
    assert {warning.filename for warning in told} == {__file__}
    guard.check(loss, X)
    guard.check(loss, X)


def test_a_site_with_one_code_is_found() -> None:
    gm = prepared(nn.Conv2d(4, 4, 1))
    guard = Guard(gm)
    gm.get_parameter("middle.weight_fq.method.scale").data.mul_(1e4)
    assert Finding("middle.weight_fq", "one code", 1.0) in guard.findings(X)


@pytest.mark.parametrize(("features", "kinds"), [(1, []), (2, ["one code"])])
def test_of_a_single_value_and_of_equal_ones_one_code_is_no_finding(features: int, kinds: list[str]) -> None:
    x = torch.randn(3, features, generator=torch.Generator().manual_seed(0))
    gm = pege_fx.prepare(nn.Linear(features, 1), QuantPolicy.parse("W4A4", first="4", last="4"), (x,))
    guard = Guard(gm)
    gm.get_parameter("weight_fq.method.scale").data.mul_(1e4)
    found = guard.findings(torch.full_like(x, 0.1))
    assert [(finding.site, finding.kind) for finding in found] == [("weight_fq", kind) for kind in kinds]


def test_the_clipped_share_counts_what_rounds_beyond_the_ends() -> None:
    gm = prepared(nn.Conv2d(4, 4, 1))
    site = pege_fx.fake_quants(gm)["tanh_fq"]
    (q_min, q_max), scale = site.site.spec.bounds, site.method.grid_of()[0].detach()
    inside = torch.tensor([q_min - 0.49, *range(q_min, q_max + 1), q_max + 0.49]) * scale
    beyond = torch.tensor([q_min - 0.51, q_max + 0.51, q_max + 5.0]) * scale
    assert clipped_share(site, inside) == 0.0
    assert clipped_share(site, torch.cat([inside, beyond])) == pytest.approx(3 / (len(inside) + 3))


class Switched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor, double: bool) -> Tensor:
        y: Tensor = self.fc(x)
        return 2 * y if double else y


def test_arguments_that_are_no_tensors_are_finite() -> None:
    gm = pege_fx.prepare(Switched(), "W4A4", (X, True))
    with pytest.raises(NonFiniteError, match="every value in the model is finite: look at the loss function"):
        Guard(gm).check(torch.tensor(float("nan")), X, True)


class Sum(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def test_inputs_on_one_scale_are_looked_at_one_by_one_and_not_after_the_call() -> None:
    rule = pege_fx.Rule(function="add", input="4", shared_scale=True)
    gm = pege_fx.prepare(Sum(), QuantPolicy((rule,)), (X, X))
    guard = Guard(gm)
    assert guard.findings(X, X) == []
    found = guard.findings(X, 100 * X)
    assert [finding.kind for finding in found] == ["clipped"]
    gm(100 * X, 100 * X)
    assert [finding.kind for finding in found] == ["clipped"]


def test_a_model_that_was_not_prepared_is_refused() -> None:
    with pytest.raises(ModelError, match="was not prepared"):
        Guard(nn.Linear(2, 2))
