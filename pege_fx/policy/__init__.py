"""Policies: rules that say which edges are quantized how, the plan that they lead to, and mixed precision."""

from pege_fx.policy.rules import QuantPolicy, Rule

__all__ = ["QuantPolicy", "Rule"]
