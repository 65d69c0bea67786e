r"""ResNet-20 on CIFAR-10 with two-bit weights and activations, trained with PEGE or another estimator.

    python examples/cifar10.py --data-dir cifar10-jpeg.tar.xz --output runs/pege --match
    python examples/cifar10.py --data-dir cifar10-jpeg.tar.xz --output runs/ste --estimator ste \
        --float-checkpoint 'runs/pege/seed{seed}/float.pt'
    python examples/cifar10.py --data-dir cifar10-jpeg.tar.xz --output runs/small --match \
        --subset 10000 --batch-size 128 --float-epochs 6 --epochs 4                          # a first look on a CPU

The last one took 7 minutes on one thread of a shared x86-64 machine: float 53.18 %, then W2A2 54.19 % (one seed, torch 2.15).

The recipe is that of EWGS (Lee et al., CVPR 2021): first convolution and last linear layer in float; a float model by SGD,
quantization-aware training from it by Adam, learning rates falling to 0 along a cosine. Every seed has a folder with its
checkpoints and results.json. A run that was stopped, or killed, goes on when the same command is given again.
"""

import argparse
import contextlib
import copy
import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import platform
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path, PurePosixPath
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:
    SummaryWriter = None

import pege_fx
from pege_fx import Constant, LogReplacement, PEGEScheduler, QuantPolicy

