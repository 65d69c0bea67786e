"""Digits in two bits: a small residual network, float first, then W2A2 with STE, EWGS and PEGE from it.

    make demo                                   # or: python examples/quickstart.py --output runs/quickstart

Data: scikit-learn's 1,797 digits, which come with the package; 540 of them are the test set. Measured on two cores of a shared
x86-64 machine, torch 2.15, nothing else running, 3 seeds, two threads: 32 s (53 s of CPU time). Test accuracy in %, after the
last epoch, mean ± standard deviation: float 99.01 ± 0.28, STE 98.77 ± 0.28, EWGS 98.27 ± 0.70, PEGE 98.46 ± 0.53. With one
thread (27 s), where sums round differently: 99.32 ± 0.47, 98.64 ± 0.60, 98.46 ± 0.28, 98.40 ± 0.57. The estimators differ by
no more than about one standard deviation: the demo shows that the library works, not which of them is best.

All three get the same float models, epochs and learning rates. Those rates were chosen on a validation split of the training
images (8 pairs, 5 seeds, best mean of the three methods). EWGS keeps its default δ. PEGE's curves were set beforehand (p
reaches 1 at half of training, λ as in an ancestor of the paper's code); on the validation split λ = 0, larger λ and growing
masks made no difference beyond the spread. An earlier setting (Adam 3e-3, 30 epochs) had been looked at on the test images.

It computes in one thread, or in as many as --threads says. On a machine that is busy with other work, two wait for each other
at every small operation, and took 460 s there.
"""

import argparse
import copy
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
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
from torch.fx import GraphModule

import pege_fx
from pege_fx import Exponential, LogReplacement, PEGEScheduler, QuantPolicy

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import MaxNLocator

ESTIMATORS = ("ste", "ewgs", "pege")
FLOAT = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}  # SGD
QUANTIZED = {"lr": 1e-2, "quantizer_lr": 1e-3, "weight_decay": 1e-4}  # Adam, the same for all three
BATCH, SPLIT_SEED, TEST_SHARE = 64, 0, 0.3
SMALLEST_SUBSET = 100  # ten classes, each in both parts


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
        parts = train_test_split(images, labels, test_size=TEST_SHARE, stratify=labels, random_state=SPLIT_SEED)
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
    model: nn.Module,
    data: Data,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    tick: Callable[[], None],
    scheduler: PEGEScheduler | None = None,
) -> list[dict[str, float]]:
    """An ordinary loop. Returns for each epoch: p and λ in it, the discretization error at its end, accuracy after it."""
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    history = []
    for _ in range(epochs):
        model.train()
        row = {"p": 1.0, "weight_lambda": 0.0, "activation_lambda": 0.0}
        if scheduler is not None:
            row = dict(zip(row, (scheduler.rate, *scheduler.lambdas), strict=True))
        batches = torch.randperm(len(data.y)).split(BATCH)
        for number, batch in enumerate(batches, 1):
            loss = F.cross_entropy(model(data.x[batch]), data.y[batch])
            if number == len(batches) and pege_fx.fake_quants(model):
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


def pege_scheduler(gm: GraphModule, epochs: int) -> PEGEScheduler:
    """p reaches 1 at half of training; λ grows to the end of it."""
    return PEGEScheduler(
        gm,
        total_steps=epochs,
        replacement=LogReplacement.reaching_one_at(max(epochs / 2, 1.5), start=0.2),
        weight_lambda=Exponential(1e-8, 1e-6, epochs),
        activation_lambda=Exponential(1e-8, 5e-8, epochs),
    )


def run_seed(seed: int, args: argparse.Namespace, data: Data, tick: Callable[[], None]) -> tuple[dict[str, Any], GraphModule]:
    """Float, then each estimator from it; returns what was measured, and the last prepared model."""
    torch.manual_seed(seed)
    model = Net()
    history = train(model, data, torch.optim.SGD(model.parameters(), **FLOAT), args.float_epochs, tick)
    runs: dict[str, Any] = {"float": {"history": history, "accuracy": history[-1]["accuracy"]}}
    for estimator in ESTIMATORS:
        torch.manual_seed(seed)
        policy = QuantPolicy.parse(args.bits, first=None, last=None, estimator=estimator)
        gm = pege_fx.prepare(copy.deepcopy(model).train(), policy, example_inputs=(data.x[:256],), seed=seed)
        scheduler = pege_scheduler(gm, args.epochs) if estimator == "pege" else None
        optimizer = torch.optim.Adam(pege_fx.parameter_groups(gm, **QUANTIZED), fused=True)
        history = train(gm, data, optimizer, args.epochs, tick, scheduler)
        deployed = pege_fx.convert(gm)
        size = pege_fx.size_report(deployed)
        with torch.no_grad():
            equal = torch.equal(deployed(data.test_x), gm.eval()(data.test_x))
        runs[estimator] = {
            "history": history,
            "accuracy": history[-1]["accuracy"],
            "converted": accuracy(deployed, data),
            "converted_equals_eval": equal,
            "float_bytes": size.float_bytes,
            "quantized_bytes": size.quantized_bytes,
        }
        if scheduler is not None:
            runs[estimator]["schedule"] = {
                name: repr(getattr(scheduler, name))
                for name in ("replacement", "weight_lambda", "activation_lambda", "refresh")
            }
    return runs, gm


def statistics(values: list[float]) -> dict[str, float]:
    return {"mean": mean(values), "standard_deviation": stdev(values) if len(values) > 1 else 0.0}


def spread(values: list[float]) -> str:
    found = statistics(values)
    side = f" ± {100 * found['standard_deviation']:.2f}" if len(values) > 1 else ""
    return f"{100 * found['mean']:.2f}{side}"


