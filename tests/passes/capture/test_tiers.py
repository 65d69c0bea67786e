"""Capture: three rungs, each recorded with its place, and the same function on each of them."""

import copy
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import pege_fx
from pege_fx import Constant, ModelError, OtherCallError, PEGEScheduler, PegeWarning
from pege_fx.modules.mode import select_by_mode
from pege_fx.policy.plan import Capture
from pege_fx.testing import assert_same_function
from pege_fx.training.scheduler import plan_of


class Branching(nn.Module):
    """Decides on values: only Python can run it. Its parts: a convolution, a Sequential, a list."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.seq = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.list = nn.ModuleList([nn.Conv2d(4, 4, 1) for _ in range(2)])
        self.gain = 1.5

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        if y.mean() > 0:
            y = y * self.gain
        y = self.seq(y)
        for layer in self.list:
            y = layer(y)
        return y


class Outer(nn.Module):
    """Traces but for its middle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.inner = Branching()
        self.fc = nn.Linear(4, 5)
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("offset", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.inner(F.relu(self.bn(self.stem(x)))).mean((2, 3))) * self.weight + self.offset
        return y


class BranchingRoot(Outer):
    """Decides on values itself, with every kind of parameter in its signature."""

    def forward(self, x: Tensor, scale: float = 1.0, *rest: Any, flag: bool = True, **more: Any) -> Tensor:  # type: ignore[override]
        if flag and x.sum() > 1e9:
            x = x * scale
        return super().forward(x)


class ByShape(nn.Module):
    """Decides on sizes: an example settles it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] > 4:
            x = F.avg_pool2d(x, 2)
        assert x.shape[1] == 3
        parts = [x[:, i : i + 1] for i in range(x.shape[1])]
        x = torch.cat(parts, 1)
        if len(x.shape) == 4:
            x = x + int(x.shape[3] // 2)
        y: Tensor = self.conv(x)
        return y


class ByMode(nn.Module):
    """Decides on ``self.training`` in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        if self.training:
            y = y * 2
        return y


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PegeWarning)
        yield


def prepared(model: nn.Module, *args: Any, examples: bool = True) -> GraphModule:
    with quiet():
        return pege_fx.prepare(model, "W4A4", args if examples else None)


def captures(gm: GraphModule) -> tuple[Capture, ...]:
    found: tuple[Capture, ...] = gm.meta["plan"].captures
    return found


