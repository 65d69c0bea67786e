"""Where things happen while a module is traced: the lines of the model's own code on the stack."""

import functools
import inspect
import os
import re
import sys

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
    """Return "file:line in function" of the innermost frame of an error that is a model's own code; else of the innermost."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append((trace.tb_frame.f_code, trace.tb_lineno))
        trace = trace.tb_next
    own = [entry for entry in frames if _is_user_code(entry[0].co_filename)] or frames
    code, number = own[-1]
    return f"{code.co_filename}:{number} in {code.co_qualname}"


def place_of(module: nn.Module) -> str:
    """Return "file:line in function" of a module's ``forward``."""
    code = type(module).forward.__code__
    return f"{code.co_filename}:{code.co_firstlineno} in {code.co_qualname}"


def described(module: nn.Module) -> str:
    """Return how a graph's own messages call a module: its class, file and line, but not where that file lies."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    place = "" if code is None else f" ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"
    return f"{type(module).__name__}{place}"
