"""Beside the scheduler: calibration, parameter groups, and the second term of the loss, which makes STE into PEGE."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import pege_fx
from pege_fx import Constant, InputError, ModelError, PEGEScheduler, QuantPolicy, fake_quants
from pege_fx.modules.mode import evaluating


class Net(nn.Module):
    """Convolutions with and without BatchNorm, a residual, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 5, 3, padding=1)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.fc((x + torch.relu(self.conv2(x))).mean((2, 3)))
        return out


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(5)
    return torch.randn(8, 3, 6, 6, generator=made).to(dtype), torch.randint(4, (8,), generator=made)


def prepared(policy: str = "W3A3", dtype: torch.dtype = torch.float32, **spec: Any) -> GraphModule:
    torch.manual_seed(0)
    return pege_fx.prepare(Net().to(dtype), QuantPolicy.parse(policy, first="3", last="3", **spec), (data(dtype)[0],))


# --- the co-optimized objective ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.6, 1.0])
@pytest.mark.parametrize("granularity", [None, "tensor"])
@pytest.mark.parametrize("method", ["lsq", "pact", "dorefa", "interval", "minmax"])
def test_ste_and_the_discretization_loss_have_peges_gradients(method: str, granularity: Any, rate: float) -> None:
    x, labels = data(torch.float64)
    grads, losses = [], []
    for estimator in ("pege", "ste"):
        gm = prepared(dtype=torch.float64, method=method, estimator=estimator, granularity=granularity)
        PEGEScheduler(gm, 10, Constant(rate), Constant(0.05), Constant(0.01))
        loss = F.cross_entropy(gm(x), labels)
        losses.append(loss.item())
        if estimator == "ste":
            loss = loss + pege_fx.discretization_loss(gm)
        loss.backward()
        grads.append({name: p.grad for name, p in gm.named_parameters()})
    assert losses[0] == losses[1]
    pege, ste = grads
    for name, grad in pege.items():
        assert grad is not None, name
        torch.testing.assert_close(grad, ste[name], rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_without_the_loss_ste_has_other_gradients_in_weights_and_below_activations() -> None:
    # The law above would hold of an estimator that ignores λ, if the loss did too.
    x, labels = data(torch.float64)
    for weight, activation in ((0.05, 0.0), (0.0, 0.01)):
        found = []
        for estimator in ("pege", "ste"):
            gm = prepared(dtype=torch.float64, estimator=estimator)
            PEGEScheduler(gm, 10, Constant(0.6), Constant(weight), Constant(activation))
            F.cross_entropy(gm(x), labels).backward()
            found.append(gm.get_parameter("conv1.weight").grad)
        assert (found[0] - found[1]).abs().max() > 1e-4


def test_the_discretization_loss_is_half_lambda_times_the_squared_errors_of_the_sites() -> None:
    gm, (x, _) = prepared(), data()
    PEGEScheduler(gm, 10, Constant(0.6), Constant(0.5), Constant(0.25))
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, fq in fake_quants(gm).items():
        fq.register_forward_hook(lambda fq, args, y, name=name: seen.update({name: (args[0].detach(), y.detach())}))
    out = gm(x)
    want = sum(
        (0.5 if name.endswith("weight_fq") else 0.25) / 2 * (a - b).double().square().sum() for name, (a, b) in seen.items()
    )
    loss = pege_fx.discretization_loss(gm)
    assert loss.ndim == 0
    assert len(seen) == 6
    assert loss.item() == pytest.approx(float(want), rel=1e-5)
    assert loss.requires_grad
    del out


def test_the_discretization_loss_is_zero_where_nothing_is_replaced_or_lambda_is() -> None:
    gm, (x, _) = prepared(), data()
    for rate, strength in ((0.0, 1.0), (1.0, 0.0)):
        PEGEScheduler(gm, 10, Constant(rate), Constant(strength), Constant(strength))
        out = gm(x)
        assert pege_fx.discretization_loss(gm).item() == 0.0
        del out


def test_the_discretization_loss_needs_a_training_forward_that_is_still_alive() -> None:
    gm, (x, _) = prepared(), data()
    words = r"there is no training forward.*\n.*between forward and backward, in train\(\) mode, on an uncompiled model"

    def refused() -> None:
        with pytest.raises(ModelError, match=words):
            pege_fx.discretization_loss(gm)

    refused()
    out = gm(x)
    out.sum().backward()
    refused()
    gm.eval()(x)
    refused()
    with torch.no_grad():
        gm.train()(x)
    refused()
    with pytest.raises(ModelError, match=words):
        pege_fx.discretization_loss(nn.Linear(2, 2))


# --- calibration -------------------------------------------------------------------------------------------------


def uncalibrated() -> GraphModule:
    torch.manual_seed(0)
    return pege_fx.prepare(Net(), QuantPolicy.parse("W3A3", first="3", last="3"))


def scales(gm: GraphModule) -> dict[str, Tensor]:
    return {name: fq.method.scale.detach().clone() for name, fq in fake_quants(gm).items()}


def test_calibration_sees_float_activations_of_every_batch() -> None:
    gm, (x, _) = uncalibrated(), data()
    batches = [x, 2 * x, 0.5 * x]
    pege_fx.calibrate(gm, batches)
    model = Net()
    model.load_state_dict({name: value for name, value in gm.state_dict().items() if "_fq." not in name})
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.eval().named_children():
        module.register_forward_hook(lambda _, args, out, name=name: seen.setdefault(name, []).append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    by_user = {"conv1": 3, "conv2": 7, "fc": 7}  # of signed and of unsigned codes
    found = sorted(value.item() for name, value in scales(gm).items() if "weight" not in name)
    want = sorted(2 * torch.cat(seen[name]).abs().mean().item() / q_max**0.5 for name, q_max in by_user.items())
    assert found == pytest.approx(want, rel=1e-4)


def test_calibration_on_one_batch_is_what_example_inputs_do() -> None:
    by_hand, x = uncalibrated(), data()[0]
    pege_fx.calibrate(by_hand, [x])
    for name, scale in scales(prepared()).items():
        assert torch.equal(scales(by_hand)[name], scale)


def test_calibration_takes_tensors_tuples_with_labels_and_dicts() -> None:
    x, labels = data()
    found = []
    for batch in (x, (x, labels), [x], {"x": x}):
        gm = uncalibrated()
        pege_fx.calibrate(gm, iter([batch]))
        found.append(scales(gm))
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


def test_calibration_changes_grids_alone() -> None:
    gm, (x, _) = uncalibrated(), data()
    gm.train()
    gm.bn1.eval()
    modes = {name: module.training for name, module in gm.named_modules()}
    before = {name: value.clone() for name, value in gm.state_dict().items()}
    pege_fx.calibrate(gm, [x])
    assert {name: module.training for name, module in gm.named_modules()} == modes
    changed = {name for name, value in gm.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("_fq." in name for name in changed)
    assert all(fq.calibrated for fq in fake_quants(gm).values())
    assert all(p.grad is None for p in gm.parameters())


def test_calibration_without_a_batch_is_refused() -> None:
    with pytest.raises(InputError, match="calibrate got no batch: give at least one"):
        pege_fx.calibrate(uncalibrated(), [])


def test_calibration_with_a_batch_that_does_not_fit_names_its_shapes() -> None:
    gm = uncalibrated()
    with pytest.raises(InputError, match=r"the model fails on inputs \[\(2, 5, 6, 6\)\]: RuntimeError"):
        pege_fx.calibrate(gm, [torch.randn(2, 5, 6, 6)])
    with pytest.raises(InputError, match=r"the model fails on inputs \['str'\]"):
        pege_fx.calibrate(gm, [("nothing to see",)])
    assert not any(fq.observing for fq in fake_quants(gm).values())
    assert gm(data()[0]).isfinite().all()


def test_calibration_of_a_model_that_was_not_prepared_is_refused() -> None:
    with pytest.raises(ModelError, match="Linear was not prepared"):
        pege_fx.calibrate(nn.Linear(2, 2), [torch.randn(1, 2)])  # type: ignore[arg-type]


def test_evaluating_gives_every_module_its_own_mode_back() -> None:
    net = Net().train()
    net.bn1.eval()

    def fail_inside() -> None:
        with evaluating(net):
            assert not any(module.training for module in net.modules())
            assert not torch.is_grad_enabled()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert net.training
    assert net.conv1.training
    assert not net.bn1.training
    assert torch.is_grad_enabled()


# --- parameter groups --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lsq", "pact", "dorefa", "interval", "minmax"])
def test_parameter_groups_partition_what_is_trained(method: str) -> None:
    gm = prepared(method=method)
    frozen = gm.get_parameter("conv1.weight").requires_grad_(False)
    groups = pege_fx.parameter_groups(gm, lr=1e-3, quantizer_lr=1e-5, weight_decay=0.02)
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in gm.parameters()} - {id(frozen)}
    names = {id(p): name for name, p in gm.named_parameters()}
    by_name = {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}
    assert by_name["weights"] == {"conv2.weight", "fc.weight"}
    assert by_name["norms and biases"] == {"bn1.weight", "bn1.bias", "conv2.bias", "fc.bias"}
    assert all("_fq.method." in name for name in by_name.get("quantizers", ()))
    assert ("quantizers" in by_name) is (method in ("lsq", "pact", "interval"))
    settings = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert settings.pop("weights") == (1e-3, 0.02)
    assert settings.pop("norms and biases") == (1e-3, 0.0)
    assert settings.pop("quantizers", (1e-5, 0.0)) == (1e-5, 0.0)


def test_quantizers_learn_at_the_same_rate_unless_told_otherwise() -> None:
    groups = pege_fx.parameter_groups(prepared(), lr=0.3)
    assert {group["lr"] for group in groups} == {0.3}


def test_a_model_trains_with_its_groups_and_its_average_follows() -> None:
    gm, (x, labels) = prepared(), data()
    optimizer = torch.optim.Adam(pege_fx.parameter_groups(gm, lr=1e-2, quantizer_lr=1e-3))
    scheduler = PEGEScheduler(gm, 45)
    average = torch.optim.swa_utils.AveragedModel(gm)
    losses = []
    for _ in range(45):
        optimizer.zero_grad()
        loss = F.cross_entropy(gm(x), labels)
        loss.backward()
        optimizer.step()
        scheduler.step()
        average.update_parameters(gm)
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert average.eval()(x).isfinite().all()
    assert not torch.equal(average(x), copy.deepcopy(gm).eval()(x))
