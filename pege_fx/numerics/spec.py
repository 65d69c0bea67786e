"""What is asked of one edge: number format, scale layout, forward method, estimator."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from pege_fx.errors import SpecError
from pege_fx.numerics.discretizer import Discretizers, Grid, discretizers_of
from pege_fx.numerics.formats import MAX_BITS, MIN_BITS, Format, Integer, bounds_of, format_of
from pege_fx.numerics.layouts import Channels, Kind, PerTensor, ScaleLayout, layout_named
from pege_fx.numerics.registry import ESTIMATORS, METHODS, Registry

__all__ = ["ESTIMATORS", "MAX_BITS", "METHODS", "MIN_BITS", "Channels", "Kind", "QuantSpec", "Registry", "bounds_of"]

ScaleDtype: TypeAlias = Literal["float32", "bfloat16", "e8m0", "e4m3"]
SCALE_BITS: dict[str, int] = {"float32": 32, "bfloat16": 16, "e8m0": 8, "e4m3": 8}


class _Values:
    """What a spec's names stand for, beside its fields: compilers that trace a fake-quant ask for the values.

    Attributes:
        number_format: a sign left open counts as signed.
        layout: what is left open counts as one scale.
        grid: of the format.
        discretizers: of estimator and format.
    """

    __slots__ = ("discretizers", "grid", "layout", "number_format")

    number_format: Format
    layout: ScaleLayout
    grid: Grid
    discretizers: Discretizers


@dataclass(frozen=True, kw_only=True)
class QuantSpec(_Values):
    """The number format of one edge.

    Args:
        bits: 2 to 8, unsigned ones 1 to 8; may be left out where ``format`` says it.
        signed: None takes the sign from the graph (unsigned where values are proved non-negative).
        granularity: which elements share a scale: "tensor", "channel" (output channels of a weight), "group-32" (or any
            size), "block-128x128", "token" (rows of an activation), or a ``ScaleLayout``; None: what the method is used with,
            "channel" for weights and "tensor" for activations, "token" for those with a dynamic scale.
        narrow: leave out the lowest signed code, so that the grid is symmetric; nothing where codes turn out unsigned.
        method: forward method, a registered name or its class.
        estimator: gradient estimator, a registered name or its class.
        format: None for whole numbers of ``bits`` bits, or "e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "nf4", "seq2", "binary",
            "ternary", "levels(-1,0,1)", the name of a format that was added, or a ``Format``.
        scale: how scales are stored: "float32", "bfloat16", or, by the methods that define them so, "e8m0" and "e4m3".

    Raises:
        SpecError: for a value outside these, or values that do not go together.

    >>> QuantSpec(bits=4).bounds
    (-8, 7)
    >>> QuantSpec(bits=4, signed=False).bounds
    (0, 15)
    >>> QuantSpec(format="e2m1", granularity="g32", method="dynamic").number_format.limits
    (-6.0, 6.0)
    """

    bits: int = 0
    signed: bool | None = None
    granularity: str | ScaleLayout | None = None
    narrow: bool = False
    method: str | type[Any] = "lsq"
    estimator: str | type[Any] = "pege"
    format: str | Format | None = None
    scale: ScaleDtype = "float32"

    def __post_init__(self) -> None:
        if self.format is not None:
            self._take_format(format_of(self.format))
        lowest = MIN_BITS if self.format is None and self.signed is not False else 1
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not lowest <= self.bits <= MAX_BITS:
            one = ' For one bit give format="binary" (-1 and 1), or signed=False (0 and 1).' if self.bits == 1 else ""
            raise SpecError(
                f"bits={self.bits!r} is not a whole number from {lowest} to {MAX_BITS}.{one}\n"
                f"  give a number in that range, or None in a rule to stay in float."
            )
        if self.signed not in (None, True, False):
            raise SpecError(f"signed={self.signed!r}: give True, False, or None to take it from the graph.")
        if self.granularity is not None:
            object.__setattr__(self, "granularity", layout_named(self.granularity).name)
        if not isinstance(self.narrow, bool):
            raise SpecError(f"narrow={self.narrow!r}: give True or False.")
        if self.narrow and self.signed is False:
            raise SpecError("narrow=True leaves out the lowest signed code: it does not go with signed=False.")
        if self.scale not in get_args(ScaleDtype):
            raise SpecError(f"scale={self.scale!r}: give one of {', '.join(map(repr, get_args(ScaleDtype)))}.")
        object.__setattr__(self, "method", METHODS.name_of(self.method))
        object.__setattr__(self, "estimator", ESTIMATORS.name_of(self.estimator))
        method = METHODS[str(self.method)]
        if self.scale not in method.scale_dtypes:
            if self.scale != "float32":
                known = ", ".join(map(repr, method.scale_dtypes))
                raise SpecError(f'scale={self.scale!r}: method="{self.method}" stores scales as {known}.')
            object.__setattr__(self, "scale", method.scale_dtypes[0])
        self._set_values()
        method.check_spec(self)

    def _set_values(self) -> None:
        plain = Integer(self.bits, self.signed is not False, self.narrow)
        object.__setattr__(self, "number_format", plain if self.format is None else format_of(self.format))
        layout = PerTensor() if self.granularity is None else layout_named(self.granularity)
        object.__setattr__(self, "layout", layout)
        object.__setattr__(self, "grid", Grid.of(self.number_format))
        object.__setattr__(self, "discretizers", discretizers_of(ESTIMATORS[str(self.estimator)], self.grid.levels))

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._set_values()

    def _take_format(self, given: Format) -> None:
        """Write whole numbers as bits, sign and narrow, and any other format as its name with its bits."""
        if self.bits not in (0, given.bits):
            raise SpecError(f"bits={self.bits} and format={given}, which has {given.bits}: leave bits out.")
        object.__setattr__(self, "bits", given.bits)
        if isinstance(given, Integer):
            if self.signed not in (None, given.signed):
                raise SpecError(f"signed={self.signed} and format={given}: leave signed out.")
            object.__setattr__(self, "signed", given.signed)
            object.__setattr__(self, "narrow", given.narrow or self.narrow)
            object.__setattr__(self, "format", None)
            return
        if self.signed is False or self.narrow:
            raise SpecError(f"format={given} says its levels: signed and narrow are for whole numbers, leave them out.")
        object.__setattr__(self, "format", given.name)

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest code (q_min, q_max) of whole numbers; a sign left open counts as signed.

        Raises:
            SpecError: for another format, whose codes have no order that means something.
        """
        if self.format is not None:
            raise SpecError(f"{self.format} has levels, no bounds: ask number_format.limits.")
        return bounds_of(self.bits, signed=self.signed is not False, narrow=self.narrow)

    def resolve(self, kind: Kind, *, non_negative: bool) -> "QuantSpec":
        """Fill in what was left open, from the kind of edge and what the graph proves of its sign."""
        method = METHODS[str(self.method)]
        granularity = self.granularity or method.default_granularity(kind)
        if self.format is not None:
            return dataclasses.replace(self, signed=True, granularity=granularity)
        signed = method.signed_by_default(kind, non_negative) if self.signed is None else self.signed
        narrow = signed and (self.narrow or method.symmetric_clip)
        return dataclasses.replace(self, signed=signed, granularity=granularity, narrow=narrow)

    def __repr__(self) -> str:
        """As a dataclass has it; fields that came later show only where they say something, so that hashes of it last."""
        shown = {name: getattr(self, name) for name in ("bits", "signed", "granularity", "narrow", "method", "estimator")}
        if self.format is not None:
            shown["format"] = self.format
        if self.scale != "float32":
            shown["scale"] = self.scale
        return f"QuantSpec({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def __str__(self) -> str:
        """Short form for tables: the format and what differs from the defaults.

        >>> str(QuantSpec(bits=4, method="pact"))
        '4 pact'
        >>> str(QuantSpec(format="e2m1", granularity="group-32", method="mx", scale="e8m0"))
        'e2m1 group-32 mx'
        """
        words = [str(self.bits) if self.format is None else str(self.format)]
        words += [str(self.granularity)] if self.granularity not in (None, "channel", "tensor") else []
        words += [str(value) for name, value in (("lsq", self.method), ("pege", self.estimator)) if value != name]
        return " ".join(words)


for _name in ESTIMATORS:  # before a compiler traces a spec that is made in its code
    discretizers_of(ESTIMATORS[_name], None)