ESTIMATORS = ("pege", "ste", "ewgs", "pege-relative", "pege-share")
SIDE, PAD = 32, 4
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
# What may differ between a run and its continuation, and what must not in float training.
INCIDENTAL = {"output", "data_dir", "download_dir", "cache", "device", "compile", "compile_mode", "eval_batch_size"}
INCIDENTAL |= {
    "time_limit",
    "deadline",
    "match",
    "on_corrupt",
    "tensorboard",
    "cuda_graphs",
    "together",
    "checkpoint_every",
    "evaluate_every",
    "reestimate",
    "oscillations",
    "test_subset",
}
FLOAT_SETTINGS = ("seed", "model", "float_epochs", "float_lr", "batch_size", "subset", "amp")


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
    """Three stages of three blocks, with 16, 32 and 64 channels."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        shapes = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
        self.blocks = nn.Sequential(*(Block(*shape) for shape in shapes))
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class VGG16(nn.Sequential):
    """Thirteen convolutions with BatchNorm in five stages, and one linear layer."""

    def __init__(self, classes: int) -> None:
        layers: list[nn.Module] = []
        before = 3
        for stage in ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)):
            for after in stage:
                layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
                nn.init.kaiming_normal_(layers[-3].weight, mode="fan_out")
                before = after
            layers.append(nn.MaxPool2d(2))
        super().__init__(*layers, nn.Flatten(), nn.Linear(before, classes))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: 1x1 to ``expansion`` times the channels, depthwise, 1x1 without activation."""

    def __init__(self, before: int, after: int, stride: int, expansion: int, kernel: int) -> None:
        super().__init__()
        wide = expansion * before
        layers: list[nn.Module] = []
        if expansion > 1:
            layers += [nn.Conv2d(before, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()]
        layers += [
            nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
        ]
        layers += [nn.Conv2d(wide, after, 1, bias=False), nn.BatchNorm2d(after)]
        self.layers, self.adds = nn.Sequential(*layers), stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.adds else y


class DepthwiseNet(nn.Sequential):
    """A network of inverted residuals: after a convolution with stride 2 that takes 32x32 images to 16x16.

    Args:
        classes: of the last linear layer.
        blocks: (expansion, channels, stride, kernel) of each.
        stem, head: channels of the first convolution, and of the last.
    """

    def __init__(self, classes: int, blocks: list[tuple[int, int, int, int]], stem: int, head: int) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU6()]
        before = stem
        for expansion, channels, stride, kernel in blocks:
            layers.append(InvertedResidual(before, channels, stride, expansion, kernel))
            before = channels
        layers += [nn.Conv2d(before, head, 1, bias=False), nn.BatchNorm2d(head), nn.ReLU6()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(head, classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")


# MobileNetV2's and EfficientNet-lite's shapes, for 32x32 images: (expansion, channels, stride, kernel).
MOBILENET = [(1, 16, 1, 3), (4, 24, 2, 3), (4, 24, 1, 3), (4, 32, 2, 3), (4, 32, 1, 3), (4, 64, 1, 3), (4, 64, 1, 3)]
MOBILENET_TINY = [(1, 8, 1, 3), (3, 16, 2, 3), (3, 16, 1, 3), (3, 24, 2, 3), (3, 24, 1, 3)]
EFFICIENTNET_LITE = [(1, 16, 1, 3), (6, 24, 2, 3), (6, 24, 1, 3), (6, 40, 2, 5), (6, 40, 1, 5), (6, 80, 1, 3)]

NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "resnet20": ResNet20,
    "vgg16": VGG16,
    "mobilenetv2": lambda classes: DepthwiseNet(classes, MOBILENET, stem=16, head=256),
    "mobilenetv2-tiny": lambda classes: DepthwiseNet(classes, MOBILENET_TINY, stem=8, head=64),
    "efficientnet-lite": lambda classes: DepthwiseNet(classes, EFFICIENTNET_LITE, stem=16, head=320),
}


# --- the data ------------------------------------------------------------------------------------------------


def members(source: Path) -> Iterator[tuple[str, Path | bytes | None]]:
    """Yield name and content of everything in a folder or tar archive; None for a folder in it."""
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
        raise UserError(f"{source} is no tar archive that can be read ({error}): copy it again.") from error


def decode(files: list[tuple[str, Path | bytes]], skip_corrupt: bool) -> tuple[Tensor, Tensor]:
    """Return images as uint8, (N, 32, 32, 3), other sizes resized; and which of the files could be read, (N,)."""
    images, good = np.zeros((len(files), SIDE, SIDE, 3), np.uint8), torch.ones(len(files), dtype=torch.bool)
    for i, (name, content) in enumerate(files):
        try:
            with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
                rgb = image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            if not skip_corrupt:
                fix = "repair it, take it out, or give --on-corrupt skip."
                raise UserError(f"{name} is no image that can be read ({error}): {fix}") from error
            print(f"skipped: {name} is no image that can be read ({error})", file=sys.stderr)
            good[i] = False
            continue
        images[i] = rgb if rgb.size == (SIDE, SIDE) else rgb.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return torch.from_numpy(images), good


def read_images(source: Path, skip_corrupt: bool = False) -> dict[str, Any]:
    """Decode an ImageFolder with train/ and test/, or a tar archive of one, in as many threads as there are cores."""
    found: dict[str, dict[str, list[tuple[str, Path | bytes]]]] = {"train": {}, "test": {}}
    for name, content in members(source):
        split, *rest = PurePosixPath(name).parts or ("",)
        if split not in found or not rest or (content is not None and len(rest) == 1):
            continue
        files = found[split].setdefault(rest[0], [])
        if content is not None and PurePosixPath(name).suffix.lower() in SUFFIXES:
            files.append((name, content))
    for split, folders in found.items():
        if not folders:
            raise UserError(f"{source} has no folder {split}/<class>/: give an ImageFolder with train/ and test/ in it.")
        for label, files in folders.items():
            if not files:
                raise UserError(f"{source}: class {split}/{label} has no images: add some, or remove the folder.")
    classes = sorted(found["train"])
    if odd := sorted(set(classes) ^ set(found["test"])):
        raise UserError(f"{source}: {', '.join(odd)} must be a class of train/ and of test/, and is in one of them only.")
    data: dict[str, Any] = {"classes": classes}
    for split, folders in found.items():
        files = [file for label in classes for file in folders[label]]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            parts = [files[i : i + 256] for i in range(0, len(files), 256)]
            images, good = map(torch.cat, zip(*pool.map(decode, parts, [skip_corrupt] * len(parts)), strict=True))
        labels = torch.tensor([i for i, label in enumerate(classes) for _ in folders[label]])
        data |= {f"{split}_images": images[good], f"{split}_labels": labels[good]}
    return data


def download(folder: str) -> dict[str, Any]:
    try:
        sets = {split: torchvision.datasets.CIFAR10(folder, split == "train", download=True) for split in ("train", "test")}
    except (OSError, RuntimeError) as error:
        raise UserError(f"no CIFAR-10 from the network ({error}): give --data-dir, an ImageFolder or its archive.") from error
    data: dict[str, Any] = {"classes": sets["train"].classes}
    for split, images in sets.items():
        data |= {f"{split}_images": torch.from_numpy(images.data), f"{split}_labels": torch.tensor(images.targets)}
    return data


def load_data(args: argparse.Namespace) -> dict[str, Any]:
    """Return train_images (N, 32, 32, 3) uint8, train_labels, test_images, test_labels, and the names of the classes."""
    source = Path(args.data_dir or ".")
    if not source.exists():
        raise UserError(f"--data-dir {source} does not exist: give a folder with train/ and test/, or a tar archive of one.")
    if args.data_dir is None:
        data = download(args.download_dir)
    elif source.suffix == ".pt":
        data = load(source)
    else:
        files = source.rglob("*") if source.is_dir() else [source]
        listing = "\n".join(sorted(f"{file} {(stat := file.stat()).st_size} {stat.st_mtime_ns}" for file in files))
        key = hashlib.sha256(listing.encode()).hexdigest()[:12]
        cache = Path(args.cache or args.output) / f"images-{key}.pt"
        if not cache.exists():
            save(read_images(source, args.on_corrupt == "skip"), cache)
        data = load(cache)
    if args.subset is not None:
        for split in ("train", "test"):
            count = len(data[f"{split}_labels"])
            size = args.subset if split == "train" or args.test_subset is None else args.test_subset
            chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:size]
            data |= {f"{split}_{what}": data[f"{split}_{what}"][chosen] for what in ("images", "labels")}
    if (count := len(data["train_labels"])) < args.batch_size:
        raise UserError(f"{count} training images are less than a batch of {args.batch_size}: lower --batch-size.")
    return data


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
        """Return an epoch, one row (image, top, left, flipped) per crop: (N, 4)."""
        where = {"generator": generator, "device": self.labels.device}
        count = len(self.labels)
        crop = torch.randint(0, 2 * self.pad + 1, (2, count), **where)
        flip = torch.randint(0, 2, (count,), **where)
        return torch.stack([torch.randperm(count, **where), *crop, flip], 1)

    def forward(self, draw: Tensor) -> tuple[Tensor, Tensor]:
        """Return normalised images (B, 3, 32, 32), channels last, and labels: one gather selects, crops and flips."""
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


