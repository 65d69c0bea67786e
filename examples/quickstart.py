"""Digits in two bits: a small residual network, float first, then W2A2 with STE, EWGS and PEGE from it.

    make demo                                   # or: python examples/quickstart.py --output runs/quickstart

Data: scikit-learn's 1,797 digits, which come with the package. All three estimators get the same float models, the same
epochs and the same learning rates; only PEGE has a schedule, with its default curves. Nothing was tuned on the test set.
Measured on two cores of a shared x86-64 machine, torch 2.15, 3 seeds, 70 s: float 99.20 ± 0.28 %, STE 97.72 ± 0.39 %, EWGS
98.77 ± 0.60 %, PEGE 97.90 ± 0.75 %. With 540 test images and 3 seeds these differences are within the spread: the demo
shows that the library works, not which estimator is best.
"""

import argparse
import copy
import json
import platform
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import pege_fx
from pege_fx import PEGEScheduler, QuantPolicy

matplotlib.use("Agg")
from matplotlib import pyplot

ESTIMATORS = ("ste", "ewgs", "pege")


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.shortcut = nn.Conv2d(before, after, 1, stride) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Net(nn.Module):
    """A stem, three blocks, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2), Block(16, 16, 1))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn(self.stem(x))))
        return self.fc(x.mean((2, 3)))


class Data:
    """Training and test images (N, 1, 8, 8) in [0, 1], always split the same way."""

    def __init__(self, subset: int | None) -> None:
        digits = load_digits()
        images, labels = digits.images[:subset, None] / 16, digits.target[:subset]
        parts = train_test_split(images, labels, test_size=0.3, stratify=labels, random_state=0)
        self.x, self.test_x = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
        self.y, self.test_y = (torch.tensor(part) for part in parts[2:])


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    model.eval()
    return float((model(data.test_x).argmax(1) == data.test_y).float().mean())


def discretization_error(gm: nn.Module) -> float:
    """Mean over sites of ||x_c - y||^2 / ||x_c||^2, of the last forward."""
    seen = [pair for fq in pege_fx.fake_quants(gm).values() if (pair := fq.last_forward()) is not None]
    return mean(float((x - y).detach().square().sum() / x.detach().square().sum()) for x, y in seen)


def train(
    model: nn.Module, data: Data, optimizer: torch.optim.Optimizer, epochs: int, scheduler: PEGEScheduler | None, tick: Any
) -> list[dict[str, float]]:
    """An ordinary loop; returns accuracy, and where p, λ and the discretization error stood, by epoch."""
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(epochs, 1))
    history = []
    for _ in range(epochs):
        model.train()
        row = {"p": 1.0, "weight_lambda": 0.0, "activation_lambda": 0.0}
        if scheduler is not None:
            row = dict(zip(row, (scheduler.rate, *scheduler.lambdas), strict=True))
        for batch in torch.randperm(len(data.y)).split(64):
            loss = F.cross_entropy(model(data.x[batch]), data.y[batch])
            if pege_fx.fake_quants(model) and batch.numel() and "error" not in row:
                row["error"] = discretization_error(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        cosine.step()
        if scheduler is not None:
            scheduler.step()
        history.append(row | {"accuracy": accuracy(model, data)})
        tick()
    return history


def run_seed(seed: int, args: argparse.Namespace, data: Data, tick: Any) -> tuple[dict[str, Any], Any]:
    """Float, then each estimator from it."""
    torch.manual_seed(seed)
    model = Net()
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    runs: dict[str, Any] = {"float": {"history": train(model, data, sgd, args.float_epochs, None, tick)}}
    runs["float"]["accuracy"] = accuracy(model, data)
    gm = None
    for estimator in ESTIMATORS:
        torch.manual_seed(seed)
        policy = QuantPolicy.parse(args.bits, first=None, last=None, estimator=estimator)
        gm = pege_fx.prepare(copy.deepcopy(model).train(), policy, example_inputs=(data.x[:256],), seed=seed)
        scheduler = PEGEScheduler(gm, total_steps=args.epochs) if estimator == "pege" and args.epochs else None
        adam = torch.optim.Adam(pege_fx.parameter_groups(gm, lr=3e-3, quantizer_lr=3e-4))
        history = train(gm, data, adam, args.epochs, scheduler, tick)
        deployed = pege_fx.convert(gm)
        size = pege_fx.size_report(deployed)
        runs[estimator] = {
            "history": history,
            "accuracy": accuracy(gm, data),
            "converted": accuracy(deployed, data),
            "float_bytes": size.float_bytes,
            "quantized_bytes": size.quantized_bytes,
        }
    return runs, gm


def spread(values: list[float]) -> str:
    return f"{100 * mean(values):.2f}" + (f" ± {100 * stdev(values):.2f}" if len(values) > 1 else "")


def table(results: list[dict[str, Any]], bits: str) -> Table:
    made = Table(title=f"Test accuracy in %, {len(results)} seed(s)", title_justify="left")
    for column in ("model", "trained", "converted", "weights and scales"):
        made.add_column(column)
    size = results[0]["ste"]
    made.add_row("float", spread([run["float"]["accuracy"] for run in results]), "-", f"{size['float_bytes'] / 1024:.1f} KiB")
    for name in ESTIMATORS:
        made.add_row(
            f"{bits} {name.upper()}",
            spread([run[name]["accuracy"] for run in results]),
            spread([run[name]["converted"] for run in results]),
            f"{results[0][name]['quantized_bytes'] / 1024:.1f} KiB",
        )
    return made


def curves(results: list[dict[str, Any]], name: str, key: str) -> np.ndarray:
    return np.array([[row.get(key, np.nan) for row in run[name]["history"]] for run in results])


def plot(results: list[dict[str, Any]], bits: str, path: Path) -> None:
    """p, λ, discretization error and accuracy over training, as four panels."""
    figure, ((rate, lambdas), (error, test)) = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained", sharex=True)
    epochs = np.arange(len(results[0]["pege"]["history"]))
    rate.plot(epochs, curves(results, "pege", "p")[0], color="C2")
    rate.set(title="Replacement rate p (PEGE)", ylabel="p", ylim=(0, 1.05))
    for key, label, style in (("weight_lambda", "weights", "-"), ("activation_lambda", "activations", "--")):
        lambdas.semilogy(epochs, curves(results, "pege", key)[0], style, color="C2", label=label)
    lambdas.set(title="λ (PEGE), absolute units", ylabel="λ")
    lambdas.legend()
    for color, name in enumerate(ESTIMATORS):
        for axes, key, factor in ((error, "error", 1.0), (test, "accuracy", 100.0)):
            values = factor * curves(results, name, key)
            middle, side = values.mean(0), values.std(0)
            axes.plot(epochs, middle, color=f"C{color}", label=name.upper())
            axes.fill_between(epochs, middle - side, middle + side, color=f"C{color}", alpha=0.2, linewidth=0)
    error.set(title="Discretization error, mean over sites", ylabel=r"$\|x_c - y\|^2 / \|x_c\|^2$", xlabel="epoch")
    test.set(title=f"Test accuracy, {bits}, mean ± spread over seeds", ylabel="accuracy in %", xlabel="epoch")
    test.axhline(100 * mean(run["float"]["accuracy"] for run in results), color="black", linestyle=":", label="float")
    test.legend()
    error.legend()
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--epochs", type=int, default=30, help="of quantization-aware training")
    parser.add_argument("--float-epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--subset", type=int, help="use this many images")
    parser.add_argument("--bits", default="W2A2")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    console, started, data = Console(), time.perf_counter(), Data(args.subset)
    results = []
    with Progress(console=console) as progress:
        total = args.seeds * (args.float_epochs + len(ESTIMATORS) * args.epochs)
        task = progress.add_task(f"float, then {args.bits} with {', '.join(ESTIMATORS)}", total=total)
        for seed in range(args.seeds):
            runs, gm = run_seed(seed, args, data, lambda: progress.advance(task))
            results.append(runs)
    print(pege_fx.summary(gm))
    console.print(table(results, args.bits))
    seconds = time.perf_counter() - started
    last = results[-1]["pege"]
    saved = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "versions": {"torch": torch.__version__, "pege_fx": pege_fx.__version__, "python": platform.python_version()},
        "seconds": seconds,
        "seeds": results,
    }
    (args.output / "results.json").write_text(json.dumps(saved, indent=1))
    if args.epochs:
        plot(results, args.bits, args.output / "training.png")
    ratio = last["float_bytes"] / last["quantized_bytes"]
    console.print(f"The quantized model is {ratio:.1f} times smaller than the float one. {seconds:.0f} s in all.")
    console.print(f"Written to {args.output}: training.png, results.json", soft_wrap=True)
    return saved


if __name__ == "__main__":
    main()
