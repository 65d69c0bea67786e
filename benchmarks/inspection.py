"""CPU seconds of ``explain``, ``summary`` (table printed) and ``diff`` on vit_b_16 and on a graph of 10,000 nodes.

python benchmarks/inspection.py [--output benchmarks/results/inspection.json]; one thread, of a machine that may be shared.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import pege_fx


class Block(nn.Module):
    """Five nodes, one of them a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)) + x) * 0.5


def best(call: Callable[[], Any], repeats: int = 1) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def measure(model: nn.Module, x: Tensor) -> dict[str, float]:
    gm = pege_fx.prepare(model, "W4A4", (x,))
    return {
        "nodes traced": len(torch.fx.symbolic_trace(model).graph.nodes),
        "nodes prepared": len(gm.graph.nodes),
        "explain": best(lambda: str(pege_fx.explain(model, "W4A4", (x,)))),
        "explain without example_inputs": best(lambda: str(pege_fx.explain(model, "W4A4"))),
        "summary": best(lambda: str(pege_fx.summary(gm))),
        "diff": best(lambda: str(pege_fx.diff(gm, gm))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    output = parser.parse_args().output
    torch.set_num_threads(1)
    results: dict[str, Any] = {"machine": f"{platform.machine()}, one thread, CPU seconds", "torch": torch.__version__}
    results["vit_b_16"] = measure(torchvision.models.vit_b_16().eval(), torch.randn(1, 3, 224, 224))
    results["10,000 nodes"] = measure(nn.Sequential(*[Block() for _ in range(2000)]).eval(), torch.randn(1, 4, 4, 4))
    text = json.dumps(results, indent=2)
    print(text)
    if output is not None:
        output.write_text(text + "\n")


if __name__ == "__main__":
    main()
