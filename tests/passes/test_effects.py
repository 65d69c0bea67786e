"""In-place writes, in the open, through views, and in code that no graph shows: what is read afterwards is read afterwards."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

import pege_fx
from pege_fx import fake_quants
from pege_fx.modules.mode import written

pytestmark = pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")


def add_in_place(x: Tensor, y: Tensor) -> None:
    x.add_(y)


def fill_corner(x: Tensor) -> Tensor:
    x[:, 0] = -1.0
    return x


torch.fx.wrap("add_in_place")
torch.fx.wrap("fill_corner")


class Untraceable(nn.Module):
    """Values steer it, and it writes to what it is given."""

    def forward(self, x: Tensor) -> None:
        if x.isfinite().all():
            x.mul_(-0.5)


STEPS: dict[str, Callable[["Program", list[Tensor], int], Any]] = {
    "read": lambda program, kept, i: kept.append(program.layers[i % 3](kept[i])),
    "add_": lambda _, kept, i: kept[i].add_(1.0),
    "relu_": lambda _, kept, i: kept.append(kept[i].relu_()),
    "iadd": lambda _, kept, i: kept.__setitem__(i, kept[i].__iadd__(kept[-1])),
    "assign": lambda _, kept, i: kept[i].__setitem__((slice(None), 0), -2.0),
    "write a view": lambda _, kept, i: kept[i].view(-1).narrow(0, 0, 3).sub_(4.0),
    "keep a view": lambda _, kept, i: kept.append(kept[i].view(kept[i].shape)),
    "write a transposed": lambda _, kept, i: kept[i].t()[1].mul_(-3.0),
    "own function": lambda _, kept, i: add_in_place(kept[i], kept[-1]),
    "own function that returns": lambda _, kept, i: kept.append(fill_corner(kept[i])),
    "python": lambda program, kept, i: program.untraceable(kept[i]),
    "relu": lambda _, kept, i: kept.append(kept[i].relu()),
}


class Program(nn.Module):
    """Keeps tensors in a list; each step reads or writes one of them."""

    def __init__(self, steps: list[tuple[str, int]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.untraceable = Untraceable()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        kept = [self.layers[0](x)]
        for name, i in self.steps:
            STEPS[name](self, kept, i % len(kept))
        return torch.cat([self.layers[1](tensor) for tensor in kept])


PROGRAMS = st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 5)), max_size=7)


@given(PROGRAMS)
def test_what_is_read_after_a_write_is_what_was_written(steps: list[tuple[str, int]]) -> None:
    model, x = Program(steps).eval(), torch.randn(2, 4)
    with torch.no_grad(), pege_fx.kernels.eager_kernels():
        expected = model(x)
        gm = pege_fx.prepare(model, "W4A4", x)
        pege_fx.calibrate(gm, [x])
        for site in fake_quants(gm).values():
            site.schedule.rate.fill_(0.0)  # nothing is replaced: every fake-quant copies its input, at its place
        torch.testing.assert_close(gm.train()(x), expected)
        torch.testing.assert_close(pickle.loads(pickle.dumps(gm))(x), expected)
        torch.testing.assert_close(pege_fx.convert(gm.eval())(x), gm(x), rtol=0, atol=0)


JOINS = {"add_": "add", "iadd": "add", "write a view": "sub", "write a transposed": "mul"}


@given(PROGRAMS, st.booleans())
def test_sums_in_place_may_be_quantized_too(steps: list[tuple[str, int]], shared: bool) -> None:
    functions = {"cat", *(JOINS[name] for name, _ in steps if name in JOINS)}
    joins = [pege_fx.Rule(function=name, input="4", shared_scale=shared) for name in sorted(functions)]
    policy = pege_fx.QuantPolicy((pege_fx.Rule(weight="4", input="4"), *joins))
    model, x = Program(steps).eval(), torch.randn(2, 4)
    with pege_fx.kernels.eager_kernels():
        expected = model(x).detach()
        gm = pege_fx.prepare(model, policy, x).train()
        for site in fake_quants(gm).values():
            site.schedule.rate.fill_(0.0)
        with torch.no_grad():
            torch.testing.assert_close(gm(x), expected)
            torch.testing.assert_close(pege_fx.convert(gm.eval())(x), gm(x), rtol=0, atol=0)


@given(PROGRAMS)
def test_codes_are_signed_where_a_write_may_have_been_negative(steps: list[tuple[str, int]]) -> None:
    model, x = Program(steps).eval(), torch.randn(8, 4)
    with torch.no_grad(), pege_fx.kernels.eager_kernels():
        gm = pege_fx.prepare(model, "W8A8", x)
        seen: dict[str, float] = {}
        for name, site in fake_quants(gm).items():
            site.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, float(args[0].min())))
        pege_fx.calibrate(gm, [x])
    unsigned = [name for name, site in fake_quants(gm).items() if site.site.spec.signed is False]
    assert [name for name in unsigned if seen[name] < 0] == []


def graph_of(*steps: tuple[str, int]) -> GraphModule:
    return pege_fx.prepare(Program(list(steps)), "W4A4", torch.randn(2, 4))


def test_readers_on_both_sides_of_a_write_have_a_fake_quant_each() -> None:
    gm = graph_of(("read", 0), ("write a view", 0))
    between = [node for node in gm.graph.nodes if node.target is written]
    assert len(between) == 1
    assert {"layers_0_fq", "layers_0_written_fq"} <= {node.name for node in gm.graph.nodes}


def test_the_mode_is_no_memory_that_stochastic_depth_writes_to() -> None:
    model = torchvision.models.efficientnet_b0(num_classes=4).features[2:4]
    gm = pege_fx.prepare(model, "W4A4", torch.randn(2, 16, 8, 8))
    assert not any(node.target is written for node in gm.graph.nodes)


def test_a_graph_without_hidden_writes_has_no_extra_node() -> None:
    gm = graph_of(("read", 0), ("relu_", 1), ("add_", 0), ("relu", 1))
    assert not any(node.target is written for node in gm.graph.nodes)


class WrittenThrough(nn.Module):
    """Writes to what a module returns, and reads what went into it."""

    def __init__(self, view: nn.Module) -> None:
        super().__init__()
        self.before, self.view, self.behind = nn.Linear(4, 4), view, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        self.view(y).sub_(4.0)
        return self.behind(y)  # type: ignore[no-any-return]


VIEWS = [nn.Identity(), nn.Flatten(), nn.Flatten(0), nn.Unflatten(1, (2, 2)), nn.Dropout(), nn.Dropout1d(), nn.ReLU()]


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_a_write_to_what_a_module_returns_is_one_to_what_went_in(view: nn.Module) -> None:
    model, x = WrittenThrough(view).eval(), torch.randn(2, 4)
    gm = pege_fx.prepare(model, pege_fx.QuantPolicy((pege_fx.Rule(weight=None, input=None),)), x)
    torch.testing.assert_close(gm(x), model(x))
    assert any(node.target is written for node in gm.graph.nodes) is not isinstance(view, nn.ReLU)


class ShapedAs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.layers[0](x), self.layers[1](x)
        view = a.view_as(b)
        b.add_(1.0)
        return self.layers[2](view) + b  # type: ignore[no-any-return]


def test_a_view_is_none_of_what_only_gives_it_its_shape() -> None:
    gm = pege_fx.prepare(ShapedAs(), "W4A4", torch.randn(2, 4))
    assert not any(node.target is written for node in gm.graph.nodes)


def test_a_module_whose_result_nobody_reads_still_runs() -> None:
    assert any(str(node.target).startswith("untraceable") for node in graph_of(("python", 0)).graph.nodes)


def pick(x: Tensor, y: Tensor, first: bool) -> Tensor:
    return x if first else y


torch.fx.wrap("pick")


class Picked(nn.Module):
    """Writes to one of two tensors, chosen in code that the graph does not look into."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.layers[0](x), self.layers[1](x)
        pick(a, b, self.first).add_(3.0)
        return torch.cat([self.layers[2](a), self.layers[2](b)])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("example", [None, torch.ones(2, 4)])
