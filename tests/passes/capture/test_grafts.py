"""A module that stays Python may count, walk, read and call parts of its children, which are graphs or stay as they are."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import pege_fx
from pege_fx import Constant, PEGEScheduler, QuantPolicy, Rule
from pege_fx.training.scheduler import plan_of

pytestmark = pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
FLOAT = QuantPolicy((Rule(weight=None, input=None),))


class Child(nn.Module):
    width = 8

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8, bias=False)])
        self.norm, self.self = nn.LayerNorm(8), nn.Linear(8, 8)
        self.gain = nn.Parameter(torch.full((8,), 2.0))
        self.settings = {"scale": 3.0}

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        y: Tensor = self.norm(self.self(x)) * self.gain
        return y

    def other(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers[0](x) - 1
        return y

    @property
    def doubled(self) -> Tensor:
        return self.gain * 2

    def __len__(self) -> int:
        return len(self.layers) + 5


class Wrapper(nn.Module):
    """Hands on what it does not have, as the wrappers of adapters do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


def counts(child: Any, x: Tensor) -> Tensor:
    return x * len(child.layers)


def counts_itself(child: Any, x: Tensor) -> Tensor:
    return x * len(child)


def walks(child: Any, x: Tensor) -> Tensor:
    for layer in child.layers:
        x = layer(x)
    return x


def reads_a_dtype(child: Any, x: Tensor) -> Tensor:
    return x.to(child.layers[0].weight.dtype)


def reads_no_bias(child: Any, x: Tensor) -> Tensor:
    return x if child.layers[1].bias is None else -x


def reads_a_number_of_a_part(child: Any, x: Tensor) -> Tensor:
    return x * float(child.layers[-1].in_features)


def reads_a_parameter(child: Any, x: Tensor) -> Tensor:
    return x * child.gain


def reads_a_setting(child: Any, x: Tensor) -> Tensor:
    return x * float(child.settings["scale"])


def reads_of_the_class(child: Any, x: Tensor) -> Tensor:
    return x * float(child.width)


def reads_a_property(child: Any, x: Tensor) -> Tensor:
    return x * child.doubled


def reads_by_name(child: Any, x: Tensor) -> Tensor:
    return x * len(getattr(child, "layers"))  # noqa: B009


def calls_a_part(child: Any, x: Tensor) -> Tensor:
    y: Tensor = child.self(x)
    return y


def calls_a_norm(child: Any, x: Tensor) -> Tensor:
    y: Tensor = child.norm(x)
    return y


def calls_another_method(child: Any, x: Tensor) -> Tensor:
    y: Tensor = child.other(x)
    return y


def calls_forward(child: Any, x: Tensor) -> Tensor:
    y: Tensor = child.forward(x)
    return y


def asks_the_class(child: Any, x: Tensor) -> Tensor:
    return x * (2 if isinstance(child, (Child, Wrapper)) else 3)


def names_the_class(child: Any, x: Tensor) -> Tensor:
    return x * len(child.__class__.__name__)


def asks_the_class_of_a_part(child: Any, x: Tensor) -> Tensor:
    return x * (2 if isinstance(child.self, nn.Linear) else 3)


def adds_up_parameters(child: Any, x: Tensor) -> Tensor:
    return x + sum(float(p.detach().sum()) for p in child.parameters())


def reads_the_first_parameter(child: Any, x: Tensor) -> Tensor:
    return x.to(next(child.parameters()).dtype)


ASKS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    ask.__name__: ask
    for ask in (
        counts, counts_itself, walks, reads_a_dtype, reads_no_bias, reads_a_number_of_a_part, reads_a_parameter,
        reads_a_setting, reads_of_the_class, reads_a_property, reads_by_name, calls_a_part, calls_a_norm,
        calls_another_method, calls_forward, asks_the_class, names_the_class, asks_the_class_of_a_part,
        adds_up_parameters, reads_the_first_parameter,
    )
}  # fmt: skip


class Asks(nn.Module):
    """Stays Python; asks its child by way of a dictionary, which no analysis of its code sees through."""

    def __init__(self, child: nn.Module, ask: str) -> None:
        super().__init__()
        self.child, self.ask = child, ask

    def forward(self, x: Tensor) -> Tensor:
        asked = ASKS[self.ask](self.child, x)
        return x if x.mean() > 100 else self.child(asked)


