"""Assumptions of tracing: what Python asked of a call, the answer that it got, and the check of it in every later call.

A check is a node of the graph, behind the value that was asked about: the answer of ``x.shape[0] > 4`` is checked, not the
shape, so that other calls with the same answer go on working.
"""

import inspect
import operator
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node, Proxy
from torch.nn.utils.rnn import PackedSequence

from pege_fx.decompositions.recurrent import CELLS, LAYERS, given_or_zeros
from pege_fx.modules.mode import (
    TRAINING_MODE,
    check_argument,
    check_class,
    check_constant,
    check_given,
    check_keys,
    check_tensor,
    check_variables,
    contains,
    length,
)
from pege_fx.passes.capture.bytecode import compares_identity, surroundings_of
from pege_fx.passes.capture.dictionaries import GuardedDict
from pege_fx.passes.capture.expressions import SIGNS, ancestors, shown
from pege_fx.passes.capture.known import Known
from pege_fx.passes.capture.proxies import DataDependenceError, InPlaceProxy, ProxyTracer, StateDependenceError, is_protocol
from pege_fx.passes.capture.source_location import described, expression, here
from pege_fx.passes.graph import after, arguments, changes_its_input, first_argument, size_class

UNKNOWN = object()
FIXED = (type(None), bool, int, str)  # Python asks of these what no proxy hears of: ``is None``, a key, ``range``


@dataclass(frozen=True)
class Guard:
    """One assumption of a graph.

    Attributes:
        question: what Python asked, as "len() of x".
        answer: what it got, as "2 items".
        place: "file:line" of the model's code that asked.
    """

    question: str
    answer: str
    place: str

    def __str__(self) -> str:
        return f"{self.question} is {self.answer}"