def table(results: list[dict[str, Any]], bits: str) -> Table:
    made = Table(title=f"Test accuracy in %, mean ± standard deviation, seeds: {len(results)}", title_justify="left")
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
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7.5), layout="constrained", sharex=True)
    (rate, lambdas), (error, test) = axes
    epochs = np.arange(1, len(results[0]["pege"]["history"]) + 1)
    marker = "." if len(epochs) <= 30 else ""
    for color, name in enumerate(ESTIMATORS):
        style = {"color": f"C{color}", "label": name.upper(), "marker": marker, "linestyle": ("--", ":", "-")[color]}
        rate.plot(epochs, curves(results, name, "p")[0], **style)
        for panel, key, factor in ((error, "error", 1.0), (test, "accuracy", 100.0)):
            values = factor * curves(results, name, key)
            middle, side = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0.0
            panel.plot(epochs, middle, **style)
            low, high = middle - side, np.minimum(middle + side, 100.0)
            panel.fill_between(epochs, low, high, color=f"C{color}", alpha=0.15, linewidth=0)
    for key, label, line in (("weight_lambda", "PEGE, weights", "-"), ("activation_lambda", "PEGE, activations", "-.")):
        lambdas.semilogy(epochs, curves(results, "pege", key)[0], line, color="C2", marker=marker, label=label)
    rate.set(title="Replacement rate p", ylabel="share of elements replaced", ylim=(0, 1.05))
    lambdas.set(title="λ (STE, EWGS: none)", ylabel="λ (absolute units, log scale)")
    error.set(title="Discretization error, mean over sites", ylabel=r"$\|x_c - y\|^2\; /\; \|x_c\|^2$", ylim=(0, None))
    test.set(title="Test accuracy, fully quantized", ylabel="accuracy in % (stretched towards 100)")
    test.axhline(100 * mean(run["float"]["accuracy"] for run in results), color="black", linewidth=1, label="float")
    test.set_yscale("function", functions=(lambda a: -np.log(102.0 - a), lambda v: 102.0 - np.exp(-v)))
    test.set(yticks=[0, 50, 80, 90, 95, 97, 98, 99, 100], ylim=(max(min(test.get_ylim()[0], 90.0), 0.0), 100.0))
    lambdas.margins(y=0.1)
    for panel in axes.flat:
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right")
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.tick_params(labelbottom=True)
    count = f"mean of {len(results)} seeds, band: ± standard deviation" if len(results) > 1 else "one seed"
    figure.get_layout_engine().set(w_pad=0.1)
    figure.suptitle(f"Digits, {bits}: {count}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder of training.png and results.json")
    parser.add_argument("--epochs", type=positive, default=15, help="of quantization-aware training (default: %(default)s)")
    parser.add_argument("--float-epochs", type=positive, default=15, help="before it (default: %(default)s)")
    parser.add_argument("--seeds", type=positive, default=3, help="how many (default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=1, help="that compute (default: %(default)s)")
    parser.add_argument("--subset", type=positive, help=f"use this many images, {SMALLEST_SUBSET} or more (default: all)")
    parser.add_argument("--bits", default="W2A2", help="of weights and activations (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.subset is not None and args.subset < SMALLEST_SUBSET:
        parser.error(f"--subset {args.subset} is too small: give {SMALLEST_SUBSET} or more")
    try:
        QuantPolicy.parse(args.bits)
        args.output.mkdir(parents=True, exist_ok=True)
    except (pege_fx.PegeError, OSError) as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    console, data = Console(highlight=False), Data(args.subset)
    wall, cpu = time.perf_counter(), time.process_time()
    results = []
    with Progress(console=console) as progress:
        total = args.seeds * (args.float_epochs + len(ESTIMATORS) * args.epochs)
        task = progress.add_task(f"float, then {args.bits} with {', '.join(map(str.upper, ESTIMATORS))}", total=total)
        for seed in range(args.seeds):
            runs, gm = run_seed(seed, args, data, lambda: progress.advance(task))
            results.append(runs)
    seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    print(pege_fx.summary(gm))
    console.print(table(results, args.bits))
    equal = all(runs[name]["converted_equals_eval"] for runs in results for name in ESTIMATORS)
    console.print(f"Converted models give {'the same outputs as' if equal else 'OTHER outputs than'} eval(), bit for bit.")
    last = results[-1]["pege"]
    console.print(f"Size: {pege_fx.SizeReport(last['float_bytes'], last['quantized_bytes'])}.")
    console.print(f"Training took {seconds['wall']:.0f} s, {seconds['cpu']:.0f} s of CPU time.")
    packages = ("torch", "numpy", "scikit-learn", "matplotlib")
    saved = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        | {"float_sgd": FLOAT, "quantized_adam": QUANTIZED, "batch": BATCH, "learning_rate_schedule": "cosine to 0 per epoch"},
        "data": {"train": len(data.y), "test": len(data.test_y), "split_seed": SPLIT_SEED},
        "versions": {"python": platform.python_version(), "pege_fx": pege_fx.__version__}
        | {package: version(package) for package in packages},
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()},
        "seconds": seconds,
        "accuracy": {name: statistics([runs[name]["accuracy"] for runs in results]) for name in ("float", *ESTIMATORS)},
        "seeds": results,
    }
    (args.output / "results.json").write_text(json.dumps(saved, indent=1))
    plot(results, args.bits, args.output / "training.png")
    console.print(f"Written to {args.output}: training.png, results.json", soft_wrap=True)
    return saved


if __name__ == "__main__":
    main()
