"""ResNet-20 on CIFAR-10 with two-bit weights and activations, trained with PEGE or another estimator.

    python examples/cifar10.py --data-dir cifar10-jpeg.tar.xz --output runs/pege
    python examples/cifar10.py --data-dir cifar10-jpeg.tar.xz --estimator ste --output runs/ste \
        --float-checkpoint 'runs/pege/seed{seed}/float.pt'
    python examples/cifar10.py --device cpu --subset 2000 --float-epochs 2 --epochs 2      # a first look on a CPU

The recipe is that of EWGS (Lee et al., CVPR 2021): first convolution and last linear layer in float; float model by SGD,
then quantization-aware training by Adam; learning rates fall to 0 along a cosine. Each seed has a folder with its
checkpoints and results.json. A run that was stopped goes on when the same command is given again.
"""

import argparse
import hashlib
import io
import json
import math
import os
import platform
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path, PurePosixPath
from statistics import mean, stdev
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import pege_fx
from pege_fx import PEGEScheduler, QuantPolicy
from pege_fx.curves import Constant, Curve, Exponential, LogReplacement

SIDE, PAD = 32, 4
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"}
# What may change between a run and its continuation.
INCIDENTAL = {"output", "device", "compile", "compile_mode", "time_limit", "cache", "download_dir", "match", "seed", "data_dir"}

Arrays: TypeAlias = dict[str, Any]


class UserError(Exception):
    """One line for the person at the keyboard: what is wrong, and the fix."""


# --- the network ---------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two convolutions and a shortcut without parameters: subsampled, missing channels zero (option A)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.stride, self.missing = stride, (after - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.missing:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.missing, self.missing))
        return F.relu(y + x)


