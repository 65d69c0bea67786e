"""Random fx graphs straight from nodes, which print as the code that makes them again.

A tracer follows a module's code; a graph may be anything: a module called from several nodes, a parameter read twice,
nodes that nobody uses, an input returned as it is, several outputs. Here a graph is written as a small Python function
whose calls stand for nodes. It is parsed, and never executed.
"""

import ast
import operator
import string
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from pege_fx.errors import InputError, closest
from pege_fx.testing.networks import as_trained

SIDE = 4
"""Every value is a batch of two of four channels of 4 x 4: any operation takes the result of any other."""
SHAPE = (2, SIDE, SIDE, SIDE)

INPUTS = ("x", "y", "z")
_NAMES = [name for name in string.ascii_lowercase if name not in INPUTS]

MODULES: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(SIDE, SIDE, 3, padding=1),
    "linear": lambda: nn.Linear(SIDE, SIDE),
    "norm": lambda: nn.BatchNorm2d(SIDE),
    "relu": lambda: nn.ReLU(),
    "depthwise": lambda: nn.Conv2d(SIDE, SIDE, 3, padding=1, groups=SIDE, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(SIDE, SIDE, 3, padding=1),
    "max_pool": lambda: nn.MaxPool2d(3, 1, 1),
    "layer_norm": lambda: nn.LayerNorm(SIDE),
}
PARAMETERS: dict[str, tuple[tuple[int, ...], Callable[..., Tensor], dict[str, Any]]] = {
    "conv_weight": ((SIDE, SIDE, 3, 3), F.conv2d, {"padding": 1}),
    "linear_weight": ((SIDE, SIDE), F.linear, {}),
    "gain": ((SIDE, 1, 1), torch.mul, {}),
}


def _halves_swapped(graph: Graph, x: Node) -> Node:
    halves = graph.call_function(torch.chunk, (x, 2), {"dim": 1})
    first, second = (graph.call_function(operator.getitem, (halves, number)) for number in range(2))
    return graph.call_function(torch.cat, ([second, first],), {"dim": 1})


def _reshaped(graph: Graph, x: Node) -> Node:
    batch = graph.call_method("size", (x, 0))
    flat = graph.call_method("reshape", (x, batch, -1))
    return graph.call_method("reshape", (flat, batch, *SHAPE[1:]))


FUNCTIONS: dict[str, Callable[[Graph, Node], Node]] = {
    "sigmoid": lambda graph, x: graph.call_function(torch.sigmoid, (x,)),
    "functional_relu": lambda graph, x: graph.call_function(F.relu, (x,), {"inplace": False}),
    "clamp": lambda graph, x: graph.call_function(torch.clamp, (x,), {"min": -1.0, "max": 1.0}),
    "double": lambda graph, x: graph.call_function(operator.mul, (2.0, x)),
    "one_minus": lambda graph, x: graph.call_function(operator.sub, (1.0, x)),
    "transpose": lambda graph, x: graph.call_method("transpose", (x, -1, -2)),
    "halves_swapped": _halves_swapped,
    "reshaped": _reshaped,
}
BINARY: dict[str, Callable[[Graph, Node, Node], Node]] = {
    "add": lambda graph, x, y: graph.call_function(operator.add, (x, y)),
    "sub": lambda graph, x, y: graph.call_function(torch.sub, (x,), {"other": y}),
    "mul": lambda graph, x, y: graph.call_method("mul", (x, y)),
    "matmul": lambda graph, x, y: graph.call_function(torch.matmul, (x, y)),
    "maximum": lambda graph, x, y: graph.call_function(torch.maximum, (x, y)),
}
_STATEFUL = [*MODULES, *PARAMETERS]
OPERATIONS = [*MODULES, *BINARY, *PARAMETERS, *FUNCTIONS]


@dataclass(frozen=True, eq=False, repr=False)
class GraphCase:
    """A graph and inputs for it; ``graph, inputs = case``.

    Attributes:
        graph: a ``GraphModule`` whose nodes have the names of the code.
        inputs: a tensor for each of its arguments.
        code: what it was made from.
        seed: of parameters and inputs.
    """

    graph: GraphModule
    inputs: tuple[Tensor, ...]
    code: str
    seed: int

    @classmethod
    def of(cls, code: str, seed: int = 0) -> "GraphCase":
        """Make a graph from a small Python function, which is read and not run.

        Each line is a call on values that were made before, ``a = conv_1(x)``, and makes a node of that name (or a few);
        the last line returns one or several. ``conv_1`` is a module: called twice, it is shared; ``conv_2`` is another. The
        operations are those of ``operation_names()``.

        Raises:
            InputError: for anything else, with the line.

        >>> graph, inputs = GraphCase.of('''
        ...     def forward(x):
        ...         a = conv_1(x)
        ...         b = add(a, x)
        ...         return b
        ... ''')
        >>> [str(node) for node in graph.graph.nodes]
        ['x', 'a', 'b', 'output']
        """
        code = textwrap.dedent(code).strip()
        graph = _Builder(seed).built(code)
        count = sum(node.op == "placeholder" for node in graph.graph.nodes)
        generator = torch.Generator().manual_seed(seed)
        return cls(graph, tuple(torch.randn(SHAPE, generator=generator) for _ in range(count)), code, seed)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.graph, self.inputs))

    def __repr__(self) -> str:
        return f'GraphCase.of("""\n{self.code}\n"""{f", seed={self.seed}" if self.seed else ""})'


def operation_names() -> list[str]:
    """Return the operations of a graph's code; those with a module or a parameter take a number: ``conv_1``."""
    return [f"{name}_1" if name in _STATEFUL else name for name in OPERATIONS]


