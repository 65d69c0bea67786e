r"""Any torchvision classifier on ImageNet, or another ImageFolder, in low bits; on one process or many.

    torchrun --nproc-per-node=8 examples/imagenet.py --data-dir /data/imagenet --model resnet18 --output runs/resnet18
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=host:29400 examples/imagenet.py ...
    python examples/imagenet.py --data-dir small --weights none --image-size 64 --batch-size 32 --epochs 2   # a first look

The recipe is that of the author's earlier work (ResNet-18 W4A4): first convolution and last linear layer in float, PACT, batch
512 over all processes, 100 epochs of SGD with Nesterov momentum, 2,500 warm-up steps, cosine, label smoothing 0.1, from
torchvision's float weights. It has not been run at full length yet: tests run it on a small ImageFolder.

Which images a step sees, and how they are cropped, follows from seed, epoch and image alone. So N processes see the global
batch of one, and a run that was stopped, killed, or restarted by torchrun (--max-restarts) goes on from its last checkpoint.
On gloo, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for restarts, or a new worker may look for one that is gone.
"""

import argparse
import csv
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
        if weights is None or weights == "DEFAULT":
            return torchvision.models.get_model(args.model, weights=weights, num_classes=None if weights else classes)
        model: nn.Module = torchvision.models.get_model(args.model, num_classes=classes)
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(
            f"--model {args.model} --weights {args.weights}: {error}; give none, DEFAULT, or a state_dict."
        ) from error
    return model


class Training:
    """The model with what moves it on, and where it stands."""

    def __init__(self, args: argparse.Namespace, train: DataLoader[Any], test: DataLoader[Any], model: nn.Module) -> None:
        self.args, self.train, self.test = args, train, test
        self.device, self.path = torch.device(args.device), Path(args.output) / "state.safetensors"
        self.teacher = model.eval() if args.distill else None
        self.settings = {name: getattr(args, name) for name in SETTINGS}
        self.epoch = self.step = 0
        self.history: list[dict[str, float]] = []
        self.batches: Batches = train.batch_sampler  # type: ignore[assignment]
        total = max(args.epochs * self.batches.steps, 1)

        # What pege_fx adds: prepare, parameter groups, a scheduler.
        policy = QuantPolicy.parse(args.bits, first=None, last=None, method=args.method, estimator=args.estimator)
        examples = next(iter(train))[0].to(self.device)
        self.gm = pege_fx.prepare(model.train(), policy, (examples,), seed=args.seed)
        if args.parallel == "fsdp" and dist.is_initialized():
            self.model: nn.Module = pege_fx.shard(self.gm)
        elif dist.is_initialized():
            self.model = DistributedDataParallel(self.gm)
        else:
            self.model = self.gm
        groups = pege_fx.parameter_groups(self.gm, args.lr, args.lr / 10, weight_decay=1e-4)
        self.optimizer = torch.optim.SGD(groups, args.lr, momentum=0.9, nesterov=True)
        start = 0.2 if args.estimator.startswith("pege") else 1.0
        self.scheduler = PEGEScheduler(
            self.gm,
            total,
            Constant(1.0) if start == 1 else LogReplacement.reaching_one_at(max(total / 2, 2), start),
            Exponential(1e-8, 1e-6, total),
            Exponential(1e-9, 5e-8, total),
        )
        warmup = min(args.warmup, total // 10 + 1)
        self.lr = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda t: min((t + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * t / total))
        )
        self.guard = Guard(self.gm)
        self.called = torch.compile(self.model) if args.compile else self.model

    def save(self) -> None:
        extra = {"settings": self.settings, "epoch": self.epoch, "step": self.step}
        extra |= {"history": self.history, "lr": self.lr.state_dict()}
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
        self.lr.load_state_dict(extra["lr"])
        say(f"goes on from {found}: epoch {self.epoch + 1}, step {self.step}")

    def loss_of(self, x: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp):
            logits = self.called(x)
            with torch.no_grad():
                taught = None if self.teacher is None else F.log_softmax(self.teacher(x).float(), 1)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
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
            self.lr.step()
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
        row |= {"top1": self.evaluate(), "seconds": time.perf_counter() - started}
        self.history.append(row)
        self.epoch, self.step = self.epoch + 1, 0
        say(f"epoch {self.epoch}: top-1 {row['top1']:.2f} %")
        self.save()

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
    add("--model", default="resnet18", help="any classifier of torchvision: resnet18, resnet50, mobilenet_v2, ...")
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