SHAPES: dict[str, Callable[..., pege_fx.Curve]] = {
    "linear": pege_fx.Linear,
    "cosine": pege_fx.Cosine,
    "exponential": pege_fx.Exponential,
    "log": pege_fx.Logarithmic,
    "step": pege_fx.Step,
}


def replacement(args: argparse.Namespace, total: int) -> pege_fx.Curve:
    start, end = args.replacement_start, max(args.replacement_end * total, 2)
    if start == 1:
        return Constant(1.0)
    if args.replacement_curve == "log":
        return LogReplacement.reaching_one_at(end, start)
    if args.replacement_curve == "ramp":
        return pege_fx.RampReplacement(steps=end, start=start)
    return SHAPES[args.replacement_curve](start, 1.0, end)


def schedule(args: argparse.Namespace, total: int) -> dict[str, Any]:
    """Return the arguments of the PEGEScheduler; position and length are counted in training steps."""

    def strength(first: float, last: float) -> pege_fx.Curve:
        return Constant(first) if first == last else SHAPES[args.lambda_curve](first, last, total)

    return {
        "total_steps": total,
        "replacement": replacement(args, total),
        "weight_lambda": late(args, total, *args.weight_lambda) if args.lambda_start else strength(*args.weight_lambda),
        "activation_lambda": strength(*args.activation_lambda),
        "refresh": args.refresh,
    }


def late(args: argparse.Namespace, total: int, first: float, last: float) -> pege_fx.Curve:
    """From ``first`` to ``last`` by --lambda-curve, but 0 before --lambda-start."""
    start = (args.lambda_start or 0.0) * total
    curve = Constant(first) if first == last else SHAPES[args.lambda_curve](first, last, max(total - start, 1))
    return pege_fx.Delayed(curve, start)


def policy_of(args: argparse.Namespace) -> QuantPolicy:
    policy = QuantPolicy.parse(args.bits, first=None, last=None, method=args.method, estimator=args.estimator)
    if args.weight_estimator is None:
        return policy
    rules = [
        rule if rule.weight is None else dataclasses.replace(rule, weight=with_estimator(rule.weight, args.weight_estimator))
        for rule in policy.rules
    ]
    return QuantPolicy(tuple(rules))


def with_estimator(spec: Any, estimator: str) -> Any:
    return dataclasses.replace(spec, estimator=estimator) if isinstance(spec, pege_fx.QuantSpec) else spec


class Companions:
    """What acts on the weights beside the estimator, as far as it was asked for: dampening, freezing, pull."""

    def __init__(self, gm: Any, args: argparse.Namespace, total: int, device: torch.device) -> None:
        self.gm, self.t = gm, 0
        self.dampening = pege_fx.Delayed(pege_fx.Cosine(*args.dampen, 0.75 * total), 0.25 * total) if args.dampen else None
        self.factor = torch.zeros((), device=device)  # a tensor, so that a CUDA graph reads it
        self.freezing = pege_fx.WeightFreezing(gm, pege_fx.Cosine(*args.freeze, total)) if args.freeze else None
        self.pull = pege_fx.DecoupledLambda(gm, late(args, total, *args.pull)) if args.pull else None

    def loss(self) -> Tensor | float:
        return 0.0 if self.dampening is None else self.factor * pege_fx.dampening_loss(self.gm, "kernel_mean")

    def before_step(self) -> None:
        if self.dampening is not None:
            self.factor.fill_(self.dampening(self.t))

    def after_step(self) -> None:
        self.t += 1
        for part in (self.freezing, self.pull):
            if part is not None:
                part.step()

    def state_dict(self) -> dict[str, Any]:
        parts = {"freezing": self.freezing, "pull": self.pull}
        return {"t": self.t} | {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.t = state["t"]
        for name in ("freezing", "pull"):
            if name in state:
                getattr(self, name).load_state_dict(state[name])


def oscillation(gm: Any, telemetry: pege_fx.Telemetry) -> dict[str, float]:
    """Share of weights that came back to their code in the last epoch: of all, and of depthwise convolutions."""
    last = max(row["step"] for row in telemetry.history)
    shares = {row["site"]: row["oscillating"] for row in telemetry.history if row["step"] == last}
    sizes = {name: gm.get_parameter(name.removesuffix("_fq")).shape for name, share in shares.items() if share is not None}
    found = {}
    for name, sites in (("oscillating", list(sizes)), ("depthwise_oscillating", [n for n in sizes if sizes[n][1:2] == (1,)])):
        count = sum(sizes[site].numel() for site in sites)
        if count:
            found[name] = sum(shares[site] * sizes[site].numel() for site in sites) / count
    return found


def progress_bar() -> Progress:
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)


