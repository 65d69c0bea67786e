"""Whatever a call on example inputs writes in a model is put back: parameters, buffers, attributes, collections in them."""

import copy
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pege_fx
from pege_fx.modules.mode import preserve_state
from pege_fx.modules.write_watch import WriteWatch


def by_numpy(w: Tensor) -> None:
    w.detach().numpy()[:] = 0


def by_view(w: Tensor) -> None:
    w.data.t()[::2] = 7


def by_reset(w: nn.Parameter) -> None:
    w.data = torch.zeros_like(w)


WRITES: dict[str, Callable[[Any], object]] = {
    "data, in place": lambda w: w.data.clamp_(-0.01, 0.01),
    "data, set": by_reset,
    "a view": by_view,
    "an item": lambda w: w.data.__setitem__(0, 1.0),
    "an operator": lambda w: w.data.__imul__(2),
    "out": lambda w: torch.add(w.data, 1, out=w.data),
    "inplace, by name": lambda w: F.relu(w.data, inplace=True),
    "inplace, by position": lambda w: F.relu(w.data, True),
    "an initialiser": nn.init.zeros_,
    "numpy": by_numpy,
    "several at once": lambda w: torch._foreach_zero_([w.data]),
    "by a function": lambda w: w.data.apply_(lambda _: 3.0),
    "max_norm": lambda w: F.embedding(torch.tensor([0, 1]), w, None, 0.1),
    "max_norm, by name": lambda w: F.embedding(torch.tensor([0, 1]), w, max_norm=0.1),
    "max_norm of bags": lambda w: F.embedding_bag(torch.tensor([[0, 1]]), w, max_norm=0.1),
    "a layer's max_norm": lambda w: nn.Embedding.from_pretrained(w.detach(), max_norm=0.1)(torch.tensor([0, 1])),
}


@pytest.mark.parametrize("way", WRITES)
def test_a_parameter_is_put_back_however_it_was_written(way: str) -> None:
    linear = nn.Linear(4, 3)
    before, memory, where = linear.weight.detach().clone(), linear.weight.detach(), linear.weight.data_ptr()
    with preserve_state([linear]), torch.no_grad():
        WRITES[way](linear.weight)
        assert not torch.equal(linear.weight, before)
    assert torch.equal(linear.weight, before)
    assert linear.weight.data_ptr() == where
    assert torch.equal(memory, before)


def test_what_reads_alone_copies_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 4), nn.LayerNorm(4))
    x = torch.randn(2, 3, 4, 4)
    with WriteWatch(model.parameters()) as watch:
        y = model(x)
        y[0] = 0.0
        y.clone().mul_(2).relu_()
        F.embedding(torch.tensor([0]), model[3].weight)
        model[3].weight.t().reshape(-1).sum().item()
    assert watch.copies == []


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("bags", [False, True])
def test_prepare_changes_nothing_that_its_example_writes(share: bool, bags: bool) -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            kind: Any = nn.EmbeddingBag if bags else nn.Embedding
            self.table, self.fc, self.head = kind(10, 8, max_norm=0.1), nn.Linear(8, 4), nn.Linear(4, 4)
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, i: Tensor) -> Tensor:
            self.fc.weight.data.clamp_(-0.01, 0.01)
            self.scale.data.mul_(0.5)
            return self.head(F.relu(self.fc(self.table(i))) * self.scale)

    model, i = Writing(), torch.tensor([[1, 2, 3]])
    before = copy.deepcopy(model.state_dict())
    gm = pege_fx.prepare(model, "W4A4", (i,), share_parameters=share)
    for state in (model.state_dict(), gm.state_dict()):
        assert all(torch.equal(state[name], value) for name, value in before.items())


class Holding(nn.Module):
    """Keeps what it has seen, in collections of every kind and depth."""

    def __init__(self) -> None:
        super().__init__()
        self.nested: dict[str, Any] = {"a": [1, [2]], "b": {"c": {1}}}
        self.recent: deque[int] = deque([1], maxlen=3)
        self.counts: Counter[str] = Counter("ab")
        self.groups: defaultdict[str, list[int]] = defaultdict(list, {"x": [1]})
        self.seen = {1}
        self.plain, self.listed = torch.zeros(2), [torch.zeros(2)]

    def change(self) -> None:
        self.nested["a"][1].append(3)
        self.nested["b"]["c"].add(2)
        self.nested["a"].pop(0)
        self.recent.extend([2, 3, 4])
        self.counts["a"] += 1
        self.groups["x"].append(2)
        self.groups["y"].append(2)
        self.seen.clear()
        self.plain += 1
        self.listed[0].add_(1)
        self.listed.append(torch.ones(1))


def test_collections_and_tensors_that_are_attributes_are_put_back_and_stay_the_same_ones() -> None:
    module = Holding()
    inner, recent = module.nested["a"][1], module.recent
    with preserve_state([module]):
        module.change()
    assert module.nested == {"a": [1, [2]], "b": {"c": {1}}}
    assert module.nested["a"][1] is inner
    assert module.recent is recent
    assert (recent, recent.maxlen) == (deque([1]), 3)
    assert module.counts == Counter("ab")
    assert module.groups == {"x": [1]}
    assert module.seen == {1}
    assert torch.equal(module.plain, torch.zeros(2))
    assert len(module.listed) == 1
    assert torch.equal(module.listed[0], torch.zeros(2))


def test_what_holds_itself_ends() -> None:
    module: Any = nn.Module()
    module.own = []
    module.own.append(module.own)
    with preserve_state([module]):
        module.own.append(1)
    assert len(module.own) == 1