class ResNet20(nn.Module):
    """Three stages of three blocks, 16, 32 and 64 channels."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        widths = [(16, 16, 1)] + [(16, 16, 1)] * 2 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
        self.blocks = nn.Sequential(*(Block(*width) for width in widths))
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


# --- the data ------------------------------------------------------------------------------------------------


def members(source: Path) -> Iterator[tuple[str, Path | bytes | None]]:
    """Yield name and content of every file of a folder or tar archive; None for a folder in it."""
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            yield path.relative_to(source).as_posix(), None if path.is_dir() else path
        return
    try:
        with tarfile.open(source) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isfile() else None
                yield member.name.removeprefix("./"), file.read() if file else None
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(
            f"{source} is no readable tar archive ({error}): give a folder or archive with train/ and test/."
        ) from error


def decode(name: str, content: Path | bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            image = image.convert("RGB")
            return np.asarray(image if image.size == (SIDE, SIDE) else image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{name} is no readable image ({error}): repair it or take it out.") from error


def read_images(source: Path) -> Arrays:
    """Decode an ImageFolder with train/ and test/, or a tar archive of one: uint8, (N, 32, 32, 3), other sizes resized."""
    found: dict[str, dict[str, list[tuple[str, Path | bytes]]]] = {"train": {}, "test": {}}
    for name, content in members(source):
        path = PurePosixPath(name)
        if path.parts[0] not in found or len(path.parts) < 2:
            continue
        if content is None and len(path.parts) == 2:
            found[path.parts[0]].setdefault(path.parts[1], [])
        elif content is not None and len(path.parts) > 2 and path.suffix.lower() in SUFFIXES:
            found[path.parts[0]].setdefault(path.parts[1], []).append((name, content))
    for split, folders in found.items():
        if not folders:
            raise UserError(
                f"{source} has no images in {split}/<class>/: give an ImageFolder with train/ and test/ subfolders."
            )
        for label, files in folders.items():
            if not files:
                raise UserError(f"{source}: class {split}/{label} has no images: add some, or remove the folder.")
    classes = sorted(found["train"])
    if classes != sorted(found["test"]):
        odd = sorted(set(classes) ^ set(found["test"]))
        raise UserError(f"{source}: train/ and test/ must hold the same classes; {', '.join(odd)} is in one of them only.")
    arrays: Arrays = {"classes": classes}
    for split, folders in found.items():
        files = [file for label in classes for file in folders[label]]
        images = np.empty((len(files), SIDE, SIDE, 3), np.uint8)

        def fill(start: int, files: list[tuple[str, Path | bytes]] = files, images: np.ndarray = images) -> None:
            for i in range(start, min(start + 256, len(files))):
                images[i] = decode(*files[i])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(fill, range(0, len(files), 256)))
        labels = [i for i, label in enumerate(classes) for _ in folders[label]]
        arrays |= {f"{split}_images": torch.from_numpy(images), f"{split}_labels": torch.tensor(labels)}
    return arrays


def load_data(args: argparse.Namespace) -> Arrays:
    """Return train_images, train_labels, test_images, test_labels as tensors, and the names of the classes."""
    if args.data_dir is None:
        from torchvision.datasets import CIFAR10

        try:
            sets = {split: CIFAR10(args.download_dir, train=split == "train", download=True) for split in ("train", "test")}
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"can not download CIFAR-10 ({error}): give --data-dir, an ImageFolder or its tar archive."
            ) from error
        arrays: Arrays = {"classes": sets["train"].classes}
        for split, data in sets.items():
            arrays |= {f"{split}_images": torch.from_numpy(data.data), f"{split}_labels": torch.tensor(data.targets)}
        return arrays
    source = Path(args.data_dir)
    if not source.exists():
        raise UserError(f"--data-dir {source} does not exist: give a folder with train/ and test/, or a tar archive of one.")
    if source.suffix == ".pt":
        return load(source)
    files = source.rglob("*") if source.is_dir() else [source]
    listed = sorted(f"{path} {(stat := path.stat()).st_size} {stat.st_mtime_ns}" for path in files)
    cache = Path(args.cache or args.output) / f"images-{hashlib.sha256(chr(10).join(listed).encode()).hexdigest()[:12]}.pt"
    if not cache.exists():
        save(read_images(source), cache)
    return load(cache)


class Images(nn.Module):
    """A data set on the device: uint8, padded once. Buffers, so that CUDA graphs read them in place."""

    images: Tensor
    labels: Tensor

    def __init__(self, images: Tensor, labels: Tensor, pad: int) -> None:
        super().__init__()
        self.pad = pad
        self.register_buffer("images", F.pad(images, (0, 0, pad, pad, pad, pad)))
        self.register_buffer("labels", labels)
        self.register_buffer("mean", 255 * torch.tensor(MEAN))
        self.register_buffer("std", 255 * torch.tensor(STD))
        self.register_buffer("pixels", torch.arange(SIDE))

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return an epoch: image, row and column of the crop, and whether it is flipped, (N, 4)."""
        count, device = len(self.labels), self.labels.device
        order = torch.randperm(count, generator=generator, device=device)
        crop = torch.randint(0, 2 * self.pad + 1, (2, count), generator=generator, device=device)
        flip = torch.randint(0, 2, (count,), generator=generator, device=device)
        return torch.stack([order, *crop, flip], 1)

    def forward(self, draw: Tensor) -> tuple[Tensor, Tensor]:
        """Return normalised images (B, 3, 32, 32) and labels: one gather selects, crops and flips."""
        index, top, left, flip = draw.unsqueeze(2).unbind(1)
        rows = top + self.pixels
        columns = left + torch.where(flip > 0, SIDE - 1 - self.pixels, self.pixels)
        x = self.images[index.unsqueeze(2), rows.unsqueeze(2), columns.unsqueeze(1)]
        return ((x - self.mean) / self.std).permute(0, 3, 1, 2), self.labels[index.squeeze(1)]


# --- files ---------------------------------------------------------------------------------------------------


