"""CPU seconds of what people read, on vit_b_16, resnet50 and a graph of 10,000 nodes; tables are printed, files written.

python benchmarks/inspection.py [--output benchmarks/results/inspection.json]; one thread, of a machine that may be shared.
"""

import argparse
import json
import os
import platform
import shutil
import tempfile
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


def seconds() -> float:
    """CPU time of this process and of those that it waited for, as Graphviz."""
    return sum(os.times()[:4])


def best(call: Callable[[], Any], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        start = seconds()
        call()
        times.append(seconds() - start)
    return round(min(times), 2)


def measure(model: nn.Module, x: Tensor) -> dict[str, float]:
    gm = pege_fx.prepare(model, "W4A4", (x,))
    return {
        "nodes traced": len(torch.fx.symbolic_trace(model).graph.nodes),
        "nodes prepared": len(gm.graph.nodes),
        "torch.fx.symbolic_trace": best(lambda: torch.fx.symbolic_trace(model)),
        "explain": best(lambda: str(pege_fx.explain(model, "W4A4", (x,)))),
        "explain without example_inputs": best(lambda: str(pege_fx.explain(model, "W4A4"))),
        "summary": best(lambda: str(pege_fx.summary(gm))),
        "diff": best(lambda: str(pege_fx.diff(gm, gm))),
    } | files(gm, x)


def files(gm: torch.fx.GraphModule, x: Tensor) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        picture, page = Path(folder, "graph.svg" if shutil.which("dot") else "graph.dot"), Path(folder, "report.html")
        return {
            "draw": best(lambda: pege_fx.draw(gm, picture)),
            "report": best(lambda: pege_fx.report(gm, page)),
            "report with histograms": best(lambda: pege_fx.report(gm, page, batches=[x])),
            "MB of the report with histograms": page.stat().st_size / 1e6,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    output = parser.parse_args().output
    torch.set_num_threads(1)
    results: dict[str, Any] = {"machine": f"{platform.machine()}, one thread, CPU seconds", "torch": torch.__version__}
    with pege_fx.kernels.eager_kernels():  # no compiler's time in the first histogram
        for name in ("vit_b_16", "resnet50"):
            results[name] = measure(torchvision.models.get_model(name).eval(), torch.randn(1, 3, 224, 224))
        results["10,000 nodes"] = measure(nn.Sequential(*[Block() for _ in range(2000)]).eval(), torch.randn(1, 4, 4, 4))
    text = json.dumps(results, indent=2)
    print(text)
    if output is not None:
        output.write_text(text + "\n")


if __name__ == "__main__":
    main()
