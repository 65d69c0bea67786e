"""What stands for a tensor while a module is traced: it keeps work in place, and tells Python what may be told."""

import operator
from collections.abc import Callable
from typing import Any

import numpy
from torch import Tensor
from torch.fx import Node, Proxy
from torch.fx.proxy import Attribute

from pege_fx.passes.capture.patching import LocalTracer
from pege_fx.passes.capture.rng_guard import RAND
from pege_fx.passes.graph import size_class


class DataDependenceError(Exception):
    """Python asked for the value of a tensor: no example may decide that."""


class ContextError(Exception):
    """A ``with`` block or a call that means something to autograd and would be lost in a graph."""


class Missing:
    """What ``ProxyTracer.example_of`` returns if an example value is known and lacks the attribute."""


def is_protocol(name: str) -> bool:
    """Tell whether Python or a library asks for a protocol by its name, as ``__array_struct__``."""
    return name.startswith("__") and name.endswith("__")


class ProxyTracer(LocalTracer):
    """A tracer that answers what Python asks of its proxies."""

    def is_size(self, node: Node) -> bool:
        """Whether a node is a shape, or a number."""
        raise NotImplementedError

    def fixed(self, proxy: Proxy, use: str, *, sized: bool = False) -> Any:
        """Return what Python asks for, or raise ``DataDependenceError``."""
        raise NotImplementedError

    def example_of(self, proxy: Proxy, name: str) -> Any:
        """Return an attribute of the example value; ``Missing()`` if the value lacks it, None if no value is known."""
        raise NotImplementedError


class InPlaceProxy(Proxy):
    """A proxy that keeps ``x += y`` and ``x[i] = y`` in place: under another name of x they are seen too."""

    tracer: ProxyTracer
    __array_priority__ = 1000  # as a tensor's: a number of NumPy leaves the operation to the proxy

    def __getattr__(self, name: str) -> Attribute:
        if is_protocol(name) or name == "node" or ((cls := size_class(self.node)) and not hasattr(cls, name)):
            raise AttributeError(f"what is traced has no attribute {name}")
        return InPlaceAttribute(self, name)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        raise DataDependenceError(f"NumPy asks for the value of {self.node}, which is not known while tracing")

    def __round__(self, digits: int | None = None) -> Any:
        return self.tracer.create_proxy("call_function", round, (self,) if digits is None else (self, digits), {})

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> tuple[Any, Any]:
        return other // self, other % self

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __lt__(self, other: Any) -> Any:
        if self.node.target is RAND and isinstance(other, (int, float)) and other <= 0:
            return False  # layers dropped with probability 0
        return self.tracer.create_proxy("call_function", operator.lt, (self, other), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("data", "grad"):
            raise ContextError(f"it sets .{name} of a tensor, which a graph does not hold")
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

    def __getattr__(self, name: str) -> Any:
        if is_protocol(name) or name == "node" or isinstance(value := self.tracer.example_of(self, name), Missing):
            raise AttributeError(f"what is traced has no attribute {name}")
        attribute = ExampleAttribute(self, name)
        # Python may ask what no proxy hears of (isinstance, a key of a dictionary), and text has no other use.
        return self.tracer.fixed(attribute, f".{name}") if isinstance(value, str) else attribute

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return numpy.asarray(self.tracer.fixed(self, "NumPy"), dtype)

    def __len__(self) -> int:
        return len(self.tracer.fixed(self, "len()", sized=True))

    def __contains__(self, item: Any) -> bool:
        value = self.tracer.fixed(self, "in", sized=True)
        if isinstance(value, Tensor) or isinstance(item, Proxy):
            raise DataDependenceError(f"in asks for the value of {self.node}, which depends on data")
        return item in value

    def __index__(self) -> int:
        return int(self.tracer.fixed(self, "a whole number"))

    def __int__(self) -> int:
        return int(self.tracer.fixed(self, "int()"))

    def __float__(self) -> float:
        return float(self.tracer.fixed(self, "float()"))


class ExampleAttribute(Attribute, ExampleProxy):
    """An attribute of such a proxy: ``x.shape``, or a method about to be called."""
