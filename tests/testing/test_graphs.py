"""Graphs from nodes: they run, train, print as code, shrink, and reach what a tracer never makes."""

import copy
import pickle
import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import find, given, settings

from pege_fx import InputError
from pege_fx.testing import Gradients, GraphCase, assert_graph, assert_same_function, graph_modules, operation_names
from pege_fx.testing.graphs import BINARY, OPERATIONS, SHAPE

QUICK = settings(max_examples=300, database=None)


@pytest.mark.parametrize("operation", operation_names())
def test_every_operation_keeps_the_shape_and_has_gradients(operation: str) -> None:
    graph, inputs = GraphCase.of(f"def forward(x, y):\n a = {operation}({'x, y' if operation in BINARY else 'x'})\n return a")
    graph.graph.lint()
    assert graph(*inputs).shape == SHAPE
    gradients = Gradients(graph)(*inputs)
    assert gradients["input 0"].any()
    assert all(value.any() for name, value in gradients.items() if not name.startswith("input"))


@given(graph_modules())
def test_a_graph_is_sound_and_prints_as_code_that_makes_it_again(case: GraphCase) -> None:
    graph, inputs = case
    graph.graph.lint()
    again = eval(repr(case), {"GraphCase": GraphCase})
    assert again.code == case.code
    assert again.graph.code == graph.code
    assert_same_function(graph, again.graph, inputs, tolerance=0)
    for other in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert_same_function(graph, other, inputs, tolerance=0)


def test_graphs_shrink_to_one_convolution() -> None:
    case = find(graph_modules(), lambda case: True, settings=QUICK)
    assert repr(case) == 'GraphCase.of("""\ndef forward(x):\n    a = conv_1(x)\n    return a\n""")'


def parameters_read(case: GraphCase) -> Counter[str]:
    return Counter(str(node.target) for node in case.graph.graph.nodes if node.op in ("get_attr", "call_module"))


@pytest.mark.parametrize(
    ("holds", "lines"),
    [
        (lambda case: max(parameters_read(case).values(), default=0) > 1, ["a = conv_1(x)", "b = conv_1(a)", "return b"]),
        (
            lambda case: any(n.op == "call_module" and not n.users for n in case.graph.graph.nodes),
            ["a = conv_1(x)", "return x"],
        ),
        (lambda case: len(case.inputs) == 2 and "sub" in case.code, ["a = sub(y, y)", "return a"]),
        (lambda case: "," in case.code.splitlines()[-1], ["a = conv_1(x)", "return a, x"]),
    ],
)
def test_shared_dead_and_several_are_found_and_shrink_to_what_a_person_reads(holds: Any, lines: list[str]) -> None:
    case = find(graph_modules(), holds, settings=QUICK)
    assert [line.strip() for line in case.code.splitlines()[1:]] == lines


@pytest.mark.parametrize("seed", range(4))
def test_graphs_shrink_from_wherever_the_search_began(seed: int) -> None:
    case = find(
        graph_modules(),
        lambda case: "add" in case.code,
        settings=settings(QUICK, max_examples=2000),
        random=random.Random(seed),
    )
    assert case.code == "def forward(x):\n    a = add(x, x)\n    return a"


def test_graphs_reach_the_operations() -> None:
    seen: set[str] = set()

    @given(graph_modules(max_nodes=20))
    @settings(max_examples=120, database=None)
    def look(case: GraphCase) -> None:
        seen.update(name for name in OPERATIONS if f"= {name}" in case.code)

    look()
    assert len(set(OPERATIONS) - seen) <= 2  # of 21, in so few graphs


def test_nodes_have_the_names_of_the_code() -> None:
    case = GraphCase.of("def forward(x, y):\n  a = conv_1(x)\n  b = conv_weight_1(a)\n  c = matmul(b, y)\n  return c, a")
    assert case.graph.graph.find_nodes(op="call_function", target=torch.matmul)[0].name == "c"
    assert_graph(
        case.graph,
        "input -> a: Conv2d -> b: conv2d -> c: matmul -> out: output",
        "attribute -> b",
        "input -> c",
        "a -> out",
    )


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("x + 1", "not one function"),
        ("def forward(x):\n  return", "no statement of a graph: 'return'"),
        ("def f(", "not one function"),
        ("def forward(x):\n  a = conv_1(x)", "ends in a return"),
        ("def forward(x):\n  a = conv(x)\n  return a", r"no operation 'conv'; closest: .*conv_1"),
        ("def forward(x):\n  a = add(x)\n  return a", "add takes 2 values, not 1"),
        ("def forward(x):\n  a = sigmoid(x, x)\n  return a", "sigmoid takes 1 value, not 2"),
        ("def forward(x):\n  return b", "'b' is no value"),
        ("def forward(x):\n  a = sigmoid(x + 1)\n  return a", r"'x \+ 1' is no value"),
        ("def forward(x):\n  import os\n  return x", "no statement of a graph: 'import os'"),
        ("def forward(x):\n  a = os.system(x)\n  return x", "no statement of a graph"),
    ],
)
def test_other_code_is_refused_with_what_is_wrong(code: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        GraphCase.of(code)


@pytest.mark.parametrize("wrong", [{"max_nodes": 0}, {"max_nodes": 24}, {"inputs": 0}, {"inputs": 4}])
def test_sizes_out_of_range_are_refused_at_once(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match="give 1 to 23 nodes and 1 to 3 inputs"):
        graph_modules(**wrong)
