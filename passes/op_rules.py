"""Traits of operations that the arguments of a call decide: rules for the table in ``op_traits``.

A rule on signs tells whether the result of a call is never negative; one on ranks, how many dimensions it has.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Call:
    """The arguments of one call and what is proved of them, for traits that the arguments decide.

    Attributes:
        positional: the positional arguments.
        named: the keyword arguments; of a module, its settings too.
        all_inputs: whether every tensor that comes in is proved to be non-negative.
        is_non_negative: tells whether an argument is a number >= 0, or a tensor that is proved to be.
        is_size: tells whether an argument is the size of a tensor, or a part of a shape.
        rank: returns the number of dimensions of an argument, None if it is not known.
    """

    positional: tuple[Any, ...]
    named: Mapping[str, Any]
    all_inputs: bool = False
    is_non_negative: Callable[[Any], bool] = lambda value: False
    is_size: Callable[[Any], bool] = lambda value: False
    rank: Callable[[Any], int | None] = lambda value: None

    def given(self, position: int, *names: str, default: Any = None) -> Any:
        """Return the argument at a position, or by one of its names."""
        found = next((self.named[name] for name in names if name in self.named), default)
        return self.positional[position] if len(self.positional) > position else found

    @property
    def first_input(self) -> bool:
        """Whether the first argument is proved to be non-negative."""
        return bool(self.positional) and self.is_non_negative(self.positional[0])


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 0


def sums(call: Call) -> bool:
    """Every number in a sum counts, and the factor of the second operand."""
    return _has_no_negative_number(call) and call.is_non_negative(call.named.get("alpha", 1)) and call.all_inputs


def multiplies(call: Call) -> bool:
    """A square, or factors none of which is negative."""
    operands = call.positional
    is_square = len(operands) == 2 and operands[0] is operands[1] and not isinstance(operands[0], (int, float))
    return is_square or (_has_no_negative_number(call) and call.all_inputs)


def _has_no_negative_number(call: Call) -> bool:
    numbers = (value for value in (*call.positional, call.named.get("other")) if isinstance(value, (int, float)))
    return all(number >= 0 for number in numbers)


def combines(call: Call) -> bool:
    """All tensors shape the values; a number is a dimension."""
    return call.all_inputs


def averages(call: Call) -> bool:
    """An average, or a sum over a number that is given."""
    return call.first_input and _is_positive(call.named.get("divisor_override") or 1)


def clamps(call: Call) -> bool:
    """A lower bound that is not negative, or an input that is not; an upper bound below zero wins over both."""
    low, high = call.given(1, "min", "min_val"), call.given(2, "max", "max_val")
    return (call.is_non_negative(low) or call.first_input) and (high is None or call.is_non_negative(high))


def clamps_above(call: Call) -> bool:
    """An upper bound."""
    return call.first_input and call.is_non_negative(call.given(1, "max"))


def replaces_below(call: Call) -> bool:
    """What is at most the threshold becomes the value."""
    kept = call.first_input or call.is_non_negative(call.given(1, "threshold"))
    return kept and call.is_non_negative(call.given(2, "value"))


def raises(call: Call) -> bool:
    """An even power, or a positive one of what is not negative."""
    exponent = call.positional[1] if len(call.positional) > 1 else None
    if not isinstance(exponent, (int, float)):
        return False
    return exponent % 2 == 0 or (exponent > 0 and call.first_input)


def divides(call: Call) -> bool:
    """By a number above zero or a size; a tensor may hold -0, and what is divided by it is -inf."""
    divisor = call.given(1, "other")
    return call.first_input and (_is_positive(divisor) or call.is_size(divisor))


def leaves_a_remainder(call: Call) -> bool:
    """A remainder has the sign of the divisor."""
    return _is_positive(call.given(1, "other"))


def chooses(call: Call) -> bool:
    """``torch.where(condition, input, other)``."""
    return call.is_non_negative(call.given(1, "input")) and call.is_non_negative(call.given(2, "other"))


def chooses_by_method(call: Call) -> bool:
    """``input.where(condition, other)``."""
    return call.first_input and call.is_non_negative(call.given(2, "other"))


def fills(call: Call) -> bool:
    """A value where a mask says so."""
    return call.first_input and call.is_non_negative(call.given(2, "value"))


def pads(call: Call) -> bool:
    """Zeros if no value is given."""
    fill = call.given(3, "value")
    return call.first_input and (fill is None or call.is_non_negative(fill))


def resizes(call: Call) -> bool:
    """Bicubic interpolation overshoots."""
    keeping = ("nearest", "nearest-exact", "linear", "bilinear", "trilinear", "area")
    return call.first_input and call.given(3, "mode", default="nearest") in keeping


def samples(call: Call) -> bool:
    """Bicubic interpolation overshoots."""
    return call.first_input and call.given(2, "mode", default="bilinear") in ("bilinear", "nearest")


def rank_of_flat(call: Call) -> int | None:
    """All but the first dimension become one."""
    start, end = call.given(1, "start_dim", default=0), call.given(2, "end_dim", default=-1)
    return 2 if (start, end) == (1, -1) else None


def rank_of_linear(call: Call) -> int | None:
    """A matrix keeps the number of dimensions; a vector for a weight takes one away."""
    return call.rank(call.given(0, "input")) if call.rank(call.given(1, "weight")) == 2 else None
