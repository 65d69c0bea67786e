"""How ``prepare`` grows with the number of nodes: CPU seconds, and the slope in a log-log plot (1 is linear).

python benchmarks/growth.py [--output benchmarks/results/growth.json]; one thread. Goal: a slope of at most 1.1.
"""

import argparse
import json
import math
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace

import pege_fx

NODES = (1_000, 3_000, 10_000, 30_000, 50_000)


class Block(nn.Module):
    """Five nodes, one of them a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)) + x) * 0.5


def seconds(model: nn.Module, repeats: int) -> dict[str, float]:
    """Median CPU seconds of tracing and of preparing, in turn."""
    calls = {"trace": lambda: symbolic_trace(model), "prepare": lambda: pege_fx.prepare(model, "W4A4")}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def slope(rows: list[dict[str, Any]], name: str) -> float:
    """Least squares of log seconds over log nodes."""
    nodes, spent = ([math.log(row[key]) for row in rows] for key in ("nodes", name))
    return statistics.linear_regression(nodes, spent).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/growth.json"))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for nodes in NODES:
        rows.append({"nodes": nodes} | seconds(nn.Sequential(*(Block() for _ in range(nodes // 5))), args.repeats))
        print(rows[-1], flush=True)
    slopes = {name: slope(rows, name) for name in ("trace", "prepare")}
    print("slopes:", slopes)
    result = {"device": f"one thread of {platform.machine()}", "torch": torch.__version__, "python": platform.python_version()}
    result |= {"pege_fx": pege_fx.__version__, "repeats": args.repeats, "rows": rows, "slopes": slopes}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
