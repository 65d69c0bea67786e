"""State: what one call leaves for the next is not lost, what it leaves behind while tracing is put back."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pege_fx
from pege_fx import Constant, PEGEScheduler, PegeWarning, QuantPolicy, Rule
from pege_fx.passes.capture.module_state import ModuleState
from pege_fx.passes.capture.tiers import capture
from pege_fx.training.scheduler import plan_of

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("offset", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        self.offset.mul_(0.5).add_(1.0)
        y: Tensor = self.fc(x) + self.offset
        return y


def test_what_is_done_to_a_buffer_is_done_by_the_graph_and_not_while_tracing() -> None:
    model = Counts()
    gm = pege_fx.prepare(model, "W4A4")
    assert int(gm.state_dict()["calls"]) == 0
    zero = Constant(0.0)
    PEGEScheduler(gm, 1, zero, zero, zero)
    for made in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm)), gm):
        reference = copy.deepcopy(model)
        for count in (1, 2):
            assert torch.equal(made(torch.ones(2, 4)), reference(torch.ones(2, 4)))
            assert int(made.state_dict()["calls"]) == count


class Running(nn.Module):
    """Assigns to a buffer what it held, moved on, after dividing by it: backward needs the old one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x) / self.scale
        self.scale = 0.5 * self.scale + x.abs().mean(0)
        return y


class RunningOnAValue(Running):
    """The same, in Python."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 1 if x.sum() > 0 else x)


class RunningInTraining(Running):
    """The same, in one mode."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x) / self.scale
        if self.training:
            self.scale = 0.5 * self.scale + x.abs().mean(0)
        return y


class Counter(nn.Module):
    """A number that counts calls."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.fc(x) * self.calls
        return y


class First(nn.Module):
    """A flag: the first call is another."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.is_first = nn.Linear(4, 4), True

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        if self.is_first:
            self.is_first = False
            y = y * 2
        return y


class Recurrent(nn.Module):
    """A state from call to call in a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.state = nn.Linear(4, 4), None

    def forward(self, x: Tensor) -> Tensor:
        self.state = x if self.state is None else x + 0.5 * self.state
        y: Tensor = self.fc(self.state)
        return y


class SetsData(nn.Module):
    """Gives a parameter other memory."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.gain = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x) * self.gain
        self.gain.data = self.gain.data * 0.5
        return y


