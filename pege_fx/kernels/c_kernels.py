"""Fake quantization of CPU tensors in eager mode, by kernels written in C: one call forward, one backward.

``functional`` defines what they compute and chooses them; y and dL/dx_c are the same bit for bit. ``c_kernels.c`` is compiled
when it is first needed, for the processor at hand, in a fraction of a second, and kept in the user's cache. What is kept is
loaded only if nobody else could have written it, and its checksum, in its name, holds.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pege_fx._utils.files import replacement, scratch
from pege_fx.errors import PegeWarning
from pege_fx.kernels.tensor_layout import layout_of

DTYPES = (torch.float32, torch.bfloat16)
_NUMBERS = {"ste": 0, "ewgs": 1, "pege": 2}
ESTIMATORS = frozenset({*_NUMBERS, "pege-relative"})

_SOURCE = Path(__file__).with_name("c_kernels.c")
_FLAGS = ("-O3", "-std=c11", "-shared", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
_MORE_FLAGS = (("-march=native", "-fopenmp"), ("-fopenmp",), ("-march=native",), ())  # the first that work
_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_GRID = (_FLOAT, _FLOAT, _INT, _INT)  # q_min, q_max, threads, is_half

# --- the library ---------------------------------------------------------------------------------------------

TIME_LIMIT = 30.0  # seconds for one run of a compiler: ten times what a busy machine needs

_COMPILING = threading.Lock()


def _unlock() -> None:
    """A forked child is alone: the thread that held the lock, and would have compiled, is not in it."""
    global _COMPILING
    _COMPILING = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)


class _Outcome(NamedTuple):
    kernels: ctypes.CDLL | None
    failed: list[str]  # what the compilers said that could not compile it
    hung: list[str]  # the compilers that did not end


def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None where there is no C compiler that makes them in time."""
    with _COMPILING:
        outcome = _library()
    _warn_of(outcome.hung)
    return outcome.kernels


def _library_or_warning() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None, after one warning where a compiler is there and fails."""
    kernels = library()
    if kernels is None:
        _warn_of(_library().failed)
    return kernels


def _warn_of(reasons: list[str]) -> None:
    if reasons:
        lines = [f"  {reason}" for reason in reasons]
        reasons.clear()  # said once
        text = "\n".join(["the kernels in C could not be compiled as usual:", *lines])
        warnings.warn(
            f"{text}\n  set CC to a compiler that works; another one, or torch.compile, is used.", PegeWarning, stacklevel=4
        )


@functools.cache
def _library() -> _Outcome:
    failed: dict[str, str] = {}
    hung: dict[str, str] = {}
    for command in _commands():
        compiler = command[0]
        if compiler in hung:  # with other flags it would not end, either
            continue
        try:
            return _Outcome(_loaded(command), [], [*hung.values()])
        except subprocess.TimeoutExpired:
            hung[compiler] = f"{compiler} did not end within {TIME_LIMIT:g} s"
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode(errors="replace").strip() or f"status {error.returncode}"
            failed[compiler] = f"{compiler}: {said.splitlines()[0][:200]}"
        except (OSError, AttributeError) as error:  # what it made is no library, or not this one
            failed[compiler] = f"{compiler}: {error}"
    return _Outcome(None, [*failed.values()], [*hung.values()])


def _commands() -> Iterator[list[str]]:
    """The compilers to try, each once, with their flags."""
    paths = (shutil.which(name) for name in (os.environ.get("CC") or "cc", "gcc", "clang"))
    for path in dict.fromkeys(path for path in paths if path):
        yield from ([path, *_FLAGS, *more] for more in _MORE_FLAGS)


def _run(command: list[str]) -> bytes:
    """Run a compiler and return what it printed. It is a group of its own: one that hangs often waits for a child.

    Raises:
        subprocess.TimeoutExpired: if it does not end in time; it is killed.
        subprocess.CalledProcessError: if it fails.
    """
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            out, said = process.communicate(timeout=TIME_LIMIT)
        except BaseException:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, out, said)
    return out


def _loaded(command: list[str]) -> ctypes.CDLL:
    """Load what is kept of the same compiler, source and kind of processor, or compile it."""
    macros = _run([*command, "-dM", "-E", "-x", "c", os.devnull])
    version = hashlib.sha256(b"\0".join([*map(str.encode, command), macros, _SOURCE.read_bytes()])).hexdigest()[:16]
    folder = _cache()
    for path in () if folder is None else sorted(folder.glob(f"kernels-{version}-*.so")):
        with contextlib.suppress(OSError):
            if _is_trusted(path) and _is_whole(path):
                return _with_types(ctypes.CDLL(str(path)))
            path.unlink()
    return _compiled(command, folder, version)


def _compiled(command: list[str], folder: Path | None, version: str) -> ctypes.CDLL:
    """Compile and load; in a folder, keep it there under a name that ends with its checksum."""
    with scratch((folder or Path(tempfile.gettempdir())) / f"pege_fx-{version}") as place:
        part = place / "kernels.so"
        _run([*command, str(_SOURCE), "-o", str(part), "-lm"])
        if folder is None:
            return _with_types(ctypes.CDLL(str(part)))  # a library that is loaded needs its file no more
        kept = folder / f"kernels-{version}-{_checksum(part)}.so"
        with replacement(kept, mode=0o644) as temporary:  # nobody else may write it, whatever the umask
            os.replace(part, temporary)
        return _with_types(ctypes.CDLL(str(kept)))


def _with_types(kernels: ctypes.CDLL) -> ctypes.CDLL:
    kernels.pege_fx_forward.argtypes = (*[_POINTER] * 7, _INT, *[_SIZE] * 3, _INT, *_GRID)
    kernels.pege_fx_forward.restype = None
    kernels.pege_fx_backward.argtypes = (*[_POINTER] * 9, *[_SIZE] * 2, *_GRID, _INT)
    kernels.pege_fx_backward.restype = _INT
    return kernels


@functools.cache
def _cache() -> Path | None:
    """The user's own folder for compiled kernels; None if there is none that can be written, or others may write there."""
    with contextlib.suppress(OSError, RuntimeError):  # a home that is not there, or not writable
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pege_fx"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder if _is_trusted(folder.resolve()) else None
    return None


