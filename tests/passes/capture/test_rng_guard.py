"""Random numbers: drawn anew in each call, by the graph or by Python, and never constants."""

import random
from random import uniform
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import pege_fx
from pege_fx import QuantPolicy, Rule
from pege_fx.training.scheduler import plan_of

DRAWS = {
    "torch": lambda x: x + torch.randn(4),
    "torch, in place": lambda x: x + torch.empty(4).uniform_(),
    "torch, as a number": lambda x: x * torch.rand(1).item(),
    "torch, deciding": lambda x: x if torch.rand(1) < 0.5 else -x,
    "Python": lambda x: x * random.random(),
    "Python, by name": lambda x: x * uniform(0, 1),
    "NumPy": lambda x: x * float(numpy.random.rand()),
}


class Draws(nn.Module):
    def __init__(self, draw: Any) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Any:
        return self.draw(x)


@pytest.mark.parametrize("examples", [None, (torch.ones(3, 4),)])
@pytest.mark.parametrize("how", DRAWS)
@pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
def test_random_numbers_are_drawn_in_each_call(how: str, examples: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Draws(DRAWS[how]), nn.Linear(4, 4))
    gm = pege_fx.prepare(model, "W4A4", examples)
    results = {tuple(gm(torch.ones(3, 4)).flatten().tolist()) for _ in range(20)}
    assert len(results) > 1
    assert [note.path for note in plan_of(gm).captures if note.rung in ("leaf", "python")] == ["1"] * (
        how not in ("torch", "torch, as a number")
    )


FOLLOWED = {
    "a constant": lambda x: x + torch.ones(4).cumsum(0),
    "drawn with the graph's probabilities": lambda x: x * torch.bernoulli(x.sigmoid()),
    "drawn into what the graph made": lambda x: x + torch.empty_like(x).uniform_(),
}


@pytest.mark.parametrize("how", FOLLOWED)
def test_what_makes_constants_or_draws_in_the_graph_is_followed(how: str) -> None:
    gm = pege_fx.prepare(nn.Sequential(nn.Linear(4, 4), Draws(FOLLOWED[how])), "W4A4", (torch.ones(3, 4),))
    assert {note.rung for note in plan_of(gm).captures} == {"symbolic"}


class LayerDrop(nn.Module):
    """Drops layers with a probability, as many transformers do, which is 0 as a rule."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.layers, self.probability = nn.ModuleList(nn.Linear(4, 4) for _ in range(2)), probability

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.training and torch.rand([]) < self.probability:
                continue
            x = layer(x)
        return x


@pytest.mark.parametrize(("probability", "rung"), [(0.0, "symbolic"), (-1.0, "symbolic"), (0.5, "python")])
@pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
def test_layers_dropped_with_probability_0_are_no_question(probability: float, rung: str) -> None:
    model, x = LayerDrop(probability), torch.randn(3, 4)
    gm = pege_fx.prepare(model, QuantPolicy((Rule(weight=None, input=None),)), (x,))
    assert plan_of(gm).captures[0].rung == rung
    for made in (gm, model):
        torch.manual_seed(0)
        dropped = sum(torch.equal(made(x), x) for _ in range(20))
        assert (dropped > 0) == (probability > 0)
    torch.testing.assert_close(gm.eval()(x), model.eval()(x))
