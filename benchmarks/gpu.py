"""Kernel and training step on a GPU, as ratios in one process: python benchmarks/gpu.py --output results.json

The kernel's floor is the bytes that have to move: forward reads x and writes y; backward reads g, x, y and writes dx.
It is held against the card's own copy bandwidth, measured here. The training step (ResNet-20, batch 256, bf16,
channels_last) is held against the float model's, both compiled and both eager, interleaved.
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pege_fx
from pege_fx import Constant, PEGEScheduler, QuantPolicy, QuantSpec, Rule, functional

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from cifar10 import ResNet20

REPEATS = 30


def interleaved(calls: dict[str, Callable[[], object]], repeats: int = REPEATS, inner: int = 1) -> dict[str, float]:
    """Median seconds of each call, measured in turn with device events."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 5):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(inner):
                call()
            end.record()
            end.synchronize()
            if repeat >= 5:
                times[name].append(start.elapsed_time(end) / 1e3 / inner)
    return {name: statistics.median(values) for name, values in times.items()}


def kernel(dtype: torch.dtype, elements: int = 64 * 2**20) -> list[dict[str, object]]:
    """Forward and backward of the fused kernel, per tensor, against a copy of as many bytes."""
    x = torch.randn(elements, device="cuda", dtype=dtype)
    grad = torch.randn_like(x)
    scale = torch.tensor(0.7, device="cuda", requires_grad=True)
    key, strength = torch.tensor(7, dtype=torch.int32, device="cuda"), torch.tensor(1e-6, device="cuda")
    rows: list[dict[str, object]] = []
    target = torch.empty_like(x)
    copy = interleaved({"copy": lambda: target.copy_(x)}, inner=5)["copy"]
    size = x.element_size() * elements
    bandwidth = 2 * size / copy
    for rate in (0.5, None):
        p = None if rate is None else torch.tensor(rate, device="cuda")

        def run(a: Tensor, p: Tensor | None = p) -> Tensor:
            return functional.fake_quantize(
                a, scale, QuantSpec(bits=2), rate=p, key=None if p is None else key, strength=strength, scale_gradient=1e-3
            )

        compiled = torch.compile(run, fullgraph=True)
        leaf = x.clone().requires_grad_()
        y = compiled(leaf)

        def backward(leaf: Tensor = leaf, y: Tensor = y) -> object:
            return torch.autograd.grad(y, (leaf, scale), grad, retain_graph=True)

        times = interleaved({"forward": lambda: compiled(leaf), "backward": backward}, inner=5)  # noqa: B023
        for name, moved in (("forward", 2), ("backward", 4)):
            rows.append(
                {
                    "pass": name,
                    "p": 1.0 if rate is None else rate,
                    "dtype": str(dtype).removeprefix("torch."),
                    "elements": elements,
                    "ms": times[name] * 1e3,
                    "over_copy": times[name] / copy,
                    "share_of_copy_bandwidth": moved * size / times[name] / bandwidth,
                    "copy_TB_per_s": bandwidth / 1e12,
                }
            )
    return rows


def training_step(model: nn.Module, compiled: bool, batch: int) -> Callable[[], object]:
    model = model.cuda().to(memory_format=torch.channels_last).train()
    run = torch.compile(model, fullgraph=True) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    x = torch.randn(batch, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)
    target = torch.randint(10, (batch,), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = F.cross_entropy(run(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def prepared(rate: float | None, recompute: bool = False) -> nn.Module:
    torch.manual_seed(0)
    policy = QuantPolicy((*QuantPolicy.parse("W2A2", first=None, last=None).rules, Rule(recompute=recompute)))
    gm = pege_fx.prepare(ResNet20(10), policy, (torch.randn(8, 3, 32, 32),))
    if rate is not None:
        PEGEScheduler(gm, 10, Constant(rate), Constant(1e-7), Constant(1e-9))
    return gm


def peak(step: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def steps(batch: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for compiled in (True, False):
        calls = {
            "float": training_step(ResNet20(10), compiled, batch),
            "W2A2 p=0.5": training_step(prepared(0.5), compiled, batch),
            "W2A2 p=1": training_step(prepared(None), compiled, batch),
            "W2A2 p=0.5 recompute": training_step(prepared(0.5, recompute=True), compiled, batch),
            "W2A2 p=1 recompute": training_step(prepared(None, recompute=True), compiled, batch),
        }
        for call in calls.values():
            for _ in range(5):
                call()
        times = interleaved(calls, inner=3)
        memory = {name: peak(call) for name, call in calls.items()}
        for name in calls:
            rows.append(
                {
                    "model": name,
                    "compiled": compiled,
                    "batch": batch,
                    "ms": times[name] * 1e3,
                    "over_float": times[name] / times["float"],
                    "peak_bytes": memory[name],
                    "peak_over_float": memory[name] / memory["float"],
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[256, 1024])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a CUDA device, and torch sees none.")
    result: dict[str, object] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "pege_fx": pege_fx.__version__,
        "kernel": [row for dtype in (torch.float32, torch.bfloat16) for row in kernel(dtype)],
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1))
    result["step"] = [row for batch in arguments.batch_sizes for row in steps(batch)]
    arguments.output.write_text(json.dumps(result, indent=1))
    for part in ("kernel", "step"):
        for row in result[part]:  # type: ignore[attr-defined]
            print("  ".join(f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))


if __name__ == "__main__":
    main()
