"""Policies of engines by the engine's name, for ``QuantPolicy.parse(..., engine=...)``: engines lie on a higher floor."""

from collections.abc import Callable
from typing import Any

from pege_fx.errors import PolicyError

MakePolicy = Callable[..., Any]  # from a short form and QuantPolicy.parse's own options to a QuantPolicy

_POLICIES: dict[str, MakePolicy] = {}


def register(name: str, make: MakePolicy) -> None:
    """Let ``engine=name`` mean this policy."""
    _POLICIES[name] = make


def policy_of(name: str) -> MakePolicy:
    """Return what makes the policy of an engine; raise ``PolicyError`` if there is none of that name."""
    if name not in _POLICIES:
        raise PolicyError(f"there is no engine {name!r}: known are {', '.join(sorted(_POLICIES))}.")
    return _POLICIES[name]
