"""Modules that stand in a traced graph for what a graph does not hold: the training mode, code that stays Python."""

import inspect
import itertools
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn

from pege_fx.errors import OtherCallError
from pege_fx.modules.calls import beside_forward
from pege_fx.modules.write_watch import WriteWatch, copied

TRAINING_MODE = "training_mode"
PYTHON_FORWARD = "python_forward"


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradient; every submodule's own mode comes back after."""
    modes = {child: child.training for child in module.modules()}
    try:
        module.eval()
        with torch.no_grad():
            yield
    finally:
        for child, training in modes.items():
            child.training = training


@contextmanager
def ordinary_modes() -> Iterator[None]:
    """The modes in which a model trains: gradients are recorded, no inference mode, no autocast."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


class Attributes(NamedTuple):
    """The attributes of a module, copies of those that change in place, by name, and of the collections inside them."""

    values: dict[str, Any]
    copies: dict[str, Any]
    nested: tuple[tuple[Any, Any], ...] = ()


_CHANGING = (dict, OrderedDict, defaultdict, Counter, list, set, deque)
_EMPTY: dict[str, Any] = {}


def attributes(module: nn.Module) -> Attributes:
    """Note the attributes of a module: lists, dictionaries of tensors, children, hooks."""
    values = vars(module).copy()
    copies = {
        name: value.copy() if value else _EMPTY  # a dozen, and most are empty
        for name, value in values.items()
        if type(value) in _CHANGING
    }
    return Attributes(values, copies, tuple(_nested(copies.values(), set())))


def _nested(collections: Iterable[Any], seen: set[int]) -> Iterator[tuple[Any, Any]]:
    """Collections inside collections, near and far, each with a copy."""
    for collection in collections:
        for value in collection.values() if isinstance(collection, dict) else collection:
            if type(value) in _CHANGING and id(value) not in seen:
                seen.add(id(value))
                yield value, value.copy()
                yield from _nested([value], seen)


def put_back(module: nn.Module, before: Attributes) -> None:
    """Give a module the attributes that it had; lists and dictionaries, which others may hold too, are the same ones."""
    module.__dict__.clear()
    module.__dict__.update(before.values)
    for value, kept in (*((before.values[name], kept) for name, kept in before.copies.items()), *before.nested):
        if value:
            value.clear()
        if kept:
            (value.extend if isinstance(value, (list, deque)) else value.update)(kept)


def _tensors_in(before: Attributes) -> set[Tensor]:
    """Tensors that are attributes, or lie in collections that are: parameters and buffers are none."""
    held = [kept for name, kept in before.copies.items() if name not in ("_parameters", "_buffers")]
    held += [before.values, *(kept for _, kept in before.nested)]
    items = itertools.chain.from_iterable(kept.values() if isinstance(kept, dict) else kept for kept in held)
    return {value for value in items if isinstance(value, Tensor)}


@contextmanager
def preserve_state(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put back what calls inside leave in modules: attributes, hooks, buffers, parameters.

    Parameters of torch's own layers are copied when something is about to write them, all other tensors at once.
    """
    modules = list(modules)
    modules += [module.code for module in modules if isinstance(module, PythonForward)]
    states = [(module, attributes(module)) for module in modules]
    own = [module for module in modules if not _is_torchs(module)]
    tensors = {buffer for module in modules for buffer in module.buffers(recurse=False)}
    tensors |= {parameter for module in own for parameter in module.parameters(recurse=False)}
    tensors |= {tensor for _, before in states for tensor in _tensors_in(before)}
    values = [copied(tensor) for tensor in tensors if not tensor.is_meta]
    rest = {parameter for module in modules for parameter in module.parameters(recurse=False)} - tensors
    leaves = {tensor for tensor in tensors | rest if tensor.is_leaf}
    watch = WriteWatch(parameter for parameter in rest if not parameter.is_meta)
    try:
        with watch:
            yield
    finally:
        for module, before in states:
            put_back(module, before)
        with torch.no_grad():
            for noted in (*values, *watch.copies):
                noted.put_back()
                if noted.tensor.grad_fn is not None and noted.tensor in leaves:
                    noted.tensor.detach_()  # a write of what needs a gradient made it part of that call's graph