class _Builder:
    def __init__(self, seed: int) -> None:
        self.seed, self.root, self.graph = seed, nn.Module(), Graph()
        self.values: dict[str, Node] = {}

    def built(self, code: str) -> GraphModule:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for statement in self._statements(code):
                self._add(statement)
        gm = GraphModule(self.root, self.graph)
        as_trained(gm, self.seed)
        return gm

    def _statements(self, code: str) -> list[ast.stmt]:
        try:
            (function,) = ast.parse(code).body
            if not isinstance(function, ast.FunctionDef):
                raise ValueError
        except (SyntaxError, ValueError) as error:
            raise InputError(f"this is not one function, def forward(x): ..., of a graph:\n{code}") from error
        for argument in function.args.args:
            self.values[argument.arg] = self.graph.placeholder(argument.arg)
        *_, last = function.body
        if not isinstance(last, ast.Return):
            raise InputError(f"the code of a graph ends in a return:\n{code}")
        return function.body

    def _add(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(func=ast.Name(id=operation), args=operands)):
                node = self._called(operation, [self._value(operand) for operand in operands])
                node.name = name
                self.values[name] = node
            case ast.Return(value=ast.Tuple(elts=results)):
                self.graph.output(tuple(map(self._value, results)))
            case ast.Return(value=ast.Name() as result):
                self.graph.output(self._value(result))
            case _:
                raise InputError(
                    f"no statement of a graph: {ast.unparse(statement)!r}; write a = operation(x), or return a, b."
                )

    def _value(self, expression: ast.expr) -> Node:
        name = ast.unparse(expression)
        if name not in self.values:
            raise InputError(f"{name!r} is no value that was made before; there are {', '.join(self.values)}.")
        return self.values[name]

    def _called(self, operation: str, operands: list[Node]) -> Node:
        kind, _, number = operation.rpartition("_")
        arity = 2 if operation in BINARY else 1
        if len(operands) != arity:
            raise InputError(f"{operation} takes {arity} value{'s' if arity > 1 else ''}, not {len(operands)}.")
        if operation in BINARY:
            return BINARY[operation](self.graph, *operands)
        if operation in FUNCTIONS:
            return FUNCTIONS[operation](self.graph, *operands)
        if not number.isdecimal() or kind not in _STATEFUL:
            raise InputError(f"there is no operation {operation!r}; closest: {closest(operation, operation_names())}.")
        if kind in MODULES:
            if not hasattr(self.root, operation):
                self.root.add_module(operation, MODULES[kind]())
            return self.graph.call_module(operation, (operands[0],))
        shape, function, options = PARAMETERS[kind]
        if not hasattr(self.root, operation):
            self.root.register_parameter(operation, nn.Parameter(0.3 * torch.randn(shape)))
        return self.graph.call_function(function, (operands[0], self.graph.get_attr(operation)), options)


def graph_modules(max_nodes: int = 6, inputs: int = 2) -> st.SearchStrategy[GraphCase]:
    """A random fx graph, not traced from any module, and inputs for it.

    Modules and parameters with one or several users, functions, methods, numbers as arguments, keyword arguments, results
    that nobody uses, inputs returned as they are, one or two outputs. They shrink to one convolution.

    Args:
        max_nodes: at most so many statements.
        inputs: at most so many inputs, one to three.

    Raises:
        InputError: for anything else, at once.

    >>> from hypothesis import find
    >>> print(find(graph_modules(), lambda case: "add" in case.code).code)
    def forward(x):
        a = add(x, x)
        return a
    """
    if not 1 <= max_nodes <= len(_NAMES) or not 1 <= inputs <= len(INPUTS):
        raise InputError(
            f"max_nodes={max_nodes!r}, inputs={inputs!r}: give 1 to {len(_NAMES)} nodes and 1 to {len(INPUTS)} inputs."
        )
    return _graph_cases(max_nodes, inputs)


# What is called again is a shared module. Else a convolution, a linear layer, a norm and a ReLU come most often, which are what
# rewrites look for; a third of the modules and parameters are the second of their kind.
_AGAIN = "again"
_CALLS = [
    f"{name}_{number}" if name in _STATEFUL else name for number in (1, 1, 2) for name in [*OPERATIONS, *[*MODULES][:4] * 4]
]
_CHOICES = _CALLS + [_AGAIN] * (len(_CALLS) // 5)


@st.composite
def _steps(draw: st.DrawFn, back_to: st.SearchStrategy[int]) -> tuple[str, list[int]]:
    operation = draw(st.sampled_from(_CHOICES))
    return operation, [draw(back_to) for _ in range(2 if operation in (*BINARY, _AGAIN) else 1)]


@st.composite
def _graph_cases(draw: st.DrawFn, max_nodes: int, inputs: int) -> GraphCase:
    # More often the last value than those before it: a rewrite looks for one thing behind another. A statement is at most four
    # choices: of longer ones Hypothesis leaves some in, when it shrinks.
    back_to = st.sampled_from([0] * 2 * (max_nodes + 3) + [*range(1, max_nodes + 3)])
    first = None
    values = list(INPUTS[: draw(st.integers(1, inputs))])
    lines = [f"def forward({', '.join(values)}):"]
    for name, (operation, back) in zip(_NAMES, draw(st.lists(_steps(back_to), min_size=1, max_size=max_nodes)), strict=False):
        operation = (first or _CALLS[0]) if operation == _AGAIN else operation
        first = first or operation
        operands = [values[-1 - steps % len(values)] for steps in back[: 2 if operation in BINARY else 1]]
        lines.append(f"    {name} = {operation}({', '.join(operands)})")
        values.append(name)
    results = draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=2, unique=True))
    lines.append(f"    return {', '.join(values[-1 - back] for back in results)}")
    return GraphCase.of("\n".join(lines), draw(st.integers(0, 2**16)))
