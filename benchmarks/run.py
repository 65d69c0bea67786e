"""Speed on this machine, as ratios in one process against a named baseline: make bench, or python benchmarks/run.py

One thread, medians of interleaved runs, CPU time: what else the machine does counts less than in wall time. Kernel: against a
copy of the same tensor. Training step (forward, backward, SGD) and evaluation: against the float model, eager and compiled,
next to other libraries where they are installed (extra ``bench``). Prepare: against ``torch.fx.symbolic_trace`` of the same
model; with two images of 224 pixels, what was captured is checked against the model or not. ``--only eager`` measures the parts
with that word in their title, and leaves the rest of the file as it is. "Memory kept" is a part once more, in a process whose
malloc hands nothing back to the system: without page faults, which come and go.
"""

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pege_fx
from pege_fx import Constant, PEGEScheduler, QuantPolicy, QuantSpec, Rule, functional

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from cifar10 import ResNet20
from libraries import others


class Cost(NamedTuple):
    """Medians of what a call took."""

    seconds: float  # of the processor; what follows says where
    user: float
    system: float
    faults: float  # pages of memory that the system had to find


def interleaved(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, Cost]:
    """What each call takes, measured in turn after two warm-up rounds."""
    costs: dict[str, list[Cost]] = {name: [] for name in calls}
    for repeat in range(repeats + 2):
        for name, call in calls.items():
            gc.collect()  # what an earlier call left behind is none of this one's time
            before, start = resource.getrusage(resource.RUSAGE_SELF), time.process_time()
            call()
            seconds, after = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF)
            if repeat >= 2:
                user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
                costs[name].append(Cost(seconds, user, system, after.ru_minflt - before.ru_minflt))
    return {name: Cost(*map(statistics.median, zip(*values, strict=True))) for name, values in costs.items()}


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
        times = interleaved(calls, repeats)
        rows += [
            {"pass": part, "what": name, "ms": 1e3 * cost.seconds, "over copy": cost.seconds / times["copy"].seconds}
            for name, cost in times.items()
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


@dataclass(frozen=True)
class Model:
    """A network to train, with a batch and a format."""

    name: str
    make: Callable[[], nn.Module]
    x: Tensor
    bits: str

    @property
    def title(self) -> str:
        return f"{self.name} at {'x'.join(map(str, self.x.shape))}"

    def prepared(self, rate: float | None, *rules: Rule, bits: str = "") -> nn.Module:
        torch.manual_seed(0)
        policy = QuantPolicy((*QuantPolicy.parse(bits or self.bits, first=None, last=None).rules, *rules))
        gm = pege_fx.prepare(self.make(), policy, (self.x[:8],))
        if rate is not None:
            PEGEScheduler(gm, 10, Constant(rate), Constant(1e-7), Constant(1e-9))
        return gm

    def variants(self) -> dict[str, nn.Module]:
        again = Rule(recompute=True)
        return {
            "float": self.make(),
            f"{self.bits} p=0.5": self.prepared(0.5),
            f"{self.bits} p=1": self.prepared(None),
            f"{self.bits} p=0.5 recompute": self.prepared(0.5, again),
            f"{self.bits} p=1 recompute": self.prepared(None, again),
        }


def training_step(model: Model, models: dict[str, nn.Module], compiled: bool, repeats: int) -> list[dict[str, Any]]:
    kept = {} if compiled else {label: saved_bytes(network.train(), model.x) for label, network in models.items()}
    times = interleaved({label: step_of(network, model.x, compiled) for label, network in models.items()}, repeats)
    return [
        {"model": model.name, "what": label, "ms": 1e3 * cost.seconds, "over float": cost.seconds / times["float"].seconds}
        | {"user ms": 1e3 * cost.user, "system ms": 1e3 * cost.system, "page faults": cost.faults}
        | ({"saved over float": kept[label] / kept["float"]} if kept else {})
        for label, cost in times.items()
    ]


def with_memory_kept(part: str, repeats: int) -> list[dict[str, Any]]:
    """Measure a part in a process whose malloc hands no memory back to the system, and so has no page faults to pay for."""
    keep = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "cpu.json"
        command = [sys.executable, __file__, "--only", part, "--repeats", str(repeats), "--output", str(output)]
        subprocess.run(command, env=os.environ | keep, stdout=subprocess.DEVNULL, check=True)
        rows: list[dict[str, Any]] = json.loads(output.read_text())[part]
    return rows


def evaluation(repeats: int) -> list[dict[str, Any]]:
    """A forward pass in ``eval()`` and without gradients."""
    network = torchvision.models.resnet18(num_classes=10)
    gm = pege_fx.prepare(network, "W4A4", (torch.randn(2, 3, 64, 64),))
    rows = []
    for shape in ((1, 3, 64, 64), (1, 3, 224, 224), (32, 3, 64, 64)):
        x = torch.randn(shape)
        calls: dict[str, Callable[[], object]] = {
            name: lambda model=model, x=x: model(x) for name, model in (("float", network.eval()), ("W4A4", gm.eval()))
        }
        with torch.no_grad():
            times = interleaved(calls, repeats)
        label = "x".join(map(str, shape))
        ours, theirs = times["W4A4"].seconds, times["float"].seconds
        rows.append({"input": label, "ms": 1e3 * ours, "over float": ours / theirs})
    return rows


def prepare_time(repeats: int) -> list[dict[str, Any]]:
    rows = []
    for name in ("resnet18", "mobilenet_v3_large", "efficientnet_b0", "swin_t", "vit_b_16"):
        model = torchvision.models.get_model(name, weights=None)
        x = torch.randn(2, 3, 224, 224)
        calls: dict[str, Callable[[], object]] = {
            "trace": lambda model=model: torch.fx.symbolic_trace(model),
            "prepare": lambda model=model: pege_fx.prepare(model, "W4A4"),
            "shared": lambda model=model: pege_fx.prepare(model, "W4A4", share_parameters=True),
            "unchecked": lambda model=model, x=x: pege_fx.prepare(model, "W4A4", (x,), check=False),
            "checked": lambda model=model, x=x: pege_fx.prepare(model, "W4A4", (x,)),
        }
        times = {call: cost.seconds for call, cost in interleaved(calls, repeats).items()}
        rows.append(
            {"model": name}
            | {f"{call} ms": 1e3 * seconds for call, seconds in times.items()}
            | {"over trace": times["prepare"] / times["trace"], "shared over trace": times["shared"] / times["trace"]}
            | {"checked over unchecked": times["checked"] / times["unchecked"]}
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
    parser.add_argument("--only", default="", help="measure the parts with this word in their title")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = [
        Model("ResNet-20", lambda: ResNet20(10), torch.randn(128, 3, 32, 32), "W2A2"),
        Model("resnet18", lambda: torchvision.models.resnet18(num_classes=10), torch.randn(32, 3, 64, 64), "W4A4"),
    ]
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {"kernel, 2 M elements": lambda: kernel(2_000_000, args.repeats)}
    parts["memory kept, kernels"] = lambda: with_memory_kept("kernel, 2 M elements", args.repeats)
    for m in models:
        parts[f"eager step, {m.title}"] = lambda m=m: training_step(m, m.variants(), False, args.repeats)
        parts[f"compiled step, {m.title}"] = lambda m=m: training_step(m, m.variants(), True, args.repeats)
        for how in ("eager", "compiled"):
            parts[f"memory kept, {how}, {m.title}"] = lambda m=m, how=how: with_memory_kept(
                f"{how} step, {m.title}", args.repeats
            )
        parts[f"libraries, {m.title}, W4A4"] = lambda m=m: training_step(m, next_to_others(m), False, args.repeats)
    parts["evaluation, resnet18"] = lambda: evaluation(args.repeats)
    parts["prepare"] = lambda: prepare_time(args.repeats)
    chosen = {title: measure for title, measure in parts.items() if args.only in title}
    if not chosen:
        parser.error(f"no part has {args.only!r} in its title; they are: {'; '.join(parts)}")
    result: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    result["pege_fx"] = pege_fx.__version__
    result.setdefault("measured", {})
    for title, measure in chosen.items():
        result[title] = measure()
        result["measured"][title] = {
            "device": f"one thread of {platform.machine()}",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "clock": "CPU time",
            "repeats": args.repeats,
        }
        show(title, result[title])
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1))


def next_to_others(model: Model) -> dict[str, nn.Module]:
    ours = {
        "float": model.make(),
        "pege_fx p=0.5": model.prepared(0.5, bits="W4A4"),
        "pege_fx p=1": model.prepared(None, bits="W4A4"),
    }
    ours["pege_fx p=1 recompute"] = model.prepared(None, Rule(recompute=True), bits="W4A4")
    return ours | others(model.make, model.x)


if __name__ == "__main__":
    main()
