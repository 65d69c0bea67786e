"""Objects that are no tensors in calls, as caches: what is done to them is done, and another class is another call."""

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pege_fx
from pege_fx.errors import OtherCallError

pytestmark = pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")


class Cache:
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        self.seen.append(x)


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        y = self.layer(x)
        if cache is not None:
            cache.update(y)
        return y


class Caching(nn.Module):
    """Has a cache in evaluation alone, and returns it, in a result by name, to code that no graph holds."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.mixer, self.head, self.always = Mixer(), nn.Linear(4, 2), always

    def forward(self, x: Tensor) -> Any:
        cache = Cache() if self.always or not self.training else None
        y = self.mixer(x, cache)
        if y.isnan().any():  # stays Python
            raise ValueError
        return OrderedDict(logits=self.head(y), cache=cache.seen if cache else [])


@pytest.mark.parametrize("always", [True, False])
def test_a_cache_is_filled_by_graphs_inside(always: bool) -> None:
    model, x = Caching(always), torch.randn(3, 4)
    gm = pege_fx.prepare(model, pege_fx.QuantPolicy(()), x)
    for mode in (True, False):
        expected, found = model.train(mode)(x), gm.train(mode)(x)
        torch.testing.assert_close(found["logits"], expected["logits"])
        torch.testing.assert_close(found["cache"], expected["cache"])


@pytest.mark.parametrize("always", [True, False])
def test_what_python_reads_below_a_graph_is_deployed(always: bool) -> None:
    gm = pege_fx.prepare(Caching(always), "W4A4", torch.randn(3, 4))
    pege_fx.calibrate(gm, [torch.randn(3, 4)])
    x = torch.randn(3, 4)
    pege_fx.PEGEScheduler(gm, 1, replacement=pege_fx.Constant(1.0))
    assert torch.equal(pege_fx.convert(gm)(x)["logits"], gm.eval()(x)["logits"])


def test_another_class_is_another_call() -> None:
    x = torch.randn(3, 4)
    gm = pege_fx.prepare(Mixer(), "W4A4", (x, Cache()))
    cache = Cache()
    gm(x, cache)
    assert len(cache.seen) == 1
    with pytest.raises(OtherCallError, match="cache was a Cache when the model was traced, and is None now"):
        copy.deepcopy(gm)(x, None)
