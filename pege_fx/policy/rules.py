"""Which edges are quantized, and how: an ordered list of rules, the last rule that sets a field wins."""

import dataclasses
import enum
import functools
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

from torch import nn

from pege_fx._utils.files import atomic_write, path_to_read
from pege_fx.errors import PolicyError, closest
from pege_fx.numerics.spec import QuantSpec
from pege_fx.policy.patterns import PathPattern


class Unset(enum.Enum):
    """The value of a rule's field that the rule leaves to the rules before it."""

    UNSET = enum.auto()

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = Unset.UNSET

Setting: TypeAlias = QuantSpec | str | int | Literal[Unset.UNSET] | None
EDGES: Final = ("weight", "input", "output")
NO_RULE: Final = "no rule sets it"
ROLES: Final = ("first", "last")
_FIELDS: Final = (*EDGES, "schedule", "shared_scale", "recompute")


@dataclass(frozen=True)
class Op:
    """What a rule can see of one operation of the graph.

    ``aliases`` are further names of its function. ``on_request``: only rules that name the function are about it.
    """

    path: str
    function: str
    classes: frozenset[str] = field(default_factory=frozenset)
    roles: frozenset[str] = field(default_factory=frozenset)
    aliases: frozenset[str] = field(default_factory=frozenset)
    on_request: bool = False


def _class_name(cls: type[nn.Module] | str) -> str:
    return cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"


def class_names(module: nn.Module) -> frozenset[str]:
    """Return the names that ``Rule(module=...)`` may use for a module: of its class and bases, qualified and bare."""
    bases = [cls for cls in type(module).__mro__ if issubclass(cls, nn.Module) and cls is not nn.Module]
    return frozenset(name for cls in bases for name in (_class_name(cls), cls.__name__))


