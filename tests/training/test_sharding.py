"""Several processes: N of them train as one does on the global batch, under DDP and fully_shard, and go on when one dies."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import is_available

import pege_fx
from pege_fx import PEGEScheduler
from pege_fx.serialization import tensor_tree
from pege_fx.serialization.checkpoint import KIND

if not is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

FILE = Path(__file__).parents[1] / "workers" / "rank.py"
found = importlib.util.spec_from_file_location("rank_worker", FILE)
assert found is not None
assert found.loader is not None
worker: Any = importlib.util.module_from_spec(found)
found.loader.exec_module(worker)

Results = list[dict[str, Any]]


@pytest.fixture
def ranks(start: Callable[..., Any], tmp_path: Path) -> Callable[[str, int], Results]:
    """Run a task of the worker on some processes, and return what each of them found."""

    def run(task: str, size: int) -> Results:
        processes = [start("rank", task, rank, size, tmp_path) for rank in range(size)]
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        return [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(size)]

    return run


def assert_all_equal_one(results: Results, name: str, one: dict[str, Any]) -> None:
    for result in results:
        for key, value in one["state"].items():
            assert torch.equal(result[name]["state"][key], results[0][name]["state"][key]), f"{name}: {key} differs by rank"
            torch.testing.assert_close(result[name]["state"][key], value, rtol=1e-6, atol=1e-9, msg=lambda m: f"{name} {m}")
    mean = torch.tensor([result[name]["loss"] for result in results]).mean(0)
    torch.testing.assert_close(mean, torch.tensor(one["loss"]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("task", "size"), [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 3)])
def test_n_processes_train_as_one_does_on_the_global_batch(ranks: Any, task: str, size: int) -> None:
    results = ranks(task, size)
    for name in results[0]:
        method, estimator = name.split()[:2]
        one = worker.trained(
            worker.prepared(method, "pege" if estimator == "at" else estimator), 0, 1, calibrated="first" not in name
        )
        assert_all_equal_one(results, name, one)
        for site, mask in one["replaced"].items():
            parts = [result[name]["replaced"][site] for result in results]
            if site.endswith("weight_fq"):  # the same on every rank
                assert all(torch.equal(part, mask) for part in parts)
            else:  # another one on each, and together that of one process
                assert torch.equal(torch.cat(parts), mask)
                assert not torch.equal(parts[0], parts[1])


def test_whoever_calls_fully_shard_the_result_is_that_of_one_process(ranks: Any) -> None:
    one = worker.trained(worker.prepared("lsq").double(), 0, 1)
    assert_all_equal_one(ranks("fsdp_of_others", 2), "lsq pege", one)


def test_scales_are_sharded_when_the_grid_is_set_from_data() -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    x = torch.randn(4, 8)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for call in (lambda gm: pege_fx.calibrate(gm, [x]), lambda gm: PEGEScheduler(gm, 4)):
            gm = pege_fx.prepare(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)), "W4A4")
            fully_shard(gm)
            with pytest.raises(pege_fx.ModelError, match="calibrate before the model is sharded"):
                call(gm)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3])
def test_a_checkpoint_of_many_processes_goes_on_there_and_in_one(ranks: Any, size: int, tmp_path: Path) -> None:
    results = ranks("resumed", size)
    whole = worker.trained(worker.prepared("lsq"), 0, 1)
    for name in ("ddp", "fsdp"):
        assert_all_equal_one(results, name, whole)
        gm = worker.prepared("lsq")
        scheduler = PEGEScheduler(gm, 2 * worker.STEPS)
        optimizer = torch.optim.SGD(pege_fx.parameter_groups(gm, 0.05), momentum=0.9)
        pege_fx.load(tmp_path / name, gm, scheduler=scheduler, optimizer=optimizer)
        assert scheduler.t == worker.STEPS // 2 + 1
        assert all(parameter in optimizer.state for parameter in gm.parameters())


def test_a_model_is_sharded_among_processes_only() -> None:
    gm = worker.prepared("lsq")
    with pytest.raises(pege_fx.ModelError, match="there is no process group: run under torchrun"):
        pege_fx.shard(gm)
    with pytest.raises(pege_fx.ModelError, match="was not prepared"):
        pege_fx.shard(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def elastic(folder: Path, dies_at: int) -> subprocess.Popen[str]:
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=3", "--standalone"]
    command += [str(FILE.with_name("elastic.py")), str(folder), str(dies_at)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    # Else a restarted worker may find the address of one that is gone (torchrun shares one store among its attempts).
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_an_elastic_restart_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    runs = {"whole": elastic(tmp_path / "whole", 0), "parts": elastic(tmp_path / "parts", 4)}
    for run in runs.values():
        output, _ = run.communicate(timeout=120)
        assert run.returncode == 0, output
    steps = [line.split() for line in (tmp_path / "parts" / "log").read_text().splitlines()]
    assert [int(step) for _, step in steps] == [1, 2, 3, 4, 5, 6]
    assert [int(restart) > 0 for restart, _ in steps] == [False] * 3 + [True] * 3
    one, other = (tensor_tree.read(tmp_path / name / "state", KIND) for name in runs)
    assert one["scheduler"] == other["scheduler"]
    assert all(torch.equal(value, other["model"][name]) for name, value in one["model"].items())
