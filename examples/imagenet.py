r"""Any torchvision classifier on ImageNet, or another ImageFolder, in low bits; on one process or many.

    torchrun --nproc-per-node=8 examples/imagenet.py --data-dir /data/imagenet --model resnet18 --output runs/resnet18
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=host:29400 examples/imagenet.py ...
    python examples/imagenet.py --data-dir small --weights none --image-size 64 --batch-size 32 --epochs 2   # a first look

    torchrun --nproc-per-node=8 examples/imagenet.py --data-dir /data/imagenet --recipe resnet18-w2      # published settings
    torchrun --nproc-per-node=8 examples/imagenet.py --data-dir /data/imagenet --recipe resnet18-w2 --estimator pege

Without --recipe the settings are those of the author's earlier work (ResNet-18 W4A4): first convolution and last linear layer
in float, PACT, batch 512 over all processes, 100 epochs of SGD with Nesterov momentum, 2,500 warm-up steps, cosine, label
smoothing 0.1, from torchvision's float weights. RECIPES has the settings of published rows, with the figure that each should
reach and its source. None of them has been run at full length yet: tests run them on a small ImageFolder.

Which images a step sees, and how they are cropped, follows from seed, epoch and image alone. So N processes see the global
batch of one, and a run that was stopped, killed, or restarted by torchrun (--max-restarts) goes on from its last checkpoint.
On gloo, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for restarts, or a new worker may look for one that is gone.
"""

