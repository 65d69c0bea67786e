"""Which part of a site's gradient, and of a weight's update, is the estimator's own term: PEGE's λ (x_c - y), EWGS' δ."""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pege_fx.modules.fake_quant import FakeQuant
from pege_fx.numerics.discretizer import parts_of_gradient
from pege_fx.training.quantized_weights import QuantizedWeight


class LambdaShares:
    """Measures, in hooks on the discretizers' autograd nodes, what the estimator's strength adds.

    The share of the gradient is ``sum |t| / (sum |t| + sum |g|)`` over a site, with t the term that the strength adds to
    dL/dx_c and g the rest.

    The share of the update is the same of the two parts of what the optimizer's moving average holds. That average is linear
    in the gradients, so it is the sum of an average of t, kept here, and one of g; Adam divides both by the same root. Weight
    decay that is added to the gradient belongs to g.

    Args:
        weights: whose terms are averaged as the optimizer averages their gradients.
        optimizer: Adam, AdamW or SGD; None measures gradients alone.
    """

    def __init__(self, weights: Mapping[str, QuantizedWeight], optimizer: torch.optim.Optimizer | None) -> None:
        known = {} if optimizer is None else _groups(optimizer)
        self._weights = {n: w for n, w in weights.items() if w.is_direct and w.parameter in known}
        self._optimizer, self._groups = optimizer, known
        self._sums: dict[str, Tensor] = {}
        self._terms: dict[str, Tensor] = {}
        self._averages: dict[str, Tensor] = {}

    def watch(self, name: str, fq: FakeQuant, looking: bool) -> None:
        """Measure in the backward of the forward that has just run."""
        if torch.compiler.is_compiling() or not (looking or name in self._weights):
            return
        for node in fq.last_nodes()[-1:]:
            self._watch(name, fq, node, looking)

    def _watch(self, name: str, fq: FakeQuant, node: Any, looking: bool) -> None:
        seen = weakref.ref(node)  # a hook that held its node would keep the forward's tensors alive
        factor = self._factor(name)  # now: the BatchNorm's statistics move before backward

        def measure(gradients: tuple[Tensor | None, ...]) -> None:
            here, grad = seen(), gradients[0]
            if here is None or grad is None:
                return
            with torch.no_grad():
                rest, term = parts_of_gradient(fq.estimator, here, grad)
                if looking:
                    sums = torch.stack([term.abs().sum(), rest.abs().sum()])
                    self._sums[name] = sums + self._sums[name] if name in self._sums else sums
                if name in self._weights:
                    self._add_term(name, term * factor)

        def forget(*_: Any) -> None:
            if (here := seen()) is not None:
                here.remembered = None  # in it is y, which knows its node

        node.register_prehook(measure)
        node.register_hook(forget)

    def _factor(self, name: str) -> Tensor | float:
        """dx_c over dw: 1, or the factor of the BatchNorm that the weight is multiplied by."""
        fold = self._weights[name].fq.fold if name in self._weights else None
        if fold is None or (fold.live and self._weights[name].fq.method.channels is not None):
            return 1.0
        return self._weights[name].factor()

    def _add_term(self, name: str, term: Tensor) -> None:
        schedule = self._weights[name].fq.schedule
        if schedule.is_scaled:
            term = term / schedule.loss_scale  # the optimizer gets unscaled gradients
        self._terms[name] = term + self._terms[name] if name in self._terms else term

    def step(self) -> None:
        """Average the terms of this step; call it after the optimizer's step."""
        for name, weight in self._weights.items():
            term = self._terms.pop(name, None)
            if term is None:
                continue
            kept, added = _rates(self._optimizer, self._groups[weight.parameter])
            before = self._averages.get(name)
            self._averages[name] = added * term if before is None else kept * before + added * term

    def of_gradient(self) -> dict[str, Tensor]:
        """The share of each site's gradient that was measured since the last question, 0-d; and begin anew."""
        found, self._sums = self._sums, {}
        return {name: _share(*sums) for name, sums in found.items()}

    def of_update(self) -> dict[str, Tensor]:
        """The share of the present update of each weight, 0-d."""
        found = {}
        for name, average in self._averages.items():
            parameter = self._weights[name].parameter
            whole, root = _update_of(self._optimizer, parameter)
            if whole is not None:
                found[name] = _share((average / root).abs().sum(), ((whole - average) / root).abs().sum())
        return found


def _share(term: Tensor, rest: Tensor) -> Tensor:
    return term / (term + rest).clamp(min=torch.finfo(term.dtype).tiny)


def _groups(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, dict[str, Any]]:
    return {parameter: group for group in optimizer.param_groups for parameter in group["params"]}


def _rates(optimizer: Any, group: Mapping[str, Any]) -> tuple[float, float]:
    """The factors of the old average and of the new gradient."""
    if isinstance(optimizer, torch.optim.SGD):
        return float(group["momentum"]), 1.0
    beta = float(group["betas"][0])
    return beta, 1.0 - beta


def _update_of(optimizer: Any, parameter: nn.Parameter) -> tuple[Tensor | None, Tensor | float]:
    """The average that the optimizer holds for a parameter, and what it divides by; None if it holds none."""
    state = optimizer.state.get(parameter, {})
    if isinstance(optimizer, torch.optim.SGD):
        whole = state.get("momentum_buffer")
        whole = parameter.grad if whole is None else whole
        return whole, 1.0
    if "exp_avg" not in state:
        return None, 1.0
    group = _groups(optimizer)[parameter]
    square = state.get("max_exp_avg_sq", state["exp_avg_sq"])
    root = (square / (1 - group["betas"][1] ** float(state["step"]))).sqrt()
    bias = 1 - group["betas"][0] ** float(state["step"])
    return state["exp_avg"], (root + group["eps"]) * bias


KNOWN_OPTIMIZERS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
