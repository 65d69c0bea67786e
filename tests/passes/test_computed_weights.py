"""Weights that operations compute have the granularity that the policy says, and their parameters count once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils import parametrizations

import pege_fx
from pege_fx import QuantPolicy, QuantSpec, Rule, fake_quants

SIZES = torch.logspace(-2, 1, 6)  # of output channels: one scale for all of them would leave nothing of the small ones


class Computing(nn.Module):
    """Reads a weight that is computed from parameters in ``forward``."""

    def __init__(self, weight: Callable[[nn.Module], Tensor], read: Callable[..., Tensor], **parameters: Tensor) -> None:
        super().__init__()
        self.compute, self.read = weight, read
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x, self.compute(self))


def rows(count: int = 6, *shape: int) -> Tensor:
    return torch.randn(count, *shape) * SIZES[:count].view(-1, *[1] * len(shape))


def standardized(m: Any) -> Tensor:
    w = m.w - m.w.mean((1, 2, 3), keepdim=True)
    return w / w.std((1, 2, 3), keepdim=True) * SIZES.view(-1, 1, 1, 1)


# The weight, who reads it, its parameters, an input; and how many of the parameters' elements it takes.
CASES: dict[str, tuple[Callable[[Any], Tensor], Callable[..., Tensor], dict[str, Tensor], tuple[int, ...], int]] = {
    "standardized": (standardized, F.conv2d, {"w": torch.randn(6, 4, 3, 3)}, (8, 4, 7, 7), 216),
    "sum of low rank": (lambda m: m.w + m.b @ m.a, F.linear, {"w": rows(6, 8), "a": rows(2, 8), "b": rows(6, 2)}, (9, 8), 76),
    "scaled": (lambda m: m.w * m.s.unsqueeze(1), F.linear, {"w": torch.randn(6, 8), "s": SIZES.clone()}, (9, 8), 54),
    "slice": (lambda m: m.w[2:8], F.linear, {"w": torch.cat([rows(2, 8), rows(6, 8), rows(4, 8)])}, (9, 8), 48),
    "chunk": (lambda m: m.w.chunk(2)[1], F.linear, {"w": torch.cat([rows(6, 8), rows(6, 8)])}, (9, 8), 48),
    "joined": (lambda m: torch.cat([m.q, m.k]), F.linear, {"q": rows(3, 8), "k": rows(3, 8)}, (9, 8), 48),
    "reshaped": (lambda m: m.w.view(6, 4, 3, 3), F.conv2d, {"w": rows(6, 36)}, (8, 4, 7, 7), 216),
    "turned": (lambda m: (m.w * 2).t(), F.linear, {"w": rows(6, 8).t().contiguous()}, (9, 8), 48),
    "permuted": (lambda m: m.w.permute(1, 0, 2, 3), F.conv2d, {"w": rows(6, 4, 3, 3).transpose(0, 1)}, (8, 4, 7, 7), 216),
    "transposed convolution": (
        lambda m: m.w.abs(),
        F.conv_transpose2d,
        {"w": rows(6, 4, 3, 3).transpose(0, 1)},
        (8, 4, 7, 7),
        216,
    ),
    "product with joined": (
        lambda m: torch.cat([m.q, m.k], 1),
        torch.matmul,
        {"q": rows(3, 8).t(), "k": rows(3, 8).t()},
        (9, 8),
        48,
    ),
    "product with a slice": (lambda m: m.w[:6].t(), torch.matmul, {"w": rows(6, 8)}, (9, 8), 48),
}


def prepared(model: nn.Module, x: Tensor | None, bits: int = 4, **spec: Any) -> GraphModule:
    policy = QuantPolicy((Rule(weight=QuantSpec(bits=bits, **spec), input=None),))
    return pege_fx.prepare(model, policy, None if x is None else (x,))


def made(name: str) -> tuple[nn.Module, Tensor, int]:
    torch.manual_seed(0)
    weight, read, parameters, shape, count = CASES[name]
    return Computing(weight, read, **{key: value.clone() for key, value in parameters.items()}), torch.randn(shape), count


def worst(model: nn.Module, gm: nn.Module, x: Tensor) -> float:
    """The largest relative error of a channel."""
    with torch.no_grad():
        wanted, found = (y.transpose(0, 1).flatten(1) if y.ndim > 2 else y.t() for y in (model(x), gm(x)))
    return float(((wanted - found).norm(dim=1) / wanted.norm(dim=1)).max())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("example", [True, False])
def test_each_channel_has_a_scale_of_its_own(name: str, example: bool) -> None:
    model, x, _ = made(name)
    gm = prepared(model.eval(), x if example else None, bits=6).eval()
    gm(x)
    (fq,) = fake_quants(gm).values()
    assert fq.site.kind == "weight"
    assert fq.method.scale.numel() == 6
    assert worst(model, gm, x) < 0.3
    assert torch.equal(pege_fx.convert(gm)(x), gm(x))


@pytest.mark.parametrize("name", CASES)
def test_its_parameters_count_once(name: str) -> None:
    model, x, count = made(name)
    gm = prepared(model, x)
    plan = pege_fx.plan_of(gm)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert plan.parameters == total
    assert plan.parameters_by_bits == {bits: n for bits, n in ((4, count), (32, total - count)) if n}
    (edge,) = [edge for _, edge, _ in plan.quantized]
    (operation,) = [operation for operation in plan.operations if operation.edge(edge.operand) is edge]
    assert operation.parameters == count
    assert "4 bits signed per channel" in str(pege_fx.summary(gm)[operation.path])


@pytest.mark.parametrize("make", [lambda m: m.w.chunk(3), lambda m: m.w.split(2), lambda m: (m.w[:2], m.w[2:4], m.w[4:])])
def test_slices_of_one_parameter_count_as_many_elements_as_they_have(make: Callable[[Any], Any]) -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(rows(6, 8))

        def forward(self, x: Tensor) -> Tensor:
            a, b, c = make(self)
            return F.linear(x, a) + F.linear(x, b) + F.linear(x, c) + F.linear(x, self.w[:2])

    plan = pege_fx.plan_of(prepared(Three(), torch.randn(3, 8)))
    assert plan.parameters_by_bits == {4: 48}
    assert [operation.parameters for operation in plan.operations] == [16] * 4


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_parametrized_layer(norm: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3)
    with torch.no_grad():
        layer.weight.copy_(rows(6, 4, 3, 3))
    model, x = norm(layer).train(), torch.randn(8, 4, 7, 7)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gm = prepared(model, None)  # its shape is asked on the quiet: nothing of the model moves
    assert all(torch.equal(value, gm.state_dict()[name]) for name, value in state.items())
    gm.eval()(x)
    (fq,) = fake_quants(gm).values()
    assert fq.method.scale.numel() == 6
    assert worst(model.eval(), gm, x) < 0.3
    assert pege_fx.plan_of(gm).parameters_by_bits[32] == 6  # the bias


def test_what_computes_a_weight_stays_float_and_says_so() -> None:
    model, x, _ = made("sum of low rank")
    inner, outer = pege_fx.plan_of(pege_fx.prepare(model, "W4A4", (x,))).operations
    assert {edge.reason for edge in inner.edges} == {"it computes a weight, which is quantized where it is read"}
    assert outer.format == "W8A8"


def test_one_that_an_input_decides_has_one_scale_and_the_summary_says_why() -> None:
    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.w * x.mean())

    for granularity in (None, "channel"):
        gm = prepared(Hyper(), torch.randn(3, 8), granularity=granularity)
        (fq,) = fake_quants(gm).values()
        assert fq.method.scale.numel() == 1
        said = str(pege_fx.summary(gm)["linear"])
        assert "per tensor" in said
        assert "(one that is computed anew in each call)" in said


def test_it_trains_and_follows_its_parameters() -> None:
    model, x, _ = made("sum of low rank")
    gm = prepared(model, x)
    gm(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in (gm.w, gm.a, gm.b))
    gm.eval()
    with torch.no_grad():
        before = gm(x)
        gm.b.add_(1.0)
        assert not torch.equal(gm(x), before)
    assert torch.equal(pege_fx.convert(gm)(x), gm(x))