def image(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("examples", [True, False])
@pytest.mark.parametrize("cls", [Outer, BranchingRoot, ByShape, Branching])
class TestEveryRung:
    def test_the_function_is_kept_bit_for_bit_at_p_0(self, cls: type[nn.Module], examples: bool) -> None:
        torch.manual_seed(1)
        model, x = cls(), image(4 if cls is Branching else 3)
        gm = prepared(model, x, examples=examples)
        zero = Constant(0.0)
        PEGEScheduler(gm, 1, zero, zero, zero)
        assert torch.equal(gm(x), copy.deepcopy(model)(x))

    def test_all_of_its_convolutions_are_quantized_and_convert(self, cls: type[nn.Module], examples: bool) -> None:
        model, x = cls(), image(4 if cls is Branching else 3)
        gm = prepared(model, x, examples=examples)
        weights = [edge.spec for op in gm.meta["plan"].operations for edge in op.edges if edge.operand == "weight"]
        layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        assert len(weights) == len(layers)
        assert all(spec is not None for spec in weights)
        gm(x)
        gm.eval()
        with torch.no_grad():
            assert torch.equal(pege_fx.convert(gm)(x), gm(x))

    def test_names_copies_and_pickles_stay(self, cls: type[nn.Module], examples: bool) -> None:
        model, x = cls(), image(4 if cls is Branching else 3)
        gm = prepared(model, x, examples=examples)
        gm(x)
        gm.eval()
        assert isinstance(gm, GraphModule)
        assert set(model.state_dict()) <= set(gm.state_dict())
        with torch.no_grad():
            assert torch.equal(copy.deepcopy(gm)(x), gm(x))
            assert torch.equal(pickle.loads(pickle.dumps(gm))(x), gm(x))


def test_rung_3_names_module_file_line_and_reason() -> None:
    with pytest.warns(PegeWarning, match=r"inner stays Python: .*test_tiers\.py:\d+ in Branching\.forward") as caught:
        gm = pege_fx.prepare(Outer(), "W4A4", (image(),))
    assert {warning.filename for warning in caught} == {__file__}  # the line that prepares
    by_path = {note.path: note for note in captures(gm)}
    assert by_path[""].rung == "symbolic"
    assert by_path["inner"].rung == "python"
    assert "depends on data" in by_path["inner"].reason
    assert by_path["inner.conv"].rung == by_path["inner.seq"].rung == by_path["inner.list.1"].rung == "symbolic"


def test_rung_2_says_what_was_fixed_and_where() -> None:
    with pytest.warns(PegeWarning, match="fixed as in the example inputs") as caught:
        gm = pege_fx.prepare(ByShape(), "W4A4", (image(),))
    assert {note.rung for note in captures(gm)} == {"specialised"}
    assert all("test_tiers.py:" in note.place for note in captures(gm))
    assert len(captures(gm)) == 5  # if, assert, range, len, int
    assert [warning.filename for warning in caught] == [__file__]
    assert all(note.place in str(caught[0].message) for note in captures(gm))


def test_without_examples_a_size_leaves_the_module_in_python_and_says_what_would_help() -> None:
    with pytest.warns(PegeWarning, match="example_inputs may allow to trace it"):
        gm = pege_fx.prepare(ByShape(), "W4A4")
    assert {note.rung for note in captures(gm)} == {"python", "symbolic"}


def test_a_value_is_never_specialised() -> None:
    model, x = Branching(), image(4)
    gm = prepared(model, x)
    zero = Constant(0.0)
    PEGEScheduler(gm, 1, zero, zero, zero)
    for shift in (-100.0, 100.0):  # either branch
        with torch.no_grad():
            model.bn.bias.fill_(shift)
            gm.get_parameter("bn.bias").fill_(shift)
        reference = copy.deepcopy(model)
        reference.bn.load_state_dict(gm.get_submodule("bn").state_dict())
        assert torch.equal(gm(x), reference(x))


class Auxiliary(nn.Module):
    """A second head in training alone, and another kind of result; the trunk goes on behind a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.aux = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.conv(x)
        if self.training:
            side = self.aux(x)
            x = x * 2
        out: Tensor = self.head(x.mean((2, 3)))
        if self.training:
            return out, side
        return out


class StateInEvaluation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if not self.training:
            x = self.bn(x)
        return x


class InPlaceInTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = x.view(-1)
        if self.training:
            y.mul_(2.0)
        return x


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(0.5)


@pytest.mark.parametrize("started_in", [True, False])
@pytest.mark.parametrize("examples", [None, (torch.ones(2, 3, 8, 8),)])
@pytest.mark.parametrize(
    ("model", "rung"),
    [
        (ByMode(), "symbolic"),
        (Auxiliary(), "symbolic"),
        (nn.Sequential(nn.Conv2d(3, 3, 3), Auxiliary()), "symbolic"),
        (StateInEvaluation(), "python"),
        (InPlaceInTraining(), "python"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), DropPath()), "leaf"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*stays Python", "ignore:replacement is not complete")
def test_both_branches_on_the_mode_stay_live(model: nn.Module, rung: str, examples: Any, started_in: bool) -> None:
    gm = pege_fx.prepare(model.train(started_in), "W4A4", examples)
    assert rung in {capture.rung for capture in plan_of(gm).captures}
    zero = Constant(0.0)
    PEGEScheduler(gm, 1, zero, zero, zero)
    x = image()
    pege_fx.calibrate(gm, [x])
    for made in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        for _ in range(2):
            reference = copy.deepcopy(model).train()
            made.train()
            torch.manual_seed(0)
            want = reference(x)
            torch.manual_seed(0)
            torch.testing.assert_close(made(x), want, rtol=0, atol=0)
        made.eval()
        assert type(made(x)) is Tensor
    assert torch.equal(pege_fx.convert(gm.eval())(x), gm(x))


def test_what_training_alone_needs_is_not_deployed() -> None:
    gm = pege_fx.prepare(Auxiliary(), "W4A4", (image(),))
    deployed = pege_fx.convert(gm)
    assert not [name for name, _ in deployed.named_modules() if name.startswith(("aux", "training_mode"))]
    assert not deployed.graph.find_nodes(op="call_function", target=select_by_mode)


def test_example_values_do_not_move_running_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), ByShapeTail())
    gm = prepared(model, image())
    assert int(gm.state_dict()["1.num_batches_tracked"]) == 0
    assert torch.equal(gm.state_dict()["1.running_mean"], torch.zeros(4))
    assert gm.get_submodule("1").training


class ByShapeTail(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[1] == 4 else x


@pytest.mark.parametrize("wrap", [nn.DataParallel])
def test_a_wrapped_model_is_refused_with_the_fix(wrap: type[nn.Module]) -> None:
    with pytest.raises(ModelError, match=r"prepare model\.module first"):
        pege_fx.prepare(wrap(ByMode()), "W4A4")


def test_a_lazy_module_is_refused_by_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.LazyConv2d(4, 3))
    with pytest.raises(ModelError, match=r"0\.weight has no shape yet"):
        pege_fx.prepare(model, "W4A4")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x).relu()
        return y


class WithBlocks(nn.Module):
    """One block runs without gradient, one in bfloat16, one is checkpointed."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.second = kind, Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "no_grad":
            with torch.no_grad():
                x = self.first(x)
        elif self.kind == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                x = self.first(x).float()
        else:
            x = checkpoint(self.first, x, use_reentrant=False)
        y: Tensor = self.second(x)
        return y


@pytest.mark.parametrize("kind", ["no_grad", "autocast", "checkpoint"])
def test_blocks_that_a_graph_would_lose_keep_their_meaning(kind: str) -> None:
    torch.manual_seed(0)
    model, x = WithBlocks(kind), image()
    with pytest.warns(PegeWarning, match="which a graph does not hold"):
        gm = pege_fx.prepare(model, "W4A4", (x,))
    zero = Constant(0.0)
    PEGEScheduler(gm, 1, zero, zero, zero)
    got, want = gm(x), model(x)
    assert torch.equal(got, want)
    got.sum().backward()
    want.sum().backward()
    assert (gm.get_parameter("first.conv.weight").grad is None) == (model.first.conv.weight.grad is None)
    assert len(pege_fx.fake_quants(gm)) == 4


# --- what libraries make of torch's modules ------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal])
def test_a_parametrized_weight_is_an_edge_and_its_parameters_train(wrap: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), wrap(nn.Conv2d(3, 4, 3)))
    gm = prepared(model, image())
    operation = plan_of(gm).operations[1]
    assert operation.path == "1"
    assert [edge.operand for edge in operation.edges if edge.spec] == ["weight", "input"]
    gm(image()).sum().backward()
    assert all(p.grad is not None for name, p in gm.named_parameters() if name.startswith("1.param"))
    assert set(model.state_dict()) <= set(gm.state_dict())
    gm.eval()
    for made in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm)), pege_fx.convert(gm)):
        assert torch.equal(made(image()), gm(image()))


