"""Errors: one base class that a user can catch, ValueErrors where Python users expect them, warnings that can be errors."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pege_fx
from pege_fx import errors
from pege_fx.errors import closest

ERRORS = [cls for name, cls in vars(errors).items() if name.endswith("Error")]


@pytest.mark.parametrize("cls", ERRORS)
def test_every_error_is_a_pege_error_that_says_something_and_is_public(cls: type[Exception]) -> None:
    assert issubclass(cls, pege_fx.PegeError)
    assert cls.__doc__
    assert getattr(pege_fx, cls.__name__) is cls


@pytest.mark.parametrize("cls", [pege_fx.SpecError, pege_fx.PolicyError, pege_fx.ScheduleError])
def test_a_wrong_value_is_also_a_value_error(cls: type[Exception]) -> None:
    assert issubclass(cls, ValueError)


def test_a_warning_is_a_user_warning_and_no_error() -> None:
    assert issubclass(pege_fx.PegeWarning, UserWarning)
    assert not issubclass(pege_fx.PegeWarning, pege_fx.PegeError)


NAMES = st.lists(st.text("abc.1", min_size=1, max_size=8), min_size=1, max_size=8, unique=True)


@given(NAMES, st.integers(1, 4), st.data())
def test_closest_begins_with_the_name_itself(names: list[str], count: int, data: st.DataObject) -> None:
    wanted = data.draw(st.sampled_from(names))
    found = closest(wanted, names, count).split(", ")
    assert found[0] == wanted
    assert len(found) == min(count, len(names))
    assert set(found) <= set(names)


def test_closest_of_nothing_is_empty() -> None:
    assert closest("conv", []) == ""