class Display:
    """A line of the progress bar on a terminal, a line per epoch elsewhere."""

    def __init__(self, bar: Progress, title: str, first: int, epochs: int, steps: int) -> None:
        self.bar, self.title, self.first, self.epochs, self.started = bar, title, first, epochs, time.perf_counter()
        self.task = bar.add_task(title, total=epochs * steps, completed=first * steps, state="")

    def step(self) -> None:
        self.bar.advance(self.task)

    def epoch(self, row: dict[str, Any]) -> None:
        words = [f"epoch {row['epoch']}/{self.epochs}"]
        if "p" in row:
            words.append(f"p {row['p']:.3f}  λ {row['weight_lambda']:.1e} {row['activation_lambda']:.1e}")
        words.append(f"{row['rate']:.0f} images/s")
        words.append(f"loss {row['loss']:.4f}  train {row['train_accuracy']:.2f} %")
        if "test_accuracy" in row:
            words.append(f"test {row['test_accuracy']:.2f} %")
        self.bar.update(self.task, state="  ".join(words))
        if self.bar.disable:
            left = (time.perf_counter() - self.started) / (row["epoch"] - self.first) * (self.epochs - row["epoch"])
            print(self.title, *words, f"ETA {timedelta(seconds=round(left))}", sep="  ", flush=True)


PREPARING = threading.Lock()  # drawing weights, compiling and recording: for one run at a time
CLASSES: dict[str, type] = {}  # of prepared models, by their code


def compiled_once(gm: Any) -> Any:
    """Give a prepared model the class of one with the same code: a compiler knows what it compiled by the code object.

    Every GraphModule has a class of its own, so that each seed would be compiled anew (25 s each, for ResNet-20 on a GPU).
    """
    gm.__class__ = CLASSES.setdefault(gm.code, type(gm))
    return gm


class Recorded:
    """A function of a draw that is recorded as a CUDA graph after a few ordinary calls, and replayed from then on.

    The first calls compile, try out convolutions and make the optimizer's state. They count like any other.
    """

    def __init__(self, function: Callable[[Tensor], Any], wanted: bool) -> None:
        self.function, self.wanted, self.ordinary, self.graph = function, wanted, 3, None

    def __call__(self, draw: Tensor) -> Any:
        if not self.wanted:
            return self.function(draw)
        if self.graph is None:
            with PREPARING:
                if self.ordinary:
                    self.ordinary -= 1
                    return self.function(draw)
                self.draw, self.graph = draw.clone(), torch.cuda.CUDAGraph()
                here = torch.cuda.current_stream()
                with torch.cuda.graph(self.graph, stream=here, capture_error_mode="thread_local"):
                    self.result = self.function(self.draw)
        self.draw.copy_(draw)
        self.graph.replay()
        return self.result


