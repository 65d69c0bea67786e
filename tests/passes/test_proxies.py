"""Proxies: what works in place goes on working in place."""

import copy
import operator
import pickle

import pytest
import torch
from torch import Tensor, nn

import pege_fx
from pege_fx import Constant, PEGEScheduler
from pege_fx.testing import assert_same_function

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
