"""Tracing one module: fx's tracer with ``.training`` live, and on request with example values beside the graph."""

import functools
import inspect
import math
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy
from torch.fx.node import map_arg
from torch.nn.utils.parametrize import is_parametrized

from pege_fx.decompositions.attention import multi_head_attention_forward
from pege_fx.modules.autocast import SWITCHES
from pege_fx.modules.batch_norm import BatchNorm
from pege_fx.modules.mode import CHECKS, TRAINING_MODE
from pege_fx.passes.capture.constants import BesideGraph, WrittenConstantError, settle_constants
from pege_fx.passes.capture.contexts import surroundings
from pege_fx.passes.capture.dictionaries import GuardedDict
from pege_fx.passes.capture.einops_calls import einops_modules, letters
from pege_fx.passes.capture.example_values import NORM_THEN_TYPES, depends_on_data, is_sized_anyway, run_node
from pege_fx.passes.capture.guards import UNKNOWN
from pege_fx.passes.capture.known import Known
from pege_fx.passes.capture.module_state import ModuleState, write_buffer
from pege_fx.passes.capture.not_traceable import ModeError, NotTraceableError
from pege_fx.passes.capture.patching import reserve_self
from pege_fx.passes.capture.patching_tracer import PatchingTracer
from pege_fx.passes.capture.proxies import ContextError, DataDependenceError, ExampleProxy, ForeignObjectError, InPlaceProxy
from pege_fx.passes.capture.signatures import STARS, keywords_behind_star
from pege_fx.passes.capture.source_location import called_by_checkpoint, line, place_of, where_raised
from pege_fx.passes.graph import (
    arguments,
    has_parameters,
    is_leaf_function,
    is_matrix,
    join,
    operator_of,
    plain,
    reads_size,
)


