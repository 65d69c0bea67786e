"""What an engine answers: the policy that makes its integer kernels run, what it refuses, its file, its verdict, its profile.

An engine is a place where a model runs. ``register`` makes one known by its name: to ``QuantPolicy.parse``, ``export``,
``verify``, ``explain`` and the command line.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.fx import GraphModule

from pege_fx.errors import ExportError
from pege_fx.policy import engine_policies
from pege_fx.policy.plan import Operation, Plan
from pege_fx.policy.rules import QuantPolicy


@dataclass(frozen=True)
class Refusal:
    """An operation that an engine will not run in integers, and why.

    Attributes:
        path: of the operation in the model.
        function: its name.
        reason: what of it the engine does not take, and what to change.
    """

    path: str
    function: str
    reason: str


@dataclass(frozen=True)
class Profile:
    """What an engine made of a file.

    Attributes:
        kernels: how often each of its operators runs.
        integer: those of them that multiply, and do so in integers.
        floating: those of them that multiply, and do so in float.
        seconds: processor time of one call in one thread, the median; 0 if it was not measured.
    """

    kernels: Mapping[str, int]
    integer: int
    floating: int
    seconds: float = 0.0

    @property
    def share(self) -> float:
        """The share of layers and products that run in integers."""
        return self.integer / max(self.integer + self.floating, 1)


class Verdict(Protocol):
    """What ``verify`` returns: prints as a few lines."""

    @property
    def verdict(self) -> str:
        """One word: "exact", "ties" or "different"."""

    @property
    def ok(self) -> bool:
        """Whether the file says what the model says."""


class Engine(Protocol):
    """A place where a model runs; see ``docs/extending.md`` for one of your own."""

    @property
    def name(self) -> str:
        """What policies, functions and the command line call it."""

    def policy(self, bits: str, **options: Any) -> QuantPolicy:
        """Return the policy that puts quantizers where the engine wants them, from a short form as ``"W8A8"``."""

    def refuses(self, plan: Plan) -> list[Refusal]:
        """Return which operations of a plan the engine will not run in integers, and why."""

    def export(
        self,
        deployed: GraphModule,
        path: str | os.PathLike[str],
        example_inputs: tuple[Any, ...] | Tensor,
        **options: Any,
    ) -> int:
        """Write a converted model as the engine reads it; return the file's size in bytes."""

    def verify(self, deployed: GraphModule, path: str | os.PathLike[str], batches: Iterable[Any]) -> Verdict:
        """Run a file in the engine and hold it against the model."""

    def profile(self, path: str | os.PathLike[str], example_inputs: tuple[Any, ...] | Tensor) -> Profile:
        """Say what the engine runs of a file, and how long it takes."""


_ENGINES: dict[str, Engine] = {}


def register(engine: Engine) -> None:
    """Make an engine known by its name.

    Raises:
        ExportError: if another engine has that name.
    """
    if (known := _ENGINES.get(engine.name)) is not None and known is not engine:
        raise ExportError(f"there is an engine {engine.name!r} already: {known!r}. Give yours another name.")
    _ENGINES[engine.name] = engine
    engine_policies.register(engine.name, engine.policy)


def engine_of(engine: Engine | str) -> Engine:
    """Return the engine of a name, or the engine itself.

    Raises:
        ExportError: if there is none of that name.
    """
    if not isinstance(engine, str):
        return engine
    if engine not in _ENGINES:
        raise ExportError(f"there is no engine {engine!r}: known are {', '.join(sorted(_ENGINES))}.")
    return _ENGINES[engine]


def answered(engine: Engine, plan: Plan) -> Plan:
    """Return a plan that says of each operation that multiplies whether the engine runs it in integers, and why not."""
    refused = {refusal.path: refusal.reason for refusal in engine.refuses(plan)}

    def answer(operation: Operation) -> str:
        if operation.path in refused:
            return f"{engine.name}: in float, {refused[operation.path]}"
        return f"{engine.name}: in integers" if operation.edges and operation.macs != 0 else ""

    said = (dataclasses.replace(operation, engine=answer(operation)) for operation in plan.operations)
    return dataclasses.replace(plan, operations=tuple(said))


def names() -> tuple[str, ...]:
    """Return the names of all engines that are known."""
    return tuple(sorted(_ENGINES))
