"""Rules as plain data, as policy files hold them."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from pege_fx.errors import PolicyError, closest
from pege_fx.numerics.spec import QuantSpec
from pege_fx.policy.rule import EDGES, UNSET, Rule
from pege_fx.policy.shorthand import name_of

# Python's reader takes time by the square of how many parts a key has.
DEEP_KEY = re.compile(r"""(?:[\w"'-]{1,64}[ \t]{0,64}\.[ \t]{0,64}){50}""")


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which one key twice is an error, as it is in TOML."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"one of the keys {', '.join(map(repr, found))} is there twice")
    return found


def rule_to_dict(rule: Rule) -> dict[str, Any]:
    entry: dict[str, Any] = {
        name: value for name in ("match", "module", "function", "role") if (value := getattr(rule, name)) is not None
    }
    for edge in EDGES:
        value = getattr(rule, edge)
        if value is None:
            entry[edge] = "float"
        elif value is not UNSET:
            entry[edge] = _spec_to_dict(value)
    for name in ("schedule", "shared_scale", "recompute"):
        if (value := getattr(rule, name)) is not UNSET:
            entry[name] = value
    return entry | ({"optional": True} if rule.optional else {})


def _spec_to_dict(spec: QuantSpec) -> dict[str, Any] | str:
    """A name, where there is one; else the fields that say something."""
    if (name := name_of(spec)) is not None:
        return name
    first: dict[str, Any] = {"bits": spec.bits} if spec.format is None else {"format": spec.format}
    plain = QuantSpec(method=spec.method, **first)
    fields = (f.name for f in dataclasses.fields(spec) if f.init and f.name not in ("bits", "format", "method"))
    changed = {name: getattr(spec, name) for name in fields if getattr(spec, name) != getattr(plain, name)}
    return first | ({} if spec.method == "lsq" else {"method": spec.method}) | changed


def rule_from_dict(number: int, entry: Any) -> Rule:
    known = {f.name for f in dataclasses.fields(Rule) if f.init}
    if not isinstance(entry, Mapping):
        raise PolicyError(f"rule {number} is {entry!r}: a rule is a table of {', '.join(sorted(known))}.")
    if unknown := set(entry) - known:
        names = ", ".join(f"{name!r} (closest: {closest(str(name), known, 1)})" for name in sorted(map(str, unknown)))
        raise PolicyError(f"rule {number} has unknown fields: {names}.")
    fields = dict(entry)
    try:
        for name in ("match", "module", "function", "role"):
            if name in fields and not isinstance(fields[name], str):
                raise PolicyError(f"{name}={fields[name]!r} is not text.")
        for edge in EDGES:
            if isinstance(fields.get(edge), Mapping):
                fields[edge] = QuantSpec(**fields[edge])
        return Rule(**fields)
    except (TypeError, ValueError) as error:
        raise PolicyError(f"rule {number}: {error}") from error