def _setting(edge: str, value: Setting) -> QuantSpec | None:
    if value is None or value == "float":
        return None
    if isinstance(value, QuantSpec):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return QuantSpec(bits=value)
    if isinstance(value, str) and value.strip().isdecimal():
        return QuantSpec(bits=int(value))
    raise PolicyError(
        f"{edge}={value!r} is not a number format.\n"
        f'  give bits ("4"), a QuantSpec, None (or "float"), or leave the field out;'
        f' "W4A4" is for QuantPolicy.parse.'
    )


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Select operations and set fields for them.

    Selection; what is left out selects everything, what is given must all hold:
        match: module path, a glob (``*`` also crosses dots) or ``re:`` and a regular expression for the whole path.
        module: class (or its name) of the module that holds the operation, or of one that contains that module.
        function: name of the operation (``"conv2d"``, ``"matmul"``), or the function itself. Additions, subtractions, products
            element by element, concatenations and stacks (``"add"``, ``"sub"``, ``"mul"``, ``"cat"``, ``"stack"``) are selected
            by rules that name them, and by no other.
        role: "first" or "last" operation with a weight.

    Fields; what is left out stays as the rules before have it, None (or ``"float"``) means float:
        weight, input, output: a ``QuantSpec``, or bits as ``"4"``.
        schedule: name of the schedule group.
        shared_scale: True gives all inputs of an operation with several one scale, as integer hardware needs it.
        recompute: True makes quantized weights and inputs of an operation again in backward instead of keeping them: the
            bytes of float training, for one more run of the quantizer.

    Raises:
        PolicyError: if the rule sets nothing or contradicts itself.

    >>> Rule(match="layer1.*", weight="2")
    Rule(match='layer1.*', weight='2')
    """

    match: str | None = None
    module: type[nn.Module] | str | None = None
    function: Callable[..., Any] | str | None = None
    role: str | None = None
    weight: Setting = UNSET
    input: Setting = UNSET
    output: Setting = UNSET
    schedule: str | Literal[Unset.UNSET] = UNSET
    shared_scale: bool | Literal[Unset.UNSET] = UNSET
    recompute: bool | Literal[Unset.UNSET] = UNSET

    def __post_init__(self) -> None:
        if self.module is not None:
            if not isinstance(self.module, str) and not (isinstance(self.module, type) and issubclass(self.module, nn.Module)):
                raise PolicyError(f"module={self.module!r} is not a class of modules: give nn.Conv2d, or its name.")
            object.__setattr__(self, "module", _class_name(self.module))
        if self.function is not None and not isinstance(self.function, str):
            name = getattr(self.function, "__name__", None)
            if name is None:
                raise PolicyError(f"function={self.function!r} has no name: give the function, or its name.")
            object.__setattr__(self, "function", name)
        if self.role is not None and self.role not in ROLES:
            raise PolicyError(f'role={self.role!r}: give "first" or "last".')
        for edge in EDGES:
            value = getattr(self, edge)
            if value is UNSET:
                continue
            spec = _setting(edge, value)
            if edge != "weight" and spec is not None and spec.granularity == "channel":
                raise PolicyError(f'{self!r}: {edge} granularity="channel": activations have one scale per tensor, drop it.')
            object.__setattr__(self, edge, spec)
        if not (self.schedule is UNSET or (isinstance(self.schedule, str) and self.schedule)):
            raise PolicyError(f"schedule={self.schedule!r}: give the name of a schedule group.")
        for name in ("shared_scale", "recompute"):
            if not ((value := getattr(self, name)) is UNSET or isinstance(value, bool)):
                raise PolicyError(f"{name}={value!r}: give True or False.")
        if self.shared_scale is True and self.input is None:
            raise PolicyError(f"{self!r}: inputs in float have no scale to share: drop shared_scale, or give input a format.")
        if all(getattr(self, name) is UNSET for name in _FIELDS):
            raise PolicyError(f"{self!r} sets nothing: give weight, input, output, schedule, shared_scale or recompute.")
        if self.match is not None:
            object.__setattr__(self, "_pattern", PathPattern(self.match))

    def selects(self, op: Op) -> bool:
        """Tell whether the rule is about this operation."""
        return (
            (self._pattern is None or self._pattern.fullmatch(op.path))
            and (self.module is None or self.module in op.classes)
            and (not op.on_request if self.function is None else self.function in (op.function, *op.aliases))
            and (self.role is None or self.role in op.roles)
        )

    _pattern: PathPattern | None = field(init=False, repr=False, compare=False, default=None)

    def __repr__(self) -> str:
        return self._text  # every edge that is planned names its rule

    @functools.cached_property
    def _text(self) -> str:
        names = ("match", "module", "function", "role")
        words = [f"{name}={getattr(self, name)!r}" for name in names if getattr(self, name) is not None]
        words += [f"{name}={_short(getattr(self, name))}" for name in _FIELDS if getattr(self, name) is not UNSET]
        return f"Rule({', '.join(words)})"


def _would_select(rule: Rule, op: Op) -> bool:
    """Whether a rule would be about an operation if that did not have to be named."""
    return rule.function is None and rule.selects(dataclasses.replace(op, on_request=False))


def _short(value: Any) -> str:
    if isinstance(value, QuantSpec) and value == QuantSpec(bits=value.bits):
        return repr(str(value.bits))
    return repr(value)


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


_SHORTHAND = re.compile(r"(?:W(?P<weight>\d+))?(?:A(?P<input>\d+))?", re.IGNORECASE)


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
    def parse(cls, text: str, *, first: Setting = "8", last: Setting = "8", **spec: Any) -> "QuantPolicy":
        """Read the shorthand: ``"W4A4"``, ``"W8"`` (weights alone), ``"A8"`` (inputs alone); 32 means float.

        Args:
            first, last: formats of the first and last operation with a weight; None leaves it in float.
            spec: further fields of ``QuantSpec`` for all edges, ``method="pact"`` or ``estimator="ste"``.
        """
        found = _SHORTHAND.fullmatch(text.strip()) if isinstance(text, str) else None
        bits = {edge: int(value) for edge, value in found.groupdict().items() if value is not None} if found else {}
        if not bits:
            raise PolicyError(
                f'{text!r} is not a policy in short: write weight bits, then input bits, each once, as in "W4A4",'
                f' "W8" or "A8".\n  for anything else give rules: QuantPolicy((Rule(...), ...)).'
            )
        try:
            specs: dict[str, Any] = {
                edge: None if value == 32 else QuantSpec(bits=value, **spec) for edge, value in bits.items()
            }
            rules = [Rule(**specs)]
            for role, setting in (("first", first), ("last", last)):
                chosen = _setting(role, setting)
                if chosen is not None and not isinstance(setting, QuantSpec):
                    chosen = QuantSpec(bits=chosen.bits, **spec)
                rules.append(Rule(role=role, **dict.fromkeys(specs, chosen)))
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
            if any(rule.selects(op) for op in seen):
                continue
            lines = [f"{rule!r} decides for none of {sum(not op.on_request for op in seen)} operations."]
            if unnamed := {op.function for op in seen if op.on_request and _would_select(rule, op)}:
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
        return {"rules": [_rule_to_dict(rule) for rule in self.rules]}

    @classmethod
    def from_dict(cls, data: Any) -> "QuantPolicy":
        """Read what ``to_dict`` returns; a ``PolicyError`` says which rule and field is wrong."""
        if not isinstance(data, Mapping) or set(data) != {"rules"} or not isinstance(data["rules"], list):
            raise PolicyError("a policy file holds a list of rules under the one key 'rules', and nothing else.")
        return cls(tuple(_rule_from_dict(number, entry) for number, entry in enumerate(data["rules"])))

    def to_json(self) -> str:
        """Return the policy as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "QuantPolicy":
        """Read a policy from JSON text."""
        try:
            data = json.loads(text, object_pairs_hook=_without_repeats)
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
        if _DEEP_KEY.search(text):
            raise PolicyError(f"{path} is no policy: it has a key of more than 50 parts.")
        try:
            data = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise PolicyError(f"{path} is not TOML: {error}.") from error
        try:
            return cls.from_dict(data)
        except PolicyError as error:
            raise PolicyError(f"{path}: {error}") from error


# Python's reader takes time by the square of how many parts a key has.
_DEEP_KEY = re.compile(r"""(?:[\w"'-]{1,64}[ \t]{0,64}\.[ \t]{0,64}){50}""")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which one key twice is an error, as it is in TOML."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"one of the keys {', '.join(map(repr, found))} is there twice")
    return found


def _rule_to_dict(rule: Rule) -> dict[str, Any]:
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
    return entry


def _spec_to_dict(spec: QuantSpec) -> dict[str, Any] | str:
    plain = QuantSpec(bits=spec.bits)
    if spec == plain:
        return str(spec.bits)
    changed = {
        f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if getattr(spec, f.name) != getattr(plain, f.name)
    }
    return {"bits": spec.bits} | changed


def _rule_from_dict(number: int, entry: Any) -> Rule:
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