class OnAValue(nn.Module):
    def __init__(self, ask: str) -> None:
        super().__init__()
        self.fc, self.ask = nn.Linear(4, 4), ask
        self.register_buffer("limit", torch.tensor(3.0))
        self.gate = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        questions = {
            "item": lambda: x.mean().item() > 0,
            "any": lambda: bool((x > 0).any()),
            "equal": lambda: torch.equal(x, x),
            "parameter": lambda: self.gate.item() > 0,
            "buffer": lambda: self.limit.item() > 0,
            "size": lambda: x.shape[0] > 1 and x.dim() == 2 and self.gate.dtype is torch.float32,
        }
        y: Tensor = self.fc(x)
        return y if questions[self.ask]() else -y


@pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
@pytest.mark.parametrize(
    ("ask", "rung"),
    [
        ("item", "python"),
        ("any", "python"),
        ("equal", "python"),
        ("parameter", "python"),
        ("buffer", "symbolic"),
        ("size", "specialised"),
    ],
)
def test_what_tensors_hold_never_steers_a_graph_and_constants_and_sizes_do(ask: str, rung: str) -> None:
    gm = pege_fx.prepare(OnAValue(ask), "W4A4", (torch.ones(2, 4),))
    assert captures(gm)[0].rung == rung


class NormAct(nn.BatchNorm2d):
    """As timm has it: torch's forward written out, then an activation."""

    def __init__(self, channels: int, act: type[nn.Module] = nn.ReLU, gain: float = 1.0) -> None:
        super().__init__(channels)
        self.drop, self.act, self.gain = nn.Identity(), act(), gain

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        statistics = self.running_mean, self.running_var
        x = F.batch_norm(x, *statistics, self.weight, self.bias, self.training, 0.1, self.eps)
        out: Tensor = self.act(self.drop(x)) * self.gain
        return out


