"""Tracing with the patches of ``patched``: what stands in for each name, and what happens where the model's code uses it."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Proxy
from torch.utils._pytree import tree_leaves

from pege_fx.kernels.inductor import TRACING
from pege_fx.modules.autocast import guard_regions, switch_autocast_back, switch_autocast_off
from pege_fx.passes.capture.constants import BesideGraph
from pege_fx.passes.capture.contexts import no_contexts, other_answer, replacements
from pege_fx.passes.capture.guards import GuardingTracer
from pege_fx.passes.capture.patched import DRAWING, FACTORIES, IS_TENSOR, functions_of, patched
from pege_fx.passes.capture.patching import replaced
from pege_fx.passes.capture.proxies import ContextError
from pege_fx.passes.capture.questions import class_of, globals_of, is_tensor, questions
from pege_fx.passes.capture.rng_guard import ConstantDrawGuard, guards
from pege_fx.passes.operators import operators


class PatchingTracer(GuardingTracer):
    """A tracer that patches the names of the table for as long as it traces.

    Attributes:
        live_training: whether the code of a model is traced, and not the generated code of a graph.
        mode: what ``if self.training`` takes; None: to ask is an error.
        opaque: paths of modules that are not looked into.
        asked: for which modes the code asked, and which module did first.
        constants: whether tensors that are made of constants alone are constants of the graph.
        contradicts: it is told another answer than the one that holds.
    """

    live_training: bool
    mode: bool | None
    opaque: Mapping[str, Any]
    asked: dict[str, str]
    contradicts: bool
    constants: bool
    _beside: BesideGraph
    _evaluating: bool
    _installed: set[nn.Module]

    def trace(self, root: Any, concrete_args: Any = None) -> Graph:
        """Trace, with the functions that make tensors of a size taking sizes of the graph."""
        with TRACING, ExitStack() as stack:
            of_contexts = replacements(self.refuse_context, self.answer)
            for namespace, names in self._replacements(root, of_contexts):
                stack.enter_context(replaced(namespace, names))
            stack.enter_context(no_contexts(of_contexts, self.refuse_context, self._region))
            stack.enter_context(self._kept_calls(root))
            stack.enter_context(ConstantDrawGuard(self.refuse_to_draw))
            stack.enter_context(self._beside)
            graph = super().trace(root, concrete_args)
        guard_regions(graph)
        for node in graph.nodes:
            if (getattr(node.target, "__module__", None) or "torch").partition(".")[0] in ("torch", "_operator"):
                node.meta.pop("is_wrapped", None)  # fx says so of the last node of a wrapped function that was followed
        return graph

    def _replacements(self, root: Any, more: dict[Any, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """What stands in for functions while tracing: (namespace, by name)."""
        factories = {make: self._factory(make) for make in FACTORIES}
        yield vars(torch), {FACTORIES[make]: stands for make, stands in factories.items()} | {"is_tensor": is_tensor(self)}
        silent = (function for entry in operators() if not entry.takes_proxies for function in entry.functions)
        yield vars(F), {function.__name__: self._factory(function) for function in silent}
        others = more | guards(self.refuse_to_draw) | {check: _assume(check) for check in functions_of("assume")}
        others[IS_TENSOR] = is_tensor(self)
        others |= {} if self.constants else factories
        own = questions(self)
        kinds = set(map(type, others))
        generators = [entry.namespace for entry in patched("draw")]
        for namespace, answers in (*((names, {}) for names in generators), *((names, own) for names in globals_of(root))):
            yield namespace, {n: others[v] for n, v in namespace.items() if type(v) in kinds and v in others} | answers

    def class_of(self, proxy: Proxy) -> type:
        return class_of(self, proxy)

    @property
    def is_following(self) -> bool:
        """Whether what runs is the code of the model: not another thread's, and no example value beside the graph."""
        return self.is_called and not self._evaluating

    def refuse_to_draw(self) -> None:
        if self.live_training and self.is_following:
            raise ContextError("it draws random numbers, which a graph would hold as constants")

    @contextmanager
    def _kept_calls(self, root: Any) -> Iterator[None]:
        """Let a module that is not looked into be one node, also where its class has a ``__call__`` of its own."""

        def kept(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                if self.is_following and module in self._installed and (path := self.path_of_module(module)) in self.opaque:
                    return self.create_proxy("call_module", path, args, kwargs)
                return original(module, *args, **kwargs)

            return call

        paths = [path for path in self.opaque if isinstance(root, nn.Module)]
        classes = {type(root.get_submodule(path)) for path in paths}
        with ExitStack() as stack:
            for cls in classes:
                if cls.__call__ is not nn.Module.__call__:
                    stack.enter_context(mock.patch.object(cls, "__call__", kept(cls.__call__)))
            yield

    def refuse_context(self, what: str) -> None:
        """Raise where the code of the model enters a context or sets a mode: another call may be within another."""
        if self.live_training and self.is_following:
            raise ContextError(f"it uses {what} inside forward, which a graph does not hold")

    def _region(self, device: str) -> Callable[[], Any]:
        """Write down that autocast is switched off from here on, and return what writes down that it is back."""
        if not (self.live_training and self.is_following):
            return lambda: None
        first = next(iter(self.graph.nodes), None)
        if self.mode is not None or first is None or first.op != "placeholder":
            raise ContextError("it uses torch.autocast inside forward, which a graph of both modes does not hold")
        before = self._switch(switch_autocast_off, (first, device))
        return functools.partial(self._switch, switch_autocast_back, (before, device))

    def _switch(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        node = self.create_node("call_function", function, args, {})
        node.meta["is_wrapped"] = True  # one node for a tracer of the generated code as well
        return node

    def answer(self, question: str, value: Any) -> Any:
        """Answer the code of the model when it asks for a mode, and note where it did."""
        if not (self.live_training and self.is_following):
            return value
        self.asked.setdefault(question, self.scope.module_path)
        if not self.contradicts:
            return value
        if (other := other_answer(value)) is None:
            raise ContextError(f"it asks {question}() inside forward, and another call may find another answer")
        return other

    def _factory(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original, updated=())
        def make(*args: Any, **kwargs: Any) -> Any:
            draws = original in DRAWING and self.live_training and self.is_following
            is_made = not self.constants and self.is_following and original.__name__ not in ("finfo", "iinfo")
            symbolic = draws or is_made or any(isinstance(leaf, Proxy) for leaf in tree_leaves((args, kwargs)))
            return self.create_proxy("call_function", original, args, kwargs) if symbolic else original(*args, **kwargs)

        return make


def _assume(check: Callable[..., Any]) -> Callable[..., Any]:
    """A check that holds for what a graph computes, as it would be for a compiler."""

    def assume(cond: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(cond, Proxy):
            check(cond, *args, **kwargs)

    return assume
