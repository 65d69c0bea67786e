"""States of a model from before its BatchNorms were merged (``batch_norm="freeze"``), loaded after."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import pege_fx
from pege_fx import CheckpointError, QuantPolicy, Rule


class ByFunction(nn.Module):
    """BatchNorm as a function, on tensors of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.gamma, self.beta = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.register_buffer("mean", torch.randn(8))
        self.register_buffer("var", torch.rand(8) + 0.2)
        self.mean: Tensor
        self.var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.var, self.gamma, self.beta, False)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "no bias": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)),
    "bias": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=0.1), nn.ReLU()),
    "no gamma": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False)),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d(8)),
    "in front": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, bias=False)),
    "on both sides": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), nn.ReLU()),
    "by function": ByFunction,
}
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 4)
            if module.affine:
                nn.init.uniform_(module.weight, 0.3, 3)
                nn.init.normal_(module.bias)
    return model.eval()


def frozen(name: str, seed: int, **options: Any) -> GraphModule:
    policy = QuantPolicy((Rule(weight="8", input="8"),))
    return pege_fx.prepare(network(name, seed), policy, (X,), batch_norm="freeze", **options).eval()


def same_weights(gm: nn.Module, other: nn.Module) -> bool:
    mine, others = gm.state_dict(), other.state_dict()
    return all(torch.allclose(mine[k], others[k], atol=1e-6) for k in mine if "_fq" not in k)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("again", [lambda gm: gm, copy.deepcopy])
def test_a_state_of_the_model_before_is_merged_as_prepare_merges(name: str, again: Callable[[Any], Any]) -> None:
    gm, trained = again(frozen(name, 0)), network(name, 1)
    wrapped = nn.Sequential(gm)
    missing = wrapped.load_state_dict({f"0.{key}": value for key, value in trained.state_dict().items()}, strict=False)
    assert not missing.unexpected_keys
    assert all("_fq." in key for key in missing.missing_keys)
    assert same_weights(gm, frozen(name, 1))
    with torch.no_grad():
        assert (gm(X) - trained(X)).norm() / trained(X).norm() < 0.1


@pytest.mark.parametrize("name", NETWORKS)
def test_a_state_of_the_merged_model_is_as_it_is(name: str) -> None:
    gm, other = frozen(name, 0), frozen(name, 1)
    gm.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(gm(X), other(X))


def test_the_callers_state_is_left_alone() -> None:
    trained = network("no bias", 1)
    state = trained.state_dict()
    kept = {key: value.clone() for key, value in state.items()}
    frozen("no bias", 0).load_state_dict(state, strict=False)
    assert state.keys() == kept.keys()
    assert all(torch.equal(state[key], value) for key, value in kept.items())


@pytest.mark.parametrize("gone", ["0.weight", "1.running_var", "1.bias"])
def test_a_part_of_what_was_merged_is_refused(gone: str) -> None:
    gm, state = frozen("no bias", 0), dict(network("no bias", 1).state_dict())
    del state[gone]
    before = {key: value.clone() for key, value in gm.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"BatchNorm 1, which is merged here, and no {gone}"):
        gm.load_state_dict(state, strict=False)
    assert all(torch.equal(value, before[key]) for key, value in gm.state_dict().items())


def test_another_size_is_refused() -> None:
    state = dict(network("no bias", 1).state_dict())
    for key in ("1.running_mean", "1.running_var", "1.weight", "1.bias"):
        state[key] = state[key][:5]
    with pytest.raises(CheckpointError, match="another BatchNorm 1"):
        frozen("no bias", 0).load_state_dict(state, strict=False)


def test_weights_that_do_not_train_stay_so() -> None:
    model = network("bias", 0)
    model[0].weight.requires_grad_(False)  # type: ignore[index]
    gm = pege_fx.prepare(model, "W4A4", (X,), batch_norm="freeze")
    assert not gm.get_parameter("0.weight").requires_grad
    assert not gm.get_parameter("0.bias").requires_grad
    assert all(p.requires_grad for p in frozen("bias", 0).parameters())


def test_a_pickled_model_merges_too() -> None:
    gm, trained = pickle.loads(pickle.dumps(frozen("no bias", 0))), network("no bias", 1)
    gm.load_state_dict(trained.state_dict(), strict=False)
    expected = frozen("no bias", 1)
    for name in ("0.weight", "0.bias"):
        assert torch.equal(gm.get_parameter(name), expected.get_parameter(name))


def test_a_model_which_knows_its_hooks_no_longer_refuses() -> None:
    """As one that was pickled by earlier versions."""
    gm, trained = frozen("no bias", 0), network("no bias", 1)
    vars(gm)["_load_state_dict_pre_hooks"].clear()
    for model, prefix in ((gm, ""), (nn.Sequential(gm), "0.")):
        with pytest.raises(CheckpointError, match="of a BatchNorm that is merged here"):
            model.load_state_dict({f"{prefix}{key}": value for key, value in trained.state_dict().items()}, strict=False)
    gm.load_state_dict(frozen("no bias", 1).state_dict())


def test_a_converted_model_has_no_float_weights_to_merge_into() -> None:
    deployed = pege_fx.convert(frozen("no bias", 0))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        deployed.load_state_dict(network("no bias", 1).state_dict())
