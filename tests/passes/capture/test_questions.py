"""Whatever Python asks of a proxy is answered for the value that it stands for, wherever the code that asks lies."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, is_tensor, nn

import pege_fx
from pege_fx import QuantPolicy, Rule

pytestmark = pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
FLOAT = QuantPolicy((Rule(weight=None, input=None),))
X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


@functools.singledispatch
def dispatched(x: Any) -> Any:
    return x * 3


@dispatched.register
def _(x: Tensor) -> Any:
    return x * 5


class Kinds(type):
    """A class of classes, made where ``type`` has another meaning."""


ASKED: dict[str, Callable[[Any], Any]] = {
    "torch.is_tensor": lambda x: 2 if torch.is_tensor(x) else 3,
    "is_tensor": lambda x: 2 if is_tensor(x) else 3,
    "isinstance": lambda x: 2 if isinstance(x, Tensor) else 3,
    "isinstance of a size": lambda x: 2 if isinstance(x.shape, tuple) and isinstance(x.shape[0], int) else 3,
    "type is": lambda x: 2 if type(x) is Tensor else 3,
    "type of a size": lambda x: 2 if type(x.shape) is torch.Size else 3,
    "type in": lambda x: 2 if type(x) in (Tensor, nn.Parameter) else 3,
    "a name": lambda x: 2 if type(x).__name__ == "Tensor" else 3,
    "a class": lambda x: 2 if isinstance(Kinds("K", (), {}), type) and isinstance(type("L", (), {}), type) else 3,
    "hasattr": lambda x: 2 if hasattr(x, "shape") and not hasattr(x, "logits") else 3,
    "getattr": lambda x: getattr(x, "logits", 2),
    "getattr of a tensor": lambda x: getattr(x, "shape", (3,))[0],
    "singledispatch": lambda x: dispatched(x) / x,
    "a key": lambda x: {torch.float32: 2}.get(x.dtype, 3),
    "in a set": lambda x: 2 if x.dtype in {torch.float32} else 3,
    "a tensor as key": lambda x: 2 if {x: 1}.get(x) == 1 else 3,
    "a text": lambda x: 2 if str(x.dtype) == "torch.float32" else 3,
    "a formatted text": lambda x: {"2 torch.float32": 2}.get(f"{x.shape[0]} {x.dtype}", 3),
    "a formatted number": lambda x: 2 if f"{x.shape[0]:d}" == "2" else 3,
    "repr": lambda x: 2 if repr(x.shape) == "torch.Size([2, 4])" else 3,
}  # fmt: skip


class Asking(nn.Module):
    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.fc(x) * self.function(x)


@pytest.mark.parametrize("example", [None, (X,)])
@pytest.mark.parametrize("name", ASKED)
def test_python_gets_the_answer_that_the_model_gets(name: str, example: Any) -> None:
    model = Asking(ASKED[name])
    gm = pege_fx.prepare(model, FLOAT, example)
    torch.testing.assert_close(gm(X), model(X))
