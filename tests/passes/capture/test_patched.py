"""The table of what is patched while a module is traced: nothing else is, and all of it is put back."""

import contextlib
import random
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pege_fx
from pege_fx.passes.capture.patched import TABLE, Patched, names_of
from pege_fx.passes.operators import operators

NAMESPACES = {entry.where: entry.namespace for entry in TABLE if entry.where and not entry.where.startswith("transformers")}
MORE = {"torch.nn.functional": vars(F), "torch.nn.modules.module.Module": vars(nn.Module), "torch.Tensor": vars(Tensor)}


def snapshot() -> dict[str, dict[str, Any]]:
    """What every name means now, in each place that is patched and in a few that are not."""
    return {where: dict(namespace) for where, namespace in (NAMESPACES | MORE).items()}


SEEN: list[dict[str, dict[str, Any]]] = []
NAMES: list[dict[str, Any]] = []


class Looks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(snapshot())
        NAMES.append(dict(globals()))
        return torch.relu(x)


def changed(before: dict[str, Any], now: dict[str, Any]) -> set[str]:
    missing = object()
    return {name for name in before | now if before.get(name, missing) is not now.get(name, missing)}


@pytest.fixture
def traced() -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]], set[str]]:
    SEEN.clear()
    NAMES.clear()
    before, own = snapshot(), dict(globals())
    pege_fx.prepare(nn.Sequential(nn.Linear(4, 4), Looks()), "W4A4")
    return before, SEEN[0], changed(own, NAMES[0])


def test_only_what_the_table_names_is_patched_and_all_of_it(traced: Any) -> None:
    before, during, own = traced
    expected: dict[str, set[str]] = {where: set() for where in before}
    for entry in TABLE:
        if entry.where in expected:
            expected[entry.where] |= {name for name in entry.names if name in before[entry.where]}
    expected["torch.nn.functional"] = {f.__name__ for entry in operators() if not entry.takes_proxies for f in entry.functions}
    # fx's own: it patches these for every trace
    expected["torch.nn.modules.module.Module"] = {"__call__", "__getattr__"}
    assert {where: changed(before[where], during[where]) for where in before} == expected
    (names,) = [set(entry.names) for entry in TABLE if not entry.where]
    assert own == names


def test_all_is_put_back(traced: Any) -> None:
    before, _, _ = traced
    assert {where: changed(before[where], now) for where, now in snapshot().items()} == {where: set() for where in before}
    assert "isinstance" not in globals()


def test_all_is_put_back_after_an_error() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no")

    before = snapshot()
    with contextlib.suppress(pege_fx.PegeError), pytest.warns(pege_fx.PegeWarning):
        pege_fx.prepare(nn.Sequential(nn.Linear(4, 4), Fails()), "W4A4")
    assert {where: changed(before[where], now) for where, now in snapshot().items()} == {where: set() for where in before}


def test_a_module_that_sets_a_backend_within_forward_stays_python() -> None:
    class Sets(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.backends.cudnn.flags(enabled=False):
                return torch.relu(x)

    gm = pege_fx.prepare(nn.Sequential(nn.Linear(4, 4), Sets()), "W4A4")
    (note,) = [note for note in pege_fx.plan_of(gm).captures if note.path == "1"]
    assert note.rung == "leaf"
    assert "it uses flags() inside forward" in note.reason


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: f"{entry.where or 'globals'} {entry.role}")
def test_every_entry_has_names_that_are_there_and_a_reason(entry: Patched) -> None:
    assert entry.reason.endswith(".")
    assert len(entry.names) == len(set(entry.names))
    if entry.where and not entry.where.startswith("transformers"):
        assert any(name in entry.namespace for name in entry.names)


def test_a_library_that_nobody_imported_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(__import__("sys").modules, "transformers", raising=False)
    assert list(names_of("assume")) == []
    assert [name for namespace, name in names_of("draw") if namespace is vars(random)]
    assert [name for namespace, name in names_of("draw") if namespace is vars(numpy.random)]
