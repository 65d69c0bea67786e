"""Modules under their old names."""

import importlib
import importlib.util
import subprocess
import sys

import pytest

import pege_fx
from pege_fx._utils.moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_a_module_is_found_under_its_old_name(old: str) -> None:
    assert importlib.util.find_spec(f"pege_fx.{old}") is not None
    assert not hasattr(pege_fx, old) or old in pege_fx.__all__, "the old name hides a public one"


def test_the_old_name_is_the_module_of_today_and_warns() -> None:
    code = """
import sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from pege_fx.scheduler import plan_of
    from pege_fx import container
import pege_fx
from pege_fx.serialization import tensor_tree as today
assert plan_of is pege_fx.plan_of and container is today, container
texts = [str(warning.message) for warning in caught if warning.category is DeprecationWarning]
scheduler, moved = texts
assert scheduler == "pege_fx.scheduler is pege_fx.training.scheduler now."
assert moved == "pege_fx.container is pege_fx.serialization.tensor_tree now."
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_public_function_shadows_a_module() -> None:
    functions = [name for name in pege_fx.__all__ if callable(getattr(pege_fx, name))]
    assert [name for name in functions if name in MOVED or importlib.util.find_spec(f"pege_fx.{name}")] == []
