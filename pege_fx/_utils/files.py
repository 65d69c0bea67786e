"""Files that are whole or not there: written beside their place, then moved in. And what is no path, and no file to read."""

import contextlib
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from pege_fx.errors import ExportError, PegeError

if sys.platform != "win32":
    import fcntl

T = TypeVar("T")

_PART = ".part"  # how the names of temporary folders end
_ATTEMPTS = 50  # to read a file that is replaced again and again


def path_of(path: str | os.PathLike[str], error: type[PegeError] = ExportError) -> Path:
    """Return ``path`` as a ``Path``, if it is one that a system may have: no number, no NUL in it.

    Raises:
        ExportError, or the error that is given: for what is no path.

    >>> path_of("model.onnx").suffix
    '.onnx'
    """
    try:
        found = Path(path)
        if b"\0" in os.fsencode(found):
            raise ValueError("it has a NUL character")
    except (TypeError, ValueError) as reason:
        raise error(f"{path!r} is no path ({reason}): give text, or a pathlib.Path.") from reason
    return found


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], error: type[PegeError] = ExportError) -> Iterator[Path]:
    """Yield a temporary path in the same folder; it replaces ``path`` when the block ends, and goes if the block fails.

    Raises:
        ExportError, or the error that is given: if ``path`` is none, or the folder or the file can not be written.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_write(Path(folder) / "a") as temporary:
    ...         _ = temporary.write_text("whole")
    ...     (Path(folder) / "a").read_text()
    'whole'
    """
    target = path_of(path, error)
    try:
        with replacement(target) as temporary:
            yield temporary
    except OSError as reason:
        raise error(f"can not write {path}: {reason.strerror or reason}; nothing was left there.") from reason


def behind_links(path: Path) -> Path:
    """Return what a path leads to in the end; links in a circle stay (``Path.resolve`` raises until Python 3.13)."""
    return Path(os.path.realpath(path))


@contextlib.contextmanager
def replacement(path: Path, keep: Callable[[Path], None] = lambda old: None, mode: int = 0o666) -> Iterator[Path]:
    """Yield a temporary path whose file becomes ``path`` when the block ends: after a crash there is the old one or the new.

    Any number of processes may write the same path at the same time; the last one wins.

    Args:
        path: where the file goes; what a link points to is replaced, not the link.
        keep: called with the old file, if there is one, right before it is replaced.
        mode: who may read and write it, less what the user's umask forbids.

    Raises:
        OSError: if the disk refuses, or something else than a file is there: a device, a pipe, a folder.

    >>> with tempfile.TemporaryDirectory() as folder, replacement(Path(folder) / "a") as temporary:
    ...     _ = temporary.write_text("whole")
    """
    target = behind_links(path)
    if target.is_symlink():
        raise OSError("it is a link that leads to itself")
    if target.is_dir():
        raise IsADirectoryError("it is a folder")
    if target.exists() and not target.is_file():
        raise OSError("it is a device, not a file")
    with scratch(target) as folder:
        temporary = folder / target.name
        yield temporary
        temporary.chmod(mode & ~_umask())  # some writers make files that nobody else may read
        _flush(temporary)
        if target.exists():
            keep(target)
        os.replace(temporary, target)
    with contextlib.suppress(OSError):  # not every system flushes folders, and the file is in place
        _flush(target.parent)


@contextlib.contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """Yield a new folder beside ``target`` for this process and user alone; it is gone when the block ends.

    It is locked as long as the process lives: what a killed one left goes when the next one works on the same target.

    >>> with tempfile.TemporaryDirectory() as place, scratch(Path(place) / "a") as folder:
    ...     folder.is_dir(), folder.parent == Path(place), folder.name.startswith(".a.")
    (True, True, True)
    """
    _remove_abandoned(target)
    folder, handle = _locked_folder(target)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _close(handle)  # last: until here nobody else removes it


def _locked_folder(target: Path) -> tuple[Path, int | None]:
    """Make a folder that nobody else has, and lock it: between the two another process may take it for abandoned.

    That process locks it first and then removes it. So this one waits for the lock: a folder that is still there then stays.
    """
    while True:
        folder = Path(tempfile.mkdtemp(_PART, f".{target.name}.", target.parent))
        handle = _locked(folder, wait=True)
        if folder.exists():
            return folder, handle
        _close(handle)


def _remove_abandoned(target: Path) -> None:
    """Remove what processes left that were killed while they worked on ``target``: the folders that nobody locks."""
    for folder in target.parent.glob(f".{glob.escape(target.name)}.*{_PART}"):
        if (handle := _locked(folder)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            _close(handle)


def _locked(folder: Path, wait: bool = False) -> int | None:
    """Lock a folder until what is returned is closed; None if another process does, or none can (then nothing is removed).

    Args:
        folder: what to lock.
        wait: until another process gives the folder back; it is held only as long as removing one takes.
    """
    if sys.platform == "win32":
        return None
    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        _close(handle)
        return None
    return handle


def _close(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def while_replaced(path: Path, read: Callable[[], T], error: type[PegeError]) -> T:
    """Return what ``read`` returns; it reads again if it fails on a file that was replaced meanwhile.

    safetensors opens a file twice, for its header and for its content: a rename between the two makes one out of two.

    Raises:
        The error that is given: as ``read`` raises it, if the file was the same all the time, or is another one every time.

    >>> while_replaced(Path("no such file"), lambda: 3, PegeError)
    3
    """
    for _ in range(_ATTEMPTS):
        before = _identity(path)
        try:
            return read()
        except error:
            if before == _identity(path):
                raise
    return read()


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def path_to_read(path: str | os.PathLike[str], error: type[PegeError]) -> Path:
    """Return ``path`` as a ``Path``, unless something else than a file is there: reading a pipe or a device may never end.

    Raises:
        The error that is given: for what is no path, a folder, a pipe or a device.

    >>> path_to_read("no such file", PegeError).exists()
    False
    """
    found = path_of(path, error)
    if os.path.exists(found) and not os.path.isfile(found):
        raise error(f"{path} is a folder, a pipe or a device: give a file.")
    return found


def _umask() -> int:
    """What a plain ``open`` would leave out of a new file's mode."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