class PegeTracer(PatchingTracer):
    """fx's tracer; with ``live_training``, ``self.training`` is a value of the graph.

    Unpickling a GraphModule makes one without: it traces the generated code, where that value is a module's call.

    Args:
        live_training: see above.
        opaque: paths of modules that are not looked into.
        known: of the arguments of ``forward``. What is None stays None: ``is None`` is no question to a graph.
        evaluate: compute values beside the graph; then sizes may steer Python, and ``guards`` says where.
        mode: what ``if self.training`` takes; None: to ask is an error.
        constants: tensors that ``forward`` makes of constants alone are constants of the graph, too; if a call writes to one,
            that is a ``WrittenConstantError``. If not, they are made in each call.

    ``state`` says what ``forward`` left in the modules, once it was followed.
    """

    def __init__(
        self,
        live_training: bool = False,
        opaque: Mapping[str, Any] | None = None,
        known: Known | None = None,
        evaluate: bool = False,
        mode: bool | None = None,
        constants: bool = True,
    ) -> None:
        super().__init__(autowrap_modules=(math, *einops_modules()))
        self.proxy_buffer_attributes = True  # what is done to a buffer is done by the graph, not while tracing
        self.live_training = live_training
        self.mode = mode
        self.constants = constants
        self._beside = BesideGraph(lambda: self.live_training and self.is_following, None if constants else self._proxy_of)
        self._proxies: dict[Tensor, Proxy] = {}
        self._context = surroundings()
        self.asked: dict[str, str] = {}  # for which modes the code asked, and which module did first
        self.contradicts = False  # it is told another answer than the one that holds
        self.opaque = opaque or {}
        self.known = None if known is None else known.fresh(tensors=evaluate)  # each attempt has a call of its own
        self.evaluate = evaluate
        self.guards = []
        self.state: ModuleState
        self.failed: str | None = None
        self._values, self._variables = {}, {}
        self._filled = []
        self._checked, self._lists, self._texts, self._of_objects, self._asked, self._decided_by = set(), [], [], set(), [], []
        self._unsized = set()  # tensors whose sizes depend on what tensors hold
        self._static = set()  # made of parameters and buffers alone
        self._learned = set()  # of parameters
        self._evaluating = False
        self._installed: set[nn.Module] = set()
        self._mode_node: Node | None = None

    def follow(self, root: nn.Module) -> Graph:
        """Trace, or raise ``NotTraceableError`` with the innermost module that can not be traced.

        What ``forward`` keeps on a module (a cached grid) is not kept: while tracing it is no tensor. A buffer is.
        """
        self.state = ModuleState(root, self.opaque)
        try:
            graph = self.trace(root)
            self.settle()
            settle_constants(root, graph, may_retry=self.constants)
            self._keep_buffers(graph)
            self.state.note()
            return graph
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
            failed = self.failed or (error.path if isinstance(error, WrittenConstantError) else "")
            place = getattr(error, "place", "") or where_raised(error) or place_of(root, failed)
            raise NotTraceableError(failed, place, reason, error) from error
        finally:
            self.state.put_back()

    def _keep_buffers(self, graph: Graph) -> None:
        """Write what ``forward`` assigned to buffers into them; what is a cache, the graph makes anew in each call."""
        for path, name, old, new in self.state.assigned_buffers():
            target = join(path, name)
            if self.known is not None and self.known.is_call and not self.evaluate:
                raise DataDependenceError(f"what size {target} is given, the example says")
            given = self._values.get(new)
            is_read = self.evaluate or graph.find_nodes(op="get_attr", target=target)
            if is_read and not (isinstance(given, Tensor) and given.shape != old.shape):
                write_buffer(graph, target, new)
            else:
                self.state.kept.append((path, name))

    def _proxy_of(self, tensor: Tensor) -> Proxy:
        """A tensor of which the graph knows nothing as a value of it."""
        if tensor not in self._proxies:
            self._proxies[tensor] = self.proxy(self.create_arg(tensor))
        return self._proxies[tensor]

    def mode_is_read(self) -> bool:
        """Whether the graph needs the mode; if not, its node goes."""
        assert self._mode_node is not None
        if self._mode_node.users:
            return True
        self._mode_node.graph.erase_node(self._mode_node)
        return False

    @functools.cached_property
    def _names(self) -> dict[Tensor, str]:
        """The paths of parameters and buffers."""
        return {value: name for name, value in (*self.root.named_parameters(), *self.root.named_buffers())}

    # --- fx's hooks ------------------------------------------------------------------------------------------

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.opaque:
            return True
        if type(m).__module__.startswith("einops.layers.") and not has_parameters(m):
            return True
        if isinstance(m, torch.jit.ScriptModule):  # its code is no Python that could be followed
            return True
        if isinstance(m, BatchNorm):  # a subclass too, unless it computes something else: torch's forward branches on the mode
            return type(m).forward is BatchNorm.forward or super().is_leaf_module(m, module_qualified_name)
        if is_parametrized(m) and not self._evaluating:
            return False  # its weight is computed, by operations of the graph
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.is_following:
            return forward(*args, **kwargs)
        if not self.live_training:
            return super().call_module(m, forward, args, kwargs)
        if isinstance(m, nn.Identity) and args and not isinstance(args[0], Proxy):
            return args[0]  # None stays None
        if called_by_checkpoint():
            raise ContextError("it checkpoints inside forward, which a graph does not hold")
        self._check_context()  # here, so that the module with the block is to blame and not the one it calls
        if m not in self._installed and not has_parameters(m):  # made on the way, as ``nn.ReLU()(x)``
            return forward(*args, **kwargs)  # what it does, not what it is, is in the graph
        try:
            if not self.is_leaf_module(m, self.path_of_module(m)):
                self.look_around(m)
            if isinstance(m, NORM_THEN_TYPES):
                y = self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
                for child in m.children():
                    y = child(y)
                return y
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None:
                self.failed = self.path_of_module(m)
            raise

    def _check_context(self) -> None:
        if self.live_training and surroundings() != self._context:
            raise ContextError("it changes the gradient or autocast mode inside forward, which a graph does not hold")

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if not self.is_following:
            return attr_val
        if not (self.live_training and isinstance(attr_val, Tensor) and attr_val in self._names):
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        name = self._names[attr_val]  # fx looks through all of them
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        reserve_self(self.graph)
        signature = inspect.signature(root_fn)
        variadic = {p.name for p in signature.parameters.values() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        wrapped = inspect.unwrap(root_fn) is not root_fn  # fx patches the code of the wrapper, which has other parameters
        if self.known is None or (variadic and not (self.known.is_call or wrapped)):
            function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
            keywords_behind_star(self.graph, root_fn)
            args = [arg if not isinstance(arg, Proxy) or str(arg.node.target)[0] == "*" else self._fix(arg) for arg in args]
        else:
            function, args = self._call_of(root_fn, list(signature.parameters.values())[1:], self.known)
        if not self.live_training:
            return function, args
        self._installed = set(self.root.modules())
        self.look_around(self.root)
        mode = self.create_proxy("call_module", TRAINING_MODE, (), {})
        self._mode_node = mode.node
        self._values[mode.node] = bool(self.mode)
        for module in self._installed:
            # fx would hold the mode of today as a constant. Python finds an instance's own attribute first, so each
            # ``if self.training`` meets the proxy; ``ModuleState`` puts the flag back.
            module.__dict__["training"] = mode
        return function, args

    def _call_of(
        self, forward: Callable[..., Any], parameters: list[inspect.Parameter], known: Known
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Make the placeholders, and call ``forward`` the way the example does: what it leaves out is left out."""
        positional: list[Any] = []
        keywords: dict[str, Any] = {}
        proxies = [
            self.create_proxy("placeholder", STARS.get(p.kind, "") + p.name, () if p.default is p.empty else (p.default,), {})
            for p in parameters
        ]
        for position, (parameter, proxy) in enumerate(zip(parameters, proxies, strict=True)):
            name, fixed = parameter.name, self._fix(proxy)
            if parameter.kind is parameter.VAR_POSITIONAL:
                positional += fixed
            elif parameter.kind is parameter.VAR_KEYWORD:
                keywords |= fixed
            elif fixed is None and name not in known.given:
                continue
            elif parameter.kind is not parameter.KEYWORD_ONLY and position < known.positional:
                positional.append(fixed)
            else:
                keywords[name] = fixed
        return lambda root: forward(root, *positional, **keywords), [self.root]

    def is_size(self, node: Node) -> bool:
        """Whether a node is a shape, or a number: as the example says, or made of shapes alone."""
        if self.evaluate:
            return isinstance(self._values.get(node), (int, float, tuple))
        if reads_size(node):
            return True
        return node.op == "call_function" and all(map(self.is_size, node.all_input_nodes)) and bool(node.all_input_nodes)

    def proxy(self, node: Node) -> Proxy:
        return ExampleProxy(node, self) if self.evaluate else InPlaceProxy(node, self)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Node:
        self._check_context()  # at every operation: fx calls nothing where a block begins or ends
        node = super().create_node(kind, target, args, kwargs, *rest, **more)
        if self.live_training and (where := line()):
            node.meta["stack_trace"] = where
        if self.evaluate and kind != "output" and target not in (TRAINING_MODE, *CHECKS, *SWITCHES):
            self._values[node] = self._evaluate(node)
            self._note_origin(node)
        return node

    def _note_origin(self, node: Node) -> None:
        """Where the value comes from: constants of the model may steer Python, sizes too, what tensors hold may not."""
        sources = node.all_input_nodes
        selects = depends_on_data(node, [self._values.get(s) for s in sources])
        if selects or (any(s in self._unsized for s in sources) and not is_sized_anyway(node)):
            self._unsized.add(node)
        if any(source in self._of_objects for source in sources):
            self._of_objects.add(node)
        sized = reads_size(node)
        if node.op == "get_attr" or (sources and all(source in self._static for source in sources)):
            self._static.add(node)
        if isinstance(self._values[node], nn.Parameter) or (not sized and any(s in self._learned for s in sources)):
            self._learned.add(node)
        is_constant = node in self._static and node not in self._learned
        is_number = isinstance(self._values[node], (bool, int, float, complex))
        of_tensor = any(isinstance(self._values.get(source), Tensor) for source in sources)
        if is_number and of_tensor and not (sized or is_constant):
            self._values[node] = UNKNOWN

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        if getattr(target, "__module__", "") == "einops.einops" and target.__name__ == "einsum":
            return torch.einsum(letters(args[-1]), *args[:-1])  # a product, with operands to quantize
        if target is torch._assert:
            self.assert_with(str((*args, *kwargs.values())[-1]))
        if self.live_training and target is F.multi_head_attention_forward:
            written_out = multi_head_attention_forward(*args, **kwargs)
            if written_out is not NotImplemented:
                return written_out
        if kind == "call_method" and target in _VIEWS and self.live_training:
            view = self._view(args[0], target)
            if view is not NotImplemented:
                return view
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        node = proxy.node
        is_opaque = is_leaf_function(node) and operator_of(node) is None
        if self.evaluate and is_opaque and any(is_matrix(self._values.get(n)) for n in node.all_input_nodes):
            self.graph.erase_node(node)
            return target(*args, **kwargs)  # with values beside the graph it can be followed
        return proxy

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Proxy):  # mostly; fx asks for everything else first
            return a.node
        kind: Any = type(a)
        if kind in _PLAIN:
            return a
        if kind is GuardedDict:
            return a.proxy.node
        if issubclass(kind, dict) and is_dataclass(a):  # a result by name, as transformers' ModelOutput
            present = {f.name: getattr(a, f.name) for f in fields(a) if getattr(a, f.name) is not None}
            return self.create_node("call_function", kind, (), {k: self.create_arg(v) for k, v in present.items()})
        if issubclass(kind, numpy.generic):  # a number that NumPy made of sizes
            return a.item()
        if kind is OrderedDict:
            return self.create_node("call_function", OrderedDict, (self.create_arg(dict(a)),), {})
        try:
            return super().create_arg(a)
        except NotImplementedError as error:
            does = "it hands on" if line() else "it returns"
            raise ForeignObjectError(f"{does} a {kind.__name__}, which a graph does not hold") from error

    def to_bool(self, obj: Proxy) -> bool:
        if obj.node is self._mode_node:
            if self.mode is None:
                raise ModeError("it does one thing in training and another in evaluation")
            return self.mode
        if self.evaluate:
            return bool(self.fixed(obj, "if"))
        return bool(super().to_bool(obj))

    def iter(self, obj: Proxy) -> Iterator[Any]:
        if isinstance(value := self._values.get(obj.node), dict):
            self.fixed(obj, "a loop", sized=True)
            return iter(list(value))
        try:
            return super().iter(obj)
        except Exception:
            if not self.evaluate:
                raise
        return iter(self._items(obj, range(len(self.fixed(obj, "a loop", sized=True)))))

    def _items(self, obj: Proxy, keys: Iterable[Any]) -> list[Any]:
        return [self.create_proxy("call_function", operator.getitem, (obj, key), {}) for key in keys]

    def _view(self, obj: Proxy, view: str) -> Any:
        """The keys, values or items of a dictionary, as the example has them."""
        if not isinstance(value := self._values.get(obj.node), dict):
            return NotImplemented if self.evaluate else self.fixed(obj, f"{view}()", sized=True)
        self.fixed(obj, f"{view}()", sized=True)
        keys = list(value)
        if view == "keys":
            return keys
        items = self._items(obj, keys)
        return items if view == "values" else list(zip(keys, items, strict=True))

    # --- example values --------------------------------------------------------------------------------------

    def _evaluate(self, node: Node) -> Any:
        assert self.known is not None
        if node.op == "placeholder":
            return self.known.values.get(str(node.target).lstrip("*"), UNKNOWN)
        return self.evaluated(node, self._values)

    def evaluated(self, node: Node, values: Mapping[Node, Any]) -> Any:
        if any(values.get(source, UNKNOWN) is UNKNOWN for source in node.all_input_nodes):
            return UNKNOWN
        args, kwargs = (plain(map_arg(part, values.__getitem__)) for part in arguments(node))
        before, self._evaluating = self._evaluating, True
        try:
            with torch.no_grad(), self.state.watch:
                return run_node(self.root, node, args, kwargs)
        finally:
            self._evaluating = before


_PLAIN = {type(None), bool, int, float, str}
_VIEWS = ("keys", "values", "items")  # of a dictionary
