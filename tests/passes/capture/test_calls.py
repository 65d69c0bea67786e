"""What a module's call does besides its class's forward: hooks, patches, __call__ of its own. Kept as they are, or refused."""

import copy
import functools
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules

import pege_fx
from pege_fx import ModelError, QuantPolicy, Rule

pytestmark = pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
FLOAT = QuantPolicy((Rule(weight=None, input=None),))
X = torch.linspace(-1.0, 1.0, 32).view(4, 8)


class Net(nn.Module):
    """A container that is called, one that is walked through, a leaf, and an attention that is written out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.walked = nn.ModuleList([nn.Linear(8, 8), nn.Dropout(0.0)])
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = self.body(x) * scale
        for layer in self.walked:
            y = layer(y)
        y = self.attention(y[None], y[None], y[None])[0][0]
        return self.head(y)  # type: ignore[no-any-return]


PATHS = ["", "body", "body.0", "body.1", "walked.0", "walked.1", "attention", "head"]


def double(module: nn.Module, args: Any, result: Any) -> Any:
    return (result[0] * 2, *result[1:]) if isinstance(result, tuple) else result * 2


def triple(module: nn.Module, args: Any) -> Any:
    return tuple(arg * 3 for arg in args)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m.register_forward_hook(double),
    "forward with kwargs": lambda m: m.register_forward_hook(lambda m, a, k, y: double(m, a, y), with_kwargs=True),
    "forward, always": lambda m: m.register_forward_hook(double, always_call=True),
    "forward pre": lambda m: m.register_forward_pre_hook(triple),
    "forward pre with kwargs": lambda m: m.register_forward_pre_hook(lambda m, a, k: (triple(m, a), k), with_kwargs=True),
    "full backward": lambda m: m.register_full_backward_hook(lambda m, gi, go: tuple(g if g is None else g * 5 for g in gi)),
    "full backward pre": lambda m: m.register_full_backward_pre_hook(
        lambda m, go: tuple(g if g is None else g * 7 for g in go)
    ),
}


def assert_same(model: nn.Module, gm: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Outputs, and gradients of the input and of all parameters."""
    a, b = X.clone().requires_grad_(), X.clone().requires_grad_()
    model.zero_grad()
    gm.zero_grad()
    expected, got = model(a, *args, **kwargs), gm(b, *args, **kwargs)
    torch.testing.assert_close(got, expected)
    expected.square().sum().backward()
    got.square().sum().backward()
    torch.testing.assert_close(b.grad, a.grad)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gm.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_anywhere_does_what_it_did(kind: str, path: str) -> None:
    model = Net()
    HOOKS[kind](model.get_submodule(path))
    assert_same(model, pege_fx.prepare(model, FLOAT, (X,)))


@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_on_a_graph_of_its_own_stays(kind: str) -> None:
    model = Net()
    HOOKS[kind](model.body)
    assert_same(model, pege_fx.prepare(model, FLOAT, (X,), blocks=("body",)))


def test_layers_below_a_hook_are_quantized_and_the_hook_is_named() -> None:
    model = Net()
    model.body.register_forward_hook(double)
    with pytest.warns(pege_fx.PegeWarning, match="body stays Python: it has forward hooks, which a graph does not hold"):
        gm = pege_fx.prepare(model, "W8A8", (X,))
    assert {"body.0.weight_fq", "head.weight_fq"} <= {name.replace("body.0.0", "body.0") for name in pege_fx.fake_quants(gm)}


@pytest.mark.parametrize("path", ["", "body"])
def test_hooks_that_collect_collect_in_every_call_and_in_copies(path: str) -> None:
    model, seen = Net(), []
    model.get_submodule(path).register_forward_hook(lambda m, a, y: seen.append(y))
    gm = pege_fx.prepare(model, "W8A8", (X,))
    for made in (gm, copy.deepcopy(gm), pege_fx.convert(gm)):
        seen.clear()
        made(X)
        made(X)
        assert len(seen) == 2


def test_a_hook_that_holds_the_model_holds_the_copy() -> None:
    """A model that collects by a hook that it registered on itself: a copied closure would fill the original's list."""
    model = Net()
    model.body.register_forward_hook(lambda m, a, y: model.seen.append(y))
    model.head.register_forward_hook(functools.partial(lambda owner, m, a, y: y + owner.seen[-1].sum(), model))
    assert_same(model, pege_fx.prepare(model, FLOAT, (X,)))
    model.seen.clear()
    pege_fx.prepare(model, FLOAT, (X,))(X)
    assert not model.seen


