"""How many examples of each law (Hypothesis), with no deadline: a first call may compile. And what tests leave behind."""

import multiprocessing
import runpy
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from hypothesis import settings
from torch.fx import _symbolic_trace

# For each change a few examples, the same in every run; at night many, others every time (`make test-nightly`).
settings.register_profile("pege_fx", deadline=None, derandomize=True, max_examples=15)
settings.register_profile("nightly", deadline=None, print_blob=True, max_examples=200)
settings.load_profile("pege_fx")  # --hypothesis-profile comes after this, and before the tests are imported

WORKERS = Path(__file__).parent / "workers"
# Processes are forked from one that has imported torch already, and itself runs no thread.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pege_fx", "torch.distributed.fsdp", "torch.distributed.tensor"])


@pytest.fixture(autouse=True, scope="module")
def _generated_code_is_forgotten() -> Iterator[None]:
    """Forget the code of graphs that a module's tests made: fx keeps that of each which calls a wrapped function.

    For every trace it patches all of them. After some thousand graphs that took longer than all else in a test.
    """
    wrapped = _symbolic_trace._wrapped_fns_to_patch
    before = set(wrapped)
    yield
    for key in wrapped.keys() - before:
        if "__name__" not in wrapped[key]:  # the globals of a graph's code, not those of a module that was imported meanwhile
            del wrapped[key]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ForkServerProcess]]:
    """Start ``tests/workers/<name>.py`` with arguments, in a process of its own; none of them outlives the test."""
    started: list[ForkServerProcess] = []

    def run(name: str, *words: object) -> ForkServerProcess:
        path = str(WORKERS / f"{name}.py")
        monkeypatch.setattr("sys.argv", [path, *map(str, words)])  # a child takes over its parent's
        process = CONTEXT.Process(target=runpy.run_path, args=(path,), kwargs={"run_name": "__main__"})
        process.start()
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.join()
