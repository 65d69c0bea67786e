"""Proxies: what works in place goes on working in place."""

import copy
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pege_fx
from pege_fx import Constant, PEGEScheduler, QuantPolicy, Rule
from pege_fx.testing import assert_same_function
from pege_fx.training.scheduler import plan_of

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


AUGMENTED = ["iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"]


class Augmented(nn.Module):
    """Changes a tensor under one of its two names."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = x.abs() + 1.0
        same = y
        if self.name == "iadd":
            same += x
        elif self.name == "isub":
            same -= 0.5
        elif self.name == "imul":
            same *= x
        elif self.name == "itruediv":
            same /= 3
        elif self.name == "ifloordiv":
            same //= 2
        elif self.name == "imod":
            same %= 2
        elif self.name == "ipow":
            same **= 2
        else:
            same[:, 1] = same[:, 0] * 2
            same[..., 2:4] = 0.5
        out: Tensor = self.fc(y)
        return out


@pytest.mark.parametrize("name", [*AUGMENTED, "setitem"])
@pytest.mark.parametrize("examples", [None, (X,)])
def test_a_tensor_changed_under_another_name_is_changed(name: str, examples: tuple[Tensor] | None) -> None:
    model = Augmented(name)
    gm = pege_fx.prepare(model, "W4A4", examples)
    assert gm.graph.find_nodes(op="call_function", target=getattr(operator, name))
    zero = Constant(0.0)
    PEGEScheduler(gm, 1, zero, zero, zero)
    for made in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert_same_function(model, made, (X,), tolerance=0)


class Contains(nn.Module):
    """Asks what something contains."""

    def __init__(self, ask: Callable[..., bool]) -> None:
        super().__init__()
        self.fc, self.ask = nn.Linear(8, 8), ask

    def forward(self, x: Tensor, named: dict[Any, Tensor]) -> Tensor:
        y: Tensor = self.fc(x)
        return y if self.ask(x, named) else -y


@pytest.mark.parametrize(
    ("ask", "note"),
    [
        (lambda x, named: 1.0 in x, "in asks for the value of x, which depends on data"),
        (lambda x, named: x.shape[0] in named, "in asks for the value of named, which depends on data"),
        (lambda x, named: "bias" not in named, "in of named is 1 items"),
    ],
)
@pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
def test_what_a_collection_contains_is_known_and_what_a_tensor_does_is_not(ask: Callable[..., bool], note: str) -> None:
    model, x = Contains(ask), torch.ones(4, 8)
    gm = pege_fx.prepare(model, QuantPolicy((Rule(weight=None, input=None),)), (x, {4: x}))
    assert note in plan_of(gm).captures[0].reason
    torch.testing.assert_close(gm(x, {4: x}), model(x, {4: x}))
