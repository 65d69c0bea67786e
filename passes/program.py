"""The context of passes: a model as its graphs, and what one pass leaves for those behind it."""

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypedDict

import torch
from torch import nn
from torch.fx import GraphModule, Node

from pege_fx.errors import PegeWarning
from pege_fx.modules.fake_quant import Site
from pege_fx.modules.merged_norm import MergedNorm
from pege_fx.modules.schedule_state import ScheduleState
from pege_fx.policy.plan import Capture, Plan
from pege_fx.policy.rules import Op, QuantPolicy

# The positional and the keyword arguments of a call.
ExampleCall: TypeAlias = tuple[tuple[Any, ...], Mapping[str, Any]]


class NodeNotes(TypedDict, total=False):
    """What is noted in ``node.meta``, beside what torch writes there (``stack_trace``, ``nn_module_stack``, ``val``).

    Attributes:
        rank: number of dimensions of the value.
        shape: of the value, on the example.
        dtype: of the value, on the example.
        layout: of the value, on the example: strided, or one that a fake-quant does not take.
        writes: the inputs that the node changed on the example; not there where nothing is known.
        shares: the inputs in whose memory the result lay on the example.
        non_negative: the value is proved to be never below zero.
        path: of the module that became this operation.
        module_classes: names of the classes of the modules around it, for rules.
        op: what a rule can see of it.
        site: of the fake-quant that it calls.
        batch_norm: the verdicts on BatchNorms in words.
        not_normalized: why a layer stays a module.
        stays_python: why a module is not looked into, with its line.
        is_wrapped: torch.fx keeps the function whole when it traces the code of the graph.
    """

    rank: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: torch.layout
    writes: list[Node]
    shares: list[Node]
    non_negative: bool
    path: str
    module_classes: frozenset[str]
    op: Op
    site: Site
    batch_norm: str
    not_normalized: str
    stays_python: str
    is_wrapped: bool


class GraphNotes(TypedDict, total=False):
    """What is noted in the ``meta`` of a GraphModule, for as long as it lives.

    Attributes:
        prefix: the path of the module that it is, inside the whole.
        is_operation: a leaf of torch whose one operation it holds.
        plan: of the whole model, on its root.
        replacement: the rate p that training had reached when it was converted.
        engine: which reference engine it was made for.
    """

    prefix: str
    is_operation: bool
    plan: Plan
    replacement: float
    engine: str


@dataclass(frozen=True)
class Verdict:
    """What became of a BatchNorm.

    Attributes:
        norm: its path.
        reason: why it stays; "" if it is folded.
    """

    norm: str
    reason: str = ""

    @property
    def is_folded(self) -> bool:
        """Whether a layer took it."""
        return not self.reason

    def __str__(self) -> str:
        return f"{self.norm} stays: {self.reason}" if self.reason else f"folded {self.norm}"


@dataclass(eq=False)
class Program:
    """A model on its way from float to quantized.

    Attributes:
        graphs: those that passes rewrite: the whole model first, if it is one; those inside modules that stay Python; blocks.
        model: as the user gave it; None if graphs are all that is known.
        example: a call of it; None if there is none.
        captures: how each part became a graph.
        modules: those of the captured model, before any pass added one.
        whole: the GraphModule that is the result, where the model itself stays Python around its graphs; None: the first graph.
        policy: what decides; None before there is a plan.
        plans: what was decided for each graph.
        plan: the same for the whole, once ``complete_plan`` has run.
        schedules: what the fake-quants of a group share, by the group's name.
        verdicts: what became of the BatchNorms that each node is or reads, in the order of the passes.
        merged_norms: the BatchNorms that each graph has taken into its weights for good.
    """

    graphs: list[GraphModule] = field(default_factory=list)
    model: nn.Module | None = None
    example: ExampleCall | None = None
    captures: list[Capture] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)
    whole: GraphModule | None = None
    policy: QuantPolicy | None = None
    plans: dict[GraphModule, Plan] = field(default_factory=dict)
    plan: Plan | None = None
    schedules: dict[str, ScheduleState] = field(default_factory=dict)
    verdicts: dict[Node, list[Verdict]] = field(default_factory=dict)
    merged_norms: dict[GraphModule, list[MergedNorm]] = field(default_factory=dict)

    @classmethod
    def of(cls, graphs: "Program | GraphModule | Iterable[GraphModule]") -> "Program":
        """Return a program; graphs alone are one about which nothing else is known.

        >>> from torch.fx import symbolic_trace
        >>> len(Program.of(symbolic_trace(nn.ReLU())).graphs)
        1
        """
        if isinstance(graphs, Program):
            return graphs
        return cls([graphs] if isinstance(graphs, GraphModule) else list(graphs))

    @property
    def root(self) -> GraphModule:
        """The whole model."""
        return self.graphs[0] if self.whole is None else self.whole


# A pass over one graph changes it in place; one over the whole program is marked by ``of_program``.
GraphPass: TypeAlias = Callable[[GraphModule], None]
ProgramPass: TypeAlias = Callable[[Program], None]


def of_program(step: Any) -> Any:
    """Mark a pass, a function or a dataclass with ``__call__``, as one that takes the whole program and not one graph."""
    step.takes_program = True
    return step


def warn(message: str) -> None:
    """Warn the code that called this package, however deep inside of it the reason was found."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "pege_fx":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, PegeWarning, stacklevel=level)
