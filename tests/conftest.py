"""Hypothesis for every test: the same examples in every run, and no deadline (a first call may compile)."""

from hypothesis import settings

settings.register_profile("pege_fx", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("pege_fx")
