"""Compiling a small function locally, so that eager mode runs it as one kernel.

``torch.compile`` of a whole model traces through the same functions; nothing here is active then.
"""

import contextlib
import os
import threading
import types
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from pege_fx.errors import PegeWarning

P = ParamSpec("P")
R = TypeVar("R")

# Below this many elements a kernel saves less than its compilation costs.
SMALLEST = 2**14

# While it traces, fx has patched ``nn.Module`` for all threads, and a compiler traces with fx: two tracers would restore each
# other's patches.
TRACING = threading.RLock()
if hasattr(os, "register_at_fork"):  # or a child, a worker that loads data, could wait for a thread that it does not have
    os.register_at_fork(before=TRACING.acquire, after_in_parent=TRACING.release, after_in_child=TRACING.release)

_enabled = True
_plain = 0  # how many ask for plain operations now, in any thread: autograd runs backward in threads of its own
_counting = threading.Lock()


@contextlib.contextmanager
def eager_kernels() -> Iterator[None]:
    """Run plain torch operations within: nothing is compiled, results are the same to rounding."""
    global _plain
    with _counting:
        _plain += 1
    try:
        yield
    finally:
        with _counting:
            _plain -= 1


def is_traced() -> bool:
    """Tell whether this thread's operations are being compiled; ``torch.compiler.is_compiling`` says so of any thread's."""
    return torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting()


def worth_compiling(x: Tensor) -> bool:
    """Tell whether a kernel may compute on a tensor, and it is large enough for one that has to be compiled for it."""
    # The size last: a compiler that traces this must not find a question about it, or it makes a graph for each answer.
    return _enabled and fits_a_kernel(x) and x.device.type in ("cpu", "cuda") and x.numel() >= SMALLEST


def fits_a_kernel(x: Tensor) -> bool:
    """Tell whether a tensor is a plain one, and nothing else is tracing or differentiating at the moment."""
    return (
        not _plain
        and type(x) in (Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and get_proxy_mode() is None  # make_fx records what plain tensors go through, and sees no kernel
        and (x.is_meta or has_memory(x))
    )


def has_memory(x: Tensor) -> bool:
    """Tell whether a tensor has memory of its own, which those under vmap have not."""
    try:
        x.data_ptr()
    except RuntimeError:
        return False
    return True


def _kind(argument: Any) -> Hashable:
    """What the compiler specialises on: sizes that happen to be equal count as one, and so do small integers."""
    if isinstance(argument, Tensor):
        return argument.ndim, argument.dtype, argument.device.type, len(set(argument.shape))
    kind: Hashable = argument
    return kind


class LocalKernel:
    """A function that is compiled once per variant, with dynamic sizes.

    Dynamo counts recompilations per code object and stops at a few. Each variant (number of dimensions, dtype, bounds
    of the grid, which optional arguments are there) therefore gets a code object of its own.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._variants: dict[Hashable, Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        """Run compiled; the first failure to compile warns, and from then on everything runs as plain operations.

        What fails as plain operations too is no matter of compiling: it is raised, and so is a lack of memory.
        """
        global _enabled
        key = tuple(map(_kind, args))
        try:
            with TRACING:  # every call may compile again
                if (known := self._variants.get(key)) is not None:
                    return known(*args)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the compiler's own remarks are not about the user's model
                    compiled = torch.compile(self._copy(len(self._variants)), dynamic=True, fullgraph=True)
                    result = compiled(*args)
                self._variants[key] = compiled
                return result
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            result = self.function(*args)
            _enabled = False
            warnings.warn(
                f"fake quantization can not be compiled here ({type(error).__name__}: {str(error).splitlines()[0][:200]}).\n"
                "  it runs as plain operations, about twenty times slower; install a C++ compiler (g++), or Triton on a GPU.",
                PegeWarning,
                stacklevel=2,
            )
            return result

    def _copy(self, number: int) -> Callable[..., Any]:
        original: Any = self.function
        code = original.__code__.replace(co_name=f"{original.__name__}_{number}")
        return types.FunctionType(code, original.__globals__, code.co_name, original.__defaults__, original.__closure__)
