"""Property-based testing of graph rewrites. Needs the extra ``testing``; docs/testing.md is a tutorial.

Strategies for Hypothesis, all of which shrink: ``tensors``, ``specs``, ``policies``, ``networks`` and ``graph_modules``; the
last two print as code that makes them again. Assertions about the function and the structure of a graph. And ``check_pass``,
which runs every law on a rewrite of your own:

>>> from pege_fx.passes.graph import remove_dead_nodes
>>> verdict = check_pass(remove_dead_nodes, "function", max_examples=10)
>>> verdict.graphs, verdict.changed > 0
(10, True)
"""

from pege_fx.errors import PackageError

try:
    from pege_fx.testing.function import BuffersAfter, Gradients, assert_same_function
    from pege_fx.testing.graphs import GraphCase, graph_modules, operation_names
    from pege_fx.testing.laws import LAWS, Verdict, check_pass
    from pege_fx.testing.networks import Case, Network, TwoInputs, as_trained, layer_names, networks
    from pege_fx.testing.structure import assert_graph, isomorphic_up_to, kind_of, structure
    from pege_fx.testing.values import policies, specs, tensors
except ModuleNotFoundError as error:
    if error.name != "hypothesis":
        raise
    raise PackageError("pege_fx.testing needs hypothesis: pip install 'pege_fx[testing]'.") from error

__all__ = [
    "LAWS",
    "BuffersAfter",
    "Case",
    "Gradients",
    "GraphCase",
    "Network",
    "TwoInputs",
    "Verdict",
    "as_trained",
    "assert_graph",
    "assert_same_function",
    "check_pass",
    "graph_modules",
    "isomorphic_up_to",
    "kind_of",
    "layer_names",
    "networks",
    "operation_names",
    "policies",
    "specs",
    "structure",
    "tensors",
]
