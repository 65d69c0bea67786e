"""Number formats: how many bits, signed or not, one scale per channel or per tensor, and by which method."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

from pege_fx.errors import SpecError, closest

Granularity: TypeAlias = Literal["channel", "tensor"]
Kind: TypeAlias = Literal["weight", "activation"]

MIN_BITS, MAX_BITS = 2, 8


def bounds_of(bits: int, *, signed: bool, narrow: bool = False) -> tuple[int, int]:
    """Return (q_min, q_max) of a grid.

    >>> bounds_of(3, signed=True, narrow=True)
    (-3, 3)
    """
    if not signed:
        return 0, 2**bits - 1
    half = 2 ** (bits - 1)
    return -half + int(narrow), half - 1


class Registry:
    """Classes by name: forward methods and estimators, the library's own and a user's."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._classes: dict[str, type[Any]] = {}

    def add(self, name: str, cls: type[Any]) -> None:
        known = self._classes.get(name)
        # A notebook cell run twice defines the same class again; that is not a conflict.
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise SpecError(f"{self.what} {name!r} is already {known.__module__}.{known.__qualname__}: choose another name.")
        self._classes[name] = cls

    def name_of(self, choice: str | type[Any]) -> str:
        """Return the registered name of a class or of a name; raise ``SpecError`` for anything else."""
        for name, cls in self._classes.items():
            if choice == name or choice is cls:
                return name
        shown = choice if isinstance(choice, str) else getattr(choice, "__name__", repr(choice))
        raise SpecError(
            f"unknown {self.what} {shown!r}.\n"
            f"  known: {', '.join(sorted(self._classes))}\n"
            f"  closest: {closest(str(shown), self._classes, 1)}; or write a class, see docs/extending.md."
        )

    def __getitem__(self, name: str) -> type[Any]:
        return self._classes[name]

    def __iter__(self) -> Any:
        return iter(self._classes)


METHODS = Registry("forward method")
ESTIMATORS = Registry("estimator")


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """The number format of one edge.

    Args:
        bits: 2 to 8.
        signed: None takes the sign from the graph (unsigned where values are proved non-negative).
        granularity: one scale per output "channel" or per "tensor"; None: per channel for weights, per
            tensor for activations.
        narrow: leave out the lowest signed code, so that the grid is symmetric; nothing where codes turn out unsigned.
        method: forward method, a registered name or its class.
        estimator: gradient estimator, a registered name or its class.

    Raises:
        SpecError: for a value outside these.

    >>> QuantSpec(bits=4).bounds
    (-8, 7)
    >>> QuantSpec(bits=4, signed=False).bounds
    (0, 15)
    """

    bits: int
    signed: bool | None = None
    granularity: Granularity | None = None
    narrow: bool = False
    method: str | type[Any] = "lsq"
    estimator: str | type[Any] = "pege"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not MIN_BITS <= self.bits <= MAX_BITS:
            raise SpecError(
                f"bits={self.bits!r} is not a whole number from {MIN_BITS} to {MAX_BITS}.\n"
                f"  give a number in that range, or None in a rule to stay in float."
            )
        if self.signed not in (None, True, False):
            raise SpecError(f"signed={self.signed!r}: give True, False, or None to take it from the graph.")
        if self.granularity not in (None, "channel", "tensor"):
            raise SpecError(f'granularity={self.granularity!r}: give "channel", "tensor", or None for the default.')
        if not isinstance(self.narrow, bool):
            raise SpecError(f"narrow={self.narrow!r}: give True or False.")
        if self.narrow and self.signed is False:
            raise SpecError("narrow=True leaves out the lowest signed code: it does not go with signed=False.")
        object.__setattr__(self, "method", METHODS.name_of(self.method))
        object.__setattr__(self, "estimator", ESTIMATORS.name_of(self.estimator))

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest code (q_min, q_max); a sign left open counts as signed."""
        return bounds_of(self.bits, signed=self.signed is not False, narrow=self.narrow)

    def resolve(self, kind: Kind, *, non_negative: bool) -> "QuantSpec":
        """Fill in what was left open, from the kind of edge and what the graph proves of its sign."""
        signed = self.signed
        if signed is None:
            signed = METHODS[str(self.method)].signed_by_default(kind, non_negative)
        granularity = self.granularity or ("channel" if kind == "weight" else "tensor")
        narrow = signed and (self.narrow or METHODS[str(self.method)].symmetric_clip)
        return dataclasses.replace(self, signed=signed, granularity=granularity, narrow=narrow)

    def __str__(self) -> str:
        """Short form for tables: bits and what differs from the defaults.

        >>> str(QuantSpec(bits=4, method="pact"))
        '4 pact'
        """
        words = [str(self.bits)]
        words += [str(value) for name, value in (("lsq", self.method), ("pege", self.estimator)) if value != name]
        return " ".join(words)


@dataclass(frozen=True)
class Channels:
    """Where a weight keeps its output channels.

    ``axis`` is 0 for convolutions, linear and embedding; 1 for transposed convolutions, whose weight has
    shape (in, out / groups, *kernel), so that output channel ``g * out / groups + j`` is at column j of the
    g-th block of rows.
    """

    count: int
    axis: int = 0
    groups: int = 1

    def broadcast(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Lay one value per output channel (shape ``(count,)``) out so that it broadcasts to a weight of ``shape``."""
        trailing = (1,) * (len(shape) - self.axis - 1)
        if self.axis == 0:
            return values.reshape(-1, *trailing)
        rows = values.reshape(self.groups, 1, -1).expand(self.groups, shape[0] // self.groups, -1)
        return rows.reshape(shape[0], -1, *trailing) if self.groups > 1 else values.reshape(1, -1, *trailing)

    def rows(self, weight: Tensor) -> Tensor:
        """Return the weight with one row per output channel, shape ``(count, elements per channel)``."""
        if self.axis == 0:
            return weight.reshape(self.count, weight.shape[1:].numel())
        rows, positions = weight.shape[0] // self.groups, weight.shape[2:].numel()
        split = weight.reshape(self.groups, rows, self.count // self.groups, positions)
        return split.transpose(1, 2).reshape(self.count, rows * positions)
