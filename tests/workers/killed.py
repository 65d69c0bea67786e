"""A training run that saves after every step and goes on from its last checkpoint; somebody may kill it at any moment.

Usage: killed.py FOLDER STEPS. Writes FOLDER/state (the checkpoint) and, at the end, FOLDER/done.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import pege_fx

folder, steps = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
torch.manual_seed(0)
net = nn.Sequential(
    nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4)
)
gm = pege_fx.prepare(net, pege_fx.QuantPolicy.parse("W2A2", method="interval"), (torch.randn(8, 3, 8, 8),))
optimizer = torch.optim.Adam(pege_fx.parameter_groups(gm, lr=1e-2, quantizer_lr=1e-3))
scheduler = pege_fx.PEGEScheduler(gm, steps)
cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
first, state = 0, folder / "state"
if pege_fx.newest(state) is not None:
    pege_fx.load(state, gm, scheduler=scheduler, optimizer=optimizer)
    extra = pege_fx.checkpoint_info(state).extra
    first = extra["step"]
    cosine.load_state_dict(extra["cosine"])
for step in range(first, steps):
    x, labels = torch.randn(16, 3, 8, 8), torch.randint(4, (16,))  # from the generator that the checkpoint restores
    loss = F.cross_entropy(gm(x), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    cosine.step()
    extra = {"step": step + 1, "cosine": cosine.state_dict()}
    pege_fx.save(gm, state, scheduler=scheduler, optimizer=optimizer, extra=extra)
(folder / "done").touch()
