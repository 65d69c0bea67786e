"""What an operation costs: its multiply-accumulates, from the shapes that the example inputs gave."""

import math
from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule, Node

from pege_fx.passes.graph import Operator, operand, operator_of, tensor_of, unfolded

Shape = tuple[int, ...]


def multiply_accumulates(gm: GraphModule, node: Node) -> int | None:
    """Return how many products an operator's node sums up, biases and masks left out; None where a shape is not known.

    >>> from torch import nn
    >>> from torch.fx import symbolic_trace
    >>> from pege_fx.passes import normalize, run
    >>> run(gm := symbolic_trace(nn.Sequential(nn.Linear(5, 3))), [normalize])
    >>> (node,) = (node for node in gm.graph.nodes if node.op == "call_function")
    >>> node.meta["shape"] = (2, 3)
    >>> multiply_accumulates(gm, node)
    30
    """
    described = operator_of(node)
    assert described is not None, f"{node} is no operator"
    if _shape(gm, node) is None:
        return None
    shapes: dict[str, Any] = {name: _shape(gm, operand(node, name)) for name in described.parameters}
    try:
        return _COUNTS.get(described.name, _product)(node, described, shapes)
    except (TypeError, ValueError, KeyError, IndexError):  # a shape is missing, or not what the operation takes
        return None


def _shape(gm: GraphModule, source: Any) -> Shape | None:
    if not isinstance(source, Node):
        return None
    if (value := tensor_of(gm, unfolded(gm, source))) is not None:
        return tuple(value.shape)
    shape: Shape | None = source.meta.get("shape")
    return shape


def _results(node: Node) -> int:
    shape: Shape = node.meta["shape"]
    return math.prod(shape)


def _convolution(node: Node, described: Operator, shapes: dict[str, Shape]) -> int:
    """Each output element sums over one filter; each input element of a transposed convolution is spread over one."""
    weight = shapes["weight"]
    sites = math.prod(shapes["input"]) if described.transposed else _results(node)
    return sites * math.prod(weight[1:])


def _linear(node: Node, described: Operator, shapes: dict[str, Shape]) -> int:
    return _results(node) * math.prod(shapes["weight"][1:])


def _product(node: Node, described: Operator, shapes: dict[str, Shape]) -> int:
    """Each output element of a matrix product sums over the last dimension of its first operand."""
    return _results(node) * shapes[described.inputs[0]][-1]


def _attention(node: Node, described: Operator, shapes: dict[str, Shape]) -> int:
    query, key, value = (shapes[name] for name in described.inputs)
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _einsum(node: Node, described: Operator, shapes: dict[str, Shape]) -> int:
    """The product of all sizes; dimensions behind an ellipsis count once."""
    equation = str(operand(node, "equation")).replace(" ", "").partition("->")[0]
    sizes: dict[Any, int] = {}
    for term, name in zip(equation.split(","), described.inputs, strict=False):
        shape = shapes[name]
        before, dots, after = term.partition("...")
        hidden = len(shape) - len(before) - len(after)
        labels = [*before, *(range(-hidden, 0) if dots else ()), *after]
        for label, size in zip(labels, shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    return math.prod(sizes.values())


def _nothing(node: Node, described: Operator, shapes: dict[str, Shape]) -> int:
    return 0  # a look-up


_COUNTS: dict[str, Callable[[Node, Operator, dict[str, Shape]], int]] = {
    **{f"conv{kind}{dims}d": _convolution for kind in ("", "_transpose") for dims in (1, 2, 3)},
    "linear": _linear,
    "bilinear": _linear,
    "embedding": _nothing,
    "embedding_bag": _nothing,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
}
