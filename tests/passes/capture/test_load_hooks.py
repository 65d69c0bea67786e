"""What a model's own modules do to a state dict before it is loaded is done for the graph too."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pege_fx
from pege_fx import ModelError

pytestmark = pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
X = torch.linspace(-1.0, 1.0, 8).view(2, 4)


class Renamed(nn.Module):
    """Its layer was called ``old`` in earlier versions."""

    def __init__(self) -> None:
        super().__init__()
        self.new = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.new(x)  # type: ignore[no-any-return]


class Overriding(Renamed):
    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        rename(state, prefix)
        super()._load_from_state_dict(state, prefix, *rest)  # type: ignore[no-untyped-call]


class Hooked(Renamed):
    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(lambda m, state, prefix, *_: rename(state, prefix))  # type: ignore[no-untyped-call]


class Asking(Overriding):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if y.sum() > 0 else -y


def rename(state: dict[str, Any], prefix: str) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}old.")]:
        state[key.replace(f"{prefix}old.", f"{prefix}new.")] = state.pop(key)


def around(inner: nn.Module, depth: int) -> nn.Module:
    for _ in range(depth):
        inner = nn.Sequential(inner, nn.Tanh())
    return inner


def old(model: nn.Module) -> dict[str, Tensor]:
    return {key.replace("new.", "old."): torch.full_like(value, 0.25) for key, value in model.state_dict().items()}


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("cls", [Overriding, Hooked, Asking])
def test_old_names_reach_the_graph_and_its_copies(cls: type[Renamed], depth: int) -> None:
    model = around(cls(), depth)
    gm = pege_fx.prepare(model, "W4A4", (X,))
    twin = copy.deepcopy(gm)
    for graph in (twin, gm):
        found = graph.load_state_dict(old(model), strict=False)
        assert not found.unexpected_keys
        assert all((graph.get_parameter(name) == 0.25).all() for name, _ in model.named_parameters())
        if graph is twin:
            assert not any((gm.get_parameter(name) == 0.25).all() for name, _ in model.named_parameters())


AFTER: list[str] = []


def before(_: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    rename(state, prefix)


def after(module: nn.Module, incompatible: Any) -> None:
    AFTER.append(type(module).__name__)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("cls", [Overriding, Renamed])
def test_pickles_load_as_the_model_did(cls: type[Renamed], depth: int) -> None:
    inner = cls()
    if cls is Renamed:
        inner.register_load_state_dict_pre_hook(before)  # type: ignore[no-untyped-call]
    inner.register_load_state_dict_post_hook(after)  # type: ignore[no-untyped-call]
    model = around(inner, depth)
    gm = pege_fx.prepare(model, "W4A4", (X,))
    once = pickle.loads(pickle.dumps(gm))
    for graph in (once, pickle.loads(pickle.dumps(once)), copy.deepcopy(once)):
        AFTER.clear()
        assert not graph.load_state_dict(old(model), strict=False).unexpected_keys
        assert all((graph.get_parameter(name) == 0.25).all() for name, _ in model.named_parameters())
        assert [cls.__name__] == AFTER


def test_a_block_of_its_own_loads_old_names() -> None:
    model = nn.Sequential(Overriding(), nn.Tanh())
    gm = pege_fx.prepare(model, "W4A4", (X,), blocks=("0",))
    assert not gm.load_state_dict(old(model), strict=False).unexpected_keys
    assert (gm.get_parameter("0.new.weight") == 0.25).all()


def test_a_wrong_size_is_said_once() -> None:
    model = nn.Sequential(Overriding())
    gm = pege_fx.prepare(model, "W4A4", (X,))
    state = old(model) | {"0.old.weight": torch.zeros(3, 3)}
    with pytest.raises(RuntimeError) as raised:
        gm.load_state_dict(state, strict=False)
    assert str(raised.value).count("size mismatch") == 1


class Versioned(nn.Module):
    """Extra state: one number that forward reads, one that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gain, self.version = nn.Linear(4, 4), 1.0, 1

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.gain  # type: ignore[no-any-return]

    def get_extra_state(self) -> dict[str, Any]:
        return {"gain": self.gain, "version": self.version}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.gain, self.version = state["gain"], state["version"]


def test_extra_state_is_taken_unless_it_changes_what_forward_does() -> None:
    model = nn.Sequential(Versioned())
    gm = pege_fx.prepare(model, "W4A4", (X,))
    model[0].version = 2
    assert not gm.load_state_dict(model.state_dict(), strict=False).unexpected_keys
    model[0].gain = 3.0
    with pytest.raises(ModelError, match=r"the extra state of 0 changes \.gain"):
        gm.load_state_dict(model.state_dict(), strict=False)


def test_a_hook_for_after_loading_runs() -> None:
    model = nn.Sequential(Renamed())
    model[0].register_load_state_dict_post_hook(lambda m, found: found.missing_keys.clear())
    gm = pege_fx.prepare(model, "W4A4", (X,))
    assert not gm.load_state_dict({}, strict=False).missing_keys
