"""One of several processes that train together; what each found is compared by the test.

Usage: rank.py TASK RANK SIZE FOLDER. Writes FOLDER/<rank>.pt.
"""

import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import pege_fx
from pege_fx import Constant, PEGEScheduler, QuantPolicy, QuantSpec, Rule
from pege_fx._utils.collectives import whole

METHODS = ("lsq", "pact", "dorefa", "interval", "minmax")
STEPS, BATCH = 4, 12


class Block(nn.Module):
    """Stays Python, because of the branch: its convolutions become graphs of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if x.abs().sum() >= 0 else x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.middle = nn.Conv2d(3, 6, 3, padding=1), Block(), nn.Conv2d(6, 5, 3, bias=False)
        self.norm, self.head = nn.BatchNorm2d(5).eval(), nn.Linear(5 * 4 * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        x = self.norm(self.middle(F.relu(y + self.block(y))))
        out: Tensor = self.head(F.relu(x).flatten(1))
        return out


def batches() -> list[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(3)
    return [
        (torch.randn(BATCH, 3, 6, 6, generator=made).double(), torch.randint(4, (BATCH,), generator=made)) for _ in range(STEPS)
    ]


def part(x: Tensor, rank: int, size: int) -> Tensor:
    return x.chunk(size)[rank]


def prepared(method: str, estimator: str = "pege", batch_norm: str = "freeze", recompute: bool = False) -> Any:
    """Not calibrated."""
    torch.manual_seed(0)
    net = Net().double()  # so that rounding does not move an element over the edge of a step
    policy = QuantPolicy.parse("W3A3", first="4", last="4", method=method, estimator=estimator)
    sums = Rule(function="add", input=QuantSpec(bits=4, method=method, estimator=estimator), shared_scale=True)
    policy = QuantPolicy((*policy.rules, sums, Rule(recompute=recompute)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pege_fx.PegeWarning)  # that the block stays Python
        return pege_fx.prepare(net, policy, batch_norm=batch_norm)


def trained(
    gm: Any, rank: int, size: int, wrap: Any = lambda gm: gm, calibrated: bool = True, state: Path | None = None
) -> dict[str, Any]:
    """Train for a few steps on this process's part of each batch, by way of a checkpoint if told so; return what was seen."""
    data = [(part(x, rank, size), part(labels, rank, size)) for x, labels in batches()]
    if calibrated:
        pege_fx.calibrate(gm, [x for x, _ in data[:2]])
    model = wrap(gm)
    scheduler = PEGEScheduler(gm, 2 * STEPS, Constant(0.5), Constant(1e-2), Constant(1e-3))
    optimizer = torch.optim.SGD(pege_fx.parameter_groups(gm, 0.05, 0.01), momentum=0.9)
    replaced: dict[str, Tensor] = {}

    def note(site: pege_fx.FakeQuant, x: tuple[Tensor], y: Tensor) -> None:
        replaced.setdefault(site.site.name, (x[0] != y).detach())

    for site in pege_fx.fake_quants(gm).values():
        site.register_forward_hook(note)
    losses = []
    for step, (x, labels) in enumerate(data):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if state is not None and step == STEPS // 2:
            pege_fx.save(model, state, scheduler=scheduler, optimizer=optimizer, extra={"step": step})
            gm = prepared("lsq")
            model = wrap(gm)
            scheduler = PEGEScheduler(gm, 2 * STEPS, Constant(0.5), Constant(1e-2), Constant(1e-3))
            optimizer = torch.optim.SGD(pege_fx.parameter_groups(gm, 0.05, 0.01), momentum=0.9)
            pege_fx.load(state, model, scheduler=scheduler, optimizer=optimizer)
    return {"state": whole(gm.state_dict()), "loss": losses, "replaced": replaced}


def ddp(rank: int, size: int, folder: Path) -> dict[str, Any]:
    runs = {f"{method} pege": (method, "pege", True) for method in METHODS}
    runs |= {"lsq ste": ("lsq", "ste", True), "lsq at the first batch": ("lsq", "pege", False)}
    found = {
        name: trained(prepared(method, estimator), rank, size, DistributedDataParallel, calibrated)
        for name, (method, estimator, calibrated) in runs.items()
    }
    again = trained(prepared("lsq", recompute=True), rank, size, DistributedDataParallel)
    return found | {"lsq pege made again in backward": again}


def fsdp(rank: int, size: int, folder: Path) -> dict[str, Any]:
    found = {f"{method} pege": trained(prepared(method), rank, size, pege_fx.shard) for method in METHODS}
    return found | {"lsq pege made again in backward": trained(prepared("lsq", recompute=True), rank, size, pege_fx.shard)}


def fsdp_of_others(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """As whatever shards by itself does it; it wants parameters of one dtype."""
    return {"lsq pege": trained(prepared("lsq").double(), rank, size, fully_shard)}


def resumed(rank: int, size: int, folder: Path) -> dict[str, Any]:
    ways = {"ddp": DistributedDataParallel, "fsdp": pege_fx.shard}
    return {name: trained(prepared("lsq"), rank, size, wrap, state=folder / name) for name, wrap in ways.items()}


TASKS = {"ddp": ddp, "fsdp": fsdp, "fsdp_of_others": fsdp_of_others, "resumed": resumed}

if __name__ == "__main__":
    task, rank, size, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    torch.save(TASKS[task](rank, size, folder), folder / f"{rank}.pt")
    dist.barrier()  # or one of them hangs up while another still listens
    dist.destroy_process_group()
