"""What a user reads: the expression and the line of the model's own code, once for all that is alike, and what to change."""

import re
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

import pege_fx
from pege_fx import InputError, PegeWarning, VerifyError
from pege_fx.passes.capture import shapes

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
HERE = re.escape(__file__)


class Decides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if (
            x.mean() > 10
            or x.min() > 3
        ):  # fmt: skip
            return x
        return x * 2


class BySize(Decides):
    def forward(self, x: Tensor) -> Tensor:
        for i in range(x.shape[0]):
            x = x + i
        return self.fc(x) if len(x.shape) == 2 and x.shape[1] > 2 else x


def said(model: nn.Module, *args: Tensor) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pege_fx.prepare(model, "W4A4", args or None)
    return [str(warning.message) for warning in caught if issubclass(warning.category, PegeWarning)]


def test_the_question_is_the_expression_of_the_source() -> None:
    (message,) = said(Decides(), X)
    assert re.fullmatch(
        rf"the model stays Python: DataDependenceError: if asks for the value of `x\.mean\(\) > 10`, which depends on data "
        rf"\({HERE}:\d+ in Decides\.forward\)",
        message,
    )


def test_what_was_fixed_is_said_in_the_words_of_the_source() -> None:
    (message,) = said(BySize(), X)
    lines = [line.strip() for line in message.splitlines()]
    assert lines[0] == "the model: fixed as in the example inputs:"
    texts = [
        "a whole number of `range(x.shape[0])` is 2",
        "len() of `len(x.shape)` is 2 items",
        "if of `x.shape[1] > 2` is True",
    ]
    assert [line.split(f" ({__file__}:")[0] for line in lines[1:]] == texts


def test_blocks_that_are_alike_are_one_warning() -> None:
    messages = said(nn.Sequential(*(Decides() for _ in range(5)), nn.Linear(4, 4)), X)
    assert len(messages) == 1
    assert messages[0].startswith("0, 1, 2 and 2 more stay Python: DataDependenceError: if asks for")
    (message,) = said(nn.Sequential(Decides(), nn.Sequential(BySize()), Decides()), X)[:1]
    assert message.startswith("0, 2 stay Python: ")


def test_code_that_has_no_source_is_said_by_its_nodes() -> None:
    namespace = {"Decides": Decides}
    exec("class Typed(Decides):\n    def forward(self, x):\n        return x if self.fc(x).mean() > 10 else -x", namespace)
    (message,) = said(namespace["Typed"](), X)  # type: ignore[operator]
    assert "if asks for the value of mean > 10, which depends on data (<string>:3 in " in message


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.body.register_forward_hook(lambda module, args, result: result * 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y


def test_the_place_is_the_users_file_where_a_module_is_torchs() -> None:
    (message,) = said(Hooked(), X)
    assert re.match(rf"body stays Python: it has forward hooks, which a graph does not hold \({HERE}:\d+ in Hooked", message)
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    model[0].register_forward_hook(lambda module, args, result: result)
    (message,) = said(model, X)
    assert message == "0 stays Python: it has forward hooks, which a graph does not hold"


class DictCache:
    def __init__(self, x: Tensor) -> None:
        self.x = x


class Caches(Decides):
    def forward(self, x: Tensor) -> tuple[Tensor, DictCache]:  # type: ignore[override]
        return self.fc(x), DictCache(x)


def test_a_cache_that_comes_back_is_said_to_be_one_and_what_to_change() -> None:
    (message,) = said(Caches(), X)
    reason = "ForeignObjectError: it returns a DictCache, which a graph does not hold"
    assert re.match(rf"the model stays Python: {reason} \({HERE}:\d+ in Caches", message)
    assert "use_cache=False" in message


class Fails(Decides):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y.reshape(3, 3) if x.mean() < 1e6 else y


def test_a_model_that_fails_by_itself_is_told_from_a_graph_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"the model fails on the example inputs .*the model itself"):
        pege_fx.prepare(Fails(), "W4A4", (X,))

    def broken(node: Node) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(shapes, "_note", lambda node, value: broken(node))
    with pytest.raises(
        VerifyError, match=r"what was captured of BySize fails where the model does not, .*RuntimeError: broken"
    ):
        pege_fx.prepare(BySize(), "W4A4", (X,))
