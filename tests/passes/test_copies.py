"""Copies: the model that came in and the one that is prepared share nothing but what they may."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pege_fx
from pege_fx import ModelError
from pege_fx.passes.copies import copied


def test_a_model_that_can_not_be_copied_is_refused_with_the_fix() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.utils.weight_norm(nn.Conv2d(3, 4, 3))
    with pytest.raises(ModelError, match=r"can not be copied[\s\S]*parametrizations.weight_norm"):
        pege_fx.prepare(model, "W4A4")


class KnowsItsParent(nn.Module):
    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.parent = (parent,)  # in a tuple, so that it is no child

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.parent[0].training)


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.child = nn.Linear(4, 4), KnowsItsParent(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.child(self.linear(x))
        return out


def test_a_child_that_knows_its_parent_knows_the_copy_of_it() -> None:
    gm = pege_fx.prepare(Parent(), "W4A4", (torch.ones(3, 4),))
    dropped = gm.train()(torch.ones(50, 4)) == 0
    assert dropped.any()
    assert not (gm.eval()(torch.ones(50, 4)) == 0).any()


@pytest.mark.parametrize("share_parameters", [False, True])
def test_parameters_and_buffers_are_copies_unless_they_are_shared(share_parameters: bool) -> None:
    model = nn.Sequential(nn.Linear(1024, 1024), nn.BatchNorm1d(1024))
    model[0].bias.requires_grad_(False)
    made = copied(model, share_parameters)
    assert [name for name, _ in made.named_modules()] == [name for name, _ in model.named_modules()]
    assert not set(made.modules()) & set(model.modules())
    mine, theirs = (part.state_dict(keep_vars=True) for part in (made, model))
    assert list(mine) == list(theirs)
    for value, original in zip(mine.values(), theirs.values(), strict=True):
        assert (value is original) == share_parameters
        assert torch.equal(value, original)
        assert (type(value), value.requires_grad) == (type(original), original.requires_grad)
        assert (value.data_ptr() == original.data_ptr()) == share_parameters


def test_collections_are_copies_and_one_of_two_modules_stays_one() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.table, model.names, model.sizes = {"one": {"two": 2}}, {"a"}, (1, [2])
    model[0].names = model.names
    made: Any = copied(model, share_parameters=False)
    made.table["one"]["two"] = 3
    made.names.add("b")
    made.sizes[1].append(3)
    assert made[0].names is made.names
    assert (model.table, model.names, model.sizes) == ({"one": {"two": 2}}, {"a"}, (1, [2]))
    assert (made.table, made.names, made.sizes) == ({"one": {"two": 3}}, {"a", "b"}, (1, [2, 3]))
