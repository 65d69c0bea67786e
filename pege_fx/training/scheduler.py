"""The schedule of a run: one position, and for each group of sites the curves that p and λ follow."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import GraphModule

from pege_fx._utils.collectives import rank_and_size
from pege_fx.errors import CheckpointError, ModelError, ScheduleError, closest
from pege_fx.modules.fake_quant import FakeQuant, fake_quants
from pege_fx.modules.schedule_state import ScheduleState
from pege_fx.modules.stages import check_stage, refuse_sharded_grids
from pege_fx.numerics.functional import refresh_key
from pege_fx.policy.plan import Plan
from pege_fx.training.curves import Exponential, LogReplacement, RampReplacement


@dataclass(frozen=True, kw_only=True)
class GroupCurves:
    """What a schedule group follows instead of the scheduler's own curves; None keeps those.

    Args:
        replacement: rate p over position t.
        weight_lambda: λ of weights.
        activation_lambda: λ of activations.

    >>> from pege_fx.training.curves import Constant
    >>> GroupCurves(replacement=Constant(1.0)).weight_lambda is None
    True
    """

    replacement: Callable[[float], float] | None = None
    weight_lambda: Callable[[float], float] | None = None
    activation_lambda: Callable[[float], float] | None = None


def plan_of(gm: Any) -> Plan:
    """Return the plan of a prepared model: every operation with its edges, the rules that decided, and how it was captured.

    Args:
        gm: a prepared model, also one that was copied, pickled or wrapped.

    Raises:
        ModelError: for any other module.

    >>> from torch import nn
    >>> import pege_fx
    >>> plan_of(pege_fx.prepare(nn.Sequential(nn.Linear(4, 4)), "W4A4")).operations[0].path
    '0'
    """
    check_stage(gm, "prepared")
    plans = [fq.plan for fq in fake_quants(gm).values()]
    plans += [module.meta.get("plan") for module in gm.modules() if isinstance(module, GraphModule)]
    plan = next((plan for plan in plans if isinstance(plan, Plan)), None)
    if plan is None:
        raise ModelError(f"{type(gm).__name__} holds fake-quants and no plan: give what pege_fx.prepare returned.")
    return plan


def default_replacement(total_steps: int) -> Callable[[float], float]:
    """The paper's logarithm from 0.2 to 1 halfway. It starts at T = 1; one or two steps take the ramp, complete at t = 1."""
    if total_steps > 2:
        return LogReplacement.reaching_one_at(total_steps / 2, start=0.2)
    return RampReplacement(steps=1.0, start=0.2)


