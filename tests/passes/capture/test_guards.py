"""What tracing took for granted is checked in each call: another one is refused, one that needs no other graph works."""

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

import pege_fx
from pege_fx import OtherCallError, QuantPolicy, Rule
from pege_fx.training.scheduler import plan_of

pytestmark = pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
FLOAT = QuantPolicy((Rule(weight=None, input=None),))
X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


class Settings:
    """An object among the arguments that no call changes."""

    def __init__(self, scale: float = 2.0, mode: str = "a", bias: Tensor | None = None) -> None:
        self.scale, self.mode, self.bias = scale, mode, bias


class Counts:
    """An object among the arguments that each call changes."""

    def __init__(self) -> None:
        self.calls, self.first = 0, None

    def count(self) -> int:
        self.calls += 1
        return self.calls


class Asking(nn.Module):
    """A layer, and a function that asks Python of its arguments."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Any, *more: Any, **named: Any) -> Any:
        return self.function(self.fc, x, *more, **named)


def larger(fc: Any, x: Tensor) -> Any:
    return fc(x) if x.shape[0] > 2 else -fc(x)


def ranked(fc: Any, x: Tensor) -> Any:
    return fc(x) if x.dim() == 3 else -fc(x)


def looped(fc: Any, x: Tensor) -> Any:
    return torch.stack([fc(x[:, i]) for i in range(x.shape[1])], 1)


def typed(fc: Any, x: Tensor) -> Any:
    return fc(x.float()) if x.dtype == torch.float64 else fc(x.float()) * 2


def floating(fc: Any, x: Tensor) -> Any:
    return fc(x) if x.is_floating_point() else fc(x.float()) * 2


def placed(fc: Any, x: Tensor) -> Any:
    return fc(x) if x.device.type == "cpu" and not x.is_cuda else -fc(x)


def listed(fc: Any, x: list[Tensor]) -> Any:
    first, second = x
    return fc(first) + second


def partly(fc: Any, x: list[Any]) -> Any:
    return fc(x[0]) if x[1] is None else fc(x[0]) * x[1]


def keyed(fc: Any, x: dict[str, Any]) -> Any:
    y = fc(x["x"])
    if "mask" in x:
        y = y * x["mask"]
    if x.get("bias") is not None:
        y = y + x["bias"]
    return y


def walked(fc: Any, x: dict[str, Tensor]) -> Any:
    return {key: fc(value) for key, value in x.items()}


def configured(fc: Any, x: Tensor, settings: Settings) -> Any:
    y = fc(x) * settings.scale
    if settings.bias is not None:
        y = y + settings.bias
    return y if settings.mode == "a" else -y


def scaled(fc: Any, x: Tensor, scale: float) -> Any:
    return fc(x) * scale


MASK, OTHER = torch.zeros(4), torch.randn(5, 3, 4)
# what asks, the example, calls that need no other graph, calls that do and what is said of them
CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], list[tuple[Any, ...]], list[tuple[tuple[Any, ...], str]]]] = {
    "an answer, not a size": (larger, (X,), [(X[:1],)], [((OTHER,), r"x.shape\[0\] > 2 was False .* and is True now")]),
    "a rank": (ranked, (X,), [(OTHER,)], [((X[0],), r"x.dim\(\) == 3 was True .* and is False now")]),
    "a loop": (looped, (X,), [(OTHER,)], [((X[:, :2],), r"x.shape\[1\] was 3 .* and is 2 now")]),
    "a type": (typed, (X,), [(OTHER,), (X.half(),)], [((X.double(),), "x.dtype == torch.float64 was False")]),
    "a kind of type": (floating, (X,), [(OTHER,)], [((X.long(),), r"x.is_floating_point\(\) was True")]),
    "a device": (placed, (X,), [(OTHER,)], [((X.to("meta"),), "x.device.type was 'cpu'")]),
    "the length of a list": (listed, ([X, X],), [([OTHER, OTHER],)],
                             [(([X, X, X],), r"x had \[0, 1\]"), (((X, X),), "x was a list")]),
    "None in a list": (partly, ([X, None],), [([OTHER, None],)], [(([X, MASK],), r"x\[1\] was None .* is a Tensor")]),
    "a tensor in a list": (partly, ([X, MASK],), [([OTHER, MASK],)], []),
    "keys": (
        keyed,
        ({"x": X, "mask": MASK, "more": 1},),
        [({"x": OTHER, "mask": MASK},), ({"x": OTHER, "mask": MASK, "another": None},)],
        [(({"x": X},), "'mask' in x was True"), (({"x": X, "mask": MASK, "bias": MASK},), "'bias' in x was False")],
    ),
    "None under a key": (keyed, ({"x": X, "bias": None},), [], [(({"x": X, "bias": MASK},), r"x\['bias'\] was None")]),
    "all keys": (walked, ({"a": X},), [({"a": OTHER},)], [(({"a": X, "b": X},), r"x had \['a'\]"), (({"b": X},), "x had")]),
    "an object": (
        configured,
        (X, Settings()),
        [(OTHER, Settings())],
        [((X, Settings(mode="b")), r"mode was 'a'"), ((X, Settings(bias=MASK)), r"bias was None"), ((X, None), "a Settings")],
    ),
    "a number": (scaled, (X, 2.0), [(X, 3.0), (X, 3)], [((X, None), "more.0. was a float")]),
    "a tensor, or None": (scaled, (X, MASK), [(OTHER, MASK)], [((X, None), "more.0. was a Tensor"), ((X, 2.0), "a float now")]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_call_gives_what_the_model_gives_or_is_refused(name: str) -> None:
    function, example, right, wrong = CASES[name]
    model = Asking(function)
    gm = pege_fx.prepare(model, FLOAT, example)
    assert "python" not in {note.rung for note in plan_of(gm).captures}
    for graph in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        for args in [example, *right]:
            torch.testing.assert_close(graph(*args), model(*args))
        for args, said in wrong:
            with pytest.raises(OtherCallError, match=f"(?s)Asking .*is called in another way: .*{said}"):
                graph(*args)


def test_the_line_that_asked_is_named() -> None:
    gm = pege_fx.prepare(Asking(larger), FLOAT, (X,))
    line = larger.__code__.co_firstlineno + 1
    with pytest.raises(OtherCallError, match=rf"Asking \(test_guards.py:{line}\) is called in another way"):
        gm(OTHER)


class Pair(NamedTuple):
    x: Tensor
    bias: Tensor | None = None


FLAG, COUNT = False, 0


def named(fc: Any, pair: Pair) -> Any:
    return fc(pair.x) if pair.bias is None else fc(pair.x) + pair.bias


def flagged(fc: Any, x: Tensor) -> Any:
    return -fc(x) if FLAG else fc(x)


class Switched(nn.Module):
    """Asks a buffer, and in the end writes into it if told so."""

    on: Tensor

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.fc, self.writes = nn.Linear(4, 4), writes
        self.register_buffer("on", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x) if self.on == 0 else -self.fc(x)
        if self.writes:
            self.on.fill_(1)
        return y


def test_a_named_tuple_is_asked_for_its_parts() -> None:
    model = Asking(named)
    gm = pege_fx.prepare(model, FLOAT, (Pair(X),))
    torch.testing.assert_close(gm(Pair(OTHER)), model(Pair(OTHER)))
    with pytest.raises(OtherCallError, match="was None when"):
        gm(Pair(X, MASK))


def test_a_global_variable_that_changed_is_another_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Asking(flagged)
    gm = pege_fx.prepare(model, FLOAT, (X,))
    torch.testing.assert_close(gm(X), model(X))
    monkeypatch.setitem(globals(), "FLAG", True)
    with pytest.raises(OtherCallError, match="FLAG was False when the model was traced, and is True now"):
        gm(X)


def test_a_buffer_that_decided_is_checked_and_one_that_each_call_writes_decides_in_python() -> None:
    model = Switched(writes=False)
    gm = pege_fx.prepare(model, FLOAT, (X,))
    torch.testing.assert_close(gm(X), model(X))
    gm.get_buffer("on").fill_(1)
    with pytest.raises(OtherCallError, match=r"on == 0 held True"):
        gm(X)
    model = Switched(writes=True)
    gm = pege_fx.prepare(model, FLOAT, (X,))
    for _ in range(2):
        torch.testing.assert_close(gm(X), model(X))


def matched(fc: Any, x: Tensor) -> Any:
    match x.shape:
        case (2, *_):
            return fc(x)
        case _:
            return -fc(x)


def identical(fc: Any, x: Tensor) -> Any:
    return fc(x) if x.dtype is torch.float32 else -fc(x.float())


def counting(fc: Any, x: Tensor) -> Any:
    global COUNT
    COUNT += 1
    return fc(x) if COUNT % 2 else -fc(x)


@pytest.mark.parametrize("function", [matched, counting])
def test_what_no_proxy_hears_of_stays_python(function: Any) -> None:
    model = Asking(function)
    gm = pege_fx.prepare(model, FLOAT, (X,))
    assert [note.rung for note in plan_of(gm).captures if not note.path] == ["python"]
    for x in (X, OTHER) if function is matched else ():
        torch.testing.assert_close(gm(x), model(x))


def test_identity_of_a_type_is_asked_of_the_value() -> None:
    model = Asking(identical)
    gm = pege_fx.prepare(model, FLOAT, (X,))
    torch.testing.assert_close(gm(OTHER), model(OTHER))
    with pytest.raises(OtherCallError, match=r"x.dtype was torch.float32 when the model was traced, and is torch.float16 now"):
        gm(X.half())


def counted(fc: Any, x: Tensor, counts: Counts) -> Any:
    return fc(x) if counts.count() == 1 else -fc(x)


def initialised(fc: Any, x: Tensor, counts: Counts) -> Any:
    if counts.first is None:
        counts.first = fc(x)
    return fc(x) - counts.first


def rewritten(fc: Any, x: list[Any]) -> Any:
    x[1] = fc(x[0]) if x[1] is None else x[1] + 1
    return x[1]


@pytest.mark.parametrize(
    ("function", "call"),
    [(counted, lambda: (X, Counts())), (initialised, lambda: (X, Counts())), (rewritten, lambda: ([X, None],))],
)
def test_what_depends_on_a_state_that_a_call_changes_stays_python(function: Any, call: Callable[[], Any]) -> None:
    model = Asking(function)
    gm = pege_fx.prepare(model, FLOAT, call())
    assert [note.rung for note in plan_of(gm).captures if not note.path] == ["python"]
    given, wanted = call(), call()
    for _ in range(2):
        torch.testing.assert_close(gm(*given), model(*wanted))


def grown(fc: Any, x: dict[str, Any]) -> Any:
    x["y"] = fc(x["x"])
    x.setdefault("z", x["y"] * 2)
    x.update(w=x["z"] + 1)
    return x


def test_what_is_written_into_a_dictionary_is_written_into_the_callers() -> None:
    model, given, wanted = Asking(grown), {"x": X}, {"x": X}
    gm = pege_fx.prepare(model, FLOAT, ({"x": X},))
    assert gm(given) is given
    model(wanted)
    torch.testing.assert_close(given, wanted)


def refuses_to_pop(fc: Any, x: dict[str, Any]) -> Any:
    return fc(x.pop("x"))


def test_what_is_taken_out_of_a_dictionary_stays_python() -> None:
    model = Asking(refuses_to_pop)
    gm = pege_fx.prepare(model, FLOAT, ({"x": X},))
    given = {"x": X}
    torch.testing.assert_close(gm(given), model({"x": X}))
    assert not given


def test_the_same_question_is_checked_once() -> None:
    def often(fc: Any, x: Tensor) -> Any:
        y = fc(x)
        for _ in range(10):
            y = y + 1 if x.shape[0] == 2 else y
        return y

    gm = pege_fx.prepare(Asking(often), FLOAT, (X,))
    assert gm.code.count("x.shape[0] == 2") == 1


class MaskedIfPadded(nn.Module):
    """Gives its part a mask only if there is something to mask."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Asking(lambda fc, x, mask: fc(x) if mask is None else fc(x).masked_fill(~mask, 0.0))

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        return self.part(x, None if mask.all() else mask)


