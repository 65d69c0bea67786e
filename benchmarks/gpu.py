"""Kernel and training step on a GPU, as ratios in one process: python benchmarks/gpu.py --output results.json

The kernel's floor is the bytes that have to move: forward reads x and writes y; backward reads g, x, y and writes dx.
It is held against the card's own copy bandwidth, measured here: compiled with the sizes it has, as a whole-model compile
does it, and as eager mode runs it ("local"): by the kernels written by hand, where Triton is installed. The training step
(ResNet-20, bf16, channels_last) is held against the float model's, interleaved: compiled and replayed as a CUDA graph (what
the device has to do), compiled and launched by Python, and eager.
"""

import argparse
import functools
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pege_fx
from pege_fx import Constant, PEGEScheduler, QuantPolicy, QuantSpec, Rule, functional

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from cifar10 import Recorded, ResNet20

REPEATS = 30
WAYS = ("graph", "compiled", "eager")  # of running a step


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


def replayed(call: Callable[[Tensor], object]) -> Callable[[], object]:
    """The call as a CUDA graph: what Python needs to launch it does not count."""
    nothing = torch.zeros((), device="cuda")
    recorded = Recorded(call, wanted=True)
    for _ in range(4):
        recorded(nothing)
    return lambda: recorded(nothing)


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

        leaf, gradients = x.clone().requires_grad_(), []
        calls: dict[str, Callable[[], object]] = {}
        for how, function in (("compiled", torch.compile(run, fullgraph=True)), ("local", run)):
            y = function(leaf)
            gradients.append(torch.autograd.grad(y, (leaf, scale), grad, retain_graph=True))
            calls[f"{how} forward"] = replayed(lambda _, function=function: function(leaf))  # noqa: B023
            calls[f"{how} backward"] = replayed(
                lambda _, y=y: torch.autograd.grad(y, (leaf, scale), grad, retain_graph=True)  # noqa: B023
            )
        torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-2)
        del gradients
        times = interleaved(calls, inner=5)
        for name in calls:
            moved = 2 if name.endswith("forward") else 4
            rows.append(
                {
                    "kernel": name,
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


def training_step(model: nn.Module, how: str, batch: int) -> Callable[[], object]:
    model = model.cuda().to(memory_format=torch.channels_last).train()
    run = model if how == "eager" else torch.compile(model, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    x = torch.randn(batch, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)
    target = torch.randint(10, (batch,), device="cuda")

    def step(target: Tensor) -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = F.cross_entropy(run(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    recorded = Recorded(step, wanted=how == "graph")
    return lambda: recorded(target)


def prepared(rate: float, recompute: bool = False) -> nn.Module:
    torch.manual_seed(0)
    policy = QuantPolicy((*QuantPolicy.parse("W2A2", first=None, last=None).rules, Rule(recompute=recompute)))
    gm = pege_fx.prepare(ResNet20(10), policy, (torch.randn(8, 3, 32, 32),))
    PEGEScheduler(gm, 10, Constant(rate), Constant(1e-7), Constant(1e-9))
    return gm


def peak(step: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def steps(how: str, batch: int) -> list[dict[str, object]]:
    calls = {
        "float": training_step(ResNet20(10), how, batch),
        "W2A2 p=0.5": training_step(prepared(0.5), how, batch),
        "W2A2 p=1": training_step(prepared(1.0), how, batch),
    }
    if how != "graph":
        calls["W2A2 p=0.5 recompute"] = training_step(prepared(0.5, recompute=True), how, batch)
    for call in calls.values():
        for _ in range(5):
            call()
    times = interleaved(calls, inner=3)
    memory = {} if how == "graph" else {name: peak(call) for name, call in calls.items()}
    return [
        {"model": name, "how": how, "batch": batch, "ms": times[name] * 1e3, "over_float": times[name] / times["float"]}
        | ({"peak_bytes": memory[name], "peak_over_float": memory[name] / memory["float"]} if memory else {})
        for name in calls
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--part", nargs="+", choices=("kernel", *WAYS), default=("kernel", *WAYS), help="default: all of them")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a CUDA device, and torch sees none.")
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "pege_fx": pege_fx.__version__,
    }
    if arguments.output.exists():  # the parts that are not measured now stay, if they come from such a machine
        before = json.loads(arguments.output.read_text())
        if {name: before.get(name) for name in result} != result:
            raise SystemExit(f"{arguments.output} comes from another machine or version: give another --output, or delete it.")
        result["kernel"] = [] if "kernel" in arguments.part else before.get("kernel", [])
        result["step"] = [row for row in before.get("step", []) if row["how"] not in arguments.part]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    dtypes = (torch.float32, torch.bfloat16) if "kernel" in arguments.part else ()
    parts: list[tuple[str, Callable[[], list[dict[str, object]]]]] = [
        *(("kernel", functools.partial(kernel, dtype)) for dtype in dtypes),
        *(("step", functools.partial(steps, how, arguments.batch_size)) for how in WAYS if how in arguments.part),
    ]
    torch.backends.cudnn.benchmark = True
    with torch.cuda.stream(torch.cuda.Stream()):  # CUDA graphs are recorded on one that is not the default
        for part, measure in parts:
            rows = measure()
            result[part] = [*result.get(part, []), *rows]
            arguments.output.write_text(json.dumps(result, indent=1))  # what is measured is kept, whatever comes
            for row in rows:
                print("  ".join(f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()
