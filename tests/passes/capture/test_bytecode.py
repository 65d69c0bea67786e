"""What a forward may do is read from its compiled code: with source or without, through helpers, properties and closures."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pege_fx
from pege_fx import QuantPolicy, Rule
from pege_fx.passes.capture.bytecode import names_in_forward
from pege_fx.training.scheduler import plan_of

pytestmark = pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
FLOAT = QuantPolicy((Rule(weight=None, input=None),))
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
CODE = """
def helper(module, x):
    return module.encode(x)

class Outer(Base):
    def forward(self, x):
        if x.sum() > 1e6:
            return x
        HOW
"""
HOW = {
    "directly": "return self.inner.encode(x) + self.inner(x)",
    "under another name": "inner = self.inner; return inner.encode(x) + inner(x)",
    "over two lines": "return (self\n            .inner\n            .encode(x))",
    "in a list": "return [each.encode(x) for each in [self.inner]][0]",
    "by a function": "return helper(self.inner, x)",
    "in a function inside": "return (lambda: self.inner.encode(x))()",
    "as a value": "return list(map(self.inner.encode, [x]))[0]",
}


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def encode(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x) * 2
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x) + 1


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = Inner()


@pytest.mark.parametrize("how", HOW)
def test_a_child_keeps_the_methods_that_code_without_source_calls(how: str) -> None:
    names: dict[str, Any] = {"Base": Base, "__name__": "without_source"}
    exec(CODE.replace("HOW", HOW[how]), names)
    model = names["Outer"]()
    gm = pege_fx.prepare(model, FLOAT, (X,))
    torch.testing.assert_close(gm(X), model(X))


class Owner(nn.Module):
    """Calls a method of its own that is named as one of its child's is, and in another method the child's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def reset(self) -> None:
        self.inner.encode(X)

    def encode(self, x: Tensor) -> Tensor:
        return x.clone()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(self.encode(x))
        return y if x.sum() < 1e6 else x


def test_only_what_forward_reaches_decides() -> None:
    gm = pege_fx.prepare(Owner(), "W4A4", (X,))
    assert [(note.path, note.rung) for note in plan_of(gm).captures] == [("", "python"), ("inner", "symbolic")]


def decorated(function: Any) -> Any:
    @functools.wraps(function)
    def call(self: Any, x: Tensor) -> Any:
        self.calls = 1
        return function(self, x)

    return call


class Names(nn.Module):
    @property
    def shown(self) -> int:
        return self.in_property  # type: ignore[no-any-return]

    def step(self, x: Tensor) -> Tensor:
        self.written = x
        return x

    def unused(self) -> None:
        self.never = self.neither

    @decorated
    def forward(self, x: Tensor) -> Any:
        return self.step(x) + self.shown


def test_names_come_from_all_that_forward_calls_and_from_nothing_else() -> None:
    names = names_in_forward(Names())
    assert {"shown", "in_property", "step"} <= names.read
    assert "neither" not in names.read
    assert {"calls", "written"} <= names.written
    assert "never" not in names.written
    assert "step" not in names.values
