"""Files that are whole or not there: written beside their place, then moved in. And what is no file to read."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pege_fx.errors import ExportError, PegeError


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], error: type[PegeError] = ExportError) -> Iterator[Path]:
    """Yield a temporary path in the same folder; it replaces ``path`` when the block ends, and goes if the block fails.

    Raises:
        ExportError, or the error that is given: if the folder or the file can not be written.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_write(Path(folder) / "a") as temporary:
    ...         _ = temporary.write_text("whole")
    ...     (Path(folder) / "a").read_text()
    'whole'
    """
    target = Path(path).resolve()  # what a link points to is replaced, not the link
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


def not_a_file(path: str | os.PathLike[str]) -> bool:
    """Whether something else than a file is there: reading a pipe or a device may never end.

    >>> not_a_file("/"), not_a_file("no such file")
    (True, False)
    """
    return os.path.exists(path) and not os.path.isfile(path)


def _umask() -> int:
    """What a plain ``open`` would leave out of a new file's mode; a temporary file starts private."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