def test_a_batch_norm_with_its_activation_is_folded_where_it_is_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4), nn.Conv2d(4, 4, 3), NormAct(4, nn.SiLU))
    gm = prepared(model, image())
    assert {operation.batch_norm for operation in plan_of(gm).operations} == {"folded 1", "folded 3"}
    assert plan_of(gm).operations[1].edge("input").spec.signed is False  # type: ignore[union-attr]
    zero = Constant(0.0)
    PEGEScheduler(gm, 1, zero, zero, zero)
    assert_same_function(model, gm, (image(),), tolerance=0)
    assert_same_function(model.eval(), gm.eval(), (image(),), tolerance=0.2)
    assert torch.equal(pege_fx.convert(at_p_1(gm))(image()), gm(image()))


def at_p_1(gm: GraphModule) -> GraphModule:
    PEGEScheduler(gm, 1, Constant(1.0), Constant(0.0), Constant(0.0))
    return gm


@pytest.mark.filterwarnings("ignore:.*stays Python")
def test_a_batch_norm_that_does_more_is_left_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4, gain=2.0))
    gm = prepared(model, image())
    assert not plan_of(gm).operations[0].batch_norm.startswith("folded")
    zero = Constant(0.0)
    PEGEScheduler(gm, 1, zero, zero, zero)
    for _ in range(2):
        assert torch.equal(model(image()), gm(image()))
    assert int(gm.state_dict()["1.num_batches_tracked"]) == int(model.state_dict()["1.num_batches_tracked"]) == 2


# --- blocks by choice ------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.layers = nn.ModuleList([Residual() for _ in range(3)])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.head(x.mean((2, 3)))
        return y


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.bn(self.conv(x))
        return F.relu(x + (y if scale is None else y * scale))


@pytest.mark.parametrize("examples", [None, (image(),)])
def test_blocks_are_graphs_of_their_own_with_the_same_plan(examples: Any) -> None:
    model = Stack()
    whole = pege_fx.prepare(model, "W4A4", examples)
    gm = pege_fx.prepare(model, "W4A4", examples, blocks=["layers.*[0-9]"])
    for layer in gm.get_submodule("layers").children():
        assert isinstance(layer, GraphModule)
        assert layer.code == next(gm.get_submodule("layers").children()).code  # repeated blocks are traced alike
    assert {capture.rung for capture in captures(gm)} == {"symbolic", "block"}
    described = [{(op.path, e.operand, e.spec) for op in plan_of(g).operations for e in op.edges} for g in (whole, gm)]
    assert described[0] == described[1]  # the signs too, which pass through the blocks
    assert set(model.state_dict()) <= set(gm.state_dict())
    zero = Constant(0.0)
    PEGEScheduler(gm, 1, zero, zero, zero)
    assert_same_function(model, gm, (image(),), tolerance=0)
    pege_fx.calibrate(at_p_1(gm).eval(), [image()])
    for made in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm)), pege_fx.convert(gm)):
        assert torch.equal(made(image()), gm(image()))


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return checkpoint(self.inner, *args, use_reentrant=False)


