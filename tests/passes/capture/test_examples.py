"""Example calls are used on copies: neither the caller's nor the next attempt's objects hold what a call left."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pege_fx
from pege_fx.passes.capture.examples import fresh
from pege_fx.training.scheduler import plan_of

pytestmark = pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
FLOAT = pege_fx.QuantPolicy((pege_fx.Rule(weight=None, input=None),))


def test_a_copy_shares_nothing_and_keeps_what_is_one_object() -> None:
    x = torch.ones(2)
    given: Any = ([x, x], {"again": x, "made": (x.clone().requires_grad_() * 2), "lock": "text"})
    copied = fresh(given)
    assert copied[0][0] is copied[0][1] is copied[1]["again"] is not x
    assert torch.equal(copied[1]["made"], given[1]["made"])
    assert copied[1]["made"].requires_grad
    assert fresh(given, tensors=False)[0] is not given[0]
    assert fresh(given, tensors=False)[0][0] is x


def test_what_can_not_be_copied_stays_itself_beside_copies() -> None:
    lock, numbers = threading.Lock(), [torch.zeros(1)]
    copied = fresh((lock, numbers))
    assert copied[0] is lock
    assert copied[1][0] is not numbers[0]


def test_an_object_that_holds_what_autograd_made_is_copied() -> None:
    memory = Memory()
    memory.add(torch.ones(2, requires_grad=True) * 2)
    copied = fresh([memory])[0]
    assert copied is not memory
    assert copied.seen[0] is not memory.seen[0]
    assert torch.equal(copied.seen[0], memory.seen[0])
    assert fresh([memory], tensors=False)[0].seen is not memory.seen


class Memory:
    """Keeps what it was given, and sums it up."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def add(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return torch.stack(self.seen).sum(0)


class Writes(nn.Module):
    """Writes into everything that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, parts: list[Tensor], named: dict[str, Tensor], memory: Memory) -> Tensor:
        x += 1
        parts[0] = self.fc(parts[0])
        named["b"] = parts[0] + named["a"]
        y: Tensor = memory.add(x + parts[0] + named["b"])
        return y


def call() -> tuple[Any, ...]:
    return torch.ones(2, 4), [torch.ones(2, 4)], {"a": torch.ones(2, 4)}, Memory()


def test_prepare_leaves_the_example_as_it_was_and_the_graph_writes_as_the_model_does() -> None:
    model, example = Writes(), call()
    gm = pege_fx.prepare(model, FLOAT, example)
    fed, wanted = call(), call()
    assert torch.equal(example[0], fed[0])
    assert torch.equal(example[1][0], fed[1][0])
    assert list(example[2]) == ["a"]
    assert not example[3].seen
    for _ in range(2):
        torch.testing.assert_close(gm(*fed), model(*wanted))
        torch.testing.assert_close(fed[:3], wanted[:3])
        assert len(fed[3].seen) == len(wanted[3].seen)


class Keys:
    """A cache that grows with each call."""

    held: Tensor | None = None

    def update(self, x: Tensor) -> Tensor:
        self.held = x if self.held is None else torch.cat([self.held, x], 1)
        return self.held


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, cache: Keys, mask: Tensor) -> Tensor:
        _first, *_ = x.shape  # only an example tells how many there are
        keys = cache.update(self.fc(x))
        return torch.dropout((x @ keys.transpose(1, 2) + mask).softmax(-1), 0.1 if self.training else 0.0, True) @ keys


class Decoding(nn.Module):
    """Returns an object, and so stays Python."""

    def __init__(self) -> None:
        super().__init__()
        self.attending = Attending()

    def forward(self, x: Tensor) -> dict[str, Any]:
        cache = Keys()
        return {"y": self.attending(x, cache, torch.zeros(x.shape[1], x.shape[1])), "cache": cache}


def test_each_attempt_to_trace_finds_an_empty_cache() -> None:
    gm = pege_fx.prepare(Decoding(), "W4A4", (torch.randn(2, 3, 4),))
    assert [note.path for note in plan_of(gm).captures if note.rung == "python"] == [""]
