"""Capture in tiers: (1) symbolic; (2) specialised on example inputs; (3) what can not be traced stays Python.

Tier 3 leaves the smallest such module as it is and captures its children on their own, so that their convolutions are
quantized all the same. The result is a GraphModule in every case, and every parameter keeps its name.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.utils._pytree import tree_leaves

from pege_fx.decompositions.decompose import decompose_modules
from pege_fx.decompositions.recurrent import CELLS, LAYERS
from pege_fx.errors import InputError, PolicyError, closest
from pege_fx.modules.calls import beside_forward, has_hooks, takes_other_arguments
from pege_fx.modules.mode import evaluating, preserve_state
from pege_fx.passes.capture.attempts import ignores_modes, is_steady
from pege_fx.passes.capture.branches import MergeError, merge_branches
from pege_fx.passes.capture.bytecode import NO_NAMES, Names, names_in_forward
from pege_fx.passes.capture.examples import fresh
from pege_fx.passes.capture.grafts import may_be_opened, stand_for
from pege_fx.passes.capture.graph_modules import graph_module, python_root
from pege_fx.passes.capture.known import Known
from pege_fx.passes.capture.model_copy import copied
from pege_fx.passes.capture.not_traceable import NotTraceableError
from pege_fx.passes.capture.observation import NOTHING, Call, Observation, observe
from pege_fx.passes.capture.proxies import ContextError
from pege_fx.passes.capture.source_location import place_of
from pege_fx.passes.capture.tracer import PegeTracer
from pege_fx.passes.graph import (
    has_parameters,
    hides_weights,
    join,
)
from pege_fx.policy.patterns import PathPattern
from pege_fx.policy.plan import Capture


@dataclass
class Captured:
    """A model as GraphModules: the root, those grafted into modules that stay Python, and how each was made."""

    root: GraphModule
    graphs: list[GraphModule] = field(default_factory=list)
    notes: list[Capture] = field(default_factory=list)


def bind(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Known:
    """Return ``forward``'s arguments by name; raise ``InputError`` if the example inputs do not fit its signature."""
    try:
        return Known.of_call(model.forward, args, kwargs)
    except TypeError as error:
        raise InputError(
            f"the example inputs do not fit {type(model).__name__}.forward{inspect.signature(model.forward)}: {error}.\n"
            f"  given: {len(args)} positional, keywords {sorted(kwargs) or 'none'}; "
            "example_inputs is a tuple of positional arguments, example_kwargs a dict."
        ) from error


def capture(
    model: nn.Module,
    example: Call | None = None,
    blocks: Iterable[str] = (),
    refused: Iterable[str] = (),
    share_parameters: bool = False,
) -> Captured:
    """Capture a copy of the model.

    Args:
        model: left alone.
        example: positional and keyword arguments of a call.
        blocks: patterns of module paths; the outermost modules that they name become GraphModules of their own.
        refused: paths of modules that stay Python, because they are called in more ways than one graph holds.
        share_parameters: the copy's parameters and buffers are the model's own.

    Raises:
        ModelError, InputError: if the model can not be copied, or the example does not fit.
        PolicyError: if a pattern names no module.
    """
    if example is not None and not takes_other_arguments(model):
        bind(model, *example)
    chosen: set[str] = set()
    for block in [blocks] if isinstance(blocks, str) else blocks:
        names = [name for name, _ in model.named_modules() if name]
        found = {name for name in names if PathPattern(block).fullmatch(name)}
        if not found:
            raise PolicyError(f"blocks={block!r} names no module.\n  closest paths: {closest(block, names)}")
        chosen |= found
    outermost = {name for name in chosen if not any(name.startswith(f"{other}.") for other in chosen)}
    root = copied(model, share_parameters)
    decompose_modules(root)
    return _TieredCapture(root, example, outermost, set(refused)).capture(root, "")