def _is_torchs(module: nn.Module) -> bool:
    """Whether a module is a layer of torch or one of this package; what a script does is seen by nobody."""
    return type(module).__module__.startswith(("torch.", "pege_fx.")) and not isinstance(module, torch.jit.ScriptModule)


class TrainingMode(nn.Module):
    """Returns its own ``training``: what ``self.training`` becomes in a traced graph."""

    def forward(self) -> bool:
        return self.training


def select_by_mode(training: bool, in_training: Any, in_evaluation: Any) -> Any:
    """Return what ``if self.training`` would have left: both sides are values of the graph."""
    return in_training if training else in_evaluation


def written(x: Any) -> Any:
    """Return ``x``: its value behind a write that other nodes of the graph made to its memory."""
    return x


# Checks of what tracing took for granted. One that belongs to a branch on the mode is not ``active`` in the other mode.


@torch.fx.has_side_effect
def check_argument(value: Any, name: str, traced: Any, module: str = "the model", active: bool = True) -> None:
    """Raise ``OtherCallError`` unless a value is the None, number, text or tuple of them that the graph was traced for."""
    if active and value is not traced and not _is_equal(value, traced):
        shown = repr(value) if isinstance(value, (*_SHOWN, *_SYMBOLIC)) or value is None else f"a {type(value).__name__}"
        raise _other_call(module, f"{name} was {traced!r} when the model was traced, and is {shown} now")


def _is_equal(value: Any, traced: Any) -> bool:
    """Whether two values are equal and of one type: True is not 1; a size that ``torch.export`` leaves open is a number."""
    if type(value) is not type(traced) and not isinstance(value, (*_SYMBOLIC, type(traced))):
        return False
    if isinstance(value, torch.SymBool):
        value = bool(value)  # torch.export notes that it asked
    return bool(value == traced) and isinstance(value, bool) == isinstance(traced, bool)


@torch.fx.has_side_effect
def check_tensor(value: Any, name: str, module: str = "the model", active: bool = True) -> None:
    """Raise ``OtherCallError`` unless an argument is a tensor, as it was when the graph was traced."""
    if active and not isinstance(value, Tensor):
        check_class(value, name, "Tensor", module)


@torch.fx.has_side_effect
def check_class(value: Any, name: str, traced: str, module: str = "the model", active: bool = True) -> None:
    """Raise ``OtherCallError`` unless an argument is of the class that was traced (an int may be given for a float)."""
    if not active or type(value).__qualname__ == traced or (traced == "float" and isinstance(value, (float, int))):
        return  # a compiler follows this, and no loop over classes
    if traced not in (cls.__qualname__ for cls in type(value).__mro__):
        shown = "None" if value is None else f"a {type(value).__name__}"
        raise _other_call(module, f"{name} was a {traced} when the model was traced, and is {shown} now")


@torch.fx.has_side_effect
def check_given(value: Any, name: str, module: str = "the model", active: bool = True) -> None:
    """Raise ``OtherCallError`` if an argument is None, for which no graph was traced."""
    if active and value is None:
        raise _other_call(module, f"{name} was taken for a tensor when the model was traced, and is None now")


@torch.fx.has_side_effect
def check_keys(value: Any, name: str, traced: tuple[Any, ...], module: str = "the model", active: bool = True) -> None:
    """Raise ``OtherCallError`` unless ``**kwargs`` have the keys, or ``*args`` the positions, that the graph was traced for."""
    found = () if not active else tuple(value) if isinstance(value, dict) else tuple(range(len(value)))
    if active and found != traced:
        raise _other_call(module, f"{name} had {list(traced)} when the model was traced, now it has {list(found)}")


@torch.fx.has_side_effect
def check_constant(value: Tensor, name: str, traced: Any, module: str = "the model", active: bool = True) -> None:
    """Raise ``OtherCallError`` unless a buffer holds what it held when the graph was traced; a compiler does not ask."""
    if not active or torch.compiler.is_compiling():
        return
    found = _nested_tuple(value.tolist())
    if found != traced:
        raise _other_call(module, f"{name} held {traced!r} when the model was traced, and holds {found!r} now")