@pytest.mark.parametrize("full_first", [True, False])
def test_a_part_that_gets_none_by_what_a_tensor_holds_takes_both_or_refuses(full_first: bool) -> None:
    model, full = MaskedIfPadded(), torch.ones(4, dtype=torch.bool)
    padded = full & (torch.arange(4) < 2)
    gm = pege_fx.prepare(model, FLOAT, (X, full if full_first else padded))
    torch.testing.assert_close(gm(X, padded), model(X, padded))
    if full_first:
        torch.testing.assert_close(gm(X, full), model(X, full))
    else:
        with pytest.raises(OtherCallError, match="was a Tensor when the model was traced, and is None now"):
            gm(X, full)


def test_a_compiler_follows_the_checks_in_one_graph_for_every_batch() -> None:
    """The question that a check asks is a question that the model's own code would ask the compiler too."""

    def asks(fc: Any, x: Tensor, mask: Tensor, named: dict[str, Tensor]) -> Any:
        y = fc(x) * mask if x.dim() == 3 else fc(x)
        return y + named["bias"] if x.shape[2] == 4 and "bias" in named and x.dtype == torch.float32 else y

    named = {"bias": MASK}
    model = Asking(asks)
    gm = pege_fx.prepare(model, FLOAT, (X, MASK, named))
    assert gm.code.count("check_") >= 6
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(gm, backend=counter, fullgraph=True, dynamic=True)
    for rows in (2, 3, 5, 7):
        x = torch.randn(rows, 3, 4)
        torch.testing.assert_close(compiled(x, MASK, named), model(x, MASK, named))
    assert counter.frame_count == 1
