"""One rewrite on one graph: what it makes, and how it is compared."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pege_fx.inspection.diff import diff
from pege_fx.passes import Program
from pege_fx.testing.function import assert_same_function

Rewrite: TypeAlias = Callable[[GraphModule], Any]


Preserves: TypeAlias = Literal["structure", "bits", "function", "evaluation", "nothing"]


class NotTriedError(Exception):
    """A law that can not be tried here; says why."""


@dataclass(frozen=True, eq=False)
class Trial:
    """A rewrite on one graph.

    Attributes:
        rewrite: what is tried.
        preserves: what it should keep.
        before: the graph, which nothing touches.
        inputs: of the graph.
        tolerance: for ``assert_same_function``; None derives it.
    """

    rewrite: Rewrite
    preserves: Preserves
    before: GraphModule
    inputs: tuple[Any, ...]
    tolerance: float | None = None

    def applied(self, gm: GraphModule) -> tuple[GraphModule, GraphModule]:
        """Rewrite a copy; return what was handed over, and the result (the same graph if the rewrite works in place)."""
        argument = copy.deepcopy(gm)
        given: Any = Program.of(argument) if getattr(self.rewrite, "takes_program", False) else argument
        result = self.rewrite(given)
        if result is None:
            argument.recompile()
            result = argument
        assert isinstance(result, GraphModule), f"it returns {type(result).__name__}: return a GraphModule, or work in place"
        return argument, result

    @cached_property
    def _first(self) -> tuple[GraphModule, GraphModule]:
        return self.applied(self.before)

    @property
    def argument(self) -> GraphModule:
        """What the rewrite was given."""
        return self._first[0]

    @property
    def after(self) -> GraphModule:
        """What the rewrite made of it."""
        return self._first[1]

    @cached_property
    def has_changed(self) -> bool:
        """Whether the rewrite did anything to nodes, modules or values."""
        return bool(diff(self.before, self.after)) or not same_state(self.before, self.after)

    def same(self, before: nn.Module, after: nn.Module, inputs: tuple[Any, ...] | None = None) -> None:
        """Assert that two modules compute the same, as nearly as the rewrite promises."""
        exact = self.preserves in ("structure", "bits")
        assert_same_function(before, after, self.inputs if inputs is None else inputs, 0.0 if exact else self.tolerance)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(equal(value, second[name]) for name, value in first.items())


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
    return bool(a == b)
