"""BatchNorm statistics for the deployed weights: against the mean over batches computed from outside."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import pege_fx
from pege_fx import Constant, InputError, ModelError, PEGEScheduler, QuantPolicy, QuantSpec, Rule

BATCHES = [torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]


class Net(nn.Module):
    """Two normalised convolutions, one of them depthwise, with factors of both signs, and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4, momentum=0.3)
        self.drop = nn.Dropout(0.5)
        for bn in (self.bn1, self.bn2):
            nn.init.uniform_(bn.weight, -1, 1)
            nn.init.uniform_(bn.running_var, 0.1, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(torch.relu(self.bn1(self.conv1(x))))
        out: Tensor = self.bn2(self.conv2(x))
        return out


def prepared(granularity: Any = "channel", batch_norm: Any = "train") -> GraphModule:
    torch.manual_seed(0)
    spec = QuantSpec(bits=3, granularity=granularity)
    gm = pege_fx.prepare(Net(), QuantPolicy((Rule(weight=spec, input="3"),)), (BATCHES[0],), batch_norm=batch_norm)
    PEGEScheduler(gm, 10, Constant(0.3), Constant(0.0), Constant(0.0))  # partly replaced: statistics are not to see that
    return gm


def weight_and_input(gm: GraphModule, conv: str, granularity: str) -> Any:
    """The conv's quantized weight, written out, and its input's fake-quant."""
    w, bn = gm.get_parameter(f"{conv}.weight").detach(), gm.get_submodule(conv.replace("conv", "bn"))
    fq = pege_fx.fake_quants(gm)[f"{conv}.weight_fq"]
    k = (bn.weight / (bn.running_var + bn.eps).sqrt()).detach().view(-1, 1, 1, 1)  # type: ignore[union-attr, operator, arg-type]
    s = fq.method.grid_of().scale.detach()
    k = torch.sign(k) if granularity == "channel" else k
    return (k * w / s).round().clamp(-4, 3) * s / k


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("training", [True, False])
def test_statistics_are_the_mean_over_batches_of_what_quantized_weights_give(granularity: str, training: bool) -> None:
    gm = prepared(granularity).train(training)
    inputs = [fq.deployed for fq in pege_fx.fake_quants(gm).values() if fq.site.kind == "activation"]
    means: list[Tensor] = []
    variances: list[Tensor] = []
    w = {conv: weight_and_input(gm, conv, granularity) for conv in ("conv1", "conv2")}
    first_var = gm.get_submodule("bn1").running_var.clone()  # type: ignore[operator, union-attr]
    with torch.no_grad():
        for x in BATCHES:
            y = F.conv2d(inputs[0](x), w["conv1"])
            means.append(y.mean((0, 2, 3)))
            variances.append(y.transpose(0, 1).flatten(1).var(1))
            if granularity == "tensor":  # its grid lies over k w, and k moves with the statistics: first batch alone
                break
    before = {name: value.clone() for name, value in gm.named_parameters()}
    rng = torch.get_rng_state()
    assert pege_fx.reestimate_batch_norm(gm, [(x,) for x in BATCHES[: len(means)]]) == len(means)
    bn = gm.get_submodule("bn1")
    torch.testing.assert_close(bn.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(bn.running_var, torch.stack(variances).mean(0))
    assert not torch.equal(bn.running_var, first_var)  # type: ignore[arg-type]
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in gm.named_parameters())
    assert all(module.training == training for module in gm.modules())
    assert gm.get_submodule("bn2").momentum == 0.3
    assert int(gm.get_submodule("bn2").num_batches_tracked) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_norm", ["train", "keep"])
def test_on_one_batch_evaluation_gives_what_training_gives_with_all_replaced(batch_norm: str) -> None:
    gm = prepared(batch_norm=batch_norm)
    for module in gm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    PEGEScheduler(gm, 10, Constant(1.0), Constant(0.0), Constant(0.0))
    x = BATCHES[0]
    with torch.no_grad():
        wanted = gm.train()(x)
    pege_fx.reestimate_batch_norm(gm, x)
    for name, size in (("bn1", 8 * 16), ("bn2", 8 * 4)):  # training normalises by the biased variance
        gm.get_submodule(name).running_var.mul_((size - 1) / size)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(gm.eval()(x), wanted, rtol=1e-4, atol=1e-4)


def test_a_functional_batch_norm_is_estimated_and_one_in_evaluation_is_not() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("var", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(self.conv(x), self.mean, self.var, training=self.training)

    gm = pege_fx.prepare(Functional(), "W4A4", (BATCHES[0],))
    pege_fx.reestimate_batch_norm(gm, BATCHES)
    assert bool(gm.get_buffer("mean").abs().min() > 0)
    gm = prepared()
    frozen = gm.get_submodule("bn1").eval()
    before = frozen.running_mean.clone()  # type: ignore[operator, union-attr]
    pege_fx.reestimate_batch_norm(gm, BATCHES)
    assert torch.equal(frozen.running_mean, before)  # type: ignore[arg-type]
    assert not frozen.training


def test_what_can_not_be_estimated_is_said() -> None:
    with pytest.raises(ModelError, match="there is no BatchNorm whose statistics could be estimated"):
        pege_fx.reestimate_batch_norm(prepared(batch_norm="freeze"), BATCHES)
    with pytest.raises(InputError, match="reestimate_batch_norm got no batch"):
        pege_fx.reestimate_batch_norm(prepared(), [])
    gm = prepared()
    with pytest.raises(InputError):
        pege_fx.reestimate_batch_norm(gm, ["no tensor"])
    assert gm.training
    assert gm.get_submodule("bn2").momentum == 0.3


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_a_batch_norm_in_training_beside_a_layer_in_evaluation_sees_the_weight_itself(granularity: str) -> None:
    gm = prepared(granularity).eval()
    gm.get_submodule("bn1").train()
    fq = pege_fx.fake_quants(gm)["conv1.weight_fq"]
    with torch.no_grad():
        found = fq(gm.get_parameter("conv1.weight"))
    torch.testing.assert_close(found, weight_and_input(gm, "conv1", granularity))
    assert bool((fq.fold.sign() < 0).any())  # type: ignore[union-attr]
