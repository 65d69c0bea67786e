"""Questions that Python answers without asking a proxy: ``isinstance``, ``type``, ``hasattr``, ``torch.is_tensor``.

While a module is traced, the code that may run has functions in their place, which answer for what a proxy stands for.
"""

import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from pege_fx.passes.capture.dictionaries import GuardedDict
from pege_fx.passes.capture.guards import UNKNOWN, GuardingTracer, said
from pege_fx.passes.capture.proxies import DataDependenceError
from pege_fx.passes.graph import size_class

_SOME_TENSOR = torch.empty(0)
_LIBRARY = ("torch", "pege_fx", "numpy", "builtins")
_MISSING = object()


def questions(tracer: GuardingTracer) -> dict[str, Any]:
    """Return what stands in for builtin functions while a module is traced, by name."""
    stand_in = functools.partial(_answer, tracer)
    return {
        "isinstance": stand_in(_is_instance),
        "hasattr": stand_in(hasattr),
        "getattr": _getattr(tracer),
        "type": _Type(tracer),
    }


def class_of(tracer: GuardingTracer, proxy: Proxy) -> type:
    """Return the class of what a proxy stands for."""
    return type(_value(tracer, proxy, "__class__"))


def is_tensor(tracer: GuardingTracer) -> Callable[[Any], bool]:
    """Return what stands in for ``torch.is_tensor``."""
    return lambda obj: bool(isinstance(_value(tracer, obj, "torch.is_tensor"), Tensor))


def _value(tracer: GuardingTracer, obj: Any, use: str) -> Any:
    """What an object stands for: itself, a value of the example call, or some tensor, which is what an operation returns."""
    if isinstance(obj, GuardedDict) or not isinstance(obj, Proxy):
        return obj
    value = tracer.answered(obj)
    if value is not UNKNOWN:
        return value
    if (cls := size_class(obj.node)) is not None:
        return cls()
    if tracer.is_size(obj.node) or obj.node.target is getattr:
        raise DataDependenceError(f"{use} asks for the class of {said(obj.node)}, which only an example tells")
    return _SOME_TENSOR


def _is_instance(value: Any, cls: Any) -> bool:
    return isinstance(value, cls)


def _answer(tracer: GuardingTracer, question: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    name = question.__name__.replace("_is_instance", "isinstance")

    def ask(obj: Any, what: Any) -> bool:
        if not isinstance(obj, Proxy) or (question is _is_instance and isinstance(obj, what)):
            return question(obj, what)
        return question(_value(tracer, obj, name), what)

    return ask


def _getattr(tracer: GuardingTracer) -> Callable[..., Any]:
    def ask(obj: Any, name: str, default: Any = _MISSING) -> Any:
        if default is not _MISSING and isinstance(obj, Proxy) and not hasattr(_value(tracer, obj, "getattr"), name):
            return default
        return getattr(obj, name) if default is _MISSING else getattr(obj, name, default)

    return ask


class _Type:
    """``type`` for the code of a model: what a proxy stands for, else as ever; it goes on being a class to ``isinstance``."""

    def __init__(self, tracer: GuardingTracer) -> None:
        self._tracer = tracer

    def __call__(self, obj: Any, *more: Any, **named: Any) -> Any:
        if more or named:
            return type(obj, *more, **named)
        if isinstance(obj, GuardedDict):
            return dict
        return type(_value(self._tracer, obj, "type()"))

    def __getattr__(self, name: str) -> Any:
        return getattr(type, name)

    def __instancecheck__(self, obj: Any) -> bool:
        return isinstance(obj, type)

    def __subclasscheck__(self, cls: Any) -> bool:
        return issubclass(cls, type)


def globals_of(root: Any) -> list[dict[str, Any]]:
    """Return the globals of the code that a call may run: those of every class, and of what they name, but no library's."""
    if not isinstance(root, nn.Module):
        return []
    return _reachable(frozenset(type(module) for module in root.modules()))


@functools.lru_cache(maxsize=64)
def _reachable(classes: frozenset[type]) -> list[dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    waiting = [names for cls in classes for names in _globals_of_class(cls)]
    packages = {str(names.get("__name__")).partition(".")[0] for names in waiting}
    while waiting:
        names = waiting.pop()
        if id(names) in found or _is_library(str(names.get("__name__"))):
            continue
        found[id(names)] = names
        modules = {_module_of(value) for value in list(names.values())} - {None}
        loaded = [vars(sys.modules[name]) for name in modules if name in sys.modules]
        waiting += [more for more in loaded if _is_own(more, packages)]
    return list(found.values())


def _is_own(names: dict[str, Any], packages: set[str]) -> bool:
    """Whether a module is of a package of the model, or nobody has installed it."""
    installed = "site-packages" in (file := str(names.get("__file__"))) or "dist-packages" in file
    return not installed or str(names.get("__name__")).partition(".")[0] in packages


def _globals_of_class(cls: type) -> Iterator[dict[str, Any]]:
    for base in cls.__mro__:
        forward = vars(base).get("forward")
        while forward is not None:  # decorated ones too
            if isinstance(names := getattr(forward, "__globals__", None), dict):
                yield names
            forward = getattr(forward, "__wrapped__", None)


def _module_of(value: Any) -> str | None:
    if isinstance(value, types.ModuleType):
        return value.__name__
    if isinstance(value, (types.FunctionType, type)):
        return value.__module__
    return None


@functools.cache
def _is_library(name: str) -> bool:
    top = name.partition(".")[0]
    return top in _LIBRARY or top in sys.stdlib_module_names
