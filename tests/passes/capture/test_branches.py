"""``if self.training``: both branches in one graph, or the reason why no graph holds both."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import pege_fx
from pege_fx import QuantPolicy, Rule
from pege_fx.modules.mode import select_by_mode
from pege_fx.training.scheduler import plan_of

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
FLOAT = QuantPolicy((Rule(weight=None, input=None),))


class Branching(nn.Module):
    """A convolution, and then whatever differs between training and evaluation."""

    def __init__(self, training: Callable[[Any, Tensor], Any], evaluation: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.norm, self.dropout = nn.BatchNorm2d(3), nn.Dropout(0.5)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("variance", torch.ones(3))
        self.sides = {True: training, False: evaluation}

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        if self.training:
            return self.sides[True](self, x)
        return self.sides[False](self, x)


def prepared(model: nn.Module) -> GraphModule:
    with warnings.catch_warnings(action="ignore"):
        return pege_fx.prepare(model, FLOAT, (X,))


def same(self: Any, x: Tensor) -> Tensor:
    return x


MERGED: dict[str, tuple[Callable[[Any, Tensor], Any], Callable[[Any, Tensor], Any], int]] = {
    "a layer in training alone": (lambda self, x: self.other(x), same, 1),
    "a layer in evaluation alone": (same, lambda self, x: self.other(x), 1),
    "other numbers": (lambda self, x: x * 2 + 1, lambda self, x: x * 3 + 1, 1),
    "a number of another kind": (lambda self, x: x * 2, lambda self, x: x * 2.0, 1),
    "the same numbers": (lambda self, x: x * 2, lambda self, x: x * 2, 0),
    "a norm without statistics": (lambda self, x: F.batch_norm(x, None, None, training=True), same, 1),
    "a list of which one differs": (lambda self, x: torch.cat([x, x * 2], 1), lambda self, x: torch.cat([x, x], 1), 1),
    "a list of another length": (lambda self, x: torch.cat([x, x], 1), lambda self, x: torch.cat([x], 1), 1),
    "results by name": (lambda self, x: {"a": x, "b": x * 2}, lambda self, x: {"a": x, "b": x}, 1),
    "results of other names": (lambda self, x: {"a": x}, lambda self, x: {"b": x}, 1),
    "results of other names, the other way round": (lambda self, x: {"b": x}, lambda self, x: {"a": x}, 1),
    "true or a number": (lambda self, x: x * True, lambda self, x: x * 3, 1),
    "a number or false": (lambda self, x: x * 3, lambda self, x: x * False, 1),
    "the mode itself": (lambda self, x: F.dropout(x, 0.5, training=True), lambda self, x: F.dropout(x, 0.5, training=False), 0),
    "the mode the other way round": (lambda self, x: F.gelu(x), lambda self, x: F.gelu(x, approximate="tanh"), 1),
    "a tensor that evaluation alone reads": (same, lambda self, x: x + self.mean.view(-1, 1, 1), 1),
    "in place on what the branch has made": (lambda self, x: (x * 2).add_(1), same, 1),
    "in place on a view of it": (lambda self, x: (x * 2).view(2, -1).add_(1).view(2, 3, 6, 6), same, 1),
}


@pytest.mark.parametrize("name", MERGED)
def test_each_mode_computes_its_side_and_evaluation_deploys(name: str) -> None:
    training, evaluation, selections = MERGED[name]
    model = Branching(training, evaluation)
    gm = prepared(model)
    assert {capture.rung for capture in plan_of(gm).captures} == {"symbolic"}
    assert len(gm.graph.find_nodes(op="call_function", target=select_by_mode)) >= selections
    for mode in (True, False, True):
        torch.manual_seed(1)
        wanted = copy.deepcopy(model).train(mode)(X)
        torch.manual_seed(1)
        torch.testing.assert_close(gm.train(mode)(X), wanted, rtol=0, atol=0)
    deployed = pege_fx.convert(gm.eval())
    torch.testing.assert_close(deployed(X), gm(X), rtol=0, atol=0)
    assert not deployed.graph.find_nodes(op="call_function", target=select_by_mode)
    assert "dropout" not in deployed.code


def test_what_both_modes_share_is_there_once_however_long_it_is() -> None:
    def long(x: Tensor) -> Tensor:
        for _ in range(250):
            x = torch.tanh(x)
        return x

    gm = prepared(Branching(lambda self, x: long(x * 2) * 2, lambda self, x: long(x)))
    assert len(gm.graph.find_nodes(op="call_function", target=torch.tanh)) == 250


def statistics(self: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, self.mean, self.variance, training=True)


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], Callable[[Any, Tensor], Any], str]] = {
    "statistics in training": (statistics, same, "batch_norm keeps statistics in training alone"),
    "statistics in evaluation": (same, statistics, "batch_norm keeps statistics in evaluation alone"),
    "in place in training": (lambda self, x: x.add_(1), same, "add_ works in place in training alone"),
    "in place in evaluation": (same, lambda self, x: x.view(-1).add_(1), "add_ works in place in evaluation alone"),
    "a state in evaluation": (same, lambda self, x: self.norm(x), "norm, which evaluation alone calls, has a state or draws"),
    "chance in evaluation": (
        same,
        lambda self, x: self.dropout(x),
        "dropout, which evaluation alone calls, has a state or draws",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_show_in_the_other_mode_is_refused_with_the_reason(name: str) -> None:
    training, evaluation, reason = REFUSED[name]
    model = Branching(training, evaluation)
    gm = prepared(model)
    (kept,) = [capture for capture in plan_of(gm).captures if capture.rung == "python"]
    assert reason in kept.reason
    gm.get_buffer("mean").zero_()  # calibration evaluates once
    for mode in (True, False):
        reference = copy.deepcopy(model).train(mode)
        torch.manual_seed(1)
        wanted = reference(X)
        torch.manual_seed(1)
        torch.testing.assert_close(gm.train(mode)(X), wanted, rtol=0, atol=0)
        torch.testing.assert_close(gm.get_buffer("mean"), reference.mean)
        gm.get_buffer("mean").zero_()


def of_unknown_code(x: Tensor) -> Tensor:
    return x * 2


torch.fx.wrap("of_unknown_code")


def test_what_training_alone_calls_is_not_deployed_and_what_nobody_reads_is() -> None:
    """Code that the graph does not look into may do anything, and is called in both modes if nobody ever read its result."""
    deployed = pege_fx.convert(prepared(Branching(lambda self, x: of_unknown_code(x), same)).eval())
    assert not deployed.graph.find_nodes(op="call_function", target=of_unknown_code)

    def unread(self: Any, x: Tensor) -> Tensor:
        of_unknown_code(x)
        return x

    deployed = pege_fx.convert(prepared(Branching(unread, unread)).eval())
    assert len(deployed.graph.find_nodes(op="call_function", target=of_unknown_code)) == 1


def count(self: Any, x: Tensor) -> Tensor:
    self.mean.add_(1.0)
    return x


def through_a_view(self: Any, x: Tensor) -> Tensor:
    y = x * 2
    y.view(-1).add_(1.0)
    return y


@pytest.mark.parametrize("write", [count, through_a_view])
def test_what_both_modes_write_to_is_deployed(write: Any) -> None:
    """What is written to outlives the call, or is read behind the write."""
    gm = prepared(Branching(write, lambda self, x: write(self, x) * 1)).eval()
    deployed = pege_fx.convert(gm)
    for _ in range(2):
        assert torch.equal(deployed(X), gm(X))
    if write is count:
        assert torch.equal(deployed.get_buffer("mean"), gm.get_buffer("mean"))


def test_what_training_alone_writes_to_is_not_deployed() -> None:
    def training(self: Any, x: Tensor) -> Tensor:
        noise = torch.zeros_like(x)
        noise.view(-1).add_(3.0)
        return x + noise

    gm = prepared(Branching(training, same))
    assert {capture.rung for capture in plan_of(gm).captures} == {"symbolic"}
    assert torch.equal(gm.train()(X), gm.eval()(X) + 3.0)
    deployed = pege_fx.convert(gm)
    assert not {"add_", "view", "zeros_like"} & {str(node.target) for node in deployed.graph.nodes}
    assert torch.equal(deployed(X), gm(X))


OTHER_FORMS: dict[str, tuple[Callable[[Any, Tensor], Any], Callable[[Any, Tensor], Any]]] = {
    "a list of another length, and what fits one alone": (
        lambda self, x: torch.stack([x, x * 2]),
        lambda self, x: torch.stack([x]).squeeze(0).gather(1, torch.zeros(2, 1, 6, 6, dtype=torch.long)),
    ),
    "another number of results": (lambda self, x: (x, x * 2), lambda self, x: x * 3),
    "another type": (lambda self, x: torch.cat([x.double(), x]), lambda self, x: torch.cat([x, x]).view(torch.int32)),
    "a result under a name, or not": (lambda self, x: {"loss": x.mean(), "y": x}, lambda self, x: x),
    "another attribute": (
        lambda self, x: x * 2 if x.dtype == torch.float32 else x,
        lambda self, x: x * 3 if x.device.type == "cpu" else x,
    ),
    "an object that is called": (lambda self, x: self.sides["log"](x), lambda self, x: x),
}


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_what_differs_in_form_is_never_mixed(name: str) -> None:
    """Both sides were run on the values of either; one that does not fit raised, or answered for the other."""
    model = Branching(*OTHER_FORMS[name])
    model.sides["log"] = lambda x: x + 1
    gm = prepared(model)
    for mode in (True, False, True):
        wanted = copy.deepcopy(model).train(mode)(X)
        torch.testing.assert_close(gm.train(mode)(X), wanted, rtol=0, atol=0)
    deployed = pege_fx.convert(gm.eval())
    torch.testing.assert_close(deployed(X), gm(X), rtol=0, atol=0)


def test_what_each_mode_reads_of_a_value_has_a_pickle() -> None:
    """The names of attributes were selected by mode, which no tracer of the generated code follows."""
    gm = prepared(Branching(*OTHER_FORMS["another attribute"]))
    torch.testing.assert_close(pickle.loads(pickle.dumps(gm))(X), gm(X), rtol=0, atol=0)


def test_what_one_mode_asked_is_checked_in_that_mode() -> None:
    model = Branching(lambda self, x: x * 2 if x.shape[0] == 2 else x, lambda self, x: x if x.shape[0] < 5 else x * 3)
    gm, one, many = prepared(model), X[:1], torch.cat([X, X, X])
    for mode, right, wrong in ((True, X, one), (False, one, many)):
        torch.testing.assert_close(gm.train(mode)(right), model.train(mode)(right))
        with pytest.raises(pege_fx.OtherCallError, match=r"conv.shape\[0\]"):
            gm(wrong)
    deployed = pege_fx.convert(gm.eval())
    torch.testing.assert_close(deployed(one), model(one))
    with pytest.raises(pege_fx.OtherCallError, match=r"conv.shape\[0\] < 5"):
        deployed(many)
    assert "active" not in deployed.code
