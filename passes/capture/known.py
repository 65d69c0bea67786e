"""What is known of the arguments of a module's forward: those of a call, or its defaults."""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pege_fx.passes.capture.examples import fresh


@dataclass(frozen=True)
class Known:
    """What is known of a forward's arguments.

    Attributes:
        values: by parameter name: the defaults, and those of an example call if there is one.
        given: names of the parameters that the call gives; without a call those without a default.
        positional: how many of them by position.
        is_call: there is a call: ``*args`` and ``**kwargs`` hold what they say and nothing else.
    """

    values: Mapping[str, Any]
    given: frozenset[str]
    positional: int
    is_call: bool

    @classmethod
    def of_call(cls, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "Known":
        """Of an example call; raises ``TypeError`` if it does not fit."""
        bound = inspect.signature(forward).bind(*args, **kwargs)
        given = frozenset(bound.arguments)
        bound.apply_defaults()
        return cls(dict(bound.arguments), given, len(args), is_call=True)

    @classmethod
    def defaults(cls, forward: Callable[..., Any]) -> "Known":
        """Of a call without its optional arguments."""
        parameters = inspect.signature(forward).parameters.values()
        required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        positional = sum(p.kind is not p.KEYWORD_ONLY for p in required)
        values = {p.name: p.default for p in parameters if p.default is not p.empty}
        return cls(values, frozenset(p.name for p in required), positional, is_call=False)

    def fresh(self, *, tensors: bool) -> "Known":
        """The same call with objects of its own, which following ``forward`` may fill; with copies of tensors if asked."""
        return replace(self, values=fresh(dict(self.values), tensors=tensors))

    def call(self, forward: Callable[..., Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and keyword arguments of the call."""
        bound = inspect.BoundArguments(inspect.signature(forward), OrderedDict(self.values))
        return bound.args, bound.kwargs