class _TieredCapture:
    """One capture of a model: tries the tiers on each module from the outside in.

    From the outside in, because a larger graph gives passes more to prove; a module is tried alone only where the one around it
    can not be followed.
    """

    def __init__(self, root: nn.Module, example: Call | None, blocks: set[str], refused: set[str]) -> None:
        self.root, self.example, self.blocks, self.refused = root, example, blocks, refused
        self._led_by_data: list[str] = []  # modules that stay Python because what tensors hold decides what they do

    @functools.cached_property
    def _observed(self) -> Observation:
        """What a run on the example showed, if there is one; the first module that stays Python asks for it."""
        return NOTHING if self.example is None else observe(self.root, self.example, bind)

    def _known(self, module: nn.Module, prefix: str) -> Known:
        """What is known of a module's arguments: those of its call in the example, or its defaults."""
        if self.example is None:
            return Known.defaults(module.forward)
        if prefix in self.refused:
            raise NotTraceableError("", place_of(self.root, prefix), "it is called in more ways than one graph holds")
        if not prefix:
            return bind(module, *self.example)
        calls = self._observed.calls.get(module)
        if not calls:
            return Known.defaults(module.forward)
        for name in () if isinstance(module, (*LAYERS, *CELLS)) else calls[0].values:
            if len({call.values[name] is None for call in calls}) > 1:
                raise NotTraceableError("", place_of(self.root, prefix), f"it is called with {name} and without")
            if self._may_be_given(calls[0], name, prefix):
                reason = f"{name} is None in the example, and data decide whether it is"
                raise NotTraceableError("", place_of(self.root, prefix), reason)
        return calls[0]

    def _may_be_given(self, call: Known, name: str, prefix: str) -> bool:
        """Whether the code around a module gives None for an argument, and another batch may give a tensor (a mask)."""
        led_by_data = any(prefix.startswith(f"{path}.") or not path for path in self._led_by_data)
        return led_by_data and name in call.given and any(leaf is None for leaf in _leaves(call.values[name]))

    def capture(self, root: nn.Module, prefix: str) -> Captured:
        if what := beside_forward(root):
            return self._keep_root(root, prefix, _beside("", place_of(self.root, prefix), what))
        opaque = self._kept_whole(root) | self._blocks_in(root, prefix)
        try:
            tracer, graph, branches = self._trace_around(root, prefix, opaque)
        except NotTraceableError as error:
            return self._keep_root(root, prefix, error)
        captured = Captured(graph_module(root, graph, tracer, prefix))
        captured.graphs.append(captured.root)
        for guard in tracer.guards:
            captured.notes.append(Capture(prefix, "specialised", guard.place, str(guard)))
        if not tracer.guards:
            both = ("", "") if branches is None else (branches.place, "both branches, one for training, one for evaluation")
            captured.notes.append(Capture(prefix, "symbolic", *both))
        for path, failure in opaque.items():
            if failure.is_block:
                inner = self.capture(captured.root.get_submodule(path), join(prefix, path))
                captured.root.set_submodule(path, inner.root)
                captured.graphs += inner.graphs
                captured.notes += [Capture(join(prefix, path), "block"), *inner.notes]
                continue
            rung = "leaf" if failure.keeps_meaning and not has_parameters(root.get_submodule(path)) else "python"
            captured.notes.append(Capture(join(prefix, path), rung, failure.place, failure.reason))
            for node in captured.root.graph.find_nodes(op="call_module", target=path):
                node.meta["stays_python"] = f"stays Python: {failure.said}"
            self._led_by_data += [join(prefix, path)] if failure.asks_data else []
            self._capture_children(captured, captured.root.get_submodule(path), join(prefix, path))
        return captured

    def _trace_around(
        self, root: nn.Module, prefix: str, opaque: dict[str, NotTraceableError]
    ) -> tuple[PegeTracer, Graph, NotTraceableError | None]:
        """Trace around what can not be traced, which is put into ``opaque``; raise if that is the root itself.

        The last of the results is there if the graph has both branches on the mode: who asked for it.
        """
        branches: NotTraceableError | None = None
        constants = True
        while True:
            try:
                return *self._trace(root, opaque, self._known(root, prefix), branches, constants), branches
            except NotTraceableError as error:
                if error.writes_constant and constants:
                    constants = False
                    continue
                if error.keeps_meaning and error.path and not has_parameters(root.get_submodule(error.path)):
                    opaque[error.path] = error
                    continue
                if error.asks_mode:
                    branches = error
                    continue
                while error.path in opaque:  # it is not looked into any more: whoever calls it is to blame
                    error.path = error.path.rpartition(".")[0]
                if error.path == "":
                    raise
                for path in [path for path in opaque if path.startswith(f"{error.path}.")]:
                    del opaque[path]
                opaque[error.path] = error
                branches = None

    def _kept_whole(self, root: nn.Module) -> dict[str, NotTraceableError]:
        """The modules below a module with hooks or a call of their own, by path: nobody knows what those do. The outermost."""
        found: dict[str, NotTraceableError] = {}
        for path, module in root.named_modules():
            is_own = type(module).__call__ is not nn.Module.__call__
            if not path or not (is_own or has_hooks(module)) or PegeTracer().is_leaf_module(module, path):
                continue
            if not any(path.startswith(f"{other}.") for other in found):
                found[path] = _beside(path, place_of(root, path), beside_forward(module))
        return found

    def _blocks_in(self, root: nn.Module, prefix: str) -> dict[str, NotTraceableError]:
        """The blocks below a module, by path."""
        found: dict[str, NotTraceableError] = {}
        for path, _ in root.named_modules() if self.blocks else ():
            if path and join(prefix, path) in self.blocks:
                found[path] = NotTraceableError(path, "", "a graph of its own, as asked for", is_block=True)
        return found

    def _trace(
        self,
        root: nn.Module,
        opaque: Mapping[str, NotTraceableError],
        known: Known,
        branches: NotTraceableError | None,
        constants: bool,
    ) -> tuple[PegeTracer, Graph]:
        """Rung 1, then rung 2 if any argument is known; with ``branches`` in both modes, as one graph."""

        def trace(evaluate: bool) -> tuple[PegeTracer, Graph]:
            def new(mode: bool | None = None) -> PegeTracer:
                return PegeTracer(True, opaque, known, evaluate, mode, constants)

            if branches is None:
                return _follow(new, root, known)
            (tracer, training), (other, evaluation) = (_follow(new, root, known, mode) for mode in (True, False))
            tracer.guards += [guard for guard in other.guards if guard not in tracer.guards]
            try:
                return tracer, merge_branches(training, evaluation, root, (tracer.values, other.values))
            except MergeError as error:
                raise NotTraceableError(branches.path, branches.place, f"{branches.reason}: {error}") from error

        try:
            symbolic = trace(evaluate=False)
        except NotTraceableError as error:
            if error.asks_mode or error.writes_constant:
                raise
            return trace(evaluate=True)
        if known.is_call and any(hides_weights(root, node) for node in symbolic[1].nodes):
            with contextlib.suppress(NotTraceableError):  # or else it stays one node, and the plan says so
                return trace(evaluate=True)
        return symbolic

    def _keep_root(self, root: nn.Module, prefix: str, failure: NotTraceableError) -> Captured:
        captured = Captured(GraphModule(nn.Module(), Graph()))
        captured.notes.append(Capture(prefix, "python", failure.place, failure.reason))
        self._led_by_data += [prefix] if failure.asks_data else []
        self._capture_children(captured, root, prefix)
        captured.root = python_root(root, prefix)
        return captured

    def _capture_children(self, captured: Captured, module: nn.Module, prefix: str, around: Names = NO_NAMES) -> None:
        """Replace every child that has something to quantize by a GraphModule of its own.

        ``around``: names in the Python code around the module, which may reach through it.
        """
        names = around | names_in_forward(module)
        for name, child in list(module.named_children()):
            path = join(prefix, name)
            if isinstance(child, (GraphModule, torch.jit.ScriptModule)) or not any(p.ndim > 1 for p in child.parameters()):
                continue
            is_container = type(child).forward is nn.Module.forward
            if not is_container and PegeTracer().is_leaf_module(child, path) and any(True for _ in child.children()):
                continue  # torch's own composite module (attention, a transformer layer): its parts are not called
            if is_container or child in self._observed.opened or may_be_opened(names, name, child):
                self._capture_children(captured, child, path, names)
                continue
            inner = self.capture(child, path)
            stand_for(child, inner.root, self._observed.read.get(child, ()))
            for alias in [alias for alias, part in module._modules.items() if part is child]:
                setattr(module, alias, inner.root)
            captured.graphs += inner.graphs
            captured.notes += inner.notes


