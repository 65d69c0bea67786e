"""In evaluation a weight is quantized once, until it or its grid changes, in whatever way."""

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import pege_fx
from pege_fx import FakeQuant, QuantPolicy, QuantSpec, Rule

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _plain_operations() -> Iterator[None]:
    with pege_fx.kernels.eager_kernels():
        yield


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sites whose deployed values were computed."""
    seen: list[str] = []
    original = FakeQuant.deployed

    def deployed(self: FakeQuant, x: torch.Tensor) -> torch.Tensor:
        if self.site.kind == "weight":
            seen.append(self.site.name)
        return original(self, x)

    monkeypatch.setattr(FakeQuant, "deployed", deployed)
    return seen


def prepared(method: str = "lsq", granularity: Any = "channel") -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    policy = QuantPolicy((Rule(weight=QuantSpec(bits=3, method=method, granularity=granularity), input="3"),))
    return pege_fx.prepare(net, policy, (X,)).eval()


def fresh(gm: Any) -> torch.Tensor:
    """What a copy computes, which knows nothing yet."""
    with torch.no_grad():
        result: torch.Tensor = copy.deepcopy(gm)(X)
    return result


@torch.no_grad()
def test_nothing_is_quantized_again(counted: list[str]) -> None:
    gm = prepared()
    first = gm(X)
    assert sorted(counted) == ["0.weight_fq", "3.weight_fq"]
    for _ in range(3):
        assert torch.equal(gm(X), first)
    with torch.inference_mode():
        assert torch.equal(gm(X), first)
    assert len(counted) == 2


def optimizer_step(gm: Any) -> None:
    with torch.enable_grad():
        gm(X).square().sum().backward()
    torch.optim.SGD(gm.parameters(), lr=0.1).step()


def average(gm: Any) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(copy.deepcopy(gm))
    averaged.update_parameters(copy.deepcopy(gm))
    gm.load_state_dict({name: 1.1 * value if value.is_floating_point() else value for name, value in gm.state_dict().items()})


def assign(gm: Any) -> None:
    gm.get_submodule("0").weight = nn.Parameter(torch.randn(4, 3, 3, 3))


def swap_data(gm: Any) -> None:
    for _ in range(3):  # whatever addresses the allocator hands out again
        gm.get_parameter("0.weight").data = gm.get_parameter("0.weight").data * 1.3
        with torch.no_grad():
            gm(X)


def write_data_between_modes(gm: Any) -> None:
    gm.get_parameter("0.weight").data.mul_(1.3)
    gm.eval()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda gm: gm.get_parameter("0.weight").detach().mul_(1.3),
    "the scale": lambda gm: gm.get_parameter("0.weight_fq.method.scale").detach().mul_(1.3),
    "the BatchNorm": lambda gm: gm.get_parameter("1.weight").detach().mul_(1.3),
    "its statistics": lambda gm: gm.get_buffer("1.running_var").mul_(1.3),
    "an optimizer": optimizer_step,
    "a state": average,
    "another parameter": assign,
    "other memory": swap_data,
    "through data, and eval()": write_data_between_modes,
    "another dtype and back": lambda gm: gm.half().float(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change: str) -> None:
    gm = prepared()
    with torch.no_grad():
        before = gm(X)
    CHANGES[change](gm)
    with torch.no_grad():
        after = gm(X)
    assert torch.equal(after, fresh(gm))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("method", ["lsq", "pact", "dorefa", "interval", "minmax"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@torch.no_grad()
def test_other_weights_for_one_call(method: str, granularity: str) -> None:
    gm = prepared(method, granularity)
    first, name = gm(X), "0.weight"
    others = [gm.get_parameter(name) * factor for factor in (0.7, 1.2, 1.9)]
    found = [torch.func.functional_call(gm, {name: other.clone()}, (X,)) for other in others]
    assert torch.equal(gm(X), first)
    for other, result in zip(others, found, strict=True):
        gm.get_parameter(name).copy_(other)
        assert torch.equal(fresh(gm), result)


@torch.no_grad()
def test_it_is_in_no_copy_file_or_state() -> None:
    gm = prepared()
    keys, size = set(gm.state_dict()), len(pickle.dumps(gm))
    first = gm(X)
    assert set(gm.state_dict()) == keys
    assert abs(len(pickle.dumps(gm)) - size) < 100
    for other in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert torch.equal(other(X), first)


def test_training_between_evaluations(counted: list[str]) -> None:
    gm = prepared()
    with torch.no_grad():
        gm(X)
    gm.train()
    gm(X).sum().backward()
    gm.eval()
    with torch.no_grad():
        assert torch.equal(gm(X), fresh(gm))


@torch.no_grad()
def test_threads_share_it() -> None:
    gm = prepared()
    found: list[torch.Tensor] = []

    def work() -> None:
        with torch.no_grad():
            found.extend(gm(X) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    assert all(torch.equal(value, found[0]) for value in found)


@torch.no_grad()
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_everything_that_the_fold_reads_is_followed(granularity: str) -> None:
    gm = prepared(granularity=granularity)
    bn = gm.get_submodule("1")
    changes: list[Callable[[], object]] = [
        lambda: setattr(bn, "eps", 0.5),
        lambda: bn.weight.mul_(-2),
        lambda: setattr(bn, "weight", nn.Parameter(torch.full((4,), 0.3))),
        lambda: setattr(bn, "running_var", torch.full((4,), 3.0)),
        lambda: bn.running_mean.add_(1),
        lambda: bn.bias.add_(1),
    ]
    for change in changes:
        gm(X)
        change()
        kept = gm(X)
        assert torch.equal(kept, fresh(gm))
        assert torch.equal(kept, pege_fx.convert(gm)(X))


class Tempered(pege_fx.ForwardMethod, name="tempered-example"):
    """A step that depends on plain attributes of its own."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.temperature: Any = 1.0

    def initialize(self, statistics: Any) -> None:
        pass

    def qparams(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        value = self.temperature[0] if isinstance(self.temperature, list) else self.temperature
        return torch.tensor(0.1 * value), None


@torch.no_grad()
def test_plain_attributes_of_a_method_are_followed(counted: list[str]) -> None:
    gm = prepared("tempered-example")
    method = gm.get_submodule("0.weight_fq").method
    outputs = [gm(X)]
    for value in (2.0, [3.0]):
        method.temperature = value
        outputs.append(gm(X))
    method.temperature[0] = 4.0
    outputs.append(gm(X))
    assert len({float(y.sum()) for y in outputs}) == 4
    assert torch.equal(outputs[-1], fresh(gm))
