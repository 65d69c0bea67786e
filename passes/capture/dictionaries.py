"""Dictionaries among the arguments of a call that is traced."""

import operator
from typing import Any

from torch.fx import Proxy

from pege_fx.passes.capture.proxies import DataDependenceError, ProxyTracer


class GuardedDict(dict[Any, Any]):
    """A dictionary among the arguments: what is read of it is guarded, what is written goes into the caller's own.

    Reading a key asks for that key alone; a loop or ``len`` asks for all of them.
    """

    def __init__(self, tracer: ProxyTracer, proxy: Proxy, name: str, values: dict[Any, Any]) -> None:
        super().__init__(values)
        self.proxy = proxy
        self._tracer, self._name = tracer, name
        self._read: set[Any] = set()
        self._is_written = False

    def __getitem__(self, key: Any) -> Any:
        if key not in self._read and dict.__contains__(self, key):
            self._read.add(key)
            dict.__setitem__(self, key, self._tracer.part(self.proxy, self._name, key, dict.__getitem__(self, key)))
        return dict.__getitem__(self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._is_written = True
        self._tracer.create_proxy("call_function", operator.setitem, (self.proxy, key, value), {})
        self._tracer.watch(f"{self._name}[{key!r}]", value)
        self._read.add(key)
        dict.__setitem__(self, key, value)

    def __contains__(self, key: Any) -> bool:
        return dict.__contains__(self, key) if key in self._read else self._tracer.has(self.proxy, key)

    def get(self, key: Any, default: Any = None) -> Any:
        found = key in self
        return self[key] if found else default

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def _whole(self, use: str) -> dict[Any, Any]:
        """All entries, in a dictionary that nothing more is asked of."""
        if self._is_written and not self._tracer.evaluate:  # only example values say what it holds by now
            raise DataDependenceError(f"it asks for all entries of {self._name}, to which it writes")
        self._tracer.fixed(self.proxy, use, sized=True)
        return {key: self[key] for key in list(dict.keys(self))}

    def __iter__(self) -> Any:
        return iter(self._whole("a loop"))

    def __len__(self) -> int:
        return len(self._whole("len()"))

    def __bool__(self) -> bool:
        return len(self) > 0

    def keys(self) -> Any:
        return self._whole("keys()").keys()

    def values(self) -> Any:
        return self._whole("values()").values()

    def items(self) -> Any:
        return self._whole("items()").items()

    def copy(self) -> dict[Any, Any]:
        return self._whole("copy()")

    def __or__(self, other: Any) -> Any:
        return self.copy() | dict(other)

    def __ror__(self, other: Any) -> Any:
        return dict(other) | self.copy()

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __ior__(self, other: Any) -> "GuardedDict":
        self.update(other)
        return self

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise DataDependenceError(f"it takes entries out of the dictionary {self._name}, or compares it, which no graph does")

    __delitem__ = pop = popitem = clear = __eq__ = __ne__ = __reversed__ = _refuse
    __hash__ = None
