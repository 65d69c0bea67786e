"""Fake quantization of CPU tensors in eager mode, by kernels written in C: one call forward, one backward.

``functional`` defines what they compute and chooses them; y and dL/dx_c are the same bit for bit. ``c_kernels.c`` is compiled
when it is first needed, for the processor at hand, in a fraction of a second, and kept in the user's cache.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from pege_fx.kernels.tensor_layout import layout_of

DTYPES = (torch.float32, torch.bfloat16)
_ESTIMATORS = {"ste": 0, "ewgs": 1, "pege": 2}

_SOURCE = Path(__file__).with_name("c_kernels.c")
_FLAGS = ("-O3", "-std=c11", "-shared", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
_MORE_FLAGS = (("-march=native", "-fopenmp"), ("-fopenmp",), ("-march=native",), ())  # the first that work
_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_GRID = (_FLOAT, _FLOAT, _INT, _INT)  # q_min, q_max, threads, is_half

# --- the library ---------------------------------------------------------------------------------------------

_COMPILING = threading.Lock()


def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None where there is no C compiler that makes them."""
    with _COMPILING:
        return _library()


@functools.cache
def _library() -> ctypes.CDLL | None:
    for command in _commands():
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            found = ctypes.CDLL(str(_compiled(command)))
            found.pege_fx_forward.argtypes = (*[_POINTER] * 6, _INT, *[_SIZE] * 3, _INT, *_GRID)
            found.pege_fx_forward.restype = None
            found.pege_fx_backward.argtypes = (*[_POINTER] * 8, *[_SIZE] * 2, *_GRID, _INT)
            found.pege_fx_backward.restype = _INT
            return found
    return None


def _commands() -> Iterator[list[str]]:
    """The compilers to try, with their flags."""
    for name in (os.environ.get("CC") or "cc", "gcc", "clang"):
        if path := shutil.which(name):
            yield from ([path, *_FLAGS, *more] for more in _MORE_FLAGS)


def _compiled(command: list[str]) -> Path:
    """Compile, or find what was compiled by the same compiler from the same source for the same kind of processor."""
    macros = subprocess.run([*command, "-dM", "-E", "-x", "c", os.devnull], capture_output=True, check=True).stdout
    version = hashlib.sha256(b"\0".join([*map(str.encode, command), macros, _SOURCE.read_bytes()])).hexdigest()[:16]
    target = _cache() / f"kernels-{version}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            part = Path(folder) / target.name
            subprocess.run([*command, str(_SOURCE), "-o", str(part), "-lm"], capture_output=True, check=True)
            part.replace(target)  # whole or not there: other processes may be looking
    return target


@functools.cache
def _cache() -> Path:
    """A folder for compiled kernels: the user's own, or else one for this process."""
    with contextlib.suppress(OSError, RuntimeError):  # a home that is not there, or not writable
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pege_fx"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    return Path(tempfile.mkdtemp(prefix="pege_fx-"))


# --- calls ---------------------------------------------------------------------------------------------------


def _float(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.to(torch.float32)


def _address(value: Tensor | None) -> int | None:
    return None if value is None else value.data_ptr()


def forward(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    rate: Tensor | None,
    key: Tensor | None,
    q_min: int,
    q_max: int,
) -> Tensor | None:
    """Return y in the memory layout of ``x``; None if the kernels do not serve this."""
    if rate is None or key is None:
        rate = key = None
    elif rate.ndim or key.dtype is not torch.int32 or not key.is_contiguous():
        return None
    layout = layout_of(x, scale, zero_point, DTYPES, rate, key)
    kernels = None if layout is None else library()
    if layout is None or kernels is None:
        return None
    y = torch.empty_like(x)
    if type(y) is not Tensor:  # under a mode that makes tensors without memory
        return None
    _, per_row, *sizes = layout
    numbers = [_float(value) for value in (scale, zero_point, rate)]
    kernels.pege_fx_forward(
        x.data_ptr(),
        y.data_ptr(),
        *map(_address, (*numbers, key)),
        key is not None and key.ndim > 0,
        *sizes,
        per_row,
        q_min,
        q_max,
        torch.get_num_threads(),
        x.dtype is torch.bfloat16,
    )
    return y


def backward(
    estimator: str,
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    strength: Tensor,
    q_min: int,
    q_max: int,
) -> tuple[Tensor, Tensor] | None:
    """Return dL/dx_c and dL/ds; None if the kernels do not serve this. ``estimator``: ste, ewgs, pege or pege-relative."""
    layout = layout_of(x, scale, zero_point, DTYPES, grad, y, strength) if strength.ndim == 0 else None
    kernels = None if layout is None else library()
    if layout is None or kernels is None:
        return None
    if estimator == "pege-relative":
        estimator, strength = "pege", strength * grad.abs().mean(dtype=torch.float32)
    grad, y = (t.contiguous(memory_format=layout.memory) for t in (grad, y))
    grad_x, grad_scale = torch.empty_like(x), torch.empty_like(scale, dtype=torch.float32)
    rows = layout.rows if layout.per_row else 1
    numbers = [_float(value) for value in (scale, zero_point, strength)]
    failed = kernels.pege_fx_backward(
        *map(_address, (grad, x, y, grad_x, grad_scale, *numbers)),
        rows,
        x.numel() // rows,
        q_min,
        q_max,
        torch.get_num_threads(),
        x.dtype is torch.bfloat16,
        _ESTIMATORS[estimator],
    )
    if failed:
        raise torch.OutOfMemoryError(f"no memory for the sums of a tensor of shape {tuple(x.shape)}.")
    return grad_x, grad_scale.to(scale.dtype)
