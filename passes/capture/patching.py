"""Tracing that other threads do not notice."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import nn
from torch.fx import Graph, GraphModule, Tracer

from pege_fx.kernels.inductor import TRACING


class LocalTracer(Tracer):
    """fx's tracer, one at a time; the modules that other threads call meanwhile are none of its business."""

    _thread: int | None = None

    def trace(self, root: Any, concrete_args: Any = None) -> Graph:
        with TRACING:
            self._thread = threading.get_ident()
            return super().trace(root, concrete_args)

    @property
    def is_called(self) -> bool:
        """Whether the thread that traces is the one that runs."""
        return threading.get_ident() == self._thread

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_module(m, forward, args, kwargs) if self.is_called else forward(*args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return super().getattr(attr, attr_val, parameter_proxy_cache) if self.is_called else attr_val


def reserve_self(graph: Graph) -> None:
    """Let no node of a new graph be named ``self``, for a child of that name: in the graph's code that is the module."""
    graph.erase_node(graph.create_node("call_function", type, (), name="self"))


@contextmanager
def uncompiled() -> Iterator[None]:
    """Leave the GraphModules that this thread makes without code: whoever finishes the graph calls ``recompile``."""
    thread, compiled = threading.get_ident(), GraphModule.recompile

    def recompile(gm: GraphModule) -> Any:
        return None if threading.get_ident() == thread else compiled(gm)

    with TRACING, mock.patch.object(GraphModule, "recompile", recompile):
        yield


@contextmanager
def replaced(namespace: dict[str, Any], names: dict[str, Any]) -> Iterator[None]:
    """Let names of a module mean something else; other threads, which see them too, never find one missing."""
    before = {name: namespace[name] for name in names if name in namespace}
    namespace.update(names)
    try:
        yield
    finally:
        namespace.update(before)
        for name in names.keys() - before.keys():
            del namespace[name]