def test_what_comes_out_of_unknown_code_may_be_anything_that_goes_in(first: bool, example: Tensor | None) -> None:
    gm = pege_fx.prepare(Picked(first), "W4A4", example)
    behind = [node.name for node in gm.graph.nodes if node.target is written]
    assert sorted(behind) == ["layers_0_written", "layers_1_written"]


class Sizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = more = x.shape[0]
        more += 1
        shape = whole = x.shape[:1]
        whole += (2, -1)
        return self.layer(x).reshape(rows, -1).repeat(more, 1).reshape(more, *shape, -1).sum(0).view(whole)


@pytest.mark.parametrize("example", [None, torch.ones(3, 4)])
def test_sizes_are_values_and_change_under_one_name_only(example: Tensor | None) -> None:
    model, x = Sizes().eval(), torch.randn(3, 4)
    gm = pege_fx.prepare(model, pege_fx.QuantPolicy.parse("W8A8"), example)
    assert gm(x).shape == model(x).shape == (3, 2, 2)


def test_signs_are_read_of_the_value_at_that_place() -> None:
    sites = fake_quants(graph_of(("relu", 0), ("read", 1), ("assign", 1), ("read", 1)))
    assert {name: site.site.spec.signed for name, site in sites.items() if name.startswith("relu")} == {
        "relu_fq": False,
        "relu_written_fq": True,
    }


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "t": torch.t,
    "swapdims": lambda x: torch.swapdims(x, 0, 1),
    "adjoint": lambda x: x.adjoint(),
    "moveaxis": lambda x: torch.moveaxis(x, 0, 1),
    "hsplit": lambda x: torch.hsplit(x, 2)[0],
    "vsplit": lambda x: torch.vsplit(x, 2)[1],
    "einsum": lambda x: torch.einsum("ij->ji", x),
    "positive": lambda x: torch.positive(x),
    "broadcast": lambda x: torch.broadcast_tensors(x, x)[1],
    "atleast": lambda x: torch.atleast_3d(x),
    "alias": lambda x: torch.ops.aten.alias(x),
    "asarray": lambda x: torch.asarray(x),
    "dropout of nothing": lambda x: torch.nn.functional.feature_alpha_dropout(x, 0.5, False),
    "identity": nn.Identity(),
    "wrapped": lambda x: fill_corner(x),
}


