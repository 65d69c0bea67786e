"""Speed on this machine, as ratios in one process against a named baseline: make bench, or python benchmarks/run.py

One thread; medians of interleaved runs. Kernel: against a copy of the same tensor. Training step (forward, backward, SGD):
against the float model. Prepare: against ``torch.fx.symbolic_trace`` of the same model, in CPU time.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pege_fx
from pege_fx import Constant, PEGEScheduler, QuantPolicy, QuantSpec, functional

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from cifar10 import ResNet20


def interleaved(calls: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each call, measured in turn after two warm-up rounds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 2):
        for name, call in calls.items():
            start = clock()
            call()
            if repeat >= 2:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def kernel(elements: int, repeats: int) -> list[dict[str, Any]]:
    x, grad = torch.randn(elements), torch.randn(elements)
    target, scale = torch.empty_like(x), torch.tensor(0.7, requires_grad=True)
    key, strength = torch.tensor(7, dtype=torch.int32), torch.tensor(1e-6)
    leaf = x.clone().requires_grad_()

    def ours(rate: Tensor | None) -> Tensor:
        spec = QuantSpec(bits=2)
        given = None if rate is None else key
        return functional.fake_quantize(leaf, scale, spec, rate=rate, key=given, strength=strength)

    def theirs() -> Tensor:
        return torch.fake_quantize_per_tensor_affine(leaf, 0.7, 0, -2, 1)

    outputs = {"pege_fx p=0.5": ours(torch.tensor(0.5)), "pege_fx p=1": ours(None), "torch fake_quantize": theirs()}
    forward: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(x),
        "relu": lambda: torch.relu(x),
        "pege_fx p=0.5": lambda: ours(torch.tensor(0.5)),
        "pege_fx p=1": lambda: ours(None),
        "torch fake_quantize": theirs,
    }
    backward: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(x)}
    for name, y in outputs.items():
        inputs = (leaf, scale) if name.startswith("pege") else (leaf,)
        backward[name] = lambda y=y, inputs=inputs: torch.autograd.grad(y, inputs, grad, retain_graph=True)
    rows = []
    for part, calls in (("forward", forward), ("backward", backward)):
        times = interleaved(calls, repeats, time.perf_counter)
        rows += [
            {"pass": part, "what": name, "ms": 1e3 * seconds, "over copy": seconds / times["copy"]}
            for name, seconds in times.items()
        ]
    return rows


def step_of(model: nn.Module, x: Tensor, compiled: bool) -> Callable[[], object]:
    model.train()
    run = torch.compile(model, fullgraph=True) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    target = torch.randint(10, (x.shape[0],))

    def step() -> None:
        F.cross_entropy(run(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for backward, each storage once, parameters left out."""
    owned = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]} | {x.untyped_storage().data_ptr()}
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        alive = model(x)  # while the graph lives no storage is used twice
    assert alive is not None
    return sum(kept.values())


def training_step(name: str, make: Callable[[], nn.Module], x: Tensor, bits: str, repeats: int) -> list[dict[str, Any]]:
    def prepared(rate: float | None) -> nn.Module:
        torch.manual_seed(0)
        gm = pege_fx.prepare(make(), QuantPolicy.parse(bits, first=None, last=None), (x[:8],))
        if rate is not None:
            PEGEScheduler(gm, 10, Constant(rate), Constant(1e-7), Constant(1e-9))
        return gm

    rows = []
    for compiled in (False, True):
        models = {"float": make(), f"{bits} p=0.5": prepared(0.5), f"{bits} p=1": prepared(None)}
        kept = {label: saved_bytes(model.train(), x) for label, model in models.items()}
        times = interleaved({k: step_of(m, x, compiled) for k, m in models.items()}, repeats, time.perf_counter)
        for label in models:
            rows.append(
                {
                    "model": name,
                    "what": label,
                    "compiled": compiled,
                    "ms": 1e3 * times[label],
                    "over float": times[label] / times["float"],
                    "saved over float": kept[label] / kept["float"],
                }
            )
    return rows


def prepare_time(repeats: int) -> list[dict[str, Any]]:
    rows = []
    for name in ("resnet18", "mobilenet_v3_large", "efficientnet_b0", "swin_t", "vit_b_16"):
        model = torchvision.models.get_model(name, weights=None)
        calls: dict[str, Callable[[], object]] = {
            "trace": lambda model=model: torch.fx.symbolic_trace(model),
            "prepare": lambda model=model: pege_fx.prepare(model, "W4A4"),
        }
        times = interleaved(calls, repeats, time.process_time)
        ratio = times["prepare"] / times["trace"]
        rows.append(
            {"model": name, "trace ms": 1e3 * times["trace"], "prepare ms": 1e3 * times["prepare"], "over trace": ratio}
        )
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu.json"))
    parser.add_argument("--repeats", type=int, default=11)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "device": f"one thread of {platform.machine()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "pege_fx": pege_fx.__version__,
        "repeats": args.repeats,
    }
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "kernel, 2 M elements": lambda: kernel(2_000_000, args.repeats),
        "step, ResNet-20 at 128x3x32x32": lambda: training_step(
            "ResNet-20", lambda: ResNet20(10), torch.randn(128, 3, 32, 32), "W2A2", args.repeats
        ),
        "step, resnet18 at 32x3x64x64": lambda: training_step(
            "resnet18", lambda: torchvision.models.resnet18(num_classes=10), torch.randn(32, 3, 64, 64), "W4A4", args.repeats
        ),
        "prepare": lambda: prepare_time(args.repeats),
    }
    for title, measure in parts.items():
        result[title] = measure()
        show(title, result[title])
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
