"""What stands in a graph for the mode and for Python: calls as they were made, checks of arguments, states that come back."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pege_fx.errors import OtherCallError
from pege_fx.modules.mode import PythonForward, check_argument, check_class, check_keys, evaluating, preserve_state


class Recorder(nn.Module):
    """Notes how its forward was called, as a decorator would see it."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def noted(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((args, kwargs))
            return forward(*args, **kwargs)

        noted.__wrapped__ = forward  # type: ignore[attr-defined]
        self.forward = noted


def plain(x: int, y: int = 2, *, z: int = 3) -> int:
    return x + 10 * y + 100 * z


def positional(x: int, y: int = 2, /, *rest: int, z: int = 3) -> int:
    return x + 10 * y + 100 * z + 1000 * sum(rest)


def required(x: int, *, z: int, **more: int) -> int:
    return x + 100 * z + 1000 * sum(more.values())


@pytest.mark.parametrize(
    ("forward", "arguments", "extra", "more", "seen"),
    [
        (plain, {"x": 1, "y": 2, "z": 3}, (), {}, ((1,), {})),
        (plain, {"x": 1, "y": 5, "z": 3}, (), {}, ((1,), {"y": 5})),
        (plain, {"x": 1, "y": 5, "z": 6}, (), {}, ((1,), {"y": 5, "z": 6})),
        (plain, {"x": 1}, (), {}, ((1,), {})),
        (positional, {"x": 1, "y": 2}, (), {}, ((1, 2), {})),
        (positional, {"x": 1, "y": 5, "z": 6}, (), {}, ((1, 5), {"z": 6})),
        (positional, {"x": 1, "y": 2}, (7, 8), {}, ((1, 2, 7, 8), {})),
        (required, {"x": 1, "z": 4}, (), {"w": 2}, ((1,), {"z": 4, "w": 2})),
    ],
)
def test_python_is_called_by_position_where_it_must_and_by_keyword_where_it_differs(
    forward: Any, arguments: dict[str, int], extra: tuple[int, ...], more: dict[str, int], seen: Any
) -> None:
    code = Recorder(forward)
    assert PythonForward(code)({}, arguments, extra, more) == forward(*seen[0], **seen[1])
    assert code.calls == [seen]


class Counting(nn.Module):
    """Assigns to one buffer, and grows another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        self.seen = torch.cat([self.seen, x])
        return x if self.training else -x


def test_what_python_assigns_to_a_buffer_is_in_the_graphs_own() -> None:
    code = PythonForward(Counting(), assigned=["count"])
    owned = {"count": torch.tensor(3.0), "seen": torch.zeros(0)}
    assert torch.equal(code.train()(owned, {"x": torch.ones(2)}, (), {}), torch.ones(2))
    assert torch.equal(code.eval()(owned, {"x": torch.ones(1)}, (), {}), -torch.ones(1))
    assert owned["count"] == 5
    assert torch.equal(owned["seen"], torch.ones(3))


@pytest.mark.parametrize(
    ("value", "traced", "is_other"),
    [
        (1, 1, False),
        (float("2.5"), float("2.5"), False),
        (1, 2, True),
        (1, True, True),
        (1.0, 1, True),
        (None, None, False),
        (None, 1, True),
        ("a", "b", True),
    ],
)
def test_an_argument_is_the_one_of_the_trace_or_refused(value: Any, traced: Any, is_other: bool) -> None:
    if not is_other:
        check_argument(value, "x", traced)
        return
    with pytest.raises(OtherCallError, match=f"x was {traced!r} when the model was traced, and is {value!r} now"):
        check_argument(value, "x", traced)


def test_an_argument_that_is_not_shown_is_named_by_its_class() -> None:
    with pytest.raises(OtherCallError, match="and is a Tensor now"):
        check_argument(torch.ones(2), "x", None)


def test_an_object_is_of_the_class_of_the_trace_or_of_one_that_derives_from_it() -> None:
    check_class(nn.Conv2d(1, 1, 1), "x", "Module")
    with pytest.raises(OtherCallError, match="x was a Linear when the model was traced, and is a Conv2d now"):
        check_class(nn.Conv2d(1, 1, 1), "x", "Linear")
    with pytest.raises(OtherCallError, match="and is None now"):
        check_class(None, "x", "Linear")


def test_keys_and_positions_are_those_of_the_trace_in_their_order() -> None:
    check_keys({"a": 5, "b": 6}, "kwargs", ("a", "b"))
    check_keys((5, 6), "args", (0, 1))
    for value, traced in (({"b": 1, "a": 2}, ("a", "b")), ({"a": 1}, ("a", "b")), ((5,), (0, 1)), ((5, 6, 7), (0, 1))):
        found = list(value) if isinstance(value, dict) else list(range(len(value)))
        with pytest.raises(OtherCallError) as refused:
            check_keys(value, "more", traced)
        said = str(refused.value).partition(": ")[2]
        assert said.startswith(f"more had {list(traced)} when the model was traced, now it has {found}.")


def test_every_module_has_its_own_mode_again() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Sequential(nn.Dropout())).train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()


class Leaving(nn.Module):
    """Leaves things behind in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gain = nn.BatchNorm1d(2), nn.Parameter(torch.ones(2))
        self.seen: list[int] = []
        self.cache: dict[str, Tensor] = {"first": torch.ones(1)}

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(self.seen))
        self.cache = {**self.cache, "last": x}
        self.last = x
        with torch.no_grad():
            self.gain.add_(1.0)
        return self.norm(x) * self.gain  # type: ignore[no-any-return]


def test_a_trial_leaves_nothing_behind() -> None:
    model = Leaving()
    seen, cache, state = model.seen, model.cache, {name: value.clone() for name, value in model.state_dict().items()}
    with preserve_state(model.modules()):
        for _ in range(2):
            model(torch.randn(4, 2))
        model.norm.register_forward_hook(lambda *_: None)
        assert model.seen == [0, 1]
    assert model.seen is seen
    assert seen == []
    assert model.cache is cache
    assert set(cache) == {"first"}
    assert not hasattr(model, "last")
    assert not model.norm._forward_hooks
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
