"""Translation validation: whatever a captured graph does otherwise than its model is an error, and what it may do is none."""

import copy
import random
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

import pege_fx
from pege_fx import PegeWarning, VerifyError
from pege_fx.decompositions.attention import ExplicitAttention
from pege_fx.passes.capture import steps
from pege_fx.passes.capture.validate import validate


class Tail(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() * 2


class Body(nn.Module):
    """What the graphs below are held against."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop, self.tail = nn.Linear(4, 4), nn.Dropout(0.5), Tail()
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.fc(x))
        self.seen.add_(y.detach().mean(0))
        z: Tensor = self.tail(y)
        return z


def captured(model: nn.Module) -> GraphModule:
    """A faithful graph, the dropout of which is a module that follows the mode."""
    return symbolic_trace(copy.deepcopy(model))


def check(model: nn.Module, gm: GraphModule, *args: Any, **kwargs: Any) -> None:
    validate(model, gm, [gm], (args, kwargs))


def test_a_faithful_graph_passes() -> None:
    model = Body()
    check(model, captured(model), torch.randn(2, 4))


def test_another_output_names_mode_node_line_and_module() -> None:
    model = Body()
    gm = captured(model)
    (factor,) = [node for node in gm.graph.nodes if node.name == "mul"]
    factor.args = (factor.args[0], 3)
    factor.meta["stack_trace"] = 'File "body.py", line 12, in forward'
    with pytest.raises(VerifyError, match=r"of Body .* in evaluation: the output differs by .*\n.* mul, .*line 12.*, in tail"):
        check(model, gm, torch.randn(2, 4))


def test_what_differs_in_training_alone_is_found_there() -> None:
    model = Body()
    gm = captured(model)
    gm.drop.p = 0.25
    with pytest.raises(VerifyError, match=r"in training: the output differs .*\n.*: drop, .*"):
        check(model, gm, torch.randn(2, 4))


def test_another_gradient_is_found_where_every_value_is_equal() -> None:
    model = Body()
    gm = captured(model)
    (tanh,) = [node for node in gm.graph.nodes if node.name == "tanh"]
    with gm.graph.inserting_before(tanh):
        half = gm.graph.call_method("detach", (tanh.args[0],))
        both = gm.graph.call_method("lerp", (tanh.args[0], half, 0.5))  # the same value, half of the gradient
    tanh.args = (both,)
    with pytest.raises(VerifyError, match=r"the gradient of fc\.weight differs"):
        check(model, gm, torch.randn(2, 4))


def test_an_output_that_needs_no_gradient_is_found() -> None:
    model = Body()
    gm = captured(model)
    (output,) = gm.graph.find_nodes(op="output")
    with gm.graph.inserting_before(output):
        output.args = (gm.graph.call_method("detach", (output.args[0],)),)
    with pytest.raises(VerifyError, match="whether the output needs a gradient is False instead of True"):
        check(model, gm, torch.randn(2, 4))


def test_a_buffer_that_is_not_written_is_found() -> None:
    model = Body()
    gm = captured(model)
    (write,) = [node for node in gm.graph.nodes if node.name.startswith("add")]
    gm.graph.erase_node(write)
    with pytest.raises(VerifyError, match="buffer seen differs"):
        check(model, gm, torch.randn(2, 4))


class Fills(nn.Module):
    """Leaves something in its arguments: a cache, as decoders have them."""

    def __init__(self, fills: bool = True) -> None:
        super().__init__()
        self.fc, self.fills = nn.Linear(4, 4), fills

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        y: Tensor = self.fc(x)
        if self.fills:
            cache["key"].append(y)
        return y


def test_an_argument_that_is_not_filled_is_found_and_the_callers_stays_empty() -> None:
    model, cache = Fills(), {"key": [torch.ones(1)]}
    without = Fills(fills=False)
    without.load_state_dict(model.state_dict())
    gm = symbolic_trace(without)
    with pytest.raises(VerifyError, match=r"argument \[1\]\['key'\]\[1\] is missing"):
        check(model, gm, torch.randn(2, 4), cache)
    assert len(cache["key"]) == 1


@dataclass
class Result:
    y: Tensor
    loss: Tensor | None = None
    steps: int = 1


class Returns(nn.Module):
    """Any tree of results."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.fc, self.what = nn.Linear(4, 4), what

    def forward(self, x: Tensor) -> Any:
        y = self.fc(x)
        return {
            "dataclass": lambda: Result(y),
            "ordered": lambda: OrderedDict(a=y, b=None),
            "nested": lambda: (y, [{"n": 3, "z": (None, y * 2)}], "text", y.shape),
            "nan": lambda: y / 0 * 0,
            "whole": lambda: (y, y.argmax(1)),
            "nothing": lambda: None,
        }[self.what]()


@pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
@pytest.mark.parametrize("what", ["dataclass", "ordered", "nested", "nan", "whole", "nothing"])
def test_any_tree_of_results_is_compared(what: str) -> None:
    pege_fx.prepare(Returns(what), "W4A4", (torch.randn(2, 4),))
    other = "ordered" if what == "nothing" else "nothing"
    with pytest.raises(VerifyError, match="the output"):
        check(Returns(what), symbolic_trace(Returns(other)), torch.randn(2, 4))


class OneMode(nn.Module):
    """Runs in one mode alone, as detectors without targets do."""

    def __init__(self, training: bool) -> None:
        super().__init__()
        self.fc, self.runs_in_training = nn.Linear(4, 4), training

    def forward(self, x: Tensor) -> Tensor:
        if self.training != self.runs_in_training:
            raise ValueError("not in this mode")
        y: Tensor = self.fc(x)
        return y


@pytest.mark.parametrize("training", [False, True])
def test_a_mode_in_which_the_model_fails_is_left_out(training: bool) -> None:
    model = OneMode(training)
    check(model, symbolic_trace(nn.Sequential(OrderedDict(fc=model.fc))), torch.randn(2, 4))
    wrong = symbolic_trace(nn.Sequential(OrderedDict(fc=model.fc, tanh=nn.Tanh())))
    with pytest.raises(VerifyError, match="in training" if training else "in evaluation"):
        check(model, wrong, torch.randn(2, 4))


def test_a_graph_that_fails_where_the_model_does_not_is_found() -> None:
    wrong = symbolic_trace(nn.Sequential(OrderedDict(fc=nn.Linear(5, 4))))
    with pytest.raises(VerifyError, match="a call raises RuntimeError"):
        check(OneMode(True), wrong, torch.randn(2, 4))


def test_one_image_under_batch_norm_is_compared_in_evaluation() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    pege_fx.prepare(model, "W4A4", (torch.randn(1, 4),))


class Capricious(nn.Module):
    """Gives something else in each call, whatever the seeds are."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        Capricious.calls += 1
        y: Tensor = self.fc(x) * Capricious.calls
        return y


def test_a_model_that_does_not_repeat_itself_is_a_warning() -> None:
    model = Capricious()
    with pytest.warns(PegeWarning, match="does not repeat itself"):
        check(model, symbolic_trace(nn.Sequential(OrderedDict(fc=model.fc))), torch.randn(2, 4))


class DeadDraw(nn.Module):
    """Draws numbers that nobody reads: the graph does not, and draws others from then on."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        self.drop(x)
        y: Tensor = self.drop(self.fc(x))
        return y


def test_masks_do_not_depend_on_draws_that_nobody_reads() -> None:
    pege_fx.prepare(DeadDraw(), "W4A4", (torch.randn(4, 8),))


@pytest.mark.parametrize(
    "layer",
    [
        nn.TransformerEncoderLayer(8, 2, 16, 0.3, batch_first=True),
        nn.TransformerDecoderLayer(8, 2, 16, 0.3),
        nn.LSTMCell(8, 8),
        nn.GRUCell(8, 8),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_is_written_out_differs_by_rounding(layer: nn.Module) -> None:
    torch.manual_seed(0)
    cell = isinstance(layer, nn.RNNCellBase)
    x = torch.randn(3, 8) if cell else torch.randn(3, 5, 8)
    pege_fx.prepare(layer, "W4A4", (x, x) if isinstance(layer, nn.TransformerDecoderLayer) else (x,))


def test_a_decomposition_that_computes_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ExplicitAttention.forward

    def forward(self: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(self, query, *(arg * 1.001 for arg in args), **kwargs)

    monkeypatch.setattr(ExplicitAttention, "forward", forward)
    x = torch.randn(3, 5, 8)
    with pytest.raises(VerifyError, match="torch's own layers, written out"):
        pege_fx.prepare(nn.MultiheadAttention(8, 2), "W4A4", (x, x.clone(), x.clone()))


@pytest.mark.parametrize("share_parameters", [False, True])
def test_nothing_of_the_callers_changes(share_parameters: bool) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)), torch.randn(8, 4)
    state, given = copy.deepcopy(model.state_dict()), x.clone()
    generators = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    gm = pege_fx.prepare(model, "W4A4", (x,), share_parameters=share_parameters)
    after = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    assert torch.equal(generators[0], after[0])
    assert generators[1:] == after[1:]
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(x, given)
    assert not x.requires_grad
    assert all(p.grad is None for p in (*model.parameters(), *gm.parameters()))
    assert all(module.training for module in (*model.modules(), *gm.modules()))


def test_prepare_checks_unless_it_is_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    x, calls = torch.randn(2, 4), []
    monkeypatch.setattr(steps, "validate", lambda *args: calls.append(args))
    pege_fx.prepare(Body(), "W4A4")
    pege_fx.prepare(Body(), "W4A4", (x,), check=False)
    pege_fx.explain(Body(), "W4A4", (x,))
    pege_fx.trace_passes(Body(), "W4A4", (x,), check=False)
    assert not calls
    pege_fx.prepare(Body(), "W4A4", (x,))
    pege_fx.trace_passes(Body(), "W4A4", (x,))
    assert len(calls) == 2


def test_it_runs_with_gradients_whatever_is_set_at_the_time() -> None:
    model = Body()
    gm = captured(model)
    gm.drop.p = 0.25
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, pytest.raises(VerifyError, match="in training"):
            check(model, gm, torch.randn(2, 4))


def test_parameters_on_meta_have_no_values_to_compare() -> None:
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(4, 4), nn.Dropout()), torch.randn(2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pege_fx.prepare(model, "W4A4", (x,))


def converted_wrongly(monkeypatch: pytest.MonkeyPatch) -> GraphModule:
    """A prepared model, the conversion of which is going to double the first bias."""

    def double(gm: GraphModule) -> None:
        with torch.no_grad():
            gm.get_parameter("0.bias").mul_(2)

    passes = pege_fx.convert_passes()
    monkeypatch.setattr("pege_fx.api.convert_passes", lambda **options: [*passes, double])
    return pege_fx.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), "W4A4", (torch.randn(2, 4),))


def test_a_conversion_is_checked_on_the_example_of_prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = converted_wrongly(monkeypatch)
    with pytest.raises(VerifyError, match=r"what was converted .*: the output differs .*\n.*the first node that parts"):
        pege_fx.convert(gm)
    assert gm.training
    pege_fx.convert(gm, check=False)


def test_a_conversion_is_checked_on_a_call_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = copy.deepcopy(converted_wrongly(monkeypatch))
    pege_fx.convert(gm)  # a copy knows of no example
    with pytest.raises(VerifyError, match="what was converted"):
        pege_fx.convert(gm, (torch.randn(3, 4),))
    with pytest.raises(VerifyError, match="what was converted"):
        pege_fx.convert(gm, example_kwargs={"input": torch.randn(3, 4)})


def test_a_call_that_the_prepared_model_refuses_says_nothing_of_its_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = converted_wrongly(monkeypatch)
    pege_fx.convert(gm, (torch.randn(3, 5),))