def save(value: Any, path: Path) -> None:
    """Write by way of a temporary file: whatever happens, ``path`` holds the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        if path.suffix == ".json":
            file.write(json.dumps(value, indent=1).encode())
        else:
            torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"can not read {path} ({type(error).__name__}): delete it, or give another.") from error


# --- training ------------------------------------------------------------------------------------------------


class Display:
    """A progress bar on a terminal, a line per epoch elsewhere."""

    def __init__(self, title: str, epochs: int, first: int, steps: int) -> None:
        self.title, self.epochs, self.console, self.started, self.first = title, epochs, Console(), time.perf_counter(), first
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
        self.bar = Progress(*columns, TimeRemainingColumn(), console=self.console, disable=not self.console.is_terminal)
        self.steps, self.task = steps, self.bar.add_task(title, total=epochs * steps, completed=first * steps, state="")

    def step(self) -> None:
        self.bar.advance(self.task)

    def epoch(self, row: dict[str, Any]) -> None:
        words = [f"epoch {row['epoch']}/{self.epochs}"]
        if "p" in row:
            words.append(f"p {row['p']:.3f}  λ {row['weight_lambda']:.1e} {row['activation_lambda']:.1e}")
        words.append(f"loss {row['loss']:.4f}  train {row['train_accuracy']:.2f} %  test {row['test_accuracy']:.2f} %")
        self.bar.update(self.task, state="  ".join(words))
        if self.bar.disable:
            seconds = (time.perf_counter() - self.started) / (row["epoch"] - self.first) * (self.epochs - row["epoch"])
            print(self.title, *words, f"ETA {timedelta(seconds=round(seconds))}", sep="  ", flush=True)


class Run:
    """One seed: its data, its folder, and the loop that both phases share."""

    def __init__(self, args: argparse.Namespace, data: Arrays, seed: int, deadline: float) -> None:
        self.args, self.seed, self.deadline, self.device = args, seed, deadline, torch.device(args.device)
        self.folder = Path(args.output) / f"seed{seed}"
        self.classes = len(data["classes"])
        self.train = Images(data["train_images"], data["train_labels"], PAD).to(self.device)
        self.test = Images(data["test_images"], data["test_labels"], 0).to(self.device)
        self.steps = len(data["train_labels"]) // args.batch_size
        self.settings = {k: v for k, v in vars(args).items() if k not in INCIDENTAL} | {"seed": seed}

    def place(self, model: nn.Module) -> Any:
        return model.to(self.device, memory_format=torch.channels_last if self.device.type == "cuda" else torch.preserve_format)

    def compiled(self, function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        if not self.args.compile:
            return function
        return torch.compile(function, fullgraph=True, dynamic=False, mode=self.args.compile_mode)

    def predictor(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        def predict(draw: Tensor) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp):
                return model(self.test(draw)[0])

        return self.compiled(predict)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, predict: Callable[[Tensor], Tensor]) -> float:
        """Return the test accuracy in percent; every batch has the same size, the last is filled up."""
        model.eval()
        labels, size = self.test.labels, self.args.eval_batch_size
        draw = torch.zeros(-(-len(labels) // size) * size, 4, dtype=torch.int64, device=self.device)
        draw[: len(labels), 0] = torch.arange(len(labels), device=self.device)
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        for start in range(0, len(labels), size):
            wanted = labels[start : start + size]
            right += (predict(draw[start : start + size]).argmax(1)[: len(wanted)] == wanted).sum()
        return 100 * right.item() / len(labels)

    def fit(
        self,
        phase: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        epochs: int,
        scheduler: PEGEScheduler | None = None,
    ) -> dict[str, Any]:
        """Train, or go on where the checkpoint of this phase stands; return the last checkpoint."""
        path, size = self.folder / f"{phase}.pt", self.args.batch_size
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(epochs, 1))
        generator = torch.Generator(self.device).manual_seed(self.seed)
        state: dict[str, Any] = {"epoch": 0, "history": [], "seconds": 0.0}
        if path.exists():
            state = self.resume(path, model, optimizer, cosine, generator, scheduler)

        def loss_of(draw: Tensor) -> tuple[Tensor, Tensor]:
            x, labels = self.train(draw)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp):
                logits = model(x)
            return F.cross_entropy(logits.float(), labels), (logits.argmax(1) == labels).sum()

        loss_of, predict = self.compiled(loss_of), self.predictor(model)
        display = Display(f"{phase} seed {self.seed}", epochs, state["epoch"], self.steps)
        with display.bar:
            for epoch in range(state["epoch"] + 1, epochs + 1):
                started = time.perf_counter()
                model.train()
                draw, totals = self.train.draw(generator), torch.zeros(2, device=self.device)
                rate = {} if scheduler is None else {"p": scheduler.rate, "lambdas": scheduler.lambdas}
                for step in range(self.steps):
                    loss, right = loss_of(draw[step * size : (step + 1) * size])
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    if scheduler is not None:
                        scheduler.step()
                    totals += torch.stack([loss.detach(), right / size])
                    display.step()
                loss, right = (totals / self.steps).tolist()
                row = {"epoch": epoch, "lr": cosine.get_last_lr()[0], "loss": loss, "train_accuracy": 100 * right}
                if rate:
                    row |= {"p": rate["p"], "weight_lambda": rate["lambdas"][0], "activation_lambda": rate["lambdas"][1]}
                if not math.isfinite(loss):
                    raise UserError(f"the loss is {loss} in epoch {epoch} of {phase}: try a smaller learning rate or λ.")
                cosine.step()
                row["test_accuracy"] = self.evaluate(model, predict)
                row["seconds"] = time.perf_counter() - started
                state = {
                    "epoch": epoch,
                    "epochs": epochs,
                    "settings": self.settings,
                    "history": [*state["history"], row],
                    "seconds": state["seconds"] + row["seconds"],
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "cosine": cosine.state_dict(),
                    "generator": generator.get_state(),
                    "scheduler": None if scheduler is None else scheduler.state_dict(),
                }
                save(state, path)
                display.epoch(row)
                if time.perf_counter() > self.deadline:
                    break
        return state | {"finished": state["epoch"] >= epochs}

    def resume(
        self, path: Path, model: nn.Module, optimizer: Any, cosine: Any, generator: torch.Generator, scheduler: Any
    ) -> dict[str, Any]:
        state: dict[str, Any] = load(path)
        for name, value in self.settings.items():
            if state["settings"].get(name) != value:
                there = state["settings"].get(name)
                raise UserError(f"{path} was made with {name}={there}, not {value}: give another --output, or delete it.")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        cosine.load_state_dict(state["cosine"])
        generator.set_state(state["generator"])
        if scheduler is not None:
            scheduler.load_state_dict(state["scheduler"])
        return state

    def float_model(self) -> tuple[nn.Module, dict[str, Any] | None]:
        """Return the float model: from --float-checkpoint, or trained."""
        torch.manual_seed(self.seed)
        model = self.place(ResNet20(self.classes))
        if self.args.float_checkpoint is None:
            sgd = torch.optim.SGD(model.parameters(), self.args.float_lr, 0.9, weight_decay=1e-4, fused=True)
            return model, self.fit("float", model, sgd, self.args.float_epochs)
        path = Path(self.args.float_checkpoint.format(seed=self.seed))
        if not path.exists():
            raise UserError(
                f"--float-checkpoint {path} does not exist: give the float.pt of a run, or leave it out to train one."
            )
        state = load(path)
        if state.get("epoch", 0) < state.get("epochs", 0):
            raise UserError(
                f"--float-checkpoint {path} stands at epoch {state['epoch']} of {state['epochs']}: finish that run first."
            )
        try:
            model.load_state_dict(state.get("model", state))
        except RuntimeError as error:
            raise UserError(
                f"--float-checkpoint {path} is of another network: {str(error).splitlines()[-1].strip()}"
            ) from error
        return model, None

    def scheduler(self, gm: Any) -> PEGEScheduler:
        args, total = self.args, max(self.args.epochs * self.steps, 1)
        start, end = args.replacement_start, args.replacement_end
        replacement = Constant(1.0) if start == 1 else LogReplacement.reaching_one_at(max(end * total, 2), start)
        lambdas = (curve_between(*pair, total) for pair in (args.weight_lambda, args.activation_lambda))
        return PEGEScheduler(gm, total, replacement, *lambdas, refresh=args.refresh)

    def quantized(self, model: nn.Module) -> tuple[Any, dict[str, Any]]:
        """Prepare the float model and train it; this is where pege_fx comes in."""
        args = self.args
        policy = QuantPolicy.parse(args.bits, first=None, last=None, method=args.method, estimator=args.estimator)
        generator = torch.Generator(self.device).manual_seed(self.seed)
        examples = self.train(self.train.draw(generator)[: args.batch_size])[0]
        gm = self.place(pege_fx.prepare(model, policy, (examples,), seed=self.seed))
        groups = pege_fx.parameter_groups(gm, args.lr, args.quantizer_lr, weight_decay=1e-4)
        adam = torch.optim.Adam(groups, fused=True)
        return gm, self.fit("qat", gm, adam, args.epochs, self.scheduler(gm))

    def match(self, gm: Any) -> dict[str, Any]:
        """Print what was quantized, and hold the converted model against the trained one."""
        deployed = pege_fx.convert(gm)
        trained, converted = (self.evaluate(model, self.predictor(model)) for model in (gm, deployed))
        size = pege_fx.size_report(deployed)
        print(pege_fx.summary(gm))
        print(
            f"trained {trained:.2f} %, converted {converted:.2f} %: {'equal' if trained == converted else 'NOT EQUAL'}\n{size}"
        )
        return {"converted": converted, "float_bytes": size.float_bytes, "quantized_bytes": size.quantized_bytes}

    def __call__(self) -> dict[str, Any]:
        """Run both phases and write results.json."""
        model, phases = None, {}
        model, trained = self.float_model()
        if trained is not None:
            phases["float"] = trained
        matched = {}
        if self.args.epochs and (trained is None or trained["finished"]):
            gm, phases["qat"] = self.quantized(model)
            if self.args.match and phases["qat"]["finished"]:
                matched = {"match": self.match(gm)}
        results: dict[str, Any] = {"settings": self.settings | {"amp": self.args.amp, "compile": self.args.compile}} | matched
        for phase, state in phases.items():
            accuracies = [row["test_accuracy"] for row in state["history"]]
            results[phase] = {
                "finished": state["finished"],
                "best": max(accuracies, default=None),
                "last": accuracies[-1] if accuracies else None,
                "seconds": state["seconds"],
                "history": state["history"],
            }
        results["finished"] = all(state["finished"] for state in phases.values()) and ("qat" in phases or not self.args.epochs)
        cuda = self.device.type == "cuda"
        results["device"] = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
        results["versions"] = {"torch": torch.__version__, "pege_fx": pege_fx.__version__, "python": platform.python_version()}
        save(results, self.folder / "results.json")
        return results


def curve_between(first: float, last: float, steps: int) -> Curve:
    return Constant(first) if first == last else Exponential(first, last, steps)


# --- the command ---------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add(
        "--data-dir",
        help="ImageFolder with train/ and test/, a tar archive of one, or a cached .pt; default: download CIFAR-10",
    )
    add("--download-dir", default="data", help="where torchvision keeps CIFAR-10")
    add("--cache", help="folder for the decoded images; default: --output")
    add("--output", default="runs/cifar10", help="folder of the results and checkpoints")
    add("--subset", type=int, help="use this many training images, and at most as many test images")
    add("--estimator", default="pege", choices=("pege", "ste", "ewgs", "pege-relative"))
    add("--method", default="lsq", choices=("lsq", "pact", "dorefa", "interval", "minmax"))
    add("--bits", default="W2A2")
    add("--epochs", type=int, default=400, help="of quantization-aware training; 0: the float model alone")
    add("--float-epochs", type=int, default=400)
    add("--float-checkpoint", help="float.pt of a run, instead of float training; {seed} stands for the seed")
    add("--batch-size", type=int, default=256)
    add("--eval-batch-size", type=int, default=1000)
    add("--lr", type=float, default=1e-3, help="Adam, of quantization-aware training")
    add("--quantizer-lr", type=float, default=1e-5, help="of scales, clips and intervals")
    add("--float-lr", type=float, default=0.1, help="SGD, of float training")
    add("--seed", type=int, nargs="+", default=[0], help="one or several, run one after the other")
    add("--replacement-start", type=float, help="p at the start; default: 0.2 for pege, 1 (fully quantized) for ste and ewgs")
    add("--replacement-end", type=float, default=0.5, help="part of the training after which p is 1")
    add("--weight-lambda", type=float, nargs=2, default=[1e-8, 1e-6], metavar=("A", "B"), help="λ, exponentially from A to B")
    add("--activation-lambda", type=float, nargs=2, default=[1e-9, 1e-8], metavar=("A", "B"))
    add("--refresh", default="step", choices=("step", "never"), help="masks: redrawn every step, or growing")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--compile", action=switch, help="torch.compile; default: on CUDA")
    add("--compile-mode", choices=("default", "reduce-overhead", "max-autotune-no-cudagraphs"), default="default")
    add("--amp", action=switch, help="bfloat16 autocast; default: on CUDA")
    add("--time-limit", type=float, default=math.inf, metavar="SECONDS", help="stop after the epoch that passes it")
    add("--match", action="store_true", help="at the end: summary, accuracy of the converted model, size")
    args = parser.parse_args(argv)
    for name in ("batch_size", "eval_batch_size", "subset"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if min(args.epochs, args.float_epochs) < 0:
        parser.error("--epochs and --float-epochs can not be negative")
    if args.replacement_start is None:
        args.replacement_start = 0.2 if args.estimator.startswith("pege") else 1.0
    return args


def choose_device(args: argparse.Namespace) -> None:
    """Resolve what "auto" and the switches that were left out stand for."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: PyTorch sees no GPU here; use --device cpu, or a CUDA build of torch on a machine with one."
        )
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    cuda = args.device == "cuda"
    args.compile = cuda if args.compile is None else args.compile
    args.amp = cuda if args.amp is None else args.amp
    if cuda:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    deadline = time.perf_counter() + args.time_limit
    choose_device(args)
    data = load_data(args)
    if args.subset is not None:
        for split in ("train", "test"):
            labels = data[f"{split}_labels"]
            chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: args.subset]
            data |= {f"{split}_images": data[f"{split}_images"][chosen], f"{split}_labels": labels[chosen]}
    if len(data["train_labels"]) < args.batch_size:
        raise UserError(f"{len(data['train_labels'])} training images are less than one batch: lower --batch-size.")
    results = []
    for seed in args.seed:
        results.append(Run(args, data, seed, deadline)())
        if not results[-1]["finished"]:
            print(f"stopped by --time-limit in seed {seed}: the same command goes on from there.")
            break
    last = [result["qat"]["last"] for result in results if result["finished"] and args.epochs]
    if last:
        spread = f" ± {stdev(last):.2f}" if len(last) > 1 else ""
        print(f"{args.bits} {args.method} {args.estimator}: {mean(last):.2f}{spread} % in the last epoch, {len(last)} seed(s)")
    return results


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(argv)
    try:
        return run(args)
    except (UserError, pege_fx.PegeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
