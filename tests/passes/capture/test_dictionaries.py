"""A dictionary of the caller that ``forward`` fills, and then asks: each call sees its own, as the model's does."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pege_fx
from pege_fx import PegeError, QuantPolicy, Rule

pytestmark = pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
FLOAT = QuantPolicy((Rule(weight=None, input=None),))


def appends(h: Tensor, cache: dict[str, Any]) -> Tensor:
    cache.setdefault("seen", []).append(h)
    return h


def appends_and_counts(h: Tensor, cache: dict[str, Any]) -> Tensor:
    cache.setdefault("seen", []).append(h)
    return h + len(cache)


def writes_and_counts(h: Tensor, cache: dict[str, Any]) -> Tensor:
    cache["h"] = h
    return h + len(cache)


def counts_before_and_after(h: Tensor, cache: dict[str, Any]) -> Tensor:
    before = len(cache)
    cache["h"] = h
    return h + before * 10 + len(cache)


def writes_and_walks(h: Tensor, cache: dict[str, Any]) -> Tensor:
    cache["h"] = h
    for value in list(cache.values()):
        h = h + value if isinstance(value, Tensor) else h
    return h


def writes_a_list(h: Tensor, cache: dict[str, Any]) -> Tensor:
    cache["both"] = [h, h * 2]
    return cache["both"][1] + cache["both"][0]


def fills_a_dictionary_inside(h: Tensor, cache: dict[str, Any]) -> Tensor:
    inner: dict[str, Tensor] = {}
    cache["inner"] = inner
    inner["h"] = h
    return h


def writes_and_asks_whether(h: Tensor, cache: dict[str, Any]) -> Tensor:
    if "h" not in cache:
        cache["h"] = h
    return h + 1 if cache else h


USES: tuple[Callable[[Tensor, dict[str, Any]], Tensor], ...] = (
    appends,
    appends_and_counts,
    writes_and_counts,
    counts_before_and_after,
    writes_and_walks,
    writes_a_list,
    fills_a_dictionary_inside,
    writes_and_asks_whether,
)


class Fills(nn.Module):
    def __init__(self, use: Callable[[Tensor, dict[str, Any]], Tensor]) -> None:
        super().__init__()
        self.fc, self.use = nn.Linear(4, 4), use

    def forward(self, x: Tensor, cache: dict[str, Any]) -> Tensor:
        y: Tensor = self.fc(self.use(x, cache))
        return y


@pytest.mark.parametrize("use", USES)
def test_every_call_fills_and_sees_its_own(use: Callable[[Tensor, dict[str, Any]], Tensor]) -> None:
    model, x = Fills(use), torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    gm = pege_fx.prepare(model, FLOAT, (x, {}))
    for given in ({}, {}, {"other": torch.ones(4)}, {"h": torch.ones(2, 4)}):
        expected, found = copy.deepcopy(given), copy.deepcopy(given)
        want = model(x, expected)
        try:
            got = gm(x, found)
        except PegeError:
            assert given  # not for the call that it was made from
            continue
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