class PEGEScheduler:
    """Moves replacement rate, λ and masks of a prepared model; call ``step()`` once per epoch or per training step.

    Args:
        gm: a prepared model.
        total_steps: length of the schedule, in whatever ``step()`` counts.
        replacement: rate p over position t; default: the paper's logarithm, reaching 1 halfway.
        weight_lambda: λ of weights over t, in the unit of their estimator: absolute for "pege", in mean gradients for
            "pege-relative", as a share of the gradient for "pege-share"; default: exponential, 1e-8 to 1e-6.
        activation_lambda: λ of activations, likewise; default: exponential, 1e-9 to 1e-8.
        refresh: "step" draws new masks at every step; "never" keeps one threshold per element, so that the set of
            replaced elements only grows while p does.
        groups: curves for the schedule groups that rules name (``Rule(schedule="head")``).

    With ``torch.distributed``, every process makes its own on the same model. Weights have the same masks everywhere; the
    activations of rank r continue those of rank r - 1, as if all ranks' batches were one. λ for activations is multiplied
    by the number of processes, whose gradients are averaged: the result is that of one process on the global batch.

    The constructor sets p and λ of t = 0. ``step()`` costs the same for any number of sites, and never waits for a device.

    Raises:
        ScheduleError: for a length that is not positive, a curve that leaves [0, 1] (rate) or is negative (λ), or a
            group that no rule names.

    >>> import torch
    >>> import pege_fx
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> gm = pege_fx.prepare(model, "W4A4", torch.randn(2, 4))
    >>> scheduler = PEGEScheduler(gm, total_steps=10)
    >>> rates = []
    >>> for epoch in range(6):
    ...     scheduler.step()  # behind the training of one epoch
    ...     rates.append(round(float(pege_fx.fake_quants(gm)["0.weight_fq"].schedule.rate), 2))
    >>> rates
    [0.2, 0.54, 0.75, 0.89, 1.0, 1.0]
    """

    def __init__(
        self,
        gm: GraphModule,
        total_steps: int,
        replacement: Callable[[float], float] | None = None,
        weight_lambda: Callable[[float], float] | None = None,
        activation_lambda: Callable[[float], float] | None = None,
        *,
        refresh: Literal["step", "never"] = "step",
        groups: Mapping[str, GroupCurves] | None = None,
    ) -> None:
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ScheduleError(f"total_steps={total_steps!r}: give a positive whole number of steps or epochs.")
        if refresh not in ("step", "never"):
            raise ScheduleError(f'refresh={refresh!r}: give "step" or "never".')
        self._fingerprint = plan_of(gm).fingerprint
        self._sites: list[FakeQuant] = list(fake_quants(gm).values())
        refuse_sharded_grids(self._sites)
        self._states: dict[str, ScheduleState] = {site.schedule.group: site.schedule for site in self._sites}
        self.total_steps, self.refresh = total_steps, refresh
        self.replacement = replacement or default_replacement(total_steps)
        self.weight_lambda = weight_lambda or Exponential(1e-8, 1e-6, total_steps)
        self.activation_lambda = activation_lambda or Exponential(1e-9, 1e-8, total_steps)
        self.groups = dict(groups or {})
        if unknown := set(self.groups) - set(self._states):
            name = sorted(unknown)[0]
            raise ScheduleError(
                f"no rule puts anything into the schedule group {name!r}.\n"
                f"  groups: {', '.join(sorted(self._states)) or 'none'}; closest: {closest(name, self._states, 1)}."
            )
        rank, self._size = rank_and_size()
        for state in self._states.values():
            state.rank = rank
        self._curves = {name: self._curves_of(name) for name in self._states}
        self.t = 0
        self.refreshes = 0
        self._check_curves()
        self._apply()

    def _curves_of(self, group: str) -> tuple[Callable[[float], float], ...]:
        own = self.groups.get(group, GroupCurves())
        return (
            own.replacement or self.replacement,
            own.weight_lambda or self.weight_lambda,
            own.activation_lambda or self.activation_lambda,
        )

    def _check_curves(self) -> None:
        """A wrong curve fails here, not in the middle of a run."""
        names = ("replacement", "weight_lambda", "activation_lambda")
        for curves in self._curves.values():
            for name, curve in zip(names, curves, strict=True):
                for t in {0, 1, self.total_steps // 2, self.total_steps}:
                    value = curve(t)
                    top = 1.0 if name == "replacement" else float("inf")
                    if not 0.0 <= value <= top or value == float("inf"):
                        raise ScheduleError(
                            f"{name} gives {value!r} at t = {t}: it must lie in [0, {top}{']' if top == 1 else ')'}."
                        )

    def _apply(self) -> None:
        for name, state in self._states.items():
            rate, weight_lambda, activation_lambda = self._curves[name]
            state.set_rate(rate(self.t))
            state.weight_lambda.fill_(weight_lambda(self.t))
            state.activation_lambda.fill_(activation_lambda(self.t) * self._size)
            state.refresh_key.fill_(refresh_key(self.refreshes))

    def step(self) -> None:
        """Go one step further; at the end, stay there."""
        self.t = min(self.t + 1, self.total_steps)
        if self.refresh == "step":
            self.refreshes += 1
        self._apply()

    def go_to(self, steps: int) -> None:
        """Go to where ``steps`` steps from the start lead."""
        self.t = min(steps, self.total_steps)
        self.refreshes = steps if self.refresh == "step" else 0
        self._apply()

    def follow(self, scaler: torch.amp.GradScaler) -> None:
        """Multiply λ by the factor that ``scaler`` multiplies the loss by; call it before each forward pass.

        The term of λ is a part of the gradient and not of the loss, so that the scaler does not see it. The factor is
        copied from tensor to tensor: nothing waits for a device.

        Args:
            scaler: multiplies the loss of the next step.

        >>> import torch
        >>> import pege_fx
        >>> gm = pege_fx.prepare(torch.nn.Sequential(torch.nn.Linear(4, 4)), "W4A4", torch.randn(2, 4))
        >>> scheduler, scaler = PEGEScheduler(gm, total_steps=10), torch.amp.GradScaler("cpu", init_scale=256.0)
        >>> scheduler.follow(scaler)
        >>> float(pege_fx.fake_quants(gm)["0.weight_fq"].schedule.loss_scale)
        256.0
        """
        for state in self._states.values():
            state.is_scaled = scaler.is_enabled()
            state.loss_scale.copy_(scaler.scale(torch.ones_like(state.loss_scale)))

    @property
    def rate(self) -> float:
        """Replacement rate p of the default curves at the present position."""
        return self.replacement(self.t)

    @property
    def lambdas(self) -> tuple[float, float]:
        """λ for weights and for activations, of the default curves at the present position."""
        return self.weight_lambda(self.t), self.activation_lambda(self.t)

    def state_dict(self) -> dict[str, Any]:
        """Return the position, the refresh count and what they belong to; plain numbers and text."""
        return {
            "t": self.t,
            "refreshes": self.refreshes,
            "total_steps": self.total_steps,
            "refresh": self.refresh,
            "graph": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position; ``CheckpointError`` if it belongs to another graph or schedule."""
        mine = self.state_dict()
        if missing := set(mine) - set(state):
            raise CheckpointError(f"this is not a PEGEScheduler's state: {', '.join(sorted(missing))} missing.")
        for name, what in (("graph", "graph or policy"), ("total_steps", "length"), ("refresh", "kind of masks")):
            if state[name] != mine[name]:
                raise CheckpointError(
                    f"the state belongs to another {what}: {name} is {state[name]!r} there and {mine[name]!r} here.\n"
                    "  prepare the same model with the same policy, and make the scheduler with the same arguments."
                )
        for name in ("t", "refreshes"):
            if not isinstance(state[name], int) or state[name] < 0 or (name == "t" and state[name] > self.total_steps):
                raise CheckpointError(f"{name}={state[name]!r} is no position of a schedule of {self.total_steps} steps.")
        self.t, self.refreshes = state["t"], state["refreshes"]
        self._apply()

    def __repr__(self) -> str:
        weight, activation = self.lambdas
        masks = "redrawn every step" if self.refresh == "step" else "growing"
        groups = "" if set(self._states) <= {"default"} else f", groups {', '.join(sorted(self._states))}"
        return (
            f"PEGEScheduler(step {self.t} of {self.total_steps}: p={self.rate:.3f}, λ weights {weight:.2e}, "
            f"activations {activation:.2e}, masks {masks}, {len(self._sites)} sites{groups})"
        )