class GuardingTracer(ProxyTracer):
    """A tracer that answers Python from what is known of a call, and guards each answer.

    ``guards`` are those that a user hears of: sizes, lengths and numbers. ``None``, flags and texts among the arguments are
    checked as well.
    """

    known: Known | None
    evaluate: bool
    guards: list[Guard]
    _values: dict[Node, Any]  # what nodes are in the example call, or else UNKNOWN
    _unsized: set[Node]
    _static: set[Node]
    _learned: set[Node]
    _checked: set[Any]
    _lists: list[tuple[str, list[Any], list[Any]]]  # handed to ``forward``, and what they held
    _filled: list[tuple[str, Any, list[int]]]  # put into the caller's dictionaries, and what they held then
    _of_objects: set[Node]  # computed by, or of, objects that are no tensors: a call may change what they say
    _texts: list[tuple[str, Proxy, str]]  # in which sizes are shown, of what, and where
    _variables: dict[tuple[str, str], Any]  # global ones that code may read, by (module, name)
    _decided_by: list[Node]  # buffers, and what is computed of them, by whose values Python went
    _asked: list[tuple[Node, Any, str, str]]  # questions about those, the answers, how the code puts them, and where

    # --- arguments -------------------------------------------------------------------------------------------

    def _fix(self, argument: Proxy) -> Any:
        """Return what ``forward`` gets for a parameter: mostly a proxy.

        None, a truth value, a whole number or a text is fixed to what it is known to be, because Python may ask for it in ways
        that no proxy hears of (``is None``, ``isinstance``); a collection of extras becomes one of proxies.
        """
        target = str(argument.node.target)
        name = target.lstrip("*")
        if self.known is None:
            return argument
        if name == "hx" and isinstance(self.root, CELLS):
            source = self.proxy(next(iter(self.graph.nodes)))
            given = (argument, source, self.root.hidden_size, isinstance(self.root, nn.LSTMCell))
            proxy = self.create_proxy("call_function", given_or_zeros, given, {})
            proxy.node.meta["is_wrapped"] = True  # one node for a tracer of the generated code as well
            return proxy
        if name == "hx" and isinstance(self.root, LAYERS):
            return argument
        nothing: Any = {} if target.startswith("**") else () if target.startswith("*") else UNKNOWN
        value = self.known.values.get(name, nothing)
        if target == name:
            return self._fix_value(argument, name, value, optional=self._is_optional(name))
        keys = tuple(value) if isinstance(value, dict) else tuple(range(len(value)))
        self._check(check_keys, argument, name, keys)
        fixed = {key: self.part(argument, name, key, value[key]) for key in keys}
        return fixed if isinstance(value, dict) else tuple(fixed.values())

    def _is_optional(self, name: str) -> bool:
        """Whether a call may leave out an argument, or give None for it: not the only one that it needs."""
        parameters = inspect.signature(self.root.forward).parameters.values()
        required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        return required != [name]

    def part(self, whole: Proxy, name: str, key: Any, value: Any) -> Any:
        """Return what ``forward`` gets for an entry of a collection among the arguments."""
        part = self.create_proxy("call_function", operator.getitem, (whole, key), {})
        return self._fix_value(part, f"{name}[{key!r}]", value)

    def _fix_value(self, argument: Proxy, name: str, value: Any, *, optional: bool = True) -> Any:
        self._values[argument.node] = value
        if isinstance(value, FIXED):
            self._check(check_argument, argument, name, value)
            return value
        if value is UNKNOWN or isinstance(value, Tensor):
            if optional:
                self._check(check_given if value is UNKNOWN else check_tensor, argument, name)
            return argument
        if type(value) in (list, tuple):
            return self._fix_sequence(argument, name, value)
        if isinstance(value, tuple) and hasattr(value, "_fields") and not isinstance(value, PackedSequence):
            return type(value)(*self._fix_sequence(argument, name, value))
        self._check(check_class, argument, name, type(value).__qualname__)
        if _is_object(value):
            self._of_objects.add(argument.node)
        return GuardedDict(self, argument, name, value) if type(value) in (dict, OrderedDict) else argument

    def _fix_sequence(self, argument: Proxy, name: str, value: list[Any] | tuple[Any, ...]) -> Any:
        """A list or tuple of tensors stays one value of the graph; one of other things is handed over part by part."""
        self._check(check_class, argument, name, type(value).__qualname__)
        self._check(check_keys, argument, name, tuple(range(len(value))))
        if type(value) in (list, tuple) and all(isinstance(part, (Tensor, float)) for part in value):
            return argument
        parts = [self.part(argument, name, place, part) for place, part in enumerate(value)]
        if isinstance(value, tuple):
            return tuple(parts)
        self._lists.append((name, parts, parts.copy()))
        return parts

    def _check(self, function: Callable[..., None], argument: Proxy, name: str, *traced: Any, place: str = "") -> None:
        whose = f"{type(self.root).__name__} ({os.path.basename(place)})" if place else described(self.root)
        node = self.create_node("call_function", function, (argument.node, name, *traced, whose), {})
        node.meta["is_wrapped"] = True  # one node for a tracer of the generated code as well

    def _ask(self, function: Callable[..., Any], *args: Any) -> Proxy:
        """A node that asks a question of its own, to be checked."""
        proxy = self.create_proxy("call_function", function, args, {})
        proxy.node.meta["is_wrapped"] = True
        return proxy

    @property
    def values(self) -> Mapping[Node, Any]:
        """What is known of nodes in the example call."""
        return self._values

    # --- questions of Python ---------------------------------------------------------------------------------

    def answered(self, value: Any) -> Any:
        """Return what a proxy stands for in the call that is known, ``UNKNOWN`` if nobody knows, or the value itself."""
        return self._values.get(value.node, UNKNOWN) if isinstance(value, Proxy) else value

    def fixed(self, proxy: Proxy, use: str, *, sized: bool = False, place: str = "") -> Any:
        """Return what Python asks for, and guard it: a size, a number made of sizes; never the value of a tensor.

        With ``sized`` the question is only how many there are, or which keys a dictionary has. What is made of buffers alone is
        a constant of the model, and nothing to tell a user of.
        """
        value = self._values.get(proxy.node, UNKNOWN)
        if proxy.node in self._static and proxy.node not in self._learned:
            if not sized:
                self._check_constants(proxy.node, place or here())
            return value
        if value is UNKNOWN or proxy.node in self._unsized or (isinstance(value, Tensor) and not sized):
            raise DataDependenceError(f"{use} asks for the value of {said(proxy.node, place)}, which depends on data")
        self._note(f"{use} of {said(proxy.node, place)}", f"{len(value)} items" if sized else repr(value), place or here())
        if not sized:
            self._check_once(check_argument, proxy, shown(proxy.node), value)
        elif isinstance(value, dict):
            self._check_once(check_keys, proxy, shown(proxy.node), tuple(value))
        else:
            self._check_once(check_argument, self._ask(length, proxy), f"len({shown(proxy.node)})", len(value))
        return value

    def _check_constants(self, node: Node, place: str) -> None:
        """Check the buffers, or what is computed of them, that decided."""
        value = self._values.get(node, UNKNOWN)
        if not isinstance(value, Tensor):
            for source in node.all_input_nodes:
                self._check_constants(source, place)
        elif (check_constant, node) not in self._checked and value.numel() <= _FEW:
            self._checked.add((check_constant, node))
            self._decided_by.append(node)
            self._check(check_constant, self.proxy(node), shown(node), _plain(value.tolist()), place=place)

    def watch(self, name: str, value: Any) -> None:
        if isinstance(value, (list, dict, set)):
            self._filled.append((name, value, _parts(value)))

    def has(self, proxy: Proxy, item: Any) -> bool:
        """Return whether a collection has an item, and guard it."""
        value = self._values.get(proxy.node, UNKNOWN)
        if value is UNKNOWN or isinstance(value, Tensor) or isinstance(item, Proxy):
            raise DataDependenceError(f"in asks for the value of {said(proxy.node)}, which depends on data")
        found = item in value
        self._note(f"in of {said(proxy.node)}", f"{len(value)} items", here())
        self._check_once(check_argument, self._ask(contains, proxy, item), f"{item!r} in {shown(proxy.node)}", found)
        return found

    def attribute(self, proxy: InPlaceProxy, name: str) -> Any:
        """Return an attribute of what a proxy stands for: what an object has of None, flags, numbers, texts is guarded."""
        missing = is_protocol(name) or name == "node"  # which raised an AttributeError of its own
        value = UNKNOWN if missing else self._values.get(proxy.node, UNKNOWN)
        if missing or not self._has_attribute(proxy, value, name):
            raise AttributeError(f"what is traced has no attribute {name}")
        if name in _OF_AUTOGRAD and (name.startswith("grad") or proxy.node.op != "get_attr"):
            raise DataDependenceError(f"it asks for .{name} of {said(proxy.node)}, which a graph does not know")
        if name in _SINGLE and compares_identity(sys._getframe(2).f_code):
            return self.fixed(proxy.attribute(name), f".{name}")
        if value is UNKNOWN or isinstance(value, Tensor):
            return proxy.attribute(name)
        found = getattr(value, name)
        if isinstance(found, str) and self.evaluate:  # text has no use but in Python
            return self.fixed(proxy.attribute(name), f".{name}")
        return self._part_of_object(proxy, name, found) if _is_object(value) and not callable(found) else proxy.attribute(name)

    def _has_attribute(self, proxy: Proxy, value: Any, name: str) -> bool:
        if value is UNKNOWN:
            cls = size_class(proxy.node)
            return cls is None or hasattr(cls, name)
        if isinstance(value, Tensor):  # to ask may warn (``grad``), or compute
            return hasattr(type(value), name) or name in vars(value)
        return hasattr(value, name)

    def _part_of_object(self, proxy: Proxy, name: str, found: Any) -> Any:
        if not self.evaluate:
            raise DataDependenceError(f"it reads .{name} of {said(proxy.node)}, which only an example tells")
        read = self.create_proxy("call_function", getattr, (proxy, name), {})
        if isinstance(found, (*FIXED, float)):
            return self.fixed(read, f".{name}")
        if isinstance(found, Tensor):
            self._asked.append((read.node, Tensor, said(read.node), here()))
            self._check_once(check_tensor, read, shown(read.node))
        return read

    def hashed(self, proxy: Proxy) -> int:
        """Return the hash of what a proxy stands for; a tensor's is its identity."""
        value = self._values.get(proxy.node, UNKNOWN)
        if isinstance(value, Tensor) or (value is UNKNOWN and not self._is_no_tensor(proxy)):
            return object.__hash__(proxy)
        return hash(self.fixed(proxy, "the hash"))

    def _is_no_tensor(self, proxy: Proxy) -> bool:
        return self.is_size(proxy.node) or proxy.node.target is getattr

    def text(self, proxy: Proxy, write: Callable[[Any], str]) -> str:
        """Return what a proxy stands for as a text, which is guarded unless it turns out to be the message of an assertion."""
        value = self._values.get(proxy.node, UNKNOWN)
        if isinstance(value, Tensor) or (value is UNKNOWN and not self.is_size(proxy.node)):
            raise DataDependenceError(f"a text shows {said(proxy.node)}, which depends on data")
        text = f"{{{shown(proxy.node)}}}" if value is UNKNOWN else write(value)
        self._texts.append((text, proxy, here()))
        return text

    def assert_with(self, message: str) -> None:
        """Take note that texts were made for a message that is shown when an assertion fails."""
        self._texts = [entry for entry in self._texts if entry[0] not in message]

    def _note(self, question: str, answer: str, place: str) -> None:
        guard = Guard(question, answer, place)
        if guard not in self.guards:
            self.guards.append(guard)

    def _check_once(self, function: Callable[..., None], proxy: Proxy, question: str, *answer: Any) -> None:
        """Check an answer, unless the same was asked before."""
        key = (function, _key(proxy.node), repr(answer))
        if key not in self._checked:
            self._checked.add(key)
            self._check(function, proxy, question, *map(_plain, answer), place=here())
            if answer and proxy.node in self._of_objects:
                self._asked.append((proxy.node, answer[0], said(proxy.node), here()))

    def look_around(self, module: nn.Module) -> None:
        """Note the global variables that a module's code reads; refuse code that asks in ways of which no proxy hears."""
        unheard, variables = surroundings_of(module)
        if unheard:
            raise DataDependenceError(f"it asks by {min(unheard)}, of which no proxy hears")
        self._variables |= variables

    def settle(self) -> None:
        """Raise ``StateDependenceError`` if the graph depends on what a call changes.

        That is a list of the call whose parts decide what ``forward`` does, or an object that now gives another answer.
        """
        for name, parts, before in self._lists:
            if len(parts) != len(before) or any(a is not b for a, b in zip(parts, before, strict=True)):
                raise StateDependenceError(f"it writes into the list {name}, whose parts decide what it does")
        for name, value, before in self._filled:
            if _parts(value) != before:
                raise StateDependenceError(f"it goes on filling {name} after it has put it there, which a graph does not see")
        if self._variables:
            variables = tuple((*place, value) for place, value in self._variables.items())
            with self.graph.inserting_before(after(next(iter(self.graph.nodes)))):
                node = self.create_node("call_function", check_variables, (variables, described(self.root)), {})
                node.meta["is_wrapped"] = True
        with self.graph.inserting_before(self.graph.output_node()):
            for _, proxy, place in self._texts:
                self.fixed(proxy, "a text", place=place)
        read = {node.target for decided in self._decided_by for node in ancestors(decided) if node.op == "get_attr"}
        for node in (node for node in self.graph.nodes if read and node.target != TRAINING_MODE):
            changed = first_argument(node) if changes_its_input(self.root, node) else None
            if isinstance(changed, Node) and changed.op == "get_attr" and changed.target in read:
                raise StateDependenceError(f"it asks for the value of {changed.target}, which each call changes")
        again: dict[Node, Any] = {}
        for node, answer, question, place in self._asked:
            now = self._recomputed(node, again)
            if not (isinstance(now, Tensor) if answer is Tensor else repr(now) == repr(answer)):
                raise StateDependenceError(
                    f"{question} is {answer!r} at first and {now!r} after a call, which changes it", place
                )

    def _recomputed(self, node: Node, again: dict[Node, Any]) -> Any:
        """What a node would be now, after the call."""
        if node not in again:
            if node.op in ("placeholder", "get_attr") or node not in self._of_objects:
                again[node] = self._values.get(node, UNKNOWN)
            else:
                for source in node.all_input_nodes:
                    self._recomputed(source, again)
                again[node] = self.evaluated(node, again)
        return again[node]

    def evaluated(self, node: Node, values: Mapping[Node, Any]) -> Any:
        """Return what a node computes from values of other nodes."""
        raise NotImplementedError


