"""What an operation costs: its multiply-accumulates, from the shapes that the example inputs gave."""

from torch.fx import GraphModule, Node

from pege_fx.passes.graph import operand, operator_of, tensor_of, unfolded
from pege_fx.passes.operators import Shape


def multiply_accumulates(gm: GraphModule, node: Node) -> int | None:
    """Return how many products an operator's node sums up, biases and masks left out; None where a shape is not known.

    >>> from torch import nn
    >>> from torch.fx import symbolic_trace
    >>> from pege_fx.passes import normalize, run
    >>> _ = run(gm := symbolic_trace(nn.Sequential(nn.Linear(5, 3))), [normalize])
    >>> (node,) = (node for node in gm.graph.nodes if node.op == "call_function")
    >>> node.meta["shape"] = (2, 3)
    >>> multiply_accumulates(gm, node)
    30
    """
    described = operator_of(node)
    assert described is not None, f"{node} is no operator"
    result = _shape(gm, node)
    if result is None:
        return None
    given = {
        name: _shape(gm, value) if isinstance(value := operand(node, name), Node) else value for name in described.parameters
    }
    try:
        return described.products(result, given)
    except (TypeError, ValueError, KeyError, IndexError):  # a shape is missing, or not what the operation takes
        return None


def _shape(gm: GraphModule, source: Node) -> Shape | None:
    if (value := tensor_of(gm, unfolded(gm, source))) is not None:
        return tuple(value.shape)
    shape: Shape | None = source.meta.get("shape")
    return shape
