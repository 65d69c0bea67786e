"""Freezing weights that oscillate between two codes."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from pege_fx.errors import CheckpointError, ModelError, ScheduleError
from pege_fx.modules.stages import check_stage, refuse_shards
from pege_fx.training.quantized_weights import quantized_weights


class WeightFreezing:
    """Iterative freezing of oscillating weights (Nagel et al. 2022, Algorithm 1). Call ``step()`` after the optimizer's.

    For each weight, with the sign of the change of its code at step t and that of its last change before:

        o_t = 1 if the code changes, and in the other direction than at its last change, else 0
        f_t = m o_t + (1 - m) f_{t-1}                the frequency of oscillation
        e_t = m code_t + (1 - m) e_{t-1}             the average code, e_0 = code_0

    A weight with f_t above the threshold is frozen at round(e_{t-1}), as in the authors' code: it keeps this code for good,
    and lies in its middle wherever the scale goes. What the optimizer does to it is undone.

    Args:
        gm: a prepared and calibrated model.
        threshold: of f, above 0: a number, or a curve over the steps. The paper lets it fall along a cosine:
            ``Cosine(0.1, 0.01, steps)`` for 4 bits, to 0.011 for 3.
        momentum: m; below the threshold, or the first oscillation freezes. The authors' command for ImageNet has 0.001.
        max_bits: weights of more bits are left alone; the authors' 4.

    Raises:
        ModelError: if no weight can be frozen: none of so few bits, or none whose method's grid lies over the weight itself.
        ScheduleError: for a threshold or momentum out of range.

    >>> import pege_fx
    >>> policy = pege_fx.QuantPolicy.parse("W3A3", last="3")
    >>> gm = pege_fx.prepare(torch.nn.Sequential(torch.nn.Linear(4, 4)), policy, torch.randn(2, 4))
    >>> freezing = WeightFreezing(gm, pege_fx.Cosine(0.1, 0.01, steps=100))
    >>> freezing.step()  # after optimizer.step()
    >>> freezing.frozen
    0.0
    """

    def __init__(
        self, gm: GraphModule, threshold: Callable[[float], float] | float, momentum: float = 0.01, max_bits: int = 4
    ) -> None:
        check_stage(gm, "prepared")
        refuse_shards(gm, "freeze the weights of a model that is not sharded")
        self.threshold = threshold if callable(threshold) else _constant(threshold)
        if not 0 < momentum <= 1:
            raise ScheduleError(f"momentum={momentum!r} must lie in (0, 1].")
        if not self.threshold(0) > 0:
            raise ScheduleError(f"threshold gives {self.threshold(0)!r} at t = 0: a frequency to freeze at is above 0.")
        self.momentum, self.t = momentum, 0
        self._weights = {
            name: weight
            for name, weight in quantized_weights(gm).items()
            if weight.is_direct and weight.fq.site.spec.bits <= max_bits
        }
        if not self._weights:
            raise ModelError(
                f'no weight can be frozen: none has {max_bits} bits or fewer and a method such as "lsq" or "minmax",\n'
                "  whose grid lies over the weight itself."
            )
        self._states: dict[str, dict[str, Tensor]] = {}

    def _state_of(self, name: str, codes: Tensor) -> dict[str, Tensor]:
        if name not in self._states:
            self._states[name] = {
                "codes": codes,
                "direction": torch.zeros_like(codes, dtype=torch.int8),
                "frequency": torch.zeros_like(codes, dtype=torch.float32),
                "average": codes.float(),
                "frozen": torch.zeros_like(codes, dtype=torch.bool),
            }
        return self._states[name]

    @torch.no_grad()
    def step(self) -> None:
        """Take the codes of this step in, freeze what oscillates too often, and put back what is frozen."""
        threshold = self.threshold(self.t)
        for name, weight in self._weights.items():
            if not weight.fq.is_calibrated:
                continue
            now = weight.codes()
            state = self._state_of(name, now.to(torch.int16))
            frozen, before = state["frozen"], state["codes"]
            codes = torch.where(frozen, before, now.to(torch.int16))
            direction = torch.sign(codes - before).to(torch.int8)
            oscillated = direction * state["direction"] == -1
            state["frequency"].lerp_(oscillated.float(), self.momentum)
            newly = (state["frequency"] > threshold) & ~frozen
            average = state["average"].round().to(torch.int16)
            state["codes"] = torch.where(newly, average, codes)
            state["average"].lerp_(codes.float(), self.momentum)
            state["direction"] = torch.where(direction != 0, direction, state["direction"])
            state["frozen"] = frozen | newly
            middle = weight.weights_of(state["codes"])
            weight.parameter.copy_(torch.where(state["frozen"], middle, weight.parameter))
        self.t += 1

    @property
    def frozen(self) -> float:
        """Share of the weights that are frozen, of those that may be."""
        count = sum(weight.parameter.numel() for weight in self._weights.values())
        return sum(int(state["frozen"].sum()) for state in self._states.values()) / count

    def state_dict(self) -> dict[str, Any]:
        """Return position, codes, frequencies, averages and what is frozen: for ``pege_fx.save(..., extra=...)``."""
        return {"t": self.t, "sites": {name: dict(state) for name, state in self._states.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; ``CheckpointError`` if it belongs to other weights."""
        known = {name: tuple(weight.parameter.shape) for name, weight in self._weights.items()}
        for name, tensors in state["sites"].items():
            if tuple(tensors["codes"].shape) != known.get(name):
                raise CheckpointError(f"the state of the frozen weights has {name}, which is not there or has another shape.")
        self.t = state["t"]
        self._states = {
            name: {key: value.clone().to(self._weights[name].parameter.device) for key, value in tensors.items()}
            for name, tensors in state["sites"].items()
        }


def _constant(value: float) -> Callable[[float], float]:
    return lambda _: value
