"""Files that are whole or not there: written beside their place, then moved in. And what is no path, and no file to read."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pege_fx.errors import ExportError, PegeError


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
    target = path_of(path, error).resolve()  # what a link points to is replaced, not the link
    temporary: Path | None = None
    try:
        if target.is_dir():
            raise IsADirectoryError("it is a folder")
        if target.exists() and not target.is_file():
            raise OSError("it is a device, not a file")
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, target)
    except OSError as reason:
        raise error(f"can not write {path}: {reason.strerror or reason}; nothing was left there.") from reason
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


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
    """What a plain ``open`` would leave out of a new file's mode; a temporary file starts private."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
