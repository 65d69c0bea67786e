"""A step leaves nothing behind: what a process holds, and how long a step takes, is the same after many.

The lengths here take seconds; ``make long-run`` measures 100,000 steps, by benchmarks/long_run.py.
"""

import gc
import json
import sys
import tracemalloc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import pege_fx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import long_run  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "long_run.json"


@pytest.fixture
def traced() -> Iterator[None]:
    list(long_run.run(3, watched=True))  # what is imported and made once
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("watched", [False, True], ids=["alone", "with telemetry and guard"])
def test_steps_leave_nothing_behind(watched: bool) -> None:
    _, second, third = (part.size for part in long_run.run(150, watched=watched, parts=3))  # the first has what is made once
    assert third.tensors <= second.tensors  # of the whole process: what tests before this one left may go
    per_step = (third.objects - second.objects) / 50
    rows = 5 * 100 / 3 if watched else 0  # telemetry keeps its rows: five sites, a third of a hundred looks
    assert per_step * 50 <= rows + 20
    assert third.allocated - second.allocated < 20_000 + 1_200 * rows  # of some twenty columns


def test_schedulers_step_in_the_same_memory() -> None:
    gm = long_run.prepared()
    scheduler = pege_fx.PEGEScheduler(gm, 10_000)
    states = {id(fq.schedule): fq.schedule for fq in pege_fx.fake_quants(gm).values()}
    places = [buffer.data_ptr() for state in states.values() for buffer in state.buffers()]
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(10_000):
        scheduler.step()
    gc.collect()
    assert len(gc.get_objects()) - before < 100
    assert places == [buffer.data_ptr() for state in states.values() for buffer in state.buffers()]
    assert scheduler.t == scheduler.refreshes == 10_000


def test_the_graph_of_a_step_dies_with_its_loss() -> None:
    """``discretization_loss`` finds the last forward: it must not keep it."""
    gm = long_run.prepared()
    sites = pege_fx.fake_quants(gm).values()
    with pege_fx.kernels.eager_kernels():
        loss = gm(torch.randn(4, 1, 6, 6)).square().mean() + pege_fx.discretization_loss(gm)
    assert all(fq.last_forward() is not None for fq in sites)
    del loss  # no backward has freed anything
    assert all(fq.last_forward() is None for fq in sites)


def test_models_are_freed_with_all_that_watched_them() -> None:
    def used() -> list[weakref.ref[object]]:
        gm = long_run.prepared()
        for step in long_run.steps_of(gm, 3, watched=True):
            step()
        deployed = pege_fx.convert(gm.eval())
        shown = (str(pege_fx.summary(gm)), str(pege_fx.diff(gm, deployed)))
        assert all(shown)
        return [weakref.ref(value) for value in (gm, deployed, *pege_fx.fake_quants(gm).values())]

    with pege_fx.kernels.eager_kernels():
        held = used()
        gc.collect()
        assert [reference() for reference in held if reference() is not None] == []


def test_preparing_again_and_again_holds_no_more_tensors() -> None:
    pege_fx.convert(long_run.prepared().eval())
    before = long_run.Size.now().tensors
    for _ in range(3):
        pege_fx.convert(long_run.prepared().eval())
    assert long_run.Size.now().tensors == before


def test_the_stored_run_grew_neither_in_memory_nor_in_time() -> None:
    stored = json.loads(RESULT.read_text(encoding="utf-8"))
    assert stored["steps"] == 100_000
    for name in ("alone", "with telemetry and guard"):
        first, second, *_, last = stored[name]
        assert last["steps"] == 100_000
        assert last["seconds"] <= 1.5 * first["seconds"]  # a shared machine
        assert last["size"]["tensors"] == second["size"]["tensors"]
        assert last["size"]["resident"] - second["size"]["resident"] < 8 * 2**20
