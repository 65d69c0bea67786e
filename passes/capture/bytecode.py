"""What a module's ``forward`` may do, by its compiled code, which is there in a notebook and behind ``exec`` too.

Names alone are looked at: an attribute of that name may be asked of anything. So answers err on the side of "it may".
"""

import dis
import functools
import operator
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Names:
    """Names in compiled code.

    Attributes:
        read: attributes that are read, those that are called included.
        values: attributes that are read other than to be called at once.
        written: attributes that are assigned.
        methods: what is read, with the attribute that it is read of, None for what may be anything; nothing of ``self``.
        variables: variables of the module around the code.
        texts: constants that may be the name of an attribute, for ``getattr``.
        unheard: what no proxy hears of: patterns that are matched, global variables that are written.
    """

    read: frozenset[str] = frozenset()
    values: frozenset[str] = frozenset()
    written: frozenset[str] = frozenset()
    methods: frozenset[tuple[str | None, str]] = frozenset()
    variables: frozenset[str] = frozenset()
    texts: frozenset[str] = frozenset()
    unheard: frozenset[str] = frozenset()

    def __or__(self, other: "Names") -> "Names":
        return Names(**{kind: getattr(self, kind) | getattr(other, kind) for kind in Names.__annotations__})

    def may_call(self, attribute: str, method: str) -> bool:
        """Tell whether a method may be called on what an attribute holds."""
        return (attribute, method) in self.methods or (None, method) in self.methods


NO_NAMES = Names()
_PLAIN = (type(None), bool, int, float, str)


def names_in_forward(module: nn.Module) -> Names:
    """Return the names in a module's ``forward``, in the methods that it may call, and in the functions that it names."""
    return functools.reduce(operator.or_, (names for names, _ in _reached(module)), NO_NAMES)


def surroundings_of(module: nn.Module) -> tuple[frozenset[str], dict[tuple[str, str], Any]]:
    """Return what no proxy hears of in a module's ``forward``, and the global flags, numbers and texts that it may read.

    Those are by (module, name). Only code in the files of its classes counts: what libraries do behind it is theirs.
    """
    files = {cls.__module__ for cls in type(module).__mro__}
    unheard: set[str] = set()
    found: dict[tuple[str, str], Any] = {}
    for names, around in _reached(module):
        place = str(around.get("__name__"))
        if place in files:
            unheard |= names.unheard
            constants = {name for name in names.variables & around.keys() if isinstance(around[name], _PLAIN)}
            found |= {(place, name): around[name] for name in sorted(constants) if not name.startswith("__")}
    return frozenset(unheard), found


def _reached(module: nn.Module) -> list[tuple[Names, dict[str, Any]]]:
    """The names in each function that ``forward`` may reach, with the globals of that function."""
    found: dict[types.CodeType, tuple[Names, dict[str, Any]]] = {}
    waiting = [(function, True) for value in _attributes(module, "forward")[:1] for function in _functions(value)]
    while waiting:
        function, is_method = waiting.pop()
        if function.__code__ in found or _is_library(function):
            continue
        names = names_of(function.__code__, is_method=is_method)
        found[function.__code__] = names, function.__globals__
        for name in names.read:
            candidates = _attributes(module, name)
            waiting += [
                (method, True)
                for value in candidates[: None if "super" in names.variables else 1]
                for method in _functions(value)
            ]
        for name in names.variables:
            waiting += [(helper, False) for helper in _functions(function.__globals__.get(name))]
    return list(found.values())


def _attributes(module: nn.Module, name: str) -> list[Any]:
    """What a module has under a name, first its own, then those of base classes, which ``super`` finds."""
    return [names[name] for names in (vars(module), *map(vars, type(module).__mro__)) if name in names]


@functools.cache
def names_of(code: types.CodeType, *, is_method: bool) -> Names:
    """Return the names in compiled code, functions inside of it included."""
    found: dict[str, set[Any]] = {kind: set() for kind in Names.__annotations__}
    itself = code.co_varnames[0] if is_method and code.co_argcount else None
    for part in _codes(code):
        receiver: Any = None  # the attribute on the stack, or ``itself``
        for step in dis.get_instructions(part):
            on, receiver = receiver, None
            if step.opname.startswith("MATCH_"):
                found["unheard"].add("a pattern")
            if step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
                found["read"].add(step.argval)
                receiver = (step.argval,)
                if not _is_call(step):
                    found["values"].add(step.argval)
                if itself is None or on != itself:
                    found["methods"].add((on[0] if isinstance(on, tuple) else None, step.argval))
            elif step.opname == "LOAD_CONST" and isinstance(step.argval, str) and step.argval.isidentifier():
                found["texts"].add(step.argval)
            elif step.opname == "STORE_ATTR":
                found["written"].add(step.argval)
            elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                found["variables"].add(step.argval)
            elif step.opname == "STORE_GLOBAL":
                found["unheard"].add(f"the global variable {step.argval}, which it writes")
            elif step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
                receiver = step.argval[-1] if isinstance(step.argval, tuple) else step.argval
                receiver = receiver if receiver == itself else None
            elif step.opname in ("EXTENDED_ARG", "CACHE"):
                receiver = on
    return Names(**{kind: frozenset(names) for kind, names in found.items()})


@functools.cache
def compares_identity(code: types.CodeType) -> bool:
    """Tell whether code asks ``is`` of anything but None and other constants, as in ``x.dtype is torch.half``."""
    before = None
    for step in dis.get_instructions(code):
        if step.opname == "IS_OP" and before != "LOAD_CONST":
            return True
        before = step.opname
    return False


def _is_call(step: dis.Instruction) -> bool:
    return step.opname == "LOAD_METHOD" or (sys.version_info >= (3, 12) and bool((step.arg or 0) & 1))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _functions(value: Any) -> Iterator[types.FunctionType]:
    """The functions behind an attribute: decorated, a property, a static or a class method, a partial application."""
    for inner in (getattr(value, "fget", None), getattr(value, "__func__", None), getattr(value, "func", None)):
        if inner is not None and inner is not value:
            yield from _functions(inner)
    while isinstance(value, types.FunctionType):
        yield value
        for cell in value.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            if isinstance(content, types.FunctionType) and content is not value:
                yield content
        value = getattr(value, "__wrapped__", None)


def _is_library(function: types.FunctionType) -> bool:
    return function.__module__ is not None and function.__module__.partition(".")[0] in ("torch", "pege_fx", "numpy")