import argparse
import csv
import dataclasses
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import UnidentifiedImageError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import pege_fx
from pege_fx import Constant, Exponential, Guard, LogReplacement, PEGEScheduler, QuantPolicy

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SETTINGS = ("model", "bits", "method", "estimator", "epochs", "batch_size", "lr", "seed", "image_size", "weights", "distill")
ADDED = ("recipe", "ends", "granularity", "optimizer", "quantizer_lr", "quantizer_optimizer", "weight_decay", "smoothing")
ADDED += ("dampen", "freeze")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The settings of a published row: options of this command; the top-1 that it should reach, in percent; where from.

    ``differs``: what the published training has and this one has not.
    """

    options: dict[str, Any]
    top1: float
    source: str
    differs: str


# Esser et al., "Learned Step Size Quantization" (ICLR 2020): weight decay is halved for 3 bits, and quartered for 2.
LSQ: dict[str, Any] = {"model": "resnet18", "method": "lsq", "estimator": "ste", "granularity": "tensor", "ends": "8"}
LSQ |= {"epochs": 90, "batch_size": 512, "lr": 0.01, "warmup": 1, "smoothing": 0.0}
LSQ_SOURCE = "Esser et al., ICLR 2020, table 1"
LSQ_DIFFERS = "its ResNet-18 is of the pre-activation kind (float 70.5)"
# Nagel et al., "Overcoming Oscillations in Quantization-Aware Training" (ICML 2022), from the commands of its repository.
DAMPENING: dict[str, Any] = {"model": "mobilenet_v2", "method": "lsq", "estimator": "ste", "granularity": "tensor", "ends": "8"}
DAMPENING |= {"epochs": 90, "batch_size": 128, "warmup": 1, "smoothing": 0.0, "weight_decay": 2.5e-5}
DAMPENING |= {"quantizer_optimizer": "adam", "quantizer_lr": 1e-5, "dampen": [0.0, 0.1], "reestimate": 50}
DAMPENING_SOURCE = "Nagel et al., ICML 2022, dampening"
DAMPENING_DIFFERS = "its ranges start from a search for the least squared error; here by LSQ's rule"
# Liu et al., "Oscillation-free Quantization for Low-bit Vision Transformers" (ICML 2023), from its training script.
OFQ: dict[str, Any] = {"model": "timm:deit_small_patch16_224", "method": "lsq", "estimator": "ste", "ends": "8"}
OFQ |= {"epochs": 300, "batch_size": 560, "lr": 5.47e-4, "optimizer": "adamw", "weight_decay": 0.05, "warmup": 11440}
OFQ |= {"distill": 1.0}

RECIPES = {
    "resnet18-w4": Recipe(LSQ | {"bits": "W4A4", "weight_decay": 1e-4}, 71.1, LSQ_SOURCE, LSQ_DIFFERS),
    "resnet18-w3": Recipe(LSQ | {"bits": "W3A3", "weight_decay": 0.5e-4}, 70.2, LSQ_SOURCE, LSQ_DIFFERS),
    "resnet18-w2": Recipe(LSQ | {"bits": "W2A2", "weight_decay": 0.25e-4}, 67.6, LSQ_SOURCE, LSQ_DIFFERS),
    "mobilenetv2-w4": Recipe(DAMPENING | {"bits": "W4A4", "lr": 0.0033}, 70.6, DAMPENING_SOURCE, DAMPENING_DIFFERS),
    "mobilenetv2-w3": Recipe(DAMPENING | {"bits": "W3A3", "lr": 0.01}, 67.8, DAMPENING_SOURCE, DAMPENING_DIFFERS),
    "deit-s-w2": Recipe(
        OFQ | {"bits": "W2A2"},
        75.7,
        "Liu et al., ICML 2023, OFQ",
        "its model is the distilled variant, with statistical weight scales, query-key reparametrization, confidence-guided "
        "annealing, RandAugment and random erasing",
    ),
}


class UserError(Exception):
    """One line for the person at the keyboard: what is wrong, and the fix."""


# --- the data ------------------------------------------------------------------------------------------------


class Images(Dataset[tuple[Tensor, int]]):
    """An ImageFolder whose random crops depend on seed, epoch and image alone, whoever loads them and in which order."""

    def __init__(self, folder: Path, transform: Any, args: argparse.Namespace) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder} does not exist: --data-dir takes an ImageFolder with train/ and val/ in it.")
        try:
            self.folder = torchvision.datasets.ImageFolder(str(folder))
        except FileNotFoundError as error:
            raise UserError(f"{error} Add some, or remove the folder.") from error
        self.transform, self.seed, self.skip_corrupt = transform, args.seed, args.on_corrupt == "skip"

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, key: Any) -> tuple[Tensor, int]:
        epoch, index = key
        path, label = self.folder.samples[index]
        try:
            image = self.folder.loader(path)
        except (OSError, SyntaxError, UnidentifiedImageError) as error:
            if not self.skip_corrupt:
                fix = "repair it, take it out, or give --on-corrupt skip."
                raise UserError(f"{path} is no image that can be read ({error}): {fix}") from None
            print(f"skipped: {path} is no image that can be read ({error})", file=sys.stderr)
            return self[epoch, (index + 1) % len(self)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash((self.seed, epoch, index)))
            return self.transform(image), label


class Batches:
    """Which images each process takes: its part of the global batch, from step ``start`` of an epoch on."""

    def __init__(self, count: int, size: int, shuffle_seed: int | None) -> None:
        self.count, self.size, self.seed = count, size, shuffle_seed
        self.epoch = self.start = 0
        self.steps = count // size if shuffle_seed is not None else math.ceil(count / size)

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.arange(self.steps * self.size) % self.count  # evaluation fills its last batch up
        if self.seed is not None:
            order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.seed * 100_003 + self.epoch))
        rank, ranks = rank_and_size()
        for step in range(self.start, self.steps):
            mine = order[step * self.size : (step + 1) * self.size].chunk(ranks)[rank]
            yield [(self.epoch, index) for index in mine.tolist()]


def loaders(args: argparse.Namespace) -> tuple[DataLoader[Any], DataLoader[Any], int]:
    """Return training and test batches, and the number of classes."""
    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    size, folder = args.image_size, Path(args.data_dir)
    train = Images(folder / "train", v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *finish]), args)
    test = Images(folder / "val", v2.Compose([v2.Resize(size * 256 // 224), v2.CenterCrop(size), *finish]), args)
    if train.folder.classes != test.folder.classes:
        odd = sorted(set(train.folder.classes) ^ set(test.folder.classes))
        raise UserError(f"{folder}: {', '.join(odd)} must be a class of train/ and of val/, and is in one of them only.")
    if len(train) < args.batch_size:
        raise UserError(f"{len(train)} training images are less than a batch of {args.batch_size}: lower --batch-size.")
    options: dict[str, Any] = {"num_workers": args.workers, "pin_memory": args.device == "cuda"}
    made = [
        DataLoader(images, batch_sampler=Batches(len(images), args.batch_size, seed), **options)
        for images, seed in ((train, args.seed), (test, None))
    ]
    return made[0], made[1], len(train.folder.classes)


# --- several processes ---------------------------------------------------------------------------------------


def rank_and_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def say(*words: Any) -> None:
    if rank_and_size()[0] == 0:
        print(*words, sep="  ", flush=True)


def begin(args: argparse.Namespace) -> torch.device:
    """Join the other processes, if torchrun started us, and return our device."""
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU; use --device cpu, or a CUDA build on a machine with a GPU.")
    args.amp = args.device == "cuda" if args.amp is None else args.amp
    device = torch.device(args.device, int(os.environ.get("LOCAL_RANK", 0)) if args.device == "cuda" else None)
    if args.device == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo", timeout=timedelta(minutes=10))
    if args.batch_size % rank_and_size()[1]:
        raise UserError(f"--batch-size {args.batch_size} can not be shared evenly by {rank_and_size()[1]} processes.")
    return device


# --- training ------------------------------------------------------------------------------------------------


def float_model(args: argparse.Namespace, classes: int) -> nn.Module:
    torch.manual_seed(args.seed)
    weights = None if args.weights == "none" else args.weights
    try:
        if args.model.startswith("timm:"):
            return timm_model(args, weights, classes)
        if weights is None or weights == "DEFAULT":
            return torchvision.models.get_model(args.model, weights=weights, num_classes=None if weights else classes)
        model: nn.Module = torchvision.models.get_model(args.model, num_classes=classes)
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(
            f"--model {args.model} --weights {args.weights}: {error}; give none, DEFAULT, or a state_dict."
        ) from error
    return model


def timm_model(args: argparse.Namespace, weights: str | None, classes: int) -> nn.Module:
    """A model of timm, with its own weights (DEFAULT), those of a file, or none."""
    try:
        import timm
    except ImportError as error:
        raise UserError(f"--model {args.model} needs a package: pip install timm.") from error
    name, own = args.model.removeprefix("timm:"), weights == "DEFAULT"
    size = {} if args.image_size == 224 else {"img_size": args.image_size}
    model: nn.Module = timm.create_model(name, pretrained=own, **size, **({} if own else {"num_classes": classes}))
    if weights is not None and not own:
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model


def late(ends: list[float], total: int) -> pege_fx.Curve:
    """From the first value to the second along a cosine after a quarter of the training; the first until then."""
    first, last = ends
    quarter = 0.25 * total
    return Shifted(pege_fx.Cosine(first, last, max(total - quarter, 1)), quarter)


@dataclasses.dataclass(frozen=True)
class Shifted(pege_fx.Curve):
    """Another curve, with its first value until ``start``."""

    curve: pege_fx.Curve
    start: float

    def __call__(self, t: float) -> float:
        return self.curve(max(t - self.start, 0.0))


class Training:
    """The model with what moves it on, and where it stands."""

    def __init__(self, args: argparse.Namespace, train: DataLoader[Any], test: DataLoader[Any], model: nn.Module) -> None:
        self.args, self.train, self.test = args, train, test
        self.device, self.path = torch.device(args.device), Path(args.output) / "state.safetensors"
        self.teacher = model.eval() if args.distill else None
        self.settings = {name: getattr(args, name) for name in (*SETTINGS, *ADDED)}
        self.epoch = self.step = 0
        self.history: list[dict[str, float]] = []
        self.batches: Batches = train.batch_sampler  # type: ignore[assignment]
        total = max(args.epochs * self.batches.steps, 1)

        # What pege_fx adds: prepare, parameter groups, a scheduler.
        ends = None if args.ends == "float" else args.ends
        spec = {"method": args.method, "estimator": args.estimator, "granularity": args.granularity}
        policy = QuantPolicy.parse(args.bits, first=ends, last=ends, **spec)
        examples = next(iter(train))[0].to(self.device)
        self.gm = pege_fx.prepare(model.train(), policy, (examples,), seed=args.seed)
        if args.parallel == "fsdp" and dist.is_initialized():
            self.model: nn.Module = pege_fx.shard(self.gm)
        elif dist.is_initialized():
            self.model = DistributedDataParallel(self.gm)
        else:
            self.model = self.gm
        rate = args.lr / 10 if args.quantizer_lr is None else args.quantizer_lr
        groups = pege_fx.parameter_groups(self.gm, args.lr, rate, weight_decay=args.weight_decay)
        self.quantizers: torch.optim.Optimizer | None = None
        if args.quantizer_optimizer == "adam":
            own = [group for group in groups if group["name"] == "quantizers"]
            groups = [group for group in groups if group["name"] != "quantizers"]
            self.quantizers = torch.optim.Adam(own) if own else None
        if args.optimizer == "adamw":
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, args.lr)
        else:
            self.optimizer = torch.optim.SGD(groups, args.lr, momentum=0.9, nesterov=True)
        self.freezing = pege_fx.WeightFreezing(self.gm, late(args.freeze, total), momentum=0.001) if args.freeze else None
        self.dampening = late(args.dampen, total) if args.dampen else None
        start = 0.2 if args.estimator.startswith("pege") else 1.0
        self.scheduler = PEGEScheduler(
            self.gm,
            total,
            Constant(1.0) if start == 1 else LogReplacement.reaching_one_at(max(total / 2, 2), start),
            Exponential(1e-8, 1e-6, total),
            Exponential(1e-9, 5e-8, total),
        )
        warmup = min(args.warmup, total // 10 + 1)
        optimizers = [self.optimizer] if self.quantizers is None else [self.optimizer, self.quantizers]
        self.lr = [
            torch.optim.lr_scheduler.LambdaLR(one, lambda t: min((t + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * t / total)))
            for one in optimizers
        ]
        self.total = total
        self.guard = Guard(self.gm)
        self.called = torch.compile(self.model) if args.compile else self.model

    def save(self) -> None:
        extra = {"settings": self.settings, "epoch": self.epoch, "step": self.step}
        extra |= {"history": self.history, "lr": [schedule.state_dict() for schedule in self.lr]}
        extra |= {"quantizers": None if self.quantizers is None else self.quantizers.state_dict()}
        extra |= {"freezing": None if self.freezing is None else self.freezing.state_dict()}
        pege_fx.save(self.gm, self.path, scheduler=self.scheduler, optimizer=self.optimizer, extra=extra)

    def resume(self) -> None:
        """Go on from the newest checkpoint that reads well, if there is one."""
        found = pege_fx.newest(self.path)
        if found is None:
            return
        extra = pege_fx.checkpoint_info(found).extra
        for name, value in self.settings.items():
            if (there := extra["settings"].get(name)) != value:
                raise UserError(f"{found} was made with {name}={there}, not {value}: give another --output, or delete it.")
        pege_fx.load(found, self.gm, scheduler=self.scheduler, optimizer=self.optimizer)
        self.epoch, self.step, self.history = extra["epoch"], extra["step"], extra["history"]
        for schedule, state in zip(self.lr, extra["lr"], strict=True):
            schedule.load_state_dict(state)
        for part, state in ((self.quantizers, extra["quantizers"]), (self.freezing, extra["freezing"])):
            if part is not None:
                part.load_state_dict(state)
        say(f"goes on from {found}: epoch {self.epoch + 1}, step {self.step}")

    def loss_of(self, x: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp):
            logits = self.called(x)
            with torch.no_grad():
                taught = None if self.teacher is None else F.log_softmax(self.teacher(x).float(), 1)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.args.smoothing)
        if self.dampening is not None:
            done = self.epoch * self.batches.steps + self.step
            loss = loss + self.dampening(done) * pege_fx.dampening_loss(self.gm, "kernel_mean")
        if taught is None:
            return loss
        soft = F.kl_div(F.log_softmax(logits.float(), 1), taught, reduction="batchmean", log_target=True)
        return (1 - self.args.distill) * loss + self.args.distill * soft

    def run_epoch(self) -> None:
        self.model.train()
        self.batches.epoch, self.batches.start = self.epoch, self.step
        started, losses, first = time.perf_counter(), [], self.step
        for x, labels in self.train:
            x = x.to(self.device, non_blocking=True, memory_format=torch.channels_last)
            loss = self.loss_of(x, labels.to(self.device, non_blocking=True))
            if self.step % self.args.log_every == 0:
                self.guard.check(loss, x)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.quantizers is not None:
                self.quantizers.step()
                self.quantizers.zero_grad()
            if self.freezing is not None:
                self.freezing.step()
            for schedule in self.lr:
                schedule.step()
            self.scheduler.step()
            losses.append(loss.detach())
            self.step += 1
            if self.step % self.args.log_every == 0 or self.step == self.batches.steps:
                rate = (self.step - first) * self.args.batch_size / (time.perf_counter() - started)
                left = (self.args.epochs - self.epoch) * self.batches.steps - self.step
                eta = timedelta(seconds=round(left * self.args.batch_size / rate))
                weight, activation = self.scheduler.lambdas
                where = f"epoch {self.epoch + 1}/{self.args.epochs}  step {self.step}/{self.batches.steps}"
                say(where, f"loss {loss.item():.4f}  p {self.scheduler.rate:.3f}  λ {weight:.1e} {activation:.1e}")
                say(f"  {rate:.0f} images/s  ETA {eta}")
            if self.args.save_every and self.step % self.args.save_every == 0 and self.step < self.batches.steps:
                self.save()
        row = {
            "epoch": self.epoch + 1,
            "loss": torch.stack(losses).mean().item() if losses else math.nan,
            "p": self.scheduler.rate,
        }
        if self.args.reestimate:
            self.reestimate()
        row |= {"top1": self.evaluate(), "seconds": time.perf_counter() - started}
        self.history.append(row)
        self.epoch, self.step = self.epoch + 1, 0
        say(f"epoch {self.epoch}: top-1 {row['top1']:.2f} %")
        self.save()

    def reestimate(self) -> None:
        """BatchNorm's statistics for the weights as they are, from some training batches."""
        self.batches.epoch, self.batches.start = self.epoch, 0
        images = (
            x.to(self.device, memory_format=torch.channels_last) for x, _ in itertools.islice(self.train, self.args.reestimate)
        )
        pege_fx.reestimate_batch_norm(self.gm, images)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return top-1 in percent over all processes."""
        self.model.eval()
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        count, size = len(self.test.dataset), self.args.batch_size  # type: ignore[arg-type]
        rank, ranks = rank_and_size()
        for step, (x, labels) in enumerate(self.test):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp):
                predicted = self.gm(x.to(self.device, memory_format=torch.channels_last)).argmax(1).cpu()
            position = step * size + rank * (size // ranks) + torch.arange(len(labels))
            right += ((predicted == labels) & (position < count)).sum().to(self.device)
        if dist.is_initialized():
            dist.all_reduce(right)
        return 100 * right.item() / count

    def write_results(self) -> dict[str, Any]:
        results: dict[str, Any] = {"settings": self.settings, "history": self.history, "processes": rank_and_size()[1]}
        results["finished"] = self.epoch == self.args.epochs
        if self.args.recipe:
            recipe = RECIPES[self.args.recipe]
            results["published"] = {"top1": recipe.top1, "source": recipe.source, "differs": recipe.differs}
        if rank_and_size()[0] == 0:
            folder = Path(self.args.output)
            (folder / "results.json").write_text(json.dumps(results, indent=1))
            with open(folder / "history.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, list(self.history[0]) if self.history else [])
                writer.writeheader()
                writer.writerows(self.history)
        return results


# --- the command ---------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--data-dir", required=True, help="ImageFolder with train/ and val/")
    add("--output", default="runs/imagenet", help="folder of checkpoints and results, seen by every process")
    add("--model", default="resnet18", help="any classifier of torchvision: resnet18, mobilenet_v2, ...; or timm:NAME")
    add("--weights", default="DEFAULT", help="float weights: DEFAULT (torchvision's), none, or the file of a state_dict")
    add("--bits", default="W4A4")
    add("--method", default="pact", choices=("lsq", "pact", "dorefa", "interval", "minmax"))
    add("--estimator", default="pege", choices=("pege", "ste", "ewgs", "pege-relative"))
    add("--distill", type=float, default=0.0, metavar="SHARE", help="of the loss: to be like the float model, 0 to 1")
    add("--epochs", type=int, default=100)
    add("--batch-size", type=int, default=512, help="over all processes")
    add("--lr", type=float, default=0.01)
    add("--warmup", type=int, default=2500, help="steps; at most a tenth of the training")
    add("--image-size", type=int, default=224)
    add("--seed", type=int, default=0)
    add("--parallel", default="ddp", choices=("ddp", "fsdp"))
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--amp", action=switch, help="bfloat16 autocast; default: on CUDA")
    add("--compile", action="store_true")
    add("--workers", type=int, default=8)
    add(
        "--on-corrupt",
        default="stop",
        choices=("stop", "skip"),
        help="at an image that can not be read; either way it is named",
    )
    add("--log-every", type=int, default=50, help="steps")
    add("--save-every", type=int, default=1000, help="steps, beside the end of each epoch; 0: there only")
    add("--recipe", choices=tuple(RECIPES), help="settings of a published row; options that are given too count for more")
    add("--ends", default="float", help="bits of the first and the last layer, or float")
    add("--granularity", choices=("tensor", "channel"), help="of weights' scales; default: by the method")
    add("--optimizer", default="sgd", choices=("sgd", "adamw"))
    add("--quantizer-lr", type=float, help="of scales and clips; default: a tenth of --lr")
    add("--quantizer-optimizer", choices=("adam",), help="of their own; default: --optimizer")
    add("--weight-decay", type=float, default=1e-4)
    add("--smoothing", type=float, default=0.1, help="of labels")
    add("--dampen", type=float, nargs=2, metavar=("A", "B"), help="oscillation dampening, along a cosine after a quarter")
    add("--freeze", type=float, nargs=2, metavar=("A", "B"), help="threshold of freezing, along a cosine after a quarter")
    add("--reestimate", type=int, default=0, metavar="BATCHES", help="BatchNorm, before each evaluation")
    chosen = parser.parse_known_args(argv)[0].recipe
    if chosen is not None:
        parser.set_defaults(**RECIPES[chosen].options)
    args = parser.parse_args(argv)
    for name in ("epochs", "batch_size", "image_size", "log_every", "warmup"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    device = begin(args)
    train, test, classes = loaders(args)
    model = float_model(args, classes).to(device, memory_format=torch.channels_last)
    training = Training(args, train, test, model)
    training.resume()
    if args.recipe:
        recipe = RECIPES[args.recipe]
        say(f"recipe {args.recipe}: top-1 {recipe.top1} % in {recipe.source}; but: {recipe.differs}")
    while training.epoch < args.epochs:
        training.run_epoch()
    return training.write_results()


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    try:
        return run(args)
    except (UserError, pege_fx.PegeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error
    finally:
        if dist.is_initialized():
            if sys.exc_info()[0] is None:
                dist.barrier()
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
