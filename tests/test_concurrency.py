"""Several at once: models, threads, the workers of a DataLoader; and the same run twice."""

import copy
import hashlib
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils.data import DataLoader

import pege_fx
from pege_fx.kernels.inductor import eager_kernels
from pege_fx.passes.capture.patching import uncompiled

ROOT = Path(__file__).parents[1]
DATA = torch.randn(8, 4, 1, 6, 6, generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def plain() -> Iterator[None]:
    """Plain operations, and threads that take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    with eager_kernels():
        yield
    sys.setswitchinterval(interval)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(8, 3))


def prepared(seed: int = 0, policy: Any = "W2A2") -> GraphModule:
    return pege_fx.prepare(network(seed), policy, DATA[0], seed=seed)


def training(gm: GraphModule, steps: int = 20) -> Iterator[float]:
    """Train; each turn is a step, and yields its loss."""
    optimizer = torch.optim.Adam(pege_fx.parameter_groups(gm, lr=1e-2, quantizer_lr=1e-3))
    scheduler = pege_fx.PEGEScheduler(gm, steps)
    for step in range(steps):
        loss = gm(DATA[step % len(DATA)]).square().mean() + 1e-3 * pege_fx.discretization_loss(gm)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        yield loss.item()


def trained(gm: GraphModule, steps: int = 20) -> tuple[list[float], bytes]:
    """The losses, and everything the model holds then."""
    losses = list(training(gm, steps))
    return losses, held(gm)


def held(gm: GraphModule) -> bytes:
    state = gm.state_dict()
    return hashlib.sha256(b"".join(name.encode() + value.numpy().tobytes() for name, value in state.items())).digest()


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Call each in a thread of its own, all from one moment on; return the results, or raise the first error."""
    results: list[Any] = [None] * len(calls)
    start = threading.Barrier(len(calls))

    def run(i: int) -> None:
        start.wait()
        try:
            results[i] = calls[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


# --- several models in one process ---------------------------------------------------------------------------------


def test_models_trained_in_turns_are_those_trained_alone() -> None:
    alone = [trained(prepared(seed)) for seed in (0, 1)]
    models = [prepared(seed) for seed in (0, 1)]
    turns = list(zip(*(training(gm) for gm in models), strict=True))
    assert [(list(losses), held(gm)) for losses, gm in zip(zip(*turns, strict=True), models, strict=True)] == alone


def test_models_share_neither_schedules_nor_masks_nor_tensors() -> None:
    one, other = prepared(0), prepared(0)
    pege_fx.PEGEScheduler(one, 10).go_to(3)
    states = [next(iter(pege_fx.fake_quants(gm).values())).schedule for gm in (one, other)]
    assert states[0].rate < 1
    assert states[1].rate == 1
    assert states[0].refresh_key != states[1].refresh_key
    places = [{value.data_ptr() for value in gm.state_dict().values() if value.numel()} for gm in (one, other)]
    assert not places[0] & places[1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda gm: pickle.loads(pickle.dumps(gm))], ids=["deepcopy", "pickle"])
def test_the_scheduler_of_a_copy_leaves_the_original_alone(copied: Any) -> None:
    gm = prepared()
    scheduler = pege_fx.PEGEScheduler(gm, 10)
    before = held(gm), {name: fq.key.item() for name, fq in pege_fx.fake_quants(gm).items()}
    trained(copied(gm), 5)
    assert (held(gm), {name: fq.key.item() for name, fq in pege_fx.fake_quants(gm).items()}) == before
    assert scheduler.t == 0


# --- threads -------------------------------------------------------------------------------------------------------


def test_models_trained_by_two_threads_are_those_trained_alone() -> None:
    alone = [trained(prepared(seed)) for seed in (0, 1)]
    models = [prepared(seed) for seed in (0, 1)]
    assert at_once(*(lambda gm=gm: trained(gm) for gm in models)) == alone  # type: ignore[misc]


READERS: dict[str, Callable[[GraphModule], Any]] = {
    "summary": lambda gm: str(pege_fx.summary(gm)),
    "diff": lambda gm: str(pege_fx.diff(gm, gm)),
    "state_dict": lambda gm: gm.state_dict(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda gm: pickle.loads(pickle.dumps(gm)),
    "explain": lambda gm: str(pege_fx.explain(network(), "W4A4", DATA[0])),
    "prepare": lambda gm: prepared(2),
    "convert": lambda gm: pege_fx.convert(prepared(2).eval()),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_model_trains_while_another_thread_reads_traces_and_converts(reader: str) -> None:
    """fx patches ``nn.Module`` for all threads while it traces, as unpickling, explain, prepare and convert do."""
    alone = trained(prepared(), 30)
    gm, done = prepared(), threading.Event()

    def train() -> tuple[list[float], bytes]:
        try:
            return trained(gm, 30)
        finally:
            done.set()

    def read() -> int:
        count = 0
        while not done.is_set():
            READERS[reader](gm)
            count += 1
        return count

    result, count = at_once(train, read)
    assert result == alone
    assert count > 0


def test_threads_prepare_what_one_prepares() -> None:
    # Both at once: two tracers would restore each other's patches of torch.
    alone = [str(prepared(seed, policy).graph) for seed, policy in ((0, "W2A2"), (1, "W4A8"))]
    for _ in range(5):
        models = at_once(lambda: prepared(0, "W2A2"), lambda: prepared(1, "W4A8"))
        assert [str(gm.graph) for gm in models] == alone
    assert nn.Module.__call__.__module__ == "torch.nn.modules.module"
    assert torch.zeros(2).tolist() == [0.0, 0.0]


def test_graphs_that_another_thread_makes_meanwhile_are_compiled() -> None:
    gm = prepared()
    with uncompiled():
        (theirs,) = at_once(lambda: copy.deepcopy(gm))
        ours = copy.deepcopy(gm)
    assert theirs.code == gm.code
    with pytest.raises(RuntimeError, match="Code has not been generated"):
        _ = ours.code


# --- the workers of a DataLoader -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_run_a_prepared_model_while_it_trains_in_the_parent(method: str) -> None:
    """Forked with it, or pickled into them: what a worker computes is what the model computed when the workers started."""
    gm = prepared()
    trained(gm, 3)
    labelling = copy.deepcopy(gm).eval().requires_grad_(False)
    wanted = [labelling(x) for x in DATA]
    context = multiprocessing.get_context(method)
    loader = DataLoader(list(DATA), batch_size=None, collate_fn=labelling, num_workers=1, multiprocessing_context=context)  # type: ignore[arg-type]
    before = held(gm)
    found = []
    for loss, y in zip(training(gm), loader, strict=False):
        found.append(y)
        assert loss == loss
    assert all(map(torch.equal, found, wanted))
    assert len(found) == len(wanted)
    assert held(gm) != before


# --- the same run twice --------------------------------------------------------------------------------------------


def test_deterministic_runs_are_bit_identical_whatever_the_order_of_sets() -> None:
    def started(hash_seed: str) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, str(ROOT / "tests" / "workers" / "deterministic.py")]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    runs = [started(hash_seed) for hash_seed in ("1", "2")]
    (one, errors), (other, _) = (run.communicate(timeout=120) for run in runs)
    assert one, errors
    assert one == other


def test_what_other_threads_draw_is_theirs() -> None:
    """While tracing, functions that draw are others; a thread that trains meanwhile, or a DataLoader's, sees nothing of it."""
    done = threading.Event()
    drawn: list[Any] = []

    def draw() -> None:
        while not done.is_set():
            drawn.append((torch.randn(2), torch.empty(2).uniform_(), random.random(), numpy.random.rand()))

    def prepare() -> int:
        try:
            return sum(len(pege_fx.plan_of(prepared(seed)).captures) for seed in range(5))
        finally:
            done.set()

    _, rungs = at_once(draw, prepare)
    assert rungs == 5  # each is traced whole
    assert {(type(a), type(b), type(c), type(d)) for a, b, c, d in drawn} == {(torch.Tensor, torch.Tensor, float, float)}
