"""Contexts while a module is traced: what enters one or sets a mode is refused, also where nothing changes by it.

A graph may be called within other contexts than it was traced in, and what a block sets would be lost then. One kind of block
is written down: that which switches autocast off. A question is answered; whoever traces asks for a second time with the
other answer, and takes the graph if it is the same one.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias
from unittest import mock

import torch

from pege_fx.passes.capture.patched import functions_of, names_of, patched
from pege_fx.passes.capture.patching import replaced

Refuse: TypeAlias = Callable[[str], None]
Region: TypeAlias = Callable[[str], Callable[[], Any]]
Answer: TypeAlias = Callable[[str, Any], Any]

_PASSING_ON = ("torch.utils._contextlib", "torch.amp.", "torch.cuda.amp.", "torch.cpu.amp.")  # what a decorator runs through

_ATTENTION_KERNELS: tuple[Callable[[], bool], ...] = (
    torch.backends.cuda.flash_sdp_enabled,
    torch.backends.cuda.mem_efficient_sdp_enabled,
    torch.backends.cuda.math_sdp_enabled,
)


def surroundings() -> tuple[Any, ...]:
    """Return the modes that what runs depends on, as far as they are no tensors' own."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.are_deterministic_algorithms_enabled(),
        *(ask() for ask in _ATTENTION_KERNELS),
    )


def replacements(refuse: Refuse, answer: Answer) -> dict[Any, Callable[..., Any]]:
    """Return what stands in for the functions that set a mode or ask for one, by the function.

    Args:
        refuse: called with what the code of the model does; raises if it is the code that is traced.
        answer: called with the question and its answer; returns what that code is to be told.
    """

    setters = {function: _refused(function, f"{name}()", refuse) for function, name in functions_of("set").items()}
    return setters | {function: _asked(function, name, answer) for function, name in functions_of("ask").items()}


@contextmanager
def no_contexts(functions: dict[Any, Callable[..., Any]], refuse: Refuse, region: Region) -> Iterator[None]:
    """Let the code of a model enter no context, and set no mode.

    Args:
        functions: what ``replacements`` returned.
        refuse: as there.
        region: called with a type of devices where a block switches autocast off for it; returns what is to be called at its
            end, or raises.
    """
    with ExitStack() as stack:
        for namespace, name in names_of("ask", "set"):
            stack.enter_context(replaced(namespace, {name: functions.get(namespace[name], namespace[name])}))
        for entry in patched("block"):
            for method in entry.names:
                refused = _refused(entry.namespace[method], f"torch.{entry.holder.__name__}", refuse, _PASSING_ON)
                stack.enter_context(mock.patch.object(entry.holder, method, refused))
        for method, stand_in in _autocast(refuse, region).items():
            stack.enter_context(mock.patch.object(torch.autocast, method, stand_in))
        yield


def _autocast(refuse: Refuse, region: Region) -> dict[str, Callable[..., Any]]:
    """Return what stands in for the methods of ``torch.autocast``: blocks that switch it off become regions of the graph."""
    original = {name: vars(torch.autocast)[name] for name in ("__init__", "__enter__", "__exit__")}
    switched_off: dict[int, Any] = {}  # by identity: those that the model made to switch autocast off
    ends: list[tuple[Any, Callable[[], Any]]] = []

    @functools.wraps(original["__init__"])
    def init(self: Any, device_type: Any, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None) -> None:
        original["__init__"](self, device_type, dtype, enabled, cache_enabled)
        if enabled is False and _is_asked_by_a_model(_PASSING_ON):
            switched_off[id(self)] = self

    @functools.wraps(original["__enter__"])
    def enter(self: Any) -> Any:
        if _is_asked_by_a_model(_PASSING_ON):
            if id(self) in switched_off:
                ends.append((self, region(self.device)))
            else:
                refuse("torch.autocast")
        return original["__enter__"](self)

    @functools.wraps(original["__exit__"])
    def leave(self: Any, *error: Any) -> Any:
        if ends and ends[-1][0] is self:
            _, end = ends.pop()
            if error[:1] == (None,):
                end()
        return original["__exit__"](self, *error)

    return {"__init__": init, "__enter__": enter, "__exit__": leave}


def other_answer(value: Any) -> Any:
    """Return what a question about a mode may be answered in another call; None if nobody knows."""
    if isinstance(value, bool):
        return not value
    return (torch.float64 if value is not torch.float64 else torch.float32) if isinstance(value, torch.dtype) else None


def _refused(original: Callable[..., Any], name: str, refuse: Refuse, passing_on: tuple[str, ...] = ()) -> Callable[..., Any]:
    @functools.wraps(original, updated=())
    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_asked_by_a_model(passing_on):
            refuse(name)
        return original(*args, **kwargs)

    return call


def _asked(original: Callable[..., Any], name: str, answer: Answer) -> Callable[..., Any]:
    @functools.wraps(original, updated=())
    def ask(*args: Any, **kwargs: Any) -> Any:
        value = original(*args, **kwargs)
        return answer(name, value) if _is_asked_by_a_model() else value

    return ask


def _is_asked_by_a_model(passing_on: tuple[str, ...] = ()) -> bool:
    """Whether the code two calls up is no library's: torch asks for modes everywhere, to do the same thing in another way."""
    frame = inspect.currentframe()
    for _ in range(2):
        frame = frame and frame.f_back
    name = str(frame and frame.f_globals.get("__name__"))
    return name.startswith(passing_on) or name.partition(".")[0] not in ("torch", "pege_fx")