def scaled(self: Any, x: Tensor, scale: float = 1.0) -> Tensor:
    return self.head(self.body(x)) * scale  # type: ignore[no-any-return]


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("way", ["method", "closure", "partial", "another method"])
def test_a_patched_forward_is_the_one_that_runs(way: str, scale: float) -> None:
    model, original = Net(), Net.forward
    patches: dict[str, Callable[..., Any]] = {
        "method": types.MethodType(scaled, model),
        "closure": lambda x, scale=1.0: original(model, x, scale) * 2,
        "partial": functools.partial(scaled, model),
        "another method": lambda x, scale=1.0: model.body(x),
    }
    model.forward = patches[way]  # type: ignore[method-assign]
    gm = pege_fx.prepare(model, FLOAT, (X,))
    torch.testing.assert_close(gm(X, scale=scale), model(X, scale=scale))
    gm.get_parameter("body.0.weight").data.zero_()  # the copy's, not the model's
    assert not torch.equal(gm(X), model(X))


def test_a_patched_forward_of_a_child_is_the_one_that_runs() -> None:
    model = Net()
    body, forward = model.body, model.body.forward
    model.body.forward = lambda x: forward(x) * 2 + body[0].bias  # type: ignore[method-assign]
    assert_same(model, pege_fx.prepare(model, FLOAT, (X,)))


class Called(Net):
    """Its call takes an argument that its forward does not know."""

    def __call__(self, x: Tensor, factor: float = 2.0) -> Any:
        return super().__call__(x * factor)


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Called()

    def forward(self, x: Tensor) -> Any:
        return self.inner(x, factor=0.5)


def test_a_call_of_its_own_is_kept() -> None:
    assert_same(Called(), pege_fx.prepare(Called(), FLOAT, (X,)), factor=3.0)
    assert_same(Around(), pege_fx.prepare(Around(), FLOAT, (X,)))
    assert_same(Around(), pege_fx.prepare(Around(), FLOAT, (X,), blocks=("inner",)))


def test_a_pre_hook_may_change_what_forward_is_given() -> None:
    model = Net()
    model.register_forward_pre_hook(lambda m, args, kwargs: ((args[0] * kwargs.pop("factor"),), kwargs), with_kwargs=True)
    gm = pege_fx.prepare(model, FLOAT, (X,), {"factor": 2.0})
    assert_same(model, gm, factor=5.0)


@pytest.mark.parametrize(
    "register",
    [
        of_all_modules.register_module_forward_hook,
        of_all_modules.register_module_forward_pre_hook,
        of_all_modules.register_module_full_backward_hook,
        of_all_modules.register_module_full_backward_pre_hook,
    ],
)
def test_hooks_for_all_modules_are_refused_by_name(register: Callable[..., Any]) -> None:
    handle = register(lambda *_: None)
    try:
        with pytest.raises(ModelError, match=register.__name__):
            pege_fx.prepare(Net(), FLOAT, (X,))
    finally:
        handle.remove()
    pege_fx.prepare(Net(), FLOAT, (X,))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_scripted_children_are_kept_whole_and_a_scripted_model_is_refused() -> None:
    model = Net()
    model.body = torch.jit.script(model.body)
    gm = pege_fx.prepare(model, FLOAT, (X,))
    gm(X).sum().backward()
    assert dict(gm.named_parameters())["body.0.weight"].grad is not None
    for made in (gm, copy.deepcopy(gm)):
        torch.testing.assert_close(made(X), model(X))
    with pytest.raises(ModelError, match="the model is scripted"):
        pege_fx.prepare(torch.jit.script(nn.Linear(8, 3)), FLOAT, (X,))


@pytest.mark.parametrize("path", ["", "0", "0.0"])
def test_old_parametrizations_stay(path: str) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Sequential(nn.Linear(8, 3))) if path else nn.Linear(8, 3)
    model = model[0] if path == "0.0" else model
    nn.utils.spectral_norm(model if not path else model.get_submodule(path[2:] or "0") if path != "0" else model[0][0])
    model.eval()
    gm = pege_fx.prepare(model, FLOAT, (X,)).eval()
    torch.testing.assert_close(gm(X), model(X))


def test_a_hook_of_the_module_level_survives_pickle() -> None:
    model = Net()
    model.register_forward_hook(double)
    gm = pege_fx.prepare(model, "W8A8", (X,)).eval()
    assert torch.equal(pickle.loads(pickle.dumps(gm))(X), gm(X))
