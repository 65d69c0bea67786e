"""Bits for each operation under a budget: lower what saves most for the least harm, then take what helps and fits."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx

from pege_fx.errors import InputError
from pege_fx.numerics.spec import QuantSpec
from pege_fx.policy.plan import FLOAT_BITS, Edge, Operation, Plan
from pege_fx.policy.rules import QuantPolicy, Rule

Readers = Mapping[tuple[str, str], str]
Harm = Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Budget:
    """At most so many bytes of quantized weights, and so many bit operations (products times the bits of both factors)."""

    size: float | None = None
    bit_operations: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.size, self.bit_operations) if value is not None]
        if not given or not all(value > 0 for value in given):
            raise InputError(f"{self!r}: give size in bytes or bit_operations, as positive numbers.")

    def overshoot(self, cost: tuple[int, int]) -> float:
        """How far a cost lies above, in parts of the budget; 0 if it fits."""
        pairs = zip(cost, (self.size, self.bit_operations), strict=True)
        return sum(max(used / most - 1.0, 0.0) for used, most in pairs if most is not None)


def mixed_precision(plan: Plan, readers: Readers, harm: Harm, budget: Budget) -> QuantPolicy:
    """Return the plan's policy with rules behind it that keep within the budget.

    Args:
        plan: of a prepared model.
        readers: for each operation's path and operand, the site it reads.
        harm: for each site, what each number of bits costs in the metric.
        budget: see there.

    Raises:
        InputError: if the fewest bits are too many, or multiply-accumulates are needed and not known.
    """
    allocation = _Allocation(plan, readers, harm, budget)
    allocation.lower_until_it_fits()
    allocation.take_what_helps_and_fits()
    rules = [rule for operation in plan.operations if (rule := allocation.rule(operation)) is not None]
    return QuantPolicy((*plan.policy.rules, *rules))


class _Allocation:
    """Bits of each group of sites: an operation's inputs have one field in a rule, so their sites go together."""

    def __init__(self, plan: Plan, readers: Readers, harm: Harm, budget: Budget) -> None:
        self.plan, self.readers, self.budget = plan, readers, budget
        self.operations = [op for op in plan.operations if any((op.path, edge.operand) in readers for edge in op.edges)]
        if budget.bit_operations is not None and (unknown := [op.path for op in self.operations if op.macs is None]):
            raise InputError(f"bit operations of {unknown[0]} are not known: prepare with example_inputs.")
        together: nx.utils.UnionFind[str] = nx.utils.UnionFind()
        for operation in self.operations:
            for edges in (operation.weights, operation.inputs):
                if sites := [site for edge in edges if (site := self._site(operation, edge))]:
                    together.union(*sites)
        self.group = {site: together[site] for site in together}
        self.harm: dict[str, dict[int, float]] = {}
        for group in set(self.group.values()):
            members = [harm[site] for site, its_group in self.group.items() if its_group == group and site in harm]
            common = set.intersection(*(set(member) for member in members)) if members else set()
            if common:
                self.harm[group] = {bits: sum(member[bits] for member in members) for bits in common}
        self.bits = {group: max(options) for group, options in sorted(self.harm.items())}

    def _site(self, operation: Operation, edge: Edge) -> str | None:
        return self.readers.get((operation.path, edge.operand))

    def _width(self, operation: Operation, edge: Edge) -> int:
        if edge.spec is None:
            return FLOAT_BITS
        return self.bits.get(self.group.get(self._site(operation, edge) or "", ""), edge.spec.bits)

    def cost(self) -> tuple[int, int]:
        """Bytes of quantized weights, and bit operations."""
        weights: dict[str, int] = {}
        products = 0
        for operation in self.operations:
            for edge in operation.weights:
                if (site := self._site(operation, edge)) is not None:
                    weights[site] = (self._width(operation, edge) * edge.elements + 7) // 8
            inputs = max((self._width(operation, edge) for edge in operation.inputs), default=FLOAT_BITS)
            first = max((self._width(operation, edge) for edge in operation.weights), default=inputs)
            products += (operation.macs or 0) * first * inputs
        return sum(weights.values()), products

    def lower_until_it_fits(self) -> None:
        while (over := self.budget.overshoot(self.cost())) > 0:
            prices = {step: self._price(step, over) for step in self._steps()}
            best = min(prices, key=prices.__getitem__, default=None)
            if best is None or prices[best][0] == float("inf"):
                size, products = self.cost()
                raise InputError(
                    f"{self.budget!r} can not be met: with the fewest bits tried, weights take {size:,} bytes and products"
                    f" {products:,} bit operations; measure fewer bits, or allow more."
                )
            self.bits[best[0]] = best[1]

    def take_what_helps_and_fits(self) -> None:
        while True:
            useful = [step for step in self._steps() if self._change(*step) < 0 and self._fits(*step)]
            if not useful:
                return
            group, bits = min(useful, key=lambda step: self._change(*step))
            self.bits[group] = bits

    def _steps(self) -> Iterator[tuple[str, int]]:
        for group, options in self.harm.items():
            yield from ((group, bits) for bits in options if bits != self.bits[group])

    def _change(self, group: str, bits: int) -> float:
        return self.harm[group][bits] - self.harm[group][self.bits[group]]

    def _cost_with(self, group: str, bits: int) -> tuple[int, int]:
        before, self.bits[group] = self.bits[group], bits
        try:
            return self.cost()
        finally:
            self.bits[group] = before

    def _price(self, step: tuple[str, int], over: float) -> tuple[float, float]:
        """Harm for each part of the overshoot that a step takes away; then the larger step first."""
        group, bits = step
        gain = over - self.budget.overshoot(self._cost_with(group, bits))
        return (max(self._change(group, bits), 0.0) / gain, -gain) if gain > 0 else (float("inf"), 0.0)

    def _fits(self, group: str, bits: int) -> bool:
        return self.budget.overshoot(self._cost_with(group, bits)) == 0

    def rule(self, operation: Operation) -> Rule | None:
        """The rule that gives an operation its bits; None where the policy does already."""
        fields: dict[str, Any] = {}
        for name, edges in (("weight", operation.weights), ("input", operation.inputs)):
            for edge in edges:
                if edge.spec is not None and self._width(operation, edge) != edge.spec.bits:
                    fields[name] = dataclasses.replace(self._setting(edge, name), bits=self._width(operation, edge))
        return Rule(match=_exactly(operation.path), function=self._named(operation), **fields) if fields else None

    def _named(self, operation: Operation) -> str | None:
        """The function, where the deciding rule names it: there are operations that only such a rule is about."""
        rules = {edge.rule for edge in operation.edges if edge.spec is not None}
        return operation.function if any(self._rule(rule).function is not None for rule in rules) else None

    def _rule(self, words: str) -> Rule:
        return self.plan.policy.rules[int(words.removeprefix("rule ").partition(":")[0])]

    def _setting(self, edge: Edge, name: str) -> QuantSpec:
        """What the deciding rule says, with signs and the like left open where it leaves them open."""
        setting = getattr(self._rule(edge.rule), name)
        assert isinstance(setting, QuantSpec)
        return setting


def _exactly(path: str) -> str:
    return f"re:{re.escape(path)}" if set(path) & set("*?[") else path