def _parts(value: Any) -> list[int]:
    """Which parts a collection has."""
    return [id(part) for pair in value.items() for part in pair] if isinstance(value, dict) else sorted(map(id, value))


# Taken here: while tracing, torch.finfo is another.
_OF_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, torch.finfo, torch.iinfo)
_SINGLE = {"dtype", "layout"}  # whose values are asked by ``is``, of which no proxy hears
_FEW = 1024  # elements that a check compares
_OF_AUTOGRAD = {"grad", "grad_fn", "requires_grad", "is_leaf"}  # example values are computed without


def _is_object(value: Any) -> bool:
    """Whether a value is an object with a state of its own."""
    if isinstance(value, (Tensor, *_OF_TORCH)) or type(value).__module__ == "torch.return_types":
        return False
    return type(value) not in (*FIXED, float, complex, list, tuple, dict, set, frozenset, OrderedDict)


# --- in words and as keys ----------------------------------------------------------------------------------------


def said(node: Node, place: str = "") -> str:
    """Return what Python asks for: an argument by its name, else the expression of the code that runs, if it is not past."""
    text = "" if node.op == "placeholder" or place else expression()
    return f"`{text}`" if text else shown(node)


def _key(value: Any) -> Any:
    """A key that two nodes share if they ask the same of the same value: every ``x.shape`` is a node of its own."""
    if isinstance(value, Node):
        asks = value.target in (getattr, operator.getitem, length, contains, *SIGNS) or value.target in ("size", "dim")
        args, kwargs = arguments(value)
        return (value.target, *map(_key, args)) if asks and not kwargs else value
    return repr(value)


def _plain(answer: Any) -> Any:
    if isinstance(answer, list):
        return tuple(map(_plain, answer))
    return tuple(answer) if isinstance(answer, torch.Size) else answer
