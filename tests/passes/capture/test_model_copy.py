"""Copies: the model that came in and the one that is prepared share nothing but what they may."""

import copyreg
import threading
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pege_fx
from pege_fx import ModelError
from pege_fx.passes.capture.model_copy import copied


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
    model = nn.Sequential(nn.Linear(1024, 1024), nn.BatchNorm1d(1024), nn.Linear(1024, 1024), nn.Linear(1024, 1024).double())
    model[0].bias.requires_grad_(False)
    model[2].weight = nn.Parameter(model[2].weight.detach().t())
    model.register_buffer("learned", torch.ones(3, requires_grad=True))
    made = copied(model, share_parameters)
    assert [name for name, _ in made.named_modules()] == [name for name, _ in model.named_modules()]
    assert not set(made.modules()) & set(model.modules())
    mine, theirs = (part.state_dict(keep_vars=True) for part in (made, model))
    assert list(mine) == list(theirs)
    for value, original in zip(mine.values(), theirs.values(), strict=True):
        assert (value is original) == share_parameters
        assert torch.equal(value, original)
        for same in ("dtype", "requires_grad", "is_leaf"):
            assert getattr(value, same) == getattr(original, same)
        assert (type(value), value.stride()) == (type(original), original.stride())
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


class Config:
    """What no rule says how to copy."""

    def __init__(self) -> None:
        self.widths = [4]


def test_an_object_is_a_copy_and_that_of_two_modules_stays_one() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.config = model[0].config = Config()
    model.register_buffer("noted", torch.ones(2))
    model.noted.config = model.config
    made: Any = copied(model, share_parameters=False)
    made.config.widths.append(5)
    assert made[0].config is made.config
    assert made.noted.config is made.config
    assert model.config.widths == [4]


class DeepCopies(nn.ReLU):
    def __deepcopy__(self, memo: dict[int, Any]) -> "DeepCopies":
        made = DeepCopies()
        made.how = "deepcopy"  # type: ignore[assignment]
        return made


class Locks(nn.ReLU):
    """What it holds has no copy."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"} | {"how": "getstate"}


class Registered(nn.ReLU):
    pass


def _registered(how: str) -> Registered:
    made = Registered()
    made.how = how  # type: ignore[assignment]
    return made


def test_a_module_that_says_how_it_is_copied_is_copied_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(copyreg.dispatch_table, Registered, lambda module: (_registered, ("copyreg",)))
    made: Any = copied(nn.Sequential(DeepCopies(), Locks(), Registered()), share_parameters=False)
    assert [module.how for module in made] == ["deepcopy", "getstate", "copyreg"]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("examples", [False, True])
def test_hooks_on_parameters_are_kept(shared: bool, examples: bool) -> None:
    seen: list[str] = []
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].weight.register_hook(lambda gradient: gradient * 3)
    model[2].weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(str(tuple(parameter.shape))))
    x = torch.randn(3, 4)
    policy = pege_fx.QuantPolicy((pege_fx.Rule(weight=None, input=None),))
    with pytest.warns(pege_fx.PegeWarning, match="nothing is quantized"):
        gm = pege_fx.prepare(model, policy, (x,) if examples else None, share_parameters=shared)
    gm(x).sum().backward()
    assert seen == ["(2, 4)"]
    found = gm.get_parameter("0.weight").grad
    model.zero_grad()
    model(x).sum().backward()
    assert found is not None
    assert shared or torch.equal(found, model[0].weight.grad)
    assert seen == ["(2, 4)"] * 2