def _nested_tuple(value: Any) -> Any:
    return tuple(map(_nested_tuple, value)) if isinstance(value, list) else value


@torch.fx.has_side_effect
def check_variables(variables: tuple[tuple[str, str, Any], ...], module: str = "the model", active: bool = True) -> None:
    """Raise ``OtherCallError`` unless global variables, each (module, name, value), are what they were."""
    if not active or torch.compiler.is_compiling():
        return
    for place, name, traced in variables:
        found = vars(sys.modules[place]).get(name, traced) if place in sys.modules else traced
        if found is not traced and not _is_equal(found, traced):
            raise _other_call(module, f"{place}.{name} was {traced!r} when the model was traced, and is {found!r} now")


def length(value: Any) -> int:
    """Return ``len(value)``, as a node of the graph that other tracers keep."""
    return len(value)


def contains(value: Any, item: Any) -> bool:
    """Return ``item in value``, as a node of the graph that other tracers keep."""
    return item in value


CHECKS = (check_argument, check_tensor, check_class, check_given, check_keys, check_constant, check_variables)
_SHOWN = (bool, int, float, str, tuple, torch.dtype, torch.device)
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def _other_call(module: str, what: str) -> OtherCallError:
    path = "" if torch.compiler.is_compiling() else _path_of_the_graph()  # a compiler follows no frames
    return OtherCallError(
        f"{module}{path and f' at {path}'} is called in another way: {what}.\n"
        "  give prepare example_inputs or example_kwargs with which it is called so, or call it as it was traced."
    )


def _path_of_the_graph() -> str:
    """The path of the innermost graph that runs, if it knows one: code that says it would differ from block to block."""
    frame = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), torch.fx.GraphModule):
        frame = frame.f_back
    return "" if frame is None else str(frame.f_locals["self"].meta.get("prefix", ""))


class PythonForward(nn.Module):
    """Runs the ``forward`` of a module that can not be traced, on children and tensors that the graph hands in.

    The graph owns those under their own names, so that ``state_dict``, ``to()`` and copies see them; the module here
    is the code alone. What the code assigns to a buffer is written into the graph's; if ``assigned`` names it, the code gets
    a copy, because backward may need what it held.
    """

    def __init__(self, code: nn.Module, assigned: Iterable[str] = ()) -> None:
        super().__init__()
        self._code = (code,)  # in a tuple: no child, so no key of it is doubled
        self._assigned = frozenset(assigned)

    @property
    def code(self) -> nn.Module:
        """The module whose ``forward`` runs."""
        return self._code[0]

    def forward(self, owned: dict[str, Any], arguments: dict[str, Any], extra: tuple[Any, ...], more: dict[str, Any]) -> Any:
        code = self.code
        code.training = self.training
        handed = {name: value.clone() if name in self._assigned else value for name, value in owned.items()}
        for name, value in handed.items():
            if getattr(code, name, None) is not value:
                setattr(code, name, value)
        args, kwargs = self._as_called(code, arguments, bool(extra))
        call = code if beside_forward(code) else code.forward
        result = call(*args, *extra, **kwargs, **more)
        with torch.no_grad():
            for name, value in code.named_buffers(recurse=False):
                if name in owned and value is not owned[name]:
                    owned[name].resize_(value.shape).copy_(value)
        return result

    @staticmethod
    def _as_called(code: nn.Module, arguments: dict[str, Any], all_positional: bool) -> tuple[list[Any], dict[str, Any]]:
        """By position what has no default, by keyword what differs from its default: a decorator may look."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for parameter in inspect.signature(code.forward).parameters.values():
            if parameter.name not in arguments:
                continue
            value = arguments[parameter.name]
            required = parameter.default is parameter.empty or parameter.kind is parameter.POSITIONAL_ONLY or all_positional
            if required and parameter.kind is not parameter.KEYWORD_ONLY:
                args.append(value)
            elif value is not parameter.default:
                kwargs[parameter.name] = value
        return args, kwargs
