"""Guard rails for training: the first place that produced a value that is not finite, and grids that went wrong."""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from pege_fx.errors import NonFiniteError, PegeWarning
from pege_fx.modules.fake_quant import FakeQuant, fake_quants
from pege_fx.modules.measures import clipped_share
from pege_fx.modules.mode import evaluating
from pege_fx.modules.stages import check_stage
from pege_fx.passes.graph import join, owner


@dataclass(frozen=True)
class Finding:
    """A grid that went wrong.

    Attributes:
        site: path of the fake-quant.
        kind: "collapsed", the step shrank; "clipped", much of the data lies beyond the last code; "one code", all of it
            has the same.
        value: the step over what it was at first; the share of elements that are clipped, or have that code.
    """

    site: str
    kind: Literal["collapsed", "clipped", "one code"]
    value: float

    def __str__(self) -> str:
        if self.kind == "collapsed":
            return f"{self.site}: the step collapsed to {self.value:.1e} of what it was; lower quantizer_lr."
        what = "is clipped" if self.kind == "clipped" else "has one and the same code"
        return f"{self.site}: {self.value:.0%} of its elements {what}; calibrate on data as in training, or give it more bits."


class Guard:
    """Watches a prepared model while it trains.

        guard = pege_fx.Guard(gm, every=100)
        ...
        loss = F.cross_entropy(gm(x), labels)
        guard.check(loss, x)         # before backward: stops at the first site that produced NaN or infinity
        loss.backward()
        guard.check_gradients()      # before the optimizer's step

    Args:
        gm: a prepared model, not compiled. With a compiled one, give ``check`` the loss of it and the guard the original.
        every: look at the grids in every so many calls of ``check``, and warn, once for each site; 0: never.
        collapsed: a step below this part of its first size is reported.
        clipped: a larger share of clipped elements is reported.

    Raises:
        ModelError: if ``gm`` was not prepared.

    >>> import pege_fx
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> gm = pege_fx.prepare(model, "W4A4", torch.randn(2, 4))
    >>> guard, x = pege_fx.Guard(gm), torch.randn(2, 4)
    >>> loss = gm(x).sum()
    >>> guard.check(loss, x)
    >>> loss.backward()
    >>> guard.check_gradients()
    """

    def __init__(self, gm: nn.Module, *, every: int = 0, collapsed: float = 1e-3, clipped: float = 0.5) -> None:
        check_stage(gm, "prepared")
        self.gm, self.every, self.collapsed, self.clipped = gm, every, collapsed, clipped
        self._first = {name: _step(site) for name, site in fake_quants(gm).items() if site.is_calibrated}
        self._calls = 0
        self._told: set[tuple[str, str]] = set()

    def check(self, loss: Tensor, *inputs: Any, **keywords: Any) -> None:
        """Raise ``NonFiniteError`` if the loss is not finite; it names the first site that is to blame.

        Args:
            loss: any shape; one wait for the device.
            inputs, keywords: what the model was called with. The forward pass is repeated on them, with the same masks.
        """
        if not _finite(loss):
            raise NonFiniteError(self._blame(loss, inputs, keywords))
        self._calls += 1
        if self.every and self._calls % self.every == 0:
            for finding in self.findings(*inputs, **keywords):
                if (finding.site, finding.kind) not in self._told:
                    self._told.add((finding.site, finding.kind))
                    warnings.warn(str(finding), PegeWarning, stacklevel=2)

    def check_gradients(self) -> None:
        """Raise ``NonFiniteError`` if a gradient is not finite; it names the last parameter on the way back that is fine."""
        bad = [name for name, p in self.gm.named_parameters() if p.grad is not None and not _finite(p.grad)]
        if bad:
            raise NonFiniteError(
                f"the gradient of {bad[-1]} is not finite, and {len(bad) - 1} more, all of them before it in the model.\n"
                "  backward made it there: lower the learning rate or λ, clip gradients, or train in float32."
            )

    def findings(self, *inputs: Any, **keywords: Any) -> list[Finding]:
        """Return what is wrong with the grids: collapsed steps, and by a forward pass in evaluation, what is clipped."""
        found = [
            Finding(name, "collapsed", ratio)
            for name, site in fake_quants(self.gm).items()
            if name in self._first and (ratio := float((_step(site) / self._first[name]).min())) < self.collapsed
        ]

        def look(name: str) -> Any:
            return lambda site, x, _: found.extend(self._clipping(name, site, x[0]))

        hooks = [site.register_forward_hook(look(name)) for name, site in fake_quants(self.gm).items()]
        try:
            with evaluating(self.gm):
                self.gm(*inputs, **keywords)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def _clipping(self, name: str, site: FakeQuant, x: Tensor) -> Iterator[Finding]:
        if x.numel() < 2:
            return
        if (share := clipped_share(site, x)) > self.clipped:
            yield Finding(name, "clipped", share)
        codes = site.codes(x)
        if bool((codes == codes.flatten()[0]).all()) and not bool((x == x.flatten()[0]).all()):
            yield Finding(name, "one code", 1.0)

    def _blame(self, loss: Tensor, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> str:
        value = "NaN" if bool(loss.isnan().any()) else "infinite"
        for i, given in enumerate([*inputs, *keywords.values()]):
            if not _finite(given):
                return f"the loss is {value}: input {i} of the model is not finite.\n  look at the data."
        for name, parameter in self.gm.named_parameters():
            if not _finite(parameter):
                return f"the loss is {value}: {name} is not finite since the last update.\n  {_FIX}"
        with _watched(self.gm), _buffers_kept(self.gm), torch.no_grad():
            try:
                self.gm(*inputs, **keywords)
            except _NotFinite as found:
                return f"the loss is {value}: {found.place} is the first to produce a value that is not finite.\n  {_FIX}"
        return f"the loss is {value}, but every value in the model is finite: look at the loss function."


_FIX = "lower the learning rate or λ, clip gradients, or train that part in float32."


def _step(site: FakeQuant) -> Tensor:
    return site.method.decoding().scale.detach().abs().clone()


def _finite(value: Any) -> bool:
    return not (isinstance(value, Tensor) and value.is_floating_point()) or bool(torch.isfinite(value.detach()).all())


# --- a forward pass that stops at the first value that is not finite ------------------------------------------------


class _NotFinite(Exception):  # noqa: N818
    def __init__(self, place: str) -> None:
        super().__init__(place)
        self.place = place


class _Watching(Interpreter):
    """Runs a graph node by node."""

    def __init__(self, gm: GraphModule, path: str) -> None:
        super().__init__(gm)
        self.path = path
        self.signature = inspect.signature(type(gm).forward)

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        bound = self.signature.bind(None, *inputs, **keywords)
        bound.apply_defaults()
        return self.run(*list(bound.arguments.values())[1:])

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op.startswith("call") and not _finite(result):
            place = str(n.target) if n.op == "call_module" else owner(n)
            raise _NotFinite(f"{join(self.path, place) or 'the model'} (node {n.name})")
        return result


@contextmanager
def _watched(model: nn.Module) -> Iterator[None]:
    graphs = {path: module for path, module in model.named_modules() if isinstance(module, GraphModule)}
    watched = []
    try:
        for path, gm in graphs.items():
            if not any(str(node.target).startswith("*") for node in gm.graph.find_nodes(op="placeholder")):
                gm.forward = _Watching(gm, path)
                watched.append(gm)
        yield
    finally:
        for gm in watched:
            del gm.forward


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """BatchNorm would count the repeated batch twice."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])
