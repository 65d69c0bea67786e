"""Assigning an attribute that a graph holds as a constant is refused; whatever else is assigned to a graph stays assignable."""

import copy
import pickle
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import pege_fx
from pege_fx import ModelError, QuantPolicy, Rule

pytestmark = pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
FLOAT = QuantPolicy((Rule(weight=None, input=None),))


class Block(nn.Module):
    gain = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.scale_factor, self.epoch, self._hidden = 1.5, 0, 2.0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x)) * self.scale_factor * self.gain
        return F.interpolate(y, scale_factor=getattr(self, "_hidden", 1.0))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.block, self.fc = nn.Conv2d(3, 3, 3, stride=2), Block(), nn.Linear(3, 2)
        self.drop = nn.Dropout(0.1)
        self.flag, self.name = True, "a"
        self.register_buffer("shift", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.drop(self.conv(x)))
        x = x + self.shift if self.flag else x
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


class InPython(Model):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.mean() > 1e6 else super().forward(x)


def image() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def kinds(gm: Any) -> list[Any]:
    gm.eval()
    return [gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm)), pege_fx.convert(gm)]


READ = {
    "flag": False,
    "block.scale_factor": 2.0,
    "block._hidden": 3.0,
    "block.gain": 2.0,
    "conv.stride": (1, 1),
    "conv.padding": 2,
    "fc.in_features": 7,
    "block.conv.padding": (0, 0),
}


@pytest.mark.parametrize("cls", [Model, InPython])
@pytest.mark.parametrize("policy", ["W4A4", FLOAT])
def test_what_forward_has_read_is_changed_or_refused(cls: type[nn.Module], policy: Any) -> None:
    """In evaluation in float: a layer that the graph still calls follows its attributes, as the model does."""
    gm = pege_fx.prepare(cls(), policy, (image(),))
    for made in kinds(gm):
        for path, value in READ.items():
            owner, _, name = path.rpartition(".")
            module = made.get_submodule(owner)
            try:
                setattr(module, name, value)
            except ModelError:
                continue
            assert policy is FLOAT
            assert isinstance(module, (nn.Conv2d, nn.Linear))


@pytest.mark.parametrize("path", READ)
@pytest.mark.parametrize("cls", [Model, InPython])
def test_it_is_refused_in_a_quantized_graph(cls: type[nn.Module], path: str) -> None:
    for made in kinds(pege_fx.prepare(cls(), "W4A4", (image(),))):
        owner, _, name = path.rpartition(".")
        with pytest.raises(
            ModelError, match=rf"^{re.escape(path)} is fixed in the graph as .*\n  set it on the model before prepare"
        ):
            setattr(made.get_submodule(owner), name, READ[path])


def test_the_same_value_may_be_assigned() -> None:
    gm = pege_fx.prepare(Model(), "W4A4", (image(),))
    gm.get_submodule("block").scale_factor = 1.5  # type: ignore[assignment]
    gm.flag = True  # type: ignore[assignment]


def test_everything_else_stays_assignable() -> None:
    gm = pege_fx.prepare(Model(), "W4A4", (image(),))
    block, conv, drop = (gm.get_submodule(path) for path in ("block", "conv", "drop"))
    block.epoch = gm.name = gm.step = 3  # type: ignore[assignment]
    gm.training = block.training = False
    conv.weight = nn.Parameter(torch.zeros(3, 3, 3, 3))
    gm.shift = torch.ones(1)
    drop.p = 0.0  # type: ignore[assignment]
    conv.register_parameter("other", nn.Parameter(torch.zeros(1)))
    conv.register_buffer("more", torch.zeros(1))
    gm.head = nn.Linear(3, 2)
    handle = block.register_forward_hook(lambda module, args, result: result)
    handle.remove()
    prune.random_unstructured(gm.get_submodule("block.conv"), "bias", 0.5)
    gm.accepts_loss_kwargs = True  # type: ignore[assignment]
    assert gm(image()).shape == (2, 2)
    assert drop.training is True


def test_modules_stay_what_they_are() -> None:
    gm = pege_fx.prepare(Model(), "W4A4", (image(),))
    conv = gm.get_submodule("conv")
    assert isinstance(conv, nn.Conv2d)
    assert repr(conv).startswith("Conv2d(\n  3, 3, kernel_size=(3, 3), stride=(2, 2)")
    assert type(copy.deepcopy(conv)) is nn.Conv2d
    assert type(pickle.loads(pickle.dumps(conv))) is nn.Conv2d
    assert copy.deepcopy(conv).stride == (2, 2)
    copy.deepcopy(conv).stride = (1, 1)


def test_the_model_itself_is_not_touched() -> None:
    model = Model()
    pege_fx.prepare(model, "W4A4", (image(),), share_parameters=True)
    model.flag, model.block.scale_factor, model.conv.stride = False, 3.0, (1, 1)
    assert type(model.conv) is nn.Conv2d


def test_a_copy_and_a_pickle_say_whether_they_take_a_trainers_arguments() -> None:
    gm = pege_fx.prepare(Model(), "W4A4", (image(),))
    for made in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm)), copy.deepcopy(copy.deepcopy(gm))):
        assert made.accepts_loss_kwargs is False