STATES = {
    Running: "",
    RunningOnAValue: "depends on data",
    RunningInTraining: "copy_ works in place in training alone",
    Counter: "each call changes self.calls, which a graph does not hold",
    First: "each call changes self.is_first",
    Recurrent: "a call reads what the last one left in self.state",
    SetsData: "it sets .data of a tensor",
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("cls", STATES)
@pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
def test_what_a_call_leaves_for_the_next_is_not_lost(cls: type[nn.Module], nested: bool) -> None:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(cls(), nn.Linear(4, 4)) if nested else cls()
    batches = torch.randn(4, 3, 4)
    policy = pege_fx.QuantPolicy((pege_fx.Rule(weight=None, input=None),))
    gm = pege_fx.prepare(model, policy, (batches[0],))
    reasons = [note.reason for note in plan_of(gm).captures if note.rung == "python"]
    assert [STATES[cls] in reason for reason in reasons] == ([True] if STATES[cls] else [])
    for x in batches:
        outputs = model(x), gm(x)
        torch.testing.assert_close(*outputs)
        for y in outputs:
            y.sum().backward()
    state = gm.state_dict()
    torch.testing.assert_close({key: state[key] for key in model.state_dict()}, model.state_dict())


class Remembers(nn.Module):
    """Leaves a tensor on itself, and changes a list of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.last: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.last = [self.fc(x)]
        self.last.append(self.last[0] * torch.tensor([2.0, 1.0, 1.0, 1.0]))
        y: Tensor = self.last[1]
        return y


def test_what_forward_leaves_on_a_module_is_no_part_of_the_graph() -> None:
    model = Remembers()
    gm = pege_fx.prepare(nn.Sequential(model), "W4A4", (torch.ones(2, 4),))
    for made in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert torch.equal(made(torch.ones(2, 4)), gm(torch.ones(2, 4)))


class Sizes(nn.Module):
    """Notes what it saw, a cache and a log: nothing that a later call reads."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.grid, self.size, self.seen = nn.Linear(4, 4), None, 0, []

    def forward(self, x: Tensor) -> Tensor:
        self.size = x.shape[0]
        self.seen.append(x)
        if self.grid is None or self.grid.shape[0] != self.size:
            self.grid = torch.arange(x.shape[0], device=x.device)
        y: Tensor = self.fc(x) + self.grid[:, None]
        return y


def test_what_no_later_call_reads_makes_no_module_stay_python() -> None:
    gm = pege_fx.prepare(Sizes(), "W4A4", (torch.randn(3, 4),))
    assert "python" not in {note.rung for note in plan_of(gm).captures}
    copy.deepcopy(gm)


class Caches(nn.Module):
    """Keeps a constant tensor, and puts results into a list that another module holds too."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.offsets, self.results = nn.Linear(4, 4), None, []
        self.other = nn.ReLU()
        self.other.results = self.results

    def forward(self, x: Tensor) -> Tensor:
        if self.offsets is None:
            self.offsets = torch.arange(4.0)
        self.results.append(x)
        y: Tensor = self.other(self.fc(x) + self.offsets)
        return y


def test_a_constant_cache_is_none_either_and_shared_lists_stay_shared() -> None:
    model = Caches()
    gm = pege_fx.prepare(model, "W4A4", (torch.randn(3, 4),))
    assert "python" not in {note.rung for note in plan_of(gm).captures}
    assert model.results is model.other.results
    assert not model.results


class Resized(nn.Module):
    """A buffer made anew for another size, as a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("offsets", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.offsets.shape[0] != x.shape[0]:
            self.offsets = torch.arange(x.shape[0]) * 1.0
        y: Tensor = self.fc(x) + self.offsets[:, None]
        return y


def test_a_buffer_of_another_size_is_a_cache() -> None:
    model, x = Resized(), torch.randn(3, 4)
    with pytest.warns(PegeWarning, match="fixed as in the example"):
        gm = pege_fx.prepare(model, "W8A8", (x,))
    assert "python" not in {note.rung for note in plan_of(gm).captures}
    zero = Constant(0.0)
    PEGEScheduler(gm, 1, zero, zero, zero)
    torch.testing.assert_close(gm(x), model(x))


@pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
def test_what_forward_keeps_on_itself_is_not_kept_while_tracing() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.shape = nn.Linear(8, 8), None

        def forward(self, x: Tensor) -> Tensor:
            if self.shape != x.shape:
                self.shape, self.grid = x.shape, torch.zeros_like(x)
            x = self.linear(x + self.grid)
            return x if x.sum() > 0 else -x  # stays Python, and runs the code above

    model = Cached().eval()
    gm = pege_fx.prepare(model, QuantPolicy((Rule(weight=None, input=None),)), (X,)).eval()
    for x in (X, X[:2]):
        assert torch.equal(gm(x), model(x))


class InstallsHooks(nn.Module):
    """Installs hooks that collect outputs, once, and says so in an attribute, as transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.installed = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2)), False
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if not self.installed:
            for layer in self.layers:
                layer.register_forward_hook(lambda module, args, output: self.seen.append(output))
            self.installed = True
        self.seen.clear()
        for layer in self.layers:
            x = layer(x)
        return (x, *self.seen)


@pytest.mark.parametrize("examples", [None, (torch.ones(3, 4),)])
def test_hooks_that_are_installed_once_are_part_of_the_graph(examples: Any) -> None:
    gm = pege_fx.prepare(InstallsHooks(), "W4A4", examples)
    assert plan_of(gm).captures[0].rung == "symbolic"
    assert len(gm(torch.ones(3, 4))) == 3


class Watching(nn.Module):
    """Hooks its layers in the first call, as transformers' models do to collect what is hidden."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.watched = False
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.watched:
            self.watched = True
            for layer in self.layers:
                layer.register_forward_hook(lambda _, __, y: self.seen.append(y))
        self.seen = []
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x + self.seen[1] * len(self.seen)


def test_hooks_that_forward_installs_are_installed_once() -> None:
    """Found by the coverage table (SegFormer, DPT): each attempt to trace left its hooks, and every output came twice."""
    model, x = Watching(), torch.randn(2, 4)
    captured = capture(model, ((x,), {})).root
    captured.recompile()
    assert torch.equal(captured(x), model(x))


def test_what_forward_left_is_what_differs_outside_of_what_is_opaque() -> None:
    model: Any = nn.Module()
    model.a = nn.Module()
    model.a.b, model.ab, model.b = nn.Module(), nn.Module(), nn.Module()
    for module in model.modules():
        module.number, module.text, module.count = 1000.5, "a text", 1
        module.register_buffer("read", torch.ones(2))
        module.register_buffer("set", torch.ones(2))
    state = ModuleState(model, ["a"])
    for module in model.modules():
        module.number, module.text, module.count = float("1000.5"), "".join(["a ", "text"]), True
        module.set = torch.ones(2)
    state.note()
    paths = [path for path, _ in model.named_modules() if path not in ("a", "a.b")]
    assert paths == ["", "ab", "b"]
    assert state.changed == [(path, "count") for path in paths]
    assert state.kept == [(path, "set") for path in paths]
