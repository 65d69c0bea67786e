"""A training run under torchrun that goes on from its last checkpoint; the last rank dies once, without a word.

Usage: torchrun ... elastic.py FOLDER DIES_AT. Writes FOLDER/state, and FOLDER/log: "<restart> <step>" for each step.
"""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import pege_fx

folder, dies_at, steps = Path(sys.argv[1]), int(sys.argv[2]), 6
dist.init_process_group("gloo", timeout=timedelta(seconds=30))
rank, size = dist.get_rank(), dist.get_world_size()
restart = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))
gm = pege_fx.prepare(net, "W3A3", (torch.randn(8, 6),))
model = DistributedDataParallel(gm)
optimizer = torch.optim.Adam(pege_fx.parameter_groups(gm, lr=1e-2))
scheduler = pege_fx.PEGEScheduler(gm, steps)
torch.manual_seed(rank)
state = folder / "state"
if state.exists():
    pege_fx.load(state, model, scheduler=scheduler, optimizer=optimizer)
while scheduler.t < steps:
    x = torch.randn(8, 6)
    loss = F.cross_entropy(model(x), (3 * torch.rand(8)).long())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    if restart == 0 and rank == size - 1 and scheduler.t == dies_at:
        os.kill(os.getpid(), signal.SIGKILL)
    pege_fx.save(model, state, scheduler=scheduler, optimizer=optimizer)
    if rank == 0:
        with open(folder / "log", "a") as file:
            file.write(f"{restart} {scheduler.t}\n")
dist.barrier()  # or one of them hangs up while another still listens
dist.destroy_process_group()
