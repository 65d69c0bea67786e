"""torch.func on prepared models: grad, vmap, jvp and what is made of them agree with autograd."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import pege_fx
from pege_fx.errors import SpecError

# torch makes its own forward-mode derivatives by torch.jit.script when they are first needed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script:FutureWarning", "ignore:.*torch.jit.script:DeprecationWarning"
)
X = torch.linspace(-1.0, 1.0, 30).view(5, 6)


def prepared(estimator: str, training: bool, rate: float = 0.5) -> Any:
    torch.manual_seed(0)
    spec = pege_fx.QuantSpec(bits=4, estimator=estimator)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    gm = pege_fx.prepare(model, pege_fx.QuantPolicy((pege_fx.Rule(weight=spec, input=spec),)), (X,))
    for site in pege_fx.fake_quants(gm).values():
        site.schedule.set_rate(rate)
    return gm.train(training)


def of_parameters(gm: nn.Module, x: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda parameters: functional_call(gm, parameters | dict(gm.named_buffers()), (x,))


def of_input(gm: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: of_parameters(gm, x)(dict(gm.named_parameters()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("estimator", ["pege", "ste", "ewgs"])
def test_grad_is_the_gradient_of_backward_and_per_sample_gradients_those_of_each_sample(estimator: str, training: bool) -> None:
    gm = prepared(estimator, training)
    parameters = dict(gm.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return of_parameters(gm, x)(parameters).square().sum()

    whole = grad(loss)(parameters, X)
    gm(X).square().sum().backward()
    for name, parameter in gm.named_parameters():
        torch.testing.assert_close(whole[name], parameter.grad)
    by_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, X)
    for name, value in grad(loss)(parameters, X[2]).items():
        torch.testing.assert_close(by_sample[name][2], value)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("estimator", ["pege", "ste"])
def test_forward_mode_is_the_transpose_of_backward(estimator: str, training: bool) -> None:
    gm = prepared(estimator, training)
    torch.testing.assert_close(jacfwd(of_input(gm))(X), jacrev(of_input(gm))(X))
    parameters = dict(gm.named_parameters())
    torch.testing.assert_close(jacfwd(of_parameters(gm, X))(parameters), jacrev(of_parameters(gm, X))(parameters))
    _, tangent = jvp(of_input(gm), (X,), (torch.ones_like(X),))
    with forward_ad.dual_level():
        dual = gm(forward_ad.make_dual(X, torch.ones_like(X)))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, tangent)


def test_an_estimator_that_is_no_linear_map_has_no_forward_mode() -> None:
    with pytest.raises(SpecError, match="EWGS has no forward-mode derivative"):
        jvp(of_input(prepared("ewgs", True)), (X,), (torch.ones_like(X),))


def test_transforms_of_transforms_and_of_a_part_of_the_parameters() -> None:
    gm = prepared("ste", True)
    assert hessian(lambda x: of_input(gm)(x).square().sum())(X[0]).shape == (6, 6)
    parameters = dict(gm.named_parameters())
    head = {name: value for name, value in parameters.items() if name.startswith("2.")}
    made = grad(lambda part: of_parameters(gm, X)(parameters | part).sum())(head)
    gm(X).sum().backward()
    for name, value in made.items():
        torch.testing.assert_close(value, gm.get_parameter(name).grad)


class Mapped(nn.Module):
    """Maps a layer over the batch by itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = vmap(self.layer)(x)
        return y


@pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
def test_a_model_that_maps_its_layers_is_prepared_and_calibrated_on_all_samples() -> None:
    model, x = Mapped(), X[:, None]
    gm = pege_fx.prepare(model, "W8A8", (x,))
    plain = pege_fx.prepare(model.layer, "W8A8", (X,))
    torch.testing.assert_close(gm.eval()(x)[:, 0], plain.eval()(X))
    gm.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in gm.parameters())


def test_what_a_transform_saw_is_gone_after_it() -> None:
    gm = prepared("pege", True, rate=1.0).eval()
    with torch.no_grad():
        before = gm(X)
        vmap(of_input(gm))(X[:, None])
        grad(lambda x: of_input(gm)(x).sum())(X)
        assert torch.equal(gm(X), before)
    gm.train()
    grad(lambda x: of_input(gm)(x).sum())(X)
    with pytest.raises(pege_fx.PegeError, match="no training forward"):
        pege_fx.discretization_loss(gm)
