"""Tensors that ``forward`` makes and writes: each call has its own, whichever way they are made and written."""

import copy
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, zeros

import pege_fx
from pege_fx import QuantPolicy, Rule
from pege_fx.training.scheduler import plan_of

pytestmark = pytest.mark.filterwarnings("ignore:nothing is quantized")
FLOAT = QuantPolicy((Rule(weight=None, input=None),))
OUTSIDE = torch.zeros(4)


class InPlace(nn.Module):
    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        z.add_(y)
        return z


class Undecided(nn.Module):
    """Stays Python, and writes to what it is given."""

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        z.add_(y)
        return z if y.sum() < 1e6 else -z


class Makes(nn.Module):
    def __init__(self, make: str) -> None:
        super().__init__()
        self.make, self.fc = make, nn.Linear(4, 4)
        self.register_buffer("ones", torch.ones(4))
        self.plain, self.many = torch.ones(4), [torch.ones(4)]
        self.in_place, self.undecided, self.relu = InPlace(), Undecided(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y + MAKE[self.make](self, y)


def of_zeros(write: Callable[[Tensor, Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    def make(model: Makes, y: Tensor) -> Tensor:
        z = torch.zeros(4)
        write(z, y[0])
        return z

    return make


def of_square(write: Callable[[Tensor, Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    def make(model: Makes, y: Tensor) -> Tensor:
        z = torch.zeros(2, 4)
        write(z, y[0])
        return z[0]

    return make


def added_to(make: Callable[[Any], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    return lambda model, y: make(model).add_(y[0])


def augmented(model: Makes, y: Tensor) -> Tensor:
    z = torch.zeros(4)
    for i in range(3):
        z += y[0] * i
    return z


def assigned(model: Makes, y: Tensor) -> Tensor:
    z = torch.full((4,), 2.0)
    z[0] = y.mean()
    z[1:3] *= y[0, :2]
    return z


def one_of_two(model: Makes, y: Tensor) -> Tensor:
    pair = [torch.zeros(4), torch.ones(4)]
    pair[0].add_(y[0])
    return pair[0] + pair[1]


def read_before_and_after(model: Makes, y: Tensor) -> Tensor:
    z, w = torch.zeros(4), torch.ones(4)
    before = z * 2
    z.add_(y[0])
    return before + z * 3 + w


def written_by_numbers_first(model: Makes, y: Tensor) -> Tensor:
    z = torch.zeros(4)
    z.add_(1)
    z[0] = 5
    z.add_(y[0])
    return z


def of_the_model(model: Makes, y: Tensor) -> Tensor:
    model.plain.add_(1)
    return model.plain * 2


def of_the_model_by_a_view(model: Makes, y: Tensor) -> Tensor:
    model.plain[1:].add_(y[0, 1:].detach())
    return model.plain * 2


def in_a_list_of_the_model(model: Makes, y: Tensor) -> Tensor:
    model.many[0].add_(y[0].detach())
    return model.many[0] * 2


def dropped(model: Makes, y: Tensor) -> Tensor:
    z = torch.ones(4)
    F.dropout(z, 0.5, model.training, inplace=True)
    return z + y[0]


MAKE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "add_": of_zeros(lambda z, y: z.add_(y)),
    "view": of_zeros(lambda z, y: z[1:].add_(y[1:])),
    "view of a view": of_zeros(lambda z, y: z.view(2, 2).t()[0].sub_(y[:2])),
    "transposed": of_square(lambda z, y: z.t().add_(y.unsqueeze(1))),
    "detached": of_zeros(lambda z, y: z.detach().add_(y.detach())),
    "out": of_zeros(lambda z, y: torch.mul(y.detach(), 2, out=z)),
    "inplace": of_zeros(lambda z, y: F.relu(z.sub_(y), inplace=True)),
    "index_put_": of_zeros(lambda z, y: z.index_put_((torch.tensor([0, 2]),), y[:2])),
    "scatter_add_": of_zeros(lambda z, y: z.scatter_add_(0, torch.arange(4), y)),
    "copy_": of_zeros(lambda z, y: z.copy_(y).mul_(y)),
    "zeros": added_to(lambda model: torch.zeros(4)),
    "ones": added_to(lambda model: torch.ones(4)),
    "full": added_to(lambda model: torch.full((4,), 2.0)),
    "arange": added_to(lambda model: torch.arange(4.0)),
    "linspace": added_to(lambda model: torch.linspace(0, 1, 4)),
    "tensor": added_to(lambda model: torch.tensor([1.0, 2.0, 3.0, 4.0])),
    "eye": added_to(lambda model: torch.eye(4)[1]),
    "imported": added_to(lambda model: zeros(4)),
    "filled": added_to(lambda model: torch.empty(4).fill_(3)),
    "new_zeros": added_to(lambda model: torch.ones(1).new_zeros(4)),
    "new_full of a buffer": added_to(lambda model: model.ones.new_full((4,), 2.0)),
    "ones_like": added_to(lambda model: torch.ones_like(torch.zeros(4))),
    "zeros_like a parameter": added_to(lambda model: torch.zeros_like(model.fc.bias)),
    "clone": added_to(lambda model: model.plain.clone()),
    "computed": added_to(lambda model: (torch.arange(4.0) * 2).flip(0)),
    "NumPy": added_to(lambda model: torch.from_numpy(numpy.zeros(4, "float32"))),
    "a module": lambda model, y: model.in_place(torch.zeros(4), y[0]),
    "a module in Python": lambda model, y: model.undecided(torch.zeros(4), y[0]),
    "a module of torch": lambda model, y: model.relu(torch.zeros(4) - y[0]),
    **{f.__name__: f for f in (augmented, assigned, one_of_two, read_before_and_after, written_by_numbers_first)},
    **{f.__name__: f for f in (of_the_model, of_the_model_by_a_view, in_a_list_of_the_model, dropped)},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
@pytest.mark.parametrize("examples", [True, False])
@pytest.mark.parametrize("make", MAKE)
def test_every_call_has_its_own(make: str, examples: bool) -> None:
    model = Makes(make)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    gm = pege_fx.prepare(model, FLOAT, (x,) if examples else None)
    for tried in (gm, copy.deepcopy(gm)):
        reference = copy.deepcopy(model)
        for number, training in enumerate((True, False, True, False)):
            found = []
            for module in (reference.train(training), tried.train(training)):
                torch.manual_seed(number)
                given = torch.randn(3, 4, requires_grad=True)
                y = module(given)
                found.append((y, *torch.autograd.grad(y.cos().sum(), (given, *module.parameters()))))
            torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize("make", ["add_", "view", "out", "assigned", "clone", "of_the_model_by_a_view", "one_of_two"])
def test_such_a_module_is_a_graph_all_the_same(make: str) -> None:
    gm = pege_fx.prepare(Makes(make), FLOAT, (torch.randn(3, 4),))
    assert [note.rung for note in plan_of(gm).captures] == ["symbolic"]


def test_what_nobody_writes_is_a_constant() -> None:
    """It is computed once, and Python may ask for its values."""

    class Asks(Makes):
        def forward(self, x: Tensor) -> Tensor:
            z = torch.zeros(4)
            z[1:] = 2.0
            y: Tensor = self.fc(x) + (z if float(z.sum()) > 3 else -z)
            return y

    gm = pege_fx.prepare(Asks(""), FLOAT, (torch.randn(3, 4),))
    assert not gm.graph.find_nodes(op="call_function", target=torch.zeros)
    assert [note.rung for note in plan_of(gm).captures] == ["symbolic"]


class WritesOutside(Makes):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        OUTSIDE.add_(y[0].detach())
        return y + OUTSIDE


def test_what_is_written_outside_of_the_model_stays_python() -> None:
    model = WritesOutside("")
    with pytest.warns(
        pege_fx.PegeWarning, match=r"writes to a tensor that it does not make.*test_constants\.py:\d+ in forward"
    ):
        gm = pege_fx.prepare(model, FLOAT)
    answers = []
    for module in (model, gm):
        OUTSIDE.zero_()
        answers.append([module(torch.ones(3, 4)) for _ in range(3)])
    assert all(map(torch.equal, *answers))
    assert not torch.equal(answers[0][0], answers[0][1])