def _follow(
    new: Callable[[bool | None], PegeTracer], root: nn.Module, known: Known, mode: bool | None = None
) -> tuple[PegeTracer, Graph]:
    """Trace, in one mode if asked; say in which it can not be."""
    tracer = new(mode)
    try:
        graph = tracer.follow(root)
        if tracer.state.changed and not is_steady(tracer, graph, new(mode)):
            path, name = tracer.state.changed[0]
            raise _stateful(root, path, f"each call changes self.{name}")
        if tracer.state.kept and known.is_call and not _repeats(root, known):
            path, name = tracer.state.kept[0]
            raise _stateful(root, path, f"a call reads what the last one left in self.{name}")
        if tracer.asked and not ignores_modes(tracer, graph, new(mode)):
            question, path = next(iter(tracer.asked.items()))
            reason = f"ContextError: it does one thing or another by {question}(), which a graph does not hold"
            raise NotTraceableError(path, place_of(root, path), reason, ContextError())
        return tracer, graph
    except NotTraceableError as error:
        if mode is not None and not error.asks_mode:
            error.reason = f"traced for {'training' if mode else 'evaluation'}: {error.reason}"
        raise


def _leaves(value: Any) -> list[Any]:
    """The leaves of nested collections, None among them."""
    return tree_leaves(value, is_leaf=lambda part: part is None)


def _beside(path: str, place: str, what: str) -> NotTraceableError:
    return NotTraceableError(path, place, f"{what}, which a graph does not hold")


def _stateful(root: nn.Module, path: str, what: str) -> NotTraceableError:
    return NotTraceableError(path, place_of(root, path), f"{what}, which a graph does not hold")


def _repeats(root: nn.Module, known: Known) -> bool:
    """Tell whether a second call on the example gives what the first does: a cache changes nothing, a state does."""
    results = []
    with preserve_state(root.modules()), evaluating(root), torch.random.fork_rng(devices=()):
        for _ in range(2):
            args, kwargs = fresh(known.call(root.forward))
            torch.manual_seed(0)
            try:
                results.append([leaf for leaf in tree_leaves(root(*args, **kwargs)) if isinstance(leaf, Tensor)])
            except Exception:
                return True  # the shapes are recorded later, and that says where and why it fails
    return all(torch.equal(first.nan_to_num(), second.nan_to_num()) for first, second in zip(*results, strict=True))


# --- a root that stays Python --------------------------------------------------------------------------------