class Run:
    """One seed: float training, quantization-aware training from it, and the loop that both share."""

    def __init__(self, args: argparse.Namespace, train: Images, test: Images, classes: int, seed: int, bar: Progress) -> None:
        self.args, self.train, self.test, self.classes, self.seed, self.bar = args, train, test, classes, seed, bar
        self.device, self.folder = torch.device(args.device), Path(args.output) / f"seed{seed}"
        self.steps = len(train.labels) // args.batch_size
        self.settings = {name: value for name, value in vars(args).items() if name not in INCIDENTAL} | {"seed": seed}
        self.stopped = False  # by --time-limit

    def __call__(self) -> dict[str, Any]:
        """Train what is not trained yet; write and return what results.json holds."""
        own_stream = torch.cuda.stream(torch.cuda.Stream()) if self.args.cuda_graphs else contextlib.nullcontext()
        with own_stream:
            return self.phases()

    def phases(self) -> dict[str, Any]:
        phases, matched = {}, {}
        model, state = self.float_model()
        if state is not None:
            phases["float"] = state
        if self.args.epochs and not self.stopped:
            gm, phases["qat"] = self.quantized(model)
            if self.args.match and phases["qat"]["epoch"] == self.args.epochs:
                matched = {"match": self.match(gm)}
        results: dict[str, Any] = {"settings": self.settings, "compile": self.args.compile and self.args.compile_mode}
        for phase, state in phases.items():
            accuracies = [row["test_accuracy"] for row in state["history"] if "test_accuracy" in row] or [None]
            results[phase] = {"best": max(accuracies), "last": accuracies[-1], "seconds": state["seconds"]}
            results[phase]["history"] = state["history"]
        goals = {"float": self.args.float_epochs, "qat": self.args.epochs}
        trained = all(state["epoch"] == goals[phase] for phase, state in phases.items())
        results["finished"] = trained and ("qat" in phases or not self.args.epochs)
        on_gpu = self.device.type == "cuda"
        results["device"] = torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine()
        modules = {"torch": torch, "torchvision": torchvision, "pege_fx": pege_fx}
        results["versions"] = {"python": platform.python_version()} | {name: str(m.__version__) for name, m in modules.items()}
        save(results | matched, self.folder / "results.json")
        return results | matched

    def float_model(self) -> tuple[nn.Module, dict[str, Any] | None]:
        """Return the float model, from --float-checkpoint or trained; and the state of that training."""
        with PREPARING:
            torch.manual_seed(self.seed)
            model = NETWORKS[self.args.model](self.classes).to(self.device, memory_format=torch.channels_last)
        if self.args.float_checkpoint is None:
            sgd = torch.optim.SGD(model.parameters(), self.args.float_lr, 0.9, weight_decay=1e-4, fused=True)
            return model, self.fit("float", model, sgd, self.args.float_epochs)
        path = Path(self.args.float_checkpoint.replace("{seed}", str(self.seed)))
        if not path.exists():
            raise UserError(f"--float-checkpoint {path} does not exist: give the float.pt of a run, or leave it out.")
        state = load(path)
        if state.get("epoch") != state.get("epochs"):
            raise UserError(f"--float-checkpoint {path} is at epoch {state['epoch']} of {state['epochs']}: finish that run.")
        try:
            model.load_state_dict(state.get("model", state))
        except RuntimeError as error:
            raise UserError(f"--float-checkpoint {path} is of another network: {error}") from error
        return model, None

    def quantized(self, model: nn.Module) -> tuple[Any, dict[str, Any]]:
        """What pege_fx adds to an ordinary training: prepare, parameter groups, a scheduler."""
        args = self.args
        draw = self.train.draw(torch.Generator(self.device).manual_seed(self.seed))
        examples = self.train(draw[: args.batch_size])[0]
        with PREPARING:
            gm = compiled_once(pege_fx.prepare(model.train(), policy_of(args), (examples,), seed=self.seed))
        groups = pege_fx.parameter_groups(gm, args.lr, args.quantizer_lr, weight_decay=1e-4)
        adam = torch.optim.Adam(groups, fused=True, capturable=args.cuda_graphs)
        scheduler = PEGEScheduler(gm, **schedule(args, args.epochs * self.steps))
        companions = Companions(gm, args, args.epochs * self.steps, self.device)
        teacher = model.eval() if args.distill else None
        return gm, self.fit("qat", gm, adam, args.epochs, scheduler, companions, teacher)

    def fit(
        self,
        phase: str,
        model: nn.Module,
        optimizer: Any,
        epochs: int,
        scheduler: PEGEScheduler | None = None,
        companions: Companions | None = None,
        teacher: nn.Module | None = None,
    ) -> dict[str, Any]:
        """Train, from the checkpoint of this phase if there is one; return the last checkpoint."""
        args, path, size = self.args, self.folder / f"{phase}.pt", self.args.batch_size
        generator = torch.Generator(self.device).manual_seed(self.seed)
        rates = [group["lr"] for group in optimizer.param_groups]
        if args.cuda_graphs:  # which read them where they are
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = torch.tensor(rate, device=self.device)
        state: dict[str, Any] = {"epoch": 0, "history": [], "seconds": 0.0}
        if path.exists():
            state = self.resume(path, model, optimizer, generator, scheduler)
            if companions is not None and "companions" in state:
                companions.load_state_dict(state["companions"])
        compiled, load_batch, totals = self.compiled(model), self.compiled(self.train), torch.zeros(2, device=self.device)

        def loss_of(network: nn.Module, draw: Tensor) -> tuple[Tensor, Tensor]:
            x, labels = load_batch(draw)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=args.amp):
                logits = network(x)
                with torch.no_grad():
                    taught = None if teacher is None else teacher(x)
            loss = F.cross_entropy(logits.float(), labels)
            if taught is not None:  # the soft part of Hinton et al., 2015, at temperature 4
                student, wanted = (F.log_softmax(values.float() / 4, 1) for values in (logits, taught))
                soft = 16 * F.kl_div(student, wanted, reduction="batchmean", log_target=True)
                loss = (1 - args.distill) * loss + args.distill * soft
            if companions is not None:
                loss = loss + companions.loss()
            return loss, (logits.argmax(1) == labels).sum()

        def train_step(draw: Tensor) -> None:
            loss, right = loss_of(compiled, draw)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            totals.add_(torch.stack([loss.detach(), right / size]))

        def predict(draw: Tensor) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=args.amp):
                return model(self.test(draw)[0])

        step, predict = Recorded(train_step, args.cuda_graphs), Recorded(predict, args.cuda_graphs)
        title = f"{Path(args.output).name} {phase} seed {self.seed}"
        display = Display(self.bar, title, state["epoch"], epochs, self.steps)
        for epoch in range(state["epoch"] + 1, epochs + 1):
            started, cosine = time.perf_counter(), (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2
            row: dict[str, Any] = {"epoch": epoch, "lr": cosine * rates[0]}
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                if args.cuda_graphs:
                    group["lr"].fill_(cosine * rate)
                else:
                    group["lr"] = cosine * rate
            if scheduler is not None:
                row["p"], (row["weight_lambda"], row["activation_lambda"]) = scheduler.rate, scheduler.lambdas
            model.train()
            totals.zero_()
            draw = self.train.draw(generator)
            if phase == "qat" and args.estimator == "ewgs" and (epoch - 1) % args.ewgs_every == 0:
                batches = draw.split(size)[: min(3, self.steps)]
                with PREPARING:
                    found = pege_fx.update_ewgs(model, lambda batch: loss_of(model, batch)[0], batches, draws=args.ewgs_draws)
                row["mean_delta"] = mean(found.values())
            watched = companions is not None and args.oscillations and epoch == epochs
            telemetry = pege_fx.Telemetry(model, max(self.steps - 1, 1), oscillations=True) if watched else None
            for number in range(self.steps):
                if companions is not None:
                    companions.before_step()
                step(draw[number * size : (number + 1) * size])
                if companions is not None:
                    companions.after_step()
                if telemetry is not None:
                    telemetry.step()
                if scheduler is not None:
                    scheduler.step()
                display.step()
            if telemetry is not None:
                telemetry.close()
                row |= oscillation(model, telemetry)
            if companions is not None and companions.freezing is not None:
                row["frozen"] = companions.freezing.frozen
            row["loss"], right = (totals / self.steps).tolist()
            if not math.isfinite(row["loss"]) and scheduler is not None:
                pege_fx.Guard(model).check(totals[0], self.train(draw[-size:])[0])
            if not math.isfinite(row["loss"]):
                raise UserError(f"the loss is {row['loss']} in {phase} epoch {epoch}: lower the learning rate, or λ.")
            row["train_accuracy"] = 100 * right
            self.stopped = time.perf_counter() > args.deadline
            if epoch % args.evaluate_every == 0 or epoch == epochs or self.stopped:
                row["test_accuracy"] = self.evaluate(model, predict)
            if epoch == epochs and args.reestimate and scheduler is not None:
                row["reestimated"] = self.reestimated(model, draw)
            row["seconds"] = time.perf_counter() - started
            row["rate"] = self.steps * size / row["seconds"]
            state = {
                "settings": self.settings,
                "epoch": epoch,
                "epochs": epochs,
                "history": [*state["history"], row],
                "seconds": state["seconds"] + row["seconds"],
            }
            if epoch % args.checkpoint_every == 0 or epoch == epochs or self.stopped:
                state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "generator": generator.get_state()}
                state["companions"] = None if companions is None else companions.state_dict()
                save(state | {"scheduler": None if scheduler is None else scheduler.state_dict()}, path)
                self.write_history(phase, state["history"])
            if args.tensorboard:
                self.write_events(phase, row)
            display.epoch(row)
            if self.stopped:
                break
        return state

    def write_history(self, phase: str, history: list[dict[str, Any]]) -> None:
        with open(self.folder / f"{phase}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in history for name in row)))
            writer.writeheader()
            writer.writerows(history)

    def write_events(self, phase: str, row: dict[str, Any]) -> None:
        with SummaryWriter(str(self.folder)) as board:
            for name, value in row.items():
                board.add_scalar(f"{phase}/{name}", value, row["epoch"])

    def resume(self, path: Path, model: nn.Module, optimizer: Any, generator: Any, scheduler: Any) -> dict[str, Any]:
        state: dict[str, Any] = load(path)
        names = FLOAT_SETTINGS if scheduler is None else self.settings
        for name in names:
            value = self.settings[name]
            if (there := state["settings"].get(name)) != value:
                raise UserError(f"{path} was made with {name}={there}, not {value}: give another --output, or delete it.")
        own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
        for part, name in ((model, "model"), (optimizer, "optimizer"), (scheduler, "scheduler")):
            if part is not None:
                part.load_state_dict(state[name])
        for group, settings in zip(optimizer.param_groups, own, strict=True):  # of this device and these options
            group.update(settings)
        generator.set_state(state["generator"])
        return state

    def compiled(self, module: nn.Module) -> Any:
        if not self.args.compile:
            return module
        return torch.compile(module, fullgraph=True, dynamic=False, mode=self.args.compile_mode)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, predict: Callable[[Tensor], Tensor]) -> float:
        """Return the test accuracy in percent; every batch has the same size, the last is filled up."""
        model.eval()
        labels = self.test.labels
        size = min(self.args.eval_batch_size, len(labels))
        draw = torch.zeros(-(-len(labels) // size) * size, 4, dtype=torch.int64, device=self.device)
        draw[: len(labels), 0] = torch.arange(len(labels), device=self.device)
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        for start in range(0, len(labels), size):
            wanted = labels[start : start + size]
            right += (predict(draw[start : start + size]).argmax(1)[: len(wanted)] == wanted).sum()
        return 100 * right.item() / len(labels)

    def reestimated(self, gm: Any, draw: Tensor) -> float:
        """The test accuracy of a copy whose BatchNorm statistics are those of --reestimate batches."""
        copied, size = copy.deepcopy(gm), self.args.batch_size
        rows = draw[: self.args.reestimate * size].split(size)
        pege_fx.reestimate_batch_norm(copied, [self.train(row)[0] for row in rows if len(row) == size])
        return self.evaluate(copied, lambda draw: copied(self.test(draw)[0]))

    def match(self, gm: Any) -> dict[str, Any]:
        """Show what was quantized, and hold the converted model against the trained one, both in float32."""
        deployed = pege_fx.convert(gm)
        size = pege_fx.size_report(deployed)
        trained, converted = (self.evaluate(m, lambda draw, m=m: m(self.test(draw)[0])) for m in (gm, deployed))
        print(pege_fx.summary(gm))
        print(f"trained {trained:.2f} %, converted {converted:.2f} %: {'equal' if trained == converted else 'NOT EQUAL'}")
        print(size)
        sizes = {"float_bytes": size.float_bytes, "quantized_bytes": size.quantized_bytes}
        return {"trained": trained, "converted": converted} | sizes


# --- the command ---------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--data-dir", help="ImageFolder with train/ and test/, a tar archive of one, or cached images; default: download")
    add("--download-dir", default="data", help="where torchvision keeps its CIFAR-10")
    add("--cache", help="folder for the decoded images; default: --output")
    add(
        "--on-corrupt",
        default="stop",
        choices=("stop", "skip"),
        help="at an image that can not be read; either way it is named",
    )
    add("--output", default="runs/cifar10", help="folder of results and checkpoints")
    add("--subset", type=int, help="use this many training images, and at most as many test images")
    add("--test-subset", type=int, help="test images, with --subset; default: as many as --subset")
    add("--model", default="resnet20", choices=tuple(NETWORKS))
    add("--estimator", default="pege", choices=ESTIMATORS)
    add("--weight-estimator", choices=ESTIMATORS, help="of weights; default: --estimator")
    add("--method", default="lsq", choices=("lsq", "pact", "dorefa", "interval", "minmax"))
    add("--bits", default="W2A2")
    add("--epochs", type=int, default=400, help="of quantization-aware training; 0: the float model alone")
    add("--float-epochs", type=int, default=400)
    add("--float-checkpoint", help="float.pt of a run, instead of float training; {seed} stands for the seed")
    add("--batch-size", type=int, default=256)
    add("--eval-batch-size", type=int, default=1000)
    add("--lr", type=float, default=1e-3, help="Adam, of quantization-aware training")
    add("--quantizer-lr", type=float, default=1e-5, help="Adam, of scales, clips and intervals")
    add("--float-lr", type=float, default=0.1, help="SGD, of float training")
    add("--seed", type=int, nargs="+", default=[0], help="one or several; see --together")
    add("--replacement-start", type=float, help="p at first; default: 0.2 for pege, 1 (all quantized) for ste and ewgs")
    add("--replacement-end", type=float, default=0.5, help="part of the training after which p is 1")
    add("--replacement-curve", default="log", choices=("log", "ramp", "linear", "cosine", "exponential", "step"))
    add("--weight-lambda", type=float, nargs=2, default=[1e-8, 1e-6], metavar=("A", "B"), help="λ grows from A to B")
    add("--activation-lambda", type=float, nargs=2, default=[1e-9, 1e-8], metavar=("A", "B"))
    add("--lambda-curve", default="exponential", choices=tuple(SHAPES))
    add("--lambda-start", type=float, metavar="PART", help="of the training, before which λ of weights is 0")
    add("--pull", type=float, nargs=2, metavar=("A", "B"), help="λ of weights as a share of the update, from A to B")
    add("--dampen", type=float, nargs=2, metavar=("A", "B"), help="oscillation dampening, along a cosine after a quarter")
    add("--freeze", type=float, nargs=2, metavar=("A", "B"), help="threshold of freezing, from A to B along a cosine")
    add("--reestimate", type=int, default=0, metavar="BATCHES", help="also measure with BatchNorm re-estimated on so many")
    add("--oscillations", action="store_true", help="count weights that oscillate in the last epoch")
    add("--distill", type=float, default=0.0, metavar="SHARE", help="of the loss: to be like the float model, 0 to 1")
    add("--ewgs-every", type=int, default=10, help="epochs from one estimate of EWGS' δ to the next")
    add("--ewgs-draws", type=int, default=10, help="Hutchinson's random vectors for each of its 3 batches")
    add("--refresh", default="step", choices=("step", "never"), help="masks: redrawn every step, or growing")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--compile", action=switch, help="torch.compile; default: on CUDA")
    add("--compile-mode", choices=("default", "max-autotune-no-cudagraphs"), default="default")
    add("--cuda-graphs", action=switch, help="a training step is one CUDA graph; default: on CUDA")
    add("--together", action=switch, help="train all seeds at once, each on a stream of its own; default: on CUDA")
    add("--checkpoint-every", type=int, default=1, metavar="EPOCHS")
    add("--evaluate-every", type=int, default=1, metavar="EPOCHS")
    add("--amp", action=switch, help="bfloat16 autocast; default: on CUDA")
    add("--time-limit", type=float, default=math.inf, metavar="SECONDS", help="stop after the epoch that passes it")
    add("--tensorboard", action="store_true", help="event files beside the CSV; needs the package tensorboard")
    add("--match", action="store_true", help="at the end: summary, accuracy of the converted model, size")
    args = parser.parse_args(argv)
    for name in ("batch_size", "eval_batch_size", "subset", "ewgs_every", "ewgs_draws", "checkpoint_every", "evaluate_every"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 <= args.distill <= 1:
        parser.error("--distill must lie between 0 and 1")
    if min(args.epochs, args.float_epochs) < 0:
        parser.error("--epochs and --float-epochs can not be negative")
    if args.replacement_start is None:
        args.replacement_start = 0.2 if args.estimator.startswith("pege") else 1.0
    return args


def choose_device(args: argparse.Namespace) -> None:
    """Resolve "auto", and the switches that were left out."""
    if args.tensorboard and SummaryWriter is None:
        raise UserError("--tensorboard needs a package: pip install tensorboard, or leave it out; there is a CSV anyway.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU; use --device cpu, or a CUDA build on a machine with a GPU.")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = args.device == "cuda"
    for name in ("compile", "amp", "cuda_graphs", "together"):
        if getattr(args, name) is None:
            setattr(args, name, on_gpu)
    if args.cuda_graphs and not on_gpu:
        raise UserError(f"--cuda-graphs needs --device cuda, and this is {args.device}: leave it out.")
    if on_gpu:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the seeds, together or one after the other; return their results."""
    policy_of(args), schedule(args, 100)  # a wrong option fails now, not after the float training
    choose_device(args)
    data = load_data(args)
    train = Images(data["train_images"], data["train_labels"], PAD).to(args.device)
    test = Images(data["test_images"], data["test_labels"], 0).to(args.device)
    with progress_bar() as bar:
        runs = [Run(args, train, test, len(data["classes"]), seed, bar) for seed in args.seed]
        if args.together:
            with ThreadPoolExecutor(len(runs)) as pool:
                results = list(pool.map(Run.__call__, runs))
        else:
            results = []
            for one in runs:
                results.append(one())
                if one.stopped:
                    break
    if len(results) < len(runs) or not all(result["finished"] for result in results):
        print("stopped by --time-limit: the same command goes on from there.")
    last = [result["qat"]["last"] for result in results if result["finished"] and args.epochs]
    if last:
        spread = f" ± {stdev(last):.2f}" if len(last) > 1 else ""
        print(
            f"{args.bits} {args.method} {args.estimator}: {mean(last):.2f}{spread} % after the last epoch, seeds: {len(last)}"
        )
    return results


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    started = time.perf_counter()
    args = parse(argv)
    args.deadline = started + args.time_limit
    try:
        return run(args)
    except (UserError, pege_fx.PegeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
