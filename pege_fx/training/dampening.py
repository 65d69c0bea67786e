"""Pulling weights to the middle of their code: by a term of the loss (dampening), or beside the optimizer (decoupled λ)."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pege_fx.errors import ModelError, ScheduleError
from pege_fx.modules.stages import check_stage, refuse_shards
from pege_fx.training.quantized_weights import QuantizedWeight, quantized_weights


def dampening_loss(gm: nn.Module, reduction: Literal["sum", "kernel_mean"] = "sum") -> Tensor:
    """Return the oscillation dampening loss of all quantized weights, 0-d, differentiable in the weights.

    Nagel et al., "Overcoming Oscillations in Quantization-Aware Training" (ICML 2022), eq. 7: the sum over weights of

        || w_q - clip(w, lowest value of the grid, highest) ||^2,    w_q held constant

    Add it to the loss with a factor that grows along a cosine, ``loss + Cosine(0, end, steps)(step) * dampening_loss(gm)``.
    The authors' code takes the mean over what one output channel reads instead (``"kernel_mean"``), a factor from 0 to 0.1,
    and begins after a quarter of the training.

    Where no weight is clipped, half of its gradient is PEGE's term with λ = 1 at p = 1. It has no gradient for clipped
    weights and for scales.

    w is what the discretizer sees, in float32 at least: with one scale per channel the weight itself, with one per tensor the
    weight times its BatchNorm's factor. A forward method's own transform (DoReFa's tanh) is ordinary autograd.

    Args:
        gm: a prepared model.
        reduction: "sum" over all elements, as in the paper; or "kernel_mean": the sum over the first dimension of a weight,
            the mean over the others.

    Raises:
        ModelError: if the model has no quantized weight that is a parameter.
        ScheduleError: for another reduction.

    >>> import pege_fx
    >>> gm = pege_fx.prepare(nn.Sequential(nn.Linear(4, 4)), "W4A4", torch.randn(2, 4))
    >>> dampening_loss(gm).item() > 0
    True
    """
    check_stage(gm, "prepared")
    if reduction not in ("sum", "kernel_mean"):
        raise ScheduleError(f'reduction={reduction!r}: give "sum" or "kernel_mean".')
    terms = []
    for weight in _calibrated(gm):
        low, high = weight.ends()
        x = weight.continuous().to(low.dtype)
        clipped = torch.minimum(torch.maximum(x, low), high)
        squares = (weight.discretized() - torch.where(x == clipped, x, clipped.detach())).square()
        terms.append(squares.sum() if reduction == "sum" else squares.sum(0).mean())
    return torch.stack(terms).sum()


def _calibrated(gm: nn.Module) -> list[QuantizedWeight]:
    found = [weight for weight in quantized_weights(gm).values() if weight.fq.is_calibrated]
    if not found:
        raise ModelError("no parameter of this model is a quantized weight: give one whose weights a policy quantizes.")
    return found


class DecoupledLambda:
    """PEGE's λ for weights as a share of the update, applied beside the optimizer as AdamW's weight decay is.

    After each step of the optimizer, for each quantized weight w with the movement dw of that step,

        w  <-  w - c (w - w_q),        c = min(share * sum |dw| / sum |w - w_q|, 1)

    so the pull to the nearest code is ``share`` of what the optimizer moves, whichever optimizer that is. λ in a gradient
    is divided by Adam with the gradient's size, and counts for more the noisier the gradients are. Leave the scheduler's
    ``weight_lambda`` at ``Constant(0)`` then.

    Args:
        gm: a prepared model; make this before the first step of the optimizer.
        share: not negative, a number or a curve over the steps. 1 pulls as far as the optimizer moves.

    Raises:
        ModelError: if no quantized weight lies under its grid itself, as those of "lsq" and "minmax" do.
        ScheduleError: for a negative share.

    >>> import pege_fx
    >>> gm = pege_fx.prepare(nn.Sequential(nn.Linear(4, 4)), "W4A4", torch.randn(2, 4))
    >>> pull = DecoupledLambda(gm, pege_fx.Delayed(pege_fx.Cosine(0, 0.3, steps=50), start=50))
    >>> pull.step()  # after optimizer.step()
    """

    def __init__(self, gm: GraphModule, share: Callable[[float], float] | float) -> None:
        check_stage(gm, "prepared")
        refuse_shards(gm, "pull the weights of a model that is not sharded")
        self.share = share if callable(share) else _constant(share)
        if not self.share(0) >= 0:
            raise ScheduleError(f"share gives {self.share(0)!r} at t = 0: it can not be negative.")
        self._weights = [weight for weight in quantized_weights(gm).values() if weight.is_direct]
        if not self._weights:
            raise ModelError(
                'no weight can be pulled: none has a method such as "lsq" or "minmax", with a grid over the weight.'
            )
        self.t = 0
        self._before = [weight.parameter.detach().clone() for weight in self._weights]

    @torch.no_grad()
    def step(self) -> None:
        """Pull the weights, by what they moved since the last call."""
        share = self.share(self.t)
        for weight, before in zip(self._weights, self._before, strict=True):
            parameter = weight.parameter
            if share and weight.fq.is_calibrated:
                away = parameter - weight.weights_of(weight.codes())
                size = away.abs().sum().clamp(min=torch.finfo(away.dtype).tiny)
                pull = (share * (parameter - before).abs().sum() / size).clamp(max=1)
                parameter.sub_(pull * away)
            before.copy_(parameter)
        self.t += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the position, for ``pege_fx.save(..., extra=...)``: the rest are the weights."""
        return {"t": self.t}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position; load the weights before."""
        self.t = state["t"]
        for weight, before in zip(self._weights, self._before, strict=True):
            before.copy_(weight.parameter.detach())


def _constant(value: float) -> Callable[[float], float]:
    return lambda _: value