def _is_trusted(path: Path) -> bool:
    """Tell whether a file or folder is the user's, and nobody else may write it: what is loaded runs with all rights."""
    found = path.lstat()
    return not hasattr(os, "geteuid") or (found.st_uid == os.geteuid() and not found.st_mode & 0o022)


def _is_whole(path: Path) -> bool:
    """Tell whether a kept library is the one that was written: loading one that a crash cut short ends the process."""
    return path.stem.rpartition("-")[2] == _checksum(path)


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


# --- calls ---------------------------------------------------------------------------------------------------


def _float(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.to(torch.float32)


def _address(value: Tensor | None) -> int | None:
    return None if value is None else value.data_ptr()


def forward(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    inverse: Tensor | None,
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
    layout = layout_of(x, (scale, zero_point, inverse), DTYPES, rate, key)
    kernels = None if layout is None else _library_or_warning()
    if layout is None or kernels is None:
        return None
    y = torch.empty_like(x)
    if type(y) is not Tensor:  # under a mode that makes tensors without memory
        return None
    _, per_row, *sizes = layout
    numbers = [_float(value) for value in (scale, zero_point, inverse, rate)]
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
    inverse: Tensor | None,
    strength: Tensor,
    q_min: int,
    q_max: int,
) -> tuple[Tensor, Tensor] | None:
    """Return dL/dx_c and dL/ds; None if the kernels do not serve this. ``estimator``: one of ``ESTIMATORS``."""
    layout = layout_of(x, (scale, zero_point, inverse), DTYPES, grad, y, strength) if strength.ndim == 0 else None
    kernels = None if layout is None else _library_or_warning()
    if layout is None or kernels is None:
        return None
    if estimator == "pege-relative":
        estimator, strength = "pege", strength * grad.abs().mean(dtype=torch.float32)
    grad, y = (t.contiguous(memory_format=layout.memory) for t in (grad, y))
    grad_x, grad_scale = torch.empty_like(x), torch.empty_like(scale, dtype=torch.float32)
    rows = layout.rows if layout.per_row else 1
    numbers = [_float(value) for value in (scale, zero_point, inverse, strength)]
    failed = kernels.pege_fx_backward(
        *map(_address, (grad, x, y, grad_x, grad_scale, *numbers)),
        rows,
        x.numel() // rows,
        q_min,
        q_max,
        torch.get_num_threads(),
        x.dtype is torch.bfloat16,
        _NUMBERS[estimator],
    )
    if failed:
        raise torch.OutOfMemoryError(f"no memory for the sums of a tensor of shape {tuple(x.shape)}.")
    return grad_x, grad_scale.to(scale.dtype)