def test_blocks_can_be_checkpointed_one_by_one() -> None:
    gm = pege_fx.prepare(Stack(), "W4A4", (image(),), blocks="layers.*")
    plain = copy.deepcopy(gm)
    layers = gm.get_submodule("layers")
    for name, layer in list(layers.named_children()):
        layers.set_submodule(name, Checkpointed(layer))
    for model in (gm, plain):
        model(image()).sum().backward()
    for (_, a), (_, b) in zip(gm.named_parameters(), plain.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or b.grad is None or torch.equal(a.grad, b.grad)


def test_a_block_that_is_not_there_is_refused_with_the_closest() -> None:
    with pytest.raises(pege_fx.PolicyError, match=r"blocks='layer.0' names no module.\n  closest paths: layers.0"):
        pege_fx.prepare(Stack(), "W4A4", blocks=["layer.0"])


class Selects(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc, self.how = nn.Linear(4, 4), how

    def forward(self, x: Tensor) -> Tensor:
        rows = {
            "where": lambda: x[torch.where(x[:, 0] > 0)[0]],
            "mask": lambda: x[x[:, 0] > 0],
            "nonzero": lambda: (x > 0).nonzero(),
        }[self.how]()
        return self.fc(x) if rows.shape[0] > 0 else -x


@pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
@pytest.mark.parametrize("how", ["where", "mask", "nonzero"])
def test_a_size_that_depends_on_data_never_steers_a_graph(how: str) -> None:
    gm = pege_fx.prepare(Selects(how), "W4A4", (torch.ones(2, 4),))
    assert captures(gm)[0].rung == "python"
    assert torch.equal(gm(-torch.ones(2, 4)), torch.ones(2, 4))


class MakesModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = nn.ReLU()(self.fc(x))
        return y


def test_a_module_made_on_the_way_is_looked_through() -> None:
    gm = prepared(MakesModules(), torch.ones(2, 4))
    assert {note.rung for note in captures(gm)} == {"symbolic"}
    assert gm.graph.find_nodes(op="call_function", target=F.relu)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y

    def loss(self, x: Tensor) -> Tensor:
        return self.conv(x).square().mean()


class AsksForMore(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = Head()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e6:
            return x
        y: Tensor = self.head(x) + self.head.loss(x)
        return y


@pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
def test_a_child_of_which_python_calls_another_method_keeps_it() -> None:
    model = AsksForMore()
    gm = prepared(model, image())
    zero = Constant(0.0)
    PEGEScheduler(gm, 1, zero, zero, zero)
    assert torch.equal(gm(image()), model(image()))
    assert [op.path for op in plan_of(gm).operations] == ["head.conv"]


class ReadsWeights(AsksForMore):
    """Asks its part for what every module has, and holds a parameter under two names that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Parameter(torch.ones(2))
        self.head.first = self.head.second = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(x.to(next(self.head.parameters()).dtype))
        return y if y.sum() < 1e6 else x


@pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
def test_a_child_that_is_asked_for_its_parameters_is_a_graph_and_keeps_their_names() -> None:
    model = ReadsWeights()
    gm = prepared(model, image())
    assert {note.path: note.rung for note in captures(gm)} == {"": "python", "head": "symbolic"}
    assert {"first", "second", "head.first", "head.second"} <= set(model.state_dict()) <= set(gm.state_dict())
    assert gm.get_parameter("head.first") is gm.get_parameter("head.second")


class UnderTwoNames(nn.Module):
    """Decides on values, and has a layer, a parameter and a buffer under two names each, of which it uses the second."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = self.alias = nn.Linear(4, 4)
        self.gain = self.factor = nn.Parameter(torch.full((4,), 2.0))
        self.register_buffer("offset", torch.ones(4))
        self.register_buffer("shift", self.offset)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.alias(x) * self.factor + self.shift
        return y if y.sum() < 1e6 else x


@pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
@pytest.mark.parametrize("nested", [False, True])
def test_what_python_has_under_two_names_is_one_quantized_thing_under_both(nested: bool) -> None:
    """Only the first name was kept: the layer ran in float, and the keys of the others were missing."""
    model: nn.Module = nn.Sequential(nn.Linear(4, 4), UnderTwoNames()) if nested else UnderTwoNames()
    x = torch.randn(3, 4)
    gm = prepared(model, x)
    assert set(model.state_dict()) <= set(gm.state_dict())
    for made in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert torch.equal(made(x), gm(x))
        owner = made.get_submodule("1") if nested else made
        made(x).sum().backward()
        assert owner.get_parameter("fc.weight").grad is not None
        assert owner.get_parameter("gain").grad is not None
    owner = gm.get_submodule("1") if nested else gm
    assert owner.get_submodule("alias") is owner.get_submodule("fc")
    assert torch.equal(pege_fx.convert(gm)(x), gm.eval()(x))
    assert not torch.equal(gm(x), model(x))
    zero = Constant(0.0)
    PEGEScheduler(gm, 1, zero, zero, zero)
    assert torch.equal(gm.train()(x), model(x))


class Masked(nn.Module):
    """Its graph makes a mask where its code makes none: what it calls sees both."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Optionally()

    def forward(self, x: Tensor) -> Tensor:
        mask = None if isinstance(x, Tensor) else torch.ones_like(x)
        return self.inner(x, mask) if x.sum() < 1e6 else x


class Optionally(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.fc(x)
        return y if mask is None else y * mask


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Optionally()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e6:
            return x
        return self.inner(x) + self.inner(x, x)


@pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
@pytest.mark.parametrize("cls", [Twice, Masked])
def test_what_is_called_in_more_ways_than_one_graph_holds_stays_python(cls: type[nn.Module]) -> None:
    model = cls()
    gm = prepared(model, torch.ones(2, 4))
    zero = Constant(0.0)
    PEGEScheduler(gm, 1, zero, zero, zero)
    assert torch.equal(gm(torch.ones(2, 4)), model(torch.ones(2, 4)))
    assert [op.path for op in plan_of(gm).operations] == ["inner.fc"]


def test_convert_says_what_never_saw_data() -> None:
    gm = pege_fx.prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "W4A4")
    with pytest.raises(ModelError, match="has seen no data: call pege_fx"):
        pege_fx.convert(gm)
    gm.get_submodule("input_1_fq")(torch.ones(2, 4))
    with pytest.warns(PegeWarning, match="_0_fq never saw data"):
        pege_fx.convert(gm)


class AsksForKinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Any, extra: Tensor) -> Tensor:
        x = torch.cat(x, 1) if isinstance(x, (tuple, list)) else x
        y: Tensor = self.fc(x)
        if isinstance(extra, Tensor):
            y = y + extra
        return y


@pytest.mark.parametrize("x", [torch.ones(2, 4), [torch.ones(2, 2), torch.ones(2, 2)]])
def test_a_proxy_is_an_instance_of_what_it_stands_for(x: Any) -> None:
    model = AsksForKinds()
    gm = prepared(model, x, torch.ones(2, 4))
    zero = Constant(0.0)
    PEGEScheduler(gm, 1, zero, zero, zero)
    assert torch.equal(gm(x, torch.ones(2, 4)), model(x, torch.ones(2, 4)))


def test_without_examples_an_argument_is_taken_for_a_tensor() -> None:
    model, x = AsksForKinds(), torch.ones(2, 4)
    gm = pege_fx.prepare(model, "W4A4")
    zero = Constant(0.0)
    PEGEScheduler(gm, 1, zero, zero, zero)
    assert torch.equal(gm(x, x), model(x, x))


class OverDictionaries(nn.Module):
    """Asks a dictionary for what it has, in each way that Python knows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        x, mask = batch.values()
        if "mask" in batch and "bias" not in batch:
            x = x * mask
        more = {key: self.fc(value) for key, value in batch.items()} | {f"_{key}": batch[key] for key in batch}
        return {"y": self.fc(x), "sum": self._sum(**batch), "keys": list(batch.keys()), **more}

    def _sum(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + mask


@pytest.mark.filterwarnings("ignore:nothing is quantized")
def test_a_dictionary_is_walked_as_the_example_has_it() -> None:
    model, batch = OverDictionaries(), {"x": torch.randn(3, 4), "mask": torch.randn(3, 4)}
    with pytest.warns(PegeWarning, match=r"values\(\) of batch is 2 items"):
        gm = pege_fx.prepare(model, pege_fx.QuantPolicy((pege_fx.Rule(weight=None, input=None),)), (batch,))
    found, expected = gm(batch), model(batch)
    assert found.pop("keys") == expected.pop("keys") == ["x", "mask"]
    torch.testing.assert_close(found, expected)


class Namespace(nn.Module):
    """Keeps weights in containers that have no forward, and can not be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name = nn.ParameterDict({"w": nn.Parameter(torch.randn(4, 4))})
        self.listed = nn.ParameterList([nn.Parameter(torch.randn(4, 4))])
        self.held = nn.Module()
        self.held.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.held.fc(x @ self.by_name["w"] @ self.listed[0])
        return y if y.sum() > 0 else -y


@pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
def test_containers_of_a_module_that_stays_python_stay_containers() -> None:
    model, x = Namespace(), torch.randn(3, 4)
    gm = pege_fx.prepare(model, "W8A8", (x,))
    zero = Constant(0.0)
    PEGEScheduler(gm, 1, zero, zero, zero)
    assert isinstance(gm.get_submodule("held.fc"), GraphModule)
    torch.testing.assert_close(gm(x), model(x))


class Cached(nn.Module):
    """Hands its block a list in evaluation, and nothing in training."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(4, 4), nn.Identity()

        def forward(self, x: Tensor, state: list[Tensor] | None = None, more: Tensor | None = None) -> Tensor:
            more = self.norm(more)
            x = x if more is None else x + more
            if state is not None:
                x = x + state[0]
            y: Tensor = self.fc(x)
            return y

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.fc = self.Inner(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.sum() > 0 else -x
        y: Tensor = self.fc(self.inner(x, None if self.training else [x]))
        return y


@pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
def test_what_training_calls_in_another_way_stays_python() -> None:
    gm = pege_fx.prepare(Cached(), "W4A4", (torch.randn(3, 4),))
    assert [note.path for note in plan_of(gm).captures if note.rung == "python"] == ["", "inner"]
    gm.train()(torch.randn(3, 4))
    gm.eval()(torch.randn(3, 4))


def test_an_identity_leaves_none_as_it_is() -> None:
    gm = pege_fx.prepare(Cached.Inner(), "W4A4", (torch.randn(3, 4),))
    assert "python" not in {note.rung for note in plan_of(gm).captures}


class Decoder(nn.Module):
    """A loop that decides on values, over a layer and a cell that get a hidden state from the second step on."""

    def __init__(self, layer: type[nn.Module], cell: type[nn.Module]) -> None:
        super().__init__()
        self.layer, self.cell, self.out = layer(4, 4), cell(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = state = None
        for _ in range(3):
            y, h = self.layer(x[None], h)
            state = self.cell(y[0], state)
            x = self.out(state[0] if isinstance(state, tuple) else state)
            x = x if x.sum() > 0 else -x
        return x


@pytest.mark.parametrize("with_examples", [False, True])
@pytest.mark.parametrize(("layer", "cell"), [(nn.LSTM, nn.LSTMCell), (nn.GRU, nn.GRUCell), (nn.RNN, nn.RNNCell)])
@pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
def test_recurrent_layers_are_called_with_a_hidden_state_and_without(layer: Any, cell: Any, with_examples: bool) -> None:
    torch.manual_seed(0)
    model, x = Decoder(layer, cell), torch.randn(3, 4)
    examples = (x,) if with_examples else None
    gm = pege_fx.prepare(model, pege_fx.QuantPolicy((pege_fx.Rule(weight=None, input=None),)), examples)
    assert [note.path for note in plan_of(gm).captures if note.rung == "python"] == [""]
    torch.testing.assert_close(gm(x), model(x))
    quantized = pege_fx.prepare(model, "W4A4", examples)
    quantized(x).sum().backward()
    assert all(op.edges for op in plan_of(quantized).operations)
    pickle.loads(pickle.dumps(quantized))(x)
    assert torch.equal(pege_fx.convert(quantized)(x), quantized.eval()(x))


class ReadsBias(nn.Module):
    """Reads the bias of a layer that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x) if x.sum() > 0 else self.fc(-x)
        return y if self.fc.bias is None else y - self.fc.bias


@pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
def test_python_may_read_that_a_layer_has_no_bias() -> None:
    gm = pege_fx.prepare(ReadsBias(), "W4A4", (torch.randn(3, 4),))
    for made in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm)), pege_fx.convert(gm)):
        assert torch.equal(made.eval()(torch.ones(3, 4)), gm.eval()(torch.ones(3, 4)))


class WritesIntoAttribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x) * 1
        y.data[:, 0] = 5.0
        y.mT[1] += 1
        return y


def test_what_is_written_into_an_attribute_is_written_after_pickle_too() -> None:
    x = torch.randn(3, 4)
    gm = pege_fx.prepare(WritesIntoAttribute(), "W4A4", (x,))
    assert torch.equal(pickle.loads(pickle.dumps(gm))(x), gm(x))
    assert (gm(x)[:, 0] == 5).all()


class MaybeMasked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, *more: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y if mask is None else y * mask


class InPython(nn.Module):
    """Calls a part in a way that only an example would have told."""

    def __init__(self) -> None:
        super().__init__()
        self.part = MaybeMasked()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.part(x if x.sum() > 0 else -x, torch.ones(4))
        return y


@pytest.mark.parametrize(
    ("model", "args", "where", "what"),
    [
        (MaybeMasked(), (1,), "", "mask was None when the model was traced, and is 1 now"),
        (MaybeMasked(), (torch.ones(4),), "", "mask was None when the model was traced, and is a Tensor now"),
        (MaybeMasked(), (None, torch.ones(4)), "", "more had [] when the model was traced, now it has [0]"),
        (InPython(), (), " at part", "mask was None when the model was traced, and is a Tensor now"),
    ],
)
def test_another_call_names_the_module_its_line_and_the_fix(
    model: nn.Module, args: tuple[Any, ...], where: str, what: str
) -> None:
    """Inputs that default to None were named, and not the module that has them."""
    with quiet():
        gm = pege_fx.prepare(model, "W4A4", None if isinstance(model, InPython) else (torch.ones(2, 4),))
    line = MaybeMasked.forward.__code__.co_firstlineno
    with pytest.raises(OtherCallError) as raised:
        gm(torch.ones(2, 4), *args)
    assert f"MaybeMasked (test_tiers.py:{line}){where} is called in another way: {what}." in str(raised.value)
    assert "give prepare example_inputs or example_kwargs with which it is called so" in str(raised.value)
    with pytest.raises(OtherCallError, match=f"MaybeMasked .test_tiers.py:{line}. is called in another way"):
        pickle.loads(pickle.dumps(gm))(torch.ones(2, 4), *args)  # fx forgets where a graph was
    assert "tests" not in gm.code  # where the file lies on this machine is nobody's business


def test_with_an_example_of_it_the_call_is_the_one_that_was_traced() -> None:
    x = torch.ones(2, 4)
    gm = prepared(InPython(), x)
    assert {note.path: note.rung for note in captures(gm)} == {"": "python", "part": "symbolic"}
    assert gm(x).shape == x.shape
