"""One of several processes with synchronised BatchNorms on the CPU, where torch only evaluates them.

Usage: sync_norm.py RANK SIZE FOLDER. Writes FOLDER/<rank>.pt.
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import pege_fx
from pege_fx.testing import as_trained


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=50))
    torch.manual_seed(0)
    model = as_trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)), 0)
    images = torch.randn(4, 3, 6, 6)
    with pege_fx.kernels.eager_kernels():
        gm = nn.SyncBatchNorm.convert_sync_batchnorm(pege_fx.prepare(model, "W4A4", (images,)))
        try:
            gm.train()(images)
            error = ""
        except ValueError as refusal:
            error = str(refusal)
        with torch.no_grad():
            evaluated, deployed = gm.eval()(images), pege_fx.convert(gm)(images)
        gm.train().get_submodule("1").eval()  # statistics that stand still need no other process
        gm(images).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in gm.named_parameters() if parameter.grad is not None}
    torch.save({"error": error, "evaluated": evaluated, "deployed": deployed, "gradients": gradients}, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
