"""One rule of a policy: which operations it selects, and what it sets for them."""

import dataclasses
import enum
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

from torch import nn

from pege_fx.errors import PolicyError
from pege_fx.numerics.layouts import Kind
from pege_fx.numerics.spec import QuantSpec
from pege_fx.policy.patterns import PathPattern
from pege_fx.policy.shorthand import EXAMPLES, name_of, spec_named


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


def as_spec(edge: str, value: Setting) -> QuantSpec | None:
    """Return the spec that a rule's field asks for; None is float.

    Raises:
        PolicyError: for what is no format.
    """
    if value is None or value == "float":
        return None
    if isinstance(value, QuantSpec):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return QuantSpec(bits=value)
    if isinstance(value, str) and (named := spec_named(value)) is not None:
        return named
    raise PolicyError(
        f"{edge}={value!r} is not a number format.\n"
        f'  give bits ("4"), a name ({", ".join(EXAMPLES)}), a QuantSpec, None (or "float"), or leave the field out;'
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
        weight, input, output: a ``QuantSpec``, bits as ``"4"``, or a name as ``"int4-g32"``, ``"int8-token"``, ``"mxfp4"``, see
            ``shorthand.spec_named``.
        schedule: name of the schedule group.
        shared_scale: True gives all inputs of an operation with several one scale, as integer hardware needs it.
        recompute: True makes quantized weights and inputs of an operation again in backward instead of keeping them: the
            bytes of float training, for one more run of the quantizer.
        optional: the rule may decide for nothing, as those of an engine's policy for operations that not every model has.

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
    optional: bool = False

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
            spec = as_spec(edge, value)
            if spec is not None:
                _check_layout(repr(self), edge, spec)
            object.__setattr__(self, edge, spec)
        if not (self.schedule is UNSET or (isinstance(self.schedule, str) and self.schedule)):
            raise PolicyError(f"schedule={self.schedule!r}: give the name of a schedule group.")
        for name in ("shared_scale", "recompute", "optional"):
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
        words += [f"{name}={short(getattr(self, name))}" for name in _FIELDS if getattr(self, name) is not UNSET]
        words += ["optional=True"] if self.optional else []
        return f"Rule({', '.join(words)})"


def would_select(rule: Rule, op: Op) -> bool:
    """Whether a rule would be about an operation if that did not have to be named."""
    return rule.function is None and rule.selects(dataclasses.replace(op, on_request=False))


def short(value: Any) -> str:
    """A field's value in a rule's ``repr``."""
    if isinstance(value, QuantSpec) and (name := name_of(value)) is not None:
        return repr(name)
    return repr(value)


def _check_layout(rule: str, edge: str, spec: QuantSpec) -> None:
    """Refuse a scale layout that no edge of this kind can have."""
    kind: Kind = "weight" if edge == "weight" else "activation"
    if spec.granularity is not None and kind not in spec.layout.kinds:
        advice = (
            'activations have one scale per "tensor", or with a dynamic one per "token" or group'
            if kind == "activation"
            else 'weights have one scale per "channel", "tensor" or group'
        )
        raise PolicyError(f'{rule}: {edge} granularity="{spec.granularity}": {advice}, drop it.')
