"""What stands for a tensor while a module is traced: it keeps work in place, and tells Python what may be told."""

import dis
import operator
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy
from torch.fx import Node, Proxy
from torch.fx.proxy import Attribute

from pege_fx.passes.capture.patched import RAND
from pege_fx.passes.capture.patching import LocalTracer
from pege_fx.passes.capture.source_location import expression


class DataDependenceError(Exception):
    """Python asked for the value of a tensor: no example may decide that."""


class StateDependenceError(DataDependenceError):
    """Python asked an object for what a call changes: another call gets another answer. ``place`` is where, if it is past."""

    def __init__(self, what: str, place: str = "") -> None:
        super().__init__(what)
        self.place = place


class ContextError(Exception):
    """A ``with`` block or a call that means something to autograd and would be lost in a graph."""


class ForeignObjectError(Exception):
    """An object comes into the graph that is no tensor, number, text, or collection of those."""


def is_protocol(name: str) -> bool:
    """Tell whether Python or a library asks for a protocol by its name, as ``__array_struct__``."""
    return name.startswith("__") and name.endswith("__")


class ProxyTracer(LocalTracer):
    """A tracer that answers what Python asks of its proxies."""

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Proxy:
        """Make a node, or raise as a tensor does that is added to None or compared with it: code may catch that."""
        if isinstance(target, types.BuiltinFunctionType) and target in _COMPUTING and any(arg is None for arg in args):
            raise TypeError(f"unsupported operand type(s) for {target.__name__}: 'Tensor' and 'NoneType'")
        return super().create_proxy(kind, target, args, kwargs, *rest, **more)

    def is_size(self, node: Node) -> bool:
        """Whether a node is a shape, or a number."""
        raise NotImplementedError

    def fixed(self, proxy: Proxy, use: str, *, sized: bool = False, place: str = "") -> Any:
        """Return what Python asks for, or raise ``DataDependenceError``."""
        raise NotImplementedError

    def attribute(self, proxy: "InPlaceProxy", name: str) -> Any:
        """Return an attribute of what a proxy stands for."""
        return proxy.attribute(name)

    def part(self, whole: Proxy, name: str, key: Any, value: Any) -> Any:
        """Return an entry of a collection."""
        raise NotImplementedError

    def class_of(self, proxy: Proxy) -> type:
        """Return the class of what a proxy stands for."""
        return type(proxy)

    def hashed(self, proxy: Proxy) -> int:
        """Return the hash of what a proxy stands for."""
        raise NotImplementedError

    def text(self, proxy: Proxy, write: Callable[[Any], str]) -> str:
        """Return what a proxy stands for as a text."""
        raise NotImplementedError

    evaluate = False

    def watch(self, name: str, value: Any) -> None:
        """Take note of what becomes a part of a collection: what is done to it afterwards, the graph does not see."""
        raise NotImplementedError

    def has(self, proxy: Proxy, item: Any) -> bool:
        """Return whether a collection has an item, or raise ``DataDependenceError``."""
        raise NotImplementedError


_COMPUTING = {
    getattr(operator, f"{in_place}{name}")
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor")
    for in_place in ("", "i")
    if hasattr(operator, f"{in_place}{name}")
} | {operator.lt, operator.le, operator.gt, operator.ge}
_READS = dis.opmap["LOAD_ATTR"]
_OWN = {"tracer", "node", "root", "attr", "_node"}  # what fx sets on a proxy


class InPlaceProxy(Proxy):
    """A proxy that keeps ``x += y`` and ``x[i] = y`` in place: under another name of x they are seen too."""

    tracer: ProxyTracer
    __array_priority__ = 1000  # as a tensor's: a number of NumPy leaves the operation to the proxy

    def __getattr__(self, name: str) -> Any:
        return self.tracer.attribute(self, name)

    def attribute(self, name: str) -> Attribute:
        """The attribute as a value of the graph, or a method about to be called."""
        return InPlaceAttribute(self, name)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        raise DataDependenceError(f"NumPy asks for the value of {expression() or self.node}, which is not known while tracing")

    def __round__(self, digits: int | None = None) -> Any:
        return self.tracer.create_proxy("call_function", round, (self,) if digits is None else (self, digits), {})

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> tuple[Any, Any]:
        return other // self, other % self

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class of what it stands for, if Python code reads the attribute, as ``functools.singledispatch`` does.

        It is not for ``isinstance``, by which torch's own code in C would take a proxy for the memory of a tensor.
        """
        asking = sys._getframe(1)
        is_read = asking.f_code.co_code[asking.f_lasti] == _READS
        return self.tracer.class_of(self) if is_read else type(self)

    def __hash__(self) -> int:
        return self.tracer.hashed(self)

    def __str__(self) -> str:
        return self.tracer.text(self, str)

    def __repr__(self) -> str:
        return self.tracer.text(self, repr)

    def __format__(self, spec: str) -> str:
        return self.tracer.text(self, lambda value: format(value, spec))

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __lt__(self, other: Any) -> Any:
        if self.node.target is RAND and isinstance(other, (int, float)) and other <= 0:
            return False  # layers dropped with probability 0
        return self.tracer.create_proxy("call_function", operator.lt, (self, other), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OWN:
            raise ContextError(f"it sets .{name} of a tensor or an object, which a graph does not hold")
        super().__setattr__(name, value)


class InPlaceAttribute(Attribute, InPlaceProxy):
    """An attribute of such a proxy."""


def _augmented(in_place: Callable[..., Any], anew: Callable[..., Any]) -> Callable[["InPlaceProxy", Any], Proxy]:
    def assign(self: InPlaceProxy, other: Any) -> Proxy:
        # Sizes can not change: under another name the old one stays.
        function = anew if self.tracer.is_size(self.node) else in_place
        result: Proxy = self.tracer.create_proxy("call_function", function, (self, other), {})
        return result

    return assign


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul"):
    _anew = getattr(operator, f"{_name}_" if _name in ("and", "or") else _name)
    setattr(InPlaceProxy, f"__i{_name}__", _augmented(getattr(operator, f"i{_name}"), _anew))


class ExampleProxy(InPlaceProxy):
    """A proxy whose value on the example inputs is known, for sizes and what is computed from them."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return numpy.asarray(self.tracer.fixed(self, "NumPy"), dtype)

    def attribute(self, name: str) -> Attribute:
        return ExampleAttribute(self, name)

    def __len__(self) -> int:
        return len(self.tracer.fixed(self, "len()", sized=True))

    def __contains__(self, item: Any) -> bool:
        return self.tracer.has(self, item)

    def __index__(self) -> int:
        return int(self.tracer.fixed(self, "a whole number"))

    def __int__(self) -> int:
        return int(self.tracer.fixed(self, "int()"))

    def __float__(self) -> float:
        return float(self.tracer.fixed(self, "float()"))


class ExampleAttribute(Attribute, ExampleProxy):
    """An attribute of such a proxy: ``x.shape``, or a method about to be called."""
