"""Frozen BatchNorms, as detectors have them: normalisation by fixed statistics, found by what they compute."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TENSORS = {"weight", "bias", "running_mean", "running_var"}
_USUAL_EPS = 1e-5


class FrozenNorm(nn.Module):
    """BatchNorm whose statistics and affine parameters are buffers: one operation, which a layer beside it can take over."""

    eps: float
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps)


def freeze_norm(module: nn.Module) -> bool:
    """Turn a module that computes ``FrozenNorm`` into one, in place; tell whether it does."""
    eps = _eps_of(module)
    if eps is not None:
        module.__class__ = FrozenNorm
        vars(module)["eps"] = eps
    return eps is not None


def _eps_of(module: nn.Module) -> float | None:
    """The eps of a module that computes ``FrozenNorm``, as torchvision's ``FrozenBatchNorm2d`` does; None for any other.

    It has four buffers and nothing else, and gives what BatchNorm gives in both modes, on statistics other than its own.
    """
    buffers = dict(module.named_buffers())
    if set(buffers) != _TENSORS or any(True for _ in (*module.parameters(), *module.children())):
        return None
    if any(buffer.is_meta or buffer.ndim != 1 for buffer in buffers.values()):
        return None
    tried = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    for buffer in tried.buffers():
        drawn = torch.rand(buffer.shape, generator=generator) * 1e-4  # so that eps shows
        buffer.copy_(drawn.to(buffer))
    frozen = copy.deepcopy(tried)
    frozen.__class__ = FrozenNorm
    assert isinstance(frozen, FrozenNorm)
    x = torch.randn(2, buffers["weight"].numel(), 3, 3, generator=generator).to(buffers["weight"])
    for eps in {float(getattr(module, "eps", _USUAL_EPS)), _USUAL_EPS}:
        frozen.eps = eps
        try:
            for training in (True, False):
                with torch.no_grad():
                    torch.testing.assert_close(tried.train(training)(x), frozen(x))
        except Exception:
            continue  # it computes something else, or can not be tried
        return eps
    return None