class AsksByAttribute(Asks):
    """The same by a function that it holds, which its code names."""

    def __init__(self, child: nn.Module, ask: str) -> None:
        super().__init__(child, ask)
        self.function = ASKS[ask]

    def forward(self, x: Tensor) -> Tensor:
        asked = self.function(self.child, x)
        return x if x.mean() > 100 else self.child(asked)


def rows() -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def made(ask: str, wrapped: bool, cls: type[Asks]) -> nn.Module:
    torch.manual_seed(0)
    return cls(Wrapper(Child()) if wrapped and ask != "counts_itself" else Child(), ask)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("ask", ASKS)
def test_python_asks_a_child_what_it_likes(ask: str, wrapped: bool) -> None:
    model, x = made(ask, wrapped, Asks), rows()
    gm = pege_fx.prepare(model, FLOAT, (x,))
    torch.testing.assert_close(gm(x), model(x), rtol=0, atol=0)
    if ask == "adds_up_parameters":
        return  # step sizes are parameters too
    gm = pege_fx.prepare(model, "W4A4", (x,)).eval()
    assert set(model.state_dict()) <= set(gm.state_dict())
    for other in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm)), pege_fx.convert(gm), copy.deepcopy(pege_fx.convert(gm))):
        assert torch.equal(other(x), gm(x))
    PEGEScheduler(gm.train(), 1, Constant(0.0), Constant(0.0), Constant(0.0))  # nothing is replaced in training
    assert torch.equal(gm(x), model(x))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("ask", [ask for ask in ASKS if ask != "reads_by_name"])
def test_without_an_example_the_code_says_so(ask: str, wrapped: bool) -> None:
    model, x = made(ask, wrapped, AsksByAttribute), rows()
    gm = pege_fx.prepare(model, FLOAT)
    torch.testing.assert_close(gm(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("ask", ["calls_a_part", "calls_another_method", "walks", "counts", "reads_a_dtype"])
def test_every_layer_is_quantized_all_the_same(ask: str) -> None:
    gm = pege_fx.prepare(made(ask, False, Asks), "W4A4", (rows(),))
    assert {op.path for op in plan_of(gm).operations} == {"child.layers.0", "child.layers.1", "child.self"}
    assert all(edge.spec for op in plan_of(gm).operations for edge in op.edges if edge.operand == "weight")


class Fused(nn.Module):
    """Calls methods of tensors that have the names of parts of its child, which is one graph: its norm is folded."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Sequential()
        self.child.conv, self.child.norm, self.child.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.child(x.relu())
        return x if y.norm() > 1e6 else y


def test_a_method_of_tensors_is_no_part_of_a_child() -> None:
    gm = pege_fx.prepare(Fused(), "W4A4", (torch.randn(2, 3, 4, 4),))
    assert {note.path: note.rung for note in plan_of(gm).captures} == {"": "python", "child": "symbolic"}


class AsksALayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.to(next(self.layer.parameters()).dtype))
        return x if y.mean() > 100 else y


def test_the_parameters_that_python_goes_through_are_deployed() -> None:
    gm = pege_fx.prepare(AsksALayer(), "W4A4", (rows(),)).eval()
    assert torch.equal(pege_fx.convert(gm)(rows()), gm(rows()))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x))


class _StaysPython(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = _Block()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return y * 2 if bool((y.sum() > 0).item()) else y


@pytest.mark.filterwarnings("ignore:the model stays Python")
def test_a_graph_takes_a_class_that_was_made_on_top_of_what_it_stands_for() -> None:
    """As ``fully_shard`` does with every module that it is given: it is a graph as before, and what it stands for."""
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    gm = pege_fx.prepare(_StaysPython(), "W4A4", (x,))
    (block,) = [module for module in gm.modules() if isinstance(module, GraphModule) and isinstance(module, _Block)]
    wanted = gm(x)

    class Sharded:
        """What is mixed in."""

    block.__class__ = type("ShardedBlock", (Sharded, block.__class__), {"mark": 1})  # type: ignore[assignment]
    assert isinstance(block, Sharded)
    assert isinstance(block, GraphModule)
    assert isinstance(block, _Block)
    assert block.mark == 1  # type: ignore[attr-defined]
    assert torch.equal(gm(x), wanted)
