"""Proxies: what works in place goes on working in place."""

import copy
import operator
import pickle
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import pege_fx
from pege_fx import Constant, PEGEScheduler, QuantPolicy, Rule
from pege_fx.testing import assert_same_function
from pege_fx.training.scheduler import plan_of

QUIET = pytest.mark.filterwarnings("ignore::pege_fx.errors.PegeWarning")
IN_FLOAT = QuantPolicy((Rule(weight=None, input=None),))
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


# --- what Python makes of sizes ------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Scales by a number that Python makes of its input's sizes."""

    def __init__(self, number: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.fc, self.number = nn.Linear(8, 8), number

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.number(x)  # type: ignore[no-any-return]


OF_SIZES: dict[str, Callable[[Tensor], Any]] = {
    "np.ceil": lambda x: numpy.ceil(x.shape[-1] / 3),
    "np.ceil as a whole number": lambda x: int(numpy.ceil(x.shape[-1] / 3)),
    "np.prod": lambda x: numpy.prod(x.shape[1:]),
    "np.array": lambda x: int(numpy.array(x.shape).max()),
    "np.sqrt": lambda x: 1 / numpy.sqrt(x.shape[-1]),
    "np.log2": lambda x: float(numpy.log2(len(x))),
    "a number of NumPy in front": lambda x: numpy.float64(0.5) * x,
    "round": lambda x: round(x.shape[-1] / 3),
    "round to digits": lambda x: round(x.shape[-1] / 3, 1),
    "divmod": lambda x: sum(divmod(x.shape[-1], 3)),
    "divmod of a number": lambda x: divmod(20, x.shape[-1])[1],
    "reversed, multiplied": lambda x: numpy.multiply.reduce(tuple(x.shape[::-1])),
}


@QUIET
@pytest.mark.parametrize("name", OF_SIZES)
def test_numbers_made_of_sizes_are_followed(name: str) -> None:
    model = Scaled(OF_SIZES[name])
    gm = pege_fx.prepare(model, IN_FLOAT, (X,))
    assert not [capture for capture in plan_of(gm).captures if capture.rung == "python"]
    assert torch.equal(gm(X), model(X))


@QUIET
def test_round_and_divmod_follow_the_size() -> None:
    for name in ("round", "divmod", "divmod of a number"):
        model = Scaled(OF_SIZES[name])
        gm = pege_fx.prepare(model, IN_FLOAT)
        assert plan_of(gm).captures[0].rung == "symbolic"
        assert torch.equal(gm(X), model(X))


@QUIET
def test_numpy_asks_for_no_tensor() -> None:
    gm = pege_fx.prepare(Scaled(lambda x: float(numpy.max(numpy.asarray(x)))), IN_FLOAT, (X,))
    assert "NumPy" in plan_of(gm).captures[0].reason
    assert plan_of(gm).captures[0].rung == "python"


@QUIET
def test_the_type_of_a_device_is_text() -> None:
    class Autocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            names = {"cpu": 1.0, "cuda": 1.0}
            return self.fc(x) * names[x.device.type]  # type: ignore[no-any-return]

    model = Autocast()
    gm = pege_fx.prepare(model, IN_FLOAT, (X,))
    assert plan_of(gm).captures[0].rung == "specialised"
    assert torch.equal(gm(X), model(X))


class Asks(nn.Module):
    """Reads a size or a type behind a selection."""

    def __init__(self, made: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.made = nn.Linear(8, 8), made

    def forward(self, x: Tensor) -> Tensor:
        made = self.made(x)
        if made.dtype == torch.float16 or made.shape[0] > 100:
            return x
        return self.fc(x) * made.sum()


SELECTIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "repeated by a number": (lambda x: x[:, :4].repeat_interleave(2, dim=1), True),
    "repeated by a tensor": (lambda x: x.repeat_interleave((x[:, 0] > 0).long(), dim=0), False),
    "repeated to a size": (lambda x: x.repeat_interleave(torch.ones_like(x[:, 0]).long(), dim=0, output_size=4), True),
    "selected, then shaped": (lambda x: x[x > -100].reshape(4, 8), True),
    "selected, then shaped by what is left": (lambda x: x[x > -100].reshape(-1, 8), False),
}


@QUIET
@pytest.mark.parametrize("name", SELECTIONS)
def test_a_size_depends_on_data_only_where_it_does(name: str) -> None:
    made, is_sized = SELECTIONS[name]
    gm = pege_fx.prepare(Asks(made), IN_FLOAT, (X,))
    assert (plan_of(gm).captures[0].rung != "python") is is_sized


@QUIET
def test_a_child_may_be_called_self() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self, self.output = Asks(SELECTIONS["repeated by a tensor"][0]), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.output(self.self(x))  # type: ignore[no-any-return]

    model = Attention()
    gm = pege_fx.prepare(model, IN_FLOAT, (X,))
    assert torch.equal(gm(X), model(X))
    assert torch.equal(copy.deepcopy(gm)(X), model(X))
    assert torch.equal(pege_fx.convert(gm)(X), gm.eval()(X))


class Catches(nn.Module):
    """Goes another way where its mask is None, as Python lets it."""

    def __init__(self, compute: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.fc, self.compute = nn.Linear(4, 4), compute

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        try:
            y = self.compute(x, mask)
        except TypeError:
            y = x - 1
        z: Tensor = self.fc(y)
        return z


@QUIET
@pytest.mark.parametrize("examples", [False, True])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "truediv", "pow", "matmul", "iadd", "imul", "lt", "ge"])
def test_arithmetic_with_none_raises_what_a_tensor_raises(name: str, examples: bool) -> None:
    function = getattr(operator, name)
    x = torch.randn(2, 4)
    for compute in (lambda x, mask: function(x + 0, mask) * 1.0, lambda x, mask: function(mask, x + 0) * 1.0):
        model = Catches(compute)
        gm = pege_fx.prepare(model, IN_FLOAT, (x,) if examples else None)
        assert torch.equal(gm(x), model(x))
