"""Tensors that code makes or writes beside the graph, which would be constants of it: no call may change those for the next.

A tensor made in ``forward`` of constants alone is computed once, while tracing. Where a call writes to it, each call needs its
own; then ``forward`` is traced again with all of them as values of the graph.
"""

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from pege_fx.modules.mode import TRAINING_MODE
from pege_fx.modules.write_watch import may_write, memory_of
from pege_fx.passes.capture.source_location import place_of_line
from pege_fx.passes.graph import (
    after,
    arguments,
    call_method,
    changes_its_input,
    copy_origin,
    first_argument,
    owner,
    reads_size,
    traits_of,
)
from pege_fx.passes.op_traits import TRAITS

CONSTANT = "_tensor_constant"  # how fx names a tensor that is no attribute of the model
_CALLS = ("call_function", "call_method", "call_module")
_TO_PYTHON = {"item", "tolist", "equal", "allclose", "is_tensor", "data_ptr"}


class WrittenConstantError(Exception):
    """A call writes to what would be a constant of the graph: to be traced again with values of the graph instead."""

    def __init__(self, path: str = "", place: str = "") -> None:
        super().__init__("it writes to a tensor that it does not make, which a graph does not hold")
        self.path, self.place = path, place


class BesideGraph(TorchFunctionMode):
    """Follows what functions of torch do to tensors of which the graph knows nothing.

    Args:
        is_following: tells whether the code of the model is what runs.
        proxy_of: where every such tensor is to be a value of the graph: makes it one.
    """

    def __init__(self, is_following: Callable[[], bool], proxy_of: Callable[[Tensor], Proxy] | None = None) -> None:
        super().__init__()
        self._is_following, self._proxy_of = is_following, proxy_of
        self._made: dict[int, Tensor] = {}  # by the address of its memory, which it keeps from being used again

    def is_made(self, tensor: Tensor) -> bool:
        """Tell whether a tensor lies in memory that was made while tracing."""
        address = memory_of(tensor)
        return address is None or address in self._made

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._is_following():
            return func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(leaf, Proxy) for leaf in leaves):
            return func(*args, **kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if tensors and (proxy_of := self._proxy_of) is not None and _is_computed(func):
            args, kwargs = tree_map(lambda part: proxy_of(part) if isinstance(part, Tensor) else part, (args, kwargs))
            return _called(func, types, args, kwargs)
        if _is_written(func, args, kwargs) and not all(map(self.is_made, tensors)):
            raise WrittenConstantError
        result = func(*args, **kwargs)
        self._note(tensors, result)
        return result

    def _note(self, given: Iterable[Tensor], result: Any) -> None:
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if made:
            known = {memory_of(tensor) for tensor in given}
            new = ((memory_of(tensor), tensor) for tensor in made)
            self._made.update((address, tensor) for address, tensor in new if address is not None and address not in known)


def _is_computed(func: Any) -> bool:
    """Tell whether a function computes tensors: what answers in numbers answers for a constant at once."""
    name = getattr(func, "__name__", "")
    if name in _TO_PYTHON or name == "__get__":
        return False
    base = name.removesuffix("_") if name.endswith("_") and not name.endswith("__") else name
    return name in _OPERATORS or (base in TRAITS and TRAITS[base].reads_data)


def _is_written(func: Any, args: Any, kwargs: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name not in _HANDING_OUT and may_write(func, args, kwargs)


def _called(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Call a function or a method of tensors, or an operator, on values of the graph."""
    by_operator = _OPERATORS.get(getattr(func, "__name__", ""))
    return Proxy.__torch_function__(func, types, args, kwargs) if by_operator is None else by_operator(*args)


_NAMES = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor", "matmul")
_OPERATORS: dict[str, Callable[..., Any]] = {
    f"__{name}__": getattr(operator, name) for name in ("getitem", "setitem", "neg", "invert", "pos", "abs")
}
for _name in _NAMES:
    _short, _binary = _name.rstrip("_"), getattr(operator, _name)
    _OPERATORS |= {f"__{_short}__": _binary, f"__i{_short}__": getattr(operator, f"i{_short}")}
    _OPERATORS[f"__r{_short}__"] = lambda x, y, binary=_binary: binary(y, x)
_HANDING_OUT = {"__set__", "__array__", "__dlpack__", "numpy", "data_ptr", "untyped_storage", "storage"}


def settle_constants(root: nn.Module, graph: Graph, *, may_retry: bool) -> None:
    """Let no call find what another one wrote to a constant of a graph.

    Raises:
        WrittenConstantError: if a node is known to write to one; with ``may_retry`` also if it may.
    """
    for node, constant, is_known in list(_written_constants(root, graph)):
        if is_known or may_retry:
            raise WrittenConstantError(owner(node), place_of_line(node.meta.get("stack_trace", "")))
        _clone_at_each_call(graph, constant)


def _written_constants(root: nn.Module, graph: Graph) -> Iterator[tuple[Node, Node, bool]]:
    """Yield the constants of a graph to which its nodes write: the node, the constant, and whether it is known that it does.

    Views of constants are constants too, and what may be a view is taken for one.
    """
    for node in graph.nodes:
        if node.op not in _CALLS or node.target == TRAINING_MODE:
            continue
        is_known = changes_its_input(root, node)
        if is_known:
            _, named = arguments(node)
            written = [first_argument(node), named.get("out")]
        elif traits_of(root, node).writes:
            written = node.all_input_nodes
        else:
            continue
        for source in _memory_behind(root, tree_leaves(written)):
            if source.op == "get_attr" and str(source.target).startswith(CONSTANT):
                yield node, source, is_known


def _memory_behind(root: nn.Module, values: Iterable[Any]) -> Iterator[Node]:
    """Yield the nodes in whose memory the values may lie."""
    waiting, seen = [value for value in values if isinstance(value, Node)], set[Node]()
    while waiting:
        if (node := waiting.pop()) in seen:
            continue
        seen.add(node)
        yield node
        if node.op in _CALLS and node.target != TRAINING_MODE and not reads_size(node):
            view = traits_of(root, node).view
            if view is not False:
                waiting += node.all_input_nodes[:1] if view else node.all_input_nodes


def _clone_at_each_call(graph: Graph, constant: Node) -> None:
    """Let all that reads a constant read a copy of it, which each call makes."""
    readers = list(constant.users)
    held = call_method(graph, "clone", (constant,), after(constant))
    copy_origin(constant, held)
    for reader in readers:
        reader.replace_input_with(constant, held)
