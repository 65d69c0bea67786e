"""A policy: which edges are quantized, and how. An ordered list of rules, the last rule that sets a field wins."""

import dataclasses
import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pege_fx._utils.files import atomic_write, path_to_read
from pege_fx.errors import PolicyError, closest
from pege_fx.numerics.spec import QuantSpec
from pege_fx.policy.engine_policies import policy_of
from pege_fx.policy.records import DEEP_KEY, rule_from_dict, rule_to_dict, without_repeats
from pege_fx.policy.rule import (
    EDGES,
    NO_RULE,
    ROLES,
    UNSET,
    Op,
    Rule,
    Setting,
    Unset,
    as_spec,
    class_names,
    would_select,
)
from pege_fx.policy.shorthand import POLICIES, policy_named

__all__ = ["EDGES", "NO_RULE", "ROLES", "UNSET", "Choice", "Op", "QuantPolicy", "Rule", "Setting", "Unset", "class_names"]


@dataclass(frozen=True)
class Choice:
    """What a policy decides for one operation: a spec (or None for float) per edge, and the rule that set each.

    ``shared_scale`` is the rule that asks for one scale for all inputs, "" if none does. ``recompute``: its quantized
    operands are made again in backward.
    """

    specs: Mapping[str, QuantSpec | None]
    rules: Mapping[str, str]
    schedule: str = "default"
    shared_scale: str = ""
    recompute: bool = False


