"""Dampening and decoupled λ: their gradients and movements written out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import pege_fx
from pege_fx import (
    Constant,
    Cosine,
    DecoupledLambda,
    Delayed,
    Linear,
    ModelError,
    PEGEScheduler,
    QuantPolicy,
    QuantSpec,
    Rule,
    ScheduleError,
    dampening_loss,
    fake_quants,
)

X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def prepared(spec: QuantSpec | None = None) -> GraphModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    nn.init.uniform_(model[1].weight, -1, 1)  # type: ignore[arg-type]
    return pege_fx.prepare(model, QuantPolicy((Rule(weight=spec or QuantSpec(bits=3)),)), (X,)).double()


def grid(gm: GraphModule, name: str) -> tuple[Any, Any, Any]:
    """w as the discretizer sees it, w_q, and the ends of the grid."""
    fq, weight = fake_quants(gm)[f"{name}.weight_fq"], gm.get_parameter(f"{name}.weight")
    factor = torch.ones(())
    if fq.fold is not None:
        bn = fq.fold.bn
        factor = (bn.weight / (bn.running_var + bn.eps).sqrt()).detach().view(-1, 1, 1, 1)
        factor = factor if fq.site.spec.granularity == "tensor" else torch.sign(factor)
    w, s = weight * factor, fq.method.grid_of().scale.detach()
    return w, (w.detach() / s).round().clamp(-4, 3) * s, (-4 * s, 3 * s)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_the_loss_is_the_papers(granularity: Any) -> None:
    gm = prepared(QuantSpec(bits=3, granularity=granularity))
    with torch.no_grad():
        gm.get_parameter("0.weight").view(-1)[:9].mul_(9)  # some are clipped
    wanted = torch.zeros((), dtype=torch.float64)
    for name in ("0", "3"):
        w, w_q, (low, high) = grid(gm, name)
        wanted = wanted + (w_q - torch.minimum(torch.maximum(w, low), high)).square().sum()
        if name == "0":
            assert bool(((w < low) | (w > high)).any())
    weights = [gm.get_parameter(f"{name}.weight") for name in ("0", "3")]
    loss = dampening_loss(gm)
    torch.testing.assert_close(loss, wanted)
    by_kernel = torch.zeros((), dtype=torch.float64)
    for name in ("0", "3"):
        w, w_q, (low, high) = grid(gm, name)
        by_kernel = by_kernel + (w_q - torch.minimum(torch.maximum(w, low), high)).square().sum() / w[0].numel()
    torch.testing.assert_close(dampening_loss(gm, "kernel_mean"), by_kernel)
    for one, two in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(wanted, weights), strict=True):
        torch.testing.assert_close(one, two)


def test_it_has_no_gradient_for_scales_nor_for_clipped_weights() -> None:
    gm = prepared()
    weight = gm.get_parameter("0.weight")
    with torch.no_grad():
        weight.view(-1)[:5].fill_(99.0)
    dampening_loss(gm).backward()
    assert weight.grad is not None
    assert bool((weight.grad.view(-1)[:5] == 0).all())
    assert bool((weight.grad != 0).any())
    assert all(fq.method.scale.grad is None for fq in fake_quants(gm).values())


def test_half_of_its_gradient_is_peges_term_where_nothing_is_clipped() -> None:
    gm = prepared()
    weights = [gm.get_parameter(f"{name}.weight") for name in ("0", "3")]
    with torch.no_grad():
        for fq in fake_quants(gm).values():
            fq.method.scale.fill_(1.0)  # type: ignore[operator, union-attr]
    PEGEScheduler(gm, 10, Constant(1.0), Constant(1.0), Constant(0.0))
    outputs = gm(X.double())
    term = torch.autograd.grad(pege_fx.discretization_loss(gm), weights)
    dampening = torch.autograd.grad(0.5 * dampening_loss(gm), weights)
    for one, two in zip(term, dampening, strict=True):
        torch.testing.assert_close(one, two)
    assert outputs.requires_grad  # the graph that the term was read from is alive


@pytest.mark.parametrize("name", ["sgd", "adam"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_the_pull_is_a_share_of_what_the_optimizer_moves(name: str, granularity: Any) -> None:
    gm = prepared(QuantSpec(bits=3, granularity=granularity))
    parameters = [gm.get_parameter("0.weight"), gm.get_parameter("3.weight")]
    optimizer = torch.optim.SGD(parameters, 1e-3) if name == "sgd" else torch.optim.Adam(parameters, 1e-3)
    PEGEScheduler(gm, 10, Constant(1.0), Constant(0.0), Constant(0.0))
    pull = DecoupledLambda(gm, Linear(0.0, 1.0, steps=10))
    for t in range(4):
        before = [p.detach().clone() for p in parameters]
        optimizer.zero_grad()
        gm(X.double()).square().mean().backward()
        optimizer.step()
        moved = [p.detach().clone() for p in parameters]
        middles = [w_q / (w / p).detach() for p, (w, w_q, _) in zip(parameters, (grid(gm, "0"), grid(gm, "3")), strict=True)]
        pull.step()
        for parameter, old, new, middle in zip(parameters, before, moved, middles, strict=True):
            way = parameter.detach() - new
            assert float(way.abs().sum()) == pytest.approx(t / 10 * float((new - old).abs().sum()), rel=1e-6, abs=1e-15)
            assert bool((way * (middle - new) >= -1e-15).all())  # towards the code
            away = (new - middle).abs().sum()
            torch.testing.assert_close(way, (middle - new) * (way.abs().sum() / away), rtol=1e-6, atol=1e-12)


def test_the_pull_goes_no_further_than_to_the_code_and_codes_stay() -> None:
    gm = prepared()
    pull = DecoupledLambda(gm, 1000.0)
    weight, fq = gm.get_parameter("0.weight"), fake_quants(gm)["0.weight_fq"]
    with torch.no_grad():
        weight.add_(0.01)
    codes = fq.codes(weight)
    pull.step()
    assert torch.equal(codes, fq.codes(weight))
    _, w_q, _ = grid(gm, "0")
    torch.testing.assert_close(grid(gm, "0")[0].detach(), w_q)
    still = weight.detach().clone()
    pull.step()
    torch.testing.assert_close(weight.detach(), still)


def test_a_resumed_pull_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def made() -> tuple[GraphModule, Any, DecoupledLambda]:
        gm = prepared()
        return gm, torch.optim.Adam(gm.parameters(), 1e-2), DecoupledLambda(gm, Delayed(Cosine(0.1, 0.9, steps=4), start=2))

    def train(gm: GraphModule, optimizer: Any, pull: DecoupledLambda, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            gm(X.double()).square().mean().backward()
            optimizer.step()
            pull.step()

    whole, part, other = made(), made(), made()
    train(*whole, 6)
    train(*part, 3)
    pege_fx.save(part[0], tmp_path / "s.safetensors", optimizer=part[1], extra=part[2].state_dict())
    pege_fx.load(tmp_path / "s.safetensors", other[0], optimizer=other[1])
    other[2].load_state_dict(pege_fx.checkpoint_info(tmp_path / "s.safetensors").extra)
    train(*other, 3)
    for one, two in zip(whole[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(one, two)


def test_what_can_not_be_done_is_said() -> None:
    with pytest.raises(ScheduleError, match=r"share gives -1.0 at t = 0"):
        DecoupledLambda(prepared(), -1.0)
    with pytest.raises(ModelError, match="no weight can be pulled"):
        DecoupledLambda(prepared(QuantSpec(bits=3, method="dorefa")), 0.1)
    with pytest.raises(ScheduleError, match=r'reduction=.mean.: give "sum" or "kernel_mean"'):
        dampening_loss(prepared(), "mean")  # type: ignore[arg-type]
    only_inputs = pege_fx.prepare(nn.Sequential(nn.Linear(4, 4)), QuantPolicy((Rule(input="4"),)), torch.randn(2, 4))
    with pytest.raises(ModelError, match="no parameter of this model is a quantized weight"):
        dampening_loss(only_inputs)


def test_a_transform_of_the_methods_own_is_ordinary_autograd() -> None:
    gm = prepared(QuantSpec(bits=3, method="dorefa"))
    dampening_loss(gm).backward()
    assert bool((gm.get_parameter("3.weight").grad != 0).any())  # type: ignore[union-attr]
