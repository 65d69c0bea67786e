"""100,000 training steps of a tiny model: does memory, or the time of a step, grow?

python benchmarks/long_run.py [--steps 100000] [--output benchmarks/results/long_run.json]

Once alone, once with telemetry and guard. After every tenth: resident memory, what Python has allocated (where tracemalloc was
started), the objects and tensors that the garbage collector knows, and the median processor time of a step. One thread.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import pege_fx

PARTS = 10


@dataclass(frozen=True)
class Size:
    """What a process holds: bytes of memory, bytes that Python allocated, objects and tensors known to the collector."""

    resident: int
    allocated: int
    objects: int
    tensors: int

    @staticmethod
    def now() -> "Size":
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        known = gc.get_objects()
        tensors = sum(issubclass(type(value), Tensor) for value in known)  # isinstance asks what warns when it is asked
        return Size(pages * os.sysconf("SC_PAGE_SIZE"), tracemalloc.get_traced_memory()[0], len(known), tensors)


@dataclass(frozen=True)
class Part:
    """A part of a run: the step it ended with, the median processor seconds of its steps, and what was held then."""

    steps: int
    seconds: float
    size: Size


def prepared(batch_norm: str = "train") -> GraphModule:
    """Return a tiny network with everything that keeps state: a live fold, a running range, a group of its own."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(8, 3)
    )  # fmt: skip
    rules = (
        pege_fx.Rule(weight="2", input="2"),
        pege_fx.Rule(match="3", input=pege_fx.QuantSpec(bits=4, method="minmax"), schedule="middle"),
    )
    return pege_fx.prepare(network, pege_fx.QuantPolicy(rules), torch.randn(4, 1, 6, 6), batch_norm=batch_norm)


def steps_of(gm: GraphModule, count: int, *, watched: bool) -> Iterator[Callable[[], None]]:
    """Yield ``count`` training steps to call, each with a step of the scheduler; ``watched`` by telemetry and a guard."""
    scheduler = pege_fx.PEGEScheduler(gm, count)
    optimizer = torch.optim.Adam(pege_fx.parameter_groups(gm, lr=1e-3, quantizer_lr=1e-5))
    telemetry = pege_fx.Telemetry(gm, every=max(count // 100, 1)) if watched else None
    guard = pege_fx.Guard(gm, every=max(count // 100, 1), collapsed=0.0, clipped=1.0) if watched else None
    data, labels = torch.randn(16, 4, 1, 6, 6), torch.randint(3, (16, 4))

    def step(i: int) -> None:
        x, label = data[i % 16], labels[i % 16]
        loss = F.cross_entropy(gm(x), label)
        if i % 10 == 0:
            loss = loss + 1e-6 * pege_fx.discretization_loss(gm)
        if guard is not None:
            guard.check(loss, x)
        optimizer.zero_grad()
        loss.backward()
        if guard is not None:
            guard.check_gradients()
        optimizer.step()
        scheduler.step()
        if telemetry is not None:
            telemetry.step()

    for i in range(count):
        yield lambda i=i: step(i)  # type: ignore[misc]
    if telemetry is not None:
        telemetry.close()


def run(count: int, *, watched: bool = False, parts: int = PARTS) -> Iterator[Part]:
    """Train a tiny model for ``count`` steps, and look at it ``parts`` times."""
    times = []
    with pege_fx.kernels.eager_kernels():
        for i, step in enumerate(steps_of(prepared(), count, watched=watched), 1):
            started = time.process_time()
            step()
            times.append(time.process_time() - started)
            if i * parts // count > (i - 1) * parts // count:
                yield Part(i, statistics.median(times), Size.now())
                times = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "long_run.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"steps": options.steps, "python": platform.python_version(), "torch": torch.__version__}
    for name, watched in (("alone", False), ("with telemetry and guard", True)):
        result[name] = []
        for part in run(options.steps, watched=watched):
            print(f"{name}: {part.steps} steps, {1e3 * part.seconds:.2f} ms each, {part.size}", flush=True)
            result[name].append(asdict(part))
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
