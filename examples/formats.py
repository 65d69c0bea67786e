"""One small network in eight number formats: accuracy over seeds, bytes, error of the weights, and a picture of the levels.

    python examples/formats.py --output runs/formats

Data: scikit-learn's 1,797 digits, which come with the package. Every format starts from the same float model of a seed and gets
the same epochs and learning rates; weights alone are quantized, but for "8da4w" and "MXFP4", whose inputs are, too. Three seeds
take a quarter of a minute on one core. Prints the table, and writes ``results.json`` and ``levels.png``.
"""

import argparse
import copy
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.fx import GraphModule

import pege_fx
from pege_fx import PEGEScheduler, QuantPolicy, Rule
from pege_fx.modules.measures import relative_error, squares

matplotlib.use("Agg")
from matplotlib import pyplot

WEIGHT = "hidden.weight"  # whose histogram is drawn
BATCH, HIDDEN = 64, 64


@dataclass(frozen=True)
class Format:
    """A row of the table: what weights and inputs are, by the names that rules take."""

    name: str
    weight: str
    input: str | None = None

    @property
    def policy(self) -> QuantPolicy:
        """The format for all three layers."""
        return QuantPolicy((Rule(weight=self.weight, input=self.input),))


FORMATS = (
    Format("int4, groups of 32", "int4-g32"),
    Format("8da4w, groups of 32", "int4-g32", "int8-token"),
    Format("LSQ, groups of 32", "4-g32"),
    Format("MXFP4, inputs too", "mxfp4", "mxfp4"),
    Format("NVFP4", "nvfp4"),
    Format("NF4, groups of 32", "nf4-g32"),
    Format("SEQ, 2 bits", "seq2"),
    Format("ternary", "ternary"),
)


class Net(nn.Module):
    """Three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.hidden, self.last = nn.Linear(64, HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.hidden(F.relu(self.first(x)))))


class Data:
    """Training and test images (N, 64) in [0, 1], always split the same way."""

    def __init__(self) -> None:
        digits = load_digits()
        parts = train_test_split(digits.data / 16, digits.target, test_size=0.3, stratify=digits.target, random_state=0)
        self.x, self.test_x = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
        self.y, self.test_y = (torch.tensor(part) for part in parts[2:])


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    model.eval()
    return float((model(data.test_x).argmax(1) == data.test_y).float().mean())


def train(model: nn.Module, data: Data, epochs: int, lr: float) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    steps = epochs * -(-len(data.y) // BATCH)
    scheduler = PEGEScheduler(model, steps) if isinstance(model, GraphModule) else None
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(data.y)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(data.x[batch]), data.y[batch]).backward()
            optimizer.step()
            cosine.step()
            if scheduler is not None:
                scheduler.step()


@torch.no_grad()
def weight_error(gm: GraphModule) -> float:
    """Mean over weights of ||w - w_q||^2 / ||w||^2."""
    sites = {name: fq for name, fq in pege_fx.fake_quants(gm).items() if fq.site.kind == "weight"}
    return mean(float(relative_error(squares(fq, gm.get_parameter(name.removesuffix("_fq"))))) for name, fq in sites.items())


def run(format_: Format, float_model: Net, data: Data, epochs: int) -> tuple[GraphModule, dict[str, float]]:
    gm = pege_fx.prepare(copy.deepcopy(float_model), format_.policy, (data.x[:BATCH],))
    train(gm, data, epochs, lr=1e-3)
    deployed = pege_fx.convert(gm)
    with torch.no_grad():
        equal = torch.equal(deployed(data.test_x), gm.eval()(data.test_x))
    size = pege_fx.size_report(deployed).quantized_bytes
    row = {"accuracy": accuracy(gm, data), "bytes": size, "error": weight_error(gm), "converted_equals_eval": equal}
    return gm, row


@torch.no_grad()
def draw_levels(models: dict[str, GraphModule], path: Path) -> None:
    """A trained weight's histogram in units of its scales, and how many elements are deployed as each level of the format."""
    figure, axes = pyplot.subplots(len(models) // 2, 2, figsize=(11, 2.1 * len(models) // 2), layout="constrained")
    for axis, (name, gm) in zip(axes.flat, models.items(), strict=True):
        weight, site = gm.get_parameter(WEIGHT), pege_fx.fake_quants(gm)[f"{WEIGHT}_fq"]
        levels, (scale, _) = site.evaluated(weight)
        place = (site.method.tiling.tiles(weight) / scale).flatten()
        lowest, highest = site.site.spec.number_format.reach
        reach = max(-lowest, highest) * 1.1
        axis.hist(place.numpy(), bins=150, range=(-reach, reach), color="#c9d3e6")
        values, counts = np.unique(levels.numpy(), return_counts=True)
        axis.vlines(values, 0, counts, color="#c0392b", linewidth=1.5)
        axis.plot(values, counts, "o", color="#c0392b", markersize=3)
        axis.set_title(f"{name}: {len(values)} of {len(site.site.spec.number_format.levels)} levels", fontsize=9)
        axis.set_xlim(-reach, reach)
    figure.suptitle("A trained weight in units of its scales (pale), and how many elements each level stands for (red)")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def table_of(results: dict[str, list[dict[str, float]]]) -> Table:
    table = Table(title="Digits, three linear layers")
    for column in ("format", "accuracy %", "bytes", "error of weights %"):
        table.add_column(column, justify="left" if column == "format" else "right")
    for name, rows in results.items():
        found = [100 * row["accuracy"] for row in rows]
        spread = f" ± {stdev(found):.2f}" if len(found) > 1 else ""
        error = f"{100 * mean(row['error'] for row in rows):.2f}" if "error" in rows[0] else ""
        table.add_row(name, f"{mean(found):.2f}{spread}", f"{rows[0]['bytes']:,.0f}", error)
    return table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/formats"), help="folder for results.json and levels.png")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20, help="of the float model; formats get half as many from it")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    data, results = Data(), {name: [] for name in ("float", *(f.name for f in FORMATS))}
    models: dict[str, GraphModule] = {}
    for seed in track(range(args.seeds), "seeds"):
        torch.manual_seed(seed)
        float_model = Net()
        train(float_model, data, args.epochs, lr=3e-3)
        size = sum(4 * parameter.numel() for parameter in float_model.parameters())
        results["float"].append({"accuracy": accuracy(float_model, data), "bytes": size})
        for format_ in FORMATS:
            torch.manual_seed(seed)
            models[format_.name], row = run(format_, float_model, data, max(args.epochs // 2, 1))
            results[format_.name].append(row)
    args.output.mkdir(parents=True, exist_ok=True)
    draw_levels(models, args.output / "levels.png")
    kept = {"torch": version("torch"), "seeds": args.seeds, "epochs": args.epochs, "results": results}
    (args.output / "results.json").write_text(json.dumps(kept, indent=1))
    Console().print(table_of(results))


if __name__ == "__main__":
    main()