@dataclass(frozen=True)
class QuantPolicy:
    """An ordered list of rules over one cascade: defaults first, exceptions after, the last that sets a field wins.

    >>> policy = QuantPolicy((Rule(weight="4", input="4"), Rule(match="fc", weight=None, input=None)))
    >>> policy.choose(Op(path="layer1.conv", function="conv2d")).specs["weight"].bits
    4
    >>> QuantPolicy.parse("W2A2", first=None, last=None).rules[0]
    Rule(weight='2', input='2')
    """

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise PolicyError(f"{rule!r} is not a Rule: QuantPolicy takes a sequence of rules.")

    @classmethod
    def parse(
        cls, text: str, *, first: Setting = UNSET, last: Setting = UNSET, engine: str | None = None, **spec: Any
    ) -> "QuantPolicy":
        """Read a policy in short.

        ``"W4A4"``, ``"W8"`` (weights alone), ``"A8"`` (inputs alone), 32 and 16 mean float; these have eight bits for the first
        and last operation with a weight. The field's names, ``"8da4w-g32"``, ``"w4a16"``, ``"fp8"``, ``"mxfp4"``, ``"nvfp4"``,
        ``"int4-g32"``, ``"nf4"``, are about linear layers, all of them. ``"ternary"``, ``"binary"`` and ``"seq2"`` are about
        weights, with eight bits for the first and the last.

        Args:
            first, last: formats of the first and last operation with a weight; None leaves it in float.
            engine: name of an engine, whose policy puts quantizers where its integer kernels need them.
            spec: further fields of ``QuantSpec`` for all edges, ``method="pact"`` or ``estimator="ste"``.
        """
        if engine is not None:
            made: QuantPolicy = policy_of(engine)(text, first=first, last=last, **spec)
            return made
        try:
            found = policy_named(text, **spec)
            if found is None:
                raise PolicyError(
                    f'{text!r} is not a policy in short: write weight bits, then input bits, each once, as in "W4A4",'
                    f' "W8" or "A8",\n  or a name: {", ".join(POLICIES)}.'
                    "\n  for anything else give rules: QuantPolicy((Rule(...), ...))."
                )
            edges: dict[str, Any] = dict(found.edges)
            rules = [Rule(function=found.function, **edges)]
            for role, setting in (("first", first), ("last", last)):
                chosen = found.ends if setting is UNSET else as_spec(role, setting)
                if setting is UNSET and found.ends is None:
                    continue
                if chosen is not None and not isinstance(setting, QuantSpec):
                    chosen = dataclasses.replace(chosen, **spec)
                rules.append(Rule(role=role, **dict.fromkeys(found.edges, chosen)))
        except TypeError as error:
            raise PolicyError(f"QuantPolicy.parse: {error}; known fields are those of QuantSpec.") from error
        return cls(tuple(rules))

    def choose(self, op: Op) -> Choice:
        """Run the cascade for one operation."""
        specs: dict[str, QuantSpec | None] = dict.fromkeys(EDGES)
        rules = dict.fromkeys(EDGES, NO_RULE)
        schedule, shared_scale, recompute = "default", "", False
        for number, rule in enumerate(self.rules):
            if not rule.selects(op):
                continue
            for edge in EDGES:
                if (value := getattr(rule, edge)) is not UNSET:
                    specs[edge], rules[edge] = value, f"rule {number}: {rule!r}"
            if rule.schedule is not UNSET:
                schedule = str(rule.schedule)
            if rule.shared_scale is not UNSET:
                shared_scale = f"rule {number}: {rule!r}" if rule.shared_scale else ""
            if rule.recompute is not UNSET:
                recompute = bool(rule.recompute)
        return Choice(specs, rules, schedule, shared_scale, recompute)

    def is_about(self, op: Op) -> bool:
        """Tell whether any rule selects this operation."""
        return any(rule.selects(op) for rule in self.rules)

    def check_all_decide(self, ops: Iterable[Op]) -> None:
        """Raise ``PolicyError`` for a rule that selects none of the operations, and name the closest."""
        seen = list(ops)
        for rule in self.rules:
            if rule.optional or any(rule.selects(op) for op in seen):
                continue
            lines = [f"{rule!r} decides for none of {sum(not op.on_request for op in seen)} operations."]
            if unnamed := {op.function for op in seen if op.on_request and would_select(rule, op)}:
                names = " or ".join(f"function={name!r}" for name in sorted(unnamed))
                lines.append(f"  it reaches an operation that only a rule with {names} is about: give that too.")
            wanted: tuple[tuple[str, Any, set[str]], ...] = (
                ("paths", rule.match, {op.path for op in seen}),
                ("module classes", rule.module, set().union(*(op.classes for op in seen))),
                ("functions", rule.function, {op.function for op in seen}),
            )
            lines += [f"  closest {what}: {closest(str(given), known)}" for what, given, known in wanted if given and known]
            raise PolicyError("\n".join([*lines, "  fix the rule, or drop it."]))

    # --- files ---------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: ``{"rules": [{...}, ...]}``; float is written as ``"float"``."""
        return {"rules": [rule_to_dict(rule) for rule in self.rules]}

    @classmethod
    def from_dict(cls, data: Any) -> "QuantPolicy":
        """Read what ``to_dict`` returns; a ``PolicyError`` says which rule and field is wrong."""
        if not isinstance(data, Mapping) or set(data) != {"rules"} or not isinstance(data["rules"], list):
            raise PolicyError("a policy file holds a list of rules under the one key 'rules', and nothing else.")
        return cls(tuple(rule_from_dict(number, entry) for number, entry in enumerate(data["rules"])))

    def to_json(self) -> str:
        """Return the policy as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "QuantPolicy":
        """Read a policy from JSON text."""
        try:
            data = json.loads(text, object_pairs_hook=without_repeats)
        except (ValueError, RecursionError) as error:
            raise PolicyError(f"not JSON: {error}.") from error
        return cls.from_dict(data)

    def to_toml(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the policy as TOML text, and write it to ``path`` if given."""
        import tomli_w

        text = tomli_w.dumps(self.to_dict())
        if path is None:
            return text
        with atomic_write(path, PolicyError) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> "QuantPolicy":
        """Read a policy from a TOML file."""
        path = path_to_read(path, PolicyError)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise PolicyError(f"can not read the policy {path}: {error}.") from error
        if DEEP_KEY.search(text):
            raise PolicyError(f"{path} is no policy: it has a key of more than 50 parts.")
        try:
            data = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise PolicyError(f"{path} is not TOML: {error}.") from error
        try:
            return cls.from_dict(data)
        except PolicyError as error:
            raise PolicyError(f"{path}: {error}") from error