class WritesAView(nn.Module):
    """Reads a value, writes to it through a view, and reads it again."""

    def __init__(self, view: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.view = nn.Linear(4, 4), nn.Linear(4, 4), view

    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.0
        first: Tensor = self.a(h)
        VIEWS[self.view](h).mul_(3.0)
        return first + self.b(h)


@pytest.mark.parametrize("examples", [True, False])
@pytest.mark.parametrize("view", VIEWS)
def test_a_write_through_any_view_is_seen(view: str, examples: bool) -> None:
    model, x = WritesAView(view).eval(), torch.randn(4, 4)
    with torch.no_grad(), pege_fx.kernels.eager_kernels():
        expected = model(x)
        gm = pege_fx.prepare(model, "W8A8", (x,) if examples else None)
        pege_fx.calibrate(gm, [x])
        for site in fake_quants(gm).values():
            site.schedule.rate.fill_(0.0)
        torch.testing.assert_close(gm.train()(x), expected)


def test_a_write_by_position_of_inplace_is_a_write() -> None:
    class Positional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = x * 1.0
            first: Tensor = self.a(h)
            torch.nn.functional.relu(h, True)
            return first + self.b(h)

    model, x = Positional(), torch.randn(4, 4)
    gm = pege_fx.prepare(model, pege_fx.QuantPolicy((pege_fx.Rule(weight=None, input=None),)), (x,))
    torch.testing.assert_close(gm(x), model(x))
