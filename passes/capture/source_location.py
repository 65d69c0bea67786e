"""Where things happen while a module is traced: the lines of the model's own code on the stack."""

import functools
import inspect
import itertools
import linecache
import os
import re
import sys
import types

import torch.utils.checkpoint
from torch import nn

import pege_fx
from pege_fx.passes.capture.patching import LocalTracer

_CAPTURE = os.path.dirname(__file__)
_PACKAGE = os.path.dirname(inspect.getfile(pege_fx))
_LIBRARY = (
    f"{sys.modules['torch'].__path__[0]}/",
    "<eval_with_key",  # what torch.fx writes
    "fx_generated_",
    "<frozen ",  # Python's own
    f"{_CAPTURE}/",
    f"{_PACKAGE}/decompositions/",  # torch's, written out
)  # but not "<stdin>", "<string>" or "<ipython-input-1-...>": a user typed those
_CHECKPOINT_FILE = torch.utils.checkpoint.__file__
_LONGEST = 72  # characters of an expression in a message
_TRACE = LocalTracer.trace.__code__  # behind it is who asked for the trace


@functools.cache
def _is_user_code(filename: str) -> bool:
    return not filename.startswith(_LIBRARY)


def here() -> str:
    """Return "file:line" of the model's code that is running."""
    frame = inspect.currentframe()
    while frame is not None and not _is_user_code(frame.f_code.co_filename):
        frame = frame.f_back
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def line() -> str | None:
    """Return the line of the model's code that runs, as a stack trace says it; a node keeps it in copies, but not in pickle."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not _TRACE:
        code = frame.f_code
        if _is_user_code(code.co_filename):
            return f'File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}'
        frame = frame.f_back
    return None


def expression() -> str:
    """Return the expression of the model's code that runs, as its source has it; "" where that is not to be found.

    What asks a tensor in an ``if`` is the condition, what asks it in a call the call.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not _TRACE:
        if _is_user_code(frame.f_code.co_filename):
            return _source(frame.f_code, frame.f_lasti)
        frame = frame.f_back
    return ""


@functools.cache
def _source(code: types.CodeType, instruction: int) -> str:
    first, last, start, end = next(itertools.islice(code.co_positions(), instruction // 2, None))
    lines = linecache.getlines(code.co_filename)
    if None in (first, last, start, end) or first is None or last is None or len(lines) < last:
        return ""
    text = [part.encode() for part in lines[first - 1 : last]]  # columns count bytes
    text[-1] = text[-1][:end]
    text[0] = text[0][start:]
    shown = " ".join(b"".join(text).decode(errors="replace").split())
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 1]}…"


def place_of_line(stack_trace: str) -> str:
    """Return "file:line in function" of what ``line`` has returned."""
    return re.sub(r'File "(.*)", line (\d+), in (.*)', r"\1:\2 in \3", stack_trace)


def called_by_checkpoint() -> bool:
    """Tell whether ``torch.utils.checkpoint`` stands between a module's call and the forward around it."""
    frame, calls = inspect.currentframe(), 0
    while frame is not None and calls < 2:
        if frame.f_code.co_filename == _CHECKPOINT_FILE:
            return True
        calls += frame.f_code.co_name == "module_call_wrapper"
        frame = frame.f_back
    return False


def where_raised(error: BaseException) -> str:
    """Return "file:line in function" of the innermost frame of an error that is a model's own code; "" if there is none."""
    found, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if _is_user_code(code.co_filename):
            found = f"{code.co_filename}:{trace.tb_lineno} in {code.co_qualname}"
        trace = trace.tb_next
    return found


def place_of(root: nn.Module, path: str = "") -> str:
    """Return "file:line in function" of the ``forward`` of a module of ``root``.

    If that is torch's own, it is the innermost around it that is not; "" if there is none.
    """
    while True:
        code = getattr(inspect.unwrap(type(root.get_submodule(path)).forward), "__code__", None)
        if code is not None and _is_user_code(code.co_filename):
            return f"{code.co_filename}:{code.co_firstlineno} in {code.co_qualname}"
        if not path:
            return ""
        path = path.rpartition(".")[0]


def described(module: nn.Module) -> str:
    """Return how a graph's own messages call a module: its class, file and line, but not where that file lies."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    place = "" if code is None else f" ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"
    return f"{type(module).__name__}{place}"
