"""A training run that prints a digest of all that it ends with: model, optimizer, telemetry, and what is deployed."""

import hashlib
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import pege_fx

torch.use_deterministic_algorithms(True)
torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(
    nn.Embedding(9, 4), nn.Conv1d(5, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2),
    nn.Conv1d(8, 8, 3, groups=2), nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(16, 4),
)  # fmt: skip
rules = (
    pege_fx.Rule(weight="4", input="4", output=None),
    pege_fx.Rule(module="Conv1d", weight=pege_fx.QuantSpec(bits=2, method="interval"), schedule="convolutions"),
    pege_fx.Rule(match="8", input=pege_fx.QuantSpec(bits=4, method="minmax", estimator="ewgs")),
)
gm = pege_fx.prepare(net, pege_fx.QuantPolicy(rules), torch.randint(9, (8, 5)))
optimizer = torch.optim.Adam(pege_fx.parameter_groups(gm, lr=1e-2, quantizer_lr=1e-3))
scheduler = pege_fx.PEGEScheduler(gm, 30)
with pege_fx.kernels.eager_kernels(), pege_fx.Telemetry(gm, every=10) as telemetry:
    for _ in range(30):
        loss = F.cross_entropy(gm(torch.randint(9, (8, 5))), torch.randint(4, (8,))) + 1e-3 * pege_fx.discretization_loss(gm)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        telemetry.step()
with warnings.catch_warnings(action="ignore"):
    deployed = pege_fx.convert(gm.eval())
found: list[Any] = [gm.state_dict(), optimizer.state_dict(), telemetry.history, deployed.state_dict(), gm.code, deployed.code]
digest = hashlib.sha256()
for leaf in tree_leaves(found):
    digest.update(leaf.detach().numpy().tobytes() if isinstance(leaf, Tensor) else repr(leaf).encode())
print(float(loss.detach()), digest.hexdigest())
