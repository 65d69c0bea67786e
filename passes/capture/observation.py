"""What a run of the model on the example inputs shows: the calls of its modules, and which Python reaches into from outside."""

import contextlib
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from unittest import mock

from torch import nn

from pege_fx.errors import InputError
from pege_fx.kernels.inductor import TRACING
from pege_fx.modules.calls import takes_hooks
from pege_fx.modules.mode import evaluating, preserve_state
from pege_fx.passes.capture.examples import fresh
from pege_fx.passes.capture.known import Known

Call: TypeAlias = tuple[tuple[Any, ...], Mapping[str, Any]]


@dataclass(frozen=True)
class Observation:
    """What a run of a model showed.

    Attributes:
        calls: with what each module was called, in order.
        opened: modules of which a child, or what they hand on by a ``__getattr__`` of their own, was read while they did not
            run: by the code around them, or by a method other than ``forward``.
        read: the names of parameters and buffers that were read so, by module.
    """

    calls: dict[nn.Module, list[Known]] = field(default_factory=dict)
    opened: set[nn.Module] = field(default_factory=set)
    read: dict[nn.Module, set[str]] = field(default_factory=dict)


NOTHING = Observation()


def observe(root: nn.Module, example: Call, bind: Callable[..., Known]) -> Observation:
    """Run a model once in evaluation and return what was seen; what the run changes in modules is put back.

    Args:
        root: the model.
        example: positional and keyword arguments of a call.
        bind: takes a module, positional and keyword arguments; returns them by name, or raises ``InputError``.
    """
    seen = Observation()
    running: Counter[nn.Module] = Counter()

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running[module] += 1
        with contextlib.suppress(InputError):  # its forward will say so
            seen.calls.setdefault(module, []).append(bind(module, *fresh((args, kwargs), tensors=False)))

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        running[module] -= 1

    args, kwargs = fresh(example)
    with preserve_state(root.modules()), evaluating(root), contextlib.ExitStack() as hooks:
        for module in filter(takes_hooks, root.modules()):
            hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        hooks.enter_context(_reads_from_outside(set(root.modules()), running, seen))
        with contextlib.suppress(Exception):  # the shapes are recorded later, and that says where and why it fails
            root(*args, **kwargs)
    return seen


@contextlib.contextmanager
def _reads_from_outside(modules: set[nn.Module], running: Counter[nn.Module], seen: Observation) -> Iterator[None]:
    """Within, note what is read of these modules while they do not run, and by other code than that of their ``forward``."""
    thread, look_up = threading.get_ident(), nn.Module.__getattr__

    def noting(module: nn.Module, name: str) -> Any:
        if threading.get_ident() == thread and not running[module] and module in modules:
            own_forward = getattr(type(module).forward, "__code__", None)  # called as a function it is a call all the same
            if name in module._parameters or name in module._buffers:
                seen.read.setdefault(module, set()).add(name)
            elif sys._getframe(1).f_code is not own_forward and not name.startswith("__"):
                seen.opened.add(module)  # but for what functools.wraps asks of anything that can be called: ``__name__``
        return look_up(module, name)

    with TRACING, mock.patch.object(nn.Module, "__getattr__", noting):
        yield
